package folder

import (
	"encoding/binary"
	"os"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/nfs"
)

func mark(n uint64) *[8]byte {
	var m [8]byte
	binary.LittleEndian.PutUint64(m[:], n)
	return &m
}

// TestExclusive is RFC 1813 §3.3.8: the same mark is the same creation, also after a restart, until the attributes are set.
func TestExclusive(t *testing.T) {
	dir := tempDir(t)
	f := mustOpen(t, dir, Options{})
	excl := func(name string, m *[8]byte) (nfs.ID, error) {
		return f.Create(ctx, f.Root(), name, nfs.Creation{Exclusive: m})
	}
	a, err := excl("a", mark(1))
	want(t, err, 0)
	var b [100]byte
	if n, err := unix.Getxattr(dataFile(dir, "a"), markName, b[:]); err != nil || string(b[:n]) != string(mark(1)[:]) {
		t.Errorf("%q %v", b[:n], err)
	}
	again := func() {
		t.Helper()
		if id, err := excl("a", mark(1)); err != nil || id != a {
			t.Fatal(id, err)
		}
		want(t, second(excl("a", mark(2))), syscall.EEXIST)
		want(t, second(excl("a", mark(0))), syscall.EEXIST)
	}
	again()
	kill(t, f)
	f = mustOpen(t, dir, Options{})
	again()
	// Whatever else is done to it before: it is the same creation.
	if _, err := f.WriteAt(ctx, a, []byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadAt(ctx, a, b[:1], 0); err != nil {
		t.Fatal(err)
	}
	again()
	if read(t, f, a) != "x" {
		t.Error("a replay emptied the file")
	}
	want(t, f.SetAttr(ctx, a, nfs.Change{Mode: ptr(uint32(0o600))}), 0)
	want(t, second(excl("a", mark(1))), syscall.EEXIST)
	kill(t, f)
	f = mustOpen(t, dir, Options{})
	want(t, second(excl("a", mark(1))), syscall.EEXIST)
	// A file made otherwise has no mark.
	create(t, f, f.Root(), "b", "")
	want(t, second(excl("b", mark(0))), syscall.EEXIST)
	if err := os.WriteFile(dataFile(dir, "c"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	want(t, second(excl("c", mark(0))), syscall.EEXIST)
	// Removed and made again with the same mark it is another file.
	want(t, f.Remove(ctx, f.Root(), "a"), 0)
	if id, err := excl("a", mark(1)); err != nil || id == a {
		t.Error(id, err)
	}
	mkdir(t, f, f.Root(), "d")
	want(t, second(excl("d", mark(0))), syscall.EEXIST)
}

// TestExclusiveRace: of many at once one makes the file; those with its mark get it too.
func TestExclusiveRace(t *testing.T) {
	f := mustOpen(t, tempDir(t), Options{})
	for round := range 20 {
		name := string(rune('a' + round))
		var mu sync.Mutex
		ids := map[nfs.ID]uint64{} // => its mark
		var wg sync.WaitGroup
		n := 0
		for i := range 9 {
			wg.Go(func() {
				m := uint64(i % 3)
				id, err := f.Create(ctx, f.Root(), name, nfs.Creation{Exclusive: mark(m)})
				mu.Lock()
				defer mu.Unlock()
				if err == nil {
					n++
					ids[id] = m
				} else if err != syscall.EEXIST {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if len(ids) != 1 || n != 3 {
			t.Fatalf("%d files, %d successes", len(ids), n)
		}
	}
}
