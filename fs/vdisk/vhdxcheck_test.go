package vdisk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// vhdxReport is what checkVHDX found in a file that obeys MS-VHDX.
type vhdxReport struct {
	disk    int64 // bytes
	present int   // payload blocks in the file
	fixed   bool
	sector  int64 // logical, bytes
}

// checkVHDX holds a dynamic or fixed VHDX against MS-VHDX, version 20180912, and to two
// stricter rules of ours: both headers and both region tables are good, and
// every byte of the file after the BAT belongs to a block. It shares no
// constant with the code it checks.
func checkVHDX(r io.ReaderAt, size int64) (rep vhdxReport, err error) {
	defer func() {
		if e, ok := recover().(vhdxError); ok {
			err = e
		}
	}()
	c := &vhdxChecker{r: r, size: size}
	c.identifier()
	c.headers()
	bat, meta := c.regions()
	block := c.metadata(meta, &rep)
	rep.present = c.bat(bat, block, rep)
	return rep, nil
}

type vhdxError struct{ error }

type vhdxChecker struct {
	r    io.ReaderAt
	size int64
	used []extent.Extent // log, regions, blocks
}

func (c *vhdxChecker) must(ok bool, format string, args ...any) {
	if !ok {
		panic(vhdxError{fmt.Errorf(format, args...)})
	}
}

func (c *vhdxChecker) read(off, n int64) []byte {
	b := make([]byte, n)
	m, err := c.r.ReadAt(b, off)
	c.must(int64(m) == n, "%d bytes at %d: %v", n, off, err)
	return b
}

func (c *vhdxChecker) zero(b []byte, what string) {
	c.must(!slices.ContainsFunc(b, func(x byte) bool { return x != 0 }), "%s is not zero", what)
}

func (c *vhdxChecker) sum(b []byte, what string) {
	want := binary.LittleEndian.Uint32(b[4:])
	clear(b[4:8])
	got := crc32.Checksum(b, crc32.MakeTable(0x82F63B78))
	c.must(got == want, "%s: CRC-32C %08x, computed %08x", what, want, got)
}

// place notes a used part of the file: 1 MiB aligned, from 1 MiB on, inside.
func (c *vhdxChecker) place(off, length int64, what string) {
	c.must(off%1048576 == 0 && off >= 1048576, "%s at %d", what, off)
	c.must(length > 0 && length%1048576 == 0, "%s of %d bytes", what, length)
	c.must(off+length <= c.size, "%s at %d+%d leaves the file of %d", what, off, length, c.size)
	c.used = append(c.used, extent.Extent{Off: off, Len: length})
}

func (c *vhdxChecker) identifier() { // §2.2.1
	b := c.read(0, 65536)
	c.must(string(b[:8]) == "vhdxfile", "no signature")
	c.zero(b[520:], "space after the file identifier")
}

func (c *vhdxChecker) headers() { // §2.2.2
	var sequence [2]uint64
	for i, off := range []int64{65536, 131072} {
		b := c.read(off, 4096)
		c.must(string(b[:4]) == "head", "header %d: no signature", i)
		c.sum(b, fmt.Sprintf("header %d", i))
		le := binary.LittleEndian
		sequence[i] = le.Uint64(b[8:])
		c.zero(b[48:64], "LogGuid of a file that must not need a replay")
		c.must(le.Uint16(b[64:]) == 0, "log version %d", le.Uint16(b[64:]))
		c.must(le.Uint16(b[66:]) == 1, "version %d", le.Uint16(b[66:]))
		c.zero(b[80:], "reserved part of the header")
		c.zero(c.read(off+4096, 65536-4096), "space after the header")
		logOff, logLen := int64(le.Uint64(b[72:])), int64(le.Uint32(b[68:]))
		if i == 0 {
			c.place(logOff, logLen, "log")
			c.zero(c.read(logOff, logLen), "log")
		}
		c.must(logOff == c.used[0].Off && logLen == c.used[0].Len, "headers differ about the log")
	}
	c.must(sequence[0] != sequence[1], "both headers have sequence %d", sequence[0])
}

