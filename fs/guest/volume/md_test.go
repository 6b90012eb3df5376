package volume

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// mdArrays are what the guest makes: each on a partition of as many disks.
var mdArrays = []struct {
	name  string
	disks int
	args  string
	lost  int // members that it can do without
}{
	{"linear", 3, "--metadata=1.2 --level=linear", 0},
	{"raid0", 3, "--metadata=1.2 --level=0 --chunk=64", 0},
	{"zones-original", 4, "--metadata=1.2 --level=0 --chunk=64 --layout=original", 0},
	{"zones-alternate", 4, "--metadata=1.2 --level=0 --chunk=64 --layout=alternate", 0},
	{"raid1-0.90", 3, "--metadata=0.90 --level=1", 2},
	{"raid1-1.0", 2, "--metadata=1.0 --level=1", 1},
	{"raid1-1.1", 2, "--metadata=1.1 --level=1 --bitmap=internal", 1},
	{"raid4", 4, "--metadata=1.2 --level=4 --chunk=64", 1},
	{"raid5-0.90", 3, "--metadata=0.90 --level=5 --chunk=32", 1},
	{"raid5-la", 4, "--metadata=1.2 --level=5 --chunk=64 --layout=left-asymmetric", 1},
	{"raid5-ra", 4, "--metadata=1.2 --level=5 --chunk=64 --layout=right-asymmetric", 1},
	{"raid5-ls", 4, "--metadata=1.2 --level=5 --chunk=64 --layout=left-symmetric", 1},
	{"raid5-rs", 5, "--metadata=1.2 --level=5 --chunk=64 --layout=right-symmetric", 1},
	{"raid5-first", 4, "--metadata=1.2 --level=5 --chunk=64 --layout=parity-first", 1},
	{"raid5-last", 4, "--metadata=1.2 --level=5 --chunk=64 --layout=parity-last", 1},
	{"raid6-la", 5, "--metadata=1.2 --level=6 --chunk=64 --layout=left-asymmetric", 2},
	{"raid6-ra", 6, "--metadata=1.2 --level=6 --chunk=64 --layout=right-asymmetric", 2},
	{"raid6-ls", 6, "--metadata=1.2 --level=6 --chunk=64 --layout=left-symmetric", 2},
	{"raid6-rs", 5, "--metadata=1.2 --level=6 --chunk=64 --layout=right-symmetric", 2},
	{"raid6-first", 5, "--metadata=1.2 --level=6 --chunk=64 --layout=parity-first", 2},
	{"raid6-last", 5, "--metadata=1.2 --level=6 --chunk=64 --layout=parity-last", 2},
	{"raid6-zr", 5, "--metadata=1.2 --level=6 --chunk=64 --layout=ddf-zero-restart", 2},
	{"raid6-nr", 6, "--metadata=1.2 --level=6 --chunk=64 --layout=ddf-N-restart", 2},
	{"raid6-nc", 5, "--metadata=1.2 --level=6 --chunk=64 --layout=ddf-N-continue", 2},
	{"raid6-la6", 5, "--metadata=1.2 --level=6 --chunk=64 --layout=left-asymmetric-6", 2},
	{"raid6-ls6", 6, "--metadata=1.2 --level=6 --chunk=64 --layout=left-symmetric-6", 2},
	{"raid6-rs6", 5, "--metadata=1.2 --level=6 --chunk=64 --layout=right-symmetric-6", 2},
	{"raid6-first6", 5, "--metadata=1.2 --level=6 --chunk=64 --layout=parity-first-6", 2},
	{"raid10-n2", 5, "--metadata=1.2 --level=10 --chunk=64 --layout=n2", 1},
	{"raid10-n3", 4, "--metadata=1.0 --level=10 --chunk=64 --layout=n3", 2},
	{"raid10-f2", 5, "--metadata=1.2 --level=10 --chunk=64 --layout=f2", 1},
	{"raid10-f3", 4, "--metadata=1.2 --level=10 --chunk=64 --layout=f3", 2},
	{"raid10-o2", 5, "--metadata=1.2 --level=10 --chunk=64 --layout=o2", 1},
	{"raid10-o3", 5, "--metadata=1.2 --level=10 --chunk=64 --layout=o3", 2},
}

