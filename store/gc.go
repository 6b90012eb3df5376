package store

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"

	"github.com/holdfast-backup/holdfast/store/bucket"
)

// GCOptions say how to collect.
type GCOptions struct {
	// MaxLive is the share of live bytes, 0 to 1, below which a pack is rewritten;
	// 0 is DefaultMaxLive. Packs with nothing live always go.
	MaxLive float64
	// IgnoreMissing collects though points need chunks that are nowhere: those
	// points are damaged already, and nothing that is left of them goes.
	IgnoreMissing bool
	DryRun        bool // change nothing
	// Progress is told of each phase and how many bytes of it are done: of the disks
	// of points, then of packs. May be nil.
	Progress func(phase GCPhase, done, total int64)
}

// DefaultMaxLive rewrites packs of which less than half is live: each byte
// copied gives back more than one.
const DefaultMaxLive = 0.5

// Packs of less than smallPack bytes are merged when there are mergePacks of them:
// every backup leaves one.
const (
	smallPack  = 8 << 20
	mergePacks = 16
)

// GCPhase is what a collection is doing.
type GCPhase string

// The phases in order.
const (
	GCMark  GCPhase = "mark"  // what points use
	GCSweep GCPhase = "sweep" // packs that are not worth keeping
)

// GCReport says what a collection found and did.
type GCReport struct {
	Points    int   `json:"points"` // marked, with those that are only held
	Pages     int64 `json:"pages"`  // unique ones
	Chunks    int64 `json:"chunks"` // unique ones
	Packs     int   `json:"packs"`  // before
	Stored    int64 `json:"bytes_stored"`
	Live      int64 `json:"bytes_live"`
	Missing   int64 `json:"missing,omitempty"`   // chunks that points need and nobody has
	Condemned int   `json:"packs_condemned"`     // in this run
	Pending   int   `json:"packs_pending"`       // condemned, and still needed by somebody at work
	Waiting   int   `json:"waiting"`             // backups at work that they wait for
	Removed   int   `json:"packs_removed"`       //
	Freed     int64 `json:"bytes_freed"`         // by removed packs, less what was copied
	Copied    int64 `json:"bytes_copied"`        // of live records into new packs
	Kept      int   `json:"packs_kept"`          // condemned, but not removed: part of them cannot be read
	PagesGone int64 `json:"index_pages_removed"` //
	DryRun    bool  `json:"dry_run,omitempty"`   //
	Reclaim   int64 `json:"bytes_reclaimable"`   // what removing all condemned packs gives back
}

// GC gives back the space of chunks that no point uses. Backups, mounts and
// restores may go on meanwhile, in this process and in others.
//
// A pack that is worth removing is condemned first: it stays readable, but no
// new point relies on it. It is removed when every backup that began before that has ended,
// after what points still use of it was copied. That may be at once, or in a later run.
// Interrupted anywhere, nothing is lost and the next run goes on. ErrLocked when another gc runs.
func (r *Repo) GC(ctx context.Context, opt GCOptions) (rep GCReport, err error) {
	g := &collector{repo: r, opt: opt, rep: &rep}
	if opt.MaxLive == 0 {
		g.opt.MaxLive = DefaultMaxLive
	}
	if opt.Progress == nil {
		g.opt.Progress = func(GCPhase, int64, int64) {}
	}
	rep.DryRun = opt.DryRun
	if !opt.DryRun {
		if err := r.makeRoom(ctx); err != nil {
			return rep, err
		}
		release, err := g.alone(ctx)
		if err != nil {
			return rep, err
		}
		defer release()
		defer r.keepRoom()
		if err := r.prepareWrite(ctx); err != nil {
			return rep, err
		}
	}
	return rep, g.run(ctx)
}

// collector is one collection on its way.
type collector struct {
	repo  *Repo
	opt   GCOptions
	rep   *GCReport
	state *gcState
	marks *marker
	index uint64 // incarnation that the numbers of packs in marks are of
}

// ErrIndexAnew: what was found out with the help of the old index means nothing.
var ErrIndexAnew = errors.New("store: the index was made anew meanwhile; run it again")

