package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/store/bucket"
)

// packs checks the packs: of those that are to be read every byte, of all others header,
// table and size.
func (v *verifier) packs(ctx context.Context) error {
	if v.opt.Points != nil {
		return nil // the chunks of these points are read on their own
	}
	var list []NumberedPack
	for p, err := range v.repo.index.Packs(ctx) {
		if err != nil {
			return fmt.Errorf("store: %w", err)
		}
		list = append(list, p)
		v.packID[p.Number] = p.ID
	}
	slices.SortFunc(list, cmpPacks)
	v.report.Packs = len(list)
	t := v.choose(list)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for i, p := range t.order {
		if gctx.Err() != nil {
			break
		}
		g.Go(func() error {
			if err := v.pack(gctx, p, i < t.chosen); err != nil {
				return err
			}
			return v.done(gctx, t, i)
		})
	}
	return g.Wait()
}

// tour is the order in which packs are checked.
type tour struct {
	order  []NumberedPack
	chosen int    // how many of order are read; of the others only the ends
	last   PackID // the last of all by id: with it a pass is over
	total  int64  // bytes to be read, or, when only the ends are, of all packs
	sizes  int64  // bytes of all packs

	checked []bool // under verifier.mu, as are the following; per pack of order
	next    int    // all of order before it are
	bytes   int64  // of those checked
}

// choose says what is read. list is in the order of a pass, and not changed.
func (v *verifier) choose(list []NumberedPack) *tour {
	t := &tour{order: list, checked: make([]bool, len(list))}
	for _, p := range list {
		t.sizes += p.Size
	}
	t.total = t.sizes
	if !v.opt.ReadData {
		return t
	}
	v.pass, v.saved = &verifyPass{Began: v.began}, v.opt.Now()
	at := 0
	if v.opt.part() && v.state.Pass != nil {
		at, _ = slices.BinarySearchFunc(list, v.state.Pass.After, func(p NumberedPack, after PackID) int {
			return cmp.Or(slices.Compare(p.ID[:], after[:]), -1) // after itself was read
		})
		if at < len(list) { // else what was left of it is gone
			pass := *v.state.Pass
			v.pass = &pass
		} else {
			at = 0
		}
	}
	t.order = slices.Concat(list[at:], list[:at])
	t.chosen = len(list)
	switch {
	case v.opt.Resume:
		t.chosen = len(list) - at
	case v.opt.part():
		want := max(int64(v.opt.Share*float64(t.sizes)), v.opt.Bytes)
		t.chosen = 0
		for sum := int64(0); t.chosen < len(list) && (sum < want || t.chosen == 0); t.chosen++ {
			sum += t.order[t.chosen].Size
		}
	}
	t.total = 0
	for _, p := range t.order[:t.chosen] {
		t.total += p.Size
	}
	if len(list) > 0 {
		t.last = list[len(list)-1].ID
	} else {
		v.report.Ended = v.began
	}
	v.complete = t.chosen == len(list)
	v.reportPass(t)
	return t
}

// done notes that a pack was checked, and now and then writes down how far the pass has come:
// up to the first pack that was not.
func (v *verifier) done(ctx context.Context, t *tour, i int) error {
	v.mu.Lock()
	p := t.order[i]
	t.checked[i] = true
	if i < t.chosen {
		v.read[p.ID] = true
	}
	if i < t.chosen || t.chosen == 0 {
		t.bytes += p.Size
		v.since += p.Size
	}
	for ; t.next < t.chosen && t.checked[t.next]; t.next++ {
		p := t.order[t.next]
		if v.pass.After == t.last { // round the end: another pass
			v.pass = &verifyPass{Began: v.opt.Now().UTC().Truncate(time.Second)}
		}
		v.pass.After, v.pass.Packs, v.pass.Read = p.ID, v.pass.Packs+1, v.pass.Read+p.Size
		if p.ID == t.last {
			v.report.Ended = v.opt.Now().UTC().Truncate(time.Second)
		}
	}
	if v.opt.Progress != nil {
		v.opt.Progress(t.bytes, t.total)
	}
	v.reportPass(t)
	save := v.pass != nil && (v.since >= saveEveryBytes || v.opt.Now().Sub(v.saved) >= saveEvery)
	if save {
		v.since, v.saved = 0, v.opt.Now()
	}
	v.mu.Unlock()
	if save {
		return v.remember(ctx, false)
	}
	return nil
}