// mdScript makes them, fills them with noise and writes for each its name, its number of bytes and its SHA-256.
func mdScript() string {
	var s strings.Builder
	s.WriteString(`
export MDADM_NO_UDEV=1
echo 200000 > /proc/sys/dev/raid/speed_limit_min
finish() { # name device
	mdadm --wait $2 >&2 || true
	noise $2 0 1000 || true
	sum $1 $2
	mdadm --stop $2 >&2
}
`)
	for i, a := range mdArrays {
		var devs []string
		for d := range a.disks {
			devs = append(devs, fmt.Sprintf("/dev/vd%c%d", 'a'+d, i+1))
		}
		name := "--homehost=host --name=" + a.name
		if strings.Contains(a.args, "0.90") {
			name = ""
		}
		fmt.Fprintf(&s, "yes | mdadm --create /dev/md%d %s --run %s --raid-devices=%d %s >&2\n", i, name, a.args, a.disks, strings.Join(devs, " "))
		fmt.Fprintf(&s, "finish %s /dev/md%d\n", a.name, i)
	}
	return s.String() + strings.NewReplacer("P1", fmt.Sprint(len(mdArrays)+1), "P2", fmt.Sprint(len(mdArrays)+2)).Replace(`
# One member fails and misses writes; another array is stopped in the middle of a rebuild.
yes | mdadm --create /dev/md100 --homehost=host --name=stale --run --level=1 --raid-devices=2 /dev/vdaP1 /dev/vdbP1 >&2
mdadm --wait /dev/md100 >&2 || true
mdadm /dev/md100 --fail /dev/vdaP1 --remove /dev/vdaP1 >&2
finish stale /dev/md100
yes | mdadm --create /dev/md101 --homehost=host --name=rebuilt --run --level=5 --chunk=64 --raid-devices=3 /dev/vdaP2 /dev/vdbP2 /dev/vdcP2 >&2
mdadm --wait /dev/md101 >&2 || true
mdadm /dev/md101 --fail /dev/vdbP2 --remove /dev/vdbP2 >&2
noise /dev/md101 0 1000 || true
mdadm --zero-superblock /dev/vdbP2; noise /dev/vdbP2 0 1000 || true
echo 100 > /proc/sys/dev/raid/speed_limit_min; echo 200 > /proc/sys/dev/raid/speed_limit_max
mdadm /dev/md101 --add /dev/vdbP2 >&2
sleep 4
sum rebuilt /dev/md101
cat /proc/mdstat >&2
mdadm --stop /dev/md101 >&2
`)
}

// mdDisks are disks of equal partitions, but that those of the zones differ.
func mdDisks(t *testing.T) (images []string) {
	t.Helper()
	for d := range 6 {
		var s strings.Builder
		s.WriteString("label: gpt\n")
		for _, a := range mdArrays {
			size := 4
			// The first zone of RAID 0 must not be a multiple of the next one's members, or the two layouts are alike.
			if strings.HasPrefix(a.name, "zones") || a.name == "linear" {
				size += []int{1, 3, 5, 3, 0, 0}[d]
			}
			fmt.Fprintf(&s, "size=%dM\n", size)
		}
		s.WriteString("size=4M\nsize=16M\n")
		image := guesttest.Sparse(t, 300<<20)
		sfdisk(t, image, s.String())
		images = append(images, image)
	}
	return images
}

