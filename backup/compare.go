package backup

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"time"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// told is what a source says has changed of a disk, while the whole disk is read to see whether that is true.
type told struct {
	ranges []extent.Extent // whole chunks, ascending

	missed int64 // bytes in chunks that changed and are in none of ranges
	first  int64 // offset of the first of them
}

// due reports whether it is time to compare a disk whose tracking was proven right at some time.
func (r *run) due(compared time.Time) bool {
	return !r.opt.CompareEvery.IsZero() && !compared.IsZero() && !r.opt.CompareEvery.After(compared).After(r.opt.Now())
}

// compare makes a plan to read everything out of one to read changes.
func (r *run) compare(ctx context.Context, d Disk, p plan) (plan, error) {
	t := &told{}
	for e, err := range extent.Coarsen(d.Extents(ctx, p.since), int64(r.draft.ChunkSize()), d.Size()) {
		if errors.Is(err, ErrChangesLost) {
			return p, nil // which is said when they are asked for again
		}
		if err != nil {
			return p, err
		}
		t.ranges = append(t.ranges, e)
	}
	p.told, p.since, p.doubt, p.data, p.why = t, "", true, 0, "full: its change tracking was compared with the disk"
	return p, nil
}

// saw is told of chunks that were read, in ascending order.
func (t *told) saw(first int64, ids, parents []store.ID, p *plan, chunk int64) {
	if t == nil {
		return
	}
	for k := range ids {
		// Where something was left out a hole of the parent says nothing.
		if ids[k] == parents[k] || parents[k].IsZero() && p.leftOut != nil {
			continue
		}
		off := (first + int64(k)) * chunk
		i := sort.Search(len(t.ranges), func(i int) bool { return t.ranges[i].End() > off })
		if i < len(t.ranges) && t.ranges[i].Off <= off {
			continue
		}
		if t.missed == 0 {
			t.first = off
		}
		t.missed += chunk
	}
}

// warning says what was missed; empty when nothing was.
func (t *told) warning() string {
	if t == nil || t.missed == 0 {
		return ""
	}
	return fmt.Sprintf("change tracking was wrong: %d bytes had changed that the source did not name, the first at byte %d; this point has them, "+
		"those before it, back to the last that was read whole, may not", t.missed, t.first)
}
