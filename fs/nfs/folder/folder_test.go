package folder

import (
	"cmp"
	"context"
	"errors"
	"io"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fs/nfs"
)

var ctx = context.Background()

// disk is a content in memory.
type disk struct {
	mu      sync.Mutex // guards following
	b       []byte
	flushed []byte
	used    int64
	flush   error // of the next Flush
}

func newDisk(size int) *disk { return &disk{b: make([]byte, size)} }

func (d *disk) Size() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return int64(len(d.b))
}

func (d *disk) Used() int64 { return d.used }

func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if off >= int64(len(d.b)) {
		return 0, io.EOF
	}
	n := copy(p, d.b[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (d *disk) WriteAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return copy(d.b[off:], p), nil
}

func (d *disk) Flush() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.flushed = slices.Clone(d.b)
	return d.flush
}

// image is a content that cannot be written.
type image struct{ d *disk }

func (i image) Size() int64                             { return i.d.Size() }
func (i image) ReadAt(p []byte, off int64) (int, error) { return i.d.ReadAt(p, off) }

// clock is one that tests set.
type clock struct {
	mu sync.Mutex // guards following
	t  time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = c.t.Add(d)
}

var day = time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)

// tempDir is on a disk: there the file systems are that a folder is for.
func tempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(cmp.Or(os.Getenv("HOLDFAST_TEST_DIR"), "/var/tmp"), "holdfast-folder-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func mustOpen(t testing.TB, dir string, opt Options, placed ...Placed) *Folder {
	t.Helper()
	f, err := Open(dir, placed, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// kill ends the use of a folder as the death of its process does: nothing is saved.
func kill(t testing.TB, f *Folder) {
	t.Helper()
	f.gate.Lock()
	defer f.gate.Unlock()
	f.closed = true
	if err := f.shut(); err != nil {
		t.Fatal(err)
	}
}

// want fails unless err is the one of that number; 0 for none.
func want(t testing.TB, err error, no syscall.Errno) {
	t.Helper()
	if no == 0 && err != nil || no != 0 && !errors.Is(err, no) {
		t.Fatalf("error %v, not %v", err, no)
	}
}

func ptr[T any](v T) *T { return &v }

func lookup(t testing.TB, f *Folder, names ...string) nfs.ID {
	t.Helper()
	id := f.Root()
	for _, name := range names {
		var err error
		if id, err = f.Lookup(ctx, id, name); err != nil {
			t.Fatalf("%v: %s: %v", names, name, err)
		}
	}
	return id
}

func attr(t testing.TB, f *Folder, id nfs.ID) nfs.Attr {
	t.Helper()
	a, err := f.Attr(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func create(t testing.TB, f *Folder, dir nfs.ID, name, content string) nfs.ID {
	t.Helper()
	id, err := f.Create(ctx, dir, name, nfs.Creation{Guarded: true})
	if err != nil {
		t.Fatal(name, err)
	}
	if n, err := f.WriteAt(ctx, id, []byte(content), 0); err != nil || n != len(content) {
		t.Fatal(name, n, err)
	}
	return id
}

func mkdir(t testing.TB, f *Folder, dir nfs.ID, name string) nfs.ID {
	t.Helper()
	id, err := f.Mkdir(ctx, dir, name, nfs.Change{})
	if err != nil {
		t.Fatal(name, err)
	}
	return id
}

func read(t testing.TB, f *Folder, id nfs.ID) string {
	t.Helper()
	b := make([]byte, attr(t, f, id).Size+1)
	n, err := f.ReadAt(ctx, id, b, 0)
	if err != io.EOF {
		t.Fatal("read past the end:", err)
	}
	return string(b[:n])
}

// names lists a directory from the beginning.
func names(t testing.TB, seq iter.Seq2[nfs.Entry, error]) (list []string) {
	t.Helper()
	for e, err := range seq {
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, e.Name)
	}
	slices.Sort(list)
	return list
}

func dataFile(dir string, name ...string) string {
	return filepath.Join(append([]string{dir, dataName}, name...)...)
}

// TestShown: a VM's folder with a disk in it is what is expected, in data/ as through the folder, also after a restart.
func TestShown(t *testing.T) {
	dir := tempDir(t)
	d := newDisk(1 << 20)
	d.used = 4096
	placed := Placed{Path: "vm/disk0-flat.vmdk", Key: "disk0", Content: d, Time: day, Mode: 0o600}
	f := mustOpen(t, dir, Options{}, placed)
	vm := lookup(t, f, "vm")
	vmx := create(t, f, vm, "vm.vmx", "memsize = 1024\n")
	flat := lookup(t, f, "vm", "disk0-flat.vmdk")
	if got := names(t, f.ReadDir(ctx, vm, 0)); !slices.Equal(got, []string{"disk0-flat.vmdk", "vm.vmx"}) {
		t.Error(got)
	}
	if b, err := os.ReadFile(dataFile(dir, "vm", "vm.vmx")); err != nil || string(b) != "memsize = 1024\n" {
		t.Errorf("%q %v", b, err)
	}
	a := attr(t, f, flat)
	if a.Kind != nfs.KindFile || a.Size != 1<<20 || a.Used != 4096 || a.Mode != 0o600 || !a.Modified.Equal(day) || a.Links != 1 {
		t.Errorf("%+v", a)
	}
	if err := os.WriteFile(dataFile(dir, "vm", "outside"), []byte("abc"), 0o640); err != nil {
		t.Fatal(err)
	}
	out := lookup(t, f, "vm", "outside")
	if a := attr(t, f, out); a.Size != 3 || a.Mode != 0o640 || read(t, f, out) != "abc" {
		t.Errorf("%+v", a)
	}
	if p, err := f.Parent(ctx, vm); err != nil || p != f.Root() {
		t.Error(p, err)
	}
	if p, err := f.Parent(ctx, f.Root()); err != nil || p != f.Root() {
		t.Error(p, err)
	}
	f.Close()
	g := mustOpen(t, dir, Options{}, placed)
	for name, id := range map[string]nfs.ID{"vm.vmx": vmx, "disk0-flat.vmdk": flat, "outside": out} {
		attr(t, g, id) // before any Lookup
		if got := lookup(t, g, "vm", name); got != id {
			t.Errorf("%s: %v, was %v", name, got, id)
		}
	}
	if read(t, g, vmx) != "memsize = 1024\n" {
		t.Error("vm.vmx is another one")
	}
}
