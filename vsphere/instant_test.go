package vsphere_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vmware/govmomi/vim25/types"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/vsphere"
	"github.com/holdfast-backup/holdfast/vsphere/vspheretest"
)

// folderOf is the folder of a VM of a point, as an export would have it, below dir.
func (r *rig) folderOf(dir, name string, p *store.Point, truth [][]byte) {
	r.t.Helper()
	v := vsphere.InstantVM{Name: name, VMX: r.configFile(p, p.VM.Name+".vmx"), Mapping: r.configFile(p, "disks.json")}
	files := map[string][]byte{}
	for i, d := range p.Disks {
		v.Disks = append(v.Disks, d.Name)
		files[d.Name+"-flat.vmdk"] = truth[i]
		files[d.Name+".vmdk"] = fmt.Appendf(nil, "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"vmfs\"\nRW %d VMFS \"%s-flat.vmdk\"\nddb.adapterType = \"lsilogic\"\n", (d.Size+511)/512, d.Name)
	}
	text, warnings, err := v.Text()
	if err != nil || len(warnings) > 0 {
		r.t.Fatal(err, warnings)
	}
	files[name+".vmx"] = text
	for file, data := range files {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o700); err != nil {
			r.t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name, file), data, 0o600); err != nil {
			r.t.Fatal(err)
		}
	}
}

func (r *rig) wantState(src *vsphere.Source, i *vsphere.Instant, want vsphere.InstantState) {
	r.t.Helper()
	want.VM = i.VM
	if !want.Registered {
		want.VM = ""
	}
	if got, err := src.Look(r.t.Context(), i); err != nil || got != want {
		r.t.Errorf("the server has %+v, %v, want %+v", got, err, want)
	}
}

// TestInstant runs a VM of a point from a datastore of ours, each step twice, as after a crash; then moves it away.
func TestInstant(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	spec := threeDisks("web")
	for i := range spec.Disks {
		spec.Disks[i].Size &^= 511
	}
	spec.Networks = []string{"VM Network"}
	vm := r.add(spec)
	src := r.source()
	p := r.mustBackup(src, "web")
	dir := t.TempDir()
	r.folderOf(dir, "web-now", p, r.truth(vm))
	r.server.SetHooks(vspheretest.Hooks{OnMount: func(host, path string) (string, error) {
		if host != "192.0.2.1" || path != "/1234" {
			t.Errorf("mount of %s:%s", host, path)
		}
		return dir, nil
	}})
	i := &vsphere.Instant{Datastore: "holdfast-1234", Server: "192.0.2.1", Export: "/1234", VMX: "web-now/web-now.vmx", Name: "web-now"}
	ctx := t.Context()
	warnings, err := src.FindPlace(ctx, vsphere.InstantPlace{Inventory: r.configFile(p, "inventory.json")}, i)
	if err != nil || len(warnings) > 0 {
		t.Fatal(err, warnings)
	}
	r.wantState(src, i, vsphere.InstantState{})
	for range 2 {
		must(t, src.Mount(ctx, i))
		r.wantState(src, i, vsphere.InstantState{Mounted: true})
	}
	for range 2 {
		i.VM = "" // as if it had not been kept
		must(t, src.Register(ctx, i))
		r.wantState(src, i, vsphere.InstantState{Mounted: true, Registered: true, Ours: true})
	}
	for range 2 {
		must(t, src.PowerOn(ctx, i))
		r.wantState(src, i, vsphere.InstantState{Mounted: true, Registered: true, On: true, Ours: true})
	}
	list, err := src.List(ctx)
	k := slices.IndexFunc(list, func(v vsphere.VM) bool { return v.ID == i.VM })
	if err != nil || k < 0 || list[k].Path != "/DC0/vm/prod/web-now" || list[k].Disks != 3 || list[k].InstanceUUID == vm.InstanceUUID() {
		t.Errorf("the VM is %+v, %v", list, err)
	}
	if err := src.Remove(ctx, i); !errors.Is(err, vsphere.ErrStillUsed) {
		t.Errorf("its storage was taken away while it runs: %v", err)
	}
	moved := r.server.VM(i.VM)
	moved.WriteAt(0, []byte("written by the guest"), 4096)
	want := r.truth(vm)
	copy(want[0][4096:], "written by the guest")
	must(t, src.Relocate(ctx, i, "LocalDS_1", nil))
	r.wantState(src, i, vsphere.InstantState{Mounted: true, Registered: true, On: true})
	for range 2 {
		must(t, src.Remove(ctx, i))
		r.wantState(src, i, vsphere.InstantState{Registered: true, On: true})
	}
	for k := range want {
		got, err := os.ReadFile(moved.File(fmt.Sprintf("disk%d-flat.vmdk", k)))
		if err != nil || !bytes.Equal(got, want[k]) {
			t.Errorf("disk %d is not what the guest has, %v", k, err)
		}
	}
	must(t, src.PowerOff(ctx, i, 0)) // it is the platform's now
	r.wantState(src, i, vsphere.InstantState{Registered: true, On: true})
}

