package backup_test

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
)

// hitAt is a point with damage on its disk.
func hitAt(vm string, at time.Time, tags ...string) store.Summary {
	s := pointAt(vm, at, 1, tags...)
	s.Hit = []store.DiskDamage{{Disk: "disk0", Chunks: 1}}
	return s
}

// TestKeepDamagedDisks: a point with damaged chunks takes the place of no good one, and has one of
// its own where there is no good one.
func TestKeepDamagedDisks(t *testing.T) {
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	day := func(n, hour int) time.Time { return time.Date(2026, 11, 21-n, hour, 0, 0, 0, time.UTC) }
	keep := func(points []store.Summary, p backup.Policy) []backup.Decision { return backup.Keep(points, p, now) }

	// The newest is damaged: the newest good one stays, and counts as the first.
	points := []store.Summary{hitAt("web", day(0, 9)), pointAt("web", day(1, 9), 1), pointAt("web", day(2, 9), 1), pointAt("web", day(3, 9), 1)}
	wantKept(t, keep(points, backup.Policy{Last: 1}), time.UTC,
		"11-20 09:00: last 1 #1, newest good point of VM web", "11-21 09:00: last 1 #1 of the damaged")
	wantKept(t, keep(points, backup.Policy{}), time.UTC, "11-20 09:00: newest good point of VM web")
	wantKept(t, keep(points, backup.Policy{Within: backup.Duration{Days: 1}}), time.UTC,
		"11-19 09:00: within 1d", "11-20 09:00: within 1d, newest good point of VM web", "11-21 09:00: within 1d")

	// A day has one point: the good one, though the damaged is newer. A day without a good one keeps
	// the newest damaged one, besides the two days of good ones.
	points = []store.Summary{hitAt("web", day(0, 9)), pointAt("web", day(0, 8), 1), hitAt("web", day(1, 9)), hitAt("web", day(1, 8)),
		pointAt("web", day(2, 9), 1), pointAt("web", day(3, 9), 1), hitAt("web", day(4, 9))}
	wantKept(t, keep(points, backup.Policy{Daily: 2}), time.UTC,
		"11-19 09:00: daily 2026-11-19", "11-20 09:00: daily 2026-11-20 of the damaged",
		"11-21 08:00: daily 2026-11-21, newest good point of VM web")

	// Older than all that a full rule keeps of the good ones: not kept. With places left it is.
	points = []store.Summary{pointAt("web", day(0, 9), 1), pointAt("web", day(1, 9), 1), hitAt("web", day(2, 9))}
	wantKept(t, keep(points, backup.Policy{Last: 2}), time.UTC, "11-20 09:00: last 2 #2", "11-21 09:00: last 2 #1, newest good point of VM web")
	wantKept(t, keep(points, backup.Policy{Last: 3}), time.UTC, "11-19 09:00: last 3 #1 of the damaged",
		"11-20 09:00: last 3 #2", "11-21 09:00: last 3 #1, newest good point of VM web")

	// One chunk that all points share is damaged: the rules go on as they did.
	points = []store.Summary{hitAt("web", day(0, 9)), hitAt("web", day(1, 9)), hitAt("web", day(2, 9)), hitAt("web", day(3, 9), "legal")}
	wantKept(t, keep(points, backup.Policy{Last: 2, KeepTags: []string{"legal"}}), time.UTC, "11-18 09:00: tag legal",
		"11-20 09:00: last 2 #2 of the damaged", "11-21 09:00: last 2 #1 of the damaged, newest point of VM web, none is good")

	// A damaged manifest is another thing: it stays, and is nobody's newest.
	bad := pointAt("web", day(0, 10), 1)
	bad.Damaged = "checksum"
	wantKept(t, keep([]store.Summary{bad, hitAt("web", day(1, 9))}, backup.Policy{}), time.UTC,
		"11-20 09:00: newest point of VM web, none is good", "11-21 10:00: damaged")
	if best := backup.NewestGood([]store.Summary{bad, hitAt("web", day(0, 9)), pointAt("web", day(5, 9), 1)}, now)["web"]; !best.Time.Equal(day(5, 9)) {
		t.Errorf("the newest good point is of %v", best.Time)
	}
}

// TestKeepDamagedCostsNoGood: whatever the rules, and whichever points are damaged, the good ones
// that stay are those that would stay if there were no others.
func TestKeepDamagedCostsNoGood(t *testing.T) {
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	rnd := rand.New(rand.NewPCG(3, 4))
	kept := 0
	for range 500 {
		var all, good []store.Summary
		for i := range 30 {
			at := now.Add(-time.Duration(i)*7*time.Hour - time.Duration(rnd.IntN(300))*time.Minute)
			if rnd.IntN(3) == 0 {
				all = append(all, hitAt("web", at))
				continue
			}
			s := pointAt("web", at, 1)
			all, good = append(all, s), append(good, s)
		}
		n := func() int { return rnd.IntN(5) }
		p := backup.Policy{Last: n(), Hourly: n(), Daily: n(), Weekly: n(), Monthly: n(), Within: backup.Duration{Days: n()}}
		ids := func(list []backup.Decision, hit bool) (ids []store.PointID) {
			for _, d := range list {
				if d.Keep && len(d.Point.Hit) > 0 == hit {
					ids = append(ids, d.Point.ID)
				}
			}
			return ids
		}
		with := backup.Keep(all, p, now)
		if !slices.Equal(ids(with, false), ids(backup.Keep(good, p, now), false)) {
			t.Fatalf("%+v: the damaged points change which good ones stay", p)
		}
		kept += len(ids(with, true))
	}
	if kept == 0 {
		t.Error("no damaged point was ever kept")
	}
}
