package ext

import (
	"math/bits"
	"slices"
)

// Hashes of names in directories: ext4 doc, Hash Tree Directories. Those above hashUnsigned are of bytes as numbers from 0 to 255, those
// below of bytes as numbers from -128 to 127, as the machine that made the file system had them.
const (
	hashLegacy = iota
	hashHalfMD4
	hashTEA
	hashUnsigned
)

// hashEnd is the hash behind all others, which no name may have.
const hashEnd = 0xFFFFFFFE

// hashName hashes a name. It reports whether it knows that kind of hash.
func hashName(kind int, seed [4]uint32, n string) (uint32, bool) {
	widen := func(c byte) uint32 { return uint32(int32(int8(c))) }
	if kind >= hashUnsigned {
		kind -= hashUnsigned
		widen = func(c byte) uint32 { return uint32(c) }
	}
	h := [4]uint32{0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476} // of MD4: RFC 1320 §3.3
	if seed != ([4]uint32{}) {
		h = seed
	}
	var sum uint32
	switch kind {
	case hashLegacy:
		sum = legacy(n, widen)
	case hashHalfMD4:
		for part := range slices.Chunk([]byte(n), 32) {
			halfMD4(&h, words(part, len(n), 8, widen))
			n = n[len(part):]
		}
		sum = h[1]
	case hashTEA:
		for part := range slices.Chunk([]byte(n), 16) {
			tea(&h, words(part, len(n), 4, widen))
			n = n[len(part):]
		}
		sum = h[0]
	default:
		return 0, false
	}
	if sum &^= 1; sum == hashEnd {
		sum -= 2
	}
	return sum, true
}

// words packs part into count numbers, the first byte highest, padded with the length of what is left of the name.
func words(part []byte, left, count int, widen func(byte) uint32) (w [8]uint32) {
	pad := uint32(left) * 0x01010101
	for i := range count {
		v := pad
		for _, c := range part[min(4*i, len(part)):min(4*i+4, len(part))] {
			v = v<<8 + widen(c)
		}
		w[i] = v
	}
	return w
}

func legacy(n string, widen func(byte) uint32) uint32 {
	h, last := uint32(0x12A3FE2D), uint32(0x37ABE8F9)
	for i := range len(n) {
		next := last + (h ^ widen(n[i])*0x6D22F5)
		if next>>31 != 0 {
			next -= 0x7FFFFFFF
		}
		h, last = next, h
	}
	return h << 1
}

// halfMD4 is MD4's compression function (RFC 1320 §3.4) over half as many words: rounds of eight steps.
func halfMD4(h *[4]uint32, w [8]uint32) {
	rounds := [3]struct {
		order  [8]int
		shifts [4]int
		add    uint32
		mix    func(x, y, z uint32) uint32
	}{
		{[8]int{0, 1, 2, 3, 4, 5, 6, 7}, [4]int{3, 7, 11, 19}, 0, func(x, y, z uint32) uint32 { return x&y | ^x&z }},
		{[8]int{1, 3, 5, 7, 0, 2, 4, 6}, [4]int{3, 5, 9, 13}, 0x5A827999, func(x, y, z uint32) uint32 { return x&y | x&z | y&z }},
		{[8]int{3, 7, 2, 6, 1, 5, 0, 4}, [4]int{3, 9, 11, 15}, 0x6ED9EBA1, func(x, y, z uint32) uint32 { return x ^ y ^ z }},
	}
	a, b, c, d := h[0], h[1], h[2], h[3]
	for _, r := range rounds {
		for i, k := range r.order {
			a, b, c, d = d, bits.RotateLeft32(a+r.mix(b, c, d)+w[k]+r.add, r.shifts[i%4]), b, c
		}
	}
	h[0], h[1], h[2], h[3] = h[0]+a, h[1]+b, h[2]+c, h[3]+d
}

// tea is the Tiny Encryption Algorithm (Wheeler and Needham, 1994) in sixteen rounds, with the name as its key.
func tea(h *[4]uint32, w [8]uint32) {
	x, y := h[0], h[1]
	sum := uint32(0)
	for range 16 {
		sum += 0x9E3779B9
		x += (y<<4 + w[0]) ^ (y + sum) ^ (y>>5 + w[1])
		y += (x<<4 + w[2]) ^ (x + sum) ^ (x>>5 + w[3])
	}
	h[0], h[1] = h[0]+x, h[1]+y
}
