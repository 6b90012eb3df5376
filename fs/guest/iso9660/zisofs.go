package iso9660

import (
	"bytes"
	"fmt"
	"io"
	"iter"
	"sync"

	"github.com/klauspost/compress/zlib"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// zisofs is a compressed file (zisofs_format.txt, "File Header", "Block Pointers"):
//
//	0 magic 8 | 8 bytes uncompressed 4 | 12 words of this head 1 | 13 log2 of a block 1 | 14 zero 2
//	a pointer of 4 bytes to each block, and one behind the last | the blocks, each of zlib; an empty one is zeros
type zisofs struct {
	raw  *content
	size int64
	head int64
	unit int64

	mu   sync.Mutex // guards following
	last int64      // block that data is of
	data []byte
}

const zisofsMagic = "\x37\xe4\x53\x96\xc9\xdb\xd6\x07"

func openZisofs(raw *content, x *extras) (guest.File, error) {
	if x.algorithm != "pz" {
		return nil, guest.Unsupported("a file compressed by %q", x.algorithm)
	}
	if x.size == 0 {
		return &content{}, nil
	}
	b := make([]byte, 16)
	if n, err := raw.ReadAt(b, 0); n < len(b) {
		if err == io.EOF {
			err = guest.Damaged("a compressed file of %d bytes", raw.size)
		}
		return nil, err
	}
	z := &zisofs{raw: raw, size: x.size, head: int64(b[12]) * 4, last: -1}
	if string(b[:8]) != zisofsMagic || int64(le.Uint32(b[8:])) != x.size || z.head < 16 || b[13] < 15 || b[13] > 17 {
		return nil, guest.Damaged("the head of a compressed file")
	}
	z.unit = 1 << b[13]
	return z, nil
}

func (z *zisofs) Size() int64 { return z.size }

func (z *zisofs) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	return whole(z.size, granularity)
}

func (z *zisofs) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("iso9660: read at %d", off)
	}
	n := 0
	for n < len(p) && off+int64(n) < z.size {
		at := off + int64(n)
		b, err := z.block(at / z.unit)
		if err != nil {
			return n, err
		}
		n += copy(p[n:], b[at%z.unit:])
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// block gives a block, which must not be changed.
func (z *zisofs) block(i int64) ([]byte, error) {
	z.mu.Lock()
	defer z.mu.Unlock()
	if z.last == i {
		return z.data, nil
	}
	b, err := z.load(i)
	if err == nil {
		z.last, z.data = i, b
	}
	return b, err
}

func (z *zisofs) load(i int64) ([]byte, error) {
	out := make([]byte, min(z.unit, z.size-i*z.unit))
	var ends [8]byte
	if n, err := z.raw.ReadAt(ends[:], z.head+4*i); n < len(ends) {
		return nil, short(err)
	}
	from, to := int64(le.Uint32(ends[:])), int64(le.Uint32(ends[4:]))
	if from > to || to > z.raw.size || to-from > 2*z.unit {
		return nil, guest.Damaged("block %d of a compressed file, from %d to %d", i, from, to)
	}
	if from == to {
		return out, nil
	}
	in := make([]byte, to-from)
	if n, err := z.raw.ReadAt(in, from); n < len(in) {
		return nil, short(err)
	}
	r, err := zlib.NewReader(bytes.NewReader(in))
	if err == nil {
		_, err = io.ReadFull(r, out)
	}
	if err != nil {
		return nil, guest.Damaged("block %d of a compressed file: %v", i, err)
	}
	return out, nil
}

// short makes the end of a file where there must be more damage.
func short(err error) error {
	if err == io.EOF {
		return guest.Damaged("a compressed file ends early")
	}
	return err
}
