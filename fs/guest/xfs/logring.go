package xfs

import (
	"hash/crc32"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// The log is a ring of sectors of 512 bytes, in which records follow each other (XFSDS, Journaling Log). The first four
// bytes of each sector tell how often the ring has been gone through: its cycle. A record's header:
//
//	0    magic number feedbabe       16   its own sequence number: cycle, sector
//	4    cycle                       24   that of the first record that is still needed
//	8    version                     32   CRC-32C, little-endian; 0 when there is none
//	12   bytes of data               36   sector of the record before it, 40  operations in it
//	44   64 words: what the first four bytes of the data's sectors were
//	300  format, 304 UUID, 320  bytes that the header is made for
//
// A record made for more than 32 KiB has further sectors of such words behind its header: a cycle, 64 words.
const (
	sector      = 512
	logMagic    = 0xfeedbabe
	maxRecord   = 256 << 10 // bytes of data
	inFlight    = 8         // records that may be written at the same time
	wordsPer    = 64        // sectors of data that a header sector has words for
	headerBytes = 328       // of a header's sector that its checksum covers; 324 on 32-bit machines
	header32    = 324
	moreBytes   = 260 // of a further header sector
)

type ring struct {
	dev  guest.Device
	off  int64 // bytes
	size int64 // sectors
	uuid [16]byte
}

// read reads n sectors from sector at on, past the ring's end from its beginning on.
func (r *ring) read(at, n int64) ([]byte, error) {
	b := make([]byte, n*sector)
	first := min(n, r.size-at)
	if err := guest.ReadFull(r.dev, b[:first*sector], r.off+at*sector); err != nil {
		return nil, err
	}
	return b, guest.ReadFull(r.dev, b[first*sector:], r.off)
}

// cycleOf is the cycle of a sector, which a record's header has in its second word.
func cycleOf(b []byte) uint32 {
	if c := be.Uint32(b); c != logMagic {
		return c
	}
	return be.Uint32(b[4:])
}

func (r *ring) cycle(at int64) (uint32, error) {
	var b [8]byte
	err := guest.ReadFull(r.dev, b[:], r.off+at*sector)
	return cycleOf(b[:]), err
}

// A record of the log, its header parsed.
type record struct {
	at      int64 // sector
	cycle   uint32
	version uint32
	size    int64 // bytes of data
	heads   int64 // sectors of the header
	lsn     uint64
	tail    uint64
	crc     uint32
	ops     int
}

// sectors is how many the whole record takes.
func (r *record) sectors() int64 { return r.heads + (r.size+sector-1)/sector }

// parse parses the header of the record at sector at.
func (r *ring) parse(b []byte, at int64) (record, error) {
	if be.Uint32(b) != logMagic {
		return record{}, guest.Damaged("no record at sector %d", at)
	}
	rec := record{at: at, cycle: be.Uint32(b[4:]), version: be.Uint32(b[8:]), size: int64(be.Uint32(b[12:])), heads: 1,
		lsn: be.Uint64(b[16:]), tail: be.Uint64(b[24:]), crc: le.Uint32(b[32:]), ops: int(be.Uint32(b[40:]))}
	made := int64(be.Uint32(b[320:]))
	switch format := be.Uint32(b[300:]); {
	case rec.version == 2 && made > wordsPer*sector:
		rec.heads = (made + wordsPer*sector - 1) / (wordsPer * sector)
	case rec.version == 0 || rec.version > 2:
		return rec, guest.Unsupported("a record of version %d", rec.version)
	case format > 1:
		return rec, guest.Unsupported("written by a machine of the other byte order")
	}
	switch {
	case rec.size < 0 || rec.size > maxRecord || rec.heads > maxRecord/(wordsPer*sector) || rec.sectors() > r.size:
		return rec, guest.Damaged("a record of %d bytes at sector %d", rec.size, at)
	case rec.ops < 0 || int64(rec.ops) > rec.size/opHead:
		return rec, guest.Damaged("%d operations in a record of %d bytes", rec.ops, rec.size)
	case [16]byte(b[304:320]) != r.uuid && rec.version == 2:
		return rec, guest.Damaged("a record of another file system at sector %d", at)
	}
	return rec, nil
}

// header reads and parses the header at a sector.
func (r *ring) header(at int64) (record, error) {
	b, err := r.read(at, 1)
	if err != nil {
		return record{}, err
	}
	return r.parse(b, at)
}

// load reads a record whole, checks it and puts its words back.
func (r *ring) load(rec *record, must bool) ([]byte, error) {
	b, err := r.read(rec.at, rec.sectors())
	if err != nil {
		return nil, err
	}
	head, data := b[:rec.heads*sector], b[rec.heads*sector:]
	if rec.crc != 0 || must {
		if rec.crc != recordSum(head, data[:rec.size], headerBytes) && rec.crc != recordSum(head, data[:rec.size], header32) {
			return nil, guest.Damaged("the checksum of the record at sector %d", rec.at)
		}
	}
	for i := int64(0); i*sector < rec.size; i++ {
		word := head[44+i%wordsPer*4:]
		if i >= wordsPer {
			if i/wordsPer >= rec.heads {
				return nil, guest.Damaged("a record of %d bytes with %d sectors of header", rec.size, rec.heads)
			}
			word = head[i/wordsPer*sector+4+i%wordsPer*4:]
		}
		copy(data[i*sector:i*sector+4], word)
	}
	return data[:rec.size], nil
}

// recordSum is the checksum of a record: of its header with no checksum in it, of the further header sectors, of the data.
func recordSum(head, data []byte, headerBytes int) uint32 {
	c := checksum(head[:headerBytes], 32)
	for at := sector; at < len(head); at += sector {
		c = crc32.Update(c, castagnoli, head[at:at+moreBytes])
	}
	return crc32.Update(c, castagnoli, data)
}
