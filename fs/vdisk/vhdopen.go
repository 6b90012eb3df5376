package vdisk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"strings"
	"unicode/utf16"
)

const (
	vhdMagic       = "conectix"
	vhdHeaderMagic = "cxsparse"

	// Types of disks.
	vhdFixed        = 2
	vhdDynamic      = 3
	vhdDifferencing = 4

	vhdUnused  = 0xFFFFFFFF // a block allocation table entry
	vhdMaxName = 4 * kib    // bytes of a parent locator
)

// VHDOptions says how to open a VHD. The zero value is usable for disks
// without a parent.
type VHDOptions struct {
	// Name is what errors call the image.
	Name string
	// Parent opens the disk that a differencing disk is over, by a path with
	// slashes. It is asked for the relative path first, then for the file name of
	// the absolute one, for as long as its answer is os.ErrNotExist. The image
	// does not close it. When nil, a differencing disk is ErrRefused.
	Parent func(name string) (*VHDImage, error)
	// TableCache bounds the memory for block tables and sector bitmaps, in bytes;
	// 0 means 4 MiB, which covers 2 TiB of disk in blocks of 2 MiB, one after the
	// other.
	TableCache int64
}

// VHDImage is an open VHD with its parents: a disk. Safe for concurrent use.
//
// Its size is the footer's current size. QEMU takes the product of the
// cylinders, heads and sectors instead, unless it knows the creator for exact
// sizes: for disks that Virtual PC or Virtual Server wrote it shows up to some
// hundred sectors less at the end. The specification calls the geometry a
// matter of ATA disks, and a backup must not leave out sectors that the file has.
//
// Its Allocated reads tables and sector bitmaps only; a fixed disk that is a
// Source is asked for its holes.
type VHDImage struct {
	Source
	id [16]byte
}

var _ Source = (*VHDImage)(nil)

// vhdFooter is what the reader needs of a footer, VHD specification 1.0, "Hard
// Disk Footer Format". All integers are big-endian.
//
//	+0  "conectix"      +28 creator, its version, its system   +60 u32 type
//	+8  u32 features    +40 u64 original size                  +64 u32 checksum
//	+12 u32 version     +48 u64 current size                   +68 unique id
//	+16 u64 header      +56 geometry                           +84 u8 saved state
//	+24 u32 time
type vhdFooter struct {
	header uint64
	size   int64
	kind   uint32
	id     [16]byte
}

// OpenVHD opens a VHD of size bytes for reading: fixed, dynamic and
// differencing. A bad footer at the end is replaced by its copy at the start,
// which fixed disks do not have. A parent must have the id that the
// differencing disk names; its time stamp is not compared, since copying a file
// may change what it is compared with. What points outside of the file is
// ErrCorrupt, at the latest when the place is read.
func OpenVHD(r io.ReaderAt, size int64, opts VHDOptions) (*VHDImage, error) {
	if opts.Name == "" {
		opts.Name = "VHD"
	}
	v, err := openVHD(r, size, opts)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", opts.Name, err)
	}
	return v, nil
}

func openVHD(r io.ReaderAt, size int64, opts VHDOptions) (*VHDImage, error) {
	f, err := readVHDFooter(r, size)
	if err != nil {
		return nil, err
	}
	v := &VHDImage{id: f.id}
	if f.kind == vhdFixed {
		if f.size > size {
			return nil, corrupt("a fixed disk of %d bytes in a file of %d", f.size, size)
		}
		src, ok := r.(Source)
		if !ok {
			src = opaque{r, size}
		}
		v.Source = section{src, 0, f.size}
		return v, nil
	}
	h, err := readVHDHeader(r, size, f)
	if err != nil {
		return nil, err
	}
	m := &mapped{r: r, fileSize: size, size: f.size, name: opts.Name, tables: newTableCache(r, size, 4*kib, opts.TableCache)}
	m.mapping = &h.blocks
	if f.kind == vhdDifferencing {
		parent, err := h.openParent(r, size, opts.Parent)
		if err != nil {
			return nil, err
		}
		m.backing = parent
	}
	v.Source = m
	return v, nil
}

// readVHDFooter takes the last 512 bytes, or the last 511, which is what
// versions before Virtual PC 2004 wrote, or else the copy at the start.
func readVHDFooter(r io.ReaderAt, size int64) (vhdFooter, error) {
	var first error
	for _, at := range []int64{size - sector, size - sector + 1, 0} {
		if at < 0 {
			continue
		}
		b := make([]byte, sector)
		if _, err := readFull(r, b[:min(sector, size-at)], at); err != nil {
			return vhdFooter{}, fmt.Errorf("reading the footer: %w", err)
		}
		f, err := parseVHDFooter(b)
		if err == nil && (at > 0 || f.kind != vhdFixed) {
			return f, nil
		}
		if err != nil && (first == nil || !errors.Is(first, ErrUnsupported)) {
			first = err
		}
	}
	if first == nil {
		first = corrupt("not a VHD")
	}
	return vhdFooter{}, first
}

