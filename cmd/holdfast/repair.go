package main

import (
	"context"
	"time"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/remote"
)

// repairActions are what `holdfast repair` can be told to do.
func repairActions() []string { return []string{"index"} }

// checkRepair refuses what nobody can repair.
func checkRepair(c *call) error {
	if c.args[0] == "index" {
		return nil
	}
	return usagef("repair: unknown part %q; it can be: index", c.args[0])
}

// runRepair makes the index anew. Opening the repository with it does all of the work.
func runRepair(ctx context.Context, c *call) error {
	began := time.Now()
	p := c.here()
	p.index = remote.NewIndex(c.repo)
	return c.withRepoIn(ctx, p, func(r *store.Repo) error {
		s, err := r.Stats(ctx)
		if err != nil {
			return err
		}
		seconds := time.Since(began).Seconds()
		c.out.line("index made anew: %d points, %d packs, %s, %.1f GiB/s", s.Points, s.Packs, sizeText(s.Stored), float64(s.Stored)/(1<<30)/seconds)
		return c.out.object(struct {
			Type     string  `json:"type"` // "repair"
			Part     string  `json:"part"`
			Duration float64 `json:"duration_s"`
			store.RepoStats
		}{"repair", "index", seconds, s})
	})
}
