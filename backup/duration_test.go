package backup_test

import (
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
)

func TestParseDuration(t *testing.T) {
	for _, c := range []struct {
		text string
		want backup.Duration
		err  string
	}{
		{"30d", backup.Duration{Days: 30}, ""},
		{"2w", backup.Duration{Weeks: 2}, ""},
		{"6m", backup.Duration{Months: 6}, ""},
		{"1y", backup.Duration{Years: 1}, ""},
		{"36h", backup.Duration{Hours: 36}, ""},
		{"1y6m", backup.Duration{Years: 1, Months: 6}, ""},
		{"12h2d", backup.Duration{Days: 2, Hours: 12}, ""},
		{"0y007d", backup.Duration{Days: 7}, ""},
		{"100y", backup.Duration{Years: 100}, ""},
		{"", backup.Duration{}, "it is empty"},
		{"0d", backup.Duration{}, "it is empty"},
		{"30", backup.Duration{}, "a number and one of"},
		{"d", backup.Duration{}, "a number and one of"},
		{"30 d", backup.Duration{}, "unknown unit ' '"},
		{"-30d", backup.Duration{}, "a number and one of"},
		{"30D", backup.Duration{}, "unknown unit 'D'"},
		{"30s", backup.Duration{}, "unknown unit 's'"},
		{"1d1d", backup.Duration{}, "unit 'd' twice"},
		{"101y", backup.Duration{}, "more than 100 years"},
		{"99999999999999999999h", backup.Duration{}, "more than 100 years"},
		{"1.5d", backup.Duration{}, "unknown unit '.'"},
		{"3٣d", backup.Duration{}, "unknown unit"}, // a digit, but none of ours
	} {
		got, err := backup.ParseDuration(c.text)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%q: %v, want %s", c.text, err, c.err)
			}
			continue
		}
		if err != nil || got != c.want {
			t.Errorf("%q: %+v, %v", c.text, got, err)
			continue
		}
		if again, err := backup.ParseDuration(got.String()); err != nil || again != got {
			t.Errorf("%q: %q reads as %+v, %v", c.text, got, again, err)
		}
	}
}

func zone(t testing.TB, name string) *time.Location {
	t.Helper()
	l, err := time.LoadLocation(name)
	if err != nil {
		t.Skip(err) // no time zones on this machine
	}
	return l
}

func TestDurationOnCalendar(t *testing.T) {
	berlin := zone(t, "Europe/Berlin")
	at := func(s string) time.Time {
		v, err := time.ParseInLocation("2006-01-02 15:04", s, berlin)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	for _, c := range []struct{ from, duration, after, before string }{
		{"2026-11-21 12:00", "30d", "2026-12-21 12:00", "2026-10-22 12:00"},
		{"2026-11-21 12:00", "1y6m", "2028-05-21 12:00", "2025-05-21 12:00"},
		{"2026-01-31 12:00", "1m", "2026-03-03 12:00", "2025-12-31 12:00"},
		{"2026-03-31 12:00", "1m", "2026-05-01 12:00", "2026-02-28 12:00"}, // never less than the month
		{"2028-02-29 12:00", "1y", "2029-03-01 12:00", "2027-02-28 12:00"},
		{"2026-01-15 12:00", "13m", "2027-02-15 12:00", "2024-12-15 12:00"},
		{"2026-03-29 12:00", "1d", "2026-03-30 12:00", "2026-03-28 12:00"}, // the clock was set at 2:00
		{"2026-03-29 12:00", "24h", "2026-03-30 12:00", "2026-03-28 11:00"},
		{"2026-10-26 01:00", "1d2h", "2026-10-27 03:00", "2026-10-24 23:00"},
	} {
		d, err := backup.ParseDuration(c.duration)
		if err != nil {
			t.Fatal(err)
		}
		if got := d.After(at(c.from)); !got.Equal(at(c.after)) {
			t.Errorf("%s after %s is %s, want %s", c.duration, c.from, got, c.after)
		}
		if got := d.Before(at(c.from)); !got.Equal(at(c.before)) {
			t.Errorf("%s before %s is %s, want %s", c.duration, c.from, got, c.before)
		}
	}
}

func FuzzParseDuration(f *testing.F) {
	f.Add("1y6m")
	f.Add("2w3d36h")
	from := time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, s string) {
		d, err := backup.ParseDuration(s)
		if err != nil {
			return
		}
		if again, err := backup.ParseDuration(d.String()); err != nil || again != d {
			t.Fatalf("%q: %+v, then %+v, %v", s, d, again, err)
		}
		if a, b := d.After(from), d.Before(from); !a.After(from) || !b.Before(from) || a.Year() > 9999 {
			t.Fatalf("%q: %s and %s", s, b, a)
		}
	})
}
