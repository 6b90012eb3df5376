package store

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/store/bucket"
)

// marker finds what the points use. It keeps one bit for each record of each pack
// and visits each page once; of a page that differs little from the page at its
// place in the point before, it looks up the differences only. So its time follows
// what the points do not share. Chunks are looked up many at a time, in ascending order of
// their ids.
type marker struct {
	repo  *Repo
	later bulk // chunks to be marked

	mu      sync.Mutex // guards following
	packs   map[uint32]*packMarks
	points  map[PointID]bool // marked so far
	missing int64            // entries of pages that the index has no place for
	pages   int64            // unique ones
	chunks  int64            // unique ones
}

// packMarks are the live records of one pack.
type packMarks struct {
	bits  []uint64
	bytes int64 // of live records, with their headers
	count uint32
}

// set marks a record and reports whether it was not marked yet.
func (p *packMarks) set(slot uint32) bool {
	for int(slot/64) >= len(p.bits) {
		p.bits = append(p.bits, 0)
	}
	w, b := &p.bits[slot/64], uint64(1)<<(slot%64)
	if *w&b != 0 {
		return false
	}
	*w |= b
	return true
}

func (p *packMarks) has(slot uint32) bool {
	return p != nil && int(slot/64) < len(p.bits) && p.bits[slot/64]&(1<<(slot%64)) != 0
}

func newMarker(r *Repo) *marker {
	m := &marker{repo: r, packs: map[uint32]*packMarks{}, points: map[PointID]bool{}}
	m.later.index, m.later.size = r.index, bulkSize
	m.later.settled = func(_ []bulkChunk, locs []Loc) {
		m.mu.Lock()
		defer m.mu.Unlock()
		for _, l := range locs {
			if m.record(l) {
				m.chunks++
			}
		}
	}
	return m
}

// run marks every point whose manifest is there and every point that a lease
// holds, but for those marked before. The manifests are listed before the leases:
// a point that is forgotten between the two was held before, or nobody may hold it any more.
func (m *marker) run(ctx context.Context, progress func(done, total int64)) error {
	var roots []markPoint
	for name, err := range bucket.Names(ctx, m.repo.bucket, pointPrefix) {
		if err != nil {
			return fmt.Errorf("store: list points: %w", err)
		}
		var id PointID
		if id.UnmarshalText([]byte(strings.TrimPrefix(name, pointPrefix))) != nil || m.points[id] {
			continue
		}
		p, err := m.repo.readPoint(ctx, id)
		if errors.Is(err, ErrNotExist) {
			continue // forgotten meanwhile
		}
		if err != nil {
			return fmt.Errorf("nothing can be collected, since what this point needs is unknown: %w", err)
		}
		roots = append(roots, rootsOf(p))
	}
	held, err := m.held(ctx)
	if err != nil {
		return err
	}
	return m.mark(ctx, append(roots, held...), progress)
}

// held gives the points of all leases of readers.
func (m *marker) held(ctx context.Context) ([]markPoint, error) {
	leases, err := m.repo.leases.Live(ctx)
	if err != nil {
		return nil, fmt.Errorf("store: leases: %w", err)
	}
	var roots []markPoint
	for _, l := range leases {
		if l.Kind != LeaseReader || len(l.Manifest) < pointHeaderLen {
			continue
		}
		id := PointID(l.Manifest[32:48])
		if m.points[id] {
			continue
		}
		p, err := decodePoint(l.Manifest, id, m.repo.id, m.repo.keys)
		if err != nil {
			return nil, fmt.Errorf("store: lease of point %s: %w", id, err)
		}
		roots = append(roots, rootsOf(p))
	}
	return roots, nil
}

// markPoint is what a point refers to. Manifests are let go when it is known.
type markPoint struct {
	id   PointID
	vm   string
	time int64
	maps []markMap
}

// markMap is one chunk map of a point.
type markMap struct {
	key  string // the same for one disk in all points of a VM
	path string // for errors
	root Root
}

func (p *markPoint) size() (n int64) {
	for i := range p.maps {
		n += p.maps[i].root.Size
	}
	return n
}

func rootsOf(p *Point) markPoint {
	out := markPoint{id: p.ID, vm: p.VM.Name, time: p.Time.Unix()}
	for i := range p.Disks {
		d := &p.Disks[i]
		out.maps = append(out.maps, markMap{"disk " + d.Key, p.Path() + "/" + d.Name, d.Map()})
	}
	for i := range p.Config {
		c := &p.Config[i]
		out.maps = append(out.maps, markMap{"config " + c.Name, p.Path() + "/config/" + c.Name, c.Map()})
	}
	return out
}

