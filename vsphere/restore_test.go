package vsphere_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/vmware/govmomi/vim25/types"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/vsphere"
	"github.com/holdfast-backup/holdfast/vsphere/vspheretest"
)

// configFile gives a configuration file of a point.
func (r *rig) configFile(p *store.Point, name string) []byte {
	r.t.Helper()
	for _, c := range p.Config {
		if c.Name != name {
			continue
		}
		img, err := r.repo.OpenConfig(p, name)
		if err != nil {
			r.t.Fatal(err)
		}
		b := make([]byte, c.Size)
		if _, err := img.ReadAt(b, 0); err != nil && err != io.EOF {
			r.t.Fatal(err)
		}
		return b
	}
	return nil
}

// restoreOf is a restore of a point.
func (r *rig) restoreOf(p *store.Point, name string) vsphere.Restore {
	r.t.Helper()
	what := vsphere.Restore{Name: name, Config: r.configFile(p, "vm.json"), Inventory: r.configFile(p, "inventory.json"), Mapping: r.configFile(p, "disks.json"),
		NVRAM: r.configFile(p, p.VM.Name+".nvram")}
	for i := range p.Disks {
		img, err := r.repo.OpenDisk(p, p.Disks[i].Name)
		if err != nil {
			r.t.Fatal(err)
		}
		what.Disks = append(what.Disks, vsphere.RestoreDisk{Name: p.Disks[i].Name, Image: img})
	}
	return what
}

// wantFlat compares the disks of a VM, as they lie on the datastore, with what they must hold; a disk may be longer by what makes it whole KiB.
func (r *rig) wantFlat(dir string, want [][]byte) {
	r.t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*-flat.vmdk"))
	if err != nil || len(files) != len(want) {
		r.t.Fatalf("%s has the disks %q, %v", dir, files, err)
	}
	slices.SortFunc(files, func(a, b string) int { return len(a)*1000 + strings.Compare(a, b) - len(b)*1000 })
	for i, f := range files {
		got, err := os.ReadFile(f)
		if err != nil || len(got) < len(want[i]) || !bytes.Equal(got[:len(want[i])], want[i]) || len(bytes.Trim(got[len(want[i]):], "\x00")) > 0 {
			r.t.Errorf("%s: %d bytes are not what disk %d holds, %v", f, len(got), i, err)
		}
	}
}

// TestRestore makes a new VM out of a point: its disks hold what was frozen, on the same controllers; it is switched off, not connected, and has an identity of its own.
func TestRestore(t *testing.T) {
	needsQemuImg(t)
	for _, esx := range []bool{false, true} {
		t.Run(map[bool]string{false: "vCenter", true: "ESXi"}[esx], func(t *testing.T) {
			r := newRig(t, vspheretest.Options{ESX: esx})
			spec := threeDisks("web")
			spec.Firmware, spec.Networks, spec.CPUs, spec.Memory = "efi", []string{"VM Network"}, 3, 1536
			spec.ExtraConfig = map[string]string{"disk.EnableUUID": "TRUE", "sched.swap.derivedName": "/vmfs/x.vswp", "scsi0.pciSlotNumber": "160", "guestinfo.role": "a \"b\""}
			spec.SecureBoot = true
			if esx {
				spec.Folder = ""
			} else {
				spec.Networks = append(spec.Networks, "DC0_DVPG0")
			}
			vm := r.add(spec)
			vm.Describe(func(c *types.VirtualMachineConfigInfo) { c.Hardware.NumCoresPerSocket = types.NewInt32(3) })
			src := r.source()
			p := r.mustBackup(src, "web")
			truth := r.truth(vm)
			r.write(vm, 3)
			made, err := src.Restore(t.Context(), r.restoreOf(p, "web-restored"))
			if err != nil {
				t.Fatal(err)
			}
			if len(made.Warnings) > 0 {
				t.Errorf("warnings %q", made.Warnings)
			}
			datastore := filepath.Dir(filepath.Dir(vm.File("x")))
			r.wantFlat(filepath.Join(datastore, "web-restored"), truth)
			nvram, err := os.ReadFile(filepath.Join(datastore, "web-restored", "web-restored.nvram"))
			if err != nil || !bytes.Equal(nvram, r.configFile(p, "web.nvram")) {
				t.Errorf("the NVRAM is not that of the point, %v", err)
			}
			list, err := src.List(t.Context())
			if err != nil || len(list) != 2 {
				t.Fatalf("%v, %v", list, err)
			}
			i := slices.IndexFunc(list, func(v vsphere.VM) bool { return v.ID == made.ID })
			if i < 0 || list[i].On || list[i].Path != made.Path || list[i].InstanceUUID == vm.InstanceUUID() || list[i].Disks != 3 {
				t.Errorf("made is %+v, listed %+v", made, list)
			}
			// What it is like the second backup tells, by what the server says of it.
			second := r.mustBackup(src, "web-restored")
			r.wantSame(p, second)
			r.wantSamePlaces(p, second)
			r.wantSameVMX(p, second)
		})
	}
}

