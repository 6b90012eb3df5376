package backup_test

import (
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
)

// TestLockIsCountedFromTheLaterOf: the clock and the newest point of the
// repository, whichever VM it is of. The lock is in the manifest and in the listing.
func TestLockIsCountedFromTheLaterOf(t *testing.T) {
	b, repo := newRepo(t, store.InitOptions{})
	at := time.Date(2026, 1, 31, 12, 0, 0, 700, time.UTC)
	run := func(vm string, now time.Time, lock backup.Duration) *store.Point {
		t.Helper()
		snap := &memSnapshot{name: vm, at: now, disks: []*memDisk{{key: "a", data: make([]byte, 1000)}}}
		p, err := backup.Run(t.Context(), repo, snap, backup.Options{LockFor: lock, Now: func() time.Time { return now }})
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	open := run("web", at, backup.Duration{})
	first := run("web", at, backup.Duration{Days: 30})
	setBack := run("db", at.AddDate(-2, 0, 0), backup.Duration{Months: 1})
	later := run("db", at.AddDate(0, 0, 1), backup.Duration{Hours: 36})

	for _, c := range []struct {
		p    *store.Point
		want time.Time
	}{
		{open, time.Time{}},
		{first, time.Date(2026, 3, 2, 12, 0, 1, 0, time.UTC)}, // rounded up
		{setBack, time.Date(2026, 3, 3, 12, 0, 0, 0, time.UTC)},
		{later, time.Date(2026, 2, 3, 0, 0, 1, 0, time.UTC)},
	} {
		if !c.p.LockedUntil.Equal(c.want) {
			t.Errorf("%s is locked until %s, want %s", c.p.Path(), c.p.LockedUntil, c.want)
		}
		for name, r := range map[string]*store.Repo{"open": repo, "opened anew": openRepo(t, b)} {
			m, err := r.Point(t.Context(), c.p.ID)
			if err != nil || !m.LockedUntil.Equal(c.want) {
				t.Errorf("%s: manifest of %s: %s, %v", name, c.p.Path(), m.LockedUntil, err)
			}
			s, err := r.Find(t.Context(), c.p.ID.String())
			if err != nil || !s.LockedUntil.Equal(c.want) {
				t.Errorf("%s: summary of %s: %s, %v", name, c.p.Path(), s.LockedUntil, err)
			}
		}
	}
	if len(first.Warnings) != 0 || len(later.Warnings) != 0 {
		t.Errorf("warnings %q, %q", first.Warnings, later.Warnings)
	}
	if len(setBack.Warnings) != 1 || !strings.Contains(setBack.Warnings[0], "the clock says 2024-01-31T12:00:00Z, but the newest point is of 2026-01-31T12:00:00Z") {
		t.Errorf("a clock set back gives the warnings %q", setBack.Warnings)
	}
}
