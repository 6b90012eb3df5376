package fuse

import (
	"bytes"
	"io"
	"iter"
	"math/rand/v2"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// fakeImage is a file that is data in given ranges.
type fakeImage struct {
	size int64
	data []extent.Extent
}

func (f *fakeImage) Size() int64 { return f.size }
func (f *fakeImage) ReadAt(p []byte, off int64) (int, error) {
	return bytes.NewReader(make([]byte, f.size)).ReadAt(p, off)
}
func (f *fakeImage) Allocated(g int64) iter.Seq2[extent.Extent, error] {
	return extent.Coarsen(extent.All(f.data), g, f.size)
}

var _ io.ReaderAt = (*fakeImage)(nil)

// TestLseek asks for data and holes at random, forwards and back, and compares
// with a map of the file in units of the granularity.
func TestLseek(t *testing.T) {
	const unit = holeGranularity
	rnd := rand.New(rand.NewPCG(8, 8))
	for range 200 {
		units := 1 + rnd.Int64N(40)
		img := &fakeImage{size: units*unit - rnd.Int64N(unit)}
		full := make([]bool, units)
		for i := range units {
			if rnd.IntN(3) == 0 {
				full[i] = true
				img.data = append(img.data, extent.Extent{Off: i * unit, Len: 1})
			}
		}
		h := &handle{conn: &conn{log: func(s string) { t.Error(s) }}, img: img, holes: unit, release: func() {}}
		for range 60 {
			off := rnd.Int64N(img.size + unit)
			whence := uint32(unix.SEEK_DATA + rnd.IntN(2))
			got, errno := h.lseek(uint64(off), whence)
			want, wantErr := off, syscall.Errno(0)
			for want < img.size && full[want/unit] != (whence == unix.SEEK_DATA) {
				want = min((want/unit+1)*unit, img.size)
			}
			if off >= img.size || (want >= img.size && whence == unix.SEEK_DATA) {
				want, wantErr = 0, syscall.ENXIO
			}
			if int64(got) != want || errno != wantErr {
				t.Fatalf("size %d, data %v: lseek(%d, %d) = %d, %v; want %d, %v", img.size, full, off, whence, got, errno, want, wantErr)
			}
		}
		h.close()
	}
}
