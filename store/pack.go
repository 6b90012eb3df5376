package store

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"

	"github.com/zeebo/blake3"
)

// ID is the name of a chunk or page: its keyed BLAKE3. The zero ID is a hole.
type ID [32]byte

// IsZero reports whether id stands for a hole.
func (id ID) IsZero() bool { return id == ID{} }

// String is the hexadecimal form.
func (id ID) String() string { return hex.EncodeToString(id[:]) }

// MarshalText gives the hexadecimal form.
func (id ID) MarshalText() ([]byte, error) { return hexBytes(id[:]).MarshalText() }

// UnmarshalText reads it.
func (id *ID) UnmarshalText(s []byte) error { return unhex(id[:], s) }

// PackID names a pack: the random salt that its key is derived from.
type PackID [32]byte

// String is the hexadecimal form.
func (p PackID) String() string { return hex.EncodeToString(p[:]) }

// MarshalText gives the hexadecimal form.
func (p PackID) MarshalText() ([]byte, error) { return hexBytes(p[:]).MarshalText() }

// UnmarshalText reads it.
func (p *PackID) UnmarshalText(s []byte) error { return unhex(p[:], s) }

// unhex fills dst with what s, of exactly that length, says.
func unhex(dst, s []byte) error {
	if len(s) != hex.EncodedLen(len(dst)) {
		return fmt.Errorf("%q is not %d bytes in hexadecimal", s, len(dst))
	}
	_, err := hex.Decode(dst, s)
	return err
}

// Sizes and marks of the pack format, little-endian throughout; see doc.go.
const (
	packPrefix     = "packs/"
	packVersion    = 1
	packHeaderLen  = 80
	recordLen      = 56 // record header
	footerEntryLen = 44
	trailerLen     = 64
	maxPackLen     = 1 << 30 // bytes; offsets and lengths fit u32 with room

	recordMagic = 0x52434648 // "HFCR"
)

var (
	packMagic    = [8]byte{'H', 'F', 'P', 'A', 'C', 'K', '\r', '\n'}
	trailerMagic = [8]byte{'H', 'F', 'F', 'O', 'O', 'T', '\r', '\n'}
	castagnoli   = crc32.MakeTable(crc32.Castagnoli)
)

// Codec of a record body before encryption.
const (
	codecRaw  = 0
	codecZstd = 1
)

// Kind of a record.
const (
	KindChunk = 0
	KindPage  = 1
)

// KindSuspect is added to the Kind of a PackRecord, for AddPack alone: the record was found damaged.
const KindSuspect = 0x80

// PackRecord is one line of a pack's table.
type PackRecord struct {
	ID    ID
	Off   uint32 // bytes from the start of the pack to the record header
	Len   uint32 // bytes of the body as stored, without the record header
	Plain uint32 // bytes of the body decoded
	Kind  uint8
}

// packHeader is the first 80 bytes of a pack.
func encodePackHeader(repo [16]byte, id PackID, sealed bool) []byte {
	b := make([]byte, packHeaderLen)
	copy(b, packMagic[:])
	binary.LittleEndian.PutUint32(b[8:], packVersion)
	if sealed {
		b[12] = 1
	}
	copy(b[16:], repo[:])
	copy(b[32:], id[:])
	binary.LittleEndian.PutUint32(b[76:], crc32.Checksum(b[:76], castagnoli))
	return b
}

// checkPackHeader compares a pack's first bytes with what they must be. A header
// that is whole and of a later version is ErrNewerFormat.
func checkPackHeader(b []byte, repo [16]byte, id PackID, sealed bool) error {
	if bytes.Equal(b, encodePackHeader(repo, id, sealed)) {
		return nil
	}
	whole := bytes.HasPrefix(b, packMagic[:]) && crc32.Checksum(b[:76], castagnoli) == binary.LittleEndian.Uint32(b[76:])
	if v := binary.LittleEndian.Uint32(b[8:]); whole && v > packVersion {
		return fmt.Errorf("%w: pack of version %d", ErrNewerFormat, v)
	}
	return errors.New("pack header")
}

// recordHeader is the decoded form of the 56 bytes before every body.
type recordHeader struct {
	crc   uint32
	id    ID
	len   uint32 // stored body, bytes
	plain uint32 // decoded body, bytes
	codec uint8
	kind  uint8
	slot  uint32 // counter of the record in its pack; the nonce
}

// putRecordHeader writes h to b but for the CRC, which putRecordCRC adds when
// the body is in place.
func putRecordHeader(b []byte, h *recordHeader) {
	binary.LittleEndian.PutUint32(b, recordMagic)
	copy(b[8:], h.id[:])
	binary.LittleEndian.PutUint32(b[40:], h.len)
	binary.LittleEndian.PutUint32(b[44:], h.plain)
	b[48], b[49], b[50], b[51] = h.codec, h.kind, 0, 0
	binary.LittleEndian.PutUint32(b[52:], h.slot)
}

