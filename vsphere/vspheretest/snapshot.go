package vspheretest

import (
	"fmt"
	"maps"
	"os"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// CreateSnapshotTask freezes the disks.
func (o *vmObject) CreateSnapshotTask(ctx *simulator.Context, req *types.CreateSnapshot_Task) soap.HasFault {
	ref := o.vm.s.task(ctx, o.Self, "CreateSnapshot", func(ctx *simulator.Context) (types.AnyType, types.BaseMethodFault) {
		return o.vm.createSnapshot(ctx, req, true)
	})
	return &methods.CreateSnapshot_TaskBody{Res: &types.CreateSnapshot_TaskResponse{Returnval: ref}}
}

// CreateSnapshotExTask is the newer form of the same.
func (o *vmObject) CreateSnapshotExTask(ctx *simulator.Context, req *types.CreateSnapshotEx_Task) soap.HasFault {
	plain := &types.CreateSnapshot_Task{This: req.This, Name: req.Name, Description: req.Description, Memory: req.Memory, Quiesce: req.QuiesceSpec != nil}
	ref := o.vm.s.task(ctx, o.Self, "CreateSnapshotEx", func(ctx *simulator.Context) (types.AnyType, types.BaseMethodFault) {
		return o.vm.createSnapshot(ctx, plain, true)
	})
	return &methods.CreateSnapshotEx_TaskBody{Res: &types.CreateSnapshotEx_TaskResponse{Returnval: ref}}
}

// AddUserSnapshot takes a snapshot as a user does, who is neither counted nor disturbed by faults.
func (vm *VM) AddUserSnapshot(name string) types.ManagedObjectReference {
	res, fault := vm.createSnapshot(vm.s.context(), &types.CreateSnapshot_Task{This: vm.ref, Name: name}, false)
	if fault != nil {
		vm.s.t.Fatalf("vspheretest: snapshot %s: %T", name, fault)
	}
	return res.(types.ManagedObjectReference)
}

// createSnapshot freezes the disks first: what vcsim then copies is the configuration with the frozen files in it.
func (vm *VM) createSnapshot(ctx *simulator.Context, req *types.CreateSnapshot_Task, client bool) (types.AnyType, types.BaseMethodFault) {
	vm.ops.Lock()
	defer vm.ops.Unlock()
	sim := vm.sim()
	if sim == nil {
		return nil, &types.ManagedObjectNotFound{Obj: vm.ref}
	}
	if client {
		if fault := vm.refuseSnapshot(ctx, sim, req.Quiesce); fault != nil {
			return nil, fault
		}
	}
	frozen, err := vm.freeze()
	if err != nil {
		return nil, &types.FileFault{File: err.Error()}
	}
	if f := vm.s.getHooks().OnFrozen; f != nil && client {
		f(vm, req.Name)
	}
	snap := &snapshot{name: req.Name, quiesced: req.Quiesce, disks: frozen}
	var res types.AnyType
	var fault types.BaseMethodFault
	ctx.WithLock(sim, func() {
		ownLayout(sim)
		if res, fault = wait(ctx, sim.CreateSnapshotTask(ctx, req).(*methods.CreateSnapshot_TaskBody).Res.Returnval); fault != nil {
			return
		}
		if client {
			snap.counted = vm.gaugeKeys(ctx, sim)
		}
		snap.file = snapshotFile(sim, res.(types.ManagedObjectReference))
		vm.mu.Lock()
		vm.snapshots[res.(types.ManagedObjectReference)] = snap
		vm.mu.Unlock()
		vm.publish(ctx, sim)
	})
	for _, key := range snap.counted {
		vm.s.count(func(c *counters) { c.snapshots.add(key, 1) })
	}
	return res, fault
}

// refuseSnapshot says why there can be no snapshot.
func (vm *VM) refuseSnapshot(ctx *simulator.Context, sim *simulator.VirtualMachine, quiesce bool) types.BaseMethodFault {
	vm.s.mu.Lock()
	delay := vm.s.faults.SnapshotDelay
	vm.s.mu.Unlock()
	vm.s.sleep(delay)
	var template bool
	var datastore types.ManagedObjectReference
	ctx.WithLock(sim, func() { template, datastore = sim.Config.Template, sim.Datastore[0] })
	if template {
		return &types.NotSupported{}
	}
	vm.mu.Lock()
	depth, on := 0, vm.on
	for _, d := range vm.disks {
		depth = max(depth, len(d.layers)-1)
	}
	vm.mu.Unlock()
	return vm.s.snapshotFault(quiesce && on, depth, datastore)
}

// gaugeKeys are what snapshots are counted by.
func (vm *VM) gaugeKeys(ctx *simulator.Context, sim *simulator.VirtualMachine) []string {
	host := ctx.Map.Get(*sim.Runtime.Host).(*simulator.HostSystem)
	return []string{"", vm.Datastore(), host.Name}
}

// RemoveSnapshotTask merges what was written since into the layer below, unless told otherwise.
func (o *snapshotObject) RemoveSnapshotTask(ctx *simulator.Context, req *types.RemoveSnapshot_Task) soap.HasFault {
	ref := o.s.task(ctx, o.Vm, "RemoveSnapshot", func(ctx *simulator.Context) (types.AnyType, types.BaseMethodFault) {
		vm := o.s.vm(o.Vm)
		if vm == nil {
			return nil, &types.ManagedObjectNotFound{Obj: o.Vm}
		}
		return nil, vm.removeSnapshot(ctx, req)
	})
	return &methods.RemoveSnapshot_TaskBody{Res: &types.RemoveSnapshot_TaskResponse{Returnval: ref}}
}

// RemoveAllSnapshotsTask removes the whole tree.
func (o *vmObject) RemoveAllSnapshotsTask(ctx *simulator.Context, req *types.RemoveAllSnapshots_Task) soap.HasFault {
	ref := o.vm.s.task(ctx, o.Self, "RemoveAllSnapshots", func(ctx *simulator.Context) (types.AnyType, types.BaseMethodFault) {
		for _, root := range o.vm.tree(ctx) {
			one := &types.RemoveSnapshot_Task{This: root.Snapshot, RemoveChildren: true, Consolidate: req.Consolidate}
			if fault := o.vm.removeSnapshot(ctx, one); fault != nil {
				return nil, fault
			}
		}
		return nil, nil
	})
	return &methods.RemoveAllSnapshots_TaskBody{Res: &types.RemoveAllSnapshots_TaskResponse{Returnval: ref}}
}

// tree is a copy of the snapshots' tree.
func (vm *VM) tree(ctx *simulator.Context) []types.VirtualMachineSnapshotTree {
	var roots []types.VirtualMachineSnapshotTree
	sim := vm.sim()
	ctx.WithLock(sim, func() {
		if sim.Snapshot != nil {
			roots = cloned(sim.Snapshot).RootSnapshotList
		}
	})
	return roots
}

// below gives the snapshot and all that were taken after it, or nothing.
func below(tree []types.VirtualMachineSnapshotTree, ref types.ManagedObjectReference, inside bool) []types.ManagedObjectReference {
	var all []types.ManagedObjectReference
	for _, node := range tree {
		in := inside || node.Snapshot == ref
		if in {
			all = append(all, node.Snapshot)
		}
		all = append(all, below(node.ChildSnapshotList, ref, in)...)
	}
	return all
}

func (vm *VM) removeSnapshot(ctx *simulator.Context, req *types.RemoveSnapshot_Task) types.BaseMethodFault {
	vm.ops.Lock()
	defer vm.ops.Unlock()
	merge, fault := vm.s.removalFault(req)
	if fault != nil {
		return fault
	}
	obj, ok := ctx.Map.Get(req.This).(*simulator.VirtualMachineSnapshot)
	sim := vm.sim()
	if !ok || sim == nil {
		return &types.ManagedObjectNotFound{Obj: req.This}
	}
	refs := []types.ManagedObjectReference{req.This}
	if req.RemoveChildren {
		refs = below(vm.tree(ctx), req.This, false)
	}
	ctx.WithLock(sim, func() {
		vm.refreshLayout(ctx, sim)
		_, fault = wait(ctx, obj.RemoveSnapshotTask(ctx, req).(*methods.RemoveSnapshot_TaskBody).Res.Returnval)
		vm.mendCurrent(ctx, sim, refs)
	})
	if fault != nil {
		return fault
	}
	vm.forget(ctx, refs)
	if merge {
		if fault := vm.mergeLayers(); fault != nil {
			return fault
		}
	}
	ctx.WithLock(sim, func() { vm.publish(ctx, sim) })
	return nil
}

// removalFault says how a removal goes wrong, and whether it merges.
func (s *Server) removalFault(req *types.RemoveSnapshot_Task) (merge bool, fault types.BaseMethodFault) {
	s.mu.Lock()
	delay := s.faults.RemoveDelay
	s.mu.Unlock()
	s.sleep(delay)
	s.mu.Lock()
	defer s.mu.Unlock()
	f := &s.faults
	if take(&f.RemoveFails) {
		return false, orFault(f.RemoveFault, &types.GenericVmConfigFault{Reason: "the snapshot is in use"})
	}
	return (req.Consolidate == nil || *req.Consolidate) && !take(&f.LeaveConsolidation), nil
}

// mendCurrent mends what vcsim leaves when the current snapshot went with its parent. The lock of sim is held.
func (vm *VM) mendCurrent(ctx *simulator.Context, sim *simulator.VirtualMachine, gone []types.ManagedObjectReference) {
	if sim.Snapshot == nil || sim.Snapshot.CurrentSnapshot == nil {
		return
	}
	for _, ref := range gone {
		if *sim.Snapshot.CurrentSnapshot == ref {
			ctx.Update(sim, []types.PropertyChange{{Name: "snapshot.currentSnapshot", Val: nil}})
			return
		}
	}
}

// forget drops snapshots that are no more.
func (vm *VM) forget(ctx *simulator.Context, refs []types.ManagedObjectReference) {
	for _, ref := range refs {
		if ctx.Map.Get(ref) != nil {
			ctx.Map.Remove(ctx, ref)
		}
		vm.mu.Lock()
		snap := vm.snapshots[ref]
		delete(vm.snapshots, ref)
		vm.mu.Unlock()
		if snap == nil {
			continue
		}
		if snap.file != "" {
			_ = os.Remove(vm.File(snap.file))
		}
		for _, key := range snap.counted {
			vm.s.count(func(c *counters) { c.snapshots.add(key, -1) })
		}
	}
}

func (vm *VM) mergeLayers() types.BaseMethodFault {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if err := vm.consolidate(); err != nil {
		return &types.FileFault{File: err.Error()}
	}
	return nil
}

// ConsolidateVMDisksTask merges what a removal has left.
func (o *vmObject) ConsolidateVMDisksTask(ctx *simulator.Context, _ *types.ConsolidateVMDisks_Task) soap.HasFault {
	ref := o.vm.s.task(ctx, o.Self, "ConsolidateVMDisks", func(ctx *simulator.Context) (types.AnyType, types.BaseMethodFault) {
		o.vm.ops.Lock()
		defer o.vm.ops.Unlock()
		fault := o.vm.s.fault(func(f *Faults) types.BaseMethodFault {
			if take(&f.ConsolidationFails) {
				return &types.FileLocked{FileFault: types.FileFault{File: "delta"}}
			}
			return nil
		})
		if fault == nil {
			fault = o.vm.mergeLayers()
		}
		sim := o.vm.sim()
		ctx.WithLock(sim, func() { o.vm.publish(ctx, sim) })
		return nil, fault
	})
	return &methods.ConsolidateVMDisks_TaskBody{Res: &types.ConsolidateVMDisks_TaskResponse{Returnval: ref}}
}

// RevertToSnapshotTask throws away what was written since.
func (o *snapshotObject) RevertToSnapshotTask(ctx *simulator.Context, req *types.RevertToSnapshot_Task) soap.HasFault {
	ref := o.s.task(ctx, o.Vm, "RevertToSnapshot", func(ctx *simulator.Context) (types.AnyType, types.BaseMethodFault) {
		return nil, o.s.vm(o.Vm).revert(ctx, o.VirtualMachineSnapshot)
	})
	return &methods.RevertToSnapshot_TaskBody{Res: &types.RevertToSnapshot_TaskResponse{Returnval: ref}}
}

// Revert takes the VM back to a snapshot.
func (vm *VM) Revert(snapshot types.ManagedObjectReference) {
	obj, ok := vm.s.model.Map().Get(snapshot).(*simulator.VirtualMachineSnapshot)
	if !ok {
		vm.s.t.Fatalf("vspheretest: no snapshot %s", snapshot.Value)
	}
	if fault := vm.revert(vm.s.context(), obj); fault != nil {
		vm.s.t.Fatalf("vspheretest: revert: %T", fault)
	}
}

func (vm *VM) revert(ctx *simulator.Context, obj *simulator.VirtualMachineSnapshot) types.BaseMethodFault {
	vm.ops.Lock()
	defer vm.ops.Unlock()
	if err := vm.revertDisks(obj.Self); err != nil {
		return &types.FileFault{File: err.Error()}
	}
	sim := vm.sim()
	var fault types.BaseMethodFault
	ctx.WithLock(sim, func() {
		ownLayout(sim)
		req := &types.RevertToSnapshot_Task{This: obj.Self}
		_, fault = wait(ctx, obj.RevertToSnapshotTask(ctx, req).(*methods.RevertToSnapshot_TaskBody).Res.Returnval)
		vm.publish(ctx, sim)
	})
	return fault
}

// revertDisks puts new deltas over what the snapshot froze. Change ids from before are no longer of use.
func (vm *VM) revertDisks(ref types.ManagedObjectReference) error {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	snap := vm.snapshots[ref]
	if snap == nil {
		return fmt.Errorf("no snapshot %s", ref.Value)
	}
	for _, d := range vm.disks {
		f := snap.disks[d.key]
		if f == nil {
			continue
		}
		old := d.active
		d.active, d.size = f.layer, f.size
		l, err := vm.newDelta(d)
		if err != nil {
			return err
		}
		d.push(l)
		if len(d.children(old)) == 0 && old.isDelta() {
			d.drop(old)
		}
		if d.allocated = maps.Clone(f.allocated); d.track != nil {
			d.track = newTracking()
		}
	}
	return vm.consolidate()
}
