package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"

	"github.com/holdfast-backup/holdfast/backup"
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
	if err := d.strays(ctx); err != nil {
		return err
	}
	c.out.table(d.table)
	if d.failed > 0 {
		return fmt.Errorf("%d checks failed", d.failed)
	}
	return nil
}

// strays says which snapshots were left on servers that no source has, by the address that it had then: no run looks for them.
func (d *doctor) strays(ctx context.Context) error {
	hosts := map[string]bool{}
	for _, s := range d.call.cfg.sources {
		if u, err := url.Parse(s.vsphere); err == nil {
			hosts[u.Host] = true
		}
	}
	journal, err := openJournal()
	if err != nil {
		return err
	}
	only := d.call.String("source")
	left, err := journal.Left(ctx, func(l backup.Leftover) bool { return !hosts[l.Host] && (only == "" || l.Source == only) })
	if err != nil {
		return err
	}
	for _, e := range left {
		l := e.Leftover
		e.Leave()
		err := d.add(l.Source, vsphere.Finding{Level: vsphere.Warning, About: l.VM, Text: fmt.Sprintf(
			"an earlier run left snapshot %s on %s, which no source in the config names: a source with that address removes it", l.Name, l.Host)})
		if err != nil {
			return err
		}
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
