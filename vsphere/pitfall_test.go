package vsphere_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/vsphere"
	"github.com/holdfast-backup/holdfast/vsphere/vspheretest"
)

// lost is how a disk is read of which the tracking was lost.
const lost = "full: change tracking was lost"

// pitfalls are what a server may do between the first point of a VM and the second. The second one must be right all the same.
var pitfalls = []struct {
	name    string
	do      func(r *rig, vm *vspheretest.VM)
	read    string // how disk0 must be read the second time; empty for changes
	warning string // what the point must say; empty for nothing
	logged  string
}{
	{name: "one area a page", do: func(r *rig, _ *vspheretest.VM) {
		r.server.Misbehave(func(f *vspheretest.Faults) { f.AreasPerPage = 1 })
	}},
	{name: "empty pages in the middle", do: func(r *rig, _ *vspheretest.VM) {
		r.server.Misbehave(func(f *vspheretest.Faults) { f.AreasPerPage, f.EmptyPages = 1, true })
	}},
	{name: "the host says FileFault", read: lost, warning: "disk0: change tracking was lost", do: func(r *rig, _ *vspheretest.VM) {
		r.server.Misbehave(func(f *vspheretest.Faults) { f.AreasFails = 1 })
	}},
	{name: "tracking began anew", read: lost, warning: "the host began tracking anew", do: func(_ *rig, vm *vspheretest.VM) { vm.ResetTracking(0) }},
	{name: "answers begin elsewhere", read: lost, warning: "answers from", do: func(r *rig, _ *vspheretest.VM) {
		r.server.Misbehave(func(f *vspheretest.Faults) { f.WrongStart = true })
	}},
	{name: "answers go nowhere", read: lost, warning: "answers for 0 bytes", do: func(r *rig, _ *vspheretest.VM) {
		r.server.Misbehave(func(f *vspheretest.Faults) { f.NoProgress = true })
	}},
	{name: "the guest cannot be quiesced", warning: "crash-consistent", do: func(r *rig, _ *vspheretest.VM) {
		r.server.Misbehave(func(f *vspheretest.Faults) { f.QuiesceFails = 3 })
	}},
	{name: "the guest can be quiesced the third time", logged: "trying again", do: func(r *rig, _ *vspheretest.VM) {
		r.server.Misbehave(func(f *vspheretest.Faults) { f.QuiesceFails = 2 })
	}},
	{name: "the session is lost", do: func(r *rig, _ *vspheretest.VM) {
		r.server.Misbehave(func(f *vspheretest.Faults) { f.LoseSessions = 2 })
	}},
	{name: "connections drop", do: func(r *rig, _ *vspheretest.VM) {
		r.server.Misbehave(func(f *vspheretest.Faults) { f.FolderCut, f.FolderCuts = 10_000, 4 })
	}},
	{name: "the file server is overloaded", logged: "503", do: func(r *rig, _ *vspheretest.VM) {
		r.server.Misbehave(func(f *vspheretest.Faults) { f.FolderStatus, f.FolderFails = 503, 3 })
	}},
	{name: "answers are of another place", logged: "and answers", do: func(r *rig, _ *vspheretest.VM) {
		r.server.Misbehave(func(f *vspheretest.Faults) { f.WrongRange = 2 })
	}},
	{name: "ranges are ignored", logged: "200", do: func(r *rig, _ *vspheretest.VM) {
		r.server.Misbehave(func(f *vspheretest.Faults) { f.FolderIgnores = 2 })
	}},
	{name: "somebody else's snapshot", do: func(r *rig, vm *vspheretest.VM) {
		vm.AddUserSnapshot("before the upgrade")
		r.write(vm, 3)
	}},
	{name: "several of them", do: func(r *rig, vm *vspheretest.VM) {
		for i := range 3 {
			vm.AddUserSnapshot(fmt.Sprint("step ", i))
			r.write(vm, 2)
		}
	}},
	{name: "the disk grew", read: "full: the disk was resized", do: func(r *rig, vm *vspheretest.VM) {
		r.resize(vm, 12*mib)
		r.write(vm, 3)
	}},
	{name: "another disk in its place", read: "full: first backup of this disk", do: func(r *rig, vm *vspheretest.VM) {
		content := make([]byte, 8*mib)
		for i := range content {
			content[i] = byte(i >> 12)
		}
		vm.ReplaceDisk(0, bytes.NewReader(content))
		r.mu.Lock()
		r.disks[vm][0] = content
		r.mu.Unlock()
	}},
	{name: "it moved to another host", do: func(r *rig, vm *vspheretest.VM) {
		hosts := r.server.Hosts()
		vm.MoveToHost(hosts[0])
		r.write(vm, 1)
		vm.MoveToHost(hosts[1])
	}},
	{name: "its files moved to another datastore", do: func(r *rig, vm *vspheretest.VM) {
		vm.MoveToDatastore("LocalDS_1")
		r.write(vm, 1)
	}},
	{name: "disks need consolidation", logged: "disks consolidated", do: func(_ *rig, vm *vspheretest.VM) { vm.NeedsConsolidation() }},
	{name: "the snapshot cannot be removed at once", logged: "could not be removed", do: func(r *rig, _ *vspheretest.VM) {
		r.server.Misbehave(func(f *vspheretest.Faults) { f.RemoveFails = 2 })
	}},
}

