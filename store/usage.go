package store

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// Usage says what is stored for whom. Bytes of records are as stored, with their headers.
type Usage struct {
	Data    int64        `json:"bytes_data"`               // of all points together, what is no hole
	Plain   int64        `json:"bytes_plain"`              // unique chunks that points use, before compression
	Packed  int64        `json:"bytes_packed"`             // the records of these chunks
	Live    int64        `json:"bytes_live"`               // the records of these chunks and of pages
	Shared  int64        `json:"bytes_shared"`             // of Live, what several VMs use
	Chunks  int64        `json:"chunks"`                   // unique ones that points use
	Pages   int64        `json:"pages"`                    // likewise
	Missing int64        `json:"missing,omitempty"`        // chunks and pages that the index has no place for, or that cannot be read
	Damaged int          `json:"points_damaged,omitempty"` // their manifests cannot be read; they are left out
	VMs     []VMUsage    `json:"by_vm"`                    // by name
	Points  []PointUsage `json:"by_point"`                 // by VM, then from old to new
}

// PointUsage is what one point uses.
type PointUsage struct {
	ID     PointID   `json:"id"`
	VM     string    `json:"vm"`
	Name   string    `json:"name"`
	Time   time.Time `json:"time"`
	Total  int64     `json:"bytes_total"`  // size of its disks
	Data   int64     `json:"bytes_data"`   // of it no holes
	Stored int64     `json:"bytes_stored"` // what was stored when it was made
	Unique int64     `json:"bytes_unique"` // bytes of records that no other point uses
}

// VMUsage is what the points of one VM use.
type VMUsage struct {
	VM     string    `json:"vm"`
	Points int       `json:"points"`
	First  time.Time `json:"first"`        // time of the oldest point
	Last   time.Time `json:"last"`         // time of the newest point
	Size   int64     `json:"bytes_size"`   // disks of the newest point
	Total  int64     `json:"bytes_total"`  // disks of all its points together
	Data   int64     `json:"bytes_data"`   // of it no holes
	Stored int64     `json:"bytes_stored"` // what was stored when they were made
	Unique int64     `json:"bytes_unique"` // bytes of records that no other VM uses
}

// Usage finds what the points use, and what of it nobody else does: for a point what
// forgetting it alone would free, for a VM what forgetting all its points would. It visits
// each page once, whatever the number of points that use it, and keeps 4 bytes for
// each record. progress is told of the bytes of disks that the pages cover; may be nil.
//
// Points that come meanwhile may be left out. ErrIndexAnew and damage that a gc caused
// meanwhile make it begin again, a few times.
func (r *Repo) Usage(ctx context.Context, progress func(done, total int64)) (*Usage, error) {
	for try := 0; ; try++ {
		gen, err := r.index.Generation(ctx)
		if err != nil {
			return nil, fmt.Errorf("store: %w", err)
		}
		index, err := r.index.Incarnation(ctx)
		if err != nil {
			return nil, fmt.Errorf("store: %w", err)
		}
		w := &usageWalk{repo: r, progress: progress, records: map[uint32][]owner{}, points: []PointUsage{}, vms: []VMUsage{}}
		w.later.index, w.later.size, w.later.settled = r.index, bulkSize, w.settled
		if err := w.run(ctx); err != nil {
			return nil, err
		}
		now, err := r.index.Incarnation(ctx)
		if err != nil {
			return nil, fmt.Errorf("store: %w", err)
		}
		after, err := r.index.Generation(ctx)
		if err != nil {
			return nil, fmt.Errorf("store: %w", err)
		}
		again := now != index || (after != gen && w.sum.Missing > 0)
		if !again || try == 3 {
			if now != index {
				return nil, ErrIndexAnew
			}
			return w.usage(), nil
		}
	}
}

// owner is who uses a record: 0 nobody yet, up to 1<<31 one point by its number from 1,
// above that several points of one VM, by its number, or points of several VMs.
type owner uint32

const (
	ofVM       owner = 1 << 31
	ofSeveral  owner = 1<<32 - 1
	maxOfUsage       = 1<<31 - 2 // points
)

// usageWalk goes through the chunk maps level by level from the top: when a
// level is reached all who use a page of it are known, so what is below it belongs to all of them.
type usageWalk struct {
	repo     *Repo
	progress func(done, total int64)
	vmOf     []uint32 // point => its VM
	later    bulk     // chunks that get one more owner

	mu      sync.Mutex         // guards following
	records map[uint32][]owner // pack => the owners of its records by slot
	points  []PointUsage
	vms     []VMUsage
	shared  []int64 // VM => bytes that several of its points use
	levels  [maxHeight][]usagePage
	sum     Usage
	done    int64 // pages of the present level
}

