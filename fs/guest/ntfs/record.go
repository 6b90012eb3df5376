package ntfs

import (
	"bytes"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// A record of the MFT (NTFS doc, "FILE Record"), with its update sequence put right:
//
//	0x00  "FILE"              0x14  offset of the first attribute (2)
//	0x04  update sequence: offset, number of words (2 + 2)
//	0x10  sequence number (2) 0x16  flags (2): in use, directory
//	0x12  links (2)           0x18  bytes in use (4)
//	                          0x20  reference to the base record (8), 0 in a base record
type record []byte

const (
	recordHeader = 0x30
	inUse        = 1
	isDirectory  = 2
)

// A reference to a record: its number, and in the upper 16 bits its sequence number.
const refMask = 1<<48 - 1

// stride is what the update sequence protects with each of its words, whatever a sector is (NTFS doc, "Fixup").
const stride = 512

// fixup puts a block right whose sectors end in the update sequence number. A block of which a part was not written is damaged.
func fixup(b []byte) error {
	off, n := int(le.Uint16(b[4:])), int(le.Uint16(b[6:]))
	if n != len(b)/stride+1 || off&1 != 0 || off < 8 || off+2*n > stride-2 {
		return guest.Damaged("update sequence: %d words at %d", n, off)
	}
	number := b[off : off+2]
	for i := 1; i < n; i++ {
		end := b[i*stride-2 : i*stride]
		if !bytes.Equal(end, number) {
			return guest.Damaged("update sequence: sector %d of a block was not written with the others", i-1)
		}
		copy(end, b[off+2*i:])
	}
	return nil
}

// pieceSize is in what pieces the MFT is read, bytes.
const pieceSize = 16 << 10

// mftDevice is the content of $MFT as a device: whole pieces, with zeros behind its end.
type mftDevice struct {
	s    *stream
	size int64
}

func (d mftDevice) Size() int64 { return (d.size + pieceSize - 1) / pieceSize * pieceSize }

func (d mftDevice) ReadAt(p []byte, off int64) (int, error) {
	n := max(0, min(int64(len(p)), d.size-off))
	if err := d.s.read(p[:n], off); err != nil {
		return 0, err
	}
	clear(p[n:])
	return len(p), nil
}

// fixPiece puts all records of a piece right; those that cannot be are marked as Windows does it.
func fixPiece(b []byte, size int64) {
	for at := int64(0); at < int64(len(b)); at += size {
		if r := b[at : at+size]; bytes.Equal(r[:4], []byte("FILE")) && fixup(r) != nil {
			copy(r, "BAAD")
		}
	}
}

// record gives a record of the MFT, which is shared. ErrNotExist: there is none, or nothing uses it.
func (f *FS) record(n int64) (record, error) {
	if n < 0 || n >= f.records {
		return nil, guest.ErrNotExist
	}
	r, err := f.own(n)
	if err != nil {
		return nil, err
	}
	if n < mirrored && !r.whole() {
		if m := f.mirror[n]; m != nil {
			r = m
		}
	}
	switch {
	case r.whole():
	case bytes.Equal(r[:4], make([]byte, 4)):
		return nil, guest.ErrNotExist
	default:
		return nil, guest.Damaged("record %d of the MFT", n)
	}
	if le.Uint16(r[0x16:])&inUse == 0 {
		return nil, guest.ErrNotExist
	}
	return r, nil
}

// own gives a record as the MFT has it, whatever it is.
func (f *FS) own(n int64) (record, error) {
	at := n * f.geo.record
	piece, err := f.pieces.Block(at/pieceSize, func(b []byte) error { fixPiece(b, f.geo.record); return nil })
	if err != nil {
		return nil, err
	}
	return record(piece[at%pieceSize:][:f.geo.record]), nil
}

// whole reports whether it is a record, and not one that is damaged or none at all.
func (r record) whole() bool { return bytes.Equal(r[:4], []byte("FILE")) }

func (r record) sequence() uint16 { return le.Uint16(r[0x10:]) }
func (r record) base() int64      { return int64(le.Uint64(r[0x20:]) & refMask) }

// attributes yields the attributes of a record, each with its header, until yield says that it is enough.
func (r record) attributes(yield func(header) bool) error {
	off, used := int(le.Uint16(r[0x14:])), int(le.Uint32(r[0x18:]))
	if used > len(r) || off < 0x28 || off > used {
		return guest.Damaged("a record with attributes from %d to %d", off, used)
	}
	for b := r[off:used]; ; {
		if len(b) < 4 || le.Uint32(b) == attrEnd {
			return nil
		}
		if len(b) < 24 {
			return guest.Damaged("an attribute of %d bytes", len(b))
		}
		n := int(le.Uint32(b[4:]))
		if n < 24 || n > len(b) {
			return guest.Damaged("an attribute of %d bytes", n)
		}
		if !yield(header(b[:n])) {
			return nil
		}
		b = b[n:]
	}
}

// attribute finds the attribute with that type and id.
func (r record) attribute(kind uint32, id uint16) (header, error) {
	var found header
	err := r.attributes(func(h header) bool {
		if h.kind() == kind && h.id() == id {
			found = h
		}
		return found == nil
	})
	if err == nil && found == nil {
		err = guest.Damaged("no attribute %#x with id %d", kind, id)
	}
	return found, err
}
