package backup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"time"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// Meter is told of the progress of one disk, from several goroutines at once.
// Nil functions are not called.
type Meter struct {
	Done func(n int64) // n more bytes of the disk are dealt with, holes included
	New  func(n int64) // n more bytes are in chunks that the repository did not hold
}

func (m Meter) done(n int64) {
	if m.Done != nil {
		m.Done(n)
	}
}

func (m Meter) fresh(n int64) {
	if m.New != nil {
		m.New(n)
	}
}

// Options of a run.
type Options struct {
	Tags    []string
	Full    bool // read everything, even where changes are known
	Exclude Exclude
	// CompareEvery is after how long a disk of which changes are tracked is read whole once more, and what the source said of its changes
	// compared with what it holds; zero never does.
	CompareEvery Duration
	Program      string // version recorded in the point
	// LockFor keeps the point from being forgotten for that long; zero does not.
	LockFor Duration
	// Start is told of each disk as it begins; the meter it returns is updated
	// as the disk is read. Nil: nobody watches.
	Start func(vm, disk string, total int64) Meter
	// Now is the clock; nil is time.Now.
	Now func() time.Time
}

// Run backs up one frozen VM into repo and commits its restore point.
func Run(ctx context.Context, repo *store.Repo, snap Snapshot, opt Options) (*store.Point, error) {
	return RunTo(ctx, Local(repo), snap, opt)
}

// RunTo is Run for any target.
func RunTo(ctx context.Context, to Target, snap Snapshot, opt Options) (*store.Point, error) {
	if opt.Now == nil {
		opt.Now = time.Now
	}
	if opt.Start == nil {
		opt.Start = func(string, string, int64) Meter { return Meter{} }
	}
	vm := snap.VM()
	if err := CheckName(vm.Name); err != nil {
		return nil, err
	}
	began := opt.Now()
	draft, err := to.Begin(ctx, vm)
	if err != nil {
		return nil, err
	}
	defer draft.Close()
	p := &store.Point{VM: vm, Time: snap.Time(), Tags: opt.Tags, Consistency: snap.Consistency(), Program: opt.Program}
	if parent := draft.Parent(); parent != nil {
		p.Parent = &parent.ID
	}
	r := run{draft: draft, opt: opt, vm: vm.Name}
	left := r.leaveOut(ctx, snap.Disks())
	p.Kept = left.notes()
	for i, d := range snap.Disks() {
		rec, err := r.disk(ctx, d, fmt.Sprintf("disk%d", i), left)
		if err != nil {
			return nil, fmt.Errorf("%s disk%d: %w", vm.Name, i, err)
		}
		p.Disks = append(p.Disks, *rec)
		p.Stats.Add(rec.Stats)
		p.Warnings = append(p.Warnings, rec.Warnings...)
	}
	files, err := snap.Config(ctx)
	if err != nil {
		return nil, fmt.Errorf("configuration of %s: %w", vm.Name, err)
	}
	for _, f := range files {
		c, err := r.config(ctx, f)
		if err != nil {
			return nil, fmt.Errorf("configuration of %s: %s: %w", vm.Name, f.Name, err)
		}
		p.Config = append(p.Config, c)
	}
	if w, ok := snap.(Warner); ok {
		p.Warnings = append(p.Warnings, w.Warnings()...)
	}
	if !opt.LockFor.IsZero() {
		l, ok := draft.(Locker)
		if !ok {
			return nil, ErrNoLock
		}
		if err := l.Lock(ctx, p, opt.LockFor, opt.Now()); err != nil {
			return nil, err
		}
	}
	p.Stats.Duration = opt.Now().Sub(began).Seconds()
	if err := draft.Commit(ctx, p); err != nil {
		return nil, err
	}
	return p, nil
}

// Lock sets until when p, about to be committed, is locked. It counts from the newest
// point of the repository when that is later than the clock, so that a clock set back
// makes no lock shorter.
func Lock(ctx context.Context, repo *store.Repo, p *store.Point, until Duration, now time.Time) error {
	all, err := repo.Points(ctx)
	if err != nil {
		return err
	}
	now = now.UTC()
	from := now
	for i := range all {
		if all[i].Time.After(from) {
			from = all[i].Time
		}
	}
	if p.Time.After(from) {
		from = p.Time.UTC()
	}
	const skew = time.Minute // between two hosts that both keep time
	if from.Sub(now) > skew {
		p.Warnings = append(p.Warnings, fmt.Sprintf("the clock says %s, but the newest point is of %s: the lock is counted from then",
			now.Format(time.RFC3339), from.Format(time.RFC3339)))
	}
	// Rounded up: a point has whole seconds.
	p.LockedUntil = until.After(from).Add(time.Second - 1).Truncate(time.Second)
	return nil
}

// CheckName refuses names of VMs that are not a single, printable path element.
func CheckName(name string) error { return store.CheckVMName(name) }

// run is one VM's backup on its way.
type run struct {
	draft Draft
	opt   Options
	vm    string
}

// plan says how a disk is read.
type plan struct {
	base     Base                    // to compare with and to start from; nil when there is none
	via      string                  // how the parent's disk was read
	compared time.Time               // when the source's tracking was last proven right; zero where that is not known
	since    string                  // change id; empty reads everything
	doubt    bool                    // what the source tracks is not trusted, nor what it says is allocated
	from     Derived                 // knows the changes itself; since says only that they are known
	data     int64                   // with since: bytes of the parent's disk that are no holes
	why      string                  // recorded in the point
	leftOut  *store.LeftOut          // of base, what was left out
	gone     iter.Seq[extent.Extent] // whole chunks that become holes, also where nothing changed; none of them is read; nil for none
	told     *told                   // what the source says has changed, to be compared; nil when it is not
	unit     int                     // bytes; reads are whole multiples of it where the ranges are
}

