package vdisk

import (
	"errors"
	"fmt"
	"io"
	"iter"
	"os"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// RawFile is a disk in a regular file or on a block device. Its size is fixed
// when it is opened; a file that shrinks later gives read errors.
type RawFile struct {
	f      *os.File
	direct *directReader // nil: not possible
	size   int64
	device bool
}

var _ Source = (*RawFile)(nil)

// OpenRaw opens a file or a block device for reading.
func OpenRaw(path string) (*RawFile, error) {
	f, err := openFile(path)
	if err != nil {
		return nil, err
	}
	r, err := newRaw(f)
	if err != nil {
		f.Close()
	}
	return r, err
}

// openFile does not wait for the other end of a pipe.
func openFile(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
}

// newRaw takes over f unless it fails.
func newRaw(f *os.File) (*RawFile, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	switch mode := st.Mode(); {
	case mode.IsRegular():
		return &RawFile{f: f, size: st.Size(), direct: newDirect(f)}, nil
	case mode&os.ModeDevice != 0 && mode&os.ModeCharDevice == 0:
		size, err := f.Seek(0, io.SeekEnd)
		if err != nil {
			return nil, fmt.Errorf("size of the device: %w", err)
		}
		return &RawFile{f: f, size: size, device: true, direct: newDirect(f)}, nil
	default:
		return nil, fmt.Errorf("%s is neither a regular file nor a block device: %w", f.Name(), ErrUnsupported)
	}
}

// Size is in bytes.
func (r *RawFile) Size() int64 { return r.size }

// Close may be called twice.
func (r *RawFile) Close() error {
	r.direct.close()
	if err := r.f.Close(); !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

func (r *RawFile) ReadAt(p []byte, off int64) (int, error) {
	p, end := clip(p, off, r.size)
	if len(p) == 0 {
		return 0, end
	}
	n := r.direct.readAt(p, off)
	if n == len(p) {
		return n, end
	}
	m, err := readFull(r.f, p[n:], off+int64(n))
	n += m
	if err == nil {
		return n, end
	}
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = fmt.Errorf("%s ends at %d, it had %d bytes when opened: %w", r.f.Name(), off+int64(n), r.size, err)
	}
	return n, err
}

// Allocated asks the file system for holes (lseek(2), SEEK_DATA). A device, or
// a file system that does not know, is data throughout.
func (r *RawFile) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	return r.AllocatedFrom(0, granularity)
}

// AllocatedFrom is Allocated without the ranges that end at off or before.
func (r *RawFile) AllocatedFrom(off, granularity int64) iter.Seq2[extent.Extent, error] {
	if granularity <= 0 || off < 0 {
		return failed(fmt.Errorf("%s: data from %d on, granularity %d", r.f.Name(), off, granularity))
	}
	return extent.Coarsen(r.data(off-off%granularity), granularity, r.size)
}

func (r *RawFile) data(off int64) iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) {
		if r.device {
			yield(to(off, r.size), nil)
			return
		}
		// Each call gives its own start, so several walks may share the file.
		for off := off; off < r.size; {
			from, err := r.f.Seek(off, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) {
				return // a hole up to the end
			}
			if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
				yield(to(off, r.size), nil)
				return
			}
			end := int64(0)
			if err == nil {
				end, err = r.f.Seek(from, unix.SEEK_HOLE)
			}
			if err != nil {
				yield(extent.Extent{}, fmt.Errorf("looking for data from %d on: %w", off, err))
				return
			}
			if !yield(to(from, end), nil) {
				return
			}
			off = end
		}
	}
}
