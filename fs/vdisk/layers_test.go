package vdisk

import (
	"fmt"
	"iter"
	"path/filepath"
	"testing"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// layers splits a disk for a chain of two: the base is wrong in the places that
// the upper file has, so that a reader that takes one for the other is caught.
type layers struct {
	base Source
	disk Source          // in whole sectors
	over []extent.Extent // what is in the upper file, in steps of 64 KiB
}

func newLayers(t *testing.T, src Source) layers {
	l := layers{disk: Flat(src)}
	for _, e := range allocated(t, l.disk, mib) {
		for off := e.Off; off < e.End(); off += mib {
			if n := off / mib; n%3 == 0 {
				l.over = append(l.over, ext(off, 576*kib))
			} else if n%7 == 0 {
				l.over = append(l.over, ext(off+64*kib, 960*kib))
			}
		}
	}
	for i, e := range l.over {
		l.over[i] = extent.Intersect(e, ext(0, l.disk.Size()))
	}
	l.over = extent.Normalise(l.over)
	if len(l.over) == 0 {
		t.Fatal("nothing for the upper file")
	}
	l.base = spoiled{l.disk, l.over}
	return l
}

// spoiled has other bytes in over.
type spoiled struct {
	Source
	over []extent.Extent
}

func (s spoiled) ReadAt(p []byte, off int64) (int, error) {
	n, err := s.Source.ReadAt(p, off)
	for _, e := range s.over {
		part := extent.Intersect(e, ext(off, int64(n)))
		for i := part.Off; i < part.End(); i++ {
			p[i-off] ^= 0x5a
		}
	}
	return n, err
}

func (s spoiled) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	all := append([]extent.Extent(nil), s.over...)
	for e, err := range s.Source.Allocated(granularity) {
		if err != nil {
			return failed(err)
		}
		all = append(all, e)
	}
	return extent.Coarsen(extent.All(extent.Normalise(all)), granularity, s.Size())
}

// units says of each unit (bytes) of the disk whether it is in the upper file.
func (l layers) units(unit int64) []bool {
	all := make([]bool, divUp(l.disk.Size(), unit))
	for _, e := range l.over {
		for i := e.Off / unit; i < divUp(e.End(), unit); i++ {
			all[i] = true
		}
	}
	return all
}

// overlay has QEMU make a file over a converted base, and write into it.
func overlay(driver, baseOptions, options string) func(t *testing.T, d tableDisk, dir string) (string, judge) {
	return func(t *testing.T, d tableDisk, dir string) (string, judge) {
		name, says := "disk."+driver, qemuSays(driver)
		if d.src.Size() == 0 {
			mustQEMU(t, dir, "qemu-img", "create", "-q", "-f", driver, "base", "0")
			mustQEMU(t, dir, "qemu-img", "create", "-q", "-f", driver, "-b", "base", "-F", driver, name)
			return name, says
		}
		l := newLayers(t, d.src)
		store(t, l.base, filepath.Join(dir, "base.raw"))
		with := func(command []string, options string, args ...string) []string {
			if options != "" {
				command = append(command, "-o", options)
			}
			return append(command, args...)
		}
		base := "base." + driver
		mustQEMU(t, dir, "qemu-img", with([]string{"convert", "-f", "raw", "-O", driver}, baseOptions, "base.raw", base)...)
		mustQEMU(t, dir, "qemu-img", with([]string{"create", "-q", "-f", driver, "-b", base, "-F", driver}, options, name)...)
		writeParts(t, dir, driver, name, l.disk, l.over)
		return name, says
	}
}

// vmfsDisk is a flat disk with the descriptor that ESXi gives it.
func vmfsDisk(t *testing.T, d tableDisk, dir string) (string, judge) {
	store(t, Flat(d.src), filepath.Join(dir, "web-flat.vmdk"))
	writeFiles(t, dir, map[string][]byte{"web.vmdk": deltaText("vmfs", "11111111", "ffffffff", "",
		fmt.Sprintf(`RW %d VMFS "web-flat.vmdk"`, divUp(d.src.Size(), sector)))})
	return "web.vmdk", qemuSays("vmdk")
}

// esxDelta is a snapshot as ESXi leaves it, by the writers of these tests.
func esxDelta(kind string) func(t *testing.T, d tableDisk, dir string) (string, judge) {
	return func(t *testing.T, d tableDisk, dir string) (string, judge) {
		l := newLayers(t, d.src)
		vmfsDisk(t, tableDisk{src: l.base}, dir)
		sectors, write, line := l.disk.Size()/sector, writeCOWD, "VMFSSPARSE"
		delta := esxDisk{sectors: sectors, grain: 128, src: l.disk}
		if kind == "seSparse" {
			write, line, delta.grain = writeSESparse, "SESPARSE", 8
		}
		for _, here := range l.units(delta.grain * sector) {
			delta.states = append(delta.states, map[bool]esxState{true: esxData, false: esxAbsent}[here])
		}
		writeFiles(t, dir, map[string][]byte{
			"web-000001.vmdk":       deltaText(kind, "22222222", "11111111", "web.vmdk", fmt.Sprintf(`RW %d %s "web-000001-delta.vmdk"`, sectors, line)),
			"web-000001-delta.vmdk": write(delta),
		})
		return "web-000001.vmdk", qemuSays("vmdk")
	}
}

