package vdisk

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/bits"
)

const (
	vmdkMagic = "KDMV"
	cowdMagic = "COWD"

	// Flags of a hosted sparse extent.
	vmdkNewlineTest = 1 << 0
	vmdkRedundant   = 1 << 1
	vmdkZeroGrains  = 1 << 2 // entry 1 stands for a grain of zeros
	vmdkCompressed  = 1 << 16
	vmdkMarkers     = 1 << 17

	vmdkAtEnd     = -1 // as place of the directory: the footer knows it
	vmdkMaxGrain  = 1 << 30
	vmdkMaxPacked = 2 * mib // bytes of a compressed grain, unpacked
)

// sparseHeader is the header of a hosted sparse extent, VMware Virtual Disk
// Format 5.0, "Hosted Sparse Extent Header". Integers are little-endian.
//
//	+0  "KDMV"        +20 u64 grain size       +48 u64 redundant directory
//	+4  u32 version   +28 u64 descriptor       +56 u64 directory
//	+8  u32 flags     +36 u64 its size         +64 u64 where the grains begin
//	+12 u64 capacity  +44 u32 entries a table  +72 u8 unclean, 4 bytes, u16 compression
//
// Sizes and places are in sectors in the file, in bytes here.
type sparseHeader struct {
	flags     uint32
	capacity  int64
	grain     int64
	descAt    int64
	descLen   int64
	entries   int64 // per grain table
	redundant int64 // 0: none
	directory int64
	grainsAt  int64 // by the field that the specification calls overHead
	unclean   bool
}

func readSparseHeader(r io.ReaderAt, size int64) (h sparseHeader, err error) {
	if h, err = readSparseHeaderAt(r, size, 0); err != nil {
		return h, err
	}
	if h.directory == vmdkAtEnd {
		foot, err := readFooter(r, size)
		if err != nil {
			return h, err
		}
		return h, h.take(foot)
	}
	return h, nil
}

// take takes from the footer where the directory is.
func (h *sparseHeader) take(foot sparseHeader) error {
	if foot.capacity != h.capacity || foot.grain != h.grain || foot.entries != h.entries || foot.flags != h.flags {
		return corrupt("header and footer differ")
	}
	h.directory, h.redundant = foot.directory, 0
	if h.directory == vmdkAtEnd {
		return corrupt("the footer does not say where the grain directory is")
	}
	return nil
}

// readFooter reads the end of a stream: a marker, a copy of the header, and a
// marker of the end; "Stream-Optimized Compressed Sparse Extents".
func readFooter(r io.ReaderAt, size int64) (h sparseHeader, err error) {
	const tail = 3 * sector
	if size < sector+tail || size%sector != 0 {
		return h, corrupt("%d bytes, and no footer at the end: the file was cut off", size)
	}
	b := make([]byte, tail)
	if _, err := readFull(r, b, size-tail); err != nil {
		return h, fmt.Errorf("reading the footer: %w", err)
	}
	le := binary.LittleEndian
	marker := func(b []byte, kind uint32) bool { return le.Uint32(b[8:]) == 0 && le.Uint32(b[12:]) == kind }
	if !marker(b, vmdkMarkFooter) || !hasPrefix(b[sector:], vmdkMagic) || !marker(b[2*sector:], vmdkMarkEnd) || le.Uint64(b[2*sector:]) != 0 {
		return h, corrupt("no footer at the end: the file was cut off, or has something behind its end")
	}
	return readSparseHeaderAt(r, size, size-2*sector)
}

// Types of markers.
const (
	vmdkMarkEnd    = 0
	vmdkMarkTable  = 1
	vmdkMarkDir    = 2
	vmdkMarkFooter = 3
	// Not in the specification: where a writer is that meets no data for long. VMware's own writer
	// makes it, vmware-archive/photon-controller, StreamVmdkWriter.java.
	vmdkMarkProgress = 4
)

func readSparseHeaderAt(r io.ReaderAt, size, at int64) (h sparseHeader, err error) {
	b := make([]byte, 80)
	if size-at < sector {
		return h, corrupt("a header of %d bytes", size-at)
	}
	if _, err := readFull(r, b, at); err != nil {
		return h, fmt.Errorf("reading the header: %w", err)
	}
	return parseSparseHeader(b, size)
}

