package vsphere

import (
	"fmt"
	"strings"

	"github.com/vmware/govmomi/vim25/types"
)

// device is a disk of a VM.
type device struct {
	key      int32
	label    string // "Hard disk 1"
	size     int64  // bytes
	file     string // "[datastore] folder/name.vmdk", of the newest link of its chain
	uuid     string // of the backing
	changeID string
	mapping  bool   // a raw device, whose data are not in files
	skip     string // why a snapshot does not hold it, or why it cannot be read; empty for one that is backed up

	controller, bus, unit int32
	kind                  string // of its controller: "lsilogic", "pvscsi"…
	controllerType        string // in the API: "VirtualLsiLogicController"
	backing               types.BaseVirtualDeviceBackingInfo
}

// disksOf gives the disks among devices, in their order, as far as the source can read them.
func (s *Source) disksOf(devices []types.BaseVirtualDevice) []device {
	out := disksOf(devices)
	for i := range out {
		if d := &out[i]; d.skip == "" && d.mapping && s.cfg.Transport == TransportFolder {
			d.skip = "is a raw device: what it holds is not in files, and the config says transport: folder"
		}
	}
	return out
}

// disksOf gives the disks among devices, in their order.
func disksOf(devices []types.BaseVirtualDevice) []device {
	controllers := map[int32]types.BaseVirtualController{}
	for _, d := range devices {
		if c, ok := d.(types.BaseVirtualController); ok {
			controllers[d.GetVirtualDevice().Key] = c
		}
	}
	var out []device
	for _, d := range devices {
		if disk, ok := d.(*types.VirtualDisk); ok {
			out = append(out, deviceOf(disk, controllers[disk.ControllerKey]))
		}
	}
	return out
}

func deviceOf(disk *types.VirtualDisk, c types.BaseVirtualController) device {
	d := device{key: disk.Key, size: disk.CapacityInBytes, controller: disk.ControllerKey, label: fmt.Sprintf("disk %d", disk.Key), backing: disk.Backing}
	if d.size == 0 {
		d.size = disk.CapacityInKB << 10
	}
	if disk.DeviceInfo != nil && disk.DeviceInfo.GetDescription().Label != "" {
		d.label = disk.DeviceInfo.GetDescription().Label
	}
	if disk.UnitNumber != nil {
		d.unit = *disk.UnitNumber
	}
	if c != nil {
		d.bus, d.kind, d.controllerType = c.GetVirtualController().BusNumber, controllerKind(c), typeName(c)
	}
	mode, sharing, encrypted := d.readBacking()
	switch {
	case isShared(c):
		d.skip = "is on a controller that is shared with other VMs"
	case sharing == string(types.VirtualDiskSharingSharingMultiWriter):
		d.skip = "is shared with other VMs"
	case d.skip != "":
	case strings.HasPrefix(mode, "independent"):
		d.skip = "is independent: snapshots leave it out"
	case mode != "" && mode != string(types.VirtualDiskModePersistent):
		d.skip = "has mode " + mode + ": snapshots leave it out"
	case encrypted:
		d.skip = "is encrypted"
	}
	return d
}

// readBacking takes what there is of a backing out of its many types.
func (d *device) readBacking() (mode, sharing string, encrypted bool) {
	switch b := d.backing.(type) {
	case *types.VirtualDiskFlatVer2BackingInfo:
		d.file, d.uuid, d.changeID = b.FileName, b.Uuid, b.ChangeId
		return b.DiskMode, b.Sharing, b.KeyId != nil
	case *types.VirtualDiskSeSparseBackingInfo:
		d.file, d.uuid, d.changeID = b.FileName, b.Uuid, b.ChangeId
		return b.DiskMode, "", b.KeyId != nil
	case *types.VirtualDiskSparseVer2BackingInfo:
		d.file, d.uuid, d.changeID = b.FileName, b.Uuid, b.ChangeId
		return b.DiskMode, "", b.KeyId != nil
	case *types.VirtualDiskRawDiskMappingVer1BackingInfo:
		d.file, d.uuid, d.changeID, d.mapping = b.FileName, b.Uuid, b.ChangeId, true
		if b.CompatibilityMode == string(types.VirtualDiskCompatibilityModePhysicalMode) {
			d.skip = "is a raw device in physical mode: snapshots leave it out"
		}
		return b.DiskMode, b.Sharing, false
	default:
		if f, ok := d.backing.(types.BaseVirtualDeviceFileBackingInfo); ok {
			d.file = f.GetVirtualDeviceFileBackingInfo().FileName
		}
		d.skip = fmt.Sprintf("is of a kind that is not known (%T)", d.backing)
		return "", "", false
	}
}

// isShared reports whether several VMs may have the disks of a controller.
func isShared(c types.BaseVirtualController) bool {
	if s, ok := c.(types.BaseVirtualSCSIController); ok {
		mode := s.GetVirtualSCSIController().SharedBus
		return mode != "" && mode != types.VirtualSCSISharingNoSharing
	}
	if n, ok := c.(*types.VirtualNVMEController); ok {
		return n.SharedBus != "" && n.SharedBus != "noSharing"
	}
	return false
}

// controllerKind names a controller as .vmx files do.
func controllerKind(c types.BaseVirtualController) string {
	switch c.(type) {
	case *types.ParaVirtualSCSIController:
		return "pvscsi"
	case *types.VirtualLsiLogicController:
		return "lsilogic"
	case *types.VirtualLsiLogicSASController:
		return "lsisas1068"
	case *types.VirtualBusLogicController:
		return "buslogic"
	case *types.VirtualNVMEController:
		return "nvme"
	case types.BaseVirtualSATAController:
		return "sata"
	case *types.VirtualIDEController:
		return "ide"
	}
	return fmt.Sprintf("%T", c)
}

// identity is the name of a disk that is the same in every run while its tracked changes can be trusted: another VM, another place or
// another file in that place is another disk.
func (d *device) identity(vm string) string { return fmt.Sprintf("%s/%d/%s", vm, d.key, d.uuid) }
