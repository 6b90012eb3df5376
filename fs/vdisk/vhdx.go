package vdisk

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"strings"
	"unicode/utf16"

	"github.com/holdfast-backup/holdfast/store/extent"
)

const (
	kib = 1 << 10
	mib = 1 << 20
	tib = 1 << 40

	vhdxBlock   = 32 * mib
	vhdxMaxDisk = 64 * tib // MS-VHDX §2.6.2.2

	// The file, MS-VHDX §2.1: everything starts at a multiple of 1 MiB but the
	// headers and region tables in the first.
	vhdxHeader1  = 64 * kib
	vhdxHeader2  = 128 * kib
	vhdxRegions1 = 192 * kib
	vhdxRegions2 = 256 * kib
	vhdxLog      = 1 * mib // 1 MiB, all zero: nothing to replay
	vhdxMeta     = 2 * mib // 1 MiB
	vhdxBAT      = 3 * mib

	// States of a payload block, MS-VHDX §2.5.1.1.
	vhdxAbsent    = 0 // in the parent; without one, undefined
	vhdxUndefined = 1
	vhdxZero      = 2 // reads as zeros, not in the file
	vhdxUnmapped  = 3
	vhdxPresent   = 6
	vhdxPartial   = 7 // partly in the parent: see the sector bitmap
)

// Known regions and metadata items, MS-VHDX §2.2.3.2 and §2.6.2.
const (
	vhdxBATRegion      = "2DC27766-F623-4200-9D64-115E9BFD4A08"
	vhdxMetaRegion     = "8B7CA206-4790-4B9A-B8FE-575F050F886E"
	vhdxFileParameters = "CAA16737-FA36-4D43-B3B6-33F0AA44E76B"
	vhdxDiskSize       = "2FA54224-CD1B-4876-B211-5DBED83BF4B8"
	vhdxDiskID         = "BECA12AB-B2E6-4523-93EF-C309E000C746"
	vhdxLogicalSector  = "8141BF1D-A96F-4709-BA47-F233A8FAAB5F"
	vhdxPhysicalSector = "CDA348C7-445D-4471-9CC9-E9885251C556"
)

// VHDXLayout says what kind of VHDX to compute. The zero value is a dynamic one
// with blocks of 32 MiB and sectors of 512 bytes.
type VHDXLayout struct {
	Fixed  bool
	Sector int64 // logical, 512 or 4096 bytes; 0 means 512
	Block  int64 // a power of two from 1 MiB to 256 MiB; 0 means 32 MiB
}

// VHDX is VHDXAs with the zero layout.
func VHDX(src Source, id Identity) (File, error) { return VHDXAs(src, id, VHDXLayout{}) }

