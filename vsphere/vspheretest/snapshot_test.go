package vspheretest

import (
	"bytes"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/holdfast-backup/holdfast/store/extent"
)

const diskSize = 4 << 20

func newVM(t testing.TB, o Options) (*Server, *VM, *client) {
	t.Helper()
	s := New(t, o)
	vm := s.AddVM(VMSpec{Name: "web01", ChangeTracking: true, Disks: []DiskSpec{{Size: diskSize, Content: bytes.NewReader(noise(1, 1<<20))}}})
	return s, vm, connect(t, s)
}

// A snapshot holds what was there when it was taken; the guest goes on; removal merges.
func TestSnapshotFreezes(t *testing.T) {
	for _, o := range []Options{{}, {ESX: true}} {
		s, vm, c := newVM(t, o)
		base := vm.FilePath("web01-flat.vmdk")
		if res, _, _ := s.request(t, "GET", base, nil); res.StatusCode != http.StatusInternalServerError {
			t.Fatalf("the disk of a running VM: %s", res.Status)
		}
		var frozen []byte
		s.SetHooks(Hooks{OnFrozen: func(vm *VM, name string) {
			frozen = readAll(t, vm, 0)
			vm.WriteAt(0, []byte("while it is frozen"), 100)
		}})
		ref := c.snapshot(vm, "holdfast")
		wantBytes(t, "the frozen disk", s.readRange(t, base, extent.Extent{Len: diskSize}), frozen)
		live := c.liveDisks(vm)[0]
		if want := vm.FilePath("web01-000001.vmdk"); live.file != want || !slices.Equal(live.parents, []string{vm.FilePath("web01.vmdk")}) {
			t.Errorf("the live disk is %+v, want %s", live, want)
		}
		if d := c.snapshotDisks(ref)[0]; d.file != vm.FilePath("web01.vmdk") || d.parents != nil || d.changeID == "" {
			t.Errorf("the disk in the snapshot is %+v", d)
		}
		if res, _, _ := s.request(t, "GET", vm.FilePath("web01-000001-sesparse.vmdk"), nil); res.StatusCode != http.StatusInternalServerError {
			t.Errorf("the delta of a running VM: %s", res.Status)
		}
		vm.WriteAt(0, noise(2, 5000), diskSize-5000)
		want := readAll(t, vm, 0)
		c.removeSnapshot(ref)
		wantBytes(t, "after the removal", readAll(t, vm, 0), want)
		if live := c.liveDisks(vm)[0]; live.file != vm.FilePath("web01.vmdk") || live.parents != nil {
			t.Errorf("after the removal the disk is %+v", live)
		}
		c.run(c.object(vm).PowerOff(c.ctx))
		wantBytes(t, "the file", s.readRange(t, base, extent.Extent{Len: diskSize}), want)
		if len(vm.Snapshots()) != 0 || s.Counts().Snapshots != 0 || s.Counts().MaxSnapshots[""] != 1 {
			t.Errorf("snapshots: %v, %+v", vm.Snapshots(), s.Counts())
		}
	}
}

