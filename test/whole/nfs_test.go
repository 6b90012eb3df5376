package whole

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/test/testimage"
)

// network is a network of its own, of which this computer is all there is: ports 111 and 2049 are free in it.
type network struct{ enter []string } // words that run a command in it

func newNetwork(t *testing.T) *network {
	t.Helper()
	needs(t, "root", "unshare", "nsenter", "ip")
	keeper := exec.Command("unshare", "-n", "sleep", "infinity")
	keeper.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := keeper.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		keeper.Process.Kill()
		keeper.Wait()
	})
	here, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	n := &network{[]string{"nsenter", "-t", fmt.Sprint(keeper.Process.Pid), "-n"}}
	until(t, "the network", func() bool {
		there, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", keeper.Process.Pid))
		return err == nil && there != here
	})
	n.tool(t, "ip", "link", "set", "lo", "up")
	return n
}

// tool runs a program in the network; it must succeed.
func (n *network) tool(t *testing.T, args ...string) string {
	t.Helper()
	args = append(n.enter[1:len(n.enter):len(n.enter)], args...)
	return tool(t, n.enter[0], args...)
}

// exportNFS serves a point in the network.
func (r *repository) exportNFS(t *testing.T, n *network, p point, args ...string) *process {
	t.Helper()
	in := *r
	in.as = append(append([]string{}, r.as...), n.enter...)
	x := in.start(t, append([]string{"export", p.path(), "--nfs", "127.0.0.1:2049"}, args...)...)
	until(t, "the export", func() bool { return !x.running() || strings.Contains(x.out.String(), "served by NFS at ") })
	if !x.running() {
		t.Fatalf("export ended with %d:\n%s", x.code(t), x.err.String())
	}
	return x
}

// TestExportNFS: what NFS clients read of a point is its disk in each format, and what they write is in an overlay, also when the server is killed.
func TestExportNFS(t *testing.T) {
	needs(t, "qemu-img", "qemu-io", "nfs-ls", "nfs-cp", "nfs-cat")
	n := newNetwork(t)
	r := newRepository(t)
	src := newText(t, newDir(t)+"/disk.raw", 7, 9<<20+512)
	p, _ := r.backup(t, "--vm", "vm", src.file)
	const at = "nfs://127.0.0.1/vm/"

	x := r.exportNFS(t, n, p)
	if out := n.tool(t, "nfs-ls", at); !strings.Contains(out, "disk0.vhdx") || !strings.Contains(out, fmt.Sprint(9<<20+512)) || strings.Contains(out, "files") {
		t.Errorf("the export has:\n%s", out)
	}
	if out := n.tool(t, "nfs-cat", at+"point.json"); !strings.Contains(out, p.ID) {
		t.Errorf("point.json is:\n%s", out)
	}
	n.tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", src.file, at+"disk0.raw")
	dir := newDir(t)
	for _, format := range []string{"qcow2", "vhdx", "raw"} {
		file := filepath.Join(dir, "disk0."+format)
		n.tool(t, "nfs-cp", at+"disk0."+format, file)
		tool(t, "qemu-img", "compare", "-f", "raw", "-F", format, src.file, file)
	}
	args := append(n.enter[1:len(n.enter):len(n.enter)], "qemu-io", "-f", "raw", "-c", "write 0 512", at+"disk0.raw")
	if out, err := exec.Command(n.enter[0], args...).CombinedOutput(); err == nil && !strings.Contains(string(out), "failed") && !strings.Contains(string(out), "ead-only") {
		t.Errorf("a point can be written: %s", out)
	}
	x.ends(t, syscall.SIGTERM)

	kept := filepath.Join(newDir(t), "kept")
	x = r.exportNFS(t, n, p, "--writable", "--overlay", kept)
	n.tool(t, "qemu-io", "-f", "raw", "-c", "write -P 0x5a 4096 8192", "-c", "flush", "-c", "write -P 0x6b 70000 1000", at+"disk0.raw")
	x.ends(t, syscall.SIGKILL)
	x = r.exportNFS(t, n, p, "--writable", "--overlay", kept)
	n.tool(t, "qemu-io", "-f", "raw", "-r", "-c", "read -P 0x5a 4096 8192", "-c", "read -P 0x6b 70000 1000", at+"disk0.raw")
	x.ends(t, syscall.SIGTERM)
	r.must(t, "restore", p.path(), "--to", dir+"/again")
	same(t, dir+"/again/disk0.raw", src.file)
	r.wants(t, 64, "no NFS client knows unix sockets", "export", p.path(), "--nfs", "unix:/x")
	r.wants(t, 64, "--allow goes with --nfs", "export", p.path(), "--nbd", ":1", "--allow", "192.0.2.1")
	r.wants(t, 64, `"x" is no address`, "export", p.path(), "--nfs", ":1", "--allow", "x")
}

