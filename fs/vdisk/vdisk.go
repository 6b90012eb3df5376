package vdisk

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"iter"

	"github.com/holdfast-backup/holdfast/store/extent"
)

var (
	// ErrTooLarge: the disk does not fit into the format.
	ErrTooLarge = errors.New("disk too large for this format")
	// ErrEmpty: the format cannot hold a disk of no sectors.
	ErrEmpty = errors.New("an empty disk cannot be written in this format")
	// ErrCorrupt: an image contradicts its format, or points past its own end.
	ErrCorrupt = errors.New("image is corrupt")
	// ErrUnsupported: a valid image that uses a feature this package lacks.
	ErrUnsupported = errors.New("image feature not supported")
	// ErrRefused: an image names a backing file, a parent or an extent that the
	// Policy forbids to open.
	ErrRefused = errors.New("file refused")
)

// Source is the disk a format is computed over, and what opening an image gives.
type Source interface {
	// ReadAt is safe for concurrent use. Holes read as zeros. A read that
	// reaches Size returns io.EOF with the bytes before it.
	io.ReaderAt
	// Size is in bytes, any value >= 0, not necessarily a multiple of 512.
	Size() int64
	// Allocated yields ascending, non-overlapping ranges aligned to granularity
	// (bytes, positive) and clipped to Size, outside of which the disk is all
	// zero. It touches no disk data. A coarse granularity is cheaper.
	Allocated(granularity int64) iter.Seq2[extent.Extent, error]
}

// File is a computed file. It is a Source of its own bytes.
type File interface {
	Source
	// AllocatedBytes is what the file would occupy if stored sparsely with
	// whole blocks (VHDX: 32 MiB, VHD: 2 MiB, VMDK and qcow2: 64 KiB); it costs
	// nothing.
	AllocatedBytes() int64
}

// Identity makes the ids inside a file: GUIDs, content ids. It must be stable
// per restore point and disk.
type Identity [16]byte

// derive makes a GUID for one purpose from id, in the byte order of Windows
// (RFC 9562 §5.8, version 8, custom).
func (id Identity) derive(purpose string) [16]byte {
	sum := sha256.Sum256(append([]byte("holdfast vdisk "+purpose+"\x00"), id[:]...))
	g := [16]byte(sum[:16])
	g[7] = g[7]&0x0f | 0x80 // the third field is little-endian: its top nibble is here
	g[8] = g[8]&0x3f | 0x80
	return g
}

const sector = 512 // bytes; the logical sector, but of a VHDX that was asked for others

// roundUp grows n to a multiple of unit. Callers bound n well below 2^62.
func roundUp(n, unit int64) int64 { return (n + unit - 1) / unit * unit }

// divUp is n/unit, rounded up.
func divUp(n, unit int64) int64 { return (n + unit - 1) / unit }

// clip cuts p to what a file of size bytes holds at off, and gives the error
// with which a ReadAt of exactly that much ends.
func clip(p []byte, off, size int64) ([]byte, error) {
	switch {
	case off < 0:
		return nil, fmt.Errorf("vdisk: negative offset %d", off)
	case len(p) == 0:
		return nil, nil
	case off >= size:
		return nil, io.EOF
	case int64(len(p)) > size-off:
		return p[:size-off], io.EOF
	}
	return p, nil
}

// readFull fills p from r. A short read is an error, and never io.EOF: the
// caller has already clipped p to the size that r claims.
func readFull(r io.ReaderAt, p []byte, off int64) (int, error) {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return n, nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// readPadded fills p from src, with zeros past the end of src.
func readPadded(src Source, p []byte, off int64) (int, error) {
	head := p[:max(0, min(int64(len(p)), src.Size()-off))]
	if len(head) > 0 {
		if n, err := readFull(src, head, off); err != nil {
			return n, err
		}
	}
	clear(p[len(head):])
	return len(p), nil
}

// failed is a sequence that only has an error.
func failed(err error) iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) { yield(extent.Extent{}, err) }
}
