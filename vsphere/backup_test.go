package vsphere_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/vmware/govmomi/vim25/types"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/vsphere"
	"github.com/holdfast-backup/holdfast/vsphere/vspheretest"
)

// TestBackup makes a full and five incremental points of a VM with three disks on two controllers, whose guest writes between the snapshots and while
// they are read, by each transport. Every point is what was frozen; what is read is in proportion to what changed.
func TestBackup(t *testing.T) {
	for _, transport := range []string{vsphere.TransportFolder, vsphere.TransportVDDK, vsphere.TransportLease} {
		t.Run(transport, func(t *testing.T) { testBackup(t, transport) })
	}
}

func testBackup(t *testing.T, transport string) {
	r := newRig(t, vspheretest.Options{})
	vm := r.add(threeDisks("web"))
	if r.cfg.Transport = transport; transport == vsphere.TransportVDDK {
		r.cfg.VDDK.LibDir = t.TempDir()
		r.cfg.VDDK.Nbdkit, _ = vspheretest.FakeVDDK(t, filepath.Dir(filepath.Dir(vm.File("x"))))
	}
	if transport == vsphere.TransportLease {
		needsQemuImg(t)
	}
	src := r.source()
	var points []*store.Point
	var truths [][][]byte
	for round := range 6 {
		changed := r.write(vm, 3)
		// The guest writes on while the disks are read.
		stop, done := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(done)
			for {
				select {
				case <-stop:
					return
				case <-time.After(5 * time.Millisecond):
					if round%2 == 1 && len(vm.Snapshots()) > 0 {
						r.write(vm, 1)
					}
				}
			}
		}()
		before := vspheretest.Sum(r.server.Counts().FolderBytes)
		p, err := r.backup(src, "web", backup.Options{})
		close(stop)
		<-done
		if err != nil {
			t.Fatal(err)
		}
		read := vspheretest.Sum(r.server.Counts().FolderBytes) - before
		points, truths = append(points, p), append(truths, r.truth(vm))
		t.Logf("round %d: %d bytes written before, %d read, %d over HTTPS", round, changed, p.Stats.Read, read)
		if len(p.Warnings) > 0 {
			t.Errorf("round %d: warnings %q", round, p.Warnings)
		}
		if p.Consistency != "application" || p.Disks[0].Via != transport {
			t.Errorf("round %d is %s-consistent, read through %q", round, p.Consistency, p.Disks[0].Via)
		}
		if r.nothingLeft(vm); transport == vsphere.TransportLease {
			continue // the host sends whole disks
		}
		r.wantRead(p, map[bool]string{true: "full: first backup of this disk", false: "changes"}[round == 0])
		// Each write touches its bytes rounded to chunks on both sides; configuration and descriptors are small.
		if most := p.Stats.Read + 256<<10; read > most {
			t.Errorf("round %d: %d bytes over HTTPS, want at most %d", round, read, most)
		}
		if most := changed + 3*3*2*64<<10; round%2 == 1 && round > 1 && p.Stats.Read > most {
			t.Errorf("round %d: %d bytes read after %d had changed, want at most %d", round, p.Stats.Read, changed, most)
		}
	}
	for i, p := range points {
		r.wantDisks(p, truths[i])
	}
	r.mustBackup(src, "web")
	if p := r.mustBackup(src, "web"); p.Stats.Read != 0 && transport != vsphere.TransportLease {
		t.Errorf("of an unchanged VM %d bytes were read", p.Stats.Read)
	}
}

// TestESXi: a host of its own is backed up as a vCenter is.
func TestESXi(t *testing.T) {
	r := newRig(t, vspheretest.Options{ESX: true})
	vm := r.add(oneDisk("web"))
	src := r.source()
	r.wantDisks(r.mustBackup(src, "web"), r.truth(vm))
	r.write(vm, 3)
	p := r.mustBackup(src, "web")
	r.wantDisks(p, r.truth(vm))
	r.wantRead(p, "changes")
	if len(p.Warnings) > 0 {
		t.Errorf("warnings %q", p.Warnings)
	}
	for _, f := range []string{"privileges", "files", "clock"} {
		if got := finding(t, src, f); got.Level != vsphere.OK {
			t.Errorf("the check says %+v", got)
		}
	}
	r.nothingLeft(vm)
}

// TestConfig: the configuration files of a point are those of the VM, and say where it was.
func TestConfig(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	spec := threeDisks("web")
	spec.Networks = []string{"VM Network"}
	spec.Firmware, spec.Attributes = "efi", map[string]string{"owner": "ann"}
	vm := r.add(spec)
	p := r.mustBackup(r.source(), "web")
	files := map[string][]byte{}
	for _, c := range p.Config {
		img, err := r.repo.OpenConfig(p, c.Name)
		if err != nil {
			t.Fatal(err)
		}
		files[c.Name] = make([]byte, c.Size)
		if _, err := img.ReadAt(files[c.Name], 0); err != nil && err != io.EOF {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"web.vmx", "web.nvram"} {
		want, err := os.ReadFile(vm.File(name))
		if err != nil || !bytes.Equal(files[name], want) {
			t.Errorf("%s is not that of the VM, %v", name, err)
		}
	}
	var config types.VirtualMachineConfigInfo
	if err := types.NewJSONDecoder(bytes.NewReader(files["vm.json"])).Decode(&config); err != nil || config.InstanceUuid != vm.InstanceUUID() || config.Firmware != "efi" || len(config.Hardware.Device) < 6 {
		t.Errorf("vm.json is of %q with %q, %v", config.InstanceUuid, config.Firmware, err)
	}
	var where struct {
		Path       string
		Networks   map[string]string
		Attributes map[string]string `json:"custom_attributes"`
	}
	if err := json.Unmarshal(files["inventory.json"], &where); err != nil || where.Path != "/DC0/vm/prod/web" || where.Attributes["owner"] != "ann" || len(where.Networks) != 1 || !slices.Contains(slices.Collect(maps.Values(where.Networks)), "VM Network") {
		t.Errorf("inventory.json says %+v, %v", where, err)
	}
	var disks []struct {
		Disk, Controller string
		Bus, Unit        int
	}
	if err := json.Unmarshal(files["disks.json"], &disks); err != nil || fmt.Sprint(disks) != "[{disk0 lsilogic 0 0} {disk1 lsilogic 0 1} {disk2 pvscsi 1 0}]" {
		t.Errorf("disks.json says %v, %v", disks, err)
	}
}
