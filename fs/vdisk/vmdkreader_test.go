package vdisk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/holdfast-backup/holdfast/store/extent"
)

var vmdkKinds = []struct{ name, options string }{
	{"sparse", "subformat=monolithicSparse"},
	{"sparse, zeroed grains", "subformat=monolithicSparse,zeroed_grain=on"},
	{"flat", "subformat=monolithicFlat"},
	{"split sparse", "subformat=twoGbMaxExtentSparse"},
	{"split flat", "subformat=twoGbMaxExtentFlat"},
	{"stream", "subformat=streamOptimized"},
}

func TestReadsQEMUsVMDKs(t *testing.T) {
	needQEMU(t)
	disks := map[string]Source{
		"one sector": newModel(1, 512, ext(0, 512)),
		"random":     newModel(2, 5*mib+512*3, ext(0, 6*mib)),
		"sparse":     compressible{randomModel(3, 40*mib+512, 70, 300*kib)},
		"sparser":    randomModel(4, 5<<30+512, 9, 300*kib), // three extents
		"zeros":      newModel(5, 10*mib),
	}
	for _, k := range vmdkKinds {
		for name, disk := range disks {
			if disk.Size() == 5<<30+512 && !strings.HasPrefix(k.name, "split") {
				continue // one extent, like the smaller ones
			}
			t.Run(k.name+"/"+name, func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				store(t, disk, filepath.Join(dir, "raw"))
				mustQEMU(t, dir, "qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", k.options, "raw", "disk.vmdk")
				img := openChain(t, filepath.Join(dir, "disk.vmdk"), Policy{})
				checkImage(t, img, disk)
				if n := extent.Total(allocated(t, img, 64*kib)); disk.Size() > 1<<30 && n > 10*mib {
					t.Errorf("%d bytes allocated", n)
				}
			})
		}
	}
}

// writeParts has qemu-io write parts of src, in whole sectors, to a disk.
func writeParts(t *testing.T, dir, driver, name string, src Source, parts []extent.Extent) {
	t.Helper()
	args := []string{"-f", driver}
	for i, e := range parts {
		p := make([]byte, e.Len)
		readPadded(src, p, e.Off)
		part := fmt.Sprint("part", i)
		if err := os.WriteFile(filepath.Join(dir, part), p, 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "-c", fmt.Sprintf("write -q -s %s %d %d", part, e.Off, e.Len))
	}
	mustQEMU(t, dir, "qemu-io", append(args, name)...)
}

// asQEMU is the disk as QEMU reads it.
func asQEMU(t *testing.T, dir, format, name string) *RawFile {
	t.Helper()
	out := filepath.Join(t.TempDir(), "raw")
	mustQEMU(t, dir, "qemu-img", "convert", "-f", format, "-O", "raw", name, out)
	raw, err := OpenRaw(out)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { raw.Close() })
	return raw
}

// Delta disks over delta disks, written by qemu-io; QEMU says what the disk is.
func TestReadsQEMUsDeltaDisks(t *testing.T) {
	needQEMU(t)
	for seed := range uint64(6) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			rnd := rand.New(rand.NewPCG(seed, 7))
			dir := t.TempDir()
			size := 8*mib + rnd.Int64N(1000)*512
			store(t, randomModel(seed, size, 20, 300*kib), filepath.Join(dir, "raw"))
			kind := vmdkKinds[rnd.IntN(len(vmdkKinds)-1)].options
			mustQEMU(t, dir, "qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", kind, "raw", "0.vmdk")
			const last = 3
			for i := 1; i <= last; i++ {
				below, name := fmt.Sprintf("%d.vmdk", i-1), fmt.Sprintf("%d.vmdk", i)
				mustQEMU(t, dir, "qemu-img", "create", "-q", "-f", "vmdk", "-b", below, "-F", "vmdk",
					"-o", fmt.Sprintf("zeroed_grain=%s", []string{"on", "off"}[i%2]), name)
				args := []string{"-f", "vmdk"}
				for range 6 {
					off, n := rnd.Int64N(size/512)*512, (1+rnd.Int64N(600))*512
					n = min(n, size-off)
					cmd := fmt.Sprintf("write -q -P %d %d %d", 1+rnd.IntN(255), off, n)
					if rnd.IntN(3) == 0 {
						cmd = fmt.Sprintf("write -q -z %d %d", off, n)
					}
					args = append(args, "-c", cmd)
				}
				mustQEMU(t, dir, "qemu-io", append(args, name)...)
			}
			top := fmt.Sprintf("%d.vmdk", last)
			img := openChain(t, filepath.Join(dir, top), Policy{})
			checkImage(t, img, asQEMU(t, dir, "vmdk", top))
		})
	}
}

