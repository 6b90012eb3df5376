package btrfs

import (
	"cmp"
	"encoding/binary"
)

var le = binary.LittleEndian

// A key names an item of a tree; items are in the order of (id, kind, off) (BTRFS, On-disk Format, Basic Structures).
type key struct {
	id   uint64
	kind uint8
	off  uint64
}

const keySize = 17

func parseKey(b []byte) key { return key{le.Uint64(b), b[8], le.Uint64(b[9:])} }

func (k key) compare(o key) int {
	if c := cmp.Compare(k.id, o.id); c != 0 {
		return c
	}
	if c := cmp.Compare(k.kind, o.kind); c != 0 {
		return c
	}
	return cmp.Compare(k.off, o.off)
}

func (k key) less(o key) bool { return k.compare(o) < 0 }

// next is the key behind k. There is none behind the last, of which next is itself.
func (k key) next() key {
	if k.off++; k.off == 0 {
		if k.kind++; k.kind == 0 {
			if k.id++; k.id == 0 {
				return lastKey
			}
		}
	}
	return k
}

var lastKey = key{maxID, 0xff, maxID}

const maxID = 1<<64 - 1

// Kinds of items (BTRFS, On-disk Format, Item Types).
const (
	kindInode        = 0x01
	kindInodeRef     = 0x0c
	kindInodeExtref  = 0x0d
	kindXattr        = 0x18
	kindOrphan       = 0x30
	kindDirLogItem   = 0x3c
	kindDirLogIndex  = 0x48
	kindDirItem      = 0x54
	kindDirIndex     = 0x60
	kindExtentData   = 0x6c
	kindExtentCsum   = 0x80
	kindRoot         = 0x84
	kindRootRef      = 0x9c
	kindExtent       = 0xa8
	kindMetadata     = 0xa9
	kindBlockGroup   = 0xc0
	kindDevice       = 0xd8
	kindChunk        = 0xe4
	objectRootTree   = 1
	objectExtentTree = 2
	objectChunkTree  = 3
	objectFSTree     = 5
	objectCsumTree   = 7
	objectGroupTree  = 11
	objectFirst      = 256 // the first that a subvolume, an inode or a chunk has; of inodes, the top of a subvolume
	objectTreeLog    = maxID - 5
	objectCsum       = maxID - 9
)

// prev is the key before k, which is not the first.
func (k key) prev() key {
	if k.off--; k.off == maxID {
		if k.kind--; k.kind == 0xff {
			k.id--
		}
	}
	return k
}
