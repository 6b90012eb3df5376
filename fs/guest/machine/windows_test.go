package machine

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
	"github.com/holdfast-backup/holdfast/fs/guest/volume"
)

// windowsDisks opens the disks of guesttest.Windows.
func windowsDisks(t *testing.T, config string, devices []guesttest.HiveValue) []volume.Disk {
	t.Helper()
	a, b := guesttest.Windows(t, config, devices)
	return []volume.Disk{{Name: "disk0", Device: guesttest.OpenDevice(t, a)}, {Name: "disk1", Device: guesttest.OpenDevice(t, b)}}
}

// names lists a directory of a view.
func names(t *testing.T, v *View, path string) (list []string) {
	t.Helper()
	p, err := v.Walk(path)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	f, err := p.Vol.FS()
	if err != nil {
		t.Fatal(err)
	}
	for e, err := range f.ReadDir(p.Ino, 0) {
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, e.Name)
	}
	return list
}

// TestWindows: the registry puts the volumes of a Windows together.
func TestWindows(t *testing.T) {
	m := Open(windowsDisks(t, "Windows/System32/config/SYSTEM", guesttest.WindowsDevices(t)), Options{})
	views := m.Views()
	if len(views) != 1 || views[0].Name != "root" {
		t.Fatalf("views: %+v, %v", views, m.Warnings)
	}
	v := views[0]
	if got := names(t, v, ""); !slices.Equal(got, []string{"C", "D", "L"}) {
		t.Errorf("drives: %q", got)
	}
	for path, want := range map[string]string{
		"C/Users/me/file": "on C", "D/data/file": "on D", "L/logical": "on L", "C/mnt/folder/deep/file": "in a folder",
		"C/Documents and Settings/me/file": "on C", "C/mnt/folder/../../Users/me/file": "on C",
	} {
		if got := read(t, v, path); got != want {
			t.Errorf("%s: %q", path, got)
		}
	}
	slices.Sort(v.Warnings)
	if want := []string{
		"G: the partition 1048576 bytes from the start of the disk 11223344 is not among the volumes",
		"H: the partition, or the volume of a dynamic disk, " + guesttest.WindowsGoneGUID + " is not among the volumes",
		"I: a volume that is identified by 13 bytes of an unknown kind is not among the volumes",
		"a folder of disk0/p2: the volume {cccccccc-0000-11ee-8000-00155d010203} is not known",
		"a folder of disk1/p2: a volume that is mounted in itself",
		"a folder of disk1/p2: a volume that is mounted in itself",
	}; !slices.Equal(v.Warnings, want) {
		t.Errorf("warnings: %q", v.Warnings)
	}
}

// TestWindowsLetters: what the system's own drive is called, whatever the registry says or does not.
func TestWindowsLetters(t *testing.T) {
	for _, c := range []struct {
		config   string
		devices  []guesttest.HiveValue
		drives   string
		warnings []string
	}{
		{"WINDOWS/system32/config/system", nil, "C", nil},
		{"windows/SYSTEM32/Config/System", []guesttest.HiveValue{{Name: `\DosDevices\E:`, Data: guesttest.MBRDevice(guesttest.WindowsSignature, guesttest.WindowsSystemAt)}}, "E", nil},
		{"WINNT/System32/config/SYSTEM", []guesttest.HiveValue{{Name: `\DosDevices\C:`, Data: guesttest.MBRDevice(1, 1)}}, "C", nil},
		{"Windows/System32/config/SYSTEM", []guesttest.HiveValue{{Name: `\DosDevices\C:`, Data: guesttest.MBRDevice(guesttest.WindowsSignature, guesttest.WindowsLogicalAt)}, {Name: `\DosDevices\1:`}}, "C",
			[]string{"disk0/p2, which Windows is on, has no drive letter"}},
	} {
		disks := windowsDisks(t, c.config, c.devices)
		views := Open(disks, Options{}).Views()
		if len(views) != 1 {
			t.Fatalf("%s: %d views", c.config, len(views))
		}
		v := views[0]
		warnings := slices.DeleteFunc(v.Warnings, func(w string) bool { return strings.Contains(w, "is not known") })
		if got := strings.Join(names(t, v, ""), ""); got != c.drives || !slices.Equal(warnings, c.warnings) {
			t.Errorf("%s: drives %s, %q", c.config, got, warnings)
		}
	}
}

