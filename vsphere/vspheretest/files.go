package vspheretest

import (
	"bytes"
	"fmt"
	"os"
	"path"
	"sort"
	"strings"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
	"github.com/vmware/govmomi/vim25/xml"
)

// descriptor is the text of the layer: VMware Virtual Disk Format 5.0, "The Layout of the Descriptor File", with the keys that
// ESXi adds.
func (l *layer) descriptor() string {
	extentKind := map[string]string{flat: "VMFS", seSparse: "SESPARSE", vmfsSparse: "VMFSSPARSE", rawMapping: "VMFSRDM", passRaw: "VMFSRDM"}[l.kind]
	parentCID := uint32(0xffffffff)
	var hint string
	if l.parent != nil {
		parentCID = l.parent.cid
		hint = fmt.Sprintf("parentFileNameHint=%q\n", l.parent.name)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID=%08x\nparentCID=%08x\nisNativeSnapshot=\"no\"\ncreateType=%q\n%s",
		l.cid, parentCID, l.kind, hint)
	fmt.Fprintf(&b, "# Extent description\nRW %d %s %q\n\n# The Disk Data Base \n#DDB\n\n", l.size/sector, extentKind, l.extent())
	if l.parent == nil {
		fmt.Fprintf(&b, "ddb.adapterType = \"lsilogic\"\nddb.geometry.cylinders = \"%d\"\nddb.geometry.heads = \"255\"\nddb.geometry.sectors = \"63\"\n",
			max(1, l.size/sector/255/63))
		fmt.Fprintf(&b, "ddb.thinProvisioned = \"1\"\nddb.toolsInstallType = \"0\"\nddb.uuid = %q\nddb.virtualHWVersion = \"19\"\n", spaced(l.uuid))
	}
	fmt.Fprintf(&b, "ddb.longContentID = \"%032x\"\n", l.cid)
	return b.String()
}

// spaced is the form that a UUID has in files: "60 00 c2 98 ...-...".
func spaced(id string) string {
	h := strings.ToLower(strings.ReplaceAll(id, "-", ""))
	var b strings.Builder
	for i := 0; i+1 < len(h); i += 2 {
		switch {
		case i == 16:
			b.WriteByte('-')
		case i > 0:
			b.WriteByte(' ')
		}
		b.WriteString(h[i : i+2])
	}
	return b.String()
}

// writeVMX writes the configuration file.
func (vm *VM) writeVMX(ctx *simulator.Context) error {
	sim := vm.sim()
	var text string
	ctx.WithLock(sim, func() {
		if sim.Config != nil {
			text = vmxText(sim, vm.fileName(".nvram"))
		}
	})
	return os.WriteFile(vm.File(vm.vmx), []byte(text), 0o600)
}

// vmxText is the configuration as a .vmx has it.
func vmxText(sim *simulator.VirtualMachine, nvram string) string {
	c := sim.Config
	kv := map[string]string{
		"config.version": "8", "virtualHW.version": strings.TrimPrefix(c.Version, "vmx-"), "displayName": c.Name, "nvram": nvram,
		"guestOS": strings.TrimSuffix(c.GuestId, "Guest"), "firmware": c.Firmware, "annotation": c.Annotation,
		"uuid.bios": spaced(c.Uuid), "vc.uuid": spaced(c.InstanceUuid), "uuid.location": spaced(c.Uuid),
		"numvcpus": fmt.Sprint(c.Hardware.NumCPU), "memSize": fmt.Sprint(c.Hardware.MemoryMB),
		"pciBridge0.present": "TRUE", "vmci0.present": "TRUE", "floppy0.present": "FALSE",
	}
	if c.ChangeTrackingEnabled != nil && *c.ChangeTrackingEnabled {
		kv["ctkEnabled"] = "TRUE"
	}
	if c.BootOptions != nil && c.BootOptions.EfiSecureBootEnabled != nil && *c.BootOptions.EfiSecureBootEnabled {
		kv["uefi.secureBoot.enabled"] = "TRUE"
	}
	for _, d := range c.Hardware.Device {
		vmxDevice(kv, c.Hardware.Device, d)
	}
	for _, o := range c.ExtraConfig {
		if v := o.GetOptionValue(); v != nil && v.Key != "govcsim" {
			kv[v.Key] = fmt.Sprint(v.Value)
		}
	}
	var lines []string
	for k, v := range kv {
		if v != "" {
			lines = append(lines, fmt.Sprintf("%s = \"%s\"\n", k, escapeVMX(v)))
		}
	}
	sort.Strings(lines)
	return ".encoding = \"UTF-8\"\n" + strings.Join(lines, "")
}

