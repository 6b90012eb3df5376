package ntfs

import "github.com/holdfast-backup/holdfast/fs/guest"

// lzntChunk is what a chunk of LZNT1 holds, bytes.
const lzntChunk = 4096

// lznt1 decompresses a compression unit ([MS-XCA] §2.5). A chunk starts with its length less 3 (12 bits), a signature (3) and whether it is
// compressed (1); a header of 0 ends the unit. What no chunk holds is zeros.
func lznt1(dst, src []byte) error {
	for len(dst) > 0 {
		if len(src) < 2 || le.Uint16(src) == 0 {
			clear(dst)
			return nil
		}
		h := le.Uint16(src)
		n := int(h&0xfff) + 1
		if src = src[2:]; n > len(src) {
			return guest.Damaged("LZNT1: a chunk of %d bytes with %d left", n, len(src))
		}
		out := dst[:min(len(dst), lzntChunk)]
		if h&0x8000 == 0 {
			clear(out[copy(out, src[:n]):])
		} else if err := lznt1Chunk(out, src[:n]); err != nil {
			return err
		}
		src, dst = src[n:], dst[len(out):]
	}
	return nil
}

// lznt1Chunk decompresses one chunk. A byte of flags stands before each eight items: literals, and pairs of 16 bits of which the
// more are the distance's the more of the chunk there is already ([MS-XCA] §2.5.1.4).
func lznt1Chunk(dst, src []byte) error {
	at, shift := 0, 12
	for len(src) > 0 {
		flags := src[0]
		src = src[1:]
		for bit := 0; bit < 8 && len(src) > 0; bit++ {
			if at == len(dst) {
				return nil
			}
			if flags>>bit&1 == 0 {
				dst[at] = src[0]
				at, src = at+1, src[1:]
				continue
			}
			if len(src) < 2 {
				return guest.Damaged("LZNT1: half a pair at the end of a chunk")
			}
			for shift > 4 && at > 1<<(16-shift) {
				shift--
			}
			pair := int(le.Uint16(src))
			src = src[2:]
			back, n := pair>>shift+1, pair&(1<<shift-1)+3
			if back > at {
				return guest.Damaged("LZNT1: %d bytes back at byte %d", back, at)
			}
			at = repeat(dst, at, back, n)
		}
	}
	clear(dst[at:])
	return nil
}

// repeat copies n bytes from back bytes before at, which may overlap, as far as there is room, and gives where it ended.
func repeat(dst []byte, at, back, n int) int {
	end := min(at+n, len(dst))
	if back >= end-at {
		return at + copy(dst[at:end], dst[at-back:])
	}
	for ; at < end; at++ {
		dst[at] = dst[at-back]
	}
	return at
}
