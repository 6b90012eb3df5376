package store

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/store/bucket"
)

// VerifyOptions say how deep to look.
type VerifyOptions struct {
	Points   []PointID // nil: all points, and all packs
	ReadData bool      // read and check every chunk, not only that it is there
	// Share, 0 to 1, and Bytes read only the next packs of the pass that is on its way: as many
	// as make up that share of all, or that many bytes. With neither a pass begins and reads all.
	Share float64
	Bytes int64
	// Resume reads what the pass on its way has not read yet.
	Resume bool
	Rate   int64 // bytes read of packs in a second; 0: as many as there can be
	// Damage is told of everything found, as it is found. Never called by two
	// goroutines at once.
	Damage func(*DamageError)
	// Progress is told of the bytes that will be read, then of each part read. May be nil.
	Progress func(done, total int64)
	Now      func() time.Time // the clock; nil is time.Now
	DryRun   bool             // remember nothing, not even in the index
}

// part reports whether only a part of the packs is read.
func (o *VerifyOptions) part() bool { return o.Share > 0 || o.Bytes > 0 || o.Resume }

// VerifyReport sums up a verification.
type VerifyReport struct {
	Points  int         `json:"points"`
	Packs   int         `json:"packs"`
	Pages   int         `json:"pages"`          // unique ones
	Chunks  int64       `json:"chunks"`         // references in unique pages
	Read    int64       `json:"bytes_read"`     // of packs
	Damaged int         `json:"damaged"`        // findings
	Hit     int         `json:"-"`              // of them, those that name a point
	Pass    *PassReport `json:"pass,omitempty"` // with data read of packs
	// Ended is when the last reading of all packs came to its end; zero: none did.
	Ended time.Time `json:"pass_ended,omitzero"`
}

// PassReport says how far the reading of all packs has come.
type PassReport struct {
	Began   time.Time `json:"began"`
	Packs   int       `json:"packs_checked"`
	Checked int64     `json:"bytes_checked"` // of the packs that there are now
	Total   int64     `json:"bytes_total"`   //
	Done    bool      `json:"done"`          // all were read
}

// maxFindingsPerDisk bounds how many places of one disk are listed one by one.
const maxFindingsPerDisk = 1000

// Progress of a pass is saved after so much time, or so many bytes, whichever comes first.
const (
	saveEvery      = 10 * time.Second
	saveEveryBytes = 4 << 30
)

// verifier is one verification on its way.
type verifier struct {
	repo  *Repo
	opt   VerifyOptions
	began time.Time
	pace  pacer

	state    verifyState                             // when it began
	packID   map[uint32]PackID                       // number => pack, for those that were there when it began
	deep     func(PackID) bool                       // which packs are gone through record by record; nil: none
	spare    func(context.Context, ID) (bool, error) // pages that are kept elsewhere: no damage; nil: none
	broken   map[uint32]*salvaged                    // packs with a damaged table, and those of deep; nil: there is nothing left of it
	index    uint64                                  // incarnation that numbers of packs are of
	complete bool                                    // the records of all packs were read by this run

	saving sync.Mutex // guards following
	mute   bool       // nothing can be remembered, which was said

	mu     sync.Mutex // guards following
	report VerifyReport
	bad    map[ID][]badRecord
	named  map[ID]bool // of bad, those that a point was found to use
	kinds  map[ID]uint8
	pages  map[ID]bool     // pages seen => something below is damaged
	read   map[PackID]bool // packs of which every record was checked
	// scanned are packs without a table: what they lack is known when the points were looked at.
	scanned map[PackID]bool
	right   map[ID]Loc // remembered chunks of points that turned out to be right
	walked  map[PointID]bool
	hits    []touch
	pass    *verifyPass // how far it has come; nil: nothing is read
	saved   time.Time   // when that was written down last
	since   int64       // bytes read since then
}

// badRecord is a damaged chunk or page.
type badRecord struct {
	pack, off uint32 // where; zero pack: wherever it is
	err       error
	known     bool // remembered, not found by this verification
}

func (b badRecord) at(loc Loc) bool {
	return b.pack == 0 || b.pack == loc.Pack && (b.off == 0 || b.off == loc.Off)
}

// badAt gives what is wrong with the record of id that the index names.
func (v *verifier) badAt(id ID, loc Loc) (badRecord, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, b := range v.bad[id] {
		if b.at(loc) {
			return b, true
		}
	}
	return badRecord{}, false
}

func (v *verifier) addBad(id ID, kind uint8, b badRecord) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.bad[id], v.kinds[id] = append(v.bad[id], b), kind
}

