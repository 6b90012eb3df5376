//go:build linux

package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/store/extent"
)

func TestPlacesLieInAllocatedParts(t *testing.T) {
	b := &bench{extents: []extent.Extent{{Off: 4096, Len: 4096}, {Off: 200 << 10, Len: 600 << 10}}}
	for _, r := range rows {
		offsets := b.places(r)
		if len(offsets) != r.reads {
			t.Fatalf("%s: %d places", r.name, len(offsets))
		}
		for i, off := range offsets {
			in := false
			for _, e := range b.extents {
				in = in || extent.Intersect(e, extent.Extent{Off: off, Len: r.block}).Len == r.block
			}
			if !in || off%r.block != 0 {
				t.Fatalf("%s: reads at %d", r.name, off)
			}
			if b.places(r)[i] != off {
				t.Fatalf("%s: other places the second time", r.name)
			}
		}
	}
}

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		v    []float64
		want float64
	}{{nil, 0}, {[]float64{3}, 3}, {[]float64{9, 1, 2}, 2}, {[]float64{4, 1, 3, 2}, 2.5}} {
		if got := median(c.v); got != c.want {
			t.Errorf("median(%v) = %v", c.v, got)
		}
	}
}

// TestGoalTable: goals are judged against the best other program, in the right
// direction, and can be missed.
func TestGoalTable(t *testing.T) {
	r := &results{Tools: []toolVersion{{Name: "holdfast"}, {Name: "restic"}, {Name: "borg"}, {Name: "cp"}}}
	add := func(tool string, first, restore, sequential float64) {
		r.Samples = append(r.Samples, sample{Tool: tool, Step: stepFirst, Wall: first}, sample{Tool: tool, Step: stepRestore, Wall: restore, Sync: 0.5})
		r.Mounts = append(r.Mounts, mountSample{Tool: tool, FirstByte: 0.2, Sequential: sequential, Rows: []readSample{{P50: 0.2}, {}, {}}})
	}
	add("holdfast", 2, 2, 1200)
	add("restic", 8, 3, 300)
	add("borg", 7, 9, 400)
	r.Samples = append(r.Samples, sample{Tool: "cp", Step: stepRestore, Wall: 1.5, Sync: 0.5})
	var out bytes.Buffer
	if err := r.writeMarkdown(&out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"| first backup | borg 7 s | 2 s | 3.5× | 3× | yes |",
		"| restore | restic 3 s | 2 s | 1.5× | 2× | no |",
		"| mount, first byte | restic 0.2 s | 0.2 s | 1.0× | under 0.1 s | no |",
		"| sequential read | borg 400 MB/s | 1200 MB/s | 3.0× | at least 1000 MB/s | yes |",
		"| restore and sync | cp 1× = 2.00 s | 2.50 s | takes 1.25× | at most 1.3× | yes |",
	} {
		if !strings.Contains(out.String(), want+"\n") {
			t.Errorf("no line %q in\n%s", want, &out)
		}
	}
	if strings.Contains(out.String(), "next backup") {
		t.Error("a goal that was not measured is in the table")
	}
}
