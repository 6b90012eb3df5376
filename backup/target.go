package backup

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/holdfast-backup/holdfast/store"
)

// Target takes restore points: a repository that this process has open (Local), or the
// server of one on another host (store/remote/agent).
type Target interface {
	// Begin begins a point of a VM. The caller closes the draft.
	Begin(ctx context.Context, vm VM) (Draft, error)
}

// Draft is a restore point in the making. Nothing of it shows before Commit. Its
// disks and files are stored one after the other: one Map is open at a time.
type Draft interface {
	// ChunkSize is the unit in which disks are stored, bytes.
	ChunkSize() int
	// Parent is the point that the new one is compared with; nil when there is none. Of
	// its disks name, key, size, change id, when they were compared and stats.Data are set, all else may be missing.
	Parent() *store.Point
	// Base gives a disk of the parent, by its name. It is nil when chunks of it are lost, so
	// that the new point must not share what it consists of.
	Base(ctx context.Context, disk string) (Base, error)
	// Map begins the chunk map of a disk or file out of that of base, or out of one hole
	// when base is nil.
	Map(ctx context.Context, base Base, size int64) (Map, error)
	// Writer gives a worker its way to store chunks.
	Writer() (Writer, error)
	// Stored is the bytes stored, or sent, for the draft so far.
	Stored() int64
	// Commit makes the point durable, as it is described by p, and fills in the rest of p:
	// id and name at least.
	Commit(ctx context.Context, p *store.Point) error
	// Close ends the draft. Calling it after Commit is harmless.
	Close() error
}

// Base is a disk of the parent.
type Base interface {
	// IDs sets ids to those of the chunks from first on, zero for holes and past the end.
	IDs(ctx context.Context, first int64, ids []store.ID) error
}

// Writer stores chunks. Not safe for concurrent use; make one for each worker.
type Writer interface {
	// Write stores consecutive chunks. data is a whole number of chunks, the last of the disk
	// padded with zeros; parents are the ids that the base has in their place, or zero.
	// It sets ids, zero for holes. data may be reused when it returns.
	Write(ctx context.Context, data []byte, parents, ids []store.ID) (store.Written, error)
	Close()
}

// Map is a chunk map in the making. Chunks and holes are given in ascending order, by
// one goroutine; what is not given stays as in the base.
type Map interface {
	// Set gives the chunks from first on their ids, as a Writer gave them or as parents has
	// them: the ids of the base in their place, or zero.
	Set(ctx context.Context, first int64, ids, parents []store.ID) error
	// Punch makes chunks [from, to) holes.
	Punch(ctx context.Context, from, to int64) error
	// Finish gives the finished map.
	Finish(ctx context.Context, size int64) (store.Root, error)
	// Close releases a map that is not finished.
	Close(ctx context.Context) error
}

// Locker is a Draft that can say until when its point is locked.
type Locker interface {
	// Lock sets until when p is locked and may add a warning to it.
	Lock(ctx context.Context, p *store.Point, until Duration, now time.Time) error
}

// rememberer is a Draft whose point says what was left out of its disks. The next run has to know where a source
// tracks changes.
type rememberer interface{ remembersLeftOut() }

// ErrNoLock: who makes the point does not decide for how long it is locked.
var ErrNoLock = errors.New("the server decides for how long points are locked")

// Local is repo as a Target.
func Local(repo *store.Repo) Target { return local{repo: repo} }

// LocalOn is repo as a Target whose points are compared with one certain point, not with the newest of
// their VM.
func LocalOn(repo *store.Repo, parent store.PointID) Target { return local{repo, &parent} }

type local struct {
	repo   *store.Repo
	parent *store.PointID // nil: the newest
}

var (
	_ Target = local{}
	_ Draft  = (*localDraft)(nil)
	_ Locker = (*localDraft)(nil)
	_ Base   = localBase{}
	_ Map    = localMap{}
	_ Writer = (*store.ChunkWriter)(nil)
)