// TestInstantStopped: a VM that is over goes with its datastore, and what else is called so is left alone.
func TestInstantStopped(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	vm := r.add(oneDisk("web"))
	src := r.source()
	p := r.mustBackup(src, "web")
	dir := t.TempDir()
	r.folderOf(dir, "web-now", p, r.truth(vm))
	r.server.SetHooks(vspheretest.Hooks{OnMount: func(string, string) (string, error) { return dir, nil }})
	ctx := t.Context()
	i := &vsphere.Instant{Datastore: "holdfast-1", Server: "192.0.2.1", Export: "/1", VMX: "web-now/web-now.vmx", Name: "web-now"}
	if _, err := src.FindPlace(ctx, vsphere.InstantPlace{Host: "nowhere"}, i); !errors.Is(err, vsphere.ErrNoTarget) {
		t.Errorf("a host that is not there: %v", err)
	}
	if _, err := src.FindPlace(ctx, vsphere.InstantPlace{}, i); err != nil {
		t.Fatal(err)
	}
	must(t, src.Mount(ctx, i))
	must(t, src.Register(ctx, i))
	must(t, src.PowerOn(ctx, i))
	must(t, src.PowerOff(ctx, i, 0))
	must(t, src.PowerOff(ctx, i, 0))
	other := *i
	other.Export = "/2"
	if err := src.Mount(ctx, &other); err == nil || !strings.Contains(err.Error(), "is not 192.0.2.1:/2") {
		t.Errorf("a name that is taken: %v", err)
	}
	if err := src.Remove(ctx, &other); err == nil {
		t.Error("another datastore was removed")
	}
	r.wantState(src, i, vsphere.InstantState{Mounted: true, Registered: true, Ours: true})
	must(t, src.Remove(ctx, i))
	r.wantState(src, i, vsphere.InstantState{})
	if list, err := src.List(ctx); err != nil || len(list) != 1 {
		t.Errorf("left: %+v, %v", list, err)
	}
}

