package xfs

import "github.com/holdfast-backup/holdfast/fs/guest"

// replayed is what readers must know of a replay besides the bytes.
type replayed struct {
	// unsummed: byte on the device => a block lies there that was put together of several pieces, whose checksum could not be computed.
	unsummed map[int64]bool
	// moved: inode => its blocks name the inode that they were taken from.
	moved map[uint64]bool
	// unfinished: inode => what the log only announces.
	unfinished map[uint64]uint8
}

const (
	unfinishedMap  = 1 << iota // extents to be mapped or unmapped
	unfinishedAttr             // attributes to be set or removed
)

func (fs *FS) replay(opt guest.Options) error { return nil }
