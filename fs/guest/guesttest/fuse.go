package guesttest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// MountNTFS mounts an image by ntfs-3g. The end of the test unmounts it, unless that has been done; what was written is then in the image.
func MountNTFS(t testing.TB, image, options string) (dir string, unmount func()) {
	t.Helper()
	dir = t.TempDir()
	// A file, since a pipe would be waited for until its last heir ends.
	out, err := os.Create(t.TempDir() + "/log")
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	before := device(t, dir)
	cmd := exec.Command("ntfs-3g", "-o", "no_detach,"+options, image, dir)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	fail := func(err error) {
		t.Helper()
		text, _ := os.ReadFile(out.Name())
		t.Fatalf("ntfs-3g: %v\n%s", err, text)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	mounted := true
	unmount = func() {
		t.Helper()
		if !mounted {
			return
		}
		mounted = false
		if text, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Fatalf("umount: %v\n%s", err, text)
		}
		// It writes after the kernel let go.
		select {
		case err := <-ended:
			if err != nil {
				fail(err)
			}
		case <-time.After(time.Minute):
			fail(errors.New("does not end"))
		}
	}
	for device(t, dir) == before {
		select {
		case err := <-ended:
			fail(fmt.Errorf("ended early: %v", err))
		case <-time.After(10 * time.Millisecond):
		}
	}
	t.Cleanup(unmount)
	return dir, unmount
}

// device is the number of the device that a directory is on, which a mount changes.
func device(t testing.TB, dir string) uint64 {
	t.Helper()
	fi, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Sys().(*syscall.Stat_t).Dev
}

// hidden are the attributes that ntfs-3g has and does not list, the last as far as Fill sets them.
var hidden = []string{"security.capability", "security.selinux", "trusted.overlay.opaque", "system.ntfs_acl", "system.ntfs_attrib", "system.ntfs_dos_name", "system.ntfs_ea", "system.ntfs_object_id", "system.ntfs_reparse_data", "system.ntfs_times"}

// TruthNTFS walks a copy of an image as ntfs-3g shows it, with the attributes that it does not list, and the times of birth that are among them.
func TruthNTFS(t *testing.T, image, options string) []Line {
	t.Helper()
	dir, unmount := MountNTFS(t, Copy(t, image), "ro,noatime,"+options)
	defer unmount()
	want, err := Walk(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range want {
		if err := addHidden(dir+"/"+l.Path, l.Fields); err != nil {
			t.Fatalf("%s: %v", Quote(l.Path), err)
		}
	}
	return want
}

func addHidden(full string, fields map[string]string) error {
	list, err := kernelXattrs(full)
	if err != nil {
		return err
	}
	value := make([]byte, 64<<10)
	for _, name := range hidden {
		n, err := unix.Lgetxattr(full, name, value)
		// The root has no name, and so says EPERM.
		if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EPERM) && name == "system.ntfs_dos_name" {
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		list = append(list, guest.Xattr{Name: name, Value: slices.Clone(value[:n])})
	}
	fields["xattrs"] = xattrText(list)
	// Born, changed, read and the record changed, each in 100 ns since 1601. ntfs-3g divides towards zero, and so has 0 ns for those before 1970.
	n, err := unix.Lgetxattr(full, "system.ntfs_times", value)
	if err != nil || n != 32 {
		return fmt.Errorf("%d bytes of system.ntfs_times: %w", n, err)
	}
	for i, name := range []string{"btime", "mtime", "atime", "ctime"} {
		t := int64(binary.LittleEndian.Uint64(value[8*i:]))
		if name == "btime" || t < epoch1970 {
			fields[name] = stamp(t/1e7-epoch1970/1e7, uint32(t%1e7*100))
		}
	}
	return nil
}

// epoch1970 is 1970 in 100 ns since 1601.
const epoch1970 = 116444736e9
