package btrfs

import (
	"errors"
	"fmt"
	"strings"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// Superblocks (BTRFS, On-disk Format, Superblock).
const (
	superSize   = 4096
	superMagic  = "_BHRfS_M"
	superArray  = 0x32b // the array of system chunks
	superArrays = 2048  // its bytes at most
)

var superPlaces = []int64{64 << 10, 64 << 20, 256 << 30}

// A super is a superblock.
type super struct {
	fsid, meta            [16]byte // meta is what nodes have
	generation            uint64
	root, chunkRoot, log  uint64 // logical addresses
	chunkGen              uint64
	total                 int64
	devices               uint64
	sector, node          int
	incompat, compatRO    uint64
	csum                  csumType
	rootLevel, chunkLevel int
	logLevel              int
	devID                 uint64
	devUUID               [16]byte
	label                 string
	chunks                []byte // keys and chunk items
}

// Features that are incompatible, by bit; "" is one that is read.
var incompatNames = map[int]string{12: "zoned", 13: "extent tree v2", 14: "raid stripe tree", 17: "remap tree"}

// knownIncompat are: mixed backrefs, default subvolume, mixed groups, LZO, Zstandard, big metadata, extended refs, RAID5/6, skinny metadata, no
// holes, metadata UUID, RAID1C3/4, simple quotas.
const (
	knownIncompat    = 0x00010fff
	incompatMetaUUID = 1 << 10
	roVerity         = 1 << 2
	roGroupTree      = 1 << 3
)

// features refuses what is not known, by name.
func (s *super) features() error {
	var names []string
	for bit := range 64 {
		if s.incompat&^knownIncompat&(1<<bit) == 0 {
			continue
		}
		if name := incompatNames[bit]; name != "" {
			names = append(names, name)
		} else {
			names = append(names, fmt.Sprintf("unknown feature %d", bit))
		}
	}
	if len(names) > 0 {
		return guest.Unsupported("a file system with %s", strings.Join(names, ", "))
	}
	return nil
}

// parseSuper reads the superblock that lies at off.
func parseSuper(b []byte, off int64) (*super, error) {
	if string(b[0x40:0x48]) != superMagic {
		return nil, guest.ErrUnknown
	}
	sum, err := csumOf(le.Uint16(b[0xc4:]))
	if err != nil {
		return nil, err
	}
	if !sum.matches(b, b[csumField:]) {
		return nil, guest.Damaged("the superblock's checksum")
	}
	if le.Uint64(b[0x30:]) != uint64(off) {
		return nil, guest.Damaged("a superblock that says that it lies elsewhere")
	}
	s := &super{
		fsid: [16]byte(b[0x20:]), generation: le.Uint64(b[0x48:]), root: le.Uint64(b[0x50:]), chunkRoot: le.Uint64(b[0x58:]), log: le.Uint64(b[0x60:]),
		total: int64(le.Uint64(b[0x70:])), devices: le.Uint64(b[0x88:]), sector: int(le.Uint32(b[0x90:])), node: int(le.Uint32(b[0x94:])),
		chunkGen: le.Uint64(b[0xa4:]), compatRO: le.Uint64(b[0xb4:]), incompat: le.Uint64(b[0xbc:]), csum: sum,
		rootLevel: int(b[0xc6]), chunkLevel: int(b[0xc7]), logLevel: int(b[0xc8]),
		devID: le.Uint64(b[0xc9:]), devUUID: [16]byte(b[0xc9+0x42:]),
	}
	s.label, _, _ = strings.Cut(string(b[0x12b:0x22b]), "\x00")
	s.meta = s.fsid
	if s.incompat&incompatMetaUUID != 0 {
		s.meta = [16]byte(b[0x23b:])
	}
	n := le.Uint32(b[0xa0:])
	switch {
	case n > superArrays:
		return nil, guest.Damaged("%d bytes of system chunks", n)
	case !unit(s.sector) || !unit(s.node) || s.node < s.sector:
		return nil, guest.Damaged("sectors of %d bytes and nodes of %d", s.sector, s.node)
	case s.total < 0:
		return nil, guest.Damaged("a size of %d bytes", uint64(s.total))
	}
	s.chunks = append([]byte(nil), b[superArray:superArray+n]...)
	return s, s.features()
}

// unit reports whether n may be the size of a sector or a node.
func unit(n int) bool { return n >= 4096 && n <= 65536 && n&(n-1) == 0 }

func superAt(dev guest.Device, off int64) (*super, error) {
	if off > dev.Size()-superSize {
		return nil, guest.ErrUnknown
	}
	b := make([]byte, superSize)
	if err := guest.ReadFull(dev, b, off); err != nil {
		return nil, err
	}
	return parseSuper(b, off)
}

// findSuper gives the newest superblock of a device, and a warning when it is not the first. A device whose first superblock
// has no magic number is none of ours: the copies stay when another file system is made.
func findSuper(dev guest.Device) (*super, string, error) {
	best, first := superAt(dev, superPlaces[0])
	if first != nil && !errors.Is(first, guest.ErrDamaged) {
		return nil, "", first
	}
	warning := ""
	for _, off := range superPlaces[1:] {
		s, err := superAt(dev, off)
		switch {
		case err != nil:
			continue
		case best == nil:
			warning = "the first superblock is damaged: a copy of it is in use"
		case s.fsid != best.fsid || s.generation <= best.generation:
			continue
		default:
			warning = "the first superblock is old: a copy of it is in use"
		}
		best = s
	}
	if best == nil {
		return nil, "", first
	}
	return best, warning, nil
}

func uuidText(u [16]byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

// Member tells which file system a device is part of, and as which of its devices, so that a caller can group devices for OpenAll.
func Member(dev guest.Device) (fsid, devid string, ok bool) {
	s, _, err := findSuper(dev)
	if err != nil {
		return "", "", false
	}
	return uuidText(s.fsid), fmt.Sprint(s.devID), true
}
