package vspheretest

import (
	"errors"
	"io"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// Resize grows a disk, as an administrator does.
func (vm *VM) Resize(disk int, size int64) {
	vm.mustChange(func() error {
		d := vm.disks[disk]
		if size < d.size {
			return errors.New("a disk does not shrink")
		}
		return d.resize(size)
	})
}

// ReplaceDisk puts another disk in the place of one: the file has its name, and nothing else of it.
func (vm *VM) ReplaceDisk(disk int, content io.ReaderAt) {
	vm.mustChange(func() error {
		d := vm.disks[disk]
		if len(vm.snapshots) > 0 {
			return errors.New("the VM has a snapshot")
		}
		d.track, d.active.uuid = nil, diskUUID()
		if err := d.load(content); err != nil {
			return err
		}
		return d.active.rewrite()
	})
}

// NeedsConsolidation leaves a delta that no snapshot accounts for, as a removal that went wrong does, and says so in the runtime.
func (vm *VM) NeedsConsolidation() {
	vm.mustChange(func() error {
		for _, d := range vm.disks {
			if !d.dependent {
				continue
			}
			l, err := vm.newDelta(d)
			if err != nil {
				return err
			}
			d.push(l)
		}
		return nil
	})
}

// mustChange changes disks, and publishes what came of it.
func (vm *VM) mustChange(change func() error) {
	vm.ops.Lock()
	defer vm.ops.Unlock()
	vm.mu.Lock()
	err := change()
	vm.mu.Unlock()
	vm.s.must(err)
	ctx, sim := vm.s.context(), vm.sim()
	ctx.WithLock(sim, func() { vm.publish(ctx, sim) })
}

// PowerOff stops the VM.
func (vm *VM) PowerOff() { vm.mustPower(false) }

// PowerOn starts it.
func (vm *VM) PowerOn() { vm.mustPower(true) }

func (vm *VM) mustPower(on bool) {
	if fault := vm.power(vm.s.context(), on); fault != nil {
		vm.s.t.Fatalf("vspheretest: power %v: %T", on, fault)
	}
}

func (vm *VM) power(ctx *simulator.Context, on bool) types.BaseMethodFault {
	sim := vm.sim()
	if sim == nil {
		return &types.ManagedObjectNotFound{Obj: vm.ref}
	}
	var res soap.HasFault
	if on {
		res = sim.PowerOnVMTask(ctx, &types.PowerOnVM_Task{This: vm.ref})
	} else {
		res = sim.PowerOffVMTask(ctx, &types.PowerOffVM_Task{This: vm.ref})
	}
	switch res := res.(type) {
	case *methods.PowerOnVM_TaskBody:
		if res.Fault_ != nil {
			return &types.InvalidState{} // a template
		}
		_, fault := wait(ctx, res.Res.Returnval)
		return fault
	case *methods.PowerOffVM_TaskBody:
		_, fault := wait(ctx, res.Res.Returnval)
		return fault
	}
	return nil
}

// PowerOnVMTask starts the VM.
func (o *vmObject) PowerOnVMTask(ctx *simulator.Context, _ *types.PowerOnVM_Task) soap.HasFault {
	ref := o.vm.s.task(ctx, o.Self, "PowerOnVM", func(ctx *simulator.Context) (types.AnyType, types.BaseMethodFault) {
		if fault := o.vm.ask(ctx); fault != nil {
			return nil, fault
		}
		return nil, o.vm.power(ctx, true)
	})
	return &methods.PowerOnVM_TaskBody{Res: &types.PowerOnVM_TaskResponse{Returnval: ref}}
}

// PowerOffVMTask stops it.
func (o *vmObject) PowerOffVMTask(ctx *simulator.Context, _ *types.PowerOffVM_Task) soap.HasFault {
	ref := o.vm.s.task(ctx, o.Self, "PowerOffVM", func(ctx *simulator.Context) (types.AnyType, types.BaseMethodFault) {
		return nil, o.vm.power(ctx, false)
	})
	return &methods.PowerOffVM_TaskBody{Res: &types.PowerOffVM_TaskResponse{Returnval: ref}}
}

// Describe changes what vcsim says of the VM: the test sets what it likes in a copy of the configuration.
func (vm *VM) Describe(change func(c *types.VirtualMachineConfigInfo)) {
	ctx, sim := vm.s.context(), vm.sim()
	ctx.WithLock(sim, func() {
		c := cloned(sim.Config)
		change(c)
		ctx.Update(sim, []types.PropertyChange{{Name: "config", Val: c}})
	})
}

// SetDatastoreType says what kind of file system a datastore has: "VMFS", "NFS", "VVOL". vcsim itself behaves otherwise for "vsan".
func (s *Server) SetDatastoreType(name, kind string) {
	ds, err := s.datastore(name)
	s.must(err)
	s.changeDatastore(ds, types.PropertyChange{Name: "summary.type", Val: kind})
}

// SetFreeSpace says how much of a datastore is free, in bytes.
func (s *Server) SetFreeSpace(name string, n int64) {
	ds, err := s.datastore(name)
	s.must(err)
	s.changeDatastore(ds, types.PropertyChange{Name: "summary.freeSpace", Val: n})
}

// SetDatastoreHosts says which hosts have a datastore mounted.
func (s *Server) SetDatastoreHosts(name string, hosts ...string) {
	ds, err := s.datastore(name)
	s.must(err)
	var mounts []types.DatastoreHostMount
	for _, h := range hosts {
		mounts = append(mounts, types.DatastoreHostMount{Key: *s.host(h)})
	}
	s.changeDatastore(ds, types.PropertyChange{Name: "host", Val: mounts})
}

func (s *Server) changeDatastore(ds *simulator.Datastore, changes ...types.PropertyChange) {
	ctx := s.context()
	ctx.WithLock(ds, func() { ctx.Update(ds, changes) })
}

// SetMaintenance says whether a host is in maintenance mode: it runs no VMs then.
func (s *Server) SetMaintenance(host string, on bool) {
	ctx, h := s.context(), s.model.Map().Get(*s.host(host))
	ctx.WithLock(h, func() { ctx.Update(h, []types.PropertyChange{{Name: "runtime.inMaintenanceMode", Val: on}}) })
}
