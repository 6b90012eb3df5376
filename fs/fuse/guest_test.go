package fuse_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/backup/imagefile"
	"github.com/holdfast-backup/holdfast/fs"
	"github.com/holdfast-backup/holdfast/fs/fuse"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
)

// TestGuestFiles has rsync compare what the mount shows of a guest's file system with the kernel's own mount of it: contents, modes,
// owners, times, hard links, devices, attributes and ACLs. rsync is another process: this one answers.
func TestGuestFiles(t *testing.T) {
	guesttest.Needs(t, "mkfs.ext4", "mount", "rsync", "fusermount3")
	image := guesttest.Sparse(t, 1<<30)
	guesttest.Run(t, "mkfs.ext4", "-q", "-O", "ea_inode", image)
	dir, unmount := guesttest.Mount(t, image, "ext4", "rw")
	if _, err := guesttest.Fill(dir, guesttest.Tree{Seed: 9, Files: 400, Big: 8 << 20, Names: 500}); err != nil {
		t.Fatal(err)
	}
	unmount()
	dir, _ = guesttest.Mount(t, image, "ext4", "ro,noatime")

	shown := mounted(t, image) + "/disk0/"
	for _, args := range [][]string{
		{"-aHAXn", "--delete", "--exclude=/lost+found"},
		{"-anc", "--exclude=/sparse", "--exclude=/lost+found"},
	} {
		cmd := append(append([]string{"rsync"}, args...), "--itemize-changes", dir+"/", shown)
		if diff := guesttest.Run(t, cmd...); diff != "" {
			t.Errorf("%v sees:\n%.3000s", args, diff)
		}
	}
	guesttest.Run(t, "find", shown, "-name", "level 49")
	guesttest.Run(t, "du", "-s", shown)
	guesttest.Run(t, "ls", "-laR", shown)
	seekDirectory(t, shown+"many")
}

// seekDirectory lists a directory, and again from each place that the first listing named.
func seekDirectory(t *testing.T, dir string) {
	t.Helper()
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	type entry struct {
		name string
		next int64
	}
	list := func(from int64, size int) (all []entry) {
		if _, err := unix.Seek(fd, from, unix.SEEK_SET); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, size)
		for {
			n, err := unix.Getdents(fd, buf)
			if err != nil {
				t.Fatal(err)
			}
			if n == 0 {
				return all
			}
			for b := buf[:n]; len(b) > 0; b = b[binary.NativeEndian.Uint16(b[16:]):] { // struct linux_dirent64, getdents(2)
				name, _, _ := bytes.Cut(b[19:], []byte{0})
				all = append(all, entry{string(name), int64(binary.NativeEndian.Uint64(b[8:]))})
			}
		}
	}
	whole := list(0, 1<<20)
	if len(whole) < 400 {
		t.Fatalf("%s has %d entries", dir, len(whole))
	}
	for i := 0; i < len(whole); i += 37 {
		if rest := list(whole[i].next, 600); !slices.Equal(rest, whole[i+1:]) {
			t.Errorf("behind entry %d: %d entries, want %d", i, len(rest), len(whole)-i-1)
		}
	}
}

