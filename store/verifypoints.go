package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"syscall"
	"time"
)

// manifests reads those of the points to be checked.
func (v *verifier) manifests(ctx context.Context) ([]*Point, error) {
	list, err := v.repo.Points(ctx)
	if err != nil {
		return nil, err
	}
	var points []*Point
	for _, s := range list {
		if v.opt.Points != nil && !slices.Contains(v.opt.Points, s.ID) {
			continue
		}
		v.report.Points++
		p, err := v.repo.readPoint(ctx, s.ID)
		var d *DamageError
		switch {
		case err == nil:
			points = append(points, p)
		case errors.As(err, &d):
			d.Point = cmp.Or(d.Point, s.Path())
			v.found(d)
		case errors.Is(err, ErrNotExist):
			gone, err := v.unlisted(ctx, s)
			if err != nil {
				return nil, err
			}
			if !gone {
				v.found(&DamageError{Point: s.Path(), What: "manifest " + s.ID.String(), Err: errors.New("missing")})
			}
		default:
			return nil, err
		}
	}
	return points, nil
}

// unlisted waits a moment for a point without a manifest to go from the listing,
// as the next step of forgetting it is.
func (v *verifier) unlisted(ctx context.Context, s Summary) (bool, error) {
	for range 20 {
		list, err := v.repo.PointsOf(ctx, s.VM)
		if err != nil {
			return false, err
		}
		if !slices.ContainsFunc(list, func(l Summary) bool { return l.ID == s.ID }) {
			return true, nil
		}
		select {
		case <-ctx.Done():
			return false, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
	return false, nil
}

// forgotten reports whether a point went since the manifests were read: then what it
// lacks is no damage.
func (v *verifier) forgotten(ctx context.Context, id PointID) (bool, error) {
	_, err := v.repo.readManifest(ctx, id)
	if errors.Is(err, ErrNotExist) {
		return true, nil
	}
	if errors.Is(err, ErrDamaged) {
		err = nil
	}
	return false, err
}

// point checks the maps of a point, each page once for all points, and then
// names the places of what was found.
func (v *verifier) point(ctx context.Context, p *Point) error {
	type mapped struct {
		name string
		root Root
	}
	var maps []mapped
	for i := range p.Disks {
		maps = append(maps, mapped{p.Disks[i].Name, p.Disks[i].Map()})
	}
	for i := range p.Config {
		maps = append(maps, mapped{"config/" + p.Config[i].Name, p.Config[i].Map()})
	}
	for _, m := range maps {
		img, err := v.repo.openMap(m.root, p.Path(), m.name)
		if err != nil {
			var d *DamageError
			if errors.As(err, &d) {
				v.found(d)
				continue
			}
			return err
		}
		if m.root.Page.IsZero() {
			continue
		}
		bad, err := v.page(ctx, m.root.Page, img.top)
		if err != nil {
			return err
		}
		if bad {
			if gone, err := v.forgotten(ctx, p.ID); gone || err != nil {
				return err
			}
			if err := v.repo.sameIndex(ctx, v.index); err != nil {
				return err
			}
			t := touch{Point: p.ID, Disk: m.name, Found: v.began}
			if err := v.places(ctx, img, m.root.Page, img.top, 0, &t); err != nil {
				return err
			}
			v.hits = append(v.hits, t)
		}
	}
	v.walked[p.ID] = true
	return nil
}

// page reports whether anything at or below a page is damaged.
func (v *verifier) page(ctx context.Context, id ID, level uint8) (bool, error) {
	if bad, seen := v.pages[id]; seen {
		return bad, nil
	}
	if err := ctx.Err(); err != nil {
		return false, err
	}
	v.report.Pages++
	p, err := v.readPage(ctx, id, level)
	if err != nil {
		v.pages[id] = true
		if !errors.Is(err, ErrDamaged) {
			return false, err
		}
		v.addBad(id, KindPage, badRecord{err: err})
		return true, nil
	}
	// A page can read right though its record was found damaged: by its CRC-32C alone.
	bad, err := v.hit(ctx, id)
	if err != nil {
		return false, err
	}
	if level > 0 {
		for _, child := range p.ids {
			if child.IsZero() {
				continue
			}
			b, err := v.page(ctx, child, level-1)
			if err != nil {
				return false, err
			}
			bad = bad || b
		}
	} else {
		b, err := v.leaf(ctx, p)
		if err != nil {
			return false, err
		}
		bad = bad || b
	}
	v.pages[id] = bad
	return bad, nil
}

// hit reports whether the record that the index names for a page is a bad one.
func (v *verifier) hit(ctx context.Context, id ID) (bool, error) {
	if len(v.bad[id]) == 0 {
		return false, nil
	}
	var loc [1]Loc
	if err := v.repo.index.Lookup(ctx, []ID{id}, loc[:]); err != nil {
		return false, fmt.Errorf("store: %w", err)
	}
	_, bad := v.badAt(id, loc[0])
	return bad, nil
}

// readPage reads a page from its pack: the index is only a cache of it.
func (v *verifier) readPage(ctx context.Context, id ID, level uint8) (*page, error) {
	b, err := v.repo.readPage(ctx, id)
	if errors.Is(err, syscall.EIO) {
		err = &DamageError{What: recordWhat(id, KindPage), Err: err}
	}
	if err != nil {
		return nil, err
	}
	p := new(page)
	if err := decodePage(b, level, p); err != nil {
		return nil, &DamageError{What: recordWhat(id, KindPage), Err: err}
	}
	return p, nil
}

// leaf checks the chunks of a page of level 0.
func (v *verifier) leaf(ctx context.Context, p *page) (bool, error) {
	var locs [PageEntries]Loc
	if err := v.repo.index.Lookup(ctx, p.ids[:], locs[:]); err != nil {
		return false, fmt.Errorf("store: %w", err)
	}
	bad := false
	for i, id := range p.ids {
		if id.IsZero() {
			continue
		}
		v.report.Chunks++
		err := v.chunk(ctx, id, locs[i])
		if err == nil {
			continue
		}
		if !errors.Is(err, ErrDamaged) {
			return false, err
		}
		bad = true
		if _, seen := v.badAt(id, locs[i]); !seen {
			v.addBad(id, KindChunk, badRecord{err: err})
		}
	}
	return bad, nil
}

// chunk says what is wrong with a chunk, nil when nothing is known to be.
func (v *verifier) chunk(ctx context.Context, id ID, loc Loc) error {
	damaged := func(why error) error { return &DamageError{What: recordWhat(id, KindChunk), Err: why} }
	if b, ok := v.badAt(id, loc); ok {
		if errors.Is(b.err, ErrDamaged) {
			return b.err
		}
		return damaged(b.err)
	}
	if !loc.Known() {
		return damaged(errors.New("not in the repository"))
	}
	if s, isBroken := v.broken[loc.Pack]; isBroken && !s.has(id) {
		return damaged(errors.New("lost in a damaged pack"))
	}
	if v.opt.Points == nil || !v.opt.ReadData {
		return nil
	}
	return v.readChunk(ctx, id, loc)
}

// readChunk reads a chunk and proves it by all its sums.
func (v *verifier) readChunk(ctx context.Context, id ID, loc Loc) error {
	r := v.repo
	if err := v.pace.wait(ctx, int64(loc.Len)); err != nil {
		return err
	}
	dst := make([]byte, r.cfg.ChunkSize)
	v.report.Read += int64(loc.Len)
	err := r.retried(ctx, id, loc, func(loc Loc) error {
		return r.withRecord(ctx, id, KindChunk, loc, func(raw []byte, b box, _ *scratch) error {
			return r.checkRecord(raw, PackRecord{ID: id, Off: loc.Off, Len: loc.Len, Plain: uint32(r.cfg.ChunkSize)}, b, dst)
		})
	})
	if err == nil {
		v.right[id] = loc
	}
	if errors.Is(err, syscall.EIO) {
		err = &DamageError{What: recordWhat(id, KindChunk), Err: err}
	}
	return err
}

// places reports the damaged chunks and pages below a page by their offsets.
func (v *verifier) places(ctx context.Context, m *Image, id ID, level uint8, first int64, t *touch) error {
	if t.More {
		return nil
	}
	if err := v.place(ctx, m, id, KindPage, first, t); err != nil {
		return err
	}
	p, err := v.readPage(ctx, id, level)
	if errors.Is(err, ErrDamaged) {
		return nil // named above
	}
	if err != nil {
		return err
	}
	for k, child := range p.ids {
		if child.IsZero() {
			continue
		}
		at := first + int64(k)*span(level)
		switch {
		case level == 0:
			err = v.place(ctx, m, child, KindChunk, at, t)
		case v.pages[child]:
			err = v.places(ctx, m, child, level-1, at, t)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// place reports a chunk or page if it is damaged. at is the chunk of the disk that it begins at.
func (v *verifier) place(ctx context.Context, m *Image, id ID, kind uint8, at int64, t *touch) error {
	if len(v.bad[id]) == 0 {
		return nil
	}
	var loc [1]Loc
	if err := v.repo.index.Lookup(ctx, []ID{id}, loc[:]); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	b, ok := v.badAt(id, loc[0])
	switch {
	case !ok:
		return nil // there is another record, which is right
	case len(t.Places) >= maxFindingsPerDisk:
		t.More = true
		return nil
	}
	if v.spare != nil && kind == KindPage {
		if ok, err := v.spare(ctx, id); ok || err != nil {
			return err
		}
	}
	d := &DamageError{What: recordWhat(id, kind), Err: b.err}
	var inner *DamageError
	if errors.As(b.err, &inner) {
		d.What, d.Err = inner.What, inner.Err
	}
	d.Point, d.Disk, d.Off = m.point, m.disk, at*int64(m.repo.cfg.ChunkSize)
	t.Places = append(t.Places, touchedPlace{d.Off, id})
	v.named[id] = true
	v.found(d)
	return nil
}
