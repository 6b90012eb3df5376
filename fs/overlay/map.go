package overlay

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
)

// Block is the unit of the map, bytes.
const Block = 4096

const (
	mapSector  = 512 // bytes
	mapHeader  = 8   // bytes of it before the bits
	mapWords   = (mapSector - mapHeader) / 8
	mapBlocks  = mapWords * 64 // blocks that a sector is about
	mapSpan    = mapBlocks * Block
	mapAtATime = 2048 // sectors written or read with one call
)

// ErrDamaged: the files of an overlay are not what was written.
var ErrDamaged = errors.New("overlay is damaged")

// blockMap is which blocks are in data. Looking is without locks.
type blockMap struct {
	f       file
	live    file                          // bits that are not written yet
	blocks  int64                         // of the disk, rounded up
	sectors []atomic.Pointer[mapSectorOf] // nil: no block of it is in data

	mu      sync.Mutex // guards following, and setting bits
	dirty   map[int64]bool
	scratch [mapSector]byte
}

// mapSectorOf is a sector in memory.
type mapSectorOf [mapWords]atomic.Uint64

func newBlockMap(f file, size int64) *blockMap {
	m := &blockMap{f: f, dirty: map[int64]bool{}}
	m.resize(size)
	return m
}

// resize makes room for a disk of size bytes. Nobody else is there.
func (m *blockMap) resize(size int64) {
	m.blocks = (size + Block - 1) / Block
	n := int((m.blocks + mapBlocks - 1) / mapBlocks)
	if n <= len(m.sectors) {
		return
	}
	grown := make([]atomic.Pointer[mapSectorOf], n)
	for i := range m.sectors {
		grown[i].Store(m.sectors[i].Load())
	}
	m.sectors = grown
}

// load reads the map.
func (m *blockMap) load() error {
	buf := make([]byte, mapAtATime*mapSector)
	end := int64(len(m.sectors)) * mapSector
	for off := int64(0); off < end; {
		from, to, err := m.f.Data(off, end)
		if err != nil {
			return err
		}
		from -= from % mapSector
		to = min(to, from+int64(len(buf)), end)
		if from >= end {
			return nil
		}
		n, err := m.f.ReadAt(buf[:to-from], from)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		clear(buf[n : to-from])
		for i := from / mapSector; i*mapSector < to; i++ {
			if err := m.decode(i, buf[i*mapSector-from:][:mapSector]); err != nil {
				return err
			}
		}
		off = to
	}
	return nil
}

func (m *blockMap) decode(i int64, b []byte) error {
	if isZero(b) {
		return nil
	}
	if binary.LittleEndian.Uint32(b) != sectorSum(i, b) {
		return fmt.Errorf("%w: map, sector %d", ErrDamaged, i)
	}
	s := new(mapSectorOf)
	for w := range s {
		s[w].Store(binary.LittleEndian.Uint64(b[mapHeader+8*w:]))
	}
	m.sectors[i].Store(s)
	return nil
}

var crcTable = crc32.MakeTable(crc32.Castagnoli)

func sectorSum(i int64, b []byte) uint32 {
	var n [8]byte
	binary.LittleEndian.PutUint64(n[:], uint64(i))
	return crc32.Update(crc32.Checksum(n[:], crcTable), crcTable, b[4:mapSector])
}

// isZero compares b with itself, one byte on.
func isZero(b []byte) bool {
	return len(b) == 0 || b[0] == 0 && bytes.Equal(b[1:], b[:len(b)-1])
}

func (m *blockMap) has(block int64) bool {
	s := m.sectors[block/mapBlocks].Load()
	in := block % mapBlocks
	return s != nil && s[in/64].Load()&(1<<(in%64)) != 0
}

