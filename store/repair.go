package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"time"

	"github.com/holdfast-backup/holdfast/store/bucket"
)

// RepairPacksOptions say how to repair packs.
type RepairPacksOptions struct {
	DryRun bool // change nothing
	// DropUnreadable removes packs also when the medium refused to give parts of them that may
	// hold something. Without it they stay: a medium, a cable or a network that refuses now may give
	// them later.
	DropUnreadable bool
	// Damage is told of what is lost at the end, with DryRun of what would be. Never called by two
	// goroutines at once.
	Damage func(*DamageError)
	// Progress is told of the bytes of packs that are looked at. May be nil.
	Progress func(done, total int64)
	Now      func() time.Time // the clock; nil is time.Now
}

// RepairPacksReport says what was found and done.
type RepairPacksReport struct {
	Damaged int   `json:"packs_damaged"`
	Removed int   `json:"packs_removed"`
	Kept    int   `json:"packs_kept"`     // what they may hold can perhaps be read later
	Records int64 `json:"records_saved"`  // stored again, or with a dry run: that would be
	Saved   int64 `json:"bytes_saved"`    // of them
	Pages   int64 `json:"pages_restored"` // out of the index
	Lost    int   `json:"damaged"`        // places on disks of points that stay damaged
	DryRun  bool  `json:"dry_run,omitempty"`
}

// RepairPacks stores again what damaged packs still hold, and removes them: those that are torn,
// have a damaged header or table, or records that a verification found damaged. Backups, mounts
// and restores may go on meanwhile. ErrLocked beside a gc.
//
// It goes the way of gc: a damaged pack is condemned, what it holds is written to other packs,
// durably, the state of gc gets another epoch, and only then the pack goes. Unlike gc it does not ask what is
// in use: every record that proves right is stored again unless it is sound elsewhere. So nothing that a
// backup, a reader or an older copy of the index relies on goes with the pack, and nobody is waited for.
// Bytes that can be read and prove wrong are given up; those that cannot be read are not, see DropUnreadable.
// Interrupted anywhere, nothing more is lost, and the next run goes on.
func (r *Repo) RepairPacks(ctx context.Context, opt RepairPacksOptions) (rep RepairPacksReport, err error) {
	rep.DryRun = opt.DryRun
	g := &collector{repo: r, rep: &GCReport{}}
	if !opt.DryRun {
		if err := r.makeRoom(ctx); err != nil { // for the lease, too
			return rep, err
		}
		release, err := g.alone(ctx)
		if err != nil {
			return rep, err
		}
		defer release()
		if err := r.prepareWrite(ctx); err != nil {
			return rep, err
		}
	}
	// What is lost is found, marked and remembered before anything goes.
	look := VerifyOptions{DryRun: opt.DryRun, Damage: func(*DamageError) {}, Progress: opt.Progress, Now: opt.Now}
	if opt.DryRun {
		look.Damage = opt.Damage
	}
	v := newVerifier(r, look)
	if opt.DryRun {
		v.spare = func(ctx context.Context, id ID) (bool, error) {
			b, err := r.indexedPage(ctx, id)
			return b != nil, err
		}
	}
	state, _, err := r.loadVerifyState(ctx)
	if err != nil {
		return rep, err
	}
	known := map[PackID]bool{}
	for i := range state.Damage {
		known[state.Damage[i].Pack] = true
	}
	v.deep = func(id PackID) bool { return known[id] }
	if err := v.run(ctx); err != nil {
		return rep, err
	}
	p := &packRepair{repo: r, g: g, v: v, opt: opt, rep: &rep}
	if err := p.examine(ctx); err != nil {
		return rep, err
	}
	if opt.DryRun {
		rep.Lost = v.report.Hit
		return rep, nil
	}
	if err := p.run(ctx); err != nil {
		return rep, err
	}
	after := newVerifier(r, VerifyOptions{Damage: opt.Damage, Now: opt.Now})
	err = after.run(ctx)
	rep.Lost = after.report.Hit
	return rep, err
}

// packRepair is a repair of packs on its way.
type packRepair struct {
	repo  *Repo
	g     *collector
	v     *verifier // that has looked for what is damaged
	opt   RepairPacksOptions
	rep   *RepairPacksReport
	packs []*damagedPack
}