// reportPass fills in how far the pass has come. v.mu is held, or nobody else is at work.
func (v *verifier) reportPass(t *tour) {
	if v.pass == nil {
		return
	}
	rep := &PassReport{Began: v.pass.Began, Total: t.sizes, Done: v.pass.After == t.last}
	for _, p := range t.order {
		if slices.Compare(p.ID[:], v.pass.After[:]) <= 0 {
			rep.Packs++
			rep.Checked += p.Size
		}
	}
	v.report.Pass = rep
}

// pack checks one pack.
func (v *verifier) pack(ctx context.Context, p NumberedPack, read bool) error {
	r := v.repo
	what := "pack " + p.ID.String()
	o, err := r.bucket.Open(ctx, packName(p.ID))
	if errors.Is(err, bucket.ErrNotExist) {
		if gone, err := v.collected(ctx, p.ID); gone || err != nil {
			return err
		}
		v.found(&DamageError{What: what, Err: errors.New("missing")})
		v.setBroken(p, nil)
		return nil
	}
	if errors.Is(err, syscall.EIO) {
		v.found(&DamageError{What: what, Err: err})
		v.setBroken(p, nil)
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
	if errors.Is(err, ErrNewerFormat) {
		return fmt.Errorf("store: %s: %w", what, err)
	}
	if err != nil {
		v.found(&DamageError{What: what, Err: err})
		return v.salvage(ctx, p, o, nil)
	}
	if v.deep != nil && v.deep(p.ID) {
		return v.salvage(ctx, p, o, recs)
	}
	if !read {
		return nil
	}
	v.mu.Lock()
	v.dropKnown(p.Number)
	v.mu.Unlock()
	slices.SortFunc(recs, func(a, b PackRecord) int { return cmp.Compare(a.Off, b.Off) })
	b := r.keys.box(ctxPack, p.ID[:])
	win := scanWindow{r: v.pace.reader(ctx, o), size: o.Size()}
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
		if ctx.Err() != nil {
			return ctx.Err() // which is no damage
		}
		if err != nil {
			v.addBad(rec.ID, rec.Kind, badRecord{pack: p.Number, off: rec.Off, err: fmt.Errorf("in %s at %d: %w", what, rec.Off, err)})
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

// salvage finds what is whole in a pack whose table cannot be trusted, or that is to be gone
// through. table is nil when it cannot be read.
func (v *verifier) salvage(ctx context.Context, p NumberedPack, o bucket.Object, table []PackRecord) error {
	s, err := v.repo.salvage(ctx, pacedObject{v.pace.reader(ctx, o), o.Size()}, p.ID)
	if err != nil {
		return fmt.Errorf("store: pack %s: %w", p.ID, err)
	}
	s.table, s.named = table, table != nil
	v.setBroken(p, s)
	for _, rec := range table {
		if !s.has(rec.ID) {
			v.addBad(rec.ID, rec.Kind, badRecord{pack: p.Number, off: rec.Off, err: fmt.Errorf("in pack %s at %d: nothing that proves right", p.ID, rec.Off)})
		}
	}
	return nil
}

// setBroken says that of a pack only s is left.
func (v *verifier) setBroken(p NumberedPack, s *salvaged) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.dropKnown(p.Number)
	v.broken[p.Number] = s
	if s != nil && s.named {
		v.read[p.ID] = true
	} else {
		v.scanned[p.ID] = true
	}
}
