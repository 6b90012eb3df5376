package vdisk

import (
	"fmt"
	"iter"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// inPlace is a computed file in which the disk lies as it is:
//
//	0         meta regions, zeros between them
//	maps      tables that say which parts of the disk have data
//	data      the disk, padded with zeros to whole units
//
// Its size is a function of the disk's size, and nothing is kept in memory. A
// read asks for the map of the disk where the tables it touches speak of it,
// and only there if the disk has AllocatedFrom.
type inPlace struct {
	src  Source
	meta []region   // ascending
	maps []mapTable // ascending, one after the other up to data
	unit int64      // bytes of disk per entry of a map
	data int64
	size int64
}

var _ File = (*inPlace)(nil)

// mapTable is an array with one entry per unit of the disk: zero where the disk
// has a hole.
type mapTable struct {
	extent.Extent
	table
	lead  int64                // entries before those of the disk: 1, all of them
	entry func(b int64) uint64 // of unit b, which has data
}

func (f *inPlace) Size() int64 { return f.size }

// AllocatedBytes is the size: a disk does not tell its data without a walk.
func (f *inPlace) AllocatedBytes() int64 { return f.size }

// ReadAt allocates nothing for data.
func (f *inPlace) ReadAt(p []byte, off int64) (int, error) {
	p, end := clip(p, off, f.size)
	for done := 0; done < len(p); {
		n, err := f.readPart(p[done:], off+int64(done))
		done += n
		if err != nil {
			return done, err
		}
	}
	return len(p), end
}

// readPart reads as far as one part of the file goes.
func (f *inPlace) readPart(p []byte, off int64) (int, error) {
	if off >= f.data {
		n, err := readPadded(f.src, p, off-f.data)
		if err != nil {
			err = fmt.Errorf("vdisk: reading the disk at %d: %w", off-f.data+int64(n), err)
		}
		return n, err
	}
	next := f.data
	for i := range f.maps {
		m := &f.maps[i]
		if off >= m.End() {
			continue
		}
		if off < m.Off {
			next = m.Off
			break
		}
		p = p[:min(int64(len(p)), m.End()-off)]
		if err := f.fillMap(m, p, off-m.Off); err != nil {
			return 0, fmt.Errorf("vdisk: listing the data of the disk: %w", err)
		}
		return len(p), nil
	}
	p = p[:min(int64(len(p)), next-off)]
	fillRegions(f.meta, p, off)
	return len(p), nil
}

// fillMap sets p to the bytes of m from off on.
func (f *inPlace) fillMap(m *mapTable, p []byte, off int64) error {
	w := int64(m.width)
	end := off + int64(len(p))
	put := func(from, to int64, entry func(i int64) uint64) { // entries
		lo, hi := max(off, from*w), min(end, to*w)
		if lo < hi {
			m.fill(p[lo-off:hi-off], lo, entry)
		}
	}
	clear(p)
	put(0, m.lead, func(int64) uint64 { return 1 })
	first, last := max(0, off/w-m.lead), divUp(end, w)-m.lead
	if first >= last {
		return nil
	}
	for e, err := range allocatedFrom(f.src, first*f.unit, f.unit) {
		if err != nil {
			return err
		}
		if e.Off >= last*f.unit {
			break
		}
		put(m.lead+e.Off/f.unit, m.lead+divUp(e.End(), f.unit), func(i int64) uint64 { return m.entry(i - m.lead) })
	}
	return nil
}

// Allocated walks the map of the disk once for each table, and once for itself.
func (f *inPlace) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	if granularity <= 0 {
		return failed(fmt.Errorf("vdisk: granularity %d", granularity))
	}
	return extent.Coarsen(f.parts(granularity), granularity, f.size)
}

func (f *inPlace) parts(granularity int64) iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) {
		for _, r := range f.meta {
			if !r.allocated(yield) {
				return
			}
		}
		for _, m := range f.maps {
			if !yield(extent.Extent{Off: m.Off, Len: m.lead * int64(m.width)}, nil) || !f.mapParts(m, yield) {
				return
			}
		}
		for e, err := range f.src.Allocated(granularity) {
			e.Off += f.data
			if !yield(e, err) || err != nil {
				return
			}
		}
	}
}

func (f *inPlace) mapParts(m mapTable, yield func(extent.Extent, error) bool) bool {
	for e, err := range f.src.Allocated(f.unit) {
		if err != nil {
			yield(extent.Extent{}, fmt.Errorf("vdisk: listing the data of the disk: %w", err))
			return false
		}
		w := int64(m.width)
		part := to((m.lead+e.Off/f.unit)*w, (m.lead+divUp(e.End(), f.unit))*w)
		part.Off += m.Off
		if !yield(part, nil) {
			return false
		}
	}
	return true
}
