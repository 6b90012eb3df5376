package backup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"time"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// ErrSameRepository: a repository cannot be copied to itself.
var ErrSameRepository = errors.New("source and destination are the same repository")

// CopyOptions of a copy.
type CopyOptions struct {
	// Start is told of each disk of a point as it begins; the meter it returns is
	// updated as the disk is copied. Nil: nobody watches.
	Start func(p *store.Point, disk string, total int64) Meter
	// Now is the clock; nil is time.Now.
	Now func() time.Time
}

// Copied is what became of one point.
type Copied struct {
	From    store.Summary // in the source
	Point   *store.Point  // in the destination; nil after an error
	Skipped bool          // it was there before
}

// Copy copies points from one repository to another, which may have another
// chunk size and other keys, and yields each when it is dealt with: those of a VM from old to
// new, so that of each only what differs from one before it is read and stored. A point that
// the destination has already is skipped; chunks that an interrupted copy left there are found
// again. Everything read is compared with its content hash.
//
// An error that comes with a point of the source which is damaged or gone is that
// point's alone, and the others go on. Any other error is the last thing that is yielded.
func Copy(ctx context.Context, from, to *store.Repo, points []store.Summary, opt CopyOptions) iter.Seq2[Copied, error] {
	if opt.Now == nil {
		opt.Now = time.Now
	}
	if opt.Start == nil {
		opt.Start = func(*store.Point, string, int64) Meter { return Meter{} }
	}
	return func(yield func(Copied, error) bool) {
		if from.ID() == to.ID() {
			yield(Copied{}, ErrSameRepository)
			return
		}
		vms := map[string][]store.Summary{} // VM => all its points at the source
		done := map[store.PointID]bool{}
		for _, s := range inOrderOfTime(points) {
			if done[s.ID] {
				continue
			}
			done[s.ID] = true
			if _, ok := vms[s.VM]; !ok {
				list, err := from.PointsOf(ctx, s.VM)
				if err != nil {
					yield(Copied{From: s}, err)
					return
				}
				vms[s.VM] = list
			}
			c := copier{from: from, to: to, opt: opt, siblings: vms[s.VM]}
			res, err := c.point(ctx, s)
			if err != nil {
				err = fmt.Errorf("copy %s: %w", s.Path(), err)
			}
			if !yield(res, err) || err != nil && !isType[*sourceError](err) {
				return
			}
		}
	}
}

// inOrderOfTime keeps the VMs in their order, and has the points of each from old to new.
func inOrderOfTime(points []store.Summary) []store.Summary {
	first := map[string]int{} // VM => where it comes
	for i, s := range points {
		if _, ok := first[s.VM]; !ok {
			first[s.VM] = i
		}
	}
	points = slices.Clone(points)
	slices.SortStableFunc(points, func(a, b store.Summary) int {
		return cmp.Or(cmp.Compare(first[a.VM], first[b.VM]), a.Time.Compare(b.Time),
			cmp.Compare(len(a.Name), len(b.Name)), cmp.Compare(a.Name, b.Name))
	})
	return points
}

// sourceError is damage or loss in the source, which hits one point and not the copy.
type sourceError struct{ err error }

func (e *sourceError) Error() string { return e.err.Error() }
func (e *sourceError) Unwrap() error { return e.err }

func isType[T error](err error) bool {
	_, ok := errors.AsType[T](err)
	return ok
}

// ofSource marks an error of reading the source.
func ofSource(err error) error {
	if errors.Is(err, store.ErrDamaged) || errors.Is(err, store.ErrNotExist) {
		return &sourceError{err}
	}
	return err
}

// copier copies one point.
type copier struct {
	from, to *store.Repo
	opt      CopyOptions
	siblings []store.Summary // all points of the VM at the source, from old to new
}

// base is a point that both repositories have: what another one shares with it at
// the source is shared at the destination without being read.
type base struct{ from, to *store.Point }