// mounted backs disks up, mounts the repository, and gives the directory of the guest's files.
func mounted(t *testing.T, images ...string) string {
	t.Helper()
	key := func() ([]byte, error) { return []byte("x"), nil }
	b := bucket.NewMemory()
	if err := store.Init(t.Context(), b, store.InitOptions{Passphrase: []byte("x")}, time.Now()); err != nil {
		t.Fatal(err)
	}
	r, err := store.Open(t.Context(), b, store.MemoryIndex(), store.OpenOptions{Passphrase: key})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	snap, err := imagefile.New(imagefile.VM{Name: "vm", Files: images}).Freeze(t.Context(), "vm")
	if err != nil {
		t.Fatal(err)
	}
	defer snap.Close()
	if _, err := backup.Run(t.Context(), r, snap, backup.Options{}); err != nil {
		t.Fatal(err)
	}
	at := t.TempDir()
	s, err := fuse.Mount(at, fs.New(r), fuse.Options{Log: func(text string) { t.Error(text) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Unmount(true) })
	neverPoll(t, at+"/vm/latest/point.json")
	return at + "/vm/latest/files"
}

// neverPoll lets the kernel find out that files of the mount cannot be polled. Go's os.Open asks for it, in a call of the runtime's that it does not
// count as one: a garbage collection that begins meanwhile waits for the call, which waits for the mount of the same process.
func neverPoll(t *testing.T, file string) {
	t.Helper()
	fd, err := unix.Open(file, unix.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0); err != nil {
		t.Fatal(err)
	}
}

// TestDriveLetters: the mount shows the volumes of a Windows by their letters and folders, one of them at two places.
func TestDriveLetters(t *testing.T) {
	guesttest.Needs(t, "fusermount3", "find")
	devices := append(guesttest.WindowsDevices(t), guesttest.HiveValue{Name: `\DosDevices\Z:`, Data: guesttest.GPTDevice(t, guesttest.WindowsFolderGUID)})
	first, second := guesttest.Windows(t, "Windows/System32/config/SYSTEM", devices)
	files := mounted(t, first, second)
	for path, want := range map[string]string{
		"root/C/Users/me/file": "on C", "root/D/data/file": "on D", "root/L/logical": "on L",
		"root/Z/deep/file": "in a folder", "root/C/mnt/folder/deep/file": "in a folder", "disk0/p2/Users/me/file": "on C",
	} {
		if got, err := os.ReadFile(files + "/" + path); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", path, got, err)
		}
	}
	found := guesttest.Run(t, "find", files+"/root", "-name", "file", "-type", "f", "-printf", "%P\n")
	list := strings.Fields(found)
	slices.Sort(list)
	if want := []string{"C/Users/me/file", "C/mnt/folder/deep/file", "D/data/file", "D/self/Users/me/file", "D/self/mnt/folder/deep/file", "Z/deep/file"}; !slices.Equal(list, want) {
		t.Errorf("find: %q", list)
	}
	if got := guesttest.Run(t, "ls", "-F", files+"/root"); got != "C/\nD/\nL/\nZ/\n" {
		t.Errorf("ls: %q", got)
	}
	guesttest.Run(t, "ls", "-laR", files)
	text, err := os.ReadFile(files + "/volumes.json")
	for _, want := range []string{`"root/C"`, `"root/D"`, `"root/Z"`, `"root/…"`, "root: G: the partition 1048576 bytes from the start of the disk 11223344 is not among the volumes"} {
		if err != nil || !strings.Contains(string(text), want) {
			t.Errorf("volumes.json: no %s: %v\n%s", want, err, text)
		}
	}
}

// TestGoldens: what Linux showed of small FAT and exFAT volumes when they were made is what the mount shows.
func TestGoldens(t *testing.T) {
	guesttest.Needs(t, "fusermount3")
	found, err := filepath.Glob("../guest/*fat/testdata/*.img.gz")
	if err != nil || len(found) < 5 {
		t.Fatal(found, err)
	}
	for _, name := range found {
		t.Run(name, func(t *testing.T) {
			disk, err := guesttest.Unzip(name)
			if err != nil {
				t.Fatal(err)
			}
			text, err := guesttest.Unzip(strings.TrimSuffix(name, ".img.gz") + ".json.gz")
			if err != nil {
				t.Fatal(err)
			}
			var want []guesttest.Line
			if err := json.Unmarshal(text, &want); err != nil {
				t.Fatal(err)
			}
			got, err := guesttest.Walk(mounted(t, guesttest.Saved(t, disk)) + "/disk0")
			if err != nil {
				t.Fatal(err)
			}
			for _, l := range append(want, got...) { // those of the root Linux makes up
				if l.Path == "" {
					l.Fields["mtime"], l.Fields["atime"], l.Fields["ctime"], l.Fields["btime"] = "", "", "", ""
				}
			}
			guesttest.Same(t, want, got)
		})
	}
}
