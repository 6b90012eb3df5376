package whole

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

const (
	huge = 10 << 40 // bytes
	// QEMU's vhdx driver tells nothing of holes, its vmdk driver of one grain at a
	// time: from this size on, windows of them are compared instead of all.
	slow = 2 << 30
)

// sources are the disks that everything must be right for.
var sources = []struct {
	name string
	init []string // arguments
	make func(t *testing.T, dir string) disk
}{
	{"empty", nil, func(t *testing.T, dir string) disk { return newRaw(t, dir+"/d.raw", 0) }},
	{"one sector", nil, random(512)},
	{"one byte", nil, random(1)},
	{"513 bytes", nil, random(513)},
	{"64 KiB and a byte", []string{"--chunk-size", "64K"}, random(64<<10 + 1)},
	{"1 MiB and 7 bytes", []string{"--chunk-size", "4M"}, random(1<<20 + 7)},
	{"a page of chunks and a byte", nil, func(t *testing.T, dir string) disk {
		return newRaw(t, dir+"/d.img", 256*128<<10+1, piece{0, 700}, piece{255*128<<10 + 9, 127 << 10}, piece{256 * 128 << 10, 1})
	}},
	{"a page of pages and a sector", []string{"--chunk-size", "64K"}, func(t *testing.T, dir string) disk {
		return newRaw(t, dir+"/d.raw", 256*256*64<<10+512, piece{256*64<<10 - 3, 10}, piece{256 * 256 * 64 << 10, 512})
	}},
	{"all zero, holes", nil, func(t *testing.T, dir string) disk { return newRaw(t, dir+"/d.raw", 3<<30) }},
	{"all zero, written", nil, func(t *testing.T, dir string) disk { return newZeros(t, dir+"/d.raw", 21<<20+512) }},
	{"all random", []string{"--no-encryption"}, random(17 << 20)},
	{"sparse 10 TiB", nil, func(t *testing.T, dir string) disk { return newHuge(t, dir+"/d.raw") }},
	{"Debian", nil, func(t *testing.T, dir string) disk { return newDebian(t, dir+"/d.img") }},
	{"qcow2 chain", nil, newChain},
	{"qcow2 by zlib", nil, func(t *testing.T, dir string) disk { return newCompressed(t, dir+"/d.qcow2", "compression_type=zlib") }},
	{"qcow2 by zstd", nil, func(t *testing.T, dir string) disk {
		return newCompressed(t, dir+"/d.qcow2", "compression_type=zstd,cluster_size=2M")
	}},
	{"VMDK, split", nil, func(t *testing.T, dir string) disk {
		return newConverted(t, dir+"/d.vmdk", "vmdk", "subformat=twoGbMaxExtentSparse")
	}},
	{"VMDK, stream", nil, func(t *testing.T, dir string) disk {
		return newConverted(t, dir+"/d.vmdk", "vmdk", "subformat=streamOptimized")
	}},
	{"VMDK over a VMDK", nil, newDelta},
	{"VHD", nil, func(t *testing.T, dir string) disk { return newConverted(t, dir+"/d.vhd", "vpc", "force_size=on") }},
	{"VHD, fixed", nil, func(t *testing.T, dir string) disk {
		return newConverted(t, dir+"/d.vhd", "vpc", "subformat=fixed,force_size=on")
	}},
	{"VHDX", nil, func(t *testing.T, dir string) disk {
		return newConverted(t, dir+"/d.vhdx", "vhdx", "subformat=dynamic")
	}},
	{"VHDX, fixed", nil, func(t *testing.T, dir string) disk {
		return newConverted(t, dir+"/d.vhdx", "vhdx", "subformat=fixed,block_size=1M")
	}},
	{"qcow2 version 2", nil, func(t *testing.T, dir string) disk { return newCompressed(t, dir+"/d.qcow2", "compat=0.10") }},
}

func random(size int64) func(t *testing.T, dir string) disk {
	return func(t *testing.T, dir string) disk { return newRaw(t, dir+"/d.raw", size, piece{0, size}) }
}

func newHuge(t *testing.T, file string) disk {
	return newRaw(t, file, huge, piece{0, 1 << 20}, piece{3<<40 + 4097, 300_000}, piece{5 << 40, 2 << 20}, piece{huge - 777, 777})
}