// wantSame compares what servers said of two VMs, but for what must differ.
func (r *rig) wantSame(a, b *store.Point) {
	r.t.Helper()
	var c [2]types.VirtualMachineConfigInfo
	for i, p := range []*store.Point{a, b} {
		if err := types.NewJSONDecoder(bytes.NewReader(r.configFile(p, "vm.json"))).Decode(&c[i]); err != nil {
			r.t.Fatal(err)
		}
	}
	text := func(c *types.VirtualMachineConfigInfo) string {
		out := fmt.Sprintln(c.Firmware, c.Hardware.NumCPU, *c.Hardware.NumCoresPerSocket, c.Hardware.MemoryMB, c.GuestId, c.Version)
		if c.BootOptions != nil && c.BootOptions.EfiSecureBootEnabled != nil {
			out += fmt.Sprintln("secure boot", *c.BootOptions.EfiSecureBootEnabled)
		}
		for _, o := range c.ExtraConfig {
			if v := o.GetOptionValue(); strings.HasPrefix(v.Key, "guestinfo.") || strings.HasSuffix(v.Key, "pciSlotNumber") {
				out += fmt.Sprintln(v.Key, v.Value)
			}
		}
		for _, d := range c.Hardware.Device {
			switch v := d.(type) {
			case *types.VirtualDisk:
				out += fmt.Sprintln("disk", v.CapacityInBytes, *v.UnitNumber)
			case types.BaseVirtualSCSIController:
				out += fmt.Sprintf("%T %d\n", v, v.GetVirtualSCSIController().BusNumber)
			case types.BaseVirtualEthernetCard:
				switch b := v.GetVirtualEthernetCard().Backing.(type) {
				case *types.VirtualEthernetCardNetworkBackingInfo:
					out += fmt.Sprintf("%T %s\n", v, b.DeviceName)
				case *types.VirtualEthernetCardDistributedVirtualPortBackingInfo:
					out += fmt.Sprintf("%T %s %s\n", v, b.Port.PortgroupKey, b.Port.SwitchUuid)
				}
			}
		}
		lines := strings.Split(out, "\n")
		slices.Sort(lines[1:])
		return strings.Join(lines, "\n")
	}
	was, is := text(&c[0]), text(&c[1])
	if was != is {
		r.t.Errorf("the VM was\n%s\nand is\n%s", was, is)
	}
	for _, o := range c[1].ExtraConfig {
		if strings.HasPrefix(o.GetOptionValue().Key, "sched.swap") {
			r.t.Errorf("it has %v", o)
		}
	}
	if !slices.ContainsFunc(c[1].ExtraConfig, func(o types.BaseOptionValue) bool { return o.GetOptionValue().Key == "disk.EnableUUID" }) {
		r.t.Error("it lacks disk.EnableUUID")
	}
	for _, d := range c[1].Hardware.Device {
		if card, ok := d.(types.BaseVirtualEthernetCard); ok && card.GetVirtualEthernetCard().Connectable.StartConnected {
			r.t.Error("it is connected when it is switched on")
		}
	}
}

