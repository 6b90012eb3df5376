package store

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/store/bucket"
)

// VerifyOptions say how deep to look.
type VerifyOptions struct {
	Points   []PointID // nil: all points, and all packs
	ReadData bool      // read and check every chunk, not only that it is there
	// Damage is told of everything found, as it is found. Never called by two
	// goroutines at once.
	Damage func(*DamageError)
	// Progress is told of the bytes that will be read, then of each part read. May be nil.
	Progress func(done, total int64)
}

// VerifyReport sums up a verification.
type VerifyReport struct {
	Points  int   `json:"points"`
	Packs   int   `json:"packs"`
	Pages   int   `json:"pages"`      // unique ones
	Chunks  int64 `json:"chunks"`     // references in unique pages
	Read    int64 `json:"bytes_read"` // of packs
	Damaged int   `json:"damaged"`    // findings
}

// maxFindingsPerDisk bounds how many places of one disk are listed one by one.
const maxFindingsPerDisk = 1000

// verifier is one verification on its way.
type verifier struct {
	repo *Repo
	opt  VerifyOptions

	mu     sync.Mutex // guards following
	report VerifyReport
	bad    map[ID]badRecord
	named  map[ID]bool // of bad, those that a point was found to use
	// broken packs have a damaged table: what they hold is only what was found whole.
	broken map[uint32]map[ID]bool
	pages  map[ID]bool // pages seen => something below is damaged
}

// badRecord is a damaged chunk or page.
type badRecord struct {
	pack, off uint32 // where; zero pack: wherever it is
	err       error
}

func (b badRecord) at(loc Loc) bool {
	return b.pack == 0 || b.pack == loc.Pack && b.off == loc.Off
}

// Verify checks the repository and reports all damage, and which points it
// touches. It changes no object; the index marks damaged chunks, so that a backup
// which still has them stores them again and so heals the points that use them. The
// error says that the check itself could not be carried out.
func (r *Repo) Verify(ctx context.Context, opt VerifyOptions) (VerifyReport, error) {
	v := &verifier{repo: r, opt: opt, bad: map[ID]badRecord{}, named: map[ID]bool{}, broken: map[uint32]map[ID]bool{}, pages: map[ID]bool{}}
	r.prepareMu.Lock()
	damaged := slices.Clone(r.cfgState.damaged)
	r.prepareMu.Unlock()
	for _, name := range damaged {
		v.found(&DamageError{What: name, Err: errors.New("damaged or missing; the other copy is whole")})
	}
	points, err := v.manifests(ctx)
	if err != nil {
		return v.report, err
	}
	if err := v.packs(ctx); err != nil {
		return v.report, err
	}
	for _, p := range points {
		if err := v.point(ctx, p); err != nil {
			return v.report, err
		}
	}
	for id, b := range v.bad {
		if !v.named[id] && b.pack != 0 { // others were found by way of a point, which may be forgotten since
			v.found(&DamageError{What: "record of " + id.String()[:16] + ", which no point checked here uses", Err: b.err})
		}
	}
	switch {
	case len(v.bad) > 0:
		return v.report, v.suspect(ctx)
	case v.report.Damaged == 0 && opt.Points == nil && opt.ReadData:
		return v.report, r.index.SetWhole(ctx)
	}
	return v.report, nil
}

