package xfs

import (
	"iter"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// Where in a directory's data its parts begin, bytes (XFSDS, Directories): entries, the index, free space.
const (
	dirIndexOff = 32 << 30
	dirFreeOff  = 64 << 30
)

// fileTypes are the types that entries tell: ftype => mode.
var fileTypes = [...]uint32{0, guest.ModeRegular, guest.ModeDir, guest.ModeChar, guest.ModeBlock, guest.ModeFIFO, guest.ModeSocket, guest.ModeLink}

// A dirent is an entry as it lies in a block or in an inode.
type dirent struct {
	ino   uint64
	name  []byte
	ftype uint8
}

func (d *dirent) dots() bool {
	return d.name[0] == '.' && (len(d.name) == 1 || len(d.name) == 2 && d.name[1] == '.')
}

func (d *dirent) mode() uint32 {
	if int(d.ftype) < len(fileTypes) {
		return fileTypes[d.ftype]
	}
	return 0
}

func (d *dirent) entry(next uint64) guest.Entry {
	return guest.Entry{Name: string(d.name), Ino: guest.Ino(d.ino), Type: d.mode(), Next: next}
}

// directory gives the inode of a directory.
func (fs *FS) directory(ino guest.Ino) (inode, error) {
	n, err := fs.inode(ino)
	if err == nil && n.kind() != guest.ModeDir {
		err = guest.ErrNotDir
	}
	return n, err
}

// ReadDir implements guest.FS. A place in a directory is the entry's number + 1 in a short one, and its byte otherwise.
func (fs *FS) ReadDir(dir guest.Ino, from uint64) iter.Seq2[guest.Entry, error] {
	return func(yield func(guest.Entry, error) bool) {
		n, err := fs.directory(dir)
		if err == nil && n.data.form == formLocal {
			err = fs.listShort(&n, from, yield)
		} else if err == nil {
			err = fs.list(&n, from, yield)
		}
		if err != nil {
			yield(guest.Entry{}, err)
		}
	}
}

// short yields the entries of a short form directory.
func (fs *FS) short(n *inode) iter.Seq2[dirent, error] {
	return func(yield func(dirent, error) bool) {
		b := n.data.area
		bad := func() { yield(dirent{}, guest.Damaged("inode %d: a short directory's entries", n.num)) }
		if n.size > int64(len(b)) || n.size < 6 {
			bad()
			return
		}
		b = b[:n.size]
		// The header: how many, how many of them need 8 bytes, and the parent (XFSDS, Short Form Directories).
		count, width := int(b[0]), 4
		if b[1] != 0 {
			width = 8
		}
		at := 2 + width
		tail := width
		if fs.sb.ftype {
			tail++
		}
		for range count {
			if at+3 > len(b) || b[at] == 0 || at+3+int(b[at])+tail > len(b) {
				bad()
				return
			}
			d := dirent{name: b[at+3 : at+3+int(b[at])]}
			at += 3 + len(d.name)
			if fs.sb.ftype {
				d.ftype = b[at]
				at++
			}
			if width == 8 {
				d.ino = be.Uint64(b[at:])
			} else {
				d.ino = uint64(be.Uint32(b[at:]))
			}
			at += width
			if !yield(d, nil) {
				return
			}
		}
	}
}

func (fs *FS) listShort(n *inode, from uint64, yield func(guest.Entry, error) bool) error {
	place := uint64(0)
	for d, err := range fs.short(n) {
		if err != nil {
			return err
		}
		if place++; place > from && !yield(d.entry(place), nil) {
			return nil
		}
	}
	return nil
}

// list lists the blocks of a directory from byte from on.
func (fs *FS) list(n *inode, from uint64, yield func(guest.Entry, error) bool) error {
	size := uint64(fs.sb.dirSize())
	end := min(uint64(n.size), dirIndexOff)
	left := fs.blocks(n)
	for at := from / size * size; at < end; {
		// Holes are where blocks without entries have been freed.
		s, err := fs.find(&n.data, at>>fs.sb.blockLog)
		if err != nil || s.n == 0 {
			return err
		}
		if s.off > at>>fs.sb.blockLog {
			if s.off >= dirIndexOff>>fs.sb.blockLog {
				return nil
			}
			at = s.off << fs.sb.blockLog / size * size
		}
		if left < 1<<fs.sb.dirLog {
			return guest.Damaged("inode %d: a directory of more blocks than it has", n.num)
		}
		left -= 1 << fs.sb.dirLog
		b, err := fs.dirBlock(n, &n.data, at)
		if err != nil {
			return err
		}
		if more, err := fs.listBlock(n, b, at, from, yield); err != nil || !more {
			return err
		}
		at += size
	}
	return nil
}

// blocks is how many blocks there can be to an inode that shares none with itself.
func (fs *FS) blocks(n *inode) uint64 { return min(n.nblocks, fs.sb.dblocks) }

func (fs *FS) listBlock(n *inode, b []byte, base, from uint64, yield func(guest.Entry, error) bool) (more bool, err error) {
	end, err := fs.entriesEnd(n, b)
	if err != nil {
		return false, err
	}
	for at := fs.sb.pick(16, 64); at < end; {
		d, next, err := fs.parseEntry(n, b[:end], at)
		if err != nil {
			return false, err
		}
		if d.ino != 0 && base+uint64(at) >= from && !d.dots() && !yield(d.entry(base+uint64(next)), nil) {
			return false, nil
		}
		at = next
	}
	return true, nil
}

// entriesEnd is where the entries of a data block end; the block of a directory of one block has its index behind them.
func (fs *FS) entriesEnd(n *inode, b []byte) (int, error) {
	switch string(b[:4]) {
	case "XD2D", "XDD3":
		return len(b), nil
	case "XD2B", "XDB3":
		leaf, err := blockIndex(n, b)
		return len(b) - 8 - len(leaf), err
	}
	return 0, guest.Damaged("inode %d: no block of entries", n.num)
}

// blockIndex is the index at the end of the block of a directory of one block (XFSDS, Block Directories).
func blockIndex(n *inode, b []byte) ([]byte, error) {
	count := uint64(be.Uint32(b[len(b)-8:]))
	if count*8 > uint64(len(b)-8-64) {
		return nil, guest.Damaged("inode %d: an index of %d entries in a block of them", n.num, count)
	}
	return b[len(b)-8-int(count)*8 : len(b)-8], nil
}

// parseEntry reads the entry at byte at; inode 0 is unused space.
func (fs *FS) parseEntry(n *inode, b []byte, at int) (d dirent, next int, err error) {
	bad := func() (dirent, int, error) {
		return dirent{}, 0, guest.Damaged("inode %d: an entry at byte %d of a block", n.num, at)
	}
	if at < 0 || at+16 > len(b) {
		// The smallest piece of unused space has 8 bytes, the smallest entry 16.
		if at < 0 || at+8 > len(b) || be.Uint16(b[at:]) != 0xffff {
			return bad()
		}
	}
	if be.Uint16(b[at:]) == 0xffff {
		size := int(be.Uint16(b[at+2:]))
		if size < 8 || size%8 != 0 || size > len(b)-at {
			return bad()
		}
		return dirent{}, at + size, nil
	}
	d = dirent{ino: be.Uint64(b[at:])}
	size, name := 8+1+int(b[at+8])+2, at+9
	if fs.sb.ftype {
		size++
	}
	size = (size + 7) &^ 7
	if b[at+8] == 0 || size > len(b)-at || d.ino == 0 {
		return bad()
	}
	d.name = b[name : name+int(b[at+8])]
	if fs.sb.ftype {
		d.ftype = b[name+len(d.name)]
	}
	return d, at + size, nil
}

// dirBlock reads the block that begins at byte off of a directory, or of attributes, and verifies what versions of it
// have a checksum. Several blocks of the file system make up one, and need not lie together.
func (fs *FS) dirBlock(n *inode, f *fork, off uint64) ([]byte, error) {
	size, log := fs.sb.dirSize(), fs.sb.blockLog
	if f == &n.xat {
		size = fs.sb.blockSize
	}
	s, err := fs.find(f, off>>log)
	if err != nil {
		return nil, err
	}
	if s.n == 0 || s.off > off>>log || s.unwritten {
		return nil, guest.Damaged("inode %d: a hole at byte %d of a directory or attributes", n.num, off)
	}
	key := bufKey{kindDir, s.block + off>>log - s.off, n.num}
	if b := fs.bufs.find(key); b != nil && int64(len(b)) == size {
		return b, nil
	}
	whole := file{fs: fs, data: *f, size: int64(off) + size}
	b := make([]byte, size)
	if _, err := whole.ReadAt(b, int64(off)); err != nil {
		return nil, err
	}
	at, err := fs.sb.offset(key.block, 1)
	if err != nil {
		return nil, err
	}
	if err := fs.verifyDir(n, b, at); err != nil {
		return nil, err
	}
	fs.bufs.keep(key, b)
	return b, nil
}

var (
	dataStamp = stamp{crc: 4, block: 8, lsn: 16, uuid: 24, owner: 40}
	treeStamp = stamp{crc: 12, block: 16, lsn: 24, uuid: 32, owner: 48}
)

// verifyDir verifies a block of entries, of an index or of attributes.
func (fs *FS) verifyDir(n *inode, b []byte, off int64) error {
	const what = "a block of a directory or of attributes"
	v5 := true
	at := dataStamp
	switch string(b[:4]) {
	case "XD2B", "XD2D", "XD2F":
		v5 = false
	case "XDB3", "XDD3", "XDF3":
	default:
		at = treeStamp
		switch be.Uint16(b[8:]) {
		case magicLeaf1, magicLeafN, magicNode, magicAttr:
			v5 = false
		case magicLeaf1v5, magicLeafNv5, magicNodev5, magicAttrv5:
		default:
			return guest.Damaged("inode %d: %s at %d: its magic number", n.num, what, off)
		}
	}
	switch {
	case v5 != fs.sb.v5:
		return guest.Damaged("inode %d: %s at %d: its magic number is of the other version", n.num, what, off)
	case !v5:
		return nil
	}
	return fs.verify(what, b, at, off, n.num, fs.log.moved[n.num])
}
