package xfs

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"hash/crc32"
	"math/bits"
	"strings"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

var (
	be         = binary.BigEndian
	le         = binary.LittleEndian
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// Bits of sb_versionnum and sb_features2 (XFSDS, Superblocks).
const (
	versionMask  = 0x000f
	versionDirV2 = 0x2000
	versionCI    = 0x4000 // names without case, ASCII
	versionMore  = 0x8000
	features2CRC = 0x0100
	features2FT  = 0x0200
)

// Bits of sb_features_incompat.
const (
	incompatFtype       = 1 << 0
	incompatSparse      = 1 << 1
	incompatMetaUUID    = 1 << 2
	incompatBigtime     = 1 << 3
	incompatNeedsRepair = 1 << 4
	incompatNrext64     = 1 << 5
	incompatExchange    = 1 << 6
	incompatParent      = 1 << 7

	roKnown  = 1<<4 - 1 // of sb_features_ro_compat: finobt, rmapbt, reflink, inobtcount
	logKnown = 1 << 0   // of sb_features_log_incompat: attributes that are logged as intents

	incompatKnown = incompatFtype | incompatSparse | incompatMetaUUID | incompatBigtime | incompatNeedsRepair |
		incompatNrext64 | incompatExchange | incompatParent
)

// incompatNames names the bits from the lowest on.
var incompatNames = []string{"ftype", "sparse inodes", "meta_uuid", "bigtime", "needs repair", "nrext64", "exchange-range", "parent", "metadir",
	"zoned", "zone gaps"}

// A super is the superblock.
type super struct {
	blockSize int64
	blockLog  uint
	dblocks   uint64 // blocks of the file system
	agBlocks  uint64 // blocks of an allocation group; the last may have fewer
	agCount   uint64
	agLog     uint // bits of a block number within a group
	sectSize  int64

	inodeSize int64
	inopbLog  uint // log2 of inodes in a block

	dirLog  uint // log2 of blocks in a directory block
	root    uint64
	journal uint64 // the log's first block; 0 when it is on another device
	logLen  int64  // blocks

	v5         bool
	ftype      bool // directories tell types
	ci         bool
	incompat   uint32
	roCompat   uint32
	logCompat  uint32
	uuid, meta [16]byte // as shown, and as stamped on metadata
	label      string
}

// checksum is that of b with the four bytes at off taken for zeros (XFSDS, Metadata Integrity: CRC32c).
func checksum(b []byte, off int) uint32 {
	var zero [4]byte
	c := crc32.Update(0, castagnoli, b[:off])
	c = crc32.Update(c, castagnoli, zero[:])
	return crc32.Update(c, castagnoli, b[off+4:])
}

func summed(b []byte, off int) bool { return checksum(b, off) == le.Uint32(b[off:]) }

func parseSuper(b []byte) (*super, error) {
	if len(b) < 512 || string(b[:4]) != "XFSB" {
		return nil, guest.ErrUnknown
	}
	s := &super{
		blockSize: int64(be.Uint32(b[4:])), blockLog: uint(b[120]), dblocks: be.Uint64(b[8:]),
		agBlocks: uint64(be.Uint32(b[84:])), agCount: uint64(be.Uint32(b[88:])), agLog: uint(b[124]),
		sectSize: int64(be.Uint16(b[102:])), inodeSize: int64(be.Uint16(b[104:])), inopbLog: uint(b[123]),
		dirLog: uint(b[192]), root: be.Uint64(b[56:]), journal: be.Uint64(b[48:]), logLen: int64(be.Uint32(b[96:])),
		label: string(bytes.TrimRight(b[108:120], "\x00")),
	}
	copy(s.uuid[:], b[32:])
	s.meta = s.uuid
	if err := s.geometry(); err != nil {
		return nil, err
	}
	return s, s.features(b)
}

// geometry checks what everything else is computed from.
func (s *super) geometry() error {
	switch {
	case s.blockLog < 9 || s.blockLog > 16 || s.blockSize != 1<<s.blockLog:
	case s.sectSize < 512 || s.sectSize > 32768 || bits.OnesCount64(uint64(s.sectSize)) != 1:
	case s.inodeSize < 256 || s.inodeSize > 2048 || s.inodeSize > s.blockSize || s.inodeSize<<s.inopbLog != s.blockSize:
	case s.blockLog+s.dirLog > 16:
	case s.agBlocks == 0 || s.agCount == 0 || s.agLog > 31 || s.agLog != uint(bits.Len64(s.agBlocks-1)):
	case s.dblocks == 0 || s.dblocks > 1<<62>>s.blockLog || (s.dblocks-1)/s.agBlocks != s.agCount-1:
	default:
		return nil
	}
	return guest.Damaged("the superblock's sizes")
}

func (s *super) features(b []byte) error {
	version, features2 := be.Uint16(b[100:]), uint32(0)
	if version&versionMore != 0 {
		features2 = be.Uint32(b[200:])
	}
	s.ci = version&versionCI != 0
	switch version & versionMask {
	case 4:
		s.ftype = features2&features2FT != 0
		if features2&features2CRC != 0 {
			return guest.Damaged("a superblock of version 4 with checksums")
		}
	case 5:
		s.v5, s.incompat = true, be.Uint32(b[216:])
		s.roCompat, s.logCompat = be.Uint32(b[212:]), be.Uint32(b[220:])
		s.ftype = s.incompat&incompatFtype != 0
		if int64(len(b)) < s.sectSize || !summed(b[:s.sectSize], 224) {
			return guest.Damaged("the superblock's checksum")
		}
		if s.incompat&incompatMetaUUID != 0 {
			copy(s.meta[:], b[248:])
		}
	default:
		return guest.Unsupported("XFS version %d", version&versionMask)
	}
	if version&versionDirV2 == 0 {
		return guest.Unsupported("directories of version 1")
	}
	if unknown := s.incompat &^ incompatKnown; unknown != 0 {
		return guest.Unsupported("features of a newer XFS: %s", featureNames(unknown))
	}
	return nil
}

func featureNames(unknown uint32) string {
	var names []string
	for bit := range 32 {
		if unknown>>bit&1 == 0 {
			continue
		}
		if bit < len(incompatNames) {
			names = append(names, incompatNames[bit])
		} else {
			names = append(names, "bit "+hex.EncodeToString([]byte{byte(bit)}))
		}
	}
	return strings.Join(names, ", ")
}

// agLen is the blocks of a group.
func (s *super) agLen(ag uint64) uint64 {
	if ag == s.agCount-1 {
		return s.dblocks - ag*s.agBlocks
	}
	return s.agBlocks
}

// offset is where on the device n blocks from fsb on lie, which names the group in its upper bits (XFSDS, Allocation Groups).
func (s *super) offset(fsb, n uint64) (int64, error) {
	ag, block := fsb>>s.agLog, fsb&(1<<s.agLog-1)
	if ag >= s.agCount || block >= s.agLen(ag) || n > s.agLen(ag)-block {
		return 0, guest.Damaged("blocks %#x and %d more, outside of the file system", fsb, n)
	}
	return int64(ag*s.agBlocks+block) << s.blockLog, nil
}

// dirSize is the bytes of a directory block.
func (s *super) dirSize() int64 { return s.blockSize << s.dirLog }

// pick chooses between what version 4 and 5 have.
func (s *super) pick(v4, v5 int) int {
	if s.v5 {
		return v5
	}
	return v4
}

func (s *super) uuidText() string {
	h := hex.EncodeToString(s.uuid[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}
