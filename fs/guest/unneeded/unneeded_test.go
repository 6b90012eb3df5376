package unneeded

import (
	"bytes"
	"os"
	"slices"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
	"github.com/holdfast-backup/holdfast/fs/guest/volume"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// TestFind: nothing that somebody else shows of a file system is in what is not needed, but for the inside of its swap file, whose
// header stays.
func TestFind(t *testing.T) {
	for _, k := range []struct {
		name string
		mkfs []string
		swap string // its path
	}{
		{"ext4", []string{"mkfs.ext4", "-q"}, "swap.img"},
		{"xfs", []string{"mkfs.xfs", "-q"}, "swapfile"},
		{"btrfs", []string{"mkfs.btrfs", "-q", "-m", "single"}, "swapfile"},
		{"ntfs", []string{"mkntfs", "-q", "-F", "-f"}, "pagefile.sys"},
	} {
		t.Run(k.name, func(t *testing.T) {
			guesttest.Needs(t, k.mkfs[0], "mount", "mkswap", "ntfs-3g", "chattr")
			image := guesttest.Sparse(t, 512<<20)
			guesttest.Run(t, append(k.mkfs, image)...)
			mount := func(image, options string) (string, func()) {
				if k.name == "ntfs" {
					return guesttest.MountNTFS(t, image, options)
				}
				return guesttest.Mount(t, image, k.name, options)
			}
			dir, unmount := mount(image, "rw")
			if _, err := guesttest.Fill(dir, guesttest.Tree{Seed: 5, Files: 300, Names: 300, Big: 8 << 20, NoHuge: true}); err != nil {
				t.Fatal(err)
			}
			const size = 24 << 20
			swap(t, dir+"/"+k.swap, size, k.name == "btrfs")
			if err := os.RemoveAll(dir + "/nested"); err != nil {
				t.Fatal(err)
			}
			unmount()

			dev := guesttest.OpenDevice(t, image)
			found := Find([]volume.Disk{{Name: "disk0", Device: dev}}, Options{Swap: true, Free: true, Unit: 4096})
			t.Logf("%+v %q", found.Items, found.Notes)
			i := slices.IndexFunc(found.Items, func(i Item) bool { return i.What == k.swap })
			free := slices.IndexFunc(found.Items, func(i Item) bool { return i.What == "free space" })
			if i < 0 || free < 0 || found.Items[i].Bytes < size-2*swapHeader || found.Items[i].Bytes > size || found.Items[free].Bytes < 64<<20 {
				t.Fatalf("%+v %q", found.Items, found.Notes)
			}

			want := walk(t, mount, image)
			spoiled := guesttest.Copy(t, image)
			spoil(t, spoiled, found)
			got := walk(t, mount, spoiled)
			diffs := guesttest.Diff(want, got)
			if len(diffs) != 1 || !bytes.HasPrefix([]byte(diffs[0]), []byte(k.swap+": sum:")) {
				t.Errorf("what is not needed is seen: %q", diffs)
			}
			dir, unmount = mount(spoiled, "ro")
			defer unmount()
			b, err := os.ReadFile(dir + "/" + k.swap)
			if err != nil || len(b) != size {
				t.Fatal(err)
			}
			if k.name == "ntfs" {
				return // Windows wants nothing of it
			}
			if string(b[4086:4096]) != "SWAPSPACE2" || bytes.Contains(b[:swapHeader], bytes.Repeat([]byte{0xaa}, 512)) {
				t.Error("the header is gone")
			}
		})
	}
}

// swap makes a swap file with something in it.
func swap(t *testing.T, path string, size int, nocow bool) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if nocow {
		guesttest.Run(t, "chattr", "+C", path)
	}
	if _, err := f.Write(bytes.Repeat([]byte("swapped "), size/8)); err != nil {
		t.Fatal(err)
	}
	guesttest.Run(t, "mkswap", path)
}

func walk(t *testing.T, mount func(image, options string) (string, func()), image string) []guesttest.Line {
	t.Helper()
	dir, unmount := mount(image, "ro,noatime")
	defer unmount()
	lines, err := guesttest.Walk(dir)
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

// spoil overwrites what is not needed.
func spoil(t *testing.T, image string, found *Found) {
	t.Helper()
	f, err := os.OpenFile(image, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	junk := bytes.Repeat([]byte{0xaa}, 1<<20)
	for e := range found.Ranges(0) {
		for !e.Empty() {
			n := min(e.Len, int64(len(junk)))
			if _, err := f.WriteAt(junk[:n], e.Off); err != nil {
				t.Fatal(err)
			}
			e = extent.Extent{Off: e.Off + n, Len: e.Len - n}
		}
	}
}
