package backup_test

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
)

// pointAt makes a summary; n tells points of one second apart.
func pointAt(vm string, at time.Time, n int, tags ...string) store.Summary {
	s := store.Summary{VM: vm, Time: at.UTC(), Name: store.PointName(at), Tags: tags}
	if n > 1 {
		s.Name = fmt.Sprintf("%s-%d", s.Name, n)
	}
	copy(s.ID[:], vm)
	binary.BigEndian.PutUint64(s.ID[4:], uint64(at.Unix()))
	binary.BigEndian.PutUint32(s.ID[12:], uint32(n))
	return s
}

// keptWhy says what is kept and why, a line for each point, from old to new.
func keptWhy(list []backup.Decision, in *time.Location) (lines []string) {
	for _, d := range list {
		if d.Keep {
			lines = append(lines, d.Point.Time.In(in).Format("01-02 15:04")+": "+strings.Join(d.Reasons, ", "))
		}
	}
	return lines
}

func wantKept(t *testing.T, list []backup.Decision, in *time.Location, want ...string) {
	t.Helper()
	if got := keptWhy(list, in); !slices.Equal(got, want) {
		t.Errorf("kept\n\t%s\nwant\n\t%s", strings.Join(got, "\n\t"), strings.Join(want, "\n\t"))
	}
}

func TestKeepRules(t *testing.T) {
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	var points []store.Summary
	for i := range 40 { // one every 12 hours, the newest at 11-21 06:00
		points = append(points, pointAt("web", now.Add(-6*time.Hour-time.Duration(i)*12*time.Hour), 1))
	}
	keep := func(p backup.Policy) []backup.Decision { return backup.Keep(points, p, now) }
	const newest = ", newest good point of VM web"

	wantKept(t, keep(backup.Policy{Last: 2}), time.UTC, "11-20 18:00: last 2 #2", "11-21 06:00: last 2 #1"+newest)
	wantKept(t, keep(backup.Policy{Daily: 2}), time.UTC, "11-20 18:00: daily 2026-11-20", "11-21 06:00: daily 2026-11-21"+newest)
	wantKept(t, keep(backup.Policy{Last: 1, Daily: 2, Weekly: 2, Monthly: 3, Yearly: 2}), time.UTC,
		"11-15 18:00: weekly 2026-W46",
		"11-20 18:00: daily 2026-11-20",
		"11-21 06:00: last 1 #1, daily 2026-11-21, weekly 2026-W47, monthly 2026-11, yearly 2026"+newest)
	wantKept(t, keep(backup.Policy{Hourly: 1, Within: backup.Duration{Days: 1}}), time.UTC,
		"11-20 06:00: within 1d", "11-20 18:00: within 1d", "11-21 06:00: hourly 2026-11-21 06:00 UTC, within 1d"+newest)
	if got := keptWhy(keep(backup.Policy{Last: backup.All}), time.UTC); len(got) != 40 || got[0] != "11-01 18:00: last #40" {
		t.Errorf("all: %q", got)
	}
	if got := keptWhy(keep(backup.Policy{Monthly: backup.All}), time.UTC); len(got) != 1 {
		t.Errorf("all months: %q", got)
	}
	wantKept(t, keep(backup.Policy{}), time.UTC, "11-21 06:00: newest good point of VM web")
	if len(backup.Keep(nil, backup.Policy{Last: 1}, now)) != 0 {
		t.Error("decisions on nothing")
	}
	for _, p := range []backup.Policy{{}, {Zone: time.Local, OnlyTags: []string{"a"}}} {
		if !p.Empty() {
			t.Errorf("%+v is not empty", p)
		}
	}
	for _, p := range []backup.Policy{{Last: 1}, {Yearly: -1}, {Within: backup.Duration{Hours: 1}}, {KeepTags: []string{"a"}}} {
		if p.Empty() {
			t.Errorf("%+v is empty", p)
		}
	}
}

// TestKeepWithinCountsFromNewest: a VM whose backups stopped long ago keeps them.
func TestKeepWithinCountsFromNewest(t *testing.T) {
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	old := now.AddDate(-1, 0, 0)
	list := backup.Keep([]store.Summary{pointAt("web", old, 1), pointAt("web", old.Add(-time.Hour), 1), pointAt("web", old.AddDate(0, 0, -8), 1)},
		backup.Policy{Within: backup.Duration{Weeks: 1}}, now)
	wantKept(t, list, time.UTC, "11-21 11:00: within 1w", "11-21 12:00: within 1w, newest good point of VM web")
}

