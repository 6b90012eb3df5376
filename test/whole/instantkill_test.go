package whole

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/nfs/nfstest"
)

// TestInstantPin: a point that a boot was made from stays while it lasts, whether anybody serves the boot or not, and not longer.
func TestInstantPin(t *testing.T) {
	l := newInstantLab(t)
	web := l.add("web", 4<<20)
	l.must(t, l.platform("backup", "web")...)
	want := bytes.Clone(l.frozen[web])
	first := l.points(t)[0]
	l.must(t, "boot", "web/latest", "--on", "lab", "--allow", "127.0.0.1")
	l.must(t, l.platform("backup", "web")...)
	if err := syscall.Kill(l.service(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "the service is dead", func() bool { return l.service() == 0 })
	if out := l.must(t, "forget", "web", "--keep-last", "1").out; !strings.Contains(out, "boot web-instant on ") {
		t.Errorf("forget says:\n%s", out)
	}
	l.wants(t, 1, "point is in use: boot web-instant on ", "forget", first.path())
	l.must(t, "gc")
	l.must(t, "boot", "ls") // serves it again
	got := make([]byte, len(want))
	if _, err := l.find(t, "web-instant").ReadAt(0, got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("after gc the guest reads something else, %v", err)
	}
	l.must(t, "boot", "stop", "web-instant", "--keep", "--patience", "0s")
	l.wants(t, 1, "point is in use", "forget", first.path())
	l.must(t, "boot", "stop", "web-instant")
	l.wantNothing(t, 1)
	if out := l.must(t, "forget", "web", "--keep-last", "1", "--json").out; !strings.Contains(out, `"forgotten":1`) {
		t.Errorf("forget says:\n%s", out)
	}
	// Of a boot that is lost, whose pin nobody removed.
	l.must(t, "boot", "web/latest", "--on", "lab", "--allow", "127.0.0.1")
	l.must(t, "boot", "stop", "web-instant", "--keep", "--patience", "0s")
	second := l.points(t)[0]
	l.must(t, l.platform("backup", "web")...)
	dirs, err := filepath.Glob(filepath.Join(l.boots, "????????"))
	if err != nil || len(dirs) != 1 {
		t.Fatal(dirs, err)
	}
	elsewhere := l.boots + ".away" // as if its file system were not mounted
	if err := os.Rename(l.boots, elsewhere); err != nil {
		t.Fatal(err)
	}
	l.wants(t, 1, "point is in use", "forget", second.path())
	if err := os.Rename(elsewhere, l.boots); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(dirs[0]); err != nil {
		t.Fatal(err)
	}
	l.must(t, "forget", second.path(), "--dry-run")
	l.must(t, "forget", second.path())
	l.wantNothing(t, 1)
}

// callKiller kills a command before one of the vCenter's methods runs, which runs all the same.
type callKiller struct {
	mu    sync.Mutex
	calls []string
	at    func(calls []string) bool
	pid   int
}

func (k *callKiller) call(method string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.pid == 0 {
		return
	}
	if k.calls = append(k.calls, method); k.at(k.calls) {
		syscall.Kill(k.pid, syscall.SIGKILL)
	}
}

// run runs a command that is killed when at says so. It gives the calls that it made, and whether it was.
func (k *callKiller) run(t *testing.T, l *instantLab, at func([]string) bool, args ...string) (calls []string, killed bool) {
	t.Helper()
	k.mu.Lock()
	k.calls, k.at = nil, at
	p := l.start(t, args...)
	k.pid = p.cmd.Process.Pid
	k.mu.Unlock()
	code := p.code(t)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.pid = 0
	if code != 0 && code != -1 {
		t.Fatalf("%v, to be killed after %v: exit %d\n%s", args, k.calls, code, p.err.String())
	}
	return k.calls, code == -1
}

// TestInstantKilled kills commands at the calls by which they change something at the vCenter, and at the next ones, or, with HOLDFAST_TEST_KILLS=all, at each
// of their calls. After the next command nothing is left of them, or the VM runs as if nothing had happened, with what its guest wrote.
func TestInstantKilled(t *testing.T) {
	l := newInstantLab(t)
	l.add("web", 4<<20)
	l.must(t, l.platform("backup", "web")...)
	k := &callKiller{}
	h := l.allHooks(t)
	h.OnAny = k.call
	l.server.SetHooks(h)
	boot := []string{"boot", "web/latest", "--on", "lab", "--allow", "127.0.0.1", "--name", "now"}
	stop := []string{"boot", "stop", "now", "--patience", "0s"}
	for _, c := range []struct {
		name string
		args []string
		kept bool // with what the guest wrote
	}{
		{name: "boot", args: boot},
		{name: "stop", args: stop},
		{name: "keep", args: append(stop, "--keep"), kept: true},
		{name: "resume", args: []string{"boot", "resume", "now"}, kept: true},
		{name: "migrate", args: []string{"boot", "migrate", "now", "--to", "LocalDS_1"}, kept: true},
	} {
		run := func(at func([]string) bool) (calls []string, killed bool) {
			if c.name != "boot" {
				l.must(t, boot...)
				l.find(t, "now").WriteAt(0, []byte("written by the guest"), 1<<20)
			}
			if c.name == "resume" {
				l.must(t, append(stop, "--keep")...)
			}
			calls, killed = k.run(t, l, at, c.args...)
			l.settled(t, c.name, c.kept)
			if t.Failed() {
				t.Fatalf("%s was killed at %v", c.name, calls)
			}
			return calls, killed
		}
		all, _ := run(func([]string) bool { return false })
		var kills []string
		for n := range all {
			method := all[n]
			changes := !slices.Contains([]string{"RetrievePropertiesEx", "CreateContainerView", "DestroyView", "Logout", "Login", "RetrieveServiceContent"}, method)
			ats := map[string]func([]string) bool{}
			if changes {
				ats[method] = func(calls []string) bool { return calls[len(calls)-1] == method }
				ats["after "+method] = func(calls []string) bool { return len(calls) > 1 && calls[len(calls)-2] == method }
			} else if os.Getenv("HOLDFAST_TEST_KILLS") == "all" {
				ats[method] = func(calls []string) bool { return len(calls) == n+1 }
			}
			for what, at := range ats {
				if _, killed := run(at); killed {
					kills = append(kills, what)
				}
			}
		}
		t.Logf("%s: %d calls, killed %d times, at %v", c.name, len(all), len(kills), kills)
		if len(kills) < 2 {
			t.Errorf("%s was killed %d times only", c.name, len(kills))
		}
	}
}

// settled looks at what the next command makes of a boot, and ends it.
func (l *instantLab) settled(t *testing.T, name string, kept bool) {
	t.Helper()
	var b struct{ State string }
	until(t, name+" to be settled", func() bool {
		b.State = ""
		out := l.must(t, "boot", "ls", "--json").out
		if out != "" {
			if err := json.Unmarshal([]byte(out), &b); err != nil {
				t.Fatalf("%s: %v", out, err)
			}
		}
		return slices.Contains([]string{"", "running", "stopped"}, b.State)
	})
	moved := name == "migrate" && b.State == ""
	if b.State == "stopped" {
		l.must(t, "boot", "resume", "now")
	}
	if kept || b.State != "" {
		vm := l.find(t, "now")
		if vm == nil {
			t.Fatalf("%s: the VM is gone, though the boot is %q", name, b.State)
		}
		got := make([]byte, 20)
		if _, err := vm.ReadAt(0, got, 1<<20); kept && (err != nil || string(got) != "written by the guest") {
			t.Errorf("%s: what the guest wrote is %q, %v", name, got, err)
		}
		if !vm.PoweredOn() {
			t.Errorf("%s: the VM does not run", name)
		}
		if moved {
			if vm.Datastore() != "LocalDS_1" {
				t.Errorf("%s: the VM is on %s", name, vm.Datastore())
			}
			vm.PowerOff()
			vm.Destroy()
		}
	}
	if b.State != "" {
		l.must(t, "boot", "stop", "now", "--patience", "0s")
	}
	l.wantNothing(t, 1)
	l.unmountAll()
}

// TestInstantAwaited: while a boot cannot be served, its host is told to ask later, not that its files are gone.
func TestInstantAwaited(t *testing.T) {
	l := newInstantLab(t)
	l.add("web", 1<<20)
	l.must(t, l.platform("backup", "web")...)
	l.must(t, "boot", "web/latest", "--on", "lab", "--allow", "127.0.0.1")
	dirs, err := filepath.Glob(filepath.Join(l.boots, "????????"))
	if err != nil || len(dirs) != 1 {
		t.Fatal(dirs, err)
	}
	dial := func() *nfstest.Client {
		c, err := nfstest.Dial("127.0.0.1:"+l.port, nfstest.Root)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	root, err := dial().Mount("/" + filepath.Base(dirs[0]))
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(l.service(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "the service is dead", func() bool { return l.service() == 0 })
	lock, err := os.OpenFile(filepath.Join(dirs[0], "lock"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	until(t, "the lock of the boot", func() bool { return syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil })
	if res := l.must(t, "boot", "ls"); !strings.Contains(res.err, "served by another process") {
		t.Errorf("boot ls says:\n%s", res.err)
	}
	c := dial()
	if _, err := c.Getattr(root); !errors.Is(err, nfstest.Jukebox) {
		t.Errorf("meanwhile: %v", err)
	}
	lock.Close()
	until(t, "the boot to be served", func() bool {
		_, err := c.Getattr(root)
		if err != nil && !errors.Is(err, nfstest.Jukebox) {
			t.Fatal(err)
		}
		return err == nil
	})
	l.must(t, "boot", "stop", "web-instant", "--patience", "0s")
	l.wantNothing(t, 1)
}
