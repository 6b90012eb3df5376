package volume

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// extentRange is a part of a device.
type extentRange struct{ off, n int64 } // bytes

// physical is a physical volume: a device with a label.
type physical struct {
	name string // of the volume it is on
	dev  device
	id   string // 32 characters
	size int64  // bytes, as the label has it
	meta []extentRange
	// depth is in how many containers it is.
	depth int
}

// lvmCRC is the checksum of LVM2: CRC-32 of IEEE's polynomial that starts with this and is not inverted
// (libvslvm, "LVM format" §"Checksum calculation").
func lvmCRC(b []byte) uint32 {
	const start = 0xf597a6cf
	return ^crc32.Update(^uint32(start), crc32.IEEETable, b)
}

// findLabel looks for the label of a physical volume in the first four sectors. ErrUnknown for none.
//
//	0 "LABELONE" | 8 its sector 8 | 16 CRC of what follows, to the sector's end 4 | 20 offset of the PV header 4 | 24 "LVM2 001"
func findLabel(b []byte) (sector int, header []byte, err error) {
	le := binary.LittleEndian
	err = guest.ErrUnknown
	for i := 0; i < 4 && len(b) >= 512*(i+1); i++ {
		s := b[512*i : 512*(i+1)]
		if string(s[:8]) != "LABELONE" || string(s[24:32]) != "LVM2 001" {
			continue
		}
		from := le.Uint32(s[20:])
		if le.Uint64(s[8:]) != uint64(i) || lvmCRC(s[20:]) != le.Uint32(s[16:]) || from < 32 || from > 512-40 {
			err = guest.Damaged("LVM2: the label in sector %d", i)
			continue
		}
		return i, s[from:], nil
	}
	return 0, nil, err
}

// openPhysical reads the label of a physical volume.
//
//	0 id 32 | 32 size of the device 8 | data areas: offset 8, size 8 …, zeros | metadata areas: the same …, zeros
func openPhysical(name string, dev device) (*physical, error) {
	b := make([]byte, min(2048, dev.Size()))
	if err := guest.ReadFull(dev, b, 0); err != nil {
		return nil, err
	}
	_, h, err := findLabel(b)
	if err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	pv := &physical{name: name, dev: dev, id: string(h[:32]), size: int64(le.Uint64(h[32:]) & (1<<62 - 1))}
	lists := 0
	for h = h[40:]; len(h) >= 16 && lists < 2; h = h[16:] {
		off, n := le.Uint64(h), le.Uint64(h[8:])
		switch {
		case off == 0:
			lists++
		case lists == 1 && off < uint64(dev.Size()) && n <= uint64(dev.Size())-off:
			pv.meta = append(pv.meta, extentRange{int64(off), int64(n)})
		}
	}
	return pv, nil
}

// maxMetadata is how long the text of a volume group may be, bytes.
const maxMetadata = 16 << 20

// texts reads the newest text of each metadata area of a physical volume. What is damaged is in err, beside what is
// good.
func (pv *physical) texts() (texts [][]byte, err error) {
	for _, area := range pv.meta {
		text, e := readArea(pv.dev, area)
		if e != nil {
			err = errors.Join(err, fmt.Errorf("%s: metadata area at %d: %w", pv.name, area.off, e))
		}
		if len(text) > 0 {
			texts = append(texts, text)
		}
	}
	return texts, err
}

// readArea reads the text that a metadata area's header points to. The area is a ring: a text that reaches its end goes on behind the
// header.
//
//	0 CRC of the rest of the sector 4 | 4 magic 16 | 20 version 4 | 24 own offset 8 | 32 size 8
//	40 texts: offset in the area 8, size 8, CRC 4, flags 4 (1 = ignore) …, zeros
func readArea(dev guest.Device, area extentRange) ([]byte, error) {
	const header = 512
	le := binary.LittleEndian
	b := make([]byte, header)
	if area.n < 2*header {
		return nil, guest.Damaged("LVM2: a metadata area of %d bytes", area.n)
	}
	if err := guest.ReadFull(dev, b, area.off); err != nil {
		return nil, err
	}
	if string(b[4:20]) != " LVM2 x[5A%r0N*>" || le.Uint32(b) != lvmCRC(b[4:]) || le.Uint32(b[20:]) != 1 ||
		le.Uint64(b[24:]) != uint64(area.off) || le.Uint64(b[32:]) != uint64(area.n) {
		return nil, guest.Damaged("LVM2: the metadata area's header")
	}
	off, n, sum, flags := le.Uint64(b[40:]), le.Uint64(b[48:]), le.Uint32(b[56:]), le.Uint32(b[60:])
	if off == 0 || n == 0 || flags&1 != 0 {
		return nil, nil
	}
	if off < header || off >= uint64(area.n) || n > uint64(area.n)-header || n > maxMetadata {
		return nil, guest.Damaged("LVM2: a text of %d bytes at %d", n, off)
	}
	text := make([]byte, n)
	first := min(int64(n), area.n-int64(off))
	if err := guest.ReadFull(dev, text[:first], area.off+int64(off)); err != nil {
		return nil, err
	}
	if err := guest.ReadFull(dev, text[first:], area.off+header); err != nil {
		return nil, err
	}
	if lvmCRC(text) != sum {
		return nil, guest.Damaged("LVM2: the text's checksum")
	}
	return bytes.TrimRight(text, "\x00"), nil
}
