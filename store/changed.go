package store

import (
	"context"
	"iter"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// Changed yields ascending ranges, whole chunks clipped to the disk, outside of
// which m holds what old, an image of the same repository, holds at the same place. Past its
// end old counts as zeros. It reads no chunk, and only those pages that the two maps do
// not share: its cost follows the changes.
func (m *Image) Changed(ctx context.Context, old *Image) iter.Seq2[extent.Extent, error] {
	return extent.Coarsen(func(yield func(extent.Extent, error) bool) {
		id, level := old.root.Page, old.top
		for ; level > m.top && !id.IsZero(); level-- { // old is larger: the rest of it does not matter
			l, err := old.page(ctx, id, level)
			if err != nil {
				yield(extent.Extent{}, old.located(err, 0))
				return
			}
			id = l.ids[0]
		}
		if id == m.root.Page {
			return
		}
		d := differ{new: m, old: old, yield: yield}
		d.pages(ctx, m.top, 0, m.root.Page, id, min(level, m.top))
	}, int64(m.repo.cfg.ChunkSize), m.root.Size)
}

// differ compares two chunk maps.
type differ struct {
	new, old *Image
	yield    func(extent.Extent, error) bool
}

var noPage leaf

// pages compares two different pages whose first chunk is first: a of the new map at
// level, and b of the old one at oldLevel, which is lower where the disk has grown.
// Either may be a hole.
func (d *differ) pages(ctx context.Context, level uint8, first int64, a, b ID, oldLevel uint8) bool {
	fail := func(m *Image, err error) bool {
		return d.yield(extent.Extent{}, m.located(err, first*int64(m.repo.cfg.ChunkSize)))
	}
	pa, pb := &noPage, &noPage
	var err error
	if !a.IsZero() {
		if pa, err = d.new.page(ctx, a, level); err != nil {
			return fail(d.new, err)
		}
	}
	if !b.IsZero() && oldLevel == level {
		if pb, err = d.old.page(ctx, b, level); err != nil {
			return fail(d.old, err)
		}
	}
	for k := range pa.ids {
		at := first + int64(k)*span(level)
		if at >= d.new.chunks {
			return true
		}
		ca, cb, cl := pa.ids[k], pb.ids[k], level
		switch {
		case oldLevel < level && k == 0:
			cb, cl = b, oldLevel // all of the old map lies below the first entry
		case level > 0:
			cl = level - 1
		}
		if ca == cb {
			continue
		}
		if level > 0 {
			if !d.pages(ctx, level-1, at, ca, cb, cl) {
				return false
			}
			continue
		}
		cs := int64(d.new.repo.cfg.ChunkSize)
		if !d.yield(extent.Extent{Off: at * cs, Len: cs}, nil) {
			return false
		}
	}
	return true
}
