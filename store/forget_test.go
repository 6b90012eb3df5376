package store_test

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
)

// forgetNow is the time of the tests that forget.
var forgetNow = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

// newPoints makes a repository in b with a point for each lock, zero for none.
func newPoints(t *testing.T, b bucket.Bucket, locks ...backup.Duration) (ids []store.PointID) {
	t.Helper()
	defer store.CheapKeys()()
	if err := store.Init(t.Context(), b, store.InitOptions{ChunkSize: 64 << 10, Passphrase: []byte("secret")}, forgetNow); err != nil {
		t.Fatal(err)
	}
	r := openPoints(t, b, store.MemoryIndex())
	defer r.Close()
	vm := &crashVM{at: forgetNow.Add(-24 * time.Hour), data: make([]byte, 200_000)}
	for _, l := range locks {
		vm = vm.next()
		p, err := backup.Run(t.Context(), r, vm, backup.Options{LockFor: l, Now: func() time.Time { return vm.at }})
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, p.ID)
	}
	return ids
}

func openPoints(t *testing.T, b bucket.Bucket, open store.IndexOpener) *store.Repo {
	t.Helper()
	r, err := store.Open(t.Context(), b, open, store.OpenOptions{Passphrase: func() ([]byte, error) { return []byte("secret"), nil }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// wantPoints wants that exactly these points are listed and that each has a
// manifest, here and in a repository opened anew.
func wantPoints(t *testing.T, b bucket.Bucket, r *store.Repo, ids ...store.PointID) {
	t.Helper()
	for name, r := range map[string]*store.Repo{"open": r, "opened anew": openPoints(t, b, store.MemoryIndex())} {
		list, err := r.Points(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var got []store.PointID
		for _, s := range list {
			got = append(got, s.ID)
		}
		if !slices.Equal(got, ids) {
			t.Errorf("%s: points %s, want %s", name, got, ids)
		}
	}
}

func flip(t *testing.T, b bucket.Bucket, id store.PointID) {
	t.Helper()
	name := "points/" + id.String()
	o, err := b.Open(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	raw := make([]byte, o.Size())
	if _, err := o.ReadAt(raw, 0); err != nil {
		t.Fatal(err)
	}
	o.Close()
	raw[100] ^= 1
	w, err := b.Create(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteAt(raw, 0); err != nil {
		t.Fatal(err)
	}
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
}

func TestForget(t *testing.T) {
	b := bucket.NewMemory()
	ids := newPoints(t, b, make([]backup.Duration, 4)...)
	r := openPoints(t, b, store.MemoryIndex())
	p, err := r.Point(t.Context(), ids[1])
	if err != nil {
		t.Fatal(err)
	}
	img, err := r.OpenDisk(p, "disk0")
	if err != nil {
		t.Fatal(err)
	}
	before, err := r.Generation(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	done, err := r.Forget(t.Context(), []store.PointID{ids[1], ids[2]}, forgetNow)
	if err != nil || !slices.Equal(done, []store.PointID{ids[1], ids[2]}) {
		t.Fatalf("forgot %s, %v", done, err)
	}
	wantPoints(t, b, r, ids[0], ids[3])
	if after, err := r.Generation(t.Context()); err != nil || after <= before {
		t.Errorf("generation %d after %d, %v", after, before, err)
	}
	if _, err := r.Point(t.Context(), ids[1]); !errors.Is(err, store.ErrNotExist) {
		t.Errorf("a forgotten manifest: %v", err)
	}
	if _, err := img.ReadAt(make([]byte, 200_000), 0); err != nil {
		t.Errorf("a disk that was open: %v", err)
	}
	// Again, and one that never was: done.
	done, err = r.Forget(t.Context(), []store.PointID{ids[1], {7}}, forgetNow)
	if err != nil || len(done) != 2 {
		t.Errorf("again: forgot %s, %v", done, err)
	}
	if done, err = r.Forget(t.Context(), nil, forgetNow); err != nil || len(done) != 0 {
		t.Errorf("nothing: %s, %v", done, err)
	}
	wantPoints(t, b, r, ids[0], ids[3])
}

// TestForgetLocked: one locked point stops all of it before anything is gone, and
// the end of the lock is the end of it.
func TestForgetLocked(t *testing.T) {
	b := bucket.NewMemory()
	ids := newPoints(t, b, backup.Duration{}, backup.Duration{Days: 30}, backup.Duration{})
	r := openPoints(t, b, store.MemoryIndex())
	p, err := r.Point(t.Context(), ids[1])
	if err != nil {
		t.Fatal(err)
	}
	for _, now := range []time.Time{forgetNow, p.LockedUntil.Add(-1), forgetNow.AddDate(-20, 0, 0)} {
		for _, forget := range []func(context.Context, []store.PointID, time.Time) ([]store.PointID, error){r.Forget, r.ForgetDamaged} {
			done, err := forget(t.Context(), ids, now)
			if !errors.Is(err, store.ErrLockedPoint) || len(done) != 0 {
				t.Fatalf("at %s: forgot %s, %v", now, done, err)
			}
		}
	}
	wantPoints(t, b, r, ids...)
	if done, err := r.Forget(t.Context(), ids[:2], p.LockedUntil); err != nil || len(done) != 2 {
		t.Errorf("at the end of the lock: forgot %s, %v", done, err)
	}
	wantPoints(t, b, r, ids[2])
}

// TestForgetLockIsInTheManifest: a summary that says nothing of the lock, as a
// program that knew no locks leaves it, does not help.
func TestForgetLockIsInTheManifest(t *testing.T) {
	b := bucket.NewMemory()
	ids := newPoints(t, b, backup.Duration{Days: 30}, backup.Duration{})
	r := openPoints(t, b, store.MemoryIndex())
	if err := r.DropLock(t.Context(), ids[0]); err != nil {
		t.Fatal(err)
	}
	locked := func() bool {
		s, err := r.Find(t.Context(), ids[0].String())
		if err != nil {
			t.Fatal(err)
		}
		return !s.LockedUntil.IsZero()
	}
	if locked() {
		t.Fatal("the test did not take the lock out of the index")
	}
	if _, err := r.Forget(t.Context(), ids[:1], forgetNow); !errors.Is(err, store.ErrLockedPoint) {
		t.Errorf("an index without the lock: %v", err)
	}
	if !locked() {
		t.Error("the index was not mended")
	}
	wantPoints(t, b, r, ids...)
}

// TestForgetDamaged: a manifest that cannot be read is removed only when that is
// asked for, and not when the index still knows its lock.
func TestForgetDamaged(t *testing.T) {
	b := bucket.NewMemory()
	ids := newPoints(t, b, backup.Duration{}, backup.Duration{Days: 30}, backup.Duration{})
	dir := filepath.Join(t.TempDir(), "index")
	r := openPoints(t, b, store.LocalIndex(dir, false))
	flip(t, b, ids[0])
	flip(t, b, ids[1])
	for _, id := range ids[:2] {
		if done, err := r.Forget(t.Context(), []store.PointID{ids[2], id}, forgetNow); !errors.Is(err, store.ErrDamaged) || len(done) != 0 {
			t.Errorf("damaged: forgot %s, %v", done, err)
		}
	}
	if done, err := r.ForgetDamaged(t.Context(), ids[:2], forgetNow); !errors.Is(err, store.ErrLockedPoint) || len(done) != 0 {
		t.Errorf("damaged and locked: forgot %s, %v", done, err)
	}
	if done, err := r.ForgetDamaged(t.Context(), ids[:1], forgetNow); err != nil || len(done) != 1 {
		t.Errorf("damaged: forgot %s, %v", done, err)
	}
	list, err := r.Points(t.Context())
	if err != nil || len(list) != 2 {
		t.Errorf("%d points, %v", len(list), err)
	}
	// Without the index nothing knows of the lock.
	r.Close()
	r = openPoints(t, b, store.MemoryIndex())
	if done, err := r.ForgetDamaged(t.Context(), []store.PointID{ids[1]}, forgetNow); err != nil || len(done) != 1 {
		t.Errorf("damaged, lock lost: forgot %s, %v", done, err)
	}
	wantPoints(t, b, r, ids[2])
}

// brokenDrop is an index that cannot drop points.
type brokenDrop struct{ store.Index }

func (brokenDrop) DropPoint(context.Context, store.PointID) error { return errors.New("broken") }

// TestForgetStopped stops it at every call to the bucket, each way that a bucket
// can fail, and likewise before the index. What is done is gone for good, what is
// not done is there whole or gone, and the next run ends the work.
func TestForgetStopped(t *testing.T) {
	b := bucket.NewMemory()
	ids := newPoints(t, b, make([]backup.Duration, 5)...)
	stops := 0
	for _, k := range append(slices.Clone(crashKinds), crashKind{"flipped bit", bucket.FlipBit}) {
		for n := int64(1); ; n++ {
			left := b.Crash()
			first := int64(0) // call of Forget
			f := bucket.NewFaulty(left, func(c bucket.Call) bucket.Fault {
				if first > 0 && c.N == first+n-1 {
					return bucket.Fault{Kind: k.kind}
				}
				return bucket.Fault{}
			})
			r := openPoints(t, f, store.MemoryIndex())
			first = f.Calls() + 1
			done, err := r.Forget(t.Context(), ids[:4], forgetNow)
			if f.Calls() < first+n-1 {
				if err != nil || len(done) != 4 {
					t.Errorf("%s: nothing went wrong, but it forgot %s, %v", k.name, done, err)
				}
				break
			}
			if err == nil {
				t.Errorf("%s at call %d of %d: no error", k.name, n, f.Calls())
			}
			stops++
			after := openPoints(t, left.Crash(), store.MemoryIndex())
			list, lerr := after.Points(t.Context())
			if lerr != nil {
				t.Fatal(lerr)
			}
			there := map[store.PointID]bool{}
			for _, s := range list {
				there[s.ID] = true
				if slices.Contains(done, s.ID) {
					t.Errorf("%s at call %d (%v): %s came back", k.name, n, err, s.Path())
				}
			}
			// Of the one that it stopped at nobody knows.
			if len(list) < 5-len(done)-1 || !there[ids[4]] {
				t.Errorf("%s at call %d (%v): %d points are left, %d done", k.name, n, err, len(list), len(done))
			}
			if done, err := after.Forget(t.Context(), ids[:4], forgetNow); err != nil || len(done) != 4 {
				t.Errorf("%s at call %d: the next run forgot %d, %v", k.name, n, len(done), err)
			}
		}
	}
	t.Logf("%d stop points", stops)
	r := openPoints(t, b, func(ctx context.Context, id [16]byte, check store.IndexCheck) (store.Index, error) {
		x, err := store.MemoryIndex()(ctx, id, check)
		return brokenDrop{x}, err
	})
	done, err := r.Forget(t.Context(), ids[:4], forgetNow)
	if err == nil || !slices.Equal(done, ids[:1]) {
		t.Errorf("the index is broken: forgot %s, %v", done, err)
	}
	wantPoints(t, b, openPoints(t, b, store.MemoryIndex()), ids[1:]...)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if done, err := r.Forget(ctx, ids[1:], forgetNow); !errors.Is(err, context.Canceled) || len(done) != 0 {
		t.Errorf("interrupted: forgot %s, %v", done, err)
	}
}
