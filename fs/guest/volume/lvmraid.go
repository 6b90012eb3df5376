package volume

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// lvmLayouts are LVM2's types of RAID 4, 5 and 6: the level and md's number of the layout (lvmraid(7), RAID LAYOUTS).
var lvmLayouts = map[string]struct{ level, layout int }{
	"raid4":      {5, parityFirst},
	"raid5":      {5, leftSymmetric},
	"raid5_n":    {5, parityLast},
	"raid5_la":   {5, leftAsymmetric},
	"raid5_ra":   {5, rightAsymmetric},
	"raid5_ls":   {5, leftSymmetric},
	"raid5_rs":   {5, rightSymmetric},
	"raid6":      {6, ddfZeroRestart},
	"raid6_zr":   {6, ddfZeroRestart},
	"raid6_nr":   {6, ddfNRestart},
	"raid6_nc":   {6, ddfNContinue},
	"raid6_la_6": {6, qLast + leftAsymmetric},
	"raid6_ra_6": {6, qLast + rightAsymmetric},
	"raid6_ls_6": {6, qLast + leftSymmetric},
	"raid6_rs_6": {6, qLast + rightSymmetric},
	"raid6_n_6":  {6, parityLast},
}

// raid makes the device of a segment of any RAID type, out of its images.
func (b *builder) raid(lv *logical, s segment, kind string) (device, error) {
	if s.number("data_offset", 0) != 0 || s.number("reshape_count", 0) != 0 {
		return nil, guest.Unsupported("LVM2: %s is being reshaped", lv.name)
	}
	legs, err := b.images(lv, s)
	if err != nil {
		return nil, err
	}
	chunk, size := s.number("stripe_size", 0)*sectorSize, s.count*b.extent
	var perLeg int64
	for _, l := range legs {
		if l.dev != nil {
			perLeg = l.dev.Size()
		}
	}
	layout, parity := lvmLayouts[kind]
	switch {
	case strings.HasPrefix(kind, "raid0"):
		return b.raid0(legs, chunk)
	case kind == "raid1":
		return newMirror(legs, size)
	case kind == "raid10" || kind == "raid10_near":
		return newRAID10(legs, perLeg, chunk, int(s.number("data_copies", 2)&0xff)|1<<8)
	case parity:
		return newParity(legs, perLeg, chunk, layout.level, layout.layout)
	}
	return nil, guest.Unsupported("LVM2: a segment of type %s", kind)
}

func (b *builder) raid0(legs []leg, chunk int64) (device, error) {
	var parts []place
	for i, l := range legs {
		if l.dev == nil {
			return nil, missingLeg(i)
		}
		parts = append(parts, place{l.dev, 0, l.dev.Size()})
	}
	return striped(parts, chunk)
}

// images are the legs of a RAID segment. One with a physical volume missing is left out, and what its kernel wrote about
// the others counts.
func (b *builder) images(lv *logical, s segment) ([]leg, error) {
	list, step := s.list("raids"), 2
	if len(list) == 0 {
		list, step = s.list("raid0_lvs"), 1
	}
	var names []string
	for _, v := range list {
		if name, ok := v.(string); ok {
			names = append(names, name)
		}
	}
	if len(names) < step || len(names)%step != 0 || len(names) > 512 {
		return nil, guest.Damaged("LVM2: %s has a RAID segment of %d parts", lv.name, len(names))
	}
	legs := make([]leg, len(names)/step)
	metas := make([]device, len(legs))
	gone := 0
	for i := range legs {
		dev, err := b.device(names[i*step+step-1])
		if errors.Is(err, guest.ErrUnsupported) {
			return nil, err
		}
		if err != nil {
			gone++
			b.warn("%s: image %d of RAID is missing: %v", lv.name, i, err)
			continue
		}
		legs[i] = leg{dev: dev, good: dev.Size()}
		if step == 2 {
			metas[i], _ = b.device(names[i*step])
		}
	}
	gone += b.fresh(lv, legs, metas)
	if gone > 0 {
		b.notes[lv.name] = fmt.Sprintf("degraded: %d of %d", len(legs)-gone, len(legs))
	}
	return legs, nil
}

// fresh leaves out the legs that the newest of dm-raid's superblocks says have failed, and notes how far one that is being rebuilt
// is. It returns how many it left out. At the start of each rmeta volume, little-endian, as Linux 6.1 writes it:
//
//	0 "DmRd" | 8 legs 4 | 12 own place 4 | 16 events 8 | 24 bits of failed legs 8 | 32 rebuilt up to, sectors 8 (all bits: all of it)
func (b *builder) fresh(lv *logical, legs []leg, metas []device) (gone int) {
	le := binary.LittleEndian
	newest, failed := uint64(0), uint64(0)
	supers := make([][]byte, len(legs))
	for i, meta := range metas {
		super := make([]byte, sectorSize)
		if meta == nil || legs[i].dev == nil || guest.ReadFull(meta, super, 0) != nil || string(super[:4]) != "DmRd" {
			continue
		}
		supers[i] = super
		if events := le.Uint64(super[16:]); events > newest {
			newest, failed = events, le.Uint64(super[24:])
		}
	}
	for i, super := range supers {
		if legs[i].dev == nil || super == nil {
			continue
		}
		rebuilt := le.Uint64(super[32:])
		switch {
		case i < 64 && failed>>i&1 != 0, le.Uint64(super[16:])+1 < newest:
			b.warn("%s: image %d of RAID is out of date and left out", lv.name, i)
			legs[i] = leg{}
			gone++
		case rebuilt < uint64(legs[i].good/sectorSize):
			legs[i].good = int64(rebuilt) * sectorSize
		}
	}
	return gone
}
