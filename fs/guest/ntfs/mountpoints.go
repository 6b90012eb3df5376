package ntfs

import (
	"cmp"
	"errors"
	"iter"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// recordExtend is the directory $Extend.
const recordExtend = 11

// A key of the index $R of $Extend/$Reparse, which has all reparse points: tag (4), reference to the file (8). Keys are ordered by
// their words.

const reparseKeyLen = 12

func compareReparse(a, b []byte) int {
	if len(a) != reparseKeyLen || len(b) != reparseKeyLen {
		return 0 // out of order
	}
	for i := 0; i < reparseKeyLen; i += 4 {
		if c := cmp.Compare(le.Uint32(a[i:]), le.Uint32(b[i:])); c != 0 {
			return c
		}
	}
	return 0
}

// MountPoints yields the directories that are mount points of volumes, or junctions: Readlink tells where they lead. They come from an index, and no
// directory is read.
func (f *FS) MountPoints() iter.Seq2[guest.Ino, error] {
	return func(yield func(guest.Ino, error) bool) {
		ino, err := f.Lookup(recordExtend, "$Reparse")
		if errors.Is(err, guest.ErrNotExist) {
			return
		}
		var i *inode
		if err == nil {
			i, err = f.inode(ino)
		}
		var x *index
		if err == nil {
			x, err = f.index(i, "$R", compareReparse)
		}
		if err == nil {
			first := make([]byte, reparseKeyLen)
			le.PutUint32(first, tagMountPoint)
			err = x.walk(first, func(_ int64, e entry) bool {
				return len(e.key) == reparseKeyLen && le.Uint32(e.key) == tagMountPoint && yield(guest.Ino(le.Uint64(e.key[4:])), nil)
			})
		}
		if err != nil {
			yield(0, err)
		}
	}
}
