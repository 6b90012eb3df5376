package vdisk

import (
	"encoding/binary"
	"fmt"
)

// The seSparse extent has no public specification by VMware. What is known of
// it was published by S. Eiderman on the list qemu-devel ("SESparse" snapshots,
// 2019 and 2020), and is checked against qemu-img 7.2 here. All integers are
// u64, little-endian; places and sizes in sectors:
//
//	constant header, sector 0
//	+0  0xcafebabe       +80  volatile header, size   +144 grain tables, size
//	+8  version 2.1      +96  journal header, size    +160 free bitmap, size
//	+16 capacity         +112 journal, size           +176 back map, size
//	+24 grain size 8     +128 grain directory, size   +192 grains, size
//	+32 table size 64    +40  flags, 32 bytes reserved
//
//	volatile header
//	+0 0xcafecafe  +8 free table  +16 transaction  +24 journal must be replayed
//
// A directory entry is 0, or 0x10000000 in its high half and the number of a
// grain table in its low half. A table entry has its kind in the top 4 bits: 0
// not there, 1 unmapped, 2 zeros, 3 the grain with the number in the other 60
// bits, which are rotated: the upper 12 of them are the low bits of the number.
const (
	seSparseMagic   = "\xbe\xba\xfe\xca\x00\x00\x00\x00"
	seSparseVersion = 2<<32 | 1
	seGrain         = 4 * kib
	seEntries       = 4096
	seTable         = seEntries * 8 // bytes
)

// seSparse is the mapping of such an extent.
type seSparse struct {
	m          *mapped
	directory  int64 // place in the file
	tables     int64 // place of the first
	tablesLeft int64 // how many there are
	grains     int64 // place of the first
}

// openSESparse sets up m.
func openSESparse(m *mapped) error {
	if m.fileSize < 2*sector {
		return corrupt("not a seSparse extent: %d bytes", m.fileSize)
	}
	b := make([]byte, sector)
	if _, err := readFull(m.r, b, 0); err != nil {
		return fmt.Errorf("reading the header: %w", err)
	}
	if !hasPrefix(b, seSparseMagic) {
		return corrupt("not a seSparse extent")
	}
	u64 := func(at int) uint64 { return binary.LittleEndian.Uint64(b[at:]) }
	if v := u64(8); v != seSparseVersion {
		return unsupported("seSparse version %d.%d", v>>32, v&0xffffffff)
	}
	if u64(24) != seGrain/sector || u64(32) != seTable/sector || u64(40) != 0 {
		return unsupported("seSparse extent with grains of %d sectors, tables of %d, flags %#x", u64(24), u64(32), u64(40))
	}
	capacity := u64(16)
	if capacity > vmdkMaxDisk {
		return corrupt("capacity of %d sectors", capacity)
	}
	m.size = int64(capacity) * sector
	// Nothing but the two headers and the directory must be whole here: tables
	// and grains are checked when they are used.
	end := uint64(m.fileSize / sector)
	for _, at := range []int{80, 128, 144, 192} {
		if u64(at) > end {
			return corrupt("header field %d is sector %d of a file of %d", at, u64(at), end)
		}
	}
	s := &seSparse{
		m:          m,
		directory:  int64(u64(128)) * sector,
		tables:     int64(u64(144)) * sector,
		tablesLeft: int64(min(u64(152), end) / (seTable / sector)),
		grains:     int64(u64(192)) * sector,
	}
	n := divUp(m.size, seEntries*seGrain) * 8
	if n > m.fileSize-s.directory || uint64(n) > min(u64(136), end)*sector {
		return corrupt("a grain directory of %d bytes at %d, in a file of %d", n, s.directory, m.fileSize)
	}
	m.mapping = s
	return checkSEVolatile(m, int64(u64(80))*sector)
}

func checkSEVolatile(m *mapped, at int64) error {
	if at > m.fileSize-32 {
		return corrupt("a volatile header at %d of a file of %d bytes", at, m.fileSize)
	}
	b := make([]byte, 32)
	if _, err := readFull(m.r, b, at); err != nil {
		return fmt.Errorf("reading the volatile header: %w", err)
	}
	if binary.LittleEndian.Uint64(b) != 0xcafecafe {
		return corrupt("no volatile header at %d", at)
	}
	if binary.LittleEndian.Uint64(b[24:]) != 0 {
		return unsupported("the journal of the seSparse extent must be replayed first: it was not closed")
	}
	return nil
}

func (s *seSparse) lookup(w *walk, off int64) (span, error) {
	const perTable = seEntries * seGrain
	b, err := w.l1.bytes(s.directory+off/perTable*8, 8)
	if err != nil {
		return span{}, err
	}
	entry := binary.LittleEndian.Uint64(b)
	if entry == 0 {
		return span{Extent: to(off, roundUp(off+1, perTable))}, nil
	}
	table := int64(entry & 0xffffffff)
	if entry>>32 != 0x10000000 || table >= s.tablesLeft {
		return span{}, corrupt("grain directory entry %d is %#x, of %d tables", off/perTable, entry, s.tablesLeft)
	}
	at := s.tables + table*seTable + off%perTable/seGrain*8
	if b, err = w.l2.bytes(at, 8); err != nil {
		return span{}, err
	}
	return s.decode(off, at, binary.LittleEndian.Uint64(b))
}

func (s *seSparse) decode(off, at int64, entry uint64) (span, error) {
	r := span{Extent: to(off, roundUp(off+1, seGrain))}
	switch entry >> 60 {
	case 0:
		if entry != 0 {
			return span{}, corrupt("grain table entry at %d is %#x", at, entry)
		}
	case 1, 2:
		r.kind = zeroes
	case 3:
		number := entry<<4>>52 | entry<<16>>4
		if number >= uint64(s.m.fileSize/seGrain) {
			return span{}, corrupt("grain table entry at %d is %#x: grain %d of a file of %d bytes", at, entry, number, s.m.fileSize)
		}
		r.kind, r.host = plain, s.grains+int64(number)*seGrain+off%seGrain
	default:
		return span{}, corrupt("grain table entry at %d is %#x", at, entry)
	}
	return r, nil
}

func (s *seSparse) unpack([]byte, span) error { return corrupt("seSparse has no compressed grains") }