// TestKeepAcrossClockChanges: the calendar is that of the zone. A day of 25 hours
// has 25 hourly points and one daily, one of 23 hours likewise.
func TestKeepAcrossClockChanges(t *testing.T) {
	berlin := zone(t, "Europe/Berlin")
	for _, c := range []struct {
		day   time.Time
		hours int
	}{
		{time.Date(2026, 10, 25, 0, 0, 0, 0, berlin), 25},
		{time.Date(2026, 3, 29, 0, 0, 0, 0, berlin), 23},
	} {
		var points []store.Summary
		for at := c.day; at.Before(c.day.AddDate(0, 0, 2)); at = at.Add(20 * time.Minute) {
			points = append(points, pointAt("web", at, 1))
		}
		now := c.day.AddDate(0, 0, 3)
		hourly, daily := 0, 0
		for _, d := range backup.Keep(points, backup.Policy{Hourly: 1000, Daily: 1000, Zone: berlin}, now) {
			if d.Point.Time.In(berlin).Day() != c.day.Day() {
				continue
			}
			for _, r := range d.Reasons {
				if strings.HasPrefix(r, "hourly") {
					hourly++
				}
				if strings.HasPrefix(r, "daily") {
					daily++
				}
			}
		}
		if hourly != c.hours || daily != 1 {
			t.Errorf("%s: %d hourly points, want %d; %d daily", c.day.Format(time.DateOnly), hourly, c.hours, daily)
		}
	}
	// 23:30 UTC is the next day in Berlin.
	points := []store.Summary{
		pointAt("web", time.Date(2026, 11, 20, 23, 30, 0, 0, time.UTC), 1),
		pointAt("web", time.Date(2026, 11, 20, 22, 30, 0, 0, time.UTC), 1),
	}
	now := time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC)
	wantKept(t, backup.Keep(points, backup.Policy{Daily: 5, Zone: berlin}, now), berlin,
		"11-20 23:30: daily 2026-11-20", "11-21 00:30: daily 2026-11-21, newest good point of VM web")
	wantKept(t, backup.Keep(points, backup.Policy{Daily: 5}, now), time.UTC, "11-20 23:30: daily 2026-11-20, newest good point of VM web")
	// At midnight Sao Paulo went back to 23:00: that hour of the old day is there twice, the day once.
	paulo := zone(t, "America/Sao_Paulo")
	points = []store.Summary{
		pointAt("web", time.Date(2019, 2, 17, 1, 30, 0, 0, time.UTC), 1),
		pointAt("web", time.Date(2019, 2, 17, 2, 30, 0, 0, time.UTC), 1),
	}
	wantKept(t, backup.Keep(points, backup.Policy{Hourly: 5, Daily: 5, Zone: paulo}, now), paulo,
		"02-16 23:30: hourly 2019-02-16 23:00 -02",
		"02-16 23:30: hourly 2019-02-16 23:00 -03, daily 2019-02-16, newest good point of VM web")
}

// TestKeepISOWeeks: the first days of January may be of the last week of the year before.
func TestKeepISOWeeks(t *testing.T) {
	now := time.Date(2027, 2, 1, 0, 0, 0, 0, time.UTC)
	var points []store.Summary
	for i := range 8 { // 2026-12-30, a Wednesday, to 2027-01-06
		points = append(points, pointAt("web", time.Date(2026, 12, 30+i, 1, 0, 0, 0, time.UTC), 1))
	}
	wantKept(t, backup.Keep(points, backup.Policy{Weekly: 5, Yearly: 5}, now), time.UTC,
		"12-31 01:00: yearly 2026", "01-03 01:00: weekly 2026-W53", "01-06 01:00: weekly 2027-W01, yearly 2027, newest good point of VM web")
}

// TestKeepPerVM: each VM has rules and a newest good point of its own.
func TestKeepPerVM(t *testing.T) {
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	var points []store.Summary
	for i := range 3 {
		points = append(points, pointAt("web", now.Add(-time.Duration(i)*time.Hour), 1), pointAt("db", now.Add(-time.Duration(100+i)*time.Hour), 1))
	}
	got := backup.Keep(points, backup.Policy{Last: 1}, now)
	wantKept(t, got, time.UTC, "11-17 08:00: last 1 #1, newest good point of VM db", "11-21 12:00: last 1 #1, newest good point of VM web")
	if len(got) != 6 || got[0].Point.VM != "db" || got[5].Point.VM != "web" || !got[0].Point.Time.Before(got[1].Point.Time) {
		t.Errorf("decisions are not by VM, then from old to new: %+v", got)
	}
}

