package xfs

import (
	"cmp"
	"encoding/binary"
	"slices"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// Flags of an attribute (XFSDS, Extended Attributes); parent pointers are newer than the book.
const (
	attrLocal      = 1 << 0
	attrRoot       = 1 << 1
	attrSecure     = 1 << 2
	attrParent     = 1 << 3
	attrIncomplete = 1 << 7
)

const (
	maxValue  = 64 << 10 // bytes of a value, as Linux limits it
	maxXattrs = 64 << 20 // bytes of all values of an inode that are put together
)

// xattrs gathers the attributes of an inode.
type xattrs struct {
	fs   *FS
	n    *inode
	list []guest.Xattr
	size int
}

// Xattrs implements guest.FS.
func (fs *FS) Xattrs(ino guest.Ino) ([]guest.Xattr, error) {
	n, err := fs.inode(ino)
	if err != nil {
		return nil, err
	}
	if fs.log.unfinished[n.num]&unfinishedAttr != 0 {
		return nil, guest.Unsupported("inode %d: the log holds an unfinished change of its attributes", n.num)
	}
	x := xattrs{fs: fs, n: &n}
	switch {
	case len(n.xat.area) == 0:
	case n.xat.form == formLocal:
		err = x.short()
	case n.xat.form == formExtents && n.xat.count == 0:
	default:
		err = x.leaves()
	}
	slices.SortStableFunc(x.list, func(a, b guest.Xattr) int { return cmp.Compare(a.Name, b.Name) })
	return x.list, err
}

// add takes an attribute in, as Linux shows it.
func (x *xattrs) add(flags uint8, name, value []byte) error {
	if x.size += len(name) + len(value) + 64; x.size > maxXattrs {
		return guest.Unsupported("inode %d: more than %d bytes of attributes", x.n.num, maxXattrs)
	}
	prefix := "user."
	switch {
	case flags&(attrIncomplete|attrParent) != 0:
		return nil
	case flags&attrRoot != 0:
		prefix = "trusted."
		// Access control lists have names of their own as well (measured, Linux 6.18: both are listed).
		if a := aclName(string(name)); a != "" {
			if acl, ok := posixACL(value); ok {
				x.list = append(x.list, guest.Xattr{Name: a, Value: acl})
			}
		}
	case flags&attrSecure != 0:
		prefix = "security."
	}
	x.list = append(x.list, guest.Xattr{Name: prefix + string(name), Value: slices.Clone(value)})
	return nil
}

func aclName(name string) string {
	switch name {
	case "SGI_ACL_FILE":
		return "system.posix_acl_access"
	case "SGI_ACL_DEFAULT":
		return "system.posix_acl_default"
	}
	return ""
}

// posixACL makes what getxattr(2) gives (linux/posix_acl_xattr.h: version 2, entries of tag, permissions, id) of a
// list on the disk: a count, and entries of tag (4 bytes), id (4), permissions (2) and 2 unused, big-endian.
func posixACL(b []byte) ([]byte, bool) {
	const undefined = 1<<32 - 1
	if len(b) < 4 || uint64(be.Uint32(b))*12 > uint64(len(b)-4) {
		return nil, false
	}
	out := []byte{2, 0, 0, 0}
	for i := range int(be.Uint32(b)) {
		e := b[4+i*12:]
		tag, id := be.Uint32(e), be.Uint32(e[4:])
		if tag != 0x02 && tag != 0x08 { // a named user, a named group
			id = undefined
		}
		out = binary.LittleEndian.AppendUint16(out, uint16(tag))
		out = binary.LittleEndian.AppendUint16(out, be.Uint16(e[8:]))
		out = binary.LittleEndian.AppendUint32(out, id)
	}
	return out, true
}

func (x *xattrs) bad() error { return guest.Damaged("inode %d: its attributes", x.n.num) }

// short reads attributes inside of the inode: the size, the count, one unused byte, entries.
func (x *xattrs) short() error {
	b := x.n.xat.area
	if len(b) < 4 || int(be.Uint16(b)) > len(b) || be.Uint16(b) < 4 {
		return x.bad()
	}
	count := int(b[2])
	b = b[4:be.Uint16(b)]
	for range count {
		if len(b) < 3 {
			return x.bad()
		}
		name, end := 3+int(b[0]), 3+int(b[0])+int(b[1])
		if end > len(b) || b[0] == 0 {
			return x.bad()
		}
		if err := x.add(b[2], b[3:name], b[name:end]); err != nil {
			return err
		}
		b = b[end:]
	}
	return nil
}

// leaves reads attributes outside of the inode, leaf by leaf.
func (x *xattrs) leaves() error {
	l, err := x.fs.leafFor(x.n, &x.n.xat, 0, 0)
	for limit := x.fs.blocks(x.n); err == nil; limit-- {
		if err := x.leaf(l); err != nil || l.forw == 0 {
			return err
		}
		if limit == 0 {
			return guest.Damaged("inode %d: leaves of attributes in a circle", x.n.num)
		}
		l, err = x.fs.leafAt(x.n, &x.n.xat, uint64(l.forw))
	}
	return err
}

// leaf reads the attributes of a leaf. Its entries are a hash, where in the block the name is, flags and an unused byte.
func (x *xattrs) leaf(l leaf) error {
	if m := be.Uint16(l.block[8:]); m != magicAttr && m != magicAttrv5 {
		return x.bad()
	}
	for e := l.entries; len(e) > 0; e = e[8:] {
		at, flags := int(be.Uint16(e[4:])), e[6]
		if flags&(attrIncomplete|attrParent) != 0 {
			continue
		}
		if at+4 > len(l.block) {
			return x.bad()
		}
		if err := x.value(l.block[at:], flags); err != nil {
			return err
		}
	}
	return nil
}

// value reads a name and its value: beside it, or in blocks of its own.
func (x *xattrs) value(b []byte, flags uint8) error {
	if flags&attrLocal != 0 {
		size, name := int(be.Uint16(b)), 3+int(b[2])
		if b[2] == 0 || name+size > len(b) {
			return x.bad()
		}
		return x.add(flags, b[3:name], b[name:name+size])
	}
	if len(b) < 10 {
		return x.bad()
	}
	block, size, name := be.Uint32(b), be.Uint32(b[4:]), 9+int(b[8])
	if b[8] == 0 || name > len(b) || size > maxValue {
		return x.bad()
	}
	value, err := x.remote(uint64(block), int(size))
	if err != nil {
		return err
	}
	return x.add(flags, b[9:name], value)
}

var remoteStamp = stamp{crc: 12, block: 40, lsn: 48, uuid: 16, owner: 32}

const remoteHead = 56 // bytes of the header of a remote value or link in version 5

// remote reads a value of size bytes that begins at a block of the attribute fork. In version 5 each block of it has a
// header: magic number, offset, bytes, checksum … (XFSDS, Remote Attribute Values).
func (x *xattrs) remote(block uint64, size int) ([]byte, error) {
	value := make([]byte, 0, size)
	fs := x.fs
	b := make([]byte, fs.sb.blockSize)
	for ; len(value) < size; block++ {
		s, err := fs.find(&x.n.xat, block)
		if err != nil {
			return nil, err
		}
		if s.n == 0 || s.off > block || s.unwritten {
			return nil, x.bad()
		}
		off, err := fs.sb.offset(s.block+block-s.off, 1)
		if err != nil {
			return nil, err
		}
		if err := guest.ReadFull(fs.dev, b, off); err != nil {
			return nil, err
		}
		data := b
		if fs.sb.v5 {
			if data, err = fs.remoteData(x.n, b, "XARM", len(value), off); err != nil {
				return nil, err
			}
		}
		value = append(value, data[:min(len(data), size-len(value))]...)
	}
	return value, nil
}

// remoteData verifies the header of a remote block that holds what follows the first done bytes, and gives what it holds.
func (fs *FS) remoteData(n *inode, b []byte, magic string, done int, off int64) ([]byte, error) {
	if string(b[:4]) != magic || be.Uint32(b[4:]) != uint32(done) || be.Uint32(b[8:]) == 0 || be.Uint32(b[8:]) > uint32(len(b)-remoteHead) {
		return nil, guest.Damaged("inode %d: the header of a value or link at %d", n.num, off)
	}
	if err := fs.verify("a value or link", b, remoteStamp, off, n.num, fs.log.moved[n.num]); err != nil {
		return nil, err
	}
	return b[remoteHead : remoteHead+be.Uint32(b[8:])], nil
}