func (r *run) plan(ctx context.Context, d Disk, name string) (plan, error) {
	var old *store.Disk
	if parent := r.draft.Parent(); parent != nil {
		for i := range parent.Disks {
			if o := &parent.Disks[i]; o.Key == d.Key() || (old == nil && o.Name == name) {
				old = o
			}
		}
	}
	if old == nil {
		return plan{why: "full: first backup of this disk", doubt: r.opt.Full}, nil
	}
	base, err := r.draft.Base(ctx, old.Name)
	if err != nil {
		return plan{}, err
	}
	if base == nil {
		return plan{why: "full: chunks of the last point are lost", doubt: true}, nil
	}
	p := plan{base: base, leftOut: old.LeftOut, via: old.Via}
	if dd, ok := d.(Derived); ok && old.Size == d.Size() && !r.opt.Full {
		if id, disk := dd.From(); id == r.draft.Parent().ID && disk == old.Name {
			return plan{base: base, leftOut: old.LeftOut, since: id.String(), from: dd, why: "changes", data: old.Stats.Data}, nil
		}
	}
	switch {
	case old.Key != d.Key(): // another disk in its place is only good to compare with
		p.why = "full: first backup of this disk"
	case r.opt.Full:
		p.why = "full: asked for"
	case d.ChangeID() == "":
		p.why = "full: the source tracks no changes"
		if u, ok := d.(Untracked); ok && u.Untracked() != "" {
			p.why = "full: " + u.Untracked()
		}
	case old.ChangeID == "":
		p.why = "full: the last point has no change id"
	case old.Size != d.Size():
		p.why = "full: the disk was resized"
	default:
		p.since, p.why, p.data = old.ChangeID, "changes", old.Stats.Data
		p.compared = old.Compared
	}
	p.doubt = r.opt.Full || p.since == "" && old.Key == d.Key()
	return p, nil
}

// disk backs up one disk. Change tracking that turns out to be lost before the
// first range is replaced by a full read.
func (r *run) disk(ctx context.Context, d Disk, name string, left *leftOut) (*store.Disk, error) {
	p, err := r.plan(ctx, d, name)
	if err != nil {
		return nil, err
	}
	rec := &store.Disk{Name: name, Key: d.Key(), Size: d.Size(), ChangeID: d.ChangeID()}
	if v, ok := d.(Via); ok {
		rec.Via = v.Via()
		if p.via != "" && p.via != rec.Via {
			rec.Warnings = append(rec.Warnings, fmt.Sprintf("%s: read through %s, the last time through %s", name, rec.Via, p.via))
		}
	}
	began := r.opt.Now()
	if d.ChangeID() != "" {
		rec.Compared = began.UTC().Truncate(time.Second)
	}
	if p.since != "" && p.from == nil {
		if rec.Compared = p.compared; r.due(p.compared) {
			if p, err = r.compare(ctx, d, name, p, left); err != nil {
				return nil, err
			}
			rec.Compared = began.UTC().Truncate(time.Second)
		}
	}
	root, stats, err := r.read(ctx, d, name, p, left)
	if errors.Is(err, ErrChangesLost) && p.since != "" {
		rec.Warnings = append(rec.Warnings, fmt.Sprintf("%s: %v; the whole disk was read", name, err))
		rec.Compared = began.UTC().Truncate(time.Second)
		p.since, p.doubt, p.data, p.why = "", true, 0, "full: change tracking was lost"
		root, stats, err = r.read(ctx, d, name, p, left)
	}
	if errors.Is(err, store.ErrDamaged) && p.base != nil {
		// The parent's map cannot be read: do without it.
		rec.Warnings = append(rec.Warnings, fmt.Sprintf("%s: the last point is damaged; the whole disk was read", name))
		if p.told != nil { // the comparison did not take place
			rec.Compared = p.compared
		}
		p = plan{why: "full: the last point is damaged", doubt: p.doubt}
		root, stats, err = r.read(ctx, d, name, p, left)
	}
	if err != nil {
		return nil, err
	}
	for _, w := range p.told.warnings() {
		rec.Warnings = append(rec.Warnings, name+": "+w)
	}
	warning, err := d.Verify()
	if err != nil {
		return nil, err
	}
	if warning != "" {
		rec.Warnings = append(rec.Warnings, name+": "+warning)
	}
	if !root.Page.IsZero() {
		rec.Root = root.Page[:]
	}
	rec.Read, rec.Stats = p.why, stats
	if p.from == nil {
		rec.LeftOut = left.record(name)
	} else {
		rec.LeftOut = p.leftOut
	}
	rec.Stats.Duration = r.opt.Now().Sub(began).Seconds()
	return rec, nil
}

// config stores a configuration file as a small disk.
func (r *run) config(ctx context.Context, f ConfigFile) (store.ConfigFile, error) {
	c := store.ConfigFile{Name: f.Name, Size: int64(len(f.Data))}
	root, _, err := r.write(ctx, bytes.NewReader(f.Data), c.Size, plan{}, wholeOf(c.Size), Meter{})
	if err == nil && !root.Page.IsZero() {
		c.Root = root.Page[:]
	}
	return c, err
}

// exactReader makes a short read an error.
type exactReader struct{ io.ReaderAt }

func (e exactReader) ReadAt(p []byte, off int64) error {
	n, err := e.ReaderAt.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = fmt.Errorf("the disk ends at byte %d, though it was longer at the beginning", off+int64(n))
	}
	return err
}
