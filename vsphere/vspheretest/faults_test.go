package vspheretest

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// A snapshot fails as a task, for the reason that the test gives, as often as it says.
func TestSnapshotFaults(t *testing.T) {
	s, vm, c := newVM(t, Options{})
	take := func(quiesce bool) error {
		task, err := c.object(vm).CreateSnapshot(c.ctx, "s", "", false, quiesce)
		if err != nil {
			t.Fatalf("no task: %v", err)
		}
		info, err := c.try(task, nil)
		if err == nil {
			c.removeSnapshot(info.Result.(types.ManagedObjectReference))
		}
		return err
	}
	s.Misbehave(func(f *Faults) { f.QuiesceFails = 2 })
	if err := take(false); err != nil {
		t.Fatalf("without quiescing: %v", err)
	}
	wantFault[*types.ApplicationQuiesceFault](t, "first", take(true))
	wantFault[*types.ApplicationQuiesceFault](t, "second", take(true))
	if err := take(true); err != nil {
		t.Fatal(err)
	}
	s.Misbehave(func(f *Faults) { f.SnapshotFails, f.SnapshotFault = 1, &types.TaskInProgress{} })
	wantFault[*types.TaskInProgress](t, "any fault", take(false))
	s.Misbehave(func(f *Faults) { f.DatastoreFull = true })
	wantFault[*types.NoDiskSpace](t, "full", take(false))
	s.Misbehave(func(f *Faults) { *f = Faults{MaxSnapshots: 2} })
	vm.AddUserSnapshot("a")
	vm.AddUserSnapshot("b")
	wantFault[*types.TooManySnapshotLevels](t, "limit", take(false))
	s.Misbehave(func(f *Faults) { *f = Faults{SnapshotDelay: 300 * time.Millisecond} })
	began := time.Now()
	if err := take(false); err != nil || time.Since(began) < 300*time.Millisecond {
		t.Errorf("slow: %v after %v", err, time.Since(began))
	}
	template := s.AddVM(VMSpec{Name: "tpl", Template: true, Disks: []DiskSpec{{Size: 1 << 20}}})
	_, err := c.try(c.object(template).CreateSnapshot(c.ctx, "s", "", false, false))
	wantFault[*types.NotSupported](t, "template", err)
}

func (c *client) consolidationNeeded(vm *VM) bool {
	c.t.Helper()
	var m mo.VirtualMachine
	c.properties(vm.Ref(), []string{"runtime.consolidationNeeded"}, &m)
	return m.Runtime.ConsolidationNeeded
}

func (c *client) consolidate(vm *VM) error {
	res, err := methods.ConsolidateVMDisks_Task(c.ctx, c.Client.Client, &types.ConsolidateVMDisks_Task{This: vm.Ref()})
	if err != nil {
		return err
	}
	_, err = c.try(object.NewTask(c.Client.Client, res.Returnval), nil)
	return err
}

// A removal fails, or leaves a delta behind, which consolidation merges.
func TestRemovalFaults(t *testing.T) {
	s, vm, c := newVM(t, Options{})
	ref := c.snapshot(vm, "s")
	vm.WriteAt(0, noise(3, 99), 5)
	want := readAll(t, vm, 0)
	s.Misbehave(func(f *Faults) { f.RemoveFails, f.LeaveConsolidation, f.ConsolidationFails = 1, 1, 1 })
	_, err := c.try(c.tryRemove(ref, true))
	wantFault[*types.GenericVmConfigFault](t, "removal", err)
	if len(vm.Snapshots()) != 1 {
		t.Fatal("the snapshot went although its removal failed")
	}
	c.removeSnapshot(ref)
	if len(vm.Snapshots()) != 0 || !c.consolidationNeeded(vm) || len(c.liveDisks(vm)[0].parents) != 1 {
		t.Fatalf("after a removal without merging: %v, %+v", c.consolidationNeeded(vm), c.liveDisks(vm))
	}
	wantFault[*types.FileLocked](t, "consolidation", c.consolidate(vm))
	if err := c.consolidate(vm); err != nil || c.consolidationNeeded(vm) || c.liveDisks(vm)[0].parents != nil {
		t.Fatalf("consolidation: %v, %+v", err, c.liveDisks(vm))
	}
	wantBytes(t, "the disk", readAll(t, vm, 0), want)
	ref = c.snapshot(vm, "s")
	c.run(c.tryRemove(ref, false))
	if !c.consolidationNeeded(vm) {
		t.Error("a removal that was told not to merge merged")
	}
	vm.NeedsConsolidation()
	if err := c.consolidate(vm); err != nil || c.liveDisks(vm)[0].parents != nil {
		t.Errorf("two deltas: %v, %+v", err, c.liveDisks(vm))
	}
	wantBytes(t, "the disk", readAll(t, vm, 0), want)
}