// wantSamePlaces compares where two VMs have their disks.
func (r *rig) wantSamePlaces(a, b *store.Point) {
	r.t.Helper()
	type place struct {
		Disk, Controller string
		Bus, Unit        int
		Size             int64 `json:"bytes"`
	}
	var at [2][]place
	for i, p := range []*store.Point{a, b} {
		if err := json.Unmarshal(r.configFile(p, "disks.json"), &at[i]); err != nil {
			r.t.Fatal(err)
		}
		slices.SortFunc(at[i], func(a, b place) int { return strings.Compare(a.Disk, b.Disk) })
	}
	for i := range at[0] { // a disk may be longer by what makes it whole KiB
		at[0][i].Size = (at[0][i].Size + 1023) &^ 1023
	}
	if !slices.Equal(at[0], at[1]) {
		r.t.Errorf("the disks were at %+v and are at %+v", at[0], at[1])
	}
}

// vmxOwn are what is of one VM alone in its .vmx: names, places, identities, and what is not taken along on purpose.
var vmxOwn = regexp.MustCompile(`(?i)^(displayName|nvram|uuid\.|vc\.uuid|.*\.fileName|.*address|.*addressType|sched\.swap|ctkEnabled|.*\.startConnected)`)

// wantSameVMX compares the .vmx of two VMs, but for what is of one alone.
func (r *rig) wantSameVMX(a, b *store.Point) {
	r.t.Helper()
	var lines [2][]string
	for i, p := range []*store.Point{a, b} {
		for line := range strings.Lines(string(r.configFile(p, p.VM.Name+".vmx"))) {
			if !vmxOwn.MatchString(line) {
				lines[i] = append(lines[i], strings.TrimSpace(line))
			}
		}
		slices.Sort(lines[i])
	}
	if len(lines[0]) < 15 || !slices.Equal(lines[0], lines[1]) {
		r.t.Errorf("the .vmx was\n%s\nand is\n%s", strings.Join(lines[0], "\n"), strings.Join(lines[1], "\n"))
	}
}

// TestRestoreIdentity: a VM that replaces the old one has its UUIDs and addresses.
func TestRestoreIdentity(t *testing.T) {
	needsQemuImg(t)
	r := newRig(t, vspheretest.Options{})
	spec := oneDisk("web")
	spec.Networks = []string{"VM Network"}
	vm := r.add(spec)
	src := r.source()
	p := r.mustBackup(src, "web")
	uuid := vm.InstanceUUID()
	what := r.restoreOf(p, "web")
	what.Name, what.KeepIdentity = "web-again", true
	if _, err := src.Restore(t.Context(), what); err != nil {
		t.Fatal(err)
	}
	second := r.mustBackup(src, "web-again")
	if second.VM.UUID != uuid {
		t.Errorf("its UUID is %s, not %s", second.VM.UUID, uuid)
	}
	mac := regexp.MustCompile(`ethernet0\.generatedAddress = "(.*)"`)
	was, is := mac.FindSubmatch(r.configFile(p, "web.vmx")), mac.FindSubmatch(r.configFile(second, "web-again.vmx"))
	if was == nil || is == nil || string(was[1]) != string(is[1]) {
		t.Errorf("its address is %s, not %s", is, was)
	}
}

// TestRestoreWhereTheStoreIs: the host is one that has the datastore, whichever the VM was on.
func TestRestoreWhereTheStoreIs(t *testing.T) {
	needsQemuImg(t)
	r := newRig(t, vspheretest.Options{})
	hosts := r.server.Hosts()
	spec := oneDisk("web")
	spec.Host = hosts[0]
	vm := r.add(spec)
	src := r.source()
	p := r.mustBackup(src, "web")
	r.server.SetDatastoreHosts("LocalDS_1", hosts[1])
	what := r.restoreOf(p, "there")
	what.Datastore = "LocalDS_1"
	made, err := src.Restore(t.Context(), what)
	if err != nil {
		t.Fatal(err)
	}
	if len(made.Warnings) > 0 {
		t.Errorf("warnings %q", made.Warnings)
	}
	r.server.SetDatastoreHosts("LocalDS_1")
	what = r.restoreOf(p, "nowhere")
	what.Datastore = "LocalDS_1"
	if _, err := src.Restore(t.Context(), what); !errors.Is(err, vsphere.ErrNoTarget) {
		t.Errorf("no host has it: %v", err)
	}
	r.nothingLeft(vm)
}