func TestContentIDs(t *testing.T) {
	needQEMU(t)
	dir := t.TempDir()
	mustQEMU(t, dir, "qemu-img", "create", "-q", "-f", "vmdk", "base.vmdk", "1M")
	mustQEMU(t, dir, "qemu-img", "create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "top.vmdk")
	openChain(t, filepath.Join(dir, "top.vmdk"), Policy{})
	b := readFile(t, filepath.Join(dir, "base.vmdk"))
	// QEMU leaves leading zeros of these numbers out.
	field := func(b []byte, key string) []byte {
		_, value, _ := bytes.Cut(b, []byte("\n"+key+"="))
		value, _, _ = bytes.Cut(value, []byte("\n"))
		return value
	}
	padded := func(value []byte) string { return fmt.Sprintf("%08s", value) }
	cid := field(b, "CID")
	copy(cid, "badcafe1badcafe1"[:len(cid)])
	if err := os.WriteFile(filepath.Join(dir, "base.vmdk"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	top := readFile(t, filepath.Join(dir, "top.vmdk"))
	want := padded(field(top, "parentCID"))
	_, err := OpenChain(filepath.Join(dir, "top.vmdk"), Policy{})
	if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), padded(cid)) || !strings.Contains(err.Error(), want) {
		t.Errorf("another parent: %v", err)
	}
}

// esxDisk is what the writers of this file make extents of: a state for each
// grain, and bytes for those with data.
type esxDisk struct {
	sectors int64
	grain   int64 // sectors
	states  []esxState
	seed    uint64
	src     Source // what has the bytes; nil: they are made up
}

type esxState byte

const (
	esxAbsent esxState = iota
	esxData
	esxZero
	esxUnmapped
)

func randomESX(seed uint64, sectors, grain int64, kinds ...esxState) esxDisk {
	rnd := rand.New(rand.NewPCG(seed, 11))
	d := esxDisk{sectors: sectors, grain: grain, seed: seed}
	for int64(len(d.states)) < (sectors+grain-1)/grain {
		k := kinds[rnd.IntN(len(kinds))]
		n := 1 + rnd.IntN(5)
		if rnd.IntN(10) == 0 {
			n = rnd.IntN(5000) // whole tables
		}
		for range n {
			d.states = append(d.states, k)
		}
	}
	d.states = d.states[:(sectors+grain-1)/grain]
	return d
}

// bytes are those of grain i: never zero where they are made up.
func (d esxDisk) bytes(i int) []byte {
	p := make([]byte, d.grain*512)
	if d.src != nil {
		readPadded(d.src, p, int64(i)*d.grain*512)
		return p
	}
	return madeUp(p, d.seed, i)
}

// madeUp fills p, whole sectors, with bytes that are not zero.
func madeUp(p []byte, seed uint64, i int) []byte {
	rnd := rand.New(rand.NewPCG(seed, uint64(i)))
	for j := 0; j < len(p); j += 8 {
		binary.LittleEndian.PutUint64(p[j:], rnd.Uint64()|0x0101010101010101)
	}
	return p
}

func put32(b []byte, at int, v int64) { binary.LittleEndian.PutUint32(b[at:], uint32(v)) }
func put64(b []byte, at int, v int64) { binary.LittleEndian.PutUint64(b[at:], uint64(v)) }

// order gives the grains with data in the order in which they are written:
// runs, but not always ascending.
func (d esxDisk) order() []int {
	var runs [][]int
	for i, s := range d.states {
		if s != esxData {
			continue
		}
		if n := len(runs); n > 0 && i%7 != 0 {
			runs[n-1] = append(runs[n-1], i)
			continue
		}
		runs = append(runs, []int{i})
	}
	rnd := rand.New(rand.NewPCG(d.seed, 12))
	rnd.Shuffle(len(runs), func(i, j int) { runs[i], runs[j] = runs[j], runs[i] })
	var all []int
	for _, r := range runs {
		all = append(all, r...)
	}
	return all
}

// writeCOWD makes a COWD extent, Virtual Disk Format 5.0, "ESX Server Sparse
// Extents": 4 sectors of header, the directory, then tables of 16 KiB and grains.
func writeCOWD(d esxDisk) []byte {
	b := make([]byte, 2048)
	tables := (int64(len(d.states)) + 4095) / 4096
	copy(b, "COWD")
	put32(b, 4, 1)
	put32(b, 8, 3)
	put32(b, 12, d.sectors)
	put32(b, 16, d.grain)
	put32(b, 20, 4)
	put32(b, 24, tables)
	put32(b, 32, 1)
	put32(b, 36, 255)
	put32(b, 40, 63)
	b = append(b, make([]byte, (tables*4+511)/512*512)...)
	for _, i := range d.order() {
		entry := 2048 + i/4096*4
		if binary.LittleEndian.Uint32(b[entry:]) == 0 {
			put32(b, entry, int64(len(b)/512))
			b = append(b, make([]byte, 4096*4)...)
		}
		table := int(binary.LittleEndian.Uint32(b[entry:])) * 512
		put32(b, table+i%4096*4, int64(len(b)/512))
		b = append(b, d.bytes(i)...)
	}
	put32(b, 28, int64(len(b)/512))
	return b
}

// writeSESparse makes a seSparse extent as the comment in vmdkse.go has it from
// the list: regions at multiples of 2048 sectors.
func writeSESparse(d esxDisk) []byte {
	tables := (int64(len(d.states)) + 4095) / 4096
	round := func(n int64) int64 { return (n + 2047) / 2048 * 2048 }
	at := int64(2048)
	region := func(b []byte, field int, sectors int64) int64 {
		put64(b, field, at)
		put64(b, field+8, sectors)
		was := at
		at += sectors
		return was
	}
	b := make([]byte, 1024)
	put64(b, 0, 0xcafebabe)
	put64(b, 8, 0x0000000200000001)
	put64(b, 16, d.sectors)
	put64(b, 24, 8)
	put64(b, 32, 64)
	put64(b, 80, 1)
	put64(b, 88, 1)
	put64(b, 96, 2)
	put64(b, 104, 2)
	region(b, 112, 2048)
	directory := region(b, 128, round(tables*8/512+1))
	gts := region(b, 144, round(tables*64))
	region(b, 160, 2048)
	region(b, 176, 2048)
	grains := region(b, 192, round(int64(len(d.states))*8))
	put64(b, 512, 0xcafecafe)
	b = append(b, make([]byte, grains*512-1024)...)
	next := int64(0)
	table := func(i int) int64 {
		entry := directory*512 + int64(i/4096*8)
		if binary.LittleEndian.Uint64(b[entry:]) == 0 {
			put64(b, int(entry), 0x10000000<<32|next)
			next++
		}
		return (gts+int64(binary.LittleEndian.Uint32(b[entry:]))*64)*512 + int64(i%4096*8)
	}
	for i, s := range d.states {
		switch s {
		case esxZero:
			put64(b, int(table(i)), 2<<60)
		case esxUnmapped:
			put64(b, int(table(i)), 1<<60|5)
		}
	}
	for n, i := range d.order() {
		n := uint64(n)
		put64(b, int(table(i)), int64(3<<60|(n&0xfff)<<48|n>>12))
		b = append(b, d.bytes(i)...)
	}
	return b
}

func writeFiles(t testing.TB, dir string, files map[string][]byte) {
	t.Helper()
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// deltaText is a descriptor in the form that ESXi gives it.
func deltaText(createType, cid, parentCID, hint string, extents ...string) []byte {
	s := "# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID=" + cid + "\nparentCID=" + parentCID +
		"\nisNativeSnapshot=\"no\"\ncreateType=\"" + createType + "\"\n"
	if hint != "" {
		s += "parentFileNameHint=\"" + hint + "\"\n"
	}
	s += "# Extent description\n" + strings.Join(extents, "\n") + "\n\n# The Disk Data Base\n#DDB\n\nddb.adapterType = \"lsilogic\"\n"
	return []byte(s)
}

// Snapshots of ESX that are made by the writers above, over a flat disk; QEMU
// reads the same files.
func TestReadsESXSnapshots(t *testing.T) {
	needQEMU(t)
	for seed := range uint64(6) {
		for _, kind := range []string{"vmfsSparse", "seSparse"} {
			t.Run(fmt.Sprintf("%s/%d", kind, seed), func(t *testing.T) {
				t.Parallel()
				rnd := rand.New(rand.NewPCG(seed, 13))
				sectors := 30000 + rnd.Int64N(60000)
				dir := t.TempDir()
				store(t, randomModel(seed, sectors*512, 60, 300*kib), filepath.Join(dir, "web-flat.vmdk"))
				extentLine, delta := "VMFSSPARSE", []byte(nil)
				if kind == "vmfsSparse" {
					delta = writeCOWD(randomESX(seed, sectors, []int64{1, 8, 128}[seed%3], esxAbsent, esxData))
				} else {
					extentLine = "SESPARSE"
					kinds := []esxState{esxAbsent, esxData, esxZero, esxUnmapped}
					if seed == 0 { // more than 4096 grains: their numbers have both parts
						sectors, kinds = 120000, []esxState{esxData, esxData, esxData, esxData, esxZero}
						store(t, randomModel(seed, sectors*512, 60, 300*kib), filepath.Join(dir, "web-flat.vmdk"))
					}
					delta = writeSESparse(randomESX(seed, sectors, 8, kinds...))
				}
				writeFiles(t, dir, map[string][]byte{
					"web.vmdk":                deltaText("vmfs", "11111111", "ffffffff", "", fmt.Sprintf(`RW %d VMFS "web-flat.vmdk"`, sectors)),
					"web-000001.vmdk":         deltaText(kind, "22222222", "11111111", "web.vmdk", fmt.Sprintf(`RW %d %s "web-000001-delta.vmdk"`, sectors, extentLine)),
					"web-000001-delta.vmdk":   delta,
					"alone-000001-delta.vmdk": delta,
				})
				img := openChain(t, filepath.Join(dir, "web-000001.vmdk"), Policy{})
				checkImage(t, img, asQEMU(t, dir, "vmdk", "web-000001.vmdk"))
				if len(img.Files()) != 4 {
					t.Errorf("files %v", img.Files())
				}
				if _, err := OpenChain(filepath.Join(dir, "alone-000001-delta.vmdk"), Policy{}); !errors.Is(err, ErrUnsupported) {
					t.Errorf("a delta without its descriptor: %v", err)
				}
			})
		}
	}
}

// A large seSparse disk with little in it costs little, and the last grain can be read.
func TestHugeSESparse(t *testing.T) {
	d := esxDisk{sectors: 10 * mib, grain: 8, seed: 3, states: make([]esxState, 10*mib/8)}
	d.states[5], d.states[len(d.states)-1] = esxData, esxData
	b := writeSESparse(d)
	put64(b, 16, 3<<31) // 3 TiB: the directory has room for that
	dir := t.TempDir()
	writeFiles(t, dir, map[string][]byte{"x": b, "x.vmdk": deltaText("seSparse", "1", "ffffffff", "", fmt.Sprintf(`RW %d SESPARSE "x"`, int64(3<<31)))})
	_, err := OpenChain(filepath.Join(dir, "x.vmdk"), Policy{})
	if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "grain directory") {
		t.Errorf("a directory that is too short: %v", err)
	}
	put64(b, 16, 10*mib)
	writeFiles(t, dir, map[string][]byte{"x": b, "x.vmdk": deltaText("seSparse", "1", "ffffffff", "", fmt.Sprintf(`RW %d SESPARSE "x"`, 10*mib))})
	img := openChain(t, filepath.Join(dir, "x.vmdk"), Policy{})
	got := allocated(t, img, 4*kib)
	want := []extent.Extent{ext(5*4*kib, 4*kib), ext(10*mib*512-4*kib, 4*kib)}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("allocated %v, want %v", got, want)
	}
	for _, i := range []int{5, len(d.states) - 1} {
		p := make([]byte, 4*kib)
		if _, err := img.ReadAt(p, int64(i)*4*kib); err != nil && err != io.EOF || !bytes.Equal(p, d.bytes(i)) {
			t.Errorf("grain %d: %v", i, err)
		}
	}
}

