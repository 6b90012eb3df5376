package folder

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/nfs"
	"github.com/holdfast-backup/holdfast/fs/overlay"
	"github.com/holdfast-backup/holdfast/fs/vdisk"
	"github.com/holdfast-backup/holdfast/test/command"
)

// TestNoAllocations: reading, writing and asking for attributes, of both kinds of files.
func TestNoAllocations(t *testing.T) {
	if raced {
		t.Skip("the race detector allocates")
	}
	f := mustOpen(t, tempDir(t), Options{}, Placed{Path: "p", Key: "p", Content: newDisk(1 << 20), Time: day})
	buf := make([]byte, 4096)
	for name, id := range map[string]nfs.ID{"placed": lookup(t, f, "p"), "real": create(t, f, f.Root(), "a", string(buf))} {
		for what, fn := range map[string]func() error{
			"read":  func() error { return second(f.ReadAt(ctx, id, buf, 0)) },
			"write": func() error { return second(f.WriteAt(ctx, id, buf, 0)) },
			"attr":  func() error { return second(f.Attr(ctx, id)) },
		} {
			want(t, fn(), 0)
			if n := testing.AllocsPerRun(100, func() { fn() }); n > 0 {
				t.Errorf("%s %s: %v allocations", what, name, n)
			}
		}
	}
}

// descriptorsIn counts the descriptors of this process below a directory.
func descriptorsIn(t *testing.T, dir string) (n int) {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && len(to) > len(dir) && to[:len(dir)] == dir {
			n++
		}
	}
	return n
}

// TestOpenFiles: no more are open than asked for, whatever many do at once, and none is left open.
func TestOpenFiles(t *testing.T) {
	const limit, files, workers = 8, 60, 6
	dir := tempDir(t)
	f := mustOpen(t, dir, Options{OpenFiles: limit})
	var ids []nfs.ID
	for i := range files {
		ids = append(ids, create(t, f, mkdir(t, f, f.Root(), fmt.Sprint("d", i)), "x", fmt.Sprintf("%04d", i)))
	}
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(w), 1))
			for range 500 {
				i := r.IntN(files)
				b := make([]byte, 4)
				_, err := f.ReadAt(ctx, ids[i], b, 0)
				if err == nil {
					_, err = f.WriteAt(ctx, ids[i], b, 4)
				}
				if err == nil && r.IntN(20) == 0 {
					err = f.Sync(ctx, ids[i])
				}
				if err != nil || string(b) != fmt.Sprintf("%04d", i) {
					t.Errorf("%d: %q %v", i, b, err)
					return
				}
			}
		})
	}
	wg.Wait()
	if n := descriptorsIn(t, dir); n > limit+3 { // data, new and lock
		t.Errorf("%d descriptors", n)
	}
	for i, id := range ids {
		if got := read(t, f, id); got != fmt.Sprintf("%04d%04d", i, i) {
			t.Fatalf("%d: %q", i, got)
		}
	}
	h, err := f.open(ids[0], 0)
	want(t, err, 0)
	want(t, f.Remove(ctx, lookup(t, f, "d0"), "x"), 0) // while it is in use
	f.release(h)
	f.Close()
	if n := descriptorsIn(t, dir); n > 0 {
		t.Errorf("%d descriptors after Close", n)
	}
}

// TestLostWrites: an error of the sync before a file is closed, to make room, is that of its next Sync.
func TestLostWrites(t *testing.T) {
	f := mustOpen(t, tempDir(t), Options{})
	id := create(t, f, f.Root(), "a", "abc")
	f.cache.mu.Lock()
	f.cache.lost[id] = unix.EIO
	f.cache.mu.Unlock()
	want(t, f.Sync(ctx, id), syscall.EIO)
	want(t, f.Sync(ctx, id), 0)
}

