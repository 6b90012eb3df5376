package vdisk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// writeOverlay makes an empty qcow2 of 1 MiB over backing.
func writeOverlay(t *testing.T, path, backing, format string) {
	t.Helper()
	f, err := QCOW2(newModel(1, mib))
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, f.Size())
	f.ReadAt(b, 0)
	be := binary.BigEndian
	if format != "" {
		be.PutUint32(b[104:], 0xE2792ACA)
		be.PutUint32(b[108:], uint32(len(format)))
		copy(b[112:], format)
	}
	be.PutUint64(b[8:], 1024)
	be.PutUint32(b[16:], uint32(len(backing)))
	copy(b[1024:], backing)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestChainPolicy(t *testing.T) {
	top := t.TempDir()
	dir := filepath.Join(top, "images")
	secret := filepath.Join(top, "secret")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(filepath.Join(dir, "sub"), 0o700))
	content := bytes.Repeat([]byte("secret! "), mib/8)
	must(os.WriteFile(secret, content, 0o600))
	must(os.WriteFile(filepath.Join(dir, "base"), content, 0o600))
	must(os.WriteFile(filepath.Join(dir, "a:b"), content, 0o600))
	must(os.WriteFile(filepath.Join(dir, "sub", "base"), content, 0o600))
	must(os.Symlink(secret, filepath.Join(dir, "link")))
	must(os.Symlink("base", filepath.Join(dir, "inlink")))
	must(os.Symlink("..", filepath.Join(dir, "up")))
	must(unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
	writeOverlay(t, filepath.Join(dir, "sub", "middle"), "../base", "raw")
	writeOverlay(t, filepath.Join(dir, "sub", "away"), "../../secret", "raw")
	writeOverlay(t, filepath.Join(dir, "ring1"), "ring2", "qcow2")
	writeOverlay(t, filepath.Join(dir, "ring2"), "ring1", "qcow2")

	for _, c := range []struct {
		backing, format string
		policy          Policy
		want            error
		text            string
	}{
		{"base", "raw", Policy{}, nil, ""},
		{"base", "", Policy{}, nil, ""},
		{"./a:b", "raw", Policy{}, nil, ""},
		{"sub/base", "raw", Policy{}, nil, ""},
		{"sub/middle", "qcow2", Policy{}, nil, ""},
		{"sub/middle", "", Policy{}, nil, ""},
		{"sub/../base", "", Policy{}, nil, ""},
		{"inlink", "raw", Policy{}, nil, ""},
		{"base", "vmdk", Policy{}, ErrCorrupt, "not a VMDK"},
		{"base", "vhd", Policy{}, ErrCorrupt, "no VHD footer"},
		{"base", "vdi", Policy{}, ErrUnsupported, `format "vdi"`},
		{"base", "qcow2", Policy{}, ErrCorrupt, "not a qcow2"},
		{"missing", "raw", Policy{}, os.ErrNotExist, "missing"},
		{secret, "raw", Policy{}, ErrRefused, "any file of this host"},
		{secret, "raw", Policy{AllowOutside: true}, nil, ""},
		{"../secret", "raw", Policy{}, ErrRefused, "leaves the directory"},
		{"../secret", "raw", Policy{AllowOutside: true}, nil, ""},
		{"sub/../../secret", "raw", Policy{}, ErrRefused, "leaves the directory"},
		{"sub/away", "qcow2", Policy{}, ErrRefused, "leaves the directory"},
		{"sub/away", "qcow2", Policy{AllowOutside: true}, nil, ""},
		{"link", "raw", Policy{}, ErrRefused, "leaves the directory"},
		{"link", "raw", Policy{AllowOutside: true}, nil, ""},
		{"up/secret", "raw", Policy{}, ErrRefused, "leaves the directory"},
		{"ring1", "qcow2", Policy{}, ErrCorrupt, "its own chain"},
		{"top", "qcow2", Policy{}, ErrCorrupt, "its own chain"},
		{"fifo", "raw", Policy{}, ErrRefused, "no regular file"},
		{"sub", "raw", Policy{}, ErrRefused, "no regular file"},
		{"/dev/null", "raw", Policy{AllowOutside: true, AllowDevices: true}, ErrRefused, "no regular file"},
		{`json:{"driver":"file"}`, "raw", Policy{AllowOutside: true}, ErrRefused, "not a path"},
		{"nbd://host/x", "raw", Policy{AllowOutside: true}, ErrRefused, "not a path"},
		{"nbd:unix:/run/x", "raw", Policy{AllowOutside: true}, ErrRefused, "not a path"},
		{"a:b", "raw", Policy{}, ErrRefused, "not a path"},
	} {
		name := filepath.Join(dir, "top")
		writeOverlay(t, name, c.backing, c.format)
		img, err := OpenChain(name, c.policy)
		if err != nil {
			if c.want == nil || !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("%q (%s, %+v): %v", c.backing, c.format, c.policy, err)
			}
			continue
		}
		if c.want != nil {
			t.Errorf("%q (%s, %+v) was opened", c.backing, c.format, c.policy)
		}
		p := make([]byte, mib)
		if _, err := img.ReadAt(p, 0); err != nil && err != io.EOF || !bytes.Equal(p, content) {
			t.Errorf("%q: wrong content (%v)", c.backing, err)
		}
		if err := errors.Join(img.Close(), img.Close()); err != nil {
			t.Error(err)
		}
		if _, err := img.ReadAt(p, 0); err == nil {
			t.Error("reads after Close")
		}
	}
	// The top file is whatever the user names.
	if _, err := OpenChain(filepath.Join(dir, "fifo"), Policy{}); !errors.Is(err, ErrUnsupported) {
		t.Errorf("a pipe as the top file: %v", err)
	}
	writeOverlay(t, filepath.Join(dir, "top"), "base", "raw")
	img := openChain(t, filepath.Join(dir, "top"), Policy{Format: "raw"})
	if img.Size() == mib {
		t.Error("opened as qcow2, asked for raw")
	}
	if open := openFiles(t, top); open != 1 {
		t.Errorf("%d files left open, want 1", open)
	}
}

