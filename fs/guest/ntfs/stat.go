package ntfs

import (
	"time"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// File attributes ([MS-FSCC] §2.6, and NTFS doc, "$FILE_NAME", for that of a directory).
const (
	flagHidden     = 0x2
	flagSystem     = 0x4
	flagDirBit     = 0x10
	flagOffline    = 0x1000
	flagReparse    = 0x400
	flagRecallOpen = 0x40000
	flagRecallData = 0x400000
	flagDirectory  = 0x10000000
)

// timeOf makes a time of 100 ns since 1601.
func timeOf(t int64) time.Time {
	const epoch = 11644473600 // seconds from 1601 to 1970
	sec, rest := t/1e7, t%1e7
	return time.Unix(sec-epoch, rest*100).UTC()
}

// Stat implements guest.FS. As ntfs-3g without options, everybody may do everything with all files, and directories have one link.
func (f *FS) Stat(ino guest.Ino) (guest.Stat, error) {
	i, err := f.inode(ino)
	if err != nil {
		return guest.Stat{}, err
	}
	n, err := f.nature(i)
	if err != nil {
		return guest.Stat{}, err
	}
	st := guest.Stat{Mode: n.mode | 0o777, Nlink: uint32(i.links), Major: n.major, Minor: n.minor,
		Btime: timeOf(i.std.born), Mtime: timeOf(i.std.modified), Ctime: timeOf(i.std.changed), Atime: timeOf(i.std.read)}
	a := i.find(attrData, "")
	if i.dir {
		st.Nlink, a = 1, i.find(attrIndex, "$I30")
	}
	if a != nil && n.mode != guest.ModeDir || a != nil && !a.resident {
		st.Size, st.Allocated = a.size, (a.packed+511)&^511
		if a.resident {
			st.Allocated = (a.allocated + 511) &^ 511
		}
	}
	if w := i.find(attrData, wofStream); w != nil && n.tag == tagWOF {
		st.Allocated += (max(w.packed, w.allocated) + 511) &^ 511
	}
	if n.mode == guest.ModeLink {
		st.Size = int64(len(n.target))
	}
	return st, f.wsl(i, &st)
}

// nature is what a file is to Linux.
type nature struct {
	mode         uint32 // type
	tag          uint32 // of a reparse point
	target       string // of a link
	major, minor uint32 // of a device
}

func (f *FS) nature(i *inode) (nature, error) {
	n := nature{mode: guest.ModeRegular}
	if i.dir {
		n.mode = guest.ModeDir
	}
	tag, data, err := f.reparse(i)
	if err != nil {
		return n, err
	}
	n.tag = tag
	switch tag {
	case 0:
		if !i.dir && i.std.flags&(flagSystem|flagHidden) == flagSystem {
			err = f.interix(i, &n)
		}
	case tagSymlink, tagMountPoint, tagLXSymlink:
		n.mode = guest.ModeLink
		n.target, err = f.target(i, tag, data)
	case tagLXFIFO:
		n.mode = guest.ModeFIFO
	case tagLXChar:
		n.mode = guest.ModeChar
	case tagLXBlock:
		n.mode = guest.ModeBlock
	case tagSocket:
		n.mode = guest.ModeSocket
	}
	return n, err
}

// maxInterix is the largest content of a special file of Interix: a link's target of 4096 units.
const maxInterix = 8 + 2*4096

// interix looks whether a file with the system attribute is a special file of Interix (Services for UNIX), which is what ntfs-3g makes as well: an
// empty one is a FIFO, one of a byte a socket, others start with a magic. Those of Windows itself are hidden.
func (f *FS) interix(i *inode, n *nature) error {
	a := i.find(attrData, "")
	if a == nil || a.size > maxInterix || !a.plain() {
		return nil
	}
	switch a.size {
	case 0:
		n.mode = guest.ModeFIFO
		return nil
	case 1:
		n.mode = guest.ModeSocket
		return nil
	}
	b, err := f.stream(a).all(maxInterix)
	if err != nil || len(b) < 8 {
		return err
	}
	switch magic := string(b[:8]); {
	case magic == "IntxLNK\x01":
		n.mode, n.target = guest.ModeLink, text(b[8:])
	case magic == "IntxCHR\x00" && len(b) == 24:
		n.mode = guest.ModeChar
	case magic == "IntxBLK\x00" && len(b) == 24:
		n.mode = guest.ModeBlock
	}
	if n.mode == guest.ModeChar || n.mode == guest.ModeBlock {
		n.major, n.minor = uint32(le.Uint64(b[8:])), uint32(le.Uint64(b[16:]))
	}
	return nil
}

// maxEA is what extended attributes of OS/2 may take, bytes.
const maxEA = 64 << 10

// wsl takes owner, mode and device from where WSL notes them, attributes of OS/2: $LXUID, $LXGID, $LXMOD, $LXDEV
// (learn.microsoft.com/windows/wsl/file-permissions).
func (f *FS) wsl(i *inode, st *guest.Stat) error {
	a := i.find(attrEA, "")
	if a == nil {
		return nil
	}
	b, err := f.stream(a).all(maxEA)
	if err != nil {
		return err
	}
	return eachEA(b, func(name string, value []byte) {
		switch {
		case name == "$LXUID" && len(value) == 4:
			st.UID = le.Uint32(value)
		case name == "$LXGID" && len(value) == 4:
			st.GID = le.Uint32(value)
		case name == "$LXMOD" && len(value) == 4:
			st.Mode = st.Mode&guest.ModeType | le.Uint32(value)&0o7777
		case name == "$LXDEV" && len(value) == 8:
			if t := st.Mode & guest.ModeType; t == guest.ModeChar || t == guest.ModeBlock {
				st.Major, st.Minor = le.Uint32(value), le.Uint32(value[4:])
			}
		}
	})
}

// eachEA gives the entries of $EA ([MS-FSCC] §2.4.16, FILE_FULL_EA_INFORMATION): offset of the next (4), flags (1), length of the name (1) and of the value
// (2), the name with a zero, the value.
func eachEA(b []byte, yield func(name string, value []byte)) error {
	for len(b) > 0 {
		if len(b) < 8 {
			return guest.Damaged("extended attributes: %d bytes left", len(b))
		}
		next, name, value := int64(le.Uint32(b)), int(b[5]), int(le.Uint16(b[6:]))
		if 9+name+value > len(b) || next != 0 && next < int64(9+name+value) || next > int64(len(b)) {
			return guest.Damaged("extended attributes: an entry of %d bytes", next)
		}
		yield(string(b[8:8+name]), b[9+name:9+name+value])
		if next == 0 {
			return nil
		}
		b = b[next:]
	}
	return nil
}
