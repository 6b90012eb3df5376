package whole

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// endService kills the NFS service.
func (l *instantLab) endService(t *testing.T) {
	t.Helper()
	if pid := l.service(); pid == 0 || syscall.Kill(pid, syscall.SIGKILL) != nil {
		t.Fatalf("the service is process %d", pid)
	}
	until(t, "the service is dead", func() bool { return l.service() == 0 })
}

// TestInstantOdd: what somebody does to a VM that was booted, on the platform or here, is said, and costs nothing of what its guest wrote.
func TestInstantOdd(t *testing.T) {
	l := newInstantLab(t)
	l.add("web", 4<<20)
	l.must(t, l.platform("backup", "web")...)
	boot := []string{"boot", "web/latest", "--on", "lab", "--allow", "127.0.0.1", "--name", "now"}
	ls := func(want string) {
		t.Helper()
		if out := l.must(t, "boot", "ls", "--json").out; !strings.Contains(out, want) {
			t.Errorf("boot ls does not say %s:\n%s", want, out)
		}
	}
	l.must(t, boot...)
	vm := l.find(t, "now")
	vm.WriteAt(0, []byte("kept"), 1<<20)

	// Switched off there.
	vm.PowerOff()
	ls(`"state":"off"`)
	l.must(t, "boot", "resume", "now")
	ls(`"state":"running"`)

	// The service is to come back where hosts look for it, and by whatever name the repository is called.
	l.endService(t)
	as := l.as
	l.as = append(l.as[:len(l.as):len(l.as)], "HOLDFAST_NFS=127.0.0.1:32049")
	if res := l.must(t, "boot", "ls"); !strings.Contains(res.err, "NFS stays at 127.0.0.1:"+l.port) {
		t.Errorf("boot ls with another address says:\n%s", res.err)
	}
	l.as = as
	got := make([]byte, 4)
	if _, err := vm.ReadAt(0, got, 1<<20); err != nil || string(got) != "kept" {
		t.Errorf("the guest reads %q, %v", got, err)
	}
	l.endService(t)
	link := filepath.Join(newDir(t), "link")
	if err := os.Symlink(l.dir, link); err != nil {
		t.Fatal(err)
	}
	serve := l.start(t, "-r", link, "boot", "serve")
	until(t, "the service by another name", func() bool { return l.service() != 0 })
	if _, err := vm.ReadAt(0, got, 1<<20); err != nil || string(got) != "kept" {
		t.Errorf("by another name of the repository the guest reads %q, %v\n%s", got, err, serve.err.String())
	}

	// A snapshot there: the disks here are not all.
	vm.AddUserSnapshot("admin's")
	if res := l.must(t, "boot", "stop", "now", "--keep", "--patience", "0s"); !strings.Contains(res.err, "not all that it wrote") {
		t.Errorf("boot stop --keep says:\n%s", res.err)
	}
	l.wants(t, 1, "not all that it wrote", "boot", "commit", "now")
	l.must(t, "boot", "stop", "now")

	// Deleted there.
	l.must(t, boot...)
	vm = l.find(t, "now")
	vm.PowerOff()
	vm.Destroy()
	ls(`"state":"gone"`)
	l.wants(t, 1, "is not on lab any more", "boot", "resume", "now")
	l.must(t, "boot", "stop", "now", "--keep")
	l.must(t, "boot", "stop", "now")

	// Moved away there.
	l.must(t, boot...)
	vm = l.find(t, "now")
	vm.WriteAt(0, []byte("kept"), 1<<20)
	vm.MoveToDatastore("LocalDS_1")
	if out := l.must(t, "boot", "stop", "now", "--keep", "--patience", "0s", "--json").out; !strings.Contains(out, `"kept":false,"moved":true`) {
		t.Errorf("boot stop of one that was moved away says:\n%s", out)
	}
	if _, err := vm.ReadAt(0, got, 1<<20); err != nil || string(got) != "kept" || !vm.PoweredOn() {
		t.Errorf("moved away the guest reads %q, %v, and runs: %v", got, err, vm.PoweredOn())
	}
	l.wantNothing(t, 2)
}

// TestInstantFull: in a repository without room, too, the point of a boot is kept from being forgotten.
func TestInstantFull(t *testing.T) {
	l := newInstantLab(t)
	l.add("web", 4<<20)
	dir := filepath.Dir(l.dir)
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=192m", "none", dir).CombinedOutput(); err != nil {
		t.Fatalf("%s, %v", out, err)
	}
	t.Cleanup(func() { exec.Command("umount", "-l", dir).Run() })
	l.must(t, "init", l.dir)
	l.must(t, l.platform("backup", "web")...)
	first := l.points(t)[0]
	l.must(t, l.platform("backup", "web")...)
	fill, err := os.Create(filepath.Join(dir, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	defer fill.Close()
	for size := 1 << 20; size >= 512; {
		if _, err := fill.Write(make([]byte, size)); err != nil {
			size /= 2
		}
	}
	res := l.must(t, "boot", first.path(), "--on", "lab", "--allow", "127.0.0.1", "--name", "now")
	if strings.Contains(res.err, "nothing keeps") {
		t.Errorf("there was room set aside, but:\n%s", res.err)
	}
	l.wants(t, 1, "point is in use", "forget", first.path())
	l.must(t, "forget", "web", "--keep-last", "1")
	if n := len(l.points(t)); n != 2 {
		t.Errorf("%d points are left", n)
	}
	l.must(t, "boot", "stop", "now", "--patience", "0s")
	l.wantNothing(t, 1)
	l.endService(t) // before the repository goes
}
