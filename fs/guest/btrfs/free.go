package btrfs

import (
	"iter"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// Free implements guest.Freer.
func (fs *FS) Free() iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) {
		yield(extent.Extent{}, guest.Unsupported("free space"))
	}
}

// Locate implements guest.Locator.
func (fs *FS) Locate(ino guest.Ino) iter.Seq2[extent.Extent, error] {
	return fs.Free()
}
