package volume

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// sfdiskTable is what sfdisk says of a disk.
type sfdiskTable struct {
	Table struct {
		Label, ID  string
		Sectorsize int64
		Partitions []struct {
			Node        string
			Start, Size int64
			Type, Name  string
			UUID        string
		} `json:"partitions"`
	} `json:"partitiontable"`
}

// sfdisk makes a partition table.
func sfdisk(t *testing.T, image, script string, args ...string) {
	t.Helper()
	cmd := exec.Command("sfdisk", append(append([]string{"-q", "--no-reread"}, args...), image)...)
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("sfdisk: %v\n%s", err, out)
	}
}

// likeSfdisk checks that a scan finds the partitions that sfdisk finds, with their numbers, places and bytes. Extended
// partitions carry nothing and are left out.
func likeSfdisk(t *testing.T, image, oracle string, args ...string) (map[string]Volume, []string) {
	t.Helper()
	var want sfdiskTable
	if err := json.Unmarshal([]byte(guesttest.Run(t, append(append([]string{"sfdisk", "-J"}, args...), oracle)...)), &want); err != nil {
		t.Fatal(err)
	}
	unit := max(want.Table.Sectorsize, 512)
	got, warnings := scanImages(t, Options{}, image)
	n := 0
	for _, p := range want.Table.Partitions {
		if p.Type == "5" || p.Type == "f" || p.Type == "85" || p.Type == "ee" {
			continue
		}
		n++
		name := "disk0/p" + strings.TrimLeft(strings.TrimPrefix(p.Node, oracle), "p")
		v, ok := got[name]
		if !ok || v.Device == nil {
			t.Errorf("%s (%+v) was not found: %v %v", name, p, v.Err, warnings)
			continue
		}
		at, err := v.Map(0, v.Device.Size())
		if err != nil || len(at) != 1 || at[0] != (Piece{0, p.Start * unit, p.Size * unit}) {
			t.Errorf("%s is at %v (%v), not at %d+%d", name, at, err, p.Start*unit, p.Size*unit)
		}
		uuid := strings.ToLower(p.UUID)
		if want.Table.Label == "dos" { // as blkid makes one, by the number of the partition
			var number int
			fmt.Sscanf(strings.TrimPrefix(name, "disk0/p"), "%d", &number)
			uuid = fmt.Sprintf("%s-%02x", strings.TrimPrefix(want.Table.ID, "0x"), number)
		}
		if v.PartUUID != uuid || v.PartLabel != p.Name {
			t.Errorf("%s: UUID %q and name %q, want %q and %q", name, v.PartUUID, v.PartLabel, uuid, p.Name)
		}
		if p.Name != "" && !strings.Contains(v.Detail, fmt.Sprintf("%q", p.Name)) {
			t.Errorf("%s: no name %q in %q", name, p.Name, v.Detail)
		}
		sameBytes(t, name, v.Device, pieces(t, v, image))
	}
	if len(got) != n || n == 0 {
		t.Errorf("%d volumes instead of %d: %v", len(got), n, got)
	}
	return got, warnings
}

func TestPartitions(t *testing.T) {
	guesttest.Needs(t, "sfdisk")
	for _, test := range []struct{ name, script string }{
		{"primary", "label: dos\n,10M,c\n,20M,83,*\n,,8e\n"},
		{"gap in the numbers", "label: dos\n2: start=4096, size=8192, type=83\n4: start=20480, size=8192, type=7\n"},
		{"logical", "label: dos\n,10M,83\n,,5\n,5M,83\n,7M,82\n,9M,8e\n,1M,83\n"},
		{"logical first", "label: dos\n,40M,f\n,10M,83\n,5M,83\n,7M,82\n"},
		{"gpt", "label: gpt\n,10M,U,\n,20M,L\n,5M,S\n"},
		{"gpt with names", "label: gpt\nsize=10M, type=U, name=\"EFI System\"\nstart=65536, size=10M, type=L, name=\"Ünïcode 😀\"\n9: size=1M, type=L\n"},
		{"gpt with a long table", "label: gpt\ntable-length: 512\n200: size=10M, type=L\n1: size=10M, type=L\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			image := guesttest.Sparse(t, 64<<20)
			sfdisk(t, image, test.script)
			scatter(t, image, 1<<20, 60<<20, 3)
			sfdisk(t, image, test.script) // the noise went over EBRs
			if _, warnings := likeSfdisk(t, image, image); len(warnings) > 0 {
				t.Error(warnings)
			}
		})
	}
}

// TestSector4096: a disk with sectors of 4096 bytes; what sfdisk says of it is by a loop device of that kind.
func TestSector4096(t *testing.T) {
	guesttest.Needs(t, "sfdisk", "losetup")
	image := guesttest.Sparse(t, 64<<20)
	loop := strings.TrimSpace(guesttest.Run(t, "losetup", "-f", "--show", "-b", "4096", image))
	defer guesttest.Run(t, "losetup", "-d", loop)
	for _, script := range []string{"label: gpt\n,10M,L\n,20M,L\n", "label: dos\n,10M,83\n,,5\n,5M,83\n,6M,83\n"} {
		sfdisk(t, loop, script)
		guesttest.Run(t, "sync", image)
		likeSfdisk(t, image, loop)
	}
}