// damagedPack is one of them.
type damagedPack struct {
	doomedPack
	found *salvaged
}

// examine says of each damaged pack what has to be stored again, and whether it can go.
func (p *packRepair) examine(ctx context.Context) error {
	if err := p.repo.sameIndex(ctx, p.v.index); err != nil {
		return err
	}
	all, _, err := p.g.registry(ctx)
	if err != nil {
		return err
	}
	for _, n := range all {
		s, broken := p.v.broken[n.Number]
		switch {
		case p.v.packID[n.Number] != n.ID:
			continue // of another index
		case s != nil:
		case n.Condemned && !broken: // removed by a run that was interrupted?
			o, err := p.repo.bucket.Open(ctx, packName(n.ID))
			if err == nil {
				o.Close()
				continue
			}
			if !errors.Is(err, bucket.ErrNotExist) {
				return fmt.Errorf("store: pack %s: %w", n.ID, err)
			}
			p.packs = append(p.packs, &damagedPack{doomedPack: doomedPack{NumberedPack: n, gone: true}, found: &salvaged{}})
			continue
		default:
			continue // whole, or missing
		}
		d := &damagedPack{doomedPack: doomedPack{NumberedPack: n, recs: slices.Concat(s.recs, s.table)}, found: s}
		p.rep.Damaged++
		locs := make([]Loc, len(s.recs))
		if err := p.repo.index.Lookup(ctx, idsOf(s.recs), locs); err != nil {
			return fmt.Errorf("store: %w", err)
		}
		for i, rec := range s.recs {
			if locs[i].Pack == n.Number || !p.sound(rec.ID, locs[i]) {
				d.live = append(d.live, rec)
				p.rep.Records++
				p.rep.Saved += recordLen + int64(rec.Len)
			}
		}
		if d.keep, err = p.keep(ctx, d); err != nil {
			return err
		}
		if d.keep {
			p.rep.Kept++
		}
		p.packs = append(p.packs, d)
	}
	return nil
}

// sound reports whether what the index has of id at loc can be relied on.
func (p *packRepair) sound(id ID, loc Loc) bool {
	s, broken := p.v.broken[loc.Pack]
	return loc.Reusable() && (!broken || s.has(id))
}

// keep reports whether a pack must stay since a later, better attempt may read more of it.
func (p *packRepair) keep(ctx context.Context, d *damagedPack) (bool, error) {
	name, err := p.misnamed(ctx, d.ID)
	if err != nil {
		return false, err
	}
	if name != "" {
		p.repo.warn(fmt.Sprintf("pack %s stays: it is %s, under a wrong name", d.ID, name))
		return true, nil
	}
	if d.found.unread == nil || p.opt.DropUnreadable {
		return false, nil
	}
	stay := !d.found.named // nobody knows what else it holds
	var lost []ID
	for _, rec := range d.found.table {
		if !d.found.has(rec.ID) {
			lost = append(lost, rec.ID)
		}
	}
	locs := make([]Loc, len(lost))
	if err := p.repo.index.Lookup(ctx, lost, locs); err != nil {
		return false, fmt.Errorf("store: %w", err)
	}
	for i, l := range locs {
		stay = stay || l.Pack == d.Number || !p.sound(lost[i], l)
	}
	if stay {
		p.repo.warn(fmt.Sprintf("pack %s stays: part of it cannot be read: %v", d.ID, d.found.unread))
	}
	return stay, nil
}

// misnamed says what a pack is that has the whole header of another one: nothing of it can be
// proved, and all of it may be whole.
func (p *packRepair) misnamed(ctx context.Context, id PackID) (string, error) {
	o, err := p.repo.bucket.Open(ctx, packName(id))
	if err != nil {
		return "", fmt.Errorf("store: pack %s: %w", id, err)
	}
	defer o.Close()
	var h [packHeaderLen]byte
	if n, _ := o.ReadAt(h[:], 0); n < len(h) {
		return "", nil // too short, or not to be read
	}
	if !bytes.HasPrefix(h[:], packMagic[:]) || crc32.Checksum(h[:76], castagnoli) != binary.LittleEndian.Uint32(h[76:]) {
		return "", nil
	}
	if named := PackID(h[32:64]); named != id || [16]byte(h[16:]) != p.repo.id {
		return "pack " + named.String(), nil
	}
	return "", nil
}