func (c *vhdxChecker) regions() (bat, meta extent.Extent) { // §2.2.3
	b := c.read(196608, 65536)
	c.must(string(b) == string(c.read(262144, 65536)), "region tables differ")
	c.zero(c.read(327680, 1048576-327680), "reserved part of the first MiB")
	c.must(string(b[:4]) == "regi", "region table: no signature")
	c.sum(b, "region table")
	le := binary.LittleEndian
	n := int(le.Uint32(b[8:]))
	c.must(n == 2, "%d regions", n)
	c.zero(b[12:16], "reserved field of the region table")
	c.zero(b[16+32*n:], "space after the region entries")
	for i := range n {
		e := b[16+32*i:]
		at := extent.Extent{Off: int64(le.Uint64(e[16:])), Len: int64(le.Uint32(e[24:]))}
		c.must(le.Uint32(e[28:]) == 1, "region %d is not required", i)
		c.place(at.Off, at.Len, "region")
		switch g := fmt.Sprintf("%x", e[:16]); g {
		case "6677c22d23f600429d64115e9bfd4a08":
			bat = at
		case "06a27c8b90479a4bb8fe575f050f886e":
			meta = at
		default:
			c.must(false, "region %s", g)
		}
	}
	c.must(bat.Len > 0 && meta.Len > 0, "a region is missing")
	return bat, meta
}

func (c *vhdxChecker) metadata(at extent.Extent, rep *vhdxReport) (block int64) { // §2.6
	b := c.read(at.Off, at.Len)
	le := binary.LittleEndian
	c.must(string(b[:8]) == "metadata", "metadata: no signature")
	c.zero(b[8:10], "reserved field of the metadata table")
	c.zero(b[12:32], "reserved field of the metadata table")
	n := int(le.Uint16(b[10:]))
	c.must(n == 5, "%d metadata items", n)
	c.zero(b[32+32*n:65536], "space after the metadata entries")
	items := map[string][]byte{} // GUID => value
	var used []extent.Extent
	for i := range n {
		e := b[32+32*i : 64+32*i]
		off, length, flags := int64(le.Uint32(e[16:])), int64(le.Uint32(e[20:])), le.Uint32(e[24:])
		g := fmt.Sprintf("%x", e[:16])
		wantFlags := uint32(6)
		if strings.HasPrefix(g, "3767a1ca") {
			wantFlags = 4
		}
		c.must(flags == wantFlags, "item %s: flags %d", g, flags)
		c.zero(e[28:32], "reserved field of a metadata entry")
		c.must(off >= 65536 && length > 0 && off+length <= at.Len, "item %s at %d+%d", g, off, length)
		items[g] = b[off : off+length]
		used = append(used, extent.Extent{Off: off, Len: length})
	}
	c.apart(used, "metadata items")
	get := func(g string, n int) []byte {
		c.must(len(items[g]) == n, "item %s has %d bytes", g, len(items[g]))
		return items[g]
	}
	params := get("3767a1ca36fa434db3b633f0aa44e76b", 8)
	block = int64(le.Uint32(params))
	c.must(block >= 1<<20 && block <= 256<<20 && block&(block-1) == 0, "block size %d", block)
	c.must(le.Uint32(params[4:])>>1 == 0, "file parameters flags %x", params[4:])
	rep.fixed = params[4]&1 == 1
	rep.sector = int64(le.Uint32(get("1dbf41816fa90947ba47f233a8faab5f", 4)))
	c.must(rep.sector == 512 || rep.sector == 4096, "logical sector of %d", rep.sector)
	rep.disk = int64(le.Uint64(get("2442a52f1bcd7648b2115dbed83bf4b8", 8)))
	c.must(rep.disk > 0 && rep.disk%rep.sector == 0 && rep.disk <= 64<<40, "disk of %d bytes", rep.disk)
	c.must(le.Uint32(get("c748a3cd5d4471449cc9e9885251c556", 4)) == 4096, "physical sector")
	id := get("ab12cabee6b2234593efc309e000c746", 16)
	c.must(slices.ContainsFunc(id, func(x byte) bool { return x != 0 }), "disk id is zero")
	return block
}

