//go:build linux

package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
)

// writeMarkdown prints the tables.
func (r *results) writeMarkdown(w io.Writer) error {
	var b strings.Builder
	r.header(&b)
	r.stepTable(&b)
	if len(r.Mounts) > 0 {
		r.mountTable(&b)
	}
	r.goalTable(&b)
	_, err := io.WriteString(w, b.String())
	return err
}

func (r *results) header(b *strings.Builder) {
	fmt.Fprintf(b, "## Benchmark of %s\n\n", r.Date.Format("2006-01-02 15:04 MST"))
	fmt.Fprintf(b, "* %s, %d cores, %.0f GiB; %s, %s, %s\n", r.Host.CPU, r.Host.Cores, float64(r.Host.Memory)/(1<<30), r.Host.System, r.Host.Kernel, r.Host.Go)
	fmt.Fprintf(b, "* load average %s at the start, %s at the end; %.0f s in all; ", r.LoadStart, r.LoadEnd, r.Seconds)
	if r.Cold {
		fmt.Fprint(b, "caches dropped before every step\n")
	} else {
		fmt.Fprint(b, "**caches not dropped (no root)**\n")
	}
	fmt.Fprintf(b, "* image: %s MiB, v1 %s and v2 %s allocated, %s changed (%.2f %%)\n",
		inMiB(r.Image.Size), inMiB(r.Image.V1), inMiB(r.Image.V2), inMiB(r.Image.Changed), 100*float64(r.Image.Changed)/float64(r.Image.Size))
	for _, t := range r.Tools {
		fmt.Fprintf(b, "* %s: %s\n", t.Name, t.Version)
	}
	fmt.Fprintf(b, "* medians of %d (min–max) [CPU seconds]\n\n", r.passes())
}

func (r *results) passes() int {
	n := 0
	for _, s := range r.Samples {
		n = max(n, s.Pass+1)
	}
	return n
}

// stepTable has a line per program: the four steps and the sizes.
func (r *results) stepTable(b *strings.Builder) {
	grown := r.mostPoints() > 3
	fmt.Fprint(b, "| program | first s | MiB | next s | +MiB | unchanged s | restore s | with sync s | RSS MiB |")
	if grown {
		fmt.Fprintf(b, " MiB after %d points |", r.mostPoints())
	}
	fmt.Fprint(b, "\n|---|---|---|---|---|---|---|---|---|"+strings.Repeat("---|", map[bool]int{true: 1}[grown])+"\n")
	for _, t := range r.Tools {
		first, second := r.size(t.Name, 1), r.size(t.Name, 2)
		fmt.Fprintf(b, "| %s | %s | %s | %s | %s | %s | %s | %s | %s |", t.Name,
			r.cell(t.Name, stepFirst), inMiB(first), r.cell(t.Name, stepNext), inMiB(second-first),
			r.cell(t.Name, stepUnchanged), r.cell(t.Name, stepRestore), seconds(r.walls(t.Name, stepRestore, true)), inMiB(r.rss(t.Name)))
		if grown {
			fmt.Fprintf(b, " %s |", inMiB(r.size(t.Name, r.mostPoints())))
		}
		fmt.Fprintln(b)
	}
	fmt.Fprintln(b)
}

func (r *results) mountTable(b *strings.Builder) {
	fmt.Fprint(b, "| mount | first byte s |")
	for _, row := range rows {
		fmt.Fprintf(b, " %s ms: p50 / mean / p99 (MB/s) |", row.name)
	}
	fmt.Fprint(b, " sequential MB/s | RSS MiB |\n|---|---|"+strings.Repeat("---|", len(rows)+2)+"\n")
	for _, t := range r.Tools {
		if len(r.ofMount(t.Name, func(m mountSample) float64 { return 0 })) == 0 {
			continue
		}
		fmt.Fprintf(b, "| %s | %.3f |", t.Name, median(r.ofMount(t.Name, firstByteOf)))
		for i := range rows {
			get := func(f func(readSample) float64) float64 {
				return median(r.ofMount(t.Name, func(m mountSample) float64 { return f(m.Rows[i]) }))
			}
			fmt.Fprintf(b, " %.2f / %.2f / %.1f (%.0f) |",
				get(func(s readSample) float64 { return s.P50 }), get(func(s readSample) float64 { return s.Mean }),
				get(func(s readSample) float64 { return s.P99 }), get(func(s readSample) float64 { return s.Rate }))
		}
		fmt.Fprintf(b, " %.0f | %.0f |\n", median(r.ofMount(t.Name, sequentialOf)),
			median(r.ofMount(t.Name, func(m mountSample) float64 { return float64(m.RSS) / (1 << 20) })))
	}
	fmt.Fprintln(b)
}

func firstByteOf(m mountSample) float64  { return m.FirstByte }
func sequentialOf(m mountSample) float64 { return m.Sequential }
func small50Of(m mountSample) float64    { return m.Rows[0].P50 }

// goal is one line of the design's "What fast means".
type goal struct {
	work       string
	unit       string
	of         func(tool string) float64 // the figure of a program; 0 for none
	times      float64                   // at least so many times better than the best other; 0 for any
	absolute   float64                   // at least this figure; 0 for none
	moreIsGood bool
}

