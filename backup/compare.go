package backup

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sort"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// told is what a source says of a disk, while the whole disk is read to see whether that is true. It is told of all chunks, in ascending order.
type told struct {
	chunk, size int64           // bytes
	changed     []extent.Extent // whole chunks, ascending
	allocated   []extent.Extent // likewise: outside of them the disk is said to be zeros; nil where only the disk itself shows that
	base        Base
	vague       bool // a hole of the base may be something that was left out

	nextOut func() (extent.Extent, bool) // of what is left out now, ascending
	out     extent.Extent                // the last that it gave

	unnamed lies // chunks that changed and are not in changed
	unknown lies // chunks with data that are not in allocated
}

// lies are areas of which something untrue was said.
type lies struct {
	total int64           // bytes
	areas []extent.Extent // ascending, maxAreas at most
	more  bool            // there are others
}

// maxAreas is how many areas a warning names.
const maxAreas = 8

func (l *lies) add(e extent.Extent) {
	l.total += e.Len
	switch n := len(l.areas); {
	case l.more:
	case n > 0 && l.areas[n-1].End() == e.Off:
		l.areas[n-1].Len += e.Len
	case n == maxAreas:
		l.more = true
	default:
		l.areas = append(l.areas, e)
	}
}

// String names the areas as byte+length.
func (l *lies) String() string {
	var b strings.Builder
	for i, e := range l.areas {
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(&b, "%d+%d", e.Off, e.Len)
	}
	if l.more {
		b.WriteString(", …")
	}
	return b.String()
}

// due reports whether it is time to compare a disk whose tracking was proven right at some time.
func (r *run) due(compared time.Time) bool {
	return !r.opt.CompareEvery.IsZero() && !compared.IsZero() && !r.opt.CompareEvery.After(compared).After(r.opt.Now())
}

// compare makes a plan to read everything out of one to read changes. What the source says is asked for first: it is wrong if it is wrong now.
func (r *run) compare(ctx context.Context, d Disk, name string, p plan, left *leftOut) (plan, error) {
	unit := int64(r.draft.ChunkSize())
	changed, err := collect(extent.Coarsen(d.Extents(ctx, p.since), unit, d.Size()))
	if errors.Is(err, ErrChangesLost) {
		return p, nil // which is said when they are asked for again
	}
	if err != nil {
		return p, err
	}
	t := &told{chunk: unit, size: d.Size(), changed: changed, base: p.base, vague: p.leftOut != nil && !left.same(name, p.leftOut)}
	if _, ok := d.(Whole); ok {
		if t.allocated, err = collect(extent.Coarsen(d.Extents(ctx, ""), unit, d.Size())); err != nil {
			return p, err
		}
	}
	p.told, p.since, p.doubt, p.data, p.why = t, "", true, 0, "full: its change tracking was compared with the disk"
	return p, nil
}

func collect(src iter.Seq2[extent.Extent, error]) ([]extent.Extent, error) {
	all := []extent.Extent{}
	for e, err := range src {
		if err != nil {
			return nil, err
		}
		all = append(all, e)
	}
	return all, nil
}

// covers reports whether a byte is in one of list, ascending.
func covers(list []extent.Extent, off int64) bool {
	i := sort.Search(len(list), func(i int) bool { return list[i].End() > off })
	return i < len(list) && list[i].Off <= off
}

// follow gets ready for what is left out; stop is called at the end.
func (t *told) follow(gone iter.Seq[extent.Extent]) (stop func()) {
	if t == nil {
		return func() {}
	}
	t.nextOut, stop = iter.Pull(gone)
	return stop
}

// at is a chunk.
func (t *told) at(chunk int64) extent.Extent {
	return extent.Intersect(extent.Extent{Off: chunk * t.chunk, Len: t.chunk}, extent.Extent{Len: t.size})
}

// saw is told of chunks that were read.
func (t *told) saw(first int64, ids, parents []store.ID) {
	if t == nil {
		return
	}
	for k := range ids {
		e := t.at(first + int64(k))
		if ids[k] != parents[k] && !(t.vague && parents[k].IsZero()) && !covers(t.changed, e.Off) {
			t.unnamed.add(e)
		}
		if t.allocated != nil && !ids[k].IsZero() && !covers(t.allocated, e.Off) {
			t.unknown.add(e)
		}
	}
}

// passed is told of chunks [from, to), which were not read: they are zeros, but for those that are left out.
func (t *told) passed(ctx context.Context, from, to int64) error {
	if t == nil {
		return nil
	}
	ids := make([]store.ID, min(store.PageEntries, to-from))
	for ; from < to; from += int64(len(ids)) {
		ids = ids[:min(int64(len(ids)), to-from)]
		if err := t.base.IDs(ctx, from, ids); err != nil {
			return err
		}
		for k, id := range ids {
			if e := t.at(from + int64(k)); !id.IsZero() && !covers(t.changed, e.Off) && !t.isLeftOut(e.Off) {
				t.unnamed.add(e)
			}
		}
	}
	return nil
}

// isLeftOut reports whether a byte is in what is left out. Bytes ascend.
func (t *told) isLeftOut(off int64) bool {
	for t.out.End() <= off {
		e, ok := t.nextOut()
		if !ok {
			return false
		}
		t.out = e
	}
	return t.out.Off <= off
}

// warnings say what was untrue.
func (t *told) warnings() []string {
	if t == nil {
		return nil
	}
	var all []string
	if l := &t.unnamed; l.total > 0 {
		all = append(all, fmt.Sprintf("change tracking was wrong: %d bytes had changed that the source did not name, at %s; this point has them, those before it may not", l.total, l))
	}
	if l := &t.unknown; l.total > 0 {
		all = append(all, fmt.Sprintf("change tracking was wrong: %d bytes hold data where the source says that nothing is allocated, at %s; this point has them, those before it may not", l.total, l))
	}
	return all
}
