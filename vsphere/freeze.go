package vsphere

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/holdfast-backup/holdfast/backup"
)

// machine is a VM as it is when its backup begins.
type machine struct {
	VM
	mo mo.VirtualMachine
}

// frozen are the properties that a backup takes.
var frozen = []string{"name", "parent", "parentVApp", "resourcePool", "config", "runtime", "snapshot", "datastore", "network", "layoutEx", "customValue", "capability", "guest.toolsRunningStatus"}

// Freeze makes a snapshot of a VM. A template has none: it is read as it lies there.
func (s *Source) Freeze(ctx context.Context, name string) (backup.Snapshot, error) {
	if s.cfg.Journal == nil {
		return nil, errors.New("vsphere: no journal")
	}
	vm, err := s.find(ctx, name)
	if err != nil {
		return nil, err
	}
	m := &machine{VM: vm}
	if err := s.read(ctx, m); err != nil {
		return nil, m.failed("read its configuration", err)
	}
	return s.freeze(ctx, m)
}

// read reads a VM anew. A listing may be hours old.
func (s *Source) read(ctx context.Context, m *machine) error {
	m.mo = mo.VirtualMachine{}
	if err := s.c.retrieve(ctx, m.ref, frozen, &m.mo); err != nil {
		return err
	}
	if m.mo.Config == nil {
		return fmt.Errorf("its configuration cannot be read now: the VM is %s", m.mo.Runtime.ConnectionState)
	}
	m.On = m.mo.Runtime.PowerState == types.VirtualMachinePowerStatePoweredOn
	c := m.mo.Config
	m.Template, m.Tracked = c.Template, c.ChangeTrackingEnabled != nil && *c.ChangeTrackingEnabled
	return nil
}

// toolsRun reports whether somebody in the guest can prepare it for a snapshot. Without, the server ignores that it was asked for:
// vSphere API, CreateSnapshot_Task.
func (m *machine) toolsRun() bool {
	return m.mo.Guest != nil && m.mo.Guest.ToolsRunningStatus == string(types.VirtualMachineToolsRunningStatusGuestToolsRunning)
}

// failed says what was tried on which VM.
func (m *machine) failed(what string, err error) error {
	return fmt.Errorf("vsphere: %s: %s: %w", m.Path, what, missing(err))
}

func (s *Source) freeze(ctx context.Context, m *machine) (_ *snapshot, err error) {
	snap := &snapshot{src: s, vm: m, consistency: "offline"}
	defer func() {
		if err != nil {
			err = errors.Join(err, snap.Close())
		}
	}()
	if err := s.tidy(ctx, m); err != nil {
		return nil, err
	}
	if m.Template {
		snap.at, snap.config = time.Now(), *m.mo.Config
		return snap, snap.open(ctx)
	}
	if err := s.enableTracking(ctx, m, snap); err != nil {
		return nil, err
	}
	if snap.release, err = s.limits.take(ctx, m.host(), m.datastores()); err != nil {
		return nil, err
	}
	if err := s.read(ctx, m); err != nil { // that may have taken long
		return nil, m.failed("read its configuration", err)
	}
	if err := s.take(ctx, m, snap); err != nil {
		return nil, err
	}
	return snap, snap.open(ctx)
}

func (m *machine) host() string {
	if m.mo.Runtime.Host == nil {
		return ""
	}
	return m.mo.Runtime.Host.Value
}

func (m *machine) datastores() []string {
	var all []string
	for _, d := range m.mo.Datastore {
		all = append(all, d.Value)
	}
	return all
}

// enableTracking switches changed block tracking on where that is asked for. It takes effect with the next snapshot, which must be the only
// one: VMware's Virtual Disk Programming Guide, "Enabling Changed Block Tracking".
func (s *Source) enableTracking(ctx context.Context, m *machine, snap *snapshot) error {
	if s.cfg.Tracking != TrackingEnable || m.Tracked {
		return nil
	}
	if m.mo.Snapshot != nil && len(m.mo.Snapshot.RootSnapshotList) > 0 {
		snap.warn("changed block tracking was not switched on: that needs a VM without snapshots")
		return nil
	}
	if err := s.setTracking(ctx, m, true); err != nil {
		snap.warn(fmt.Sprintf("changed block tracking could not be switched on: %v", missing(err)))
		return ctx.Err()
	}
	s.logf("%s: changed block tracking switched on", m.Path)
	m.Tracked = true
	return nil
}

