package guesttest

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// guestTime is how long a guest may run. It is emulated, for a nested KVM may hang; it starts within 10 s or so.
const guestTime = 8 * time.Minute

// Guest boots a small machine with a kernel of Debian's, not the host's, whose disks /dev/vda, /dev/vdb … are these raw
// images, and runs a shell script there as root; it returns what the script wrote to stdout. The script stops at the first
// command that fails (set -e), which fails the test. Programs of the host that extra names, or gives the path of, are there, beside busybox, lvm, mdadm and
// cryptsetup.
//
// It is for what the host's kernel cannot do: device-mapper, md, old formats. It skips the test unless all tests are asked for.
func Guest(t *testing.T, disks []string, script string, extra ...string) string {
	t.Helper()
	return boot(t, disks, script, nil, extra)
}

// boot is Guest; programs are further ones, by the names that they have in the guest.
func boot(t *testing.T, disks []string, script string, programs map[string]string, extra []string) string {
	t.Helper()
	if os.Getenv("HOLDFAST_TEST_ALL") == "" {
		t.Skip("boots a guest, which takes a minute; HOLDFAST_TEST_ALL asks for it")
	}
	Needs(t, "qemu-system-x86_64", "busybox", "lvm", "mdadm", "cryptsetup", "apt-get", "dpkg-deb")
	kernel, modules := guestKernel(t)
	dir := t.TempDir()
	initramfs := filepath.Join(dir, "initramfs")
	if err := os.WriteFile(initramfs, guestFiles(t, modules, script, programs, extra), 0o600); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "out")
	// Of a newer CPU the kernel would take "rep movsb" to copy, which is emulated byte by byte, and of an older one of Intel's change
	// page tables at every system call: both double the time.
	args := []string{"-accel", "tcg", "-cpu", "EPYC", "-m", "1200", "-smp", "2", "-nodefaults", "-no-reboot", "-display", "none",
		"-kernel", kernel, "-initrd", initramfs, "-append", "console=ttyS0 quiet panic=-1 mitigations=off nokaslr",
		"-serial", "stdio", "-serial", "file:" + out}
	for i, disk := range disks {
		args = append(args, "-drive", fmt.Sprintf("file=%s,if=none,id=d%d,format=raw,cache=unsafe,discard=unmap,detect-zeroes=unmap", disk, i),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=d%d", i))
	}
	ctx, cancel := context.WithTimeout(t.Context(), guestTime)
	defer cancel()
	console, err := exec.CommandContext(ctx, "qemu-system-x86_64", args...).CombinedOutput()
	said, _ := os.ReadFile(out)
	text, whole := strings.CutSuffix(strings.ReplaceAll(string(said), "\r\n", "\n"), "\nGUEST DONE\n")
	if err != nil || !whole {
		t.Fatalf("the guest: %v\n%s\n%s", err, console[max(0, len(console)-8000):], said[max(0, len(said)-4000):])
	}
	return text
}

// guestKernel gives a kernel and the directory of its modules, kept in the user's cache.
func guestKernel(t *testing.T) (kernel, modules string) {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	cache = filepath.Join(cache, "holdfast-test")
	dir := filepath.Join(cache, "guest-kernel")
	if found, _ := filepath.Glob(dir + "/boot/vmlinuz-*"); len(found) == 0 {
		name := ""
		for _, line := range strings.Split(Run(t, "apt-cache", "depends", "linux-image-cloud-amd64"), "\n") {
			if _, dep, ok := strings.Cut(line, "Depends: "); ok {
				name = dep
			}
		}
		if err := os.MkdirAll(cache, 0o755); err != nil {
			t.Fatal(err)
		}
		tmp, err := os.MkdirTemp(cache, "kernel")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(tmp)
		get := exec.Command("apt-get", "download", name)
		get.Dir = tmp
		if out, err := get.CombinedOutput(); err != nil {
			t.Fatalf("apt-get download %s: %v\n%s", name, err, out)
		}
		debs, _ := filepath.Glob(tmp + "/*.deb")
		Run(t, "dpkg-deb", "-x", debs[0], tmp+"/x")
		// Another test may have been quicker.
		if err := os.Rename(tmp+"/x", dir); err != nil && !os.IsExist(err) {
			t.Fatal(err)
		}
	}
	kernels, _ := filepath.Glob(dir + "/boot/vmlinuz-*")
	trees, _ := filepath.Glob(dir + "/lib/modules/*")
	if len(kernels) != 1 || len(trees) != 1 {
		t.Fatalf("a kernel in %s: %v %v", dir, kernels, trees)
	}
	return kernels[0], trees[0]
}

// guestModules are in the guest, with those that they need; the kernel loads them when something asks for what they do.
var guestModules = strings.Fields(`virtio_pci virtio_blk virtio_console loop
	dm-mod dm-raid dm-mirror dm-snapshot dm-thin-pool dm-cache dm-cache-smq dm-crypt dm-zero dm-writecache dm-integrity dm-log
	md-mod linear raid0 raid1 raid10 raid456
	crc32c_generic crc32c-intel xts ecb cbc cts essiv aesni-intel algif_skcipher algif_hash sha256_generic sha256-ssse3 sha512_generic serpent_generic twofish_generic
	ext4 xfs btrfs vfat isofs nls_cp437 nls_iso8859-1 nls_ascii nls_utf8 exfat`)

