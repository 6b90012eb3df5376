package backup

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/holdfast-backup/holdfast/store"
)

// All as the number of a rule of a Policy puts no limit to it.
const All = -1

// Policy says which points are kept. A point is kept when any rule keeps it, and
// every rule counts on its own: a point that one rule keeps takes its place in
// the others too. The zero Policy has no rule.
type Policy struct {
	Last int // that many of the newest points; All, or 0 for no such rule
	// The newest point of each of the last that many hours, days… that have one.
	// Weeks are those of ISO 8601.
	Hourly, Daily, Weekly, Monthly, Yearly int
	// Within keeps what is no older than this, counted back from the newest point
	// of the VM: when backups stop, it does not eat up those that there are.
	Within   Duration
	KeepTags []string // points with any of these tags are kept
	// OnlyTags are not a rule: with any, points that have none of them are kept
	// and take no place in any rule.
	OnlyTags []string
	Zone     *time.Location // whose hours, days… are meant; nil is UTC
}

// Empty reports whether the policy has no rule. It would keep the newest point
// of each VM alone, which nobody means: callers refuse it.
func (p *Policy) Empty() bool {
	return p.Last == 0 && p.Hourly == 0 && p.Daily == 0 && p.Weekly == 0 && p.Monthly == 0 && p.Yearly == 0 &&
		p.Within.IsZero() && len(p.KeepTags) == 0
}

// Decision is what a policy makes of one point.
type Decision struct {
	Point   store.Summary
	Keep    bool
	Reasons []string // all that keep it; none when it is to be forgotten
}

// Keep decides on each point, per VM, in time n log n. It has decisions by VM,
// then from old to new, whatever the order of points. Besides what the policy keeps:
//   - the newest good point of a VM, or, where none is good, the newest whose manifest can be
//     read. Good is a point with no known damage;
//   - a locked point;
//   - a point with a damaged manifest, since its time, tags and lock may be unknown. It takes no
//     place in any rule: a good one does instead;
//   - a point whose time is after now. It takes no place either, or else the points of a
//     day when the clock was wrong would push out all that are made after it.
//
// A point with damage on its disks (Hit) costs no good point its place: which good ones stay is
// the same as if it were not there. Most of it may be readable, and it may be healed, so rules have
// as many places again for such points: of a day without a good point, the newest damaged
// one stays. Past what a rule keeps of the good ones, to the old side, it keeps no damaged one either.
func Keep(points []store.Summary, p Policy, now time.Time) []Decision {
	all := make([]Decision, len(points))
	for i, s := range points {
		all[i].Point = s
	}
	slices.SortFunc(all, func(a, b Decision) int { return compare(&a.Point, &b.Point) })
	for begin := 0; begin < len(all); {
		end := begin + 1
		for end < len(all) && all[end].Point.VM == all[begin].Point.VM {
			end++
		}
		p.decide(all[begin:end], now)
		begin = end
	}
	return all
}

// compare orders points as listings do: by VM, then from old to new. Points of
// one second have names that grow in length.
func compare(a, b *store.Summary) int {
	return cmp.Or(cmp.Compare(a.VM, b.VM), a.Time.Compare(b.Time), cmp.Compare(len(a.Name), len(b.Name)),
		cmp.Compare(a.Name, b.Name), slices.Compare(a.ID[:], b.ID[:]))
}

// good reports whether nothing is known against a point.
func good(s *store.Summary) bool { return s.Damaged == "" && len(s.Hit) == 0 }

// NewestGood gives the newest good point of each VM, or, where none is good, the newest
// that can be read in part: the one that is forgotten only when somebody insists. Points after now are chosen only
// where there is no other.
func NewestGood(points []store.Summary, now time.Time) map[string]store.Summary { // VM => point
	newest := map[string]store.Summary{}
	for i := range points {
		s := &points[i]
		if s.Damaged != "" {
			continue
		}
		if best, ok := newest[s.VM]; !ok || better(s, &best, now) {
			newest[s.VM] = *s
		}
	}
	return newest
}

// better reports whether a is rather to be kept than b, of the same VM.
func better(a, b *store.Summary, now time.Time) bool {
	if good(a) != good(b) {
		return good(a)
	}
	if early, other := !a.Time.After(now), !b.Time.After(now); early != other {
		return early
	}
	return compare(a, b) > 0
}