// sameIndex fails when the numbers of packs have got another meaning since the incarnation was.
func (r *Repo) sameIndex(ctx context.Context, was uint64) error {
	now, err := r.index.Incarnation(ctx)
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	if now != was {
		return ErrIndexAnew
	}
	return nil
}

// alone takes the lease of the collection.
func (g *collector) alone(ctx context.Context) (release func(), err error) {
	id, release, err := g.repo.lease(ctx, Lease{Kind: LeaseGC})
	if err != nil {
		return nil, err
	}
	live, err := g.repo.leases.Live(ctx)
	if err == nil && slices.ContainsFunc(live, func(l Lease) bool { return l.Kind == LeaseGC && l.ID != id }) {
		err = fmt.Errorf("%w by another gc", ErrLocked)
	}
	if err != nil {
		release()
		return nil, fmt.Errorf("store: %w", err)
	}
	return release, nil
}

func (g *collector) run(ctx context.Context) error {
	r := g.repo
	state, sound, err := r.loadGCState(ctx)
	if err != nil {
		return err
	}
	g.state = state
	// Who may rely on what was condemned earlier is asked before anything is marked:
	// a backup that has ended by now has its manifest in place.
	pending, err := g.waits(ctx)
	if err != nil {
		return err
	}
	if g.index, err = r.index.Incarnation(ctx); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	packs, first, err := g.registry(ctx)
	if err != nil {
		return err
	}
	g.marks = newMarker(r)
	progress := func(done, total int64) { g.opt.Progress(GCMark, done, total) }
	if err := g.marks.run(ctx, progress); err != nil {
		return err
	}
	if err := r.sameIndex(ctx, g.index); err != nil {
		return err
	}
	g.sum(packs)
	if g.marks.missing > 0 && !g.opt.IgnoreMissing {
		return fmt.Errorf("store: %w: %d chunks that points need are not in the index; nothing was collected", ErrDamaged, g.marks.missing)
	}
	chosen := g.choose(packs, first)
	if g.opt.DryRun {
		g.forecast(packs, chosen)
		return nil
	}
	if len(state.Packs) > 0 && pending == 0 && sound {
		if err := g.sweep(ctx); err != nil {
			return err
		}
	}
	if err := g.condemn(ctx, chosen); err != nil {
		return err
	}
	if pending, err = g.waits(ctx); err != nil {
		return err
	}
	if len(g.state.Packs) > 0 && pending == 0 {
		// Points that came since the first marking.
		if err := g.marks.run(ctx, func(int64, int64) {}); err != nil {
			return err
		}
		if err := g.sweep(ctx); err != nil {
			return err
		}
	}
	g.rep.Pending, g.rep.Waiting = len(g.state.Packs), pending
	if g.rep.Removed > 0 {
		// Records of packs that are gone. When this fails the next one does it.
		if err := r.changeVerifyState(ctx, func(*verifyState) error { return nil }); err != nil {
			r.warn(err.Error())
		}
	}
	return g.dropPages(ctx)
}

// waits counts the leases that the condemned packs wait for, and notes which when
// the run that condemned them did not come to that.
func (g *collector) waits(ctx context.Context) (int, error) {
	if len(g.state.Packs) == 0 {
		return 0, nil
	}
	live, err := g.repo.leases.Live(ctx)
	if err != nil {
		return 0, fmt.Errorf("store: leases: %w", err)
	}
	unknown := g.state.Waits == nil
	if unknown {
		g.state.Waits = []hexBytes{}
	}
	n := 0
	for _, l := range live {
		if l.Kind != LeaseWriter {
			continue
		}
		id := hexBytes(bytes.Clone(l.ID[:]))
		switch {
		case unknown:
			g.state.Waits = append(g.state.Waits, id)
			n++
		case slices.ContainsFunc(g.state.Waits, func(w hexBytes) bool { return bytes.Equal(w, id) }):
			n++
		}
	}
	if unknown && !g.opt.DryRun {
		return n, g.repo.saveGCState(ctx, g.state)
	}
	return n, nil
}

