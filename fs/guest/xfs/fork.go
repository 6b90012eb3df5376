package xfs

import (
	"sort"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// A fork is one of an inode's two: its data, or its attributes.
type fork struct {
	ino   uint64
	form  uint8
	area  []byte // its part of the inode
	count uint64 // extents in it
	list  []span // when the form is formList
}

// A span is an extent: n blocks of a fork from off on lie from block on.
type span struct {
	off, block, n uint64
	unwritten     bool
}

func (s span) end() uint64 { return s.off + s.n }

// parseSpan unpacks an extent: 1 bit for unwritten, 54 of offset, 52 of block, 21 of length (XFSDS, Data Extents).
func parseSpan(b []byte) span {
	hi, lo := be.Uint64(b), be.Uint64(b[8:])
	return span{off: hi << 1 >> 10, block: (hi<<43 | lo>>21) & (1<<52 - 1), n: lo & (1<<21 - 1), unwritten: hi>>63 == 1}
}

func (s span) valid(sb *super) error {
	if s.n == 0 {
		return guest.Damaged("an empty extent")
	}
	_, err := sb.offset(s.block, s.n)
	return err
}

// find gives the first extent that ends behind block off. The extent's end is 0 when there is none.
func (fs *FS) find(f *fork, off uint64) (span, error) {
	switch f.form {
	case formList:
		i := sort.Search(len(f.list), func(i int) bool { return f.list[i].end() > off })
		if i == len(f.list) {
			return span{}, nil
		}
		return f.list[i], nil
	case formExtents:
		if f.count > uint64(len(f.area)/16) {
			return span{}, guest.Damaged("inode %d: %d extents in %d bytes", f.ino, f.count, len(f.area))
		}
		return fs.search(f.area[:f.count*16], off)
	case formTree:
		// A second descent when what is looked for lies behind the end of the leaf.
		s, next, err := fs.descend(f, off)
		if err == nil && s.n == 0 && next > off {
			if s, _, err = fs.descend(f, next); err == nil && s.n == 0 {
				err = guest.Damaged("inode %d: a gap in the tree of its extents", f.ino)
			}
		}
		return s, err
	}
	return span{}, guest.Damaged("inode %d: a fork of form %d", f.ino, f.form)
}

// search looks through extents in order.
func (fs *FS) search(recs []byte, off uint64) (span, error) {
	lo, hi := 0, len(recs)/16
	for lo < hi {
		mid := (lo + hi) / 2
		if s := parseSpan(recs[mid*16:]); s.end() > off {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	if lo == len(recs)/16 {
		return span{}, nil
	}
	s := parseSpan(recs[lo*16:])
	return s, s.valid(fs.sb)
}

const maxLevels = 12 // of any tree; a full disk needs fewer

// descend goes down the tree of extents to the leaf for block off. next is where the leaf behind it begins, or 0.
func (fs *FS) descend(f *fork, off uint64) (s span, next uint64, err error) {
	if len(f.area) < 4 {
		return span{}, 0, guest.Damaged("inode %d: no tree of extents", f.ino)
	}
	level, n := int(be.Uint16(f.area)), int(be.Uint16(f.area[2:]))
	body := f.area[4:]
	if level == 0 || level > maxLevels {
		return span{}, 0, guest.Damaged("inode %d: a tree of %d levels", f.ino, level)
	}
	for ; level > 0; level-- {
		// Keys, and pointers behind as many keys as there is room for (XFSDS, B+tree Extent List).
		room := len(body) / 16
		if n == 0 || n > room {
			return span{}, 0, guest.Damaged("inode %d: %d keys in a node for %d", f.ino, n, room)
		}
		i := lastKey(body[:n*8], off)
		if i+1 < n {
			next = be.Uint64(body[(i+1)*8:])
		}
		ptr := be.Uint64(body[(room+i)*8:])
		if n, body, err = fs.mapBlock(f, ptr, level-1); err != nil {
			return span{}, 0, err
		}
	}
	if n > len(body)/16 {
		return span{}, 0, guest.Damaged("inode %d: %d extents in a leaf", f.ino, n)
	}
	s, err = fs.search(body[:n*16], off)
	return s, next, err
}

// lastKey is the index of the last key that is not above off, or 0.
func lastKey(keys []byte, off uint64) int {
	lo, hi := 0, len(keys)/8
	for lo < hi {
		mid := (lo + hi) / 2
		if be.Uint64(keys[mid*8:]) <= off {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return max(lo-1, 0)
}

var mapStamp = stamp{crc: 64, block: 24, lsn: 32, uuid: 40, owner: 56}

// mapBlock reads a block of a tree of extents.
func (fs *FS) mapBlock(f *fork, ptr uint64, level int) (n int, body []byte, err error) {
	b, err := fs.block(bufKey{kindMap, ptr, f.ino}, func(b []byte, off int64) error {
		switch string(b[:4]) {
		case "BMA3":
			if fs.sb.v5 {
				return fs.verify("a block of an extent map", b, mapStamp, off, f.ino, fs.log.moved[f.ino])
			}
		case "BMAP":
			if !fs.sb.v5 {
				return nil
			}
		}
		return guest.Damaged("inode %d: no block of an extent map at %d", f.ino, off)
	})
	if err != nil {
		return 0, nil, err
	}
	if int(be.Uint16(b[4:])) != level {
		return 0, nil, guest.Damaged("inode %d: a block of level %d at level %d of its extent map", f.ino, be.Uint16(b[4:]), level)
	}
	return int(be.Uint16(b[6:])), b[fs.sb.pick(24, 72):], nil
}
