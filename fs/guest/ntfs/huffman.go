package ntfs

import "github.com/holdfast-backup/holdfast/fs/guest"

// bitReader reads bits of 16-bit little-endian words, the highest first, as XPRESS and LZX have them. Behind the end are zeros.
type bitReader struct {
	src  []byte
	at   int    // next byte
	bits uint64 // the upper n bits are valid
	n    uint
}

// word takes another word in.
func (r *bitReader) word() {
	if r.at+1 < len(r.src) {
		r.bits |= uint64(le.Uint16(r.src[r.at:])) << (48 - r.n)
	}
	r.at += 2
	r.n += 16
}

func (r *bitReader) drop(n uint) {
	r.bits <<= n
	r.n -= n
}

// take gives the next n bits, at most 16.
func (r *bitReader) take(n uint) int {
	for r.n < n {
		r.word()
	}
	v := int(r.bits >> 1 >> (63 - n))
	r.drop(n)
	return v
}

// over reports whether more was read than there is.
func (r *bitReader) over() bool { return r.at-int(r.n/8) > len(r.src)+2 }

const maxBits = 16 // of a code, in all of these

// huffman is a prefix code: symbols in order of the length of their codes and then of their number have ascending codes.
type huffman struct {
	symbols []uint16 // in order of their codes
	first   [maxBits + 2]int32
	index   [maxBits + 2]int32 // of the first symbol of a length
	quick   [1 << quickBits]uint16
}

// quickBits is up to which length of a code a table tells the symbol at once: symbol<<4 | length, or 0.
const quickBits = 9

// build makes the code of these lengths, 0 for a symbol that is not in it. A code that leaves bits over is not refused, as one of a single symbol does.
func (h *huffman) build(lens []byte) error {
	var count [maxBits + 2]int32
	for _, n := range lens {
		count[n]++
	}
	count[0] = 0
	code, at := int32(0), int32(0)
	for n := 1; n <= maxBits; n++ {
		h.first[n], h.index[n] = code, at
		code, at = (code+count[n])<<1, at+count[n]
		if code > 2<<n {
			return guest.Damaged("a prefix code with too many codes of %d bits", n)
		}
	}
	h.first[maxBits+1], h.index[maxBits+1] = code, at
	if cap(h.symbols) < len(lens) {
		h.symbols = make([]uint16, len(lens))
	}
	h.symbols = h.symbols[:at]
	clear(h.quick[:])
	next := h.index
	for s, n := range lens {
		if n == 0 {
			continue
		}
		h.symbols[next[n]] = uint16(s)
		if n <= quickBits {
			from := (h.first[n] + next[n] - h.index[n]) << (quickBits - n)
			for k := range int32(1) << (quickBits - n) {
				h.quick[from+k] = uint16(s)<<4 | uint16(n)
			}
		}
		next[n]++
	}
	return nil
}

// next reads a symbol. ok is false for bits that are no code.
func (h *huffman) next(r *bitReader) (symbol int, ok bool) {
	for r.n < maxBits {
		r.word()
	}
	if q := h.quick[r.bits>>(64-quickBits)]; q != 0 {
		r.drop(uint(q & 15))
		return int(q >> 4), true
	}
	for n := uint(quickBits + 1); n <= maxBits; n++ {
		code := int32(r.bits >> (64 - n))
		if k := code - h.first[n]; k >= 0 && k < h.index[n+1]-h.index[n] {
			r.drop(n)
			return int(h.symbols[h.index[n]+k]), true
		}
	}
	return 0, false
}