// parseSparseHeader takes at least 80 bytes of a file of size bytes.
func parseSparseHeader(b []byte, size int64) (h sparseHeader, err error) {
	le := binary.LittleEndian
	if !hasPrefix(b, vmdkMagic) {
		return h, corrupt("not a sparse extent")
	}
	if v := le.Uint32(b[4:]); v < 1 || v > 3 {
		return h, unsupported("sparse extent of version %d", v)
	}
	h.flags = le.Uint32(b[8:])
	if h.flags&vmdkNewlineTest != 0 && string(b[73:77]) != "\n \r\n" {
		return h, corrupt("line ends in the header were changed: the file was transferred as text")
	}
	if unknown := h.flags >> 18 << 18; unknown != 0 {
		return h, unsupported("sparse extent with flags %#x", unknown)
	}
	if c, packed := le.Uint16(b[77:]), h.flags&vmdkCompressed != 0; c > 1 {
		return h, unsupported("compression method %d", c)
	} else if packed != (c == 1) {
		return h, corrupt("compression method %d contradicts the flags %#x", c, h.flags)
	}
	capacity, grain, entries := le.Uint64(b[12:]), le.Uint64(b[20:]), le.Uint32(b[44:])
	if capacity > vmdkMaxDisk {
		return h, corrupt("capacity of %d sectors", capacity)
	}
	if grain < 1 || grain > vmdkMaxGrain/sector || bits.OnesCount64(grain) != 1 {
		return h, corrupt("grains of %d sectors", grain)
	}
	if entries < 1 || entries > 512 { // always 512
		return h, corrupt("grain tables of %d entries", entries)
	}
	h.capacity, h.grain, h.entries = int64(capacity)*sector, int64(grain)*sector, int64(entries)
	h.unclean = b[72] != 0
	return h, h.parsePlaces(b, size)
}

// parsePlaces takes what points into the file.
func (h *sparseHeader) parsePlaces(b []byte, size int64) error {
	le := binary.LittleEndian
	if at, n := le.Uint64(b[28:]), le.Uint64(b[36:]); at != 0 && n != 0 {
		if at > uint64(size/sector) || n > uint64(size/sector)-at || n > vmdkMaxText/sector {
			return corrupt("a descriptor of %d sectors at sector %d", n, at)
		}
		h.descAt, h.descLen = int64(at)*sector, int64(n)*sector
	}
	// Whether these are in the file is seen later: one of them may be good.
	place := func(at uint64) int64 {
		if at > uint64(size/sector) {
			return size
		}
		return int64(at) * sector
	}
	if h.flags&vmdkRedundant != 0 {
		h.redundant = place(le.Uint64(b[48:]))
	}
	h.directory, h.grainsAt = place(le.Uint64(b[56:])), place(le.Uint64(b[64:]))
	if int64(le.Uint64(b[56:])) == vmdkAtEnd {
		h.directory = vmdkAtEnd
	}
	return nil
}

func (h *sparseHeader) readDescriptor(r io.ReaderAt, size int64) ([]byte, error) {
	b := make([]byte, h.descLen)
	if _, err := readFull(r, b, h.descAt); err != nil {
		return nil, fmt.Errorf("reading the descriptor: %w", err)
	}
	return b, nil
}

// grains is the mapping of hosted sparse extents and of those of ESX.
type grains struct {
	m         *mapped
	grain     int64  // bytes
	entries   int64  // per grain table
	directory int64  // place in the file
	redundant int64  // another directory with tables of its own; 0: none
	flags     uint32 // of a hosted sparse extent
	packed    *packedCache
}

// openSparse sets up m for a hosted sparse extent. extents is how many the disk has.
func openSparse(m *mapped, extents int) error {
	h, err := readSparseHeader(m.r, m.fileSize)
	if err != nil {
		return err
	}
	g := &grains{m: m, grain: h.grain, entries: h.entries, directory: h.directory, redundant: h.redundant, flags: h.flags}
	if h.unclean {
		// A writer that was stopped may have brought one of the two up to date only.
		g.redundant = 0
	}
	if g.packing() {
		if extents > 1 {
			return unsupported("compressed, in a disk of several extents") // caches would add up
		}
		if h.grain > vmdkMaxPacked {
			return unsupported("compressed grains of %d bytes", h.grain)
		}
		g.packed = newPackedCache(h.grain, g.decompress)
	}
	m.mapping, m.size = g, h.capacity
	return g.placeDirectory(h.capacity)
}

func (g *grains) packing() bool { return g.flags&vmdkCompressed != 0 }

// placeDirectory makes sure that the directory is in the file, and takes the
// redundant one when only that is.
func (g *grains) placeDirectory(capacity int64) error {
	n := divUp(capacity, g.entries*g.grain) * 4
	inside := func(at int64) bool { return at > 0 && at <= g.m.fileSize && n <= g.m.fileSize-at }
	if !inside(g.redundant) {
		g.redundant = 0
	}
	if n == 0 || inside(g.directory) {
		return nil
	}
	if g.redundant == 0 {
		return corrupt("the grain directory, %d bytes at %d, does not lie in the file of %d bytes", n, g.directory, g.m.fileSize)
	}
	g.directory, g.redundant = g.redundant, 0
	return nil
}

