package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/holdfast-backup/holdfast/vsphere"
)

// finding is a line of `doctor --json`.
type finding struct {
	Type   string `json:"type"` // "finding"
	Source string `json:"source"`
	vsphere.Finding
}

// doctor is a run of the command.
type doctor struct {
	call   *call
	table  *table
	failed int
}

func runDoctor(ctx context.Context, c *call) error {
	names := slices.Sorted(maps.Keys(c.cfg.sources))
	if name := c.String("source"); name != "" {
		names = []string{name}
	}
	if len(names) == 0 {
		return withHint(usagef("doctor: the config names no source"), "platforms stand below sources: in the config")
	}
	d := &doctor{call: c, table: newTable("SOURCE", "", "ABOUT", "")}
	for _, name := range names {
		if err := d.source(ctx, name); err != nil {
			return err
		}
	}
	c.out.table(d.table)
	if d.failed > 0 {
		return fmt.Errorf("%d checks failed", d.failed)
	}
	return nil
}

func (d *doctor) add(source string, f vsphere.Finding) error {
	if f.Level == vsphere.Failed {
		d.failed++
	}
	d.table.row(printable(source), string(f.Level), printable(f.About), printable(f.Text))
	return d.call.out.object(finding{"finding", source, f})
}

// source checks one source. That it cannot be reached is a finding, too.
func (d *doctor) source(ctx context.Context, name string) error {
	src, _, err := d.call.platformNamed(ctx, name)
	if err != nil {
		if ctx.Err() != nil || errors.As(err, new(*usageError)) {
			return err
		}
		return d.add(name, vsphere.Finding{Level: vsphere.Failed, About: "connection", Text: err.Error()})
	}
	defer src.Close()
	if d.call.Bool("clean") {
		removed, err := src.CleanUp(ctx)
		for _, l := range removed {
			if err := d.add(name, vsphere.Finding{Level: vsphere.OK, About: l.VM, Text: "removed snapshot " + l.Name + " of an earlier run"}); err != nil {
				return err
			}
		}
		if err != nil {
			if err := d.add(name, vsphere.Finding{Level: vsphere.Failed, About: "snapshots", Text: err.Error()}); err != nil {
				return err
			}
		}
	}
	list, err := src.Check(ctx)
	for _, f := range list {
		if err := d.add(name, f); err != nil {
			return err
		}
	}
	return err
}