// TestFull: a full disk is ENOSPC, through everything, and not the end.
func TestFull(t *testing.T) {
	dir := tempDir(t)
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=1m,nr_inodes=64"); err != nil {
		t.Skip("cannot mount: ", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	f := mustOpen(t, dir, Options{}, Placed{Path: "p", Key: "p", Content: newDisk(10), Time: day})
	defer f.Close()
	id := create(t, f, f.Root(), "a", "")
	n, err := f.WriteAt(ctx, id, make([]byte, 2<<20), 0)
	want(t, err, syscall.ENOSPC)
	if n == 2<<20 {
		t.Error("all written")
	}
	want(t, f.Rename(ctx, f.Root(), "p", f.Root(), "q"), syscall.ENOSPC) // the state cannot be written
	if got := fmt.Sprint(names(t, f.ReadDir(ctx, f.Root(), 0))); got != "[a p]" {
		t.Error(got)
	}
	want(t, f.SetAttr(ctx, id, nfs.Change{Size: new(int64)}), 0)
	want(t, f.Rename(ctx, f.Root(), "p", f.Root(), "q"), 0)
	for i := 0; err != nil && i < 100; i++ { // until the inodes are used up
		_, err = f.Create(ctx, f.Root(), fmt.Sprint(i), nfs.Creation{})
		if errors.Is(err, syscall.ENOSPC) {
			err = nil
		} else if err == nil {
			err = syscall.EAGAIN
		}
	}
	want(t, err, 0)
	want(t, f.Remove(ctx, f.Root(), "0"), 0)
	create(t, f, f.Root(), "z", "")
}

// TestOverlay: a disk that is written through the folder is, by qemu-img, what a plain file is that qemu-io was told the same.
func TestOverlay(t *testing.T) {
	needs(t, "qemu-img", "qemu-io")
	const size = 64 << 20
	dir, r := tempDir(t), rand.New(rand.NewPCG(1, 1))
	base, plain := filepath.Join(dir, "base.raw"), filepath.Join(dir, "plain.raw")
	content := make([]byte, 5<<20)
	for i := range content {
		content[i] = byte(r.Uint32())
	}
	for _, file := range []string{base, plain} {
		if err := errors.Join(os.WriteFile(file, content, 0o600), os.Truncate(file, size)); err != nil {
			t.Fatal(err)
		}
	}
	img, err := vdisk.OpenRaw(base)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	over := filepath.Join(dir, "overlay")
	d, err := overlay.Create(over, img, overlay.Options{Base: "base"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { d.Close() }()
	vm := filepath.Join(dir, "vm")
	open := func() *Folder {
		return mustOpen(t, vm, Options{}, Placed{Path: "vm/disk0-flat.vmdk", Key: "disk0", Content: d, Time: day})
	}
	f := open()
	id := lookup(t, f, "vm", "disk0-flat.vmdk")
	args := []string{"qemu-io", "-f", "raw"}
	for range 60 {
		off, n, pattern := r.Int64N(size-300_000), r.IntN(300_000)+1, byte(r.IntN(255)+1)
		if r.IntN(2) == 0 {
			off, n = off&^4095, n&^4095+4096
		}
		if _, err := f.WriteAt(ctx, id, bytes.Repeat([]byte{pattern}, n), off); err != nil {
			t.Fatal(err)
		}
		args = append(args, "-c", fmt.Sprintf("write -P %d %d %d", pattern, off, n))
	}
	want(t, f.Sync(ctx, id), 0)
	want(t, second(f.WriteAt(ctx, id, make([]byte, 512), size-511)), syscall.EFBIG)
	if _, err := command.Run(context.Background(), append(args, plain)...); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if d, err = overlay.Open(over, img, overlay.Options{Base: "base"}); err != nil {
		t.Fatal(err)
	}
	f = open()
	copied, err := os.Create(filepath.Join(dir, "copy.raw"))
	if err != nil {
		t.Fatal(err)
	}
	defer copied.Close()
	buf := make([]byte, 1<<20)
	for off := int64(0); off < size; off += int64(len(buf)) {
		if n, err := f.ReadAt(ctx, id, buf, off); n != len(buf) || err != nil {
			t.Fatal(n, err)
		}
		if _, err := copied.WriteAt(buf, off); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := command.Run(context.Background(), "qemu-img", "compare", "-f", "raw", "-F", "raw", copied.Name(), plain); err != nil {
		t.Error(err)
	}
}

func BenchmarkReadReal(b *testing.B)   { benchmark(b, false, (*Folder).ReadAt) }
func BenchmarkReadPlaced(b *testing.B) { benchmark(b, true, (*Folder).ReadAt) }
func BenchmarkWriteReal(b *testing.B)  { benchmark(b, false, (*Folder).WriteAt) }
func BenchmarkWritePlaced(b *testing.B) {
	benchmark(b, true, (*Folder).WriteAt)
}
func BenchmarkAttrReal(b *testing.B)   { benchmark(b, false, attrOnly) }
func BenchmarkAttrPlaced(b *testing.B) { benchmark(b, true, attrOnly) }

func attrOnly(f *Folder, ctx context.Context, id nfs.ID, _ []byte, _ int64) (int, error) {
	_, err := f.Attr(ctx, id)
	return 0, err
}

// still is a content that does nothing.
type still struct{}

func (still) Size() int64                              { return 1 << 40 }
func (still) ReadAt(p []byte, off int64) (int, error)  { return len(p), nil }
func (still) WriteAt(p []byte, off int64) (int, error) { return len(p), nil }

func benchmark(b *testing.B, placed bool, do func(*Folder, context.Context, nfs.ID, []byte, int64) (int, error)) {
	f := mustOpen(b, tempDir(b), Options{}, Placed{Path: "p", Key: "p", Content: still{}, Time: day})
	id := lookup(b, f, "p")
	if !placed {
		id = create(b, f, f.Root(), "a", string(make([]byte, 4096)))
	}
	b.ReportAllocs()
	b.SetParallelism(8 / runtime.GOMAXPROCS(0))
	b.RunParallel(func(pb *testing.PB) {
		buf := make([]byte, 4096)
		for pb.Next() {
			if _, err := do(f, ctx, id, buf, 0); err != nil {
				b.Error(err)
			}
		}
	})
}
