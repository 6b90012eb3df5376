package main

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/holdfast-backup/holdfast/store"
)

// statsResult is what `stats --json` prints.
type statsResult struct {
	Type      string `json:"type"` // "stats"
	ID        string `json:"id"`
	ChunkSize int    `json:"chunk_size"`
	Encrypted bool   `json:"encrypted"`
	store.RepoStats
	Ratio       float64        `json:"ratio,omitempty"`             // bytes_total to bytes_stored
	Dedupe      float64        `json:"ratio_dedupe,omitempty"`      // bytes_data to bytes_plain
	Compression float64        `json:"ratio_compression,omitempty"` // bytes_plain to bytes_packed
	Growth      []store.Growth `json:"growth"`
	*store.Usage
}

func runStats(ctx context.Context, c *call) error {
	return c.withRepo(ctx, func(r *store.Repo) error {
		res := statsResult{Type: "stats", ID: r.ID(), ChunkSize: r.ChunkSize(), Encrypted: r.Encrypted()}
		points, err := r.Points(ctx)
		if err != nil {
			return err
		}
		vm := ""
		if len(c.args) == 1 {
			vm = c.args[0]
			if !slices.ContainsFunc(points, func(s store.Summary) bool { return s.VM == vm }) {
				return withHint(fmt.Errorf("no VM %q: %w", vm, store.ErrNotExist), "'holdfast points' lists all")
			}
		}
		if res.RepoStats, err = r.Stats(ctx); err != nil {
			return err
		}
		vms := store.VMsOf(points)
		if !c.Bool("quick") {
			if res.Usage, err = c.usage(ctx, r); err != nil {
				return err
			}
			vms = res.Usage.VMs
			res.Dedupe, res.Compression = ratio(res.Data, res.Plain), ratio(res.Plain, res.Packed)
		}
		res.Ratio = ratio(res.Total, res.Stored)
		by := store.Period(c.String("by"))
		if by == "auto" {
			by = store.PeriodOf(points)
		}
		res.Growth = store.GrowthOf(points, by, time.Local)
		if file := c.String("metrics"); file != "" {
			if err := writeMetrics(file, &res, vms, c.clock.now()); err != nil {
				return fmt.Errorf("metrics: %w", err)
			}
		}
		c.printStats(r, &res)
		if vm != "" {
			c.printPointUsage(vm, res.Usage.Points)
		} else {
			c.printVMUsage(vms, res.Usage != nil)
		}
		c.printGrowth(by, res.Growth)
		return c.out.object(res)
	})
}

// usage finds what is used by whom, and shows how far it is.
func (c *call) usage(ctx context.Context, r *store.Repo) (*store.Usage, error) {
	t := c.progress.task("stats", "", -1)
	last := int64(0)
	u, err := r.Usage(ctx, func(done, total int64) {
		t.setTotal(total)
		t.add(done - last)
		last = done
	})
	t.end(err)
	return u, err
}

func ratio(a, b int64) float64 {
	if b <= 0 {
		return 0
	}
	return float64(a) / float64(b)
}

func ratioText(r float64) string {
	if r == 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f", r)
}

func (c *call) printStats(r *store.Repo, res *statsResult) {
	path, err := filepath.Abs(c.repo)
	if err != nil {
		path = c.repo
	}
	all, stored := sizeText(res.Total), fmt.Sprintf("%s in %d packs", sizeText(res.Stored), res.Packs)
	if u := res.Usage; u != nil {
		all += fmt.Sprintf(", %s of it data", sizeText(u.Data))
		stored += fmt.Sprintf(", %s of it in use", sizeText(u.Live))
	}
	fields := [][2]string{
		{"repository", path},
		{"id", res.ID},
		{"created", timeText(r.Created())},
		{"chunk size", sizeText(int64(res.ChunkSize))},
		{"encryption", encryptionText(res.Encrypted)},
		{"VMs", fmt.Sprint(res.RepoStats.VMs)},
		{"restore points", fmt.Sprint(res.RepoStats.Points)},
		{"all points together", all},
		{"stored", stored},
		{"ratio", ratioText(res.Ratio)},
	}
	if u := res.Usage; u != nil {
		fields = append(fields,
			[2]string{"deduplication", fmt.Sprintf("%s (%s in %d chunks)", ratioText(res.Dedupe), sizeText(u.Plain), u.Chunks)},
			[2]string{"compression", fmt.Sprintf("%s (to %s)", ratioText(res.Compression), sizeText(u.Packed))},
			[2]string{"used by several VMs", sizeText(u.Shared)})
		if u.Missing > 0 || u.Damaged > 0 {
			fields = append(fields, [2]string{"DAMAGED", fmt.Sprintf("%d points left out, %d chunks or pages missing: see 'holdfast verify'", u.Damaged, u.Missing)})
		}
	}
	c.out.fields(fields...)
}

// printVMUsage lists the VMs; known says that it was found what they use alone.
func (c *call) printVMUsage(vms []store.VMUsage, known bool) {
	if len(vms) == 0 {
		return
	}
	t := newTable("VM", ">POINTS", "NEWEST", ">SIZE", ">STORED", ">DATA", ">UNIQUE")
	if !known {
		t = newTable("VM", ">POINTS", "NEWEST", ">SIZE", ">STORED")
	}
	for _, v := range vms {
		row := []string{v.VM, fmt.Sprint(v.Points), timeText(v.Last), sizeText(v.Size), sizeText(v.Stored)}
		if known {
			row = append(row, sizeText(v.Data), sizeText(v.Unique))
		}
		t.row(row...)
	}
	c.out.line("")
	c.out.table(t)
}

func (c *call) printPointUsage(vm string, points []store.PointUsage) {
	t := newTable("POINT", ">SIZE", ">DATA", ">STORED", ">UNIQUE")
	for _, p := range points {
		if p.VM == vm {
			t.row(p.VM+"/"+p.Name, sizeText(p.Total), sizeText(p.Data), sizeText(p.Stored), sizeText(p.Unique))
		}
	}
	c.out.line("")
	c.out.table(t)
}

// growthShown is how many periods people are shown; JSON has all.
const growthShown = 12

func (c *call) printGrowth(by store.Period, growth []store.Growth) {
	if len(growth) == 0 {
		return
	}
	t := newTable(map[store.Period]string{store.ByDay: "DAY", store.ByWeek: "WEEK", store.ByMonth: "MONTH", store.ByYear: "YEAR"}[by],
		">POINTS", ">NEW", ">STORED", ">SUM")
	for _, g := range growth[max(0, len(growth)-growthShown):] {
		t.row(g.Period, fmt.Sprint(g.Points), sizeText(g.New), sizeText(g.Stored), sizeText(g.Sum))
	}
	c.out.line("")
	c.out.table(t)
}
