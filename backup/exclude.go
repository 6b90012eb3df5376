package backup

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"iter"
	"time"

	"github.com/zeebo/blake3"

	"github.com/holdfast-backup/holdfast/fs/guest/unneeded"
	"github.com/holdfast-backup/holdfast/fs/guest/volume"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// Exclude says what of a guest's disks is stored as holes.
type Exclude struct {
	Swap bool // what the guest has swapped out: package unneeded
	Free bool // blocks that its file systems do not use
}

// leftOut is what of each disk is stored as holes: whole chunks.
type leftOut struct {
	found *unneeded.Found
	index map[string]int // disk => its index in found
}

// leaveOut looks for what the disks of a VM need not hold. Disks that say what became of a point are left as they are.
func (r *run) leaveOut(ctx context.Context, disks []Disk) *leftOut {
	l := &leftOut{index: map[string]int{}}
	if r.opt.Exclude == (Exclude{}) {
		return l
	}
	ctx, cancel := context.WithTimeout(ctx, lookFor)
	defer cancel()
	var list []volume.Disk
	for i, d := range disks {
		if o, ok := d.(InOrder); ok && o.InOrder() { // then nothing can be looked at before it is stored
			return &leftOut{found: &unneeded.Found{Notes: []string{fmt.Sprintf("disk%d: is read once, in order: nothing is left out of the VM's disks", i)}}}
		}
		_, derived := d.(Derived)
		_, remembers := r.draft.(rememberer)
		if derived || !remembers && d.ChangeID() != "" {
			return l
		}
		name := fmt.Sprintf("disk%d", i)
		l.index[name] = i
		list = append(list, volume.Disk{Name: name, Device: patient{d, ctx}})
	}
	l.found = unneeded.Find(list, unneeded.Options{Swap: r.opt.Exclude.Swap, Free: r.opt.Exclude.Free, Unit: int64(r.draft.ChunkSize())})
	return l
}

// lookFor is how long a guest's file systems may take to look through: they are a guest's, and a backup waits for it.
const lookFor = 5 * time.Minute

// patient is a disk that is read until ctx ends.
type patient struct {
	Disk
	ctx context.Context
}

func (p patient) ReadAt(b []byte, off int64) (int, error) {
	if err := p.ctx.Err(); err != nil {
		return 0, err
	}
	return p.Disk.ReadAt(b, off)
}

// of gives the ranges of a disk.
func (l *leftOut) of(disk string) iter.Seq[extent.Extent] {
	i, ok := l.index[disk]
	if !ok || l.found == nil {
		return func(func(extent.Extent) bool) {}
	}
	return l.found.Ranges(i)
}

// notes say what was not left out, and why.
func (l *leftOut) notes() []string {
	if l.found == nil {
		return nil
	}
	return l.found.Notes
}

// record is what the point says of a disk; nil for nothing.
func (l *leftOut) record(disk string) *store.LeftOut {
	if l.found == nil {
		return nil
	}
	var out store.LeftOut
	for _, i := range l.found.Items {
		if i.Disk == disk {
			out.Items = append(out.Items, store.LeftOutItem{Volume: i.Volume, What: i.What, Bytes: i.Bytes})
		}
	}
	if out.Items == nil {
		return nil
	}
	h := blake3.New()
	for e := range l.of(disk) {
		var b [16]byte
		binary.LittleEndian.PutUint64(b[:], uint64(e.Off))
		binary.LittleEndian.PutUint64(b[8:], uint64(e.Len))
		h.Write(b[:])
	}
	out.Ranges = h.Sum(nil)
	return &out
}

// same reports whether of a disk the same is left out as the last time.
func (l *leftOut) same(disk string, last *store.LeftOut) bool {
	now := l.record(disk)
	return now != nil && bytes.Equal(last.Ranges, now.Ranges)
}

// ranges gives what of a disk is to be read, and what is left out of that.
func (r *run) ranges(ctx context.Context, d Disk, name string, p plan, l *leftOut) iter.Seq2[extent.Extent, error] {
	if p.from != nil {
		return p.from.Changed(ctx)
	}
	unit := int64(r.draft.ChunkSize())
	var said iter.Seq2[extent.Extent, error]
	if w, ok := d.(Whole); ok && p.since == "" && p.doubt {
		said = w.Whole(ctx)
	} else {
		said = d.Extents(ctx, p.since)
	}
	list := extent.CoarsenUpTo(said, unit, max(1, jobBytes/unit)*unit, d.Size())
	// What was left out the last time and is not any more did not need to change for that: a file system may give blocks to a
	// file after they were written.
	if p.since != "" && p.leftOut != nil && !l.same(name, p.leftOut) {
		whole := extent.Coarsen(d.Extents(ctx, ""), unit, d.Size())
		list = extent.Merge(list, holesOf(ctx, p.base, unit, whole))
	}
	return extent.Subtract(list, l.of(name))
}

// holesOf yields the chunks of ranges, whole ones, that base has as holes.
func holesOf(ctx context.Context, base Base, unit int64, ranges iter.Seq2[extent.Extent, error]) iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) {
		ids := make([]store.ID, store.PageEntries)
		for e, err := range ranges {
			for err == nil && !e.Empty() {
				some := ids[:min(int64(len(ids)), (e.Len+unit-1)/unit)]
				clear(some)
				if err = base.IDs(ctx, e.Off/unit, some); err != nil {
					break
				}
				for i, id := range some {
					hole := extent.Intersect(e, extent.Extent{Off: e.Off + int64(i)*unit, Len: unit})
					if id.IsZero() && !yield(hole, nil) {
						return
					}
				}
				n := min(e.Len, int64(len(some))*unit)
				e.Off, e.Len = e.Off+n, e.Len-n
			}
			if err != nil {
				yield(extent.Extent{}, err)
				return
			}
		}
	}
}

// puncher makes holes of what is left out of a disk of which only changes are read: what the last point has there may be older than
// what the disk has.
type puncher struct {
	to   Map
	base Base
	unit int64
	next func() (extent.Extent, bool)
	stop func()
	cur  extent.Extent
	more bool
	data int64 // bytes of the base that became holes
}

func newPuncher(to Map, p plan, unit int64) *puncher {
	x := &puncher{to: to, base: p.base, unit: unit, stop: func() {}}
	if p.gone != nil && p.since != "" {
		x.next, x.stop = iter.Pull(p.gone)
		x.cur, x.more = x.next()
	}
	return x
}

// upTo punches what lies before chunk to. No range reaches across it: what is read begins and ends with whole chunks.
func (x *puncher) upTo(ctx context.Context, to int64) error {
	for ; x.more && x.cur.Off/x.unit < to; x.cur, x.more = x.next() {
		first, end := x.cur.Off/x.unit, (x.cur.End()+x.unit-1)/x.unit
		if err := x.to.Punch(ctx, first, end); err != nil {
			return err
		}
		ids := make([]store.ID, store.PageEntries)
		for at := first; at < end; at += int64(len(ids)) {
			some := ids[:min(int64(len(ids)), end-at)]
			if err := x.base.IDs(ctx, at, some); err != nil {
				return err
			}
			for _, id := range some {
				if !id.IsZero() {
					x.data += x.unit
				}
			}
		}
	}
	return nil
}
