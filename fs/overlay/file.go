package overlay

import (
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// file is what the overlay asks of its files; tests put one there that loses what was not synced.
type file interface {
	io.ReaderAt
	io.WriterAt
	// Punch makes n bytes from off on a hole; past the end of the file it does nothing.
	Punch(off, n int64) error
	// Clear makes n bytes from off on zero and keeps the room for them.
	Clear(off, n int64) error
	Truncate(size int64) error
	// Data gives the first range with data in [off, end), which may be longer than
	// that; an empty one at end when there is none.
	Data(off, end int64) (from, to int64, err error)
	// Sync makes what was written durable.
	Sync() error
	io.Closer
}

// osFile is a file of the operating system.
type osFile struct{ *os.File }

func (f osFile) Punch(off, n int64) error {
	return f.fallocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (f osFile) Clear(off, n int64) error {
	return f.fallocate(unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

// fallocate falls back to writing zeros where the file system lacks the mode: fallocate(2).
func (f osFile) fallocate(mode uint32, off, n int64) error {
	if n <= 0 {
		return nil
	}
	var err error
	for {
		if err = unix.Fallocate(int(f.Fd()), mode, off, n); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err == nil || !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	zeros := make([]byte, min(n, 1<<20))
	for n > 0 {
		k := min(n, int64(len(zeros)))
		if _, err := f.WriteAt(zeros[:k], off); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

// Data asks lseek(2). It moves the file's offset, which nothing else here uses.
func (f osFile) Data(off, end int64) (from, to int64, err error) {
	from, err = unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return end, end, nil
	case errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP):
		return off, end, nil // a file system that does not know
	case err != nil:
		return 0, 0, err
	case from >= end:
		return end, end, nil
	}
	to, err = unix.Seek(int(f.Fd()), from, unix.SEEK_HOLE)
	return from, to, err
}

func (f osFile) Sync() error { return unix.Fdatasync(int(f.Fd())) }
