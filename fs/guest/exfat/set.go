package exfat

import (
	"strings"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/cluster"
)

// Types of entries (§6.2.1, §7). Bit 7: in use; bit 6: follows another; bit 5: may be ignored by who does not know it.
const (
	entryBitmap = 0x81
	entryUpcase = 0x82
	entryLabel  = 0x83
	entryFile   = 0x85
	entryStream = 0xc0
	entryName   = 0xc1

	typeInUse     = 0x80
	typeSecondary = 0x40
	typeBenign    = 0x20
)

// Attributes (§7.4.4) and flags of a stream (§6.3.4).
const (
	attrReadOnly = 0x01
	attrDir      = 0x10

	flagNoChain = 0x02
)

// A set is the entries of a file or directory (§7.4, §7.6, §7.7):
//
//	file    0 type   1 number of entries behind it   2 checksum (2)   4 attributes (2)   8 created, 12 written, 16 read (4 each)
//	        20 created, 21 written: 10 ms   22 created, 23 written, 24 read: zone
//	stream  0 type   1 flags   3 length of the name   4 hash of it (2)   8 valid length (8)   20 first cluster (4)   24 length (8)
//	name    0 type   1 flags   2 15 units
type set struct {
	file   [cluster.SlotSize]byte
	stream [cluster.SlotSize]byte
	name   string
	slot   uint32 // of the file's entry
	next   uint32 // the one behind the last
	ino    guest.Ino
}

func (s *set) dir() bool     { return le.Uint16(s.file[4:])&attrDir != 0 }
func (s *set) first() uint32 { return le.Uint32(s.stream[20:]) }
func (s *set) size() int64   { return int64(le.Uint64(s.stream[24:])) }
func (s *set) valid() int64  { return int64(le.Uint64(s.stream[8:])) }

func (s *set) kind() uint32 {
	if s.dir() {
		return guest.ModeDir
	}
	return guest.ModeRegular
}

// chain is the clusters of what the set names.
func (s *set) chain(t *cluster.Table) *cluster.Chain {
	switch {
	case s.size() == 0:
		return t.Chain(0)
	case s.stream[1]&flagNoChain != 0:
		return t.Run(s.first(), (s.size()-1)/t.Size+1)
	}
	return t.Chain(s.first())
}

// slotReader gives slots one after the other, nil behind the last.
type slotReader interface{ Next() ([]byte, error) }

const unitsPerName = 15

// readSet reads the entries behind that of a file, which b is.
func readSet(b []byte, it slotReader) (s set, err error) {
	s.file = [cluster.SlotSize]byte(b)
	count, want := int(b[1]), le.Uint16(b[2:])
	if count < 2 {
		return s, guest.Damaged("a file of %d entries", count+1)
	}
	// The checksum covers all but itself (§6.3.3).
	sum := checksum16(checksum16(0, b[:2]), b[4:])
	var units []uint16
	unknown := byte(0)
	for i := range count {
		b, err := it.Next()
		if err != nil {
			return s, err
		}
		if b == nil || b[0]&(typeInUse|typeSecondary) != typeInUse|typeSecondary || (i == 0) != (b[0] == entryStream) {
			return s, guest.Damaged("a file of %d entries, of which number %d is another's", count+1, i+1)
		}
		sum = checksum16(sum, b)
		switch {
		case b[0] == entryStream:
			s.stream = [cluster.SlotSize]byte(b)
			units = make([]uint16, 0, int(b[3])+unitsPerName)
		case b[0] == entryName && len(units) < int(s.stream[3]):
			for j := range unitsPerName {
				units = append(units, le.Uint16(b[2+2*j:]))
			}
		case b[0] == entryName, b[0]&typeBenign == 0:
			unknown = b[0]
		}
	}
	n := int(s.stream[3])
	switch {
	case sum != want:
		return s, guest.Damaged("entries of a file: their checksum")
	case unknown != 0:
		return s, guest.Unsupported("a file with an entry of type %#x", unknown)
	case n == 0 || n > len(units):
		return s, guest.Damaged("a name of %d units in %d", n, len(units))
	case s.size() < 0 || s.valid() < 0 || s.valid() > s.size():
		return s, guest.Damaged("a file of %d bytes, %d of them valid", s.size(), s.valid())
	}
	s.name = cluster.Text(units[:n])
	if s.name == "." || s.name == ".." || strings.ContainsAny(s.name, "/\x00") {
		return s, guest.Damaged("an entry with the name %q", s.name)
	}
	return s, nil
}

// checksum16 goes on with the checksum of a set (§6.3.3).
func checksum16(sum uint16, b []byte) uint16 {
	for _, c := range b {
		sum = (sum>>1 | sum<<15) + uint16(c)
	}
	return sum
}
