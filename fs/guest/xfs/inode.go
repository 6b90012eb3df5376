package xfs

import (
	"math"
	"time"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// nullIno is the number of no inode.
const nullIno = math.MaxUint64

// Forms of a fork (XFSDS, On-disk Inode: di_format).
const (
	formDev = iota
	formLocal
	formExtents
	formTree
	formList = 0xff // ours: the replay has changed it
)

// Bits of di_flags and di_flags2.
const (
	flagRealtime = 1 << 0

	flag2Reflink = 1 << 1
	flag2Bigtime = 1 << 3
	flag2Nrext64 = 1 << 4
)

// Where the inode's fields lie that the log needs, too (XFSDS, Inode Core).
const (
	coreV2, coreV3 = 96, 176 // bytes of the core that are logged
	literalV2      = 100     // where the forks begin; coreV3 in version 3
	inodeCRC       = 100
	inodeLSN       = 112
	inodeFlags2    = 120
)

// An inode, as its bytes say.
type inode struct {
	num       uint64
	raw       []byte
	mode      uint16
	format    uint8
	nlink     uint32
	size      int64 // bytes
	nblocks   uint64
	flags     uint16
	flags2    uint64
	data, xat fork
}

// inode reads inode num. guest.ErrNotExist when it is free.
func (fs *FS) inode(ino guest.Ino) (inode, error) {
	num := uint64(ino)
	raw, err := fs.rawInode(num)
	if err != nil {
		return inode{}, err
	}
	n := inode{num: num, raw: raw, mode: be.Uint16(raw[2:]), format: raw[5], size: int64(be.Uint64(raw[56:])),
		nblocks: be.Uint64(raw[64:]), flags: be.Uint16(raw[90:]), nlink: be.Uint32(raw[16:])}
	version := raw[4]
	literal := literalV2
	switch {
	case fs.sb.v5 && version == 3:
		n.flags2, literal = be.Uint64(raw[inodeFlags2:]), coreV3
	case fs.sb.v5 || version < 1 || version > 2:
		return inode{}, guest.Damaged("inode %d: version %d", num, version)
	case version == 1:
		n.nlink = uint32(be.Uint16(raw[6:]))
	}
	if n.mode == 0 || n.nlink == 0 {
		return inode{}, guest.ErrNotExist
	}
	split := len(raw)
	if raw[82] != 0 {
		split = literal + int(raw[82])*8
	}
	if n.size < 0 || split > len(raw) {
		return inode{}, guest.Damaged("inode %d: sizes", num)
	}
	n.data = fork{ino: num, form: raw[5], area: raw[literal:split]}
	n.xat = fork{ino: num, form: raw[83], area: raw[split:]}
	n.data.count, n.xat.count = uint64(be.Uint32(raw[76:])), uint64(be.Uint16(raw[80:]))
	if n.flags2&flag2Nrext64 != 0 {
		n.data.count, n.xat.count = be.Uint64(raw[24:]), uint64(be.Uint32(raw[76:]))
	}
	if p := fs.log.patched[num]; p != nil {
		n.data.form, n.data.list = formList, p.spans
		n.nblocks += uint64(p.added)
	}
	return n, nil
}

// rawInode gives the verified bytes of an inode.
func (fs *FS) rawInode(num uint64) ([]byte, error) {
	fsb, at := fs.sb.inodePlace(num)
	if _, err := fs.sb.offset(fsb, 1); err != nil {
		return nil, guest.Damaged("inode %d, outside of the file system", num)
	}
	b, err := fs.block(bufKey{kind: kindInodes, block: fsb}, nil)
	if err != nil {
		return nil, err
	}
	raw := b[at : at+fs.sb.inodeSize]
	switch {
	case be.Uint16(raw) != 0x494e:
		return nil, guest.Damaged("inode %d: there is none", num)
	case !fs.sb.v5:
		return raw, nil
	case !summed(raw, inodeCRC):
		return nil, guest.Damaged("inode %d: the checksum", num)
	case be.Uint64(raw[152:]) != num || [16]byte(raw[160:176]) != fs.sb.meta:
		return nil, guest.Damaged("inode %d: it is another one", num)
	}
	return raw, nil
}

// inodePlace is the block of an inode, and the byte in it (XFSDS, Inode Numbers).
func (s *super) inodePlace(num uint64) (fsb uint64, at int64) {
	return num >> s.inopbLog, int64(num&(1<<s.inopbLog-1)) * s.inodeSize
}

// Stat implements guest.FS.
func (fs *FS) Stat(ino guest.Ino) (guest.Stat, error) {
	n, err := fs.inode(ino)
	if err != nil {
		return guest.Stat{}, err
	}
	st := guest.Stat{Mode: uint32(n.mode), Nlink: n.nlink, UID: be.Uint32(n.raw[8:]), GID: be.Uint32(n.raw[12:]), Size: n.size,
		Allocated: int64(min(n.nblocks, math.MaxInt64>>fs.sb.blockLog) << fs.sb.blockLog),
		Atime:     n.time(32), Mtime: n.time(40), Ctime: n.time(48)}
	if fs.sb.v5 {
		st.Btime = n.time(144)
	}
	if t := st.Mode & guest.ModeType; (t == guest.ModeChar || t == guest.ModeBlock) && n.format == formDev {
		// 14 bits of major, 18 of minor number; measured (Linux 6.18).
		dev := be.Uint32(n.data.area)
		st.Major, st.Minor = dev>>18&0x3fff, dev&0x3ffff
	}
	return st, nil
}

// time reads the time at off: seconds and nanoseconds (XFSDS, Inode Core), or nanoseconds since 1901-12-13 20:45:52.
func (n *inode) time(off int) time.Time {
	if n.flags2&flag2Bigtime != 0 {
		ns := be.Uint64(n.raw[off:])
		return time.Unix(int64(ns/1e9)-1<<31, int64(ns%1e9)).UTC()
	}
	return time.Unix(int64(int32(be.Uint32(n.raw[off:]))), int64(be.Uint32(n.raw[off+4:]))).UTC()
}

func (n *inode) kind() uint32 { return uint32(n.mode) & guest.ModeType }