// differencingVHD is over a fixed VHD of QEMU's. QEMU reads no differencing
// VHD; libvhdi does.
func differencingVHD(t *testing.T, d tableDisk, dir string) (string, judge) {
	l := newLayers(t, d.src)
	store(t, l.base, filepath.Join(dir, "base.raw"))
	mustQEMU(t, dir, "qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", "subformat=fixed,force_size=on", "base.raw", "base.vhd")
	foot := make([]byte, sector)
	base, err := OpenRaw(filepath.Join(dir, "base.vhd"))
	if err != nil {
		t.Fatal(err)
	}
	defer base.Close()
	if _, err := readFull(base, foot, base.Size()-sector); err != nil {
		t.Fatal(err)
	}
	child := vhdDisk{size: l.disk.Size(), block: 2 * mib, states: l.units(sector), id: 3, name: "base.vhd", src: l.disk}
	b := writeVHD(child)
	copy(b[512+40:], foot[68:84])
	signVHD(b[512:512+1024], 36)
	writeFiles(t, dir, map[string][]byte{"disk.avhd": b})
	return "disk.avhd", libvhdiSays(filepath.Join(dir, "base.vhd"))
}

// differencingVHDX is over a VHDX of QEMU's, which reads no differencing one.
func differencingVHDX(t *testing.T, d tableDisk, dir string) (string, judge) {
	l := newLayers(t, d.src)
	store(t, l.base, filepath.Join(dir, "base.raw"))
	mustQEMU(t, dir, "qemu-img", "convert", "-f", "raw", "-O", "vhdx", "base.raw", "base.vhdx")
	size, block := l.disk.Size(), int64(mib)
	if size > tib {
		block = 16 * mib // the BAT of these files has 2 MiB
	}
	m := newMaker(block, sector, size)
	m.plain = true // libvhdi takes the user's item for the disk's
	linkage := openVHDXFile(t, filepath.Join(dir, "base.vhdx")).DataWriteGUID()
	m.locator = [][2]string{{"parent_linkage", linkage.String()}, {"relative_path", `.\base.vhdx`}}
	bitmaps := map[int64][]byte{} // index in the BAT => bits
	for b := int64(-1); ; {
		next := nextBlock(l.over, b+1, block)
		if next < 0 {
			break
		}
		b = next
		data := noise(uint64(b), block) // where a bit is clear: not to be read
		at := m.bitmap(b)
		if bitmaps[at] == nil {
			bitmaps[at] = make([]byte, madeMiB)
		}
		for _, e := range l.over {
			part := extent.Intersect(e, ext(b*block, block))
			if part.Empty() {
				continue
			}
			readPadded(l.disk, data[part.Off-b*block:part.End()-b*block], part.Off)
			for s := part.Off / sector; s < part.End()/sector; s++ {
				bit := s % (m.ratio() * block / sector)
				bitmaps[at][bit/8] |= 1 << (bit % 8)
			}
		}
		m.fill(b, 7, data)
	}
	for at, b := range bitmaps {
		m.bat[at] = uint64(m.add(b)) | 6
	}
	writeFile(t, filepath.Join(dir, "disk.avhdx"), m.bytes())
	return "disk.avhdx", libvhdiSays(filepath.Join(dir, "base.vhdx"))
}

// nextBlock is the first block from b on with something of list in it, or -1.
func nextBlock(list []extent.Extent, b, block int64) int64 {
	for _, e := range list {
		if e.End() > b*block {
			return max(b, e.Off/block)
		}
	}
	return -1
}

func libvhdiSays(bases ...string) judge {
	return judge{"identical for libvhdi", func(t *testing.T, d tableDisk, dir, name, raw string) {
		var parts []extent.Extent
		if size := roundUp(d.src.Size(), sector); d.data != nil {
			for _, e := range append([]extent.Extent{ext(size/3, mib)}, d.data...) {
				around := ext(max(0, e.Off-300*kib), e.Len+600*kib)
				parts = append(parts, extent.Intersect(extent.Align(around, sector), ext(0, size)))
			}
		}
		got := filepath.Join(dir, "libvhdi")
		libvhdi(t, got, parts, append([]string{filepath.Join(dir, name)}, bases...)...)
		mustQEMU(t, dir, "qemu-img", "compare", "-f", "raw", "-F", "raw", got, raw)
	}}
}