// TestPitfalls: whatever the server does, the point is what was frozen, or the user is told.
func TestPitfalls(t *testing.T) {
	for _, c := range pitfalls {
		for _, format := range []string{"seSparse", "vmfsSparse"} {
			if format == "vmfsSparse" && !strings.Contains(c.name, "somebody") && !strings.Contains(c.name, "several") {
				continue
			}
			t.Run(c.name+"/"+format, func(t *testing.T) {
				r := newRig(t, vspheretest.Options{DeltaFormat: format})
				vm := r.add(oneDisk("web"))
				src := r.source()
				first, was := r.mustBackup(src, "web"), r.truth(vm)
				r.write(vm, 5)
				c.do(r, vm)
				second := r.mustBackup(src, "web")
				r.wantDisks(first, was)
				r.wantDisks(second, r.truth(vm))
				if c.read == "" {
					c.read = "changes"
				}
				r.wantRead(second, c.read)
				if c.warning != "" {
					r.wantWarning(second, c.warning)
				} else if len(second.Warnings) > 0 {
					t.Errorf("warnings %q", second.Warnings)
				}
				if c.logged != "" && !r.said(c.logged) {
					t.Errorf("nothing was said of %q: %q", c.logged, r.log)
				}
				if crash := strings.HasPrefix(c.warning, "crash"); crash != (second.Consistency == "crash") {
					t.Errorf("the point is %s-consistent", second.Consistency)
				}
				r.nothingLeft(vm)
				// And the next one goes on from there.
				r.server.Misbehave(func(f *vspheretest.Faults) { *f = vspheretest.Faults{} })
				r.write(vm, 2)
				third := r.mustBackup(src, "web")
				r.wantDisks(third, r.truth(vm))
				r.wantRead(third, "changes")
			})
		}
	}
}

// TestTrackingOnlyWhereItIs: without tracking everything is read, the user sees why; it is switched on by option.
func TestTrackingOnlyWhereItIs(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	spec := oneDisk("web")
	spec.ChangeTracking = false
	vm := r.add(spec)
	src := r.source()
	r.mustBackup(src, "web")
	p := r.mustBackup(src, "web")
	r.wantRead(p, "full: the VM has changed block tracking switched off")
	r.wantDisks(p, r.truth(vm))

	r.cfg.Tracking = vsphere.TrackingEnable
	src = r.source()
	p = r.mustBackup(src, "web")
	if !vm.ChangeTracking() {
		t.Fatal("change tracking was not switched on")
	}
	if p.Disks[0].ChangeID == "" {
		t.Error("the point has no change id")
	}
	r.write(vm, 3)
	p = r.mustBackup(src, "web")
	r.wantRead(p, "changes")
	r.wantDisks(p, r.truth(vm))

	r.cfg.Tracking = vsphere.TrackingOff
	p = r.mustBackup(r.source(), "web")
	r.wantRead(p, "full: change tracking is switched off in the config")
}