// registry gives the packs, and the first number that may be of a backup at work.
func (g *collector) registry(ctx context.Context) (packs []NumberedPack, first uint32, err error) {
	live, err := g.repo.leases.Live(ctx)
	if err != nil {
		return nil, 0, fmt.Errorf("store: leases: %w", err)
	}
	if first, err = g.repo.index.NextPack(ctx); err != nil {
		return nil, 0, fmt.Errorf("store: %w", err)
	}
	for _, l := range live {
		if l.Kind == LeaseWriter {
			first = min(first, l.FirstPack)
		}
	}
	for p, err := range g.repo.index.Packs(ctx) {
		if err != nil {
			return nil, 0, fmt.Errorf("store: %w", err)
		}
		packs = append(packs, p)
	}
	slices.SortFunc(packs, func(a, b NumberedPack) int { return cmp.Compare(a.Number, b.Number) })
	return packs, first, nil
}

// live is the bytes of live records of a pack.
func (g *collector) live(number uint32) int64 {
	if p := g.marks.packs[number]; p != nil {
		return p.bytes
	}
	return 0
}

func (g *collector) sum(packs []NumberedPack) {
	g.rep.Points, g.rep.Pages, g.rep.Chunks, g.rep.Missing = len(g.marks.points), g.marks.pages, g.marks.chunks, g.marks.missing
	g.rep.Packs = len(packs)
	for _, p := range packs {
		g.rep.Stored += p.Size
		g.rep.Live += g.live(p.Number)
	}
}

// choose gives the packs that are worth removing. Those of backups at work are
// left alone: what is in them belongs to points that do not show yet.
func (g *collector) choose(packs []NumberedPack, first uint32) []PackID {
	var chosen, small []PackID
	for _, p := range packs {
		live := g.live(p.Number)
		switch {
		case p.Number >= first || p.Condemned:
		case live == 0, float64(live) < g.opt.MaxLive*float64(recordBytes(p.PackInfo)):
			chosen = append(chosen, p.ID)
		case p.Size < smallPack:
			small = append(small, p.ID)
		}
	}
	if len(small) >= g.repo.mergePacks {
		chosen = append(chosen, small...)
	}
	return chosen
}

// recordBytes is the size of a pack's records alone.
func recordBytes(p PackInfo) int64 {
	return p.Size - packHeaderLen - trailerLen - int64(p.Records)*footerEntryLen
}

// forecast fills the report of a dry run.
func (g *collector) forecast(packs []NumberedPack, chosen []PackID) {
	is := map[PackID]bool{}
	for _, id := range chosen {
		is[id] = true
	}
	g.rep.Condemned = len(chosen)
	for _, p := range packs {
		if is[p.ID] || p.Condemned {
			g.rep.Reclaim += p.Size - g.live(p.Number)
		}
	}
}

// condemn adds packs to the condemned ones. The object comes first: an index that
// is made anew from here on learns of them. Only then is it asked who may not know yet.
func (g *collector) condemn(ctx context.Context, packs []PackID) error {
	g.rep.Condemned = len(packs)
	if len(packs) == 0 {
		return nil
	}
	for _, id := range packs {
		g.state.Packs = append(g.state.Packs, bytes.Clone(id[:]))
	}
	g.state.Waits = nil
	return g.publish(ctx)
}

// publish makes the state known under a new epoch: to the bucket, then to the index.
func (g *collector) publish(ctx context.Context) error {
	epoch := make(hexBytes, 16)
	if _, err := rand.Read(epoch); err != nil {
		return err
	}
	g.state.Epoch = epoch
	if err := g.repo.saveGCState(ctx, g.state); err != nil {
		return err
	}
	for {
		// Somebody else may have told the index already.
		now, err := g.repo.index.Epoch(ctx)
		if err != nil {
			return fmt.Errorf("store: %w", err)
		}
		if bytes.Equal(now[:], epoch) {
			return nil
		}
		if _, err := g.repo.index.Condemn(ctx, now, g.state.condemned()); err != nil {
			return fmt.Errorf("store: %w", err)
		}
	}
}