// run stores again what is whole and removes the packs.
func (p *packRepair) run(ctx context.Context) error {
	g := p.g
	var sound bool
	var err error
	if g.state, sound, err = p.repo.loadGCState(ctx); err != nil {
		return err
	}
	var condemn []PackID
	going := map[PackID]bool{}
	for _, d := range p.packs {
		if !d.keep {
			going[d.ID] = true
			if !d.Condemned {
				condemn = append(condemn, d.ID)
			}
		}
	}
	if err := g.condemn(ctx, condemn); err != nil {
		return err
	}
	if err := p.save(ctx); err != nil {
		return err
	}
	if len(going) == 0 {
		return nil
	}
	// Before anything goes: an older copy of the index must be seen to be one.
	if len(condemn) == 0 && !sound {
		for id := range going {
			g.state.Packs = append(g.state.Packs, bytes.Clone(id[:]))
		}
	}
	if err := g.publish(ctx); err != nil {
		return err
	}
	for _, d := range p.packs {
		if d.keep {
			continue
		}
		if err := g.remove(ctx, &d.doomedPack); err != nil {
			return err
		}
		if !d.gone {
			p.rep.Removed++
		}
	}
	// What gc has condemned stays so. A pack that could not be read to its end is pardoned.
	g.state.Packs = slices.DeleteFunc(g.state.Packs, func(id hexBytes) bool { return going[PackID(id)] })
	return g.publish(ctx)
}

// save stores again what is whole in the packs, and the lost pages that the index still has.
func (p *packRepair) save(ctx context.Context) error {
	w, err := (&Draft{repo: p.repo}).Writer()
	if err != nil {
		return err
	}
	defer w.Close()
	for _, d := range p.packs {
		if err := p.copy(ctx, w, d); err != nil {
			return err
		}
	}
	if err := p.pages(ctx, w); err != nil {
		return err
	}
	return p.repo.packer.flush()
}

// copy stores the live records of one pack again.
func (p *packRepair) copy(ctx context.Context, w *ChunkWriter, d *damagedPack) error {
	if len(d.live) == 0 {
		return nil
	}
	r := p.repo
	o, err := r.bucket.Open(ctx, packName(d.ID))
	if err != nil {
		return fmt.Errorf("store: pack %s: %w", d.ID, err)
	}
	defer o.Close()
	b := r.keys.box(ctxPack, d.ID[:])
	win := scanWindow{r: o, size: o.Size()}
	dst := make([]byte, max(r.cfg.ChunkSize, maxPageLen))
	for _, rec := range d.live {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, body, err := r.wholeRecord(&win, rec, b, dst)
		if err != nil { // it was right a moment ago
			return fmt.Errorf("store: pack %s: record at %d: %w; run the repair again", d.ID, rec.Off, err)
		}
		if _, err := w.copy(ctx, h, body); err != nil {
			return err
		}
	}
	return nil
}

// pages stores lost pages of which the index has kept a copy.
func (p *packRepair) pages(ctx context.Context, w *ChunkWriter) error {
	for id, kind := range p.v.kinds {
		if kind != KindPage || len(p.v.bad[id]) == 0 {
			continue
		}
		var loc [1]Loc
		if err := p.repo.index.Lookup(ctx, []ID{id}, loc[:]); err != nil {
			return fmt.Errorf("store: %w", err)
		}
		if loc[0].Reusable() {
			continue
		}
		b, err := p.repo.indexedPage(ctx, id)
		if err != nil {
			return err
		}
		if b == nil {
			continue
		}
		if _, err := w.store(ctx, id, KindPage, b); err != nil {
			return err
		}
		p.rep.Pages++
	}
	return nil
}

// indexedPage gives the copy of a page that the index has kept, nil when it has none, or a wrong one.
func (r *Repo) indexedPage(ctx context.Context, id ID) ([]byte, error) {
	b, err := r.index.Page(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	if b == nil || r.hashPage(b) != id {
		return nil, nil
	}
	return b, nil
}
