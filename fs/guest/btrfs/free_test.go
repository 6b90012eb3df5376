package btrfs

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"os"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// junk overwrites ranges of an image.
func junk(t *testing.T, image string, list []extent.Extent) {
	t.Helper()
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := bytes.Repeat([]byte("junk"), 1<<18)
	for _, e := range list {
		for e.Len > 0 {
			n := min(e.Len, int64(len(b)))
			if _, err := f.WriteAt(b[:n], e.Off); err != nil {
				t.Fatal(err)
			}
			e.Off, e.Len = e.Off+n, e.Len-n
		}
	}
}

func freeOf(t *testing.T, fs *FS) []extent.Extent {
	t.Helper()
	var list []extent.Extent
	last := int64(0)
	for e, err := range fs.Free() {
		if err != nil {
			t.Fatal(err)
		}
		if e.Off < last || e.Len <= 0 {
			t.Fatal(e)
		}
		last = e.End()
		list = append(list, e)
	}
	return list
}

// TestFree overwrites all that is free: neither the kernel nor btrfs check may mind, before and after a log's replay.
func TestFree(t *testing.T) {
	guesttest.Needs(t, "mkfs.btrfs", "btrfs", "mount")
	for _, mkfs := range [][]string{nil, {"-M", "-m", "single", "-d", "single", "-R", "^free-space-tree"}} {
		image := guesttest.Sparse(t, 200<<20)
		guesttest.Run(t, append(append([]string{"mkfs.btrfs", "-q"}, mkfs...), image)...)
		dir, unmount := guesttest.Mount(t, image, "btrfs", "rw,nobarrier,commit=1000")
		if _, err := guesttest.Fill(dir, guesttest.Tree{Seed: 1, Files: 300, Names: 300, Big: 6 << 20, NoHuge: true}); err != nil {
			t.Fatal(err)
		}
		if err := cmp.Or(os.WriteFile(dir+"/logged", bytes.Repeat([]byte("logged"), 300000), 0o600), fsync(dir+"/logged")); err != nil {
			t.Fatal(err)
		}
		dirty := guesttest.Copy(t, image)
		unmount()
		for i, image := range []string{image, dirty} {
			fs := open(t, image, guest.Options{})
			if fs.Info().Replayed != (i == 1) {
				t.Errorf("%+v", fs.Info())
			}
			want := truth(t, image)
			list := freeOf(t, fs)
			if n := extent.Total(list); n < 60<<20 {
				t.Errorf("%v: only %d bytes are free", mkfs, n)
			}
			junk(t, image, list)
			got := truth(t, image)
			guesttest.Same(t, want, got)
			guesttest.SameFS(t, want, open(t, image, guest.Options{}))
			if i == 0 {
				guesttest.Run(t, "btrfs", "check", "--check-data-csum", image)
			}
		}
		for _, err := range open(t, dirty, guest.Options{NoReplay: true}).Free() {
			if err == nil {
				t.Error("free space without the log")
			}
		}
	}
}

// TestLocate compares what lies where a swap file is said to be with its content.
func TestLocate(t *testing.T) {
	guesttest.Needs(t, "mkfs.btrfs", "btrfs", "mount", "chattr")
	image := guesttest.Sparse(t, 300<<20)
	guesttest.Run(t, "mkfs.btrfs", "-q", image)
	dir, unmount := guesttest.Mount(t, image, "btrfs", "rw,nobarrier")
	for _, args := range [][]string{
		{"touch", dir + "/swap", dir + "/shared"}, {"chattr", "+C", dir + "/swap", dir + "/shared"},
		{"btrfs", "subvolume", "create", dir + "/s"}, {"touch", dir + "/s/old"}, {"chattr", "+C", dir + "/s/old"},
		{"dd", "if=/dev/urandom", "of=" + dir + "/swap", "bs=1M", "count=9"}, {"dd", "if=/dev/urandom", "of=" + dir + "/shared", "bs=1M", "count=1"},
		{"dd", "if=/dev/urandom", "of=" + dir + "/s/old", "bs=1M", "count=1"}, {"dd", "if=/dev/urandom", "of=" + dir + "/cow", "bs=1M", "count=1"},
		{"cp", "--reflink=always", dir + "/shared", dir + "/sharer"}, {"btrfs", "subvolume", "snapshot", dir + "/s", dir + "/snapshot"},
	} {
		if args[0] == "cp" {
			guesttest.Run(t, "sh", "-c", "touch "+dir+"/sharer && chattr +C "+dir+"/sharer")
		}
		guesttest.Run(t, args...)
	}
	content, err := os.ReadFile(dir + "/swap")
	if err != nil {
		t.Fatal(err)
	}
	unmount()
	fs := open(t, image, guest.Options{})
	h, total := sha256.New(), int64(0)
	ino, err := guesttest.Find(fs, "swap")
	if err != nil {
		t.Fatal(err)
	}
	for e, err := range fs.Locate(ino) {
		b := make([]byte, e.Len)
		if err == nil {
			err = guest.ReadFull(guesttest.OpenDevice(t, image), b, e.Off)
		}
		if err != nil {
			t.Fatal(err)
		}
		h.Write(b)
		total += e.Len
	}
	if want := sha256.Sum256(content); total != int64(len(content)) || !bytes.Equal(h.Sum(nil), want[:]) {
		t.Errorf("%d bytes of %d", total, len(content))
	}
	for _, p := range []string{"shared", "sharer", "s/old", "snapshot/old", "cow"} {
		ino, err := guesttest.Find(fs, p)
		if err != nil {
			t.Fatal(err)
		}
		for e, err := range fs.Locate(ino) {
			if err == nil || p == "cow" && e.Len > 0 {
				t.Error(p, e, err)
			}
		}
	}
}
