package vdisk

import (
	"errors"
	"iter"
	"math/rand/v2"
	"testing"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// Every question is also answered by counting a slice of bools.
func TestBitmap(t *testing.T) {
	for seed := range uint64(40) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		n := 1 + rnd.Int64N(30000)
		m, ref := newBitmap(n), make([]bool, n)
		longest := 1 + rnd.Int64N(1<<rnd.IntN(15))
		for b := rnd.Int64N(longest); b < n; {
			end := min(n, b+1+rnd.Int64N(longest))
			m.set(b, end)
			for i := b; i < end; i++ {
				ref[i] = true
			}
			b = end + rnd.Int64N(longest)
		}
		m.seal()
		checkBitmap(t, m, ref)
	}
}

func checkBitmap(t *testing.T, m *bitmap, ref []bool) {
	t.Helper()
	rank, run := int64(0), int64(0)
	for b := int64(len(ref)) - 1; b >= 0; b-- {
		if run++; !ref[b] {
			run = 0
		}
		if got := m.run(b, 1<<40); got != run {
			t.Fatalf("run(%d) = %d, want %d", b, got, run)
		}
		if got := m.run(b, 3); got != min(run, 3) {
			t.Fatalf("run(%d, 3) = %d, want %d", b, got, min(run, 3))
		}
	}
	for b, member := range ref {
		if got := m.rank(int64(b)); got != rank || m.has(int64(b)) != member {
			t.Fatalf("rank(%d) = %d, want %d; has: %v, want %v", b, got, rank, !member, member)
		}
		if member {
			if got := m.pick(rank); got != int64(b) {
				t.Fatalf("pick(%d) = %d, want %d", rank, got, b)
			}
			rank++
		}
	}
	if n := int64(len(ref)); m.ones != rank || m.rank(n) != rank || m.rank(n+9) != rank || m.has(n) || m.run(n, 5) != 0 {
		t.Fatalf("past the end: ones %d, want %d", m.ones, rank)
	}
}

// A source that lists nonsense is refused, not believed.
func TestBadListings(t *testing.T) {
	broken := errors.New("broken")
	for name, seq := range map[string]iter.Seq2[extent.Extent, error]{
		"backwards": extent.All([]extent.Extent{ext(64*kib, 64*kib), ext(0, 64*kib)}),
		"overlap":   extent.All([]extent.Extent{ext(0, 128*kib), ext(64*kib, 64*kib)}),
		"past end":  extent.All([]extent.Extent{ext(0, mib+1)}),
		"negative":  extent.All([]extent.Extent{ext(-64*kib, 128*kib)}),
		"neg len":   extent.All([]extent.Extent{ext(64*kib, -64*kib)}),
		"overflow":  extent.All([]extent.Extent{ext(64*kib, 1<<63-1)}),
		"error":     failed(broken),
	} {
		for _, f := range formats()[:3] {
			_, err := f.make(listing{newModel(1, mib), seq}, "x.vmdk")
			if err == nil || name == "error" && !errors.Is(err, broken) {
				t.Errorf("%s, %s: %v", f.name, name, err)
			}
		}
	}
}

type listing struct {
	*model
	seq iter.Seq2[extent.Extent, error]
}

func (l listing) Allocated(int64) iter.Seq2[extent.Extent, error] { return l.seq }