func newVerifier(r *Repo, opt VerifyOptions) *verifier {
	if opt.Now == nil {
		opt.Now = time.Now
	}
	return &verifier{
		repo: r, opt: opt, began: opt.Now().UTC().Truncate(time.Second), pace: pacer{rate: opt.Rate},
		packID: map[uint32]PackID{}, broken: map[uint32]*salvaged{},
		bad: map[ID][]badRecord{}, named: map[ID]bool{}, kinds: map[ID]uint8{}, pages: map[ID]bool{}, read: map[PackID]bool{}, scanned: map[PackID]bool{},
		right: map[ID]Loc{}, walked: map[PointID]bool{},
	}
}

// Verify checks the repository and reports all damage, and which points it
// touches. It changes nothing that points consist of; the index marks damaged chunks, so that a backup
// which still has them stores them again and so heals the points that use them. What was
// found is remembered in verify/state, and counts as damage until it is healed or its pack is read
// again and right. The error says that the check itself could not be carried out; with one that is
// the context's, how far it came is remembered.
func (r *Repo) Verify(ctx context.Context, opt VerifyOptions) (VerifyReport, error) {
	v := newVerifier(r, opt)
	err := v.run(ctx)
	return v.report, err
}

func (v *verifier) run(ctx context.Context) error {
	r := v.repo
	r.prepareMu.Lock()
	damaged := slices.Clone(r.cfgState.damaged)
	r.prepareMu.Unlock()
	for _, name := range damaged {
		v.found(&DamageError{What: name, Err: errors.New("damaged or missing; the other copy is whole")})
	}
	if err := v.begin(ctx); err != nil {
		return err
	}
	if err := v.look(ctx); err != nil {
		// What was found so far is kept, whatever stopped it.
		return errors.Join(err, v.remember(context.WithoutCancel(ctx), false))
	}
	for id, list := range v.bad {
		for _, b := range list {
			if !v.named[id] && b.pack != 0 && !b.known { // others were found by way of a point, which may be forgotten since
				v.found(&DamageError{What: "record of " + id.String()[:16] + ", which no point checked here uses", Err: b.err})
			}
		}
	}
	if err := v.remember(ctx, true); err != nil {
		return err
	}
	if v.report.Damaged == 0 && v.complete && !v.opt.DryRun {
		return r.index.SetWhole(ctx)
	}
	return nil
}

// look goes through packs and points.
func (v *verifier) look(ctx context.Context) error {
	points, err := v.manifests(ctx)
	if err != nil {
		return err
	}
	if err := v.packs(ctx); err != nil {
		return err
	}
	for _, p := range points {
		if err := v.point(ctx, p); err != nil {
			return err
		}
	}
	if len(v.bad) > 0 || len(v.broken) > 0 {
		return v.repo.sameIndex(ctx, v.index) // by whose numbers damage is known
	}
	return nil
}

// begin reads what is remembered. Damage in packs that are not going to be read counts as found.
func (v *verifier) begin(ctx context.Context) error {
	s, _, err := v.repo.loadVerifyState(ctx)
	if err != nil {
		return err
	}
	v.state, v.report.Ended = *s, s.Ended
	if v.index, err = v.repo.index.Incarnation(ctx); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	number := map[PackID]uint32{}
	for p, err := range v.repo.index.Packs(ctx) {
		if err != nil {
			return fmt.Errorf("store: %w", err)
		}
		v.packID[p.Number], number[p.ID] = p.ID, p.Number
	}
	for _, d := range s.Damage {
		n, ok := number[d.Pack]
		if !ok || v.opt.Points != nil && v.opt.ReadData && d.Kind == KindChunk {
			continue // looked for again
		}
		v.addBad(d.ID, d.Kind, badRecord{n, d.Off, fmt.Errorf("%s, as a verification found at %s", d.Error, d.Found.Format(time.RFC3339)), true})
	}
	return nil
}

// dropKnown forgets what is remembered of a pack that is read now. v.mu is held.
func (v *verifier) dropKnown(number uint32) {
	for id, list := range v.bad {
		list = slices.DeleteFunc(list, func(b badRecord) bool { return b.known && b.pack == number })
		if v.bad[id] = list; len(list) == 0 {
			delete(v.bad, id)
		}
	}
}

func (v *verifier) found(d *DamageError) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.report.Damaged++
	if d.Point != "" {
		v.report.Hit++
	}
	v.opt.Damage(d)
}