// point copies one point, unless it is there.
func (c *copier) point(ctx context.Context, s store.Summary) (Copied, error) {
	res := Copied{From: s}
	p, release, err := c.from.Hold(ctx, s.ID)
	if err != nil {
		return res, ofSource(err)
	}
	defer release()
	if err := CheckName(p.VM.Name); err != nil {
		return res, &sourceError{err}
	}
	there, err := c.find(ctx, p)
	if err != nil {
		return res, err
	}
	if there != nil {
		res.Point, res.Skipped = there, true
		return res, nil
	}
	began := c.opt.Now()
	b, release, err := c.base(ctx, p)
	if err != nil {
		return res, err
	}
	defer release()
	draft, err := c.to.NewDraft(ctx)
	if err != nil {
		return res, err
	}
	defer draft.Close()

	origin := c.from.Origin(p)
	q := *p
	q.ID, q.Parent, q.CopiedFrom, q.Disks, q.Config, q.Stats = store.PointID{}, nil, &origin, nil, nil, store.Stats{}
	if b.to != nil {
		q.Parent = &b.to.ID
	}
	to := &localDraft{draft, c.to, b.to, func() {}}
	r := run{draft: to, vm: p.VM.Name}
	for _, d := range p.Disks {
		began := c.opt.Now()
		src, err := c.from.OpenDisk(p, d.Name)
		if err != nil {
			return res, ofSource(err)
		}
		shared, err := b.disk(c.from, c.to, &d)
		if err != nil {
			return res, err
		}
		root, stats, err := c.image(ctx, &r, to, p, src, shared, func() Meter { return c.opt.Start(p, d.Name, d.Size) })
		if err != nil {
			return res, err
		}
		stats.Duration = c.opt.Now().Sub(began).Seconds()
		if d.Root, d.Stats = nil, stats; !root.Page.IsZero() {
			d.Root = root.Page[:]
		}
		q.Disks = append(q.Disks, d)
		q.Stats.Add(stats)
	}
	for _, f := range p.Config {
		src, err := c.from.OpenConfig(p, f.Name)
		if err != nil {
			return res, ofSource(err)
		}
		shared, err := b.config(c.from, c.to, &f)
		if err != nil {
			return res, err
		}
		root, _, err := c.image(ctx, &r, to, p, src, shared, func() Meter { return Meter{} })
		if err != nil {
			return res, err
		}
		if f.Root = nil; !root.Page.IsZero() {
			f.Root = root.Page[:]
		}
		q.Config = append(q.Config, f)
	}
	q.Stats.Duration = c.opt.Now().Sub(began).Seconds()
	// Another copy may have been quicker.
	if there, err = c.find(ctx, p); err != nil || there != nil {
		res.Point, res.Skipped = there, there != nil
		return res, err
	}
	if err := draft.Commit(ctx, &q); err != nil {
		return res, err
	}
	res.Point = &q
	return res, nil
}

// find gives the point of the destination that has the same origin as p, nil when
// there is none. It reads the manifests of those only that have p's VM and time.
func (c *copier) find(ctx context.Context, p *store.Point) (*store.Point, error) {
	list, err := c.at(ctx, p.VM.Name, p.Time)
	if err != nil {
		return nil, err
	}
	for _, s := range list {
		q, err := c.to.Point(ctx, s.ID)
		switch {
		case errors.Is(err, store.ErrDamaged), errors.Is(err, store.ErrNotExist):
		case err != nil:
			return nil, err
		case c.to.Origin(q) == c.from.Origin(p):
			return q, nil
		}
	}
	return nil, nil
}

// at gives the points of a VM that the destination has of that time.
func (c *copier) at(ctx context.Context, vm string, t time.Time) ([]store.Summary, error) {
	list, err := c.to.PointsOf(ctx, vm)
	if err != nil {
		return nil, err
	}
	t = t.Truncate(time.Second)
	i, _ := slices.BinarySearchFunc(list, t, func(s store.Summary, t time.Time) int { return s.Time.Compare(t) })
	n := i
	for n < len(list) && list[n].Time.Equal(t) {
		n++
	}
	return list[i:n], nil
}

// base finds the point next to p, an older one if there is any, that both
// repositories have, and keeps it readable in both. Without one it is empty.
func (c *copier) base(ctx context.Context, p *store.Point) (b base, release func(), err error) {
	none := func() {}
	for s := range c.near(p) {
		list, err := c.at(ctx, s.VM, s.Time)
		if err != nil {
			return base{}, none, err
		}
		if len(list) == 0 || s.Damaged != "" {
			continue
		}
		from, release, err := c.from.Hold(ctx, s.ID)
		if errors.Is(err, store.ErrDamaged) || errors.Is(err, store.ErrNotExist) {
			continue
		}
		if err != nil {
			return base{}, none, err
		}
		to, err := c.find(ctx, from)
		if err == nil && to == nil {
			release()
			continue
		}
		releaseTo := none
		if err == nil {
			_, releaseTo, err = c.to.Hold(ctx, to.ID)
		}
		switch {
		case errors.Is(err, store.ErrDamaged), errors.Is(err, store.ErrNotExist): // only help is lost
			release()
			continue
		case err != nil:
			release()
			return base{}, none, err
		}
		return base{from, to}, func() { release(); releaseTo() }, nil
	}
	return base{}, none, nil
}