// A disk of every sort of extent at once, over a parent, at odd sectors. QEMU
// has no ZERO extents: what is expected here is put together by hand.
func TestMixedExtents(t *testing.T) {
	const part = 9001 // sectors
	dir := t.TempDir()
	parent := randomModel(1, 6*part*512, 300, 60*kib)
	store(t, parent, filepath.Join(dir, "p-flat.vmdk"))
	flat := randomModel(2, 2*part*512+4096, 30, 100*kib)
	store(t, flat, filepath.Join(dir, "flat"))
	cowd := randomESX(3, part, 1, esxAbsent, esxData)
	se := randomESX(4, part, 8, esxAbsent, esxData, esxZero)
	hosted := randomESX(5, part, 16, esxAbsent, esxData, esxZero)
	writeFiles(t, dir, map[string][]byte{
		"p.vmdk": deltaText("vmfs", "aaaa0001", "ffffffff", "", fmt.Sprintf(`RW %d VMFS "p-flat.vmdk"`, 6*part)),
		"cowd":   writeCOWD(cowd), "se": writeSESparse(se), "hosted": writeHosted(hosted, nil),
		"x.vmdk": deltaText("vmfsSparse", "aaaa0002", "aaaa0001", "p.vmdk",
			fmt.Sprintf(`RW %d FLAT "flat" 0`, part),
			fmt.Sprintf(`RDONLY %d VMFSSPARSE "cowd"`, part),
			fmt.Sprintf(`RW %d ZERO`, part),
			`RW 0 ZERO`,
			fmt.Sprintf(`RW %d SESPARSE "se"`, part),
			fmt.Sprintf("RW\t%d  SPARSE \"hosted\"\r", part),
			fmt.Sprintf(`rw %d FLAT "flat" %d`, part, part+8)),
	})
	want := make([]byte, 6*part*512)
	parent.ReadAt(want, 0)
	at := func(i int64) []byte { return want[i*part*512:][:part*512] }
	flat.ReadAt(at(0), 0)
	cowd.over(at(1))
	clear(at(2))
	se.over(at(3))
	hosted.over(at(4))
	flat.ReadAt(at(5), (part+8)*512)
	img := openChain(t, filepath.Join(dir, "x.vmdk"), Policy{})
	checkImage(t, img, memSource(want))

	var wg sync.WaitGroup
	for g := range uint64(6) {
		wg.Go(func() { checkReads(t, g, img, bytes.NewReader(want), int64(len(want)), 60, 300*kib, nil) })
	}
	wg.Wait()

	// From anywhere on: the same list, less what ends before.
	v := img.Source.(*VMDKImage)
	all := allocated(t, v, 4096)
	for _, from := range []int64{0, 1, 4096, part * 512, part*512*3 + 77, 6*part*512 - 1} {
		var rest []extent.Extent
		for e, err := range v.AllocatedFrom(from, 4096) {
			if err != nil {
				t.Fatal(err)
			}
			rest = append(rest, e)
		}
		for _, e := range all {
			e = extent.Intersect(e, ext(from, 1<<40))
			for _, r := range rest {
				if part := extent.Intersect(e, r); part.Off == e.Off {
					e = ext(part.End(), e.End()-part.End())
				}
			}
			if !e.Empty() {
				t.Errorf("from %d: %v is missing", from, e)
			}
		}
		if len(rest) > 0 && rest[0].End() <= from {
			t.Errorf("from %d: begins with %v", from, rest[0])
		}
	}
}

