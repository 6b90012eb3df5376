package vsphere

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/holdfast-backup/holdfast/backup"
)

// prefix begins the names of our snapshots; what follows is drawn by lot, so that one is told from those of any other run.
const prefix = "holdfast-"

func newName() (string, error) {
	var b [8]byte
	_, err := rand.Read(b[:])
	return prefix + hex.EncodeToString(b[:]), err
}

// about is the description of a snapshot, for whoever looks at the VM.
func about() string {
	host, _ := os.Hostname()
	return fmt.Sprintf("Made for a backup by holdfast on %s; it is removed when the backup ends.", host)
}

// maxChain is how many snapshots one above the other a VM may have before it gets one more. vSphere allows 32.
const maxChain = 28

// tidy removes what earlier runs left on a VM, and refuses one that must not get another snapshot.
func (s *Source) tidy(ctx context.Context, m *machine) error {
	left, err := s.cfg.Journal.Left(ctx, func(l backup.Leftover) bool { return l.Host == s.c.URL().Host && l.VM == m.ID })
	if err != nil {
		return err
	}
	defer leaveAll(left)
	removed := false
	for _, e := range left {
		if err := s.removeLeft(ctx, e); err != nil {
			return m.failed("remove a snapshot that an earlier run left", err)
		}
		removed = true
	}
	if removed {
		if err := s.read(ctx, m); err != nil {
			return m.failed("read its configuration", err)
		}
	}
	if m.mo.Runtime.ConsolidationNeeded {
		if err := s.consolidate(ctx, m.ref); err != nil {
			return m.failed("consolidate its disks", err)
		}
		s.logf("%s: disks consolidated", m.Path)
		if err := s.read(ctx, m); err != nil {
			return m.failed("read its configuration", err)
		}
	}
	if n := chain(m.mo.Snapshot); n > maxChain {
		return fmt.Errorf("vsphere: %s has %d snapshots one above the other: remove some of them, or consolidate its disks; vSphere allows 32", m.Path, n)
	}
	return nil
}

// CleanUp removes the snapshots that earlier runs left, and says which. Those of a run that is under way are left alone.
func (s *Source) CleanUp(ctx context.Context) (removed []backup.Leftover, err error) {
	var errs []error
	seen := map[string]bool{} // names
	for {
		// One at a time: a backup of a VM whose entry is held by somebody takes it for one under way.
		more := false
		left, err := s.cfg.Journal.Left(ctx, func(l backup.Leftover) bool {
			if more || l.Host != s.c.URL().Host || seen[l.Name] {
				return false
			}
			more, seen[l.Name] = true, true
			return true
		})
		if err != nil || !more {
			return removed, errors.Join(append(errs, err)...)
		}
		for _, e := range left {
			what := e.Leftover
			if err := s.removeLeft(ctx, e); err != nil {
				errs = append(errs, fmt.Errorf("vsphere: %s: remove snapshot %s: %w", what.VM, what.Name, missing(err)))
				continue
			}
			removed = append(removed, what)
		}
	}
}

func leaveAll(list []*backup.JournalEntry) {
	for _, e := range list {
		e.Leave()
	}
}

// removeLeft removes what an entry of the journal names.
func (s *Source) removeLeft(ctx context.Context, e *backup.JournalEntry) error {
	vm := types.ManagedObjectReference{Type: "VirtualMachine", Value: e.VM}
	err := s.removeNamed(ctx, vm, e.Name)
	if fault.Is(err, &types.ManagedObjectNotFound{}) { // the VM is gone, and its snapshots with it
		err = nil
	}
	if err != nil {
		e.Leave()
		return err
	}
	s.logf("%s: snapshot %s of an earlier run is gone", e.VM, e.Name)
	return e.Clear()
}

