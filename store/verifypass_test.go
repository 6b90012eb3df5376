package store_test

import (
	"context"
	"errors"
	"maps"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
)

// watched counts how often the records of each pack are gone through: reads that begin at the
// first record. Blocks of refuse cannot be read.
type watched struct {
	*bucket.Memory

	mu     sync.Mutex // guards following
	began  map[string]int
	refuse map[string][][2]int64 // pack => ranges
}

func watch(m *bucket.Memory) *watched {
	return &watched{Memory: m, began: map[string]int{}, refuse: map[string][][2]int64{}}
}

func (w *watched) Open(ctx context.Context, name string) (bucket.Object, error) {
	o, err := w.Memory.Open(ctx, name)
	if err != nil {
		return nil, err
	}
	return watchedObject{o, w, name}, nil
}

type watchedObject struct {
	bucket.Object
	w    *watched
	name string
}

func (o watchedObject) ReadAt(p []byte, off int64) (int, error) {
	o.w.mu.Lock()
	defer o.w.mu.Unlock()
	if off == 80 {
		o.w.began[o.name]++
	}
	for _, r := range o.w.refuse[o.name] {
		if off < r[1] && off+int64(len(p)) > r[0] {
			return 0, &errPath{o.name, syscall.EIO}
		}
	}
	return o.Object.ReadAt(p, off)
}

type errPath struct {
	name string
	err  error
}

func (e *errPath) Error() string { return "read " + e.name + ": " + e.err.Error() }
func (e *errPath) Unwrap() error { return e.err }

// reads gives how often packs were read since the last call, in no order.
func (w *watched) reads() (n map[string]int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	n, w.began = w.began, map[string]int{}
	return n
}

func tenPacks(t *testing.T) (*gcRepo, []*store.Point) {
	t.Helper()
	t.Cleanup(store.CheapKeys())
	g := newGCRepo(t)
	r := g.open(g.mem)
	var points []*store.Point
	for i := range 10 {
		points = append(points, g.backup(r, string(rune('a'+i))))
	}
	return g, points
}

// TestSubsetRotation: parts of a pass read each pack exactly once, whoever verifies.
func TestSubsetRotation(t *testing.T) {
	g, _ := tenPacks(t)
	w := watch(g.mem)
	for pass := range 3 {
		seen := map[string]int{}
		for part := 0; len(seen) < 10; part++ {
			if part == 10 {
				t.Fatalf("pass %d: %d of 10 packs were read in 10 parts of a fifth", pass, len(seen))
			}
			rep, found := g.verify(g.open(w), store.VerifyOptions{ReadData: true, Share: 0.2})
			now := w.reads()
			if len(now) < 2 || len(now) > 3 || len(found) > 0 {
				t.Errorf("pass %d, part %d: %d packs were read, %v", pass, part, len(now), found)
			}
			for name, n := range now {
				if seen[name] += n; seen[name] > 1 && len(seen) < 10 {
					t.Errorf("pass %d, part %d: %s was read %d times", pass, part, name, seen[name])
				}
			}
			if p := rep.Pass; p == nil || p.Total == 0 || (p.Done && p.Checked != p.Total) {
				t.Errorf("pass %d, part %d: %+v", pass, part, p)
			}
			if again := 0; len(seen) == 10 {
				for _, n := range seen {
					again += n - 1
				}
				// The last part of a pass may begin the next one; a whole pass follows it anew.
				if again > 0 && rep.Pass.Done {
					t.Errorf("pass %d: packs were read twice: %v", pass, seen)
				}
			}
		}
		// The rest of the pass that the last part may have begun.
		if rep, _ := g.verify(g.open(w), store.VerifyOptions{ReadData: true, Resume: true}); !rep.Pass.Done || rep.Ended.IsZero() {
			t.Errorf("pass %d: %+v", pass, rep.Pass)
		}
		w.reads()
	}
	// By size: one pack at a time, all of them in ten runs, and the eleventh begins again.
	var order []string
	for range 20 {
		g.verify(g.open(w), store.VerifyOptions{ReadData: true, Bytes: 1})
		for name, n := range w.reads() {
			for range n {
				order = append(order, name)
			}
		}
	}
	if len(order) != 20 || !slices.IsSorted(order[:10]) || !slices.Equal(order[:10], order[10:]) {
		t.Errorf("packs were read in this order: %q", order)
	}
}

