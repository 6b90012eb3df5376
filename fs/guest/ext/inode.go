package ext

import (
	"fmt"
	"time"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// Inode flags: ext4 doc, Index Nodes.
const (
	flagEncrypt  = 0x800
	flagIndex    = 0x1000
	flagHuge     = 0x40000
	flagExtents  = 0x80000
	flagEAInode  = 0x200000
	flagInline   = 0x10000000
	flagCasefold = 0x40000000
)

// inode is one as it stands in its table.
type inode struct {
	no    uint32
	raw   []byte // shared, not to be changed
	mode  uint32
	flags uint32
	size  int64
	seed  uint32 // of the checksums of its extents and directory blocks
	runs  *[]run // where its blocks are, when a fast commit changed it; nil otherwise
}

// block is i_block: the root of a map, a short link's target, inline data.
func (in *inode) block() []byte { return in.raw[0x28 : 0x28+60] }

func (in *inode) is(kind uint32) bool { return in.mode&guest.ModeType == kind }

func (in *inode) inline() bool { return in.flags&flagInline != 0 }

// extra is how much of the inode's fields beyond 128 bytes is in use, bytes.
func (in *inode) extra() int {
	if len(in.raw) < 0x82 {
		return 0
	}
	return int(le.Uint16(in.raw[0x80:]))
}

// has reports whether a field that ends at end is one of the inode's.
func (in *inode) has(end int) bool { return end <= 128+in.extra() }

// inode reads an inode: ErrNotExist when it is not in use.
func (f *FS) inode(ino guest.Ino) (inode, error) {
	in, err := f.rawInode(ino)
	if err == nil && le.Uint16(in.raw[0x1a:]) == 0 {
		err = fmt.Errorf("inode %d: %w", ino, guest.ErrNotExist)
	}
	return in, err
}

// rawInode reads an inode, in use or not.
func (f *FS) rawInode(ino guest.Ino) (inode, error) {
	if ino == 0 || ino > guest.Ino(f.inodes) {
		return inode{}, fmt.Errorf("inode %d: %w", ino, guest.ErrNotExist)
	}
	if c := f.fast.inode(uint32(ino)); c != nil {
		return f.parseInode(uint32(ino), c.raw, c.runs)
	}
	raw, err := f.tableEntry(uint32(ino))
	if err != nil {
		return inode{}, err
	}
	return f.parseInode(uint32(ino), raw, nil)
}

// tableEntry gives an inode's bytes.
func (f *FS) tableEntry(no uint32) ([]byte, error) {
	group, index := int64(no-1)/f.inodesPerGroup, int64(no-1)%f.inodesPerGroup
	d, err := f.desc(group)
	if err != nil {
		return nil, err
	}
	at := index * f.inodeSize
	b, err := f.meta.Block(d.inodeTable+at/f.blockSize, nil)
	if err != nil {
		return nil, err
	}
	return b[at%f.blockSize:][:f.inodeSize], nil
}

// parseInode reads an inode's bytes. Those of one that a fast commit changed have no checksum.
func (f *FS) parseInode(no uint32, raw []byte, runs *[]run) (inode, error) {
	in := inode{no: no, raw: raw, mode: uint32(le.Uint16(raw)), flags: le.Uint32(raw[0x20:]), runs: runs}
	in.size = int64(le.Uint32(raw[4:]))
	if in.is(guest.ModeRegular) || f.incompat&incompatLargeDir != 0 && in.is(guest.ModeDir) {
		in.size |= int64(le.Uint32(raw[0x6c:])) << 32
	}
	in.seed = crc32c(crc32c32(f.seed, no), raw[0x64:0x68])
	if in.mode == 0 && le.Uint16(raw[0x1a:]) == 0 {
		return in, nil // never used: it may not even have a checksum
	}
	if e := in.extra(); e%4 != 0 || 128+e > len(raw) {
		return in, guest.Damaged("inode %d: %d bytes beyond 128", no, e)
	}
	if runs == nil && f.ro&roMetadataCsum != 0 && !in.checksum() {
		return in, guest.Damaged("inode %d: checksum", no)
	}
	if in.size < 0 || in.size > f.blockSize<<32 {
		return in, guest.Damaged("inode %d: %d bytes", no, uint64(in.size))
	}
	return in, nil
}

// checksum verifies the inode's: of 16 bits where there is no room for 32.
func (in *inode) checksum() bool {
	const low, high = 0x7c, 0x82
	sum := crc32c(crc32c(crc32c(in.seed, in.raw[:low]), zeros[:2]), in.raw[low+2:128])
	want := uint32(le.Uint16(in.raw[low:]))
	if len(in.raw) == 128 {
		return sum&0xffff == want
	}
	if !in.has(high + 2) {
		return crc32c(sum, in.raw[128:])&0xffff == want
	}
	sum = crc32c(crc32c(crc32c(sum, in.raw[128:high]), zeros[:2]), in.raw[high+2:])
	return sum == want|uint32(le.Uint16(in.raw[high:]))<<16
}

// Stat implements guest.FS.
func (f *FS) Stat(ino guest.Ino) (guest.Stat, error) {
	in, err := f.inode(ino)
	if err != nil {
		return guest.Stat{}, err
	}
	raw := in.raw
	s := guest.Stat{
		Mode: in.mode, Nlink: uint32(le.Uint16(raw[0x1a:])), Size: in.size, Allocated: f.allocated(&in),
		UID:   uint32(le.Uint16(raw[2:])) | uint32(le.Uint16(raw[0x78:]))<<16,
		GID:   uint32(le.Uint16(raw[0x18:])) | uint32(le.Uint16(raw[0x7a:]))<<16,
		Atime: in.time(8, 0x8c), Ctime: in.time(0xc, 0x84), Mtime: in.time(0x10, 0x88),
	}
	if in.has(0x94) {
		s.Btime = in.time(0x90, 0x94)
	}
	if in.is(guest.ModeChar) || in.is(guest.ModeBlock) {
		s.Major, s.Minor = device(in.block())
	}
	return s, nil
}

// time reads a time whose seconds are at sec, and whose further bits are at extra if the inode has them: two bits of
// seconds, thirty of nanoseconds (ext4 doc, Inode Timestamps).
func (in *inode) time(sec, extra int) time.Time {
	s, ns := int64(int32(le.Uint32(in.raw[sec:]))), int64(0)
	if in.has(extra + 4) {
		more := le.Uint32(in.raw[extra:])
		s += int64(more&3) << 32
		ns = int64(more >> 2)
	}
	return time.Unix(s, ns).UTC()
}

// allocated is i_blocks in bytes (ext4 doc, Index Nodes). Of a file with inline data, Linux adds its size in
// sectors, so that no program takes it for a hole (seen with Linux 6.18).
func (f *FS) allocated(in *inode) int64 {
	n := int64(le.Uint32(in.raw[0x1c:]))
	unit := int64(512)
	if f.ro&roHugeFile != 0 {
		n |= int64(le.Uint16(in.raw[0x74:])) << 32
		if in.flags&flagHuge != 0 {
			unit = f.blockSize
		}
	}
	if in.inline() && in.is(guest.ModeRegular) {
		n += (in.size + 511) / 512
	}
	return n * unit
}

// device reads a device's number: 16 bits in the first word, or 32 in the second, as Linux encodes them (minor and major interleaved).
func device(block []byte) (major, minor uint32) {
	if old := le.Uint32(block); old != 0 {
		return old >> 8 & 0xff, old & 0xff
	}
	dev := le.Uint32(block[4:])
	return dev >> 8 & 0xfff, dev&0xff | dev>>12&0xfff00
}

// Readlink implements guest.FS.
func (f *FS) Readlink(ino guest.Ino) (string, error) {
	in, err := f.inode(ino)
	if err != nil {
		return "", err
	}
	switch {
	case !in.is(guest.ModeLink):
		return "", fmt.Errorf("inode %d: no symbolic link", ino)
	case in.flags&flagEncrypt != 0:
		return "", guest.Unsupported("inode %d: an encrypted link", ino)
	case in.size == 0 || in.size > f.blockSize:
		return "", guest.Damaged("inode %d: a link to %d bytes", ino, in.size)
	}
	target := in.block()
	if !in.short(f) {
		c, err := f.content(&in)
		if err != nil {
			return "", err
		}
		target = make([]byte, in.size)
		if _, err := c.ReadAt(target, 0); err != nil {
			return "", err
		}
	}
	if in.size > int64(len(target)) {
		return "", guest.Damaged("inode %d: a link to %d bytes", ino, in.size)
	}
	target = target[:in.size]
	for i, c := range target {
		if c == 0 {
			return "", guest.Damaged("inode %d: a link to %d of %d bytes", ino, i, in.size)
		}
	}
	return string(target), nil
}

// short reports whether a link's target stands in the inode itself: then it has no blocks besides that of its attributes.
func (in *inode) short(f *FS) bool {
	if in.inline() || in.flags&flagExtents != 0 {
		return false
	}
	n := f.allocated(in)
	if f.xattrBlock(in) != 0 {
		n -= f.blockSize << f.clusterBits
	}
	return n == 0
}
