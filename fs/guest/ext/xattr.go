package ext

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

const (
	xattrMagic = 0xEA020000
	// maxValue is the longest value that Linux gives to anybody (xattr(7)).
	maxValue = 64 << 10
	// maxValues bounds all values of an inode.
	maxValues = 16 << 20
)

// Name indices with a meaning of their own: ext4 doc, Attribute Name Indices.
const (
	indexACL        = 2
	indexDefaultACL = 3
	indexSystem     = 7
)

// prefixes begin the names of what Linux lists. What it keeps to itself is not in it: inline data, encryption contexts, Lustre's,
// and rich ACLs.
var prefixes = map[byte]string{1: "user.", indexACL: "system.posix_acl_access", indexDefaultACL: "system.posix_acl_default",
	4: "trusted.", 6: "security.", 10: "gnu."}

// An attr is an attribute as the disk has it.
type attr struct {
	index byte
	name  []byte
	value []byte // nil when it is in an inode of its own
	inode uint32
	size  int64
}

// parseAttrs calls fn for each attribute in b, whose entries start at first; values are found from base on. It reports
// whether b was in order.
func parseAttrs(b []byte, first, base int, fn func(attr) bool) bool {
	for at := first; ; {
		if at+4 > len(b) {
			return false
		}
		if le.Uint32(b[at:]) == 0 {
			return true
		}
		if at+16 > len(b) || at+16+int(b[at]) > len(b) {
			return false
		}
		e := b[at:]
		a := attr{index: e[1], name: e[16 : 16+int(e[0])], inode: le.Uint32(e[4:]), size: int64(le.Uint32(e[8:]))}
		if a.inode == 0 && a.size > 0 {
			from := int64(base) + int64(le.Uint16(e[2:]))
			if from+a.size > int64(len(b)) {
				return false
			}
			a.value = b[from : from+a.size]
		}
		if !fn(a) {
			return true
		}
		at += (16 + int(e[0]) + 3) &^ 3
	}
}

// attrs calls fn for all attributes of an inode: those in the inode, then those in its block.
func (f *FS) attrs(in *inode, fn func(attr) bool) error {
	more := true
	visit := func(a attr) bool { more = fn(a); return more }
	start := 128 + in.extra()
	if len(in.raw) > 128 && start+4 <= len(in.raw) && le.Uint32(in.raw[start:]) == xattrMagic {
		body := in.raw[start+4:]
		if !parseAttrs(body, 0, 0, visit) {
			return guest.Damaged("inode %d: attributes", in.no)
		}
	}
	block := f.xattrBlock(in)
	if block == 0 || !more {
		return nil
	}
	b, err := f.readXattrBlock(block)
	if err == nil && !parseAttrs(b, 32, 0, visit) {
		err = guest.Damaged("attributes in block %d", block)
	}
	if err != nil {
		return fmt.Errorf("inode %d: %w", in.no, err)
	}
	return nil
}

// xattrBlock is the block of an inode's attributes, 0 without one.
func (f *FS) xattrBlock(in *inode) int64 {
	n := int64(le.Uint32(in.raw[0x68:]))
	if f.incompat&incompat64bit != 0 {
		n |= int64(le.Uint16(in.raw[0x76:])) << 32
	}
	return n
}

func (f *FS) readXattrBlock(block int64) ([]byte, error) {
	b, err := f.meta.Block(block, nil)
	if err != nil {
		return nil, err
	}
	if le.Uint32(b) != xattrMagic {
		return nil, guest.Damaged("attributes in block %d", block)
	}
	if f.ro&roMetadataCsum != 0 {
		var n [8]byte
		le.PutUint64(n[:], uint64(block))
		sum := crc32c(crc32c(crc32c(f.seed, n[:]), b[:16]), zeros[:])
		if crc32c(sum, b[20:]) != le.Uint32(b[16:]) {
			return nil, guest.Damaged("checksum of the attributes in block %d", block)
		}
	}
	return b, nil
}

