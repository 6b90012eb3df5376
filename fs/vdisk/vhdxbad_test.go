package vdisk

import (
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
)

// resum puts the checksum of a structure of n bytes right.
func resum(b []byte, at, n int) {
	copy(b[at+4:], []byte{0, 0, 0, 0})
	binary.LittleEndian.PutUint32(b[at+4:], madeSum(b[at:at+n]))
}

// Single faults, and what they are to be called. A nil error means that the
// image is still read.
func TestVHDXFaults(t *testing.T) {
	const meta = madeLog + madeMiB // with the five system items behind the user's
	le := binary.LittleEndian
	both := func(b []byte, change func(h []byte)) { // headers
		for _, at := range []int{65536, 131072} {
			change(b[at:])
			resum(b, at, 4096)
		}
	}
	tables := func(b []byte, change func(h []byte)) { // region tables
		for _, at := range []int{196608, 262144} {
			change(b[at:])
			resum(b, at, 65536)
		}
	}
	item := func(b []byte, id string) []byte { // entry of the metadata table
		for e := b[meta+32:]; ; e = e[32:] {
			if string(e[:16]) == string(madeGUID(id)) && e[24]&1 == 0 {
				return e
			}
		}
	}
	value := func(b []byte, id string) []byte { return b[meta+le.Uint32(item(b, id)[16:]):] }
	const params, logical = "CAA16737-FA36-4D43-B3B6-33F0AA44E76B", "8141BF1D-A96F-4709-BA47-F233A8FAAB5F"
	for _, c := range []struct {
		name   string
		change func(b []byte)
		err    error
	}{
		{"none", func([]byte) {}, nil},
		{"signature", func(b []byte) { b[0] ^= 1 }, ErrCorrupt},
		{"older header", func(b []byte) { b[131072+100] ^= 1 }, nil},
		{"newer header", func(b []byte) { b[65536+100] ^= 1 }, nil},
		{"both headers", func(b []byte) { b[65536+100] ^= 1; b[131072+100] ^= 1 }, ErrCorrupt},
		{"signatures of the headers", func(b []byte) { both(b, func(h []byte) { h[0] = 'x' }) }, ErrCorrupt},
		{"equal sequences, different headers", func(b []byte) {
			both(b, func(h []byte) { h[8] = 5 })
			b[65536+16] ^= 1
			resum(b, 65536, 4096)
		}, ErrCorrupt},
		{"equal headers", func(b []byte) { copy(b[131072:], b[65536:65536+4096]) }, nil},
		{"version", func(b []byte) { both(b, func(h []byte) { h[66] = 2 }) }, ErrUnsupported},
		{"log version, no log", func(b []byte) { both(b, func(h []byte) { h[64] = 1 }) }, nil},
		{"log version", func(b []byte) { both(b, func(h []byte) { h[64], h[48] = 1, 1 }) }, ErrUnsupported},
		{"log nowhere", func(b []byte) { both(b, func(h []byte) { h[48] = 1; clear(h[68:72]) }) }, ErrCorrupt},
		{"log past the end", func(b []byte) { both(b, func(h []byte) { h[79] = 0x7f }) }, ErrCorrupt},
		{"log in the BAT", func(b []byte) { both(b, func(h []byte) { le.PutUint64(h[72:], madeBAT) }) }, ErrCorrupt},
		{"region table", func(b []byte) { b[196608+70000-65536] ^= 1 }, nil},
		{"copy of the region table", func(b []byte) { b[262144+9] ^= 1 }, nil},
		{"both region tables", func(b []byte) { b[196608+9] ^= 1; b[262144+9] ^= 1 }, ErrCorrupt},
		{"number of regions", func(b []byte) { tables(b, func(h []byte) { le.PutUint32(h[8:], 2048) }) }, ErrCorrupt},
		{"unknown required region", func(b []byte) { tables(b, func(h []byte) { h[16+64+28] = 1 }) }, ErrUnsupported},
		{"no BAT", func(b []byte) { tables(b, func(h []byte) { h[16+32] ^= 1; h[16+32+28] = 0 }) }, ErrCorrupt},
		{"BAT twice", func(b []byte) { tables(b, func(h []byte) { copy(h[16+64:], h[16+32:16+64]) }) }, ErrCorrupt},
		{"BAT past the end", func(b []byte) { tables(b, func(h []byte) { h[16+32+16+7] = 0x40 }) }, ErrCorrupt},
		{"BAT at an odd place", func(b []byte) { tables(b, func(h []byte) { h[16+32+16] = 1 }) }, ErrCorrupt},
		{"BAT over the metadata", func(b []byte) { tables(b, func(h []byte) { le.PutUint64(h[16+32+16:], meta-madeMiB) }) }, ErrCorrupt},
		{"metadata signature", func(b []byte) { b[meta] ^= 1 }, ErrCorrupt},
		{"number of items", func(b []byte) { le.PutUint16(b[meta+10:], 2048) }, ErrCorrupt},
		{"unknown required item", func(b []byte) { item(b, "CDA348C7-445D-4471-9CC9-E9885251C556")[0] ^= 1 }, ErrUnsupported},
		{"required item of the user", func(b []byte) { b[meta+32+2*32+24] |= 4 }, ErrUnsupported},
		{"item outside of the region", func(b []byte) { item(b, params)[18] = 0x10 }, ErrCorrupt},
		{"item in the table", func(b []byte) { item(b, params)[18] = 0 }, ErrCorrupt},
		{"item too long", func(b []byte) { item(b, params)[20] = 9 }, ErrCorrupt},
		{"item twice", func(b []byte) { copy(item(b, logical), madeGUID(params)) }, ErrCorrupt},
		{"no sector size", func(b []byte) { e := item(b, logical); e[0], e[24] = 0, 0 }, ErrCorrupt},
		{"sector size", func(b []byte) { le.PutUint32(value(b, logical), 520) }, ErrCorrupt},
		{"block size of 3 MiB", func(b []byte) { le.PutUint32(value(b, params), 3*mib) }, ErrCorrupt},
		{"block size of 512 KiB", func(b []byte) { le.PutUint32(value(b, params), mib/2) }, ErrCorrupt},
		{"block size of 512 MiB", func(b []byte) { le.PutUint32(value(b, params), 512*mib) }, ErrCorrupt},
		{"block size 0", func(b []byte) { le.PutUint32(value(b, params), 0) }, ErrCorrupt},
		{"unknown file parameter", func(b []byte) { value(b, params)[4] = 8 }, ErrUnsupported},
		{"parent without a locator", func(b []byte) { value(b, params)[4] = 2 }, ErrCorrupt},
		{"odd disk", func(b []byte) { value(b, madeSize)[0] = 1 }, ErrCorrupt},
		{"disk too large", func(b []byte) { value(b, madeSize)[7] = 1 }, ErrCorrupt},
		{"disk larger than the BAT", func(b []byte) { value(b, madeSize)[5] = 1 }, ErrCorrupt},
		{"state 4", func(b []byte) { b[madeBAT] ^= 2 }, ErrCorrupt},
		{"partial without a parent", func(b []byte) { b[madeBAT] ^= 1 }, ErrCorrupt},
		{"reserved bits of the BAT", func(b []byte) { b[madeBAT+1] ^= 1 }, ErrCorrupt},
		{"block past the end", func(b []byte) { b[madeBAT+4] = 1 }, ErrCorrupt},
		{"block far past the end", func(b []byte) { b[madeBAT+7] = 0xff }, ErrCorrupt},
		{"block in the header", func(b []byte) { le.PutUint64(b[madeBAT:], 6) }, ErrCorrupt},
		{"block in the BAT", func(b []byte) { le.PutUint64(b[madeBAT:], madeBAT|6) }, ErrCorrupt},
		{"block in the log", func(b []byte) { le.PutUint64(b[madeBAT:], madeLog|6) }, ErrCorrupt},
		{"the end of the file is missing", nil, ErrCorrupt},
	} {
		m := newMaker(mib, 512, 3*mib)
		m.fill(0, 6, noise(1, mib))
		b := m.bytes()
		if c.change == nil {
			b = b[:len(b)-9]
		} else {
			c.change(b)
		}
		v, err := OpenVHDX(bytesAt(b), int64(len(b)), VHDXOptions{})
		if err == nil {
			p := make([]byte, 3*mib)
			if _, err = v.ReadAt(p, 0); err == io.EOF {
				err = nil
			}
			if err == nil && !slices.Equal(p[:mib], noise(1, mib)) {
				t.Errorf("%s: other bytes", c.name)
			}
		}
		if !errors.Is(err, c.err) || (err == nil) != (c.err == nil) {
			t.Errorf("%s: got %v, want %v", c.name, err, c.err)
		}
	}
	for n := range 40 {
		b := newMaker(mib, 512, 3*mib).bytes()
		b = b[:n*len(b)/40]
		if _, err := OpenVHDX(bytesAt(b), int64(len(b)), VHDXOptions{}); !errors.Is(err, ErrCorrupt) {
			t.Errorf("cut to %d bytes: %v", len(b), err)
		}
	}
}

