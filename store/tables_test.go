package store

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

// newTables makes an index of n chunks in dir, all of it in tables, and gives their ids.
func newTables(t testing.TB, dir string, n int) []ID {
	t.Helper()
	x, err := openBadger(dir, [16]byte{1}, false)
	if err != nil {
		t.Fatal(err)
	}
	rnd := rand.NewChaCha8([32]byte{7})
	ids := make([]ID, n)
	for from := 0; from < n; from += 1 << 13 {
		recs := make([]PackRecord, min(1<<13, n-from))
		for i := range recs {
			rnd.Read(ids[from+i][:])
			recs[i] = PackRecord{ID: ids[from+i], Off: uint32(i) << 10, Len: 1 << 10, Plain: 1 << 10}
		}
		var pack PackID
		binary.BigEndian.PutUint32(pack[:], uint32(from))
		if err := x.AddPack(t.Context(), PackInfo{ID: pack, Size: 1 << 24}, recs); err != nil {
			t.Fatal(err)
		}
	}
	x.complete.Store(true)
	if err := x.Close(); err != nil {
		t.Fatal(err)
	}
	return ids
}

// TestDamagedTables flips a byte anywhere in the tables of an index: it opens, and
// what it knows is right, or it was made anew.
func TestDamagedTables(t *testing.T) {
	dir := t.TempDir()
	ids := newTables(t, dir, 3000)
	files, err := filepath.Glob(dir + "/*.sst")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	rnd := rand.New(rand.NewPCG(3, 4))
	for i := range 150 {
		again := t.TempDir()
		if err := os.CopyFS(again, os.DirFS(dir)); err != nil {
			t.Fatal(err)
		}
		name := filepath.Join(again, filepath.Base(files[rnd.IntN(len(files))]))
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		off := rnd.IntN(len(b))
		if i < 100 { // the lengths and sums at the end
			off = len(b) - 1 - i
		}
		b[off] ^= 1 << rnd.IntN(8)
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		clean := false
		x, err := LocalIndex(again, false)(t.Context(), [16]byte{1}, func(_ context.Context, _ Index, c bool) error { clean = c; return nil })
		if err != nil {
			t.Fatalf("byte %d of %d: %v", off, len(b), err)
		}
		locs := make([]Loc, len(ids))
		if err := x.Lookup(t.Context(), ids, locs); err != nil {
			t.Fatalf("byte %d of %d: %v", off, len(b), err)
		}
		for k, l := range locs {
			if l.Known() && (l.Pack != 1 || l.Off != uint32(k)<<10 || l.Slot != uint32(k)) || clean && !l.Known() {
				t.Fatalf("byte %d of %d: chunk %d is at %+v, clean %v", off, len(b), k, l, clean)
			}
		}
		if err := x.Close(); err != nil {
			t.Fatal(err)
		}
		os.RemoveAll(again)
	}
	if err := proveFiles(dir); err != nil {
		t.Errorf("what Badger wrote is not proved: %v", err)
	}
	// Of a large index only the ends of its tables are read.
	for _, name := range files {
		if err := proveTable(name, false); err != nil {
			t.Errorf("end of %s: %v", name, err)
		}
	}
	b, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		b[len(b)-1-i] ^= 4
		if err := os.WriteFile(files[0], b, 0o600); err != nil {
			t.Fatal(err)
		}
		if proveTable(files[0], false) == nil {
			t.Errorf("a flipped bit %d bytes before the end is not seen", i+1)
		}
		b[len(b)-1-i] ^= 4
	}
}

// BenchmarkProveFiles is what an owner pays on opening.
func BenchmarkProveFiles(b *testing.B) {
	dir := b.TempDir()
	newTables(b, dir, 1<<20)
	var size int64
	files, err := filepath.Glob(dir + "/*.sst")
	if err != nil {
		b.Fatal(err)
	}
	for _, f := range files {
		st, err := os.Stat(f)
		if err != nil {
			b.Fatal(err)
		}
		size += st.Size()
	}
	b.SetBytes(size)
	for b.Loop() {
		if err := proveFiles(dir); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkLookup looks up single chunks in any order.
func BenchmarkLookup(b *testing.B) {
	dir := b.TempDir()
	ids := newTables(b, dir, 1<<20)
	x, err := openBadger(dir, [16]byte{1}, false)
	if err != nil {
		b.Fatal(err)
	}
	defer x.Close()
	rnd := rand.New(rand.NewPCG(1, 1))
	var loc [1]Loc
	for b.Loop() {
		i := rnd.IntN(len(ids))
		if err := x.Lookup(b.Context(), ids[i:i+1], loc[:]); err != nil || !loc[0].Known() {
			b.Fatal(loc, err)
		}
	}
}
