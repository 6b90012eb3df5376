package vdisk

import (
	"encoding/binary"
	"encoding/hex"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"unicode/utf16"
)

// vhdxMaker writes small VHDX files for tests of the reader. It is written from
// MS-VHDX (revision 8.0, 2024-04-23), shares no constant with the reader, and
// puts everything elsewhere than the computed files have it. Differencing files
// and sectors of 4096 bytes exist in tests only as this makes them: QEMU has no
// differencing VHDX, and no Windows was asked.
type vhdxMaker struct {
	block, sector, disk int64
	locator             [][2]string // of a differencing file; nil: none
	dataWrite           string      // id
	sizeID              string      // of the item with the disk's size
	log                 []byte      // 1 MiB when nil
	logID               string
	sequence            [2]uint64 // of the headers
	plain               bool      // nothing that QEMU refuses although it may be there
	bat                 map[int64]uint64
	payload             []byte // the file from the end of the metadata on
}

const (
	madeMiB     = 1 << 20
	madeBAT     = 1 * madeMiB
	madeLog     = 3 * madeMiB
	madeSize    = "2FA54224-CD1B-4876-B211-5DBED83BF4B8"
	madeLogID   = "00112233-4455-6677-8899-AABBCCDDEEFF"
	madeWriteID = "01234567-89AB-CDEF-0123-456789ABCDEF"
)

func newMaker(block, sector, disk int64) *vhdxMaker {
	return &vhdxMaker{block: block, sector: sector, disk: disk, dataWrite: madeWriteID, sizeID: madeSize,
		sequence: [2]uint64{8, 7}, bat: map[int64]uint64{}, log: make([]byte, madeMiB)}
}

func madeGUID(s string) []byte {
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(b) != 16 {
		panic(s)
	}
	slices.Reverse(b[:4])
	slices.Reverse(b[4:6])
	slices.Reverse(b[6:8])
	return b
}

func madeSum(b []byte) uint32 { return crc32.Checksum(b, crc32.MakeTable(0x82F63B78)) }

func (m *vhdxMaker) ratio() int64 { return 8388608 * m.sector / m.block }

// index of a payload block in the BAT, and of the bitmap for it.
func (m *vhdxMaker) index(b int64) int64  { return b/m.ratio()*(m.ratio()+1) + b%m.ratio() }
func (m *vhdxMaker) bitmap(b int64) int64 { return b/m.ratio()*(m.ratio()+1) + m.ratio() }

// metaAt is behind the log, the payload behind the 1 MiB of metadata.
func (m *vhdxMaker) metaAt() int64 { return madeLog + int64(len(m.log)) }

// add puts b behind everything else, padded to whole MiB, and returns where.
func (m *vhdxMaker) add(b []byte) int64 {
	at := m.metaAt() + madeMiB + int64(len(m.payload))
	m.payload = append(m.payload, b...)
	m.payload = append(m.payload, make([]byte, -len(m.payload)&(madeMiB-1))...)
	return at
}

// fill gives block b a state and data, which may be nil.
func (m *vhdxMaker) fill(b int64, state uint64, data []byte) {
	entry := state
	if data != nil {
		entry |= uint64(m.add(data))
	}
	m.bat[m.index(b)] = entry
}

// bytes is the file. The BAT has 2 MiB.
func (m *vhdxMaker) bytes() []byte {
	le := binary.LittleEndian
	f := make([]byte, m.metaAt()+madeMiB, m.metaAt()+madeMiB+int64(len(m.payload)))
	copy(f, "vhdxfile")
	for i, sequence := range m.sequence {
		h := f[65536*(i+1):][:4096]
		copy(h, "head")
		le.PutUint64(h[8:], sequence)
		copy(h[16:], madeGUID(madeWriteID))
		copy(h[32:], madeGUID(m.dataWrite))
		if m.logID != "" {
			copy(h[48:], madeGUID(m.logID))
		}
		le.PutUint16(h[66:], 1)
		le.PutUint32(h[68:], uint32(len(m.log)))
		le.PutUint64(h[72:], madeLog)
		le.PutUint32(h[4:], madeSum(h))
	}
	region := f[196608:][:65536]
	copy(region, "regi")
	n := 0
	entry := func(id string, off, size int64, required uint32) {
		e := region[16+32*n:]
		n++
		le.PutUint32(region[8:], uint32(n))
		copy(e, madeGUID(id))
		le.PutUint64(e[16:], uint64(off))
		le.PutUint32(e[24:], uint32(size))
		le.PutUint32(e[28:], required)
	}
	entry("8B7CA206-4790-4B9A-B8FE-575F050F886E", m.metaAt(), madeMiB, 1)
	entry("2DC27766-F623-4200-9D64-115E9BFD4A08", madeBAT, 2*madeMiB, 1)
	if !m.plain {
		entry("11111111-2222-3333-4444-555555555555", 1<<40, madeMiB, 0) // unknown, and not required
	}
	le.PutUint32(region[4:], madeSum(region))
	copy(f[262144:], region)
	for i, e := range m.bat {
		le.PutUint64(f[madeBAT+8*i:], e)
	}
	copy(f[madeLog:], m.log)
	m.metadata(f[m.metaAt():])
	return append(f, m.payload...)
}