func (c *vhdxChecker) bat(at extent.Extent, block int64, rep vhdxReport) (present int) { // §2.5
	ratio := (1 << 23) * rep.sector / block
	payload := (rep.disk + block - 1) / block
	entries := payload + (payload-1)/ratio
	c.must(entries*8 <= at.Len, "BAT of %d bytes for %d entries", at.Len, entries)
	b := c.read(at.Off, at.Len)
	c.zero(b[entries*8:], "space after the BAT")
	for i := range entries {
		e := binary.LittleEndian.Uint64(b[8*i:])
		state, off := e&7, int64(e&^0xFFFFF)
		c.must(e&0xFFFF8 == 0, "BAT entry %d: reserved bits in %x", i, e)
		if i%(ratio+1) == ratio {
			c.must(e == 0, "sector bitmap entry %d is %x", i, e)
			continue
		}
		c.must(state == 6 || state == 2 && !rep.fixed, "BAT entry %d: state %d", i, state)
		if state == 2 {
			c.must(off == 0, "BAT entry %d: zero block at %d", i, off)
			continue
		}
		c.place(off, block, fmt.Sprintf("block %d", i))
		present++
	}
	c.apart(c.used, "parts of the file")
	total := int64(1 << 20)
	for _, e := range c.used {
		total += e.Len
	}
	c.must(total == c.size, "%d bytes used of %d", total, c.size)
	return present
}

func (c *vhdxChecker) apart(es []extent.Extent, what string) {
	es = slices.Clone(es)
	slices.SortFunc(es, func(a, b extent.Extent) int { return int(min(1, max(-1, a.Off-b.Off))) })
	for i := 1; i < len(es); i++ {
		c.must(es[i].Off >= es[i-1].End(), "%s overlap: %v and %v", what, es[i-1], es[i])
	}
}

