package vsphere

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/vmware/govmomi/vim25/types"

	"github.com/holdfast-backup/holdfast/backup"
)

// snapshot is a VM held still.
type snapshot struct {
	src         *Source
	vm          *machine
	config      types.VirtualMachineConfigInfo // as it was when the snapshot was made
	at          time.Time
	consistency string
	disks       []*disk
	warnings    []string

	exported *export                       // nil: none
	name     string                        // of the snapshot; empty for a template
	ref      *types.ManagedObjectReference // nil: none
	entry    *backup.JournalEntry
	release  func() // of the limits

	close sync.Once
	err   error // of close
}

var (
	_ backup.Snapshot = (*snapshot)(nil)
	_ backup.Warner   = (*snapshot)(nil)
)

func (s *snapshot) warn(text string) { s.warnings = append(s.warnings, text) }

// Warnings implements backup.Warner.
func (s *snapshot) Warnings() []string { return s.warnings }

// VM implements backup.Snapshot.
func (s *snapshot) VM() backup.VM {
	return backup.VM{Name: s.vm.Name, UUID: s.config.InstanceUuid, Source: "vsphere"}
}

// Time implements backup.Snapshot.
func (s *snapshot) Time() time.Time { return s.at }

// Consistency implements backup.Snapshot.
func (s *snapshot) Consistency() string { return s.consistency }

// Disks implements backup.Snapshot.
func (s *snapshot) Disks() []backup.Disk {
	out := make([]backup.Disk, len(s.disks))
	for i, d := range s.disks {
		out[i] = d
	}
	return out
}

// open opens the disks.
func (s *snapshot) open(ctx context.Context) error {
	all := s.src.disksOf(s.config.Hardware.Device)
	live := s.src.disksOf(s.vm.mo.Config.Hardware.Device)
	for _, dev := range all {
		if dev.skip != "" {
			s.warn(fmt.Sprintf("%s (%s) is not in this point: it %s", dev.label, dev.file, dev.skip))
			continue
		}
		d := &disk{snap: s, device: dev}
		d.untracked = s.untracked(&dev, live)
		var err error
		if d.reader, err = s.src.openReader(ctx, s, &dev); err != nil {
			return s.vm.failed("open "+dev.label, err)
		}
		if d.untracked == "" && d.reader.Via() == TransportLease {
			d.untracked = "the host exports whole disks"
		}
		s.disks = append(s.disks, d)
	}
	// What an independent disk is the snapshot may not say.
	for _, dev := range live {
		if dev.skip != "" && !has(all, dev.key) {
			s.warn(fmt.Sprintf("%s (%s) is not in this point: it %s", dev.label, dev.file, dev.skip))
		}
	}
	return nil
}

func has(list []device, key int32) bool {
	for i := range list {
		if list[i].key == key {
			return true
		}
	}
	return false
}

// untracked says why changes of a disk are not known; empty when they are.
func (s *snapshot) untracked(dev *device, live []device) string {
	switch {
	case s.src.cfg.Tracking == TrackingOff:
		return "change tracking is switched off in the config"
	case !s.vm.Tracked:
		return "the VM has changed block tracking switched off"
	case s.ref == nil:
		return "there is no snapshot to compare with"
	case dev.changeID == "":
		return "the host gives no change id for it"
	case !has(live, dev.key):
		return "the VM has no such disk any more"
	}
	return ""
}

// Close implements backup.Snapshot: the snapshot is removed, also when the run was cancelled.
func (s *snapshot) Close() error {
	s.close.Do(func() {
		var errs []error
		for _, d := range s.disks {
			errs = append(errs, d.reader.Close())
		}
		if s.exported != nil {
			if err := s.exported.close(); err != nil {
				s.src.logf("%s: the export lease ends with %v", s.vm.Path, err)
			}
		}
		if err := s.remove(); err != nil {
			errs = append(errs, fmt.Errorf("vsphere: %s: remove snapshot %s: %w", s.vm.Path, s.name, missing(err)))
		}
		if s.release != nil {
			s.release()
		}
		s.err = errors.Join(errs...)
	})
	return s.err
}

// remove removes the snapshot, if one was made, and then its entry in the journal. What cannot be removed stays there.
func (s *snapshot) remove() error {
	if s.entry == nil {
		return nil
	}
	defer func() { s.entry, s.ref = nil, nil }()
	ctx, cancel := context.WithTimeout(context.Background(), snapshotTime)
	defer cancel()
	if err := s.src.removeAll(ctx, s.vm.ref, s.ref, s.name); err != nil {
		s.entry.Leave()
		return err
	}
	return s.entry.Clear()
}
