package vdisk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// computed is what VHDX, sparse VMDK and qcow2 have in common:
//
//	0            meta regions, zeros between them
//	data         the first block of the disk that has data, whole
//	data+unit    the second
//	…
//	size         after the last one
//
// Blocks lie in the order of the disk, so the place of a block is the number of
// blocks with data before it. The part of the last block past the end of the
// disk is zero.
type computed struct {
	src    Source
	blocks *bitmap  // which blocks of the disk have data
	unit   int64    // bytes per block
	meta   []region // ascending
	data   int64    // where the blocks begin, a multiple of what the format asks
	size   int64    // of the file
	stored int64    // bytes of tables that are not all zero, and of blocks
}

var _ File = (*computed)(nil)

// region is a part of the file that is made up, not read.
type region struct {
	extent.Extent
	fill func(p []byte, off int64) // sets all of p to the bytes from off (within the region) on
	// When piece is not 0 the region consists of pieces of that many bytes,
	// all zero unless used.
	piece int64
	used  func(i int64) bool
}

// bytesRegion holds b at off.
func bytesRegion(off int64, b []byte) region {
	return region{
		Extent: extent.Extent{Off: off, Len: int64(len(b))},
		fill:   func(p []byte, off int64) { copy(p, b[off:]) },
	}
}

// fillRegions sets p to what regions have from off on, zeros between them.
func fillRegions(regions []region, p []byte, off int64) {
	for i := range regions {
		r := &regions[i]
		if r.End() <= off {
			continue
		}
		if gap := min(int64(len(p)), r.Off-off); gap > 0 {
			clear(p[:gap])
			p, off = p[gap:], off+gap
		}
		n := min(int64(len(p)), r.End()-off)
		if n <= 0 {
			break
		}
		r.fill(p[:n], off-r.Off)
		p, off = p[n:], off+n
	}
	clear(p)
}

// finish does the sums once everything else is set.
func (c *computed) finish() *computed {
	c.size = c.data + c.blocks.ones*c.unit
	c.stored = c.size - c.data
	for _, r := range c.meta {
		r.allocated(func(e extent.Extent, _ error) bool {
			c.stored += e.Len
			return true
		})
	}
	return c
}

func (c *computed) Size() int64 { return c.size }

// place is where block b, which has data, is in the file.
func (c *computed) place(b int64) int64 { return c.data + c.blocks.rank(b)*c.unit }

// ReadAt allocates nothing unless it fails.
func (c *computed) ReadAt(p []byte, off int64) (int, error) {
	p, end := clip(p, off, c.size)
	done := 0
	if off < c.data && len(p) > 0 {
		done = int(min(int64(len(p)), c.data-off))
		fillRegions(c.meta, p[:done], off)
	}
	n, err := c.readBlocks(p[done:], off+int64(done))
	if err != nil {
		return done + n, err
	}
	return done + n, end
}

// readBlocks asks the disk once per run of neighbouring blocks.
func (c *computed) readBlocks(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		at := off - c.data + int64(done)
		b, in := c.blocks.pick(at/c.unit), at%c.unit
		left := int64(len(p) - done)
		n := min(left, c.blocks.run(b, divUp(in+left, c.unit))*c.unit-in)
		got, err := readPadded(c.src, p[done:done+int(n)], b*c.unit+in)
		done += got
		if err != nil {
			return done, fmt.Errorf("vdisk: reading the disk at %d: %w", b*c.unit+in, err)
		}
	}
	return done, nil
}

func (c *computed) AllocatedBytes() int64 { return c.stored }

// Allocated asks the disk only when granularity is finer than a block.
func (c *computed) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	if granularity <= 0 {
		return failed(fmt.Errorf("vdisk: granularity %d", granularity))
	}
	fine := func(yield func(extent.Extent, error) bool) {
		for _, r := range c.meta {
			if !r.allocated(yield) {
				return
			}
		}
		if granularity >= c.unit {
			yield(extent.Extent{Off: c.data, Len: c.size - c.data}, nil)
			return
		}
		c.mapped(granularity, yield)
	}
	return extent.Coarsen(fine, granularity, c.size)
}

func (r region) allocated(yield func(extent.Extent, error) bool) bool {
	if r.piece == 0 {
		return yield(r.Extent, nil)
	}
	for i := range r.Len / r.piece {
		if r.used(i) && !yield(extent.Extent{Off: r.Off + i*r.piece, Len: r.piece}, nil) {
			return false
		}
	}
	return true
}

var errSourceChanged = errors.New("vdisk: the disk lists data where it had none before")

// mapped yields the data of the disk at its places in the file.
func (c *computed) mapped(granularity int64, yield func(extent.Extent, error) bool) {
	for e, err := range c.src.Allocated(granularity) {
		if err != nil {
			yield(extent.Extent{}, fmt.Errorf("vdisk: listing the data of the disk: %w", err))
			return
		}
		b, in := e.Off/c.unit, e.Off%c.unit
		if n := divUp(in+e.Len, c.unit); c.blocks.run(b, n) != n {
			yield(extent.Extent{}, errSourceChanged)
			return
		}
		if !yield(extent.Extent{Off: c.place(b) + in, Len: e.Len}, nil) {
			return
		}
	}
}

// table is an array of integers that is computed entry by entry.
type table struct {
	width int  // bytes per entry: 2, 4 or 8
	big   bool // endian
}

// fill sets p to the bytes of the table from off on.
func (t table) fill(p []byte, off int64, entry func(i int64) uint64) {
	w := int64(t.width)
	i := off / w
	var one [8]byte
	if cut := off % w; cut != 0 {
		t.put(one[:], entry(i))
		p = p[copy(p, one[cut:w]):]
		i++
	}
	for ; len(p) >= t.width; i++ {
		t.put(p, entry(i))
		p = p[t.width:]
	}
	if len(p) > 0 {
		t.put(one[:], entry(i))
		copy(p, one[:])
	}
}

func (t table) put(p []byte, v uint64) {
	switch {
	case t.width == 8 && t.big:
		binary.BigEndian.PutUint64(p, v)
	case t.width == 8:
		binary.LittleEndian.PutUint64(p, v)
	case t.width == 4 && t.big:
		binary.BigEndian.PutUint32(p, uint32(v))
	case t.width == 4:
		binary.LittleEndian.PutUint32(p, uint32(v))
	default:
		binary.BigEndian.PutUint16(p, uint16(v))
	}
}
