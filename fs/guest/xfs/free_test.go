package xfs

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// gather collects ranges.
func gather(t *testing.T, seq func(func(extent.Extent, error) bool)) []extent.Extent {
	t.Helper()
	var out []extent.Extent
	for e, err := range seq {
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, e)
	}
	return extent.Normalise(out)
}

// TestFree compares the free space with what the kernel says (GETFSMAP), file by file with where it says they lie (BMAP).
func TestFree(t *testing.T) {
	guesttest.Needs(t, "xfs_io", "xfs_bmap")
	for _, v := range []variant{
		{"default", nil, 1 << 30, small},
		{"1 KiB blocks", []string{"-b", "size=1024", "-m", "rmapbt=1"}, 1 << 30, small},
	} {
		t.Run(strings.ReplaceAll(v.name, " ", "-"), func(t *testing.T) {
			t.Parallel()
			image := v.make(t)
			fs := open(t, image, guest.Options{})
			dir, unmount := guesttest.Mount(t, guesttest.Copy(t, image), "xfs", "ro")
			defer unmount()
			var want []extent.Extent
			for line := range strings.Lines(guesttest.Run(t, "xfs_io", "-r", "-c", "fsmap", dir)) {
				var n, major, minor int
				var from, to int64
				if _, err := fmt.Sscanf(line, " %d: %d:%d [%d..%d]: free space", &n, &major, &minor, &from, &to); err == nil && strings.Contains(line, ": free space") {
					want = append(want, extent.Extent{Off: from * 512, Len: (to + 1 - from) * 512})
				}
			}
			last := int64(0)
			for e := range fs.Free() {
				if e.Off < last {
					t.Errorf("%v after %d", e, last)
				}
				last = e.End()
			}
			if got := gather(t, fs.Free()); len(got) < 10 || !slices.Equal(got, extent.Normalise(want)) {
				t.Errorf("%d free ranges, the kernel has %d:\n%v\n%v", len(got), len(want), got, extent.Normalise(want))
			}
			located(t, fs, dir)
		})
	}
}

func located(t *testing.T, fs *FS, dir string) {
	t.Helper()
	for _, p := range []string{"big/large", "sparse/600 extents", "fragmented/0", "allocated/unwritten", "allocated/punched", "big/size 0", "big/size 1"} {
		var want []extent.Extent
		for line := range strings.Lines(guesttest.Run(t, "xfs_bmap", dir+"/"+p)) {
			var n int
			var a, b, from, to int64
			if k, _ := fmt.Sscanf(line, " %d: [%d..%d]: %d..%d", &n, &a, &b, &from, &to); k == 5 {
				want = append(want, extent.Extent{Off: from * 512, Len: (to + 1 - from) * 512})
			}
		}
		ino, err := guesttest.Find(fs, p)
		if err != nil {
			t.Fatal(err)
		}
		if got := gather(t, fs.Locate(ino)); !slices.Equal(got, extent.Normalise(want)) || len(got) == 0 && p != "big/size 0" {
			t.Errorf("%s: at %v, the kernel says %v", p, got, want)
		}
	}
}

// TestFreeOfDirty leaves out what is free, as a backup does, from a disk whose log is to be replayed: the kernel must show the same of it.
func TestFreeOfDirty(t *testing.T) {
	guesttest.Needs(t, "xfs_repair")
	v := variant{"dirty", []string{"-l", "size=5m", "-b", "size=1024"}, 600 << 20, tiny}
	image := v.make(t)
	dir, unmount := guesttest.Mount(t, image, "xfs", "rw")
	defer unmount()
	c := &churn{t: t, dir: dir + "/churn", rng: rand.New(rand.NewPCG(3, 2))}
	c.run(200)
	image = guesttest.Copy(t, image)
	want := guesttest.Truth(t, image, "xfs", "nouuid")
	fs := open(t, image, guest.Options{})
	free := gather(t, fs.Free())
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	total := int64(0)
	for _, e := range free {
		total += e.Len
		if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, e.Off, e.Len); err != nil {
			t.Fatal(err)
		}
		for _, off := range []int64{e.Off, e.End() - 512} {
			if _, err := f.WriteAt([]byte(strings.Repeat("free", 128)), off); err != nil {
				t.Fatal(err)
			}
		}
	}
	if total < 300<<20 {
		t.Errorf("only %d bytes are free", total)
	}
	guesttest.SameFS(t, want, fs)
	guesttest.Same(t, want, guesttest.Truth(t, image, "xfs", "nouuid"))
	_, off := guesttest.Mount(t, image, "xfs", "nouuid")
	off()
	guesttest.Run(t, "xfs_repair", "-n", image)
}

// TestShared reads files that share blocks. Where they lie is not told.
func TestShared(t *testing.T) {
	v := variant{"shared", nil, 600 << 20, tiny}
	image := v.empty(t)
	dir, unmount := guesttest.Mount(t, image, "xfs", "rw")
	c := &churn{t: t, dir: dir + "/churn", rng: rand.New(rand.NewPCG(4, 2))}
	c.run(100)
	for range 20 {
		c.fragment()
		c.share()
	}
	unmount()
	fs := open(t, image, guest.Options{})
	guesttest.SameFS(t, guesttest.Truth(t, image, "xfs", "nouuid"), fs)
	refused := 0
	for n := range 6 {
		ino, err := guesttest.Find(fs, fmt.Sprint("churn/shared ", n))
		if err != nil {
			continue
		}
		for _, err := range fs.Locate(ino) {
			if err != nil {
				refused++
			}
		}
	}
	if refused == 0 {
		t.Error("no file was refused to be located")
	}
}
