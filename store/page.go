package store

import (
	"encoding/binary"
	"errors"
	"math/bits"
)

// PageEntries is how many entries a page of a chunk map has.
const PageEntries = 256

const (
	pageHeaderLen = 4
	pageBitmapLen = PageEntries / 8
	maxPageLen    = pageHeaderLen + pageBitmapLen + PageEntries*32 // bytes
	maxHeight     = 7                                              // 256^7 chunks are more than any disk
)

// page is one node of a chunk map: at level 0 the ids of chunks, above it the
// ids of pages one level down. A zero id is a hole of the entry's whole range.
type page struct {
	level uint8
	ids   [PageEntries]ID
}

// encode appends the canonical form of p: equal pages have equal bytes.
func (p *page) encode(b []byte) []byte {
	b = append(b, 'm', 1, p.level, 0)
	var bitmap [pageBitmapLen]byte
	for i := range p.ids {
		if !p.ids[i].IsZero() {
			bitmap[i/8] |= 1 << (i % 8)
		}
	}
	b = append(b, bitmap[:]...)
	for i := range p.ids {
		if !p.ids[i].IsZero() {
			b = append(b, p.ids[i][:]...)
		}
	}
	return b
}

// empty reports whether every entry is a hole.
func (p *page) empty() bool { return p.ids == [PageEntries]ID{} }

// decodePage parses b, refusing anything that encode would not have written.
func decodePage(b []byte, level uint8, p *page) error {
	if len(b) < pageHeaderLen+pageBitmapLen || b[0] != 'm' || b[1] != 1 || b[3] != 0 {
		return errors.New("page: header")
	}
	if b[2] != level {
		return errors.New("page: level")
	}
	bitmap := b[pageHeaderLen : pageHeaderLen+pageBitmapLen]
	n := 0
	for i := 0; i < pageBitmapLen; i += 8 {
		n += bits.OnesCount64(binary.LittleEndian.Uint64(bitmap[i:]))
	}
	ids := b[pageHeaderLen+pageBitmapLen:]
	if len(ids) != n*32 {
		return errors.New("page: length")
	}
	p.level = level
	for i := range p.ids {
		if bitmap[i/8]>>(i%8)&1 == 0 {
			p.ids[i] = ID{}
			continue
		}
		p.ids[i] = ID(ids[:32])
		ids = ids[32:]
		if p.ids[i].IsZero() {
			return errors.New("page: zero id")
		}
	}
	return nil
}

// Root is the chunk map of one disk: a disk is its size and its root page.
type Root struct {
	Page ID    // zero when the whole disk is a hole
	Size int64 // bytes
}

// height is how many levels of pages cover n chunks; at least one.
func height(chunks int64) int {
	h := 1
	for span := int64(PageEntries); span < chunks; span *= PageEntries {
		h++
	}
	return h
}

// span is how many chunks one entry of a page at that level covers.
func span(level uint8) int64 { return 1 << (8 * uint(level)) }

// chunkCount is how many chunks a disk of size bytes has.
func chunkCount(size int64, chunkSize int) int64 {
	return (size + int64(chunkSize) - 1) / int64(chunkSize)
}
