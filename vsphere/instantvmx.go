package vsphere

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// InstantVM is a VM that is to run out of a folder that we serve.
type InstantVM struct {
	Name string
	// Of a VM of this platform, as a point keeps them: its .vmx and disks.json. Without them, Machine says what the VM is like.
	VMX, Mapping []byte
	Machine      Machine
	Disks        []string // disk0…, which stand in the folder as disk0.vmdk…

	Network      string // of all cards; empty: as the VM had
	Connect      bool   // the cards, when it is switched on
	KeepIdentity bool   // UUIDs and MAC addresses, for one that replaces the old VM
}

// NVRAM is the file in the folder with the variables of UEFI.
func (v *InstantVM) NVRAM() string { return "vm.nvram" }

// Text gives the .vmx, and what is left out of the VM.
func (v *InstantVM) Text() (text []byte, warnings []string, err error) {
	x := parseVMX(v.VMX)
	if len(v.VMX) == 0 {
		x = v.plain()
	} else if warnings, err = v.adopt(x); err != nil {
		return nil, nil, err
	}
	x.set("displayName", v.Name)
	x.set("nvram", v.NVRAM())
	x.set("uuid.action", map[bool]string{true: "keep", false: "create"}[v.KeepIdentity]) // what "moved or copied?" would ask
	x.set("msg.autoAnswer", "TRUE")
	return x.text(), warnings, nil
}

// lost are settings of the old place, of its snapshots and of tracking: they would name files that are not there.
func lost(key string) bool {
	for _, p := range []string{"sched.swap.", "migrate.", "snapshot.", "checkpoint.", "vmotion.", "ctkenabled", "workingdir", "extendedconfigfile", "vmxstats.filename",
		"log.filename", "suspend.directory", "uuid.action", "vc.uuid.action"} {
		if strings.HasPrefix(key, p) {
			return true
		}
	}
	return strings.HasSuffix(key, ".ctkenabled") || strings.HasSuffix(key, ".redo")
}

// adopt changes the .vmx of the VM.
func (v *InstantVM) adopt(x *vmx) (warnings []string, err error) {
	if x.get("encryption.keySafe") != "" || x.get("dataFileKey") != "" {
		return nil, errors.New("the VM is encrypted (it may have a virtual TPM): its configuration cannot be used elsewhere")
	}
	x.drop(lost)
	if !v.KeepIdentity {
		x.drop(func(key string) bool { return key == "uuid.bios" || key == "uuid.location" || key == "vc.uuid" })
	}
	placed, err := v.placeDisks(x)
	if err != nil {
		return nil, err
	}
	for _, kind := range []string{"scsi", "sata", "nvme", "ide"} {
		for _, name := range x.devices(kind) {
			if !strings.Contains(name, ":") || slices.Contains(placed, name) {
				continue
			}
			if kind := strings.ToLower(x.get(name + ".deviceType")); kind == "cdrom-image" || !strings.Contains(kind, "cdrom") {
				warnings = append(warnings, fmt.Sprintf("%s (%s) is not in the point", name, x.get(name+".fileName")))
			}
			x.dropDevice(name)
		}
	}
	for _, kind := range []string{"serial", "parallel", "floppy", "pciPassthru", "usb_xhci:", "usb:", "svga1"} {
		for _, name := range x.devices(strings.ToLower(kind)) {
			warnings = append(warnings, name+" is left out")
			x.dropDevice(name)
		}
	}
	for _, name := range x.devices("ethernet") {
		v.card(x, name)
	}
	return warnings, nil
}

// placeDisks puts the disks of the point where they were, and says where that is.
func (v *InstantVM) placeDisks(x *vmx) (placed []string, err error) {
	var mapped []mappedDisk
	if err := json.Unmarshal(v.Mapping, &mapped); err != nil {
		return nil, fmt.Errorf("disks.json: %w", err)
	}
	for _, name := range v.Disks {
		i := slices.IndexFunc(mapped, func(m mappedDisk) bool { return m.Disk == name })
		if i < 0 {
			return nil, fmt.Errorf("disks.json does not say what %s was", name)
		}
		m := &mapped[i]
		at := fmt.Sprintf("%s%d:%d", vmxBus(m.Controller), m.Bus, m.Unit)
		if !x.is(at + ".present") {
			return nil, fmt.Errorf("the .vmx has no %s, where %s was", at, name)
		}
		x.set(at+".fileName", name+".vmdk")
		x.set(at+".mode", "persistent")
		placed = append(placed, at)
	}
	return placed, nil
}

// vmxBus is what a .vmx calls the bus of a kind of controller.
func vmxBus(controller string) string {
	switch controller {
	case "nvme", "sata", "ide":
		return controller
	}
	return "scsi"
}

// card sets where a network card is plugged in, and what it is called.
func (v *InstantVM) card(x *vmx, name string) {
	x.set(name+".startConnected", map[bool]string{true: "TRUE", false: "FALSE"}[v.Connect])
	if !v.KeepIdentity {
		x.drop(func(key string) bool {
			return key == name+".address" || key == name+".generatedaddress" || key == name+".generatedaddressoffset" || key == name+".checkmacaddress"
		})
		x.set(name+".addressType", "generated")
	}
	// A port of a distributed switch is the old VM's; the port group stays.
	x.drop(func(key string) bool { return key == name+".dvs.portid" || key == name+".dvs.connectionid" })
	if v.Network != "" {
		x.drop(func(key string) bool { return strings.HasPrefix(key, name+".dvs.") })
		x.set(name+".networkName", v.Network)
	}
}

// plain is a VM of another platform: its disks on one SATA controller, and no network card.
func (v *InstantVM) plain() *vmx {
	x := parseVMX(nil)
	m := v.Machine
	for _, kv := range [][2]string{
		{".encoding", "UTF-8"}, {"config.version", "8"}, {"virtualHW.version", "14"}, {"guestOS", cmp.Or(strings.TrimSuffix(m.Guest, "Guest"), "other-64")},
		{"firmware", map[bool]string{true: "efi", false: "bios"}[m.EFI]}, {"numvcpus", fmt.Sprint(cmp.Or(m.CPUs, 2))}, {"memSize", fmt.Sprint(cmp.Or(m.Memory, 2048))},
		{"pciBridge0.present", "TRUE"}, {"vmci0.present", "TRUE"}, {"floppy0.present", "FALSE"}, {"sata0.present", "TRUE"},
	} {
		x.set(kv[0], kv[1])
	}
	for i, name := range v.Disks {
		at := fmt.Sprintf("sata0:%d", i)
		x.set(at+".present", "TRUE")
		x.set(at+".deviceType", "disk")
		x.set(at+".fileName", name+".vmdk")
	}
	return x
}
