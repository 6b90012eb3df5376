package whole

import (
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// export serves a point and gives the URI of a disk.
func (r *repository) export(t *testing.T, p point, args ...string) (x *process, uri string) {
	t.Helper()
	sock := filepath.Join(newDir(t), "nbd.sock")
	x = r.start(t, append([]string{"export", p.path(), "--nbd", "unix:" + sock}, args...)...)
	until(t, "the export", func() bool { return !x.running() || strings.Contains(x.out.String(), "served by NBD at ") })
	if !x.running() {
		t.Fatalf("export ended with %d:\n%s", x.code(t), x.err.String())
	}
	return x, "nbd+unix:///disk0?socket=" + sock
}

// ends ends a process by a signal.
func (p *process) ends(t *testing.T, sig syscall.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
	if code := p.code(t); sig == syscall.SIGTERM && code != 0 {
		t.Errorf("it ended with %d:\n%s", code, p.err.String())
	}
}

// TestExport: what NBD clients read of a point is its disk; they cannot write, or what they write is in an overlay
// that is kept when asked for, also when the process is killed.
func TestExport(t *testing.T) {
	needs(t, "qemu-img", "qemu-io", "nbdcopy")
	t.Parallel()
	r := newRepository(t)
	src := newText(t, newDir(t)+"/disk.raw", 7, 9<<20+512)
	p, _ := r.backup(t, "--vm", "vm", src.file)

	x, uri := r.export(t, p)
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", src.file, uri)
	copied := filepath.Join(newDir(t), "copy.raw")
	tool(t, "nbdcopy", uri, copied)
	same(t, copied, src.file)
	if out, err := exec.Command("qemu-io", "-f", "raw", "-c", "write 0 512", uri).CombinedOutput(); err == nil && !strings.Contains(string(out), "read-only") {
		t.Errorf("a point can be written: %s", out)
	}
	x.ends(t, syscall.SIGTERM)

	kept := filepath.Join(newDir(t), "kept")
	x, uri = r.export(t, p, "--writable", "--overlay", kept)
	tool(t, "qemu-io", "-f", "raw", "-c", "write -P 0x5a 4096 8192", "-c", "flush", "-c", "write -P 0x6b 70000 1000", uri)
	x.ends(t, syscall.SIGKILL)
	x, uri = r.export(t, p, "--writable", "--overlay", kept)
	tool(t, "qemu-io", "-f", "raw", "-r", "-c", "read -P 0x5a 4096 8192", "-c", "read -P 0x6b 70000 1000", uri)
	x.ends(t, syscall.SIGTERM)

	x, uri = r.export(t, p)
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", src.file, uri)
	x.ends(t, syscall.SIGTERM)
	r.wants(t, 64, "no address", "export", p.path(), "--nbd", "nowhere")
	r.wants(t, 1, "no disk", "export", p.path(), "--nbd", "unix:"+filepath.Join(newDir(t), "s"), "--disk", "disk7")
}
