package ntfs

import (
	"fmt"
	"slices"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// stream reads the value of an attribute: its bytes as they are stored, or what they are made of when they are compressed.
type stream struct {
	fs  *FS
	a   *attr
	mft []run // all runs, of $MFT only
}

func (f *FS) stream(a *attr) *stream { return &stream{fs: f, a: a} }

// runKey names a part of an attribute: a record and an id in it.
type runKey struct {
	record int64
	id     uint16
}

// runs gives the runs of the part that has the cluster vcn.
func (s *stream) runs(vcn int64) ([]run, error) {
	if s.mft != nil {
		return covering(s.mft, s.a.kind, vcn)
	}
	i, ok := slices.BinarySearchFunc(s.a.parts, vcn, func(p part, vcn int64) int { return int(min(1, max(-1, p.low-vcn))) })
	if !ok {
		i--
	}
	if i < 0 {
		return nil, guest.Damaged("attribute %#x: no cluster %d", s.a.kind, vcn)
	}
	p := s.a.parts[i]
	key := runKey{p.record, p.id}
	runs, ok := s.fs.runs.Get(key)
	if !ok {
		var err error
		if runs, err = s.fs.decode(s.a, p); err != nil {
			return nil, err
		}
		s.fs.runs.Put(key, runs, 64+24*int64(cap(runs)))
	}
	return covering(runs, s.a.kind, vcn)
}

func covering(runs []run, kind uint32, vcn int64) ([]run, error) {
	if n := len(runs); n == 0 || vcn >= runs[n-1].vcn+runs[n-1].n {
		return nil, guest.Damaged("attribute %#x: no cluster %d", kind, vcn)
	}
	return runs, nil
}

func (f *FS) decode(a *attr, p part) ([]run, error) {
	if p.pairs == nil {
		h, err := f.attribute(a.base, p.record, a.kind, p.id)
		if err != nil {
			return nil, err
		}
		low := p.low
		if p, err = h.part(p.record); err != nil {
			return nil, err
		}
		if p.low != low {
			return nil, guest.Damaged("record %d of the MFT: clusters from %d on and not %d", p.record, p.low, low)
		}
	}
	runs, err := decodeRuns(p.pairs, p.low, p.high, f.geo.clusters)
	if err != nil {
		return nil, fmt.Errorf("record %d of the MFT: %w", p.record, err)
	}
	return runs, nil
}

// read fills p with what lies at off: of a stream that is not compressed, within its allocated clusters.
func (s *stream) read(p []byte, off int64) error {
	if s.a.resident {
		if off+int64(len(p)) > int64(len(s.a.value)) {
			return guest.Damaged("attribute %#x: %d bytes", s.a.kind, len(s.a.value))
		}
		copy(p, s.a.value[off:])
		return nil
	}
	if n := max(0, min(int64(len(p)), s.a.valid-off)); n < int64(len(p)) {
		clear(p[n:])
		p = p[:n]
	}
	return s.raw(p, off)
}

// raw fills p from clusters. Holes are zeros.
func (s *stream) raw(p []byte, off int64) error {
	cluster := s.fs.geo.cluster
	for len(p) > 0 {
		runs, err := s.runs(off / cluster)
		if err != nil {
			return err
		}
		for _, r := range runs[find(runs, off/cluster):] {
			in := off - r.vcn*cluster
			n := min(int64(len(p)), r.n*cluster-in)
			if r.lcn == hole {
				clear(p[:n])
			} else if err := guest.ReadFull(s.fs.dev, p[:n], r.lcn*cluster+in); err != nil {
				return err
			}
			if p, off = p[n:], off+n; len(p) == 0 {
				break
			}
		}
	}
	return nil
}

// all reads the whole of a value that is at most limit bytes.
func (s *stream) all(limit int64) ([]byte, error) {
	if s.a.resident {
		return s.a.value, nil
	}
	if s.a.size > limit {
		return nil, guest.Damaged("attribute %#x: %d bytes", s.a.kind, s.a.size)
	}
	if !s.a.plain() {
		return nil, guest.Unsupported("attribute %#x: compressed or encrypted", s.a.kind)
	}
	b := make([]byte, s.a.size)
	return b, s.read(b, 0)
}