func (m *vhdxMaker) metadata(b []byte) {
	le := binary.LittleEndian
	copy(b, "metadata")
	n, at := 0, 65536+13 // items need no alignment
	item := func(id string, flags uint32, value []byte) {
		e := b[32+32*n:]
		n++
		le.PutUint16(b[10:], uint16(n))
		copy(e, madeGUID(id))
		le.PutUint32(e[16:], uint32(at))
		le.PutUint32(e[20:], uint32(len(value)))
		le.PutUint32(e[24:], flags)
		at += copy(b[at:], value) + 3
	}
	params := le.AppendUint32(nil, uint32(m.block))
	flags := uint32(0)
	if m.locator != nil {
		flags = 2
		item("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C", 4, madeLocator(m.locator))
	}
	item("8141BF1D-A96F-4709-BA47-F233A8FAAB5F", 6, le.AppendUint32(nil, uint32(m.sector)))
	item("CDA348C7-445D-4471-9CC9-E9885251C556", 6, le.AppendUint32(nil, 4096))
	// A user's item with the id of a known one is the user's.
	if !m.plain {
		item(madeSize, 1, []byte("hello"))
	}
	item(m.sizeID, 6, le.AppendUint64(nil, uint64(m.disk)))
	item("BECA12AB-B2E6-4523-93EF-C309E000C746", 6, madeGUID(madeWriteID))
	item("CAA16737-FA36-4D43-B3B6-33F0AA44E76B", 4, le.AppendUint32(params, flags))
}

func madeLocator(pairs [][2]string) []byte {
	le := binary.LittleEndian
	b := append(madeGUID("B04AEFB7-D19E-4A81-B789-25B8E9445913"), 0, 0, byte(len(pairs)), 0)
	strs := []byte{}
	add := func(s string) (off uint32, n uint16) {
		off = uint32(20 + 12*len(pairs) + len(strs))
		for _, u := range utf16.Encode([]rune(s)) {
			strs = le.AppendUint16(strs, u)
			n += 2
		}
		return off, n
	}
	for _, p := range pairs {
		ko, kn := add(p[0])
		vo, vn := add(p[1])
		b = le.AppendUint32(b, ko)
		b = le.AppendUint32(b, vo)
		b = le.AppendUint16(b, kn)
		b = le.AppendUint16(b, vn)
	}
	return append(b, strs...)
}

// madeEntry is an entry of a log, MS-VHDX §2.3.1.
type madeEntry struct {
	sequence      uint64
	tail          int
	flushed, last int64
	writes        []madeWrite
	pad           int // further sectors
	id            string
}

type madeWrite struct {
	off  int64
	data []byte // 4 KiB
	zero int64  // when data is nil
}

func (e madeEntry) bytes() []byte {
	le := binary.LittleEndian
	b := make([]byte, (2+len(e.writes)+127)/128*4096)
	var sectors []byte
	copy(b, "loge")
	le.PutUint32(b[12:], uint32(e.tail))
	le.PutUint64(b[16:], e.sequence)
	le.PutUint32(b[24:], uint32(len(e.writes)))
	if e.id == "" {
		e.id = madeLogID
	}
	copy(b[32:], madeGUID(e.id))
	le.PutUint64(b[48:], uint64(e.flushed))
	le.PutUint64(b[56:], uint64(e.last))
	for i, w := range e.writes {
		d := b[64+32*i:]
		le.PutUint64(d[16:], uint64(w.off))
		le.PutUint64(d[24:], e.sequence)
		if w.data == nil {
			copy(d, "zero")
			le.PutUint64(d[8:], uint64(w.zero))
			continue
		}
		copy(d, "desc")
		copy(d[4:8], w.data[4092:])
		copy(d[8:16], w.data)
		s := slices.Clone(w.data)
		copy(s, "data")
		le.PutUint32(s[4:], uint32(e.sequence>>32))
		le.PutUint32(s[4092:], uint32(e.sequence))
		sectors = append(sectors, s...)
	}
	b = append(b, sectors...)
	b = append(b, make([]byte, 4096*e.pad)...)
	le.PutUint32(b[8:], uint32(len(b)))
	le.PutUint32(b[4:], madeSum(b))
	return b
}

// putRing writes b to a ring from at on and returns where it ends.
func putRing(ring []byte, at int, b []byte) int {
	for i := range b {
		ring[(at+i)%len(ring)] = b[i]
	}
	return (at + len(b)) % len(ring)
}

func noise(seed uint64, n int64) []byte {
	m := newModel(seed, n, ext(0, n))
	b := make([]byte, n)
	if _, err := m.ReadAt(b, 0); err != nil && err != io.EOF {
		panic(err)
	}
	return b
}

// bytesAt is a file in memory.
type bytesAt []byte

func (b bytesAt) ReadAt(p []byte, off int64) (int, error) {
	if off >= int64(len(b)) {
		return 0, io.EOF
	}
	n := copy(p, b[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func openMade(t testing.TB, b []byte, opts VHDXOptions) *VHDXImage {
	t.Helper()
	v, err := OpenVHDX(bytesAt(b), int64(len(b)), opts)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func writeFile(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func coin(rnd *rand.Rand) bool { return rnd.IntN(2) == 0 }