// VHDXAs computes a VHDX of src. Physical sectors have 4096 bytes.
//
// The disk in it is src padded with zeros to whole sectors. A disk of size 0 is
// ErrEmpty: QEMU refuses the VHDX of it. Above 64 TiB it is ErrTooLarge. The
// file is to be served read-only: a host that may write changes the header the
// moment it opens it.
//
// A dynamic one has the blocks with data and lists the disk once when it is
// made. A fixed one has all blocks in their order: its size depends on the
// disk's only, it does not ask which parts have data, and keeps nothing in
// memory.
func VHDXAs(src Source, id Identity, layout VHDXLayout) (File, error) {
	if layout.Sector == 0 {
		layout.Sector = sector
	}
	if layout.Block == 0 {
		layout.Block = vhdxBlock
	}
	if layout.Sector != 512 && layout.Sector != 4096 || layout.Block < mib || layout.Block > 256*mib || layout.Block&(layout.Block-1) != 0 {
		return nil, fmt.Errorf("vhdx: blocks of %d bytes in sectors of %d", layout.Block, layout.Sector)
	}
	disk := src.Size()
	if disk > vhdxMaxDisk {
		return nil, fmt.Errorf("vhdx: %d bytes, at most %d: %w", disk, int64(vhdxMaxDisk), ErrTooLarge)
	}
	if disk == 0 {
		return nil, fmt.Errorf("vhdx: %w", ErrEmpty)
	}
	disk = roundUp(disk, layout.Sector)
	blocks := divUp(disk, layout.Block)
	// One sector bitmap entry follows each ratio payload entries that are not
	// the last, MS-VHDX §2.5.
	ratio := (1 << 23) * layout.Sector / layout.Block
	entries := blocks + (blocks-1)/ratio
	batLen := roundUp(entries*8, mib)
	data := vhdxBAT + batLen

	table := vhdxRegionTable(batLen)
	metadata, items := vhdxMetadata(disk, layout, id)
	meta := []region{
		bytesRegion(0, vhdxFileIdentifier()),
		bytesRegion(vhdxHeader1, vhdxHeader(id, layout.name(), 1)),
		bytesRegion(vhdxHeader2, vhdxHeader(id, layout.name(), 2)),
		bytesRegion(vhdxRegions1, table),
		bytesRegion(vhdxRegions2, table),
		bytesRegion(vhdxMeta, metadata),
		bytesRegion(vhdxMeta+vhdxItems, items),
	}
	if layout.Fixed {
		place := func(b int64) uint64 { return uint64(data+b*layout.Block) | vhdxPresent }
		meta = append(meta, vhdxBATOf(entries, ratio, place))
		return &inPlace{src: src, meta: meta, data: data, size: data + blocks*layout.Block}, nil
	}
	used, err := allocatedBlocks(src, layout.Block)
	if err != nil {
		return nil, err
	}
	c := &computed{src: src, blocks: used, unit: layout.Block, data: data}
	c.meta = append(meta, vhdxBATOf(entries, ratio, func(b int64) uint64 {
		if !used.has(b) {
			return vhdxZero
		}
		return uint64(c.place(b)) | vhdxPresent
	}))
	return c.finish(), nil
}

// name tells layouts apart. It is part of ids: the one that VHDX has always made
// has none.
func (l VHDXLayout) name() string {
	if l == (VHDXLayout{Sector: sector, Block: vhdxBlock}) {
		return ""
	}
	return fmt.Sprintf(" fixed %t, sector %d, block %d", l.Fixed, l.Sector, l.Block)
}

// vhdxBATOf: an entry is the offset in the file, a multiple of 1 MiB, with the
// state in its low 3 bits (MS-VHDX §2.5.1). Sector bitmap entries stay 0.
func vhdxBATOf(entries, ratio int64, entry func(b int64) uint64) region {
	fill := func(p []byte, off int64) {
		table{width: 8}.fill(p, off, func(i int64) uint64 {
			if (i+1)%(ratio+1) == 0 {
				return 0
			}
			return entry(i - i/(ratio+1))
		})
	}
	return region{Extent: extent.Extent{Off: vhdxBAT, Len: entries * 8}, fill: fill}
}

// vhdxFileIdentifier, MS-VHDX §2.2.1: signature and creator in UTF-16LE.
func vhdxFileIdentifier() []byte {
	b := make([]byte, 8+512)
	copy(b, vhdxMagic)
	for i, u := range utf16.Encode([]rune("Holdfast")) {
		binary.LittleEndian.PutUint16(b[8+2*i:], u)
	}
	return b
}