// putRecordCRC fills in the CRC-32C over everything behind it, header and body.
func putRecordCRC(record []byte) { binary.LittleEndian.PutUint32(record[4:], crcOf(record)) }

// crcOf is the CRC-32C that a record must have.
func crcOf(record []byte) uint32 { return crc32.Checksum(record[8:], castagnoli) }

// parseRecordHeader reads a record header; the CRC is not checked here.
func parseRecordHeader(b []byte) (h recordHeader, ok bool) {
	if len(b) < recordLen || binary.LittleEndian.Uint32(b) != recordMagic {
		return h, false
	}
	h.crc = binary.LittleEndian.Uint32(b[4:])
	copy(h.id[:], b[8:])
	h.len = binary.LittleEndian.Uint32(b[40:])
	h.plain = binary.LittleEndian.Uint32(b[44:])
	h.codec, h.kind = b[48], b[49]
	h.slot = binary.LittleEndian.Uint32(b[52:])
	if b[50] != 0 || b[51] != 0 || h.codec > codecZstd || h.kind > KindPage ||
		h.plain > MaxChunkSize || h.len > MaxChunkSize+tagLen {
		return h, false
	}
	return h, true
}

// recordAAD is the part of a record header that the tag covers.
func recordAAD(record []byte) []byte { return record[8:recordLen] }

// encodeFooter gives the table, sorted by id, and the trailer of a pack whose
// records end at byte end.
func encodeFooter(recs []PackRecord, header []byte, end uint32) []byte {
	slices.SortFunc(recs, func(a, b PackRecord) int { return bytes.Compare(a.ID[:], b.ID[:]) })
	b := make([]byte, 0, len(recs)*footerEntryLen+trailerLen)
	for _, r := range recs {
		b = append(b, r.ID[:]...)
		b = binary.LittleEndian.AppendUint32(b, r.Off)
		b = binary.LittleEndian.AppendUint32(b, r.Len)
		b = binary.LittleEndian.AppendUint32(b, r.Plain|uint32(r.Kind)<<31)
	}
	b = binary.LittleEndian.AppendUint32(b, uint32(len(recs)))
	b = binary.LittleEndian.AppendUint32(b, end)
	b = append(b, make([]byte, 16)...)
	sum := footerSum(header, b)
	b = append(b, sum[:]...)
	return append(b, trailerMagic[:]...)
}

// footerSum is the BLAKE3 over the pack header and the footer up to the sum.
func footerSum(header, footer []byte) (sum [32]byte) {
	h := blake3.New()
	h.Write(header)
	h.Write(footer)
	h.Sum(sum[:0])
	return sum
}

// decodeFooter parses footer, the bytes from end of records to end of pack.
func decodeFooter(header, footer []byte, recordsEnd int64) ([]PackRecord, error) {
	if len(footer) < trailerLen {
		return nil, errors.New("footer: too short")
	}
	table := footer[:len(footer)-trailerLen]
	trailer := footer[len(table):]
	if [8]byte(trailer[56:]) != trailerMagic {
		return nil, errors.New("footer: magic")
	}
	sum := footerSum(header, footer[:len(footer)-40])
	if !bytes.Equal(sum[:], trailer[24:56]) {
		return nil, errors.New("footer: checksum")
	}
	n := binary.LittleEndian.Uint32(trailer)
	if int64(n)*footerEntryLen != int64(len(table)) || int64(binary.LittleEndian.Uint32(trailer[4:])) != recordsEnd {
		return nil, errors.New("footer: counts")
	}
	recs := make([]PackRecord, n)
	for i := range recs {
		e := table[i*footerEntryLen:]
		plain := binary.LittleEndian.Uint32(e[40:])
		recs[i] = PackRecord{
			ID: ID(e[:32]), Off: binary.LittleEndian.Uint32(e[32:]), Len: binary.LittleEndian.Uint32(e[36:]),
			Plain: plain &^ (1 << 31), Kind: uint8(plain >> 31),
		}
		if r := recs[i]; int64(r.Off) < packHeaderLen || int64(r.Off)+recordLen+int64(r.Len) > recordsEnd || r.Plain > MaxChunkSize {
			return nil, errors.New("footer: entry out of range")
		}
	}
	return recs, nil
}

