package overlay

import (
	"fmt"
	"iter"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// Allocated yields ascending ranges aligned to granularity and clipped to Size, outside of
// which all bytes are zero: what the image says, and what was written. It reads no data. What is
// written meanwhile may be missed.
func (d *Disk) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	return d.AllocatedFrom(0, granularity)
}

// AllocatedFrom is Allocated from off on; the first range may begin before it.
func (d *Disk) AllocatedFrom(off, granularity int64) iter.Seq2[extent.Extent, error] {
	return d.list(off, granularity, func(yield func(extent.Extent, error) bool) {
		d.runs(off, func(e extent.Extent, here bool) bool {
			if here {
				return d.dataIn(e, yield)
			}
			return d.imageIn(e, granularity, yield)
		})
	})
}

// Changed yields ascending ranges aligned to granularity and clipped to Size, outside of which the
// disk is what the image is, and zero past the image's end: what was written, zeroed
// or cut off.
func (d *Disk) Changed(granularity int64) iter.Seq2[extent.Extent, error] {
	return d.list(0, granularity, func(yield func(extent.Extent, error) bool) {
		cut := min(d.image.Size(), d.state.size) // from limit on the image is not seen
		d.runs(0, func(e extent.Extent, here bool) bool {
			if !here {
				e = extent.Intersect(e, extent.Extent{Off: d.state.limit, Len: max(0, cut-d.state.limit)})
			}
			return e.Empty() || yield(e, nil)
		})
	})
}

func (d *Disk) list(off, granularity int64, fine iter.Seq2[extent.Extent, error]) iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) {
		if granularity <= 0 || off < 0 {
			yield(extent.Extent{}, fmt.Errorf("overlay: granularity %d from %d", granularity, off))
			return
		}
		if err := d.enter(); err != nil {
			yield(extent.Extent{}, err)
			return
		}
		size := d.state.size
		d.gate.RUnlock()
		extent.Coarsen(fine, granularity, size)(yield)
	}
}

// runs calls fn with ranges that are in data, or not, until it returns false.
func (d *Disk) runs(off int64, fn func(e extent.Extent, here bool) bool) {
	for block := off / Block; ; {
		if d.enter() != nil {
			return
		}
		if block >= d.blocks.blocks {
			d.gate.RUnlock()
			return
		}
		n, here := d.blocks.run(block, d.blocks.blocks-block)
		d.gate.RUnlock()
		if !fn(extent.Extent{Off: block * Block, Len: n * Block}, here) {
			return
		}
		block += n
	}
}

// dataIn yields what of e is no hole in data.
func (d *Disk) dataIn(e extent.Extent, yield func(extent.Extent, error) bool) bool {
	for at := e.Off; at < e.End(); {
		from, to, err := d.data.Data(at, e.End())
		if err != nil {
			yield(extent.Extent{}, fmt.Errorf("overlay: %w", err))
			return false
		}
		from, to = max(at, from), min(to, e.End())
		if from >= to {
			return true
		}
		if !yield(extent.Extent{Off: from, Len: to - from}, nil) {
			return false
		}
		at = to
	}
	return true
}

// imageIn yields what the image has in e.
func (d *Disk) imageIn(e extent.Extent, granularity int64, yield func(extent.Extent, error) bool) bool {
	for x, err := range d.imageFrom(e.Off, granularity) {
		if err != nil {
			yield(extent.Extent{}, err)
			return false
		}
		if x.Off >= e.End() {
			return true
		}
		if x = extent.Intersect(x, e); !x.Empty() && !yield(x, nil) {
			return false
		}
	}
	return true
}