// Each lie about changed areas is one that a client can meet.
func TestChangedAreasLie(t *testing.T) {
	s, vm, c := newVM(t, Options{AreasPerPage: 1})
	s1 := c.snapshot(vm, "one")
	d := c.snapshotDisks(s1)[0]
	var want []extent.Extent
	for i := range int64(3) {
		vm.WriteAt(0, []byte{1}, i*4*unit)
		want = append(want, extent.Extent{Off: i * 4 * unit, Len: unit})
	}
	s2 := c.snapshot(vm, "two")
	ask := func(id string, f Faults) ([]extent.Extent, int, error) {
		t.Helper()
		s.Misbehave(func(was *Faults) { *was = f })
		return c.areas(vm, s2, d, id)
	}
	if es, pages, err := ask(d.changeID, Faults{EmptyPages: true}); err != nil || !slices.Equal(es, want) || pages != 5 {
		t.Errorf("empty pages: %v in %d, %v", es, pages, err)
	}
	if es, pages, err := ask(d.changeID, Faults{AreasPerPage: 2}); err != nil || !slices.Equal(es, want) || pages != 2 {
		t.Errorf("two areas a page: %v in %d, %v", es, pages, err)
	}
	if _, _, err := ask(d.changeID, Faults{WrongStart: true}); !errors.Is(err, errWrongStart) {
		t.Errorf("wrong start: %v", err)
	}
	if _, _, err := ask(d.changeID, Faults{NoProgress: true}); !errors.Is(err, errNoProgress) {
		t.Errorf("no progress: %v", err)
	}
	_, _, err := ask(d.changeID, Faults{AreasFails: 1})
	wantFault[*types.FileFault](t, "areas fail", err)
	_, _, err = ask("*", Faults{NoAllocated: true})
	wantFault[*types.FileFault](t, "no allocated areas", err)
	if es, _, err := ask("*", Faults{WholeDisk: true}); err != nil || !slices.Equal(es, []extent.Extent{{Len: diskSize}}) {
		t.Errorf("the whole disk: %v, %v", es, err)
	}
	if es, _, err := ask(d.changeID, Faults{HideChange: true}); err != nil || !slices.Equal(es, want[:2]) {
		t.Errorf("a hidden change: %v, %v", es, err)
	}
	if es, _, err := ask(d.changeID, Faults{}); err != nil || !slices.Equal(es, want) {
		t.Errorf("no fault: %v, %v", es, err)
	}
}

// A lost session is lost for calls and for /folder; a new login mends it.
func TestSessions(t *testing.T) {
	s, vm, c := newVM(t, Options{})
	login := func(user, password string) error {
		_, err := methods.Login(c.ctx, c.Client.Client, &types.Login{This: *c.Client.Client.ServiceContent.SessionManager, UserName: user, Password: password})
		return err
	}
	var m mo.VirtualMachine
	now := func() error {
		_, err := methods.GetCurrentTime(c.ctx, c.Client.Client)
		return err
	}
	if err := now(); err != nil {
		t.Fatal(err)
	}
	s.Misbehave(func(f *Faults) { f.LoseSessions = 1 })
	wantFault[*types.NotAuthenticated](t, "lost session", now())
	wantFault[*types.NotAuthenticated](t, "still", now())
	wantFault[*types.InvalidLogin](t, "wrong password", login(s.User, "wrong"))
	if err := login(s.User, s.Password); err != nil {
		t.Fatal(err)
	}
	c.properties(vm.Ref(), []string{"name"}, &m)
	if n := s.Counts(); n.Logins != 2 || n.Sessions != 1 || m.Name != "web01" {
		t.Errorf("%+v", n)
	}
	vm.PowerOff()
	url := s.folderURL(t, vm.FilePath("web01.vmdk"))
	ask := func(auth func(r *http.Request)) int {
		t.Helper()
		r, _ := http.NewRequest("GET", url, nil)
		auth(r)
		res, _, err := send(t, r)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode
	}
	cookie := func(r *http.Request) {
		for _, k := range c.Client.Client.Jar.Cookies(c.Client.Client.URL()) {
			if k.Name == soap.SessionCookieName {
				r.AddCookie(k)
			}
		}
	}
	for what, status := range map[string]int{
		"nobody":         ask(func(*http.Request) {}) - 401,
		"the cookie":     ask(cookie) - 200,
		"the password":   ask(func(r *http.Request) { r.SetBasicAuth(s.User, s.Password) }) - 200,
		"a bad password": ask(func(r *http.Request) { r.SetBasicAuth(s.User, "x") }) - 401,
		"a bad cookie":   ask(func(r *http.Request) { r.AddCookie(&http.Cookie{Name: soap.SessionCookieName, Value: "x"}) }) - 401,
	} {
		if status != 0 {
			t.Errorf("%s: off by %d", what, status)
		}
	}
	s.LoseSessions()
	if got := ask(cookie); got != 401 {
		t.Errorf("the cookie of a lost session: %d", got)
	}
	if n := s.Counts().Sessions; n != 0 {
		t.Errorf("%d sessions are open", n)
	}
	if err := login(s.User, s.Password); err != nil || ask(cookie) != 200 {
		t.Errorf("after another login: %v", err)
	}
	s.Misbehave(func(f *Faults) { f.LoseSessions = 1 })
	if got := ask(cookie); got != 401 {
		t.Errorf("the session that a request lost: %d", got)
	}
}

