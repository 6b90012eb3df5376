package store

import (
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

// reconcile brings x up to date with the packs and manifests in the bucket.
// It reads only names, and the footers and manifests that x lacks.
func (r *Repo) reconcile(ctx context.Context, x Index, clean bool) error {
	stale, err := r.reconcileGC(ctx, x) // before packs are added: some may be condemned
	if err != nil {
		return err
	}
	clean = clean && !stale
	if !clean {
		if err := r.reconcilePacks(ctx, x, stale); err != nil {
			return err
		}
	}
	news, err := r.reconcilePoints(ctx, x)
	if err != nil {
		return err
	}
	if !clean {
		return r.markEmptyWhole(ctx, x)
	}
	if !news {
		return nil
	}
	// Points that a clean index has never seen: it is from before them, and so it
	// lacks their packs as well.
	return r.reconcilePacks(ctx, x, stale)
}

// markEmptyWhole: an index that begins with the repository lacks nothing.
func (r *Repo) markEmptyWhole(ctx context.Context, x Index) error {
	for _, err := range x.Packs(ctx) {
		return err
	}
	for _, err := range x.Points(ctx, PointID{}) {
		return err
	}
	return x.SetWhole(ctx)
}

// Whole reports whether the repository is known to lack nothing that its points
// need. When it is not, what a point claims to share with others has to be checked.
func (r *Repo) Whole(ctx context.Context) (bool, error) { return r.index.Whole(ctx) }

// reconcilePacks makes the registry of x that of the packs that are there. stale says
// that there was a collection that x has not heard of.
func (r *Repo) reconcilePacks(ctx context.Context, x Index, stale bool) error {
	state, _, err := r.loadVerifyState(ctx)
	if err != nil {
		return err
	}
	known := map[PackID]NumberedPack{}
	for p, err := range x.Packs(ctx) {
		if err != nil {
			return err
		}
		known[p.ID] = p
	}
	none := len(known) == 0
	var news []PackInfo
	for info, err := range r.bucket.List(ctx, packPrefix) {
		if err != nil {
			return fmt.Errorf("list packs: %w", err)
		}
		id, err := parsePackName(info.Name)
		if err != nil {
			continue
		}
		k, ok := known[id]
		// Cut short: forget what it held. Of a condemned pack the index keeps what it knows: once
		// dropped it would never come back.
		short := ok && k.Size != info.Size && !k.Condemned
		if short {
			if err := x.DropPack(ctx, k.ID, nil); err != nil {
				return err
			}
		}
		if !ok || short {
			news = append(news, PackInfo{ID: id, Size: info.Size})
		}
		delete(known, id)
	}
	if err := r.addPacks(ctx, x, news, state); err != nil {
		return err
	}
	if none && len(news) > 0 {
		r.rebuilt(len(news))
	}
	for _, p := range known {
		// A gc of another process may have removed the pack since the list was made.
		switch _, err := x.Pack(ctx, p.Number); {
		case errors.Is(err, ErrNotExist):
			continue
		case err != nil:
			return err
		}
		if !p.Condemned && !stale {
			r.warn(fmt.Sprintf("pack %s is missing", p.ID))
		}
		if err := x.DropPack(ctx, p.ID, nil); err != nil {
			return err
		}
	}
	return r.suspectKnown(ctx, x, state)
}

// suspectKnown marks in x what is remembered as damaged: x may be from before it was found.
func (r *Repo) suspectKnown(ctx context.Context, x Index, s *verifyState) error {
	if len(s.Damage) == 0 {
		return nil
	}
	packs := map[PackID]uint32{}
	for p, err := range x.Packs(ctx) {
		if err != nil {
			return err
		}
		packs[p.ID] = p.Number
	}
	for part := range slices.Chunk(s.Damage, lookupBatch) {
		ids, locs := make([]ID, len(part)), make([]Loc, len(part))
		for i := range part {
			ids[i] = part[i].ID
		}
		if err := x.Lookup(ctx, ids, locs); err != nil {
			return err
		}
		var hit []ID
		for i := range part {
			if locs[i].Sound() && part[i].hits(locs[i], packs) {
				hit = append(hit, ids[i])
			}
		}
		if len(hit) == 0 {
			continue
		}
		if err := x.Suspect(ctx, hit); err != nil {
			return err
		}
	}
	return nil
}

// addPacks reads the tables of packs into x. Of what s knows to be damaged no record takes
// the place of a whole one.
func (r *Repo) addPacks(ctx context.Context, x Index, packs []PackInfo, s *verifyState) error {
	bad := map[PackID][]damageRecord{}
	for _, d := range s.Damage {
		if d.Pack != (PackID{}) {
			bad[d.Pack] = append(bad[d.Pack], d)
		}
	}
	var done, total int64 // bytes of packs
	for _, p := range packs {
		total += p.Size
	}
	var mu sync.Mutex // guards done
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for _, p := range packs {
		g.Go(func() error {
			recs, whole, err := r.packTable(ctx, p.ID)
			if err == nil && !whole {
				// Of no chunk that is known, but the index is not whole with this pack.
				err = x.Suspect(ctx, []ID{{}})
			}
			if err == nil {
				markSuspect(recs, bad[p.ID])
				err = x.AddPack(ctx, p, recs)
			}
			if err != nil && !errors.Is(err, ErrNotExist) { // collected meanwhile
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			done += p.Size
			r.indexing(done, total)
			return nil
		})
	}
	return g.Wait()
}

// markSuspect marks those of recs, of one pack, that bad says were found damaged.
func markSuspect(recs []PackRecord, bad []damageRecord) {
	if len(bad) == 0 {
		return
	}
	at := make(map[ID][]uint32, len(bad)) // id => offsets
	for _, d := range bad {
		at[d.ID] = append(at[d.ID], d.Off)
	}
	for i := range recs {
		for _, off := range at[recs[i].ID] {
			if off == 0 || off == recs[i].Off {
				recs[i].Kind |= KindSuspect
			}
		}
	}
}

// packTable gives the records of a pack: from its footer, or, when that is
// damaged, from the records themselves; then it is not whole. Those are proved one by one: in a pack under
// a wrong name none can be read, and they must not hide the good ones elsewhere.
func (r *Repo) packTable(ctx context.Context, id PackID) (recs []PackRecord, whole bool, err error) {
	o, err := r.bucket.Open(ctx, packName(id))
	if err != nil {
		return nil, false, fmt.Errorf("pack %s: %w", id, err)
	}
	defer o.Close()
	recs, err = readFooter(o, o.Size(), r.id, id, r.keys.sealed)
	if err == nil {
		return recs, true, nil
	}
	if errors.Is(err, ErrNewerFormat) {
		return nil, false, fmt.Errorf("pack %s: %w", id, err)
	}
	r.warn(fmt.Sprintf("pack %s: %v; its records are read one by one", id, err))
	s, err := r.salvage(ctx, o, id)
	if err != nil {
		return nil, false, fmt.Errorf("pack %s: %w", id, err)
	}
	return s.recs, false, nil
}

// reconcilePoints reports whether there were points that x did not have.
func (r *Repo) reconcilePoints(ctx context.Context, x Index) (news bool, err error) {
	known := map[PointID]bool{}
	for p, err := range x.Points(ctx, PointID{}) {
		if err != nil {
			return false, err
		}
		known[p.ID] = true
	}
	for name, err := range bucket.Names(ctx, r.bucket, pointPrefix) {
		if err != nil {
			return false, fmt.Errorf("list points: %w", err)
		}
		var id PointID
		if id.UnmarshalText([]byte(strings.TrimPrefix(name, pointPrefix))) != nil {
			continue
		}
		if known[id] {
			delete(known, id)
			continue
		}
		s, err := r.summaryOf(ctx, id)
		if errors.Is(err, ErrNotExist) {
			continue // gone meanwhile
		}
		if err != nil {
			return false, err
		}
		if s.Damaged != "" {
			r.warn(s.Damaged)
		}
		news = true
		if err := r.putSummaryIn(ctx, x, &s); err != nil {
			return false, err
		}
	}
	for id := range known {
		if err := x.DropPoint(ctx, id); err != nil {
			return false, err
		}
	}
	return news, nil
}
