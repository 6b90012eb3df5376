package vdisk

import (
	"io"
	"iter"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// section is the part of a disk of size bytes from base on, with zeros past the
// end of the disk.
type section struct {
	src  Source
	base int64
	size int64
}

func (s section) Size() int64 { return s.size }

func (s section) ReadAt(p []byte, off int64) (int, error) {
	p, end := clip(p, off, s.size)
	if len(p) == 0 {
		return 0, end
	}
	if n, err := readPadded(s.src, p, s.base+off); err != nil {
		return n, err
	}
	return len(p), end
}

func (s section) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	return s.AllocatedFrom(0, granularity)
}

func (s section) AllocatedFrom(off, granularity int64) iter.Seq2[extent.Extent, error] {
	whole := extent.Extent{Off: s.base, Len: s.size}
	fine := func(yield func(extent.Extent, error) bool) {
		for e, err := range allocatedFrom(s.src, s.base+off, granularity) {
			if err == nil && e.Off >= whole.End() {
				return
			}
			if e = extent.Intersect(e, whole); err == nil && e.Empty() {
				continue
			}
			e.Off -= s.base
			if !yield(e, err) {
				return
			}
		}
	}
	return extent.Coarsen(fine, granularity, s.size)
}

// opaque is a disk in a file whose holes are not known.
type opaque struct {
	io.ReaderAt
	size int64
}

func (o opaque) Size() int64 { return o.size }

func (o opaque) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	return extent.All([]extent.Extent{{Len: o.size}})
}

// zeros is a disk of size bytes without data.
type zeros struct{ size int64 }

func (z zeros) Size() int64 { return z.size }

func (z zeros) ReadAt(p []byte, off int64) (int, error) {
	p, end := clip(p, off, z.size)
	clear(p)
	return len(p), end
}

func (z zeros) Allocated(int64) iter.Seq2[extent.Extent, error] { return extent.All(nil) }
