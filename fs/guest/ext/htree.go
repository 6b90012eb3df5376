package ext

import "github.com/holdfast-backup/holdfast/fs/guest"

// maxLevels bounds the levels of a directory's index below its root: Linux has three with large_dir (ext4 doc, Hash Tree
// Directories).
const maxLevels = 3

// An index is a node of a directory's hash tree: pairs of a hash and a block of the directory, the first pair's hash being
// no hash but two counts.
type index struct {
	pairs []byte
	i     int // the pair in use
}

func (x *index) len() int          { return len(x.pairs) / 8 }
func (x *index) hash(i int) uint32 { return le.Uint32(x.pairs[i*8:]) }
func (x *index) block() int64      { return int64(le.Uint32(x.pairs[x.i*8+4:]) & 0x0fffffff) }
func (x *index) parse(b []byte) bool { // b starts where the counts are
	limit, count := int(le.Uint16(b)), int(le.Uint16(b[2:]))
	if count == 0 || count > limit || limit*8 > len(b) {
		return false
	}
	x.pairs, x.i = b[:count*8], 0
	return true
}

// seek goes to the last pair whose hash is not greater.
func (x *index) seek(hash uint32) {
	lo, hi := 1, x.len()
	for lo < hi {
		if mid := (lo + hi) / 2; x.hash(mid) <= hash {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	x.i = lo - 1
}

// An indexed directory is one whose names are hashed.
type indexed struct {
	kind int
	root index
	deep int // levels below the root
}

// openIndex reads the root of a directory's index; ok is false when there is none that can be used.
func (f *FS) openIndex(in *inode) (x indexed, ok bool) {
	if in.flags&flagIndex == 0 || in.inline() || f.fast.made(in.no) {
		return x, false
	}
	b, err := f.fileBlock(in, 0)
	if err != nil || len(b) < rootIndex+8 || b[0x1d] != 8 || b[0x1e] > maxLevels {
		return x, false
	}
	x.kind, x.deep = int(b[0x1c]), int(b[0x1e])
	if f.hashUnsigned && x.kind < hashUnsigned {
		x.kind += hashUnsigned
	}
	return x, x.root.parse(b[rootIndex:])
}

// hash hashes a name as a directory does; ok is false when that is not known.
func (f *FS) hash(in *inode, kind int, n string) (sum uint32, ok bool) {
	if f.ignoresCase(in) {
		if folded, ok := foldName(n); ok {
			n = folded
		}
	}
	return hashName(kind, f.hashSeed, n)
}

// lookupIndex looks for a name where the index says that it is. Whatever is wrong with the index, it is only not found.
func (f *FS) lookupIndex(in *inode, want *sought) (found name, ok bool) {
	x, ok := f.openIndex(in)
	if !ok {
		return name{}, false
	}
	hash, ok := f.hash(in, x.kind, want.name)
	if !ok {
		return name{}, false
	}
	path := make([]index, x.deep+1)
	path[0] = x.root
	path[0].seek(hash)
	if !f.fill(in, path[1:], path[0].block(), hash) {
		return name{}, false
	}
	return f.searchLeaves(in, path, hash, want)
}

// fill reads the nodes below a block, on the way to a hash.
func (f *FS) fill(in *inode, path []index, block int64, hash uint32) bool {
	for i := range path {
		b, err := f.fileBlock(in, block)
		if err != nil || !path[i].parse(b[nodeIndex:]) {
			return false
		}
		path[i].seek(hash)
		block = path[i].block()
	}
	return true
}

// searchLeaves looks for a name in the leaf that path leads to, and in those behind it that go on with the same hash.
func (f *FS) searchLeaves(in *inode, path []index, hash uint32, want *sought) (found name, ok bool) {
	for left := in.size / f.blockSize; left > 0; left-- {
		b, err := f.fileBlock(in, path[len(path)-1].block())
		if err != nil {
			return name{}, false
		}
		f.blockEntries(in, b, 0, 0, func(n name) bool {
			if want.is(n.bytes) {
				found, ok = n, true
			}
			return !ok
		})
		if ok || !f.onward(in, path, hash) {
			return found, ok
		}
	}
	return name{}, false
}

// onward goes to the next leaf, if that one goes on with the same hash: then the lowest bit of its own is set.
func (f *FS) onward(in *inode, path []index, hash uint32) bool {
	for level := len(path) - 1; level >= 0; level-- {
		x := &path[level]
		if x.i+1 == x.len() {
			continue
		}
		x.i++
		if x.hash(x.i) != hash|1 {
			return false
		}
		return f.fill(in, path[level+1:], x.block(), 0)
	}
	return false
}

// fileBlock reads block at of a directory.
func (f *FS) fileBlock(in *inode, at int64) ([]byte, error) {
	r, err := f.find(in, at)
	if err != nil {
		return nil, err
	}
	if !r.data() || at >= (in.size+f.blockSize-1)/f.blockSize {
		return nil, guest.Damaged("inode %d: no block %d in the directory", in.no, at)
	}
	return f.dirBlock(in, r.phys)
}
