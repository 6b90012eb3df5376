package vspheretest

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// RelocateVMTask moves a VM: its files to another datastore, itself to another host, pool or folder.
func (o *vmObject) RelocateVMTask(ctx *simulator.Context, req *types.RelocateVM_Task) soap.HasFault {
	ref := o.vm.s.task(ctx, o.Self, "RelocateVM", func(ctx *simulator.Context) (types.AnyType, types.BaseMethodFault) {
		return nil, o.vm.relocate(ctx, &req.Spec)
	})
	return &methods.RelocateVM_TaskBody{Res: &types.RelocateVM_TaskResponse{Returnval: ref}}
}

// MoveToDatastore is a Storage vMotion: the files move, the reference stays.
func (vm *VM) MoveToDatastore(name string) {
	ds, err := vm.s.datastore(name)
	vm.s.must(err)
	vm.mustRelocate(&types.VirtualMachineRelocateSpec{Datastore: &ds.Self})
}

// MoveToHost is a vMotion.
func (vm *VM) MoveToHost(name string) {
	vm.mustRelocate(&types.VirtualMachineRelocateSpec{Host: vm.s.host(name)})
}

func (vm *VM) mustRelocate(spec *types.VirtualMachineRelocateSpec) {
	if fault := vm.relocate(vm.s.context(), spec); fault != nil {
		vm.s.t.Fatalf("vspheretest: relocate: %T %+v", fault, fault)
	}
}

func (vm *VM) relocate(ctx *simulator.Context, spec *types.VirtualMachineRelocateSpec) types.BaseMethodFault {
	vm.ops.Lock()
	defer vm.ops.Unlock()
	sim := vm.sim()
	if sim == nil {
		return &types.ManagedObjectNotFound{Obj: vm.ref}
	}
	var to *simulator.Datastore
	if spec.Datastore != nil {
		ds, ok := ctx.Map.Get(*spec.Datastore).(*simulator.Datastore)
		if !ok {
			return &types.InvalidArgument{InvalidProperty: "spec.datastore"}
		}
		to = ds
		if fault := vm.s.spaceFault(); fault != nil {
			return fault
		}
		err := vm.copyAhead(ds)
		if err == nil {
			err = vm.moveFiles(ds)
		}
		if err != nil {
			return &types.FileFault{File: err.Error()}
		}
	}
	if spec.Folder != nil {
		if fault := moveIntoFolder(ctx, *spec.Folder, vm.ref); fault != nil {
			return fault
		}
	}
	ctx.WithLock(sim, func() {
		vm.moveHost(ctx, sim, spec.Host)
		vm.movePool(ctx, sim, spec.Pool)
		if to != nil {
			vm.moveConfig(ctx, sim, to)
		}
		vm.publish(ctx, sim)
	})
	if err := vm.writeVMX(ctx); err != nil {
		return &types.FileFault{File: err.Error()}
	}
	return nil
}