// TestTrackingNotBesideSnapshots: it is not switched on where another snapshot exists.
func TestTrackingNotBesideSnapshots(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	spec := oneDisk("web")
	spec.ChangeTracking = false
	vm := r.add(spec)
	vm.AddUserSnapshot("mine")
	r.write(vm, 3)
	r.cfg.Tracking = vsphere.TrackingEnable
	p := r.mustBackup(r.source(), "web")
	r.wantWarning(p, "needs a VM without snapshots")
	r.wantDisks(p, r.truth(vm))
	if vm.ChangeTracking() {
		t.Error("change tracking was switched on all the same")
	}
}

// TestAllocatedUnknown: where the host does not say what is allocated, or says that all is, everything is read.
func TestAllocatedUnknown(t *testing.T) {
	for name, misbehave := range map[string]func(f *vspheretest.Faults){
		"whole disk": func(f *vspheretest.Faults) { f.WholeDisk = true },
		"fault":      func(f *vspheretest.Faults) { f.NoAllocated = true },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, vspheretest.Options{})
			vm := r.add(oneDisk("web"))
			r.server.Misbehave(misbehave)
			p := r.mustBackup(r.source(), "web")
			r.wantDisks(p, r.truth(vm))
			if p.Stats.Read != p.Stats.Total {
				t.Errorf("%d bytes of %d were read", p.Stats.Read, p.Stats.Total)
			}
		})
	}
}

// TestLiar: a host that leaves a change out is found out by the periodic comparison, and by --full.
func TestLiar(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	vm := r.add(oneDisk("web"))
	src := r.source()
	now := time.Now()
	opt := backup.Options{CompareEvery: backup.Duration{Days: 7}, Now: func() time.Time { return now }}
	if _, err := r.backup(src, "web", opt); err != nil {
		t.Fatal(err)
	}
	r.write(vm, 4)
	r.server.Misbehave(func(f *vspheretest.Faults) { f.HideChange = true })
	p, err := r.backup(src, "web", opt)
	if err != nil {
		t.Fatal(err)
	}
	r.wantRead(p, "changes")
	// It still lies, also of what is allocated: who doubts it does not ask it.
	r.server.Misbehave(func(f *vspheretest.Faults) { f.HideAllocated = true })
	full := opt
	full.Full = true
	if p, err = r.backup(src, "web", full); err != nil {
		t.Fatal(err)
	}
	r.wantDisks(p, r.truth(vm))
	r.write(vm, 4)
	if _, err := r.backup(src, "web", opt); err != nil {
		t.Fatal(err)
	}
	r.write(vm, 1)
	now = now.Add(8 * 24 * time.Hour)
	if p, err = r.backup(src, "web", opt); err != nil {
		t.Fatal(err)
	}
	r.wantRead(p, "full: its change tracking was compared with the disk")
	r.wantWarning(p, "change tracking was wrong")
	r.wantDisks(p, r.truth(vm))
}

// TestNamedLikeAnID: a VM that is called like the id of another one is itself.
func TestNamedLikeAnID(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	first := r.add(oneDisk("aaa"))
	second := r.add(oneDisk(first.Ref().Value))
	r.write(second, 3)
	src := r.source()
	p := r.mustBackup(src, first.Ref().Value)
	r.wantDisks(p, r.truth(second))
	if p.VM.UUID != second.InstanceUUID() {
		t.Error("another VM was backed up")
	}
}

// TestMadeAnew: a VM of the name of one that is no more has nothing of its tracking.
func TestMadeAnew(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	old := r.add(oneDisk("web"))
	src := r.source()
	r.mustBackup(src, "web")
	old.PowerOff()
	old.Destroy()
	vm := r.add(oneDisk("web"))
	r.write(vm, 2)
	p := r.mustBackup(r.source(), "web")
	r.wantDisks(p, r.truth(vm))
	if p.Disks[0].Read == "changes" {
		t.Error("the changes of another VM's disk were read")
	}
}

// TestReverted: a VM that was taken back to a snapshot of its user is read right.
func TestReverted(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	vm := r.add(oneDisk("web"))
	src := r.source()
	r.mustBackup(src, "web")
	was := vm.AddUserSnapshot("mine")
	then := r.truth(vm)
	r.write(vm, 3)
	r.mustBackup(src, "web")
	vm.Revert(was)
	p := r.mustBackup(src, "web")
	r.wantDisks(p, then)
}

