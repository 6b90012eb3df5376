package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
)

// listing is the points at one generation. It and its slices are immutable; the
// next one shares what did not change.
type listing struct {
	gen  uint64
	byVM map[string][]Summary // VM => its points from old to new

	once    sync.Once
	flatAll []Summary // by VM; made when asked for
}

// inOrder compares points of one VM.
func inOrder(a, b Summary) int {
	return cmp.Or(a.Time.Compare(b.Time), cmp.Compare(len(a.Name), len(b.Name)),
		cmp.Compare(a.Name, b.Name), slices.Compare(a.ID[:], b.ID[:]))
}

// all gives the points by VM, then from old to new.
func (l *listing) all() []Summary {
	l.once.Do(func() {
		for _, vm := range slices.Sorted(maps.Keys(l.byVM)) {
			l.flatAll = append(l.flatAll, l.byVM[vm]...)
		}
	})
	return l.flatAll
}

// named gives the newest point of that name.
func (l *listing) named(vm, name string) (Summary, bool) {
	for _, s := range slices.Backward(l.byVM[vm]) {
		if s.Name == name {
			return s, true
		}
	}
	return Summary{}, false
}

// list gives the present listing. It costs what has changed since the last one.
func (r *Repo) list(ctx context.Context) (*listing, error) {
	gen, err := r.index.Generation(ctx)
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	r.pointsMu.Lock()
	defer r.pointsMu.Unlock()
	if r.points != nil && r.points.gen == gen {
		return r.points, nil
	}
	since := uint64(0)
	if r.points != nil {
		since = r.points.gen
	}
	r.packs.prune(func(number uint32) bool {
		_, err := r.index.Pack(ctx, number)
		return errors.Is(err, ErrNotExist)
	})
	c, err := r.index.Changes(ctx, since)
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	if c.Unknown || r.points == nil {
		r.points, r.pointVM = &listing{}, map[PointID]string{}
		c = Changes{Generation: c.Generation}
		for sp, err := range r.index.Points(ctx, PointID{}) {
			if err != nil {
				r.points = nil
				return nil, fmt.Errorf("store: %w", err)
			}
			c.Put = append(c.Put, sp)
		}
	}
	l, err := r.changed(ctx, c)
	if err != nil {
		r.points = nil // pointVM may be half changed
		return nil, err
	}
	r.points = l
	return l, nil
}

// changed applies changes to the listing. r.pointsMu is held.
func (r *Repo) changed(ctx context.Context, c Changes) (*listing, error) {
	l := &listing{gen: c.Generation, byVM: maps.Clone(r.points.byVM)}
	if l.byVM == nil {
		l.byVM = map[string][]Summary{}
	}
	gone := map[PointID]bool{}
	touched := map[string]bool{} // VMs whose points are to be changed
	leave := func(id PointID) {
		if vm, ok := r.pointVM[id]; ok {
			gone[id], touched[vm] = true, true
			delete(r.pointVM, id)
		}
	}
	for _, id := range c.Dropped {
		leave(id)
	}
	come := map[string][]Summary{}
	for _, sp := range c.Put {
		s, err := r.openSummary(sp)
		if err != nil { // the index is only a cache of it
			if s, err = r.summaryOf(ctx, sp.ID); err != nil {
				return nil, err
			}
		}
		leave(s.ID)
		come[s.VM] = append(come[s.VM], s)
		r.pointVM[s.ID] = s.VM
		touched[s.VM] = true
	}
	for vm := range touched {
		list := make([]Summary, 0, len(l.byVM[vm])+len(come[vm]))
		for _, s := range l.byVM[vm] {
			if !gone[s.ID] {
				list = append(list, s)
			}
		}
		list = append(list, come[vm]...)
		slices.SortFunc(list, inOrder)
		if len(list) == 0 {
			delete(l.byVM, vm)
			continue
		}
		l.byVM[vm] = list
	}
	return l, nil
}