// localDraft is a draft of a repository that this process has open.
type localDraft struct {
	*store.Draft
	repo    *store.Repo
	parent  *store.Point
	release func() // of the parent
}

// Begin implements Target.
func (l local) Begin(ctx context.Context, vm VM) (Draft, error) {
	parent, release, err := l.parentOf(ctx, vm.Name)
	if err != nil {
		return nil, err
	}
	d, err := l.repo.NewDraft(ctx)
	if err != nil {
		release()
		return nil, err
	}
	return &localDraft{d, l.repo, parent, release}, nil
}

func (l local) parentOf(ctx context.Context, vm string) (*store.Point, func(), error) {
	if l.parent != nil {
		return l.repo.Hold(ctx, *l.parent)
	}
	return parentOf(ctx, l.repo, vm)
}

// parentOf gives the newest point of the VM that can be read and that no helper on
// another host made, or nil, and keeps its chunks until release is called. A helper's word
// on what a disk held at some change id is not taken for anybody else's backup.
func parentOf(ctx context.Context, repo *store.Repo, vm string) (p *store.Point, release func(), err error) {
	none := func() {}
	list, err := repo.PointsOf(ctx, vm)
	if err != nil {
		return nil, none, err
	}
	for _, s := range slices.Backward(list) {
		if s.Damaged != "" {
			continue
		}
		p, release, err := repo.Hold(ctx, s.ID)
		switch {
		case errors.Is(err, store.ErrDamaged), errors.Is(err, store.ErrNotExist):
			return nil, none, nil // only a hint is lost
		case err != nil:
			return nil, none, err
		case p.Agent == "":
			return p, release, nil
		}
		release()
	}
	return nil, none, nil
}

func (d *localDraft) ChunkSize() int       { return d.repo.ChunkSize() }
func (d *localDraft) Parent() *store.Point { return d.parent }

// localBase is a disk or file of a point of the repository.
type localBase struct {
	*store.Image
	root store.Root
}

func (d *localDraft) Base(ctx context.Context, disk string) (Base, error) {
	img, err := d.repo.OpenDisk(d.parent, disk)
	if err != nil {
		return nil, err
	}
	whole, err := d.whole(ctx, img)
	if err != nil || !whole {
		return nil, err
	}
	for i := range d.parent.Disks {
		if o := &d.parent.Disks[i]; o.Name == disk {
			return localBase{img, o.Map()}, nil
		}
	}
	return nil, nil
}

// whole reports whether a new point may share what img, of the parent, consists of.
func (d *localDraft) whole(ctx context.Context, img *store.Image) (bool, error) {
	whole, err := d.repo.Whole(ctx)
	if err == nil && !whole {
		whole, err = img.Complete(ctx)
	}
	return whole, err
}

func (d *localDraft) Map(ctx context.Context, base Base, size int64) (Map, error) {
	var root store.Root
	if b, ok := base.(localBase); ok {
		root = b.root
	}
	m, err := d.Draft.Map(ctx, root, size)
	if err != nil {
		return nil, err
	}
	return localMap{m}, nil
}

// Writer implements Draft.
func (d *localDraft) Writer() (Writer, error) { return d.Draft.Writer() }

// localMap is a store.MapBuilder that takes many ids at once.
type localMap struct{ *store.MapBuilder }

func (m localMap) Set(ctx context.Context, first int64, ids, _ []store.ID) error {
	for k, id := range ids {
		if err := m.MapBuilder.Set(ctx, first+int64(k), id); err != nil {
			return err
		}
	}
	return nil
}

// Lock implements Locker.
func (d *localDraft) Lock(ctx context.Context, p *store.Point, until Duration, now time.Time) error {
	return Lock(ctx, d.repo, p, until, now)
}

func (d *localDraft) remembersLeftOut() {}

// Close implements Draft.
func (d *localDraft) Close() error {
	defer d.release()
	return d.Draft.Close()
}
