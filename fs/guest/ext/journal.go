package ext

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// The journal, jbd2's, is a file of blocks with numbers in big-endian order (ext4 doc, Journal):
//
//	┌────────────┬────────────┬──────────────┬────────┬─────┬────────────┬─────┬──────────────┐
//	│ superblock │ descriptor │ data blocks … │ revoke │ …   │   commit   │  …  │ fast commits │
//	└────────────┴────────────┴──────────────┴────────┴─────┴────────────┴─────┴──────────────┘
//	 block 0      first … end: a ring; s_start is where the oldest transaction begins
//
// Every block but those of data starts with a magic number, its kind and the number of its transaction. A transaction counts once its commit
// block is there and the checksums match; a torn one ends the log.
var be = binary.BigEndian

const journalMagic = 0xC03B3998

// Kinds of journal blocks.
const (
	kindDescriptor = 1
	kindCommit     = 2
	kindSuper1     = 3
	kindSuper2     = 4
	kindRevoke     = 5
)

// Journal features.
const (
	journalCompatSum   = 0x1 // checksums of the first kind
	journalRevoke      = 0x1
	journal64bit       = 0x2
	journalAsync       = 0x4
	journalSum2        = 0x8
	journalSum3        = 0x10
	journalFast        = 0x20
	journalIncompat    = journalRevoke | journal64bit | journalAsync | journalSum2 | journalSum3 | journalFast
	journalHeader      = 12  // bytes
	journalFastDefault = 256 // blocks, when the superblock does not tell
)

// journal is one that is read.
type journal struct {
	f                *FS
	in               inode
	compat, incompat uint32
	sequence         uint32 // of the oldest transaction
	start            int64  // its block; 0: there is none
	first, end       int64  // blocks of the ring
	maxlen           int64  // blocks of the file
	seed             uint32
	failed           uint32 // errno of what went wrong in the guest
}

// recover shows the file system as its journal would leave it.
func (f *FS) recover(opt guest.Options) error {
	if f.compat&compatJournal == 0 {
		return nil
	}
	// A copy of the superblock does not tell that the journal is needed: then the journal does.
	if f.incompat&incompatRecover == 0 && f.backupGroup == 0 {
		return nil
	}
	if opt.NoReplay {
		f.doubt("its journal was not replayed")
		return nil
	}
	if f.journalIno == 0 {
		f.warn("the journal is on another device, so what is shown may not be consistent")
		return nil
	}
	err := f.replay(opt)
	if errors.Is(err, guest.ErrUnsupported) {
		return fmt.Errorf("ext: journal: %w", err)
	}
	if err != nil {
		f.warn("the journal cannot be replayed, so what is shown may not be consistent: %v", err)
	}
	return nil
}

// replay replays the journal into memory.
func (f *FS) replay(opt guest.Options) error {
	j, err := f.openJournal()
	if err != nil {
		return err
	}
	if j.failed != 0 {
		f.warn("the guest gave up writing its journal (error %d)", j.failed)
	}
	if j.start == 0 {
		return nil
	}
	end, err := j.scan()
	if err != nil {
		return err
	}
	revoked, err := j.revoked(end, opt.Journal/2)
	if err != nil {
		return err
	}
	over := guest.NewOverlay(f.dev, f.blockSize, opt.Journal)
	if err := j.write(over, end, revoked); err != nil {
		return err
	}
	if over.Len() > 0 {
		f.info.Replayed = true
		f.dev = over
		f.use(f.super, opt.Cache)
		f.reread(opt.Cache)
	}
	if j.incompat&journalFast != 0 {
		return j.replayFast(end, opt.Journal)
	}
	return nil
}

// reread takes the superblock as the journal has it.
func (f *FS) reread(cache int64) {
	b := make([]byte, superSize)
	err := guest.ReadFull(f.dev, b, superOffset)
	if err == nil && f.backupGroup == 0 {
		var s *super
		if s, err = parseSuper(b); err == nil {
			f.use(s, cache)
		}
	}
	if err != nil {
		f.warn("the journal's superblock: %v", err)
	}
}

// openJournal reads the journal's superblock.
func (f *FS) openJournal() (*journal, error) {
	j := &journal{f: f}
	b := make([]byte, f.blockSize)
	var err error
	if j.in, err = f.inode(guest.Ino(f.journalIno)); err == nil {
		err = j.read(0, b)
	}
	if err != nil && f.journalBackup != nil {
		// The superblock keeps a copy of i_block and the two halves of the size (ext4 doc, Super Block).
		raw := make([]byte, 128)
		copy(raw[0x28:], f.journalBackup[:60])
		copy(raw[4:], f.journalBackup[64:])
		copy(raw[0x6c:], f.journalBackup[60:64])
		j.in = inode{no: f.journalIno, raw: raw, mode: guest.ModeRegular, size: int64(le.Uint32(raw[4:])) | int64(le.Uint32(raw[0x6c:]))<<32}
		if le.Uint16(raw[0x28:]) == extentMagic {
			j.in.flags = flagExtents
		}
		err = j.read(0, b)
	}
	if err != nil {
		return nil, err
	}
	return j, j.parse(b)
}