// TestKeepTags: a tag keeps a point, and points without the tags asked for are left alone.
func TestKeepTags(t *testing.T) {
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	at := func(h int) time.Time { return now.Add(-time.Duration(h) * time.Hour) }
	points := []store.Summary{
		pointAt("web", at(5), 1, "legal"), pointAt("web", at(4), 1, "nightly"), pointAt("web", at(3), 1, "nightly", "legal"),
		pointAt("web", at(2), 1, "nightly"), pointAt("web", at(1), 1),
	}
	wantKept(t, backup.Keep(points, backup.Policy{Last: 1, KeepTags: []string{"legal"}}, now), time.UTC,
		"11-21 07:00: tag legal", "11-21 09:00: tag legal", "11-21 11:00: last 1 #1, newest good point of VM web")
	wantKept(t, backup.Keep(points, backup.Policy{Last: 1, OnlyTags: []string{"nightly", "none"}}, now), time.UTC,
		"11-21 07:00: has none of the tags", "11-21 10:00: last 1 #1", "11-21 11:00: has none of the tags, newest good point of VM web")
}

// TestKeepNeverLosesTheLastGoodPoint: damaged points satisfy no rule and are not dropped.
func TestKeepNeverLosesTheLastGoodPoint(t *testing.T) {
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	bad := func(s store.Summary) store.Summary {
		s.Damaged = "checksum"
		return s
	}
	at := func(h int) time.Time { return now.Add(-time.Duration(h) * time.Hour) }
	points := []store.Summary{
		pointAt("web", at(4), 1), pointAt("web", at(3), 1), bad(pointAt("web", at(2), 1, "legal")), bad(pointAt("web", at(1), 1)),
	}
	wantKept(t, backup.Keep(points, backup.Policy{Last: 1, KeepTags: []string{"legal"}}, now), time.UTC,
		"11-21 09:00: last 1 #1, newest good point of VM web", "11-21 10:00: damaged", "11-21 11:00: damaged")
	// Only damaged ones: all stay. One that does not even say its VM, too.
	lost := store.Summary{ID: store.PointID{9}, Damaged: "header"}
	for _, d := range backup.Keep([]store.Summary{points[2], points[3], lost}, backup.Policy{Last: 1}, now) {
		if !d.Keep || !slices.Equal(d.Reasons, []string{"damaged"}) {
			t.Errorf("%+v", d)
		}
	}
}

// TestKeepLocked: a lock keeps a point until it ends, whatever else there is to say.
func TestKeepLocked(t *testing.T) {
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	locked := func(s store.Summary, until time.Time) store.Summary {
		s.LockedUntil = until
		return s
	}
	points := []store.Summary{
		locked(pointAt("web", now.Add(-4*time.Hour), 1), now.Add(time.Second)),
		locked(pointAt("web", now.Add(-3*time.Hour), 1), now),
		locked(pointAt("web", now.Add(-2*time.Hour), 1), now.Add(-time.Hour)),
		pointAt("web", now.Add(-time.Hour), 1),
	}
	wantKept(t, backup.Keep(points, backup.Policy{Last: 1}, now), time.UTC,
		"11-21 08:00: locked until 2026-11-21T12:00:01Z", "11-21 11:00: last 1 #1, newest good point of VM web")
}

// TestKeepFuture: points made while the clock was wrong push out nothing.
func TestKeepFuture(t *testing.T) {
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	points := []store.Summary{pointAt("web", now.AddDate(10, 0, 0), 1), pointAt("web", now.AddDate(10, 0, 1), 1)}
	for h := range 3 {
		points = append(points, pointAt("web", now.Add(-time.Duration(h)*time.Hour), 1))
	}
	wantKept(t, backup.Keep(points, backup.Policy{Last: 2, Within: backup.Duration{Hours: 1}}, now), time.UTC,
		"11-21 11:00: last 2 #2, within 1h", "11-21 12:00: last 2 #1, within 1h, newest good point of VM web",
		"11-21 12:00: its time is in the future", "11-22 12:00: its time is in the future")
	// All of them, as after the clock was set back.
	wantKept(t, backup.Keep(points[:2], backup.Policy{Last: 1}, now), time.UTC,
		"11-21 12:00: its time is in the future", "11-22 12:00: its time is in the future, newest good point of VM web")
}