// readFooter reads and checks the header and the footer of a pack: two small
// reads for the ends, one for the table.
func readFooter(r io.ReaderAt, size int64, repo [16]byte, id PackID, sealed bool) ([]PackRecord, error) {
	if size < packHeaderLen+trailerLen || size > maxPackLen {
		return nil, errors.New("pack length")
	}
	var header [packHeaderLen]byte
	if _, err := io.ReadFull(io.NewSectionReader(r, 0, packHeaderLen), header[:]); err != nil {
		return nil, err
	}
	if err := checkPackHeader(header[:], repo, id, sealed); err != nil {
		return nil, err
	}
	var trailer [trailerLen]byte
	if _, err := io.ReadFull(io.NewSectionReader(r, size-trailerLen, trailerLen), trailer[:]); err != nil {
		return nil, err
	}
	n := int64(binary.LittleEndian.Uint32(trailer[:]))
	start := size - trailerLen - n*footerEntryLen
	if start < packHeaderLen {
		return nil, errors.New("footer: counts")
	}
	footer := make([]byte, size-start)
	if _, err := io.ReadFull(io.NewSectionReader(r, start, size-start), footer); err != nil {
		return nil, err
	}
	return decodeFooter(header[:], footer, start)
}

// scanRecords walks the records of a pack by their headers alone, as one does
// when the footer is lost, and calls fn with each whole record (header and
// body; valid until fn returns) whose CRC-32C is right. After damage it looks
// for the next record magic with a right CRC. It returns where the last good record ended.
func scanRecords(r io.ReaderAt, size int64, fn func(off int64, h recordHeader, record []byte) error) (int64, error) {
	off, end := int64(packHeaderLen), int64(packHeaderLen)
	var win scanWindow
	win.r, win.size = r, size
	for off+recordLen <= size {
		head, err := win.at(off, recordLen)
		if err != nil {
			return end, err
		}
		if h, ok := parseRecordHeader(head); ok && off+recordLen+int64(h.len) <= size {
			rec, err := win.at(off, recordLen+int(h.len))
			if err != nil {
				return end, err
			}
			if crcOf(rec) == h.crc {
				if err := fn(off, h, rec); err != nil {
					return end, err
				}
				off += int64(len(rec))
				end = off
				continue
			}
		}
		// Not a record here: the footer, or damage. Search on byte by byte.
		next, err := win.findMagic(off + 1)
		if err != nil {
			return end, err
		}
		if next < 0 {
			break
		}
		off = next
	}
	return end, nil
}

// scanWindow reads a pack through a sliding buffer.
type scanWindow struct {
	r    io.ReaderAt
	size int64
	off  int64 // of buf on the pack
	buf  []byte
	slow int64 // up to there the medium refuses large reads
}

const scanWindowLen = 8 << 20

// at gives n bytes at off, at most scanWindowLen.
func (w *scanWindow) at(off int64, n int) ([]byte, error) {
	if off < w.off || off+int64(n) > w.off+int64(len(w.buf)) {
		if w.buf == nil {
			w.buf = make([]byte, 0, min(scanWindowLen, w.size))
		}
		l := min(int64(scanWindowLen), w.size-off)
		if l < int64(n) {
			return nil, io.ErrUnexpectedEOF
		}
		if off < w.slow {
			l = int64(n)
		}
		w.off, w.buf = off, w.buf[:l]
		_, err := io.ReadFull(io.NewSectionReader(w.r, off, l), w.buf)
		if err != nil && l > int64(n) {
			// A bad block further on must not take the records before it along.
			w.slow, w.buf = off+l, w.buf[:n]
			_, err = io.ReadFull(io.NewSectionReader(w.r, off, int64(n)), w.buf)
		}
		if err != nil {
			w.buf = w.buf[:0]
			return nil, err
		}
	}
	i := off - w.off
	return w.buf[i : i+int64(n)], nil
}

// findMagic gives the place of the next record magic at or after off, or -1.
func (w *scanWindow) findMagic(off int64) (int64, error) {
	magic := binary.LittleEndian.AppendUint32(nil, recordMagic)
	for off+4 <= w.size {
		n := int(min(1<<20, w.size-off))
		b, err := w.at(off, n)
		if err != nil {
			return -1, err
		}
		if i := bytes.Index(b, magic); i >= 0 {
			return off + int64(i), nil
		}
		off += int64(n) - 3
		if n < 8 {
			break
		}
	}
	return -1, nil
}

func packName(id PackID) string { return packPrefix + id.String() }

// parsePackName undoes packName.
func parsePackName(name string) (id PackID, err error) {
	if len(name) != len(packPrefix)+64 || name[:len(packPrefix)] != packPrefix {
		return id, fmt.Errorf("%q is not the name of a pack", name)
	}
	_, err = hex.Decode(id[:], []byte(name[len(packPrefix):]))
	return id, err
}
