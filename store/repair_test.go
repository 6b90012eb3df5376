package store_test

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/store"
)

func (g *gcRepo) repair(r *store.Repo, opt store.RepairPacksOptions) (rep store.RepairPacksReport, found []*store.DamageError) {
	g.t.Helper()
	opt.Damage = func(d *store.DamageError) { found = append(found, d) }
	rep, err := r.RepairPacks(g.t.Context(), opt)
	if err != nil {
		g.t.Fatal(err)
	}
	return rep, found
}

// placesOf counts the findings that name a point.
func placesOf(found []*store.DamageError) (n int) {
	for _, f := range found {
		if f.Point != "" {
			n++
		}
	}
	return n
}

// change replaces a pack by what fn makes of it.
func (g *gcRepo) change(name string, fn func([]byte) []byte) {
	g.t.Helper()
	putObject(g.t, g.mem, name, fn(bytes.Clone(object(g.t, g.mem, name))))
}

// TestRepairPacks damages a pack in each of the ways that leave all or most of it, and repairs.
func TestRepairPacks(t *testing.T) {
	t.Cleanup(store.CheapKeys())
	cut := func(n int) func([]byte) []byte { return func(b []byte) []byte { return b[:len(b)-n] } }
	zero := func(from, to int) func([]byte) []byte {
		return func(b []byte) []byte { clear(b[from:to]); return b }
	}
	for _, c := range []struct {
		name string
		fn   func([]byte) []byte
		find bool // by a verification, before the repair
		lost int64
	}{
		{"trailer torn", cut(5), false, 0},
		{"table torn", cut(64 + 3*44), false, 0},
		{"table and the page torn", cut(64 + 9*44 + 20), false, 0}, // which the index has
		{"header lost", zero(0, 80), false, 0},
		{"header and first record lost", zero(0, 90), false, 1},
		{"middle zeroed", zero(80+2*83, 80+3*83), true, 1},
		{"one byte", zero(80+60, 80+61), true, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newGCRepo(t)
			r := g.open(g.mem)
			a := g.backup(r, "abcdefgh")
			pack, _ := g.recordOf(r, a, 0)
			b := g.backup(r, "abcdefghxyz")
			g.change(pack, c.fn)
			if c.find {
				g.verify(r, store.VerifyOptions{ReadData: true})
			}
			n, size := g.packs()
			dry, found := g.repair(r, store.RepairPacksOptions{DryRun: true})
			if m, s := g.packs(); m != n || s != size || dry.Damaged != 1 || dry.Records < 8 {
				t.Fatalf("dry run: %+v, %d packs of %d bytes were %d of %d", dry, m, s, n, size)
			}
			if named := placesOf(found); (named > 0) != (c.lost > 0) && c.name != "table and the page torn" || named != dry.Lost {
				t.Errorf("dry run: %v, %+v", found, dry)
			}
			rep, found := g.repair(r, store.RepairPacksOptions{})
			if rep.Damaged != 1 || rep.Removed != 1 || rep.Kept != 0 || int64(rep.Lost) != 2*c.lost {
				t.Fatalf("%+v, %v", rep, found)
			}
			if _, err := g.mem.Open(t.Context(), pack); !errors.Is(err, store.ErrNotExist) {
				t.Errorf("the damaged pack is there: %v", err)
			}
			for _, r := range []*store.Repo{r, g.open(g.mem)} {
				if _, found := g.verify(r, store.VerifyOptions{ReadData: true}); len(found) != int(2*c.lost) {
					t.Errorf("after the repair: %v", found)
				}
				if c.lost > 0 {
					for _, f := range found {
						if f.Disk != "disk0" || f.Point == "" {
							t.Errorf("no place is named: %v", f)
						}
					}
					continue
				}
				g.whole(r, a, "abcdefgh")
				g.whole(r, b, "abcdefghxyz")
			}
			if again, _ := g.repair(r, store.RepairPacksOptions{}); again.Damaged != 0 || int64(again.Lost) != 2*c.lost {
				t.Errorf("again: %+v", again)
			}
			// The next backup stores again what is lost, and all is well.
			g.backup(r, "abcdefgh")
			g.wantHit(r, []*store.Point{a, b}, "", "")
			fresh := g.open(g.mem)
			g.whole(fresh, a, "abcdefgh")
			g.whole(fresh, b, "abcdefghxyz")
			if _, found := g.verify(fresh, store.VerifyOptions{ReadData: true}); len(found) != 0 {
				t.Errorf("%v", found)
			}
			if rep := g.gc(fresh, store.GCOptions{}); rep.Missing != 0 || rep.Kept != 0 {
				t.Errorf("gc: %+v", rep)
			}
		})
	}
}

