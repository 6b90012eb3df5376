package vspheretest

import (
	"fmt"
	"os"
	"regexp"
	"strings"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// CreateVMTask lets vcsim make the VM, and then gives its disks their bytes.
func (o *folderObject) CreateVMTask(ctx *simulator.Context, req *types.CreateVM_Task) soap.HasFault {
	ref := o.s.task(ctx, o.Self, "CreateVM", func(ctx *simulator.Context) (types.AnyType, types.BaseMethodFault) {
		vm, fault := o.s.createVM(ctx, o.Folder, req)
		if fault != nil {
			return nil, fault
		}
		return vm.ref, nil
	})
	return &methods.CreateVM_TaskBody{Res: &types.CreateVM_TaskResponse{Returnval: ref}}
}

func (s *Server) createVM(ctx *simulator.Context, folder *simulator.Folder, req *types.CreateVM_Task) (*VM, types.BaseMethodFault) {
	if fault := s.spaceFault(); fault != nil {
		return nil, fault
	}
	for _, c := range req.Config.DeviceChange {
		if b, ok := c.GetVirtualDeviceConfigSpec().Device.GetVirtualDevice().Backing.(*types.VirtualDiskFlatVer2BackingInfo); ok {
			b.ChangeId = "" // the server's to say
		}
	}
	ref, fault := makeVM(ctx, folder, req)
	if fault != nil {
		return nil, fault
	}
	return s.adoptNew(ctx, ref)
}

// special are the characters that an inventory name has in another form, and that form itself, which stays (ManagedEntity.name,
// vSphere API).
var special = regexp.MustCompile(`%2[fF]|%5[cC]|%25|[%/\\]`)

// inventoryName is a name as the inventory has it.
func inventoryName(name string) string {
	return special.ReplaceAllStringFunc(name, func(s string) string {
		if len(s) == 1 {
			return fmt.Sprintf("%%%02x", s[0])
		}
		return s
	})
}

// makeVM lets vcsim make a VM. With special characters in the name it would add each device twice: it gets that name afterwards.
func makeVM(ctx *simulator.Context, folder *simulator.Folder, req *types.CreateVM_Task) (ref types.ManagedObjectReference, fault types.BaseMethodFault) {
	name := inventoryName(req.Config.Name)
	if name != req.Config.Name {
		req.Config.Name = plainName(req.Config.Name)
	}
	res, fault := wait(ctx, folder.CreateVMTask(ctx, req).(*methods.CreateVM_TaskBody).Res.Returnval)
	if fault != nil {
		return ref, fault
	}
	ref = res.(types.ManagedObjectReference)
	if name != req.Config.Name {
		setName(ctx, ctx.Map.Get(ref).(*simulator.VirtualMachine), name)
	}
	return ref, nil
}

func setName(ctx *simulator.Context, sim *simulator.VirtualMachine, name string) {
	ctx.WithLock(sim, func() {
		ctx.Update(sim, []types.PropertyChange{{Name: "name", Val: name}, {Name: "config.name", Val: name}, {Name: "summary.config.name", Val: name}})
	})
}

// plainName is a name as files have it.
func plainName(name string) string {
	return strings.NewReplacer("%", "_", "/", "_", `\`, "_").Replace(name)
}

// adoptNew takes over a VM that vcsim has just made.
func (s *Server) adoptNew(ctx *simulator.Context, ref types.ManagedObjectReference) (*VM, types.BaseMethodFault) {
	vm, err := s.adopt(ctx, ref)
	if err == nil {
		err = vm.writeVMX(ctx)
	}
	if err != nil {
		return nil, &types.FileFault{File: err.Error()}
	}
	return vm, nil
}

func (s *Server) spaceFault() types.BaseMethodFault {
	return s.fault(func(f *Faults) types.BaseMethodFault {
		if f.DatastoreFull {
			return &types.NoDiskSpace{Datastore: "datastore"}
		}
		return nil
	})
}

type poolObject struct {
	*simulator.ResourcePool
	s *Server
}

// Entity hides that of the embedded object.
func (*poolObject) Entity() {}

// ImportVApp makes a VM and a lease to fill its disks.
func (o *poolObject) ImportVApp(ctx *simulator.Context, req *types.ImportVApp) soap.HasFault {
	body := new(methods.ImportVAppBody)
	spec, ok := req.Spec.(*types.VirtualMachineImportSpec)
	if !ok {
		body.Fault_ = simulator.Fault("", &types.InvalidArgument{InvalidProperty: "spec"})
		return body
	}
	own := o.s.context()
	folder, err := o.s.folder(own, "", *o.s.host(""))
	if req.Folder != nil {
		folder, ok = ctx.Map.Get(*req.Folder).(*simulator.Folder)
	}
	if err != nil || !ok {
		body.Fault_ = simulator.Fault("", &types.InvalidArgument{InvalidProperty: "folder"})
		return body
	}
	l := o.s.newLease(ctx, nil)
	go o.s.importVM(own, l, folder, &types.CreateVM_Task{This: folder.Self, Config: spec.ConfigSpec, Pool: o.Self, Host: req.Host})
	body.Res = &types.ImportVAppResponse{Returnval: l.Self}
	return body
}

func (s *Server) importVM(ctx *simulator.Context, l *lease, folder *simulator.Folder, req *types.CreateVM_Task) {
	vm, fault := s.createVM(ctx, folder, req)
	if fault != nil {
		l.end(ctx, fault)
		return
	}
	l.vm = vm
	l.close = func(ok bool) {
		if !ok && !s.lies(func(f *Faults) bool { return f.LeaseKeeps }) {
			vm.destroy(s.context())
		}
	}
	sim := vm.sim()
	var devices []types.BaseVirtualDevice
	ctx.WithLock(sim, func() { devices = clonedDevices(sim.Config.Hardware.Device) })
	vm.mu.Lock()
	var names []string
	for _, dev := range devices {
		d := vm.diskByKey(dev.GetVirtualDevice().Key)
		if d == nil {
			continue
		}
		name := fmt.Sprintf("disk-%d.vmdk", len(names))
		names = append(names, name)
		place := s.leasePlace(devices, dev, len(names)-1)
		l.files[name] = &leaseFile{key: "/" + vm.ref.Value + "/" + place, importKey: "/" + vm.name() + "/" + place, disk: d, size: d.size}
	}
	vm.mu.Unlock()
	l.ready(names)
}

// DestroyTask takes the files along.
func (o *vmObject) DestroyTask(ctx *simulator.Context, _ *types.Destroy_Task) soap.HasFault {
	ref := o.vm.s.task(ctx, o.Self, "Destroy", func(ctx *simulator.Context) (types.AnyType, types.BaseMethodFault) {
		return nil, o.vm.destroy(ctx)
	})
	return &methods.Destroy_TaskBody{Res: &types.Destroy_TaskResponse{Returnval: ref}}
}

func (vm *VM) destroy(ctx *simulator.Context) types.BaseMethodFault {
	vm.ops.Lock()
	defer vm.ops.Unlock()
	sim := vm.sim()
	if sim == nil {
		return &types.ManagedObjectNotFound{Obj: vm.ref}
	}
	if vm.PoweredOn() {
		return &types.InvalidPowerState{RequestedState: types.VirtualMachinePowerStatePoweredOff, ExistingState: types.VirtualMachinePowerStatePoweredOn}
	}
	// vcsim deletes the folder at some later time, when another VM may have it: it gets the name of one that is not there.
	vm.mu.Lock()
	dir := vm.dir.file("")
	nothing := vm.dir.ref(fmt.Sprint(".none-", vm.s.id()))
	vm.mu.Unlock()
	ctx.WithLock(sim, func() {
		files := sim.Config.Files
		files.LogDirectory = nothing
		ctx.Update(sim, []types.PropertyChange{{Name: "config.files", Val: files}})
	})
	_, fault := wait(ctx, sim.DestroyTask(ctx, &types.Destroy_Task{This: vm.ref}).(*methods.Destroy_TaskBody).Res.Returnval)
	if fault != nil {
		return fault
	}
	vm.leave(ctx, true)
	if err := os.RemoveAll(dir); err != nil {
		return &types.FileFault{File: err.Error()}
	}
	return nil
}

// UnregisterVM leaves the files.
func (o *vmObject) UnregisterVM(ctx *simulator.Context, req *types.UnregisterVM) soap.HasFault {
	res := o.VirtualMachine.UnregisterVM(ctx, req)
	if res.Fault() == nil {
		o.vm.leave(ctx, false)
	}
	return res
}

// leave ends what is ours of the VM.
func (vm *VM) leave(ctx *simulator.Context, destroy bool) {
	vm.mu.Lock()
	vm.gone = true
	var refs []types.ManagedObjectReference
	for ref := range vm.snapshots {
		refs = append(refs, ref)
	}
	for _, d := range vm.disks {
		d.detach(destroy)
	}
	vm.disks = nil
	vm.mu.Unlock()
	vm.forget(ctx, refs)
	vm.s.mu.Lock()
	delete(vm.s.vms, vm.ref)
	vm.s.mu.Unlock()
}