// TestInterop backs up every kind of disk and has qemu compare each with what
// comes back: restored in all formats, and as a mount shows it.
func TestInterop(t *testing.T) {
	needs(t, "qemu-img")
	for _, s := range sources {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			dir := newDir(t)
			src := s.make(t, dir)
			r := newRepository(t, s.init...)
			p, _ := r.backup(t, src.file, "--vm", "vm")
			want := padded(t, src, dir)

			out := filepath.Join(dir, "out")
			for _, format := range []string{"raw", "qcow2", "vmdk", "vhdx", "vhd"} {
				file := filepath.Join(out, "disk0."+format)
				if src.size == 0 && format != "raw" && format != "qcow2" || src.size > 2040<<30 && format == "vhd" {
					// A file of that format cannot hold a disk of no bytes, or that many.
					r.wants(t, 1, "disk0 as "+format, "restore", p.path(), "--to", out, "--format", format)
					gone(t, file, file+".partial")
					continue
				}
				r.must(t, "restore", p.path(), "--to", out, "--format", format)
				compare(t, want, file, format)
			}
			if out := filepath.Join(dir, "stream", "out"); src.size > 0 {
				r.must(t, "restore", p.path(), "--to", out, "--format", "vmdk-stream")
				compare(t, want, filepath.Join(out, "disk0.vmdk"), "vmdk")
			} else {
				r.wants(t, 1, "an empty disk", "restore", p.path(), "--to", out, "--format", "vmdk-stream")
				gone(t, filepath.Join(out, "disk0.vmdk"))
			}
			raw := filepath.Join(out, "disk0.raw")
			exact(t, src, raw)
			if got, had := allocated(t, raw), allocated(t, src.file); src.format == "raw" && got > had+1<<20 {
				t.Errorf("restored raw takes up %d bytes, its source %d", got, had)
			}

			needs(t, "fuse")
			m := r.mount(t)
			at := filepath.Join(m.dir, "vm", "latest")
			exact(t, src, filepath.Join(at, "disk0.raw"))
			compare(t, want, filepath.Join(at, "disk0.raw"), "raw")
			compare(t, want, filepath.Join(at, "disk0.qcow2"), "qcow2")
			if src.size == 0 {
				gone(t, at+"/disk0.vmdk", at+"/disk0-flat.vmdk", at+"/disk0.vhdx")
			} else {
				compare(t, want, filepath.Join(at, "disk0.vmdk"), "vmdk")
				compare(t, want, filepath.Join(at, "disk0-flat.vmdk"), "raw")
				compare(t, want, filepath.Join(at, "disk0.vhdx"), "vhdx")
			}
			m.stop(t, interrupt)
		})
	}
}

// padded is the source as other formats hold it: in whole sectors.
func padded(t *testing.T, d disk, dir string) disk {
	t.Helper()
	if d.size%512 == 0 {
		return d
	}
	to := disk{filepath.Join(dir, "padded.raw"), "raw", (d.size + 511) &^ 511}
	tool(t, "cp", "--sparse=always", d.file, to.file)
	if err := os.Truncate(to.file, to.size); err != nil {
		t.Fatal(err)
	}
	return to
}

// gone wants that files do not exist.
func gone(t *testing.T, files ...string) {
	t.Helper()
	for _, f := range files {
		if _, err := os.Lstat(f); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v, should not exist", f, err)
		}
	}
}

// exact compares a raw file byte by byte, its size included, with the source
// as cmp or, where that has holes or another format, qemu reads it.
func exact(t *testing.T, src disk, raw string) {
	t.Helper()
	st, err := os.Stat(raw)
	if err != nil {
		t.Fatal(err)
	}
	if st.Size() != src.size {
		t.Errorf("%s has %d bytes, want %d", raw, st.Size(), src.size)
	}
	if src.format == "raw" && src.size <= 256<<20 {
		tool(t, "cmp", src.file, raw)
	}
}

