package xfs

import (
	"fmt"
	"iter"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// Free implements guest.Freer. It yields what the trees of free space say; the blocks that a group keeps for its own
// trees are not among them.
func (fs *FS) Free() iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) {
		if fs.doubt != nil {
			yield(extent.Extent{}, fs.doubt)
			return
		}
		for ag := range fs.sb.agCount {
			more, err := fs.freeIn(ag, yield)
			if err != nil {
				yield(extent.Extent{}, fmt.Errorf("xfs: the free space of group %d: %w", ag, err))
				return
			}
			if !more {
				return
			}
		}
	}
}

var (
	agfStamp   = stamp{crc: 216, lsn: 208, uuid: 64}
	shortStamp = stamp{crc: 52, block: 16, lsn: 24, uuid: 32}
)

// A freeTree is what a walk through a group's tree of free space remembers.
type freeTree struct {
	fs    *FS
	ag    uint64
	next  uint64 // what is yielded next begins here or behind it, blocks
	total uint64 // blocks yielded
	root  int    // level of the root
	stop  bool
	yield func(extent.Extent, error) bool
}

// freeIn yields the free space of a group, whose header says how much there must be (XFSDS, AG Free Space Block).
func (fs *FS) freeIn(ag uint64, yield func(extent.Extent, error) bool) (more bool, err error) {
	start := int64(ag*fs.sb.agBlocks) << fs.sb.blockLog
	b := make([]byte, fs.sb.sectSize)
	if err := guest.ReadFull(fs.dev, b, start+fs.sb.sectSize); err != nil {
		return false, err
	}
	if string(b[:4]) != "XAGF" || uint64(be.Uint32(b[8:])) != ag || uint64(be.Uint32(b[12:])) != fs.sb.agLen(ag) {
		return false, guest.Damaged("the group's header")
	}
	if fs.sb.v5 {
		if err := fs.verify("a group's header", b, agfStamp, start+fs.sb.sectSize, 0, true); err != nil {
			return false, err
		}
	}
	level := int(be.Uint32(b[28:]))
	if level < 1 || level > maxLevels {
		return false, guest.Damaged("a tree of %d levels", level)
	}
	t := freeTree{fs: fs, ag: ag, root: level - 1, yield: yield}
	if err := t.walk(uint64(be.Uint32(b[16:])), t.root); err != nil || t.stop {
		return false, err
	}
	if t.total != uint64(be.Uint32(b[52:])) {
		return false, guest.Damaged("%d blocks in the tree, %d in the header", t.total, be.Uint32(b[52:]))
	}
	return true, nil
}

// walk goes through a block of the tree. Extents must be in order, so that a tree that leads to itself ends.
func (t *freeTree) walk(block uint64, level int) error {
	b, err := t.block(block)
	if err != nil {
		return err
	}
	body, n := b[t.fs.sb.pick(16, 56):], int(be.Uint16(b[6:]))
	if int(be.Uint16(b[4:])) != level {
		return guest.Damaged("a block of level %d at level %d", be.Uint16(b[4:]), level)
	}
	if level > 0 {
		// Keys of 8 bytes, and pointers of 4 behind as many keys as there is room for.
		room := len(body) / 12
		if n == 0 || n > room {
			return guest.Damaged("%d keys in a node", n)
		}
		for i := range n {
			if err := t.walk(uint64(be.Uint32(body[room*8+i*4:])), level-1); err != nil || t.stop {
				return err
			}
		}
		return nil
	}
	if n > len(body)/8 || n == 0 && t.root > 0 {
		return guest.Damaged("%d extents in a leaf", n)
	}
	for i := range n {
		from, count := uint64(be.Uint32(body[i*8:])), uint64(be.Uint32(body[i*8+4:]))
		if count == 0 || from < t.next || from+count > t.fs.sb.agLen(t.ag) {
			return guest.Damaged("free extents out of order")
		}
		t.next, t.total = from+count, t.total+count
		log := t.fs.sb.blockLog
		e := extent.Extent{Off: int64(t.ag*t.fs.sb.agBlocks+from) << log, Len: int64(count) << log}
		if !t.yield(e, nil) {
			t.stop = true
			return nil
		}
	}
	return nil
}

func (t *freeTree) block(block uint64) ([]byte, error) {
	fsb := t.ag<<t.fs.sb.agLog | block
	if block >= t.fs.sb.agBlocks {
		return nil, guest.Damaged("block %d of a group", block)
	}
	return t.fs.block(bufKey{kindLeaf, fsb, 0}, func(b []byte, off int64) error {
		switch m := string(b[:4]); {
		case m == "AB3B" && t.fs.sb.v5:
			if uint64(be.Uint32(b[48:])) != t.ag {
				return guest.Damaged("a block of another group's tree at %d", off)
			}
			return t.fs.verify("a tree of free space", b, shortStamp, off, 0, true)
		case m == "ABTB" && !t.fs.sb.v5:
			return nil
		}
		return guest.Damaged("no tree of free space at %d", off)
	})
}

// Locate implements guest.Locator. What is allocated and unwritten, or behind the end of the file, is in it.
func (fs *FS) Locate(ino guest.Ino) iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) {
		n, err := fs.regular(ino)
		if err == nil && fs.doubt != nil {
			err = fs.doubt
		}
		if err == nil && n.flags2&flag2Reflink != 0 {
			err = guest.Unsupported("inode %d: a file that may share its blocks", n.num)
		}
		if err != nil {
			yield(extent.Extent{}, err)
			return
		}
		for s, err := range fs.spans(&n.data) {
			var off int64
			if err == nil {
				off, err = fs.sb.offset(s.block, s.n)
			}
			if !yield(extent.Extent{Off: off, Len: int64(s.n) << fs.sb.blockLog}, err) || err != nil {
				return
			}
		}
	}
}
