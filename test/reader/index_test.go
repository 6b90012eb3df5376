package reader_test

import (
	"context"
	"iter"
	"maps"
	"slices"
	"sync"

	"github.com/holdfast-backup/holdfast/store"
)

// mapIndex is an Index of maps: making one costs microseconds, so that a
// repository can be opened a hundred thousand times.
type mapIndex struct {
	mu         sync.Mutex // guards following
	locs       map[store.ID]store.Loc
	packs      map[uint32]store.PackInfo
	pages      map[store.ID][]byte
	points     map[store.PointID][]byte
	names      map[string]int // name => how often handed out
	next       uint32
	generation uint64
	condemned  store.Condemned
}

var _ store.Index = (*mapIndex)(nil)

func newMapIndex() *mapIndex {
	return &mapIndex{
		locs: map[store.ID]store.Loc{}, packs: map[uint32]store.PackInfo{}, pages: map[store.ID][]byte{},
		points: map[store.PointID][]byte{}, names: map[string]int{}, next: 1, generation: 1,
	}
}

func (x *mapIndex) clone() *mapIndex {
	x.mu.Lock()
	defer x.mu.Unlock()
	return &mapIndex{
		locs: maps.Clone(x.locs), packs: maps.Clone(x.packs), pages: maps.Clone(x.pages),
		points: maps.Clone(x.points), names: map[string]int{}, next: x.next, generation: x.generation, condemned: x.condemned,
	}
}

// opener opens x as an index that its last owner left clean, or did not.
func (x *mapIndex) opener(clean bool) store.IndexOpener {
	return func(ctx context.Context, _ [16]byte, check store.IndexCheck) (store.Index, error) {
		return x, check(ctx, x, clean)
	}
}

func (x *mapIndex) Lookup(_ context.Context, ids []store.ID, locs []store.Loc) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	for i, id := range ids {
		locs[i] = store.Loc{}
		if l, ok := x.locs[id]; ok && x.packs[l.Pack] != (store.PackInfo{}) {
			l.Condemned = slices.Contains(x.condemned.Packs, x.packs[l.Pack].ID)
			locs[i] = l
		}
	}
	return nil
}

func (x *mapIndex) AddPack(_ context.Context, pack store.PackInfo, recs []store.PackRecord) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, p := range x.packs {
		if p.ID == pack.ID {
			return nil
		}
	}
	recs = slices.Clone(recs)
	slices.SortFunc(recs, func(a, b store.PackRecord) int { return int(a.Off) - int(b.Off) })
	for i, r := range recs {
		x.locs[r.ID] = store.Loc{Pack: x.next, Off: r.Off, Len: r.Len, Slot: uint32(i)}
	}
	pack.Records = uint32(len(recs))
	x.packs[x.next] = pack
	x.next++
	return nil
}

func (x *mapIndex) Packs(context.Context) iter.Seq2[store.NumberedPack, error] {
	x.mu.Lock()
	packs := maps.Clone(x.packs)
	x.mu.Unlock()
	return func(yield func(store.NumberedPack, error) bool) {
		for n, p := range packs {
			if !yield(store.NumberedPack{Number: n, PackInfo: p, Condemned: slices.Contains(x.condemned.Packs, p.ID)}, nil) {
				return
			}
		}
	}
}

func (x *mapIndex) Pack(_ context.Context, number uint32) (store.PackInfo, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	p, ok := x.packs[number]
	if !ok {
		return p, store.ErrNotExist
	}
	return p, nil
}

func (x *mapIndex) DropPack(_ context.Context, id store.PackID, _ []store.ID) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	maps.DeleteFunc(x.packs, func(_ uint32, p store.PackInfo) bool { return p.ID == id })
	return nil
}

func (x *mapIndex) Incarnation(context.Context) (uint64, error) { return 1, nil }

func (x *mapIndex) NextPack(context.Context) (uint32, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.next, nil
}

func (x *mapIndex) Condemn(_ context.Context, old [16]byte, c store.Condemned) (bool, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.condemned.Epoch != old {
		return false, nil
	}
	x.condemned = c
	return true, nil
}

func (x *mapIndex) Epoch(context.Context) ([16]byte, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.condemned.Epoch, nil
}

func (x *mapIndex) PageIDs(_ context.Context, after store.ID) iter.Seq2[store.ID, error] {
	x.mu.Lock()
	ids := slices.SortedFunc(maps.Keys(x.pages), func(a, b store.ID) int { return slices.Compare(a[:], b[:]) })
	x.mu.Unlock()
	return func(yield func(store.ID, error) bool) {
		for _, id := range ids {
			if slices.Compare(id[:], after[:]) > 0 && !yield(id, nil) {
				return
			}
		}
	}
}

func (x *mapIndex) DropPages(_ context.Context, ids []store.ID) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, id := range ids {
		delete(x.pages, id)
	}
	return nil
}

// Changes: nothing is remembered.
func (x *mapIndex) Changes(context.Context, uint64) (store.Changes, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	return store.Changes{Generation: x.generation, Unknown: true}, nil
}

func (x *mapIndex) Suspect(_ context.Context, ids []store.ID) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, id := range ids {
		if l, ok := x.locs[id]; ok {
			l.Suspect = true
			x.locs[id] = l
		}
	}
	return nil
}

// Whole is always false: everything is checked.
func (x *mapIndex) Whole(context.Context) (bool, error) { return false, nil }

func (x *mapIndex) SetWhole(context.Context) error { return nil }

func (x *mapIndex) Page(_ context.Context, id store.ID) ([]byte, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.pages[id], nil
}

func (x *mapIndex) PutPages(_ context.Context, ids []store.ID, pages [][]byte) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	for i, id := range ids {
		x.pages[id] = pages[i]
	}
	return nil
}

func (x *mapIndex) Points(_ context.Context, after store.PointID) iter.Seq2[store.SealedPoint, error] {
	x.mu.Lock()
	points := maps.Clone(x.points)
	x.mu.Unlock()
	return func(yield func(store.SealedPoint, error) bool) {
		for _, id := range slices.SortedFunc(maps.Keys(points), func(a, b store.PointID) int { return slices.Compare(a[:], b[:]) }) {
			if slices.Compare(id[:], after[:]) > 0 && !yield(store.SealedPoint{ID: id, Summary: points[id]}, nil) {
				return
			}
		}
	}
}

func (x *mapIndex) PutPoint(_ context.Context, p store.SealedPoint) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.points[p.ID] = p.Summary
	x.generation++
	return nil
}

func (x *mapIndex) DropPoint(_ context.Context, id store.PointID) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.points, id)
	x.generation++
	return nil
}

func (x *mapIndex) Generation(context.Context) (uint64, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.generation, nil
}

func (x *mapIndex) Reserve(_ context.Context, name string) (int, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	n := x.names[name]
	x.names[name] = n + 1
	return n, nil
}

func (x *mapIndex) Close() error { return nil }