// copyAhead copies disks of a VM that runs, piece by piece: its guest writes meanwhile.
func (vm *VM) copyAhead(ds *simulator.Datastore) error {
	vm.mu.Lock()
	dir, on := *vm.dir, vm.on
	var bottom []*layer
	for _, d := range vm.disks {
		for _, l := range d.layers {
			if !l.isDelta() {
				bottom = append(bottom, l)
			}
		}
	}
	vm.mu.Unlock()
	var from, to syscall.Stat_t
	if err := errors.Join(syscall.Stat(dir.root, &from), syscall.Stat(ds.Summary.Url, &to)); err != nil || !on || from.Dev == to.Dev {
		return err
	}
	b := make([]byte, unit)
	for _, l := range bottom {
		out, err := os.CreateTemp(ds.Summary.Url, "moving-")
		if err != nil {
			return err
		}
		vm.mu.Lock()
		l.mirror, l.copied = out, 0
		vm.mu.Unlock()
		for off := int64(0); off < l.size && err == nil; off += unit {
			vm.mu.Lock()
			p := b[:min(unit, l.size-off)]
			if err = readFull(l.raw, p, off); err == nil && !isZero(p) {
				_, err = out.WriteAt(p, off)
			}
			l.copied = off + int64(len(p))
			vm.mu.Unlock()
		}
		if err == nil {
			err = out.Truncate(l.size)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// moveFiles moves the folder of the VM, and disks that were elsewhere into it.
func (vm *VM) moveFiles(ds *simulator.Datastore) error {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	old := *vm.dir
	if old.root == ds.Summary.Url {
		return nil
	}
	files, err := vm.allFiles()
	if err != nil {
		return err
	}
	to, err := newDirectory(ds, path.Base(old.path))
	if err != nil {
		return err
	}
	for from, l := range files {
		if err := moveFile(from, to.file(filepath.Base(from)), l); err != nil {
			return err
		}
	}
	_ = os.Remove(old.file(""))
	*vm.dir = *to
	for _, d := range vm.disks {
		for _, l := range d.layers {
			l.dir = vm.dir
		}
		if d.track != nil && vm.s.moveResets() {
			d.track = newTracking()
		}
	}
	return nil
}

// allFiles are those in the folder of the VM and those of its disks: name => layer, nil for what belongs to no disk.
func (vm *VM) allFiles() (map[string]*layer, error) {
	files := map[string]*layer{}
	list, err := os.ReadDir(vm.dir.file(""))
	if err != nil {
		return nil, err
	}
	for _, f := range list {
		if f.Type().IsRegular() {
			files[vm.dir.file(f.Name())] = nil
		}
	}
	for _, d := range vm.disks {
		for _, l := range d.layers {
			if err := l.flush(); err != nil {
				return nil, err
			}
			files[l.dir.file(l.name)], files[l.dir.file(l.extent())] = l, l
		}
	}
	return files, nil
}

func (s *Server) moveResets() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.faults.MoveResetsTracking
}

// moveFile moves a file, also to another filesystem; the layer then works on the new one.
func moveFile(from, to string, l *layer) error {
	if l != nil && l.mirror != nil && filepath.Base(to) == l.extent() {
		if err := os.Rename(l.mirror.Name(), to); err != nil {
			return err
		}
		_ = l.raw.Close()
		l.raw, l.mirror = l.mirror, nil
		return os.Remove(from)
	}
	err := os.Rename(from, to)
	if !errors.Is(err, syscall.EXDEV) {
		return err
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	st, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := os.OpenFile(to, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err := copySparse(out, in, st.Size()); err != nil {
		_ = out.Close()
		return err
	}
	if l != nil && !l.isDelta() && filepath.Base(to) == l.extent() {
		_ = l.raw.Close()
		l.raw = out
	} else if err := out.Close(); err != nil {
		return err
	}
	return os.Remove(from)
}

// moveConfig lets the configuration and the datastores know. The lock of sim is held.
func (vm *VM) moveConfig(ctx *simulator.Context, sim *simulator.VirtualMachine, to *simulator.Datastore) {
	for _, ref := range sim.Datastore {
		if ds, ok := ctx.Map.Get(ref).(*simulator.Datastore); ok {
			ctx.Map.RemoveReference(ctx, ds, &ds.Vm, vm.ref)
		}
	}
	ctx.Map.AddReference(ctx, to, &to.Vm, vm.ref)
	vm.mu.Lock()
	dir, vmx := vm.dir.ref(""), vm.dir.ref(vm.vmx)
	vm.mu.Unlock()
	dir = strings.TrimSuffix(dir, "/")
	files := types.VirtualMachineFileInfo{VmPathName: vmx, SnapshotDirectory: dir, SuspendDirectory: dir, LogDirectory: dir}
	ctx.Update(sim, []types.PropertyChange{
		{Name: "datastore", Val: []types.ManagedObjectReference{to.Self}},
		{Name: "config.files", Val: files},
		{Name: "summary.config.vmPathName", Val: vmx},
	})
	ownLayout(sim)
	sim.LayoutEx.File = nil
}

func (vm *VM) moveHost(ctx *simulator.Context, sim *simulator.VirtualMachine, to *types.ManagedObjectReference) {
	if to == nil {
		return
	}
	host, ok := ctx.Map.Get(*to).(*simulator.HostSystem)
	if !ok {
		return
	}
	if old, ok := ctx.Map.Get(*sim.Runtime.Host).(*simulator.HostSystem); ok {
		ctx.Map.RemoveReference(ctx, old, &old.Vm, vm.ref)
	}
	ctx.Map.AddReference(ctx, host, &host.Vm, vm.ref)
	ctx.Update(sim, []types.PropertyChange{{Name: "runtime.host", Val: to}, {Name: "summary.runtime.host", Val: to}})
}

func (vm *VM) movePool(ctx *simulator.Context, sim *simulator.VirtualMachine, to *types.ManagedObjectReference) {
	if to == nil {
		return
	}
	pool, ok := ctx.Map.Get(*to).(*simulator.ResourcePool)
	if !ok {
		return
	}
	if sim.ResourcePool != nil {
		if old, ok := ctx.Map.Get(*sim.ResourcePool).(*simulator.ResourcePool); ok {
			ctx.Map.RemoveReference(ctx, old, &old.Vm, vm.ref)
		}
	}
	ctx.Map.AddReference(ctx, pool, &pool.Vm, vm.ref)
	ctx.Update(sim, []types.PropertyChange{{Name: "resourcePool", Val: to}})
}

func moveIntoFolder(ctx *simulator.Context, to, vm types.ManagedObjectReference) types.BaseMethodFault {
	folder, ok := ctx.Map.Get(to).(*simulator.Folder)
	if !ok {
		return &types.InvalidArgument{InvalidProperty: "spec.folder"}
	}
	req := &types.MoveIntoFolder_Task{This: to, List: []types.ManagedObjectReference{vm}}
	var task types.ManagedObjectReference
	ctx.WithLock(folder, func() { task = folder.MoveIntoFolderTask(ctx, req).(*methods.MoveIntoFolder_TaskBody).Res.Returnval })
	_, fault := wait(ctx, task)
	return fault
}

// nasMark is in the names of directories that stand for exports.
const nasMark = "nas-"

type storageObject struct {
	*simulator.HostDatastoreSystem
	s *Server
}

// CreateNasDatastore mounts what the hook says stands behind the address. Without the hook it is vcsim's: the local path must be a
// directory of this machine.
func (o *storageObject) CreateNasDatastore(ctx *simulator.Context, req *types.CreateNasDatastore) soap.HasFault {
	mount := o.s.getHooks().OnMount
	if mount == nil {
		return o.HostDatastoreSystem.CreateNasDatastore(ctx, req)
	}
	dir, err := mount(req.Spec.RemoteHost, req.Spec.RemotePath)
	if err == nil {
		link := filepath.Join(o.s.scratch, fmt.Sprint(nasMark, o.s.id()), filepath.Base(req.Spec.LocalPath))
		if err = os.Mkdir(filepath.Dir(link), 0o700); err == nil {
			err = os.Symlink(dir, link)
		}
		req.Spec.LocalPath = link
	}
	if err != nil {
		return &methods.CreateNasDatastoreBody{Fault_: simulator.Fault(err.Error(), &types.HostConfigFault{})}
	}
	return o.HostDatastoreSystem.CreateNasDatastore(ctx, req)
}

// RemoveDatastore takes a datastore from the host, and away when no other host has it. One with a VM on it stays.
func (o *storageObject) RemoveDatastore(ctx *simulator.Context, req *types.RemoveDatastore) soap.HasFault {
	o.s.placing.Lock()
	defer o.s.placing.Unlock()
	body := new(methods.RemoveDatastoreBody)
	ds, ok := ctx.Map.Get(req.Datastore).(*simulator.Datastore)
	if !ok {
		body.Fault_ = simulator.Fault("", &types.ManagedObjectNotFound{Obj: req.Datastore})
		return body
	}
	var fault types.BaseMethodFault
	var last bool
	ctx.WithLock(ds, func() {
		if len(ds.Vm) > 0 {
			fault = &types.ResourceInUse{Type: "Datastore", Name: ds.Name}
			return
		}
		if last = len(ds.Host) <= 1; last {
			return
		}
		for i, m := range ds.Host {
			if m.Key == o.Host.Self {
				ds.Host = append(ds.Host[:i:i], ds.Host[i+1:]...)
				break
			}
		}
		ctx.Map.RemoveReference(ctx, o.Host, &o.Host.Datastore, ds.Self)
	})
	if last && fault == nil {
		task := ds.DestroyTask(ctx, &types.Destroy_Task{This: ds.Self}).(*methods.Destroy_TaskBody).Res.Returnval
		_, fault = wait(ctx, task)
	}
	if fault != nil {
		body.Fault_ = simulator.Fault(faultText(fault), fault)
		return body
	}
	simulator.RemoveReference(&o.Datastore, req.Datastore)
	body.Res = new(types.RemoveDatastoreResponse)
	return body
}