func TestVHDXStructure(t *testing.T) {
	for _, l := range append(layouts(), layout{name: "64 TiB", disk: randomModel(2, 64*tib, 3000, mib)}) {
		t.Run(l.name, func(t *testing.T) {
			f, err := VHDX(l.disk, testID)
			if errors.Is(err, ErrEmpty) {
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			rep, err := checkVHDX(f, f.Size())
			if err != nil {
				t.Fatal(err)
			}
			present := 0
			for _, e := range allocated(t, l.disk, 32*mib) {
				present += int(divUp(e.Len, 32*mib))
			}
			if want := (vhdxReport{roundUp(l.disk.size, 512), present, false, 512}); rep != want {
				t.Errorf("%+v, want %+v", rep, want)
			}
		})
	}
}

// Fixed ones, sectors of 4096 bytes and other sizes of blocks.
func TestVHDXLayouts(t *testing.T) {
	for _, l := range layouts() {
		for _, layout := range []VHDXLayout{
			{Fixed: true}, {Sector: 4096}, {Fixed: true, Sector: 4096, Block: 256 * mib}, {Block: 8 * mib}, {Fixed: true, Block: 64 * mib},
		} {
			f, err := VHDXAs(l.disk, testID, layout)
			if l.disk.size == 0 {
				if !errors.Is(err, ErrEmpty) {
					t.Error(err)
				}
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			rep, err := checkVHDX(f, f.Size())
			if err != nil {
				t.Fatalf("%s, %+v: %v", l.name, layout, err)
			}
			want := vhdxReport{disk: roundUp(l.disk.size, max(512, layout.Sector)), fixed: layout.Fixed, sector: max(512, layout.Sector)}
			block := layout.Block
			if block == 0 {
				block = 32 * mib
			}
			if want.present = int(divUp(want.disk, block)); !layout.Fixed {
				want.present = 0
				for _, e := range allocated(t, l.disk, block) {
					want.present += int(divUp(e.Len, block))
				}
			}
			if rep != want {
				t.Errorf("%s, %+v: %+v, want %+v", l.name, layout, rep, want)
			}
			// Ours against ours: the writer and the reader agree about all of it.
			if v, err := OpenVHDX(f, f.Size(), VHDXOptions{}); err != nil || v.LogicalSectorSize() != want.sector {
				t.Error(err)
			} else {
				checkReads(t, 3, v, padded{l.disk, want.disk}, want.disk, 5, mib, l.disk.data)
			}
		}
	}
	for _, bad := range []VHDXLayout{{Sector: 520}, {Block: 3 * mib}, {Block: 512 * mib}, {Block: 512 * kib}, {Sector: -1}} {
		if _, err := VHDXAs(newModel(1, mib), testID, bad); err == nil {
			t.Errorf("%+v accepted", bad)
		}
	}
	if _, err := VHDXAs(newModel(1, 64*tib), testID, VHDXLayout{Fixed: true, Sector: 4096, Block: mib}); err != nil {
		t.Error(err)
	}
}

// padded has zeros behind its end.
type padded struct {
	Source
	size int64
}

func (p padded) Size() int64 { return p.size }

func (p padded) ReadAt(b []byte, off int64) (int, error) {
	b, end := clip(b, off, p.size)
	if n, err := readPadded(p.Source, b, off); err != nil {
		return n, err
	}
	return len(b), end
}

// The checker and QEMU notice what they are here to notice.
func TestVHDXChecksCanFail(t *testing.T) {
	disk := newModel(1, 140<<30, ext(0, 70*mib), ext(139<<30, 5*mib))
	f, err := VHDX(disk, testID)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, c := range []struct {
		name string
		off  int64
		flip byte
	}{
		{"signature", 0, 1},
		{"CRC of header 1", 65536 + 4, 1},
		{"CRC of header 2", 131072 + 7, 0x80},
		{"reserved in header 1", 65536 + 90, 1},
		{"log GUID", 131072 + 50, 1},
		{"CRC of region table 1", 196608 + 4, 1},
		{"region table 2", 262144 + 40, 1},
		{"disk size", 2097152 + 65536 + 8, 1},
		{"item flags", 2097152 + 32 + 24, 1},
		{"block state", 3145728, 1},                            // 6 => 7
		{"dropped block", 3145728, 6 ^ 2},                      // 6 => 2, with an offset
		{"reserved BAT bits", 3145728 + 1, 1},                  //
		{"overlap", 3145728 + 8 + 3, 2},                        // 36 MiB => 4 MiB
		{"sector bitmap entry", 3145728 + 128*8, 6},            //
		{"block past the end", 3145728 + 5, 1},                 //
		{"space after the BAT", 3145728 + 8*(4480+34) + 8, 16}, //
	} {
		broken := &flipped{f, c.off, c.flip}
		if _, err := checkVHDX(broken, f.Size()); err == nil {
			t.Errorf("%s: not noticed", c.name)
		} else {
			t.Logf("%s: %v", c.name, err)
		}
	}
	fixed, err := VHDXAs(disk, testID, VHDXLayout{Fixed: true})
	if err != nil {
		t.Fatal(err)
	}
	for name, broken := range map[string]*flipped{
		"a hole in a fixed one": {fixed, 3145728 + 9*8, 6 ^ 2},
		"fixed flag":            {fixed, 2097152 + 65536 + 4, 2},
		"sector size":           {fixed, 2097152 + 65536 + 32 + 1, 0x12},
	} {
		if _, err := checkVHDX(broken, fixed.Size()); err == nil {
			t.Errorf("%s: not noticed", name)
		}
	}
	if testing.Short() {
		return
	}
	// QEMU: both headers broken is no VHDX; a dropped block is another disk.
	small, err := VHDX(newModel(1, 3*mib, ext(0, 3*mib)), testID)
	if err != nil {
		t.Fatal(err)
	}
	store(t, newModel(1, 3*mib, ext(0, 3*mib)), filepath.Join(dir, "want.raw"))
	for name, change := range map[string]func(b []byte){
		"sound":         func([]byte) {},
		"both headers":  func(b []byte) { b[65536+4] ^= 1; b[131072+4] ^= 1 },
		"region tables": func(b []byte) { b[196608+4] ^= 1; b[262144+4] ^= 1 },
		"dropped block": func(b []byte) { copy(b[3145728:], []byte{2, 0, 0, 0, 0, 0, 0, 0}) },
		"data":          func(b []byte) { b[4*mib+12345] ^= 1 },
	} {
		b := make([]byte, small.Size())
		small.ReadAt(b, 0)
		change(b)
		if err := os.WriteFile(filepath.Join(dir, "disk.vhdx"), b, 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := qemu(t, dir, "qemu-img", "compare", "-f", "vhdx", "-F", "raw", "disk.vhdx", "want.raw")
		if (err == nil) != (name == "sound") {
			t.Errorf("%s: qemu-img compare: %v", name, err)
		}
	}
}

// flipped changes some bits of one byte.
type flipped struct {
	r    io.ReaderAt
	off  int64
	bits byte
}

func (f *flipped) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.r.ReadAt(p, off)
	if f.off >= off && f.off < off+int64(n) {
		p[f.off-off] ^= f.bits
	}
	return n, err
}
