package vspheretest

import (
	"bytes"
	"os"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/vapi/rest"
	"github.com/vmware/govmomi/vapi/tags"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/holdfast-backup/holdfast/store/extent"
)

func (c *client) folders() (*object.Datacenter, *object.DatacenterFolders, *object.ResourcePool) {
	c.t.Helper()
	dc, err := find.NewFinder(c.Client.Client).DefaultDatacenter(c.ctx)
	if err != nil {
		c.t.Fatal(err)
	}
	f, err := dc.Folders(c.ctx)
	if err != nil {
		c.t.Fatal(err)
	}
	pool, err := c.s.pool(c.s.context(), "", *c.s.host(""))
	if err != nil {
		c.t.Fatal(err)
	}
	return dc, f, object.NewResourcePool(c.Client.Client, pool)
}

func (c *client) create(spec types.VirtualMachineConfigSpec) *VM {
	c.t.Helper()
	_, f, pool := c.folders()
	ref := c.run(f.VmFolder.CreateVM(c.ctx, spec, pool, nil)).Result.(types.ManagedObjectReference)
	return c.s.vm(ref)
}

// The inventory is worth listing; a VM has what its specification says.
func TestAddVM(t *testing.T) {
	for _, o := range []Options{{}, {ESX: true}} {
		s := New(t, o)
		spec := VMSpec{
			Name: "web 01", Firmware: "efi", SecureBoot: true, CPUs: 3, Memory: 2048, Annotation: "two\nlines \"quoted\"",
			ExtraConfig: map[string]string{"guestinfo.role": "web"}, Networks: []string{"VM Network"}, TPM: true,
			Disks: []DiskSpec{
				{Size: 1 << 20}, {Size: 2 << 20}, {Size: 1 << 20, Controller: "lsilogic", Bus: 1, Mode: "independent_persistent"},
				{Size: 1 << 20, Controller: "sata"}, {Size: 1 << 20, Controller: "nvme"}, {Size: 1 << 20, Controller: "ide", Bus: 1},
				{Size: 1 << 20, RDM: "physical"}, {Size: 1 << 20, RDM: "virtual"}, {Size: 1 << 20, Controller: "lsisas", Bus: 2, SharedBus: true},
				{Size: 1 << 20, Thick: true, Encrypted: true},
			},
		}
		if !o.ESX {
			spec.Folder, spec.Pool, spec.Attributes = "Production/Web", "Gold", map[string]string{"owner": "ops"}
			spec.Tags = map[string]string{"tier": "gold"}
		}
		vm := s.AddVM(spec)
		c := connect(t, s)
		var m mo.VirtualMachine
		c.properties(vm.Ref(), []string{"config", "runtime", "customValue", "datastore", "network"}, &m)
		if m.Config.Firmware != "efi" || !*m.Config.BootOptions.EfiSecureBootEnabled || m.Config.Hardware.NumCPU != 3 || m.Config.InstanceUuid != vm.InstanceUUID() {
			t.Errorf("the configuration is %+v", m.Config)
		}
		if !o.ESX && len(m.CustomValue) != 1 || m.Runtime.PowerState != types.VirtualMachinePowerStatePoweredOn || len(m.Network) != 1 {
			t.Errorf("%+v, %+v, %+v", m.CustomValue, m.Runtime, m.Network)
		}
		var keys []int32
		for _, d := range apiDisks(m.Config.Hardware.Device) {
			keys = append(keys, d.key)
		}
		if want := []int32{2000, 2001, 2016, 16000, 32000, 3002, 2002, 2003, 2032, 2004}; !slices.Equal(keys, want) {
			t.Errorf("disks %v, want %v", keys, want)
		}
		_, vmx, err := s.request(t, "GET", vm.FilePath("web 01.vmx"), nil)
		for _, line := range []string{
			`displayName = "web 01"`, `firmware = "efi"`, `annotation = "two|0Alines |22quoted|22"`, `scsi0:1.fileName = "web 01_1.vmdk"`,
			`scsi1:0.mode = "independent-persistent"`, `sata0:0.present = "TRUE"`, `nvme0.present = "TRUE"`, `guestinfo.role = "web"`,
			`uefi.secureBoot.enabled = "TRUE"`, `ethernet0.networkName = "VM Network"`, `scsi2.sharedBus = "physical"`,
			`vc.uuid = "` + spaced(vm.InstanceUUID()) + `"`,
		} {
			if err != nil || !strings.Contains(string(vmx), line) {
				t.Errorf("the .vmx lacks %s", line)
			}
		}
		if _, b, err := s.request(t, "GET", vm.FilePath("web 01.nvram"), nil); err != nil || len(b) == 0 {
			t.Errorf("the nvram: %d bytes, %v", len(b), err)
		}
		ref := c.snapshot(vm, "s")
		var inside []int32
		for _, d := range c.snapshotDisks(ref) {
			if vm.snapshots[ref].disks[d.key] != nil {
				inside = append(inside, d.key)
			}
		}
		if want := []int32{2000, 2001, 16000, 32000, 3002, 2003, 2004}; !slices.Equal(inside, want) {
			t.Errorf("the snapshot has %v, want %v", inside, want)
		}
		if !o.ESX {
			if twin := s.AddVM(VMSpec{Name: "web 01", Folder: "Other"}); twin.Ref() == vm.Ref() || twin.FilePath("x") == vm.FilePath("x") {
				t.Error("two VMs of one name are one")
			}
			slash := s.AddVM(VMSpec{Name: "a/b", Disks: []DiskSpec{{Size: 1 << 20}}})
			c.properties(slash.Ref(), []string{"name"}, &m)
			if m.Name != "a%2fb" || slash.FilePath("a_b.vmdk") != c.liveDisks(slash)[0].file {
				t.Errorf("a VM with a slash is %q, %+v", m.Name, c.liveDisks(slash))
			}
			c.wantTag(vm, "gold")
		}
	}
}

