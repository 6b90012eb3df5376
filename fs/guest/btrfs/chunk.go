package btrfs

import (
	"cmp"
	"slices"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// Profiles: bits of a chunk's type.
const (
	typeData     = 1 << 0
	typeSystem   = 1 << 1
	typeMetadata = 1 << 2
	raid0        = 1 << 3
	raid1        = 1 << 4
	dup          = 1 << 5
	raid10       = 1 << 6
	raid5        = 1 << 7
	raid6        = 1 << 8
	raid1c3      = 1 << 9
	raid1c4      = 1 << 10
	profiles     = raid0 | raid1 | dup | raid10 | raid5 | raid6 | raid1c3 | raid1c4
)

const (
	maxStripes = 1024 // of a chunk
	maxChunks  = 1 << 20
)

// A chunk maps a range of logical addresses to stripes on devices (BTRFS, On-disk Format, CHUNK_ITEM).
type chunk struct {
	logical, length uint64
	kind            uint64
	stripeLen       uint64
	columns         int // pieces of data side by side
	copies          int // of each
	stripes         []stripe
}

type stripe struct {
	dev uint64
	off int64
}

// parseChunk reads a chunk item and gives how many bytes it has.
func parseChunk(logical uint64, b []byte) (chunk, int, error) {
	if len(b) < 0x30 {
		return chunk{}, 0, guest.Damaged("a chunk of %d bytes", len(b))
	}
	c := chunk{logical: logical, length: le.Uint64(b), stripeLen: le.Uint64(b[0x10:]), kind: le.Uint64(b[0x18:])}
	n := int(le.Uint16(b[0x2c:]))
	size := 0x30 + n*0x20
	if n == 0 || n > maxStripes || size > len(b) || c.length == 0 || c.length > 1<<61 || logical > 1<<61 ||
		c.stripeLen < 4096 || c.stripeLen > 1<<24 || c.stripeLen&(c.stripeLen-1) != 0 {
		return c, 0, guest.Damaged("the chunk at %d", logical)
	}
	for s := b[0x30:size]; len(s) > 0; s = s[0x20:] {
		off := le.Uint64(s[8:])
		if off > 1<<61 {
			return c, 0, guest.Damaged("the chunk at %d", logical)
		}
		c.stripes = append(c.stripes, stripe{le.Uint64(s), int64(off)})
	}
	return c, size, c.shape(int(le.Uint16(b[0x2e:])))
}

// shape sets how the data is spread; sub is how many stripes a copy of RAID10 has.
func (c *chunk) shape(sub int) error {
	n := len(c.stripes)
	switch c.kind & profiles {
	case 0, dup, raid1, raid1c3, raid1c4:
		c.columns, c.copies = 1, n
	case raid0:
		c.columns, c.copies = n, 1
	case raid10:
		if sub < 1 || n%sub != 0 {
			return guest.Damaged("the chunk at %d: %d stripes by %d", c.logical, n, sub)
		}
		c.columns, c.copies = n/sub, sub
	case raid5:
		c.columns, c.copies = n-1, 1
	case raid6:
		c.columns, c.copies = n-2, 1
	default:
		return guest.Unsupported("chunks of type %#x", c.kind)
	}
	if c.columns < 1 {
		return guest.Damaged("the chunk at %d: %d stripes", c.logical, n)
	}
	return nil
}

func (c *chunk) end() uint64 { return c.logical + c.length }

// at tells where byte off of the chunk lies in a copy, and how many bytes follow it there.
func (c *chunk) at(off uint64, copy int) (dev uint64, phys int64, room uint64) {
	room = c.length - off
	if c.kind&profiles&^(raid0|raid10|raid5|raid6) != 0 || c.kind&profiles == 0 {
		s := c.stripes[copy]
		return s.dev, s.off + int64(off), room
	}
	nr, in := off/c.stripeLen, off%c.stripeLen
	row, column := nr/uint64(c.columns), nr%uint64(c.columns)
	var s stripe
	switch c.kind & profiles {
	case raid0, raid10:
		s = c.stripes[int(column)*c.copies+copy]
	default: // the columns turn by one with each row, the parity behind them
		s = c.stripes[(column+row)%uint64(len(c.stripes))]
	}
	return s.dev, s.off + int64(row*c.stripeLen+in), min(room, c.stripeLen-in)
}

// A volume is the devices and how logical addresses lie on them.
type volume struct {
	devs   map[uint64]member // by device id
	chunks []chunk           // ascending
}

// A member is a device. A stale one missed commits, and is asked last.
type member struct {
	guest.Device
	stale bool
}

// add adds a chunk. One of the same place replaces the one there.
func (v *volume) add(c chunk) error {
	i, found := slices.BinarySearchFunc(v.chunks, c.logical, func(c chunk, at uint64) int { return cmp.Compare(c.logical, at) })
	switch {
	case found:
		v.chunks[i] = c
	case len(v.chunks) >= maxChunks:
		return guest.Unsupported("more than %d chunks", maxChunks)
	default:
		v.chunks = slices.Insert(v.chunks, i, c)
	}
	if i > 0 && v.chunks[i-1].end() > c.logical || i+1 < len(v.chunks) && v.chunks[i+1].logical < c.end() {
		return guest.Damaged("overlapping chunks at %d", c.logical)
	}
	// Copies that missed commits come last.
	if c.columns == 1 && c.copies > 1 {
		slices.SortStableFunc(c.stripes, func(a, b stripe) int { return v.rank(a) - v.rank(b) })
	}
	return nil
}

func (v *volume) rank(s stripe) int {
	switch m, ok := v.devs[s.dev]; {
	case !ok:
		return 2
	case m.stale:
		return 1
	}
	return 0
}

// find gives the chunk of a logical address.
func (v *volume) find(logical uint64) (*chunk, error) {
	i, found := slices.BinarySearchFunc(v.chunks, logical, func(c chunk, at uint64) int { return cmp.Compare(c.logical, at) })
	if !found {
		i--
	}
	if i < 0 || logical >= v.chunks[i].end() {
		return nil, guest.Damaged("the logical address %d, which no chunk has", logical)
	}
	return &v.chunks[i], nil
}

// copies is how many copies there are of what lies at a logical address.
func (v *volume) copies(logical uint64) (int, error) {
	c, err := v.find(logical)
	if err != nil {
		return 0, err
	}
	return c.copies, nil
}

// read reads one copy of what lies at a logical address.
func (v *volume) read(p []byte, logical uint64, copy int) error {
	for len(p) > 0 {
		c, err := v.find(logical)
		if err != nil {
			return err
		}
		if copy >= c.copies {
			return guest.Damaged("copy %d of %d at %d", copy, c.copies, logical)
		}
		dev, phys, room := c.at(logical-c.logical, copy)
		n := min(uint64(len(p)), room)
		m, ok := v.devs[dev]
		if !ok {
			if c.kind&(raid5|raid6) != 0 {
				return guest.Unsupported("RAID5 or RAID6 with a missing device")
			}
			return guest.Damaged("what lies at %d, on device %d, which is missing", logical, dev)
		}
		if err := guest.ReadFull(m, p[:n], phys); err != nil {
			return err
		}
		p, logical = p[n:], logical+n
	}
	return nil
}