// near yields the other points of the VM: those before p from new to old, then those
// after it from old to new.
func (c *copier) near(p *store.Point) iter.Seq[store.Summary] {
	// Points have whole seconds, and so have summaries.
	at, _ := slices.BinarySearchFunc(c.siblings, p.Time, func(s store.Summary, t time.Time) int { return s.Time.Compare(t) })
	for at < len(c.siblings)-1 && c.siblings[at].ID != p.ID {
		at++
	}
	return func(yield func(store.Summary) bool) {
		for i := at - 1; i >= 0; i-- {
			if !yield(c.siblings[i]) {
				return
			}
		}
		for i := at + 1; i < len(c.siblings); i++ {
			if !yield(c.siblings[i]) {
				return
			}
		}
	}
}

// shared is one disk or file of a base.
type shared struct {
	from, to *store.Image // nil: there is none
	root     store.Root   // of to
	data     int64        // bytes of to that are no holes
}

// disk gives the disk of the base that a disk is compared with: the one of its key, or else of its name.
func (b base) disk(from, to *store.Repo, d *store.Disk) (s shared, err error) {
	if b.from == nil {
		return s, nil
	}
	var old *store.Disk
	for i := range b.from.Disks {
		if o := &b.from.Disks[i]; o.Key == d.Key || old == nil && o.Name == d.Name {
			old = o
		}
	}
	if old == nil {
		return s, nil
	}
	i := slices.IndexFunc(b.to.Disks, func(o store.Disk) bool { return o.Name == old.Name })
	if i < 0 || b.to.Disks[i].Size != old.Size {
		return s, nil
	}
	s.root, s.data = b.to.Disks[i].Map(), b.to.Disks[i].Stats.Data
	if s.from, err = from.OpenDisk(b.from, old.Name); err == nil {
		s.to, err = to.OpenDisk(b.to, old.Name)
	}
	return s, err
}

// config does for a configuration file what disk does for a disk.
func (b base) config(from, to *store.Repo, f *store.ConfigFile) (s shared, err error) {
	if b.from == nil {
		return s, nil
	}
	named := func(o store.ConfigFile) bool { return o.Name == f.Name }
	i, k := slices.IndexFunc(b.from.Config, named), slices.IndexFunc(b.to.Config, named)
	if i < 0 || k < 0 || b.from.Config[i].Size != b.to.Config[k].Size {
		return s, nil
	}
	s.root = b.to.Config[k].Map()
	if s.from, err = from.OpenConfig(b.from, f.Name); err == nil {
		s.to, err = to.OpenConfig(b.to, f.Name)
	}
	return s, err
}

// image copies one disk or file of p: of what it shares with the base, where there
// is one, nothing is read. start is called again when it has to begin anew.
func (c *copier) image(ctx context.Context, r *run, to *localDraft, p *store.Point, src *store.Image, old shared, start func() Meter) (store.Root, store.Stats, error) {
	read := func(pl plan, ranges iter.Seq2[extent.Extent, error]) (store.Root, store.Stats, error) {
		pl.unit = src.ChunkSize()
		return r.write(ctx, imageReader{ctx, src.Checked()}, src.Size(), pl, fromSource(ranges), start())
	}
	whole := false
	if old.to != nil {
		var err error
		if whole, err = to.whole(ctx, old.to); err != nil {
			return store.Root{}, store.Stats{}, err
		}
	}
	// Of a disk that has shrunk the last chunk may hold, at the destination, what lay
	// past its new end.
	if !whole || src.Size() < old.from.Size() {
		return read(plan{}, src.Allocated(0))
	}
	root, stats, err := read(plan{base: localBase{old.to, old.root}, since: sinceBase, data: old.data}, src.Changed(ctx, old.from))
	if errors.Is(err, store.ErrDamaged) && !hits(err, p) {
		return read(plan{}, src.Allocated(0)) // the base is damaged, here or there: do without it
	}
	return root, stats, err
}

// sinceBase stands for a change id: what lies outside of the ranges is as in the base.
const sinceBase = "base"

// hits reports whether err is damage of p, a point of the source.
func hits(err error, p *store.Point) bool {
	d, ok := errors.AsType[*store.DamageError](err)
	return ok && isType[*sourceError](err) && d.Point == p.Path()
}

// imageReader reads an image of the source.
type imageReader struct {
	ctx context.Context // that of one write
	img *store.Image
}

func (r imageReader) ReadAt(p []byte, off int64) (int, error) {
	n, err := r.img.ReadContext(r.ctx, p, off)
	return n, ofSource(err)
}

// fromSource marks the errors of ranges.
func fromSource(ranges iter.Seq2[extent.Extent, error]) iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) {
		for e, err := range ranges {
			if !yield(e, ofSource(err)) {
				return
			}
		}
	}
}
