package volume

import (
	"encoding/binary"
	"hash/crc32"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// The metadata of a thin pool is blocks of 4 KiB, each with a checksum and its own number; everything is little-endian, as thin_dump(8)
// reads it. The superblock is block 0:
//
//	0 checksum 4 | 4 flags 4 (1 needs check) | 8 own number 8 | 32 magic 8 | 40 version 4 | 48 transaction 8 | 320 root of mappings 8
//	328 root of details 8 | 336 sectors of a data block 4 | 340 sectors of a metadata block 4
//
// A node of a B-tree:
//
//	0 checksum 4 | 4 flags 4 (1 inner, 2 leaf) | 8 own number 8 | 16 entries 4 | 20 most entries 4 | 24 bytes of a value 4
//	32 keys, 8 each, room for the most | values, likewise
//
// The tree of mappings leads from a device's id to the root of its own tree, which leads from a block of the device to
// the block of data (upper 40 bits) and a time (lower 24).
const (
	thinBlock  = 4096
	thinMagic  = 27022010
	superXOR   = 160774
	nodeXOR    = 121107
	thinDepth  = 12 // levels of one tree; 2^64 keys need 8 with nodes as full as they are
	nodeHeader = 32
)

// thinPool is a pool of thin volumes.
type thinPool struct {
	meta        *guest.Cache
	data        device
	block       int64 // bytes of a data block
	mappings    uint64
	details     uint64
	transaction int64
	doubt       bool // Linux has found something wrong with it
}

// thinSum is dm's checksum: CRC-32C without the last inversion, and a number for the kind of block, over all but itself.
func thinSum(b []byte, xor uint32) uint32 {
	return ^crc32.Checksum(b[4:], crc32.MakeTable(crc32.Castagnoli)) ^ xor
}

// openPool reads the superblock of a pool.
func openPool(meta, data device, cache int64) (*thinPool, error) {
	p := &thinPool{meta: guest.NewCache(meta, thinBlock, cache), data: data}
	b := make([]byte, thinBlock)
	if err := guest.ReadFull(meta, b, 0); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	switch {
	case le.Uint64(b[32:]) != thinMagic || le.Uint32(b) != thinSum(b, superXOR):
		return nil, guest.Damaged("thin pool: the superblock")
	case le.Uint32(b[40:]) < 1 || le.Uint32(b[40:]) > 2:
		return nil, guest.Unsupported("thin pool: version %d", le.Uint32(b[40:]))
	}
	p.doubt = le.Uint32(b[4:])&1 != 0
	p.transaction = int64(le.Uint64(b[48:]))
	p.mappings, p.details = le.Uint64(b[320:]), le.Uint64(b[328:])
	p.block = int64(le.Uint32(b[336:])) * sectorSize
	if p.block < 64<<10 || p.block > 1<<30 || le.Uint32(b[340:]) != thinBlock/sectorSize {
		return nil, guest.Damaged("thin pool: blocks of %d bytes", p.block)
	}
	return p, nil
}

// lookup finds a key in a tree. Values are of at least 8 bytes; the first 8 count.
func (p *thinPool) lookup(root, key uint64) (value uint64, ok bool, err error) {
	le := binary.LittleEndian
	at := root
	for range thinDepth {
		if at > 1<<40 {
			return 0, false, guest.Damaged("thin pool: a node at block %d", at)
		}
		b, err := p.meta.Block(int64(at), func(b []byte) error { return checkNode(b, at) })
		if err != nil {
			return 0, false, err
		}
		n, most, size := int(le.Uint32(b[16:])), int(le.Uint32(b[20:])), int(le.Uint32(b[24:]))
		// The last entry whose key is not above.
		low, high := 0, n
		for low < high {
			if mid := (low + high) / 2; le.Uint64(b[nodeHeader+8*mid:]) <= key {
				low = mid + 1
			} else {
				high = mid
			}
		}
		if low == 0 {
			return 0, false, nil
		}
		low--
		value := le.Uint64(b[nodeHeader+8*most+size*low:])
		if le.Uint32(b[4:])&1 == 0 {
			return value, le.Uint64(b[nodeHeader+8*low:]) == key, nil
		}
		at = value
	}
	return 0, false, guest.Damaged("thin pool: a tree of more than %d levels", thinDepth)
}

// checkNode checks a node of a tree. It is a leaf or not, inner ones have values of 8 bytes.
func checkNode(b []byte, at uint64) error {
	le := binary.LittleEndian
	flags, n, most, size := le.Uint32(b[4:]), le.Uint32(b[16:]), le.Uint32(b[20:]), le.Uint32(b[24:])
	switch {
	case le.Uint32(b) != thinSum(b, nodeXOR) || le.Uint64(b[8:]) != at:
		return guest.Damaged("thin pool: the checksum of block %d", at)
	case flags != 1 && flags != 2, n > most, size < 8, size > 1024, most > thinBlock/8, flags == 1 && size != 8,
		nodeHeader+most*(8+size) > thinBlock:
		return guest.Damaged("thin pool: node %d with %d of %d entries of %d bytes", at, n, most, size)
	}
	return nil
}

// thinVolume is a volume of a pool.
type thinVolume struct {
	pool   *thinPool
	root   uint64
	origin device // what unmapped blocks are read from; nil for zeros
}

func (v *thinVolume) at(off, n int64) (place, error) {
	block, in := off/v.pool.block, off%v.pool.block
	n = min(n, v.pool.block-in)
	value, ok, err := v.pool.lookup(v.root, uint64(block))
	switch {
	case err != nil:
		return place{}, err
	case ok:
		at := value >> 24
		if at >= uint64(v.pool.data.Size()/v.pool.block) {
			return place{}, guest.Damaged("thin pool: data block %d, past the end of the pool", at)
		}
		return place{v.pool.data, int64(at)*v.pool.block + in, n}, nil
	case v.origin == nil || off >= v.origin.Size():
		return place{nil, 0, n}, nil
	}
	return place{v.origin, off, min(n, v.origin.Size()-off)}, nil
}

// pool opens the pool of a thin volume, once.
func (b *builder) pool(name string) (*thinPool, error) {
	if p := b.pools[name]; p != nil {
		return p, nil
	}
	lv := b.lvs[name]
	if lv == nil || len(lv.segments) != 1 || lv.segments[0].kind != "thin-pool" {
		return nil, guest.Damaged("LVM2: no thin pool %q", name)
	}
	s := lv.segments[0]
	meta, err := b.device(s.text("metadata"))
	if err != nil {
		return nil, err
	}
	data, err := b.device(s.text("pool"))
	if err != nil {
		return nil, err
	}
	cache := b.opt.Cache
	if cache == 0 {
		cache = 16 << 20
	}
	p, err := openPool(meta, data, cache/int64(max(1, b.poolCount)))
	if err != nil {
		return nil, err
	}
	if id := s.number("transaction_id", p.transaction); id != p.transaction {
		b.warn("thin pool %s: LVM2 is at transaction %d, the pool at %d", name, id, p.transaction)
	}
	if p.doubt {
		b.warn("thin pool %s is marked as one that needs a check", name)
	}
	b.pools[name] = p
	return p, nil
}

// thin makes the device of a thin volume.
func (b *builder) thin(lv *logical, s segment) (device, error) {
	p, err := b.pool(s.text("thin_pool"))
	if err != nil {
		return nil, err
	}
	id := uint64(s.number("device_id", 0))
	root, ok, err := p.lookup(p.mappings, id)
	if err != nil {
		return nil, err
	}
	v := &thinVolume{pool: p, root: root}
	if !ok {
		return nil, guest.Damaged("thin pool: no device %d for %s", id, lv.name)
	}
	if origin := s.text("external_origin"); origin != "" {
		if v.origin, err = b.device(origin); err != nil {
			return nil, err
		}
	}
	return &mapped{layout: v, size: s.count * b.extent, shared: true}, nil
}
