package vdisk

import (
	"encoding/binary"
	"fmt"
	"math"
	"strings"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// VMDKKind is the createType of a descriptor with a flat extent.
type VMDKKind string

const (
	// MonolithicFlat is for workstation products and QEMU.
	MonolithicFlat VMDKKind = "monolithicFlat"
	// VMFS is for ESXi, also on an NFS datastore.
	VMFS VMDKKind = "vmfs"
)

// VMDKDescriptor is the small text file that makes a VMDK of a flat file beside
// it: Flat of the disk, under the name flatName. size is the disk's in bytes;
// the descriptor speaks of whole sectors, rounded up. Size 0 is ErrEmpty:
// qemu-img 7.2 aborts on an extent of no sectors.
//
// VMware Virtual Disk Format 5.0, "The Descriptor File".
func VMDKDescriptor(kind VMDKKind, size int64, flatName string, id Identity) ([]byte, error) {
	if err := checkVMDKName(flatName); err != nil {
		return nil, err
	}
	sectors := divUp(size, sector)
	if sectors == 0 {
		return nil, fmt.Errorf("vmdk: %w", ErrEmpty)
	}
	switch kind {
	case MonolithicFlat:
		return vmdkDescriptor(string(kind), sectors, fmt.Sprintf("RW %d FLAT %q 0", sectors, flatName), id), nil
	case VMFS:
		return vmdkDescriptor(string(kind), sectors, fmt.Sprintf("RW %d VMFS %q", sectors, flatName), id), nil
	}
	return nil, fmt.Errorf("vmdk: no descriptor for createType %q", string(kind))
}

// checkVMDKName refuses what could not be quoted, or would name a file elsewhere.
func checkVMDKName(name string) error {
	bad := func(r rune) bool { return r < ' ' || r == '"' || r == '/' || r == '\\' || r == 0x7f || r == '\uFFFD' }
	if name == "" || len(name) > 255 || strings.ContainsFunc(name, bad) {
		return fmt.Errorf("vmdk: file name %q cannot stand in a descriptor", name)
	}
	return nil
}

func vmdkDescriptor(createType string, sectors int64, extentLine string, id Identity) []byte {
	content, uuid := id.derive("vmdk content"), id.derive("vmdk uuid")
	// A CID of ffffffff means "no parent" and fffffffe "never written".
	if cid := binary.BigEndian.Uint32(content[12:]); cid >= math.MaxUint32-1 {
		content[12] = 0
	}
	// Geometry as for lsilogic, which is also what pvscsi disks say: 255 heads
	// of 63 sectors. 2^31 keeps what some readers take for an int.
	cylinders := min(sectors/(255*63), math.MaxInt32)

	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("# Disk DescriptorFile")
	line("version=1")
	line(`encoding="UTF-8"`)
	line("CID=%x", content[12:])
	line("parentCID=ffffffff")
	line("createType=%q", createType)
	line("")
	line("# Extent description")
	line("%s", extentLine)
	line("")
	line("# The Disk Data Base")
	line("#DDB")
	line("")
	line(`ddb.adapterType = "lsilogic"`)
	line(`ddb.geometry.cylinders = "%d"`, cylinders)
	line(`ddb.geometry.heads = "255"`)
	line(`ddb.geometry.sectors = "63"`)
	line(`ddb.longContentID = "%x"`, content) // ends in the CID
	line(`ddb.uuid = "60 00 C2 9%x % x-% x"`, uuid[3]&0x0f, uuid[4:8], uuid[8:16])
	line(`ddb.virtualHWVersion = "14"`)
	return []byte(b.String())
}

// The hosted sparse extent, VMware Virtual Disk Format 5.0. In sectors:
//
//	0        header
//	1..20    descriptor
//	21       redundant grain directory, its grain tables
//	…        grain directory, its grain tables
//	data     grains of 128 sectors, from a multiple of 128 on
//
// A grain directory has one u32 sector number per grain table; a grain table
// has 512 of them, one per grain, 0 for a grain of zeros.
const (
	vmdkGrain       = 64 * kib
	vmdkTableGrains = 512
	vmdkTable       = vmdkTableGrains * 4 // bytes
	vmdkDescSectors = 20
)

// SparseVMDK computes a monolithicSparse VMDK of src; ownName is the file name
// it will have, which its descriptor repeats.
//
// The disk in it is src padded with zeros to whole sectors. All sector numbers
// are 32 bits wide: a file of 2 TiB and more is ErrTooLarge, whatever the size
// of the disk. QEMU refuses a sparse VMDK of no sectors, so an empty disk is
// ErrEmpty.
func SparseVMDK(src Source, id Identity, ownName string) (File, error) {
	if err := checkVMDKName(ownName); err != nil {
		return nil, err
	}
	sectors := divUp(src.Size(), sector)
	if sectors == 0 {
		return nil, fmt.Errorf("vmdk: %w", ErrEmpty)
	}
	if sectors > math.MaxUint32*vmdkGrain/sector { // the tables alone pass the limit
		return nil, fmt.Errorf("vmdk: %d sectors: %w", sectors, ErrTooLarge)
	}
	tables := divUp(sectors, vmdkTableGrains*vmdkGrain/sector)
	dirLen := roundUp(tables*4, sector)
	redundant := int64(1+vmdkDescSectors) * sector
	primary := redundant + dirLen + tables*vmdkTable
	end := primary + dirLen + tables*vmdkTable
	data := roundUp(end, vmdkGrain)

	blocks, err := allocatedBlocks(src, vmdkGrain)
	if err != nil {
		return nil, err
	}
	if last := (data + (blocks.ones-1)*vmdkGrain) / sector; last > math.MaxUint32 {
		return nil, fmt.Errorf("vmdk: a grain at sector %d: %w", last, ErrTooLarge)
	}
	c := &computed{src: src, blocks: blocks, unit: vmdkGrain, data: data}

	desc := vmdkDescriptor("monolithicSparse", sectors, fmt.Sprintf("RW %d SPARSE %q", sectors, ownName), id)
	c.meta = []region{
		bytesRegion(0, vmdkHeader(sectors, redundant, primary, data)),
		bytesRegion(sector, desc),
		grainDirectory(redundant, dirLen, tables),
		c.grainTables(redundant+dirLen, tables),
		grainDirectory(primary, dirLen, tables),
		c.grainTables(primary+dirLen, tables),
	}
	return c.finish(), nil
}

func vmdkHeader(sectors, redundant, primary, data int64) []byte {
	const newlineTest, redundantTables = 1, 2
	b := make([]byte, sector)
	le := binary.LittleEndian
	copy(b, "KDMV")
	le.PutUint32(b[4:], 1)
	le.PutUint32(b[8:], newlineTest|redundantTables)
	le.PutUint64(b[12:], uint64(sectors))
	le.PutUint64(b[20:], vmdkGrain/sector)
	le.PutUint64(b[28:], 1) // descriptor, in sectors like all that follows
	le.PutUint64(b[36:], vmdkDescSectors)
	le.PutUint32(b[44:], vmdkTableGrains)
	le.PutUint64(b[48:], uint64(redundant/sector))
	le.PutUint64(b[56:], uint64(primary/sector))
	le.PutUint64(b[64:], uint64(data/sector))
	copy(b[73:], "\n \r\n") // shows a transfer that translated line ends
	return b
}

// grainDirectory is followed by its own tables.
func grainDirectory(off, length, tables int64) region {
	entry := func(i int64) uint64 {
		if i >= tables {
			return 0
		}
		return uint64(off+length+i*vmdkTable) / sector
	}
	return region{
		Extent: extent.Extent{Off: off, Len: length},
		fill:   func(p []byte, off int64) { table{width: 4}.fill(p, off, entry) },
	}
}

func (c *computed) grainTables(off, tables int64) region {
	entry := func(b int64) uint64 {
		if !c.blocks.has(b) {
			return 0
		}
		return uint64(c.place(b)) / sector
	}
	return region{
		Extent: extent.Extent{Off: off, Len: tables * vmdkTable},
		fill:   func(p []byte, off int64) { table{width: 4}.fill(p, off, entry) },
		piece:  vmdkTable,
		used: func(i int64) bool {
			return c.blocks.rank((i+1)*vmdkTableGrains) > c.blocks.rank(i*vmdkTableGrains)
		},
	}
}