// What goes wrong with /folder.
func TestFolderFaults(t *testing.T) {
	s, vm, _ := newVM(t, Options{})
	vm.PowerOff()
	file := vm.FilePath("web01-flat.vmdk")
	whole := readAll(t, vm, 0)
	ask := func(f Faults) (*http.Response, []byte, error) {
		t.Helper()
		s.Misbehave(func(was *Faults) { *was = f })
		return s.request(t, "GET", file, nil, "Range", "bytes=4096-69631")
	}
	if res, b, err := ask(Faults{}); err != nil || res.StatusCode != 206 || res.Header.Get("Content-Range") != fmt.Sprintf("bytes 4096-69631/%d", diskSize) || !bytes.Equal(b, whole[4096:69632]) {
		t.Fatalf("no fault: %v, %v", res, err)
	}
	for _, status := range []int{500, 503} {
		if res, _, err := ask(Faults{FolderStatus: status, FolderFails: 1}); err != nil || res.StatusCode != status {
			t.Errorf("%d: %v, %v", status, res, err)
		}
	}
	if _, b, err := ask(Faults{FolderCut: 1000, FolderCuts: 1}); err == nil || len(b) > 1000 {
		t.Errorf("cut: %d bytes, %v", len(b), err)
	}
	if res, b, err := ask(Faults{FolderShort: 1}); err != nil || res.StatusCode != 206 || len(b) != 32768 {
		t.Errorf("short: %d bytes, %v", len(b), err)
	}
	if res, _, err := ask(Faults{WrongRange: 1}); err != nil || res.Header.Get("Content-Range") == fmt.Sprintf("bytes 4096-69631/%d", diskSize) {
		t.Errorf("wrong range: %v, %v", res, err)
	}
	if res, b, err := ask(Faults{FolderIgnores: 1}); err != nil || res.StatusCode != 200 || len(b) != diskSize {
		t.Errorf("range ignored: %v, %d bytes, %v", res, len(b), err)
	}
	began := time.Now()
	if _, _, err := ask(Faults{FolderDelay: 200 * time.Millisecond}); err != nil || time.Since(began) < 200*time.Millisecond {
		t.Errorf("slow: %v after %v", err, time.Since(began))
	}
	if res, _, err := ask(Faults{NoFolder: map[string]bool{"LocalDS_0": true}}); err != nil || res.StatusCode != 404 {
		t.Errorf("no folder: %v, %v", res, err)
	}
	if res, _, err := ask(Faults{}); err != nil || res.StatusCode != 206 {
		t.Errorf("in the end: %v, %v", res, err)
	}
	s.Deny("Datastore.Browse")
	if res, _, err := ask(Faults{}); err != nil || res.StatusCode != 403 {
		t.Errorf("without the privilege: %v, %v", res, err)
	}
	if n := s.Counts(); n.FolderBytes[file] == 0 || n.MaxReads < 1 || n.MaxConnections < 1 {
		t.Errorf("%+v", n)
	}
}

