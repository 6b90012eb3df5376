package store_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
)

// gcRepo is a repository in memory with an index and leases that several Repos may share.
type gcRepo struct {
	t      *testing.T
	mem    *bucket.Memory
	leases *store.MemoryLeases
	at     time.Time
}

func newGCRepo(t *testing.T) *gcRepo {
	t.Helper()
	g := &gcRepo{t: t, mem: bucket.NewMemory(), leases: &store.MemoryLeases{}, at: time.Unix(1e9, 0)}
	opt := store.InitOptions{ChunkSize: mosaicChunk, Passphrase: []byte("secret")}
	if err := store.Init(t.Context(), g.mem, opt, g.at); err != nil {
		t.Fatal(err)
	}
	return g
}

// open opens it with an index made anew.
func (g *gcRepo) open(b bucket.Bucket) *store.Repo {
	g.t.Helper()
	r, err := store.Open(g.t.Context(), b, store.MemoryIndex(), store.OpenOptions{
		Passphrase: func() ([]byte, error) { return []byte("secret"), nil }, Leases: g.leases,
	})
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { r.Close() })
	return r
}

// backup makes a point with one chunk for each letter.
func (g *gcRepo) backup(r *store.Repo, letters string) *store.Point {
	g.t.Helper()
	g.at = g.at.Add(time.Second)
	p, err := backup.Run(g.t.Context(), r, &mosaicVM{name: "vm", at: g.at, data: lettered(letters)}, backup.Options{})
	if err != nil {
		g.t.Fatal(err)
	}
	return p
}

func lettered(letters string) []byte {
	var data []byte
	for _, c := range []byte(letters) {
		data = append(data, bytes.Repeat([]byte{c}, mosaicChunk)...)
	}
	return data
}

func (g *gcRepo) drop(r *store.Repo, p *store.Point) {
	g.t.Helper()
	if _, err := r.Forget(g.t.Context(), []store.PointID{p.ID}, time.Now()); err != nil {
		g.t.Fatal(err)
	}
}

func (g *gcRepo) gc(r *store.Repo, opt store.GCOptions) store.GCReport {
	g.t.Helper()
	rep, err := r.GC(g.t.Context(), opt)
	if err != nil {
		g.t.Fatal(err)
	}
	return rep
}

func (g *gcRepo) whole(r *store.Repo, p *store.Point, letters string) {
	g.t.Helper()
	if err := sameDisk(r, p, lettered(letters)); err != nil {
		g.t.Fatalf("%s: %v", p.Path(), err)
	}
}

// packs counts the packs in the bucket and their bytes.
func (g *gcRepo) packs() (n int, size int64) {
	g.t.Helper()
	for i, err := range g.mem.List(context.Background(), "packs/") {
		if err != nil {
			g.t.Fatal(err)
		}
		n++
		size += i.Size
	}
	return n, size
}

func TestGCFreesWhatNobodyUses(t *testing.T) {
	g := newGCRepo(t)
	r := g.open(g.mem)
	a, b := g.backup(r, "abcdefgh"), g.backup(r, "xh")
	if rep := g.gc(r, store.GCOptions{}); rep.Removed != 0 || rep.Points != 2 || rep.Chunks != 9 || rep.Live == 0 {
		t.Fatalf("with everything in use: %+v", rep)
	}
	g.drop(r, a)
	before, size := g.packs()
	dry := g.gc(r, store.GCOptions{DryRun: true})
	if n, _ := g.packs(); n != before || dry.Condemned == 0 || dry.Reclaim <= 0 {
		t.Fatalf("dry run: %d packs of %d left, %+v", n, before, dry)
	}
	rep := g.gc(r, store.GCOptions{})
	_, left := g.packs()
	if rep.Removed == 0 || rep.Pending != 0 || size <= left {
		t.Fatalf("%d of %d bytes left, %+v", left, size, rep)
	}
	g.whole(r, b, "xh")
	g.whole(g.open(g.mem), b, "xh")
	if again := g.gc(r, store.GCOptions{}); again.Removed != 0 || again.Condemned != 0 {
		t.Errorf("a second gc found something: %+v", again)
	}
	// What was collected is stored again, not believed in.
	c := g.backup(r, "abcdefgh")
	g.whole(g.open(g.mem), c, "abcdefgh")
}