func readAll(t testing.TB, vm *VM, disk int) []byte {
	t.Helper()
	b := make([]byte, vm.DiskSize(disk))
	if _, err := vm.ReadAt(disk, b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// The areas are those that were written, in pages, relative to the snapshot that is asked about.
func TestChangedAreas(t *testing.T) {
	_, vm, c := newVM(t, Options{AreasPerPage: 2})
	s1 := c.snapshot(vm, "one")
	d1 := c.snapshotDisks(s1)[0]
	es, pages, err := c.areas(vm, s1, d1, "*")
	if want := []extent.Extent{{Len: 1 << 20}}; err != nil || !reflect.DeepEqual(es, want) || pages != 1 {
		t.Fatalf("allocated: %v in %d pages, %v; want %v", es, pages, err, want)
	}
	var want []extent.Extent
	for i := range int64(5) {
		off := i * 3 * unit
		vm.WriteAt(0, []byte{1}, off+7)
		want = append(want, extent.Extent{Off: off, Len: unit})
	}
	c.removeSnapshot(s1)
	s2 := c.snapshot(vm, "two")
	vm.WriteAt(0, []byte{1}, 50*unit) // after it
	if es, _, err := c.areas(vm, s2, d1, "*"); err != nil || slices.Contains(es, extent.Extent{Off: 50 * unit, Len: unit}) {
		t.Errorf("allocated before that: %v, %v", es, err)
	}
	vm.WriteAt(0, []byte{2}, 0) // again: it still counts for the second
	es, pages, err = c.areas(vm, s2, d1, d1.changeID)
	if err != nil || !reflect.DeepEqual(es, want) || pages != 3 {
		t.Fatalf("changed: %v in %d pages, %v; want %v in 3", es, pages, err, want)
	}
	d2 := c.snapshotDisks(s2)[0]
	s3 := c.snapshot(vm, "three")
	es, _, err = c.areas(vm, s3, d1, d2.changeID)
	if want := []extent.Extent{{Len: unit}, {Off: 50 * unit, Len: unit}}; err != nil || !reflect.DeepEqual(es, want) {
		t.Fatalf("changed since the second: %v, %v; want %v", es, err, want)
	}
	if es, _, err = c.areas(vm, s2, d2, d2.changeID); err != nil || es != nil {
		t.Fatalf("changed in no time: %v, %v", es, err)
	}
}

func TestChangedAreasRefused(t *testing.T) {
	s, vm, c := newVM(t, Options{})
	s1 := c.snapshot(vm, "one")
	d := c.snapshotDisks(s1)[0]
	id, _, _ := strings.Cut(d.changeID, "/")
	_, err := c.query(vm, s1, d.key, 0, "52 00 00 00 00 00 00 00-00 00 00 00 00 00 00 00/1")
	wantFault[*types.FileFault](t, "another UUID", err)
	_, err = c.query(vm, s1, d.key, 0, id+"/9")
	wantFault[*types.FileFault](t, "a newer change id", err)
	_, err = c.query(vm, s1, d.key+1, 0, "*")
	wantFault[*types.InvalidArgument](t, "another key", err)
	_, err = c.query(vm, s1, d.key, diskSize, "*")
	wantFault[*types.InvalidArgument](t, "behind the end", err)
	vm.ResetTracking(0)
	s2 := c.snapshot(vm, "two")
	_, err = c.query(vm, s2, d.key, 0, d.changeID)
	wantFault[*types.FileFault](t, "after a reset", err)

	other := s.AddVM(VMSpec{Name: "plain", Disks: []DiskSpec{{Size: diskSize}}})
	s3 := c.snapshot(other, "one")
	if d := c.snapshotDisks(s3)[0]; d.changeID != "" {
		t.Errorf("without tracking the change id is %q", d.changeID)
	}
	_, err = c.query(other, s3, other.DiskKey(0), 0, "*")
	wantFault[*types.InvalidArgument](t, "without tracking", err)
}

// Tracking begins at the first snapshot after it was enabled, and not while there is another.
func TestTrackingBegins(t *testing.T) {
	s := New(t, Options{})
	vm := s.AddVM(VMSpec{Name: "web01", Disks: []DiskSpec{{Size: diskSize}}})
	c := connect(t, s)
	user := vm.AddUserSnapshot("by hand")
	enable := types.VirtualMachineConfigSpec{ChangeTrackingEnabled: types.NewBool(true)}
	c.run(c.object(vm).Reconfigure(c.ctx, enable))
	if !vm.ChangeTracking() {
		t.Error("tracking is not enabled")
	}
	s1 := c.snapshot(vm, "one")
	if d := c.snapshotDisks(s1)[0]; d.changeID != "" {
		t.Errorf("with a snapshot of the user the change id is %q", d.changeID)
	}
	c.removeSnapshot(s1)
	c.removeSnapshot(user)
	if d := c.snapshotDisks(c.snapshot(vm, "two"))[0]; !strings.HasSuffix(d.changeID, "/1") || !strings.HasPrefix(d.changeID, "52 ") || len(d.changeID) != 49 {
		t.Errorf("the change id is %q", d.changeID)
	}
}

// While the VM runs, the delta over a snapshot of the user can be read as soon as another is over it.
func TestFrozenDeltaIsReadable(t *testing.T) {
	s, vm, c := newVM(t, Options{})
	vm.AddUserSnapshot("by hand")
	vm.WriteAt(0, noise(7, 7000), 70)
	delta := vm.FilePath("web01-000001-sesparse.vmdk")
	status := func() int {
		t.Helper()
		res, _, err := s.request(t, "GET", delta, nil)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode
	}
	if got := status(); got != http.StatusInternalServerError {
		t.Errorf("what the VM writes to: %d", got)
	}
	ref := c.snapshot(vm, "holdfast")
	if got := status(); got != http.StatusOK {
		t.Errorf("what is frozen: %d", got)
	}
	d := c.snapshotDisks(ref)[0]
	if d.file != vm.FilePath("web01-000001.vmdk") || !slices.Equal(d.parents, []string{vm.FilePath("web01.vmdk")}) {
		t.Errorf("the chain is %+v", d)
	}
	if n := s.Counts(); n.Snapshots != 1 || len(vm.Snapshots()) != 2 {
		t.Errorf("%d counted, %v", n.Snapshots, vm.Snapshots())
	}
}

// Snapshots in a row merge into what is left, whichever goes first.
func TestSnapshotChains(t *testing.T) {
	for _, order := range [][]int{{0, 1, 2}, {2, 1, 0}, {1, 0, 2}, {1, 2, 0}} {
		_, vm, c := newVM(t, Options{})
		var refs []types.ManagedObjectReference
		var truth [][]byte
		for i := range 3 {
			vm.WriteAt(0, noise(uint64(10+i), 9000), int64(i)*100000)
			vm.Zero(0, int64(i)*unit+3, 2*unit)
			truth = append(truth, readAll(t, vm, 0))
			refs = append(refs, c.snapshot(vm, "s"))
		}
		vm.WriteAt(0, noise(9, 100), 77)
		want := readAll(t, vm, 0)
		left := map[int]bool{0: true, 1: true, 2: true}
		for _, i := range order {
			c.removeSnapshot(refs[i])
			delete(left, i)
			wantBytes(t, "the guest's view", readAll(t, vm, 0), want)
			for j := range left {
				wantBytes(t, "a snapshot that is left", vm.frozenBytes(refs[j], 0), truth[j])
			}
			var m mo.VirtualMachine
			c.properties(vm.Ref(), []string{"snapshot"}, &m)
			if n := treeSize(m.Snapshot); n != len(left) {
				t.Errorf("%d snapshots in the tree, want %d", n, len(left))
			}
		}
		if d := c.liveDisks(vm)[0]; d.file != vm.FilePath("web01.vmdk") || d.parents != nil {
			t.Errorf("in the end the disk is %+v", d)
		}
	}
}

func treeSize(info *types.VirtualMachineSnapshotInfo) int {
	if info == nil {
		return 0
	}
	var count func([]types.VirtualMachineSnapshotTree) int
	count = func(tree []types.VirtualMachineSnapshotTree) int {
		n := len(tree)
		for _, node := range tree {
			n += count(node.ChildSnapshotList)
		}
		return n
	}
	return count(info.RootSnapshotList)
}

func (vm *VM) frozenBytes(ref types.ManagedObjectReference, disk int) []byte {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	f := vm.snapshots[ref].disks[vm.disks[disk].key]
	b := make([]byte, f.size)
	_, _ = f.layer.ReadAt(b, 0)
	return b
}
