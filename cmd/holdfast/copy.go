package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
)

// copiedPoint is one point in `copy --json`.
type copiedPoint struct {
	Type   string        `json:"type"`   // "point"
	Status string        `json:"status"` // "copied", "skipped" or "failed"
	From   store.PointID `json:"from"`   // in the source
	// At the destination; absent when it failed.
	ID   *store.PointID `json:"id,omitempty"`
	VM   string         `json:"vm"`
	Name string         `json:"name"`
	Time time.Time      `json:"time"`
	*store.Stats
	Error string `json:"error,omitempty"`
}

// copySummary is the last object of `copy --json`.
type copySummary struct {
	Type    string `json:"type"` // "summary"
	Copied  int    `json:"points_copied"`
	Skipped int    `json:"points_skipped"` // they were there
	Failed  int    `json:"points_failed"`
	store.Stats
}

func checkCopy(c *call) error {
	if c.String("to") == "" {
		return usagef("copy: where to? --to is missing")
	}
	if to := c.String("to"); isAway(to) {
		return onlyAdds("copy", to)
	}
	return nil
}

func runCopy(ctx context.Context, c *call) error {
	to := c.String("to")
	if same(c.repo, to) {
		return fmt.Errorf("%s and %s: %w", c.repo, to, backup.ErrSameRepository)
	}
	if _, err := openBucket(to); err != nil { // before a password is asked for
		return err
	}
	return c.withRepo(ctx, func(r *store.Repo) error {
		points, err := c.pointsToCopy(ctx, r)
		if err != nil {
			return err
		}
		return c.withRepoIn(ctx, place{dir: to, password: c.toPassword}, func(w *store.Repo) error { return c.copy(ctx, r, w, points) })
	})
}

// same reports whether two paths lead to one directory.
func same(a, b string) bool {
	ai, err := os.Stat(a)
	if err != nil {
		return false
	}
	bi, err := os.Stat(b)
	return err == nil && os.SameFile(ai, bi)
}

// pointsToCopy resolves the arguments: points, VMs, or nothing for all; each point once.
func (c *call) pointsToCopy(ctx context.Context, r *store.Repo) ([]store.Summary, error) {
	if len(c.args) == 0 {
		return r.Points(ctx)
	}
	var points []store.Summary
	seen := map[store.PointID]bool{}
	add := func(list ...store.Summary) {
		for _, s := range list {
			if !seen[s.ID] {
				seen[s.ID] = true
				points = append(points, s)
			}
		}
	}
	for _, ref := range c.args {
		if !strings.Contains(ref, "/") {
			list, err := r.PointsOf(ctx, ref)
			if err != nil {
				return nil, err
			}
			if len(list) > 0 {
				add(list...)
				continue
			}
		}
		s, err := r.Find(ctx, ref)
		if errors.Is(err, store.ErrNotExist) {
			return nil, withHint(fmt.Errorf("no VM and no point %q: %w", ref, store.ErrNotExist), "'holdfast points' lists all")
		}
		if err != nil {
			return nil, err
		}
		add(s)
	}
	return points, nil
}

// copy copies points and reports each as it is done.
func (c *call) copy(ctx context.Context, from, to *store.Repo, points []store.Summary) error {
	began := c.clock.now()
	sum := copySummary{Type: "summary"}
	var running *task
	end := func(err error) {
		if running != nil {
			running.end(err)
		}
		running = nil
	}
	opt := backup.CopyOptions{Now: c.clock.now, Start: func(p *store.Point, disk string, total int64) backup.Meter {
		end(nil)
		running = c.progress.task(p.Path()+"/"+disk, "new", total)
		return backup.Meter{Done: running.add, New: running.count}
	}}
	var failures []error
	for res, err := range backup.Copy(ctx, from, to, points, opt) {
		end(err)
		if err != nil && ctx.Err() != nil {
			return err
		}
		if err != nil && res.From.ID == (store.PointID{}) { // of no point
			return err
		}
		line := copiedPoint{Type: "point", From: res.From.ID, VM: res.From.VM, Name: res.From.Name, Time: res.From.Time}
		if p := res.Point; p != nil {
			line.ID, line.Name = &p.ID, p.Name
		}
		switch {
		case err != nil:
			line.Status, line.Error = "failed", err.Error()
			failures = append(failures, err)
			sum.Failed++
		case res.Skipped:
			line.Status = "skipped"
			c.progress.detail("%s is there already", res.Point.Path())
			sum.Skipped++
		default:
			s := res.Point.Stats
			line.Status, line.Stats = "copied", &s
			c.out.line("%s: %s, %s read, %s new, %s stored, in %s", res.Point.Path(), sizeText(s.Total), sizeText(s.Read),
				sizeText(s.New), sizeText(s.Stored), durationText(time.Duration(s.Duration*float64(time.Second))))
			sum.Copied++
			sum.Stats.Add(s)
		}
		if err := c.out.object(line); err != nil {
			return err
		}
	}
	sum.Duration = c.clock.now().Sub(began).Seconds()
	c.out.line("%d points copied, %d were there already", sum.Copied, sum.Skipped)
	if err := c.out.object(sum); err != nil {
		return err
	}
	if len(failures) == 0 {
		return nil
	}
	err := errors.Join(failures...)
	if sum.Copied+sum.Skipped > 0 {
		left := len(points) - sum.Copied - sum.Skipped
		err = fmt.Errorf("%w: %d points are not copied\n%w", errPartlyDone, left, err)
	}
	if errors.Is(err, store.ErrDamaged) {
		err = withHint(err, "'holdfast verify --read-data' lists all damage")
	}
	return err
}