// vhdxHeader, MS-VHDX §2.2.2:
//
//	+0  "head"            +16 FileWriteGuid   +64 u16 log version 0
//	+4  u32 CRC-32C       +32 DataWriteGuid   +66 u16 version 1
//	+8  u64 sequence      +48 LogGuid         +68 u32 log length, +72 u64 log offset
//
// The checksum covers all 4096 bytes with its own field zero. A LogGuid of
// zero says that there is nothing to replay. The layout of the file makes
// another FileWriteGuid, but the same disk.
func vhdxHeader(id Identity, layout string, sequence uint64) []byte {
	b := make([]byte, 4*kib)
	le := binary.LittleEndian
	copy(b, "head")
	le.PutUint64(b[8:], sequence)
	fileWrite, dataWrite := id.derive("vhdx file write"+layout), id.derive("vhdx data write")
	copy(b[16:], fileWrite[:])
	copy(b[32:], dataWrite[:])
	le.PutUint16(b[66:], 1)
	le.PutUint32(b[68:], mib)
	le.PutUint64(b[72:], vhdxLog)
	le.PutUint32(b[4:], castagnoli(b))
	return b
}

// vhdxRegionTable, MS-VHDX §2.2.3: "regi", u32 CRC-32C over all 64 KiB, u32
// count; then per region GUID, u64 offset, u32 length, u32 required. Only the
// bytes before the zeros at its end are returned.
func vhdxRegionTable(batLen int64) []byte {
	b := make([]byte, 64*kib)
	le := binary.LittleEndian
	copy(b, "regi")
	le.PutUint32(b[8:], 2)
	entry := func(b []byte, id string, off, length int64) {
		g := guid(id)
		copy(b, g[:])
		le.PutUint64(b[16:], uint64(off))
		le.PutUint32(b[24:], uint32(length))
		le.PutUint32(b[28:], 1)
	}
	entry(b[16:], vhdxBATRegion, vhdxBAT, batLen)
	entry(b[48:], vhdxMetaRegion, vhdxMeta, mib)
	le.PutUint32(b[4:], castagnoli(b))
	return b[:16+2*32]
}

const vhdxMagic = "vhdxfile"

const vhdxItems = 64 * kib // where items begin in the metadata region, MS-VHDX §2.6.1.2

// vhdxMetadata makes the metadata table (MS-VHDX §2.6.1) and the items it
// points to (§2.6.2). Table: "metadata", +10 u16 count; entries from +32: GUID,
// u32 offset in the region, u32 length, u32 flags.
func vhdxMetadata(disk int64, layout VHDXLayout, id Identity) (table, items []byte) {
	const virtualDisk, required = 2, 4
	le := binary.LittleEndian
	diskID := id.derive("vhdx disk")
	params := uint64(layout.Block)
	if layout.Fixed {
		params |= 1 << 32 // leave blocks allocated; bit 33 would be "has a parent"
	}
	list := []struct {
		id    string
		flags uint32
		value []byte
	}{
		{vhdxFileParameters, required, le.AppendUint64(nil, params)}, // u32 block size, u32 flags
		{vhdxDiskSize, required | virtualDisk, le.AppendUint64(nil, uint64(disk))},
		{vhdxDiskID, required | virtualDisk, diskID[:]},
		{vhdxLogicalSector, required | virtualDisk, le.AppendUint32(nil, uint32(layout.Sector))},
		{vhdxPhysicalSector, required | virtualDisk, le.AppendUint32(nil, 4*kib)},
	}
	table = make([]byte, 32+32*len(list))
	copy(table, "metadata")
	le.PutUint16(table[10:], uint16(len(list)))
	for i, item := range list {
		e := table[32+32*i:]
		g := guid(item.id)
		copy(e, g[:])
		le.PutUint32(e[16:], uint32(vhdxItems+len(items)))
		le.PutUint32(e[20:], uint32(len(item.value)))
		le.PutUint32(e[24:], item.flags)
		items = append(items, item.value...)
	}
	return table, items
}

var castagnoliTable = crc32.MakeTable(crc32.Castagnoli)

func castagnoli(b []byte) uint32 { return crc32.Checksum(b, castagnoliTable) }

// guid is the binary form of a constant: the first three fields are
// little-endian (MS-DTYP §2.3.4.2).
func guid(s string) [16]byte {
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil {
		panic(err)
	}
	return [16]byte{b[3], b[2], b[1], b[0], b[5], b[4], b[7], b[6],
		b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]}
}
