package ext

import (
	"fmt"
	"iter"
	"math/bits"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// Free implements guest.Freer, from the bitmaps of blocks, each of which has to match its checksum and its group's count.
func (f *FS) Free() iter.Seq2[extent.Extent, error] {
	return extent.Coarsen(func(yield func(extent.Extent, error) bool) {
		if err := f.certain(); err != nil {
			yield(extent.Extent{}, err)
			return
		}
		for group := range f.groups {
			bitmap, err := f.bitmap(group)
			if err != nil {
				yield(extent.Extent{}, err)
				return
			}
			for e := range f.freeOf(group, bitmap) {
				if !yield(e, nil) {
					return
				}
			}
		}
	}, 1, f.blocks*f.blockSize)
}

// certain gives why blocks in use cannot be told from free ones, or from those with several owners.
func (f *FS) certain() error {
	if f.uncertain != nil {
		return f.uncertain
	}
	if unknown := f.ro &^ roOwned; unknown != 0 {
		return guest.Unsupported("ext: blocks with feature %#x", unknown)
	}
	return nil
}

// clusters is how many clusters a group has.
func (f *FS) clusters(group int64) int64 {
	n := min(f.blocksPerGroup, f.blocks-f.firstBlock(group))
	return (n + 1<<f.clusterBits - 1) >> f.clusterBits
}

// bitmap gives the clusters of a group that are in use, a bit each.
func (f *FS) bitmap(group int64) ([]byte, error) {
	d, err := f.primary(group)
	if err != nil {
		return nil, err
	}
	var b []byte
	if d.flags&blockUninit != 0 && f.ro&(roGDTCsum|roMetadataCsum) != 0 {
		b = f.freshBitmap(group, d)
	} else if b, err = f.meta.Block(d.blockBitmap, nil); err != nil {
		return nil, err
	} else if !f.bitmapSum(d, b) {
		return nil, guest.Damaged("group %d: checksum of the bitmap", group)
	}
	if free := countFree(b, f.clusters(group)); free != d.free {
		return nil, guest.Damaged("group %d: %d clusters are free, its descriptor says %d", group, free, d.free)
	}
	return b, nil
}

// countFree counts the bits that are not set among the first n.
func countFree(b []byte, n int64) int64 {
	used := 0
	for _, c := range b[:n/8] {
		used += bits.OnesCount8(c)
	}
	if n%8 != 0 {
		used += bits.OnesCount8(b[n/8] & (1<<(n%8) - 1))
	}
	return n - int64(used)
}

// bitmapSum verifies the checksum of a group's bitmap, of which small descriptors hold only half.
func (f *FS) bitmapSum(d desc, b []byte) bool {
	if f.ro&roMetadataCsum == 0 {
		return true
	}
	sum := crc32c(f.seed, b[:f.clustersPerGroup/8])
	if f.descSize < 64 {
		sum &= 0xffff
	}
	return sum == d.bitmapSum
}

// freshBitmap is the bitmap of a group that was never written to: only what mkfs places in it is in use (ext4 doc, Lazy Block Group
// Initialization).
func (f *FS) freshBitmap(group int64, d desc) []byte {
	b := make([]byte, f.blockSize)
	first := f.firstBlock(group)
	use := func(block, n int64) {
		for i := max(block, first); i < min(block+n, first+f.blocksPerGroup); i++ {
			c := (i - first) >> f.clusterBits
			b[c/8] |= 1 << (c % 8)
		}
	}
	super := int64(0)
	if f.hasSuper(group) {
		super = 1
	}
	use(first, super+f.tables(group))
	use(d.blockBitmap, 1)
	use(d.inodeBitmap, 1)
	use(d.inodeTable, (f.inodesPerGroup*f.inodeSize+f.blockSize-1)/f.blockSize)
	return b
}

// tables is how many blocks of group descriptors, and room for more, a group has.
func (f *FS) tables(group int64) int64 {
	perBlock := f.blockSize / f.descSize
	blocks := (f.groups + perBlock - 1) / perBlock
	if f.incompat&incompatMetaBG != 0 {
		blocks = min(blocks, f.firstMetaBG)
		if group >= f.firstMetaBG*perBlock {
			// The first, second and last group of a meta group hold its descriptors.
			if i := group % perBlock; i == 0 || i == 1 || i == perBlock-1 {
				return 1
			}
			return 0
		}
	}
	if !f.hasSuper(group) {
		return 0
	}
	return blocks + f.reservedGDT
}

// freeOf yields what is free in a group.
func (f *FS) freeOf(group int64, bitmap []byte) iter.Seq[extent.Extent] {
	return func(yield func(extent.Extent) bool) {
		n := f.clusters(group)
		first, end := f.firstBlock(group)*f.blockSize, f.blocks*f.blockSize
		unit := f.blockSize << f.clusterBits
		for i := nextBit(bitmap, 0, n, 0); i < n; {
			from := i
			i = nextBit(bitmap, from, n, 1)
			e := extent.Extent{Off: first + from*unit, Len: (i - from) * unit}
			e.Len = min(e.Len, end-e.Off)
			if !yield(e) {
				return
			}
			i = nextBit(bitmap, i, n, 0)
		}
	}
}

// nextBit gives the first bit from i on, and before n, that is want; n when there is none.
func nextBit(b []byte, i, n int64, want byte) int64 {
	for i < n {
		switch c := b[i/8] ^ (want - 1); { // a bit is set now where it is the one that is wanted
		case c == 0:
			i = (i/8 + 1) * 8
		case c>>(i%8)&1 != 0:
			return i
		default:
			i++
		}
	}
	return n
}

// Locate implements guest.Locator, in the order of the file: all its blocks, those behind its end too.
func (f *FS) Locate(ino guest.Ino) iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) {
		in, err := f.inode(ino)
		if err == nil {
			err = f.certain()
		}
		if err == nil && !in.is(guest.ModeRegular) {
			err = fmt.Errorf("inode %d: no regular file", ino)
		}
		if err != nil {
			yield(extent.Extent{}, err)
			return
		}
		if in.inline() {
			return
		}
		var last extent.Extent
		for r, err := range f.runs(&in, f.mostBlocks(&in)) {
			if err != nil {
				yield(extent.Extent{}, err)
				return
			}
			e := extent.Extent{Off: r.phys * f.blockSize, Len: r.n * f.blockSize}
			if last.End() == e.Off {
				last.Len += e.Len
				continue
			}
			if !last.Empty() && !yield(last, nil) {
				return
			}
			last = e
		}
		if !last.Empty() {
			yield(last, nil)
		}
	}
}

// mostBlocks is how many blocks a file can have.
func (f *FS) mostBlocks(in *inode) int64 {
	if in.flags&flagExtents != 0 || in.runs != nil {
		return maxBlocks
	}
	n := f.blockSize / 4
	return min(maxBlocks, direct+n+n*n+n*n*n)
}
