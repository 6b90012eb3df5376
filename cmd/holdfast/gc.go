package main

import (
	"context"
	"fmt"

	"github.com/holdfast-backup/holdfast/store"
)

func runGC(ctx context.Context, c *call) error {
	live, err := share(c.String("repack-below"))
	if err != nil {
		return err
	}
	return c.withRepo(ctx, func(r *store.Repo) error {
		opt := store.GCOptions{MaxLive: live, DryRun: c.Bool("dry-run"), IgnoreMissing: c.Bool("ignore-missing")}
		var t *task
		var phase store.GCPhase
		last := int64(0)
		opt.Progress = func(p store.GCPhase, done, total int64) {
			if t == nil || p != phase {
				if t != nil {
					t.end(nil)
				}
				t, phase, last = c.progress.task("gc "+string(p), "", total), p, 0
			}
			t.add(done - last)
			last = done
		}
		rep, err := r.GC(ctx, opt)
		if t != nil {
			t.end(err)
		}
		if err != nil {
			return err
		}
		if err := c.out.object(struct {
			Type string `json:"type"`
			store.GCReport
		}{"gc", rep}); err != nil {
			return err
		}
		c.out.line("%d points use %s of %s in %d packs", rep.Points, sizeText(rep.Live), sizeText(rep.Stored), rep.Packs)
		if rep.DryRun {
			c.out.line("%d packs would be condemned; removing all that are gives back %s", rep.Condemned, sizeText(rep.Reclaim))
			return nil
		}
		c.out.line("%d packs removed, %s copied out of them: %s freed", rep.Removed, sizeText(rep.Copied), sizeText(max(0, rep.Freed)))
		if rep.Pending > 0 {
			c.out.line("%d packs are condemned and wait for %d backups that began before: the next gc removes them", rep.Pending, rep.Waiting)
		}
		if rep.Kept > 0 {
			return withHint(fmt.Errorf("%w: %d packs stay because part of them cannot be read", errDamageFound, rep.Kept), "'holdfast verify --read-data' says what is damaged, 'holdfast repair packs' saves what can be read")
		}
		return nil
	})
}

// share reads a percentage as a fraction.
func share(s string) (float64, error) {
	n, ok := percentage(s)
	if !ok {
		return 0, usagef("gc: --repack-below %q is not a percentage from 1%% to 100%%", s)
	}
	return n, nil
}

// percentage reads one, above 0 % and up to 100 %, as a fraction.
func percentage(s string) (float64, bool) {
	var n float64
	if _, err := fmt.Sscanf(s+" ", "%f%% ", &n); err != nil || n <= 0 || n > 100 {
		return 0, false
	}
	return n / 100, true
}
