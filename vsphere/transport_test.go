package vsphere_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/vsphere"
	"github.com/holdfast-backup/holdfast/vsphere/vspheretest"
)

// needsQemuImg skips a test for which the double needs that, to make streamOptimized VMDKs.
func needsQemuImg(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("qemu-img"); err != nil && os.Getenv("HOLDFAST_TEST_ALL") != "1" {
		t.Skip(err)
	}
}

// TestLease: where a datastore has no files the host exports whole disks.
func TestLease(t *testing.T) {
	needsQemuImg(t)
	for _, esx := range []bool{false, true} {
		t.Run(map[bool]string{false: "vCenter", true: "ESXi"}[esx], func(t *testing.T) {
			r := newRig(t, vspheretest.Options{ESX: esx})
			spec := threeDisks("web")
			if esx {
				spec.Folder = ""
			}
			vm := r.add(spec)
			for _, name := range r.server.Datastores() {
				r.server.SetDatastoreType(name, "vsan")
			}
			r.server.Misbehave(func(f *vspheretest.Faults) { f.LeaseCut, f.LeaseCuts = 300_000, 2 })
			src := r.source()
			p := r.mustBackup(src, "web")
			r.wantDisks(p, r.truth(vm))
			if p.Disks[0].Via != "lease" {
				t.Errorf("read through %q", p.Disks[0].Via)
			}
			r.write(vm, 2)
			p = r.mustBackup(src, "web")
			r.wantDisks(p, r.truth(vm))
			r.wantRead(p, "full: the host exports whole disks")
			if p.Stats.New > 4*mib {
				t.Errorf("%d bytes are new", p.Stats.New)
			}
			// What is left out has to be found before anything is read: here that cannot be.
			p, err := r.backup(src, "web", backup.Options{Exclude: backup.Exclude{Swap: true, Free: true}})
			if err != nil {
				t.Fatal(err)
			}
			r.wantDisks(p, r.truth(vm))
			if len(p.Kept) != 1 || !strings.Contains(p.Kept[0], "in order") || len(p.Warnings) > 0 {
				t.Errorf("kept %q, warnings %q", p.Kept, p.Warnings)
			}
			r.nothingLeft(vm)
			if n := r.server.Counts().OpenLeases; n != 0 {
				t.Errorf("%d leases are open", n)
			}
			r.server.Misbehave(func(f *vspheretest.Faults) { f.LeaseFails = 1 })
			if _, err := r.backup(src, "web", backup.Options{}); err == nil {
				t.Error("the lease failed")
			}
			r.nothingLeft(vm)
		})
	}
}

// TestVDDK: disks are read through nbdkit where the user gave VDDK. It is asked for the frozen disk of the snapshot, and gets the password
// in no argument. Changed blocks are asked for as ever.
func TestVDDK(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	vm := r.add(oneDisk("web"))
	var notes string
	r.cfg.VDDK.LibDir = t.TempDir()
	r.cfg.VDDK.Nbdkit, notes = vspheretest.FakeVDDK(t, filepath.Dir(filepath.Dir(vm.File("x"))))
	src := r.source()
	p := r.mustBackup(src, "web")
	r.wantDisks(p, r.truth(vm))
	if p.Disks[0].Via != "vddk" {
		t.Errorf("read through %q", p.Disks[0].Via)
	}
	r.write(vm, 3)
	p = r.mustBackup(src, "web")
	r.wantDisks(p, r.truth(vm))
	r.wantRead(p, "changes")
	for file := range r.server.Counts().FolderBytes {
		if strings.Contains(file, "-flat") {
			t.Errorf("%s was read over HTTPS, too", file)
		}
	}
	text, err := os.ReadFile(notes)
	if err != nil {
		t.Fatal(err)
	}
	host, port, _ := strings.Cut(r.server.Host(), ":")
	for _, want := range []string{"--readonly", "server=" + host, "port=" + port, "user=" + r.server.User, "vm=moref=" + vm.Ref().Value, "snapshot=snapshot-", "file=[LocalDS_0] web/web.vmdk", "libdir=" + r.cfg.VDDK.LibDir, "thumbprint="} {
		if !strings.Contains(string(text), want) {
			t.Errorf("nbdkit was not asked for %q:\n%s", want, text)
		}
	}
	if strings.Contains(string(text), r.server.Password) {
		t.Error("the password is an argument")
	}
	if got, err := os.ReadFile(notes + ".password"); err != nil || strings.TrimSpace(string(got)) != r.server.Password {
		t.Errorf("nbdkit got the password %q, %v", got, err)
	}
	// Another way is not taken silently.
	r.cfg.VDDK = vsphere.VDDK{}
	p = r.mustBackup(r.source(), "web")
	r.wantWarning(p, "read through folder, the last time through vddk")
	r.wantRead(p, "changes")
	// Nor when the one that was asked for is not there.
	r.cfg.VDDK = vsphere.VDDK{LibDir: t.TempDir(), Nbdkit: "/nonexistent/nbdkit"}
	if _, err := r.source().Freeze(t.Context(), "web"); err == nil || !strings.Contains(err.Error(), "nbdkit") {
		t.Errorf("without nbdkit: %v", err)
	}
	r.nothingLeft(vm)
}
