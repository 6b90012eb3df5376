package ntfs

import (
	"cmp"
	"errors"
	"io"
	"math/bits"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

const (
	maxXattr  = 64 << 10 // the largest value that Linux has for an extended attribute (XATTR_SIZE_MAX), bytes
	maxXattrs = 8 << 20  // of all streams of a file that are given as attributes
)

// Xattrs implements guest.FS.
func (f *FS) Xattrs(ino guest.Ino) ([]guest.Xattr, error) {
	i, err := f.inode(ino)
	if err != nil {
		return nil, err
	}
	var list []guest.Xattr
	add := func(name string, value []byte) { list = append(list, guest.Xattr{Name: name, Value: value}) }
	acl, err := f.descriptor(i)
	if err != nil {
		return nil, err
	}
	if acl != nil {
		add("system.ntfs_acl", acl)
	}
	flags := i.std.flags
	if i.dir {
		flags |= flagDirBit
	}
	add("system.ntfs_attrib", le.AppendUint32(nil, flags))
	var times []byte
	for _, t := range []int64{i.std.born, i.std.modified, i.std.read, i.std.changed} {
		times = le.AppendUint64(times, uint64(t))
	}
	add("system.ntfs_times", times)
	if err := f.attributeXattrs(i, add); err != nil {
		return nil, err
	}
	if err := f.streamXattrs(i, ino, add); err != nil {
		return nil, err
	}
	slices.SortFunc(list, func(a, b guest.Xattr) int { return cmp.Compare(a.Name, b.Name) })
	return list, nil
}

// attributeXattrs gives those that are attributes of NTFS as they are.
func (f *FS) attributeXattrs(i *inode, add func(string, []byte)) error {
	for _, x := range []struct {
		name  string
		kind  uint32
		limit int64
	}{{"system.ntfs_ea", attrEA, maxEA}, {"system.ntfs_object_id", attrObjectID, 256}, {"system.ntfs_reparse_data", attrReparse, maxReparse + 64}} {
		a := i.find(x.kind, "")
		if a == nil {
			continue
		}
		value, err := f.stream(a).all(x.limit)
		if err != nil {
			return err
		}
		add(x.name, value)
	}
	return f.names(i, func(n fileName) bool {
		switch {
		case n.space() == dosName:
			add("system.ntfs_dos_name", []byte(text(n.units())))
		case n.space() == bothName && i.number != recordRoot: // a short name but for its case
			add("system.ntfs_dos_name", []byte(text(f.upcase.upper(n.units()))))
		default:
			return true
		}
		return false
	})
}

// streamXattrs gives the streams of regular files and directories, which are all that Linux lets have attributes of users.
func (f *FS) streamXattrs(i *inode, ino guest.Ino, add func(string, []byte)) error {
	names, err := f.Streams(ino)
	if err != nil || len(names) == 0 {
		return err
	}
	if n, err := f.nature(i); err != nil || n.mode != guest.ModeRegular && n.mode != guest.ModeDir {
		return err
	}
	room := int64(maxXattrs)
	for _, name := range names {
		a := i.find(attrData, name)
		if a.size > min(room, maxXattr) || a.flags&encrypted != 0 {
			continue
		}
		room -= a.size
		content, err := f.file(a)
		if err != nil {
			return err
		}
		value := make([]byte, a.size)
		if _, err := content.ReadAt(value, 0); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		add(xattrName(name), value)
	}
	return nil
}

// xattrName is the attribute that a stream is. Those of other classes than user's ntfs-3g stores in streams with a prefix.
func xattrName(stream string) string {
	if rest, ok := strings.CutPrefix(stream, "ntfs-3g."); ok {
		if strings.HasPrefix(rest, "security.") || strings.HasPrefix(rest, "trusted.") {
			return rest
		}
	}
	return "user." + stream
}

// descriptor gives the security descriptor of a file ([MS-DTYP] §2.4.6): its own, or that of its id in $Secure; nil when it has none.
func (f *FS) descriptor(i *inode) ([]byte, error) {
	if a := i.find(attrSecurity, ""); a != nil {
		return f.stream(a).all(maxXattr)
	}
	id := i.std.security
	if id == 0 || f.secure == nil {
		return nil, nil
	}
	if b, ok := f.acls.Get(id); ok {
		return b, nil
	}
	b, err := f.shared(id)
	if err == nil {
		f.acls.Put(id, b, int64(len(b))+128)
	}
	return b, err
}

// sdsHeader stands before each descriptor in $SDS, and is the data of its entry in $SII (NTFS doc, "$Secure"): hash (4), id (4), offset in $SDS (8), length (4).
const sdsHeader = 20

// shared gives a descriptor of $Secure.
func (f *FS) shared(id uint32) ([]byte, error) {
	x, err := f.index(f.secure, "$SII", func(a, b []byte) int {
		if len(a) != 4 || len(b) != 4 {
			return 0
		}
		return cmp.Compare(le.Uint32(a), le.Uint32(b))
	})
	if err != nil {
		return nil, err
	}
	e, err := x.lookup(le.AppendUint32(nil, id))
	if err != nil {
		return nil, guest.Damaged("$Secure: descriptor %#x: %v", id, err)
	}
	off := int(le.Uint16(e.head))
	if len(e.key) != 4 || off < 0x14 || off+sdsHeader > len(e.head) {
		return nil, guest.Damaged("$Secure: the entry of descriptor %#x", id)
	}
	return f.sds(id, e.head[off:off+sdsHeader])
}

// sds reads a descriptor, or the copy of it: $SDS has each 256 KiB twice.
func (f *FS) sds(id uint32, head []byte) ([]byte, error) {
	a := f.secure.find(attrData, "$SDS")
	off, n := int64(le.Uint64(head[8:])), int64(le.Uint32(head[16:]))
	if a == nil || n < sdsHeader || n > maxXattr || off < 0 {
		return nil, guest.Damaged("$Secure: descriptor %#x of %d bytes", id, n)
	}
	err := guest.Damaged("$Secure: descriptor %#x does not match its hash", id)
	b := make([]byte, n)
	for _, at := range []int64{off, off + 256<<10} {
		if at > a.size-n {
			continue
		}
		if readErr := f.stream(a).read(b, at); readErr != nil {
			err = readErr
			continue
		}
		if string(b[:sdsHeader]) == string(head) && le.Uint32(head[4:]) == id && sdHash(b[sdsHeader:]) == le.Uint32(head) {
			return b[sdsHeader:], nil
		}
	}
	return nil, err
}

// sdHash is the hash of a descriptor (NTFS doc, "$Secure").
func sdHash(b []byte) uint32 {
	var h uint32
	for ; len(b) >= 4; b = b[4:] {
		h = le.Uint32(b) + bits.RotateLeft32(h, 3)
	}
	return h
}
