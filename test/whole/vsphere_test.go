package whole

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/vsphere/vspheretest"
)

// lab is a vCenter, as far as it can be had without one, and a repository that its VMs are backed up to.
type lab struct {
	*repository
	server *vspheretest.Server
	config string
	state  string // directory of the program's

	mu     sync.Mutex                 // guards following
	guests map[*vspheretest.VM][]byte // what each one disk holds
	frozen map[*vspheretest.VM][]byte
}

func newLab(t *testing.T, more string) *lab {
	t.Helper()
	return newLabOf(t, newRepository(t), more)
}

// newLabOf is newLab with a repository that is there already.
func newLabOf(t *testing.T, r *repository, more string) *lab {
	t.Helper()
	dir := newDir(t)
	l := &lab{repository: r, server: vspheretest.New(t, vspheretest.Options{}), state: filepath.Join(dir, "state"),
		guests: map[*vspheretest.VM][]byte{}, frozen: map[*vspheretest.VM][]byte{}}
	l.as = []string{"env", "HOLDFAST_STATE=" + l.state}
	l.config = filepath.Join(dir, "config.yaml")
	text := fmt.Sprintf("sources:\n  lab: {vsphere: %q, user: %q, password_file: pw, thumbprint: %q%s}\n", l.server.URL(), l.server.User, l.server.Thumbprint(), more)
	for file, text := range map[string]string{"pw": l.server.Password + "\n", "config.yaml": text} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	l.server.SetHooks(vspheretest.Hooks{OnFrozen: l.freeze})
	return l
}

func (l *lab) freeze(vm *vspheretest.VM, _ string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.frozen[vm] = bytes.Clone(l.guests[vm])
}

// add makes a VM of one disk.
func (l *lab) add(name string, size int) *vspheretest.VM {
	vm := l.server.AddVM(vspheretest.VMSpec{Name: name, ChangeTracking: true, Disks: []vspheretest.DiskSpec{{Size: int64(size)}}})
	l.mu.Lock()
	l.guests[vm] = make([]byte, size)
	l.mu.Unlock()
	l.write(vm, rand.New(rand.NewPCG(1, uint64(size))), 10)
	return vm
}

func (l *lab) write(vm *vspheretest.VM, rnd *rand.Rand, writes int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	disk := l.guests[vm]
	for range writes {
		off := rnd.IntN(len(disk))
		p := disk[off:min(len(disk), off+1+rnd.IntN(300_000))]
		for i := range p {
			p[i] = byte(rnd.Uint32())
		}
		vm.WriteAt(0, p, int64(off))
	}
}

// platform gives the arguments of a command that uses the vCenter.
func (l *lab) platform(args ...string) []string {
	return append([]string{args[0], "--config", l.config, "--source", "lab"}, args[1:]...)
}

// wantFrozen restores a point and compares it with what was frozen.
func (l *lab) wantFrozen(t *testing.T, point string, vm *vspheretest.VM) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.wantDisk(t, point, l.frozen[vm])
}