// sweep removes the condemned packs, after it has copied what is live in them.
func (g *collector) sweep(ctx context.Context) error {
	packs, _, err := g.registry(ctx)
	if err != nil {
		return err
	}
	var doomed []*doomedPack
	for _, p := range packs {
		if !p.Condemned {
			continue
		}
		d, err := g.examine(ctx, p)
		if err != nil {
			return err
		}
		doomed = append(doomed, d)
	}
	// From here on packs and records go by their ids.
	if err := g.repo.sameIndex(ctx, g.index); err != nil {
		return err
	}
	var done, total int64
	for _, d := range doomed {
		total += d.Size
	}
	// Those that hold nothing go first: that may make the room for copying the rest.
	for _, d := range doomed {
		if d.keep || len(d.live) > 0 {
			continue
		}
		if err := g.remove(ctx, d); err != nil {
			return err
		}
		done += d.Size
		g.opt.Progress(GCSweep, done, total)
	}
	for _, d := range doomed {
		if d.keep || len(d.live) == 0 {
			continue
		}
		g.opt.Progress(GCSweep, done, total)
		done += d.Size
		if err := g.rescue(ctx, d); err != nil {
			return err
		}
	}
	if err := g.repo.packer.flush(); err != nil {
		return err
	}
	// Before anything goes that held something live: an older copy of the index must be seen to be one.
	if err := g.publish(ctx); err != nil {
		return err
	}
	left := 0
	for _, d := range doomed {
		switch {
		case d.keep:
			left++
		case len(d.live) > 0:
			if err := g.remove(ctx, d); err != nil {
				return err
			}
		}
	}
	g.opt.Progress(GCSweep, total, total)
	// The packs that stay are pardoned: they are as good as any other.
	g.rep.Kept += left
	g.state.Packs, g.state.Waits = nil, nil
	return g.publish(ctx)
}

// doomedPack is a condemned pack.
type doomedPack struct {
	NumberedPack
	recs []PackRecord // by offset
	live []PackRecord // of them
	keep bool         // something is wrong with it: nothing of it goes
	gone bool         // removed by a run that was interrupted
}

// examine reads the table of a condemned pack and tells what is live in it.
func (g *collector) examine(ctx context.Context, p NumberedPack) (*doomedPack, error) {
	d := &doomedPack{NumberedPack: p}
	o, err := g.repo.bucket.Open(ctx, packName(p.ID))
	if errors.Is(err, bucket.ErrNotExist) {
		d.gone = true
		return d, nil
	}
	if err != nil {
		return nil, fmt.Errorf("store: pack %s: %w", p.ID, err)
	}
	defer o.Close()
	if d.recs, err = readFooter(o, o.Size(), g.repo.id, p.ID, g.repo.keys.sealed); err != nil {
		g.repo.warn(fmt.Sprintf("pack %s stays: %v", p.ID, err))
		d.keep = true
		return d, nil
	}
	slices.SortFunc(d.recs, func(a, b PackRecord) int { return cmp.Compare(a.Off, b.Off) })
	ids, locs := idsOf(d.recs), make([]Loc, len(d.recs))
	if err := g.repo.index.Lookup(ctx, ids, locs); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	marks := g.marks.packs[p.Number]
	for i, rec := range d.recs {
		if locs[i].Pack == p.Number && locs[i].Off == rec.Off && marks.has(locs[i].Slot) {
			d.live = append(d.live, rec)
		}
	}
	return d, nil
}

func idsOf(recs []PackRecord) []ID {
	ids := make([]ID, len(recs))
	for i, r := range recs {
		ids[i] = r.ID
	}
	return ids
}

// rescue copies the live records of a pack into new packs. A pack of which one
// cannot be read stays as it is.
func (g *collector) rescue(ctx context.Context, d *doomedPack) error {
	if len(d.live) == 0 {
		return nil
	}
	r := g.repo
	o, err := r.bucket.Open(ctx, packName(d.ID))
	if err != nil {
		return fmt.Errorf("store: pack %s: %w", d.ID, err)
	}
	defer o.Close()
	w, err := (&Draft{repo: r}).Writer()
	if err != nil {
		return err
	}
	defer w.Close()
	b := r.keys.box(ctxPack, d.ID[:])
	win := scanWindow{r: o, size: o.Size()}
	dst := make([]byte, max(r.cfg.ChunkSize, maxPageLen))
	copied := int64(0)
	for _, rec := range d.live {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, body, err := r.wholeRecord(&win, rec, b, dst)
		if err != nil {
			r.warn(fmt.Sprintf("pack %s stays: record at %d: %v", d.ID, rec.Off, err))
			d.keep = true
			return nil
		}
		n, err := w.copy(ctx, h, body)
		if err != nil {
			return err
		}
		copied += int64(n)
	}
	g.rep.Copied += copied
	g.rep.Freed -= copied
	return nil
}

