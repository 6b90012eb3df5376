package ext

import "github.com/holdfast-backup/holdfast/fs/guest"

// desc is what is used of a group's descriptor (ext4 doc, Block Group Descriptors).
type desc struct {
	blockBitmap, inodeBitmap, inodeTable int64 // blocks
	free                                 int64 // clusters
	bitmapSum                            uint32
	flags                                uint16
}

// Bits of desc.flags.
const blockUninit = 2

// desc gives the descriptor of a group: the first of its copies that matches its checksum. Where its things are never changes while a
// file system is in use, so that an old copy tells it as well; what changes is asked of the first copy alone, by primary.
func (f *FS) desc(group int64) (desc, error) {
	d, err := f.primary(group)
	if err == nil || f.incompat&incompatMetaBG != 0 {
		return d, err
	}
	for _, g := range []int64{int64(f.backupGroup), 1, int64(f.backups[0]), 3, 5, 7, 9} {
		if g == 0 || g >= f.groups || !f.hasSuper(g) {
			continue
		}
		if d, err := f.descAt(group, f.firstBlock(g)+1); err == nil {
			return d, nil
		}
	}
	return d, err
}

// primary gives the descriptor that a running system writes.
func (f *FS) primary(group int64) (desc, error) {
	if group < 0 || group >= f.groups {
		return desc{}, guest.Damaged("group %d", group)
	}
	perBlock := f.blockSize / f.descSize
	block := group / perBlock
	if f.incompat&incompatMetaBG == 0 || block < f.firstMetaBG {
		return f.descAt(group, superOffset/f.blockSize+1)
	}
	// Each meta group has its descriptors in its own first group (ext4 doc, Meta Block Groups).
	first := block * perBlock
	at := f.firstBlock(first)
	if f.hasSuper(first) {
		at++
	}
	if first == 0 && f.blockSize == superOffset && f.firstData == 0 {
		at++ // block 0 is before the superblock's
	}
	return f.descAt(group, at-block)
}

// descAt reads a group's descriptor from a table that starts at block table.
func (f *FS) descAt(group, table int64) (desc, error) {
	perBlock := f.blockSize / f.descSize
	b, err := f.meta.Block(table+group/perBlock, nil)
	if err != nil {
		return desc{}, err
	}
	b = b[group%perBlock*f.descSize:][:f.descSize]
	if f.descSum(group, b) != le.Uint16(b[0x1e:]) {
		return desc{}, guest.Damaged("group %d: checksum", group)
	}
	d := desc{
		blockBitmap: int64(le.Uint32(b)), inodeBitmap: int64(le.Uint32(b[4:])), inodeTable: int64(le.Uint32(b[8:])),
		free: int64(le.Uint16(b[12:])), flags: le.Uint16(b[0x12:]), bitmapSum: uint32(le.Uint16(b[0x18:])),
	}
	if f.descSize >= 64 {
		d.blockBitmap |= int64(le.Uint32(b[0x20:])) << 32
		d.inodeBitmap |= int64(le.Uint32(b[0x24:])) << 32
		d.inodeTable |= int64(le.Uint32(b[0x28:])) << 32
		d.free |= int64(le.Uint16(b[0x2c:])) << 16
		d.bitmapSum |= uint32(le.Uint16(b[0x38:])) << 16
	}
	for _, n := range []int64{d.blockBitmap, d.inodeBitmap, d.inodeTable} {
		if n <= f.firstData || n >= f.blocks {
			return desc{}, guest.Damaged("group %d: descriptor", group)
		}
	}
	return d, nil
}

// descSum is the checksum of a descriptor; where there is none, it is what stands there.
func (f *FS) descSum(group int64, b []byte) uint16 {
	var n [4]byte
	le.PutUint32(n[:], uint32(group))
	switch {
	case f.ro&roMetadataCsum != 0:
		sum := crc32c(crc32c(f.seed, n[:]), b[:0x1e])
		return uint16(crc32c(crc32c(sum, zeros[:2]), b[0x20:]))
	case f.ro&roGDTCsum != 0:
		sum := crc16(crc16(crc16(^uint16(0), f.uuid[:]), n[:]), b[:0x1e])
		return crc16(sum, b[0x20:])
	}
	return le.Uint16(b[0x1e:])
}
