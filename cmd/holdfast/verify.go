package main

import (
	"context"
	"fmt"

	"github.com/holdfast-backup/holdfast/store"
)

// damageFound is one finding in `verify --json`.
type damageFound struct {
	Type  string `json:"type"` // "damage"
	Point string `json:"point,omitempty"`
	Disk  string `json:"disk,omitempty"`
	Off   *int64 `json:"offset,omitempty"`
	What  string `json:"what"`
	Error string `json:"error"`
}

func runVerify(ctx context.Context, c *call) error {
	return c.withRepo(ctx, func(r *store.Repo) error {
		opt := store.VerifyOptions{ReadData: c.Bool("read-data")}
		for _, ref := range c.args {
			s, err := r.Find(ctx, ref)
			if err != nil {
				return err
			}
			opt.Points = append(opt.Points, s.ID)
		}
		t := c.progress.task("verify", "", -1)
		last := int64(0)
		opt.Progress = func(done, total int64) {
			t.setTotal(total)
			t.add(done - last)
			last = done
		}
		opt.Damage = func(d *store.DamageError) {
			c.out.line("%s", d)
			f := damageFound{Type: "damage", Point: d.Point, Disk: d.Disk, What: d.What, Error: d.Error()}
			if d.Disk != "" {
				f.Off = &d.Off
			}
			c.out.object(f) // an error sticks and is reported at the end
		}
		rep, err := r.Verify(ctx, opt)
		t.end(err)
		if err != nil {
			return err
		}
		if err := c.out.object(struct {
			Type string `json:"type"`
			store.VerifyReport
		}{"verify", rep}); err != nil {
			return err
		}
		how := "are there"
		if opt.ReadData {
			how = "were read and are right"
		}
		if rep.Damaged == 0 {
			c.out.line("%d points, %d packs, %d chunks: all %s", rep.Points, rep.Packs, rep.Chunks, how)
			return nil
		}
		return withHint(fmt.Errorf("%w: %d findings", errDamageFound, rep.Damaged), "points that are not named are whole; the next backup of a VM stores again what it still has")
	})
}