// parse reads the superblock.
func (j *journal) parse(b []byte) error {
	kind := be.Uint32(b[4:])
	if be.Uint32(b) != journalMagic || kind != kindSuper1 && kind != kindSuper2 {
		return guest.Damaged("the journal's superblock")
	}
	j.maxlen, j.first, j.start = int64(be.Uint32(b[0x10:])), int64(be.Uint32(b[0x14:])), int64(be.Uint32(b[0x1c:]))
	j.sequence, j.failed = be.Uint32(b[0x18:]), be.Uint32(b[0x20:])
	j.end = j.maxlen
	if kind == kindSuper2 {
		j.compat, j.incompat = be.Uint32(b[0x24:]), be.Uint32(b[0x28:])
		j.seed = crc32c(^uint32(0), b[0x30:0x40])
	}
	if unknown := j.incompat &^ journalIncompat; unknown != 0 {
		return fmt.Errorf("its feature %#x is not known", unknown)
	}
	if j.sums() && (b[0x50] != 4 || crc32c(crc32c(crc32c(^uint32(0), b[:0xfc]), zeros[:]), b[0x100:superSize]) != be.Uint32(b[0xfc:])) {
		return guest.Damaged("checksum of the journal's superblock")
	}
	if j.incompat&journalFast != 0 {
		n := int64(be.Uint32(b[0x54:]))
		if n == 0 {
			n = journalFastDefault
		}
		j.end -= n
	}
	blocks := j.in.size / j.f.blockSize
	if int64(be.Uint32(b[0xc:])) != j.f.blockSize || j.maxlen > blocks || j.first < 1 || j.first >= j.end || j.start != 0 && (j.start < j.first || j.start >= j.end) {
		return guest.Damaged("the journal's superblock")
	}
	return nil
}

// sums reports whether every block has a checksum.
func (j *journal) sums() bool { return j.incompat&(journalSum2|journalSum3) != 0 }

// place is where block n of the journal is on the device, bytes.
func (j *journal) place(n int64) (int64, error) {
	r, err := j.f.find(&j.in, n)
	if err == nil && !r.data() {
		err = guest.Damaged("a hole in the journal")
	}
	return r.phys * j.f.blockSize, err
}

// read reads block n of the journal.
func (j *journal) read(n int64, b []byte) error {
	off, err := j.place(n)
	if err != nil {
		return err
	}
	return guest.ReadFull(j.f.dev, b, off)
}

// wrap is the block of the ring that is n blocks behind at.
func (j *journal) wrap(at, n int64) int64 { return j.first + (at-j.first+n)%(j.end-j.first) }

// A tag says where a data block belongs.
type tag struct {
	block   int64
	escaped bool
	sum     uint32
}

// tagSize is the size of a tag without its UUID, bytes. Checksums of the second kind add two bytes that are not used
// (seen in journals that debugfs writes with "journal_open -c -v 2").
func (j *journal) tagSize() int {
	n := 8
	switch {
	case j.incompat&journalSum3 != 0:
		return 16
	case j.incompat&journalSum2 != 0:
		n += 2
	}
	if j.incompat&journal64bit != 0 {
		n += 4
	}
	return n
}

// tags reads a descriptor block.
func (j *journal) tags(b []byte) []tag {
	const escape, sameUUID, last = 1, 2, 8
	var list []tag
	size := j.tagSize()
	if j.sums() {
		b = b[:len(b)-4]
	}
	for at := journalHeader; at+size <= len(b); at += size {
		e := b[at:]
		t := tag{block: int64(be.Uint32(e))}
		flags, high := uint32(be.Uint16(e[6:])), 8
		t.sum = uint32(be.Uint16(e[4:]))
		if j.incompat&journalSum3 != 0 {
			flags, t.sum = be.Uint32(e[4:]), be.Uint32(e[12:])
		}
		if j.incompat&journal64bit != 0 {
			t.block |= int64(be.Uint32(e[high:])) << 32
		}
		t.escaped = flags&escape != 0
		list = append(list, t)
		if flags&last != 0 {
			break
		}
		if flags&sameUUID == 0 {
			at += 16
		}
	}
	return list
}

// A logBlock is a block of the ring that is not data.
type logBlock struct {
	kind     uint32
	sequence uint32
	b        []byte // until the next
	tags     []tag  // of a descriptor
	data     int64  // the block behind a descriptor
}

// walk calls visit for the blocks of the log, the oldest first, until one is not of it, or visit returns false.
func (j *journal) walk(visit func(l *logBlock) (bool, error)) error {
	b := make([]byte, j.f.blockSize)
	at, sequence := j.start, j.sequence
	for left := j.end - j.first; left > 0; left-- {
		if err := j.read(at, b); err != nil {
			return err
		}
		l := logBlock{kind: be.Uint32(b[4:]), sequence: sequence, b: b, data: j.wrap(at, 1)}
		if be.Uint32(b) != journalMagic || be.Uint32(b[8:]) != sequence {
			return nil
		}
		switch l.kind {
		case kindDescriptor:
			l.tags = j.tags(b)
		case kindCommit:
			sequence++
		case kindRevoke:
		default:
			return nil
		}
		if more, err := visit(&l); err != nil || !more {
			return err
		}
		left -= int64(len(l.tags))
		at = j.wrap(at, 1+int64(len(l.tags)))
	}
	return nil
}
