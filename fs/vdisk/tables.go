package vdisk

import (
	"encoding/binary"
	"io"
	"sync"
)

// tableCache keeps slices of the tables of an image in memory: pieces of a file as
// large as a slice and aligned to it. Safe for concurrent use.
type tableCache struct {
	r     io.ReaderAt
	size  int64 // of the file, bytes
	slice int64 // bytes, a power of two
	max   int   // slices

	mu sync.Mutex
	// guards following
	byOff map[int64]int // offset in the file => index in ring
	ring  []cachedSlice
	hand  int // next candidate for eviction
}

type cachedSlice struct {
	off  int64
	b    []byte // immutable; shorter than a slice at the end of the file
	used bool   // since the hand passed last
}

func newTableCache(r io.ReaderAt, size, cluster, budget int64) *tableCache {
	if budget <= 0 {
		budget = 4 * mib
	}
	slice := min(cluster, 4*kib)
	return &tableCache{r: r, size: size, slice: slice, max: int(max(2, budget/slice)), byOff: map[int64]int{}}
}

// get returns the slice that begins at off, a multiple of the slice size. The
// bytes must not be changed.
func (t *tableCache) get(off int64) ([]byte, error) {
	t.mu.Lock()
	if i, ok := t.byOff[off]; ok {
		t.ring[i].used = true
		b := t.ring[i].b
		t.mu.Unlock()
		return b, nil
	}
	t.mu.Unlock()

	if off >= t.size {
		return nil, corrupt("a table at %d lies past the end of the file at %d", off, t.size)
	}
	b := make([]byte, min(t.slice, t.size-off))
	if _, err := readFull(t.r, b, off); err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.add(off, b)
	return b, nil
}

// add is called with mu held. The clock algorithm: evict what was not used
// since the hand came by.
func (t *tableCache) add(off int64, b []byte) {
	if _, ok := t.byOff[off]; ok {
		return // another reader was faster
	}
	if len(t.ring) < t.max {
		t.byOff[off] = len(t.ring)
		t.ring = append(t.ring, cachedSlice{off: off, b: b})
		return
	}
	for t.ring[t.hand].used {
		t.ring[t.hand].used = false
		t.hand = (t.hand + 1) % len(t.ring)
	}
	delete(t.byOff, t.ring[t.hand].off)
	t.byOff[off] = t.hand
	t.ring[t.hand] = cachedSlice{off: off, b: b}
	t.hand = (t.hand + 1) % len(t.ring)
}

// walk is the state of one reader going through a disk.
type walk struct{ l1, l2 cursor }

// cursor reads entries of one table after the other without asking the cache
// for each. It belongs to one reader.
type cursor struct {
	tables *tableCache
	off    int64 // of b
	b      []byte
}

// uint64 is the big-endian integer at off, a multiple of 8.
func (c *cursor) uint64(off int64) (uint64, error) {
	b, err := c.bytes(off, 8)
	if err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint64(b), nil
}

// bytes gives what the cache has in one piece from off on, n bytes or more; off
// is a multiple of n, a power of two. The bytes must not be changed.
func (c *cursor) bytes(off, n int64) ([]byte, error) {
	in := off & (c.tables.slice - 1)
	if c.b == nil || off-in != c.off {
		b, err := c.tables.get(off - in)
		if err != nil {
			return nil, err
		}
		c.off, c.b = off-in, b
	}
	if in+n > int64(len(c.b)) {
		return nil, corrupt("a table entry at %d lies past the end of the file at %d", off, c.tables.size)
	}
	return c.b[in:], nil
}