// TestVerifyResume: a pass that was stopped goes on where it was, in another process, and what its
// first part found is named at its end.
func TestVerifyResume(t *testing.T) {
	one := runtime.GOMAXPROCS(1) // packs are read one after the other
	t.Cleanup(func() { runtime.GOMAXPROCS(one) })
	g, points := tenPacks(t)
	r := g.open(g.mem)
	for _, p := range points {
		g.damage(r, p, 0)
	}
	w := watch(g.mem)
	ctx, cancel := context.WithCancel(t.Context())
	opt := store.VerifyOptions{ReadData: true, Damage: func(*store.DamageError) {}, Progress: func(done, total int64) {
		if done > total/2 {
			cancel()
		}
	}}
	rep, err := g.open(w).Verify(ctx, opt)
	if !errors.Is(err, context.Canceled) || rep.Pass == nil || rep.Pass.Packs == 0 || rep.Pass.Packs == 10 || rep.Pass.Done {
		t.Fatalf("%+v, %v", rep.Pass, err)
	}
	first := w.reads()
	fresh := g.open(w)
	if n := fresh.Remembered(t.Context()); n == 0 {
		t.Error("nothing of the first part is remembered")
	}
	rep, found := g.verify(fresh, store.VerifyOptions{ReadData: true, Resume: true})
	second := w.reads()
	if len(found) != 10 || !rep.Pass.Done || rep.Pass.Packs != 10 {
		t.Errorf("%d findings, %+v", len(found), rep.Pass)
	}
	all := maps.Clone(first)
	maps.Copy(all, second)
	// Packs that were in the middle of being read are read again.
	if twice := len(first) + len(second) - len(all); len(all) != 10 || twice > 1 || len(second) > 6 {
		t.Errorf("%d packs were read, then %d, %d in all", len(first), len(second), len(all))
	}
	for i, text := range g.hit(fresh, points...) {
		if !strings.HasPrefix(text, "1 chunk") {
			t.Errorf("point %d: %q", i, text)
		}
	}
	// Nothing is on its way now: resuming begins a pass.
	if rep, _ := g.verify(g.open(w), store.VerifyOptions{ReadData: true, Resume: true}); len(w.reads()) != 10 || !rep.Pass.Done {
		t.Errorf("%+v", rep.Pass)
	}
}

// TestVerifyRate: no more is read in a second than was asked for. What the last reads pay for
// nobody waits for.
func TestVerifyRate(t *testing.T) {
	g, _ := tenPacks(t)
	r := g.open(g.mem)
	rep, _ := g.verify(r, store.VerifyOptions{ReadData: true})
	began := time.Now()
	g.verify(r, store.VerifyOptions{ReadData: true, Rate: rep.Read})
	if took := time.Since(began); took < 600*time.Millisecond {
		t.Errorf("all of %d bytes took %v at that many bytes a second", rep.Read, took)
	}
}

// TestVerifyUnreadable: blocks that the medium refuses are damage, of the records in them and of
// no others, and end nothing.
func TestVerifyUnreadable(t *testing.T) {
	t.Cleanup(store.CheapKeys())
	g := newGCRepo(t)
	r := g.open(g.mem)
	a := g.backup(r, "abcdefgh")
	pack, off := g.recordOf(r, a, 3)
	_, next := g.recordOf(r, a, 4)
	w := watch(g.mem)
	w.refuse[pack] = [][2]int64{{off + 60, off + 61}}
	_, found := g.verify(g.open(w), store.VerifyOptions{ReadData: true})
	if len(found) != 1 || found[0].Off != 3*mosaicChunk || next <= off {
		t.Errorf("%v", found)
	}
	g.wantHit(g.open(g.mem), []*store.Point{a}, "1 chunk of disk0 at 196608")
	if _, found := g.verify(g.open(g.mem), store.VerifyOptions{ReadData: true}); len(found) != 0 {
		t.Errorf("read again, and right: %v", found)
	}
	// The table, too: what cannot be read of the rest is known by the points.
	size := int64(len(object(t, g.mem, pack)))
	w.refuse[pack] = append(w.refuse[pack], [2]int64{size - 10, size})
	fresh := g.open(w)
	_, found = g.verify(fresh, store.VerifyOptions{})
	if len(found) < 2 || found[0].Point != "" || found[len(found)-1].Point != a.Path() {
		t.Errorf("%v", found)
	}
	if err := sameDisk(fresh, a, lettered("abcdefgh")); !errors.Is(err, store.ErrDamaged) {
		t.Errorf("the disk reads: %v", err)
	}
}
