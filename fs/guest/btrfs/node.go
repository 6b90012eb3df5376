package btrfs

import (
	"bytes"
	"sync"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

const (
	headerSize = 0x65
	itemSize   = 0x19 // key, offset and size of an item of a leaf
	ptrSize    = 0x21 // key, address and generation in a node above
	maxLevel   = 7
)

// A node is a block of a tree that was verified: its keys ascend, and the items of a leaf lie within it (BTRFS, On-disk Format, Header).
type node struct {
	b     []byte
	gen   uint64
	owner uint64
	level int
	n     int // items or pointers
}

func (n *node) key(i int) key {
	if n.level == 0 {
		return parseKey(n.b[headerSize+i*itemSize:])
	}
	return parseKey(n.b[headerSize+i*ptrSize:])
}

// item gives what item i of a leaf holds.
func (n *node) item(i int) []byte {
	h := n.b[headerSize+i*itemSize+keySize:]
	off, size := headerSize+le.Uint32(h), le.Uint32(h[4:])
	return n.b[off : off+size : off+size]
}

func (n *node) ptr(i int) (addr, gen uint64) {
	h := n.b[headerSize+i*ptrSize+keySize:]
	return le.Uint64(h), le.Uint64(h[8:])
}

// slot gives the last whose key is not behind k, or -1.
func (n *node) slot(k key) int {
	lo, hi := 0, n.n
	for lo < hi {
		if mid := (lo + hi) / 2; k.less(n.key(mid)) {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	return lo - 1
}

// parseNode verifies one copy of the block at a logical address.
func (fs *FS) parseNode(b []byte, addr uint64) (*node, error) {
	sb := fs.sb
	n := &node{b: b, gen: le.Uint64(b[0x50:]), owner: le.Uint64(b[0x58:]), n: int(le.Uint32(b[0x60:])), level: int(b[0x64])}
	switch {
	case !sb.csum.matches(b, b[csumField:]):
		return nil, guest.Damaged("the node at %d: the checksum", addr)
	case !bytes.Equal(b[0x20:0x30], sb.meta[:]):
		return nil, guest.Damaged("the node at %d is of another file system", addr)
	case le.Uint64(b[0x30:]) != addr:
		return nil, guest.Damaged("the node at %d says that it lies at %d", addr, le.Uint64(b[0x30:]))
	case n.level > maxLevel:
		return nil, guest.Damaged("the node at %d has level %d", addr, n.level)
	}
	each := itemSize
	if n.level > 0 {
		each = ptrSize
	}
	if n.n > (len(b)-headerSize)/each || n.n == 0 && n.level > 0 {
		return nil, guest.Damaged("the node at %d has %d items", addr, n.n)
	}
	for i := range n.n {
		if i > 0 && !n.key(i-1).less(n.key(i)) {
			return nil, guest.Damaged("the node at %d: the order of its items", addr)
		}
		if n.level > 0 {
			continue
		}
		h := b[headerSize+i*itemSize+keySize:]
		if off, size := uint64(le.Uint32(h))+headerSize, uint64(le.Uint32(h[4:])); off+size > uint64(len(b)) || off < uint64(headerSize+n.n*itemSize) {
			return nil, guest.Damaged("the node at %d: item %d", addr, i)
		}
	}
	return n, nil
}

// want is what points to a node says of it.
type want struct {
	addr, gen uint64
	level     int
}

func (w want) check(n *node) error {
	if n.gen != w.gen || n.level != w.level {
		return guest.Damaged("the node at %d has generation %d and level %d, and not %d and %d", w.addr, n.gen, n.level, w.gen, w.level)
	}
	return nil
}

// node reads a node, from the first copy that is good, or takes it from memory.
func (fs *FS) node(w want) (*node, error) {
	if n := fs.nodes.find(w.addr); n != nil {
		if err := w.check(n); err != nil {
			return nil, err
		}
		return n, nil
	}
	copies, err := fs.vol.copies(w.addr)
	if err != nil {
		return nil, err
	}
	var first error
	for i := range copies {
		b := make([]byte, fs.sb.node)
		n, err := (*node)(nil), fs.vol.read(b, w.addr, i)
		if err == nil {
			n, err = fs.parseNode(b, w.addr)
		}
		if err == nil {
			err = w.check(n)
		}
		if err == nil {
			fs.nodes.keep(w.addr, n, int64(len(b)))
			return n, nil
		}
		if first == nil {
			first = err
		}
	}
	return nil, first
}

// A cache keeps what was used last, in a bounded number of bytes, by logical address. Safe for concurrent use.
type cache[T any] struct {
	half int64 // bytes that a generation may have

	mu         sync.Mutex // guards following
	young, old map[uint64]kept[T]
	size       int64 // bytes in young
}

type kept[T any] struct {
	v    *T
	size int64
}

func newCache[T any](limit int64) *cache[T] {
	return &cache[T]{half: max(limit/2, 1), young: map[uint64]kept[T]{}}
}

// find gives what is shared and must not be changed, or nil.
func (c *cache[T]) find(at uint64) *T {
	c.mu.Lock()
	defer c.mu.Unlock()
	if k := c.young[at]; k.v != nil {
		return k.v
	}
	k := c.old[at]
	if k.v != nil {
		c.put(at, k)
	}
	return k.v
}

func (c *cache[T]) keep(at uint64, v *T, size int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.put(at, kept[T]{v, size})
}

func (c *cache[T]) put(at uint64, k kept[T]) {
	if c.young[at].v != nil {
		return
	}
	if c.size += k.size; c.size > c.half {
		c.old, c.young, c.size = c.young, map[uint64]kept[T]{}, k.size
	}
	c.young[at] = k
}