// over lays the grains of d on p.
func (d esxDisk) over(p []byte) {
	for i, s := range d.states {
		at := p[int64(i)*d.grain*512:]
		at = at[:min(int64(len(at)), d.grain*512)]
		switch s {
		case esxData:
			copy(at, d.bytes(i))
		case esxZero, esxUnmapped:
			clear(at)
		}
	}
}

// memSource is a disk in memory, all of it data.
type memSource []byte

func (m memSource) Size() int64 { return int64(len(m)) }
func (m memSource) ReadAt(p []byte, off int64) (int, error) {
	return bytes.NewReader(m).ReadAt(p, off)
}
func (m memSource) Allocated(int64) iter.Seq2[extent.Extent, error] {
	return extent.All([]extent.Extent{{Len: int64(len(m))}})
}

// writeHosted makes a hosted sparse extent of version 2 with zeroed grains, two
// directories and their tables, and grains of any size; "Hosted Sparse Extents".
// A descriptor, if any, is embedded.
func writeHosted(d esxDisk, descriptor []byte) []byte {
	tables := (int64(len(d.states)) + 511) / 512
	dirLen := (tables*4 + 511) / 512
	b := make([]byte, 512)
	copy(b, "KDMV")
	put32(b, 4, 2)
	put32(b, 8, 1|2|4)
	put64(b, 12, d.sectors)
	put64(b, 20, d.grain)
	put32(b, 44, 512)
	copy(b[73:], "\n \r\n")
	if descriptor != nil {
		put64(b, 28, 1)
		put64(b, 36, 1)
		b = append(b, descriptor...)
		b = append(b, make([]byte, 2*512-len(b))...)
	}
	var dirs [2]int
	for i := range dirs {
		dirs[i] = len(b)
		put64(b, 48+8*i, int64(len(b)/512))
		at := int64(len(b)/512) + dirLen
		b = append(b, make([]byte, (dirLen+4*tables)*512)...)
		for j := range tables {
			put32(b, dirs[i]+int(j)*4, at+4*j)
		}
	}
	put64(b, 64, int64(len(b)/512))
	entry := func(i int, v int64) {
		for _, dir := range dirs {
			table := int(binary.LittleEndian.Uint32(b[dir+i/512*4:])) * 512
			put32(b, table+i%512*4, v)
		}
	}
	for i, s := range d.states {
		if s == esxZero {
			entry(i, 1)
		}
	}
	for _, i := range d.order() {
		entry(i, int64(len(b)/512))
		b = append(b, d.bytes(i)...)
	}
	return b
}

