package btrfs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// subvolumes makes an image with nested subvolumes, snapshots, shared extents and a default subvolume.
func subvolumes(t *testing.T) string {
	t.Helper()
	guesttest.Needs(t, "mkfs.btrfs", "btrfs", "mount")
	image := guesttest.Sparse(t, 1<<30)
	guesttest.Run(t, "mkfs.btrfs", "-q", "-L", "a label", image)
	dir, unmount := guesttest.Mount(t, image, "btrfs", "rw,nobarrier")
	for _, s := range []string{
		"btrfs subvolume create a", "btrfs subvolume create a/nested", "mkdir a/dir", "btrfs subvolume create a/dir/deep", "chown 5:6 a/dir", "chmod 751 a/dir",
		"echo top > top", "echo nested > a/nested/file", "echo deep > a/dir/deep/file",
		"dd if=/dev/urandom of=a/data bs=4096 count=300 status=none", "touch -d 2001-02-03 a/dir a",
		"btrfs subvolume snapshot -r a ro", "btrfs subvolume snapshot a rw", "echo changed >> rw/data", "rm rw/nested -r", "echo new > rw/new",
		"cp --reflink=always a/data top-reflink", "cp --reflink=always a/data a/dir/reflink", "dd if=/dev/urandom of=a/data bs=4096 seek=10 count=5 conv=notrunc status=none",
		"btrfs subvolume create gone", "echo x > gone/x", "btrfs subvolume delete gone", "btrfs subvolume create moved", "mv moved a/renamed",
		"btrfs subvolume set-default a", "btrfs subvolume snapshot ro a/snapshot of ro",
	} {
		args := strings.Fields(s)
		if strings.ContainsAny(s, ">") || strings.HasSuffix(s, "of ro") {
			s = strings.Replace(s, "a/snapshot of ro", "'a/snapshot of ro'", 1)
			args = []string{"sh", "-c", s}
		}
		guesttest.Run(t, append([]string{"env", "-C", dir}, args...)...)
	}
	unmount()
	return image
}

func TestSubvolumes(t *testing.T) {
	image := subvolumes(t)
	fs := open(t, image, guest.Options{})
	want := truth(t, image)
	got, err := guesttest.WalkFS(fs)
	if err != nil {
		t.Fatal(err)
	}
	// The kernel makes up the times of the empty folders when it is asked, and their inode is always 2.
	n := 0
	for _, list := range [][]guesttest.Line{want, got} {
		for _, l := range list {
			if l.Fields["btime"] == "" {
				delete(l.Fields, "mtime")
				delete(l.Fields, "ctime")
				delete(l.Fields, "id")
				n++
			}
		}
	}
	if n != 2*5 {
		t.Errorf("%d empty folders", n)
	}
	guesttest.Same(t, want, got)
	if i := fs.Info(); i.Label != "a label" || len(i.Warnings) > 0 {
		t.Errorf("%+v", i)
	}
	ino, err := fs.Default()
	a, err2 := fs.Lookup(fs.Root(), "a")
	if err != nil || err2 != nil || ino != a || ino == fs.Root() {
		t.Errorf("the default subvolume: %x, %v; a: %x, %v", ino, err, a, err2)
	}
	for _, l := range want {
		if _, err := guesttest.Find(fs, l.Path); err != nil {
			t.Error(err)
		}
	}
	if _, err := guesttest.Find(fs, "ro/nested/file"); !errors.Is(err, guest.ErrNotExist) {
		t.Error("a snapshot's empty folder: ", err)
	}
}

// disks makes n loop devices of images.
func disks(t *testing.T, n int) (images, devices []string) {
	t.Helper()
	for range n {
		image := guesttest.Sparse(t, 512<<20)
		dev := strings.TrimSpace(guesttest.Run(t, "losetup", "-f", "--show", image))
		t.Cleanup(func() { guesttest.Run(t, "losetup", "-d", dev) })
		images, devices = append(images, image), append(devices, dev)
	}
	return images, devices
}

// mountAll mounts a file system of several devices.
func mountAll(t *testing.T, devices []string, options string) (dir string, unmount func()) {
	t.Helper()
	dir = t.TempDir()
	for _, d := range devices {
		options += ",device=" + d
	}
	guesttest.Run(t, "mount", "-t", "btrfs", "-o", options, devices[0], dir)
	mounted := true
	unmount = func() {
		t.Helper()
		if mounted {
			mounted = false
			guesttest.Run(t, "umount", dir)
		}
	}
	t.Cleanup(unmount)
	return dir, unmount
}

func openAll(t *testing.T, images []string) (*FS, error) {
	t.Helper()
	var devs []guest.Device
	for _, image := range images {
		devs = append(devs, guesttest.OpenDevice(t, image))
	}
	return OpenAll(devs, guest.Options{})
}

// profileTests are how data and metadata are spread, and whether a device may be missing.
var profileTests = []struct {
	data, metadata string
	devices        int
	redundant      bool
}{
	{"raid0", "raid1", 2, false},
	{"raid1", "raid1", 2, true},
	{"raid10", "raid10", 4, true},
	{"raid1c3", "raid1c4", 4, true},
	{"raid0", "raid1c3", 3, false},
	{"single", "dup", 2, false},
	{"raid5", "raid1", 3, false},
	{"raid6", "raid6", 4, false},
}

