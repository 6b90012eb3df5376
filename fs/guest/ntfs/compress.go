package ntfs

import (
	"github.com/holdfast-backup/holdfast/fs/guest"
)

// unitKey names a piece of what a file decompresses to: a record, an id in it, and the number of the unit.
type unitKey struct {
	runKey
	n int64
}

// maxUnit bounds a compression unit, bytes; Windows has none above 64 KiB.
const maxUnit = 1 << 20

// readUnits fills p from a compressed stream, below its valid length.
func (s *stream) readUnits(p []byte, off int64) error {
	size := s.a.unit * s.fs.geo.cluster
	if size > maxUnit {
		return guest.Unsupported("a compression unit of %d bytes", size)
	}
	for len(p) > 0 {
		n, in := off/size, off%size
		k := int(min(int64(len(p)), size-in))
		if in == 0 && int64(k) == size {
			if err := s.expand(p[:k], n); err != nil {
				return err
			}
		} else {
			unit, err := s.cachedUnit(n, size)
			if err != nil {
				return err
			}
			copy(p[:k], unit[in:])
		}
		p, off = p[k:], off+int64(k)
	}
	return nil
}

func (s *stream) cachedUnit(n, size int64) ([]byte, error) {
	first := s.a.parts[0]
	key := unitKey{runKey{first.record, first.id}, n}
	if unit, ok := s.fs.units.Get(key); ok {
		return unit, nil
	}
	unit := make([]byte, size)
	if err := s.expand(unit, n); err != nil {
		return nil, err
	}
	s.fs.units.Put(key, unit, size+128)
	return unit, nil
}

// expand makes compression unit n (NTFS doc, "Compressed files"): clusters that are all there hold it as it is, none are zeros, and
// some, which are the first, hold it compressed.
func (s *stream) expand(dst []byte, n int64) error {
	stored, err := s.unitRuns(n)
	if err != nil {
		return err
	}
	cluster := s.fs.geo.cluster
	have := int64(0)
	for _, r := range stored {
		have += r.n
	}
	// The last unit of a file may have no more clusters than the file has.
	need := min(s.a.unit, (s.a.valid-n*s.a.unit*cluster+cluster-1)/cluster)
	src := dst
	switch {
	case have == 0:
		clear(dst)
		return nil
	case have < need:
		src = make([]byte, have*cluster)
	case have < s.a.unit && s.holeAfter(n, have):
		src = make([]byte, have*cluster)
	}
	at := int64(0)
	for _, r := range stored {
		if err := guest.ReadFull(s.fs.dev, src[at:at+r.n*cluster], r.lcn*cluster); err != nil {
			return err
		}
		at += r.n * cluster
	}
	if &src[0] == &dst[0] {
		clear(dst[at:])
		return nil
	}
	return lznt1(dst, src)
}

// unitRuns gives what of a unit is on the disk.
func (s *stream) unitRuns(n int64) ([]run, error) {
	vcn, end := n*s.a.unit, (n+1)*s.a.unit
	if last := (s.a.allocated + s.fs.geo.cluster - 1) / s.fs.geo.cluster; end > last {
		end = last
	}
	var stored []run
	for vcn < end {
		runs, err := s.runs(vcn)
		if err != nil {
			return nil, err
		}
		for _, r := range runs[find(runs, vcn):] {
			k := min(r.vcn+r.n, end) - vcn
			if r.lcn != hole {
				stored = append(stored, run{vcn, r.lcn + vcn - r.vcn, k})
			}
			if vcn += k; vcn >= end {
				break
			}
		}
	}
	return stored, nil
}

// holeAfter reports whether a hole fills a unit up behind its first clusters, as it does when they hold it compressed.
func (s *stream) holeAfter(n, have int64) bool {
	vcn := n*s.a.unit + have
	runs, err := s.runs(vcn)
	return err == nil && runs[find(runs, vcn)].lcn == hole
}
