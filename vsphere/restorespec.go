package vsphere

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/vmware/govmomi/vim25/types"
)

// describe makes the specification of the new VM.
func (r *restoring) describe(ctx context.Context) error {
	r.spec = types.VirtualMachineConfigSpec{Name: r.what.Name, Files: &types.VirtualMachineFileInfo{VmPathName: "[" + r.to.datastoreName + "]"}}
	if len(r.what.Config) == 0 {
		return r.fromMachine()
	}
	var c types.VirtualMachineConfigInfo
	if err := types.NewJSONDecoder(bytes.NewReader(r.what.Config)).Decode(&c); err != nil {
		return fmt.Errorf("vm.json: %w", err)
	}
	var disks []mappedDisk
	if err := json.Unmarshal(r.what.Mapping, &disks); err != nil {
		return fmt.Errorf("disks.json: %w", err)
	}
	r.general(&c)
	return r.devices(ctx, &c, disks)
}

// general takes over what is no device.
func (r *restoring) general(c *types.VirtualMachineConfigInfo) {
	s := &r.spec
	s.Version, s.GuestId, s.AlternateGuestName, s.Annotation = c.Version, c.GuestId, c.AlternateGuestName, c.Annotation
	s.NumCPUs, s.NumCoresPerSocket, s.MemoryMB = c.Hardware.NumCPU, c.Hardware.NumCoresPerSocket, int64(c.Hardware.MemoryMB)
	s.Firmware, s.MemoryHotAddEnabled, s.CpuHotAddEnabled, s.NestedHVEnabled = c.Firmware, c.MemoryHotAddEnabled, c.CpuHotAddEnabled, c.NestedHVEnabled
	if c.BootOptions != nil {
		b := *c.BootOptions
		b.BootOrder = nil // it names devices by keys that the new VM does not have
		s.BootOptions = &b
	}
	if r.what.KeepIdentity {
		s.Uuid, s.InstanceUuid = c.Uuid, c.InstanceUuid
	}
	for _, o := range c.ExtraConfig {
		if v := o.GetOptionValue(); keptOption(v.Key) {
			s.ExtraConfig = append(s.ExtraConfig, v)
		}
	}
}

// keptOption reports whether a setting of a .vmx is for the new VM, too: not what names files, snapshots and identities of the old one.
func keptOption(key string) bool {
	key = strings.ToLower(key)
	for _, p := range []string{"sched.swap.", "migrate.", "snapshot.", "ctkenabled", "uuid.", "vc.uuid", "nvram", "vmware.tools.internalversion", "vmware.tools.requiredversion"} {
		if strings.HasPrefix(key, p) {
			return false
		}
	}
	return !strings.HasSuffix(key, ".ctkenabled") && !strings.HasSuffix(key, ".redo") && !strings.HasSuffix(key, ".filename")
}

// always are the devices that each VM has by itself.
func always(d types.BaseVirtualDevice) bool {
	switch d.(type) {
	case *types.VirtualPCIController, *types.VirtualPS2Controller, *types.VirtualSIOController, *types.VirtualIDEController, *types.VirtualKeyboard,
		*types.VirtualPointingDevice, *types.VirtualMachineVideoCard, *types.VirtualMachineVMCIDevice:
		return true
	}
	return false
}

func (r *restoring) add(d types.BaseVirtualDevice, op types.VirtualDeviceConfigSpecFileOperation) {
	r.spec.DeviceChange = append(r.spec.DeviceChange, &types.VirtualDeviceConfigSpec{Operation: types.VirtualDeviceConfigSpecOperationAdd, FileOperation: op, Device: d})
}

// devices takes over the disks, their controllers and the network cards; what else there was, and is not in each VM, is said.
func (r *restoring) devices(ctx context.Context, c *types.VirtualMachineConfigInfo, mapped []mappedDisk) error {
	controllers := map[int32]int32{} // key in the old VM => key in the specification
	for _, d := range r.what.Disks {
		i := slices.IndexFunc(mapped, func(m mappedDisk) bool { return m.Disk == d.Name })
		if i < 0 {
			return fmt.Errorf("disks.json does not say what %s was", d.Name)
		}
		old, controller := diskAndController(c.Hardware.Device, mapped[i].Key)
		if old == nil || controller == nil {
			return fmt.Errorf("vm.json does not have %s, device %d", d.Name, mapped[i].Key)
		}
		r.addDisk(d, mapped[i].Unit, controller, controllers)
	}
	for _, dev := range c.Hardware.Device {
		switch d := dev.(type) {
		case *types.VirtualDisk:
			if i := slices.IndexFunc(mapped, func(m mappedDisk) bool { return m.Key == d.Key && m.Disk == "" }); i >= 0 {
				r.warnf("%s is not in the point: it %s", mapped[i].Label, mapped[i].Skipped)
			}
		case types.BaseVirtualEthernetCard:
			if err := r.addCard(ctx, d); err != nil {
				return err
			}
		case *types.VirtualCdrom:
			if iso, ok := d.Backing.(*types.VirtualCdromIsoBackingInfo); ok && iso.FileName != "" {
				r.warnf("%s with %s is left out", deviceText(d), iso.FileName)
			} // One without a medium is no loss.
		case types.BaseVirtualSCSIController, types.BaseVirtualSATAController, *types.VirtualNVMEController:
			// With its disks.
		default:
			if !always(dev) {
				r.warnf("%s is left out", deviceText(dev))
			}
		}
	}
	return nil
}

