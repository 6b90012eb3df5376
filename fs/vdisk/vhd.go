package vdisk

import (
	"encoding/binary"
	"fmt"
	"iter"

	"github.com/holdfast-backup/holdfast/store/extent"
)

const (
	vhdBlock   = 2 * mib
	vhdBitmap  = vhdBlock / sector / 8 // bytes before each block: exactly a sector
	vhdMaxDisk = 2040 << 30            // VHD specification 1.0, "Dynamic Hard Disk Image"
	vhdTable   = 512 + 1024            // place of the block allocation table
)

// VHD computes a dynamic VHD of src, with blocks of 2 MiB:
//
//	0     copy of the footer
//	512   header
//	1536  block allocation table, u32 sector of each block, padded with FF
//	…     blocks: a sector of bitmap, all ones, and 2 MiB of the disk
//	end   footer
//
// The disk in it is src padded with zeros to whole sectors. More than 2040 GiB
// is ErrTooLarge, and nothing is ErrEmpty.
func VHD(src Source, id Identity) (File, error) {
	disk, err := checkVHDSize(src)
	if err != nil {
		return nil, err
	}
	blocks, err := allocatedBlocks(src, vhdBlock)
	if err != nil {
		return nil, err
	}
	foot := vhdFooterBytes(disk, vhdDynamic, id)
	tableLen := roundUp(blocks.n*4, sector)
	r := &recorded{src: src, blocks: blocks, stride: vhdBitmap + vhdBlock, data: vhdTable + tableLen}
	r.read = r.readVHDBlock
	entry := func(i int64) uint64 {
		if !blocks.has(i) { // also past the last block
			return vhdUnused
		}
		return uint64(r.place(i)) / sector
	}
	r.finish([]region{
		bytesRegion(0, foot),
		bytesRegion(sector, vhdHeaderBytes(blocks.n)),
		{
			Extent: extent.Extent{Off: vhdTable, Len: tableLen},
			fill:   func(p []byte, off int64) { table{width: 4, big: true}.fill(p, off, entry) },
		},
	}, []region{bytesRegion(0, foot)})
	return r, nil
}

func checkVHDSize(src Source) (int64, error) {
	disk := src.Size()
	if disk > vhdMaxDisk {
		return 0, fmt.Errorf("vhd: %d bytes, at most %d: %w", disk, int64(vhdMaxDisk), ErrTooLarge)
	}
	if disk == 0 {
		return 0, fmt.Errorf("vhd: %w", ErrEmpty)
	}
	return roundUp(disk, sector), nil
}

func (r *recorded) readVHDBlock(p []byte, b, in int64) (int, error) {
	done := 0
	if in < vhdBitmap {
		done = int(min(int64(len(p)), vhdBitmap-in))
		for i := range p[:done] {
			p[i] = 0xff
		}
	}
	if done == len(p) {
		return done, nil
	}
	n, err := readPadded(r.src, p[done:], b*vhdBlock+in+int64(done)-vhdBitmap)
	return done + n, err
}

// vhdFooterBytes makes a footer; its fields are at vhdFooter. The creator is
// that of Windows, since QEMU and others take the geometry for the size when
// they do not know it.
func vhdFooterBytes(disk int64, kind uint32, id Identity) []byte {
	b := make([]byte, sector)
	be := binary.BigEndian
	copy(b, vhdMagic)
	be.PutUint32(b[8:], 2) // reserved, always set
	be.PutUint32(b[12:], 0x00010000)
	be.PutUint64(b[16:], sector)
	if kind == vhdFixed {
		be.PutUint64(b[16:], 1<<64-1)
	}
	copy(b[28:], "win ")
	be.PutUint32(b[32:], 0x000A0000)
	copy(b[36:], "Wi2k")
	be.PutUint64(b[40:], uint64(disk))
	be.PutUint64(b[48:], uint64(disk))
	cylinders, heads, sectors := vhdGeometry(disk / sector)
	be.PutUint16(b[56:], uint16(cylinders))
	b[58], b[59] = byte(heads), byte(sectors)
	be.PutUint32(b[60:], kind)
	unique := id.derive("vhd id")
	copy(b[68:], unique[:])
	be.PutUint32(b[64:], vhdSum(b, 64))
	return b
}

// vhdGeometry is the algorithm of the specification, "Appendix: CHS Calculation".
func vhdGeometry(total int64) (cylinders, heads, sectors int64) {
	total = min(total, 65535*16*255)
	if total >= 65535*16*63 {
		return total / 255 / 16, 16, 255
	}
	sectors = 17
	tracks := total / sectors
	heads = max(4, (tracks+1023)/1024)
	if tracks >= heads*1024 || heads > 16 {
		sectors, heads = 31, 16
		tracks = total / sectors
	}
	if tracks >= heads*1024 {
		sectors, heads = 63, 16
		tracks = total / sectors
	}
	return tracks / heads, heads, sectors
}

// vhdHeaderBytes makes the header of a dynamic disk; its fields are at vhdHeader.
func vhdHeaderBytes(blocks int64) []byte {
	b := make([]byte, 1024)
	be := binary.BigEndian
	copy(b, vhdHeaderMagic)
	be.PutUint64(b[8:], 1<<64-1)
	be.PutUint64(b[16:], vhdTable)
	be.PutUint32(b[24:], 0x00010000)
	be.PutUint32(b[28:], uint32(blocks))
	be.PutUint32(b[32:], vhdBlock)
	be.PutUint32(b[36:], vhdSum(b, 36))
	return b
}

// VHDFixed computes a fixed VHD of src: the disk, padded with zeros to whole
// sectors, and a footer. Its limits are those of VHD.
func VHDFixed(src Source, id Identity) (File, error) {
	disk, err := checkVHDSize(src)
	if err != nil {
		return nil, err
	}
	return vhdFlat{flat{src, disk}, bytesRegion(disk, vhdFooterBytes(disk, vhdFixed, id))}, nil
}

type vhdFlat struct {
	flat
	foot region
}

func (v vhdFlat) Size() int64           { return v.foot.End() }
func (v vhdFlat) AllocatedBytes() int64 { return v.foot.End() }

func (v vhdFlat) ReadAt(p []byte, off int64) (int, error) {
	p, end := clip(p, off, v.Size())
	head := p[:max(0, min(int64(len(p)), v.foot.Off-off))]
	if len(head) > 0 {
		if n, err := readFull(v.flat, head, off); err != nil {
			return n, err
		}
	}
	if rest := p[len(head):]; len(rest) > 0 {
		v.foot.fill(rest, off+int64(len(head))-v.foot.Off)
	}
	return len(p), end
}

func (v vhdFlat) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	return extent.Coarsen(func(yield func(extent.Extent, error) bool) {
		for e, err := range v.flat.Allocated(granularity) {
			if !yield(e, err) || err != nil {
				return
			}
		}
		yield(v.foot.Extent, nil)
	}, granularity, v.Size())
}