// guestInit is what the kernel starts. The script's own output goes to the second serial port, where nothing else writes.
const guestInit = `#!/bin/busybox sh
/bin/busybox --install -s /bin
for c in pvcreate pvs vgcreate vgchange vgcfgbackup vgextend lvcreate lvchange lvconvert lvextend lvremove lvs; do ln -sf lvm /bin/$c; done
export PATH=/bin:/sbin:/usr/bin:/usr/sbin LVM_SUPPRESS_FD_WARNINGS=1
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
mkdir -p /run /tmp /var/lock /etc /mnt /run/lvm /run/cryptsetup
ln -sf /proc/mounts /etc/mtab
ln -s /bin/busybox /sbin/modprobe
modprobe -a virtio_pci virtio_blk loop dm-mod md-mod
stty -F /dev/ttyS1 raw 2>/dev/null
if sh -e /script > /dev/ttyS1; then printf '\nGUEST DONE\n' > /dev/ttyS1; fi
sync
sleep 0.2
poweroff -f
`

// guestFiles makes the archive that the kernel unpacks into its root.
func guestFiles(t *testing.T, modules, script string, programs map[string]string, extra []string) []byte {
	t.Helper()
	a := &archive{seen: map[string]bool{}}
	for _, dir := range []string{"bin", "sbin", "usr", "usr/bin", "usr/sbin", "dev", "proc", "sys", "etc", "etc/lvm"} {
		a.dir(dir)
	}
	a.file("init", []byte(guestInit), 0o755)
	a.file("script", []byte(script), 0o755)
	a.file("etc/lvm/lvm.conf", []byte("devices { use_devicesfile=0 }\nactivation { udev_sync=0 udev_rules=0 monitoring=0 }\nbackup { backup=0 archive=0 }\n"+
		"global { use_lvmpolld=0 thin_check_executable=\"\" cache_check_executable=\"\" }\n"), 0o644)
	a.modules(t, modules)
	for _, program := range append([]string{"busybox", "lvm", "mdadm", "cryptsetup"}, extra...) {
		path, err := exec.LookPath(program)
		if err != nil {
			t.Fatal(err)
		}
		a.program(t, path, "bin/"+filepath.Base(program))
	}
	for name, path := range programs {
		a.program(t, path, "bin/"+name)
	}
	// What glibc opens when a thread ends.
	if found, _ := filepath.Glob("/lib/*/libgcc_s.so.1"); len(found) > 0 {
		a.copy(t, found[0], strings.TrimPrefix(found[0], "/"))
	}
	return a.end()
}

// modules adds guestModules, those that they depend on, and the lists of them that modprobe needs. Those built into this kernel have no file.
func (a *archive) modules(t *testing.T, tree string) {
	t.Helper()
	files := map[string]string{}
	plain := func(name string) string { return strings.ReplaceAll(name, "-", "_") }
	err := filepath.WalkDir(tree+"/kernel", func(path string, d os.DirEntry, err error) error {
		if name, ok := strings.CutSuffix(filepath.Base(path), ".ko"); ok {
			files[plain(name)] = path
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	dir := "lib/modules/" + filepath.Base(tree)
	if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
		t.Fatal(err)
	}
	var add func(name string)
	add = func(name string) {
		path, ok := files[plain(name)]
		if !ok {
			return
		}
		delete(files, plain(name))
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		to := dir + "/" + filepath.Base(path)
		if err := os.WriteFile(filepath.Join(root, to), b, 0o644); err != nil {
			t.Fatal(err)
		}
		a.file(to, b, 0o644)
		// The .modinfo section has strings that end with a zero byte.
		if _, deps, ok := bytes.Cut(b, []byte("\x00depends=")); ok {
			deps, _, _ = bytes.Cut(deps, []byte{0})
			for _, dep := range strings.Split(string(deps), ",") {
				add(dep)
			}
		}
	}
	for _, name := range guestModules {
		add(name)
	}
	Run(t, "busybox", "depmod", "-b", root, filepath.Base(tree))
	for _, list := range []string{"modules.dep", "modules.alias", "modules.symbols"} {
		a.copy(t, filepath.Join(root, dir, list), dir+"/"+list)
	}
}

// archive is a cpio archive in the "newc" format, which the kernel unpacks (Documentation/driver-api/early-userspace/buffer-format.rst).
type archive struct {
	bytes.Buffer
	inode int
	seen  map[string]bool
}

func (a *archive) entry(name string, mode int, data []byte) {
	if a.seen[name] {
		return
	}
	a.seen[name] = true
	a.inode++
	fmt.Fprintf(a, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		a.inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)
	a.pad()
	a.Write(data)
	a.pad()
}

func (a *archive) pad() {
	for a.Len()%4 != 0 {
		a.WriteByte(0)
	}
}

func (a *archive) dir(name string) { a.entry(name, 0o040755, nil) }

// file adds a file and the directories above it.
func (a *archive) file(name string, data []byte, mode int) {
	for i, c := range name {
		if c == '/' {
			a.dir(name[:i])
		}
	}
	a.entry(name, 0o100000|mode, data)
}

func (a *archive) copy(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	a.file(to, b, 0o755)
}

// program adds a program and the libraries that ldd lists.
func (a *archive) program(t *testing.T, path, to string) {
	t.Helper()
	a.copy(t, path, to)
	out, err := exec.Command("ldd", path).Output()
	if err != nil {
		return // a static one
	}
	for _, word := range strings.Fields(string(out)) {
		if strings.HasPrefix(word, "/") {
			a.copy(t, word, strings.TrimPrefix(word, "/"))
		}
	}
}

func (a *archive) end() []byte {
	a.entry("TRAILER!!!", 0, nil)
	return a.Bytes()
}
