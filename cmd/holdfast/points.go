package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/fs/boot"
	"github.com/holdfast-backup/holdfast/store"
)

func runPoints(ctx context.Context, c *call) error {
	return c.withRepo(ctx, func(r *store.Repo) error {
		list, err := r.Points(ctx)
		if err != nil {
			return err
		}
		if len(c.args) == 1 {
			vm := c.args[0]
			if list, err = r.PointsOf(ctx, vm); err != nil {
				return err
			}
			if len(list) == 0 {
				return withHint(fmt.Errorf("no VM %q: %w", vm, store.ErrNotExist), "'holdfast points' lists all")
			}
		}
		if list, err = r.WithDamage(ctx, list); err != nil {
			return err
		}
		columns := []string{"POINT", "ID", ">SIZE", ">NEW", ">STORED", "TAGS", ""}
		now := c.clock.now()
		locks := slices.ContainsFunc(list, func(s store.Summary) bool { return s.LockedUntil.After(now) })
		if locks {
			columns = append(columns[:len(columns)-1], "LOCKED UNTIL", "")
		}
		t := newTable(columns...)
		for _, s := range list {
			note := ""
			switch {
			case s.Damaged != "":
				note = "DAMAGED: " + s.Damaged
			case len(s.Hit) > 0:
				note = "DAMAGED: " + hitText(s.Hit)
			case s.Warnings > 0:
				note = fmt.Sprintf("%d warnings", s.Warnings)
			}
			row := []string{s.Path(), s.ID.String()[:12], sizeText(s.Total), sizeText(s.New), sizeText(s.Stored), strings.Join(s.Tags, ",")}
			if locks {
				row = append(row, lockText(s.LockedUntil, now))
			}
			t.row(append(row, note)...)
			if err := c.out.object(struct {
				Type string `json:"type"`
				store.Summary
			}{"point", s}); err != nil {
				return err
			}
		}
		if len(t.rows) > 0 {
			c.out.table(t)
		}
		return nil
	})
}

func runShow(ctx context.Context, c *call) error {
	return c.withRepo(ctx, func(r *store.Repo) error {
		p, err := findPoint(ctx, r, c.args[0])
		if err != nil {
			return err
		}
		marked, err := r.WithDamage(ctx, []store.Summary{{ID: p.ID}})
		if err != nil {
			return err
		}
		hit := marked[0].Hit
		fields := [][2]string{
			{"point", p.Path()},
			{"id", p.ID.String()},
			{"time", timeText(p.Time)},
			{"source", p.VM.Source},
			{"consistency", p.Consistency},
		}
		if len(p.Tags) > 0 {
			fields = append(fields, [2]string{"tags", strings.Join(p.Tags, ", ")})
		}
		if l := lockText(p.LockedUntil, c.clock.now()); l != "" {
			fields = append(fields, [2]string{"locked until", l})
		}
		if p.Agent != "" {
			fields = append(fields, [2]string{"made by", "a helper with the token " + p.Agent})
		}
		if o := p.CopiedFrom; o != nil {
			fields = append(fields, [2]string{"copied from", fmt.Sprintf("%s in repository %s", o.Point, o.Repository)})
		}
		fields = append(fields,
			[2]string{"size", fmt.Sprintf("%s, %s of data", sizeText(p.Stats.Total), sizeText(p.Stats.Data))},
			[2]string{"read", sizeText(p.Stats.Read)},
			[2]string{"new", fmt.Sprintf("%s, %s stored", sizeText(p.Stats.New), sizeText(p.Stats.Stored))},
			[2]string{"took", fmt.Sprintf("%.1fs", p.Stats.Duration)},
		)
		for _, d := range p.Disks {
			if d.LeftOut == nil {
				continue
			}
			for _, i := range d.LeftOut.Items {
				fields = append(fields, [2]string{"left out", fmt.Sprintf("%s of %s: %s", sizeText(i.Bytes), i.Volume, i.What)})
			}
		}
		for _, k := range p.Kept {
			fields = append(fields, [2]string{"not left out", k})
		}
		for _, w := range p.Warnings {
			fields = append(fields, [2]string{"warning", w})
		}
		for _, d := range hit {
			fields = append(fields, [2]string{"DAMAGED", fmt.Sprintf("%s, the first at offset %d, found %s", d, d.Off, timeText(d.Found))})
		}
		proof, err := boot.ProofOf(ctx, r, p.ID)
		if err != nil && !errors.Is(err, store.ErrNotExist) {
			c.progress.warn("what was seen of the point when it was booted cannot be read: %v", err)
		}
		var seen *bootProof
		if proof != nil {
			fields = append(fields, [2]string{"boot", proofText(proof)})
			seen = &bootProof{"", proof.Point, "", proof.Time, proof.OK, proof.Sign, proof.Why, proof.Took}
		}
		if dir := c.String("proof"); dir != "" {
			if err := c.saveProof(proof, dir); err != nil {
				return err
			}
		}
		c.out.fields(fields...)
		t := newTable("DISK", "KEY", ">SIZE", ">DATA", ">NEW", "READ")
		for _, d := range p.Disks {
			read := d.Read
			if d.Via != "" {
				read += ", through " + d.Via
			}
			t.row(d.Name, d.Key, sizeText(d.Size), sizeText(d.Stats.Data), sizeText(d.Stats.New), read)
		}
		c.out.line("")
		c.out.table(t)
		for _, f := range p.Config {
			c.out.line("config/%s  %s", f.Name, sizeText(f.Size))
		}
		return c.out.object(struct {
			Type string `json:"type"`
			*store.Point
			Hit   []store.DiskDamage `json:"damaged_disks,omitempty"`
			Proof *bootProof         `json:"boot_proof,omitempty"`
		}{"point", p, hit, seen})
	})
}

// hitText says what is damaged of a point.
func hitText(hit []store.DiskDamage) string {
	var parts []string
	for _, d := range hit {
		parts = append(parts, d.String())
	}
	return strings.Join(parts, ", ")
}

// lockText says when a lock ends, "" when there is none any more.
func lockText(until, now time.Time) string {
	if !until.After(now) {
		return ""
	}
	return timeText(until)
}

// findPoint resolves a point's name and reads its manifest.
func findPoint(ctx context.Context, r *store.Repo, ref string) (*store.Point, error) {
	s, err := r.Find(ctx, ref)
	if err != nil {
		return nil, err
	}
	return r.Point(ctx, s.ID)
}
