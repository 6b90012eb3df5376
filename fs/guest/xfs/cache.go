package xfs

import (
	"sync"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// A bufKey names a piece of metadata. What is kept under it was verified as that kind and as of that owner.
type bufKey struct {
	kind  uint8
	block uint64
	owner uint64 // inode number, where the block names one
}

const (
	kindInodes uint8 = iota // a block of inodes; each is verified when it is read
	kindMap                 // a block of an extent map
	kindDir                 // a block of a directory or of attributes
	kindLeaf                // a block of a tree of an allocation group
)

// buffers keep the metadata used last, in a bounded number of bytes. Safe for concurrent use.
type buffers struct {
	half int64 // bytes that a generation may have

	mu         sync.Mutex // guards following
	young, old map[bufKey][]byte
	size       int64 // bytes in young
}

func newBuffers(limit int64) *buffers {
	return &buffers{half: max(limit/2, 1), young: map[bufKey][]byte{}}
}

// find gives the bytes, which are shared and must not be changed, or nil.
func (c *buffers) find(k bufKey) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	if b := c.young[k]; b != nil {
		return b
	}
	b := c.old[k]
	if b != nil {
		c.put(k, b)
	}
	return b
}

func (c *buffers) keep(k bufKey, b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.put(k, b)
}

func (c *buffers) put(k bufKey, b []byte) {
	if c.young[k] != nil {
		return
	}
	if c.size += int64(len(b)); c.size > c.half {
		c.old, c.young, c.size = c.young, map[bufKey][]byte{}, int64(len(b))
	}
	c.young[k] = b
}

// block reads and verifies a block, or takes it from memory.
func (fs *FS) block(k bufKey, check func(b []byte, off int64) error) ([]byte, error) {
	if b := fs.bufs.find(k); b != nil {
		return b, nil
	}
	off, err := fs.sb.offset(k.block, 1)
	if err != nil {
		return nil, err
	}
	b := make([]byte, fs.sb.blockSize)
	if err := guest.ReadFull(fs.dev, b, off); err != nil {
		return nil, err
	}
	if check != nil {
		if err := check(b, off); err != nil {
			return nil, err
		}
	}
	fs.bufs.keep(k, b)
	return b, nil
}

// stamp is where the parts of a block lie by which version 5 knows it (XFSDS, Metadata Integrity).
type stamp struct {
	crc, block, lsn, uuid, owner int // offsets; 0 for what is not there, except uuid's of a superblock
}

// verify checks a block of version 5 at off bytes of the device; a wrong owner is no fault when any is good.
func (fs *FS) verify(what string, b []byte, at stamp, off int64, owner uint64, any bool) error {
	switch {
	case !summed(b, at.crc) && !fs.log.unsummed[off]:
		return guest.Damaged("%s at %d: the checksum", what, off)
	case at.block != 0 && be.Uint64(b[at.block:]) != uint64(off)/512:
		return guest.Damaged("%s at %d says that it lies elsewhere", what, off)
	case [16]byte(b[at.uuid:at.uuid+16]) != fs.sb.meta:
		return guest.Damaged("%s at %d is of another file system", what, off)
	case at.owner != 0 && !any && be.Uint64(b[at.owner:]) != owner:
		return guest.Damaged("%s at %d is of inode %d and not of %d", what, off, be.Uint64(b[at.owner:]), owner)
	}
	return nil
}
