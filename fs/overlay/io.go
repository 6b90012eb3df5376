package overlay

import (
	"fmt"
	"io"
	"iter"
	"sync"

	"github.com/holdfast-backup/holdfast/store/extent"
)

var _ Image = (*Disk)(nil)

// check gives ErrRange for what is not on the disk. d.gate is held.
func (d *Disk) check(off, n int64) error {
	if off < 0 || n < 0 || off > d.state.size || n > d.state.size-off {
		return fmt.Errorf("%w: %d bytes at %d of %d", ErrRange, n, off, d.state.size)
	}
	return nil
}

// ReadAt implements io.ReaderAt. It allocates nothing.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	if err := d.enter(); err != nil {
		return 0, err
	}
	defer d.gate.RUnlock()
	if off < 0 {
		return 0, fmt.Errorf("%w: read at %d", ErrRange, off)
	}
	var end error
	if left := d.state.size - off; int64(len(p)) > left {
		p, end = p[:max(0, left)], io.EOF
	}
	n, err := d.read(p, off)
	if err != nil {
		return n, err
	}
	return n, end
}

// read reads run by run of what is in data and what is not. d.gate is held.
func (d *Disk) read(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		at := off + int64(done)
		block, in := at/Block, at%Block
		left := int64(len(p) - done)
		n, here := d.blocks.run(block, (in+left+Block-1)/Block)
		part := p[done : done+int(min(left, n*Block-in))]
		var got int
		var err error
		if here {
			got, err = full(d.data, part, at)
		} else {
			got, err = d.readImage(part, at)
		}
		done += got
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// readImage reads from the image, zeros past what is seen of it.
func (d *Disk) readImage(p []byte, off int64) (int, error) {
	n := int(max(0, min(int64(len(p)), d.state.limit-off)))
	if n > 0 {
		if got, err := full(d.image, p[:n], off); err != nil {
			return got, err
		}
	}
	clear(p[n:])
	return len(p), nil
}

// full fills p; less is an error that is not io.EOF.
func full(r io.ReaderAt, p []byte, off int64) (int, error) {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return n, nil
	}
	if err == nil || err == io.EOF { //nolint:errorlint // io.ReaderAt returns it bare
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// WriteAt implements io.WriterAt. A write past the end is ErrRange and writes nothing.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	if err := d.enter(); err != nil {
		return 0, err
	}
	defer d.gate.RUnlock()
	if err := d.check(off, int64(len(p))); err != nil || len(p) == 0 {
		return 0, err
	}
	from, to := off/Block, (off+int64(len(p))+Block-1)/Block
	if n, here := d.blocks.run(from, to-from); here && n == to-from {
		defer d.unsynced.add(from, to)
		return d.write(p, off)
	}
	busy := d.first.take(from, to)
	defer d.first.give(busy)
	if err := d.edges(off, int64(len(p))); err != nil {
		return 0, err
	}
	n, err := d.write(p, off)
	if err == nil {
		err = d.blocks.set(from, to)
	}
	if err == nil {
		d.unsynced.add(from, to)
	}
	return n, err
}

// writePiece is how much is written at a time, bytes. ext4 keeps what a larger write brings in folios of as many pages, and those
// are slow to get where memory is in pieces or, in a virtual machine, not there yet: writes of 1 MiB went at 440 MB/s
// instead of 1,500 (Linux 6.18, 2026-11-22).
const writePiece = 64 << 10

func (d *Disk) write(p []byte, off int64) (done int, err error) {
	defer d.written.Store(true)
	for done < len(p) && err == nil {
		var n int
		n, err = d.data.WriteAt(p[done:min(done+writePiece, len(p))], off+int64(done))
		done += n
	}
	if err == nil {
		err = d.flush.log.overwritten(off/Block, roundUp(off+int64(len(p)))/Block)
	}
	return done, err
}

// edges copies the blocks that [off, off+n) covers in part up from the image, unless they
// are in data. Nobody else writes there.
func (d *Disk) edges(off, n int64) error {
	first, last := off/Block, (off+n-1)/Block
	if off%Block != 0 || (first == last && n != Block) {
		if err := d.copyUp(first, off, n); err != nil {
			return err
		}
	}
	if last != first && (off+n)%Block != 0 {
		return d.copyUp(last, off, n)
	}
	return nil
}

var blockPool = sync.Pool{New: func() any { return new([Block]byte) }}

// copyUp writes a block as the image has it, but for what [off, off+n) will overwrite. It is not in the map yet.
func (d *Disk) copyUp(block, off, n int64) error {
	if d.blocks.has(block) {
		return nil
	}
	buf := blockPool.Get().(*[Block]byte)
	defer blockPool.Put(buf)
	at := block * Block
	if _, err := d.readImage(buf[:], at); err != nil {
		return err
	}
	_, err := d.data.WriteAt(buf[:], at)
	return err
}