// TestArrays: every level and layout as Linux reads it, whole and with members missing.
func TestArrays(t *testing.T) {
	guesttest.Needs(t, "qemu-system-x86_64", "mdadm", "sfdisk")
	images := mdDisks(t)
	want, names := guesttest.Sums(t, images, mdScript())
	for i, a := range mdArrays {
		if i >= len(names) || names[i] != a.name {
			t.Fatal(i, names)
		}
	}
	if len(want) != len(mdArrays)+2 {
		t.Fatal(want)
	}
	got, warnings := scanImages(t, Options{}, images...)
	sameSum(t, got, "stale", want["stale"])
	sameSum(t, got, "rebuilt", want["rebuilt"])
	// The rebuild must not have ended before the guest did.
	m, err := readMember(got[fmt.Sprintf("disk1/p%d", len(mdArrays)+2)].dev)
	if err != nil || m.recovered < 0 || m.recovered >= m.size {
		t.Errorf("%+v, %v", m, err)
	}
	if len(warnings) != 1 || !strings.Contains(warnings[0], "out of date") {
		t.Error(warnings)
	}
	for _, lost := range [][]int{{}, {0}, {2}, {3}, {0, 1}, {1, 3}, {2, 3}, {0, 4}} {
		checkArrays(t, images, lost, want)
	}
}

// TestLeftoverMember: a superblock that an earlier use of the disk left at its end does not hide its partitions.
func TestLeftoverMember(t *testing.T) {
	guesttest.Needs(t, "sfdisk", "mkfs.ext4")
	image := guesttest.Sparse(t, 64<<20)
	sfdisk(t, image, "label: gpt\nsize=40M\n")
	guesttest.Run(t, "mkfs.ext4", "-q", "-F", "-E", "offset=1048576", image, "40M")
	disk, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	at := mdPlaces(int64(len(disk)))[0] - 64<<10 // the disk was smaller
	le := binary.LittleEndian
	for _, level := range []uint32{5, 0} {
		disk := append([]byte(nil), disk[:at+8192]...)
		b := disk[at:]
		for off, v := range map[int]uint32{0: mdMagic, 4: 1, 72: level, 80: 1000, 88: 8, 92: 3, 136: 1000, 144: uint32(at / 512), 220: 3} {
			le.PutUint32(b[off:], v)
		}
		le.PutUint32(b[216:], mdSum(b[:262], 216))
		got, warnings := byName(Scan([]Disk{{"d", memory(disk)}}, Options{}))
		if got["d"].Signature != "linux_raid_member" || got["md127"].Err == nil || got["d/p1"].Signature != "ext4" || len(warnings) == 0 {
			t.Errorf("%+v %v", got, warnings)
		}
	}
}

// checkArrays compares arrays without some disks: those that can do without must be right, others must say that they cannot.
func checkArrays(t *testing.T, images []string, lost []int, want map[string]string) {
	t.Helper()
	var disks []Disk
	for i, image := range images {
		gone := false
		for _, l := range lost {
			gone = gone || l == i
		}
		if !gone {
			disks = append(disks, Disk{fmt.Sprintf("disk%d", i), guesttest.OpenDevice(t, image)})
		}
	}
	got, _ := byName(Scan(disks, Options{}))
	for i, a := range mdArrays {
		missing := 0
		for _, l := range lost {
			if l < a.disks {
				missing++
			}
		}
		name := a.name
		if strings.Contains(a.args, "0.90") {
			name = "md" + strconv.Itoa(i)
		}
		v, ok := got[name]
		switch {
		case missing > a.lost && strings.HasPrefix(name, "raid10") && v.Device != nil:
		case missing == a.disks:
		case missing > a.lost:
			if !ok || v.Device != nil || !errors.Is(v.Err, guest.ErrDamaged) {
				t.Errorf("%s without %v: %+v", name, lost, v)
			}
			continue
		case v.Device == nil || v.Kind != KindArray:
			t.Errorf("%s without %v: %+v", name, lost, v)
			continue
		}
		if missing == a.disks {
			continue
		}
		if sum := fmt.Sprint(v.Device.Size(), " ", sum(t, v.Device)); sum != want[a.name] {
			t.Errorf("%s without %v: %s, want %s", name, lost, sum, want[a.name])
		}
	}
}
