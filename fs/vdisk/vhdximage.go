package vdisk

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/bits"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// VHDXImage is an open VHDX with its parents: a disk. Safe for concurrent use.
//
// Blocks that the format leaves undefined, or that were unmapped, read as
// zeros. Its Allocated reads tables only: the BAT and, in a differencing image,
// sector bitmaps.
type VHDXImage struct {
	mapped
	head    vhdxHead
	regions vhdxRegions
	meta    vhdxMetaItems
	ratio   int64 // payload blocks per sector bitmap block
}

var _ Source = (*VHDXImage)(nil)

func newVHDXImage(r io.ReaderAt, size int64, head vhdxHead, regions vhdxRegions, meta vhdxMetaItems, opts VHDXOptions) (*VHDXImage, error) {
	v := &VHDXImage{head: head, regions: regions, meta: meta}
	v.ratio = (1 << 23) * meta.sector / meta.block // at least 16
	blocks := divUp(meta.disk, meta.block)
	// The bitmap entry after the last payload entries is looked for when it is needed.
	if entries := blocks + max(0, blocks-1)/v.ratio; entries*8 > regions.bat.Len {
		return nil, corrupt("BAT of %d bytes for %d entries", regions.bat.Len, entries)
	}
	v.mapped = mapped{
		mapping:  v,
		r:        r,
		fileSize: size,
		size:     meta.disk,
		name:     opts.Name,
		tables:   newTableCache(r, size, 4*kib, opts.TableCache),
	}
	return v, nil
}

// DataWriteGUID identifies the contents of the disk: every writer changes it
// before its first write (MS-VHDX §2.2.2). Children name it as their linkage.
func (v *VHDXImage) DataWriteGUID() GUID { return v.head.dataWrite }

// LogicalSectorSize is 512 or 4096 bytes.
func (v *VHDXImage) LogicalSectorSize() int64 { return v.meta.sector }

// unpack: nothing in a VHDX is compressed.
func (v *VHDXImage) unpack([]byte, span) error { return ErrUnsupported }

// lookup finds the span at off. It ends with the block, or where the sector
// bitmap changes, or where a slice of the sector bitmap ends.
func (v *VHDXImage) lookup(w *walk, off int64) (span, error) {
	b := off / v.meta.block
	entry, err := v.batEntry(&w.l1, b+b/v.ratio)
	if err != nil {
		return span{}, err
	}
	s := span{Extent: to(off, min(roundUp(off+1, v.meta.block), v.size))}
	switch state := entry & 7; state {
	case vhdxAbsent:
		if v.meta.hasParent {
			return s, nil
		}
		s.kind = zeroes
	case vhdxUndefined, vhdxZero, vhdxUnmapped:
		s.kind = zeroes
	case vhdxPresent, vhdxPartial:
		s.kind = plain
		if s.host, err = v.place(entry, v.meta.block); err != nil {
			return s, fmt.Errorf("block %d: %w", b, err)
		}
		s.host += off % v.meta.block
		if state == vhdxPartial {
			return v.partial(w, s)
		}
	default:
		return s, corrupt("block %d has the state %d", b, state)
	}
	return s, nil
}

// batEntry reads the BAT: a u64 with the state in bits 0..2 and the offset in
// the file in bits 20..63, all others reserved (MS-VHDX §2.5.1).
func (v *VHDXImage) batEntry(c *cursor, i int64) (uint64, error) {
	if i*8 >= v.regions.bat.Len {
		return 0, corrupt("entry %d is past the end of the BAT", i)
	}
	big, err := c.uint64(v.regions.bat.Off + i*8)
	if err != nil {
		return 0, err
	}
	entry := bits.ReverseBytes64(big)
	if entry&0xFFFF8 != 0 {
		return 0, corrupt("BAT entry %d is %#x", i, entry)
	}
	return entry, nil
}

// place is where the n bytes of a BAT entry are. Whether the file is that long
// shows when they are read: the last block need not be whole.
func (v *VHDXImage) place(entry uint64, n int64) (int64, error) {
	at := entry &^ (mib - 1)
	if at < mib || at > maxFile || v.regions.covers(extent.Extent{Off: int64(at), Len: n}) {
		return 0, corrupt("%d bytes at %d, where other things are", n, at)
	}
	return int64(at), nil
}

// partial cuts s, a part of a block that is partially present, to the sectors
// that are all in the file, or all in the parent: one bit per sector, set for
// those in the file (MS-VHDX §2.4). The BAT entry of a sector bitmap stands
// after those of a whole chunk, in the last chunk as well, however short (§2.5,
// "must be able to locate the last sector bitmap block").
func (v *VHDXImage) partial(w *walk, s span) (span, error) {
	chunk := v.meta.block * v.ratio // bytes of disk per sector bitmap
	i := s.Off / chunk
	entry, err := v.batEntry(&w.l2, i*(v.ratio+1)+v.ratio)
	if err != nil {
		return s, err
	}
	if !v.meta.hasParent || entry&7 != vhdxPresent {
		return s, corrupt("the block at %d is partially present, but its sector bitmap has the state %d", s.Off, entry&7)
	}
	at, err := v.place(entry, mib)
	if err != nil {
		return s, fmt.Errorf("sector bitmap %d: %w", i, err)
	}
	bit := s.Off % chunk / v.meta.sector
	slice, err := w.l2.bytes(at+bit/64*8, 8)
	if err != nil {
		return s, err
	}
	run, here := sectorRun(slice, bit%64)
	end := (s.Off/v.meta.sector + run) * v.meta.sector
	s.Len = min(s.End(), end) - s.Off
	if !here {
		s.kind, s.host = fromBacking, 0
	}
	return s, nil
}

// sectorRun counts equal bits in b from bit on, in whole words of 64 of which the
// first has bit.
func sectorRun(b []byte, bit int64) (n int64, set bool) {
	word := binary.LittleEndian.Uint64(b) >> bit
	flip := uint64(0)
	if set = word&1 == 1; set {
		flip = ^uint64(0)
	}
	if n = int64(bits.TrailingZeros64(word ^ flip)); n < 64-bit {
		return n, set
	}
	n = 64 - bit
	for b = b[8:]; len(b) >= 8; b = b[8:] {
		more := bits.TrailingZeros64(binary.LittleEndian.Uint64(b) ^ flip)
		n += int64(more)
		if more < 64 {
			break
		}
	}
	return n, set
}