// wholeRecord reads a record and proves it by all its sums. The body is decrypted
// and still compressed, and valid until the next read of win; dst is scratch.
func (r *Repo) wholeRecord(win *scanWindow, rec PackRecord, b box, dst []byte) (h recordHeader, body []byte, err error) {
	raw, err := win.at(int64(rec.Off), recordLen+int(rec.Len))
	if err != nil {
		return h, nil, err
	}
	h, ok := parseRecordHeader(raw)
	if !ok || h.plain != rec.Plain {
		return h, nil, errors.New("record header")
	}
	if crcOf(raw) != h.crc {
		return h, nil, errors.New("checksum")
	}
	if h, body, err = proveRecord(raw, rec.ID, rec.Kind, b); err != nil {
		return h, nil, err
	}
	_, err = r.decodeBody(h, body, dst, true)
	return h, body, err
}

// remove removes a pack whose live records are elsewhere, the object first: until
// the index has forgotten it as well it is condemned and known to be expendable.
func (g *collector) remove(ctx context.Context, d *doomedPack) error {
	r := g.repo
	ids, locs := idsOf(d.live), make([]Loc, len(d.live))
	if err := r.index.Lookup(ctx, ids, locs); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	for i, l := range locs {
		if !l.Known() || l.Condemned {
			return fmt.Errorf("store: pack %s: %s was copied, but is not in the index", d.ID, ids[i])
		}
	}
	// The decision still stands: nobody has made the index anew without knowing of it.
	now, sound, err := r.loadGCState(ctx)
	if err != nil {
		return err
	}
	epoch, err := r.index.Epoch(ctx)
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	if !sound || !bytes.Equal(now.Epoch, g.state.Epoch) || !bytes.Equal(epoch[:], g.state.Epoch) {
		return fmt.Errorf("store: the repository changed under the gc; run it again")
	}
	if !d.gone {
		if err := r.bucket.Remove(ctx, packName(d.ID)); err != nil && !errors.Is(err, bucket.ErrNotExist) {
			return fmt.Errorf("store: pack %s: %w", d.ID, err)
		}
		g.rep.Removed++
		g.rep.Freed += d.Size
	}
	if err := r.index.DropPack(ctx, d.ID, idsOf(d.recs)); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	r.packs.forget(d.Number)
	return nil
}

// dropPages clears the cache of pages of those that no point uses any more.
func (g *collector) dropPages(ctx context.Context) error {
	var batch []ID
	flush := func() error {
		locs := make([]Loc, len(batch))
		if err := g.repo.index.Lookup(ctx, batch, locs); err != nil {
			return fmt.Errorf("store: %w", err)
		}
		dead := batch[:0]
		for i, id := range batch {
			if p := g.marks.packs[locs[i].Pack]; !locs[i].Known() || (p != nil && !p.has(locs[i].Slot)) { // of a cache: a mistake costs a read
				dead = append(dead, id)
			}
		}
		g.rep.PagesGone += int64(len(dead))
		err := g.repo.index.DropPages(ctx, dead)
		batch = batch[:0]
		if err != nil {
			return fmt.Errorf("store: %w", err)
		}
		return nil
	}
	var all []ID
	for id, err := range g.repo.index.PageIDs(ctx, ID{}) {
		if err != nil {
			return fmt.Errorf("store: %w", err)
		}
		all = append(all, id)
	}
	for part := range slices.Chunk(all, 4096) {
		batch = part
		if err := flush(); err != nil {
			return err
		}
	}
	return nil
}