// copyOf is a device that can be changed.
func copyOf(d types.BaseVirtualDevice) types.BaseVirtualDevice {
	c := reflect.New(reflect.TypeOf(d).Elem())
	c.Elem().Set(reflect.ValueOf(d).Elem())
	return c.Interface().(types.BaseVirtualDevice)
}

func deviceText(d types.BaseVirtualDevice) string {
	if info := d.GetVirtualDevice().DeviceInfo; info != nil && info.GetDescription().Label != "" {
		return info.GetDescription().Label + " (" + typeName(d) + ")"
	}
	return typeName(d)
}

func diskAndController(all []types.BaseVirtualDevice, key int32) (disk *types.VirtualDisk, controller types.BaseVirtualController) {
	for _, d := range all {
		if v, ok := d.(*types.VirtualDisk); ok && v.Key == key {
			disk = v
		}
	}
	if disk == nil {
		return nil, nil
	}
	for _, d := range all {
		if c, ok := d.(types.BaseVirtualController); ok && d.GetVirtualDevice().Key == disk.ControllerKey {
			return disk, c
		}
	}
	return disk, nil
}

// addDisk adds a disk, and its controller if that is the first one there.
func (r *restoring) addDisk(d RestoreDisk, unit int32, controller types.BaseVirtualController, known map[int32]int32) {
	was := controller.GetVirtualController()
	key, ok := known[was.Key]
	if !ok {
		if key = was.Key; !always(controller.(types.BaseVirtualDevice)) { // or it is there, under that key
			key = -100 - int32(len(known))
			made := copyOf(controller.(types.BaseVirtualDevice))
			at := made.(types.BaseVirtualController).GetVirtualController()
			at.Key, at.Device = key, nil
			r.add(made, "")
		}
		known[was.Key] = key
	}
	disk := &types.VirtualDisk{CapacityInBytes: roundUp(d.Image.Size()), CapacityInKB: roundUp(d.Image.Size()) >> 10}
	disk.Key, disk.ControllerKey, disk.UnitNumber = -1000-int32(len(r.disks)), key, &unit
	disk.Backing = &types.VirtualDiskFlatVer2BackingInfo{
		VirtualDeviceFileBackingInfo: types.VirtualDeviceFileBackingInfo{FileName: "[" + r.to.datastoreName + "]"},
		DiskMode:                     string(types.VirtualDiskModePersistent), ThinProvisioned: types.NewBool(true),
	}
	r.add(disk, types.VirtualDeviceConfigSpecFileOperationCreate)
	r.disks = append(r.disks, restoredDisk{d, fmt.Sprintf("%s%d:%d", typeName(controller), was.BusNumber, unit)})
}

// roundUp is the capacity for a disk of n bytes: whole KiB, as the API has it.
func roundUp(n int64) int64 { return (n + 1023) &^ 1023 }

// addCard adds a network card of the same kind.
func (r *restoring) addCard(ctx context.Context, d types.BaseVirtualEthernetCard) error {
	d = copyOf(d.(types.BaseVirtualDevice)).(types.BaseVirtualEthernetCard)
	card := d.GetVirtualEthernetCard()
	backing, err := r.network(ctx, card)
	if err != nil {
		return err
	}
	card.Key, card.ControllerKey, card.Backing = -2000-int32(len(r.spec.DeviceChange)), 0, backing
	card.Connectable = &types.VirtualDeviceConnectInfo{StartConnected: r.what.Connect, AllowGuestControl: true}
	card.DeviceInfo, card.ResourceAllocation, card.ExternalId = nil, nil, ""
	// An address that the server gave out is not one that may be set by hand: the kind stays, and what became of it is looked at.
	if !r.what.KeepIdentity {
		card.AddressType, card.MacAddress = string(types.VirtualEthernetCardMacTypeGenerated), ""
	} else {
		r.macs = append(r.macs, card.MacAddress)
	}
	r.add(d.(types.BaseVirtualDevice), "")
	return nil
}

// fromMachine describes a VM of another platform: its disks on one controller that every system since about 2005 has a driver for.
func (r *restoring) fromMachine() error {
	m := r.what.Machine
	r.spec.GuestId, r.spec.NumCPUs, r.spec.MemoryMB = cmp.Or(m.Guest, string(types.VirtualMachineGuestOsIdentifierOtherGuest64)), cmp.Or(m.CPUs, 2), cmp.Or(m.Memory, 2048)
	r.spec.Firmware = string(types.GuestOsDescriptorFirmwareTypeBios)
	if m.EFI {
		r.spec.Firmware = string(types.GuestOsDescriptorFirmwareTypeEfi)
	}
	controllers := map[int32]int32{}
	ahci := &types.VirtualAHCIController{}
	ahci.Key = 15000
	for i, d := range r.what.Disks {
		r.addDisk(d, int32(i), ahci, controllers)
	}
	r.warnf("the point is of another platform: the VM has its disks on a SATA controller and no network card")
	return nil
}