func (s *Source) setTracking(ctx context.Context, m *machine, on bool) error {
	req := &types.ReconfigVM_Task{This: m.ref, Spec: types.VirtualMachineConfigSpec{ChangeTrackingEnabled: types.NewBool(on)}}
	res, err := methods.ReconfigVM_Task(ctx, s.c, req)
	if err == nil {
		_, err = s.wait(ctx, res.Returnval)
	}
	return err
}

// Snapshots that a guest could not prepare for are tried so often, after such a pause.
const (
	quiesceAttempts = 3
	quiescePause    = 5 * time.Second
)

// take makes the snapshot, by the policy.
func (s *Source) take(ctx context.Context, m *machine, snap *snapshot) error {
	quiesce := m.On && s.cfg.Quiesce != QuiesceOff
	if s.cfg.Quiesce == QuiesceRequire && m.mo.Runtime.PowerState != types.VirtualMachinePowerStatePoweredOff {
		if !m.On {
			return m.failed("make a snapshot that the guest prepares for", fmt.Errorf("it is %s", m.mo.Runtime.PowerState))
		}
		if !m.toolsRun() {
			return m.failed("make a snapshot that the guest prepares for", ErrNoTools)
		}
	}
	for n := 1; ; n++ {
		err := s.create(ctx, m, snap, quiesce)
		switch {
		case err == nil:
			if quiesce && !m.toolsRun() {
				snap.warn(fmt.Sprintf("the guest did not prepare for the snapshot (%v): the point is crash-consistent", ErrNoTools))
				quiesce = false
			}
			if m.mo.Runtime.PowerState != types.VirtualMachinePowerStatePoweredOff { // a suspended one has not written what its memory holds
				snap.consistency = map[bool]string{true: "application", false: "crash"}[quiesce]
			}
			return nil
		case !quiesce || !unquiet(err):
			return m.failed("make a snapshot", err)
		case n < quiesceAttempts:
			s.logf("%s: the guest could not prepare for a snapshot; trying again", m.Path)
			if err := s.cfg.Sleep(ctx, quiescePause); err != nil {
				return err
			}
		case s.cfg.Quiesce == QuiesceRequire:
			return m.failed("make a snapshot that the guest prepares for", err)
		default:
			snap.warn(fmt.Sprintf("the guest could not prepare for the snapshot (%v): the point is crash-consistent", err))
			quiesce = false
		}
	}
}

// ErrNoTools: nobody in the guest can prepare it for a snapshot.
var ErrNoTools = errors.New("VMware Tools do not run in the guest")

// unquiet reports whether err is about what the guest did before the snapshot.
func unquiet(err error) bool {
	return fault.Is(err, &types.ApplicationQuiesceFault{}) || fault.Is(err, &types.FilesystemQuiesceFault{}) || fault.Is(err, &types.ToolsUnavailable{}) ||
		fault.Is(err, &types.QuiesceDatastoreIOForHAFailed{})
}

// create makes one snapshot, which is in the journal before.
func (s *Source) create(ctx context.Context, m *machine, snap *snapshot, quiesce bool) error {
	name, err := newName()
	if err != nil {
		return err
	}
	if snap.entry, err = s.cfg.Journal.Begin(backup.Leftover{Source: s.cfg.Name, Host: s.c.URL().Host, VM: m.ID, Name: name, Began: time.Now().UTC()}); err != nil {
		return err
	}
	snap.name = name
	req := &types.CreateSnapshot_Task{This: m.ref, Name: name, Description: about(), Quiesce: quiesce}
	// A task that has begun is waited for even when the run is cancelled: the snapshot that it makes has to be removed.
	res, err := methods.CreateSnapshot_Task(ctx, s.c, req)
	var made types.AnyType
	if err == nil {
		waiting, cancel := context.WithTimeout(context.WithoutCancel(ctx), snapshotTime)
		made, err = s.wait(waiting, res.Returnval)
		cancel()
	}
	if err != nil {
		return errors.Join(err, snap.remove())
	}
	ref, ok := made.(types.ManagedObjectReference)
	if !ok {
		return errors.Join(fmt.Errorf("the task gave %T, no snapshot", made), snap.remove())
	}
	snap.ref, snap.at = &ref, time.Now()
	var have mo.VirtualMachineSnapshot
	if err := s.c.retrieve(ctx, ref, []string{"config"}, &have); err != nil {
		return err
	}
	snap.config = have.Config
	return cmp.Or(ctx.Err(), nil)
}

// snapshotTime is how long making or removing a snapshot may take.
const snapshotTime = 6 * time.Hour
