package volume

import (
	"errors"
	"fmt"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// lvmGuest are the types of logical volumes that device-mapper in the guest makes, with the physical volumes that each
// can do without.
var lvmGuest = []struct {
	name, args string
	lost       int
}{
	{"raid0", "--type raid0 -i 3 -I 64k", 0},
	{"raid0m", "--type raid0_meta -i 3 -I 64k", 0},
	{"raid1", "--type raid1 -m 2", 2},
	{"raid4", "--type raid4 -i 3 -I 64k", 1},
	{"raid5", "--type raid5 -i 3 -I 64k", 1},
	{"raid5n", "--type raid5_n -i 3 -I 64k", 1},
	{"raid5la", "--type raid5_la -i 3 -I 64k", 1},
	{"raid5ra", "--type raid5_ra -i 2 -I 64k", 1},
	{"raid5rs", "--type raid5_rs -i 3 -I 64k", 1},
	{"raid6", "--type raid6 -i 3 -I 64k", 2},
	{"raid6nr", "--type raid6_nr -i 3 -I 64k", 2},
	{"raid6nc", "--type raid6_nc -i 3 -I 64k", 2},
	{"raid10", "--type raid10 -i 2 -m 1 -I 64k", 1},
	{"mirror", "--type mirror -m 1 --mirrorlog core", 0},
}

const lvmScript = `
sums() { for lv in "$@"; do sum $lv /dev/mapper/$lv; done; }
pvcreate -q /dev/vda /dev/vdb /dev/vdc /dev/vdd /dev/vde >&2
vgcreate -q -s 1M vg /dev/vda /dev/vdb /dev/vdc /dev/vdd /dev/vde >&2
`

// thinScript makes thin volumes, snapshots of them and of the older kind, and caches, on the last two disks.
const thinScript = `
pvcreate -q /dev/vdf /dev/vdg >&2
vgcreate -q -s 1M tv /dev/vdf /dev/vdg >&2
lvcreate -q -n ext -L 8M -Wn tv >&2; noise /dev/tv/ext 0 128; lvchange -an tv/ext; lvchange -pr tv/ext >&2
lvcreate -q --type thin-pool -n pool -L 64M -c 64k tv >&2
lvcreate -q -V 200M --thinpool tv/pool -n thin -Wn >&2
for i in 0 3 5 9 11 700 1500 2222 3199; do noise /dev/tv/thin $i 1; done
noise /dev/tv/thin 1000 200
lvcreate -q -s -n tsnap -K -kn tv/thin >&2
noise /dev/tv/thin 1005 50; noise /dev/tv/thin 4 1; noise /dev/tv/tsnap 8 3
lvcreate -q -s -n tsnap2 -K -kn tv/tsnap >&2
noise /dev/tv/tsnap2 3000 30
blkdiscard -o 65536000 -l 655360 /dev/tv/thin || true
lvcreate -q -s tv/ext --thinpool tv/pool -n xthin -K -kn >&2
noise /dev/tv/xthin 3 5
lvcreate -q -n cow -L 24M -Wn tv >&2; noise /dev/tv/cow 0 384
lvcreate -q -s -n csnap -L 20M -c 4k tv/cow >&2
noise /dev/tv/cow 10 20; noise /dev/tv/csnap 100 7
dd if=/dev/urandom of=/dev/tv/cow bs=4k count=900 seek=2000 conv=notrunc 2>/dev/null
lvcreate -q -n cached -L 16M -Wn tv >&2; noise /dev/tv/cached 0 256
lvcreate -q --type cache-pool -n cpool -L 8M --cachemode writethrough tv >&2
lvconvert -q -y --type cache --cachepool tv/cpool tv/cached >&2
noise /dev/tv/cached 3 100
lvcreate -q -n back -L 16M -Wn tv >&2
lvcreate -q --type cache-pool -n bpool -L 8M --cachemode writeback tv >&2
lvconvert -q -y --type cache --cachepool tv/bpool tv/back >&2
lvcreate -q -n vg0-part -L 20M -Wn tv >&2; noise /dev/tv/vg0-part 0 320
sums tv-thin tv-tsnap tv-tsnap2 tv-xthin tv-cow tv-csnap tv-cached tv-vg0--part
vgcfgbackup -f /tmp/cfg tv >&2
vgchange -an tv >&2
`

// TestLVMInGuest: what device-mapper makes of logical volumes, as it reads them.
func TestLVMInGuest(t *testing.T) {
	var images []string
	for range 7 {
		images = append(images, guesttest.Sparse(t, 160<<20))
	}
	script := lvmScript
	names := ""
	for _, lv := range lvmGuest {
		script += fmt.Sprintf("lvcreate -q -y -Wn -n %s -L 6M %s vg >&2\nnoise /dev/vg/%s 0 1000 || true\n", lv.name, lv.args, lv.name)
		names += " vg-" + lv.name
	}
	script += `for i in $(seq 60); do lvs --noheadings -o sync_percent vg | grep -v 100.00 | grep -q '[0-9]' || break; sleep 1; done
lvs -a -o lv_name,segtype,sync_percent,devices vg >&2
sums` + names + `
vgchange -an vg >&2
` + thinScript
	want, _ := guesttest.Sums(t, images, script)
	t.Log(want)
	got, warnings := scanImages(t, Options{}, images...)
	if len(warnings) > 0 {
		t.Error(warnings)
	}
	for name, w := range want {
		sameSum(t, got, name, w)
	}
	if v := got["tv-back"]; !errors.Is(v.Err, guest.ErrUnsupported) {
		t.Errorf("a cache that writes back: %+v", v)
	}
	if n := len(images) + len(want) + 2; len(got) != n {
		t.Errorf("%d volumes, not %d", len(got), n)
	}
	for lost := range 5 {
		withoutPVs(t, images, want, lost)
	}
	withoutPVs(t, images, want, 0, 3)
	withoutPVs(t, images, want, 1, 2)
}

func sameSum(t *testing.T, got map[string]Volume, name, want string) {
	t.Helper()
	v := got[name]
	if v.Device == nil {
		t.Errorf("%s: %+v", name, v)
		return
	}
	if sum := fmt.Sprint(v.Device.Size(), " ", sum(t, v.Device)); sum != want {
		t.Errorf("%s (%s): %s, want %s", name, v.Detail, sum, want)
	}
}

// withoutPVs checks the RAID volumes with disks missing: right, or an error; never wrong.
func withoutPVs(t *testing.T, images []string, want map[string]string, lost ...int) {
	t.Helper()
	var left []string
	for i, image := range images {
		if i != lost[0] && i != lost[len(lost)-1] {
			left = append(left, image)
		}
	}
	got, _ := scanImages(t, Options{}, left...)
	for _, lv := range lvmGuest {
		v := got["vg-"+lv.name]
		if v.Device == nil && len(lost) > lv.lost {
			continue
		}
		sameSum(t, got, "vg-"+lv.name, want["vg-"+lv.name])
	}
}