// What a client makes has files; what it writes by /folder is what the disk holds; what it destroys is gone.
func TestCreateAndDestroy(t *testing.T) {
	s := New(t, Options{})
	c := connect(t, s)
	vm := c.create(c.importSpec("new01", diskSize).ConfigSpec)
	base := strings.TrimSuffix(c.liveDisks(vm)[0].file, ".vmdk") + "-flat.vmdk"
	want := append(make([]byte, 1<<20), noise(1, diskSize-1<<20)...)
	if res, _, err := s.request(t, "PUT", base, bytes.NewReader(want)); err != nil || res.StatusCode != 201 {
		t.Fatalf("upload: %v, %v", res, err)
	}
	wantBytes(t, "the guest's view", readAll(t, vm, 0), want)
	c.run(c.object(vm).Reconfigure(c.ctx, types.VirtualMachineConfigSpec{ChangeTrackingEnabled: types.NewBool(true)}))
	ref := c.snapshot(vm, "s")
	if es, _, err := c.areas(vm, ref, c.snapshotDisks(ref)[0], "*"); err != nil || !slices.Equal(es, []extent.Extent{{Off: 1 << 20, Len: diskSize - 1<<20}}) {
		t.Errorf("allocated by the upload: %v, %v", es, err)
	}
	c.removeSnapshot(ref)
	if _, b, err := s.request(t, "GET", base, nil); err != nil || !bytes.Equal(b, want) {
		t.Errorf("read back: %d bytes, %v", len(b), err)
	}
	if res, _, err := s.request(t, "PUT", base, bytes.NewReader(make([]byte, diskSize+1))); err != nil || res.StatusCode != 500 {
		t.Errorf("more than the disk: %v, %v", res, err)
	}
	dir := path.Dir(base)
	for _, name := range []string{"/new01.nvram", "/other.txt"} {
		if res, _, err := s.request(t, "PUT", dir+name, strings.NewReader("hello")); err != nil || res.StatusCode != 201 {
			t.Errorf("%s: %v, %v", name, res, err)
		}
		if _, b, err := s.request(t, "GET", dir+name, nil); err != nil || string(b) != "hello" {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
	if res, b, err := s.request(t, "HEAD", base, nil); err != nil || res.ContentLength != diskSize || len(b) != 0 {
		t.Errorf("HEAD: %v, %v", res, err)
	}
	if res, _, err := s.request(t, "DELETE", dir+"/other.txt", nil); err != nil || res.StatusCode != 204 {
		t.Errorf("DELETE: %v, %v", res, err)
	}
	if res, _, err := s.request(t, "GET", dir+"/other.txt", nil); err != nil || res.StatusCode != 404 {
		t.Errorf("after DELETE: %v, %v", res, err)
	}
	c.run(c.object(vm).PowerOn(c.ctx))
	if _, err := c.try(c.object(vm).Destroy(c.ctx)); err == nil {
		t.Error("a running VM was destroyed")
	}
	c.run(c.object(vm).PowerOff(c.ctx))
	c.snapshot(vm, "s")
	c.run(c.object(vm).Destroy(c.ctx))
	if _, err := os.Stat(vm.File("")); !os.IsNotExist(err) || s.vm(vm.Ref()) != nil || s.Counts().Snapshots != 0 {
		t.Errorf("after the end: %v, %+v", err, s.Counts())
	}
	var m mo.VirtualMachine
	if err := c.RetrieveOne(c.ctx, vm.Ref(), []string{"name"}, &m); err == nil {
		t.Error("a destroyed VM has properties")
	}
}

// Disks come, grow and go.
func TestReconfigure(t *testing.T) {
	s, vm, c := newVM(t, Options{})
	var m mo.VirtualMachine
	c.properties(vm.Ref(), []string{"config.hardware.device"}, &m)
	devices := object.VirtualDeviceList(m.Config.Hardware.Device)
	ctl, err := devices.FindDiskController("")
	if err != nil {
		t.Fatal(err)
	}
	disk := devices.CreateDisk(ctl, types.ManagedObjectReference{}, "")
	disk.CapacityInKB = 1024
	if err := c.object(vm).AddDevice(c.ctx, disk); err != nil {
		t.Fatal(err)
	}
	if vm.Disks() != 2 || vm.DiskSize(1) != 1<<20 {
		t.Fatalf("%d disks", vm.Disks())
	}
	vm.WriteAt(1, noise(1, 1000), 1<<20-1000)
	c.properties(vm.Ref(), []string{"config.hardware.device"}, &m)
	added := object.VirtualDeviceList(m.Config.Hardware.Device).FindByKey(vm.DiskKey(1)).(*types.VirtualDisk)
	added.CapacityInKB, added.CapacityInBytes = 2048, 2<<20
	if err := c.object(vm).EditDevice(c.ctx, added); err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc([]int{0, 1}, func(i int) bool { return vm.DiskSize(i) == 2<<20 })
	if i < 0 {
		t.Fatal("the disk did not grow")
	}
	b := make([]byte, 1000)
	_, _ = vm.ReadAt(i, b, 1<<20-1000)
	wantBytes(t, "after it grew", b, noise(1, 1000))
	file := added.Backing.(*types.VirtualDiskFlatVer2BackingInfo).FileName
	if err := c.object(vm).RemoveDevice(c.ctx, false, added); err != nil {
		t.Fatal(err)
	}
	if res, _, err := s.request(t, "GET", file, nil); err != nil || res.StatusCode != 404 || vm.Disks() != 1 {
		t.Errorf("after its removal: %v, %v, %d disks", res, err, vm.Disks())
	}
	vm.Resize(0, 2*diskSize)
	if d := c.liveDisks(vm)[0]; d.size != 2*diskSize {
		t.Errorf("the disk is %+v", d)
	}
}

// A disk that took the place of another has its file name, and nothing else; a revert ends the tracking.
func TestTrackingEnds(t *testing.T) {
	_, vm, c := newVM(t, Options{})
	s1 := c.snapshot(vm, "one")
	d := c.snapshotDisks(s1)[0]
	frozen := readAll(t, vm, 0)
	vm.WriteAt(0, noise(5, 5000), 77)
	vm.Revert(s1)
	wantBytes(t, "after the revert", readAll(t, vm, 0), frozen)
	s2 := c.snapshot(vm, "two")
	_, err := c.query(vm, s2, d.key, 0, d.changeID)
	wantFault[*types.FileFault](t, "after a revert", err)
	c.removeSnapshot(s1)
	c.removeSnapshot(s2)
	wantBytes(t, "after all", readAll(t, vm, 0), frozen)
	before := c.liveDisks(vm)[0]
	vm.ReplaceDisk(0, bytes.NewReader(noise(8, diskSize)))
	s3 := c.snapshot(vm, "three")
	after := c.snapshotDisks(s3)[0]
	if after.file != before.file || strings.Split(after.changeID, "/")[0] == strings.Split(before.changeID, "/")[0] {
		t.Errorf("was %+v, is %+v", before, after)
	}
	wantBytes(t, "the new disk", vm.frozenBytes(s3, 0), noise(8, diskSize))
}

// A VM that moves takes its files along, with snapshots and all, and both datastores know.
func TestRelocate(t *testing.T) {
	s, vm, c := newVM(t, Options{})
	s1 := c.snapshot(vm, "one")
	d := c.snapshotDisks(s1)[0]
	vm.WriteAt(0, noise(6, 6000), 66)
	want, frozen := readAll(t, vm, 0), vm.frozenBytes(s1, 0)
	old := vm.File("")
	ds, err := s.datastore("LocalDS_1")
	if err != nil {
		t.Fatal(err)
	}
	hosts := s.Hosts()
	c.run(c.object(vm).Relocate(c.ctx, types.VirtualMachineRelocateSpec{Datastore: &ds.Self, Host: s.host(hosts[1])}, ""))
	wantBytes(t, "the guest's view", readAll(t, vm, 0), want)
	if _, err := os.Stat(old); !os.IsNotExist(err) || vm.Datastore() != "LocalDS_1" {
		t.Errorf("the old folder: %v", err)
	}
	moved := c.snapshotDisks(s1)[0]
	if moved.file != "[LocalDS_1] web01/web01.vmdk" || moved.changeID != d.changeID {
		t.Errorf("the disk in the snapshot is %+v", moved)
	}
	wantBytes(t, "by /folder", s.readRange(t, "[LocalDS_1] web01/web01-flat.vmdk", extent.Extent{Len: diskSize}), frozen)
	var m mo.VirtualMachine
	c.properties(vm.Ref(), []string{"datastore", "config.files", "runtime.host", "layoutEx"}, &m)
	if len(m.Datastore) != 1 || m.Datastore[0] != ds.Self || m.Config.Files.VmPathName != "[LocalDS_1] web01/web01.vmx" || *m.Runtime.Host != *s.host(hosts[1]) {
		t.Errorf("%+v, %+v, %v", m.Datastore, m.Config.Files, m.Runtime.Host)
	}
	for _, f := range m.LayoutEx.File {
		if !strings.HasPrefix(f.Name, "[LocalDS_1] web01/") {
			t.Errorf("the layout has %s", f.Name)
		}
	}
	c.removeSnapshot(s1)
	wantBytes(t, "after the removal", readAll(t, vm, 0), want)
	from, _ := s.datastore("LocalDS_0")
	c.run(object.NewDatastore(c.Client.Client, from.Self).Destroy(c.ctx))
	_, err = c.try(object.NewDatastore(c.Client.Client, ds.Self).Destroy(c.ctx))
	wantFault[*types.ResourceInUse](t, "a datastore in use", err)
}

// A VM that was taken off the inventory comes back from its files.
func TestRegister(t *testing.T) {
	s := New(t, Options{})
	vm := s.AddVM(VMSpec{Name: "web01", Firmware: "efi", Annotation: "a \"note\"", Networks: []string{"VM Network"}, PoweredOff: true, Disks: []DiskSpec{
		{Size: 1 << 20, Content: bytes.NewReader(noise(1, 1<<20))}, {Size: 2 << 20, Controller: "sata"}, {Size: 1 << 20, Controller: "lsilogic", Bus: 1, Mode: "independent_persistent"},
	}})
	c := connect(t, s)
	_, f, pool := c.folders()
	var was, is mo.VirtualMachine
	c.properties(vm.Ref(), []string{"config"}, &was)
	if err := c.object(vm).Unregister(c.ctx); err != nil {
		t.Fatal(err)
	}
	info := c.run(f.VmFolder.RegisterVM(c.ctx, was.Config.Files.VmPathName, "", false, pool, nil))
	back := s.vm(info.Result.(types.ManagedObjectReference))
	c.properties(back.Ref(), []string{"config", "name"}, &is)
	if is.Name != "web01" || is.Config.Uuid != was.Config.Uuid || is.Config.InstanceUuid != was.Config.InstanceUuid || is.Config.Firmware != "efi" ||
		is.Config.Annotation != was.Config.Annotation || is.Config.Hardware.NumCPU != was.Config.Hardware.NumCPU {
		t.Errorf("came back as %+v", is.Config)
	}
	a, b := apiDisks(was.Config.Hardware.Device), apiDisks(is.Config.Hardware.Device)
	slices.SortFunc(a, func(x, y apiDisk) int { return int(x.key - y.key) })
	for i := range a {
		if len(b) != len(a) || a[i].key != b[i].key || a[i].size != b[i].size || a[i].file != b[i].file {
			t.Fatalf("disks %+v, want %+v", b, a)
		}
	}
	wantBytes(t, "the disk", readAll(t, back, 0), noise(1, 1<<20))
	if _, err := c.try(f.VmFolder.RegisterVM(c.ctx, was.Config.Files.VmPathName, "", false, pool, nil)); err == nil {
		t.Error("registered twice")
	}
	_, err := c.try(f.VmFolder.RegisterVM(c.ctx, "[LocalDS_0] nothing/nothing.vmx", "", false, pool, nil))
	wantFault[*types.NotFound](t, "no such file", err)
}

// A datastore behind an address is where the test says, and goes when nothing is on it.
func TestNASDatastore(t *testing.T) {
	s := New(t, Options{})
	c := connect(t, s)
	dir := t.TempDir()
	s.SetHooks(Hooks{OnMount: func(host, path string) (string, error) {
		if host != "backup.example" || path != "/points/web01" {
			t.Errorf("mount of %s:%s", host, path)
		}
		return dir, nil
	}})
	host := object.NewHostSystem(c.Client.Client, *s.host(""))
	sys, err := host.ConfigManager().DatastoreSystem(c.ctx)
	if err != nil {
		t.Fatal(err)
	}
	ds, err := sys.CreateNasDatastore(c.ctx, types.HostNasVolumeSpec{RemoteHost: "backup.example", RemotePath: "/points/web01", LocalPath: "holdfast-1", AccessMode: "readWrite", Type: "NFS"})
	if err != nil {
		t.Fatal(err)
	}
	vm := s.AddVM(VMSpec{Name: "web01", Datastore: "holdfast-1", PoweredOff: true, Disks: []DiskSpec{{Size: diskSize, Content: bytes.NewReader(noise(1, diskSize))}}})
	if _, err := os.Stat(dir + "/web01/web01-flat.vmdk"); err != nil {
		t.Fatal(err)
	}
	_, err = methods.RemoveDatastore(c.ctx, c.Client.Client, &types.RemoveDatastore{This: sys.Reference(), Datastore: ds.Reference()})
	wantFault[*types.ResourceInUse](t, "in use", err)
	vm.MoveToDatastore("LocalDS_1")
	wantBytes(t, "after the move", readAll(t, vm, 0), noise(1, diskSize))
	if _, err = methods.RemoveDatastore(c.ctx, c.Client.Client, &types.RemoveDatastore{This: sys.Reference(), Datastore: ds.Reference()}); err != nil {
		t.Fatal(err)
	}
	if slices.Contains(s.Datastores(), "holdfast-1") {
		t.Error("the datastore is still there")
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func (c *client) wantTag(vm *VM, name string) {
	c.t.Helper()
	rc := rest.NewClient(c.Client.Client)
	if err := rc.Login(c.ctx, c.s.URLWithUser().User); err != nil {
		c.t.Fatal(err)
	}
	attached, err := tags.NewManager(rc).GetAttachedTags(c.ctx, vm.Ref())
	if err != nil || len(attached) != 1 || attached[0].Name != name {
		c.t.Errorf("tags %+v, %v; want %s", attached, err, name)
	}
}

func TestInventoryName(t *testing.T) {
	for name, want := range map[string]string{"web01": "web01", "a/b": "a%2fb", "a%2fb": "a%2fb", "50%": "50%25", `a\b%20`: "a%5cb%2520", "%5C%25": "%5C%25"} {
		if got := inventoryName(name); got != want {
			t.Errorf("%q is %q, want %q", name, got, want)
		}
	}
}

// What a test says of VMs and datastores is what a client reads.
func TestDescribe(t *testing.T) {
	s, vm, c := newVM(t, Options{})
	vm.Describe(func(c *types.VirtualMachineConfigInfo) { c.KeyId = &types.CryptoKeyId{KeyId: "k1"} })
	s.SetDatastoreType("LocalDS_0", "VVOL")
	s.SetFreeSpace("LocalDS_0", 12345)
	var m mo.VirtualMachine
	c.properties(vm.Ref(), []string{"config.keyId", "datastore"}, &m)
	var ds mo.Datastore
	c.properties(m.Datastore[0], []string{"summary"}, &ds)
	if m.Config.KeyId == nil || ds.Summary.Type != "VVOL" || ds.Summary.FreeSpace != 12345 {
		t.Errorf("%+v, %+v", m.Config, ds.Summary)
	}
	c.snapshot(vm, "s")
	host := s.Hosts()[1]
	vm.MoveToHost(host)
	c.properties(vm.Ref(), []string{"runtime.host"}, &m)
	if *m.Runtime.Host != *s.host(host) {
		t.Errorf("the VM is on %v, want %s", m.Runtime.Host, host)
	}
}

// A disk of 3 TiB costs what is on it.
func TestLargeDisk(t *testing.T) {
	const size = 3<<40 + 1024
	s := New(t, Options{})
	vm := s.AddVM(VMSpec{Name: "big", ChangeTracking: true, Disks: []DiskSpec{{Size: size}}})
	c := connect(t, s)
	vm.WriteAt(0, noise(1, 1024), size-1024)
	s1 := c.snapshot(vm, "one")
	d := c.snapshotDisks(s1)[0]
	last := extent.Extent{Off: 3 << 40, Len: 1024}
	if es, _, err := c.areas(vm, s1, d, "*"); err != nil || !slices.Equal(es, []extent.Extent{last}) {
		t.Errorf("allocated: %v, %v", es, err)
	}
	wantBytes(t, "the end", s.readRange(t, flatOf(d.file), last), noise(1, 1024))
	vm.WriteAt(0, noise(2, 512), 5<<39)
	s2 := c.snapshot(vm, "two")
	if es, _, err := c.areas(vm, s2, d, d.changeID); err != nil || !slices.Equal(es, []extent.Extent{{Off: 5 << 39, Len: unit}}) {
		t.Errorf("changed: %v, %v", es, err)
	}
	c.removeSnapshot(s1)
	c.removeSnapshot(s2)
	vm.MoveToDatastore("LocalDS_1")
	b := make([]byte, 512)
	if _, err := vm.ReadAt(0, b, 5<<39); err != nil {
		t.Fatal(err)
	}
	wantBytes(t, "in the middle", b, noise(2, 512))
}
