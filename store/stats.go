package store

import (
	"context"
	"fmt"
	"time"
)

// RepoStats sums up a repository.
type RepoStats struct {
	VMs    int   `json:"vms"`
	Points int   `json:"points"`
	Packs  int   `json:"packs"`
	Total  int64 `json:"bytes_total"`  // disks of all points together
	Stored int64 `json:"bytes_stored"` // size of all packs
}

// Stats sums up the repository from its index.
func (r *Repo) Stats(ctx context.Context) (RepoStats, error) {
	l, err := r.list(ctx)
	if err != nil {
		return RepoStats{}, err
	}
	s := RepoStats{VMs: len(l.byVM)}
	for _, list := range l.byVM {
		s.Points += len(list)
		for _, p := range list {
			s.Total += p.Total
		}
	}
	for p, err := range r.index.Packs(ctx) {
		if err != nil {
			return s, fmt.Errorf("store: %w", err)
		}
		s.Packs++
		s.Stored += p.Size
	}
	return s, nil
}

// VMsOf sums up points, in the order of a listing, by their VMs: all but Data and Unique.
func VMsOf(points []Summary) []VMUsage {
	var list []VMUsage
	for i := range points {
		p := &points[i]
		if p.VM == "" {
			continue // its manifest is damaged
		}
		if n := len(list); n == 0 || list[n-1].VM != p.VM {
			list = append(list, VMUsage{VM: p.VM, First: p.Time})
		}
		v := &list[len(list)-1]
		v.Points++
		v.Last, v.Size = p.Time, p.Total
		v.Total += p.Total
		v.Stored += p.Stored
	}
	return list
}

// Period is a part of the calendar that growth is counted by.
type Period string

// The periods.
const (
	ByDay   Period = "day"
	ByWeek  Period = "week" // ISO 8601
	ByMonth Period = "month"
	ByYear  Period = "year"
)

// Growth is what the points of one period added when they were made. Points that
// were forgotten since do not count.
type Growth struct {
	Period string `json:"period"` // 2026-11-21, 2026-W47, 2026-11 or 2026
	Points int    `json:"points"`
	New    int64  `json:"bytes_new"`    // in chunks that the repository did not hold
	Stored int64  `json:"bytes_stored"` // those compressed and encrypted
	Sum    int64  `json:"bytes_sum"`    // Stored of this period and all before
}

// PeriodOf picks one in which the time that points span is at most about 30 periods.
func PeriodOf(points []Summary) Period {
	var first, last time.Time
	for i := range points {
		t := points[i].Time
		if points[i].VM == "" {
			continue // its manifest is damaged: the time is unknown
		}
		if first.IsZero() || t.Before(first) {
			first = t
		}
		if t.After(last) {
			last = t
		}
	}
	const day = 24 * time.Hour
	switch span := last.Sub(first); {
	case span <= 31*day:
		return ByDay
	case span <= 30*7*day:
		return ByWeek
	case span <= 30*31*day:
		return ByMonth
	}
	return ByYear
}

// GrowthOf counts points by the calendar of zone, from the first period that has one to the
// last, with those in between that have none.
func GrowthOf(points []Summary, by Period, zone *time.Location) []Growth {
	sums := map[time.Time]*Growth{} // beginning of the period => what came in it
	var first, last time.Time
	for i := range points {
		p := &points[i]
		if p.VM == "" {
			continue
		}
		at := by.begin(p.Time.In(zone))
		if sums[at] == nil {
			sums[at] = &Growth{}
		}
		g := sums[at]
		g.Points++
		g.New += p.New
		g.Stored += p.Stored
		if first.IsZero() || at.Before(first) {
			first = at
		}
		if at.After(last) {
			last = at
		}
	}
	list := []Growth{}
	if len(sums) == 0 {
		return list
	}
	sum := int64(0)
	const most = 100_000 // a clock that was wrong once makes no endless list
	for at := first; !at.After(last) && len(list) < most; at = by.next(at) {
		g := Growth{Period: by.name(at)}
		if s := sums[at]; s != nil {
			g.Points, g.New, g.Stored = s.Points, s.New, s.Stored
		}
		sum += g.Stored
		g.Sum = sum
		list = append(list, g)
	}
	return list
}

// begin is when the period of t begins. All of them are midnights, so that they can be compared.
func (by Period) begin(t time.Time) time.Time {
	y, m, d := t.Date()
	switch by {
	case ByYear:
		m, d = 1, 1
	case ByMonth:
		d = 1
	case ByWeek:
		d -= (int(t.Weekday()) + 6) % 7 // from Monday
	}
	return time.Date(y, m, d, 0, 0, 0, 0, time.UTC)
}

func (by Period) next(t time.Time) time.Time {
	switch by {
	case ByYear:
		return t.AddDate(1, 0, 0)
	case ByMonth:
		return t.AddDate(0, 1, 0)
	case ByWeek:
		return t.AddDate(0, 0, 7)
	}
	return t.AddDate(0, 0, 1)
}

func (by Period) name(t time.Time) string {
	switch by {
	case ByYear:
		return t.Format("2006")
	case ByMonth:
		return t.Format("2006-01")
	case ByWeek:
		y, w := t.ISOWeek()
		return fmt.Sprintf("%04d-W%02d", y, w)
	}
	return t.Format(time.DateOnly)
}
