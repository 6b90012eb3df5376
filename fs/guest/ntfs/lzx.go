package ntfs

import "github.com/holdfast-backup/holdfast/fs/guest"

// LZX with a window of 32 KiB, as WOF and WIM images have it: [MS-PATCH] §2 with these differences, of which wimlib's and 7-Zip's
// documents tell. Each chunk stands alone. There is no header: code of x86 is always translated, for a file of 12,000,000 bytes. A block says
// by one bit that it is of 32 KiB, and else has its size in 16 bits.
const (
	lzxSlots    = 30
	lzxMain     = 256 + 8*lzxSlots
	lzxLengths  = 249
	lzxPre      = 20
	lzxAligned  = 8
	lzxFileSize = 12000000

	lzxVerbatim = 1
	lzxOffsets  = 2
	lzxStored   = 3
)

// lzxDecoder decompresses one chunk.
type lzxDecoder struct {
	bitReader
	dst     []byte
	at      int
	recent  [3]int // distances used last
	mainLen [lzxMain]byte
	lenLen  [lzxLengths]byte
	main    huffman
	length  huffman
	aligned huffman
}

// lzx decompresses a chunk of at most 32 KiB.
func lzx(dst, src []byte) error {
	d := &lzxDecoder{bitReader: bitReader{src: src}, dst: dst, recent: [3]int{1, 1, 1}}
	for d.at < len(dst) {
		if err := d.block(); err != nil {
			return err
		}
	}
	lzxCode(dst)
	return nil
}

func (d *lzxDecoder) damaged() error {
	return guest.Damaged("LZX: at byte %d of %d", d.at, len(d.dst))
}

func (d *lzxDecoder) block() error {
	kind, size := d.take(3), 32<<10
	if d.take(1) == 0 {
		size = d.take(16)
	}
	if size == 0 || size > len(d.dst)-d.at || d.over() {
		return d.damaged()
	}
	switch kind {
	case lzxStored:
		return d.stored(size)
	case lzxOffsets:
		var lens [lzxAligned]byte
		for i := range lens {
			lens[i] = byte(d.take(3))
		}
		if err := d.aligned.build(lens[:]); err != nil {
			return err
		}
	case lzxVerbatim:
	default:
		return d.damaged()
	}
	for _, lens := range [][]byte{d.mainLen[:256], d.mainLen[256:], d.lenLen[:]} {
		if err := d.lengths(lens); err != nil {
			return err
		}
	}
	if err := d.main.build(d.mainLen[:]); err != nil {
		return err
	}
	if err := d.length.build(d.lenLen[:]); err != nil {
		return err
	}
	return d.items(d.at+size, kind == lzxOffsets)
}

// stored copies a block that is not compressed ([MS-PATCH] §2.3.2.2): from the next word on, the recent distances and then the bytes.
func (d *lzxDecoder) stored(size int) error {
	// 1 to 16 bits are left out, up to the next word; whole words that were taken in ahead go back.
	d.take(1)
	from := d.unread()
	head := 12
	if from+head+size > len(d.src) {
		return d.damaged()
	}
	for i := range d.recent {
		d.recent[i] = int(le.Uint32(d.src[from+4*i:]))
	}
	copy(d.dst[d.at:d.at+size], d.src[from+head:])
	d.at += size
	d.bitReader = bitReader{src: d.src, at: (from + head + size + 1) &^ 1}
	return nil
}

// unread is the place of the first word of which no bit was used.
func (r *bitReader) unread() int { return r.at - int(r.n/16)*2 }

// lengths reads the lengths of codes, as differences from those of the block before ([MS-PATCH] §2.4.1).
func (d *lzxDecoder) lengths(lens []byte) error {
	var preLen [lzxPre]byte
	for i := range preLen {
		preLen[i] = byte(d.take(4))
	}
	var pre huffman
	if err := pre.build(preLen[:]); err != nil {
		return err
	}
	for i := 0; i < len(lens); {
		symbol, ok := pre.next(&d.bitReader)
		run := 1
		switch {
		case !ok || d.over():
			return d.damaged()
		case symbol == 17:
			symbol, run = -1, 4+d.take(4)
		case symbol == 18:
			symbol, run = -1, 20+d.take(5)
		case symbol == 19:
			run = 4 + d.take(1)
			if symbol, ok = pre.next(&d.bitReader); !ok || symbol > 16 {
				return d.damaged()
			}
		}
		if run > len(lens)-i {
			return d.damaged()
		}
		value := byte(0)
		if symbol >= 0 {
			value = byte((int(lens[i]) - symbol + 17) % 17)
		}
		for ; run > 0; run-- {
			lens[i] = value
			i++
		}
	}
	return nil
}

// items reads literals and matches until end.
func (d *lzxDecoder) items(end int, aligned bool) error {
	for d.at < end {
		symbol, ok := d.main.next(&d.bitReader)
		if !ok || d.over() {
			return d.damaged()
		}
		if symbol < 256 {
			d.dst[d.at] = byte(symbol)
			d.at++
			continue
		}
		symbol -= 256
		n := symbol & 7
		if n == 7 {
			more, ok := d.length.next(&d.bitReader)
			if !ok {
				return d.damaged()
			}
			n += more
		}
		n += 2
		back, ok := d.distance(symbol>>3, aligned)
		if !ok || back <= 0 || back > d.at || n > end-d.at {
			return d.damaged()
		}
		d.at = repeat(d.dst, d.at, back, n)
	}
	return nil
}

// distance reads the distance of a match: slots 0 to 2 are those used last, the others a base and further bits, of which an aligned block
// has the lower three as a code ([MS-PATCH] §2.5).
func (d *lzxDecoder) distance(slot int, aligned bool) (back int, ok bool) {
	if slot < 3 {
		back = d.recent[slot]
		d.recent[slot], d.recent[0] = d.recent[0], back
		return back, true
	}
	extra := uint(slot/2 - 1)
	base := (2 + slot&1) << extra
	if aligned && extra >= 3 {
		low := 0
		high := d.take(extra - 3)
		if low, ok = d.aligned.next(&d.bitReader); !ok {
			return 0, false
		}
		back = base + high<<3 + low
	} else {
		back = base + d.take(extra)
	}
	back -= 2
	d.recent = [3]int{back, d.recent[0], d.recent[1]}
	return back, true
}

// lzxCode undoes the translation of x86 calls ([MS-PATCH] §2.6): targets were made absolute so that they repeat.
func lzxCode(b []byte) {
	for i := 0; i < len(b)-10; i++ {
		if b[i] != 0xe8 {
			continue
		}
		absolute := int(int32(le.Uint32(b[i+1:])))
		switch {
		case absolute >= 0 && absolute < lzxFileSize:
			le.PutUint32(b[i+1:], uint32(absolute-i))
		case absolute < 0 && absolute >= -i:
			le.PutUint32(b[i+1:], uint32(absolute+lzxFileSize))
		}
		i += 4
	}
}