// The id of the disk comes from the newer header, and the size of the disk
// under either of its ids.
func TestVHDXChoices(t *testing.T) {
	for _, sequence := range [][2]uint64{{1, 2}, {2, 1}, {1 << 63, 1}} {
		m := newMaker(mib, 512, 3*mib)
		m.sequence = sequence
		b := m.bytes()
		b[65536+32], b[131072+32] = 1, 2
		resum(b, 65536, 4096)
		resum(b, 131072, 4096)
		newer := byte(1)
		if sequence[1] > sequence[0] {
			newer = 2
		}
		if g := openMade(t, b, VHDXOptions{}).DataWriteGUID(); g[0] != newer {
			t.Errorf("%v: %v", sequence, g)
		}
	}
	m := newMaker(mib, 512, 3*mib)
	m.sizeID = "2FA54224-CD1B-4876-B211-5BE07A6CE32C"
	if v := openMade(t, m.bytes(), VHDXOptions{}); v.Size() != 3*mib || v.DataWriteGUID().String() != "{01234567-89ab-cdef-0123-456789abcdef}" {
		t.Error(v.Size(), v.DataWriteGUID())
	}
}

func TestVHDXParents(t *testing.T) {
	right, other := "{01234567-89ab-cdef-0123-456789ABCDEF}", "{99999999-89ab-cdef-0123-456789ABCDEF}"
	parent := func(sector int64) func(ParentLocator) (Source, error) {
		return func(ParentLocator) (Source, error) {
			return openMade(t, newMaker(mib, sector, mib).bytes(), VHDXOptions{}), nil
		}
	}
	broken := errors.New("broken")
	for _, c := range []struct {
		name    string
		locator [][2]string
		open    func(ParentLocator) (Source, error)
		err     error
	}{
		{"right", [][2]string{{"parent_linkage", right}}, parent(512), nil},
		{"right second", [][2]string{{"parent_linkage", other}, {"parent_linkage2", right}}, parent(512), nil},
		{"wrong", [][2]string{{"parent_linkage", other}}, parent(512), ErrCorrupt},
		{"wrong twice", [][2]string{{"parent_linkage", other}, {"parent_linkage2", other}}, parent(512), ErrCorrupt},
		{"no linkage", [][2]string{{"relative_path", "x"}}, parent(512), ErrCorrupt},
		{"no id", [][2]string{{"parent_linkage", "{zz}"}}, parent(512), ErrCorrupt},
		{"odd id", [][2]string{{"parent_linkage", "{0123456789ab-cdef-0123-456789ABCDEF----}"}}, parent(512), ErrCorrupt},
		{"linkage twice", [][2]string{{"parent_linkage", right}, {"parent_linkage", right}}, parent(512), ErrCorrupt},
		{"NUL", [][2]string{{"parent_linkage", right}, {"relative_path", "a\x00b"}}, parent(512), ErrCorrupt},
		{"empty", [][2]string{{"parent_linkage", right}, {"relative_path", ""}}, parent(512), ErrCorrupt},
		{"other sectors", [][2]string{{"parent_linkage", right}}, parent(4096), ErrCorrupt},
		{"nobody to ask", [][2]string{{"parent_linkage", right}}, nil, ErrRefused},
		{"no VHDX", [][2]string{{"parent_linkage", right}}, func(ParentLocator) (Source, error) { return newModel(1, mib), nil }, ErrCorrupt},
		{"cannot be opened", [][2]string{{"parent_linkage", right}}, func(ParentLocator) (Source, error) { return nil, broken }, broken},
	} {
		m := newMaker(mib, 512, 3*mib)
		m.locator = c.locator
		b := m.bytes()
		_, err := OpenVHDX(bytesAt(b), int64(len(b)), VHDXOptions{Parent: c.open})
		if !errors.Is(err, c.err) || (err == nil) != (c.err == nil) {
			t.Errorf("%s: got %v, want %v", c.name, err, c.err)
		}
	}
	if _, err := parseLocator(append(make([]byte, 20), 1)); !errors.Is(err, ErrUnsupported) {
		t.Error(err)
	}
}