// TestNewestGood takes the points in any order.
func TestNewestGood(t *testing.T) {
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	points := []store.Summary{pointAt("web", now.Add(-time.Hour), 1), pointAt("web", now, 1), pointAt("web", now, 2),
		pointAt("web", now.Add(time.Hour), 1), pointAt("db", now.Add(time.Hour), 1), pointAt("db", now.Add(2*time.Hour), 1), pointAt("bad", now, 1)}
	points[6].Damaged = "checksum"
	for seed := range uint64(50) {
		rand.New(rand.NewPCG(seed, 1)).Shuffle(len(points), func(i, j int) { points[i], points[j] = points[j], points[i] })
		got := backup.NewestGood(points, now)
		if len(got) != 2 || got["web"].Name != "2026-11-21T120000Z-2" || got["db"].Name != "2026-11-21T140000Z" {
			t.Fatalf("%+v", got)
		}
	}
}

// TestKeepEqualTimes: of points of one second the last made is the newest.
func TestKeepEqualTimes(t *testing.T) {
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	var points []store.Summary
	for n := 1; n <= 12; n++ { // the name of the tenth sorts before that of the second
		points = append(points, pointAt("web", now, n))
	}
	rand.New(rand.NewPCG(1, 1)).Shuffle(len(points), func(i, j int) { points[i], points[j] = points[j], points[i] })
	for _, p := range []backup.Policy{{Last: 1}, {Daily: 3}, {Hourly: 3}} {
		list := backup.Keep(points, p, now)
		for i, d := range list {
			if d.Keep != (i == 11) {
				t.Errorf("%+v: point %s is kept: %v", p, d.Point.Name, d.Keep)
			}
		}
		if list[11].Point.Name != store.PointName(now)+"-12" {
			t.Errorf("the last is %s", list[11].Point.Name)
		}
	}
}

// slowKeep decides on point i of points by looking at all others for every rule:
// a second opinion that shares no code with Keep. Times of points differ.
func slowKeep(points []store.Summary, i int, p backup.Policy, now time.Time) bool {
	s := points[i]
	tagged := func(s store.Summary, tags []string) bool {
		for _, a := range tags {
			for _, b := range s.Tags {
				if a == b {
					return true
				}
			}
		}
		return false
	}
	counts := func(o store.Summary) bool {
		return o.VM == s.VM && o.Damaged == "" && !o.Time.After(now) && (len(p.OnlyTags) == 0 || tagged(o, p.OnlyTags))
	}
	if !counts(s) || s.LockedUntil.After(now) {
		return true
	}
	newest, newestOfAll := true, true
	for _, o := range points {
		if counts(o) && o.Time.After(s.Time) {
			newest = false
		}
		if o.VM == s.VM && o.Damaged == "" && !o.Time.After(now) && o.Time.After(s.Time) {
			newestOfAll = false
		}
	}
	if newestOfAll || tagged(s, p.KeepTags) {
		return true
	}
	if d := p.Within; d != (backup.Duration{}) { // of days and hours only
		last := s.Time
		for _, o := range points {
			if counts(o) && o.Time.After(last) {
				last = o.Time
			}
		}
		if newest || !last.In(p.Zone).AddDate(0, 0, -d.Days).Add(-time.Duration(d.Hours)*time.Hour).After(s.Time) {
			return true
		}
	}
	for _, r := range []struct {
		limit int
		label func(time.Time) string
	}{
		{p.Last, func(t time.Time) string { return t.Format(time.RFC3339Nano) }},
		{p.Hourly, func(t time.Time) string { return t.Format("2006 01 02 15 -0700") }},
		{p.Daily, func(t time.Time) string { return t.Format("2006 01 02") }},
		{p.Weekly, func(t time.Time) string { // its Thursday names the week
			for t.Weekday() != time.Thursday {
				if t.Weekday() == time.Sunday || t.Weekday() > time.Thursday {
					t = t.AddDate(0, 0, -1)
				} else {
					t = t.AddDate(0, 0, 1)
				}
			}
			return t.Format("2006 01 02")
		}},
		{p.Monthly, func(t time.Time) string { return t.Format("2006 01") }},
		{p.Yearly, func(t time.Time) string { return t.Format("2006") }},
	} {
		if r.limit == 0 {
			continue
		}
		mine, later := r.label(s.Time.In(p.Zone)), map[string]bool{}
		for _, o := range points {
			if counts(o) && o.Time.After(s.Time) {
				later[r.label(o.Time.In(p.Zone))] = true
			}
		}
		if !later[mine] && (r.limit < 0 || len(later) < r.limit) {
			return true
		}
	}
	return false
}

