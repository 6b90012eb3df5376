package ntfs

import (
	"fmt"
	"io"
	"iter"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// file is the content of a stream.
type file struct {
	s *stream
}

func (f *FS) file(a *attr) (guest.File, error) {
	switch {
	case a.flags&encrypted != 0:
		return nil, guest.Unsupported("a file that Windows encrypted (EFS)")
	case a.unit != 0 && a.flags&compressMask != compressLZNT1:
		return nil, guest.Unsupported("compression %d", a.flags&compressMask)
	}
	return file{f.stream(a)}, nil
}

// Size implements guest.File.
func (f file) Size() int64 { return f.s.a.size }

// ReadAt implements io.ReaderAt.
func (f file) ReadAt(p []byte, off int64) (int, error) {
	a := f.s.a
	if off < 0 {
		return 0, fmt.Errorf("ntfs: read at %d", off)
	}
	if off >= a.size && len(p) > 0 {
		return 0, io.EOF
	}
	n := int(max(0, min(int64(len(p)), a.size-off)))
	// What lies behind the valid length is zeros, whatever is on the disk.
	valid := int(max(0, min(int64(n), a.valid-off)))
	var err error
	switch {
	case valid == 0:
	case a.unit > 0:
		err = f.s.readUnits(p[:valid], off)
	default:
		err = f.s.read(p[:valid], off)
	}
	if err != nil {
		return 0, err
	}
	clear(p[valid:n])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Allocated implements guest.File.
func (f file) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	a := f.s.a
	if a.resident {
		return extent.Coarsen(extent.All([]extent.Extent{{Len: a.size}}), granularity, a.size)
	}
	unit := max(a.unit, 1) * f.s.fs.geo.cluster
	return extent.Coarsen(func(yield func(extent.Extent, error) bool) {
		for r, err := range f.s.stored() {
			if err != nil {
				yield(extent.Extent{}, err)
				return
			}
			// A unit of which a cluster is there has all its bytes.
			e := extent.Align(extent.Extent{Off: r.vcn * f.s.fs.geo.cluster, Len: r.n * f.s.fs.geo.cluster}, unit)
			if e = extent.Intersect(e, extent.Extent{Len: min(a.valid, a.size)}); !e.Empty() && !yield(e, nil) {
				return
			}
		}
	}, granularity, a.size)
}

// stored yields the runs of a stream that are somewhere, as far as its allocated length goes.
func (s *stream) stored() iter.Seq2[run, error] {
	return func(yield func(run, error) bool) {
		end := (s.a.allocated + s.fs.geo.cluster - 1) / s.fs.geo.cluster
		for vcn := int64(0); vcn < end && len(s.a.parts) > 0; {
			runs, err := s.runs(vcn)
			if err != nil {
				yield(run{}, err)
				return
			}
			for _, r := range runs[find(runs, vcn):] {
				if r.lcn != hole && !yield(r, nil) {
					return
				}
				vcn = r.vcn + r.n
			}
		}
	}
}
