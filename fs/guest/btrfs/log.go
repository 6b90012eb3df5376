package btrfs

import "github.com/holdfast-backup/holdfast/fs/guest"

// replayed is what the log says.
type replayed struct {
	trees map[uint64]*tree // subvolumes that it changes, by id
	csums []logSum         // ascending
}

// A logSum is an item of checksums in the log.
type logSum struct {
	at   uint64 // logical address of the first
	sums []byte
}

// sums gives the checksums of n sectors when the log has them all.
func (l *replayed) sums(logical uint64, n int, sb *super) []byte { return nil }

func (fs *FS) replay(opt guest.Options) error { return nil }
