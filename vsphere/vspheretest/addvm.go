package vspheretest

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// AddVM adds a VM, with its files, and starts it unless the spec says otherwise.
func (s *Server) AddVM(spec VMSpec) *VM {
	s.t.Helper()
	ctx := s.context()
	stem := plainName(spec.Name)
	ds, err := s.datastore(spec.Datastore)
	s.must(err)
	dir, err := newDirectory(ds, stem)
	s.must(err)
	var bases []*layer
	for i, d := range spec.Disks {
		name := stem + ".vmdk"
		if i > 0 {
			name = fmt.Sprintf("%s_%d.vmdk", stem, i)
		}
		l := &layer{dir: dir, name: name, kind: d.kind(), size: d.Size, uuid: diskUUID(), cid: 0xfffffffe}
		s.must(l.create(d.Content))
		s.must(l.raw.Close()) // adopt opens it
		bases = append(bases, l)
	}
	host := s.host(spec.Host)
	folder, err := s.folder(ctx, spec.Folder, *host)
	s.must(err)
	pool, err := s.pool(ctx, spec.Pool, *host)
	s.must(err)
	req := &types.CreateVM_Task{This: folder.Self, Config: s.configSpec(spec, dir.ref(stem+".vmx"), bases), Pool: pool, Host: host}
	ref, fault := makeVM(ctx, folder, req)
	if fault != nil {
		s.t.Fatalf("vspheretest: create %s: %T %+v", spec.Name, fault, fault)
	}
	vm, err := s.adopt(ctx, ref)
	s.must(err)
	for i, d := range spec.Disks {
		vm.disks[i].thick = d.Thick
	}
	s.must(vm.finish(ctx, spec))
	return vm
}

// finish does what only a VM that exists can have done to it.
func (vm *VM) finish(ctx *simulator.Context, spec VMSpec) error {
	sim := vm.sim()
	for _, name := range slices.Sorted(maps.Keys(spec.Attributes)) {
		if err := vm.s.setAttribute(ctx, sim, name, spec.Attributes[name]); err != nil {
			return err
		}
	}
	if err := vm.s.setTags(vm.ref, spec.Tags); err != nil {
		return err
	}
	if err := os.WriteFile(vm.dir.file(vm.fileName(".nvram")), randomBytes(8684), 0o600); err != nil {
		return err
	}
	if spec.ChangeTracking {
		vm.mu.Lock()
		vm.wanted = true
		vm.stun()
		vm.mu.Unlock()
	}
	if !spec.NoTools {
		ctx.WithLock(sim, func() {
			sim.Guest.ToolsRunningStatus = string(types.VirtualMachineToolsRunningStatusGuestToolsRunning)
		})
	}
	var fault types.BaseMethodFault
	switch {
	case spec.Template:
		ctx.WithLock(sim, func() { sim.MarkAsTemplate(&types.MarkAsTemplate{This: vm.ref}) })
	case !spec.PoweredOff:
		_, fault = wait(ctx, sim.PowerOnVMTask(ctx, &types.PowerOnVM_Task{This: vm.ref}).(*methods.PowerOnVM_TaskBody).Res.Returnval)
	}
	if fault != nil {
		return fmt.Errorf("power on %s: %T", spec.Name, fault)
	}
	return vm.writeVMX(ctx)
}

// newDirectory makes the folder of a VM: its name, or its name and a number.
func newDirectory(ds *simulator.Datastore, name string) (*directory, error) {
	d := &directory{datastore: ds.Name, root: ds.Summary.Url, path: name}
	for i := 1; ; i++ {
		err := os.Mkdir(d.file(""), 0o700)
		if !errors.Is(err, os.ErrExist) {
			return d, err
		}
		d.path = fmt.Sprintf("%s_%d", name, i)
	}
}

// datastore finds one by its name, or the first of all.
func (s *Server) datastore(name string) (*simulator.Datastore, error) {
	all := s.model.Map().All("Datastore")
	slices.SortFunc(all, func(a, b mo.Entity) int {
		return strings.Compare(a.(*simulator.Datastore).Name, b.(*simulator.Datastore).Name)
	})
	for _, e := range all {
		if ds := e.(*simulator.Datastore); name == "" || ds.Name == name {
			return ds, nil
		}
	}
	return nil, fmt.Errorf("no datastore %q", name)
}