// TestBootOverNFS boots a real Debian system whose disk is a file of an export; the server is killed while it writes, and another one takes over.
func TestBootOverNFS(t *testing.T) {
	needs(t, "nfs-cp")
	d := newBootable(t)
	n := newNetwork(t)
	dir, kept := newDir(t), filepath.Join(newDir(t), "kept")
	x := d.exportNFS(t, n, d.point, "--writable", "--overlay", kept)
	sock := filepath.Join(dir, "serial.sock")
	args := append(n.enter[1:len(n.enter):len(n.enter)], "qemu-system-x86_64", "-nodefaults", "-machine", "q35,accel=tcg", "-cpu", "max", "-smp", "2", "-m", "512", "-display", "none",
		"-serial", "unix:"+sock+",server=on,wait=off", "-drive", "if=virtio,format=raw,rerror=stop,werror=stop,file=nfs://127.0.0.1/debian/disk0-flat.vmdk")
	cmd := exec.Command(n.enter[0], args...)
	cmd.Dir, cmd.Stderr = dir, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); cmd.Wait() }()
	defer func() { cmd.Process.Kill(); <-ended }()
	line := openSerial(t, sock)
	line.shell(t)
	line.do(t, "echo synced > /root/synced && sync")
	fmt.Fprint(line.conn, "dd if=/dev/urandom of=/root/during bs=64k count=256 conv=fsync; sync; echo during''-done\n")
	time.Sleep(time.Second)
	x.ends(t, syscall.SIGKILL)
	time.Sleep(3 * time.Second)
	x = d.exportNFS(t, n, d.point, "--writable", "--overlay", kept)
	if !line.await("during-done", 3*time.Minute) {
		t.Fatalf("the guest did not go on:\n%s", line.said.String())
	}
	sum := strings.Fields(line.do(t, "echo 3 > /proc/sys/vm/drop_caches; sha256sum < /root/during"))[0]
	fmt.Fprint(line.conn, "systemctl poweroff\n")
	select {
	case <-ended:
	case <-time.After(bootLimit):
		t.Fatal("the guest does not shut down")
	}
	x.ends(t, syscall.SIGTERM)
	// What the guest wrote is on the disk, by another client than it used.
	x = d.exportNFS(t, n, d.point, "--writable", "--overlay", kept)
	copied := filepath.Join(dir, "disk.raw")
	n.tool(t, "nfs-cp", "nfs://127.0.0.1/debian/disk0.raw", copied)
	x.ends(t, syscall.SIGTERM)
	err := testimage.InMount(t.Context(), d.disk.On(copied).Root, "ext4", copied+".mnt", func(root string) error {
		if got, err := os.ReadFile(filepath.Join(root, "root/synced")); string(got) != "synced\n" {
			t.Errorf("the file that was synced holds %q, %v", got, err)
		}
		out, err := exec.Command("sha256sum", filepath.Join(root, "root/during")).Output()
		if err != nil || !strings.HasPrefix(string(out), sum) {
			t.Errorf("the file that was written while the server was killed is %s, not %s, %v", out, sum, err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	tool(t, "e2fsck", "-fn", fmt.Sprintf("%s?offset=%d", copied, d.disk.Root.Off))
	d.unchanged(t)
}
