package cluster

import (
	"io"
	"slices"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// SlotSize is that of an entry of a directory, bytes.
const SlotSize = 32

// Slots reads the slots of a directory, one after the other.
type Slots struct {
	dev   io.ReaderAt
	chain *Chain
	end   int64 // bytes of the directory
	buf   []byte
	start int64 // where buf is in the directory
	pos   int64 // of the next slot, bytes
}

// NewSlots reads from slot number from on. A directory that breaks off gives its error there.
func NewSlots(dev io.ReaderAt, chain *Chain, size int64, from uint32) *Slots {
	return &Slots{dev: dev, chain: chain, end: size &^ (SlotSize - 1), pos: int64(from) * SlotSize}
}

// Pos is the number of the next slot.
func (s *Slots) Pos() uint32 { return uint32(s.pos / SlotSize) }

// Seek goes to a slot.
func (s *Slots) Seek(slot uint32) { s.pos = int64(slot) * SlotSize }

// Next gives a slot, whose bytes are good until the next call; nil behind the last.
func (s *Slots) Next() ([]byte, error) {
	if s.pos >= s.end {
		return nil, nil
	}
	if s.pos < s.start || s.pos >= s.start+int64(len(s.buf)) {
		if err := s.fill(); err != nil {
			return nil, err
		}
	}
	slot := s.buf[s.pos-s.start:][:SlotSize]
	s.pos += SlotSize
	return slot, nil
}

// fill reads on: little at first, for most directories are small and many calls want one entry.
func (s *Slots) fill() error {
	const least, most = 512, 32 << 10
	n := min(most, max(least, int64(len(s.buf))*4))
	n = min(n-s.pos%least, s.end-s.pos)
	if int64(cap(s.buf)) < n {
		s.buf = make([]byte, n)
	}
	s.buf, s.start = s.buf[:n], s.pos
	if err := s.chain.ReadAt(s.dev, s.buf, s.pos); err != nil {
		s.buf = s.buf[:0]
		return err
	}
	return nil
}

// Index finds the entries of a directory by a hash of their names.
type Index struct {
	refs []uint64 // hash<<32 | slot, ascending
	Dirs uint32   // how many directories it has
}

// Add adds an entry. Done comes after the last one.
func (x *Index) Add(hash, slot uint32) { x.refs = append(x.refs, uint64(hash)<<32|uint64(slot)) }

// Done makes the index ready for use.
func (x *Index) Done() {
	slices.Sort(x.refs)
	x.refs = slices.Clip(slices.Compact(x.refs))
}

// Cost is what it takes, bytes of memory.
func (x *Index) Cost() int64 { return 100 + int64(cap(x.refs))*8 }

// Find yields the slots of the entries with a hash.
func (x *Index) Find(hash uint32) func(yield func(slot uint32) bool) {
	return func(yield func(uint32) bool) {
		i, _ := slices.BinarySearch(x.refs, uint64(hash)<<32)
		for ; i < len(x.refs) && uint32(x.refs[i]>>32) == hash; i++ {
			if !yield(uint32(x.refs[i])) {
				return
			}
		}
	}
}

// Hash is that of a name for an Index: FNV-1a of its UTF-16 units.
func Hash(units []uint16) uint32 {
	h := uint32(2166136261)
	for _, u := range units {
		h = (h ^ uint32(u&0xff)) * 16777619
		h = (h ^ uint32(u>>8)) * 16777619
	}
	return h
}

// Parents knows in which directory each directory was seen last of those in use: one that is seen in two could lead around in a circle.
type Parents struct {
	seen *guest.Recent[guest.Ino, guest.Ino]
}

// NewParents takes at most limit bytes.
func NewParents(limit int64) Parents {
	return Parents{guest.NewRecent[guest.Ino, guest.Ino](limit)}
}

// Claim notes that child is in dir; it is guest.ErrDamaged when it is elsewhere, too.
func (p Parents) Claim(child, dir guest.Ino) error {
	other, ok := p.seen.Get(child)
	if !ok {
		p.seen.Put(child, dir, 64)
		return nil
	}
	if other != dir {
		return guest.Damaged("a directory that is in two others")
	}
	return nil
}

// Cached reads a device through a cache of its blocks: for metadata.
type Cached struct {
	dev   guest.Device
	cache *guest.Cache
	unit  int64
}

// NewCached makes one that takes at most limit bytes.
func NewCached(dev guest.Device, limit int64) *Cached {
	const unit = 8 << 10
	return &Cached{dev, guest.NewCache(dev, unit, limit), unit}
}

// Block gives the block with the byte at off, and where it starts. It must not be changed.
func (c *Cached) Block(off int64) (b []byte, start int64, err error) {
	n := off / c.unit
	start = n * c.unit
	if off < 0 || off >= c.dev.Size() {
		return nil, 0, guest.Damaged("a place %d bytes from the start, past the end of the device", off)
	}
	if start+c.unit > c.dev.Size() { // the cache has whole ones
		b = make([]byte, c.dev.Size()-start)
		return b, start, guest.ReadFull(c.dev, b, start)
	}
	b, err = c.cache.Block(n, nil)
	return b, start, err
}

// ReadAt implements io.ReaderAt.
func (c *Cached) ReadAt(p []byte, off int64) (n int, err error) {
	for n < len(p) {
		b, start, err := c.Block(off + int64(n))
		if err != nil {
			return n, err
		}
		n += copy(p[n:], b[off+int64(n)-start:])
	}
	return n, nil
}
