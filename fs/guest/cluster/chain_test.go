package cluster

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

const size = 16

// volume is clusters whose table is a map in memory, 0 for the end.
func volume(count int, links map[uint32]uint32) *Table {
	return &Table{Data: 100, Size: size, Count: int64(count), Links: func() func(uint32) (uint32, error) {
		return func(c uint32) (uint32, error) { return links[c], nil }
	}}
}

// disk is bytes of chance.
func disk(count int, rng *rand.Rand) []byte {
	b := make([]byte, 100+count*size)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

// TestChain reads a chain in pieces of chance, in one with many more runs than are kept.
func TestChain(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for _, pieces := range []int{1, 2, 100, maxRuns - 1, maxRuns, maxRuns + 1, 5 * maxRuns, 40000} {
		const count = 50000
		order := rng.Perm(count)
		// Pieces of the disk in another order.
		var list []uint32
		cut := count / pieces
		for _, i := range order {
			if i < pieces {
				for c := range cut {
					list = append(list, uint32(First+i*cut+c))
				}
			}
		}
		links := map[uint32]uint32{}
		for i := range list[1:] {
			links[list[i]] = list[i+1]
		}
		b := disk(count, rng)
		table := volume(count, links)
		var want []byte
		for _, c := range list {
			want = append(want, b[table.At(c):][:size]...)
		}
		chain := table.Chain(list[0])
		if n, err := chain.Len(); n != int64(len(want)) || err != nil {
			t.Fatal(pieces, n, err)
		}
		if len(chain.runs) >= maxRuns || chain.Cost() > 24*maxRuns+100 {
			t.Fatalf("%d runs are kept", len(chain.runs))
		}
		for range 500 {
			off := rng.IntN(len(want))
			p := make([]byte, rng.IntN(min(3000, len(want)-off)+1))
			if err := chain.ReadAt(bytes.NewReader(b), p, int64(off)); err != nil || !bytes.Equal(p, want[off:][:len(p)]) {
				t.Fatal(pieces, off, len(p), err)
			}
			at, err := chain.Where(int64(off))
			if err != nil || b[at] != want[off] || at != table.At(list[off/size])+int64(off%size) {
				t.Fatal(pieces, off, at, err)
			}
		}
		var got []byte
		for e, err := range chain.Extents(int64(len(want)) - 3) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, b[e.Off:e.End()]...)
		}
		if !bytes.Equal(got, want[:len(want)-3]) {
			t.Fatal(pieces, "extents")
		}
		if err := chain.ReadAt(bytes.NewReader(b), make([]byte, 2), int64(len(want))-1); !errors.Is(err, guest.ErrDamaged) {
			t.Fatal(err)
		}
	}
}

// FuzzChain follows any table: it ends, and gives no cluster twice.
func FuzzChain(f *testing.F) {
	f.Add([]byte{3, 4, 5, 0}, uint8(2))
	f.Add([]byte{3, 4, 2}, uint8(2))
	f.Fuzz(func(t *testing.T, b []byte, first uint8) {
		b = b[:min(len(b), 250)]
		links := map[uint32]uint32{}
		for i, c := range b {
			links[uint32(i+First)] = uint32(c)
		}
		table := volume(len(b), links)
		chain := table.Chain(uint32(first))
		n, err := chain.Len()
		seen := map[int64]bool{}
		for e, err := range chain.Extents(n) {
			if err != nil {
				t.Fatal(err)
			}
			for off := e.Off; off < e.End(); off += size {
				if seen[off] {
					t.Fatal("a cluster twice")
				}
				seen[off] = true
			}
		}
		if int64(len(seen))*size != n || err != nil && !errors.Is(err, guest.ErrDamaged) {
			t.Fatal(n, err)
		}
	})
}

func FuzzNames(f *testing.F) {
	f.Add([]byte("a\x00\x00\xd8b\x00\x00\xdc"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var units []uint16
		for i := 0; i+1 < min(len(b), 2*MaxName); i += 2 {
			units = append(units, uint16(b[i])|uint16(b[i+1])<<8)
		}
		got, ok := Units(Text(units))
		if ok != (len(units) > 0) {
			t.Fatalf("%x: %q", units, Text(units))
		}
		for i, u := range got {
			if u != units[i] {
				t.Fatalf("%x: %x", units, got)
			}
		}
	})
}

// TestCached reads across the blocks, to the end of a device that ends within one.
func TestCached(t *testing.T) {
	b := disk(3000, rand.New(rand.NewPCG(2, 2)))
	c := NewCached(device{bytes.NewReader(b)}, 1<<20)
	p := make([]byte, len(b)-5)
	if _, err := c.ReadAt(p, 5); err != nil || !bytes.Equal(p, b[5:]) {
		t.Fatal(err)
	}
	if _, err := c.ReadAt(p, 6); !errors.Is(err, guest.ErrDamaged) {
		t.Fatal(err)
	}
}

type device struct{ *bytes.Reader }