func TestProfiles(t *testing.T) {
	guesttest.Needs(t, "mkfs.btrfs", "losetup", "mount")
	for i, test := range profileTests {
		if testing.Short() && i%4 != 1 {
			continue
		}
		t.Run(test.data+" "+test.metadata, func(t *testing.T) {
			images, devices := disks(t, test.devices)
			guesttest.Run(t, append([]string{"mkfs.btrfs", "-q", "-d", test.data, "-m", test.metadata}, devices...)...)
			dir, unmount := mountAll(t, devices, "rw,nobarrier")
			if _, err := guesttest.Fill(dir, guesttest.Tree{Seed: 1, Files: 50, Names: 50, Big: 9 << 20}); err != nil {
				t.Fatal(err)
			}
			unmount()
			dir, unmount = mountAll(t, devices, "ro,noatime")
			want, err := guesttest.Walk(dir)
			if err != nil {
				t.Fatal(err)
			}
			unmount()
			fs, err := openAll(t, images)
			if err != nil {
				t.Fatal(err)
			}
			guesttest.SameFS(t, want, fs)
			if i := fs.Info(); len(i.Warnings) > 0 {
				t.Errorf("%+v", i)
			}
			for _, i := range []int{0, len(images) - 1} {
				fs, err := openAll(t, append(append([]string{}, images[:i]...), images[i+1:]...))
				if err == nil && len(fs.Info().Warnings) == 0 {
					t.Error("no warning of a missing device")
				}
				if !test.redundant && err == nil {
					got, err := guesttest.WalkFS(fs)
					if err == nil && len(guesttest.Diff(want, got)) == 0 {
						t.Error("nothing is missing without device ", i+1)
					}
					for _, l := range got {
						if e := l.Fields["error"]; e == "" && l.Fields["type"] == "" {
							t.Error(l)
						}
					}
				}
				if !test.redundant {
					continue
				}
				if err != nil {
					t.Fatal(err)
				}
				guesttest.SameFS(t, want, fs)
			}
			scratch(t, images[0])
			if fs, err = openAll(t, images); err != nil && test.redundant {
				t.Fatal(err)
			}
			if test.redundant {
				guesttest.SameFS(t, want, fs)
			}
		})
	}
}

// scratch overwrites the most of a device that is behind its first superblock.
func scratch(t *testing.T, image string) {
	t.Helper()
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	junk := bytes.Repeat([]byte("junk"), 1<<18)
	for off := int64(1 << 20); off < 512<<20; off += int64(len(junk)) {
		if _, err := f.WriteAt(junk, off); err != nil {
			t.Fatal(err)
		}
	}
}

func TestMember(t *testing.T) {
	guesttest.Needs(t, "mkfs.btrfs", "losetup")
	images, devices := disks(t, 2)
	guesttest.Run(t, append([]string{"mkfs.btrfs", "-q", "-U", "01234567-89ab-4def-8123-456789abcdef"}, devices...)...)
	for i, image := range images {
		fsid, devid, ok := Member(guesttest.OpenDevice(t, image))
		if fsid != "01234567-89ab-4def-8123-456789abcdef" || devid != fmt.Sprint(i+1) || !ok {
			t.Error(fsid, devid, ok)
		}
	}
	if _, _, ok := Member(guesttest.OpenDevice(t, guesttest.Sparse(t, 1<<20))); ok {
		t.Error("zeros are a member")
	}
	if _, err := Open(guesttest.OpenDevice(t, guesttest.Sparse(t, 1<<20)), guest.Options{}); !errors.Is(err, guest.ErrUnknown) {
		t.Error(err)
	}
	if _, err := openAll(t, []string{images[0], images[0]}); err == nil {
		t.Error("a device twice")
	}
}

// TestMirrors damages the first superblock, then one copy of everything, then both.
func TestMirrors(t *testing.T) {
	v := variant{mkfs: []string{"-m", "dup", "-d", "dup"}, tree: guesttest.Tree{Seed: 1, Files: 100, Names: 100, Big: 1 << 20, NoHuge: true}}
	image := v.make(t)
	want := truth(t, image)
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{1}, 64<<10+200); err != nil {
		t.Fatal(err)
	}
	fs := open(t, image, guest.Options{})
	guesttest.SameFS(t, want, fs)
	if w := fs.Info().Warnings; len(w) != 1 {
		t.Error(w)
	}
	ino, err := guesttest.Find(fs, "big/large")
	if err != nil {
		t.Fatal(err)
	}
	n, err := fs.inode(ino)
	if err != nil {
		t.Fatal(err)
	}
	e, err := (&file{fs, n}).find(8192)
	if err != nil {
		t.Fatal(err)
	}
	at := e.disk + e.in + 8192 - e.off
	for copy := range 2 {
		c, err := fs.vol.find(at)
		if err != nil {
			t.Fatal(err)
		}
		_, phys, _ := c.at(at-c.logical, copy)
		if _, err := f.WriteAt([]byte("damage"), phys+100); err != nil {
			t.Fatal(err)
		}
		r, err := fs.Open(ino)
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.ReadAll(io.NewSectionReader(r, 0, r.Size()))
		if copy == 0 && err != nil || copy == 1 && !errors.Is(err, guest.ErrDamaged) {
			t.Errorf("with %d copies damaged: %v", copy+1, err)
		}
	}
}
