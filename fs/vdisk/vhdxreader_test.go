package vdisk

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/store/extent"
)

func openVHDXFile(t testing.TB, path string) *VHDXImage {
	t.Helper()
	raw, err := OpenRaw(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { raw.Close() })
	v, err := OpenVHDX(raw, raw.Size(), VHDXOptions{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// rawOf lets QEMU say what the disk in a file is.
func rawOf(t testing.TB, dir, format, name string) *RawFile {
	t.Helper()
	mustQEMU(t, dir, "qemu-img", "convert", "-f", format, "-O", "raw", name, name+".raw")
	raw, err := OpenRaw(filepath.Join(dir, name+".raw"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { raw.Close() })
	return raw
}

// Images that QEMU converts and then writes to: ours is what QEMU reads.
func TestReadsQEMUsVHDX(t *testing.T) {
	needQEMU(t)
	for i, options := range []string{
		"subformat=dynamic",
		"subformat=dynamic,block_size=1M",
		"subformat=dynamic,block_size=1M,log_size=3M",
		"subformat=dynamic,block_size=2M,block_state_zero=off",
		"subformat=dynamic,block_size=32M,log_size=8M",
		"subformat=dynamic,block_size=256M",
		"subformat=fixed",
		"subformat=fixed,block_size=1M",
		"subformat=fixed,block_size=64M,log_size=2M",
	} {
		t.Run(options, func(t *testing.T) {
			t.Parallel()
			dir, rnd := t.TempDir(), rand.New(rand.NewPCG(uint64(i), 5))
			size := 40*mib + 512*rnd.Int64N(5000)
			store(t, randomModel(uint64(i), size, 8, 900*kib), filepath.Join(dir, "raw"))
			mustQEMU(t, dir, "qemu-img", "convert", "-f", "raw", "-O", "vhdx", "-o", options, "raw", "disk.vhdx")
			args := []string{"-f", "vhdx"}
			for range 20 {
				off := rnd.Int64N(size/512) * 512
				args = append(args, "-c", fmt.Sprintf("write -P %d %d %d", 1+rnd.IntN(255), off, min(size-off, 512*(1+rnd.Int64N(900)))))
			}
			mustQEMU(t, dir, "qemu-io", append(args, "disk.vhdx")...)
			checkImage(t, openVHDXFile(t, filepath.Join(dir, "disk.vhdx")), rawOf(t, dir, "vhdx", "disk.vhdx"))
		})
	}
}

// Logs that QEMU left behind when it could not write the BAT: QEMU replays its
// own, and ours of the file before that is the same.
func TestReplaysQEMUsLog(t *testing.T) {
	needQEMU(t)
	for _, block := range []int{1, 8} {
		t.Run(fmt.Sprint(block, " MiB"), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			mustQEMU(t, dir, "qemu-img", "create", "-q", "-f", "vhdx", "-o", fmt.Sprintf("block_size=%dM", block), "disk.vhdx", "8G")
			mustQEMU(t, dir, "qemu-io", "-f", "vhdx", "-c", "write -P 1 0 64k", "-c", "write -P 7 5G 3M", "disk.vhdx")
			// The first sector of the BAT, at 2 MiB, cannot be written.
			out, _ := qemu(t, dir, "qemu-io", "--image-opts", "driver=vhdx,file.driver=blkdebug,file.image.driver=file,"+
				"file.image.filename=disk.vhdx,file.inject-error.0.event=none,file.inject-error.0.iotype=write,file.inject-error.0.sector=4096",
				"-c", "write -P 2 64k 1k", "-c", "write -P 3 40M 300k", "-c", "abort")
			if out, err := qemu(t, dir, "qemu-img", "check", "-f", "vhdx", "disk.vhdx"); err == nil || !strings.Contains(out, "log that needs to be replayed") {
				t.Fatalf("no log to replay: %v %s", err, out)
			}
			before, err := os.ReadFile(filepath.Join(dir, "disk.vhdx"))
			if err != nil {
				t.Fatal(err)
			}
			img := openMade(t, before, VHDXOptions{})
			mustQEMU(t, dir, "qemu-img", "check", "-r", "all", "-f", "vhdx", "disk.vhdx")
			want := rawOf(t, dir, "vhdx", "disk.vhdx")
			checkImage(t, img, want)
			// Without the log it would be another disk.
			p := make([]byte, 10)
			if _, err := want.ReadAt(p, 40*mib); err != nil || p[9] != 3 {
				t.Errorf("the log had nothing to say: %v %v\n%s", p, err, out)
			}
		})
	}
}

// logCase is a file with a log, and what the BAT is after it has been replayed.
type logCase struct {
	name string
	make func(m *vhdxMaker, slots []int64) (want map[int64]int) // block => slot with its data, -1: zeros
	err  error
	cut  int64  // the file ends that much earlier
	mine string // what QEMU 7.2 does instead of what the specification says
}

func logCases() []logCase {
	// sectorOf is a sector of the BAT, 512 blocks, with these entries.
	sectorOf := func(slots []int64, entries map[int64]int) []byte {
		b := make([]byte, 4096)
		for block, slot := range entries {
			copy(b[block%512*8:], bytesOf(uint64(slots[slot])|6))
		}
		return b
	}
	bat := func(sector int64) int64 { return madeBAT + 4096*sector }
	end := func(m *vhdxMaker) int64 { return int64(len(m.bytes())) }
	entry := func(m *vhdxMaker, sequence uint64, tail int, writes ...madeWrite) madeEntry {
		return madeEntry{sequence: sequence, tail: tail, flushed: end(m), last: end(m), writes: writes}
	}
	manyWrites := func(s []int64, n int) (writes []madeWrite) {
		for i := range n {
			writes = append(writes, madeWrite{off: bat(1), data: sectorOf(s, map[int64]int{512 + int64(i): i % 5})})
		}
		return writes
	}
	put := func(m *vhdxMaker, at int, e madeEntry) int { return putRing(m.log, at, e.bytes()) }
	return []logCase{
		{name: "one entry", make: func(m *vhdxMaker, s []int64) map[int64]int {
			put(m, 8192, entry(m, 100, 8192, madeWrite{off: bat(0), data: sectorOf(s, map[int64]int{0: 1, 5: 2})}))
			return map[int64]int{0: 1, 5: 2}
		}},
		{name: "nothing to write", make: func(m *vhdxMaker, s []int64) map[int64]int {
			put(m, 0, entry(m, 1, 0))
			return map[int64]int{0: 0, 600: 3}
		}},
		{name: "three entries, the last one counts", make: func(m *vhdxMaker, s []int64) map[int64]int {
			at := put(m, 4096, entry(m, 1<<32-2, 4096, madeWrite{off: bat(0), data: sectorOf(s, map[int64]int{0: 2})}))
			at = put(m, at, entry(m, 1<<32-1, 4096, madeWrite{off: bat(0), data: sectorOf(s, map[int64]int{1: 1})}, madeWrite{off: bat(2), data: sectorOf(s, map[int64]int{1500: 4})}))
			put(m, at, entry(m, 1<<32, 4096, madeWrite{off: bat(0), data: sectorOf(s, map[int64]int{2: 0})}))
			return map[int64]int{2: 0, 600: 3, 1500: 4, 0: -1, 1: -1}
		}},
		{name: "around the end of the ring", make: func(m *vhdxMaker, s []int64) map[int64]int {
			first := len(m.log) - 5*4096
			at := put(m, first, entry(m, 7, first, madeWrite{off: bat(0), data: sectorOf(s, map[int64]int{0: 1})}, madeWrite{off: bat(3), data: sectorOf(s, map[int64]int{2000: 0})}))
			put(m, at, entry(m, 8, first, madeWrite{off: bat(1), data: sectorOf(s, map[int64]int{700: 2})}, madeWrite{off: bat(2), data: sectorOf(s, map[int64]int{1030: 4})}))
			return map[int64]int{0: 1, 2000: 0, 700: 2, 1030: 4, 600: -1}
		}},
		{name: "an entry across the end of the ring", make: func(m *vhdxMaker, s []int64) map[int64]int {
			first := len(m.log) - 2*4096
			put(m, first, entry(m, 7, first, madeWrite{off: bat(0), data: sectorOf(s, map[int64]int{0: 1})}, madeWrite{off: bat(3), data: sectorOf(s, map[int64]int{2000: 0})}))
			return map[int64]int{0: 1, 2000: 0, 600: 3}
		}},
		{name: "the last entry is torn", make: func(m *vhdxMaker, s []int64) map[int64]int {
			at := put(m, 4096, entry(m, 9, 4096, madeWrite{off: bat(0), data: sectorOf(s, map[int64]int{3: 1})}))
			torn := entry(m, 10, 4096, madeWrite{off: bat(1), data: sectorOf(s, map[int64]int{700: 2})}, madeWrite{off: bat(2), data: sectorOf(s, map[int64]int{1100: 2})}).bytes()
			put(m, at, madeEntry{}) // what was there before
			putRing(m.log, at, torn[:2*4096])
			return map[int64]int{3: 1, 600: 3, 0: -1, 700: -1}
		}},
		{name: "the last entry fails its checksum", make: func(m *vhdxMaker, s []int64) map[int64]int {
			at := put(m, 4096, entry(m, 9, 4096, madeWrite{off: bat(0), data: sectorOf(s, map[int64]int{3: 1})}))
			bad := entry(m, 10, 4096, madeWrite{off: bat(1), data: sectorOf(s, map[int64]int{700: 2})}).bytes()
			bad[5000] ^= 1
			putRing(m.log, at, bad)
			return map[int64]int{3: 1, 600: 3, 0: -1, 700: -1}
		}},
		{name: "a sector of the last entry is another's, the checksum right", make: func(m *vhdxMaker, s []int64) map[int64]int {
			at := put(m, 4096, entry(m, 9, 4096, madeWrite{off: bat(0), data: sectorOf(s, map[int64]int{3: 1})}))
			bad := entry(m, 10, 4096, madeWrite{off: bat(1), data: sectorOf(s, map[int64]int{700: 2})}).bytes()
			bad[8188]--
			resum(bad, 0, len(bad))
			putRing(m.log, at, bad)
			return map[int64]int{3: 1, 600: 3, 0: -1, 700: -1}
		}, mine: "refuses the file"},
		{name: "an entry of another log follows", make: func(m *vhdxMaker, s []int64) map[int64]int {
			at := put(m, 4096, entry(m, 9, 4096, madeWrite{off: bat(0), data: sectorOf(s, map[int64]int{3: 1})}))
			other := entry(m, 10, 4096, madeWrite{off: bat(1), data: sectorOf(s, map[int64]int{700: 2})})
			other.id = madeWriteID
			put(m, at, other)
			return map[int64]int{3: 1, 600: 3, 0: -1, 700: -1}
		}},
		{name: "an older sequence elsewhere", make: func(m *vhdxMaker, s []int64) map[int64]int {
			put(m, 4096, entry(m, 50, 4096, madeWrite{off: bat(0), data: sectorOf(s, map[int64]int{3: 1})}))
			put(m, 65536, entry(m, 40, 65536, madeWrite{off: bat(1), data: sectorOf(s, map[int64]int{700: 2})}))
			return map[int64]int{3: 1, 600: 3, 0: -1, 700: -1}
		}},
		{name: "a newer sequence elsewhere", make: func(m *vhdxMaker, s []int64) map[int64]int {
			put(m, 4096, entry(m, 50, 4096, madeWrite{off: bat(0), data: sectorOf(s, map[int64]int{3: 1})}))
			put(m, 65536, entry(m, 60, 65536, madeWrite{off: bat(1), data: sectorOf(s, map[int64]int{700: 2})}))
			return map[int64]int{0: 0, 700: 2, 600: -1, 3: -1}
		}},
		{name: "the tail has moved on", make: func(m *vhdxMaker, s []int64) map[int64]int {
			// What is before the tail was written back; block 0 moved since.
			at := put(m, 4096, entry(m, 50, 4096, madeWrite{off: bat(0), data: sectorOf(s, map[int64]int{3: 1})}))
			put(m, at, entry(m, 51, at, madeWrite{off: bat(1), data: sectorOf(s, map[int64]int{700: 2})}))
			return map[int64]int{0: 0, 700: 2, 600: -1, 3: -1}
		}, mine: "replays what is before the tail as well"},
		{name: "zeros", make: func(m *vhdxMaker, s []int64) map[int64]int {
			put(m, 4096, entry(m, 50, 4096, madeWrite{off: bat(0), zero: 8192}, madeWrite{off: bat(3), data: sectorOf(s, map[int64]int{2000: 1})}))
			return map[int64]int{0: -1, 600: -1, 2000: 1}
		}},
		{name: "zeros, and data in the middle of them", make: func(m *vhdxMaker, s []int64) map[int64]int {
			at := put(m, 4096, entry(m, 50, 4096, madeWrite{off: bat(0), zero: 16384}))
			put(m, at, entry(m, 51, 4096, madeWrite{off: bat(1), data: sectorOf(s, map[int64]int{700: 2})}))
			return map[int64]int{0: -1, 600: -1, 700: 2}
		}},
		{name: "a full sector of descriptors", make: func(m *vhdxMaker, s []int64) map[int64]int {
			put(m, 4096, entry(m, 50, 4096, manyWrites(s, 126)...))
			return map[int64]int{512 + 125: 0, 512: -1, 512 + 124: -1, 0: 0}
		}},
		{name: "two sectors of descriptors", make: func(m *vhdxMaker, s []int64) map[int64]int {
			put(m, 4096, entry(m, 50, 4096, manyWrites(s, 150)...))
			return map[int64]int{512 + 149: 4, 512: -1, 512 + 148: -1, 0: 0}
		}, mine: "takes it for invalid"},
		{name: "a padded entry", make: func(m *vhdxMaker, s []int64) map[int64]int {
			e := entry(m, 50, 4096, madeWrite{off: bat(1), data: sectorOf(s, map[int64]int{700: 2})})
			e.pad = 3
			at := put(m, 4096, e)
			put(m, at, entry(m, 51, 4096, madeWrite{off: bat(2), data: sectorOf(s, map[int64]int{1100: 1})}))
			return map[int64]int{700: 2, 1100: 1, 600: -1}
		}, mine: "wants entries without padding"},
		{name: "the region tables are in the log", make: func(m *vhdxMaker, s []int64) map[int64]int {
			// The log names another place for the BAT: the end of the file.
			moved := m.add(make([]byte, 2*madeMiB))
			table := m.bytes()[196608:][:65536]
			copy(table[16+32+16:], bytesOf(uint64(moved)))
			copy(table[4:8], make([]byte, 4))
			copy(table[4:8], bytesOf(uint64(madeSum(table))))
			at := 4096
			for i := range 16 {
				at = put(m, at, entry(m, 50+uint64(i), 4096, madeWrite{off: 196608 + int64(i)*4096, data: table[4096*i:][:4096]}))
			}
			put(m, at, entry(m, 66, 4096, madeWrite{off: moved + 4096, data: sectorOf(s, map[int64]int{900: 3})}))
			return map[int64]int{900: 3, 0: -1, 600: -1}
		}},
		{name: "the file grows", make: func(m *vhdxMaker, s []int64) map[int64]int {
			b := make([]byte, 4096)
			copy(b, bytesOf(uint64(end(m))|6)) // a block behind the end of the file: zeros
			e := entry(m, 50, 4096, madeWrite{off: bat(0), data: b})
			e.last += 1 * madeMiB
			put(m, 4096, e)
			return map[int64]int{0: -1, 600: 3}
		}, mine: "does not let the file grow"},
		{name: "the file was cut off", make: func(m *vhdxMaker, s []int64) map[int64]int {
			put(m, 4096, entry(m, 50, 4096))
			return nil
		}, cut: madeMiB, err: ErrCorrupt},
		{name: "an empty log", make: func(*vhdxMaker, []int64) map[int64]int { return nil }, err: ErrCorrupt, mine: "opens it"},
		{name: "a tail that is nowhere", make: func(m *vhdxMaker, s []int64) map[int64]int {
			put(m, 4096, entry(m, 50, 65536))
			return nil
		}, err: ErrCorrupt, mine: "opens it"},
		{name: "an odd place", make: func(m *vhdxMaker, s []int64) map[int64]int {
			put(m, 4096, entry(m, 50, 4096, madeWrite{off: bat(0) + 512, zero: 4096}))
			return nil
		}, err: ErrCorrupt},
	}
}

func bytesOf(v uint64) []byte {
	return []byte{byte(v), byte(v >> 8), byte(v >> 16), byte(v >> 24), byte(v >> 32), byte(v >> 40), byte(v >> 48), byte(v >> 56)}
}

// Logs written from the specification. QEMU replays them as well, where it can.
func TestVHDXLogs(t *testing.T) {
	for _, c := range logCases() {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			m := newMaker(mib, 512, 2<<30)
			m.logID, m.plain = madeLogID, true
			var slots []int64
			for i := range uint64(5) {
				slots = append(slots, m.add(noise(i, mib)))
			}
			m.bat[m.index(0)], m.bat[m.index(600)] = uint64(slots[0])|6, uint64(slots[3])|6
			want := c.make(m, slots)
			b := m.bytes()
			b = b[:int64(len(b))-c.cut]
			img, err := OpenVHDX(bytesAt(b), int64(len(b)), VHDXOptions{})
			if !errors.Is(err, c.err) || (err == nil) != (c.err == nil) {
				t.Fatalf("got %v, want %v", err, c.err)
			}
			if err == nil {
				checkSlots(t, img, want)
			}
			if testing.Short() || c.mine != "" {
				return
			}
			dir := t.TempDir()
			writeFile(t, filepath.Join(dir, "disk.vhdx"), b)
			_, err = qemu(t, dir, "qemu-img", "check", "-r", "all", "-f", "vhdx", "disk.vhdx")
			if (err == nil) != (c.err == nil) {
				t.Fatalf("QEMU says %v", err)
			}
			if c.err == nil {
				checkImage(t, img, rawOf(t, dir, "vhdx", "disk.vhdx"))
			}
		})
	}
}

func checkSlots(t *testing.T, img *VHDXImage, want map[int64]int) {
	t.Helper()
	got := make([]byte, mib)
	for block, slot := range want {
		ref := make([]byte, mib)
		if slot >= 0 {
			ref = noise(uint64(slot), mib)
		}
		if _, err := img.ReadAt(got, block*mib); err != nil && err != io.EOF {
			t.Fatal(err)
		}
		if !bytes.Equal(got, ref) {
			t.Errorf("block %d is not what slot %d has", block, slot)
		}
	}
}

// The search for the active sequence in any ring takes bounded time.
func TestVHDXLogMadeToHurt(t *testing.T) {
	m := newMaker(mib, 512, mib)
	m.log, m.logID = make([]byte, vhdxMaxLog), madeLogID
	n := len(m.log) / 4096
	for i := range n { // each entry claims all of the ring, as padding
		e := madeEntry{sequence: uint64(i + 1), pad: 0}.bytes()
		copy(e[8:], bytesOf(uint64(len(m.log)))[:4])
		putRing(m.log, i*4096, e)
	}
	b := m.bytes()
	if _, err := OpenVHDX(bytesAt(b), int64(len(b)), VHDXOptions{}); !errors.Is(err, ErrCorrupt) {
		t.Error(err)
	}
	for i := range n { // good ones, one sequence, without a tail
		putRing(m.log, i*4096, madeEntry{sequence: uint64(i + 1), tail: (i + 1) % n * 4096}.bytes())
	}
	b = m.bytes()
	if _, err := OpenVHDX(bytesAt(b), int64(len(b)), VHDXOptions{}); err != nil && !errors.Is(err, ErrCorrupt) {
		t.Error(err)
	}
	m.log = append(m.log, make([]byte, mib)...)
	b = m.bytes()
	if _, err := OpenVHDX(bytesAt(b), int64(len(b)), VHDXOptions{}); !errors.Is(err, ErrUnsupported) {
		t.Error(err)
	}
}

// madeChain is differencing files and what the disk is, at every depth.
type madeChain struct {
	files [][]byte // the base first
	want  []bytesAt
}

// makeChain makes random blocks in all states that have a meaning.
func makeChain(seed uint64, block, sector, disk int64, depth int) madeChain {
	rnd := rand.New(rand.NewPCG(seed, 9))
	var c madeChain
	below := []byte{}
	for level := range depth {
		// Children may be larger or smaller than their parents.
		size := max(sector, disk+sector*(rnd.Int64N(2*block/sector)-block/sector))
		m := newMaker(block, sector, size)
		m.dataWrite = fmt.Sprintf("00000000-0000-0000-0000-%012d", level)
		if level > 0 {
			m.locator = [][2]string{
				{"some_other_key", "x"},
				{"absolute_win32_path", `\\?\d:\base\p.vhdx`},
				{"parent_linkage", fmt.Sprintf("{00000000-0000-0000-0000-%012d}", level-1)},
				{"relative_path", `..\p.vhdx`},
			}
		}
		want := make([]byte, size)
		copy(want, below)
		bitmaps := map[int64][]byte{}
		for b := range divUp(size, block) {
			part := want[b*block : min(size, (b+1)*block)]
			data := noise(rnd.Uint64(), block)
			state := []uint64{0, 1, 2, 3, 6, 7, 7}[rnd.IntN(7)]
			if level == 0 && state == 7 {
				state = 6
			}
			switch state {
			case 0:
				m.fill(b, 0, nil)
			case 1, 2, 3:
				m.fill(b, state, nil)
				if rnd.IntN(2) == 0 { // the place is reserved or old: not to be read
					m.bat[m.index(b)] |= uint64(1+rnd.IntN(9)) << 20
				}
				clear(part)
			case 6:
				m.fill(b, 6, data)
				copy(part, data)
			case 7:
				m.fill(b, 7, data)
				i := m.bitmap(b)
				if bitmaps[i] == nil {
					bitmaps[i] = make([]byte, madeMiB)
				}
				longest := []int64{3, 100, 3000}[rnd.IntN(3)]
				first := b % m.ratio() * (block / sector)
				for s := int64(0); s < block/sector; {
					n := min(1+rnd.Int64N(longest), block/sector-s)
					if here := coin(rnd); here {
						for k := s; k < s+n; k++ {
							bitmaps[i][(first+k)/8] |= 1 << ((first + k) % 8)
						}
						if s*sector < int64(len(part)) {
							copy(part[s*sector:], data[s*sector:min(block, (s+n)*sector)])
						}
					}
					s += n
				}
			}
		}
		for i, b := range bitmaps {
			m.bat[i] = uint64(m.add(b)) | 6
		}
		c.files = append(c.files, m.bytes())
		c.want = append(c.want, want)
		below = want
	}
	return c
}

func (c madeChain) open(t testing.TB, level int) *VHDXImage {
	t.Helper()
	return openMade(t, c.files[level], VHDXOptions{TableCache: 16 * kib, Parent: func(l ParentLocator) (Source, error) {
		if l.RelativePath != `..\p.vhdx` || l.Relative() != "../p.vhdx" || l.AbsoluteWin32Path != `\\?\d:\base\p.vhdx` || l.VolumePath != "" {
			t.Errorf("%+v", l)
		}
		return c.open(t, level-1), nil
	}})
}

// Differencing files and sectors of 4096 bytes, as the specification has them:
// there is no other reader here to ask.
func TestVHDXChains(t *testing.T) {
	for seed := range uint64(8) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			block, sector := []int64{mib, 2 * mib}[seed%2], []int64{512, 4096}[seed/2%2]
			c := makeChain(seed, block, sector, 5*mib, 1+int(seed)%4)
			for level := range c.files {
				img, want := c.open(t, level), c.want[level]
				size := int64(len(want))
				if img.Size() != size || img.LogicalSectorSize() != sector {
					t.Fatalf("size %d in sectors of %d", img.Size(), img.LogicalSectorSize())
				}
				checkRead(t, img, want, size, 0, size+1)
				checkReads(t, seed, img, want, size, 50, 300*kib, nil)
				checkReads(t, seed, img, want, size, 200, 3000, nil)
				for _, g := range []int64{512, 64 * kib} {
					checkHoles(t, img, g)
				}
			}
		})
	}
}

