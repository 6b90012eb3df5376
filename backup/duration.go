package backup

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// Duration is a stretch of the calendar, as "keep within" and locks take it. What
// a year, a month or a day is depends on where on the calendar it is counted from.
type Duration struct {
	Years, Months, Weeks, Days, Hours int // none negative
}

// maxHours bounds each part of a duration to a century: a lock cannot be taken
// back, and a time after the year 9999 has no form in RFC 3339.
const maxHours = 100 * 366 * 24

// units are the parts of a duration, from long to short.
func (d *Duration) units() []unit {
	return []unit{{'y', &d.Years, 366 * 24}, {'m', &d.Months, 31 * 24}, {'w', &d.Weeks, 7 * 24}, {'d', &d.Days, 24}, {'h', &d.Hours, 1}}
}

type unit struct {
	letter byte
	n      *int
	hours  int // at most
}

// ParseDuration reads 30d, 2w, 6m (months), 1y, 36h and combinations such as
// 1y6m, each unit at most once. A duration of nothing is an error.
func ParseDuration(s string) (d Duration, err error) {
	rest := s
	for rest != "" {
		n, digits := 0, 0
		for digits < len(rest) && rest[digits] >= '0' && rest[digits] <= '9' {
			if n = n*10 + int(rest[digits]-'0'); n > maxHours {
				return Duration{}, fmt.Errorf("duration %q: more than 100 years", s)
			}
			digits++
		}
		if digits == 0 || digits == len(rest) {
			return Duration{}, fmt.Errorf("duration %q: a number and one of y, m (months), w, d, h are wanted, such as 30d or 1y6m", s)
		}
		if err := d.set(rest[digits], n); err != nil {
			return Duration{}, fmt.Errorf("duration %q: %w", s, err)
		}
		rest = rest[digits+1:]
	}
	if d == (Duration{}) {
		return d, fmt.Errorf("duration %q: it is empty", s)
	}
	return d, nil
}

func (d *Duration) set(letter byte, n int) error {
	for _, u := range d.units() {
		switch {
		case u.letter != letter:
		case *u.n != 0:
			return fmt.Errorf("unit %q twice", letter)
		case n > maxHours/u.hours:
			return errors.New("more than 100 years")
		default:
			*u.n = n
			return nil
		}
	}
	return fmt.Errorf("unknown unit %q", letter)
}

// IsZero reports whether it is no time at all.
func (d Duration) IsZero() bool { return d == Duration{} }

// String is the form that ParseDuration reads.
func (d Duration) String() string {
	var b strings.Builder
	for _, u := range d.units() {
		if *u.n != 0 {
			fmt.Fprintf(&b, "%d%c", *u.n, u.letter)
		}
	}
	return b.String()
}

// After is the time d later than t, on the calendar of t's location. Where that
// month has no such day it is one of the next month: 31 January and 1m is 3 March.
func (d Duration) After(t time.Time) time.Time {
	return t.AddDate(d.Years, d.Months, 7*d.Weeks+d.Days).Add(time.Duration(d.Hours) * time.Hour)
}

// Before is the time d earlier than t, on the calendar of t's location. Where
// that month has no such day it is its last: like After, the longer reading.
func (d Duration) Before(t time.Time) time.Time {
	year, month, day := t.Date()
	year, month = year-d.Years, month-time.Month(d.Months)
	last := time.Date(year, month+1, 0, 0, 0, 0, 0, time.UTC).Day()
	day = min(day, last) - 7*d.Weeks - d.Days
	return time.Date(year, month, day, t.Hour(), t.Minute(), t.Second(), t.Nanosecond(), t.Location()).
		Add(-time.Duration(d.Hours) * time.Hour)
}
