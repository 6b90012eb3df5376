package xfs

import (
	"errors"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// A stretch is what there is to replay: from sector tail on up to head. Both are the same when there is nothing.
type stretch struct {
	tail, head int64
	tailCycle  uint32
}

// stretch finds what a replay has to read.
func (r *ring) stretch() (stretch, error) {
	head, cycles, err := r.border()
	if err != nil || cycles == [2]uint32{} {
		return stretch{}, err // a log of zeros
	}
	// An unmount is written when all else is, so that nothing before it can be missing.
	if last, err := r.lastBefore(head); err == nil && (last.at+last.sectors())%r.size == head%r.size {
		if clean, err := r.unmount(&last); err == nil && clean {
			return stretch{tail: head, head: head}, nil
		}
	}
	if head, err = r.firstHole(head, cycles); err != nil {
		return stretch{}, err
	}
	last, head, err := r.lastWhole(head)
	if err != nil {
		return stretch{}, err
	}
	if clean, err := r.unmount(&last); err != nil || clean {
		return stretch{tail: head, head: head}, err
	}
	s := stretch{tail: int64(uint32(last.tail)), head: head % r.size, tailCycle: uint32(last.tail >> 32)}
	if s.tail >= r.size || s.tailCycle > last.cycle || last.cycle-s.tailCycle > 1 {
		return s, guest.Damaged("its first record is said to be at sector %d of cycle %d", s.tail, s.tailCycle)
	}
	return s, nil
}

// border looks for the sector where the cycle changes: all before it are of the first cycle, as long as writes reached the disk
// in order. It is the ring's size when the last write ended there. cycles are those of the first and the last sector.
func (r *ring) border() (head int64, cycles [2]uint32, err error) {
	if cycles[0], err = r.cycle(0); err != nil {
		return 0, cycles, err
	}
	if cycles[1], err = r.cycle(r.size - 1); err != nil {
		return 0, cycles, err
	}
	if cycles[0] == cycles[1] {
		return r.size, cycles, nil
	}
	lo, hi := int64(0), r.size-1
	for hi-lo > 1 {
		mid := (lo + hi) / 2
		c, err := r.cycle(mid)
		if err != nil {
			return 0, cycles, err
		}
		if c == cycles[0] {
			lo = mid
		} else {
			hi = mid
		}
	}
	return hi, cycles, nil
}

// firstHole moves the head back to the first sector that a write has left out: of as many as can have been written at the same
// time, those that came first may be missing.
func (r *ring) firstHole(head int64, cycles [2]uint32) (int64, error) {
	scan := min(inFlight*maxRecord/sector, r.size)
	old := cycles[1]
	if cycles[0] == cycles[1] {
		old--
	}
	if head < scan {
		// The writes may have begun at the end of the ring, in the cycle before.
		from := r.size - (scan - head)
		if at, err := r.scanFor(from, r.size, old-1); at >= 0 || err != nil {
			return at, err
		}
	}
	at, err := r.scanFor(max(head-scan, 0), head, old)
	if at >= 0 || err != nil {
		return at, err
	}
	return head, nil
}

// scanFor looks for a sector of a cycle; -1 when there is none.
func (r *ring) scanFor(from, to int64, cycle uint32) (int64, error) {
	const step = 256
	for at := from; at < to; at += step {
		b, err := r.read(at, min(step, to-at))
		if err != nil {
			return 0, err
		}
		for i := 0; i < len(b); i += sector {
			if cycleOf(b[i:]) == cycle {
				return at + int64(i/sector), nil
			}
		}
	}
	return -1, nil
}

var errNoRecord = guest.Damaged("no record before its end")

// lastBefore looks for the header of a record before a sector, as far back as a record and one that was torn reach.
func (r *ring) lastBefore(head int64) (record, error) {
	const step = 64
	scan := min(2*(maxRecord/sector+8), r.size)
	for done := int64(0); done < scan; done += step {
		n := min(step, scan-done)
		from := (head - done - n + 2*r.size) % r.size
		b, err := r.read(from, n)
		if err != nil {
			return record{}, err
		}
		for i := n - 1; i >= 0; i-- {
			if be.Uint32(b[i*sector:]) == logMagic {
				return r.parse(b[i*sector:], (from+i)%r.size)
			}
		}
	}
	return record{}, errNoRecord
}

// lastWhole looks for the last record that is there whole, and where it ends. Records may have been torn: of those that can
// have been written at the same time, the first whose checksum is wrong ends the log.
func (r *ring) lastWhole(head int64) (record, int64, error) {
	recs, head, err := r.newest(head)
	if err != nil {
		return record{}, 0, err
	}
	for i := len(recs) - 1; i >= 0; i-- {
		_, err := r.load(&recs[i], false)
		switch {
		case err == nil:
			continue
		case !errors.Is(err, guest.ErrDamaged):
			return record{}, 0, err
		}
		if head = recs[i].at; i+1 < len(recs) {
			return recs[i+1], head, nil
		}
		last, err := r.lastBefore(head)
		return last, head, err
	}
	return recs[0], head, nil
}

// newest gives the records before head, as many as may be torn, the newest first, and where that one ends. One whose end is
// not there is none.
func (r *ring) newest(head int64) (recs []record, end int64, err error) {
	back := int64(0) // sectors from head
	at := head
	for tries := 0; len(recs) < inFlight && tries < 4*inFlight; tries++ {
		rec, err := r.lastBefore(at)
		if err != nil && len(recs) == 0 {
			return nil, 0, err
		}
		gap := (at-rec.at+2*r.size-1)%r.size + 1
		if back += gap; err != nil || back > r.size {
			break
		}
		at = rec.at
		if rec.sectors() > gap {
			if len(recs) > 0 {
				break
			}
			continue
		}
		if len(recs) == 0 {
			end = (at + rec.sectors()) % r.size
		}
		if recs = append(recs, rec); at == int64(uint32(recs[0].tail)) {
			break // nothing before it is needed
		}
	}
	if len(recs) == 0 {
		return nil, 0, errNoRecord
	}
	return recs, end, nil
}

// unmount reports whether a record says that the file system was unmounted.
func (r *ring) unmount(rec *record) (bool, error) {
	if rec.ops != 1 {
		return false, nil
	}
	b, err := r.load(rec, false)
	if err != nil {
		return false, err
	}
	return b[9]&opUnmount != 0, nil
}