// usagePage is a page to be visited.
type usagePage struct {
	id    ID
	loc   Loc
	owner owner // of a page without a place; others have theirs in records
	point uint32
	key   uint32 // of the disk within its VM
	first int64  // chunk
}

func (w *usageWalk) run(ctx context.Context) error {
	if err := w.roots(ctx); err != nil {
		return err
	}
	for level := maxHeight - 1; level >= 0; level-- {
		list := w.levels[level]
		w.levels[level] = nil
		// One place of a disk after the other, from point to point: pages that
		// follow each other differ little.
		slices.SortFunc(list, func(a, b usagePage) int {
			return cmp.Or(cmp.Compare(w.vmOf[a.point], w.vmOf[b.point]), cmp.Compare(a.key, b.key),
				cmp.Compare(a.first, b.first), cmp.Compare(a.point, b.point), bytes.Compare(a.id[:], b.id[:]))
		})
		if err := w.level(ctx, uint8(level), list); err != nil {
			return err
		}
	}
	return nil
}

// roots reads the manifests and enters the root pages of all maps.
func (w *usageWalk) roots(ctx context.Context) error {
	l, err := w.repo.list(ctx)
	if err != nil {
		return err
	}
	all := l.all()
	if len(all) > maxOfUsage {
		return errors.New("store: too many points")
	}
	keys := map[string]uint32{}
	for i := range all {
		s := &all[i]
		p, err := w.repo.readPoint(ctx, s.ID)
		switch {
		case errors.Is(err, ErrNotExist):
			continue // forgotten meanwhile, or lost, as verify says
		case errors.Is(err, ErrDamaged):
			w.sum.Damaged++
			continue
		case err != nil:
			return err
		}
		if n := len(w.vms); n == 0 || w.vms[n-1].VM != s.VM {
			w.vms = append(w.vms, VMUsage{VM: s.VM, First: p.Time})
			w.shared = append(w.shared, 0)
			clear(keys)
		}
		vm := &w.vms[len(w.vms)-1]
		n := uint32(len(w.points))
		w.points = append(w.points, PointUsage{ID: p.ID, VM: s.VM, Name: p.Name, Time: p.Time, Total: p.Stats.Total, Data: p.Stats.Data, Stored: p.Stats.Stored})
		w.vmOf = append(w.vmOf, uint32(len(w.vms)-1))
		vm.Points++
		vm.Last, vm.Size = p.Time, p.Stats.Total
		vm.Total += p.Stats.Total
		vm.Data += p.Stats.Data
		vm.Stored += p.Stats.Stored
		w.sum.Data += p.Stats.Data
		for _, m := range rootsOf(p).maps {
			if m.root.Page.IsZero() {
				continue
			}
			if _, ok := keys[m.key]; !ok {
				keys[m.key] = uint32(len(keys))
			}
			level := height(chunkCount(m.root.Size, w.repo.cfg.ChunkSize)) - 1
			var loc [1]Loc
			if err := w.repo.index.Lookup(ctx, []ID{m.root.Page}, loc[:]); err != nil {
				return fmt.Errorf("store: %w", err)
			}
			page := usagePage{id: m.root.Page, loc: loc[0], point: n, key: keys[m.key]}
			w.enter(&page, owner(n+1), uint8(level))
		}
	}
	return nil
}

// enter gives a page one more owner and, the first time, puts it down for a visit.
// w.mu is held, or nobody else is there yet.
func (w *usageWalk) enter(p *usagePage, o owner, level uint8) {
	if !p.loc.Known() {
		w.sum.Missing++
		p.owner = o
		w.levels[level] = append(w.levels[level], *p)
		return
	}
	if w.use(p.loc, o) {
		w.sum.Pages++
		w.levels[level] = append(w.levels[level], *p)
	}
}

// use gives a record one more owner and reports whether it is its first. w.mu is
// held, or nobody else is there yet.
func (w *usageWalk) use(l Loc, o owner) bool {
	list := w.records[l.Pack]
	for int(l.Slot) >= len(list) {
		list = append(list, 0)
	}
	w.records[l.Pack] = list
	old := list[l.Slot]
	now := w.join(old, o)
	if now == old {
		return false
	}
	list[l.Slot] = now
	n := recordLen + int64(l.Len)
	if old == 0 {
		w.sum.Live += n
	} else {
		*w.bytesOf(old) -= n
	}
	*w.bytesOf(now) += n
	return old == 0
}

func (w *usageWalk) vm(o owner) uint32 {
	if o&ofVM != 0 {
		return uint32(o &^ ofVM)
	}
	return w.vmOf[o-1]
}

