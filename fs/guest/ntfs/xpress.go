package ntfs

import "github.com/holdfast-backup/holdfast/fs/guest"

const (
	xpressSymbols = 512
	xpressTable   = xpressSymbols / 2 // bytes: 4 bits for the length of each code
)

// xpress decompresses LZ77 with Huffman codes ([MS-XCA] §2.2), one block of at most 64 KiB.
//
// Symbols below 256 are bytes. The others are matches: the lower 4 bits are the length less 3, and the upper 4 how many
// bits of the distance follow. A length of 15 has a byte more, of 255 two more, and of 0 in those four.
func xpress(dst, src []byte) error {
	if len(src) < xpressTable {
		return guest.Damaged("XPRESS: %d bytes", len(src))
	}
	var lens [xpressSymbols]byte
	for i, b := range src[:xpressTable] {
		lens[2*i], lens[2*i+1] = b&15, b>>4
	}
	var code huffman
	if err := code.build(lens[:]); err != nil {
		return err
	}
	r := bitReader{src: src, at: xpressTable}
	r.word()
	r.word()
	for at := 0; at < len(dst); {
		symbol, ok := code.next(&r)
		if !ok || r.over() {
			return guest.Damaged("XPRESS: no code at byte %d of %d", at, len(dst))
		}
		r.refill()
		if symbol < 256 {
			dst[at] = byte(symbol)
			at++
			continue
		}
		symbol -= 256
		n, ok := r.length(symbol & 15)
		shift := uint(symbol >> 4)
		back := 1<<shift | r.take(shift)
		r.refill()
		if !ok || back > at {
			return guest.Damaged("XPRESS: %d bytes back at byte %d", back, at)
		}
		at = repeat(dst, at, back, n)
	}
	return nil
}

// refill takes a word in when there are less than 16 bits, as the decoder of [MS-XCA] §2.2.4 does: where the bytes between
// the words are depends on it.
func (r *bitReader) refill() {
	if r.n < 16 {
		r.word()
	}
}

// length gives the length of a match, of which symbol has 4 bits.
func (r *bitReader) length(symbol int) (n int, ok bool) {
	if symbol < 15 {
		return symbol + 3, true
	}
	b := r.bytes(1)
	if b == nil {
		return 0, false
	}
	if b[0] < 255 {
		return int(b[0]) + 15 + 3, true
	}
	if b = r.bytes(2); b == nil {
		return 0, false
	}
	n = int(le.Uint16(b))
	if n == 0 {
		if b = r.bytes(4); b == nil {
			return 0, false
		}
		n = int(le.Uint32(b))
	}
	return n + 3, n >= 15 && n < 1<<30
}

// bytes takes n whole bytes, or nil.
func (r *bitReader) bytes(n int) []byte {
	if r.at > len(r.src)-n {
		return nil
	}
	b := r.src[r.at : r.at+n]
	r.at += n
	return b
}