// TestRepairPacksUnreadable: a pack that the medium does not give stays, what it gives is saved, and when
// it gives the rest another time nothing is lost.
func TestRepairPacksUnreadable(t *testing.T) {
	t.Cleanup(store.CheapKeys())
	g := newGCRepo(t)
	r := g.open(g.mem)
	var many []byte
	for i := range 60 { // packs of some blocks
		many = append(many, byte('A'+i))
	}
	a := g.backup(r, string(many))
	pack, off := g.recordOf(r, a, 30)
	size := int64(len(object(t, g.mem, pack)))
	w := watch(g.mem)
	w.refuse[pack] = [][2]int64{{off + 60, off + 61}}
	g.verify(g.open(w), store.VerifyOptions{ReadData: true})
	for i, more := range [][2]int64{{}, {size - 10, size}} {
		w.refuse[pack] = append(w.refuse[pack], more)
		rep, found := g.repair(g.open(w), store.RepairPacksOptions{})
		if rep.Kept != 1 || rep.Removed != 0 || rep.Lost == 0 || len(found) == 0 || i == 0 && rep.Records < 40 {
			t.Errorf("round %d: %+v, %v", i, rep, found)
		}
		object(t, g.mem, pack)
	}
	// With the medium as it was before, all is there.
	fresh := g.open(g.mem)
	rep, found := g.repair(fresh, store.RepairPacksOptions{})
	if rep.Kept != 0 || rep.Lost != 0 {
		t.Errorf("%+v, %v", rep, found)
	}
	g.whole(fresh, a, string(many))
	g.whole(g.open(g.mem), a, string(many))

	// Who does not believe in that says so.
	delete(w.refuse, pack)
	a = g.backup(fresh, "01234567")
	pack, off = g.recordOf(fresh, a, 3)
	w.refuse[pack] = [][2]int64{{off + 60, off + 61}}
	g.verify(g.open(w), store.VerifyOptions{ReadData: true})
	if rep, _ := g.repair(g.open(w), store.RepairPacksOptions{DropUnreadable: true}); rep.Removed != 1 || rep.Kept != 0 || rep.Lost == 0 {
		t.Errorf("%+v", rep)
	}
}

// TestRepairPacksOfAnotherName: a whole pack under a wrong name proves nothing, and stays.
func TestRepairPacksOfAnotherName(t *testing.T) {
	t.Cleanup(store.CheapKeys())
	g := newGCRepo(t)
	r := g.open(g.mem)
	a := g.backup(r, "abcdef")
	pack, _ := g.recordOf(r, a, 0)
	moved := object(t, g.mem, pack)
	wrong := "packs/" + store.PackID{1, 2, 3}.String()
	putObject(t, g.mem, wrong, moved)
	if err := g.mem.Remove(t.Context(), pack); err != nil {
		t.Fatal(err)
	}
	r = g.open(g.mem)
	if rep, _ := g.repair(r, store.RepairPacksOptions{}); rep.Kept != 1 || rep.Removed != 0 || rep.Lost == 0 {
		t.Errorf("%+v", rep)
	}
	putObject(t, g.mem, pack, object(t, g.mem, wrong))
	g.whole(g.open(g.mem), a, "abcdef")
}