// suspect marks what was found damaged in the index, so that it is stored again when
// a backup meets it. Where the index knows another record of the same id it stays as it is.
func (v *verifier) suspect(ctx context.Context) error {
	ids := slices.Collect(maps.Keys(v.bad))
	locs := make([]Loc, len(ids))
	if err := v.repo.index.Lookup(ctx, ids, locs); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	var hit []ID
	for i, id := range ids {
		if b := v.bad[id]; b.pack == 0 || (b.pack == locs[i].Pack && b.off == locs[i].Off) {
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

func (v *verifier) found(d *DamageError) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.report.Damaged++
	v.opt.Damage(d)
}

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

// packs checks the packs: with ReadData every byte, otherwise header, table and size.
func (v *verifier) packs(ctx context.Context) error {
	if v.opt.Points != nil {
		return nil // the chunks of these points are read on their own
	}
	var list []NumberedPack
	var total, done int64
	for p, err := range v.repo.index.Packs(ctx) {
		if err != nil {
			return fmt.Errorf("store: %w", err)
		}
		list = append(list, p)
		total += p.Size
	}
	slices.SortFunc(list, func(a, b NumberedPack) int { return cmp.Compare(a.Number, b.Number) })
	v.report.Packs = len(list)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for _, p := range list {
		if gctx.Err() != nil {
			break
		}
		g.Go(func() error {
			if err := v.pack(gctx, p); err != nil {
				return err
			}
			v.mu.Lock()
			defer v.mu.Unlock()
			done += p.Size
			if v.opt.Progress != nil {
				v.opt.Progress(done, total)
			}
			return nil
		})
	}
	return g.Wait()
}

// pack checks one pack.
func (v *verifier) pack(ctx context.Context, p NumberedPack) error {
	r := v.repo
	what := "pack " + p.ID.String()
	o, err := r.bucket.Open(ctx, packName(p.ID))
	if errors.Is(err, bucket.ErrNotExist) {
		if gone, err := v.collected(ctx, p.ID); gone || err != nil {
			return err
		}
		v.found(&DamageError{What: what, Err: errors.New("missing")})
		v.setBroken(p.Number, nil)
		return nil
	}
	if err != nil {
		return fmt.Errorf("store: %s: %w", what, err)
	}
	defer o.Close()
	if o.Size() != p.Size {
		v.found(&DamageError{What: what, Err: fmt.Errorf("%d bytes instead of %d", o.Size(), p.Size)})
	}
	recs, err := readFooter(o, o.Size(), r.id, p.ID, r.keys.sealed)
	if err != nil {
		v.found(&DamageError{What: what, Err: err})
		return v.brokenPack(ctx, p, o)
	}
	if !v.opt.ReadData {
		return nil
	}
	slices.SortFunc(recs, func(a, b PackRecord) int { return cmp.Compare(a.Off, b.Off) })
	b := r.keys.box(ctxPack, p.ID[:])
	win := scanWindow{r: o, size: o.Size()}
	dst := make([]byte, max(r.cfg.ChunkSize, maxPageLen))
	at := int64(packHeaderLen)
	for _, rec := range recs {
		if err := ctx.Err(); err != nil {
			return err
		}
		if int64(rec.Off) != at {
			v.found(&DamageError{What: what, Err: fmt.Errorf("no record between %d and %d", at, rec.Off)})
		}
		raw, err := win.at(int64(rec.Off), recordLen+int(rec.Len))
		if err == nil {
			err = r.checkRecord(raw, rec, b, dst)
		}
		if err != nil {
			v.badRecord(p.Number, rec, what, err)
		}
		at = int64(rec.Off) + recordLen + int64(rec.Len)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.report.Read += o.Size()
	return nil
}

// collected reports whether a pack that is missing was removed by a gc since the
// list of packs was made.
func (v *verifier) collected(ctx context.Context, id PackID) (bool, error) {
	for p, err := range v.repo.index.Packs(ctx) {
		if err != nil {
			return false, fmt.Errorf("store: %w", err)
		}
		if p.ID == id {
			return p.Condemned, nil
		}
	}
	return true, nil
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

// checkRecord proves one record by its CRC-32C, its tag and its content hash.
func (r *Repo) checkRecord(raw []byte, rec PackRecord, b box, dst []byte) error {
	h, ok := parseRecordHeader(raw)
	if !ok || h.plain != rec.Plain {
		return errors.New("record header")
	}
	if crcOf(raw) != h.crc {
		return errors.New("checksum")
	}
	_, err := r.openRecord(raw, rec.ID, rec.Kind, b, dst, true)
	return err
}

func (v *verifier) badRecord(pack uint32, rec PackRecord, what string, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.bad[rec.ID] = badRecord{pack, rec.Off, fmt.Errorf("in %s at %d: %w", what, rec.Off, err)}
}

// brokenPack finds what is whole in a pack without a table.
func (v *verifier) brokenPack(ctx context.Context, p NumberedPack, o bucket.Object) error {
	r := v.repo
	whole := map[ID]bool{}
	b := r.keys.box(ctxPack, p.ID[:])
	dst := make([]byte, max(r.cfg.ChunkSize, maxPageLen))
	_, err := scanRecords(o, o.Size(), func(_ int64, h recordHeader, raw []byte) error {
		if _, err := r.openRecord(bytes.Clone(raw), h.id, h.kind, b, dst, true); err == nil {
			whole[h.id] = true
		}
		return ctx.Err()
	})
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("store: pack %s: %w", p.ID, err)
	}
	v.setBroken(p.Number, whole)
	return nil
}

func (v *verifier) setBroken(number uint32, whole map[ID]bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.broken[number] = whole
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
			left := maxFindingsPerDisk
			if err := v.places(ctx, img, m.root.Page, img.top, 0, &left); err != nil {
				return err
			}
		}
	}
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
		v.bad[id] = badRecord{err: err}
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
	b, ok := v.bad[id]
	if !ok {
		return false, nil
	}
	var loc [1]Loc
	if err := v.repo.index.Lookup(ctx, []ID{id}, loc[:]); err != nil {
		return false, fmt.Errorf("store: %w", err)
	}
	return b.at(loc[0]), nil
}

// readPage reads a page from its pack: the index is only a cache of it.
func (v *verifier) readPage(ctx context.Context, id ID, level uint8) (*page, error) {
	b, err := v.repo.readPage(ctx, id)
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
		v.bad[id] = badRecord{err: err}
	}
	return bad, nil
}

