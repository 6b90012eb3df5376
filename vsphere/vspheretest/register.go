package vspheretest

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// RegisterVMTask makes a VM of files that are there already. vcsim does not read the .vmx; this does.
func (o *folderObject) RegisterVMTask(ctx *simulator.Context, req *types.RegisterVM_Task) soap.HasFault {
	ref := o.s.task(ctx, o.Self, "RegisterVM", func(ctx *simulator.Context) (types.AnyType, types.BaseMethodFault) {
		vm, fault := o.s.register(ctx, o.Folder, req)
		if fault != nil {
			return nil, fault
		}
		return vm.ref, nil
	})
	return &methods.RegisterVM_TaskBody{Res: &types.RegisterVM_TaskResponse{Returnval: ref}}
}

func (s *Server) register(ctx *simulator.Context, folder *simulator.Folder, req *types.RegisterVM_Task) (*VM, types.BaseMethodFault) {
	s.placing.Lock()
	defer s.placing.Unlock()
	dir, name, err := s.parsePath(req.Path)
	if err != nil {
		return nil, &types.InvalidDatastorePath{DatastorePath: req.Path}
	}
	text, err := os.ReadFile(dir.file(name))
	if err != nil {
		return nil, &types.NotFound{}
	}
	spec, err := dir.parseVMX(string(text))
	if err != nil {
		return nil, &types.InvalidVmConfig{Property: err.Error()}
	}
	if req.Name == "" {
		req.Name = spec.Name
	}
	name = inventoryName(req.Name)
	req.Name = plainName(req.Name)
	spec.Name = req.Name
	// vcsim wants these files to be there; ESXi makes them when the VM is started.
	for _, need := range []string{req.Name + ".nvram", "vmware.log"} {
		f, err := os.OpenFile(dir.file(need), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err == nil {
			_ = f.Close()
			defer os.Remove(dir.file(need))
		} else if !errors.Is(err, os.ErrExist) {
			return nil, &types.FileFault{File: err.Error()}
		}
	}
	res, fault := wait(ctx, folder.RegisterVMTask(ctx, req).(*methods.RegisterVM_TaskBody).Res.Returnval)
	if fault != nil {
		return nil, fault
	}
	sim, ok := ctx.Map.Get(res.(types.ManagedObjectReference)).(*simulator.VirtualMachine)
	if !ok { // somebody was faster to unregister it
		return nil, &types.ManagedObjectNotFound{Obj: res.(types.ManagedObjectReference)}
	}
	ctx.WithLock(sim, func() {
		change := &types.ReconfigVM_Task{This: sim.Self, Spec: *spec}
		_, fault = wait(ctx, sim.ReconfigVMTask(ctx, change).(*methods.ReconfigVM_TaskBody).Res.Returnval)
	})
	var vm *VM
	if fault == nil {
		if vm, err = s.adopt(ctx, sim.Self); err == nil {
			setName(ctx, sim, name)
			return vm, nil
		}
		fault = &types.FileFault{File: err.Error()}
	}
	ctx.WithLock(sim, func() { sim.UnregisterVM(ctx, &types.UnregisterVM{This: sim.Self}) })
	return nil, fault
}

var (
	vmxLine       = regexp.MustCompile(`^\s*([^\s=#]+)\s*=\s*"(.*)"\s*$`)
	vmxController = regexp.MustCompile(`^(scsi|sata|nvme|ide)(\d+)\.present$`)
	vmxDisk       = regexp.MustCompile(`^(scsi|sata|nvme|ide)(\d+):(\d+)\.filename$`)
	vmxCard       = regexp.MustCompile(`^ethernet(\d+)\.present$`)
	vmxEscape     = regexp.MustCompile(`\|[0-9A-Fa-f]{2}`)
)

// vmxFile is what a .vmx says; the names of its keys know no upper case.
type vmxFile map[string]string

func parseVMXText(text string) vmxFile {
	kv := vmxFile{}
	for _, line := range strings.Split(text, "\n") {
		if m := vmxLine.FindStringSubmatch(strings.TrimSuffix(line, "\r")); m != nil {
			kv[strings.ToLower(m[1])] = vmxEscape.ReplaceAllStringFunc(m[2], func(s string) string {
				n, _ := strconv.ParseUint(s[1:], 16, 8)
				return string([]byte{byte(n)})
			})
		}
	}
	return kv
}

func (kv vmxFile) number(key string) int64 {
	n, _ := strconv.ParseInt(kv[key], 10, 64)
	return n
}

func (kv vmxFile) yes(key string) bool { return strings.EqualFold(kv[key], "TRUE") }

// uuid brings "60 00 c2 98 ...-..." into the form of the API.
func (kv vmxFile) uuid(key string) string {
	h := strings.NewReplacer(" ", "", "-", "").Replace(kv[key])
	if len(h) != 32 {
		return ""
	}
	return strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-")
}

// parseVMX makes of the text of a .vmx what would create such a VM.
func (dir *directory) parseVMX(text string) (*types.VirtualMachineConfigSpec, error) {
	kv := parseVMXText(text)
	if kv["displayname"] == "" {
		return nil, errors.New("displayName")
	}
	spec := &types.VirtualMachineConfigSpec{
		Name: kv["displayname"], Annotation: kv["annotation"], Firmware: kv["firmware"], GuestId: kv["guestos"] + "Guest",
		Uuid: kv.uuid("uuid.bios"), InstanceUuid: kv.uuid("vc.uuid"), NumCPUs: int32(kv.number("numvcpus")), MemoryMB: kv.number("memsize"),
		ChangeTrackingEnabled: types.NewBool(kv.yes("ctkenabled")),
	}
	if !slices.Contains(simulator.GuestID, types.VirtualMachineGuestOsIdentifier(spec.GuestId)) {
		spec.GuestId = string(types.VirtualMachineGuestOsIdentifierOtherGuest64)
	}
	for key, value := range kv {
		if strings.HasSuffix(key, "pcislotnumber") || strings.HasPrefix(key, "guestinfo.") {
			spec.ExtraConfig = append(spec.ExtraConfig, &types.OptionValue{Key: key, Value: value})
		}
	}
	devices, err := dir.vmxDevices(kv)
	for _, d := range devices {
		spec.DeviceChange = append(spec.DeviceChange, &types.VirtualDeviceConfigSpec{Operation: "add", Device: d})
	}
	return spec, err
}

// vmxDevices are the controllers, disks and network cards, by their keys: a controller comes before its disks.
func (dir *directory) vmxDevices(kv vmxFile) ([]types.BaseVirtualDevice, error) {
	var all []types.BaseVirtualDevice
	for key, value := range kv {
		if m := vmxController.FindStringSubmatch(key); m != nil && kv.yes(key) {
			if c := diskSpec(kv, m[1], m[2]).device(); c != nil {
				all = append(all, c)
			}
		}
		if m := vmxDisk.FindStringSubmatch(key); m != nil && strings.HasSuffix(value, ".vmdk") {
			disk, err := dir.vmxDisk(kv, m, value)
			if err != nil {
				return nil, err
			}
			all = append(all, disk)
		}
		if m := vmxCard.FindStringSubmatch(key); m != nil && kv.yes(key) {
			all = append(all, vmxNIC(kv, m[1]))
		}
	}
	slices.SortFunc(all, func(a, b types.BaseVirtualDevice) int {
		return cmp.Compare(a.GetVirtualDevice().Key, b.GetVirtualDevice().Key)
	})
	return all, nil
}

func diskSpec(kv vmxFile, class, bus string) DiskSpec {
	n, _ := strconv.Atoi(bus)
	kind := class
	if class == "scsi" {
		kind = map[string]string{"pvscsi": "pvscsi", "lsisas1068": "lsisas"}[kv["scsi"+bus+".virtualdev"]]
		setDefault(&kind, "lsilogic")
	}
	return DiskSpec{Controller: kind, Bus: n, SharedBus: kv[class+bus+".sharedbus"] == "physical"}
}

var extentLine = regexp.MustCompile(`(?m)^RW (\d+) \w+ "`)

// vmxDisk is a disk that the configuration names; its size is in its descriptor.
func (dir *directory) vmxDisk(kv vmxFile, m []string, file string) (*types.VirtualDisk, error) {
	d := diskSpec(kv, m[1], m[2])
	if strings.Contains(file, "/") {
		return nil, fmt.Errorf("%s: not in the folder of the VM", file)
	}
	text, err := os.ReadFile(dir.file(file))
	if err != nil {
		return nil, fmt.Errorf("%s: no such file", file)
	}
	extent := extentLine.FindStringSubmatch(string(text))
	if extent == nil {
		return nil, fmt.Errorf("%s: no descriptor", file)
	}
	sectors, _ := strconv.ParseInt(extent[1], 10, 64)
	unitNumber, _ := strconv.ParseInt(m[3], 10, 32)
	k := d.controller()
	disk := &types.VirtualDisk{CapacityInBytes: sectors * sector, CapacityInKB: sectors * sector / 1024}
	disk.ControllerKey, disk.UnitNumber = k.key+int32(d.Bus), types.NewInt32(int32(unitNumber))
	disk.Key = k.disk + int32(d.Bus)*k.slots + int32(unitNumber)
	mode := strings.ReplaceAll(kv[m[1]+m[2]+":"+m[3]+".mode"], "-", "_")
	setDefault(&mode, string(types.VirtualDiskModePersistent))
	disk.Backing = &types.VirtualDiskFlatVer2BackingInfo{
		VirtualDeviceFileBackingInfo: types.VirtualDeviceFileBackingInfo{FileName: dir.ref(file)},
		DiskMode:                     mode, ThinProvisioned: types.NewBool(true), Uuid: diskUUID(),
	}
	return disk, nil
}

func vmxNIC(kv vmxFile, n string) types.BaseVirtualDevice {
	card := &types.VirtualVmxnet3{}
	i, _ := strconv.Atoi(n)
	card.Key, card.ControllerKey, card.UnitNumber = int32(4000+i), 100, types.NewInt32(int32(7+i))
	card.MacAddress = kv["ethernet"+n+".generatedaddress"]
	setDefault(&card.MacAddress, kv["ethernet"+n+".address"])
	name := kv["ethernet"+n+".networkname"]
	setDefault(&name, "VM Network")
	card.Backing = &types.VirtualEthernetCardNetworkBackingInfo{VirtualDeviceDeviceBackingInfo: types.VirtualDeviceDeviceBackingInfo{DeviceName: name}}
	return card
}
