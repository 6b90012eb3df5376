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

// eachData calls f for every unit of the file that may hold something else than zeros.
func eachData(file *os.File, size int64, f func(off int64) error) error {
	for off := int64(0); off < size; {
		data, err := file.Seek(off, seekData)
		if errors.Is(err, syscall.ENXIO) {
			return nil
		} else if err != nil {
			return err
		}
		hole, err := file.Seek(data, seekHole)
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

// copySparse replaces a file by size bytes of from, and leaves holes for zeros. Holes of a file are not read.
func copySparse(to *os.File, from io.ReaderAt, size int64) error {
	if err := to.Truncate(0); err != nil {
		return err
	}
	b := make([]byte, unit)
	one := func(off int64) error {
		p := b[:min(unit, size-off)]
		if err := readFull(from, p, off); err != nil || isZero(p) {
			return err
		}
		_, err := to.WriteAt(p, off)
		return err
	}
	var err error
	if file, ok := from.(*os.File); ok {
		err = eachData(file, size, one)
	} else {
		for off := int64(0); off < size && err == nil; off += unit {
			err = one(off)
		}
	}
	if err != nil {
		return err
	}
	return to.Truncate(size)
}
