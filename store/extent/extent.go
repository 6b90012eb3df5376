// Package extent is arithmetic on byte ranges: the one place that aligns,
// clips, merges and subtracts them. It does no I/O and imports nothing of ours.
//
//	for e, err := range extent.Coarsen(src, 1<<20, size) { … }
package extent

import (
	"cmp"
	"fmt"
	"iter"
	"math"
	"slices"
)

// Extent is the byte range [Off, Off+Len).
type Extent struct {
	Off int64 // bytes from the start of the disk
	Len int64 // bytes
}

// End is the first byte after e.
func (e Extent) End() int64 { return e.Off + e.Len }

// Empty reports whether e covers no byte.
func (e Extent) Empty() bool { return e.Len <= 0 }

// String formats e as [off,end).
func (e Extent) String() string { return fmt.Sprintf("[%d,%d)", e.Off, e.End()) }

// Intersect returns the bytes common to a and b; the result may be empty.
func Intersect(a, b Extent) Extent {
	off := max(a.Off, b.Off)
	return Extent{off, max(0, min(a.End(), b.End())-off)}
}

// Align grows e outwards to multiples of unit (bytes, positive).
func Align(e Extent, unit int64) Extent {
	off := e.Off - e.Off%unit
	end := e.End()
	if r := end % unit; r != 0 {
		end += unit - r
	}
	return Extent{off, end - off}
}

// Normalise sorts es, drops empty ranges and merges those that touch or overlap.
// It may reuse the memory of es.
func Normalise(es []Extent) []Extent {
	es = slices.DeleteFunc(es, Extent.Empty)
	slices.SortFunc(es, func(a, b Extent) int { return cmp.Compare(a.Off, b.Off) })
	out := es[:0]
	for _, e := range es {
		if n := len(out); n > 0 && e.Off <= out[n-1].End() {
			out[n-1].Len = max(out[n-1].End(), e.End()) - out[n-1].Off
			continue
		}
		out = append(out, e)
	}
	return out
}

// Total is the number of bytes in es, which must not overlap.
func Total(es []Extent) int64 {
	var n int64
	for _, e := range es {
		n += e.Len
	}
	return n
}

// Coarsen turns ascending, non-overlapping ranges into ranges aligned to unit,
// merged where they touch and clipped to [0, size). An error of src is passed
// on and ends the sequence.
func Coarsen(src iter.Seq2[Extent, error], unit, size int64) iter.Seq2[Extent, error] {
	return CoarsenUpTo(src, unit, math.MaxInt64, size)
}

// CoarsenUpTo is Coarsen in ranges of at most limit bytes, a multiple of unit: src is asked for no more
// than that beyond what was yielded. A src that waits until its ranges are read needs that.
func CoarsenUpTo(src iter.Seq2[Extent, error], unit, limit, size int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		var cur Extent // from the end of what was yielded on
		for e, err := range src {
			if err != nil {
				yield(Extent{}, err)
				return
			}
			e = Intersect(Align(e, unit), Extent{cur.Off, size - cur.Off})
			if e.Empty() {
				continue
			}
			if e.Off > cur.End() {
				if !cur.Empty() && !yield(cur, nil) {
					return
				}
				cur.Off, cur.Len = e.Off, 0
			}
			for cur.Len = max(cur.End(), e.End()) - cur.Off; cur.Len >= limit; cur = (Extent{cur.Off + limit, cur.Len - limit}) {
				if !yield(Extent{cur.Off, limit}, nil) {
					return
				}
			}
		}
		if !cur.Empty() {
			yield(cur, nil)
		}
	}
}

// All adapts a slice to the iterator form used for listings.
func All(es []Extent) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		for _, e := range es {
			if !yield(e, nil) {
				return
			}
		}
	}
}

// Subtract yields what of src is in none of gone; both are ascending and each without overlaps. An error of src is passed on and ends
// the sequence.
func Subtract(src iter.Seq2[Extent, error], gone iter.Seq[Extent]) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		next, stop := iter.Pull(gone)
		defer stop()
		g, more := next()
		for e, err := range src {
			if err != nil {
				yield(Extent{}, err)
				return
			}
			for !e.Empty() {
				for more && g.End() <= e.Off {
					g, more = next()
				}
				piece := e
				if more && g.Off < e.End() {
					piece.Len = max(0, g.Off-e.Off)
					rest := min(g.End(), e.End())
					e = Extent{rest, e.End() - rest}
				} else {
					e = Extent{}
				}
				if !piece.Empty() && !yield(piece, nil) {
					return
				}
			}
		}
	}
}

// Merge yields what is in a or in b, ascending and without overlaps; each of them is. An error of either is passed on and ends
// the sequence.
func Merge(a, b iter.Seq2[Extent, error]) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		next, stop := iter.Pull2(b)
		defer stop()
		other, berr, more := next()
		var cur Extent
		// put joins e to cur, or yields that when e does not touch it.
		put := func(e Extent) bool {
			if !cur.Empty() && e.Off <= cur.End() {
				cur.Len = max(cur.End(), e.End()) - cur.Off
				return true
			}
			before := cur
			cur = e
			return before.Empty() || yield(before, nil)
		}
		upTo := func(off int64) bool {
			for more && (berr != nil || other.Off <= off) {
				if berr != nil {
					yield(Extent{}, berr)
					return false
				}
				if !put(other) {
					return false
				}
				other, berr, more = next()
			}
			return true
		}
		for e, err := range a {
			if err != nil {
				yield(Extent{}, err)
				return
			}
			if !upTo(e.Off) || !put(e) {
				return
			}
		}
		if upTo(1<<63-1) && !cur.Empty() {
			yield(cur, nil)
		}
	}
}