// compare has qemu compare a file with the source, and check it where it can.
func compare(t *testing.T, src disk, file, format string) {
	t.Helper()
	if format == "vhd" {
		format = "vpc" // QEMU's name for it
	}
	var info struct {
		Size int64 `json:"virtual-size"`
	}
	if err := json.Unmarshal([]byte(tool(t, "qemu-img", "info", "--output=json", "-f", format, file)), &info); err != nil {
		t.Fatal(err)
	}
	if info.Size != (src.size+511)&^511 {
		t.Errorf("%s: a disk of %d bytes, want %d", file, info.Size, src.size)
	}
	sparseVMDK := format == "vmdk" && filepath.Base(filepath.Dir(file)) == "out"
	if format == "qcow2" || format == "vhdx" || sparseVMDK {
		tool(t, "qemu-img", "check", "-q", "-f", format, file)
	}
	if (format == "vhdx" || sparseVMDK) && src.size >= slow {
		for _, off := range windows(src.size) {
			compareWindow(t, src, file, format, off)
		}
		return
	}
	out, err := exec.Command("qemu-img", "compare", "-f", src.format, "-F", format, src.file, file).CombinedOutput()
	if err != nil {
		t.Errorf("qemu-img compare %s %s: %v\n%s", src.file, file, err, out)
	}
}

// windowSize is what is compared at each of windows, bytes.
const windowSize = 64 << 20

// windows are where the disks larger than slow have data, and some places where they have none.
func windows(size int64) (offs []int64) {
	for _, off := range []int64{0, 256*64<<10 - 4096, 1 << 40, 3 << 40, 5<<40 - 512, 7<<40 + 1<<30, size - windowSize} {
		if off >= 0 && off+windowSize <= size {
			offs = append(offs, off)
		}
	}
	return offs
}

// compareWindow compares one window of two disks: both are read through
// QEMU's raw driver, which can show a part of any image.
func compareWindow(t *testing.T, src disk, file, format string, off int64) {
	t.Helper()
	part := func(file, format string) string {
		return fmt.Sprintf(`json:{"driver":"raw","offset":%d,"size":%d,"file":{"driver":%q,"file":{"driver":"file","filename":%q}}}`,
			off, windowSize, format, file)
	}
	out, err := exec.Command("qemu-img", "compare", part(src.file, src.format), part(file, format)).CombinedOutput()
	if err != nil {
		t.Errorf("qemu-img compare %s %s from %d: %v\n%s", src.file, file, off, err, out)
	}
}

// TestUnchangedHuge: the second backup of an unchanged 10 TiB disk takes
// moments, little memory and almost no space.
func TestUnchangedHuge(t *testing.T) {
	needs(t)
	t.Parallel()
	d := newHuge(t, filepath.Join(newDir(t), "huge.raw"))
	r := newRepository(t)
	_, first := r.backup(t, d.file)
	apparent, taken := usage(t, r.dir)
	p, second := r.backup(t, d.file)
	apparent2, taken2 := usage(t, r.dir)
	t.Logf("first backup of 10 TiB: %.2fs, %d MiB; second: %.2fs, %d MiB, the repository grew by %d bytes, %d on disk",
		first.took.Seconds(), first.rss>>20, second.took.Seconds(), second.rss>>20, apparent2-apparent, taken2-taken)
	if p.New != 0 {
		t.Errorf("%d bytes of an unchanged disk are new", p.New)
	}
	if apparent2-apparent > 100<<10 || taken2-taken > 100<<10 {
		t.Errorf("the repository grew by more than 100 KiB")
	}
	for _, res := range []result{first, second} {
		if res.rss > 300<<20 {
			t.Errorf("a backup took %d MiB of memory", res.rss>>20)
		}
	}
}

// TestDebianFiles: the kernel mounts the ext4 inside a restored and a mounted
// disk and finds every file of the source in it.
func TestDebianFiles(t *testing.T) {
	needs(t, "root", "fuse", "losetup", "e2fsck")
	t.Parallel()
	dir := newDir(t)
	src := newDebian(t, dir+"/debian.img")
	r := newRepository(t)
	r.backup(t, src.file)
	r.must(t, "restore", "debian/latest", "--to", dir+"/out")
	m := r.mount(t)
	inside := func(file string) (string, func()) {
		dev := loop(t, file, "--read-only", "--offset", fmt.Sprint(rootOff), "--sizelimit", fmt.Sprint(rootSize))
		tool(t, "e2fsck", "-f", "-n", dev)
		at, unmount := kernelMount(t, "-o", "ro,noload", dev)
		return at, func() {
			unmount()
			tool(t, "losetup", "--detach", dev)
		}
	}
	want, done := inside(src.file)
	defer done()
	for _, file := range []string{dir + "/out/disk0.raw", m.dir + "/debian/latest/disk0.raw"} {
		tool(t, "sgdisk", "--verify", file)
		got, done := inside(file)
		tool(t, "diff", "-r", "--no-dereference", want, got)
		done()
	}
	m.stop(t, terminate)
}