// run is how many blocks from block on, at most limit, are all in data or all not.
func (m *blockMap) run(block, limit int64) (n int64, in bool) {
	in = m.has(block)
	limit = min(limit, m.blocks-block)
	for n < limit {
		at := block + n
		s := m.sectors[at/mapBlocks].Load()
		bit := at % mapBlocks
		if s == nil {
			if in {
				return n, in
			}
			n += mapBlocks - bit
			continue
		}
		word := s[bit/64].Load()
		if in {
			word = ^word
		}
		if word >>= bit % 64; word != 0 {
			n += int64(bits.TrailingZeros64(word))
			break
		}
		n += 64 - bit%64
	}
	return min(n, limit), in
}

// set marks blocks as in data: in live, and then in memory, where others see it and answer writes to these blocks.
func (m *blockMap) set(from, to int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for at := from; at < to; { // under the lock: an older value of a word must not overtake a newer one
		i, bit := at/mapBlocks, at%mapBlocks
		n := min(to-at, mapBlocks-bit)
		first, last := bit/64, (bit+n-1)/64
		s := m.sectors[i].Load()
		b := m.scratch[:0]
		for w := first; w <= last; w++ {
			word := bitsOf(bit-64*w, bit+n-64*w)
			if s != nil {
				word |= s[w].Load()
			}
			b = binary.LittleEndian.AppendUint64(b, word)
		}
		if _, err := m.live.WriteAt(b, liveAt(i)+8*first); err != nil {
			return err
		}
		at += n
	}
	m.change(from, to, true)
	return nil
}

// bitsOf is the word with bits [from, to), of which only 0 to 63 are there.
func bitsOf(from, to int64) uint64 {
	from, to = max(from, 0), min(to, 64)
	return ^uint64(0) >> (64 - (to - from)) << from
}

// restore marks a block as in data, and live is to be made anew. Nobody else is there.
func (m *blockMap) restore(block int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.change(block, block+1, true)
}

// clear marks blocks as not in data. Nobody else is there, and live is to be made anew.
func (m *blockMap) clear(from, to int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.change(from, to, false)
}

// change sets or clears bits. m.mu is held.
func (m *blockMap) change(from, to int64, in bool) {
	for from < to {
		i, bit := from/mapBlocks, from%mapBlocks
		n := min(to-from, 64-bit%64)
		from += n
		s := m.sectors[i].Load()
		if s == nil {
			if !in {
				continue
			}
			s = new(mapSectorOf)
			m.sectors[i].Store(s)
		}
		mask := (^uint64(0) >> (64 - n)) << (bit % 64)
		old := s[bit/64].Load()
		now := old | mask
		if !in {
			now = old &^ mask
		}
		if now != old {
			s[bit/64].Store(now)
			m.dirty[i] = true
		}
	}
}

// maxDirty is how many sectors are written between two syncs: 64 MiB.
const maxDirty = 1 << 17

// changed takes what is to be written, at most maxDirty sectors: their numbers in order and
// their content as it is now.
func (m *blockMap) changed() (list []int64, content []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.dirty) == 0 {
		return nil, nil
	}
	for i := range m.dirty {
		list = append(list, i)
		delete(m.dirty, i)
		if len(list) == maxDirty {
			break
		}
	}
	slices.Sort(list)
	content = make([]byte, len(list)*mapSector)
	for k, i := range list {
		b := content[k*mapSector:][:mapSector]
		s := m.sectors[i].Load()
		for w := range s {
			binary.LittleEndian.PutUint64(b[mapHeader+8*w:], s[w].Load())
		}
		binary.LittleEndian.PutUint32(b, sectorSum(i, b))
	}
	return list, content
}

// unwritten is how many sectors are to be written.
func (m *blockMap) unwritten() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.dirty)
}

// write writes what changed gave and syncs it.
func (m *blockMap) write(list []int64, content []byte) error {
	for len(list) > 0 {
		n := 1 // neighbours
		for n < len(list) && list[n] == list[0]+int64(n) && n < mapAtATime {
			n++
		}
		if _, err := m.f.WriteAt(content[:n*mapSector], list[0]*mapSector); err != nil {
			return err
		}
		list, content = list[n:], content[n*mapSector:]
	}
	return m.f.Sync()
}