// TestRawDevice: a raw device in virtual mode is no file; where only files are to be read it is left out, and said.
func TestRawDevice(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	vm := r.add(vspheretest.VMSpec{Name: "db", Disks: []vspheretest.DiskSpec{{Size: 4 * mib}, {Size: 4 * mib, RDM: "virtual"}}})
	r.cfg.Transport = vsphere.TransportFolder
	p := r.mustBackup(r.source(), "db")
	r.wantWarning(p, "is a raw device")
	r.wantDisks(p, r.truth(vm)[:1])
	r.nothingLeft(vm)
}

// TestNoTools: a server that is asked to quiesce a guest without VMware Tools makes a snapshot all the same.
func TestNoTools(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	spec := oneDisk("web")
	spec.NoTools = true
	vm := r.add(spec)
	p := r.mustBackup(r.source(), "web")
	if r.wantWarning(p, "VMware Tools do not run"); p.Consistency != "crash" {
		t.Errorf("the point is %s-consistent", p.Consistency)
	}
	r.cfg.Quiesce = vsphere.QuiesceRequire
	if _, err := r.backup(r.source(), "web", backup.Options{}); !errors.Is(err, vsphere.ErrNoTools) {
		t.Errorf("the guest must be quiesced: %v", err)
	}
	r.nothingLeft(vm)
}

// TestListedLongAgo: what a VM is like is asked for when it is backed up, not when it was listed.
func TestListedLongAgo(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	spec := oneDisk("web")
	spec.PoweredOff = true
	vm := r.add(spec)
	src := r.source()
	if _, err := src.List(t.Context()); err != nil {
		t.Fatal(err)
	}
	vm.PowerOn()
	if p := r.mustBackup(src, "web"); p.Consistency != "application" {
		t.Errorf("the VM was switched on: its point is %s-consistent", p.Consistency)
	}
	vm.PowerOff()
	if p := r.mustBackup(src, "web"); p.Consistency != "offline" {
		t.Errorf("the VM was switched off: its point is %s-consistent", p.Consistency)
	}
	r.nothingLeft(vm)
}

