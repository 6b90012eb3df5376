package ext

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/bits"
	"strings"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

var le = binary.LittleEndian

// Features: ext4 doc, Super Block. Those not in the document are named as mke2fs(8) and ext4(5) name them.
const (
	compatJournal      = 0x4
	compatSparseSuper2 = 0x200

	incompatFiletype   = 0x2
	incompatRecover    = 0x4
	incompatJournalDev = 0x8
	incompatMetaBG     = 0x10
	incompatExtents    = 0x40
	incompat64bit      = 0x80
	incompatMMP        = 0x100
	incompatFlexBG     = 0x200
	incompatEAInode    = 0x400
	incompatCsumSeed   = 0x2000
	incompatLargeDir   = 0x4000
	incompatInline     = 0x8000
	incompatEncrypt    = 0x10000
	incompatCasefold   = 0x20000
	incompatKnown      = incompatFiletype | incompatRecover | incompatMetaBG | incompatExtents | incompat64bit | incompatMMP | incompatFlexBG |
		incompatEAInode | incompatCsumSeed | incompatLargeDir | incompatInline | incompatEncrypt | incompatCasefold

	roSparseSuper  = 0x1
	roLargeFile    = 0x2
	roBtreeDir     = 0x4
	roHugeFile     = 0x8
	roGDTCsum      = 0x10
	roDirNlink     = 0x20
	roExtraIsize   = 0x40
	roQuota        = 0x100
	roBigalloc     = 0x200
	roMetadataCsum = 0x400
	roReadonly     = 0x1000
	roProject      = 0x2000
	roVerity       = 0x8000
	roOrphan       = 0x10000
	// roOwned are those with which a block in use belongs to one file alone (not shared_blocks, not snapshots).
	roOwned = roSparseSuper | roLargeFile | roBtreeDir | roHugeFile | roGDTCsum | roDirNlink | roExtraIsize | roQuota | roBigalloc |
		roMetadataCsum | roReadonly | roProject | roVerity | roOrphan
)

// incompatNames are the features that are refused, and that have a name.
var incompatNames = map[uint32]string{0x1: "compression", incompatJournalDev: "journal_dev (an external journal)", 0x1000: "dirdata"}

// Bits of super.state.
const (
	stateValid  = 1
	stateErrors = 2
)

const (
	superOffset = 1024 // bytes, of the first superblock
	superSize   = 1024
	rootIno     = 2
)

// super is what is used of a superblock.
type super struct {
	compat, incompat, ro uint32
	state                uint16
	group                uint16 // that it stands in
	inodes               uint32
	blocks               int64 // of the whole file system
	firstData            int64 // block
	blockSize            int64 // bytes
	clusterBits          uint  // log2 of the blocks of a cluster
	blocksPerGroup       int64
	clustersPerGroup     int64
	inodesPerGroup       int64
	inodeSize            int64 // bytes
	descSize             int64 // bytes
	groups               int64
	reservedGDT          int64 // blocks
	firstMetaBG          int64
	backups              [2]uint32 // groups with a superblock, with sparse_super2
	uuid                 [16]byte
	label                string
	seed                 uint32 // of all metadata's checksums
	hashSeed             [4]uint32
	hashUnsigned         bool
	encoding             uint16 // of names
	journalIno           uint32
	journalBackup        []byte // i_block and size of the journal's inode; nil when there is no copy
}

// parseSuper reads a superblock: ErrUnknown when it is none, ErrDamaged when it cannot be right, ErrUnsupported when it has a feature that
// is not known.
func parseSuper(b []byte) (*super, error) {
	if len(b) < superSize || le.Uint16(b[0x38:]) != 0xEF53 {
		return nil, fmt.Errorf("ext: no superblock: %w", guest.ErrUnknown)
	}
	s := &super{
		inodes: le.Uint32(b), blocks: int64(le.Uint32(b[4:])), firstData: int64(le.Uint32(b[0x14:])),
		blocksPerGroup: int64(le.Uint32(b[0x20:])), clustersPerGroup: int64(le.Uint32(b[0x24:])), inodesPerGroup: int64(le.Uint32(b[0x28:])),
		state: le.Uint16(b[0x3a:]), inodeSize: 128, descSize: 32,
	}
	if le.Uint32(b[0x4c:]) > 0 {
		s.dynamic(b)
	}
	copy(s.uuid[:], b[0x68:])
	if err := s.checksum(b); err != nil {
		return nil, err
	}
	if err := s.supported(b); err != nil {
		return nil, err
	}
	return s, s.geometry(le.Uint32(b[0x18:]), le.Uint32(b[0x1c:]))
}