// TestKeepAgainstReference: thousands of random histories and policies.
func TestKeepAgainstReference(t *testing.T) {
	zones := []*time.Location{time.UTC, zone(t, "Europe/Berlin"), zone(t, "Australia/Lord_Howe"), zone(t, "America/St_Johns"), zone(t, "Asia/Kathmandu")}
	rounds := 3000
	if testing.Short() {
		rounds = 300
	}
	decided, forgotten := 0, 0
	for round := range rounds {
		rnd := rand.New(rand.NewPCG(uint64(round), 7))
		now := time.Date(2024+rnd.IntN(4), time.Month(1+rnd.IntN(12)), 1+rnd.IntN(31), rnd.IntN(24), 0, 0, 0, time.UTC)
		spread := []int64{3600, 86400, 40 * 86400, 1000 * 86400}[rnd.IntN(4)]
		var points []store.Summary
		seen := map[int64]bool{}
		for range 1 + rnd.IntN(60) {
			back := rnd.Int64N(spread*4) - spread/10
			if seen[back] {
				continue
			}
			seen[back] = true
			s := pointAt([]string{"web", "db"}[rnd.IntN(2)], now.Add(-time.Duration(back)*time.Second), 1)
			for _, tag := range []string{"a", "b"} {
				if rnd.IntN(4) == 0 {
					s.Tags = append(s.Tags, tag)
				}
			}
			if rnd.IntN(10) == 0 {
				s.Damaged = "damaged"
			}
			if rnd.IntN(10) == 0 {
				s.LockedUntil = now.Add(time.Duration(rnd.IntN(3)-1) * time.Hour)
			}
			points = append(points, s)
		}
		limit := func() int { return []int{0, 0, 0, 1, 2, 5, 30, backup.All}[rnd.IntN(8)] }
		p := backup.Policy{Last: limit(), Hourly: limit(), Daily: limit(), Weekly: limit(), Monthly: limit(), Yearly: limit(), Zone: zones[rnd.IntN(len(zones))]}
		if rnd.IntN(3) == 0 {
			p.Within = backup.Duration{Days: rnd.IntN(40), Hours: 1 + rnd.IntN(50)}
		}
		if rnd.IntN(4) == 0 {
			p.KeepTags = []string{"a"}
		}
		if rnd.IntN(4) == 0 {
			p.OnlyTags = []string{"b", "c"}
		}
		before := slices.Clone(points)
		got := backup.Keep(points, p, now)
		if !reflect.DeepEqual(points, before) {
			t.Fatal("the points were changed")
		}
		at := map[store.PointID]int{}
		for i, s := range points {
			at[s.ID] = i
		}
		for _, d := range got {
			want := slowKeep(points, at[d.Point.ID], p, now)
			if d.Keep != want || d.Keep != (len(d.Reasons) > 0) {
				t.Fatalf("round %d: %+v now %s: %s %s is kept: %v (%q), want %v", round, p, now, d.Point.Path(), d.Point.Tags, d.Keep, d.Reasons, want)
			}
			decided++
			if !d.Keep {
				forgotten++
			}
		}
		if len(got) != len(points) {
			t.Fatalf("round %d: %d decisions on %d points", round, len(got), len(points))
		}
		rnd.Shuffle(len(points), func(i, j int) { points[i], points[j] = points[j], points[i] })
		if again := backup.Keep(points, p, now); !reflect.DeepEqual(got, again) {
			t.Fatalf("round %d: another order of the points decides otherwise", round)
		}
	}
	t.Logf("%d decisions, %d to forget", decided, forgotten)
}

// TestKeepManyPoints: the time is not quadratic. The figures are printed; the
// bound is far above them (0.2 s) and far below what n² takes (hours).
func TestKeepManyPoints(t *testing.T) {
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	for _, vms := range []int{1, 200} {
		var points []store.Summary
		for i := range 100_000 {
			points = append(points, pointAt(fmt.Sprint("vm", i%vms), now.Add(-time.Duration(i)*10*time.Minute), 1))
		}
		began := time.Now()
		list := backup.Keep(points, backup.Policy{Last: 10, Hourly: 48, Daily: 30, Weekly: backup.All, Monthly: 12, Yearly: 5, Zone: zone(t, "Europe/Berlin")}, now)
		took := time.Since(began)
		t.Logf("100,000 points of %d VMs: %.2fs, %d kept", vms, took.Seconds(), len(keptWhy(list, time.UTC)))
		if took > 30*time.Second {
			t.Errorf("%d VMs: it took %s", vms, took)
		}
	}
}
