package whole

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// mounted is a mount and the process that serves it.
type mounted struct {
	*process
	dir string
}

// mount mounts r on a new directory until the test ends.
func (r *repository) mount(t *testing.T, args ...string) *mounted {
	t.Helper()
	dir := filepath.Join(newDir(t), "mnt")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return r.mountAt(t, dir, args...)
}

func (r *repository) mountAt(t *testing.T, dir string, args ...string) *mounted {
	t.Helper()
	t.Cleanup(func() { detach(dir) })
	m := &mounted{process: r.start(t, append([]string{"mount", dir}, args...)...), dir: dir}
	until(t, "the mount", func() bool {
		return !m.running() || strings.Contains(m.err.String(), "mounted at ")
	})
	if !m.running() {
		t.Fatalf("mount ended with %d:\n%s", m.code(t), m.err.String())
	}
	return m
}

// stop ends a mount by a signal and wants a clean end.
func (m *mounted) stop(t *testing.T, sig syscall.Signal) {
	t.Helper()
	if err := m.cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
	m.endedWell(t)
}

// endedWell wants exit 0 and nothing mounted.
func (m *mounted) endedWell(t *testing.T) {
	t.Helper()
	if code := m.code(t); code != 0 {
		t.Errorf("mount ended with %d:\n%s", code, m.err.String())
	}
	if kind := mountKind(t, m.dir); kind != "" {
		t.Errorf("%s is still mounted as %s", m.dir, kind)
	}
}

// mountKind is the type of file system mounted at dir, "" when none is.
func mountKind(t *testing.T, dir string) string {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	dir = strings.ReplaceAll(dir, " ", `\040`) // as mountinfo has it
	kind := ""
	for line := range strings.Lines(string(text)) {
		front, back, _ := strings.Cut(line, " - ")
		if strings.Fields(front)[4] == dir {
			kind = strings.Fields(back)[0]
		}
	}
	return kind
}

// detach takes away whatever is mounted at dir, for clean-up.
func detach(dir string) {
	for syscall.Unmount(dir, syscall.MNT_DETACH) == nil {
	}
}

// tool runs a program that must succeed and gives its output.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// loop attaches part of a file to a loop device until the test ends.
func loop(t *testing.T, file string, args ...string) (device string) {
	t.Helper()
	device = strings.TrimSpace(tool(t, "losetup", append(append([]string{"--find", "--show"}, args...), file)...))
	t.Cleanup(func() { exec.Command("losetup", "--detach", device).Run() })
	return device
}

// kernelMount mounts a device or file system until the test ends.
func kernelMount(t *testing.T, args ...string) (dir string, unmount func()) {
	t.Helper()
	dir = filepath.Join(newDir(t), "fs")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	tool(t, "mount", append(args, dir)...)
	t.Cleanup(func() { detach(dir) })
	return dir, func() {
		t.Helper()
		tool(t, "umount", dir)
	}
}

// Signals that end a mount well.
const (
	interrupt = syscall.SIGINT
	terminate = syscall.SIGTERM
)
