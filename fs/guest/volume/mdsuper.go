package volume

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

const mdMagic = 0xa92b4efc

// member is a device with an md superblock.
type member struct {
	name  string // of the volume it is on
	kind  string // likewise
	dev   device
	depth int

	minor  int    // of version 1: where the superblock is; -1 for version 0.90
	set    string // UUID of the array
	array  string // its name, "" for none
	number int    // of /dev/mdN, -1 when it is not said
	level  int
	layout int
	chunk  int64 // bytes
	disks  int
	size   int64 // bytes that each member gives to the array, of levels 1 and up
	start  int64 // of the data, bytes
	avail  int64 // bytes for data
	events uint64
	role   int // its place in the array; below 0: spare, faulty or a journal
	own    int // its number, which stays when its place changes
	// roles are the places of all numbers, as this superblock knows them.
	roles []int
	// recovered is up to where a member that is being rebuilt is good, bytes; below 0 for all of it.
	recovered int64
	dirty     bool // writes may be in some members and not in others
	reshaping bool
	journal   bool // the array has a journal device
	bad       []extentRange
}

// Members that are none of the array's places.
const (
	roleSpare   = -1
	roleFaulty  = -2
	roleJournal = -3
)

// Feature bits of version 1, md.4 and the kernel's include/uapi names.
const (
	mdRecovery    = 2
	mdReshape     = 4
	mdReplacement = 16
	mdNewOffset   = 64
	mdJournal     = 512
	mdRAID0Layout = 4096
)

// readMember looks for an md superblock in all four places. ErrUnknown for none. Version 0.90 only at the end of a device, where the last
// partition of a disk may have put it: its caller must know.
func readMember(dev device) (*member, error) {
	err := error(guest.ErrUnknown)
	for minor, at := range mdPlaces(dev.Size()) {
		m, e := readMember1(dev, at, minor)
		if e == nil {
			return m, nil
		}
		if e != guest.ErrUnknown {
			err = e
		}
	}
	m, e := readMember0(dev)
	if e == nil {
		return m, nil
	}
	if err == guest.ErrUnknown {
		err = e
	}
	return nil, err
}

// mdPlaces are the offsets of superblocks 1.0, 1.1 and 1.2 ("RAID superblock formats", Sub-versions): 8 KiB before the end and aligned
// to 4 KiB, at the start, 4 KiB from it.
func mdPlaces(size int64) [3]int64 {
	return [3]int64{(size/sectorSize - 16) &^ 7 * sectorSize, 0, 4096}
}

// md0Place is where a superblock 0.90 is: the last whole 64 KiB but one.
func md0Place(size int64) int64 { return size&^(64<<10-1) - 64<<10 }

// readMember1 reads a superblock of version 1 ("RAID superblock formats", version-1), little-endian:
//
//	0 magic 4 | 4 major 4 | 8 features 4 | 16 set UUID 16 | 32 name 32 | 72 level 4 | 76 layout 4 | 80 size 8 | 88 chunk 4 | 92 disks 4
//	128 data offset 8 | 136 data size 8 | 144 super offset 8 | 152 recovery offset 8 | 160 own number 4 | 184 flags 1 | 185 shift 1, size 2,
//	offset 4 of the list of bad blocks | 200 events 8 | 208 resync offset 8 | 216 checksum 4 | 220 roles 4 | 256 role of each number, 2 each
func readMember1(dev device, at int64, minor int) (*member, error) {
	const most = 4096
	if at < 0 || at > dev.Size()-1024 {
		return nil, guest.ErrUnknown
	}
	b := make([]byte, min(most, dev.Size()-at))
	if err := guest.ReadFull(dev, b, at); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	if le.Uint32(b) != mdMagic || le.Uint32(b[4:]) != 1 || le.Uint64(b[144:]) != uint64(at/sectorSize) {
		return nil, guest.ErrUnknown
	}
	roles := int(le.Uint32(b[220:]))
	if roles > (len(b)-256)/2 || roles < 0 {
		return nil, guest.Damaged("md: a superblock with %d roles", roles)
	}
	if mdSum(b[:256+2*roles], 216) != le.Uint32(b[216:]) {
		return nil, guest.Damaged("md: the superblock's checksum")
	}
	features := le.Uint32(b[8:])
	m := &member{dev: dev, minor: minor, set: hex.EncodeToString(b[16:32]), number: -1, level: int(int32(le.Uint32(b[72:]))),
		layout: int(int32(le.Uint32(b[76:]))), disks: int(le.Uint32(b[92:])), events: le.Uint64(b[200:]), recovered: -1,
		dirty: le.Uint64(b[208:]) != 1<<64-1, reshaping: features&(mdReshape|mdNewOffset) != 0, journal: features&mdJournal != 0}
	if name, _, _ := bytes.Cut(b[32:64], []byte{0}); len(name) > 0 {
		m.array = string(name)
	}
	if m.level == 0 && features&mdRAID0Layout == 0 {
		m.layout = 0
	}
	size, chunk, start, avail := le.Uint64(b[80:]), le.Uint32(b[88:]), le.Uint64(b[128:]), le.Uint64(b[136:])
	if size > 1<<52 || start > 1<<52 || avail > 1<<52 || int64(start)*sectorSize > dev.Size() || m.disks > 4096 || m.disks < 1 {
		return nil, guest.Damaged("md: a superblock with data at sector %d, %d disks", start, m.disks)
	}
	m.size, m.chunk, m.start, m.avail = int64(size)*sectorSize, int64(chunk)*sectorSize, int64(start)*sectorSize, int64(avail)*sectorSize
	m.avail = min(m.avail, dev.Size()-m.start)
	for i := range roles {
		r := int(le.Uint16(b[256+2*i:]))
		switch {
		case r == 0xfffe:
			r = roleFaulty
		case r == 0xfffd:
			r = roleJournal
		case r >= 0xff00:
			r = roleSpare
		}
		m.roles = append(m.roles, r)
	}
	m.role, m.own = roleSpare, int(le.Uint32(b[160:]))
	if m.own >= 0 && m.own < roles {
		m.role = m.roles[m.own]
	}
	if features&mdRecovery != 0 && m.role != roleJournal {
		m.recovered = int64(min(le.Uint64(b[152:]), 1<<52)) * sectorSize
	}
	if features&mdReplacement != 0 {
		m.role = roleSpare // what it replaces is there until it is done
	}
	m.readBad(b, at)
	return m, nil
}