// escapeVMX writes a quote, a bar and line ends as ESXi does: | and two hexadecimal digits.
func escapeVMX(s string) string {
	return strings.NewReplacer("|", "|7C", `"`, "|22", "\n", "|0A", "\r", "|0D").Replace(s)
}

func vmxDevice(kv map[string]string, all []types.BaseVirtualDevice, dev types.BaseVirtualDevice) {
	switch dev := dev.(type) {
	case types.BaseVirtualController:
		name, kind := controllerName(dev)
		if name == "" {
			return
		}
		kv[name+".present"] = "TRUE"
		if kind != "" {
			kv[name+".virtualDev"] = kind
		}
		if s, ok := dev.(types.BaseVirtualSCSIController); ok {
			kv[name+".sharedBus"] = map[bool]string{true: "physical"}[s.GetVirtualSCSIController().SharedBus == types.VirtualSCSISharingPhysicalSharing]
		}
	case *types.VirtualDisk:
		name := ""
		for _, c := range all {
			if c, ok := c.(types.BaseVirtualController); ok && c.GetVirtualController().Key == dev.ControllerKey {
				name, _ = controllerName(c)
			}
		}
		file, mode := backingFile(dev.Backing)
		if name == "" || dev.UnitNumber == nil || file == nil {
			return
		}
		name = fmt.Sprintf("%s:%d", name, *dev.UnitNumber)
		_, base, _ := strings.Cut(file.FileName, "] ")
		kv[name+".present"], kv[name+".deviceType"], kv[name+".fileName"] = "TRUE", "scsi-hardDisk", path.Base(base)
		kv[name+".mode"] = strings.ReplaceAll(strings.TrimPrefix(mode, "persistent"), "_", "-")
	case types.BaseVirtualEthernetCard:
		card := dev.GetVirtualEthernetCard()
		number := 0 // of the card among all
		for _, d := range all {
			if other, ok := d.(types.BaseVirtualEthernetCard); ok && other.GetVirtualEthernetCard().Key < card.Key {
				number++
			}
		}
		name := fmt.Sprintf("ethernet%d", number)
		kv[name+".present"], kv[name+".virtualDev"], kv[name+".generatedAddress"] = "TRUE", "vmxnet3", card.MacAddress
		kv[name+".addressType"] = "vpx"
		if b, ok := card.Backing.(*types.VirtualEthernetCardNetworkBackingInfo); ok {
			kv[name+".networkName"] = b.DeviceName
		}
	}
}

// controllerName is how a .vmx names a controller of disks: scsi0, and of which make it is.
func controllerName(c types.BaseVirtualController) (name, kind string) {
	bus := c.GetVirtualController().BusNumber
	switch c.(type) {
	case *types.ParaVirtualSCSIController:
		return fmt.Sprint("scsi", bus), "pvscsi"
	case *types.VirtualLsiLogicSASController:
		return fmt.Sprint("scsi", bus), "lsisas1068"
	case types.BaseVirtualSCSIController:
		return fmt.Sprint("scsi", bus), "lsilogic"
	case types.BaseVirtualSATAController:
		return fmt.Sprint("sata", bus), ""
	case *types.VirtualNVMEController:
		return fmt.Sprint("nvme", bus), ""
	case *types.VirtualIDEController:
		return fmt.Sprint("ide", bus), ""
	}
	return "", ""
}

// backingFile is the file and the mode of a disk.
func backingFile(b types.BaseVirtualDeviceBackingInfo) (*types.VirtualDeviceFileBackingInfo, string) {
	switch b := b.(type) {
	case *types.VirtualDiskFlatVer2BackingInfo:
		return &b.VirtualDeviceFileBackingInfo, b.DiskMode
	case *types.VirtualDiskRawDiskMappingVer1BackingInfo:
		return &b.VirtualDeviceFileBackingInfo, b.DiskMode
	}
	return nil, ""
}

// cloned is a deep copy of a value of the API.
func cloned[T any](v T) T {
	var out T
	b, err := xml.Marshal(v)
	if err != nil {
		panic(err) // it came from the API
	}
	d := xml.NewDecoder(bytes.NewReader(b))
	d.TypeFunc = types.TypeFunc()
	if err := d.Decode(&out); err != nil {
		panic(err)
	}
	return out
}

func clonedDevices(devices []types.BaseVirtualDevice) []types.BaseVirtualDevice {
	return cloned(types.ArrayOfVirtualDevice{VirtualDevice: devices}).VirtualDevice
}
