package xfs

import (
	"bytes"
	"errors"
	"math/bits"
	"sort"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// Magic numbers of blocks that begin with the header of a tree (XFSDS, Magic Numbers).
const (
	magicLeaf1, magicLeaf1v5 = 0xd2f1, 0x3df1
	magicLeafN, magicLeafNv5 = 0xd2ff, 0x3dff
	magicNode, magicNodev5   = 0xfebe, 0x3ebe
	magicAttr, magicAttrv5   = 0xfbee, 0x3bee
)

// hashName is the hash of names (XFSDS, Variable Length Record B+trees): seven bits further for each byte.
func hashName(name []byte) uint32 {
	var h uint32
	for _, c := range name {
		h = uint32(c) ^ bits.RotateLeft32(h, 7)
	}
	return h
}

// fold makes a name what a file system without case compares and hashes: small letters, of Latin 1 too.
func fold(name []byte) []byte {
	out := make([]byte, len(name))
	for i, c := range name {
		if c >= 'A' && c <= 'Z' || c >= 0xc0 && c <= 0xde && c != 0xd7 {
			c += 0x20
		}
		out[i] = c
	}
	return out
}

// A wanted name, and what has been found of it.
type wanted struct {
	name, folded []byte // folded is nil where case counts
	hash         uint32
	ino          uint64 // that matches but for its case
}

func (fs *FS) wanted(name string) *wanted {
	w := &wanted{name: []byte(name)}
	if fs.sb.ci {
		w.folded = fold(w.name)
		w.hash = hashName(w.folded)
	} else {
		w.hash = hashName(w.name)
	}
	return w
}

// is reports whether it is the name itself. One that differs by its case is kept for when there is no other.
func (w *wanted) is(d *dirent) bool {
	if bytes.Equal(d.name, w.name) {
		return true
	}
	if w.folded != nil && w.ino == 0 && len(d.name) == len(w.name) && bytes.Equal(fold(d.name), w.folded) {
		w.ino = d.ino
	}
	return false
}

func (w *wanted) found() (guest.Ino, error) {
	if w.ino != 0 {
		return guest.Ino(w.ino), nil
	}
	return 0, guest.ErrNotExist
}

// Lookup implements guest.FS. It uses the index of the directory, and its entries when the index is damaged.
func (fs *FS) Lookup(dir guest.Ino, name string) (guest.Ino, error) {
	n, err := fs.directory(dir)
	if err != nil {
		return 0, err
	}
	if name == "" || len(name) > 255 || name == "." || name == ".." {
		return 0, guest.ErrNotExist
	}
	w := fs.wanted(name)
	if n.data.form == formLocal {
		return fs.lookupAll(dir, w)
	}
	ino, err := fs.lookupIndex(&n, w)
	if errors.Is(err, guest.ErrDamaged) {
		w.ino = 0
		if ino, e := fs.lookupAll(dir, w); e == nil {
			return ino, nil
		}
	}
	return ino, err
}

// lookupAll looks through all entries.
func (fs *FS) lookupAll(dir guest.Ino, w *wanted) (guest.Ino, error) {
	for e, err := range fs.ReadDir(dir, 0) {
		if err != nil {
			return 0, err
		}
		if w.is(&dirent{name: []byte(e.Name), ino: uint64(e.Ino)}) {
			return e.Ino, nil
		}
	}
	return w.found()
}

func (fs *FS) lookupIndex(n *inode, w *wanted) (guest.Ino, error) {
	if n.size == fs.sb.dirSize() {
		b, err := fs.dirBlock(n, &n.data, 0)
		if err != nil {
			return 0, err
		}
		if m := string(b[:4]); m == "XD2B" || m == "XDB3" {
			leaf, err := blockIndex(n, b)
			if err != nil {
				return 0, err
			}
			if ino, _, err := fs.probe(n, leaf, w); ino != 0 || err != nil {
				return ino, err
			}
			return w.found()
		}
	}
	return fs.lookupTree(n, w)
}

// A leaf is a block at the bottom of an index.
type leaf struct {
	block   []byte
	forw    uint32 // the block behind it, 0 at the end
	entries []byte // 8 bytes each, in order of their hashes
}

// lookupTree goes down the index and then along its leaves as long as they have the hash.
func (fs *FS) lookupTree(n *inode, w *wanted) (guest.Ino, error) {
	l, err := fs.leafFor(n, &n.data, dirIndexOff>>fs.sb.blockLog, w.hash)
	for limit := fs.blocks(n); err == nil; limit-- {
		ino, more, err := fs.probe(n, l.entries, w)
		switch {
		case ino != 0 || err != nil:
			return ino, err
		case !more || l.forw == 0:
			return w.found()
		case limit == 0:
			return 0, guest.Damaged("inode %d: leaves of the index in a circle", n.num)
		}
		if l, err = fs.leafAt(n, &n.data, uint64(l.forw)); err != nil {
			return 0, err
		}
	}
	return 0, err
}

// leafAt reads the leaf at a block of a fork.
func (fs *FS) leafAt(n *inode, f *fork, block uint64) (leaf, error) {
	b, err := fs.dirBlock(n, f, block<<fs.sb.blockLog)
	if err != nil {
		return leaf{}, err
	}
	return fs.parseLeaf(n, b)
}

// leafFor descends from the block root of a fork (counted in blocks of the file system) to the first leaf that can have the hash.
func (fs *FS) leafFor(n *inode, f *fork, root uint64, hash uint32) (leaf, error) {
	block, level := root, -1
	for range maxLevels {
		b, err := fs.dirBlock(n, f, block<<fs.sb.blockLog)
		if err != nil {
			return leaf{}, err
		}
		if m := be.Uint16(b[8:]); m != magicNode && m != magicNodev5 {
			if level > 1 {
				break
			}
			return fs.parseLeaf(n, b)
		}
		// The header's count and level, then pairs of hash and block, the hash being the largest below (XFSDS, Internal Nodes).
		at := fs.sb.pick(12, 56)
		count, l := int(be.Uint16(b[at:])), int(be.Uint16(b[at+2:]))
		body := b[fs.sb.pick(16, 64):]
		if count == 0 || count > len(body)/8 || l == 0 || level >= 0 && l != level-1 {
			break
		}
		level = l
		i := min(firstHash(body[:count*8], hash), count-1)
		block = uint64(be.Uint32(body[i*8+4:]))
	}
	return leaf{}, guest.Damaged("inode %d: the tree of an index", n.num)
}

// firstHash is the index of the first pair whose hash is not below the one given.
func firstHash(pairs []byte, hash uint32) int {
	return sort.Search(len(pairs)/8, func(i int) bool { return be.Uint32(pairs[i*8:]) >= hash })
}

func (fs *FS) parseLeaf(n *inode, b []byte) (leaf, error) {
	l := leaf{block: b, forw: be.Uint32(b)}
	at, head := fs.sb.pick(12, 56), fs.sb.pick(16, 64)
	switch be.Uint16(b[8:]) {
	case magicLeaf1, magicLeaf1v5:
		l.forw = 0
	case magicLeafN, magicLeafNv5:
	case magicAttr, magicAttrv5:
		head = fs.sb.pick(32, 80)
	default:
		return l, guest.Damaged("inode %d: no leaf of an index", n.num)
	}
	count := int(be.Uint16(b[at:]))
	if count > (len(b)-head)/8 {
		return l, guest.Damaged("inode %d: a leaf with %d entries", n.num, count)
	}
	l.entries = b[head : head+count*8]
	return l, nil
}

// probe looks at the entries with the hash. more: those behind the leaf may have it, too.
func (fs *FS) probe(n *inode, entries []byte, w *wanted) (ino guest.Ino, more bool, err error) {
	i := firstHash(entries, w.hash)
	for ; i < len(entries)/8; i++ {
		if be.Uint32(entries[i*8:]) != w.hash {
			return 0, false, nil
		}
		// The entry's byte in the directory, in units of 8; 0 is stale.
		addr := uint64(be.Uint32(entries[i*8+4:])) * 8
		if addr == 0 {
			continue
		}
		d, err := fs.entryAt(n, addr)
		if err != nil {
			return 0, false, err
		}
		if w.is(&d) {
			return guest.Ino(d.ino), false, nil
		}
	}
	return 0, true, nil
}

func (fs *FS) entryAt(n *inode, addr uint64) (dirent, error) {
	size := uint64(fs.sb.dirSize())
	if addr >= dirIndexOff {
		return dirent{}, guest.Damaged("inode %d: an entry at byte %d", n.num, addr)
	}
	b, err := fs.dirBlock(n, &n.data, addr/size*size)
	if err != nil {
		return dirent{}, err
	}
	end, err := fs.entriesEnd(n, b)
	if err != nil {
		return dirent{}, err
	}
	d, _, err := fs.parseEntry(n, b[:end], int(addr%size))
	if err == nil && d.ino == 0 {
		err = guest.Damaged("inode %d: the index names a place without an entry", n.num)
	}
	return d, err
}
