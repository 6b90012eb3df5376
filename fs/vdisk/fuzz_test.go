package vdisk

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// seeds are small images: clusters of 512 bytes keep them below 10 KiB. They
// are written by hand, since the computed ones have 64 KiB clusters.
func seeds() [][]byte {
	encoder, err := zstd.NewWriter(nil)
	if err != nil {
		panic(err)
	}
	var all [][]byte
	for _, version := range []byte{2, 3} {
		b := make([]byte, 8*512)
		copy(b, qcowMagic)
		put := func(off int, v ...byte) { copy(b[off:], v) }
		put(7, version)
		put(23, 9)          // cluster bits
		put(24+4, 0, 0, 16) // 4 KiB of disk
		put(39, 1)          // L1 entries
		put(46, 4)          // L1 at 1024
		put(99, 4)          // refcount order
		put(103, 104)
		put(1024, 0x80, 0, 0, 0, 0, 0, 6)                   // L1: L2 at 1536
		put(1536, 0x80, 0, 0, 0, 0, 0, 8)                   // data at 2048
		put(1544, 0x80, 0, 0, 0, 0, 0, 10)                  // next to it
		put(1552, 0, 0, 0, 0, 0, 0, 0, version-2)           // zero in version 3
		put(1560, 0x40, 0, 0, 0, 0, 0, 12)                  // compressed at 3072
		put(3072, 0x63, 0x18, 0x05, 0xa3, 0x60, 0x14, 0x0c) // a deflate stream
		all = append(all, b)

		backed := bytes.Clone(b)
		backed[14], backed[19] = 1, 4 // backing file name at 256
		copy(backed[256:], "base")
		all = append(all, backed)
	}
	zst := bytes.Clone(all[2])
	zst[79], zst[103], zst[104] = 8, 112, 1
	copy(zst[3072:], encoder.EncodeAll(make([]byte, 512), nil))
	return append(all, zst)
}

func FuzzQCOW2(f *testing.F) {
	for _, b := range seeds() {
		f.Add(b, uint64(100), uint16(900))
	}
	f.Fuzz(func(t *testing.T, b []byte, off uint64, n uint16) {
		if len(b) > mib {
			t.Skip("longer than any interesting header and tables")
		}
		tryImage(t, b, off, n)
	})
}

// Behind a good header the tables and the data are anything.
func FuzzQCOW2Tables(f *testing.F) {
	all := seeds()
	for i, b := range all {
		f.Add(byte(i), b[1024:], uint64(100), uint16(900))
	}
	f.Fuzz(func(t *testing.T, header byte, tables []byte, off uint64, n uint16) {
		b := append(bytes.Clone(all[int(header)%len(all)][:1024]), tables...)
		tryImage(t, b, off, n)
	})
}

// tryImage reads an image that may be anything: no panic, errors that are
// ErrCorrupt or ErrUnsupported, and the same bytes in large and small reads.
func tryImage(t *testing.T, b []byte, off uint64, n uint16) {
	base := newModel(1, 3000, ext(100, 700), ext(2000, 1000))
	img, err := OpenQCOW2(bytes.NewReader(b), int64(len(b)), QCOW2Options{
		TableCache: 16 * kib,
		Backing:    func(string, string) (Source, error) { return base, nil },
	})
	tryReads(t, img, err, off, n)
}

// tryReads reads from what opening anything gave.
func tryReads(t *testing.T, img Source, err error, off uint64, n uint16) {
	if err != nil {
		if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrUnsupported) {
			t.Fatalf("open: %v", err)
		}
		return
	}
	size := img.Size()
	at := int64(off % uint64(size+1))
	for _, off := range []int64{0, at, max(0, size-500)} {
		p := make([]byte, n)
		m, err := img.ReadAt(p, off)
		want := max(0, min(int64(n), size-off))
		if err == nil && m != int(n) || err == io.EOF && int64(m) != want || m > int(want) {
			t.Fatalf("ReadAt(%d, %d) of %d: %d, %v", n, off, size, m, err)
		}
		if err != nil && err != io.EOF && !errors.Is(err, ErrCorrupt) {
			t.Fatalf("ReadAt: %v", err)
		}
		// Reading byte by byte gives the same.
		one := []byte{0}
		for i := range min(m, 40) {
			if k, err := img.ReadAt(one, off+int64(i)); k != 1 || one[0] != p[i] {
				t.Fatalf("byte %d: %d, %v; %d in one read", off+int64(i), one[0], err, p[i])
			}
		}
	}
	ranges, last := 0, int64(-1)
	for e, err := range img.Allocated(512) {
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatalf("Allocated: %v", err)
			}
			break
		}
		if e.Off <= last || e.Len <= 0 || e.End() > size {
			t.Fatalf("range %v after %d in %d", e, last, size)
		}
		last = e.End()
		if ranges++; ranges > 1000 {
			break
		}
	}
}

// What the seeds say, so that fuzzing starts from images that can be read.
func TestSeeds(t *testing.T) {
	for i, b := range seeds() {
		base := newModel(1, 3000, ext(0, 3000))
		img, err := OpenQCOW2(bytes.NewReader(b), int64(len(b)), QCOW2Options{
			Backing: func(string, string) (Source, error) { return base, nil },
		})
		if err != nil {
			t.Fatal(i, err)
		}
		p := make([]byte, 4096)
		if n, err := img.ReadAt(p, 0); n != len(p) || err != nil && err != io.EOF {
			t.Errorf("seed %d: %d bytes, %v", i, n, err)
		}
	}
}