func (s *Server) configSpec(spec VMSpec, vmx string, bases []*layer) types.VirtualMachineConfigSpec {
	c := types.VirtualMachineConfigSpec{
		Name: spec.Name, GuestId: spec.GuestID, Firmware: spec.Firmware, NumCPUs: spec.CPUs, MemoryMB: spec.Memory,
		Annotation: spec.Annotation, Uuid: spec.UUID, InstanceUuid: spec.InstanceUUID, Version: "vmx-19",
		Files: &types.VirtualMachineFileInfo{VmPathName: vmx},
	}
	setDefault(&c.GuestId, string(types.VirtualMachineGuestOsIdentifierOtherLinux64Guest))
	setDefault(&c.Firmware, "bios")
	setDefault(&c.Uuid, newUUID())
	setDefault(&c.InstanceUuid, newUUID())
	setDefault(&c.NumCPUs, 2)
	setDefault(&c.MemoryMB, 1024)
	if spec.SecureBoot {
		c.BootOptions = &types.VirtualMachineBootOptions{EfiSecureBootEnabled: types.NewBool(true)}
	}
	if spec.ChangeTracking {
		c.ChangeTrackingEnabled = types.NewBool(true)
	}
	for _, key := range slices.Sorted(maps.Keys(spec.ExtraConfig)) {
		c.ExtraConfig = append(c.ExtraConfig, &types.OptionValue{Key: key, Value: spec.ExtraConfig[key]})
	}
	all := append(devices(spec, bases), s.cards(spec.Networks)...)
	if spec.TPM {
		all = append(all, &types.VirtualTPM{VirtualDevice: types.VirtualDevice{Key: 11000}})
	}
	for _, d := range append(all, spec.Devices...) {
		c.DeviceChange = append(c.DeviceChange, &types.VirtualDeviceConfigSpec{Operation: types.VirtualDeviceConfigSpecOperationAdd, Device: d})
	}
	return c
}

func setDefault[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// cards are network cards on the networks of these names.
func (s *Server) cards(networks []string) []types.BaseVirtualDevice {
	var all []types.BaseVirtualDevice
	for i, name := range networks {
		card := &types.VirtualVmxnet3{}
		card.Key, card.ControllerKey, card.UnitNumber = int32(4000+i), 100, types.NewInt32(int32(7+i))
		card.AddressType, card.MacAddress = "generated", fmt.Sprintf("00:50:56:%02x:%02x:%02x", i, s.id()/256, s.id()%256)
		card.Connectable = &types.VirtualDeviceConnectInfo{StartConnected: true, AllowGuestControl: true}
		card.Backing = s.networkBacking(name)
		all = append(all, card)
	}
	return all
}

func (s *Server) networkBacking(name string) types.BaseVirtualDeviceBackingInfo {
	for _, e := range s.model.Map().All("DistributedVirtualPortgroup") {
		pg, ok := e.(*simulator.DistributedVirtualPortgroup)
		if !ok || pg.Name != name {
			continue
		}
		dvs := s.model.Map().Get(*pg.Config.DistributedVirtualSwitch).(*simulator.DistributedVirtualSwitch)
		return &types.VirtualEthernetCardDistributedVirtualPortBackingInfo{
			Port: types.DistributedVirtualSwitchPortConnection{PortgroupKey: pg.Key, SwitchUuid: dvs.Uuid},
		}
	}
	return &types.VirtualEthernetCardNetworkBackingInfo{VirtualDeviceDeviceBackingInfo: types.VirtualDeviceDeviceBackingInfo{DeviceName: name}}
}

// create makes the files of a bottom layer.
func (l *layer) create(content io.ReaderAt) error {
	f, err := os.OpenFile(l.dir.file(l.extent()), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	l.raw = f
	if content != nil {
		if err := copySparse(f, content, l.size); err != nil {
			return err
		}
	}
	if err := f.Truncate(l.size); err != nil {
		return err
	}
	return os.WriteFile(l.dir.file(l.name), []byte(l.descriptor()), 0o600)
}

// fileName is that of a file that is named after the configuration: "web01.nvram".
func (vm *VM) fileName(ext string) string {
	return strings.TrimSuffix(vm.vmx, ".vmx") + ext
}

// parsePath takes "[datastore] dir/file" apart.
func (s *Server) parsePath(p string) (*directory, string, error) {
	ds, file, ok := strings.Cut(strings.TrimPrefix(p, "["), "] ")
	if !ok || !strings.HasPrefix(p, "[") || strings.Contains(file, "..") {
		return nil, "", fmt.Errorf("%q is no datastore path", p)
	}
	found, err := s.datastore(ds)
	if err != nil || ds == "" {
		return nil, "", fmt.Errorf("%q: no datastore %q", p, ds)
	}
	return &directory{datastore: ds, root: found.Summary.Url, path: path.Dir(file)}, filepath.Base(file), nil
}
