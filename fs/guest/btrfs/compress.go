package btrfs

import (
	"bytes"
	"io"
	"sync"

	"github.com/klauspost/compress/zlib"
	"github.com/klauspost/compress/zstd"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// Kinds of compression.
const (
	compZlib = 1
	compLZO  = 2
	compZstd = 3
)

// decompressed gives what a compressed extent holds, which is shared and must not be changed.
func (f *file) decompressed(e fileExtent) ([]byte, error) {
	if e.kind == extentInline {
		return f.fs.decompress(e.comp, e.inline, int(e.ram))
	}
	if b := f.fs.parts.find(e.disk); b != nil && uint64(len(*b)) >= e.ram {
		return *b, nil
	}
	in := make([]byte, e.len)
	if err := f.fs.data(in, e.disk, f.n.flags&flagNoSum == 0); err != nil {
		return nil, err
	}
	b, err := f.fs.decompress(e.comp, in, int(e.ram))
	if err != nil {
		return nil, err
	}
	f.fs.parts.keep(e.disk, &b, int64(len(b)))
	return b, nil
}

// decompress gives size bytes. What follows the compressed data fills the sector up, and so do zeros what it holds: Linux 6.18
// compresses no more than up to the end of the file.
func (fs *FS) decompress(comp uint8, in []byte, size int) ([]byte, error) {
	out := make([]byte, 0, size)
	var err error
	switch comp {
	case compZlib:
		out, err = unzlib(out, in)
	case compLZO:
		out, err = unlzo(out, in, fs.sb.sector)
	case compZstd:
		out, err = unzstd(out, in)
	}
	if err != nil || size-len(out) >= fs.sb.sector {
		return nil, guest.Damaged("a compressed extent: %d of %d bytes: %v", len(out), size, err)
	}
	clear(out[len(out):size])
	return out[:size], nil
}

var zlibs sync.Pool // of io.ReadCloser that are zlib.Resetter

// unzlib fills the room of out, or less when the data ends before.
func unzlib(out, in []byte) ([]byte, error) {
	r, _ := zlibs.Get().(io.ReadCloser)
	var err error
	if r == nil {
		r, err = zlib.NewReader(bytes.NewReader(in))
	} else {
		err = r.(zlib.Resetter).Reset(bytes.NewReader(in), nil)
	}
	if err != nil {
		return nil, err
	}
	defer zlibs.Put(r)
	for len(out) < cap(out) {
		n, err := r.Read(out[len(out):cap(out)])
		out = out[:len(out)+n]
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// zstds decodes frames; the window of Btrfs is no larger than an extent.
var zstds = sync.OnceValues(func() (*zstd.Decoder, error) {
	return zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxMemory(8<<20), zstd.WithDecodeAllCapLimit(true))
})

func unzstd(out, in []byte) ([]byte, error) {
	n, err := frame(in)
	if err != nil {
		return nil, err
	}
	d, err := zstds()
	if err != nil {
		return nil, err
	}
	return d.DecodeAll(in[:n], out)
}

// frame gives the length of the Zstandard frame that b begins with (RFC 8878 §3.1.1).
func frame(b []byte) (int, error) {
	var h zstd.Header
	if err := h.Decode(b); err != nil {
		return 0, err
	}
	for at := h.HeaderSize; at+3 <= len(b); {
		head := int(b[at]) | int(b[at+1])<<8 | int(b[at+2])<<16
		at += 3
		if head>>1&3 == 1 {
			at++ // one byte, repeated
		} else {
			at += head >> 3
		}
		if head&1 == 0 {
			continue
		}
		if h.HasCheckSum {
			at += 4
		}
		if at <= len(b) {
			return at, nil
		}
	}
	return 0, io.ErrUnexpectedEOF
}