// Where OpenChain looks for a parent.
func TestVHDXParentNames(t *testing.T) {
	parent := newMaker(mib, 512, mib)
	parent.fill(0, 6, noise(1, mib))
	const missing, there = `missing.vhdx`, `base.vhdx`
	for _, c := range []struct {
		locator [][2]string
		err     error
	}{
		{[][2]string{{"relative_path", `.\` + there}}, nil},
		{[][2]string{{"relative_path", there}, {"absolute_win32_path", `\\?\d:\x\` + missing}}, nil},
		{[][2]string{{"absolute_win32_path", `\\?\d:\x\` + there}}, nil},
		{[][2]string{{"absolute_win32_path", `d:` + there}}, nil},
		{[][2]string{{"relative_path", `.\` + missing}, {"volume_path", `\\?\Volume{1}\` + missing}, {"absolute_win32_path", `\\?\d:\` + there}}, nil},
		{[][2]string{{"relative_path", `.\` + missing}}, os.ErrNotExist},
		{[][2]string{{"absolute_win32_path", `\\?\d:\` + missing}}, os.ErrNotExist},
		{[][2]string{{"relative_path", `..\` + there}, {"absolute_win32_path", `\\?\d:\` + there}}, ErrRefused},
		{[][2]string{{"relative_path", `.\child.vhdx`}}, ErrCorrupt}, // itself
		{[][2]string{{"absolute_win32_path", `d:\`}}, ErrCorrupt},
		{nil, ErrCorrupt},
	} {
		child := newMaker(mib, 512, mib)
		child.locator = append(c.locator, [2]string{"parent_linkage", "{" + madeWriteID + "}"})
		dir := t.TempDir()
		writeFiles(t, dir, map[string][]byte{"child.vhdx": child.bytes(), there: parent.bytes()})
		img, err := OpenChain(filepath.Join(dir, "child.vhdx"), Policy{})
		if !errors.Is(err, c.err) || (err == nil) != (c.err == nil) {
			t.Errorf("%v: got %v, want %v", c.locator, err, c.err)
		}
		if err == nil {
			checkImage(t, img, memSource(noise(1, mib)))
			img.Close()
		}
	}
}

// pieces is a large file of which little is not zero.
type pieces struct {
	size int64
	at   map[int64][]byte // offset => bytes, apart
}

func (f pieces) ReadAt(p []byte, off int64) (int, error) {
	p, end := clip(p, off, f.size)
	clear(p)
	for at, b := range f.at {
		if at < off+int64(len(p)) && off < at+int64(len(b)) {
			copy(p[max(0, at-off):], b[max(0, off-at):])
		}
	}
	return len(p), end
}

var fuzzParent = sync.OnceValue(func() []byte {
	m := newMaker(mib, 512, mib)
	m.fill(0, 6, noise(5, 3000))
	return m.bytes()
})

// tryVHDX reads an image that may be anything.
func tryVHDX(t *testing.T, f pieces, off uint64, n uint16) {
	parent := fuzzParent()
	v, err := OpenVHDX(f, f.size, VHDXOptions{TableCache: 16 * kib, Parent: func(l ParentLocator) (Source, error) {
		p, err := OpenVHDX(bytesAt(parent), int64(len(parent)), VHDXOptions{})
		if err == nil {
			p.head.dataWrite, p.meta.sector = l.Linkage, []int64{512, 4096}[n%2]
		}
		return p, err
	}})
	if err != nil {
		if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrUnsupported) {
			t.Fatalf("OpenVHDX: %v", err)
		}
		return
	}
	tryDisk(t, v, off, n)
}

// tryDisk: no panic, errors that are ErrCorrupt, and the same bytes in large
// and small reads.
func tryDisk(t *testing.T, disk Source, off uint64, n uint16) {
	size := disk.Size()
	at := int64(off % uint64(size+600))
	p := make([]byte, n)
	m, err := disk.ReadAt(p, at)
	if err != nil && err != io.EOF && !errors.Is(err, ErrCorrupt) {
		t.Fatalf("ReadAt: %v", err)
	}
	one := []byte{0}
	for i := range min(m, 40) {
		if k, err := disk.ReadAt(one, at+int64(i)); k != 1 || one[0] != p[i] {
			t.Fatalf("byte %d: %d, %v; %d in one read", at+int64(i), one[0], err, p[i])
		}
	}
	ranges, last := 0, int64(-1)
	for e, err := range disk.Allocated(512) {
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatalf("Allocated: %v", err)
			}
			break
		}
		if e.Off <= last || e.Len <= 0 || e.End() > size {
			t.Fatalf("range %v after %d in %d", e, last, size)
		}
		last = e.End()
		if ranges++; ranges > 1000 {
			break
		}
	}
}

// madePieces takes the parts out of a file that say something.
func madePieces(b []byte) (header, regions, metadata, bat, log []byte) {
	meta := int(binary.LittleEndian.Uint64(b[196608+32:]))
	return b[65536:][:80], b[196608:][:16+96], b[meta:][:65536+700], b[madeBAT:][:64], b[madeLog:][:8192]
}

func FuzzVHDX(f *testing.F) {
	child := makeChain(1, mib, 512, 3*mib, 2).files[1]
	small := newMaker(mib, 4096, 2*mib)
	small.fill(0, 6, noise(1, 9000))
	small.logID = madeLogID
	putRing(small.log, 0, madeEntry{sequence: 9, writes: []madeWrite{{off: madeBAT, zero: 4096}}}.bytes())
	for _, b := range [][]byte{child, small.bytes()} {
		header, regions, metadata, bat, log := madePieces(b)
		f.Add(header, regions, metadata[:400], metadata[65536:], bat, log, uint64(100), uint16(900))
	}
	f.Fuzz(func(t *testing.T, header, regions, metadata, items, bat, log []byte, off uint64, n uint16) {
		if max(len(header), len(regions), len(metadata), len(items), len(bat), len(log)) > 32*kib {
			t.Skip("longer than anything interesting")
		}
		grow := func(b []byte, n int) []byte { return append(slices.Clone(b), make([]byte, n)...)[:n] }
		h, r := grow(header, 4096), grow(regions, 65536)
		resum(h, 0, 4096)
		resum(r, 0, 65536)
		ring := grow(log, 64*kib)
		for at := 0; at < len(ring); at += 4096 { // checksums that fuzzing would not find
			if n := int(binary.LittleEndian.Uint32(ring[at+8:])); string(ring[at:at+4]) == "loge" && n >= 4096 && n <= len(ring)-at {
				resum(ring, at, n)
			}
		}
		meta := append(grow(metadata, 65536), items...)
		tryVHDX(t, pieces{7 * mib, map[int64][]byte{
			0: []byte("vhdxfile"), 65536: h, 131072: grow(nil, 4096), 196608: r,
			madeBAT: bat, madeLog: ring, madeLog + madeMiB: meta, madeLog + 2*madeMiB: noise(1, 9000),
		}}, off, n)
	})
}

// What the seeds say, so that fuzzing starts from images that can be read.
func TestVHDXSeeds(t *testing.T) {
	c := makeChain(1, mib, 512, 3*mib, 2)
	header, regions, metadata, bat, _ := madePieces(c.files[1])
	h, r := make([]byte, 4096), make([]byte, 65536)
	copy(h, header)
	copy(r, regions)
	f := pieces{7 * mib, map[int64][]byte{0: []byte("vhdxfile"), 65536: h, 196608: r, madeBAT: bat, madeLog + madeMiB: metadata}}
	if _, err := OpenVHDX(f, f.size, VHDXOptions{Parent: func(ParentLocator) (Source, error) { return c.open(t, 0), nil }}); err != nil {
		t.Error(err)
	}
}
