package ext

import (
	"bytes"
	"fmt"
	"iter"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// types are the types of directory entries (ext4 doc, Directory Entries).
var types = [...]uint32{0, guest.ModeRegular, guest.ModeDir, guest.ModeChar, guest.ModeBlock, guest.ModeFIFO, guest.ModeSocket, guest.ModeLink}

// A name is one in a directory, as it stands there.
type name struct {
	bytes []byte
	ino   uint32
	kind  byte
	next  int64 // byte of the directory behind it
}

// A cookie of ReadDir is the byte of the directory to go on from; this bit remembers that something before it could not be read.
const damageSeen = 1 << 63

// dir reads the inode of a directory whose names can be read.
func (f *FS) dir(ino guest.Ino) (inode, error) {
	in, err := f.inode(ino)
	switch {
	case err != nil:
	case !in.is(guest.ModeDir):
		err = fmt.Errorf("inode %d: %w", ino, guest.ErrNotDir)
	case in.flags&flagEncrypt != 0:
		err = guest.Unsupported("inode %d: an encrypted directory", ino)
	}
	return in, err
}

// ReadDir implements guest.FS. Where a block of the directory is damaged, the names in others come first.
func (f *FS) ReadDir(dir guest.Ino, from uint64) iter.Seq2[guest.Entry, error] {
	return func(yield func(guest.Entry, error) bool) {
		in, err := f.dir(dir)
		if err != nil {
			yield(guest.Entry{}, err)
			return
		}
		if from&damageSeen != 0 {
			err = guest.Damaged("inode %d: directory", dir)
		}
		done := false
		err = f.names(&in, int64(from&^damageSeen), err, func(n name, bad error) bool {
			e := guest.Entry{Name: string(n.bytes), Ino: guest.Ino(n.ino), Next: uint64(n.next)}
			if int(n.kind) < len(types) {
				e.Type = types[n.kind]
			}
			if bad != nil {
				e.Next |= damageSeen
			}
			done = !yield(e, nil)
			return !done
		})
		if err != nil && !done {
			yield(guest.Entry{}, err)
		}
	}
}

// names calls fn for each name of a directory from a place on, until it returns false, in the order of the disk; bad is the first
// damage so far. It gives the first damage.
func (f *FS) names(in *inode, from int64, bad error, fn func(n name, bad error) bool) error {
	more := true
	note := func(err error) {
		if bad == nil {
			bad = err
		}
	}
	visit := func(n name) bool {
		more = f.fast.removed(in.no, n) || fn(n, bad)
		return more
	}
	if from < fastNames && !f.fast.made(in.no) {
		if in.inline() {
			note(f.inlineNames(in, from, &more, visit))
		} else {
			f.blockNames(in, from, &more, note, visit)
		}
	}
	if more {
		f.fast.added(in.no, from, func(n name) bool { return fn(n, bad) })
	}
	return bad
}

// inlineNames lists a directory with inline data. A place in it counts from the beginning of i_block.
func (f *FS) inlineNames(in *inode, from int64, more *bool, visit func(name) bool) error {
	first, second, err := f.inlineParts(in)
	if err == nil {
		err = f.blockEntries(in, first, 4, from, visit)
	}
	if err == nil && *more {
		err = f.blockEntries(in, second, inlineHead, from, visit)
	}
	return err
}

// blockNames lists a directory that has blocks: no more of them than the device, or one that has the same blocks again and again would have
// hardly an end.
func (f *FS) blockNames(in *inode, from int64, more *bool, note func(error), visit func(name) bool) {
	bs := f.blockSize
	end := (in.size + bs - 1) / bs
	var r run
	left := f.blocks
	for at := from / bs; at < end && *more; at++ {
		if left--; left < 0 {
			note(guest.Damaged("inode %d: more blocks than the device", in.no))
			return
		}
		if at >= r.end() {
			var err error
			if r, err = f.find(in, at); err != nil {
				note(err)
				return
			}
			r.n = min(r.n, end-at)
		}
		if !r.data() {
			note(guest.Damaged("inode %d: a hole in the directory", in.no))
			at = r.end() - 1
			continue
		}
		b, err := f.dirBlock(in, r.from(at).phys)
		if err == nil {
			err = f.blockEntries(in, b, at*bs, from, visit)
		}
		if err != nil {
			note(err)
		}
	}
}

// dirBlock reads a block of a directory.
func (f *FS) dirBlock(in *inode, block int64) ([]byte, error) {
	b, err := f.meta.Block(block, nil)
	if err == nil && !f.dirSum(in, b) {
		err = guest.Damaged("inode %d: checksum of the directory in block %d", in.no, block)
	}
	return b, err
}

// Sizes and places in directory blocks: ext4 doc, Directory Entries and Hash Tree Directories.
const (
	direntHead = 8  // bytes before the name
	direntMin  = 12 // bytes of the shortest entry
	sumEntry   = 12 // bytes of the entry that hides a leaf's checksum
	rootIndex  = 32 // where a root's index starts
	nodeIndex  = 8  // where an inner node's index starts
)

// dirSum verifies the checksum of a directory block: that of a part of the index, or that of names.
func (f *FS) dirSum(in *inode, b []byte) bool {
	if f.ro&roMetadataCsum == 0 {
		return true
	}
	at := 0
	switch {
	case f.recLen(b[4:]) == len(b):
		at = nodeIndex
	case f.recLen(b[4:]) == direntMin && f.recLen(b[direntMin+4:]) == len(b)-direntMin:
		at = rootIndex
	default:
		tail := b[len(b)-sumEntry:]
		return le.Uint32(tail) == 0 && le.Uint32(tail[4:]) == 0xDE00_000C && crc32c(in.seed, b[:len(b)-sumEntry]) == le.Uint32(tail[8:])
	}
	limit, count := int(le.Uint16(b[at:])), int(le.Uint16(b[at+2:]))
	tail := at + limit*8
	if count > limit || tail+8 > len(b) {
		return false
	}
	sum := crc32c(crc32c(crc32c(in.seed, b[:at+count*8]), b[tail:tail+4]), zeros[:])
	return sum == le.Uint32(b[tail+4:])
}

// recLen reads the length of an entry. A block of 64 KiB has one that 16 bits cannot hold.
func (f *FS) recLen(b []byte) int {
	n := int(le.Uint16(b))
	if f.blockSize == 64<<10 && (n == 0xffff || n == 0) {
		return 64 << 10
	}
	return n
}

// blockEntries calls fn for the names in b, which is at byte base of the directory, that begin at byte from of it or later.
func (f *FS) blockEntries(in *inode, b []byte, base, from int64, fn func(name) bool) error {
	var bad error
	for at := 0; at < len(b); {
		e := b[at:]
		if len(e) < direntMin {
			return guest.Damaged("inode %d: directory entry at byte %d", in.no, base+int64(at))
		}
		n := f.recLen(e[4:])
		size := int(e[6])
		if n < direntMin || n%4 != 0 || n > len(e) || direntHead+size > n {
			return guest.Damaged("inode %d: directory entry at byte %d", in.no, base+int64(at))
		}
		start := base + int64(at)
		at += n
		d := name{bytes: e[direntHead : direntHead+size], ino: le.Uint32(e), next: base + int64(at)}
		if f.incompat&incompatFiletype != 0 {
			d.kind = e[7]
		}
		if d.ino == 0 || start < from || string(d.bytes) == "." || string(d.bytes) == ".." {
			continue
		}
		if d.ino > f.inodes || !legal(d.bytes) {
			bad = guest.Damaged("inode %d: directory entry at byte %d", in.no, start)
			continue
		}
		if !fn(d) {
			break
		}
	}
	return bad
}

// legal reports whether a name can be one: no system lets anybody make another, and whoever shows it would be led astray.
func legal(n []byte) bool {
	return len(n) > 0 && bytes.IndexByte(n, '/') < 0 && bytes.IndexByte(n, 0) < 0
}

// Lookup implements guest.FS. Where a directory ignores case, so does it, as Linux.
func (f *FS) Lookup(dir guest.Ino, want string) (guest.Ino, error) {
	n, err := f.lookup(dir, want)
	return guest.Ino(n.ino), err
}

// lookup finds a name. One that the index does not lead to is looked for everywhere, for an index may be wrong; once for each
// directory, because then it is known whether it is.
func (f *FS) lookup(dir guest.Ino, want string) (name, error) {
	in, err := f.dir(dir)
	if err != nil {
		return name{}, err
	}
	s := f.sought(&in, want)
	if n, ok := f.fast.lookup(in.no, &s); ok {
		return n, nil
	}
	if n, ok := f.lookupIndex(&in, &s); ok && !f.fast.removed(in.no, n) {
		return n, nil
	}
	const longest = 255 // bytes: the length of a name has 8 bits
	missing := fmt.Errorf("%q in inode %d: %w", want, dir, guest.ErrNotExist)
	if len(want) > longest || f.sound.has(in.no) {
		return name{}, missing
	}
	check := f.newIndexCheck(&in)
	var found name
	err = f.names(&in, 0, nil, func(n name, _ error) bool {
		if s.is(n.bytes) {
			found = n
		}
		check.see(n)
		return found.ino == 0
	})
	switch {
	case found.ino != 0:
		return found, nil
	case err != nil:
		return name{}, err
	case check.sound():
		f.sound.add(in.no)
	}
	return name{}, missing
}
