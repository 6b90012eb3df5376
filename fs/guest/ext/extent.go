package ext

import (
	"sort"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// maxBlocks bounds the blocks of a file: their numbers have 32 bits.
const maxBlocks = 1 << 32

// A run is a stretch of a file whose blocks follow each other on the device.
type run struct {
	at        int64 // block of the file
	n         int64 // blocks
	phys      int64 // block of the device; 0: a hole
	unwritten bool  // allocated, and reads as zeros
}

func (r run) end() int64 { return r.at + r.n }

// data reports whether there is something on the device to read.
func (r run) data() bool { return r.phys != 0 && !r.unwritten }

// from is the part of a run from a block on.
func (r run) from(at int64) run {
	d := at - r.at
	r.at, r.n = at, r.n-d
	if r.phys != 0 {
		r.phys += d
	}
	return r
}

// find gives the run that begins with block at of a file.
func (f *FS) find(in *inode, at int64) (run, error) {
	var r run
	var err error
	switch {
	case in.inline():
		return run{}, guest.Damaged("inode %d: inline data with blocks", in.no)
	case in.runs != nil:
		r = findRun(*in.runs, at)
	case in.flags&flagExtents != 0:
		r, err = f.findExtent(in, at)
	default:
		r, err = f.findMapped(in, at)
	}
	if err == nil && r.phys != 0 && (r.phys < f.firstData || r.phys+r.n > f.blocks) {
		err = guest.Damaged("inode %d: block %d is block %d of the device", in.no, at, r.phys)
	}
	return r, err
}

// findRun finds a block in a list of runs.
func findRun(list []run, at int64) run {
	i := sort.Search(len(list), func(i int) bool { return list[i].end() > at })
	switch {
	case i == len(list):
		return run{at: at, n: maxBlocks}
	case list[i].at > at:
		return run{at: at, n: list[i].at - at}
	}
	return list[i].from(at)
}

// Sizes in an extent tree (ext4 doc, Extent Tree): a header and each entry have 12 bytes.
const (
	extentMagic = 0xF30A
	extentSize  = 12
	extentDepth = 5
)

// A node of an extent tree covers the file's blocks from lo up to hi.
type node struct {
	entries []byte
	depth   int
	lo, hi  int64
}

func (n node) len() int { return len(n.entries) / extentSize }

func (n node) entry(i int) []byte { return n.entries[i*extentSize:][:extentSize] }

// at is the first block of the file that entry i covers.
func (n node) at(i int) int64 { return int64(le.Uint32(n.entry(i))) }

// search gives the last entry that begins at or before block at of the file; -1 when there is none.
func (n node) search(at int64) int {
	lo, hi := 0, n.len()
	for lo < hi {
		if mid := (lo + hi) / 2; n.at(mid) <= at {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return lo - 1
}

// extent gives entry i of a leaf.
func (n node) extent(i int) run {
	e := n.entry(i)
	r := run{at: int64(le.Uint32(e)), n: int64(le.Uint16(e[4:])), phys: int64(le.Uint32(e[8:])) | int64(le.Uint16(e[6:]))<<32}
	if r.n > 1<<15 {
		r.n -= 1 << 15
		r.unwritten = true
	}
	return r
}

// child gives the block that entry i of an inner node points to, and what the node there covers.
func (n node) child(i int) (block int64, c node) {
	e := n.entry(i)
	c = node{depth: n.depth - 1, lo: n.at(i), hi: n.hi}
	if i+1 < n.len() {
		c.hi = n.at(i + 1)
	}
	return int64(le.Uint32(e[4:])) | int64(le.Uint16(e[8:]))<<32, c
}

// parse reads the node in b and makes sure that its entries are in order and within what it covers: then each step down
// or onward ends, whatever the disk says.
func (n *node) parse(b []byte) bool {
	count, room := int(le.Uint16(b[2:])), int(le.Uint16(b[4:]))
	if le.Uint16(b) != extentMagic || count > room || (room+1)*extentSize > len(b) || int(le.Uint16(b[6:])) != n.depth {
		return false
	}
	n.entries = b[extentSize:][:count*extentSize]
	end := n.lo
	for i := range count {
		at := n.at(i)
		if at < end || at >= n.hi {
			return false
		}
		end = at + 1
		if n.depth == 0 {
			r := n.extent(i)
			if r.n == 0 || r.phys == 0 {
				return false
			}
			end = at + r.n
		}
	}
	return end <= n.hi
}

// root gives the root of an inode's extents.
func (in *inode) root() (node, error) {
	b := in.block()
	n := node{depth: int(le.Uint16(b[6:])), hi: maxBlocks}
	if n.depth > extentDepth || !n.parse(b) {
		return n, guest.Damaged("inode %d: root of the extents", in.no)
	}
	return n, nil
}

// down reads the node that entry i of n points to.
func (f *FS) down(in *inode, n node, i int) (node, error) {
	block, c := n.child(i)
	b, err := f.meta.Block(block, nil)
	if err != nil {
		return c, err
	}
	if !c.parse(b) {
		return c, guest.Damaged("inode %d: extents in block %d", in.no, block)
	}
	if f.ro&roMetadataCsum != 0 {
		// The checksum stands behind the entries that there is room for (ext4 doc, Extent Tree).
		tail := (int(le.Uint16(b[4:])) + 1) * extentSize
		if tail+4 > len(b) || crc32c(in.seed, b[:tail]) != le.Uint32(b[tail:]) {
			return c, guest.Damaged("inode %d: checksum of the extents in block %d", in.no, block)
		}
	}
	return c, nil
}

// findExtent finds a block in an extent tree.
func (f *FS) findExtent(in *inode, at int64) (run, error) {
	n, err := in.root()
	for err == nil {
		i := n.search(at)
		if i < 0 {
			hole := run{at: at, n: n.hi - at}
			if n.len() > 0 {
				hole.n = n.at(0) - at
			}
			return hole, nil
		}
		if n.depth > 0 {
			n, err = f.down(in, n, i)
			continue
		}
		if r := n.extent(i); at < r.end() {
			return r.from(at), nil
		}
		next := n.hi
		if i+1 < n.len() {
			next = n.at(i + 1)
		}
		return run{at: at, n: next - at}, nil
	}
	return run{}, err
}