// TestRestoreElsewhere: a point of another platform, and places that are told.
func TestRestoreElsewhere(t *testing.T) {
	needsQemuImg(t)
	r := newRig(t, vspheretest.Options{})
	vm := r.add(threeDisks("web"))
	src := r.source()
	p := r.mustBackup(src, "web")
	what := r.restoreOf(p, "moved")
	what.Config, what.Inventory, what.Mapping, what.NVRAM = nil, nil, nil, nil
	what.Machine = vsphere.Machine{EFI: true, CPUs: 4, Memory: 512}
	what.Folder, what.Datastore, what.PowerOn = "/DC0/vm/prod", "LocalDS_1", true
	made, err := src.Restore(t.Context(), what)
	if err != nil {
		t.Fatal(err)
	}
	if made.Path != "/DC0/vm/prod/moved" || !strings.Contains(strings.Join(made.Warnings, ""), "another platform") {
		t.Errorf("made is %+v", made)
	}
	dir := filepath.Dir(filepath.Dir(vm.File("x")))
	r.wantFlat(filepath.Join(filepath.Dir(dir), strings.Replace(filepath.Base(dir), "LocalDS_0", "LocalDS_1", 1), "moved"), r.truth(vm))
	for _, wrong := range []func(*vsphere.Restore){
		func(w *vsphere.Restore) { w.Datastore = "nowhere" },
		func(w *vsphere.Restore) { w.Folder = "/DC0/vm/nowhere" },
		func(w *vsphere.Restore) { w.Pool = "nowhere" },
	} {
		what := r.restoreOf(p, "wrong")
		wrong(&what)
		if _, err := src.Restore(t.Context(), what); !errors.Is(err, vsphere.ErrNoTarget) || !strings.Contains(err.Error(), "nowhere") {
			t.Errorf("a place that is not there: %v", err)
		}
	}
}

// TestRestoreFails: where a restore fails there is no VM, and no lease is open.
func TestRestoreFails(t *testing.T) {
	needsQemuImg(t)
	r := newRig(t, vspheretest.Options{})
	r.add(oneDisk("web"))
	src := r.source()
	p := r.mustBackup(src, "web")
	broken := r.restoreOf(p, "broken")
	broken.Disks[0].Image = brokenImage{broken.Disks[0].Image.(*store.Image)}
	if _, err := src.Restore(t.Context(), broken); !errors.Is(err, errBroken) {
		t.Errorf("a disk that cannot be read: %v", err)
	}
	r.server.Misbehave(func(f *vspheretest.Faults) { f.LeaseCut, f.LeaseCuts = 100_000, 1 })
	if _, err := src.Restore(t.Context(), r.restoreOf(p, "cut")); err == nil {
		t.Error("the connection was lost")
	}
	// A server that keeps what was begun.
	r.server.Misbehave(func(f *vspheretest.Faults) { f.LeaseCut, f.LeaseCuts, f.LeaseKeeps = 100_000, 1, true })
	if _, err := src.Restore(t.Context(), r.restoreOf(p, "kept")); err == nil {
		t.Error("the connection was lost")
	}
	list, err := src.List(t.Context())
	if err != nil || len(list) != 1 {
		t.Errorf("%+v, %v", list, err)
	}
	if n := r.server.Counts().OpenLeases; n != 0 {
		t.Errorf("%d leases are open", n)
	}
}

// TestLeaseNumbers: disks of leases that have numbers in the place of controllers.
func TestLeaseNumbers(t *testing.T) {
	needsQemuImg(t)
	r := newRig(t, vspheretest.Options{})
	vm := r.add(threeDisks("web"))
	r.server.Misbehave(func(f *vspheretest.Faults) { f.LeaseNumbers = true })
	r.cfg.Transport = vsphere.TransportLease
	src := r.source()
	p := r.mustBackup(src, "web")
	r.wantDisks(p, r.truth(vm))
	if _, err := src.Restore(t.Context(), r.restoreOf(p, "new")); err != nil {
		t.Fatal(err)
	}
	r.wantFlat(filepath.Join(filepath.Dir(filepath.Dir(vm.File("x"))), "new"), r.truth(vm))
}

var errBroken = errors.New("a broken chunk")

type brokenImage struct{ *store.Image }

func (b brokenImage) ReadAt([]byte, int64) (int, error) { return 0, errBroken }
