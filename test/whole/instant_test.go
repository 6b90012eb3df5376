package whole

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/test/nfsmount"
	"github.com/holdfast-backup/holdfast/vsphere/vspheretest"
)

// instantLab is a lab whose hosts mount exports by libnfs.
type instantLab struct {
	*lab
	boots string
	port  string
	mu    sync.Mutex
	// mounts by the path of the export.
	mounts map[string]func()
}

func newInstantLab(t *testing.T) *instantLab {
	t.Helper()
	needs(t, "root", "fuse", "gcc")
	l := &instantLab{lab: newLab(t, ""), boots: newDir(t), mounts: map[string]func(){}}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, l.port, _ = net.SplitHostPort(ln.Addr().String())
	ln.Close()
	l.as = append(l.as, "HOLDFAST_BOOTS="+l.boots, "HOLDFAST_NFS=127.0.0.1:"+l.port, "HOLDFAST_PORTMAP=off", "HOLDFAST_CONFIG="+l.config)
	l.server.SetHooks(l.allHooks(t))
	t.Cleanup(func() { // what a failure left
		l.unmountAll()
		exec.Command("fuser", "-k", "-KILL", filepath.Join(l.boots, "nfs", "lock")).Run()
	})
	return l
}

func (l *instantLab) unmountAll() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, unmount := range l.mounts {
		unmount()
	}
	clear(l.mounts)
}

func (l *instantLab) allHooks(t *testing.T) vspheretest.Hooks {
	return vspheretest.Hooks{OnFrozen: l.freeze, OnMount: func(host, path string) (string, error) {
		dir, unmount, err := nfsmount.Try(t, nil, fmt.Sprintf("nfs://%s%s?nfsport=%s&mountport=%s", host, path, l.port, l.port))
		if err != nil {
			return "", err
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		l.mounts[path] = unmount
		return dir, nil
	}}
}

// service is the process that serves NFS; 0 for none.
func (l *instantLab) service() int {
	out, err := exec.Command("fuser", filepath.Join(l.boots, "nfs", "lock")).Output()
	var pid int
	if err != nil {
		return 0
	}
	fmt.Sscan(string(out), &pid)
	return pid
}

// wantNothing looks for what a boot that is over left.
func (l *instantLab) wantNothing(t *testing.T, vms int) {
	t.Helper()
	if out := strings.TrimSpace(l.must(t, "boot", "ls", "--json").out); out != "" {
		t.Errorf("boots are left:\n%s", out)
	}
	if dirs, err := filepath.Glob(filepath.Join(l.boots, "????????")); err != nil || len(dirs) > 0 {
		t.Errorf("left in the directory of boots: %v, %v", dirs, err)
	}
	if pins, err := filepath.Glob(filepath.Join(l.dir, "notes", "pin-*")); err != nil || len(pins) > 0 {
		t.Errorf("left in the repository: %v, %v", pins, err)
	}
	for _, d := range l.server.Datastores() {
		if strings.HasPrefix(d, "holdfast-") {
			t.Errorf("datastore %s is left", d)
		}
	}
	if n := strings.Count(l.must(t, l.platform("vms", "--json")...).out, "\n"); n != vms {
		t.Errorf("there are %d VMs, want %d", n, vms)
	}
}

// TestInstantRecovery runs a VM of a point on a vCenter from NFS, through a kill of the service; what its guest wrote is in the VM that is moved away.
func TestInstantRecovery(t *testing.T) {
	l := newInstantLab(t)
	web := l.add("web", 8<<20)
	l.must(t, l.platform("backup", "web")...)
	want := bytes.Clone(l.frozen[web])
	res := l.must(t, "boot", "web/latest", "--on", "lab", "--allow", "127.0.0.1", "--json", "--name", "web-now")
	var b struct{ ID, State, NFS string }
	if err := json.Unmarshal([]byte(res.out), &b); err != nil || b.State != "running" {
		t.Fatalf("%s: %v", res.out, err)
	}
	t.Logf("from boot to power-on: %v", res.took)
	vm := l.find(t, "web-now")
	rnd := rand.New(rand.NewPCG(3, 3))
	write := func(n int) {
		for range n {
			off := rnd.IntN(len(want) - 5000)
			p := want[off : off+1+rnd.IntN(5000)]
			for i := range p {
				p[i] = byte(rnd.Uint32())
			}
			vm.WriteAt(0, p, int64(off))
		}
	}
	write(50)
	if got := make([]byte, len(want)); true {
		if _, err := vm.ReadAt(0, got, 0); err != nil || !bytes.Equal(got, want) {
			t.Errorf("the guest reads something else, %v", err)
		}
	}
	if out := l.must(t, "boot", "ls").out; !strings.Contains(out, "running") || !strings.Contains(out, "127.0.0.1") {
		t.Errorf("boot ls says:\n%s", out)
	}
	// The service dies, and the next command has another one serve the same.
	pid := l.service()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(pid, err)
	}
	wrote := make(chan struct{})
	go func() { defer close(wrote); write(50) }()
	time.Sleep(300 * time.Millisecond)
	l.as = l.as[:len(l.as)-3] // it is where it was, without being told again
	l.as = append(l.as, "HOLDFAST_CONFIG="+l.config)
	l.must(t, "boot", "ls")
	select {
	case <-wrote:
	case <-time.After(hangs):
		t.Fatal("the guest does not go on")
	}
	if again := l.service(); again == 0 || again == pid {
		t.Errorf("the service is %d, was %d", again, pid)
	}
	l.must(t, "boot", "migrate", "web-now", "--to", "LocalDS_1")
	write(10)
	if got, err := os.ReadFile(vm.File("disk0-flat.vmdk")); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the disk of the VM that was moved is not what its guest wrote, %v", err)
	}
	if vm.Datastore() != "LocalDS_1" || !vm.PoweredOn() {
		t.Errorf("the VM is on %s, runs: %v", vm.Datastore(), vm.PoweredOn())
	}
	l.wantNothing(t, 2)
	l.wantFrozen(t, "web/latest", web)
}

