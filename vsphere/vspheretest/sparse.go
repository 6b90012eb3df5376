package vspheretest

import (
	"errors"
	"io"
	"os"
	"syscall"
)

// What Seek takes besides io.SeekStart on Linux, lseek(2).
const (
	seekData = 3
	seekHole = 4
)

// eachData calls f for every unit of the disk that may hold something else than zeros.
func eachData(l *layer, size int64, f func(off int64) error) error {
	if l.isDelta() {
		for off := int64(0); off < size; off += unit {
			if err := f(off); err != nil {
				return err
			}
		}
		return nil
	}
	for off := int64(0); off < size; {
		data, err := l.raw.Seek(off, seekData)
		if errors.Is(err, syscall.ENXIO) {
			return nil
		} else if err != nil {
			return err
		}
		hole, err := l.raw.Seek(data, seekHole)
		if err != nil {
			return err
		}
		for off = data - data%unit; off < min(hole, size); off += unit {
			if err := f(off); err != nil {
				return err
			}
		}
	}
	return nil
}

// copySparse copies size bytes to the file, and leaves holes for zeros.
func copySparse(to *os.File, from io.ReaderAt, size int64) error {
	if err := to.Truncate(0); err != nil {
		return err
	}
	b := make([]byte, 1<<20)
	for off := int64(0); off < size; off += int64(len(b)) {
		p := b[:min(int64(len(b)), size-off)]
		if err := readFull(from, p, off); err != nil {
			return err
		}
		if isZero(p) {
			continue
		}
		if _, err := to.WriteAt(p, off); err != nil {
			return err
		}
	}
	return to.Truncate(size)
}