// chunk says what is wrong with a chunk, nil when nothing is known to be.
func (v *verifier) chunk(ctx context.Context, id ID, loc Loc) error {
	damaged := func(why error) error { return &DamageError{What: recordWhat(id, KindChunk), Err: why} }
	if b, ok := v.bad[id]; ok && b.at(loc) {
		if errors.Is(b.err, ErrDamaged) {
			return b.err
		}
		return damaged(b.err)
	}
	if !loc.Known() {
		return damaged(errors.New("not in the repository"))
	}
	if whole, isBroken := v.broken[loc.Pack]; isBroken && !whole[id] {
		return damaged(errors.New("lost in a damaged pack"))
	}
	if v.opt.Points == nil || !v.opt.ReadData {
		return nil
	}
	dst := make([]byte, v.repo.cfg.ChunkSize)
	v.report.Read += int64(loc.Len)
	return v.repo.retried(ctx, id, loc, func(loc Loc) error { return v.repo.readWhole(ctx, id, loc, dst, true) })
}

// places reports the damaged chunks and pages below a page by their offsets.
func (v *verifier) places(ctx context.Context, m *Image, id ID, level uint8, first int64, left *int) error {
	if *left <= 0 {
		return nil
	}
	at := first * int64(m.repo.cfg.ChunkSize)
	if b, ok := v.bad[id]; ok {
		*left--
		v.name(m, id, KindPage, at, b.err)
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
		if level == 0 {
			if b, ok := v.bad[child]; ok && *left > 0 {
				*left--
				v.name(m, child, KindChunk, at*int64(m.repo.cfg.ChunkSize), b.err)
			}
		} else if v.pages[child] {
			if err := v.places(ctx, m, child, level-1, at, left); err != nil {
				return err
			}
		}
	}
	return nil
}

// name reports damage with the point, disk and offset that it touches.
func (v *verifier) name(m *Image, id ID, kind uint8, off int64, err error) {
	d := &DamageError{What: recordWhat(id, kind), Err: err}
	var inner *DamageError
	if errors.As(err, &inner) {
		d.What, d.Err = inner.What, inner.Err
	}
	d.Point, d.Disk, d.Off = m.point, m.disk, off
	v.named[id] = true
	v.found(d)
}