func parseVHDFooter(b []byte) (f vhdFooter, err error) {
	be := binary.BigEndian
	if !hasPrefix(b, vhdMagic) {
		return f, corrupt("no VHD footer")
	}
	if sum, want := vhdSum(b, 64), be.Uint32(b[64:]); sum != want {
		return f, corrupt("the footer has checksum %08x, computed %08x", want, sum)
	}
	if v := be.Uint32(b[12:]); v>>16 != 1 {
		return f, unsupported("VHD version %d.%d", v>>16, v&0xffff)
	}
	f.header, f.kind = be.Uint64(b[16:]), be.Uint32(b[60:])
	copy(f.id[:], b[68:])
	if f.kind < vhdFixed || f.kind > vhdDifferencing {
		return f, unsupported("VHD of type %d", f.kind)
	}
	size := be.Uint64(b[48:])
	if size > vmdkMaxDisk*sector {
		return f, corrupt("disk of %d bytes", size)
	}
	f.size = int64(size)
	return f, nil
}

// vhdSum is the one's complement of the sum of all bytes but the sum itself,
// which stands at at.
func vhdSum(b []byte, at int) uint32 {
	sum := uint32(0)
	for i, c := range b {
		if i < at || i >= at+4 {
			sum += uint32(c)
		}
	}
	return ^sum
}

// vhdHeader is the header of a dynamic disk, "Dynamic Disk Header Format":
//
//	+0  "cxsparse"       +28 u32 table entries     +56 u32 parent's time
//	+8  u64 no use       +32 u32 block size        +64 512 bytes: parent's name
//	+16 u64 table        +36 u32 checksum          +576 8 parent locators of 24 bytes
//	+24 u32 version 1.0  +40 parent's unique id
type vhdHeader struct {
	blocks   vhdBlocks
	parent   [16]byte
	name     string // of the parent
	locators []byte
}

func readVHDHeader(r io.ReaderAt, size int64, f vhdFooter) (h vhdHeader, err error) {
	const length = 1024
	if size < length || f.header > uint64(size-length) {
		return h, corrupt("a header at %d of a file of %d bytes", f.header, size)
	}
	b := make([]byte, length)
	if _, err := readFull(r, b, int64(f.header)); err != nil {
		return h, fmt.Errorf("reading the header: %w", err)
	}
	be := binary.BigEndian
	if !hasPrefix(b, vhdHeaderMagic) {
		return h, corrupt("no header of a dynamic disk at %d", f.header)
	}
	if sum, want := vhdSum(b, 36), be.Uint32(b[36:]); sum != want {
		return h, corrupt("the header has checksum %08x, computed %08x", want, sum)
	}
	if v := be.Uint32(b[24:]); v>>16 != 1 {
		return h, unsupported("VHD header version %d.%d", v>>16, v&0xffff)
	}
	table, entries, block := be.Uint64(b[16:]), int64(be.Uint32(b[28:])), be.Uint32(b[32:])
	if block < sector || bits.OnesCount32(block) != 1 {
		return h, corrupt("blocks of %d bytes", block)
	}
	h.blocks = vhdBlocks{table: int64(table), block: int64(block)}
	if need := divUp(f.size, int64(block)); need > entries {
		return h, corrupt("a table of %d blocks of %d bytes for a disk of %d", entries, block, f.size)
	} else if table%4 != 0 || table > uint64(size) || need*4 > size-int64(table) {
		return h, corrupt("a table of %d blocks at %d of a file of %d bytes", need, table, size)
	}
	copy(h.parent[:], b[40:])
	h.name, h.locators = utf16BE(b[64:576]), b[576:768]
	return h, nil
}

func utf16BE(b []byte) string { return decodeUTF16(b, binary.BigEndian) }

// decodeUTF16 stops at a zero.
func decodeUTF16(b []byte, order binary.ByteOrder) string {
	var u []uint16
	for ; len(b) >= 2; b = b[2:] {
		c := order.Uint16(b)
		if c == 0 {
			break
		}
		u = append(u, c)
	}
	return string(utf16.Decode(u))
}

