package btrfs

import (
	"cmp"
	"errors"
	"slices"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// maxXattrs is how many bytes of extended attributes an inode may have: the kernel lists no more than 64 KiB of names.
const maxXattrs = 64 << 20

// Xattrs implements guest.FS.
func (fs *FS) Xattrs(ino guest.Ino) ([]guest.Xattr, error) {
	n, err := fs.inode(ino)
	if err != nil || n.p.empty {
		return nil, err
	}
	p := n.p
	var list []guest.Xattr
	var bad error
	size := 0
	err = p.walk(key{p.ino, kindXattr, 0}, func(k key, b []byte) bool {
		if k.id != p.ino || k.kind != kindXattr {
			return false
		}
		for len(b) > 0 {
			var e entry
			if e, b, bad = parseEntry(b); bad != nil {
				return false
			}
			if size += len(e.name) + len(e.data); size > maxXattrs {
				bad = guest.Damaged("inode %d: more than %d bytes of extended attributes", p.ino, maxXattrs)
				return false
			}
			list = append(list, guest.Xattr{Name: string(e.name), Value: slices.Clone(e.data)})
		}
		return true
	})
	if err = errors.Join(err, bad); err != nil {
		return nil, err
	}
	slices.SortFunc(list, func(a, b guest.Xattr) int { return cmp.Compare(a.Name, b.Name) })
	return list, nil
}
