package vspheretest

import (
	"io"

	"github.com/vmware/govmomi/vim25/types"
)

// VMSpec says what a VM is. Empty fields are chosen.
type VMSpec struct {
	Name           string
	Folder         string // below the datacenter's folder of VMs, "Production/Web"; made when it is not there
	Pool           string // name; made below the root pool when it is not there
	Host           string // name
	Datastore      string // name
	Disks          []DiskSpec
	Networks       []string // names, one card each
	Template       bool
	PoweredOff     bool
	NoTools        bool   // VMware Tools do not run in the guest
	ChangeTracking bool   // it is switched on already, and works
	Firmware       string // "bios" (the default) or "efi"
	SecureBoot     bool
	TPM            bool
	CPUs           int32 // 0 for 2
	Memory         int64 // MiB; 0 for 1024
	GuestID        string
	Annotation     string
	UUID           string
	InstanceUUID   string
	ExtraConfig    map[string]string
	Attributes     map[string]string // custom attributes
	Tags           map[string]string // category => tag; not on a host
	Devices        []types.BaseVirtualDevice
}

// DiskSpec says what a disk is.
type DiskSpec struct {
	Size       int64       // bytes, whole KiB
	Controller string      // "pvscsi" (the default), "lsilogic", "lsisas", "sata", "nvme" or "ide"
	Bus        int         // which controller of the kind
	Mode       string      // "persistent" (the default), "independent_persistent", "independent_nonpersistent"
	RDM        string      // "physical" or "virtual"
	SharedBus  bool        // the controller shares its bus with other hosts
	Thick      bool        // "*" answers the whole of it
	Encrypted  bool        // the backing names a key
	Content    io.ReaderAt // what is on it; nil for zeros
}

// dependent says whether snapshots hold the disk.
func (d DiskSpec) dependent() bool {
	return d.RDM != "physical" && (d.Mode == "" || d.Mode == string(types.VirtualDiskModePersistent)) && !d.SharedBus
}

func (d DiskSpec) kind() string {
	return map[string]string{"": flat, "virtual": rawMapping, "physical": passRaw}[d.RDM]
}

// controllerKind says how a controller is named, where its keys begin, and how many disks it has room for, as vCenter numbers them.
type controllerKind struct {
	class      string // in the vmx: scsi0, sata0
	key, disk  int32  // of the first controller, and of its first disk
	slots      int32
	reserved   int32 // a unit that no disk can have
	virtualDev string
}

func (d DiskSpec) controller() controllerKind {
	switch d.Controller {
	case "sata":
		return controllerKind{"sata", 15000, 16000, 30, -1, "ahci"}
	case "nvme":
		return controllerKind{"nvme", 31000, 32000, 64, -1, "nvme"}
	case "ide":
		return controllerKind{"ide", 200, 3000, 2, -1, ""}
	case "lsilogic":
		return controllerKind{"scsi", 1000, 2000, 16, 7, "lsilogic"}
	case "lsisas":
		return controllerKind{"scsi", 1000, 2000, 16, 7, "lsisas1068"}
	}
	return controllerKind{"scsi", 1000, 2000, 16, 7, "pvscsi"}
}

// device makes the controller, or nil where each VM has it.
func (d DiskSpec) device() types.BaseVirtualDevice {
	k := d.controller()
	c := types.VirtualController{BusNumber: int32(d.Bus)}
	c.Key = k.key + int32(d.Bus)
	c.ControllerKey = 100 // the PCI controller
	scsi := types.VirtualSCSIController{VirtualController: c, SharedBus: types.VirtualSCSISharingNoSharing, ScsiCtlrUnitNumber: 7}
	if d.SharedBus {
		scsi.SharedBus = types.VirtualSCSISharingPhysicalSharing
	}
	switch d.Controller {
	case "sata":
		return &types.VirtualAHCIController{VirtualSATAController: types.VirtualSATAController{VirtualController: c}}
	case "nvme":
		return &types.VirtualNVMEController{VirtualController: c}
	case "ide":
		return nil
	case "lsilogic":
		return &types.VirtualLsiLogicController{VirtualSCSIController: scsi}
	case "lsisas":
		return &types.VirtualLsiLogicSASController{VirtualSCSIController: scsi}
	}
	return &types.ParaVirtualSCSIController{VirtualSCSIController: scsi}
}

// devices are the controllers and disks of the spec; the files of the disks are there.
func devices(spec VMSpec, bases []*layer) []types.BaseVirtualDevice {
	var all []types.BaseVirtualDevice
	units := map[int32]int32{} // key of a controller => next unit
	for i, d := range spec.Disks {
		k := d.controller()
		key := k.key + int32(d.Bus)
		if _, seen := units[key]; !seen {
			if c := d.device(); c != nil {
				all = append(all, c)
			}
		}
		u := units[key]
		if u == k.reserved {
			u++
		}
		units[key] = u + 1
		disk := &types.VirtualDisk{CapacityInBytes: d.Size, CapacityInKB: d.Size / 1024}
		disk.Key = k.disk + int32(d.Bus)*k.slots + u
		disk.ControllerKey, disk.UnitNumber = key, &u
		disk.Backing = d.backing(bases[i])
		all = append(all, disk)
	}
	return all
}

func (d DiskSpec) backing(l *layer) types.BaseVirtualDeviceBackingInfo {
	mode := d.Mode
	if mode == "" {
		mode = string(types.VirtualDiskModePersistent)
	}
	file := types.VirtualDeviceFileBackingInfo{FileName: l.dir.ref(l.name)}
	if d.RDM != "" {
		return &types.VirtualDiskRawDiskMappingVer1BackingInfo{
			VirtualDeviceFileBackingInfo: file, DiskMode: mode, Uuid: l.uuid, LunUuid: "0200" + newUUID(),
			DeviceName: "vml." + newUUID(), CompatibilityMode: d.RDM + "Mode",
		}
	}
	b := &types.VirtualDiskFlatVer2BackingInfo{
		VirtualDeviceFileBackingInfo: file, DiskMode: mode, Uuid: l.uuid, ContentId: newUUID(),
		ThinProvisioned: types.NewBool(!d.Thick), EagerlyScrub: types.NewBool(d.Thick),
	}
	if d.Encrypted {
		b.KeyId = &types.CryptoKeyId{KeyId: newUUID(), ProviderId: &types.KeyProviderId{Id: "kms"}}
	}
	return b
}
