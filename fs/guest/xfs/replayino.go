package xfs

import (
	"slices"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// What an inode's item has (XFSDS, Inode Updates: ilf_fields).
const (
	inoDataLocal = 1 << 1
	inoDataExt   = 1 << 2
	inoDataRoot  = 1 << 3
	inoDevice    = 1 << 4
	inoAttrLocal = 1 << 6
	inoAttrExt   = 1 << 7
	inoAttrRoot  = 1 << 8
	inoOwners    = 1<<9 | 1<<10

	inoData = inoDataLocal | inoDataExt | inoDataRoot
	inoAttr = inoAttrLocal | inoAttrExt | inoAttrRoot
)

// An inodeItem says what of which inode follows as regions: its core, its data fork, its attribute fork.
type inodeItem struct {
	place  // of the inodes' buffer
	fields uint32
	ino    uint64
	dev    uint32
	offset uint32 // in the buffer, bytes
}

func parseInodeItem(b []byte) (i inodeItem, err error) {
	if len(b) < 52 {
		return i, guest.Damaged("an inode's item of %d bytes", len(b))
	}
	i.fields = le.Uint32(b[4:])
	if len(b) < 56 {
		b = b[8:] // without padding before the number of the inode
	} else {
		b = b[12:]
	}
	i.ino, i.dev = le.Uint64(b[4:]), le.Uint32(b[12:])
	i.place = place{le.Uint64(b[28:]), uint64(le.Uint32(b[36:]))}
	i.offset = le.Uint32(b[40:])
	return i, nil
}

// inode replays an inode, unless its buffer is cancelled later, or what the disk has is newer.
func (r *replayer) inode(it *item) error {
	i, err := parseInodeItem(it.regions[0])
	if err != nil {
		return err
	}
	if r.cancelled[i.place] > 0 {
		return nil
	}
	size := r.fs.sb.inodeSize
	if i.at > uint64(r.over.Size())/sector || int64(i.offset)+size > maxBuffer || len(it.regions) < 2 {
		return guest.Damaged("an item of inode %d", i.ino)
	}
	off := int64(i.at)*sector + int64(i.offset)
	b, err := r.read(off, size)
	if err != nil {
		return err
	}
	core := it.regions[1]
	if be.Uint16(b) != 0x494e || len(core) < coreV2 || le.Uint16(core) != 0x494e {
		return guest.Damaged("inode %d: its item, or its place on the disk", i.ino)
	}
	if i.fields&inoOwners != 0 {
		r.moved[i.ino] = true
	}
	if r.newer(b, core) {
		return nil
	}
	if err := r.core(b, core); err != nil {
		return guest.Damaged("inode %d: its core in the log", i.ino)
	}
	if err := r.forks(b, &i, it.regions[2:]); err != nil {
		return err
	}
	if r.fs.sb.v5 {
		le.PutUint32(b[inodeCRC:], checksum(b, inodeCRC))
	}
	return r.write(off, b)
}

// newer reports whether the disk's inode is newer than the item: by its sequence number, or by the number of
// times that it was written, which starts again after its largest value (XFSDS, On-disk Inode: di_flushiter).
func (r *replayer) newer(disk, core []byte) bool {
	if r.fs.sb.v5 {
		lsn := be.Uint64(disk[inodeLSN:])
		return lsn != 0 && lsn != nullIno && lsn > r.lsn
	}
	was, is := be.Uint16(disk[30:]), le.Uint16(core[30:])
	return is < was && !(was == 0xffff && is < 0x7fff)
}

// core brings an inode's core into the order of bytes that the disk has.
func (r *replayer) core(dst, src []byte) error {
	n := coreV2
	if r.fs.sb.v5 {
		n = coreV3
	}
	if len(src) < n || (src[4] == 3) != r.fs.sb.v5 {
		return guest.ErrDamaged
	}
	at := 0
	swap := func(widths ...int) {
		for _, w := range widths {
			copy(dst[at:], src[at:at+w])
			slices.Reverse(dst[at : at+w])
			at += w
		}
	}
	raw := func(n int) { at += copy(dst[at:], src[at:at+n]) }
	var flags2 uint64
	if r.fs.sb.v5 {
		flags2 = le.Uint64(src[inodeFlags2:])
	}
	stamp := func() {
		if flags2&flag2Bigtime != 0 {
			swap(8)
		} else {
			swap(4, 4)
		}
	}
	swap(2, 2, 1, 1, 2, 4, 4, 4, 2, 2) // magic, mode, version, format, old links, owners, links, projects
	if flags2&flag2Nrext64 != 0 {
		swap(8) // extents
	} else {
		raw(6)
		swap(2) // flushes
	}
	stamp()
	stamp()
	stamp()
	swap(8, 8, 4, 4, 2, 1, 1, 4, 2, 2, 4) // size, blocks, hint, extents, of attributes, fork, form, events, state, flags, generation
	if !r.fs.sb.v5 {
		be.PutUint16(dst[30:], 0) // flushes begin anew
		return nil
	}
	at = 104
	swap(8) // changes
	be.PutUint64(dst[at:], r.lsn)
	at += 8
	swap(8, 4) // flags, hint
	raw(12)
	stamp()
	swap(8) // number
	raw(16)
	return nil
}

// forks takes over what an item has of the two forks.
func (r *replayer) forks(b []byte, i *inodeItem, parts [][]byte) error {
	literal := r.fs.sb.pick(literalV2, coreV3)
	split := len(b)
	if b[82] != 0 {
		split = literal + int(b[82])*8
	}
	if split > len(b) {
		return guest.Damaged("inode %d: sizes", i.ino)
	}
	if i.fields&inoDevice != 0 {
		be.PutUint32(b[literal:], i.dev)
	}
	if i.fields&inoData != 0 {
		if len(parts) == 0 {
			return guest.Damaged("inode %d: its item lacks the data", i.ino)
		}
		if err := r.fork(b[literal:split], parts[0], i.fields&inoDataRoot != 0); err != nil {
			return err
		}
		parts = parts[1:]
	}
	if i.fields&inoAttr != 0 {
		if len(parts) == 0 {
			return guest.Damaged("inode %d: its item lacks the attributes", i.ino)
		}
		return r.fork(b[split:], parts[0], i.fields&inoAttrRoot != 0)
	}
	return nil
}

// fork takes over a fork. The root of a tree is logged as memory has it: like a block of the tree, with the pointers behind as
// many keys as there was room for in it; the inode has another header and other room.
func (r *replayer) fork(area, part []byte, root bool) error {
	if !root {
		copy(area, part)
		return nil
	}
	head := r.fs.sb.pick(24, 72)
	if len(part) < head || len(area) < 4 {
		return guest.Damaged("the root of an extent tree in the log")
	}
	n, from, to := int(be.Uint16(part[6:])), (len(part)-head)/16, (len(area)-4)/16
	if n > from || n > to {
		return guest.Damaged("a root of an extent tree in the log with %d keys", n)
	}
	copy(area[:4], part[4:8]) // level, number
	copy(area[4:], part[head:head+n*8])
	copy(area[4+to*8:], part[head+from*8:head+from*8+n*8])
	return nil
}

// create makes the inodes of a new chunk: free ones (XFSDS, Inode Creation Log Item).
func (r *replayer) create(b []byte) error {
	if len(b) < 28 {
		return guest.Damaged("an item of new inodes with %d bytes", len(b))
	}
	sb := r.fs.sb
	ag, block, count := uint64(be.Uint32(b[4:])), uint64(be.Uint32(b[8:])), int64(be.Uint32(b[12:]))
	size, blocks := int64(be.Uint32(b[16:])), int64(be.Uint32(b[20:]))
	if size != sb.inodeSize || count > 1<<12 || count*size != blocks<<sb.blockLog ||
		ag*sb.agBlocks+block > uint64(r.over.Size()-count*size)>>sb.blockLog {
		return guest.Damaged("an item of new inodes")
	}
	off := int64(ag*sb.agBlocks+block) << sb.blockLog
	for at := range blocks {
		if r.cancelledAt[uint64(off+at<<sb.blockLog)/sector] > 0 {
			return nil
		}
	}
	chunk := make([]byte, count*size)
	first := (ag<<sb.agLog | block) << sb.inopbLog
	for i := range count {
		c := chunk[i*size : (i+1)*size]
		be.PutUint16(c, 0x494e)
		c[4] = byte(sb.pick(2, 3))
		copy(c[92:96], b[24:28])
		be.PutUint32(c[96:], 1<<32-1) // in no list of unlinked ones
		if sb.v5 {
			be.PutUint64(c[152:], first+uint64(i))
			copy(c[160:], sb.meta[:])
			le.PutUint32(c[inodeCRC:], checksum(c, inodeCRC))
		}
	}
	return r.write(off, chunk)
}
