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
	vhdxMaxDisk = 64 * tib                       // MS-VHDX §2.6.2.2
	vhdxRatio   = (1 << 23) * sector / vhdxBlock // payload blocks per sector bitmap block, MS-VHDX §2.5

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

// VHDX computes a dynamic VHDX of src with blocks of 32 MiB and sectors of 512
// bytes (4096 physical).
//
// The disk in it is src padded with zeros to whole sectors. A disk of size 0 is
// ErrEmpty: QEMU refuses the VHDX of it. Above 64 TiB it is ErrTooLarge. The file is to be served read-only: a
// host that may write changes the header the moment it opens it.
func VHDX(src Source, id Identity) (File, error) {
	disk := src.Size()
	if disk > vhdxMaxDisk {
		return nil, fmt.Errorf("vhdx: %d bytes, at most %d: %w", disk, int64(vhdxMaxDisk), ErrTooLarge)
	}
	if disk == 0 {
		return nil, fmt.Errorf("vhdx: %w", ErrEmpty)
	}
	disk = roundUp(disk, sector)
	blocks, err := allocatedBlocks(src, vhdxBlock)
	if err != nil {
		return nil, err
	}
	// One sector bitmap entry follows each vhdxRatio payload entries that are
	// not the last, MS-VHDX §2.5.
	entries := blocks.n + (blocks.n-1)/vhdxRatio
	batLen := roundUp(entries*8, mib)
	c := &computed{src: src, blocks: blocks, unit: vhdxBlock, data: vhdxBAT + batLen}

	regions := vhdxRegionTable(batLen)
	table, items := vhdxMetadata(disk, id)
	c.meta = []region{
		bytesRegion(0, vhdxFileIdentifier()),
		bytesRegion(vhdxHeader1, vhdxHeader(id, 1)),
		bytesRegion(vhdxHeader2, vhdxHeader(id, 2)),
		bytesRegion(vhdxRegions1, regions),
		bytesRegion(vhdxRegions2, regions),
		bytesRegion(vhdxMeta, table),
		bytesRegion(vhdxMeta+vhdxItems, items),
		{Extent: extent.Extent{Off: vhdxBAT, Len: entries * 8}, fill: c.fillBAT},
	}
	return c.finish(), nil
}

// fillBAT: an entry is the offset in the file, a multiple of 1 MiB, with the
// state in its low 3 bits (MS-VHDX §2.5.1). Sector bitmap entries stay 0.
func (c *computed) fillBAT(p []byte, off int64) {
	table{width: 8}.fill(p, off, func(i int64) uint64 {
		if (i+1)%(vhdxRatio+1) == 0 {
			return 0
		}
		b := i - i/(vhdxRatio+1)
		if !c.blocks.has(b) {
			return vhdxZero
		}
		return uint64(c.place(b)) | vhdxPresent
	})
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
// zero says that there is nothing to replay.
func vhdxHeader(id Identity, sequence uint64) []byte {
	b := make([]byte, 4*kib)
	le := binary.LittleEndian
	copy(b, "head")
	le.PutUint64(b[8:], sequence)
	fileWrite, dataWrite := id.derive("vhdx file write"), id.derive("vhdx data write")
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
func vhdxMetadata(disk int64, id Identity) (table, items []byte) {
	const virtualDisk, required = 2, 4
	le := binary.LittleEndian
	diskID := id.derive("vhdx disk")
	list := []struct {
		id    string
		flags uint32
		value []byte
	}{
		{vhdxFileParameters, required, le.AppendUint64(nil, vhdxBlock)}, // u32 block size, u32 flags 0: dynamic, no parent
		{vhdxDiskSize, required | virtualDisk, le.AppendUint64(nil, uint64(disk))},
		{vhdxDiskID, required | virtualDisk, diskID[:]},
		{vhdxLogicalSector, required | virtualDisk, le.AppendUint32(nil, sector)},
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