func (w *usageWalk) join(a, b owner) owner {
	switch {
	case a == 0 || a == b:
		return b
	case a == ofSeveral || b == ofSeveral || w.vm(a) != w.vm(b):
		return ofSeveral
	}
	return ofVM | owner(w.vm(a))
}

// bytesOf is where the bytes of an owner are counted.
func (w *usageWalk) bytesOf(o owner) *int64 {
	switch {
	case o == ofSeveral:
		return &w.sum.Shared
	case o&ofVM != 0:
		return &w.shared[o&^ofVM]
	}
	return &w.points[o-1].Unique
}

// level visits the pages of one level.
func (w *usageWalk) level(ctx context.Context, level uint8, list []usagePage) error {
	w.done = 0
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	const part = 512 // pages that one goroutine visits in order
	cover := PageEntries * span(level) * int64(w.repo.cfg.ChunkSize)
	for pages := range slices.Chunk(list, part) {
		if gctx.Err() != nil {
			break
		}
		g.Go(func() error {
			var v usageVisit
			for i := range pages {
				if err := w.visit(gctx, &v, &pages[i], level); err != nil {
					return err
				}
			}
			w.mu.Lock()
			defer w.mu.Unlock()
			w.done += int64(len(pages))
			if w.progress != nil && level == 0 { // the others are few
				w.progress(w.done*cover, int64(len(list))*cover)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return w.later.end(ctx)
}

// usageVisit is what a goroutine knows of the page it visited last.
type usageVisit struct {
	page, next page
	given      [PageEntries]owner // at level 0: what the entries of page have got here
	later      []bulkChunk
	locs       [PageEntries]Loc // above level 0: where the entries of page are
	ids        []ID             // that are to be looked up
	at         []int            // their entries
	got        []Loc
}

// visit gives the entries of a page the page's owner.
func (w *usageWalk) visit(ctx context.Context, v *usageVisit, p *usagePage, level uint8) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	err := w.repo.loadPage(ctx, p.id, level, &v.next)
	if errors.Is(err, ErrDamaged) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.sum.Missing++
		return nil
	}
	if err != nil {
		return err
	}
	o := p.owner
	if p.loc.Known() {
		w.mu.Lock()
		o = w.records[p.loc.Pack][p.loc.Slot]
		w.mu.Unlock()
	}
	if level == 0 {
		return w.chunks(ctx, v, o)
	}
	v.ids, v.at = v.ids[:0], v.at[:0]
	for k, id := range v.next.ids {
		if !id.IsZero() && id != v.page.ids[k] {
			v.ids, v.at = append(v.ids, id), append(v.at, k)
		}
	}
	v.got = slices.Grow(v.got[:0], len(v.ids))[:len(v.ids)]
	if err := w.repo.index.Lookup(ctx, v.ids, v.got); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	for i, k := range v.at {
		v.locs[k] = v.got[i]
	}
	v.page = v.next
	w.mu.Lock()
	defer w.mu.Unlock()
	for k, id := range v.page.ids {
		if !id.IsZero() {
			child := usagePage{id: id, loc: v.locs[k], point: p.point, key: p.key, first: p.first + int64(k)*span(level)}
			w.enter(&child, o, level-1)
		}
	}
	return nil
}

// chunks gives the chunks of v.next one more owner, by the end of the level. What an entry
// has got already by way of the pages before is not given again.
func (w *usageWalk) chunks(ctx context.Context, v *usageVisit, o owner) error {
	v.later = v.later[:0]
	for k, id := range v.next.ids {
		if id != v.page.ids[k] {
			v.given[k] = 0
		}
		if all := w.join(v.given[k], o); !id.IsZero() && all != v.given[k] {
			v.later = append(v.later, bulkChunk{id, all})
			v.given[k] = all
		}
	}
	v.page = v.next
	return w.later.add(ctx, v.later)
}

// settled gives chunks the owners that they were put off with.
func (w *usageWalk) settled(chunks []bulkChunk, locs []Loc) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, l := range locs {
		switch {
		case !l.Known():
			if i == 0 || chunks[i].id != chunks[i-1].id {
				w.sum.Missing++
			}
		case w.use(l, chunks[i].owner):
			w.sum.Chunks++
			w.sum.Packed += recordLen + int64(l.Len)
		}
	}
}

// usage gives the result.
func (w *usageWalk) usage() *Usage {
	u := w.sum
	u.Points, u.VMs = w.points, w.vms
	u.Plain = u.Chunks * int64(w.repo.cfg.ChunkSize)
	for i := range u.Points {
		u.VMs[w.vmOf[i]].Unique += u.Points[i].Unique
	}
	for i := range u.VMs {
		u.VMs[i].Unique += w.shared[i]
	}
	return &u
}
