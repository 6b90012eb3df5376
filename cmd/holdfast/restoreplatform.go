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
		&cli.BoolFlag{DisableDefaultText: true, Name: "in-place", Usage: "no new VM: overwrite the disks of this one, where they differ; asks for its name, or takes --name"},
	}
}

// checkPlatform refuses flags that contradict each other in a restore to a platform.
func (c *call) checkPlatform() error {
	if c.IsSet("format") {
		return usagef("restore: a platform decides on the format by itself: no --format")
	}
	if !c.Bool("in-place") {
		return nil
	}
	for _, f := range platformFlags() {
		if name := f.Names()[0]; name != "name" && name != "in-place" && c.IsSet(name) {
			return usagef("restore: --%s is about a new VM, and --in-place makes none", name)
		}
	}
	if c.String("name") == "" && !c.canAsk() {
		return withHint(usagef("restore: --in-place overwrites disks and asks for the VM's name first, but there is no terminal"), "give it with --name")
	}
	return nil
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
	if c.Bool("in-place") {
		return c.restoreInPlace(ctx, r, p, src, name, began)
	}
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

// restoredDisk is a disk in the result of a restore in place.
type restoredDisk struct {
	Disk     string `json:"disk"`
	Compared int64  `json:"bytes_compared"`
	Written  int64  `json:"bytes_written"`
	Why      string `json:"compared_because"`
}

// restoredInPlace is the object of `restore --to SOURCE: --in-place --json`.
type restoredInPlace struct {
	Type     string         `json:"type"` // "restored in place"
	Point    store.PointID  `json:"point"`
	Source   string         `json:"source"`
	Path     string         `json:"path"`
	Disks    []restoredDisk `json:"disks"`
	Warnings []string       `json:"warnings"`
	Duration float64        `json:"duration_s"`
}

// restoreInPlace gives the disks of a VM back what they held.
func (c *call) restoreInPlace(ctx context.Context, r *store.Repo, p *store.Point, src *vsphere.Source, name string, began time.Time) error {
	if p.VM.Source != "vsphere" {
		return fmt.Errorf("%s is not of a VM of vSphere: it can only be restored as a new one", p.Path())
	}
	disks, err := c.chosenDisks(p)
	if err != nil {
		return err
	}
	what := vsphere.InPlace{VM: c.String("name"), UUID: p.VM.UUID, Progress: c.diskProgress(p)}
	if what.VM == "" {
		question := fmt.Sprintf("This overwrites %d disks of %s with what they held on %s.\nName of the VM: ", len(disks), p.VM.Name, p.Time.Local().Format(time.DateTime))
		if what.VM, err = c.ask(ctx, question); err != nil {
			return err
		}
	}
	for i := range disks {
		img, err := r.OpenDisk(p, disks[i].Name)
		if err != nil {
			return err
		}
		what.Disks = append(what.Disks, vsphere.InPlaceDisk{Name: disks[i].Name, Key: disks[i].Key, ChangeID: disks[i].ChangeID, Image: img})
	}
	done, err := src.RestoreInPlace(ctx, what)
	for _, w := range done.Warnings {
		c.progress.warn("%s: %s", done.Path, w)
	}
	if err != nil {
		return err
	}
	res := restoredInPlace{"restored in place", p.ID, name, done.Path, nil, append([]string{}, done.Warnings...), time.Since(began).Seconds()}
	for _, w := range done.Disks {
		c.out.line("%s %s: %s differed and were written; compared: %s, %s", done.Path, w.Disk, sizeText(w.Written), sizeText(w.Compared), w.Why)
		res.Disks = append(res.Disks, restoredDisk(w))
	}
	return c.out.object(res)
}

// diskProgress shows how far each disk is.
func (c *call) diskProgress(p *store.Point) func(disk string, total int64) (func(int64), func(error)) {
	return func(disk string, total int64) (func(int64), func(error)) {
		t := c.progress.task(p.VM.Name+"/"+disk, "", total)
		return t.add, t.end
	}
}

// restoreOf gathers what a platform needs of a point.
func (c *call) restoreOf(r *store.Repo, p *store.Point) (*vsphere.Restore, error) {
	what := &vsphere.Restore{Name: c.String("name"), Datastore: c.String("datastore"), Network: c.String("network"), Folder: c.String("folder"), Pool: c.String("pool"),
		KeepIdentity: c.Bool("keep-identity"), Connect: c.Bool("connect"), PowerOn: c.Bool("power-on"), Progress: c.diskProgress(p)}
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