// removeNamed removes the snapshots of a name, of which there are two where a request was made again that had been heard.
func (s *Source) removeNamed(ctx context.Context, vm types.ManagedObjectReference, name string) error {
	if err := s.settle(ctx, vm); err != nil {
		return err
	}
	for range 2 * attempts {
		m := machine{VM: VM{ref: vm}}
		if err := s.c.retrieve(ctx, vm, []string{"snapshot"}, &m.mo); err != nil {
			return err
		}
		if m.mo.Snapshot == nil {
			return nil
		}
		ref := named(m.mo.Snapshot.RootSnapshotList, name)
		if ref == nil {
			return nil
		}
		if err := s.removeSnapshot(ctx, *ref); err != nil {
			return err
		}
	}
	return fmt.Errorf("snapshot %s is still there after it was removed", name)
}

// settle waits for snapshots that are being made: who asked for them may have been killed meanwhile.
func (s *Source) settle(ctx context.Context, vm types.ManagedObjectReference) error {
	var have mo.VirtualMachine
	if err := s.c.retrieve(ctx, vm, []string{"recentTask"}, &have); err != nil {
		return err
	}
	for _, ref := range have.RecentTask {
		var t mo.Task
		err := s.c.retrieve(ctx, ref, []string{"info"}, &t)
		if fault.Is(err, &types.ManagedObjectNotFound{}) {
			continue
		}
		if err != nil {
			return err
		}
		if t.Info.DescriptionId == "VirtualMachine.createSnapshot" && (t.Info.State == types.TaskInfoStateRunning || t.Info.State == types.TaskInfoStateQueued) {
			_, _ = s.wait(ctx, ref) // whatever became of it, the list of snapshots says
		}
	}
	return ctx.Err()
}

func named(list []types.VirtualMachineSnapshotTree, name string) *types.ManagedObjectReference {
	if !strings.HasPrefix(name, prefix) { // never one of somebody else's
		return nil
	}
	for i := range list {
		if list[i].Name == name {
			return &list[i].Snapshot
		}
		if ref := named(list[i].ChildSnapshotList, name); ref != nil {
			return ref
		}
	}
	return nil
}

func (s *Source) removeSnapshot(ctx context.Context, ref types.ManagedObjectReference) error {
	res, err := methods.RemoveSnapshot_Task(ctx, s.c, &types.RemoveSnapshot_Task{This: ref, Consolidate: types.NewBool(true)})
	if err == nil {
		_, err = s.wait(ctx, res.Returnval)
	}
	if fault.Is(err, &types.ManagedObjectNotFound{}) {
		return nil
	}
	return err
}

func (s *Source) consolidate(ctx context.Context, vm types.ManagedObjectReference) error {
	res, err := methods.ConsolidateVMDisks_Task(ctx, s.c, &types.ConsolidateVMDisks_Task{This: vm})
	if err == nil {
		_, err = s.wait(ctx, res.Returnval)
	}
	return err
}

// chain is how many snapshots are one above the other at most.
func chain(info *types.VirtualMachineSnapshotInfo) int {
	if info == nil {
		return 0
	}
	return depth(info.RootSnapshotList)
}

func depth(list []types.VirtualMachineSnapshotTree) int {
	most := 0
	for i := range list {
		most = max(most, 1+depth(list[i].ChildSnapshotList))
	}
	return most
}

// Removing is tried so often, after such a pause: nothing else must happen to the VM meanwhile, such as a migration.
const (
	removeAttempts = 5
	removePause    = 5 * time.Second
)

// removeAll removes a snapshot, and whatever else has its name.
func (s *Source) removeAll(ctx context.Context, vm types.ManagedObjectReference, ref *types.ManagedObjectReference, name string) (err error) {
	for n := 1; ; n++ {
		if err = nil; ref != nil {
			err = s.removeSnapshot(ctx, *ref)
		}
		if err == nil {
			err = s.removeNamed(ctx, vm, name)
		}
		if err == nil || n == removeAttempts || fault.Is(err, &types.NoPermission{}) {
			return err
		}
		s.logf("snapshot %s could not be removed (%v); trying again", name, err)
		if err := s.cfg.Sleep(ctx, removePause); err != nil {
			return err
		}
	}
}
