package store_test

import (
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
)

func (g *gcRepo) backupOf(r *store.Repo, vm string, data []byte) *store.Point {
	g.t.Helper()
	g.at = g.at.Add(time.Second)
	p, err := backup.Run(g.t.Context(), r, &mosaicVM{name: vm, at: g.at, data: data}, backup.Options{})
	if err != nil {
		g.t.Fatal(err)
	}
	return p
}

func (g *gcRepo) usage(r *store.Repo) *store.Usage {
	g.t.Helper()
	u, err := r.Usage(g.t.Context(), nil)
	if err != nil {
		g.t.Fatal(err)
	}
	return u
}

// TestUsageUniqueIsWhatForgettingFrees compares the bytes that a point or a VM is said to
// use alone with what a gc finds alive with and without it.
func TestUsageUniqueIsWhatForgettingFrees(t *testing.T) {
	g := newGCRepo(t)
	r := g.open(g.mem)
	rnd := rand.New(rand.NewPCG(3, 5))
	const chunks = 520 // three pages below a root
	letters := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(1 + rnd.IntN(120))
		}
		return b
	}
	disks := map[string][]byte{"a": letters(chunks), "b": letters(chunks), "c": letters(40)}
	disks["b"] = append([]byte(nil), disks["a"]...)
	for i := range 12 {
		vm := []string{"a", "b", "c"}[i%3]
		d := disks[vm]
		for range 1 + rnd.IntN(3) {
			d[rnd.IntN(len(d))] = byte(121 + rnd.IntN(130))
		}
		if i == 8 { // comes back to what another VM has
			copy(d, disks["a"][:30])
		}
		g.backupOf(r, vm, lettered(string(d)))
	}
	g.backupOf(r, "hole", make([]byte, 3*mosaicChunk))
	r.Close()

	live := func(b bucket.Bucket, drop ...store.PointID) int64 {
		r := g.open(b)
		defer r.Close()
		if len(drop) > 0 {
			if _, err := r.Forget(t.Context(), drop, time.Now()); err != nil {
				t.Fatal(err)
			}
		}
		return g.gc(r, store.GCOptions{DryRun: true}).Live
	}
	all := live(g.mem)
	r = g.open(g.mem)
	u := g.usage(r)
	if u.Live != all || u.Missing != 0 || u.Damaged != 0 || len(u.Points) != 13 || len(u.VMs) != 4 {
		t.Fatalf("live %d, for gc %d; %+v", u.Live, all, u)
	}
	if u.Plain != u.Chunks*mosaicChunk || u.Packed >= u.Live || u.Packed <= 0 {
		t.Errorf("%+v", u)
	}
	some := 0
	ofVM := map[string][]store.PointID{}
	for _, p := range u.Points {
		ofVM[p.VM] = append(ofVM[p.VM], p.ID)
		if want := all - live(g.mem.Crash(), p.ID); p.Unique != want {
			t.Errorf("%s/%s: unique %d, forgetting it frees %d", p.VM, p.Name, p.Unique, want)
		}
		if p.Unique > 0 {
			some++
		}
	}
	sum := u.Shared
	for _, vm := range u.VMs {
		if want := all - live(g.mem.Crash(), ofVM[vm.VM]...); vm.Unique != want {
			t.Errorf("%s: unique %d, forgetting it frees %d", vm.VM, vm.Unique, want)
		}
		sum += vm.Unique
	}
	if some < 5 || u.Shared == 0 || sum != u.Live {
		t.Errorf("%d points use something alone, %d bytes are shared, sum %d of %d", some, u.Shared, sum, u.Live)
	}
}

func TestUsageGoesOnPastDamage(t *testing.T) {
	g := newGCRepo(t)
	r := g.open(g.mem)
	a := g.backupOf(r, "a", lettered("abcd"))
	g.backupOf(r, "b", lettered("efgh"))
	before := g.usage(r)
	r.Close()
	flip(t, g.mem, a.ID)
	u := g.usage(g.open(g.mem))
	if u.Damaged != 1 || len(u.Points) != 1 || u.Live >= before.Live || u.Live != before.Points[1].Unique {
		t.Errorf("%+v; before %+v", u, before)
	}
}

func TestGrowth(t *testing.T) {
	at := func(s string) store.Summary {
		tm, err := time.Parse(time.DateTime, s)
		if err != nil {
			t.Fatal(err)
		}
		return store.Summary{VM: "vm", Time: tm, New: 10, Stored: 4}
	}
	points := []store.Summary{at("2026-12-31 23:30:00"), at("2026-12-28 00:00:00"), at("2027-01-04 12:00:00"), {Damaged: "x"}}
	line := func(list []store.Growth) string {
		var s []string
		for _, g := range list {
			s = append(s, g.Period+":"+strings.Repeat("+", g.Points)+":"+time.Duration(g.Sum).String())
		}
		return strings.Join(s, " ")
	}
	berlin := time.FixedZone("", 3600)
	for _, c := range []struct {
		by   store.Period
		zone *time.Location
		want string
	}{
		{store.ByYear, time.UTC, "2026:++:8ns 2027:+:12ns"},
		{store.ByYear, berlin, "2026:+:4ns 2027:++:12ns"},
		{store.ByMonth, time.UTC, "2026-12:++:8ns 2027-01:+:12ns"},
		{store.ByWeek, time.UTC, "2026-W53:++:8ns 2027-W01:+:12ns"},
		{store.ByDay, time.UTC, "2026-12-28:+:4ns 2026-12-29::4ns 2026-12-30::4ns 2026-12-31:+:8ns 2027-01-01::8ns 2027-01-02::8ns 2027-01-03::8ns 2027-01-04:+:12ns"},
	} {
		if got := line(store.GrowthOf(points, c.by, c.zone)); got != c.want {
			t.Errorf("%s: %s, want %s", c.by, got, c.want)
		}
	}
	if got := store.PeriodOf(points); got != store.ByDay {
		t.Error(got)
	}
	if got := store.PeriodOf(append(points, at("2020-01-01 00:00:00"))); got != store.ByYear {
		t.Error(got)
	}
	if got := store.GrowthOf(nil, store.ByDay, time.UTC); len(got) != 0 {
		t.Error(got)
	}
}