// TestRepairPacksBesideOthers: a backup at work that relies on a damaged pack, a reader of a
// forgotten point, and a gc.
func TestRepairPacksBesideOthers(t *testing.T) {
	t.Cleanup(store.CheapKeys())
	g := newGCRepo(t)
	r := g.open(g.mem)
	a := g.backup(r, "abcdefgh")
	pack, _ := g.recordOf(r, a, 0)
	p, release, err := r.Hold(t.Context(), a.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	// It has looked up chunks that no point has any more when it commits.
	d, err := r.NewDraft(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	w, err := d.Writer()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	ids := make([]store.ID, 8)
	if _, err := w.Write(t.Context(), lettered("abcdefgh"), make([]store.ID, 8), ids); err != nil {
		t.Fatal(err)
	}
	g.drop(r, a)
	g.change(pack, func(b []byte) []byte { return b[:len(b)-70] })
	other := g.open(g.mem)
	rep, found := g.repair(other, store.RepairPacksOptions{})
	if rep.Removed != 1 || rep.Lost != 0 {
		t.Fatalf("%+v, %v", rep, found)
	}
	g.gc(other, store.GCOptions{MaxLive: 1})
	third := g.open(g.mem) // with an index that knows of all that
	g.whole(third, p, "abcdefgh")
	m, err := d.Map(t.Context(), store.Root{}, 8*mosaicChunk)
	if err != nil {
		t.Fatal(err)
	}
	for i, id := range ids {
		if err := m.Set(t.Context(), int64(i), id); err != nil {
			t.Fatal(err)
		}
	}
	root, err := m.Finish(t.Context(), 8*mosaicChunk)
	if err != nil {
		t.Fatal(err)
	}
	q := &store.Point{VM: store.VM{Name: "vm"}, Time: time.Unix(2e9, 0), Disks: []store.Disk{{Name: "disk0", Size: root.Size, Root: root.Page[:]}}}
	if err := d.Commit(t.Context(), q); err != nil {
		t.Fatal(err)
	}
	fresh := g.open(g.mem)
	g.whole(fresh, q, "abcdefgh")

	release()
	end, err := g.leases.Take(t.Context(), store.Lease{ID: [16]byte{1}, Kind: store.LeaseGC})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fresh.RepairPacks(t.Context(), store.RepairPacksOptions{Damage: func(*store.DamageError) {}}); !errors.Is(err, store.ErrLocked) {
		t.Errorf("beside a gc: %v", err)
	}
	end()
}

// TestRepairPacksTwoCopies: of two copies of a chunk, in two damaged packs, the index names the one
// that is lost, and only a backup at work needs it.
func TestRepairPacksTwoCopies(t *testing.T) {
	t.Cleanup(store.CheapKeys())
	g := newGCRepo(t)
	r := g.open(g.mem)
	a := g.backup(r, "abc")
	first, _ := g.recordOf(r, a, 0)
	undo := g.damage(r, a, 0)
	g.verify(r, store.VerifyOptions{ReadData: true})
	undo()
	b := g.backup(r, "a") // stores it again
	second, off := g.recordOf(r, b, 0)
	if first == second {
		t.Fatal("there is one copy")
	}
	d, err := r.NewDraft(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	w, err := d.Writer()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	ids := make([]store.ID, 1)
	if wrote, err := w.Write(t.Context(), lettered("a"), make([]store.ID, 1), ids); err != nil || wrote.New > 0 {
		t.Fatal(wrote, err)
	}
	g.drop(r, a)
	g.drop(r, b)
	g.change(first, func(b []byte) []byte { clear(b[:80]); return b })
	g.change(second, func(b []byte) []byte { clear(b[off : off+70]); clear(b[len(b)-64:]); return b })
	if rep, found := g.repair(r, store.RepairPacksOptions{}); rep.Removed != 2 {
		t.Fatalf("%+v, %v", rep, found)
	}
	m, err := d.Map(t.Context(), store.Root{}, mosaicChunk)
	if err == nil {
		err = m.Set(t.Context(), 0, ids[0])
	}
	if err != nil {
		t.Fatal(err)
	}
	root, err := m.Finish(t.Context(), mosaicChunk)
	if err != nil {
		t.Fatal(err)
	}
	p := &store.Point{VM: store.VM{Name: "vm"}, Time: time.Unix(2e9, 0), Disks: []store.Disk{{Name: "disk0", Size: root.Size, Root: root.Page[:]}}}
	if err := d.Commit(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	g.whole(r, p, "a")
	g.whole(g.open(g.mem), p, "a")
}
