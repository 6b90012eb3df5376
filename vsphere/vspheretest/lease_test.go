package vspheretest

import (
	"bytes"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmware/govmomi/nfc"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

func (c *client) leaseInfo(l *nfc.Lease) *nfc.LeaseInfo {
	c.t.Helper()
	info, err := l.Wait(c.ctx, nil)
	if err != nil {
		c.t.Fatal(err)
	}
	return info
}

func (c *client) exportSnapshot(ref types.ManagedObjectReference) *nfc.Lease {
	c.t.Helper()
	res, err := methods.ExportSnapshot(c.ctx, c.Client.Client, &types.ExportSnapshot{This: ref})
	if err != nil {
		c.t.Fatal(err)
	}
	return nfc.NewLease(c.Client.Client, res.Returnval)
}

func get(t testing.TB, url string) (*http.Response, []byte, error) {
	t.Helper()
	r, err := http.NewRequest("GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	return send(t, r)
}

// A lease gives what the snapshot froze, as QEMU reads it, over a chain too.
func TestExport(t *testing.T) {
	needQEMU(t)
	s := New(t, Options{})
	vm := s.AddVM(VMSpec{Name: "web01", Disks: []DiskSpec{{Size: diskSize, Content: bytes.NewReader(noise(1, 1<<20))}, {Size: 1 << 20, Controller: "sata", Mode: "independent_persistent"}, {Size: 2 << 20, Controller: "nvme"}}})
	c := connect(t, s)
	vm.AddUserSnapshot("by hand")
	vm.WriteAt(0, noise(2, 9999), 12345)
	vm.WriteAt(2, noise(3, 9999), 0)
	truth := [][]byte{readAll(t, vm, 0), readAll(t, vm, 2)}
	ref := c.snapshot(vm, "holdfast")
	vm.WriteAt(0, noise(4, 5000), 0)
	c.compareLease(c.exportSnapshot(ref), truth, []string{"ParaVirtualSCSIController0:0", "VirtualNVMEController0:0"})
	if _, err := c.object(vm).Export(c.ctx); err == nil {
		t.Error("a running VM was exported")
	}
	c.run(c.object(vm).PowerOff(c.ctx))
	l, err := c.object(vm).Export(c.ctx)
	if err != nil {
		t.Fatal(err)
	}
	c.compareLease(l, [][]byte{readAll(t, vm, 0), readAll(t, vm, 1), readAll(t, vm, 2)},
		[]string{"ParaVirtualSCSIController0:0", "VirtualAHCIController0:0", "VirtualNVMEController0:0"})
	if n := s.Counts(); n.OpenLeases != 0 || n.LeaseBytes["disk-0.vmdk"] == 0 {
		t.Errorf("%+v", n)
	}
}

func (c *client) compareLease(l *nfc.Lease, truth [][]byte, places []string) {
	c.t.Helper()
	info := c.leaseInfo(l)
	dir, n := c.t.TempDir(), 0
	for _, u := range info.DeviceUrl {
		if !*u.Disk {
			continue
		}
		if !strings.HasSuffix(u.Key, places[n]) || !strings.HasPrefix(u.ImportKey, "/web01/") {
			c.t.Errorf("device %+v, want %s", u, places[n])
		}
		res, b, err := get(c.t, u.Url)
		if err != nil || res.StatusCode != http.StatusOK {
			c.t.Fatalf("%s: %v, %v", u.Url, res, err)
		}
		writeFile(c.t, filepath.Join(dir, "lease.vmdk"), b)
		writeFile(c.t, filepath.Join(dir, "truth"), truth[n])
		qemu(c.t, dir, "compare", "-f", "vmdk", "-F", "raw", "lease.vmdk", "truth")
		n++
	}
	if n != len(truth) {
		c.t.Errorf("%d disks, want %d", n, len(truth))
	}
	manifest, err := l.GetManifest(c.ctx)
	if err != nil || len(manifest) != n {
		c.t.Errorf("the manifest: %v, %v", manifest, err)
	}
	if err := l.Complete(c.ctx); err != nil {
		c.t.Fatal(err)
	}
	if res, _, _ := get(c.t, info.DeviceUrl[0].Url); res.StatusCode != http.StatusNotFound {
		c.t.Errorf("after the end: %s", res.Status)
	}
}

// A host does not say its own name in the addresses; it means the one by which it was reached.
func TestExportFromHost(t *testing.T) {
	needQEMU(t)
	s, vm, c := newVM(t, Options{ESX: true})
	res, err := methods.ExportSnapshot(c.ctx, c.Client.Client, &types.ExportSnapshot{This: c.snapshot(vm, "s")})
	if err != nil {
		t.Fatal(err)
	}
	// nfc.Lease of govmomi puts the name in; the server's own words are in the property.
	l := nfc.NewLease(c.Client.Client, res.Returnval)
	if info := c.leaseInfo(l); info.DeviceUrl[0].Url == "" || info.Items[0].URL.Host != s.Host() {
		t.Errorf("%+v", info.DeviceUrl)
	}
	var m mo.HttpNfcLease
	c.properties(l.Reference(), []string{"info"}, &m)
	if !strings.HasPrefix(m.Info.DeviceUrl[0].Url, "https://*/nfc/") {
		t.Errorf("the address is %s", m.Info.DeviceUrl[0].Url)
	}
}

// A lease without progress ends; with progress it lives.
func TestLeaseTimeout(t *testing.T) {
	needQEMU(t)
	s := New(t, Options{LeaseTimeout: 800 * time.Millisecond})
	vm := s.AddVM(VMSpec{Name: "web01", Disks: []DiskSpec{{Size: diskSize}}})
	c := connect(t, s)
	ref := c.snapshot(vm, "holdfast")
	l := c.exportSnapshot(ref)
	info := c.leaseInfo(l)
	for range 8 {
		time.Sleep(150 * time.Millisecond)
		if err := l.Progress(c.ctx, 10); err != nil {
			t.Fatal(err)
		}
	}
	if res, _, _ := get(t, info.DeviceUrl[0].Url); res.StatusCode != http.StatusOK {
		t.Fatalf("a lease with progress: %s", res.Status)
	}
	time.Sleep(1600 * time.Millisecond)
	if err := l.Progress(c.ctx, 20); err == nil {
		t.Error("a lease without progress lives")
	}
	if res, _, _ := get(t, info.DeviceUrl[0].Url); res.StatusCode != http.StatusNotFound {
		t.Errorf("after the time: %s", res.Status)
	}
	var m mo.HttpNfcLease
	c.properties(l.Reference(), []string{"state", "error"}, &m)
	if m.State != types.HttpNfcLeaseStateError || m.Error == nil || s.Counts().OpenLeases != 0 {
		t.Errorf("the lease is %+v", m)
	}
}

func (c *client) importSpec(name string, sizes ...int64) *types.VirtualMachineImportSpec {
	spec := types.VirtualMachineConfigSpec{
		Name: name, GuestId: "otherGuest64", NumCPUs: 1, MemoryMB: 64, Firmware: "efi",
		Files: &types.VirtualMachineFileInfo{VmPathName: "[LocalDS_1]"},
	}
	scsi := &types.ParaVirtualSCSIController{VirtualSCSIController: types.VirtualSCSIController{
		SharedBus: types.VirtualSCSISharingNoSharing, VirtualController: types.VirtualController{VirtualDevice: types.VirtualDevice{Key: 1000}},
	}}
	devices := object.VirtualDeviceList{scsi}
	for i, size := range sizes {
		disk := &types.VirtualDisk{CapacityInBytes: size, CapacityInKB: size / 1024}
		disk.Key, disk.ControllerKey, disk.UnitNumber = int32(-100-i), 1000, types.NewInt32(int32(i))
		disk.Backing = &types.VirtualDiskFlatVer2BackingInfo{DiskMode: "persistent", ThinProvisioned: types.NewBool(true)}
		devices = append(devices, disk)
	}
	for _, d := range devices {
		change := &types.VirtualDeviceConfigSpec{Operation: "add", Device: d}
		if _, ok := d.(*types.VirtualDisk); ok {
			change.FileOperation = "create"
		}
		spec.DeviceChange = append(spec.DeviceChange, change)
	}
	return &types.VirtualMachineImportSpec{ConfigSpec: spec}
}

func (c *client) importVApp(spec *types.VirtualMachineImportSpec) *nfc.Lease {
	c.t.Helper()
	pool, err := c.s.pool(c.s.context(), "", *c.s.host(""))
	if err != nil {
		c.t.Fatal(err)
	}
	res, err := methods.ImportVApp(c.ctx, c.Client.Client, &types.ImportVApp{This: pool, Spec: spec})
	if err != nil {
		c.t.Fatal(err)
	}
	return nfc.NewLease(c.Client.Client, res.Returnval)
}

func post(t testing.TB, url string, b []byte) (*http.Response, error) {
	t.Helper()
	r, err := http.NewRequest("POST", url, bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	res, _, err := send(t, r)
	return res, err
}

func streamOptimized(t testing.TB, raw []byte) []byte {
	t.Helper()
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "raw"), raw)
	qemu(t, dir, "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", "raw", "x.vmdk")
	b, err := os.ReadFile(filepath.Join(dir, "x.vmdk"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// What is uploaded is what the disks of the new VM hold.
func TestImport(t *testing.T) {
	needQEMU(t)
	s := New(t, Options{})
	c := connect(t, s)
	l := c.importVApp(c.importSpec("back01", diskSize, 1<<20))
	info := c.leaseInfo(l)
	truth := [][]byte{append(noise(1, 1<<20), make([]byte, diskSize-1<<20)...), noise(2, 1<<20)}
	for i, u := range info.DeviceUrl {
		if res, err := post(t, u.Url, streamOptimized(t, truth[i])); err != nil || res.StatusCode != http.StatusCreated {
			t.Fatalf("upload: %v, %v", res, err)
		}
	}
	if err := l.Complete(c.ctx); err != nil {
		t.Fatal(err)
	}
	vm := s.vm(info.Entity)
	for i := range truth {
		wantBytes(t, "the new disk", readAll(t, vm, i), truth[i])
	}
	file := c.liveDisks(vm)[0].file
	_, b, err := s.request(t, "GET", strings.TrimSuffix(file, ".vmdk")+"-flat.vmdk", nil)
	if err != nil {
		t.Fatal(err)
	}
	wantBytes(t, "the file", b, truth[0])
}

// An upload that is cut, or that is no disk of the size, is an error, and the VM goes with the lease.
func TestImportRefuses(t *testing.T) {
	needQEMU(t)
	s := New(t, Options{})
	c := connect(t, s)
	whole := streamOptimized(t, noise(1, 1<<20))
	for i, bad := range [][]byte{whole[:len(whole)/2], noise(3, 5000), streamOptimized(t, noise(1, 2<<20))} {
		l := c.importVApp(c.importSpec("back01", 1<<20))
		info := c.leaseInfo(l)
		if res, err := post(t, info.DeviceUrl[0].Url, bad); err != nil || res.StatusCode != http.StatusInternalServerError {
			t.Errorf("upload %d: %v, %v", i, res, err)
		}
		if err := l.Complete(c.ctx); err == nil {
			t.Errorf("upload %d: the lease was completed", i)
		}
		if s.vm(info.Entity) != nil || s.model.Map().Get(info.Entity) != nil {
			t.Errorf("upload %d: the VM is still there", i)
		}
	}
	l := c.importVApp(c.importSpec("back01", 1<<20))
	info := c.leaseInfo(l)
	if err := l.Abort(c.ctx, nil); err != nil || s.vm(info.Entity) != nil || s.Counts().OpenLeases != 0 {
		t.Errorf("abort: %v, %+v", err, s.Counts())
	}
}

// A test may end while a lease is being made.
func TestLeaseAtTheEnd(t *testing.T) {
	needQEMU(t)
	_, vm, c := newVM(t, Options{})
	c.exportSnapshot(c.snapshot(vm, "s"))
}

// Leases fail and are cut on demand.
func TestLeaseFaults(t *testing.T) {
	needQEMU(t)
	s, vm, c := newVM(t, Options{})
	ref := c.snapshot(vm, "holdfast")
	s.Misbehave(func(f *Faults) { f.LeaseFails, f.LeaseCuts, f.LeaseCut = 1, 1, 1000 })
	if _, err := c.exportSnapshot(ref).Wait(c.ctx, nil); err == nil {
		t.Error("the lease did not fail")
	}
	l := c.exportSnapshot(ref)
	url := c.leaseInfo(l).DeviceUrl[0].Url
	if _, b, err := get(t, url); err == nil || len(b) > 1000 {
		t.Errorf("the body was not cut: %d bytes, %v", len(b), err)
	}
	if res, _, err := get(t, url); err != nil || res.StatusCode != http.StatusOK {
		t.Errorf("afterwards: %v, %v", res, err)
	}
	if s.Counts().OpenLeases != 1 {
		t.Errorf("%d leases are open, want 1", s.Counts().OpenLeases)
	}
}