// find gives a VM by its name.
func (l *instantLab) find(t *testing.T, name string) *vspheretest.VM {
	t.Helper()
	var v struct{ ID string }
	if err := json.Unmarshal([]byte(l.must(t, l.platform("vms", name, "--json")...).out), &v); err != nil {
		t.Fatal(err)
	}
	return l.server.VM(v.ID)
}

// TestInstantStop: what a VM wrote is dropped, or kept and there when it is run again.
func TestInstantStop(t *testing.T) {
	l := newInstantLab(t)
	web := l.add("web", 4<<20)
	l.must(t, l.platform("backup", "web")...)
	boot := []string{"boot", "web/latest", "--on", "lab", "--allow", "127.0.0.1"}
	l.must(t, boot...)
	l.find(t, "web-instant").WriteAt(0, []byte("kept"), 1<<20)
	l.wants(t, 1, "when it has ended", "boot", "commit", "web-instant")
	l.wants(t, 1, "runs on lab", "boot", "screenshot", "web-instant", "--to", "/nonexistent/x.png")
	l.must(t, "boot", "stop", "web-instant", "--keep", "--patience", "0s")
	l.must(t, "boot", "commit", "web-instant")
	l.mu.Lock()
	copy(l.frozen[web][1<<20:], "kept")
	l.mu.Unlock()
	l.wantFrozen(t, "web/latest", web)
	if out := l.must(t, "boot", "ls").out; !strings.Contains(out, "stopped") {
		t.Errorf("boot ls says:\n%s", out)
	}
	l.must(t, "boot", "resume", "web-instant")
	got := make([]byte, 4)
	if _, err := l.find(t, "web-instant").ReadAt(0, got, 1<<20); err != nil || string(got) != "kept" {
		t.Errorf("run again it reads %q, %v", got, err)
	}
	l.must(t, "boot", "stop", "web-instant", "--patience", "0s")
	l.wantNothing(t, 1)
	l.wants(t, 64, `no source "lap"`, "boot", "web/latest", "--on", "lap")
	l.wants(t, 1, "not on this server", append(boot, "--host", "nowhere")...)
	l.wants(t, 64, "takes no --memory", append(boot, "--memory", "1G")...)
	l.wantNothing(t, 1)
}