// openParent tries what the file says of its parent's name, as relative path
// first.
func (h *vhdHeader) openParent(r io.ReaderAt, size int64, open func(name string) (*VHDImage, error)) (*VHDImage, error) {
	names, err := h.parentNames(r, size)
	if err != nil {
		return nil, err
	}
	if open == nil {
		return nil, fmt.Errorf("has the parent %q: %w", names[0], ErrRefused)
	}
	var missing error
	for _, name := range names {
		parent, err := open(name)
		if errors.Is(err, os.ErrNotExist) {
			missing = errors.Join(missing, err)
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("parent %q: %w", name, err)
		}
		if parent.id != h.parent {
			return nil, corrupt("parent %q has the id %x, but %x is expected: it is another disk", name, parent.id, h.parent)
		}
		return parent, nil
	}
	return nil, fmt.Errorf("parent %q: %w", names[0], missing)
}

// parentNames gives at least one name. Windows writes two locators, W2ru (a path
// relative to this file) and W2ku (an absolute one), in UTF-16LE; "Parent
// Locator". Absolute ones say nothing here but the last part.
func (h *vhdHeader) parentNames(r io.ReaderAt, size int64) ([]string, error) {
	var relative, names []string
	for e := h.locators; len(e) >= 24; e = e[24:] {
		be := binary.BigEndian
		code, n, at := string(e[:4]), int64(be.Uint32(e[8:])), be.Uint64(e[16:])
		if code != "W2ru" && code != "W2ku" {
			continue
		}
		if n > vhdMaxName || at > uint64(size) || n > size-int64(at) {
			return nil, corrupt("a parent locator of %d bytes at %d of a file of %d", n, at, size)
		}
		b := make([]byte, n)
		if _, err := readFull(r, b, int64(at)); err != nil {
			return nil, fmt.Errorf("reading a parent locator: %w", err)
		}
		name := slashes(decodeUTF16(b, binary.LittleEndian))
		if code == "W2ru" {
			relative = append(relative, name)
		} else {
			names = append(names, name)
		}
	}
	names = append(names, slashes(h.name))
	for i, name := range names {
		names[i] = name[strings.LastIndexAny(name, "/:")+1:]
	}
	var all []string
	for _, name := range append(relative, names...) {
		if name != "" {
			all = append(all, name)
		}
	}
	if all == nil {
		return nil, corrupt("a differencing disk without the name of its parent")
	}
	return all, nil
}

// slashes turns a path of Windows into one of Unix.
func slashes(name string) string { return strings.ReplaceAll(name, `\`, "/") }

// vhdBlocks is the mapping of a dynamic or differencing disk. The table has the
// sector of each block: a bitmap with a bit per sector (the first is the top
// bit), padded to whole sectors, then the sectors. A sector whose bit is clear
// is the parent's, or has never been written; "Block Allocation Table and Data
// Blocks".
type vhdBlocks struct {
	table int64 // place in the file
	block int64 // bytes
}

func (b *vhdBlocks) bitmapLen() int64 { return roundUp(divUp(b.block/sector, 8), sector) }

func (b *vhdBlocks) lookup(w *walk, off int64) (span, error) {
	raw, err := w.l1.bytes(b.table+off/b.block*4, 4)
	if err != nil {
		return span{}, err
	}
	entry := binary.BigEndian.Uint32(raw)
	s := span{Extent: to(off, roundUp(off+1, b.block))}
	if entry == vhdUnused {
		return s, nil
	}
	if entry == 0 {
		return span{}, corrupt("block %d is at sector 0, where the footer's copy is", off/b.block)
	}
	bitmap, in := int64(entry)*sector, off%b.block
	index := in / sector
	if raw, err = w.l2.bytes(bitmap+index/8, 1); err != nil {
		return span{}, fmt.Errorf("block %d: %w", off/b.block, err)
	}
	bytesLeft := divUp(b.block/sector, 8) - index/8
	set, n := bitRun(raw[:min(int64(len(raw)), bytesLeft)], int(index%8))
	s.Len = min(s.Len, int64(n)*sector-in%sector)
	if set {
		s.kind, s.host = plain, bitmap+b.bitmapLen()+in
	}
	return s, nil
}

// bitRun is the bit at i, and how many in a row from there are like it. The
// first bit is the top bit of the first byte.
func bitRun(b []byte, i int) (set bool, n int) {
	flip := byte(0)
	if b[0]<<i>>7 == 1 {
		set, flip = true, 0xff
	}
	n = min(8-i, bits.LeadingZeros8((b[0]^flip)<<i))
	if n < 8-i {
		return set, n
	}
	for _, c := range b[1:] {
		k := bits.LeadingZeros8(c ^ flip)
		n += k
		if k < 8 {
			break
		}
	}
	return set, n
}

func (b *vhdBlocks) unpack([]byte, span) error { return corrupt("VHD has no compressed blocks") }
