package guest

import (
	"fmt"
	"io"
	"sync"
)

// Overlay is a device with blocks of it replaced in memory: those that a journal's replay would write. The device itself
// stays as it is. Set, Move and Drop come first, by one goroutine; then ReadAt by any number.
type Overlay struct {
	dev    Device
	unit   int64
	blocks map[int64]patch // block number => what it reads as
	room   int64           // bytes of memory left
}

// A patch is what a block reads as: data, or another place of the device with its first bytes put right.
type patch struct {
	data []byte
	from int64  // bytes; when data is nil
	head []byte // replaces the first bytes of what lies at from
}

// patchCost is the memory of a block that was moved, bytes.
const patchCost = 128

// NewOverlay makes an overlay over dev with blocks of unit bytes, that takes at most limit bytes of memory.
func NewOverlay(dev Device, unit, limit int64) *Overlay {
	return &Overlay{dev: dev, unit: unit, blocks: map[int64]patch{}, room: limit}
}

// Size is that of the device.
func (o *Overlay) Size() int64 { return o.dev.Size() }

// Len is how many blocks are replaced.
func (o *Overlay) Len() int { return len(o.blocks) }

// Set makes block n read as data, of one unit, which the overlay keeps.
func (o *Overlay) Set(n int64, data []byte) error {
	if int64(len(data)) != o.unit {
		return fmt.Errorf("guest: a block of %d bytes for one of %d", len(data), o.unit)
	}
	return o.put(n, patch{data: data}, o.unit+patchCost)
}

// Move makes block n read as what lies at from (bytes) of the device, with head instead of its first bytes.
func (o *Overlay) Move(n, from int64, head []byte) error {
	return o.put(n, patch{from: from, head: head}, patchCost)
}

func (o *Overlay) put(n int64, p patch, cost int64) error {
	o.Drop(n)
	if cost > o.room {
		return Unsupported("a journal with more to replay than fits into memory")
	}
	o.room -= cost
	o.blocks[n] = p
	return nil
}

// Drop makes block n read as the device has it.
func (o *Overlay) Drop(n int64) {
	p, ok := o.blocks[n]
	if !ok {
		return
	}
	o.room += patchCost + int64(len(p.data))
	delete(o.blocks, n)
}

// ReadAt implements io.ReaderAt.
func (o *Overlay) ReadAt(p []byte, off int64) (int, error) {
	if len(o.blocks) == 0 {
		return o.dev.ReadAt(p, off)
	}
	if off < 0 {
		return 0, fmt.Errorf("guest: read at %d", off)
	}
	n := 0
	for n < len(p) {
		block := (off + int64(n)) / o.unit
		// As many blocks at once as are not replaced.
		run := block
		for end := (off + int64(len(p)) - 1) / o.unit; run <= end; run++ {
			if _, ok := o.blocks[run]; ok {
				break
			}
		}
		if run > block {
			k := min(int64(len(p)-n), run*o.unit-off-int64(n))
			got, err := o.dev.ReadAt(p[n:n+int(k)], off+int64(n))
			n += got
			if int64(got) < k {
				return n, err
			}
			continue
		}
		from := off + int64(n) - block*o.unit
		k := int(min(int64(len(p)-n), o.unit-from, o.Size()-off-int64(n)))
		if k <= 0 {
			return n, io.EOF
		}
		if err := o.blocks[block].read(o.dev, p[n:n+k], from); err != nil {
			return n, err
		}
		n += k
	}
	return n, nil
}

// read copies the patch from byte from on into p.
func (b patch) read(dev Device, p []byte, from int64) error {
	if b.data != nil {
		copy(p, b.data[from:])
		return nil
	}
	if err := ReadFull(dev, p, b.from+from); err != nil {
		return err
	}
	if from < int64(len(b.head)) {
		copy(p, b.head[from:])
	}
	return nil
}

// ReadFull fills p; what lies past the end of the device is ErrDamaged.
func ReadFull(dev io.ReaderAt, p []byte, off int64) error {
	n, err := dev.ReadAt(p, off)
	switch {
	case n == len(p):
		return nil
	case err == nil || err == io.EOF:
		return Damaged("a place %d bytes from the start, past the end of the device", off+int64(n))
	}
	return err
}

// Cache reads blocks of a device and keeps those used last, in a bounded number of bytes. Safe for concurrent use.
type Cache struct {
	dev   Device
	unit  int64
	limit int // blocks

	mu       sync.Mutex       // guards following
	young    map[int64][]byte // block number => its bytes: used since the last turn
	old      map[int64][]byte // not used since; the next turn forgets them
	inflight map[int64]*loading
}

type loading struct {
	done chan struct{}
	data []byte
	err  error
}

// NewCache makes a cache of at most limit bytes for blocks of unit bytes.
func NewCache(dev Device, unit, limit int64) *Cache {
	return &Cache{dev: dev, unit: unit, limit: int(max(2, limit/unit/2)),
		young: map[int64][]byte{}, old: map[int64][]byte{}, inflight: map[int64]*loading{}}
}

// Block gives block n. The bytes are shared and must not be changed. check, when there is one, looks at a block that was read from the
// device; what it refuses is not kept.
func (c *Cache) Block(n int64, check func([]byte) error) ([]byte, error) {
	c.mu.Lock()
	if b := c.find(n); b != nil {
		c.mu.Unlock()
		return b, nil
	}
	if l := c.inflight[n]; l != nil {
		c.mu.Unlock()
		<-l.done
		return l.data, l.err
	}
	l := &loading{done: make(chan struct{})}
	c.inflight[n] = l
	c.mu.Unlock()

	l.data, l.err = c.load(n, check)
	c.mu.Lock()
	delete(c.inflight, n)
	if l.err == nil {
		c.keep(n, l.data)
	}
	c.mu.Unlock()
	close(l.done)
	return l.data, l.err
}

func (c *Cache) load(n int64, check func([]byte) error) ([]byte, error) {
	if n < 0 || n > c.dev.Size()/c.unit {
		return nil, Damaged("block %d, past the end of the device", n)
	}
	b := make([]byte, c.unit)
	if err := ReadFull(c.dev, b, n*c.unit); err != nil {
		return nil, err
	}
	if check != nil {
		if err := check(b); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// find looks a block up; one that is found is young again.
func (c *Cache) find(n int64) []byte {
	if b := c.young[n]; b != nil {
		return b
	}
	b := c.old[n]
	if b != nil {
		delete(c.old, n)
		c.keep(n, b)
	}
	return b
}

func (c *Cache) keep(n int64, b []byte) {
	if len(c.young) >= c.limit {
		c.old, c.young = c.young, make(map[int64][]byte, c.limit)
	}
	c.young[n] = b
}