// decide decides on the points of one VM, which are from old to new.
func (p *Policy) decide(list []Decision, now time.Time) {
	points := make([]store.Summary, len(list))
	for i := range list {
		points[i] = list[i].Point
	}
	newest, some := NewestGood(points, now)[points[0].VM]
	rules := p.rules()
	var since time.Time // of Within; zero until a point is seen
	// The good ones first: the others take what they leave.
	for _, hit := range []bool{false, true} {
		for i := range slices.Backward(list) {
			d := &list[i]
			s := &d.Point
			if len(s.Hit) > 0 != hit {
				continue
			}
			why := func(format string, a ...any) { d.Reasons = append(d.Reasons, fmt.Sprintf(format, a...)) }
			switch {
			case s.Damaged != "":
				why("damaged")
			case s.Time.After(now):
				why("its time is in the future")
			case len(p.OnlyTags) > 0 && !slices.ContainsFunc(p.OnlyTags, hasTag(s)):
				why("has none of the tags")
			default:
				at := s.Time.In(p.zone())
				for r := range rules {
					take := rules[r].take
					if hit {
						take = rules[r].takeHit
					}
					if reason := take(at); reason != "" {
						why("%s", reason)
					}
				}
				if !p.Within.IsZero() {
					if since.IsZero() {
						since = p.Within.Before(at)
					}
					if !s.Time.Before(since) {
						why("within %s", p.Within)
					}
				}
				for _, t := range p.KeepTags {
					if hasTag(s)(t) {
						why("tag %s", t)
					}
				}
			}
			if s.LockedUntil.After(now) {
				why("locked until %s", s.LockedUntil.UTC().Format(time.RFC3339))
			}
			switch {
			case !some || s.ID != newest.ID:
			case hit:
				why("newest point of VM %s, none is good", s.VM)
			default:
				why("newest good point of VM %s", s.VM)
			}
			d.Keep = len(d.Reasons) > 0
		}
	}
}

func hasTag(s *store.Summary) func(string) bool {
	return func(tag string) bool { return slices.Contains(s.Tags, tag) }
}

func (p *Policy) zone() *time.Location { return cmp.Or(p.Zone, time.UTC) }

// rule keeps the newest point of each of its buckets.
type rule struct {
	limit  int // buckets; negative: all
	bucket func(t time.Time) [4]int
	reason func(t time.Time, n int) string
	taken  map[[4]int]bool // by good points
	oldest time.Time       // of those
	hit    map[[4]int]bool // taken by damaged points
}

// rules are those of the policy that keep anything.
func (p *Policy) rules() []rule {
	seen := 0
	named := func(name, layout string) func(time.Time, int) string {
		return func(t time.Time, _ int) string { return name + " " + t.Format(layout) }
	}
	all := []rule{
		{limit: p.Last, bucket: func(time.Time) [4]int {
			seen++
			return [4]int{seen} // each point has one of its own
		}, reason: func(_ time.Time, n int) string {
			if p.Last < 0 {
				return fmt.Sprintf("last #%d", n)
			}
			return fmt.Sprintf("last %d #%d", p.Last, n)
		}},
		{limit: p.Hourly, bucket: func(t time.Time) [4]int {
			// The hour that a clock set back shows twice is two hours.
			_, offset := t.Zone()
			return [4]int{t.Year(), t.YearDay(), t.Hour(), offset}
		}, reason: named("hourly", "2006-01-02 15:00 MST")},
		{limit: p.Daily, bucket: func(t time.Time) [4]int { return [4]int{t.Year(), t.YearDay()} }, reason: named("daily", "2006-01-02")},
		{limit: p.Weekly, bucket: func(t time.Time) [4]int {
			year, week := t.ISOWeek()
			return [4]int{year, week}
		}, reason: func(t time.Time, _ int) string {
			year, week := t.ISOWeek()
			return fmt.Sprintf("weekly %04d-W%02d", year, week)
		}},
		{limit: p.Monthly, bucket: func(t time.Time) [4]int { return [4]int{t.Year(), int(t.Month())} }, reason: named("monthly", "2006-01")},
		{limit: p.Yearly, bucket: func(t time.Time) [4]int { return [4]int{t.Year()} }, reason: named("yearly", "2006")},
	}
	all = slices.DeleteFunc(all, func(r rule) bool { return r.limit == 0 })
	for i := range all {
		all[i].taken, all[i].hit = map[[4]int]bool{}, map[[4]int]bool{}
	}
	return all
}

// take gives the reason to keep a point, "" when the rule has none. It is asked
// for the points from new to old. Buckets are looked up and not only compared with the
// last one: where a clock is set back over midnight, days are not in order.
func (r *rule) take(t time.Time) string {
	if r.limit > 0 && len(r.taken) == r.limit {
		return ""
	}
	b := r.bucket(t)
	if r.taken[b] {
		return ""
	}
	r.taken[b], r.oldest = true, t
	return r.reason(t, len(r.taken))
}

// takeHit is take for damaged points, once all good ones were asked for. They have places of
// their own, where no good point is.
func (r *rule) takeHit(t time.Time) string {
	full := r.limit > 0 && len(r.taken) == r.limit
	if full && t.Before(r.oldest) || r.limit > 0 && len(r.hit) == r.limit {
		return ""
	}
	b := r.bucket(t)
	if r.taken[b] || r.hit[b] {
		return ""
	}
	r.hit[b] = true
	return r.reason(t, len(r.hit)) + " of the damaged"
}