// A large disk: sector bitmaps of several chunks, with 64-bit arithmetic.
func TestVHDXFarAway(t *testing.T) {
	for _, c := range []struct{ block, sector int64 }{{256 * mib, 512}, {256 * mib, 4096}, {64 * mib, 512}, {64 * mib, 4096}} {
		disk := int64(60 * tib)
		if c.block == 64*mib {
			disk = 14 * tib // the BAT of these files has 2 MiB
		}
		m := newMaker(c.block, c.sector, disk)
		m.locator = [][2]string{{"parent_linkage", "{" + madeWriteID + "}"}, {"relative_path", "p"}}
		last := disk/c.block - 1
		chunk := m.ratio()
		m.fill(last, 6, noise(1, 3*mib)) // the file ends in the middle of the block
		m.bat[m.index(chunk+1)] = m.bat[m.index(last)] | 1
		bitmap := make([]byte, mib)
		first := c.block / c.sector // of block chunk+1 in chunk 1
		bitmap[(first+9)/8] = 1 << ((first + 9) % 8)
		m.bat[m.bitmap(chunk+1)] = uint64(m.add(bitmap)) | 6
		parent := newMaker(c.block, c.sector, disk)
		b := m.bytes()
		img := openMade(t, b, VHDXOptions{Parent: func(ParentLocator) (Source, error) { return openMade(t, parent.bytes(), VHDXOptions{}), nil }})
		p := make([]byte, c.sector)
		if _, err := img.ReadAt(p, last*c.block+mib); err != nil || !bytes.Equal(p, noise(1, 3*mib)[mib:][:c.sector]) {
			t.Errorf("%+v: the last block: %v", c, err)
		}
		for i := range int64(20) {
			want := make([]byte, c.sector)
			if i == 9 {
				copy(want, noise(1, 3*mib)[9*c.sector:])
			}
			if _, err := img.ReadAt(p, (chunk+1)*c.block+i*c.sector); err != nil || !bytes.Equal(p, want) {
				t.Errorf("%+v: sector %d: %v", c, i, err)
			}
		}
		if _, err := img.ReadAt(p, disk-c.sector); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%+v: past the end of the file: %v", c, err)
		}
		got := allocated(t, img, 4096)
		want := []extent.Extent{extent.Align(ext((chunk+1)*c.block+9*c.sector, c.sector), 4096), ext(last*c.block, c.block)}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%+v: lists %v, want %v", c, got, want)
		}
	}
}

// Neighbours in the file are read at once.
func TestVHDXReadsAreFew(t *testing.T) {
	m := newMaker(mib, 512, 64*mib)
	for b := range int64(8) {
		m.fill(b, 6, noise(uint64(b), mib))
	}
	b := m.bytes()
	r := &counting{ReaderAt: bytesAt(b)}
	img, err := OpenVHDX(r, int64(len(b)), VHDXOptions{})
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 8*mib)
	img.ReadAt(p, 0)
	r.reads.Store(0)
	if n := testing.AllocsPerRun(10, func() { img.ReadAt(p, 0) }); n > 0 && !raced {
		t.Errorf("%v allocations", n)
	}
	if n := r.reads.Load(); n != 11 {
		t.Errorf("%d reads instead of 11", n)
	}
}