// Privileges that are missing are named, and asked for.
func TestPrivileges(t *testing.T) {
	s, vm, c := newVM(t, Options{})
	const create = "VirtualMachine.State.CreateSnapshot"
	am := *c.Client.Client.ServiceContent.AuthorizationManager
	has := func() []bool {
		t.Helper()
		ids := []string{create, "VirtualMachine.State.RemoveSnapshot"}
		one, err := methods.HasPrivilegeOnEntity(c.ctx, c.Client.Client, &types.HasPrivilegeOnEntity{This: am, Entity: vm.Ref(), PrivId: ids})
		if err != nil {
			t.Fatal(err)
		}
		user, err := methods.HasUserPrivilegeOnEntities(c.ctx, c.Client.Client, &types.HasUserPrivilegeOnEntities{This: am, Entities: []types.ManagedObjectReference{vm.Ref()}, UserName: s.User, PrivId: ids})
		if err != nil {
			t.Fatal(err)
		}
		list, err := methods.FetchUserPrivilegeOnEntities(c.ctx, c.Client.Client, &types.FetchUserPrivilegeOnEntities{This: am, Entities: []types.ManagedObjectReference{vm.Ref()}, UserName: s.User})
		if err != nil {
			t.Fatal(err)
		}
		for i, id := range ids {
			listed := slices.Contains(list.Returnval[0].Privileges, id)
			if user.Returnval[0].PrivAvailability[i].IsGranted != one.Returnval[i] || listed != one.Returnval[i] {
				t.Errorf("%s: the three answers differ", id)
			}
		}
		return one.Returnval
	}
	if got := has(); !slices.Equal(got, []bool{true, true}) {
		t.Errorf("at first: %v", got)
	}
	s.Deny(create, changeTracking)
	if got := has(); !slices.Equal(got, []bool{false, true}) {
		t.Errorf("denied: %v", got)
	}
	_, err := c.object(vm).CreateSnapshot(c.ctx, "s", "", false, false)
	var missing *types.NoPermission
	if !soap.IsSoapFault(err) {
		t.Fatal(err)
	}
	if f, ok := soap.ToSoapFault(err).VimFault().(types.NoPermission); ok {
		missing = &f
	}
	if missing == nil || missing.PrivilegeId != create {
		t.Errorf("the fault is %v, %+v", err, missing)
	}
	_, err = c.object(vm).Reconfigure(c.ctx, types.VirtualMachineConfigSpec{ChangeTrackingEnabled: types.NewBool(true)})
	wantFault[*types.NoPermission](t, "change tracking", err)
	s.Allow(create)
	c.snapshot(vm, "s")
}

// Any method fails, at once or as a task; the server itself is busy, or gone.
func TestAnyFault(t *testing.T) {
	s, vm, c := newVM(t, Options{})
	now := func() error {
		_, err := methods.GetCurrentTime(c.ctx, c.Client.Client)
		return err
	}
	busy := &types.TaskInProgress{}
	s.Misbehave(func(f *Faults) {
		f.Calls = map[string][]types.BaseMethodFault{"ReconfigVM_Task": {busy, nil}}
		f.Tasks = map[string][]types.BaseMethodFault{"ReconfigVM_Task": {nil, &types.FileLocked{}}, "PowerOffVM_Task": {busy}}
	})
	_, err := c.object(vm).Reconfigure(c.ctx, types.VirtualMachineConfigSpec{})
	wantFault[*types.TaskInProgress](t, "at once", err)
	c.run(c.object(vm).Reconfigure(c.ctx, types.VirtualMachineConfigSpec{}))
	_, err = c.try(c.object(vm).Reconfigure(c.ctx, types.VirtualMachineConfigSpec{}))
	wantFault[*types.FileLocked](t, "as a task", err)
	_, err = c.try(c.object(vm).PowerOff(c.ctx))
	wantFault[*types.TaskInProgress](t, "power", err)
	c.run(c.object(vm).PowerOff(c.ctx))

	s.Misbehave(func(f *Faults) { f.SDKFails, f.SDKStatus = 1, 503 })
	if err := now(); err == nil || soap.IsSoapFault(err) {
		t.Errorf("busy: %v", err)
	}
	s.Misbehave(func(f *Faults) { f.SDKDrops = 1 })
	if err := now(); err == nil || soap.IsSoapFault(err) {
		t.Errorf("gone: %v", err)
	}
	s.Misbehave(func(f *Faults) { *f = Faults{} })
	if err := now(); err != nil {
		t.Error(err)
	}
	s.Misbehave(func(f *Faults) { f.DatastoreFull = true })
	if res, _, err := s.request(t, "PUT", vm.FilePath("note.txt"), bytes.NewReader([]byte("x"))); err != nil || res.StatusCode != 500 {
		t.Errorf("full: %v, %v", res, err)
	}
}
