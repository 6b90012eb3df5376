package store_test

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
)

// other makes a second repository, of another chunk size and password.
func (g *gcRepo) other(chunkSize int) *gcRepo {
	g.t.Helper()
	o := &gcRepo{t: g.t, mem: bucket.NewMemory(), leases: &store.MemoryLeases{}, at: g.at}
	opt := store.InitOptions{ChunkSize: chunkSize, Passphrase: []byte("secret")}
	if err := store.Init(g.t.Context(), o.mem, opt, g.at); err != nil {
		g.t.Fatal(err)
	}
	return o
}

// copyAll copies all points.
func copyAll(t *testing.T, from, to *store.Repo) {
	t.Helper()
	list, err := from.Points(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range backup.Copy(t.Context(), from, to, list, backup.CopyOptions{}) {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func heal(t *testing.T, r, from *store.Repo) (rep backup.HealReport, found []string) {
	t.Helper()
	rep, err := backup.Heal(t.Context(), r, from, backup.HealOptions{Damage: func(d *store.DamageError) { found = append(found, d.Error()) }})
	if err != nil {
		t.Fatal(err)
	}
	return rep, found
}

// losePack removes the pack that has a chunk.
func (g *gcRepo) losePack(r *store.Repo, p *store.Point, n int64) {
	g.t.Helper()
	pack, _ := g.recordOf(r, p, n)
	if err := g.mem.Remove(g.t.Context(), pack); err != nil {
		g.t.Fatal(err)
	}
}

// TestHeal damages single chunks and loses whole packs, with the pages of a map of two levels in
// them, and heals from repositories of other chunk sizes: a copy, what it is a copy of, and one
// with backups of the same VM.
func TestHeal(t *testing.T) {
	t.Cleanup(store.CheapKeys())
	long := strings.Repeat("abcdefghij", 30) // 300 chunks: two levels
	last := long[:299] + "z"
	for _, c := range []struct {
		name string
		size int // of the chunks of the other repository
	}{{"large chunks", 1 << 20}, {"chunks of the same size", 64 << 10}} {
		for _, back := range []bool{false, true} {
			t.Run(fmt.Sprint(c.name, " back ", back), func(t *testing.T) {
				g := newGCRepo(t)
				r := g.open(g.mem)
				g.backup(r, long)
				g.backup(r, "xyz")
				g.backup(r, last)
				o := g.other(c.size)
				from := o.open(o.mem)
				copyAll(t, r, from)
				want := []string{long, "xyz", last}
				if back { // the copy is damaged, the original heals it
					g, r, o, from = o, from, g, r
				}
				list, err := r.Points(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				var points []*store.Point
				for _, s := range list {
					p, err := r.Point(t.Context(), s.ID)
					if err != nil {
						t.Fatal(err)
					}
					points = append(points, p)
				}
				g.damage(r, points[1], 0)
				g.losePack(r, points[0], 1)
				r = g.open(g.mem)
				_, found := g.verify(r, store.VerifyOptions{ReadData: true})
				if len(found) == 0 {
					t.Fatal("nothing is damaged")
				}
				rep, left := heal(t, r, from)
				if rep.Left != 0 || rep.Chunks == 0 || rep.Pages == 0 {
					t.Errorf("%+v, %q", rep, left)
				}
				g.wantHit(r, points, "", "", "")
				for _, r := range []*store.Repo{r, g.open(g.mem)} {
					for i, p := range points {
						if err := sameDisk(r, p, lettered(want[i])); err != nil {
							t.Errorf("point %d: %v", i, err)
						}
					}
				}
				if rep, _ := heal(t, r, from); rep != (backup.HealReport{}) {
					t.Errorf("again: %+v", rep)
				}
			})
		}
	}
}

// TestHealLeaf: one page in the middle of a map, and what it says is lost with it.
func TestHealLeaf(t *testing.T) {
	t.Cleanup(store.CheapKeys())
	letters := strings.Repeat("abcdefghij", 30)
	g := newGCRepo(t)
	r := g.open(g.mem)
	a := g.backup(r, letters)
	o := g.other(1 << 20)
	from := o.open(o.mem)
	copyAll(t, r, from)
	pack, loc, err := r.PagePlace(t.Context(), a, "disk0", 256)
	if err != nil {
		t.Fatal(err)
	}
	flipByte(t, g.mem, pack, int64(loc.Off)+70)
	r = g.open(g.mem)
	if _, found := g.verify(r, store.VerifyOptions{ReadData: true}); len(found) != 1 || found[0].Off != 256*mosaicChunk {
		t.Fatalf("%v", found)
	}
	g.wantHit(r, []*store.Point{a}, "1 map page of disk0 at 16777216")
	// A disk of that size with other bytes gives nothing, and nothing of it is stored.
	wrong := g.other(128 << 10)
	wr := wrong.open(wrong.mem)
	wrong.backup(wr, strings.Repeat("zyxwvutsrq", 30))
	n, size := g.packs()
	if rep, left := heal(t, r, wr); rep.Pages != 0 || rep.Chunks != 0 || rep.Left != 1 {
		t.Errorf("%+v, %q", rep, left)
	}
	if m, s := g.packs(); m != n || s != size {
		t.Errorf("%d packs of %d bytes became %d of %d", n, size, m, s)
	}
	if rep, left := heal(t, r, from); rep.Pages != 1 || rep.Chunks != 0 || rep.Left != 0 {
		t.Errorf("%+v, %q", rep, left)
	}
	g.whole(g.open(g.mem), a, letters)
}

// TestHealFromOtherPoints: no copy is needed, the bytes are; and wrong bytes heal nothing.
func TestHealFromOtherPoints(t *testing.T) {
	t.Cleanup(store.CheapKeys())
	g := newGCRepo(t)
	r := g.open(g.mem)
	a := g.backup(r, "abcdefgh")
	g.damage(r, a, 1)
	g.damage(r, a, 5)
	g.verify(r, store.VerifyOptions{ReadData: true})
	o := g.other(1 << 20)
	from := o.open(o.mem)
	o.backup(from, "abXdeXgh") // chunk 1 only
	o.backup(from, "abc")      // another size
	rep, left := heal(t, r, from)
	if rep.Chunks != 1 || rep.Left != 1 || len(left) != 1 || !strings.Contains(left[0], "disk0 at offset 327680") {
		t.Errorf("%+v, %q", rep, left)
	}
	g.wantHit(r, []*store.Point{a}, "1 chunk of disk0 at 327680")
	if rep, _ := heal(t, r, from); rep.Chunks != 0 || rep.Left != 1 {
		t.Errorf("again: %+v", rep)
	}
	o.backup(from, "XXXXXfXX")
	if rep, _ := heal(t, r, from); rep.Chunks != 1 || rep.Left != 0 {
		t.Errorf("with the right bytes: %+v", rep)
	}
	g.whole(g.open(g.mem), a, "abcdefgh")
	// A source that is damaged itself gives nothing wrong.
	g.damage(r, a, 0)
	g.verify(r, store.VerifyOptions{ReadData: true})
	for _, s := range pointsIn(t, from) {
		o.damage(from, s, 0)
	}
	if rep, _ := heal(t, r, o.open(o.mem)); rep.Chunks != 0 || rep.Left != 1 {
		t.Errorf("from a damaged source: %+v", rep)
	}
}

func pointsIn(t *testing.T, r *store.Repo) (all []*store.Point) {
	t.Helper()
	list, err := r.Points(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range list {
		p, err := r.Point(t.Context(), s.ID)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	return all
}

// TestHealFromTwin: the same repository elsewhere gives back manifests too, bit for bit; a copy cannot.
func TestHealFromTwin(t *testing.T) {
	t.Cleanup(store.CheapKeys())
	g := newGCRepo(t)
	r := g.open(g.mem)
	a, b := g.backup(r, "abc"), g.backup(r, "xyz")
	twin := g.mem.Crash()
	o := g.other(1 << 20)
	copyAll(t, r, o.open(o.mem))
	name := "points/" + a.ID.String()
	right := object(t, g.mem, name)
	flipByte(t, g.mem, name, 80)
	g.damage(r, a, 2)
	g.damage(r, b, 2)
	r = g.open(g.mem)
	g.verify(r, store.VerifyOptions{ReadData: true})
	if rep, left := heal(t, r, o.open(o.mem)); rep.Manifests != 0 || rep.Chunks != 1 || rep.Left != 1 || !strings.Contains(left[0], "manifest") {
		t.Errorf("from a copy: %+v, %q", rep, left)
	}
	from := (&gcRepo{t: t, mem: twin, leases: &store.MemoryLeases{}}).open(twin)
	if rep, left := heal(t, r, from); rep.Manifests != 1 || rep.Left != 0 {
		t.Errorf("from a twin: %+v, %q", rep, left)
	}
	if !bytes.Equal(object(t, g.mem, name), right) {
		t.Error("the manifest is another one")
	}
	for _, s := range pointsIn(t, r) {
		if s.ID == a.ID {
			a = s
		}
	}
	// That its chunk is damaged nobody could know before.
	g.verify(r, store.VerifyOptions{ReadData: true})
	if rep, left := heal(t, r, from); rep.Left != 0 {
		t.Errorf("%+v, %q", rep, left)
	}
	g.whole(r, a, "abc")
	g.whole(g.open(g.mem), a, "abc")
	g.whole(g.open(g.mem), b, "xyz")
}

// TestCrashHeal stops a repair out of another repository everywhere.
func TestCrashHeal(t *testing.T) {
	if testing.Short() {
		t.Skip("-short")
	}
	t.Cleanup(store.CheapKeys())
	ctx := t.Context()
	s := damagedScene(t, false, true, "abc", "bcx")
	at := time.Unix(1e9, 0)
	mem := bucket.NewMemory()
	if err := store.Init(ctx, mem, store.InitOptions{ChunkSize: 1 << 20, Passphrase: []byte("secret")}, at); err != nil {
		t.Fatal(err)
	}
	from, err := sceneRepo(ctx, mem, store.MemoryIndex())
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	if _, err := backup.Run(ctx, from, &mosaicVM{name: "vm0", at: at.Add(time.Minute), data: lettered("aqq")}, backup.Options{}); err != nil {
		t.Fatal(err)
	}
	op := func(r *store.Repo) error {
		rep, err := backup.Heal(ctx, r, from, backup.HealOptions{Damage: func(*store.DamageError) {}})
		if err == nil && rep.Left > 0 {
			err = fmt.Errorf("%+v", rep)
		}
		return err
	}
	s.everywhere(t, op, func(r *store.Repo) error {
		if err := op(r); err != nil {
			return err
		}
		// Now nothing is lost: the damaged record goes, too.
		rep, err := r.RepairPacks(ctx, store.RepairPacksOptions{Damage: func(*store.DamageError) {}})
		if err == nil && rep.Lost > 0 {
			err = fmt.Errorf("%+v", rep)
		}
		return err
	}, healed)
}

// TestCrashVerify stops a verification that has damage to remember everywhere.
func TestCrashVerify(t *testing.T) {
	t.Cleanup(store.CheapKeys())
	ctx := t.Context()
	s := &repairScene{newScene(t, false, "abc", "bcx"), map[store.PointID]bool{}}
	r, err := sceneRepo(ctx, s.mem, store.LocalIndex(s.index, false))
	if err != nil {
		t.Fatal(err)
	}
	for id, vm := range s.live {
		if vm.at.Equal(time.Unix(1e9, 0)) {
			p, err := r.Point(ctx, id)
			if err != nil {
				t.Fatal(err)
			}
			pack, loc, err := r.Place(ctx, p, "disk0", 0)
			if err != nil {
				t.Fatal(err)
			}
			flipByte(t, s.mem, pack, int64(loc.Off)+60)
			s.lost[id] = true
		}
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	verify := func(r *store.Repo) (n int, err error) {
		_, err = r.Verify(ctx, store.VerifyOptions{ReadData: true, Damage: func(d *store.DamageError) { n++ }})
		return n, err
	}
	s.everywhere(t, func(r *store.Repo) error { _, err := verify(r); return err }, func(r *store.Repo) error {
		n, err := verify(r)
		if err != nil {
			return err
		}
		if n != 1 || r.Remembered(ctx) != 2 {
			return fmt.Errorf("%d findings, %d things remembered", n, r.Remembered(ctx))
		}
		return damagedListed(ctx, r, s)
	}, known)
}

// known demands of what a stop has left: when the run came to its end, its finding is remembered.
func known(ctx context.Context, s *repairScene, r *store.Repo, done bool) error {
	if !done {
		return nil
	}
	return damagedListed(ctx, r, s)
}

// damagedListed demands that exactly the points that have lost something are listed as such.
func damagedListed(ctx context.Context, r *store.Repo, s *repairScene) error {
	list, err := r.Points(ctx)
	if err != nil {
		return err
	}
	if list, err = r.WithDamage(ctx, list); err != nil {
		return err
	}
	for _, p := range list {
		if s.lost[p.ID] != (len(p.Hit) > 0) {
			return fmt.Errorf("%s: known damage is %v", p.Path(), p.Hit)
		}
	}
	return nil
}

// healed demands that a heal that was reported as done is one, with every index. One from before
// the run learns of its packs, since there is no point with them, with the first write.
func healed(ctx context.Context, s *repairScene, r *store.Repo, done bool) error {
	if !done {
		return nil
	}
	d, err := r.NewDraft(ctx)
	if err == nil {
		err = d.Close()
	}
	if err != nil {
		return err
	}
	for id, vm := range s.live {
		p, err := r.Point(ctx, id)
		if err == nil {
			err = sameDisk(r, p, vm.data)
		}
		if err != nil {
			return fmt.Errorf("reported as healed: %w", err)
		}
	}
	return nil
}