// openCOWD sets up m for a sparse extent of ESX, VMware Virtual Disk Format
// 5.0, "ESX Server Sparse Extents":
//
//	+0 "COWD"         +12 u32 capacity   +20 u32 directory, +24 u32 its entries
//	+4 u32 version 1  +16 u32 grain size
//
// in sectors, little-endian. Grain tables have 4096 entries.
func openCOWD(m *mapped) error {
	b := make([]byte, 32)
	if m.fileSize < 4*sector {
		return corrupt("not an extent of a vmfsSparse disk: %d bytes", m.fileSize)
	}
	if _, err := readFull(m.r, b, 0); err != nil {
		return fmt.Errorf("reading the header: %w", err)
	}
	le := binary.LittleEndian
	if !hasPrefix(b, cowdMagic) {
		return corrupt("not an extent of a vmfsSparse disk")
	}
	if v := le.Uint32(b[4:]); v != 1 {
		return unsupported("vmfsSparse extent of version %d", v)
	}
	grain := int64(le.Uint32(b[16:])) * sector
	if grain < sector || grain > vmdkMaxGrain {
		return corrupt("grains of %d bytes", grain)
	}
	m.size = int64(le.Uint32(b[12:])) * sector
	g := &grains{m: m, grain: grain, entries: 4096, directory: int64(le.Uint32(b[20:])) * sector}
	if need, have := divUp(m.size, g.entries*grain), int64(le.Uint32(b[24:])); need > have {
		return corrupt("a grain directory of %d entries for %d bytes", have, m.size)
	}
	m.mapping = g
	return g.placeDirectory(m.size)
}

// lookup implements mapping.
func (g *grains) lookup(w *walk, off int64) (span, error) {
	perTable := g.entries * g.grain
	index := off / perTable
	table, err := g.table(w, index)
	if err != nil {
		return span{}, fmt.Errorf("grain directory, entry %d: %w", index, err)
	}
	if table < sector { // 0: no table; 1: zeros
		s := span{Extent: to(off, roundUp(off+1, perTable))}
		if table == 1 {
			s.kind = zeroes
		}
		return s, nil
	}
	at := table + off%perTable/g.grain*4
	b, err := w.l2.bytes(at, 4)
	if err != nil {
		return span{}, err
	}
	s := span{Extent: to(off, roundUp(off+1, g.grain))}
	switch entry := int64(binary.LittleEndian.Uint32(b)); {
	case entry == 0:
	case entry == 1 && g.flags&vmdkZeroGrains != 0:
		s.kind = zeroes
	case entry == 1:
		return span{}, corrupt("grain table entry at %d is 1: the header", at)
	case g.packing():
		s.kind, s.host = packed, entry*sector
	default:
		s.kind, s.host = plain, entry*sector+off%g.grain
	}
	return s, nil
}

// table is the place of a grain table, 0 when there is none, and 1 when it
// stands for zeros. Only a place outside of the file shows that an entry is
// damaged: then the redundant directory has the table.
func (g *grains) table(w *walk, index int64) (int64, error) {
	b, err := w.l1.bytes(g.directory+index*4, 4)
	if err != nil {
		return 0, err
	}
	entry := int64(binary.LittleEndian.Uint32(b))
	if entry == 1 && g.flags&vmdkZeroGrains != 0 {
		return 1, nil
	}
	if entry != 1 && entry*sector < g.m.fileSize {
		return entry * sector, nil
	}
	if g.redundant != 0 {
		if b, err = w.l1.bytes(g.redundant+index*4, 4); err != nil {
			return 0, err
		}
		if other := int64(binary.LittleEndian.Uint32(b)); other > 1 && other*sector < g.m.fileSize {
			return other * sector, nil
		}
	}
	return 0, corrupt("a grain table at sector %d of a file of %d bytes", entry, g.m.fileSize)
}

func (g *grains) unpack(p []byte, s span) error {
	in := s.Off % g.grain
	return g.packed.read(p, packedKey{host: s.host, at: s.Off - in}, in)
}

// decompress reads a compressed grain: u64 sector of the disk, u32 length, then
// a zlib stream; without markers in the file, the stream alone. Only the last
// grain may be shorter than the others.
func (g *grains) decompress(u *unpacker, dst []byte, key packedKey) error {
	at, n := key.host, 2*g.grain
	if g.flags&vmdkMarkers != 0 {
		if at > g.m.fileSize-12 {
			return corrupt("a grain at %d lies past the end of the file at %d", at, g.m.fileSize)
		}
		if err := u.load(g.m.r, at, 12); err != nil {
			return err
		}
		lba, length := binary.LittleEndian.Uint64(u.in), binary.LittleEndian.Uint32(u.in[8:])
		if lba != uint64(key.at/sector) {
			return corrupt("the grain at %d says that it is for sector %d, not %d", at, lba, key.at/sector)
		}
		at += 12
		if n = int64(length); n == 0 || n > 2*g.grain+sector {
			return corrupt("a grain of %d compressed bytes at %d", n, at)
		}
		if n > g.m.fileSize-at {
			return corrupt("a grain at %d lies past the end of the file at %d", at, g.m.fileSize)
		}
	}
	if n = min(n, g.m.fileSize-at); n <= 0 {
		return corrupt("a grain at %d lies past the end of the file at %d", at, g.m.fileSize)
	}
	if err := u.load(g.m.r, at, n); err != nil {
		return err
	}
	got, err := u.unzlib(dst)
	if err == nil && int64(got) < min(g.grain, g.m.size-key.at) {
		err = fmt.Errorf("gives %d bytes only", got)
	}
	if err != nil {
		return corrupt("compressed data at %d (%v)", at, err)
	}
	clear(dst[got:])
	return nil
}
