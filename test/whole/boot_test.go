package whole

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/test/testimage"
)

// booted is what `boot --json` says.
type booted struct {
	ID     string `json:"id"`
	Name   string `json:"name"`
	Path   string `json:"path"`
	State  string `json:"state"`
	Dir    string `json:"dir"`
	PID    int    `json:"pid"`
	Serial string `json:"serial"`
	NBD    string `json:"nbd"`
}

func (b booted) line(t *testing.T) *serial {
	t.Helper()
	return openSerial(t, strings.TrimPrefix(b.Serial, "unix:"))
}

// bootable is a repository with a Debian system that boots.
type bootable struct {
	*repository
	disk  testimage.Disk
	point point
	boots string
}

// bootableDisk makes the disk for the first test that wants it.
var bootableDisk = sync.OnceValues(func() (testimage.Disk, error) {
	return testimage.MakeBootable(context.Background(), filepath.Join(filepath.Dir(program), "debian.raw"), testimage.DefaultCache())
})

func newBootable(t *testing.T) *bootable {
	t.Helper()
	needs(t, "root", "fuse", "qemu-system-x86_64", "debootstrap", "grub-mkimage", "mcopy", "sgdisk")
	d := &bootable{repository: newRepository(t), boots: newDir(t)}
	var err error
	if d.disk, err = bootableDisk(); err != nil {
		t.Fatal(err)
	}
	d.point, _ = d.backup(t, d.disk.Path, "--vm", "debian")
	t.Cleanup(func() { // what a failure left
		files, _ := filepath.Glob(filepath.Join(d.boots, "*", "boot.json"))
		for _, file := range files {
			exec.Command("fuser", "-k", "-KILL", filepath.Join(filepath.Dir(file), "lock")).Run()
			var s struct{ Process struct{ PID int } }
			if b, err := os.ReadFile(file); err == nil && json.Unmarshal(b, &s) == nil && s.Process.PID > 0 {
				syscall.Kill(s.Process.PID, syscall.SIGKILL)
			}
		}
	})
	return d
}

// boot boots a point in the background.
func (d *bootable) boot(t *testing.T, args ...string) booted {
	t.Helper()
	return d.bootWith(t, append([]string{"boot", "--on", "qemu", "--bus", "virtio", "--memory", "512M"}, args...)...)
}

func (d *bootable) bootWith(t *testing.T, args ...string) (b booted) {
	t.Helper()
	res := d.must(t, append(args, "--background", "--json", "--boots", d.boots)...)
	if err := json.Unmarshal([]byte(res.out), &b); err != nil {
		t.Fatalf("%q: %v", res.out, err)
	}
	return b
}

func (d *bootable) list(t *testing.T) (all []booted) {
	t.Helper()
	for line := range strings.Lines(d.must(t, "boot", "ls", "--json", "--boots", d.boots).out) {
		var b booted
		if err := json.Unmarshal([]byte(line), &b); err != nil {
			t.Fatal(err)
		}
		all = append(all, b)
	}
	return all
}

func (d *bootable) state(t *testing.T, name string) string {
	t.Helper()
	for _, b := range d.list(t) {
		if b.Name == name {
			return b.State
		}
	}
	return "none"
}

// served is the process that serves the disks of a boot.
func (b booted) served(t *testing.T) int {
	t.Helper()
	out, err := exec.Command("fuser", filepath.Join(b.Dir, "lock")).Output()
	if err != nil {
		t.Fatalf("nobody serves %s: %v", b.Name, err)
	}
	var pid int
	if _, err := fmt.Sscan(string(out), &pid); err != nil {
		t.Fatal(err)
	}
	return pid
}

