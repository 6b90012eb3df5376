//go:build linux

package nbd

import (
	"errors"
	"io"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/holdfast-backup/holdfast/store/extent"
)

const (
	kib = 1 << 10
	mib = 1 << 20
)

// scratch is a directory in memory where there is one.
func scratch(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "nbd-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// fileDisk is a plain file as a WritableDisk.
type fileDisk struct {
	f       *os.File
	size    int64
	flushes atomic.Int64
}

var _ WritableDisk = (*fileDisk)(nil)

// newFileDisk makes a sparse file of which about a third is random data.
func newFileDisk(t testing.TB, size int64) *fileDisk {
	t.Helper()
	f, err := os.Create(filepath.Join(scratch(t), "disk.raw"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	var seed [32]byte
	rnd := rand.NewChaCha8(seed)
	p := make([]byte, 256*kib)
	for off := int64(0); off < min(size, 64*mib); off += 3 * int64(len(p)) {
		rnd.Read(p)
		if _, err := f.WriteAt(p[:min(int64(len(p)), size-off)], off); err != nil {
			t.Fatal(err)
		}
	}
	return &fileDisk{f: f, size: size}
}

func (d *fileDisk) path() string { return d.f.Name() }
func (d *fileDisk) Size() int64  { return d.size }

func (d *fileDisk) ReadAt(p []byte, off int64) (int, error)  { return d.f.ReadAt(p, off) }
func (d *fileDisk) WriteAt(p []byte, off int64) (int, error) { return d.f.WriteAt(p, off) }

func (d *fileDisk) Flush() error {
	d.flushes.Add(1)
	return d.f.Sync()
}

// fallocate(2)
const (
	fallocKeepSize  = 1
	fallocPunchHole = 2
	fallocZeroRange = 16
)

func (d *fileDisk) Zero(off, n int64, punch bool) error {
	if punch && n > 0 {
		return syscall.Fallocate(int(d.f.Fd()), fallocPunchHole|fallocKeepSize, off, n)
	}
	zeros := make([]byte, min(n, mib))
	for n > 0 {
		k, err := d.f.WriteAt(zeros[:min(n, mib)], off)
		if err != nil {
			return err
		}
		off, n = off+int64(k), n-int64(k)
	}
	return nil
}

func (d *fileDisk) Trim(off, n int64) error { return d.Zero(off, n, true) }

func (d *fileDisk) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	return d.AllocatedFrom(0, granularity)
}

// lseek(2)
const (
	seekData = 3
	seekHole = 4
)

func (d *fileDisk) AllocatedFrom(off, granularity int64) iter.Seq2[extent.Extent, error] {
	return extent.Coarsen(func(yield func(extent.Extent, error) bool) {
		for off < d.size {
			from, err := syscall.Seek(int(d.f.Fd()), off, seekData)
			if errors.Is(err, syscall.ENXIO) {
				return
			}
			if err != nil {
				yield(extent.Extent{}, err)
				return
			}
			to, err := syscall.Seek(int(d.f.Fd()), from, seekHole)
			if err != nil {
				yield(extent.Extent{}, err)
				return
			}
			if !yield(extent.Extent{Off: from, Len: to - from}, nil) {
				return
			}
			off = to
		}
	}, granularity, d.size)
}

// faultyDisk fails what touches the byte at bad.
type faultyDisk struct {
	*fileDisk
	bad int64
	err error
}

func (d *faultyDisk) touches(off, n int64) bool { return off <= d.bad && d.bad < off+n }

func (d *faultyDisk) ReadAt(p []byte, off int64) (int, error) {
	if d.touches(off, int64(len(p))) {
		n, _ := d.fileDisk.ReadAt(p[:d.bad-off], off)
		return n, d.err
	}
	return d.fileDisk.ReadAt(p, off)
}

func (d *faultyDisk) WriteAt(p []byte, off int64) (int, error) {
	if d.touches(off, int64(len(p))) {
		return 0, d.err
	}
	return d.fileDisk.WriteAt(p, off)
}

// memory is a read-only disk of p.
type memory []byte

func (m memory) Size() int64 { return int64(len(m)) }

func (m memory) ReadAt(p []byte, off int64) (int, error) {
	n := copy(p, m[min(off, m.Size()):])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m memory) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	return extent.Coarsen(extent.All([]extent.Extent{{Off: 0, Len: m.Size()}}), granularity, m.Size())
}
