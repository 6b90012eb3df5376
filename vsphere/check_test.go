package vsphere_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/vsphere"
	"github.com/holdfast-backup/holdfast/vsphere/vspheretest"
)

// TestPrivileges: a privilege that is missing is named, by the check and by the error of who runs into it.
func TestPrivileges(t *testing.T) {
	for _, c := range []struct {
		privilege string
		fails     bool
	}{
		{"VirtualMachine.State.CreateSnapshot", true},
		{"VirtualMachine.Provisioning.DiskRandomRead", false}, // without it changes are not known: everything is read
	} {
		t.Run(c.privilege, func(t *testing.T) {
			r := newRig(t, vspheretest.Options{})
			vm := r.add(oneDisk("web"))
			src := r.source()
			r.mustBackup(src, "web")
			r.server.Deny(c.privilege)
			_, err := r.backup(src, "web", backup.Options{})
			if c.fails && (!errors.Is(err, vsphere.ErrNoPrivilege) || !strings.Contains(err.Error(), c.privilege)) || !c.fails && err != nil {
				t.Errorf("a backup: %v", err)
			}
			if f := finding(t, src, "privileges"); f.Level != vsphere.Failed || !strings.Contains(f.Text, c.privilege) {
				t.Errorf("the check says %+v", f)
			}
			r.server.Allow(c.privilege)
			if f := finding(t, src, "privileges"); f.Level != vsphere.OK {
				t.Errorf("the check says %+v", f)
			}
			r.nothingLeft(vm)
		})
	}
}

// TestPrivilegesToRestore: those that only a restore needs are looked at on what they are needed on, and do not fail the check.
func TestPrivilegesToRestore(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	vm := r.add(oneDisk("web"))
	src := r.source()
	p := r.mustBackup(src, "web")
	for _, privilege := range []string{"VApp.Import", "Network.Assign", "Datastore.AllocateSpace", "VirtualMachine.Inventory.Create", "Resource.AssignVMToPool", "VirtualMachine.Inventory.Delete"} {
		r.server.Deny(privilege)
		f := finding(t, src, "privileges for a restore")
		if f.Level != vsphere.Warning || !strings.Contains(f.Text, privilege+" is missing") {
			t.Errorf("without %s the check says %+v", privilege, f)
		}
		if f := finding(t, src, "privileges"); f.Level != vsphere.OK {
			t.Errorf("without %s the check says %+v", privilege, f)
		}
		if privilege == "VApp.Import" {
			if _, err := src.Restore(t.Context(), r.restoreOf(p, "new")); !errors.Is(err, vsphere.ErrNoPrivilege) || !strings.Contains(err.Error(), privilege) {
				t.Errorf("a restore without %s: %v", privilege, err)
			}
		}
		r.server.Allow(privilege)
	}
	if f := finding(t, src, "privileges for a restore"); f.Level != vsphere.OK {
		t.Errorf("the check says %+v", f)
	}
	r.nothingLeft(vm)
}

// TestPrivilegesToBoot: those that only a boot from a point needs are looked at on what they are needed on, and named when it fails for the lack of them.
func TestPrivilegesToBoot(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	r.add(oneDisk("web"))
	src := r.source()
	for _, privilege := range []string{"Host.Config.Storage", "VirtualMachine.Inventory.Register", "VirtualMachine.Inventory.Unregister", "VirtualMachine.Interact.AnswerQuestion",
		"Resource.HotMigrate", "VirtualMachine.Config.EditDevice", "VirtualMachine.Interact.PowerOff"} {
		r.server.Deny(privilege)
		f := finding(t, src, "privileges for a boot from a point")
		if f.Level != vsphere.Warning || !strings.Contains(f.Text, privilege+" is missing on ") {
			t.Errorf("without %s the check says %+v", privilege, f)
		}
		if f := finding(t, src, "privileges"); f.Level != vsphere.OK {
			t.Errorf("without %s the check says %+v", privilege, f)
		}
		r.server.Allow(privilege)
	}
	if f := finding(t, src, "privileges for a boot from a point"); f.Level != vsphere.OK {
		t.Errorf("the check says %+v", f)
	}
	i := &vsphere.Instant{Datastore: "holdfast-1234", Server: "192.0.2.1", Export: "/1234", VMX: "web-now/web-now.vmx", Name: "web-now"}
	if _, err := src.FindPlace(t.Context(), vsphere.InstantPlace{}, i); err != nil {
		t.Fatal(err)
	}
	r.server.Deny("Host.Config.Storage")
	if err := src.Mount(t.Context(), i); !errors.Is(err, vsphere.ErrNoPrivilege) || !strings.Contains(err.Error(), "Host.Config.Storage") {
		t.Errorf("a mount without Host.Config.Storage: %v", err)
	}
}

// finding gives what a check says about something.
func finding(t *testing.T, src *vsphere.Source, about string) vsphere.Finding {
	t.Helper()
	list, err := src.Check(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range list {
		if f.About == about {
			return f
		}
	}
	t.Fatalf("the check says nothing about %s: %+v", about, list)
	return vsphere.Finding{}
}

// TestCheckChangesNothing: a check only looks.
func TestCheckChangesNothing(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	r.add(threeDisks("web"))
	r.server.SetFreeSpace("LocalDS_1", 1)
	src := r.source()
	list, err := src.Check(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range list {
		t.Logf("%+v", f)
		want := vsphere.OK
		if f.About == "datastore LocalDS_1" {
			want = vsphere.Warning
		}
		if f.Level != want {
			t.Errorf("%+v, want %s", f, want)
		}
	}
	for method, n := range r.server.Counts().Calls {
		switch {
		case strings.HasPrefix(method, "Retrieve"), strings.HasPrefix(method, "Has"), method == "Login", method == "CurrentTime", method == "CreateContainerView", method == "DestroyView":
		default:
			t.Errorf("%s was called %d times", method, n)
		}
	}
}
