package vspheretest

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/vmware/govmomi/vim25/types"
)

// needQEMU skips the test when qemu-img is missing; with HOLDFAST_TEST_ALL=1 that is an error.
func needQEMU(t testing.TB) {
	t.Helper()
	_, err := exec.LookPath("qemu-img")
	switch {
	case err == nil:
	case os.Getenv("HOLDFAST_TEST_ALL") == "1":
		t.Fatalf("the oracle is missing: %v", err)
	default:
		t.Skipf("the oracle is missing: %v", err)
	}
}

func qemu(t testing.TB, dir string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-img", args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("qemu-img %v: %v\n%s", args, err, out)
	}
}

func writeFile(t testing.TB, name string, b []byte) {
	t.Helper()
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// The files of a chain, as /folder gives them, are what QEMU takes for the disk that the guest had.
func TestDeltasAreReadable(t *testing.T) {
	needQEMU(t)
	for format, size := range map[string]int64{seSparse: 17 << 20, vmfsSparse: 3 << 20} { // more than a grain table has
		s := New(t, Options{DeltaFormat: format})
		vm := s.AddVM(VMSpec{Name: "web01", Disks: []DiskSpec{{Size: size + 1024, Content: bytes.NewReader(noise(1, 1<<20))}}})
		c := connect(t, s)
		var truth [][]byte
		var refs []types.ManagedObjectReference
		for i := range int64(4) {
			truth = append(truth, readAll(t, vm, 0))
			refs = append(refs, vm.AddUserSnapshot("by hand"))
			vm.WriteAt(0, noise(uint64(i), 70001), i*(size/5)+11)
			vm.WriteAt(0, noise(9, 3), vm.DiskSize(0)-3)
			vm.Zero(0, i*3*unit, 4*unit+512)
		}
		c.run(c.object(vm).PowerOff(c.ctx))
		truth = append(truth, readAll(t, vm, 0))
		tops := append(topFiles(c, refs), c.liveDisks(vm)[0].file)
		dir := download(t, s, vm)
		for i, top := range tops {
			writeFile(t, filepath.Join(dir, "truth"), truth[i])
			qemu(t, dir, "compare", "-f", "vmdk", "-F", "raw", filepath.Base(top), "truth")
		}
		// Without a part of the chain the rest is as it was.
		for _, step := range []struct {
			gone int
			left []int
		}{{1, []int{0, 2, 3, 4}}, {3, []int{0, 2, 4}}} {
			c.removeSnapshot(refs[step.gone])
			dir = download(t, s, vm)
			for _, i := range step.left {
				top := c.liveDisks(vm)[0].file
				if i < 4 {
					top = c.snapshotDisks(refs[i])[0].file
				}
				writeFile(t, filepath.Join(dir, "truth"), truth[i])
				qemu(t, dir, "compare", "-f", "vmdk", "-F", "raw", filepath.Base(top), "truth")
			}
		}
	}
}

func topFiles(c *client, refs []types.ManagedObjectReference) []string {
	var all []string
	for _, ref := range refs {
		all = append(all, c.snapshotDisks(ref)[0].file)
	}
	return all
}

// download gets all files of a VM's disks.
func download(t testing.TB, s *Server, vm *VM) string {
	t.Helper()
	dir := t.TempDir()
	vm.mu.Lock()
	var names []string
	for _, d := range vm.disks {
		for _, l := range d.layers {
			names = append(names, l.name, l.extent())
		}
	}
	vm.mu.Unlock()
	for _, name := range names {
		res, b, err := s.request(t, "GET", vm.FilePath(name), nil)
		if err != nil || res.StatusCode != 200 {
			t.Fatalf("%s: %v, %v", name, res, err)
		}
		writeFile(t, filepath.Join(dir, name), b)
	}
	return dir
}