// wantDisk restores a point and compares its disk.
func (l *lab) wantDisk(t *testing.T, point string, want []byte) {
	t.Helper()
	dir := newDir(t)
	l.must(t, "restore", point, "--to", dir)
	got, err := os.ReadFile(filepath.Join(dir, "disk0.raw"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s is not what was frozen", point)
	}
}

func (l *lab) wantNoSnapshot(t *testing.T, vm *vspheretest.VM) {
	t.Helper()
	if s := vm.Snapshots(); len(s) > 0 {
		t.Errorf("snapshots are left: %v", s)
	}
}

// TestVSphere is what a user does: look, back up, look again, back up what changed, restore.
func TestVSphere(t *testing.T) {
	l := newLab(t, "")
	rnd := rand.New(rand.NewPCG(7, 7))
	web, db := l.add("web", 8<<20), l.add("db", 4<<20)
	out := l.must(t, l.platform("vms")...).out
	for _, want := range []string{"web", "db", "/DC0/vm/web", "8.0 MiB"} {
		if !strings.Contains(out, want) {
			t.Errorf("vms does not say %q:\n%s", want, out)
		}
	}
	if out := l.must(t, l.platform("doctor")...).out; !strings.Contains(out, "changed block tracking is on for 2") {
		t.Errorf("doctor says:\n%s", out)
	}
	l.must(t, l.platform("backup", "*")...)
	l.wantFrozen(t, "web/latest", web)
	l.wantFrozen(t, "db/latest", db)
	l.write(web, rnd, 2)
	out = l.must(t, l.platform("backup", "web", "--json")...).out
	p := summaryOf(out)
	if len(p) != 1 || p[0].Read == 0 || p[0].Read > 1<<20 {
		t.Errorf("the second backup says:\n%s", out)
	}
	l.wantFrozen(t, "web/latest", web)
	l.wantNoSnapshot(t, web)
	if out := l.must(t, "ls", "web/latest/config/").out; !strings.Contains(out, "web.vmx") || !strings.Contains(out, "vm.json") || !strings.Contains(out, "web.nvram") {
		t.Errorf("the configuration is:\n%s", out)
	}
	needs(t, "qemu-img") // by which the vCenter reads what it gets
	l.must(t, "restore", "web/latest", "--to", "lab:", "--name", "web2", "--config", l.config)
	flat, err := os.ReadFile(filepath.Join(filepath.Dir(filepath.Dir(web.File("x"))), "web2", "web2-flat.vmdk"))
	if err != nil || !bytes.Equal(flat, l.frozen[web]) {
		t.Errorf("the disk of the restored VM is not what was frozen, %v", err)
	}
	if out := l.must(t, l.platform("vms", "web2")...).out; !strings.Contains(out, "off") {
		t.Errorf("the restored VM is:\n%s", out)
	}
	l.wants(t, 1, "not on this server", "restore", "web/latest", "--to", "lab:", "--datastore", "nowhere", "--config", l.config)
	l.wants(t, 64, `no source "lap"`, "restore", "web/latest", "--to", "lap:", "--config", l.config)
	l.wants(t, 64, "--name is about a VM on a platform", "restore", "web/latest", "--to", t.TempDir(), "--name", "x")
	// And a disk image as a VM.
	image := filepath.Join(newDir(t), "image.raw")
	if err := os.WriteFile(image, l.frozen[web], 0o600); err != nil {
		t.Fatal(err)
	}
	l.must(t, "backup", image, "--vm", "image")
	l.must(t, "restore", "image/latest", "--to", "lab:", "--datastore", "LocalDS_0", "--config", l.config)
	flat, err = os.ReadFile(filepath.Join(filepath.Dir(filepath.Dir(web.File("x"))), "image-restored", "image-restored-flat.vmdk"))
	if err != nil || !bytes.Equal(flat, l.frozen[web]) {
		t.Errorf("the disk of the VM made of an image is not that, %v", err)
	}
	l.wants(t, 1, `no VM is called "nope"`, l.platform("backup", "nope")...)
	if p := l.points(t); len(p) != 4 {
		t.Errorf("there are %d points", len(p))
	}
}

// slow lets the first reads of disks take long, and tells when one has begun.
func (l *lab) slow() (reading <-chan struct{}) {
	began := make(chan struct{})
	var once sync.Once
	l.server.SetHooks(vspheretest.Hooks{OnFrozen: l.freeze, OnRead: func(file string, _, _ int64) {
		if strings.Contains(file, "-flat") {
			once.Do(func() { close(began) })
			time.Sleep(300 * time.Millisecond)
		}
	}})
	return began
}

// TestVSphereInPlace gives a VM its disk back through an nbdkit that stands in for VDDK.
func TestVSphereInPlace(t *testing.T) {
	needs(t, "nbdkit")
	dir := newDir(t)
	l := newLab(t, fmt.Sprintf(", vddk_libdir: %q, nbdkit: %q", dir, filepath.Join(dir, "nbdkit")))
	vm := l.add("web", 8<<20)
	program, _ := vspheretest.FakeVDDK(t, filepath.Dir(filepath.Dir(vm.File("x"))))
	if err := os.Symlink(program, filepath.Join(dir, "nbdkit")); err != nil {
		t.Fatal(err)
	}
	l.must(t, l.platform("backup", "web")...)
	was := bytes.Clone(l.frozen[vm])
	l.write(vm, rand.New(rand.NewPCG(8, 8)), 2)
	inPlace := []string{"restore", "web/latest", "--to", "lab:", "--in-place", "--config", l.config}
	l.wants(t, 64, "asks for the VM's name", inPlace...)
	l.wants(t, 64, "--datastore is about a new VM", append(inPlace, "--datastore", "x")...)
	l.wants(t, 1, "is switched on", append(inPlace, "--name", "web")...)
	vm.PowerOff()
	l.add("other", 1<<20).PowerOff()
	l.wants(t, 1, "not the VM that the point is of", append(inPlace, "--name", "other")...)
	if out := l.must(t, append(inPlace, "--name", "web")...).out; !strings.Contains(out, "differed and were written") {
		t.Errorf("it says:\n%s", out)
	}
	if flat, err := os.ReadFile(vm.File("web-flat.vmdk")); err != nil || !bytes.Equal(flat, was) {
		t.Errorf("the disk is not what it was, %v", err)
	}
}

// TestVSphereEnds: a backup that is killed leaves a snapshot, which the next one removes before it reads what changed; one that gets a signal removes it
// before it ends.
func TestVSphereEnds(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGINT, syscall.SIGTERM} {
		t.Run(sig.String(), func(t *testing.T) {
			l := newLab(t, "")
			rnd := rand.New(rand.NewPCG(7, uint64(sig)))
			vm := l.add("web", 16<<20)
			l.must(t, l.platform("backup", "web")...)
			l.write(vm, rnd, 20)
			reading := l.slow()
			cmd := l.command(t.Context(), l.platform("backup", "web")...)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			select {
			case <-reading:
			case <-time.After(hangs):
				t.Fatal("no disk is read")
			}
			if err := cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait()
			if left := len(vm.Snapshots()); (sig == syscall.SIGKILL) != (left == 1) {
				t.Errorf("%d snapshots after %v", left, sig)
			}
			if sig != syscall.SIGKILL && cmd.ProcessState.ExitCode() != 130 {
				t.Errorf("exit code %d", cmd.ProcessState.ExitCode())
			}
			l.server.SetHooks(vspheretest.Hooks{OnFrozen: l.freeze})
			l.write(vm, rnd, 1)
			out := l.must(t, l.platform("doctor")...).out
			if found := strings.Contains(out, "an earlier run left snapshot"); found != (sig == syscall.SIGKILL) {
				t.Errorf("doctor says:\n%s", out)
			}
			res := l.must(t, l.platform("backup", "web", "--json")...)
			if p := summaryOf(res.out); len(p) != 1 || p[0].Read > 8<<20 {
				t.Errorf("the next backup says:\n%s", res.out)
			}
			l.wantNoSnapshot(t, vm)
			l.wantFrozen(t, "web/latest", vm)
		})
	}
}