// Zero makes n bytes from off on zero. With punch the room for them is given back.
func (d *Disk) Zero(off, n int64, punch bool) error {
	if err := d.enter(); err != nil {
		return err
	}
	defer d.gate.RUnlock()
	if err := d.check(off, n); err != nil {
		return err
	}
	defer d.unsynced.many.Store(true)
	// The part of the last block past the end of the disk may become zero, too.
	end := off + n
	if end == d.state.size {
		end = roundUp(end)
	}
	from, to := (off+Block-1)/Block, end/Block
	if from >= to {
		return d.zeroPart(off, off+n)
	}
	if err := d.zeroPart(off, from*Block); err != nil {
		return err
	}
	if err := d.zeroBlocks(from, to, punch); err != nil {
		return err
	}
	if to*Block < off+n {
		return d.zeroPart(to*Block, off+n)
	}
	return nil
}

var zeros [Block]byte

// zeroPart makes less than two blocks zero by writing.
func (d *Disk) zeroPart(off, end int64) error {
	for off < end {
		n := min(end-off, Block-off%Block)
		if err := d.zeroIn(off, n); err != nil {
			return err
		}
		off += n
	}
	return nil
}

// zeroIn makes a part of one block zero.
func (d *Disk) zeroIn(off, n int64) error {
	block := off / Block
	if !d.blocks.has(block) {
		busy := d.first.take(block, block+1)
		defer d.first.give(busy)
		if err := d.copyUp(block, off, n); err != nil {
			return err
		}
		if _, err := d.write(zeros[:n], off); err != nil {
			return err
		}
		return d.blocks.set(block, block+1)
	}
	_, err := d.write(zeros[:n], off)
	return err
}

// zeroBlocks makes whole blocks zero. Those that the image has as holes, and that were never
// written, stay as they are.
func (d *Disk) zeroBlocks(from, to int64, punch bool) error {
	for from < to {
		n, here := d.blocks.run(from, to-from)
		end := from + n
		if here {
			if err := d.zeroRun(from, end, punch); err != nil {
				return err
			}
			from = end
			continue
		}
		for from < end {
			e, err := d.nextOfImage(from*Block, end*Block)
			if err != nil {
				return err
			}
			if e.Empty() {
				break
			}
			// Somebody may have written there meanwhile.
			busy := d.first.take(e.Off/Block, roundUp(e.End())/Block)
			err = d.zeroRun(e.Off/Block, roundUp(e.End())/Block, punch)
			if err == nil {
				err = d.blocks.set(e.Off/Block, roundUp(e.End())/Block)
			}
			d.first.give(busy)
			if err != nil {
				return err
			}
			from = roundUp(e.End()) / Block
		}
		from = end
	}
	return nil
}

func (d *Disk) zeroRun(from, to int64, punch bool) error {
	zero := d.data.Clear
	if punch {
		zero = d.data.Punch
	}
	err := zero(from*Block, (to-from)*Block)
	d.written.Store(true)
	if err == nil {
		err = d.flush.log.overwritten(from, to)
	}
	return err
}

// nextOfImage gives the first part of [off, end) where the image may have data, in whole
// blocks; empty when there is none.
func (d *Disk) nextOfImage(off, end int64) (extent.Extent, error) {
	for e, err := range d.imageFrom(off, Block) {
		if err != nil {
			return extent.Extent{}, err
		}
		if e.End() > off {
			e = extent.Intersect(e, extent.Extent{Off: off, Len: end - off})
			return extent.Intersect(extent.Align(e, Block), extent.Extent{Off: off, Len: end - off}), nil
		}
	}
	return extent.Extent{}, nil
}

// imageFrom lists what is seen of the image, from off on at least.
func (d *Disk) imageFrom(off, granularity int64) iter.Seq2[extent.Extent, error] {
	list := d.image.Allocated
	if x, ok := d.image.(interface {
		AllocatedFrom(off, granularity int64) iter.Seq2[extent.Extent, error]
	}); ok {
		list = func(g int64) iter.Seq2[extent.Extent, error] { return x.AllocatedFrom(off, g) }
	}
	return func(yield func(extent.Extent, error) bool) {
		for e, err := range list(granularity) {
			if err == nil {
				e = extent.Intersect(e, extent.Extent{Len: d.state.limit})
				if e.Empty() {
					if e.Off >= d.state.limit {
						return
					}
					continue
				}
			}
			if !yield(e, err) || err != nil {
				return
			}
		}
	}
}

// Trim says that n bytes from off on are not needed: whole blocks of them become zero.
func (d *Disk) Trim(off, n int64) error {
	end := off + n
	if size := d.Size(); end != size {
		end -= end % Block
	}
	if off = roundUp(off); off >= end {
		return nil
	}
	return d.Zero(off, end-off, true)
}

// Prefetch says that a range will be read soon.
func (d *Disk) Prefetch(off, n int64) {
	if x, ok := d.image.(interface{ Prefetch(off, n int64) }); ok {
		x.Prefetch(off, n)
	}
}