// TestInstantLost: a VM whose datastore is not to be found is not taken for one that was moved away, and a guest is asked before it is switched off; its
// datastore leaves all hosts.
func TestInstantLost(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	vm := r.add(oneDisk("web"))
	src := r.source()
	p := r.mustBackup(src, "web")
	dir := t.TempDir()
	r.folderOf(dir, "web-now", p, r.truth(vm))
	r.server.SetHooks(vspheretest.Hooks{OnMount: func(string, string) (string, error) { return dir, nil }})
	ctx := t.Context()
	i := &vsphere.Instant{Datastore: "holdfast-1", Server: "192.0.2.1", Export: "/1", VMX: "web-now/web-now.vmx", Name: "web-now"}
	if _, err := src.FindPlace(ctx, vsphere.InstantPlace{}, i); err != nil {
		t.Fatal(err)
	}
	must(t, src.Mount(ctx, i))
	must(t, src.Register(ctx, i))
	must(t, src.PowerOn(ctx, i))
	for name, change := range map[string]func(i *vsphere.Instant){
		"the server is called otherwise":            func(i *vsphere.Instant) { i.Server, i.Datastore = "::ffff:192.0.2.1", "old name" },
		"so it is, and nobody knows the datastore":  func(i *vsphere.Instant) { i.Server, i.Datastore, i.Store = "::ffff:192.0.2.1", "old name", "" },
		"the server is called otherwise, as before": func(i *vsphere.Instant) { i.Server, i.Store = "::ffff:192.0.2.1", "" },
	} {
		odd := *i
		change(&odd)
		if st, err := src.Look(ctx, &odd); err == nil {
			t.Errorf("%s: the server has %+v", name, st)
		}
		if err := src.Remove(ctx, &odd); err == nil {
			t.Errorf("%s: it was removed", name)
		}
	}
	before := r.server.Counts().Calls["PowerOffVM_Task"]
	must(t, src.PowerOff(ctx, i, time.Minute))
	if c := r.server.Counts().Calls; c["ShutdownGuest"] != 1 || c["PowerOffVM_Task"] != before {
		t.Errorf("the guest was asked %d times, and switched off %d times", c["ShutdownGuest"], c["PowerOffVM_Task"]-before)
	}
	other := *i
	for _, host := range r.server.Hosts() {
		if _, err := src.FindPlace(ctx, vsphere.InstantPlace{Host: host}, &other); err != nil {
			t.Fatal(err)
		}
		must(t, src.Mount(ctx, &other))
	}
	must(t, src.Remove(ctx, i))
	r.wantState(src, i, vsphere.InstantState{})
	for _, name := range r.server.Datastores() {
		if name == "holdfast-1" {
			t.Error("the datastore is left on a host")
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestInstantNetwork plugs a VM into a port group of a distributed switch, of which its .vmx knows nothing.
func TestInstantNetwork(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	spec := threeDisks("web")
	for i := range spec.Disks {
		spec.Disks[i].Size &^= 511
	}
	spec.Networks = []string{"VM Network"}
	vm := r.add(spec)
	src := r.source()
	p := r.mustBackup(src, "web")
	dir := t.TempDir()
	r.folderOf(dir, "web-now", p, r.truth(vm))
	r.server.SetHooks(vspheretest.Hooks{OnMount: func(string, string) (string, error) { return dir, nil }})
	i := &vsphere.Instant{Datastore: "holdfast-1234", Server: "192.0.2.1", Export: "/1234", VMX: "web-now/web-now.vmx", Name: "web-now"}
	ctx := t.Context()
	place := vsphere.InstantPlace{Inventory: r.configFile(p, "inventory.json"), Network: "nowhere"}
	if _, err := src.FindPlace(ctx, place, i); !errors.Is(err, vsphere.ErrNoTarget) {
		t.Errorf("a network that is not there: %v", err)
	}
	place.Network = "DC0_DVPG0"
	if warnings, err := src.FindPlace(ctx, place, i); err != nil || len(warnings) > 0 {
		t.Fatal(err, warnings)
	}
	must(t, src.Mount(ctx, i))
	for range 2 {
		i.VM = ""
		must(t, src.Register(ctx, i))
		wantPlugged(t, r.server.VM(i.VM), i.Portgroup)
	}
}

// wantPlugged looks at where the one network card of a VM is.
func wantPlugged(t *testing.T, vm *vspheretest.VM, portgroup string) {
	t.Helper()
	var devices []types.BaseVirtualDevice
	vm.Describe(func(c *types.VirtualMachineConfigInfo) { devices = c.Hardware.Device })
	cards := 0
	for _, d := range devices {
		card, ok := d.(types.BaseVirtualEthernetCard)
		if !ok {
			continue
		}
		cards++
		b, ok := card.GetVirtualEthernetCard().Backing.(*types.VirtualEthernetCardDistributedVirtualPortBackingInfo)
		if !ok || b.Port.PortgroupKey != portgroup {
			t.Errorf("a card is in %+v", card.GetVirtualEthernetCard().Backing)
		}
	}
	if cards != 1 {
		t.Errorf("the VM has %d cards", cards)
	}
}
