package backup_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// TestCompare: a source that tracks changes is taken at its word until it is time to look; then what it did not name is found, said and backed up.
func TestCompare(t *testing.T) {
	for _, lie := range []bool{true, false} {
		t.Run(fmt.Sprint("lie ", lie), func(t *testing.T) {
			_, repo := newRepo(t, store.InitOptions{ChunkSize: 64 << 10})
			d := &memDisk{key: "a", data: make([]byte, 4<<20)}
			for i := range d.data {
				d.data[i] = byte(i >> 9 * 7)
			}
			snap := &memSnapshot{name: "vm", at: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), disks: []*memDisk{d}}
			round := 0
			next := func(hidden bool) *store.Point {
				t.Helper()
				now := snap.at.Add(time.Duration(round) * 24 * time.Hour)
				prev := d.change
				d.change = fmt.Sprint("change-", round)
				d.data[1<<20+round]++
				d.changed = map[string][]extent.Extent{prev: {{Off: 1 << 20, Len: 512}}}
				if hidden {
					d.data[3<<20+5]++
				}
				p, err := backup.Run(t.Context(), repo, snap, backup.Options{CompareEvery: backup.Duration{Days: 3}, Now: func() time.Time { return now }})
				if err != nil {
					t.Fatal(err)
				}
				round++
				return p
			}
			for i, want := range []string{"full: first backup of this disk", "changes", "changes", "full: its change tracking was compared with the disk", "changes"} {
				p := next(lie && i == 2)
				got := p.Disks[0]
				if got.Read != want {
					t.Errorf("round %d: read %q, want %q", i, got.Read, want)
				}
				if want == "changes" && p.Stats.Read > 1<<20 {
					t.Errorf("round %d read %d bytes", i, p.Stats.Read)
				}
				said := strings.Join(p.Warnings, "\n")
				if lie && i == 3 {
					if !strings.Contains(said, "65536 bytes had changed that the source did not name, the first at byte 3145728") {
						t.Errorf("of the change that was not named it says %q", said)
					}
				} else if said != "" {
					t.Errorf("round %d warns: %q", i, said)
				}
				if i >= 3 || !lie {
					wantDisk(t, repo, p, "disk0", d.data)
				}
			}
		})
	}
}