// TestLeftoversOfMany: VMs that are backed up at once have their leftovers removed, each its own.
func TestLeftoversOfMany(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	const n = 6
	var vms []*vspheretest.VM
	for i := range n {
		vms = append(vms, r.add(oneDisk(fmt.Sprint("vm", i))))
	}
	src := r.source()
	for i, vm := range vms {
		name := fmt.Sprintf("holdfast-00000000000000%02d", i)
		vm.AddUserSnapshot(name)
		e, err := r.journal.Begin(backup.Leftover{Source: "lab", Host: r.server.Host(), VM: vm.Ref().Value, Name: name, Began: time.Now()})
		if err != nil {
			t.Fatal(err)
		}
		e.Leave()
	}
	if _, err := src.List(t.Context()); err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	for i := range n {
		work.Go(func() {
			snap, err := src.Freeze(t.Context(), fmt.Sprint("vm", i))
			if err == nil {
				err = snap.Close()
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	work.Wait()
	for _, vm := range vms {
		r.nothingLeft(vm)
	}
}

// TestQuiesceRequired: where the guest must prepare and cannot, there is no point, and no snapshot is left.
func TestQuiesceRequired(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	vm := r.add(oneDisk("web"))
	r.cfg.Quiesce = vsphere.QuiesceRequire
	r.server.Misbehave(func(f *vspheretest.Faults) { f.QuiesceFails = 3 })
	src := r.source()
	if _, err := r.backup(src, "web", backup.Options{}); err == nil || !strings.Contains(err.Error(), "the guest prepares for") {
		t.Errorf("no point was to be made: %v", err)
	}
	r.nothingLeft(vm)
	r.cfg.Quiesce = vsphere.QuiesceOff
	if p := r.mustBackup(r.source(), "web"); p.Consistency != "crash" {
		t.Errorf("without quiescing the point is %s-consistent", p.Consistency)
	}
}

// TestSkippedDisks: disks that a snapshot does not hold, or that cannot be read, are said, in the listing and in the point.
func TestSkippedDisks(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	vm := r.add(vspheretest.VMSpec{Name: "db", ChangeTracking: true, Disks: []vspheretest.DiskSpec{
		{Size: 4 * mib},
		{Size: 4 * mib, Mode: "independent_persistent"},
		{Size: 4 * mib, RDM: "physical"},
		{Size: 4 * mib, Controller: "lsilogic", Bus: 1, SharedBus: true},
		{Size: 4 * mib, Controller: "sata", Encrypted: true},
		{Size: 4 * mib, Controller: "nvme"},
	}})
	src := r.source()
	list, err := src.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != 1 || list[0].Disks != 2 || len(list[0].Skipped) != 4 {
		t.Fatalf("listed is %+v", list)
	}
	p := r.mustBackup(src, "db")
	for _, why := range []string{"is independent", "raw device in physical mode", "shared with other VMs", "is encrypted"} {
		r.wantWarning(p, why)
		if !strings.Contains(strings.Join(list[0].Skipped, "\n"), why) {
			t.Errorf("the listing does not say %q: %q", why, list[0].Skipped)
		}
	}
	truth := r.truth(vm)
	r.wantDisks(p, [][]byte{truth[0], truth[5]})
}

// TestTemplate: a template has no snapshot; it is read as it lies there.
func TestTemplate(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	spec := oneDisk("golden")
	spec.Template = true
	vm := r.add(spec)
	r.freeze(vm)
	p := r.mustBackup(r.source(), "golden")
	r.wantDisks(p, r.truth(vm))
	if p.Consistency != "offline" {
		t.Errorf("the point is %s", p.Consistency)
	}
	r.nothingLeft(vm)
}

// TestOff: a VM that is switched off is backed up by a snapshot, too, and its changes are tracked.
func TestOff(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	spec := oneDisk("off")
	spec.PoweredOff = true
	vm := r.add(spec)
	src := r.source()
	p := r.mustBackup(src, "off")
	r.wantDisks(p, r.truth(vm))
	if p.Consistency != "offline" {
		t.Errorf("the point is %s", p.Consistency)
	}
	r.nothingLeft(vm)
}

// TestSameName: two VMs of one name are two.
func TestSameName(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	prod, test := oneDisk("web"), oneDisk("web")
	prod.Folder, test.Folder = "prod", "test"
	a, b := r.add(prod), r.add(test)
	src := r.source()
	if _, err := src.Freeze(t.Context(), "web"); !errors.Is(err, vsphere.ErrAmbiguous) {
		t.Errorf("a name of two VMs: %v", err)
	}
	pa, pb := r.mustBackup(src, "web (prod)"), r.mustBackup(src, "web (test)")
	r.wantDisks(pa, r.truth(a))
	r.wantDisks(pb, r.truth(b))
	if pa.VM.UUID != a.InstanceUUID() || pb.VM.UUID != b.InstanceUUID() {
		t.Errorf("the points are of %s and %s", pa.VM.UUID, pb.VM.UUID)
	}
}

// TestConnection: who is not trusted is not spoken to, who may not log in is told so.
func TestConnection(t *testing.T) {
	server := vspheretest.New(t, vspheretest.Options{})
	good := vsphere.Config{URL: server.URL(), User: server.User, Password: server.Password}
	foreign := vspheretest.New(t, vspheretest.Options{})
	junk := t.TempDir() + "/junk.pem"
	if err := os.WriteFile(junk, []byte("no certificate"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		change func(*vsphere.Config)
		want   error
		text   string
	}{
		{"thumbprint", func(c *vsphere.Config) { c.Thumbprint = server.Thumbprint() }, nil, ""},
		{"thumbprint in small letters without colons", func(c *vsphere.Config) {
			c.Thumbprint = strings.ToLower(strings.ReplaceAll(server.Thumbprint(), ":", ""))
		}, nil, ""},
		{"authority", func(c *vsphere.Config) { c.CAFile = server.CAFile() }, nil, ""},
		{"nothing", func(*vsphere.Config) {}, vsphere.ErrUntrusted, ""},
		{"another thumbprint", func(c *vsphere.Config) { c.Thumbprint = foreign.Thumbprint() }, vsphere.ErrUntrusted, server.Thumbprint()},
		// A pin is a pin, also where an authority vouches for the server.
		{"another thumbprint beside the authority", func(c *vsphere.Config) { c.CAFile, c.Thumbprint = server.CAFile(), foreign.Thumbprint() }, vsphere.ErrUntrusted, ""},
		{"another authority", func(c *vsphere.Config) { c.CAFile = foreign.CAFile() }, vsphere.ErrUntrusted, ""},
		{"no thumbprint", func(c *vsphere.Config) { c.Thumbprint = "AA:BB" }, nil, "neither a SHA-256"},
		{"no certificate", func(c *vsphere.Config) { c.CAFile = junk }, nil, "holds no certificate"},
		{"wrong password", func(c *vsphere.Config) { c.Thumbprint, c.Password = server.Thumbprint(), "x" }, vsphere.ErrLogin, ""},
		{"http", func(c *vsphere.Config) { c.URL = "http://vc.example/sdk" }, nil, "https://"},
		{"password in the URL", func(c *vsphere.Config) { c.URL = "https://u:p@vc.example/sdk" }, nil, "password_file"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := good
			c.change(&cfg)
			src, err := vsphere.Connect(t.Context(), cfg)
			if src != nil {
				defer src.Close()
			}
			switch {
			case c.want == nil && c.text == "":
				if err != nil {
					t.Error(err)
				}
			case err == nil, c.want != nil && !errors.Is(err, c.want), !strings.Contains(err.Error(), c.text):
				t.Errorf("%v, want %v %q", err, c.want, c.text)
			case strings.Contains(err.Error(), server.Password):
				t.Errorf("the error tells the password: %v", err)
			}
		})
	}
	if n := server.Counts().Sessions; n != 0 {
		t.Errorf("%d sessions are open after all have been closed", n)
	}
}

// TestLeftovers: what a killed run left the next one removes, and CleanUp does; what others made stays, and so does what a run holds that is under way.
func TestLeftovers(t *testing.T) {
	for _, clean := range []bool{false, true} {
		t.Run(fmt.Sprint("CleanUp ", clean), func(t *testing.T) {
			r := newRig(t, vspheretest.Options{})
			vm := r.add(oneDisk("web"))
			src := r.source()
			r.mustBackup(src, "web")
			vm.AddUserSnapshot("mine")
			name := "holdfast-0123456789abcdef"
			e, err := r.journal.Begin(backup.Leftover{Source: "lab", Host: r.server.Host(), VM: vm.Ref().Value, Name: name})
			if err != nil {
				t.Fatal(err)
			}
			vm.AddUserSnapshot(name)
			r.write(vm, 3)
			vm.AddUserSnapshot("holdfast-fedcba9876543210") // of another host's run
			if removed, err := src.CleanUp(t.Context()); err != nil || len(removed) > 0 {
				t.Fatalf("removed %v of a run that is under way, %v", removed, err)
			}
			e.Leave()
			if clean {
				removed, err := src.CleanUp(t.Context())
				if err != nil || len(removed) != 1 || removed[0].Name != name {
					t.Fatalf("removed %v, %v", removed, err)
				}
			}
			r.write(vm, 3)
			p := r.mustBackup(src, "web")
			r.wantRead(p, "changes")
			r.wantDisks(p, r.truth(vm))
			var left []string
			for _, s := range vm.Snapshots() {
				left = append(left, s.Name)
			}
			if strings.Join(left, " ") != "mine holdfast-fedcba9876543210" {
				t.Errorf("left are %q", left)
			}
			list, err := r.journal.Left(t.Context(), func(backup.Leftover) bool { return true })
			if err != nil || len(list) > 0 {
				t.Errorf("%d entries are left in the journal, %v", len(list), err)
			}
		})
	}
}

// TestStuckSnapshot: a snapshot that cannot be removed is said, and the next run removes it.
func TestStuckSnapshot(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	vm := r.add(oneDisk("web"))
	src := r.source()
	r.server.Misbehave(func(f *vspheretest.Faults) { f.RemoveFails = 1000 })
	if _, err := r.backup(src, "web", backup.Options{}); err == nil || !strings.Contains(err.Error(), "remove snapshot") {
		t.Errorf("nothing was said of the snapshot that stays: %v", err)
	}
	if len(vm.Snapshots()) != 1 {
		t.Fatalf("snapshots are %v", vm.Snapshots())
	}
	r.server.Misbehave(func(f *vspheretest.Faults) { f.RemoveFails = 0 })
	r.write(vm, 3)
	p := r.mustBackup(src, "web")
	r.wantRead(p, "changes") // the first point was committed
	r.wantDisks(p, r.truth(vm))
	r.nothingLeft(vm)
}

// TestConsolidation: disks that need consolidation get it before a snapshot is made.
func TestConsolidation(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	vm := r.add(oneDisk("web"))
	src := r.source()
	r.server.Misbehave(func(f *vspheretest.Faults) { f.LeaveConsolidation = 1 })
	r.mustBackup(src, "web")
	r.write(vm, 3)
	p := r.mustBackup(src, "web")
	r.wantDisks(p, r.truth(vm))
	if n := r.server.Counts().Calls["ConsolidateVMDisks_Task"]; n != 1 {
		t.Errorf("disks were consolidated %d times", n)
	}
}

// TestChainLimit: a VM near the limit of snapshots gets no further one.
func TestChainLimit(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	vm := r.add(oneDisk("web"))
	for i := range 29 {
		vm.AddUserSnapshot(fmt.Sprint("s", i))
	}
	if _, err := r.backup(r.source(), "web", backup.Options{}); err == nil || !strings.Contains(err.Error(), "29 snapshots") {
		t.Errorf("a chain of 29: %v", err)
	}
	if n := r.server.Counts().Calls["CreateSnapshot_Task"]; n != 0 {
		t.Errorf("%d snapshots were asked for", n)
	}
}

// TestCancelled: a run that is cancelled while it reads removes its snapshot before it ends.
func TestCancelled(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	vm := r.add(oneDisk("web"))
	src := r.source()
	ctx, cancel := context.WithCancel(t.Context())
	r.server.SetHooks(vspheretest.Hooks{OnRead: func(file string, _, _ int64) {
		if strings.Contains(file, "-flat") {
			cancel()
		}
	}})
	if _, err := r.backupWith(ctx, src, "web", backup.Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("a run that was cancelled: %v", err)
	}
	r.nothingLeft(vm)
	if points, err := r.repo.Points(t.Context()); err != nil || len(points) > 0 {
		t.Errorf("%d points, %v", len(points), err)
	}
}

// TestDeadHost: a host that answers no read fails the VM, after a bounded number of attempts, and the snapshot goes.
func TestDeadHost(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	vm := r.add(oneDisk("web"))
	r.server.Misbehave(func(f *vspheretest.Faults) { f.FolderStatus, f.FolderFails = 500, 100_000 })
	if _, err := r.backup(r.source(), "web", backup.Options{}); err == nil || !strings.Contains(err.Error(), "500") {
		t.Errorf("nothing could be read: %v", err)
	}
	r.nothingLeft(vm)
}

// TestPointAfterLostCommit: where a point was not committed, the change ids of the one before it count.
func TestPointAfterLostCommit(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	vm := r.add(oneDisk("web"))
	src := r.source()
	r.mustBackup(src, "web")
	for range 3 {
		r.write(vm, 2)
		snap, err := src.Freeze(t.Context(), "web")
		if err != nil {
			t.Fatal(err)
		}
		if err := snap.Close(); err != nil {
			t.Fatal(err)
		}
	}
	p := r.mustBackup(src, "web")
	r.wantRead(p, "changes")
	r.wantDisks(p, r.truth(vm))
}

// TestNoSpace: a datastore without room for a snapshot is said.
func TestNoSpace(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	vm := r.add(oneDisk("web"))
	r.server.Misbehave(func(f *vspheretest.Faults) { f.DatastoreFull = true })
	if _, err := r.backup(r.source(), "web", backup.Options{}); err == nil {
		t.Error("there was no space for a snapshot")
	}
	r.nothingLeft(vm)
}

// TestNoRoomForThePoint: where the repository has no room there is no point, and no snapshot is left.
func TestNoRoomForThePoint(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	vm := r.add(oneDisk("web"))
	src := r.source()
	snap, err := src.Freeze(t.Context(), "web")
	if err != nil {
		t.Fatal(err)
	}
	full := errors.New("no space left on device")
	if _, err := backup.RunTo(t.Context(), fullTarget{backup.Local(r.repo), full}, snap, backup.Options{}); !errors.Is(err, full) {
		t.Errorf("the repository is full: %v", err)
	}
	if err := snap.Close(); err != nil {
		t.Error(err)
	}
	r.nothingLeft(vm)
	p := r.mustBackup(src, "web")
	r.wantDisks(p, r.truth(vm))
}

// fullTarget is a target without room.
type fullTarget struct {
	backup.Target
	err error
}

func (f fullTarget) Begin(ctx context.Context, vm backup.VM) (backup.Draft, error) {
	d, err := f.Target.Begin(ctx, vm)
	return fullDraft{d, f.err}, err
}

type fullDraft struct {
	backup.Draft
	err error
}

func (f fullDraft) Commit(context.Context, *store.Point) error { return f.err }

// TestLimits: no more snapshots at once than are allowed on a host and on a datastore, and as many.
func TestLimits(t *testing.T) {
	for _, c := range []struct {
		name                        string
		perHost, perDatastore, most int
	}{
		{"host", 2, 8, 2}, {"datastores", 8, 1, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, vspheretest.Options{})
			r.cfg.SnapshotsPerHost, r.cfg.SnapshotsPerDatastore = c.perHost, c.perDatastore
			const n = 6
			for i := range n {
				spec := oneDisk(fmt.Sprint("vm", i))
				spec.Host, spec.Datastore = r.server.Hosts()[0], r.server.Datastores()[i%2]
				r.add(spec)
			}
			src := r.source()
			if _, err := src.List(t.Context()); err != nil {
				t.Fatal(err)
			}
			var work sync.WaitGroup
			for i := range n {
				work.Go(func() {
					snap, err := src.Freeze(t.Context(), fmt.Sprint("vm", i))
					if err != nil {
						t.Error(err)
						return
					}
					time.Sleep(200 * time.Millisecond)
					if err := snap.Close(); err != nil {
						t.Error(err)
					}
				})
			}
			work.Wait()
			if got := r.server.Counts().MaxSnapshots; got[""] != c.most {
				t.Errorf("at once there were %v, want %d in all", got, c.most)
			}
		})
	}
}

// TestResume: a download whose connection is lost goes on at the byte where it was.
func TestResume(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	vm := r.add(oneDisk("web"))
	var mu sync.Mutex
	var offsets []int64
	r.server.SetHooks(vspheretest.Hooks{
		OnFrozen: func(vm *vspheretest.VM, _ string) { r.freeze(vm) },
		OnRead: func(file string, off, _ int64) {
			if strings.Contains(file, "-flat") {
				mu.Lock()
				defer mu.Unlock()
				offsets = append(offsets, off)
			}
		},
	})
	r.server.Misbehave(func(f *vspheretest.Faults) { f.FolderCut, f.FolderCuts = 10_000, 6 })
	p := r.mustBackup(r.source(), "web")
	r.wantDisks(p, r.truth(vm))
	middle := 0 // of a piece; pieces are whole chunks
	for _, off := range offsets {
		if off%(64<<10) != 0 {
			middle++
		}
	}
	if middle == 0 {
		t.Errorf("all reads began at the beginning of a piece: %v", offsets)
	}
}

// TestNoChangeIDAfterEnabling: tracking that was just switched on and gives no change id yet is no reason to fail, and is said.
func TestNoChangeIDAfterEnabling(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	spec := oneDisk("web")
	spec.ChangeTracking = false
	vm := r.add(spec)
	r.cfg.Tracking = vsphere.TrackingUse
	p := r.mustBackup(r.source(), "web")
	r.wantDisks(p, r.truth(vm))
	if p.Disks[0].ChangeID != "" {
		t.Error("a VM without tracking has a change id")
	}
	r.cfg.Tracking = vsphere.TrackingEnable
	for range 3 {
		r.write(vm, 1)
		p = r.mustBackup(r.source(), "web")
		r.wantDisks(p, r.truth(vm))
	}
	if p.Disks[0].ChangeID == "" || !vm.ChangeTracking() {
		t.Error("tracking was not switched on")
	}
	r.wantRead(p, "changes")
}
