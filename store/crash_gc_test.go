package store_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
)

// scene is a repository before the run that is going to be stopped.
type scene struct {
	mem   *bucket.Memory
	index string                      // directory
	live  map[store.PointID]*mosaicVM // what must be there, whatever happens
	made  []*mosaicVM                 // what the run makes points of
	going []store.PointID             // what the run forgets
	gone  []store.PointID             // what was forgotten before
}

// sceneRepo opens a scene. leases are those of one moment: nobody else is at work.
func sceneRepo(ctx context.Context, b bucket.Bucket, index store.IndexOpener) (*store.Repo, error) {
	r, err := store.Open(ctx, b, index, store.OpenOptions{
		Passphrase: func() ([]byte, error) { return []byte("secret"), nil }, ChunkCache: 1 << 20, PageCache: 1 << 20,
	})
	if err == nil {
		r.SetPackSize(1500)
	}
	return r, err
}

// newScene makes points of the given letters; those in upper case are forgotten at once,
// those in brackets by the run.
func newScene(t *testing.T, plain bool, points ...string) *scene {
	t.Helper()
	s := &scene{mem: bucket.NewMemory(), index: memoryDir(t), live: map[store.PointID]*mosaicVM{}}
	at := time.Unix(1e9, 0)
	opt := store.InitOptions{ChunkSize: mosaicChunk, Passphrase: []byte("secret"), NoEncryption: plain}
	if err := store.Init(t.Context(), s.mem, opt, at); err != nil {
		t.Fatal(err)
	}
	r, err := sceneRepo(t.Context(), s.mem, store.LocalIndex(s.index, false))
	if err != nil {
		t.Fatal(err)
	}
	for i, letters := range points {
		vm := &mosaicVM{name: fmt.Sprintf("vm%d", i%2), at: at.Add(time.Duration(i) * time.Hour)}
		vm.data = lettered(string(bytes.ToLower(bytes.Trim([]byte(letters), "[]"))))
		p, err := backup.Run(t.Context(), r, vm, backup.Options{})
		if err != nil {
			t.Fatal(err)
		}
		switch c := letters[0]; {
		case c == '[':
			s.going = append(s.going, p.ID)
		case c < 'a':
			s.gone = append(s.gone, p.ID)
		default:
			s.live[p.ID] = vm
		}
	}
	if _, err := r.Forget(t.Context(), s.gone, time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	return s
}

// condemned is a scene with a collection behind it that had to wait for a backup.
func condemned(t *testing.T, plain bool, points ...string) *scene {
	t.Helper()
	s := newScene(t, plain, points...)
	r, err := sceneRepo(t.Context(), s.mem, store.LocalIndex(s.index, false))
	if err != nil {
		t.Fatal(err)
	}
	d, err := r.NewDraft(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if rep, err := r.GC(t.Context(), store.GCOptions{MaxLive: 0.9}); err != nil || rep.Pending == 0 {
		t.Fatal(rep, err)
	}
	if err := errors.Join(d.Close(), r.Close()); err != nil {
		t.Fatal(err)
	}
	return s
}

// memoryDir is a temporary directory that no disk slows down, where there is one.
func memoryDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "holdfast-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// stop says where a run is stopped and how.
type stop struct {
	where string
	n     int64
	kind  bucket.Kind
	index bool // at the n-th commit to Badger instead of the n-th call to the bucket
}

// run carries out op on copies and stops it. It reports whether op was done, and whether the
// stop was reached at all.
func (s *scene) run(t *testing.T, at stop, op func(*store.Repo) error) (left *bucket.Memory, index string, done, reached bool) {
	t.Helper()
	left, index = s.mem.Crash(), memoryDir(t)
	used := memoryDir(t)
	copyIndex(t, s.index, used)
	var gone atomic.Bool
	var calls, commits atomic.Int64
	f := bucket.NewFaulty(left, func(c bucket.Call) bucket.Fault {
		calls.Store(c.N)
		if gone.Load() {
			return bucket.Fault{Kind: bucket.Gone}
		}
		if !at.index && c.N == at.n {
			gone.Store(at.kind == bucket.Gone)
			return bucket.Fault{Kind: at.kind}
		}
		return bucket.Fault{}
	})
	r, err := sceneRepo(t.Context(), f, store.StoppableIndex(used, func(commit func() error) error {
		n := commits.Add(1)
		switch {
		case gone.Load():
			return bucket.ErrGone
		case !at.index || n != at.n:
			return commit()
		}
		switch at.kind {
		case bucket.LostAck:
			return errors.Join(commit(), bucket.ErrInjected)
		case bucket.Gone:
			gone.Store(true)
			return bucket.ErrGone
		}
		return bucket.ErrInjected
	}))
	if err == nil {
		err = op(r)
	}
	copyIndex(t, used, index) // as a killed process leaves it
	left = left.Crash()
	if r != nil {
		r.Close()
	}
	os.RemoveAll(used)
	if at.index {
		return left, index, err == nil, commits.Load() >= at.n
	}
	return left, index, err == nil, calls.Load() >= at.n
}

// readScene gives the disks of all points by the independent reader.
func readScene(ctx context.Context, b *bucket.Memory) (map[string][]byte, error) {
	r, err := readerOf(ctx, b)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(r.Damage...); err != nil {
		return nil, err
	}
	disks := map[string][]byte{}
	for _, p := range r.Points {
		if disks[p.ID], err = r.Bytes(p.Disks[0]); err != nil {
			return nil, fmt.Errorf("%s: %w", p.ID, err)
		}
	}
	return disks, nil
}

// holds demands that b has what it must have, and nothing that it must not.
func (s *scene) holds(ctx context.Context, b *bucket.Memory, done bool) error {
	disks, err := readScene(ctx, b)
	if err != nil {
		return fmt.Errorf("independent reader: %w", err)
	}
	known := map[string]bool{}
	for id, vm := range s.live {
		known[id.String()] = true
		if !bytes.Equal(disks[id.String()], vm.data) {
			return fmt.Errorf("independent reader: the point at %v reads wrong", vm.at)
		}
	}
	for _, id := range s.going {
		known[id.String()] = true
	}
	made := 0
	for id, data := range disks {
		if known[id] {
			continue
		}
		if !slices.ContainsFunc(s.made, func(vm *mosaicVM) bool { return bytes.Equal(vm.data, data) }) {
			return fmt.Errorf("independent reader: nobody made point %s as it is", id)
		}
		made++
	}
	if done && made < len(s.made) {
		return fmt.Errorf("independent reader: %d of %d points that were reported as made", made, len(s.made))
	}
	for _, id := range s.gone {
		if disks[id.String()] != nil {
			return fmt.Errorf("point %s is back", id)
		}
	}
	for _, id := range s.going {
		if done && disks[id.String()] != nil {
			return fmt.Errorf("point %s was reported as forgotten and is there", id)
		}
	}
	return nil
}

// goesOn opens what a stop has left, looks at it, and finishes the work.
func (s *scene) goesOn(ctx context.Context, b *bucket.Memory, open store.IndexOpener, done bool) error {
	if err := s.holds(ctx, b, done); err != nil {
		return err
	}
	r, err := sceneRepo(ctx, b, open)
	if err != nil {
		return err
	}
	defer r.Close()
	look := func() error {
		list, err := r.Points(ctx)
		if err != nil {
			return err
		}
		there := map[store.PointID]bool{}
		for _, p := range list {
			there[p.ID] = true
		}
		for id, vm := range s.live {
			if !there[id] {
				return fmt.Errorf("the point at %v is not listed", vm.at)
			}
			p, err := r.Point(ctx, id)
			if err != nil {
				return err
			}
			if err := sameDisk(r, p, vm.data); err != nil {
				return err
			}
		}
		for _, id := range s.gone {
			if there[id] {
				return fmt.Errorf("point %s is listed again", id)
			}
		}
		var damage error
		_, err = r.Verify(ctx, store.VerifyOptions{ReadData: true, Damage: func(d *store.DamageError) { damage = errors.Join(damage, d) }})
		return errors.Join(err, damage)
	}
	if err := look(); err != nil {
		return err
	}
	if _, err := r.Forget(ctx, s.going, time.Now()); err != nil {
		return fmt.Errorf("forget again: %w", err)
	}
	if _, err := r.GC(ctx, store.GCOptions{MaxLive: 0.9}); err != nil {
		return fmt.Errorf("gc again: %w", err)
	}
	if err := look(); err != nil {
		return fmt.Errorf("after another gc: %w", err)
	}
	rep, err := r.GC(ctx, store.GCOptions{MaxLive: 0.9, DryRun: true})
	if err != nil {
		return err
	}
	if rep.Condemned > 0 || rep.Pending > 0 {
		return fmt.Errorf("another gc left work: %+v", rep)
	}
	if err := s.holds(ctx, b.Crash(), true); err != nil {
		return fmt.Errorf("after another gc: %w", err)
	}
	return nil
}

// TestCrashCollect stops forget and gc at every call to the bucket and at every
// commit to Badger, in every way, and goes on with what is left: with the index that was left,
// with the one from before, and with none.
func TestCrashCollect(t *testing.T) {
	t.Cleanup(store.CheapKeys())
	ctx := t.Context()
	collect := func(r *store.Repo) error {
		r.SetMergePacks(4)
		_, err := r.GC(ctx, store.GCOptions{MaxLive: 0.9})
		return err
	}
	type crashCase struct {
		name  string
		scene *scene
		op    func(s *scene) func(r *store.Repo) error
	}
	cases := []crashCase{ // those at the end are left out of short runs
		{"forget", newScene(t, false, "abc", "[abcd]", "ad", "[xyz]"), func(s *scene) func(*store.Repo) error {
			return func(r *store.Repo) error { _, err := r.Forget(ctx, s.going, time.Now()); return err }
		}},
		{"gc goes on", condemned(t, false, "ABCDEFGH", "chx", "XYZ", "adx"), func(*scene) func(*store.Repo) error { return collect }},
		{"gc", newScene(t, false, "ABCDEFGH", "chx", "XYZ", "adx"), func(*scene) func(*store.Repo) error { return collect }},
		{"gc merges", newScene(t, false, "a", "b", "c", "d"), func(*scene) func(*store.Repo) error { return collect }},
		{"gc, not encrypted", newScene(t, true, "ABCDEFGH", "chx", "XYZ", "adx"), func(*scene) func(*store.Repo) error { return collect }},
	}
	if testing.Short() {
		cases = cases[:2]
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.scene.everyStop(t, c.op(c.scene), c.scene.goesOn)
		})
	}
}

