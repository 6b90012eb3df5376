package ntfs

import (
	"github.com/holdfast-backup/holdfast/fs/guest"
)

// Types of attributes (NTFS doc, "Attributes").
const (
	attrStandard  = 0x10
	attrList      = 0x20
	attrFileName  = 0x30
	attrObjectID  = 0x40
	attrSecurity  = 0x50
	attrVolName   = 0x60
	attrVolInfo   = 0x70
	attrData      = 0x80
	attrIndexRoot = 0x90
	attrIndex     = 0xa0
	attrBitmap    = 0xb0
	attrReparse   = 0xc0
	attrEAInfo    = 0xd0
	attrEA        = 0xe0
	attrEnd       = 0xffffffff
)

// Flags of an attribute.
const (
	compressMask  = 0x00ff
	compressLZNT1 = 0x0001
	encrypted     = 0x4000
	sparse        = 0x8000
)

// A header of an attribute as a record has it (NTFS doc, "Attribute Header"):
//
//	0x00  type (4)                     0x09  length of the name, UTF-16 units (1)
//	0x04  length (4)                   0x0a  offset of the name (2)
//	0x08  1: not resident (1)          0x0c  flags (2)
//	                                   0x0e  id within the record (2)
//	resident:  0x10  length of the value (4)   0x14  its offset (2)
//	others:    0x10  first and last cluster (8 + 8)   0x20  offset of the mapping pairs (2)   0x22  compression unit, log2 of clusters (1)
//	           0x28  allocated, size, valid (8 + 8 + 8)   0x40  allocated when compressed or sparse (8)
type header []byte

func (h header) kind() uint32 { return le.Uint32(h) }
func (h header) id() uint16   { return le.Uint16(h[0x0e:]) }
func (h header) name() (string, error) {
	n, off := 2*int(h[0x09]), int(le.Uint16(h[0x0a:]))
	if n == 0 {
		return "", nil
	}
	if off+n > len(h) {
		return "", guest.Damaged("attribute %#x: a name past its end", h.kind())
	}
	return text(h[off : off+n]), nil
}

// attr is an attribute of a file, from all the records that it is in.
type attr struct {
	base     int64 // record of the file
	kind     uint32
	name     string
	flags    uint16
	resident bool
	value    []byte // of a resident one

	// Of the others:
	size, allocated, valid, packed int64 // bytes; packed is what is allocated of a compressed or sparse one
	unit                           int64 // clusters of a compression unit, or 0
	parts                          []part
}

// part is where the mapping pairs of a range of clusters are.
type part struct {
	low, high int64 // first and last cluster; high is unknown (-1) until it is read, but for the first
	record    int64
	id        uint16
	pairs     []byte // when known
}

// parse reads the header of an attribute of the file base whose first part is in the record rec.
func (h header) parse(base, rec int64) (attr, error) {
	a := attr{base: base, kind: h.kind(), flags: le.Uint16(h[0x0c:]), resident: h[8] == 0}
	var err error
	if a.name, err = h.name(); err != nil {
		return a, err
	}
	if a.resident {
		n, off := int64(le.Uint32(h[0x10:])), int64(le.Uint16(h[0x14:]))
		if off+n > int64(len(h)) {
			return a, guest.Damaged("attribute %#x: a value of %d bytes in %d", a.kind, n, len(h))
		}
		a.value, a.size, a.valid = h[off:off+n], n, n
		a.allocated = (n + 7) &^ 7
		return a, nil
	}
	p, err := h.part(rec)
	if err != nil {
		return a, err
	}
	a.parts = []part{p}
	a.allocated, a.size, a.valid = int64(le.Uint64(h[0x28:])), int64(le.Uint64(h[0x30:])), int64(le.Uint64(h[0x38:]))
	if a.size < 0 || a.allocated < 0 || a.valid < 0 || a.size > 1<<60 {
		return a, guest.Damaged("attribute %#x: sizes %d, %d, %d", a.kind, a.allocated, a.size, a.valid)
	}
	a.packed = a.allocated
	if a.flags&(compressMask|sparse) != 0 && le.Uint16(h[0x20:]) >= 0x48 && len(h) >= 0x48 {
		a.packed = int64(le.Uint64(h[0x40:]))
	}
	// Without a unit the flag says what new files are to be, as that of a directory's index does.
	if shift := h[0x22]; a.flags&compressMask != 0 && shift != 0 {
		if shift > 8 {
			return a, guest.Damaged("attribute %#x: a compression unit of 2^%d clusters", a.kind, shift)
		}
		a.unit = 1 << shift
	}
	return a, nil
}

// plain reports whether the clusters have the value as it is.
func (a *attr) plain() bool { return a.unit == 0 && a.flags&encrypted == 0 }

// part reads where the mapping pairs of a header are.
func (h header) part(rec int64) (part, error) {
	if len(h) < 0x40 {
		return part{}, guest.Damaged("attribute %#x: %d bytes", h.kind(), len(h))
	}
	p := part{low: int64(le.Uint64(h[0x10:])), high: int64(le.Uint64(h[0x18:])), record: rec, id: h.id()}
	off := int(le.Uint16(h[0x20:]))
	if off < 0x40 || off > len(h) || p.low < 0 || p.high < p.low-1 || p.high >= maxVCN {
		return part{}, guest.Damaged("attribute %#x: clusters %d to %d, mapping pairs at %d", h.kind(), p.low, p.high, off)
	}
	p.pairs = h[off:]
	return p, nil
}