// TestVSphereMany: 200 VMs, 8 at once, one of which fails: the others are backed up, within bounds.
func TestVSphereMany(t *testing.T) {
	const vms, atOnce = 200, 8
	l := newLab(t, ", vms_at_once: 8, snapshots_per_datastore: 8, snapshots_per_host: 8")
	for i := range vms {
		l.add(fmt.Sprintf("vm%03d", i), 1<<20)
	}
	broken := l.server.AddVM(vspheretest.VMSpec{Name: "broken", Disks: []vspheretest.DiskSpec{{Size: 1 << 20}}})
	if err := os.Remove(broken.File("broken.vmdk")); err != nil {
		t.Fatal(err)
	}
	res := l.wants(t, 3, "1 of 201 VMs failed", l.platform("backup", "*", "--json", "-v")...)
	if want := fmt.Sprintf(`"parts_done":%d,"parts_total":%d,`, vms+1, vms+1); !strings.Contains(res.err, want) {
		t.Errorf("the progress does not say %s", want)
	}
	for _, want := range []string{`"task":"vm007/disk0"`, `"task":"in total"`, fmt.Sprintf(`"bytes_total":%d`, (vms+1)<<20)} {
		if !strings.Contains(res.err, want) {
			t.Errorf("the progress does not say %s", want)
		}
	}
	var sum struct {
		Points []point
		Failed []struct{ VM, Error string }
		Total  int64 `json:"bytes_total"`
	}
	lines := strings.Split(strings.TrimSpace(res.out), "\n")
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &sum); err != nil {
		t.Fatal(err)
	}
	if len(sum.Points) != vms || len(sum.Failed) != 1 || sum.Failed[0].VM != "broken" || sum.Total != vms<<20 {
		t.Errorf("%d points of %d bytes, failed %v", len(sum.Points), sum.Total, sum.Failed)
	}
	c := l.server.Counts()
	t.Logf("%v, %d MiB, %d connections and %d snapshots at once, %d calls", res.took, res.rss>>20, c.MaxConnections, c.MaxSnapshots[""], vspheretest.Sum(c.Calls))
	// Less memory than the disks have bytes, and as many VMs at once as were asked for.
	if c.MaxSnapshots[""] != atOnce || c.MaxConnections > 40 || res.rss > 150<<20 {
		t.Errorf("%d snapshots and %d connections at once, %d MiB of memory", c.MaxSnapshots[""], c.MaxConnections, res.rss>>20)
	}
	if c.Snapshots != 0 || c.Sessions != 0 {
		t.Errorf("%d snapshots and %d sessions are left", c.Snapshots, c.Sessions)
	}
}
