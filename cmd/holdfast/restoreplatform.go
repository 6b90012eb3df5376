package main

import (
	"context"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/holdfast-backup/holdfast/fs/boot"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/vsphere"
)

// platformFlags are the flags of a restore to a platform.
func platformFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "name", Usage: "`NAME` of the new VM; that of the VM in the point, with -restored"},
		&cli.StringFlag{Name: "datastore", Usage: "`NAME` of the datastore for its disks; as the VM had"},
		&cli.StringFlag{Name: "network", Usage: "`NAME` of the network for all its cards; as the VM had"},
		&cli.StringFlag{Name: "folder", Usage: "`PATH` of its folder in the inventory; as the VM had"},
		&cli.StringFlag{Name: "pool", Usage: "`NAME` of its resource pool; as the VM had"},
		&cli.BoolFlag{DisableDefaultText: true, Name: "keep-identity", Usage: "keep UUIDs and MAC addresses, for a VM that replaces the old one"},
		&cli.BoolFlag{DisableDefaultText: true, Name: "connect", Usage: "connect its network cards when it is switched on"},
		&cli.BoolFlag{DisableDefaultText: true, Name: "power-on", Usage: "switch it on"},
	}
}

// platformOf gives the platform that --to names, as NAME:, if it is one.
func (c *call) platformOf(to string) (name string, ok bool) { return strings.CutSuffix(to, ":") }

// restoredVM is the object of `restore --to SOURCE: --json`.
type restoredVM struct {
	Type     string        `json:"type"` // "restored vm"
	Point    store.PointID `json:"point"`
	Source   string        `json:"source"`
	VM       string        `json:"vm"` // id on the platform
	Path     string        `json:"path"`
	Warnings []string      `json:"warnings"`
	Duration float64       `json:"duration_s"`
}

// restoreToPlatform makes a VM out of a point.
func (c *call) restoreToPlatform(ctx context.Context, r *store.Repo, p *store.Point, name string) error {
	began := time.Now()
	src, _, err := c.platformNamed(ctx, name)
	if err != nil {
		return err
	}
	defer src.Close()
	what, err := c.restoreOf(r, p)
	if err != nil {
		return err
	}
	made, err := src.Restore(ctx, *what)
	if err != nil {
		return err
	}
	for _, w := range made.Warnings {
		c.progress.warn("%s: %s", made.Path, w)
	}
	c.out.line("%s: restored to %s on %s, in %s", p.Path(), made.Path, name, durationText(time.Since(began)))
	return c.out.object(restoredVM{"restored vm", p.ID, name, made.ID, made.Path, append([]string{}, made.Warnings...), time.Since(began).Seconds()})
}

// restoreOf gathers what a platform needs of a point.
func (c *call) restoreOf(r *store.Repo, p *store.Point) (*vsphere.Restore, error) {
	what := &vsphere.Restore{Name: c.String("name"), Datastore: c.String("datastore"), Network: c.String("network"), Folder: c.String("folder"), Pool: c.String("pool"),
		KeepIdentity: c.Bool("keep-identity"), Connect: c.Bool("connect"), PowerOn: c.Bool("power-on"),
		Progress: func(disk string, total int64) (func(int64), func(error)) {
			t := c.progress.task(p.VM.Name+"/"+disk, "", total)
			return t.add, t.end
		}}
	if what.Name == "" {
		what.Name = p.VM.Name + "-restored"
	}
	disks, err := c.chosenDisks(p)
	if err != nil {
		return nil, err
	}
	for i := range disks {
		img, err := r.OpenDisk(p, disks[i].Name)
		if err != nil {
			return nil, err
		}
		what.Disks = append(what.Disks, vsphere.RestoreDisk{Name: disks[i].Name, Image: img})
	}
	if p.VM.Source != "vsphere" {
		return what, c.machineFor(r, p, what)
	}
	for _, f := range []struct {
		name string
		to   *[]byte
	}{{"vm.json", &what.Config}, {"inventory.json", &what.Inventory}, {"disks.json", &what.Mapping}} {
		if *f.to, err = configNamed(r, p, f.name); err != nil {
			return nil, err
		}
	}
	for i := range p.Config {
		if isNVRAM(p.Config[i].Name) {
			if what.NVRAM, err = configOf(r, p, &p.Config[i]); err != nil {
				return nil, err
			}
		}
	}
	return what, nil
}

// configNamed gives a configuration file that a point must have.
func configNamed(r *store.Repo, p *store.Point, name string) ([]byte, error) {
	for i := range p.Config {
		if p.Config[i].Name == name {
			return configOf(r, p, &p.Config[i])
		}
	}
	return nil, fmt.Errorf("%s has no config/%s: %w", p.Path(), name, fs.ErrNotExist)
}

// machineFor says what a VM of another platform is like.
func (c *call) machineFor(r *store.Repo, p *store.Point, what *vsphere.Restore) error {
	var h boot.Hints
	for i := range p.Config {
		if strings.HasSuffix(strings.ToLower(p.Config[i].Name), ".vmx") {
			b, err := configOf(r, p, &p.Config[i])
			if err != nil {
				return err
			}
			h = boot.ParseVMX(b)
		}
	}
	if h.Firmware == "" && len(what.Disks) > 0 {
		var err error
		if h.Firmware, err = boot.DetectFirmware(what.Disks[0].Image); err != nil {
			return err
		}
	}
	what.Machine = vsphere.Machine{EFI: h.Firmware == boot.UEFI, CPUs: int32(h.CPUs), Memory: h.Memory >> 20}
	return nil
}