// TestDualBoot: a Windows and a Linux on the same disks have a view each.
func TestDualBoot(t *testing.T) {
	guesttest.NeedsPrograms(t, "mkfs.ext4")
	disks := windowsDisks(t, "Windows/System32/config/SYSTEM", guesttest.WindowsDevices(t))
	c := guesttest.Sparse(t, rootLen<<20)
	filesystem(t, c, 0, rootLen, "root", rootUUID, tree(t, map[string]string{
		"etc/fstab": "/dev/sdc / ext4 defaults 0 1\nPARTUUID=" + strings.ToLower(guesttest.WindowsDataGUID) + " /win ntfs ro 0 0\n", "win/": "",
	}))
	m := Open(append(disks, volume.Disk{Name: "disk2", Device: guesttest.OpenDevice(t, c)}), Options{})
	views := m.Views()
	if len(views) != 2 || views[0].Name != "root" || views[1].Name != "root-2" {
		t.Fatalf("%d views", len(views))
	}
	if got := read(t, views[0], "D/data/file"); got != "on D" {
		t.Error(got)
	}
	if got := read(t, views[1], "win/data/file"); got != "on D" {
		t.Error(got)
	}
}

// TestWindowsHiveDamaged: without its registry, Windows has the drive C.
func TestWindowsHiveDamaged(t *testing.T) {
	guesttest.Needs(t, "mkntfs", "ntfs-3g", "dd")
	disk := guesttest.Sparse(t, guesttest.WindowsSystemLen<<20)
	guesttest.MakeDrive(t, disk, 0, guesttest.WindowsSystemLen, map[string]string{"Windows/System32/config/SYSTEM": strings.Repeat("no hive", 2000)})
	v := Open([]volume.Disk{{Name: "disk0", Device: guesttest.OpenDevice(t, disk)}}, Options{}).Views()
	if len(v) != 1 || len(v[0].Warnings) != 1 || !strings.HasPrefix(v[0].Warnings[0], "which drive letters the volumes have is not known: registry: ") {
		t.Fatalf("%+v", v)
	}
	if got := names(t, v[0], "C/Windows"); !slices.Equal(got, []string{"System32"}) {
		t.Error(got)
	}
}

// TestWindowsBitLocker: a drive that is encrypted has its letter when it is open, and is said to be locked otherwise.
func TestWindowsBitLocker(t *testing.T) {
	guesttest.NeedsPrograms(t, "ntfscp")
	first, second := guesttest.Windows(t, "Windows/System32/config/SYSTEM", guesttest.WindowsDevices(t))
	plain, gap := guesttest.BitLockerNTFS(t, 24<<20, 512)
	m := guesttest.BitLocker{Method: 0x8004, Sector: 512, Header: 8192, Protectors: []string{"external"}}
	hidden := m.Make(plain, gap, 5)
	f, err := os.OpenFile(first, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(hidden.Image, guesttest.WindowsLogicalAt<<20); err != nil {
		t.Fatal(err)
	}
	disks := []volume.Disk{{Name: "disk0", Device: guesttest.OpenDevice(t, first)}, {Name: "disk1", Device: guesttest.OpenDevice(t, second)}}
	locked := Open(disks, Options{}).Views()[0]
	if got := names(t, locked, ""); !slices.Equal(got, []string{"C", "D"}) {
		t.Errorf("drives without a key: %q", got)
	}
	if !slices.ContainsFunc(locked.Warnings, func(w string) bool { return strings.HasPrefix(w, "L: ") && strings.HasSuffix(w, "locked") }) {
		t.Errorf("warnings: %q", locked.Warnings)
	}
	key := func(volume.Locked) [][]byte { return [][]byte{hidden.BEK} }
	open := Open(disks, Options{Volumes: volume.Options{Unlock: key}}).Views()[0]
	if got := names(t, open, ""); !slices.Equal(got, []string{"C", "D", "L"}) {
		t.Errorf("drives with a key: %q", got)
	}
	if got := names(t, open, "L"); !slices.Contains(got, "noise") {
		t.Errorf("L: %q", got)
	}
}

// TestWindowsDamaged: a volume on which nobody can tell whether there is a Windows is not one without it.
func TestWindowsDamaged(t *testing.T) {
	vol := &Volume{Volume: volume.Volume{Signature: "ntfs"}}
	if v, err := (&Machine{}).view(vol, guarded{broken{}}); v != nil || !errors.Is(err, guest.ErrDamaged) {
		t.Errorf("%v, %v", v, err)
	}
}
