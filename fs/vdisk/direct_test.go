package vdisk

import (
	"bytes"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TestDirectReads compares reads of a file that is not in the page cache, at all
// alignments, with the bytes written, and looks whether the large ones left the cache alone.
func TestDirectReads(t *testing.T) {
	const size = 8<<20 + 777
	path := filepath.Join(t.TempDir(), "disk.raw")
	want := make([]byte, size)
	rnd := rand.NewChaCha8([32]byte{1})
	rnd.Read(want)
	if err := os.WriteFile(path, want, 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := OpenRaw(path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if r.direct == nil {
		t.Skip("needs Linux 6.5 and a file system with direct I/O")
	}
	evict := func() {
		t.Helper()
		if err := r.f.Sync(); err != nil {
			t.Fatal(err)
		}
		if err := unix.Fadvise(int(r.f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
			t.Fatal(err)
		}
		if n, err := cached(r.f, 0, size); err != nil || n != 0 {
			t.Skipf("%d bytes stay in the page cache (%v)", n, err)
		}
	}
	buf := make([]byte, 4<<20)
	if uintptr(unsafe.Pointer(&buf[0]))%directAlign != 0 {
		t.Fatal("a large slice is not aligned to pages")
	}
	evict()
	for _, c := range []struct {
		off, n, skew int
		direct       bool
	}{
		{0, 1 << 20, 0, true},
		{5 << 20, 3 << 20, 0, true},
		{1 << 20, directMin, 0, true},
		{1 << 20, directMin - 4096, 0, false},
		{512, 1 << 20, 0, false},
		{0, 1 << 20, 1, false},
		{0, 1<<20 + 5, 0, false}, // the rest comes through the cache
		{7 << 20, 1<<20 + 777, 0, false},
		{size - 1, 1, 0, false},
	} {
		evict()
		p := buf[c.skew : c.skew+c.n]
		clear(p)
		if n, err := r.ReadAt(p, int64(c.off)); n != c.n || err != nil && err != io.EOF {
			t.Fatalf("%+v: %d, %v", c, n, err)
		}
		if !bytes.Equal(p, want[c.off:c.off+c.n]) {
			t.Errorf("%+v: wrong bytes", c)
		}
		if n, _ := cached(r.f, int64(c.off), int64(c.n)); (n == 0) != c.direct {
			t.Errorf("%+v: %d bytes cached", c, n)
		}
	}
	// What was just written and is still in the cache only.
	w, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	for i := range 50 {
		off, n := rand.IntN(size-4096), 1+rand.IntN(4096)
		rnd.Read(want[off : off+n])
		if _, err := w.WriteAt(want[off:off+n], int64(off)); err != nil {
			t.Fatal(err)
		}
		at := off &^ (1<<20 - 1)
		p := buf[:min(1<<20, size-at)]
		if _, err := r.ReadAt(p, int64(at)); err != nil && err != io.EOF || !bytes.Equal(p, want[at:at+len(p)]) {
			t.Fatalf("write %d is not seen (%v)", i, err)
		}
		if i%5 == 0 {
			evict()
		}
	}
	// A file cut short is an error, whichever way it is read.
	evict()
	if err := os.Truncate(path, 6<<20+100); err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{5 << 20, 6 << 20, 7 << 20} {
		if n, err := r.ReadAt(buf[:2<<20-8192], off); err == nil {
			t.Errorf("reads %d bytes at %d of a file cut short", n, off)
		}
	}
}
