package fat

import (
	"time"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/cluster"
)

// raw is an entry of a directory.
type raw [cluster.SlotSize]byte

func (e raw) dir() bool   { return e[11]&attrDir != 0 }
func (e raw) size() int64 { return int64(le.Uint32(e[28:])) }

func (e raw) kind() uint32 {
	if e.dir() {
		return guest.ModeDir
	}
	return guest.ModeRegular
}

// first is the first cluster. Only FAT32 has the upper half.
func (f *FS) first(e raw) uint32 {
	c := uint32(le.Uint16(e[26:]))
	if f.geo.bits == 32 {
		c |= uint32(le.Uint16(e[20:])) << 16
	}
	return c
}

// entry reads the entry that an inode number names.
func (f *FS) entry(ino guest.Ino) (e raw, err error) {
	at := int64(ino) * cluster.SlotSize
	inRoot := at >= f.geo.rootAt && at < f.geo.rootAt+f.geo.rootLen
	if ino > 1<<50 || !inRoot && (at < f.geo.data || at >= f.geo.data+f.geo.clusters*f.geo.cluster) {
		return e, guest.ErrNotExist
	}
	if err := guest.ReadFull(f.cache, e[:], at); err != nil {
		return e, err
	}
	if e[0] == 0 || e[0] == deleted || e[11]&attrLabel != 0 {
		return e, guest.ErrNotExist
	}
	return e, nil
}

// Stat implements guest.FS.
func (f *FS) Stat(ino guest.Ino) (guest.Stat, error) {
	st := guest.Stat{Nlink: 1}
	if ino == rootIno {
		st.Mode = guest.ModeDir | 0o755
		st.Mtime = time.Unix(0, 0).UTC()
		st.Atime, st.Ctime, st.Btime = st.Mtime, st.Mtime, st.Mtime
		return st, f.statDir(ino, &st)
	}
	e, err := f.entry(ino)
	if err != nil {
		return guest.Stat{}, err
	}
	st.Mode = e.kind() | 0o755
	st.Mtime = cluster.Time(le.Uint16(e[24:]), le.Uint16(e[22:]), 0)
	st.Ctime = st.Mtime
	st.Atime = cluster.Time(le.Uint16(e[18:]), 0, 0)
	st.Btime = cluster.Time(le.Uint16(e[16:]), le.Uint16(e[14:]), e[13])
	if e.dir() {
		return st, f.statDir(ino, &st)
	}
	if e[11]&attrReadOnly != 0 {
		st.Mode &^= 0o222
	}
	st.Size = e.size()
	st.Allocated = f.rounded(st.Size)
	return st, nil
}

func (f *FS) statDir(ino guest.Ino, st *guest.Stat) error {
	d, err := f.directory(ino)
	if err != nil {
		return err
	}
	st.Nlink = 2 + d.index.Dirs
	st.Size, st.Allocated = d.size, f.rounded(d.size)
	return nil
}

// rounded is a size as whole clusters.
func (f *FS) rounded(n int64) int64 { return (n + f.geo.cluster - 1) &^ (f.geo.cluster - 1) }
