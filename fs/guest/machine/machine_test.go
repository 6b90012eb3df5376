package machine

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
	"github.com/holdfast-backup/holdfast/fs/guest/volume"
)

// Two disks of a machine, and where their partitions are, MiB.
const (
	bootAt, bootLen = 1, 32
	rootAt, rootLen = 40, 64
	homeLen         = 48 // the second disk, without a table
)

// filesystem makes an ext4 with what is in dir at a place of an image.
func filesystem(t *testing.T, image string, at, size int, label, uuid, dir string) {
	t.Helper()
	guesttest.Run(t, "mkfs.ext4", "-q", "-F", "-L", label, "-U", uuid, "-d", dir, "-E", fmt.Sprintf("offset=%d", at<<20), image, fmt.Sprintf("%dM", size))
}

func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		target, link := strings.CutPrefix(content, "-> ")
		var err error
		switch {
		case link:
			err = os.Symlink(target, p)
		case strings.HasSuffix(name, "/"):
			err = os.MkdirAll(p, 0o755)
		default:
			err = os.WriteFile(p, []byte(content), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

const (
	bootUUID = "11111111-2222-3333-4444-555555555555"
	rootUUID = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
	homeUUID = "99999999-8888-7777-6666-000000000000"
)

// open makes the machine with a certain fstab.
func open(t *testing.T, fstab string) *Machine {
	t.Helper()
	guesttest.NeedsPrograms(t, "mkfs.ext4", "sfdisk")
	a, b := guesttest.Sparse(t, 128<<20), guesttest.Sparse(t, homeLen<<20)
	guesttest.Input(t, fmt.Sprintf("label: dos\nlabel-id: 0x1234abcd\nstart=%dMiB, size=%dMiB\nstart=%dMiB, size=%dMiB\n", bootAt, bootLen, rootAt, rootLen), "sfdisk", "-q", a)
	filesystem(t, a, bootAt, bootLen, "boot", bootUUID, tree(t, map[string]string{"vmlinuz": "kernel"}))
	filesystem(t, a, rootAt, rootLen, "root", rootUUID, tree(t, map[string]string{
		"etc/fstab": fstab, "boot/": "", "data/home dir/": "", "home": "-> data/home dir", "mnt/": "", "abs": "-> /etc/fstab", "out": "-> ../../../../etc/fstab", "loop": "-> loop",
	}))
	filesystem(t, b, 0, homeLen, "home", homeUUID, tree(t, map[string]string{"user/file": "mine"}))
	return Open([]volume.Disk{{Name: "disk0", Device: guesttest.OpenDevice(t, a)}, {Name: "disk1", Device: guesttest.OpenDevice(t, b)}}, Options{})
}

// read gives the content of a file in a view.
func read(t *testing.T, v *View, path string) string {
	t.Helper()
	p, err := v.Walk(path)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	f, err := p.Vol.FS()
	if err != nil {
		t.Fatal(err)
	}
	file, err := f.Open(p.Ino)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	b := make([]byte, file.Size())
	if n, _ := file.ReadAt(b, 0); n < len(b) {
		t.Fatalf("%s: %d bytes", path, n)
	}
	return string(b)
}

// TestViews: a guest's table puts its volumes together, however it names them.
func TestViews(t *testing.T) {
	for _, names := range [][2]string{
		{"UUID=" + bootUUID, "UUID=" + strings.ToUpper(homeUUID)},
		{"LABEL=boot", `LABEL="home"`},
		{"PARTUUID=1234abcd-01", "LABEL=home"},
		{"/dev/sda1", "/dev/vdb"},
		{"/dev/disk/by-uuid/" + bootUUID, "/dev/disk/by-label/home"},
		{"/dev/nvme0n1p1", "/dev/nvme1n1"},
	} {
		fstab := fmt.Sprintf("# a table\n%s /boot ext4 ro 0 2\n%s /home ext4 defaults 0 2\nLABEL=root / ext4 defaults 0 1\nLABEL=gone /mnt ext4 nofail 0 0\n"+
			"proc /proc proc defaults 0 0\n/etc /mnt none bind 0 0\n/swap\\040file none swap sw 0 0\nUUID=x none swap sw 0 0\n", names[0], names[1])
		m := open(t, fstab)
		views := m.Views()
		if len(views) != 1 || views[0].Name != "root" {
			t.Fatalf("%v: views: %+v, %v", names, views, m.Warnings)
		}
		v := views[0]
		for path, want := range map[string]string{
			"boot/vmlinuz": "kernel", "home/user/file": "mine", "data/home dir/user/file": "mine", "abs": fstab, "out": fstab, "boot/../abs": fstab,
		} {
			if got := read(t, v, path); got != want {
				t.Errorf("%v: %s: %q", names, path, got)
			}
		}
		if _, err := v.Walk("loop"); err == nil {
			t.Error("a link to itself leads somewhere")
		}
		if !slices.Equal(v.Swap, []string{"swap file"}) {
			t.Errorf("swap files: %q", v.Swap)
		}
		if len(v.Warnings) != 1 || !strings.Contains(v.Warnings[0], "LABEL=gone") {
			t.Errorf("warnings: %q", v.Warnings)
		}
	}
}

// TestImageOfCD: an installation image is a disk, also when it has a partition table besides.
func TestImageOfCD(t *testing.T) {
	guesttest.NeedsPrograms(t, "xorriso")
	dir := tree(t, map[string]string{"Folder/A file": "on the CD"})
	for _, options := range [][]string{nil, {"-partition_offset", "16", "--mbr-force-bootable"}, {"-append_partition", "2", "0xef", guesttest.Sparse(t, 1<<20)}} {
		image := filepath.Join(t.TempDir(), "iso")
		guesttest.Run(t, append(append([]string{"xorriso", "-as", "mkisofs", "-quiet", "-o", image}, options...), dir)...)
		m := Open([]volume.Disk{{Name: "disk0", Device: guesttest.OpenDevice(t, image)}}, Options{})
		if len(m.Volumes) != 1 || m.Volumes[0].Name != "disk0" {
			t.Fatalf("%v: %+v", options, m.Volumes)
		}
		f, err := m.Volumes[0].FS()
		if err != nil {
			t.Fatalf("%v: %v", options, err)
		}
		if _, err := guesttest.Find(f, "Folder/A file"); err != nil {
			t.Errorf("%v: %v", options, err)
		}
	}
}

// alone makes a machine of one disk without a table, whose root has these files, after change has been at it.
func alone(t *testing.T, files map[string]string, change func(image string)) *Machine {
	t.Helper()
	guesttest.NeedsPrograms(t, "mkfs.ext4", "debugfs")
	image := guesttest.Sparse(t, rootLen<<20)
	filesystem(t, image, 0, rootLen, "root", rootUUID, tree(t, files))
	change(image)
	return Open([]volume.Disk{{Name: "disk0", Device: guesttest.OpenDevice(t, image)}}, Options{})
}

// TestTableElsewhere: the table may be a link, as NixOS has it.
func TestTableElsewhere(t *testing.T) {
	m := alone(t, map[string]string{"etc/fstab": "-> /etc/static/fstab", "etc/static": "-> /store/etc", "store/etc/fstab": "/swap file none swap\n"}, func(string) {})
	if views := m.Views(); len(views) != 1 || len(m.Warnings) > 0 {
		t.Errorf("%d views, %q", len(views), m.Warnings)
	}
}

// TestTableDamaged: a table that cannot be read is said; a system without one is none.
func TestTableDamaged(t *testing.T) {
	files := map[string]string{"etc/fstab": "/swap file none swap\n"}
	m := alone(t, files, func(image string) { guesttest.Run(t, "debugfs", "-w", "-R", "zap_block -f /etc 0", image) })
	if views := m.Views(); len(views) != 0 || len(m.Warnings) != 1 || !strings.Contains(m.Warnings[0], "damaged") {
		t.Errorf("%d views, %q", len(views), m.Warnings)
	}
	m = alone(t, map[string]string{"etc/hostname": "x"}, func(string) {})
	if views := m.Views(); len(views) != 0 || len(m.Warnings) > 0 {
		t.Errorf("without a table: %d views, %q", len(views), m.Warnings)
	}
}