func TestGCKeepsWhatIsHeld(t *testing.T) {
	g := newGCRepo(t)
	r := g.open(g.mem)
	a := g.backup(r, "abcdef")
	g.backup(r, "x")
	_, release, err := r.Hold(t.Context(), a.ID)
	if err != nil {
		t.Fatal(err)
	}
	g.drop(r, a)
	other := g.open(g.mem) // as another process, which never saw the point
	for range 2 {
		if rep := g.gc(other, store.GCOptions{MaxLive: 1}); rep.Points != 2 {
			t.Fatalf("%+v", rep)
		}
		g.whole(g.open(g.mem), a, "abcdef")
	}
	if _, _, err := r.Hold(t.Context(), a.ID); !errors.Is(err, store.ErrNotExist) {
		t.Errorf("a forgotten point can be held: %v", err)
	}
	release()
	if rep := g.gc(other, store.GCOptions{}); rep.Removed == 0 || rep.Points != 1 {
		t.Errorf("after the release: %+v", rep)
	}
}

// TestGCWaitsForOlderBackups: a draft that may have found a chunk before it was
// condemned can rely on it; one that began later cannot, and is not waited for.
func TestGCWaitsForOlderBackups(t *testing.T) {
	g := newGCRepo(t)
	r := g.open(g.mem)
	g.drop(r, g.backup(r, "abcdef"))
	old, err := r.NewDraft(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	rep := g.gc(r, store.GCOptions{})
	if rep.Condemned == 0 || rep.Removed != 0 || rep.Pending != rep.Condemned || rep.Waiting != 1 {
		t.Fatalf("beside an older backup: %+v", rep)
	}
	later, err := r.NewDraft(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer later.Close()
	if rep := g.gc(r, store.GCOptions{}); rep.Removed != 0 || rep.Waiting != 1 {
		t.Fatalf("still beside it: %+v", rep)
	}
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	// Another process, whose index is new, goes on where the first one stopped.
	other := g.open(g.mem)
	if rep := g.gc(other, store.GCOptions{}); rep.Removed == 0 || rep.Pending != 0 {
		t.Errorf("with a younger backup only: %+v", rep)
	}
}

// TestGCMergesSmallPacks: each backup leaves a small pack behind.
func TestGCMergesSmallPacks(t *testing.T) {
	g := newGCRepo(t)
	r := g.open(g.mem)
	points := map[string]*store.Point{}
	for c := 'a'; c < 'a'+20; c++ {
		points[string(c)] = g.backup(r, string(c))
	}
	before, _ := g.packs()
	g.gc(r, store.GCOptions{})
	if after, _ := g.packs(); after != 1 {
		t.Errorf("%d packs became %d", before, after)
	}
	fresh := g.open(g.mem)
	for letters, p := range points {
		g.whole(r, p, letters)
		g.whole(fresh, p, letters)
	}
}

func TestGCOneAtATime(t *testing.T) {
	g := newGCRepo(t)
	r := g.open(g.mem)
	release, err := g.leases.Take(t.Context(), store.Lease{ID: [16]byte{1}, Kind: store.LeaseGC})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.GC(t.Context(), store.GCOptions{}); !errors.Is(err, store.ErrLocked) {
		t.Errorf("beside another gc: %v", err)
	}
	release()
	g.gc(r, store.GCOptions{})
}

// TestGCAndDamage: what cannot be known or read is never removed.
func TestGCAndDamage(t *testing.T) {
	remove := func(g *gcRepo, prefix string) {
		for i, err := range g.mem.List(t.Context(), prefix) {
			if err != nil {
				t.Fatal(err)
			}
			if err := g.mem.Remove(t.Context(), i.Name); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Run("pack of a point lost", func(t *testing.T) {
		g := newGCRepo(t)
		r := g.open(g.mem)
		g.backup(r, "abc")
		remove(g, "packs/")
		g.backup(r, "xyz")
		r = g.open(g.mem)
		n, _ := g.packs()
		if _, err := r.GC(t.Context(), store.GCOptions{}); !errors.Is(err, store.ErrDamaged) {
			t.Errorf("%v", err)
		}
		if m, _ := g.packs(); m != n {
			t.Errorf("%d of %d packs left", m, n)
		}
	})
	t.Run("manifest damaged", func(t *testing.T) {
		g := newGCRepo(t)
		r := g.open(g.mem)
		p := g.backup(r, "abc")
		g.drop(r, g.backup(r, "xyz"))
		w, err := g.mem.Create(t.Context(), "points/"+p.ID.String())
		if err != nil {
			t.Fatal(err)
		}
		w.WriteAt([]byte("HFPOINT\n and nothing like it, for more bytes than a header, tag and checksum of a manifest take up together"), 0)
		if err := w.Commit(); err != nil {
			t.Fatal(err)
		}
		if _, err := g.open(g.mem).GC(t.Context(), store.GCOptions{}); !errors.Is(err, store.ErrDamaged) {
			t.Errorf("%v", err)
		}
	})
	t.Run("live record damaged", func(t *testing.T) {
		g := newGCRepo(t)
		r := g.open(g.mem)
		a := g.backup(r, "abcdefgh")
		first := ""
		for i, err := range g.mem.List(t.Context(), "packs/") {
			if err != nil {
				t.Fatal(err)
			}
			first = i.Name
		}
		g.backup(r, "a")
		g.drop(r, a)
		flipByte(t, g.mem, first, 80+56+2) // in the first record: a
		rep := g.gc(r, store.GCOptions{})
		if o, err := g.mem.Open(t.Context(), first); err != nil || rep.Kept != 1 {
			t.Errorf("the pack went: %v, %+v", err, rep)
		} else {
			o.Close()
		}
		if rep := g.gc(g.open(g.mem), store.GCOptions{}); rep.Kept != 1 {
			t.Errorf("in the next run: %+v", rep)
		}
	})
}

// flipByte changes one byte of an object.
func flipByte(t *testing.T, m *bucket.Memory, name string, off int64) {
	t.Helper()
	o, err := m.Open(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, o.Size())
	if _, err := o.ReadAt(b, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	b[off] ^= 0x10
	w, err := m.Create(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
}

// TestRemovedPackStaysAway: somebody who listed the packs before a gc, and adds
// what it lacks after it, must not bring a removed pack back.
func TestRemovedPackStaysAway(t *testing.T) {
	x, err := store.MemoryIndex()(t.Context(), [16]byte{}, func(context.Context, store.Index, bool) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	id := store.PackID{7}
	recs := []store.PackRecord{{ID: store.ID{1}, Off: 80, Len: 10, Plain: 10}}
	add := func() {
		if err := x.AddPack(t.Context(), store.PackInfo{ID: id, Size: 1000}, recs); err != nil {
			t.Fatal(err)
		}
	}
	known := func() bool {
		var loc [1]store.Loc
		if err := x.Lookup(t.Context(), []store.ID{recs[0].ID}, loc[:]); err != nil {
			t.Fatal(err)
		}
		return loc[0].Known()
	}
	add()
	if !known() {
		t.Fatal("not added")
	}
	if ok, err := x.Condemn(t.Context(), [16]byte{}, store.Condemned{Epoch: [16]byte{1}, Packs: []store.PackID{id}}); !ok || err != nil {
		t.Fatal(ok, err)
	}
	if ok, err := x.Condemn(t.Context(), [16]byte{}, store.Condemned{Epoch: [16]byte{2}}); ok || err != nil {
		t.Fatalf("condemned on top of another epoch: %v %v", ok, err)
	}
	if err := x.DropPack(t.Context(), id, []store.ID{recs[0].ID}); err != nil {
		t.Fatal(err)
	}
	add()
	if known() {
		t.Error("a removed pack is back")
	}
	for p := range x.Packs(t.Context()) {
		t.Errorf("pack %d is registered", p.Number)
	}
}
