package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/backup/overlaid"
	"github.com/holdfast-backup/holdfast/fs/boot"
	"github.com/holdfast-backup/holdfast/fs/boot/qemu"
	"github.com/holdfast-backup/holdfast/store"
)

// machineOf makes out what VM a point is of: what the user says, or else its configuration, or else what
// its first disk looks like.
func (c *call) machineOf(ctx context.Context, r *store.Repo, id store.PointID, host *qemu.Host) (opt boot.Options, err error) {
	p, err := r.Point(ctx, id)
	if err != nil {
		return opt, err
	}
	if len(p.Disks) == 0 {
		return opt, fmt.Errorf("%s has no disks", p.Path())
	}
	hints, nvram, err := c.hintsOf(r, p, host)
	if err != nil {
		return opt, err
	}
	disk, err := r.OpenDisk(p, p.Disks[0].Name)
	if err != nil {
		return opt, err
	}
	m, err := boot.NewMachine(p, hints, disk)
	if err != nil {
		return opt, err
	}
	known := c.cfg.vms[p.VM.Name]
	if kind := c.setting("firmware", known.firmware); kind != "" && kind != "auto" {
		if m.Firmware = boot.Firmware(kind); m.Firmware != boot.BIOS && m.Firmware != boot.UEFI {
			return opt, usagef("firmware %q: want bios or uefi", kind)
		}
	}
	if n, err := c.bootMemory(known.memory); err != nil {
		return opt, err
	} else if n > 0 {
		m.Memory = n
	}
	if n, err := c.bootCPUs(known.cpus); err != nil {
		return opt, err
	} else if n > 0 {
		m.CPUs = n
	}
	m.VNC = c.String("vnc")
	for i := range m.NICs {
		m.NICs[i].Network = c.network()
	}
	if len(m.NICs) == 0 && c.network() != "none" {
		m.NICs = []boot.NIC{{Model: "e1000", Network: c.network()}}
	}
	if m.Firmware == boot.UEFI && nvram == nil {
		if nvram, err = host.NVRAM(); err != nil {
			return opt, err
		}
	}
	bus := func(d *store.Disk) boot.Bus {
		if want := c.setting("bus", known.bus); want != "" && want != "auto" {
			return boot.Bus(want)
		}
		if b := hints.Bus(d.Key); b != "" {
			return b
		}
		return boot.SATA
	}
	repo, err := filepath.Abs(c.repo)
	return boot.Options{Name: c.String("name"), Repository: repo, Host: c.String("on"), Machine: m, Bus: bus, NVRAM: nvram, Now: c.clock.now}, err
}

// network is what the cards of a VM are plugged into; verify has no flag for that, and plugs them into nothing.
func (c *call) network() string {
	if s := c.String("network"); s != "" {
		return s
	}
	return "none"
}

// hintsOf looks through the configuration of a point.
func (c *call) hintsOf(r *store.Repo, p *store.Point, host *qemu.Host) (h boot.Hints, nvram []byte, err error) {
	for i := range p.Config {
		f := &p.Config[i]
		switch {
		case strings.HasSuffix(strings.ToLower(f.Name), ".vmx"):
			b, err := configOf(r, p, f)
			if err != nil {
				return h, nil, err
			}
			h = boot.ParseVMX(b)
		case isNVRAM(f.Name):
			b, err := configOf(r, p, f)
			if err != nil {
				return h, nil, err
			}
			if host.Fits(b) {
				nvram = b
			} else {
				c.progress.note("%s is not of this host's firmware: the VM starts with empty variables", f.Name)
			}
		}
	}
	return h, nvram, nil
}

// committed is the result of a commit.
type committed struct {
	Type string        `json:"type"` // "boot commit"
	ID   store.PointID `json:"id"`
	VM   string        `json:"vm"`
	Name string        `json:"name"`
	store.Stats
}

// ask has the process that serves the session do it.
func (p *committed) ask(ctx context.Context, s *boot.State, tags []string) error {
	text, err := s.AskCommit(ctx, tags)
	if err != nil {
		return err
	}
	return json.Unmarshal(text, p)
}

// commitSession makes a point of the disks of a session as they are now.
func (c *call) commitSession(ctx context.Context, s *boot.Session, tags []string) (*committed, error) {
	was := s.BootedPoint()
	for _, d := range s.Machine.Disks {
		if d.File != "" {
			return nil, withHint(fmt.Errorf("%s of %s was moved to %s", d.Name, s.Name, d.File), "'holdfast backup %s --vm %s' backs it up", d.File, was.VM.Name)
		}
	}
	snap := &overlaid.Snapshot{Machine: was.VM, Point: was.ID, State: "offline"}
	if s.Runs() {
		snap.State = "crash"
	}
	var p *store.Point
	err := s.Frozen(ctx, func() (err error) {
		snap.Taken = c.clock.now()
		if snap.Files, err = c.configAfter(s, was); err != nil {
			return err
		}
		for i := range was.Disks {
			snap.Add(was.Disks[i].Name, was.Disks[i].Key, s.Disk(i))
		}
		p, err = backup.RunTo(ctx, backup.LocalOn(s.Repo(), was.ID), snap, backup.Options{Tags: tags, Program: programVersion(), LockFor: c.cfg.backup.lockFor, Now: c.clock.now})
		return err
	})
	if err != nil {
		return nil, err
	}
	return &committed{Type: "boot commit", ID: p.ID, VM: p.VM.Name, Name: p.Name, Stats: p.Stats}, nil
}

// configAfter is the configuration of the point that was booted, with the variables of UEFI as they are now.
func (c *call) configAfter(s *boot.Session, was *store.Point) ([]backup.ConfigFile, error) {
	var files []backup.ConfigFile
	for i := range was.Config {
		f := &was.Config[i]
		if f.Name == boot.NVRAMFile {
			continue
		}
		b, err := configOf(s.Repo(), was, f)
		if err != nil {
			return nil, err
		}
		files = append(files, backup.ConfigFile{Name: f.Name, Data: b})
	}
	if s.Machine.Firmware != boot.UEFI {
		return files, nil
	}
	b, err := os.ReadFile(s.File(boot.NVRAMFile))
	if errors.Is(err, os.ErrNotExist) {
		return files, nil
	}
	return append(files, backup.ConfigFile{Name: boot.NVRAMFile, Data: b}), err
}
