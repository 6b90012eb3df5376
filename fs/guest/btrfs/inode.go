package btrfs

import (
	"time"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

const inodeSize = 160

// Flags of an inode.
const (
	flagNoSum = 1 << 0
	flagNoCow = 1 << 1
)

// An inode is an INODE_ITEM.
type inode struct {
	p      place
	size   int64
	nbytes uint64
	mode   uint32
	flags  uint64
	b      []byte
}

// inode reads an inode that is in use. That of an empty folder is the one of the directory that it is in.
func (fs *FS) inode(ino guest.Ino) (inode, error) {
	p, err := fs.place(ino)
	if err != nil {
		return inode{}, err
	}
	return p.inode()
}

func (p place) inode() (inode, error) {
	b, ok, err := p.get(key{p.ino, kindInode, 0})
	if err != nil {
		return inode{}, err
	}
	if !ok {
		return inode{}, guest.ErrNotExist
	}
	return parseInode(p, b)
}

func parseInode(p place, b []byte) (inode, error) {
	if len(b) < inodeSize {
		return inode{}, guest.Damaged("inode %d of %d bytes", p.ino, len(b))
	}
	n := inode{p: p, size: int64(le.Uint64(b[16:])), nbytes: le.Uint64(b[24:]), mode: le.Uint32(b[52:]), flags: le.Uint64(b[64:]), b: b}
	if n.size < 0 {
		return n, guest.Damaged("inode %d: its size", p.ino)
	}
	return n, nil
}

func (n *inode) kind() uint32 { return n.mode & guest.ModeType }

func timeAt(b []byte) time.Time { return time.Unix(int64(le.Uint64(b)), int64(le.Uint32(b[8:]))).UTC() }

// Stat implements guest.FS.
func (fs *FS) Stat(ino guest.Ino) (guest.Stat, error) {
	n, err := fs.inode(ino)
	if err != nil {
		return guest.Stat{}, err
	}
	if n.nbytes > 1<<62 { // in a log anything may stand there
		return guest.Stat{}, guest.Damaged("inode %d: %d bytes", n.p.ino, n.nbytes)
	}
	st := guest.Stat{
		Mode: n.mode, Nlink: le.Uint32(n.b[40:]), UID: le.Uint32(n.b[44:]), GID: le.Uint32(n.b[48:]), Size: n.size,
		Atime: timeAt(n.b[112:]), Ctime: timeAt(n.b[124:]), Mtime: timeAt(n.b[136:]), Btime: timeAt(n.b[148:]),
	}
	// st_blocks counts whole sectors.
	unit := int64(fs.sb.sector)
	st.Allocated = (int64(n.nbytes) + unit - 1) / unit * unit
	if k := n.kind(); k == guest.ModeChar || k == guest.ModeBlock {
		dev := le.Uint64(n.b[56:]) // as the kernel's own dev_t: 20 bits are the minor number
		st.Major, st.Minor = uint32(dev>>20), uint32(dev&0xfffff)
	}
	if n.p.empty {
		st = emptyStat(st)
	}
	return st, nil
}

// emptyStat is what Linux 6.18 shows of an empty folder in place of a subvolume, in a directory with st; it changes at the time when somebody looks first,
// for which the directory's time stands here.
func emptyStat(st guest.Stat) guest.Stat {
	return guest.Stat{Mode: guest.ModeDir | 0o755, Nlink: 1, UID: st.UID, GID: st.GID, Mtime: st.Mtime, Atime: st.Atime, Ctime: st.Mtime}
}

// Readlink implements guest.FS. The target is content like a file's.
func (fs *FS) Readlink(ino guest.Ino) (string, error) {
	n, err := fs.inode(ino)
	switch {
	case err != nil:
		return "", err
	case n.kind() != guest.ModeLink || n.p.empty:
		return "", guest.Unsupported("inode %d: reading a link that is none", n.p.ino)
	case n.size > 65536:
		return "", guest.Damaged("inode %d: a link of %d bytes", n.p.ino, n.size)
	}
	b := make([]byte, n.size)
	f := file{fs: fs, n: n}
	if _, err := f.ReadAt(b, 0); err != nil && int64(len(b)) > 0 {
		return "", err
	}
	return string(b), nil
}