// everyStop stops op everywhere, in every way, and has what is left looked at: with no
// index, with the one from before the run, and with the one that the run left. Nothing is sampled but in short runs: see
// crashStep.
func (s *scene) everyStop(t *testing.T, op func(*store.Repo) error, look func(ctx context.Context, b *bucket.Memory, open store.IndexOpener, done bool) error) {
	stops, unfinished := 0, 0
	for _, k := range crashKinds {
		for _, inIndex := range []bool{false, true} {
			if inIndex && k.kind == bucket.Short {
				continue // a commit to Badger is whole or nothing
			}
			for n := int64(1); ; n += crashStep() {
				at := stop{n: n, kind: k.kind, index: inIndex, where: fmt.Sprintf("%s at call %d", k.name, n)}
				if inIndex {
					at.where = fmt.Sprintf("%s at commit %d to the index", k.name, n)
				}
				left, index, done, reached := s.run(t, at, op)
				if !reached {
					os.RemoveAll(index)
					break
				}
				stops++
				if !done {
					unfinished++
				}
				before := memoryDir(t)
				copyIndex(t, s.index, before)
				for name, open := range map[string]store.IndexOpener{
					"no index": store.MemoryIndex(), "old index": store.LocalIndex(before, false), "index left": store.LocalIndex(index, false),
				} {
					if err := look(t.Context(), left.Crash(), open, done); err != nil {
						t.Errorf("%s, %s: %v", at.where, name, err)
					}
				}
				os.RemoveAll(before)
				os.RemoveAll(index)
			}
		}
	}
	t.Logf("%d stops, %d of which ended the run", stops, unfinished)
	if unfinished < stops/2 {
		t.Error("most stops did not stop anything")
	}
}
