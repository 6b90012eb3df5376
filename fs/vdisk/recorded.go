package vdisk

import (
	"fmt"
	"iter"
	"slices"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// recorded is a computed file in which each block of the disk stands in a
// record, with something before or behind it, and in which something follows
// the records:
//
//	0     meta regions, zeros between them
//	data  the record of the first block of the disk that has data
//	…     the second …
//	tail  meta regions, zeros between them
//
// Records lie in the order of the disk and are all of one size.
type recorded struct {
	src    Source
	blocks *bitmap
	stride int64 // bytes per record
	data   int64 // where the records begin
	tail   int64 // where they end
	size   int64
	stored int64
	head   []region // ascending, from 0 on
	after  []region // ascending, from tail on
	// read sets p, which is not empty, to the bytes from in on of the record of
	// block b, not past its end.
	read func(p []byte, b, in int64) (int, error)
}

var _ File = (*recorded)(nil)

// finish takes the regions, those of after relative to where the records end.
func (r *recorded) finish(head, after []region) {
	r.head = head
	r.tail = r.data + r.blocks.ones*r.stride
	r.size = r.tail
	for _, a := range after {
		a.Off += r.tail
		r.after = append(r.after, a)
		r.size = a.End()
	}
	r.stored = r.tail - r.data
	for _, m := range slices.Concat(r.head, r.after) {
		r.stored += m.Len
	}
}

func (r *recorded) Size() int64           { return r.size }
func (r *recorded) AllocatedBytes() int64 { return r.stored }

// place is where the record of block b, which has data, is in the file.
func (r *recorded) place(b int64) int64 { return r.data + r.blocks.rank(b)*r.stride }

func (r *recorded) ReadAt(p []byte, off int64) (int, error) {
	p, end := clip(p, off, r.size)
	done := 0
	if off < r.data && len(p) > 0 {
		done = int(min(int64(len(p)), r.data-off))
		fillRegions(r.head, p[:done], off)
	}
	for done < len(p) && off+int64(done) < r.tail {
		at := off + int64(done) - r.data
		in := at % r.stride
		n := int(min(int64(len(p)-done), r.stride-in, r.tail-r.data-at))
		b := r.blocks.pick(at / r.stride)
		got, err := r.read(p[done:done+n], b, in)
		done += got
		if err != nil {
			return done, fmt.Errorf("vdisk: reading block %d of the disk: %w", b, err)
		}
	}
	if done < len(p) {
		fillRegions(r.after, p[done:], off+int64(done))
		done = len(p)
	}
	return done, end
}

// Allocated takes every record for data.
func (r *recorded) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	if granularity <= 0 {
		return failed(fmt.Errorf("vdisk: granularity %d", granularity))
	}
	all := []extent.Extent{{Off: r.data, Len: r.tail - r.data}}
	for _, m := range slices.Concat(r.head, r.after) {
		all = append(all, m.Extent)
	}
	return extent.Coarsen(extent.All(extent.Normalise(all)), granularity, r.size)
}
