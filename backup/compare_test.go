package backup_test

import (
	"bytes"
	"context"
	"fmt"
	"iter"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/extent"
	"github.com/holdfast-backup/holdfast/store/remote/agent"
)

// TestCompare: a source that tracks changes is taken at its word until it is time to look; then what it did not name is found, said and backed up.
func TestCompare(t *testing.T) {
	for _, c := range []struct{ lie, away bool }{{true, false}, {false, false}, {true, true}} {
		t.Run(fmt.Sprintf("%+v", c), func(t *testing.T) {
			_, repo := newRepo(t, store.InitOptions{ChunkSize: 64 << 10})
			lie, to := c.lie, backup.Local(repo)
			if c.away {
				client, _ := newAgent(t, repo, serveAgents(t, repo, agent.ServerOptions{}))
				to = backup.Away(client)
			}
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
				p, err := backup.RunTo(t.Context(), to, snap, backup.Options{CompareEvery: backup.Duration{Days: 3}, Now: func() time.Time { return now }})
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
					if !strings.Contains(said, "65536 bytes had changed that the source did not name, at 3145728+65536;") {
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

// trackedDisk is a disk of which the source says something else than it shows itself.
type trackedDisk struct {
	*memDisk
	says, shows []extent.Extent // what is allocated
}

func (d *trackedDisk) Extents(ctx context.Context, since string) iter.Seq2[extent.Extent, error] {
	if since == "" {
		return extent.All(d.says)
	}
	return d.memDisk.Extents(ctx, since)
}

func (d *trackedDisk) Whole(context.Context) iter.Seq2[extent.Extent, error] {
	return extent.All(d.shows)
}

// trackedSnapshot is a VM with one such disk.
type trackedSnapshot struct {
	*memSnapshot
	disk *trackedDisk
}

func (s trackedSnapshot) Disks() []backup.Disk { return []backup.Disk{s.disk} }

// TestComparedLies: what a source may be wrong about, on a disk of which a part is left out, and what a comparison says of that: the areas, and not one that is
// only left out. The point is right.
func TestComparedLies(t *testing.T) {
	const chunk, data, hole = 128 << 10, 7<<20 + 256<<10, 7<<20 + 512<<10 // places behind the swap area: with data, and from where on there is none
	whole := []extent.Extent{{Len: swapBig}}
	used := []extent.Extent{{Len: hole}}
	const unnamed, unknown = "bytes had changed that the source did not name, at ", "bytes hold data where the source says that nothing is allocated, at "
	for _, c := range []struct {
		name   string
		before func(d *trackedDisk) // the first point
		after  func(d *trackedDisk) // it
		want   []string             // warnings, each after the number of bytes
	}{
		{name: "nothing"},
		{name: "what it names", after: func(d *trackedDisk) {
			d.data[data]++
			d.changed["0"] = []extent.Extent{{Off: data, Len: 1}}
		}},
		{name: "a change", after: func(d *trackedDisk) { d.data[data]++ }, want: []string{fmt.Sprintf("%d %s%d+%d;", chunk, unnamed, data, chunk)}},
		{name: "zeros, which are read", after: func(d *trackedDisk) { clear(d.data[data:][:chunk]) }, want: []string{fmt.Sprintf("%d %s%d+%d;", chunk, unnamed, data, chunk)}},
		{name: "zeros, which are not read", after: func(d *trackedDisk) {
			clear(d.data[data:][:chunk])
			d.shows = []extent.Extent{{Len: data}, {Off: data + chunk, Len: swapBig - data - chunk}}
		}, want: []string{fmt.Sprintf("%d %s%d+%d;", chunk, unnamed, data, chunk)}},
		{name: "zeros that it names", after: func(d *trackedDisk) {
			clear(d.data[data:][:chunk])
			d.shows = []extent.Extent{{Len: data}, {Off: data + chunk, Len: swapBig - data - chunk}}
			d.changed["0"] = []extent.Extent{{Off: data, Len: chunk}}
		}},
		{name: "zeros at the end and before the swap area", after: func(d *trackedDisk) {
			clear(d.data[swapAt-chunk : swapAt])
			clear(d.data[data:])
			d.shows = []extent.Extent{{Len: swapAt - chunk}, {Off: swapAt, Len: data - swapAt}}
		}, want: []string{fmt.Sprintf("%d %s%d+%d, %d+%d;", 3*chunk, unnamed, swapAt-chunk, chunk, data, 2*chunk)}},
		{name: "that something is allocated", after: func(d *trackedDisk) {
			d.data[hole]++
			d.changed["0"] = []extent.Extent{{Off: hole, Len: 1}}
		}, want: []string{fmt.Sprintf("%d %s%d+%d;", chunk, unknown, hole, chunk)}},
		{name: "the same from the beginning", before: func(d *trackedDisk) { d.data[hole]++ }, want: []string{
			fmt.Sprintf("%d %s%d+%d;", chunk, unnamed, hole, chunk), fmt.Sprintf("%d %s%d+%d;", chunk, unknown, hole, chunk)}},
		{name: "what is left out", after: func(d *trackedDisk) { clear(d.data[4<<20 : 5<<20]) }},
		{name: "what is left out no longer", after: func(d *trackedDisk) {
			mark(d.data, false)
			d.changed["0"] = []extent.Extent{{Off: swapAt, Len: 4096}}
		}},
		{name: "what is left out now", before: func(d *trackedDisk) { mark(d.data, false) }, after: func(d *trackedDisk) {
			mark(d.data, true)
			d.changed["0"] = []extent.Extent{{Off: swapAt, Len: 4096}}
		}},
		{name: "more than is said", before: func(d *trackedDisk) { mark(d.data, false) }, after: func(d *trackedDisk) {
			for i := range 10 {
				d.data[2<<20+2*i*chunk]++
			}
		}, want: []string{fmt.Sprintf("%d %s%d+%d, ", 10*chunk, unnamed, 2<<20, chunk)}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, r := newRepo(t, store.InitOptions{})
			d := &trackedDisk{&memDisk{key: "a", data: swapDisk(true), change: "0", changed: map[string][]extent.Extent{"0": nil, "1": nil}}, used, whole}
			clear(d.data[hole:])
			do := func(f func(d *trackedDisk)) {
				if f != nil {
					f(d)
				}
			}
			run := func(day int) *store.Point {
				t.Helper()
				at := time.Date(2026, 1, 1+day, 0, 0, 0, 0, time.UTC)
				p, err := backup.Run(t.Context(), r, trackedSnapshot{&memSnapshot{name: "vm", at: at}, d}, backup.Options{
					Exclude: backup.Exclude{Swap: true}, CompareEvery: backup.Duration{Days: 3}, Now: func() time.Time { return at }})
				if err != nil {
					t.Fatal(err)
				}
				return p
			}
			do(c.before)
			run(0)
			do(c.after)
			d.change = "1"
			p := run(3)
			if p.Disks[0].Read != "full: its change tracking was compared with the disk" {
				t.Fatalf("read: %s", p.Disks[0].Read)
			}
			want := slices.Clone(d.data)
			if p.Disks[0].LeftOut != nil {
				want = withoutSwap(d.data)
			}
			wantDisk(t, r, p, "disk0", want)
			if len(p.Warnings) != len(c.want) {
				t.Errorf("it says %q", p.Warnings)
			}
			for i, w := range p.Warnings {
				if i >= len(c.want) || !strings.HasPrefix(w, "disk0: change tracking was wrong: "+c.want[i]) {
					t.Errorf("it says %q, want %q", w, c.want)
				}
				if named := strings.Count(w, "+"); (named > 2) != (c.name == "more than is said") || named > 2 && (named != 8 || !strings.Contains(w, ", …;")) {
					t.Errorf("it says %q", w)
				}
			}
			// It is not due any more.
			d.change = "2"
			if p = run(5); p.Disks[0].Read != "changes" || p.Stats.Read > 0 || len(p.Warnings) > 0 {
				t.Errorf("the next one: %s, %d bytes, %q", p.Disks[0].Read, p.Stats.Read, p.Warnings)
			}
		})
	}
}

// TestComparedGone: a disk of several pages that is empty now, of which the source says nothing.
func TestComparedGone(t *testing.T) {
	const size = 40<<20 + 512
	_, r := newRepo(t, store.InitOptions{ChunkSize: 64 << 10})
	d := &trackedDisk{&memDisk{key: "a", data: bytes.Repeat([]byte("x"), size), change: "0", changed: map[string][]extent.Extent{"0": nil}}, []extent.Extent{{Len: size}}, nil}
	for day := range 2 {
		at := time.Date(2026, 1, 1+3*day, 0, 0, 0, 0, time.UTC)
		p, err := backup.Run(t.Context(), r, trackedSnapshot{&memSnapshot{name: "vm", at: at}, d}, backup.Options{CompareEvery: backup.Duration{Days: 3}, Now: func() time.Time { return at }})
		if err != nil {
			t.Fatal(err)
		}
		wantDisk(t, r, p, "disk0", d.data)
		if want := fmt.Sprintf("%d bytes had changed that the source did not name, at 0+%d;", size, size); day == 1 && (len(p.Warnings) != 1 || !strings.Contains(p.Warnings[0], want)) {
			t.Errorf("it says %q, want %q", p.Warnings, want)
		}
		clear(d.data)
		d.change = "1"
	}
}
