package unneeded

import (
	"iter"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// set is a set of units of a disk, a bit for each.
type set struct {
	unit, size int64 // bytes
	bits       []uint64
}

func newSet(size, unit int64) *set {
	return &set{unit: unit, size: size, bits: make([]uint64, ((size+unit-1)/unit+63)/64)}
}

func (s *set) has(i int64) bool { return s.bits[i/64]>>(i%64)&1 != 0 }

// add adds the units that lie whole within a range, and gives how many bytes those are that were not there before.
func (s *set) add(e extent.Extent) (bytes int64) {
	first, end := (e.Off+s.unit-1)/s.unit, e.End()/s.unit
	if e.End() >= s.size {
		end = (s.size + s.unit - 1) / s.unit
	}
	for i := first; i < end; i++ {
		if !s.has(i) {
			s.bits[i/64] |= 1 << (i % 64)
			bytes += min(s.unit, s.size-i*s.unit)
		}
	}
	return bytes
}

// ranges yields what is in the set, ascending.
func (s *set) ranges() iter.Seq[extent.Extent] {
	return func(yield func(extent.Extent) bool) {
		n := (s.size + s.unit - 1) / s.unit
		for i := int64(0); i < n; {
			if s.bits[i/64] == 0 {
				i += 64 - i%64
				continue
			}
			if !s.has(i) {
				i++
				continue
			}
			first := i
			for i < n && s.has(i) {
				i++
			}
			if !yield(extent.Extent{Off: first * s.unit, Len: min(i*s.unit, s.size) - first*s.unit}) {
				return
			}
		}
	}
}