// dynamic reads what revision 1 added.
func (s *super) dynamic(b []byte) {
	s.inodeSize = int64(le.Uint16(b[0x58:]))
	s.group = le.Uint16(b[0x5a:])
	s.compat, s.incompat, s.ro = le.Uint32(b[0x5c:]), le.Uint32(b[0x60:]), le.Uint32(b[0x64:])
	s.label, _, _ = strings.Cut(string(b[0x78:0x88]), "\x00")
	s.reservedGDT = int64(le.Uint16(b[0xce:]))
	for i := range s.hashSeed {
		s.hashSeed[i] = le.Uint32(b[0xec+4*i:])
	}
	s.encoding = le.Uint16(b[0x27c:])
	s.hashUnsigned = le.Uint32(b[0x160:])&2 != 0
	s.firstMetaBG = int64(le.Uint32(b[0x104:]))
	s.backups = [2]uint32{le.Uint32(b[0x24c:]), le.Uint32(b[0x250:])}
	if s.incompat&incompat64bit != 0 {
		s.blocks |= int64(le.Uint32(b[0x150:])) << 32
		s.descSize = int64(le.Uint16(b[0xfe:]))
	}
	if s.compat&compatJournal != 0 {
		s.journalIno = le.Uint32(b[0xe0:])
		if b[0xfd] <= 1 {
			s.journalBackup = bytes.Clone(b[0x10c : 0x10c+17*4])
		}
	}
}

// checksum verifies the superblock's, and makes the seed of all others.
func (s *super) checksum(b []byte) error {
	s.seed = crc32c(^uint32(0), b[0x68:0x78])
	if s.incompat&incompatCsumSeed != 0 {
		s.seed = le.Uint32(b[0x270:])
	}
	if s.ro&roMetadataCsum == 0 {
		return nil
	}
	if b[0x175] != 1 {
		return guest.Unsupported("metadata checksums of kind %d", b[0x175])
	}
	if crc32c(^uint32(0), b[:0x3fc]) != le.Uint32(b[0x3fc:]) {
		return guest.Damaged("superblock: checksum")
	}
	return nil
}

func (s *super) supported(b []byte) error {
	unknown := s.incompat &^ incompatKnown
	if unknown == 0 {
		return nil
	}
	bit := uint32(1) << bits.TrailingZeros32(unknown)
	if name := incompatNames[bit]; name != "" {
		return guest.Unsupported("ext: feature %s", name)
	}
	return guest.Unsupported("ext: feature %#x", bit)
}

// geometry checks that the numbers can be, and completes them.
func (s *super) geometry(logBlock, logCluster uint32) error {
	if logBlock > 6 {
		return guest.Damaged("superblock: blocks of 2^%d bytes", 10+uint64(logBlock))
	}
	s.blockSize = 1024 << logBlock
	if s.ro&roBigalloc != 0 {
		if logCluster < logBlock || logCluster > 20 {
			return guest.Damaged("superblock: clusters of 2^%d bytes", 10+uint64(logCluster))
		}
		s.clusterBits = uint(logCluster - logBlock)
	} else {
		s.clustersPerGroup = s.blocksPerGroup
	}
	bitmap := s.blockSize * 8
	switch {
	case s.blocksPerGroup == 0 || s.clustersPerGroup == 0 || s.clustersPerGroup > bitmap || s.blocksPerGroup != s.clustersPerGroup<<s.clusterBits:
		return guest.Damaged("superblock: %d blocks in a group", s.blocksPerGroup)
	case s.inodeSize < 128 || s.inodeSize > s.blockSize || s.inodeSize&(s.inodeSize-1) != 0:
		return guest.Damaged("superblock: inodes of %d bytes", s.inodeSize)
	case s.inodesPerGroup == 0 || s.inodesPerGroup > bitmap:
		return guest.Damaged("superblock: %d inodes in a group", s.inodesPerGroup)
	case s.descSize < 32 || s.descSize > s.blockSize || s.descSize&(s.descSize-1) != 0 || s.incompat&incompat64bit != 0 && s.descSize < 64:
		return guest.Damaged("superblock: group descriptors of %d bytes", s.descSize)
	case s.blocks <= s.firstData || s.blocks > 1<<48 || s.firstData > 1:
		return guest.Damaged("superblock: %d blocks", s.blocks)
	}
	s.groups = (s.blocks - s.firstData + s.blocksPerGroup - 1) / s.blocksPerGroup
	if int64(s.inodes) > s.groups*s.inodesPerGroup {
		return guest.Damaged("superblock: %d inodes in %d groups", s.inodes, s.groups)
	}
	return nil
}

// kind names the file system as blkid(8) does: by the features that need a driver of ext3 or ext4.
func (s *super) kind() string {
	switch {
	case s.incompat&^(incompatFiletype|incompatRecover|incompatMetaBG) != 0 || s.ro&^(roSparseSuper|roLargeFile|roBtreeDir) != 0:
		return "ext4"
	case s.compat&compatJournal != 0:
		return "ext3"
	}
	return "ext2"
}

// hasSuper reports whether a group begins with a copy of the superblock (ext4 doc, Super Block).
func (s *super) hasSuper(group int64) bool {
	switch {
	case group == 0:
		return true
	case s.compat&compatSparseSuper2 != 0:
		return group == int64(s.backups[0]) || group == int64(s.backups[1])
	case s.ro&roSparseSuper == 0 || group == 1:
		return true
	}
	for _, base := range []int64{3, 5, 7} {
		n := base
		for n < group {
			n *= base
		}
		if n == group {
			return true
		}
	}
	return false
}

// firstBlock is the first block of a group.
func (s *super) firstBlock(group int64) int64 { return s.firstData + group*s.blocksPerGroup }

// uuidText is the UUID as blkid prints it.
func (s *super) uuidText() string {
	if s.uuid == ([16]byte{}) {
		return ""
	}
	u := s.uuid
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}
