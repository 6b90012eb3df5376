package vspheretest

import (
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// ReconfigVMTask lets vcsim do it, and then the files follow: disks come, go and grow.
func (o *vmObject) ReconfigVMTask(ctx *simulator.Context, req *types.ReconfigVM_Task) soap.HasFault {
	ref := o.vm.s.task(ctx, o.Self, "ReconfigVM", func(ctx *simulator.Context) (types.AnyType, types.BaseMethodFault) {
		o.vm.ops.Lock()
		defer o.vm.ops.Unlock()
		return nil, o.vm.reconfigure(ctx, req)
	})
	return &methods.ReconfigVM_TaskBody{Res: &types.ReconfigVM_TaskResponse{Returnval: ref}}
}

func (vm *VM) reconfigure(ctx *simulator.Context, req *types.ReconfigVM_Task) types.BaseMethodFault {
	sim := vm.sim()
	if sim == nil {
		return &types.ManagedObjectNotFound{Obj: vm.ref}
	}
	for _, c := range req.Spec.DeviceChange {
		if spec := c.GetVirtualDeviceConfigSpec(); spec.Operation == types.VirtualDeviceConfigSpecOperationEdit {
			spec.FileOperation = "" // govmomi says replace, of which vcsim makes an empty file
		}
	}
	var fault types.BaseMethodFault
	ctx.WithLock(sim, func() {
		sim.Config.Hardware.Device = clonedDevices(sim.Config.Hardware.Device)
		ownLayout(sim)
		if _, fault = wait(ctx, sim.ReconfigVMTask(ctx, req).(*methods.ReconfigVM_TaskBody).Res.Returnval); fault != nil {
			return
		}
		if fault = vm.follow(sim, req.Spec.DeviceChange); fault == nil {
			vm.publish(ctx, sim)
		}
	})
	if fault != nil {
		return fault
	}
	if err := vm.writeVMX(ctx); err != nil {
		return &types.FileFault{File: err.Error()}
	}
	return nil
}

// follow brings the disks in line with the devices. The lock of sim is held.
func (vm *VM) follow(sim *simulator.VirtualMachine, changes []types.BaseVirtualDeviceConfigSpec) types.BaseMethodFault {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	vm.instanceUUID = sim.Config.InstanceUuid
	vm.wanted = sim.Config.ChangeTrackingEnabled != nil && *sim.Config.ChangeTrackingEnabled
	if !vm.wanted && !vm.on && !vm.s.lies(func(f *Faults) bool { return f.KeepTracking }) {
		for _, d := range vm.disks {
			d.track = nil // the host removes -ctk.vmdk at once; of a VM that runs at its next stun
		}
	}
	destroy := map[int32]bool{}
	for _, c := range changes {
		spec := c.GetVirtualDeviceConfigSpec()
		destroy[spec.Device.GetVirtualDevice().Key] = spec.FileOperation == types.VirtualDeviceConfigSpecFileOperationDestroy
	}
	there := map[int32]*types.VirtualDisk{}
	for _, dev := range sim.Config.Hardware.Device {
		if dev, ok := dev.(*types.VirtualDisk); ok {
			there[dev.Key] = dev
		}
	}
	var kept []*disk
	for _, d := range vm.disks {
		dev := there[d.key]
		if dev == nil {
			d.detach(destroy[d.key])
			continue
		}
		if err := d.resize(dev.CapacityInBytes); err != nil {
			return &types.FileFault{File: err.Error()}
		}
		kept = append(kept, d)
	}
	vm.disks = kept
	if err := vm.adoptDisks(sim.Config.Hardware.Device); err != nil {
		return &types.FileFault{File: err.Error()}
	}
	return nil
}

// detach lets go of a disk, and of its files if they go too.
func (d *disk) detach(destroy bool) {
	for _, l := range d.layers {
		if destroy {
			l.remove()
			continue
		}
		_ = l.flush()
		_ = l.raw.Close()
	}
}

// resize grows the disk.
func (d *disk) resize(size int64) error {
	if size <= d.size {
		return nil
	}
	d.size, d.active.size = size, size
	return d.active.rewrite()
}