func (r *results) goals() []goal {
	wall := func(step string) func(string) float64 {
		return func(tool string) float64 { return median(r.walls(tool, step, false)) }
	}
	mount := func(f func(mountSample) float64) func(string) float64 {
		return func(tool string) float64 { return median(r.ofMount(tool, f)) }
	}
	gs := []goal{
		{work: "first backup", unit: "s", of: wall(stepFirst), times: 3},
		{work: "next backup, no change tracking", unit: "s", of: wall(stepNext), times: 5},
		{work: "restore", unit: "s", of: wall(stepRestore), times: 2},
		{work: "mount, first byte", unit: "s", of: mount(firstByteOf), absolute: 0.1},
		{work: "4 KiB random read, p50", unit: "ms", of: mount(small50Of), absolute: 0.25},
		{work: "sequential read", unit: "MB/s", of: mount(sequentialOf), absolute: 1000, moreIsGood: true},
	}
	if n := r.mostPoints(); n > 3 {
		size := func(tool string) float64 { return float64(r.size(tool, n)) / (1 << 20) }
		gs = append(gs, goal{work: fmt.Sprintf("repository after %d points", n), unit: "MiB", of: size, times: 1})
	}
	return gs
}

// goalTable compares Holdfast with the best of the others, where it was measured.
func (r *results) goalTable(b *strings.Builder) {
	const us, baseline = "holdfast", "cp"
	if len(r.walls(us, stepFirst, false)) == 0 {
		return
	}
	fmt.Fprint(b, "| work | best other | holdfast | times better | goal | met |\n|---|---|---|---|---|---|\n")
	for _, g := range r.goals() {
		ours := g.of(us)
		if ours == 0 {
			continue
		}
		name, best := "–", 0.0
		for _, t := range r.Tools {
			v := g.of(t.Name)
			if t.Name == us || t.Name == baseline || v == 0 {
				continue
			}
			if best == 0 || (v < best) != g.moreIsGood {
				name, best = t.Name, v
			}
		}
		fmt.Fprintln(b, g.line(name, best, ours))
	}
	ours, cp := median(r.walls(us, stepRestore, true)), median(r.walls(baseline, stepRestore, true))
	if cp > 0 {
		fmt.Fprintf(b, "| restore and sync | cp 1× = %.2f s | %.2f s | takes %.2f× | at most 1.3× | %s |\n", cp, ours, ours/cp, yes(ours <= 1.3*cp))
	}
}

func (g goal) line(other string, best, ours float64) string {
	ratio, want, met := "–", "", true
	if best > 0 {
		times := best / ours
		if g.moreIsGood {
			times = ours / best
		}
		ratio = fmt.Sprintf("%.1f×", times)
		if g.times > 0 {
			met = times >= g.times
		}
	}
	switch {
	case g.times > 0 && best == 0:
		want, met = fmt.Sprintf("%.0f×", g.times), false
	case g.times > 0:
		want = fmt.Sprintf("%.0f×", g.times)
	case g.moreIsGood:
		want, met = fmt.Sprintf("at least %.4g %s", g.absolute, g.unit), ours >= g.absolute
	default:
		want, met = fmt.Sprintf("under %.4g %s", g.absolute, g.unit), ours < g.absolute
	}
	return fmt.Sprintf("| %s | %s %.4g %s | %.4g %s | %s | %s | %s |", g.work, other, best, g.unit, ours, g.unit, ratio, want, yes(met))
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// walls are the seconds of a step in every pass, with the sync after it or not.
func (r *results) walls(tool, step string, synced bool) []float64 {
	var v []float64
	for _, s := range r.Samples {
		if s.Tool != tool || s.Step != step {
			continue
		}
		t := s.Wall
		if synced {
			t += s.Sync
		}
		v = append(v, t)
	}
	return v
}

// cell is "median (min–max) [CPU]".
func (r *results) cell(tool, step string) string {
	walls := r.walls(tool, step, false)
	if len(walls) == 0 {
		return "–"
	}
	var cpu []float64
	for _, s := range r.Samples {
		if s.Tool == tool && s.Step == step {
			cpu = append(cpu, s.CPU)
		}
	}
	return fmt.Sprintf("%s [%.2f]", seconds(walls), median(cpu))
}

// seconds is "median (min–max)".
func seconds(v []float64) string {
	switch len(v) {
	case 0:
		return "–"
	case 1:
		return fmt.Sprintf("%.2f", v[0])
	}
	return fmt.Sprintf("%.2f (%.2f–%.2f)", median(v), slices.Min(v), slices.Max(v))
}

// rss is the largest of all steps and passes, in bytes.
func (r *results) rss(tool string) int64 {
	var most int64
	for _, s := range r.Samples {
		if s.Tool == tool {
			most = max(most, s.RSS)
		}
	}
	return most
}

// size is the repository's after so many points, in bytes; of the first pass
// that has it, since all passes store the same.
func (r *results) size(tool string, points int) int64 {
	for _, s := range r.Sizes {
		if s.Tool == tool && s.Points == points {
			return s.Bytes
		}
	}
	return 0
}

func (r *results) mostPoints() int {
	most := 0
	for _, s := range r.Sizes {
		most = max(most, s.Points)
	}
	return most
}

func (r *results) ofMount(tool string, f func(mountSample) float64) []float64 {
	var v []float64
	for _, m := range r.Mounts {
		if m.Tool == tool {
			v = append(v, f(m))
		}
	}
	return v
}

// median of nothing is 0.
func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.SortedFunc(slices.Values(v), cmp.Compare[float64])
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}

// inMiB rounds up; nothing is a dash.
func inMiB(n int64) string {
	if n == 0 {
		return "–"
	}
	return fmt.Sprintf("%d", (n+1<<20-1)>>20)
}
