package volume

import (
	"errors"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// lvm runs a command of lvm2 on loop devices, without device-mapper.
type lvm struct {
	t     *testing.T
	loops []string
}

func newLVM(t *testing.T, images ...string) *lvm {
	t.Helper()
	guesttest.Needs(t, "lvm", "losetup")
	l := &lvm{t: t}
	for _, image := range images {
		loop := strings.TrimSpace(guesttest.Run(t, "losetup", "-f", "--show", image))
		t.Cleanup(func() { guesttest.Run(t, "losetup", "-d", loop) })
		l.loops = append(l.loops, loop)
	}
	return l
}

func (l *lvm) run(args ...string) string {
	l.t.Helper()
	filter := `"a|^` + strings.Join(l.loops, `$|","a|^`) + `$|","r|.*|"`
	config := `devices { use_devicesfile=0 filter=[` + filter + `] } activation { udev_sync=0 udev_rules=0 } backup { backup=0 archive=0 }`
	cmd := exec.Command("lvm", append([]string{args[0], "--config", config}, args[1:]...)...)
	cmd.Env = append(cmd.Environ(), "LVM_SUPPRESS_FD_WARNINGS=1")
	out, err := cmd.Output()
	if err != nil {
		l.t.Fatalf("lvm %v: %v\n%s", args, err, err.(*exec.ExitError).Stderr)
	}
	return string(out)
}

func (l *lvm) create(args ...string) {
	l.t.Helper()
	l.run(append([]string{"lvcreate", "-an", "-Zn", "-Wn", "--driverloaded", "n"}, args...)...)
}

var ranges = regexp.MustCompile(`^(.+):(\d+)-(\d+)$`)

// truth puts together from the segments that lvs lists what a logical volume is, out of the loop devices.
func (l *lvm) truth(vg, lv string) guest.Device {
	l.t.Helper()
	var parts []place
	for _, line := range strings.Split(strings.TrimSpace(l.run("lvs", "--noheadings", "--separator", "|", "--units", "b", "--nosuffix",
		"-o", "seg_size,stripe_size,vg_extent_size,seg_pe_ranges", "-O", "seg_start", vg+"/"+lv)), "\n") {
		f := strings.Split(strings.TrimSpace(line), "|")
		num := func(s string) int64 {
			n, err := strconv.ParseInt(s, 10, 64)
			if err != nil {
				l.t.Fatal(line, err)
			}
			return n
		}
		extent, stripe := num(f[2]), num(f[1])
		var devs []place
		for _, r := range strings.Fields(f[3]) {
			m := ranges.FindStringSubmatch(r)
			devs = append(devs, place{whole{Device: guesttest.OpenDevice(l.t, m[1])}, 1<<20 + num(m[2])*extent, (num(m[3]) - num(m[2]) + 1) * extent})
		}
		if stripe == 0 {
			stripe = num(f[0])
		}
		for off := int64(0); off < num(f[0]); off += stripe {
			row, i := off/stripe/int64(len(devs)), off/stripe%int64(len(devs))
			parts = append(parts, place{devs[i].dev, devs[i].off + row*stripe, stripe})
		}
	}
	dev, err := concat(parts)
	if err != nil {
		l.t.Fatal(err)
	}
	return dev
}

// TestLVM: linear and striped volumes in several segments on partitions and whole disks, by what lvs says of them.
func TestLVM(t *testing.T) {
	images := []string{guesttest.Sparse(t, 200<<20), guesttest.Sparse(t, 100<<20), guesttest.Sparse(t, 60<<20)}
	for i, image := range images {
		scatter(t, image, 1<<20, 60<<20-2<<20, uint64(i))
	}
	l := newLVM(t, images...)
	l.run("pvcreate", "-q", "--pvmetadatacopies", "2", l.loops[0])
	l.run("pvcreate", "-q", "--pvmetadatacopies", "0", l.loops[1])
	l.run("pvcreate", "-q", "--labelsector", "3", l.loops[2])
	l.run("vgcreate", "-s", "1M", "vg-0", l.loops[0], l.loops[1])
	l.create("-n", "root", "-L", "40M", "vg-0")
	l.create("-n", "a-b", "-L", "8M", "vg-0")
	l.create("-n", "str", "-i", "2", "-I", "64k", "-L", "16M", "vg-0")
	// The text goes around the ring a few times.
	for range 25 {
		l.run("lvextend", "--driverloaded", "n", "-L", "+1M", "vg-0/root")
		l.run("lvextend", "--driverloaded", "n", "-L", "+1M", "vg-0/a-b")
	}
	l.run("vgcreate", "one", l.loops[2])
	l.create("-n", "lv", "-l", "100%FREE", "one")
	guesttest.Run(t, "sync")

	got, warnings := scanImages(t, Options{}, images...)
	if len(warnings) > 0 {
		t.Error(warnings)
	}
	for _, lv := range []struct{ name, vg, lv string }{
		{"vg--0-root", "vg-0", "root"}, {"vg--0-a--b", "vg-0", "a-b"}, {"vg--0-str", "vg-0", "str"}, {"one-lv", "one", "lv"},
	} {
		v := got[lv.name]
		if v.Device == nil || v.Kind != KindLogical {
			t.Errorf("%s: %+v", lv.name, v)
			continue
		}
		want := l.truth(lv.vg, lv.lv)
		sameBytes(t, lv.name, v.Device, want)
		sameBytes(t, lv.name+" by its map", pieces(t, v, images...), want)
	}
	for i := range images {
		if v := got["disk"+strconv.Itoa(i)]; v.Signature != "LVM2_member" {
			t.Errorf("%+v", v)
		}
	}
	if len(got) != 7 {
		t.Errorf("%d volumes", len(got))
	}

	// One header damaged: the other copy does. A disk missing: what does not need it is there.
	damage(t, images[0], 4096+8, 1)
	got, warnings = scanImages(t, Options{}, images[0])
	if len(warnings) != 2 || got["vg--0-a--b"].Device == nil || !errors.Is(got["vg--0-str"].Err, guest.ErrDamaged) {
		t.Errorf("%+v %v", got, warnings)
	}
	sameBytes(t, "a-b with a disk missing", got["vg--0-a--b"].Device, l.truth("vg-0", "a-b"))
}