// readBad reads the list of bad blocks: 64 bits each, a sector of the device above 10 bits of a count. The list ends with all bits
// set, or after the 8 sectors that Linux allows.
func (m *member) readBad(b []byte, at int64) {
	le := binary.LittleEndian
	shift, n, off := b[185], min(8, int64(le.Uint16(b[186:]))), int64(int32(le.Uint32(b[188:])))
	if le.Uint32(b[8:])&8 == 0 || n == 0 || shift > 20 {
		return
	}
	list := make([]byte, n*sectorSize)
	if guest.ReadFull(m.dev, list, at+off*sectorSize) != nil {
		return
	}
	for ; len(list) >= 8; list = list[8:] {
		v := le.Uint64(list)
		if v == 1<<64-1 {
			return
		}
		start, count := v>>10<<shift, (v&0x3ff)<<shift
		if start < 1<<52 {
			m.bad = append(m.bad, extentRange{int64(start) * sectorSize, int64(count) * sectorSize})
		}
	}
}

// readMember0 reads a superblock 0.90: 1024 words of the byte order of the machine that made it; only little-endian ones are known. By
// words ("RAID superblock formats", version-0.90):
//
//	0 magic | 1 major | 2 minor | 5 set | 7 level | 8 size (KiB) | 10 disks | 11 md minor | 13-15 set | 33 state | 38 checksum
//	39, 40 events | 64 layout | 65 chunk (bytes) | 128… descriptors of 32 words: number, major, minor, place, state | 992 own descriptor
func readMember0(dev device) (*member, error) {
	at := md0Place(dev.Size())
	if at < 0 {
		return nil, guest.ErrUnknown
	}
	b := make([]byte, 4096)
	if err := guest.ReadFull(dev, b, at); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	word := func(i int) uint32 { return le.Uint32(b[4*i:]) }
	if word(0) != mdMagic || word(1) != 0 {
		return nil, guest.ErrUnknown
	}
	if mdSum(b, 38*4) != word(38) {
		return nil, guest.Damaged("md: the superblock's checksum")
	}
	const active, sync = 1 << 1, 1 << 2
	m := &member{dev: dev, minor: -1, number: int(word(11)), level: int(int32(word(7))), layout: int(word(64)), chunk: int64(word(65)),
		set: fmt.Sprintf("%08x%08x%08x%08x", word(5), word(13), word(14), word(15)), disks: int(word(10)), size: int64(word(8)) << 10,
		avail: at, events: uint64(word(39)) | uint64(word(40))<<32, role: roleSpare, recovered: -1,
		dirty: word(33)&1 == 0, reshaping: word(2) >= 91}
	if m.disks < 1 || m.disks > 27 {
		return nil, guest.Damaged("md: a superblock with %d disks", m.disks)
	}
	place := func(at int) int {
		place, state := int(word(at+3)), word(at+4)
		if state&1 != 0 || state&(active|sync) != active|sync || place >= m.disks {
			return roleSpare
		}
		return place
	}
	const descriptors, mine = 128, 992
	for i := range 27 {
		m.roles = append(m.roles, place(descriptors+32*i))
	}
	m.role, m.own = place(mine), int(word(mine))
	if m.level == 0 {
		m.layout = 0
	}
	return m, nil
}

// mdSum adds 32-bit words, but for the one at skip, and folds what overflows.
func mdSum(b []byte, skip int) uint32 {
	le := binary.LittleEndian
	sum := uint64(0)
	i := 0
	for ; i+4 <= len(b); i += 4 {
		if i != skip {
			sum += uint64(le.Uint32(b[i:]))
		}
	}
	if i+2 <= len(b) {
		sum += uint64(le.Uint16(b[i:]))
	}
	return uint32(sum) + uint32(sum>>32)
}