// mark marks points, those of a VM one after the other from old to new.
func (m *marker) mark(ctx context.Context, points []markPoint, progress func(done, total int64)) error {
	slices.SortFunc(points, func(a, b markPoint) int {
		return cmp.Or(cmp.Compare(a.vm, b.vm), cmp.Compare(a.time, b.time), bytes.Compare(a.id[:], b.id[:]))
	})
	var total, done int64 // bytes of disks
	for i := range points {
		total += points[i].size()
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for len(points) > 0 && gctx.Err() == nil {
		n := 1
		for n < len(points) && points[n].vm == points[0].vm {
			n++
		}
		vm := points[:n]
		points = points[n:]
		g.Go(func() error {
			w := markWorker{m: m, last: map[string]Root{}}
			for _, p := range vm {
				for _, mp := range p.maps {
					if err := w.root(gctx, mp); err != nil {
						return fmt.Errorf("nothing can be collected, since what %s needs is unknown: %w", mp.path, err)
					}
				}
				m.mu.Lock()
				m.points[p.id] = true
				done += p.size()
				if progress != nil {
					progress(done, total)
				}
				m.mu.Unlock()
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return m.later.end(ctx)
}

// markWorker marks the points of one VM.
type markWorker struct {
	m     *marker
	last  map[string]Root // disk => its map in the point before
	later []bulkChunk
	at    [maxHeight]markLevel // scratch memory of the page being visited there
}

type markLevel struct {
	page, before page
	ids          []ID // entries that before does not have
	olds         []ID // what before has in their place
}

// root marks a chunk map.
func (w *markWorker) root(ctx context.Context, mp markMap) error {
	cs := w.m.repo.cfg.ChunkSize
	h := height(chunkCount(mp.root.Size, cs))
	old := w.last[mp.key]
	w.last[mp.key] = mp.root
	if mp.root.Page.IsZero() || mp.root.Page == old.Page {
		return nil
	}
	if height(chunkCount(old.Size, cs)) != h {
		old.Page = ID{}
	}
	fresh, err := w.records(ctx, []ID{mp.root.Page})
	if err != nil || !fresh[0] {
		return err
	}
	w.count(&w.m.pages, 1)
	return w.page(ctx, mp.root.Page, old.Page, uint8(h-1))
}

func (w *markWorker) count(n *int64, by int64) {
	w.m.mu.Lock()
	defer w.m.mu.Unlock()
	*n += by
}

// page marks what a page refers to. What the page old, which is marked, has at the
// same place needs no look.
func (w *markWorker) page(ctx context.Context, id, old ID, level uint8) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	at := &w.at[level]
	if err := w.m.repo.loadPage(ctx, id, level, &at.page); err != nil {
		return err
	}
	at.before = page{}
	if !old.IsZero() {
		if err := w.m.repo.loadPage(ctx, old, level, &at.before); err != nil {
			return err
		}
	}
	at.ids, at.olds = at.ids[:0], at.olds[:0]
	for k, child := range at.page.ids {
		if !child.IsZero() && child != at.before.ids[k] {
			at.ids, at.olds = append(at.ids, child), append(at.olds, at.before.ids[k])
		}
	}
	if level == 0 {
		w.later = w.later[:0]
		for _, id := range at.ids {
			w.later = append(w.later, bulkChunk{id: id})
		}
		return w.m.later.add(ctx, w.later)
	}
	fresh, err := w.records(ctx, at.ids)
	if err != nil {
		return err
	}
	for i, child := range at.ids {
		if !fresh[i] {
			continue
		}
		w.count(&w.m.pages, 1)
		if err := w.page(ctx, child, at.olds[i], level-1); err != nil {
			return err
		}
	}
	return nil
}

// records marks the records of ids and reports which were not marked before.
func (w *markWorker) records(ctx context.Context, ids []ID) ([]bool, error) {
	locs := make([]Loc, len(ids))
	if err := w.m.repo.index.Lookup(ctx, ids, locs); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	fresh := make([]bool, len(ids))
	w.m.mu.Lock()
	defer w.m.mu.Unlock()
	for i, l := range locs {
		fresh[i] = w.m.record(l)
	}
	return fresh, nil
}

// record marks a record and reports whether it was not marked before. One that the index
// has no place for cannot be removed either; a page like that fails to load. m.mu is held.
func (m *marker) record(l Loc) bool {
	if !l.Known() {
		m.missing++
		return true
	}
	p := m.packs[l.Pack]
	if p == nil {
		p = &packMarks{}
		m.packs[l.Pack] = p
	}
	if !p.set(l.Slot) {
		return false
	}
	p.bytes += recordLen + int64(l.Len)
	p.count++
	return true
}