// file reads a file of the root partition of a point, by the kernel of this host.
func (d *bootable) file(t *testing.T, p, name string) (content string, there bool) {
	t.Helper()
	dir := newDir(t)
	d.must(t, "restore", p, "--to", dir)
	root := d.disk.On(filepath.Join(dir, "disk0.raw")).Root
	err := testimage.InMount(t.Context(), root, "ext4", filepath.Join(dir, "root"), func(root string) error {
		b, err := os.ReadFile(filepath.Join(root, name))
		content, there = string(b), err == nil
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return content, there
}

// unchanged compares the point that was booted with the disk it was made of.
func (d *bootable) unchanged(t *testing.T) {
	t.Helper()
	dir := newDir(t)
	d.must(t, "restore", d.point.path(), "--to", dir)
	same(t, filepath.Join(dir, "disk0.raw"), d.disk.Path)
}

// same compares two files.
func same(t *testing.T, a, b string) {
	t.Helper()
	if out, err := exec.Command("cmp", a, b).CombinedOutput(); err != nil {
		t.Fatalf("%s and %s differ: %s", a, b, out)
	}
}

// TestBoot boots a real Debian system from a point: by BIOS and by UEFI, over NBD with an overlay, through
// the death of the process that serves its disks; commits what it wrote as a new point, moves its disk away
// while it runs, and ends it in each way.
func TestBoot(t *testing.T) {
	d := newBootable(t)
	for _, firmware := range []string{"bios", "uefi"} {
		t.Run(firmware, func(t *testing.T) { d.life(t, firmware) })
	}
	d.unchanged(t)
	d.must(t, "verify", "--read-data")
}

func (d *bootable) life(t *testing.T, firmware string) {
	b := d.boot(t, d.point.path(), "--firmware", firmware, "--name", firmware)
	line := b.line(t)
	line.shell(t)
	efi := line.do(t, "ls -d /sys/firmware/efi || true")
	if got := strings.Contains(efi, "/sys/firmware/efi\n") && !strings.Contains(efi, "cannot"); got != (firmware == "uefi") {
		t.Errorf("booted by UEFI: %v\n%s", got, efi)
	}
	if nics := line.do(t, "ls /sys/class/net"); strings.TrimSpace(nics) != "lo" {
		t.Errorf("it has a network: %q", nics)
	}
	line.do(t, "echo first > /root/first && sync")
	d.wants(t, 11, "served by another process", "boot", "resume", b.ID, "--boots", d.boots)
	d.wants(t, 1, "no such boot", "boot", "stop", "nobody", "--boots", d.boots)

	// While nobody serves its disks the guest waits, and then goes on.
	if err := syscall.Kill(b.served(t), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "the server to be gone", func() bool { return d.state(t, b.Name) == "waiting" })
	fmt.Fprint(line.conn, "dd if=/dev/urandom of=/root/during bs=64k count=16 conv=fsync; sync; echo during''-done\n")
	time.Sleep(time.Second)
	again := d.bootWith(t, "boot", "resume", b.ID)
	if again.ID != b.ID || again.PID != b.PID {
		t.Errorf("resumed as %+v, was %+v", again, b)
	}
	if !line.await("during-done", 2*time.Minute) {
		t.Fatalf("the guest did not go on:\n%s", line.said.String())
	}
	sum := line.do(t, "sha256sum < /root/during")

	// A point of what it is now, while it runs.
	res := d.must(t, "boot", "commit", b.Name, "--boots", d.boots, "--json", "--tag", "after")
	var p point
	if err := json.Unmarshal([]byte(res.out), &p); err != nil {
		t.Fatal(err)
	}
	if p.Read > 64<<20 || p.Stored > 32<<20 || p.Read == 0 {
		t.Errorf("the commit read %d bytes and stored %d", p.Read, p.Stored)
	}
	if got, _ := d.file(t, p.path(), "root/first"); got != "first\n" {
		t.Errorf("the new point has %q in the file", got)
	}
	if _, there := d.file(t, d.point.path(), "root/first"); there {
		t.Error("the point that was booted has the file")
	}

	// Its disk goes to a file while it runs.
	moved := filepath.Join(newDir(t), "moved.raw")
	d.must(t, "boot", "migrate", b.Name, "--to", moved, "--boots", d.boots)
	line.do(t, "echo last > /root/last && sync")
	d.wants(t, 1, "was moved to", "boot", "commit", b.Name, "--boots", d.boots)
	if again := line.do(t, "echo 3 > /proc/sys/vm/drop_caches; sha256sum < /root/during"); again != sum {
		t.Errorf("after the move the file reads as %q, not %q", again, sum)
	}

	// The power button. Debian shuts down.
	d.must(t, "boot", "stop", b.Name, "--boots", d.boots, "--keep", "--patience", "3m")
	if log, err := os.ReadFile(filepath.Join(b.Dir, "serial.log")); err != nil || !bytes.Contains(log, []byte("Power down")) {
		t.Errorf("the guest did not shut down: %v\n%.2000s", err, log[max(0, len(log)-2000):])
	}
	if got := d.state(t, b.Name); got != "stopped" {
		t.Errorf("it is %s", got)
	}
	err := testimage.InMount(t.Context(), d.disk.On(moved).Root, "ext4", moved+".mnt", func(root string) error {
		for name, want := range map[string]string{"root/first": "first\n", "root/last": "last\n"} {
			if got, err := os.ReadFile(filepath.Join(root, name)); string(got) != want {
				t.Errorf("%s in the file it was moved to: %q, %v", name, got, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	d.must(t, "boot", "stop", b.Name, "--boots", d.boots)
	if _, err := os.Stat(b.Dir); !os.IsNotExist(err) {
		t.Errorf("%s is still there: %v", b.Dir, err)
	}
}

// TestBootKept: what a VM wrote is there when it is run again, and in a commit while it does not run.
func TestBootKept(t *testing.T) {
	d := newBootable(t)
	b := d.boot(t, d.point.path())
	line := b.line(t)
	line.shell(t)
	line.do(t, "echo kept > /root/kept && sync")
	d.must(t, "boot", "stop", b.Name, "--boots", d.boots, "--keep", "--patience", "0s")
	res := d.must(t, "boot", "commit", b.Name, "--boots", d.boots, "--json")
	var p point
	if err := json.Unmarshal([]byte(res.out), &p); err != nil {
		t.Fatal(err)
	}
	if got, _ := d.file(t, p.path(), "root/kept"); got != "kept\n" {
		t.Errorf("the new point has %q in the file", got)
	}
	b = d.bootWith(t, "boot", "resume", b.Name)
	line = b.line(t)
	line.shell(t)
	if got := line.do(t, "cat /root/kept"); got != "kept\n" {
		t.Errorf("run again, the file holds %q", got)
	}
	moved := filepath.Join(newDir(t), "moved.raw")
	d.must(t, "boot", "stop", b.Name, "--boots", d.boots, "--keep", "--patience", "0s")
	d.must(t, "boot", "migrate", b.Name, "--boots", d.boots, "--to", moved)
	d.wants(t, 1, "is in "+moved+" already", "boot", "migrate", b.Name, "--boots", d.boots, "--to", moved+"2")
	d.must(t, "boot", "stop", b.Name, "--boots", d.boots)
	if got, err := os.Stat(moved); err != nil || got.Size() != d.disk.Size {
		t.Errorf("%s: %v", moved, err)
	}
	d.unchanged(t)
}

// TestBootThroughMount boots QEMU from the files of a mount, in each format: it reads them alone, and writes to
// a file of its own.
func TestBootThroughMount(t *testing.T) {
	d := newBootable(t)
	m := d.mount(t)
	for i, form := range []struct{ file, format string }{
		{"disk0.raw", "raw"}, {"disk0.vmdk", "vmdk"}, {"disk0.vhdx", "vhdx"}, {"disk0.qcow2", "qcow2"},
	} {
		firmware := []string{"bios", "uefi"}[i%2]
		t.Run(form.format+" "+firmware, func(t *testing.T) {
			dir := newDir(t)
			sock := filepath.Join(dir, "serial.sock")
			args := []string{"-nodefaults", "-machine", "q35,accel=tcg", "-cpu", "max", "-smp", "2", "-m", "512", "-display", "none",
				"-serial", "unix:" + sock + ",server=on,wait=off",
				"-drive", "if=virtio,snapshot=on,format=" + form.format + ",file=" + filepath.Join(m.dir, d.point.path(), form.file)}
			if firmware == "uefi" {
				args = append(args, "-drive", "if=pflash,unit=0,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd",
					"-drive", "if=pflash,unit=1,format=raw,snapshot=on,file=/usr/share/OVMF/OVMF_VARS_4M.fd")
			}
			cmd := exec.Command("qemu-system-x86_64", args...)
			cmd.Dir, cmd.Stderr = dir, io.Discard
			cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer cmd.Wait()
			defer cmd.Process.Kill()
			line := openSerial(t, sock)
			line.shell(t)
			line.do(t, "echo here > /root/here && sync && cat /root/here")
		})
	}
	m.stop(t, syscall.SIGTERM)
	d.unchanged(t)
}

// TestVerifyBoot: a point that boots gives a sign, one that does not is damage; both are kept with the point.
func TestVerifyBoot(t *testing.T) {
	d := newBootable(t)
	verify := func(code int, text string, args ...string) {
		t.Helper()
		args = append([]string{"verify", "--boot", "--boots", d.boots, "--memory", "512M", "--json"}, args...)
		if code == 0 {
			d.must(t, args...)
		} else {
			d.wants(t, code, text, args...)
		}
	}
	proof := func(p point) (res struct {
		OK        bool `json:"ok"`
		Sign, Why string
	}) {
		t.Helper()
		var s struct {
			Proof json.RawMessage `json:"boot_proof"`
		}
		if err := json.Unmarshal([]byte(d.must(t, "show", p.path(), "--json").out), &s); err != nil || s.Proof == nil {
			t.Fatalf("show tells of no boot: %v", err)
		}
		if err := json.Unmarshal(s.Proof, &res); err != nil {
			t.Fatal(err)
		}
		return res
	}
	verify(0, "", d.point.path(), "--bus", "virtio", "--sign", "agent")
	if p := proof(d.point); !p.OK || !strings.Contains(p.Sign, "agent") {
		t.Errorf("by its agent: %+v", p)
	}
	verify(0, "", d.point.path(), "--bus", "nvme", "--firmware", "uefi", "--sign", "serial:automatic login")
	if p := proof(d.point); !p.OK || !strings.Contains(p.Sign, "automatic login") {
		t.Errorf("by its serial line: %+v", p)
	}
	dir := newDir(t)
	d.must(t, "show", d.point.path(), "--proof", dir)
	if b, err := os.ReadFile(filepath.Join(dir, "screen.png")); err != nil || !bytes.HasPrefix(b, []byte("\x89PNG\r\n")) {
		t.Errorf("no picture: %v", err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "serial.log")); err != nil || !bytes.Contains(b, []byte("automatic login")) {
		t.Errorf("no log: %v", err)
	}
	empty := filepath.Join(newDir(t), "empty.raw")
	if err := os.WriteFile(empty, make([]byte, 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	bad, _ := d.backup(t, empty, "--vm", "empty")
	verify(4, "1 of 1 points do not boot", bad.path(), "--boot-limit", "15s")
	if p := proof(bad); p.OK || !strings.Contains(p.Why, "no sign of life") {
		t.Errorf("an empty disk: %+v", p)
	}
	if left := d.list(t); len(left) > 0 {
		t.Errorf("boots are left: %+v", left)
	}
	d.unchanged(t)
}