// Grains of other sizes than 64 KiB, zeroed grains, and a damaged directory.
func TestHostedSparse(t *testing.T) {
	needQEMU(t)
	for i, grain := range []int64{1, 8, 16, 128, 4096} {
		t.Run(fmt.Sprint(grain), func(t *testing.T) {
			t.Parallel()
			sectors := grain*1300 + 1
			d := randomESX(uint64(i), min(sectors, 50001), grain, esxAbsent, esxData, esxZero)
			text := deltaText("monolithicSparse", "1", "ffffffff", "", fmt.Sprintf(`RW %d SPARSE "x.vmdk"`, d.sectors))
			b := writeHosted(d, text)
			dir := t.TempDir()
			path := filepath.Join(dir, "x.vmdk")
			save := func() { writeFiles(t, dir, map[string][]byte{"x.vmdk": b}) }
			save()
			want := make(memSource, d.sectors*512)
			d.over(want)
			checkImage(t, openChain(t, path, Policy{}), want)
			if grain > 8 { // QEMU takes "more than 8 sectors" as strictly as the specification
				checkImage(t, asQEMU(t, dir, "vmdk", "x.vmdk"), want)
			}

			// The primary directory outside of the file, then one of its entries.
			primary := int64(binary.LittleEndian.Uint64(b[56:]))
			put64(b, 56, 1<<40)
			save()
			checkImage(t, openChain(t, path, Policy{}), want)
			b[72] = 1 // unclean: the copy may be old
			save()
			if _, err := OpenChain(path, Policy{}); !errors.Is(err, ErrCorrupt) {
				t.Errorf("the copy of an unclean file: %v", err)
			}
			b[72] = 0
			put64(b, 56, primary)
			was := int64(binary.LittleEndian.Uint32(b[primary*512:]))
			put32(b, int(primary*512), 0x7fffffff)
			save()
			checkImage(t, openChain(t, path, Policy{}), want)
			put32(b, int(primary*512), was)
		})
	}
}