// remember writes down what was found: for later verifications and listings to verify/state, and
// for backups as a mark in the index. all says that the points were looked at, too.
func (v *verifier) remember(ctx context.Context, all bool) error {
	if v.opt.DryRun {
		return nil
	}
	v.saving.Lock()
	defer v.saving.Unlock()
	found, err := v.findings(ctx)
	if err != nil {
		return err
	}
	if len(found) == 0 && v.pass == nil && len(v.state.Damage) == 0 && len(v.state.Touched) == 0 {
		return nil
	}
	if len(found) > 0 {
		if err := v.repo.sameIndex(ctx, v.index); err != nil {
			return err
		}
	}
	if !v.mute {
		err = v.repo.changeVerifyState(ctx, func(s *verifyState) error {
			v.merge(s, found, all)
			return nil
		})
	}
	switch {
	case err == nil:
	case errors.Is(err, bucket.ErrReadOnly), errors.Is(err, bucket.ErrFull), errors.Is(err, ErrNewerFormat):
		if !v.mute {
			v.repo.warn(fmt.Sprintf("what was found cannot be remembered: %v", err))
		}
		v.mute = true
	default:
		return err
	}
	return v.suspect(ctx, found)
}

// findings gives what this verification found, each with the pack that it is in.
func (v *verifier) findings(ctx context.Context) ([]damageRecord, error) {
	v.mu.Lock()
	var list []damageRecord
	var where []uint32 // number of the pack; 0: to be looked up
	for _, id := range slices.SortedFunc(maps.Keys(v.bad), func(a, b ID) int { return bytes.Compare(a[:], b[:]) }) {
		for _, b := range v.bad[id] {
			if b.known {
				continue
			}
			text := b.err.Error()
			list = append(list, damageRecord{ID: id, Kind: v.kinds[id], Off: b.off, Error: text[:min(len(text), maxDamageMessage)], Found: v.began})
			where = append(where, b.pack)
		}
	}
	v.mu.Unlock()
	ids, locs := make([]ID, len(list)), make([]Loc, len(list))
	for i := range list {
		ids[i] = list[i].ID
	}
	if err := v.repo.index.Lookup(ctx, ids, locs); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	seen := map[[64]byte]bool{}
	found := list[:0]
	for i := range list {
		d := list[i]
		if where[i] == 0 && locs[i].Known() {
			where[i], d.Off = locs[i].Pack, locs[i].Off
		}
		d.Pack = v.packID[where[i]]
		if k := d.key(); !seen[k] {
			seen[k] = true
			found = append(found, d)
		}
	}
	return found, nil
}

// merge brings what this verification found into s, which others may have changed since it
// began.
func (v *verifier) merge(s *verifyState, found []damageRecord, all bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	old := map[[64]byte]time.Time{}
	for i := range s.Damage {
		old[s.Damage[i].key()] = s.Damage[i].Found
	}
	now := map[[64]byte]bool{}
	for i := range found {
		k := found[i].key()
		now[k] = true
		if t, ok := old[k]; ok {
			found[i].Found = t
		}
	}
	s.Damage = slices.DeleteFunc(s.Damage, func(d damageRecord) bool {
		loc, right := v.right[d.ID]
		switch {
		case now[d.key()]:
			return true // comes back below
		case !d.Found.Before(v.began) && !d.Found.Equal(v.began):
			return false // by somebody who began later
		case d.Pack == PackID{}:
			return all && v.opt.Points == nil
		case right && v.packID[loc.Pack] == d.Pack:
			return true
		}
		return v.read[d.Pack] || all && v.scanned[d.Pack]
	})
	s.Damage = append(s.Damage, found...)
	if all {
		s.Touched = slices.DeleteFunc(s.Touched, func(t touch) bool { return v.walked[t.Point] })
		s.Touched = append(s.Touched, v.hits...)
	}
	if v.pass != nil {
		pass := *v.pass
		s.Pass, s.Ended = &pass, v.report.Ended
		if v.report.Pass != nil && v.report.Pass.Done {
			s.Pass = nil
		}
	}
}

// suspect marks what was found damaged in the index, so that it is stored again when
// a backup meets it. Where the index knows another record of the same id it stays as it is.
func (v *verifier) suspect(ctx context.Context, found []damageRecord) error {
	ids := make([]ID, 0, len(found))
	for i := range found {
		if i == 0 || found[i].ID != found[i-1].ID {
			ids = append(ids, found[i].ID)
		}
	}
	locs := make([]Loc, len(ids))
	if err := v.repo.index.Lookup(ctx, ids, locs); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	var hit []ID
	for i, id := range ids {
		if b, ok := v.badAt(id, locs[i]); ok && !b.known {
			hit = append(hit, id)
		}
	}
	if len(hit) == 0 {
		return nil
	}
	if err := v.repo.index.Suspect(ctx, hit); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	return nil
}

// cmpPacks orders packs by their ids, which is the order in which they are read.
func cmpPacks(a, b NumberedPack) int {
	return cmp.Or(bytes.Compare(a.ID[:], b.ID[:]), cmp.Compare(a.Number, b.Number))
}