// damage writes over bytes of an image.
func damage(t *testing.T, image string, off, n int64) {
	t.Helper()
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, n)
	if _, err := f.ReadAt(b, off); err != nil {
		t.Fatal(err)
	}
	for i := range b {
		b[i] ^= 0x5a
	}
	if _, err := f.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
}

// TestBackupGPT: the table is found by its backup, also after the disk has grown; with both gone that is damage.
func TestBackupGPT(t *testing.T) {
	guesttest.Needs(t, "sfdisk")
	image := guesttest.Sparse(t, 64<<20)
	sfdisk(t, image, "label: gpt\n,10M,L\n,20M,L\n")
	intact := guesttest.Copy(t, image)
	for _, test := range []struct {
		name   string
		off, n int64
		grow   int64
	}{
		{"header", 512 + 40, 1, 0}, {"signature", 512, 8, 0}, {"entries", 1024 + 32, 1, 0},
		{"header, grown", 512 + 40, 1, 3 << 20}, {"signature, grown", 512, 512, 3 << 20},
	} {
		bad := guesttest.Copy(t, image)
		damage(t, bad, test.off, test.n)
		if err := os.Truncate(bad, 64<<20+test.grow); err != nil {
			t.Fatal(err)
		}
		if _, warnings := likeSfdisk(t, bad, intact); len(warnings) != 1 || !strings.Contains(warnings[0], "backup") {
			t.Errorf("%s: %v", test.name, warnings)
		}
	}
	damage(t, image, 512, 100)
	damage(t, image, 64<<20-512+20, 1)
	if got, _ := scanImages(t, Options{}, image); got["disk0"].Err == nil || len(got) != 1 {
		t.Errorf("both tables damaged: %v", got)
	}
}

// TestHybrid: a GPT counts, whatever else the MBR lists beside it.
func TestHybrid(t *testing.T) {
	guesttest.Needs(t, "sfdisk", "sgdisk")
	image := guesttest.Sparse(t, 64<<20)
	guesttest.Run(t, "sgdisk", "-n", "1:0:+10M", "-n", "2:0:+10M", "-n", "3:0:+10M", "-h", "2:3", image)
	got, warnings := scanImages(t, Options{}, image)
	if len(got) != 3 || len(warnings) > 0 {
		t.Errorf("%v %v", got, warnings)
	}
}

// TestSuperfloppy: file systems on whole disks, beside what looks like a table, have the name that blkid gives them.
func TestSuperfloppy(t *testing.T) {
	guesttest.Needs(t, "mkfs.vfat", "mkfs.ext4", "blkid", "sfdisk", "mkswap")
	for _, make := range [][]string{
		{"mkfs.vfat", "-F", "12", "-I"}, {"mkfs.vfat", "-F", "16"}, {"mkfs.vfat", "-F", "32"}, {"mkfs.vfat", "-F", "32", "--mbr=y"},
		{"mkfs.ext4", "-q"}, {"mkfs.ext3", "-q"}, {"mkfs.ext2", "-q"}, {"mkswap"},
		{"mkfs.xfs", "-q", "-f"}, {"mkfs.btrfs", "-q"}, {"mkntfs", "-Q", "-F"}, {"mkfs.exfat"}, {"mkfs.f2fs"}, {"mksquashfs"},
	} {
		if _, err := exec.LookPath(make[0]); err != nil || make[0] == "mksquashfs" {
			continue
		}
		size := int64(320) << 20
		if make[0] == "mkfs.vfat" && make[2] == "12" {
			size = 16 << 20
		}
		image := guesttest.Sparse(t, size)
		guesttest.Run(t, append(make, image)...)
		want := strings.TrimSpace(guesttest.Run(t, "blkid", "-p", "-s", "TYPE", "-o", "value", image))
		got, warnings := scanImages(t, Options{}, image)
		if v := got["disk0"]; len(got) != 1 || v.Signature != want || v.Kind != KindDisk || v.Device == nil || len(warnings) > 0 {
			t.Errorf("%v: %+v %v, want %s", make, got, warnings, want)
		}
		// The same in a partition.
		disk := guesttest.Sparse(t, size+2<<20)
		sfdisk(t, disk, "label: dos\nstart=2048,type=83\n")
		guesttest.Run(t, "dd", "if="+image, "of="+disk, "bs=1M", "seek=1", "conv=notrunc,sparse", "status=none")
		if got, _ := scanImages(t, Options{}, disk); got["disk0/p1"].Signature != want || len(got) != 1 {
			t.Errorf("%v in a partition: %+v", make, got)
		}
	}
}

// TestLeftover: an old signature behind a table that is in use, and an old table before a file system.
func TestLeftover(t *testing.T) {
	guesttest.Needs(t, "mkfs.ext4", "sfdisk")
	image := guesttest.Sparse(t, 64<<20)
	guesttest.Run(t, "mkfs.ext4", "-q", image)
	sfdisk(t, image, "label: dos\n,,83\n", "--wipe", "never", "--wipe-partitions", "never")
	if got, warnings := scanImages(t, Options{}, image); got["disk0"].Signature != "ext4" || len(warnings) != 1 {
		t.Errorf("%+v %v", got, warnings)
	}
	guesttest.Run(t, "mkfs.ext4", "-q", "-F", "-E", "offset=1048576", image, "60M")
	if got, warnings := scanImages(t, Options{}, image); got["disk0/p1"].Signature != "ext4" || len(got) != 1 || len(warnings) != 1 {
		t.Errorf("%+v %v", got, warnings)
	}
}
