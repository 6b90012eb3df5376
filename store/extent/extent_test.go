package extent

import (
	"errors"
	"iter"
	"math/rand/v2"
	"slices"
	"testing"
)

// TestAgainstBitmap compares every operation with a plain bitmap of a small disk.
func TestAgainstBitmap(t *testing.T) {
	const size = 200
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		var es []Extent
		var bits [size]bool
		for range rnd.IntN(8) {
			e := Extent{rnd.Int64N(size), rnd.Int64N(30)}
			e = Intersect(e, Extent{0, size})
			es = append(es, e)
			for i := e.Off; i < e.End(); i++ {
				bits[i] = true
			}
		}
		es = Normalise(es)
		if got := toBits(es, size); !slices.Equal(got, bits[:]) {
			t.Fatalf("Normalise: %v", es)
		}
		for i := 1; i < len(es); i++ {
			if es[i].Off <= es[i-1].End() {
				t.Fatalf("not merged: %v", es)
			}
		}
		n := int64(0)
		for _, b := range bits {
			if b {
				n++
			}
		}
		if Total(es) != n {
			t.Fatalf("Total(%v) = %d, want %d", es, Total(es), n)
		}
		unit := 1 + rnd.Int64N(20)
		var coarse []Extent
		for e, err := range Coarsen(All(es), unit, size) {
			if err != nil {
				t.Fatal(err)
			}
			coarse = append(coarse, e)
		}
		var want [size]bool
		for i, b := range bits {
			if b {
				lo := int64(i) / unit * unit
				for j := lo; j < min(lo+unit, size); j++ {
					want[j] = true
				}
			}
		}
		if got := toBits(coarse, size); !slices.Equal(got, want[:]) {
			t.Fatalf("Coarsen(%v, %d) = %v", es, unit, coarse)
		}
		limit := unit * (1 + rnd.Int64N(5))
		var parts []Extent
		src := func(yield func(Extent, error) bool) {
			for i, e := range es {
				if !yield(e, nil) {
					return
				}
				if Total(es[:i+1])-Total(parts) >= limit {
					t.Fatalf("CoarsenUpTo(%v, %d, %d) holds %v back behind %v", es, unit, limit, e, parts)
				}
			}
		}
		for e, err := range CoarsenUpTo(src, unit, limit, size) {
			if n := len(parts); err != nil || e.Empty() || e.Len > limit || n > 0 && e.Off < parts[n-1].End() {
				t.Fatalf("CoarsenUpTo(%v, %d, %d): %v, %v after %v", es, unit, limit, e, err, parts)
			}
			parts = append(parts, e)
		}
		if !slices.Equal(Normalise(parts), coarse) {
			t.Fatalf("CoarsenUpTo(%v, %d, %d) = %v", es, unit, limit, parts)
		}
	}
}

func toBits(es []Extent, size int) []bool {
	bits := make([]bool, size)
	for _, e := range es {
		for i := e.Off; i < e.End(); i++ {
			bits[i] = true
		}
	}
	return bits
}

func TestCoarsenError(t *testing.T) {
	boom := errors.New("boom")
	src := func(yield func(Extent, error) bool) {
		if yield(Extent{0, 1}, nil) {
			yield(Extent{}, boom)
		}
	}
	var last error
	for _, err := range Coarsen(src, 10, 100) {
		last = err
	}
	if last != boom {
		t.Fatalf("error lost: %v", last)
	}
}

// someOf makes random ranges within size.
func someOf(rnd *rand.Rand, size int64) []Extent {
	var es []Extent
	for range rnd.IntN(8) {
		es = append(es, Intersect(Extent{rnd.Int64N(size), rnd.Int64N(30)}, Extent{0, size}))
	}
	return Normalise(es)
}

// TestPairsAgainstBitmap compares operations on two lists with bitmaps.
func TestPairsAgainstBitmap(t *testing.T) {
	const size = 200
	rnd := rand.New(rand.NewPCG(3, 4))
	for range 5000 {
		a, b := someOf(rnd, size), someOf(rnd, size)
		abits, bbits := toBits(a, size), toBits(b, size)
		less, both := make([]bool, size), make([]bool, size)
		for i := range size {
			less[i], both[i] = abits[i] && !bbits[i], abits[i] || bbits[i]
		}
		for name, c := range map[string]struct {
			got  iter.Seq2[Extent, error]
			want []bool
		}{
			"Subtract": {Subtract(All(a), slices.Values(b)), less},
			"Merge":    {Merge(All(a), All(b)), both},
		} {
			var list []Extent
			for e, err := range c.got {
				if n := len(list); err != nil || e.Empty() || n > 0 && e.Off < list[n-1].End() {
					t.Fatalf("%s(%v, %v): %v, %v after %v", name, a, b, e, err, list)
				}
				list = append(list, e)
			}
			if !slices.Equal(toBits(list, size), c.want) {
				t.Fatalf("%s(%v, %v) = %v", name, a, b, list)
			}
		}
	}
	bad := errors.New("bad")
	failing := func(yield func(Extent, error) bool) { _ = yield(Extent{0, 5}, nil) && yield(Extent{}, bad) }
	for _, seq := range []iter.Seq2[Extent, error]{Subtract(failing, slices.Values([]Extent(nil))), Merge(failing, All(nil)), Merge(All(nil), failing)} {
		var got error
		for _, err := range seq {
			got = err
		}
		if !errors.Is(got, bad) {
			t.Errorf("the error is lost: %v", got)
		}
	}
}