// Xattrs implements guest.FS.
func (f *FS) Xattrs(ino guest.Ino) ([]guest.Xattr, error) {
	in, err := f.inode(ino)
	if err != nil {
		return nil, err
	}
	var list []guest.Xattr
	var bad error
	room := int64(maxValues)
	err = f.attrs(&in, func(a attr) bool {
		prefix, ok := prefixes[a.index]
		if !ok {
			return true
		}
		if room -= a.size; room < 0 {
			bad = guest.Unsupported("inode %d: more than %d bytes of attributes", ino, maxValues)
			return false
		}
		x := guest.Xattr{Name: prefix + string(a.name)}
		if x.Value, bad = f.value(&in, a); bad != nil {
			bad = fmt.Errorf("%s: %w", x.Name, bad)
			return false
		}
		list = append(list, x)
		return true
	})
	slices.SortStableFunc(list, func(a, b guest.Xattr) int { return cmp.Compare(a.Name, b.Name) })
	// One in the inode hides one of the same name in the block.
	list = slices.CompactFunc(list, func(a, b guest.Xattr) bool { return a.Name == b.Name })
	return list, cmp.Or(bad, err)
}

// value gives an attribute's value, as getxattr(2) does.
func (f *FS) value(in *inode, a attr) ([]byte, error) {
	if a.size > maxValue {
		return nil, guest.Unsupported("inode %d: an attribute of %d bytes", in.no, a.size)
	}
	b := slices.Clone(a.value)
	if a.inode != 0 {
		var err error
		if b, err = f.valueInode(in, a); err != nil {
			return nil, err
		}
	}
	if a.index == indexACL || a.index == indexDefaultACL {
		acl := expandACL(b)
		if acl == nil {
			return nil, guest.Damaged("inode %d: an access control list", in.no)
		}
		return acl, nil
	}
	return b, nil
}

// valueInode reads the value that has an inode of its own. The inode's atime holds the value's checksum; where an older
// system wrote it, mtime and generation name the one file that has it (ext4 doc, Large Extended Attribute Values).
func (f *FS) valueInode(in *inode, a attr) ([]byte, error) {
	v, err := f.inode(guest.Ino(a.inode))
	if err != nil {
		return nil, err
	}
	if v.flags&flagEAInode == 0 || v.size != a.size || !v.is(guest.ModeRegular) {
		return nil, guest.Damaged("inode %d: the value of an attribute in inode %d", in.no, a.inode)
	}
	c, err := f.content(&v)
	if err != nil {
		return nil, err
	}
	b := make([]byte, a.size)
	if err := guest.ReadFull(c, b, 0); err != nil {
		return nil, err
	}
	owned := le.Uint32(v.raw[0x10:]) == in.no && le.Uint32(v.raw[0x64:]) == le.Uint32(in.raw[0x64:])
	if crc32c(f.seed, b) != le.Uint32(v.raw[8:]) && !owned {
		return nil, guest.Damaged("inode %d: checksum of an attribute's value", a.inode)
	}
	return b, nil
}

// expandACL makes of an access control list as the disk has it the one that getxattr(2) gives: version 2 instead of 1, and
// an id for every entry, also for those that have none on the disk (ext4 doc, POSIX ACLs). It is nil when
// the list cannot be right.
func expandACL(b []byte) []byte {
	const user, group = 2, 8 // tags of those with an id
	if len(b) < 4 || le.Uint32(b) != 1 {
		return nil
	}
	out := make([]byte, 4, 4+2*len(b))
	out[0] = 2
	for b = b[4:]; len(b) > 0; {
		n := 4
		if len(b) >= 8 && (le.Uint16(b) == user || le.Uint16(b) == group) {
			n = 8
		} else if len(b) < 4 || le.Uint16(b) == user || le.Uint16(b) == group {
			return nil
		}
		out = append(out, b[:n]...)
		if n == 4 {
			out = append(out, 0xff, 0xff, 0xff, 0xff)
		}
		b = b[n:]
	}
	return out
}
