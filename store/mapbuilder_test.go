package store

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"
)

// memPages is a page source and sink in memory that counts what it stores and loads.
type memPages struct {
	pages         map[ID][]byte
	stored, loads int
}

func (m *memPages) load(_ context.Context, id ID, level uint8, p *page) error {
	m.loads++
	b, ok := m.pages[id]
	if !ok {
		return errors.New("no such page")
	}
	return decodePage(b, level, p)
}

func (m *memPages) store(_ context.Context, p *page) (ID, error) {
	b := p.encode(nil)
	id := ID(sha256.Sum256(b))
	m.pages[id] = b
	m.stored++
	return id, nil
}

// flatten reads a whole map into chunk => id, by its own plain recursion.
func (m *memPages) flatten(t *testing.T, id ID, level int, first int64, out map[int64]ID) {
	t.Helper()
	if id.IsZero() {
		return
	}
	var p page
	if err := decodePage(m.pages[id], uint8(level), &p); err != nil {
		t.Fatal(err)
	}
	if p.empty() {
		t.Fatal("an empty page is stored")
	}
	for k, child := range p.ids {
		at := first + int64(k)<<(8*level)
		switch {
		case child.IsZero():
		case level == 0:
			out[at] = child
		default:
			m.flatten(t, child, level-1, at, out)
		}
	}
}

const testChunk = 1 << 16

// TestMapBuilderRandom changes a sparse disk of random size many times, growing
// and shrinking it, and compares each map with a plain Go map. Equal content must also
// give an equal root, whatever way led to it.
func TestMapBuilderRandom(t *testing.T) {
	ctx := context.Background()
	for seed := range uint64(60) {
		rnd := rand.New(rand.NewPCG(seed, 7))
		m := &memPages{pages: map[ID][]byte{}}
		model := map[int64]ID{}
		var root Root
		for range 12 {
			chunks := 1 + rnd.Int64N([]int64{3, 300, 70_000, 20_000_000}[rnd.IntN(4)])
			size := chunks*testChunk - rnd.Int64N(testChunk)
			b, err := newMapBuilder(ctx, root, size, testChunk, m.load, m.store)
			if err != nil {
				t.Fatal(err)
			}
			for i := range model {
				if i >= chunks {
					delete(model, i)
				}
			}
			for at := int64(0); at < chunks; {
				at += rnd.Int64N(chunks/10 + 2)
				if at >= chunks {
					break
				}
				switch n := min(chunks-at, 1+rnd.Int64N(chunks/7+1)); rnd.IntN(3) {
				case 0: // a hole
					if err := b.Punch(ctx, at, at+n); err != nil {
						t.Fatal(err)
					}
					for i := range model {
						if i >= at && i < at+n {
							delete(model, i)
						}
					}
					at += n
				default: // some chunks
					n = min(n, 40)
					for i := at; i < at+n; i++ {
						var id ID
						if rnd.IntN(5) > 0 {
							binary.LittleEndian.PutUint64(id[:], 1+rnd.Uint64N(1000))
							model[i] = id
						} else {
							delete(model, i)
						}
						if err := b.Set(ctx, i, id); err != nil {
							t.Fatal(err)
						}
					}
					at += n
				}
			}
			if root, err = b.Finish(ctx, size); err != nil {
				t.Fatal(err)
			}
			got := map[int64]ID{}
			m.flatten(t, root.Page, height(chunks)-1, 0, got)
			if len(got) != len(model) {
				t.Fatalf("seed %d: %d chunks, want %d", seed, len(got), len(model))
			}
			for i, id := range model {
				if got[i] != id {
					t.Fatalf("seed %d: chunk %d is %v, want %v", seed, i, got[i], id)
				}
			}
			fresh, err := newMapBuilder(ctx, Root{}, size, testChunk, m.load, m.store)
			if err != nil {
				t.Fatal(err)
			}
			for i := int64(0); i < chunks && len(model) < 20_000 && chunks < 100_000; i++ {
				if err := fresh.Set(ctx, i, model[i]); err != nil {
					t.Fatal(err)
				}
			}
			if chunks < 100_000 && len(model) < 20_000 {
				r2, err := fresh.Finish(ctx, size)
				if err != nil || r2 != root {
					t.Fatalf("seed %d: the same content has two roots: %v", seed, err)
				}
			}
		}
	}
}

// TestMapBuilderCost: one changed chunk in a 16 TiB disk touches one page per
// level, and an unchanged disk none.
func TestMapBuilderCost(t *testing.T) {
	ctx := context.Background()
	m := &memPages{pages: map[ID][]byte{}}
	const size = 16 << 40
	build := func(parent Root, set map[int64]byte, punch bool) Root {
		m.loads, m.stored = 0, 0
		b, err := newMapBuilder(ctx, parent, size, 128<<10, m.load, m.store)
		if err != nil {
			t.Fatal(err)
		}
		next := int64(0)
		for _, i := range []int64{0, 1 << 20, size/(128<<10) - 1} {
			if punch {
				if err := b.Punch(ctx, next, i); err != nil {
					t.Fatal(err)
				}
			}
			if v, ok := set[i]; ok {
				if err := b.Set(ctx, i, ID{v}); err != nil {
					t.Fatal(err)
				}
			}
			next = i + 1
		}
		r, err := b.Finish(ctx, size)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	all := map[int64]byte{0: 1, 1 << 20: 2, size/(128<<10) - 1: 3}
	r1 := build(Root{}, all, true)
	if r2 := build(r1, all, true); r2 != r1 || m.stored != 0 {
		t.Fatalf("an unchanged disk stored %d pages", m.stored)
	}
	build(r1, map[int64]byte{1 << 20: 9}, false)
	if m.stored != 4 || m.loads != 4 {
		t.Fatalf("one changed chunk loaded %d and stored %d pages, want 4 and 4", m.loads, m.stored)
	}
}

func TestPageDecodeRefuses(t *testing.T) {
	var p, q page
	p.level = 2
	p.ids[3], p.ids[255] = ID{1}, ID{2}
	b := p.encode(nil)
	if err := decodePage(b, 2, &q); err != nil || q != p {
		t.Fatalf("round trip: %v", err)
	}
	for name, bad := range map[string][]byte{
		"short": b[:20], "long": append(b[:len(b):len(b)], 0), "cut": b[:len(b)-1], "empty": nil,
	} {
		if decodePage(bad, 2, &q) == nil {
			t.Errorf("%s page accepted", name)
		}
	}
	if decodePage(b, 1, &q) == nil {
		t.Error("a page of another level accepted")
	}
}
