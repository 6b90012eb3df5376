package vdisk

import (
	"iter"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// Flat is the disk itself, padded with zeros to whole sectors: the extent file
// beside a VMDKDescriptor.
func Flat(src Source) File { return flat{src, roundUp(src.Size(), sector)} }

type flat struct {
	src  Source
	size int64
}

func (f flat) Size() int64 { return f.size }

func (f flat) ReadAt(p []byte, off int64) (int, error) {
	p, end := clip(p, off, f.size)
	if n, err := readPadded(f.src, p, off); err != nil {
		return n, err
	}
	return len(p), end
}

// AllocatedBytes is the size: a disk does not tell its data without a walk.
func (f flat) AllocatedBytes() int64 { return f.size }

func (f flat) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	// Again through Coarsen: the last range may now end a little later.
	return extent.Coarsen(f.src.Allocated(granularity), granularity, f.size)
}