// openFiles counts the files below dir that this process holds open.
func openFiles(t *testing.T, dir string) int {
	t.Helper()
	open := map[string]bool{}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip(err)
	}
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(to, dir) {
			open[to] = true
		}
	}
	return len(open)
}

func TestChainDepth(t *testing.T) {
	dir := t.TempDir()
	store(t, newModel(1, mib, ext(0, mib)), filepath.Join(dir, "0"))
	for i := 1; i <= 64; i++ {
		writeOverlay(t, filepath.Join(dir, fmt.Sprint(i)), fmt.Sprint(i-1), "")
	}
	img := openChain(t, filepath.Join(dir, "63"), Policy{})
	checkImage(t, img, newModel(1, mib, ext(0, mib)))
	if len(img.Files()) != 64 || img.Files()[63] != filepath.Join(dir, "0") {
		t.Errorf("files: %v", img.Files())
	}
	if _, err := OpenChain(filepath.Join(dir, "64"), Policy{}); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "more than 64") {
		t.Errorf("65 files: %v", err)
	}
}

// A damaged or unreadable backing file is an error of the read, with its name.
func TestBackingErrors(t *testing.T) {
	dir := t.TempDir()
	writeOverlay(t, filepath.Join(dir, "top"), "base", "raw")
	store(t, newModel(1, mib, ext(0, mib)), filepath.Join(dir, "base"))
	img := openChain(t, filepath.Join(dir, "top"), Policy{})
	if err := os.Truncate(filepath.Join(dir, "base"), 1000); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 4*kib)
	n, err := img.ReadAt(p, 0)
	if n != 1000 || !errors.Is(err, io.ErrUnexpectedEOF) || !strings.Contains(err.Error(), "base ends at 1000") {
		t.Errorf("%d, %v", n, err)
	}
	broken := errors.New("broken")
	q, err := OpenQCOW2(bytes.NewReader(readFile(t, filepath.Join(dir, "top"))), 5*64*kib, QCOW2Options{
		Backing: func(name, format string) (Source, error) {
			if name != "base" || format != "raw" {
				t.Errorf("asked for %q, %q", name, format)
			}
			return listing{newModel(1, mib), failed(broken)}, nil
		}})
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range q.Allocated(4 * kib) {
		if !errors.Is(err, broken) {
			t.Errorf("Allocated: %v", err)
		}
	}
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestRaw(t *testing.T) {
	for _, disk := range []*model{
		newModel(1, 0),
		newModel(1, 1, ext(0, 1)),
		newModel(1, 10*mib+3, ext(10*mib, 3)),
		newModel(1, 10*mib+3),
		randomModel(2, 100*mib+77, 50, 500*kib),
		newModel(1, 10*tib, ext(mib, mib), ext(10*tib-mib, mib)),
	} {
		path := tempPath(t, "disk")
		store(t, disk, path)
		raw, err := OpenRaw(path)
		if err != nil {
			t.Fatal(err)
		}
		if disk.size > 0 {
			checkImage(t, raw, disk)
		} else if n, err := raw.ReadAt(make([]byte, 1), 0); n != 0 || err != io.EOF {
			t.Errorf("empty: %d, %v", n, err)
		}
		total := int64(0)
		for _, e := range allocated(t, raw, 4*kib) {
			total += e.Len
		}
		if most := int64(len(disk.data)) * 600 * kib * 4; total > most {
			t.Errorf("%d bytes of data found, at most %d are there", total, most)
		}
		if err := errors.Join(raw.Close(), raw.Close()); err != nil {
			t.Error(err)
		}
	}
	if _, err := OpenRaw("/dev/null"); !errors.Is(err, ErrUnsupported) {
		t.Errorf("/dev/null: %v", err)
	}
	if _, err := OpenRaw(t.TempDir()); err == nil {
		t.Error("a directory was opened")
	}
}

// A loop device stands for the block device of a VM.
func TestRawDevice(t *testing.T) {
	if testing.Short() || os.Getuid() != 0 {
		t.Skip("needs root, to make a loop device")
	}
	disk := randomModel(1, 8*mib+512, 20, 100*kib)
	path := tempPath(t, "disk")
	store(t, disk, path)
	out, err := qemu(t, ".", "losetup", "--find", "--show", "--read-only", path)
	if err != nil {
		t.Skipf("no loop devices: %v", err)
	}
	device := strings.TrimSpace(out)
	t.Cleanup(func() { qemu(t, ".", "losetup", "--detach", device) })
	raw, err := OpenRaw(device)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	checkImage(t, raw, disk)
	dir := t.TempDir()
	writeOverlay(t, filepath.Join(dir, "top"), device, "raw")
	if _, err := OpenChain(filepath.Join(dir, "top"), Policy{AllowOutside: true}); !errors.Is(err, ErrRefused) {
		t.Errorf("a device as backing file: %v", err)
	}
	openChain(t, filepath.Join(dir, "top"), Policy{AllowOutside: true, AllowDevices: true})
}
