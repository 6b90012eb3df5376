package volume

import (
	"fmt"
	"io"
	"sort"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// device is where bytes come from, and where they are on the disks.
type device interface {
	guest.Device
	// locate appends the pieces that n bytes from off on are in. They are within the device.
	locate(to []Piece, off, n int64) ([]Piece, error)
}

// whole is a disk.
type whole struct {
	guest.Device
	index int
}

func (w whole) locate(to []Piece, off, n int64) ([]Piece, error) {
	if n == 0 {
		return to, nil
	}
	if k := len(to) - 1; k >= 0 && to[k].Disk == w.index && to[k].Off+to[k].Len == off {
		to[k].Len += n
		return to, nil
	}
	return append(to, Piece{w.index, off, n}), nil
}

// place is where some bytes are: n of them from off on in dev. A nil dev is zeros.
type place struct {
	dev    device
	off, n int64
}

// layout says where the bytes of something larger are.
type layout interface {
	// at gives the place of the bytes from off on: at least one and at most n, all in one place. They are within the device.
	at(off, n int64) (place, error)
}

// mapped is a device whose bytes are somewhere else.
type mapped struct {
	layout
	size int64
	// shared: the places are not this device's alone, or not the only ones.
	shared bool
}

// Size implements guest.Device.
func (m *mapped) Size() int64 { return m.size }

// ReadAt implements io.ReaderAt.
func (m *mapped) ReadAt(p []byte, off int64) (int, error) {
	return readRuns(p, off, m.size, func(p []byte, off int64) (int, error) {
		at, err := m.at(off, int64(len(p)))
		if err != nil {
			return 0, err
		}
		p = p[:at.n]
		if at.dev == nil {
			clear(p)
			return len(p), nil
		}
		return len(p), guest.ReadFull(at.dev, p, at.off)
	})
}

// readRuns fills p by a read that may do less than it is asked to, and keeps to the end of the device.
func readRuns(p []byte, off, size int64, read func([]byte, int64) (int, error)) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("volume: read at %d", off)
	}
	end := error(nil)
	if off >= size {
		p, end = nil, io.EOF
	} else if int64(len(p)) > size-off {
		p, end = p[:size-off], io.EOF
	}
	done := 0
	for done < len(p) {
		n, err := read(p[done:], off+int64(done))
		if err != nil {
			return done, err
		}
		done += n
	}
	return done, end
}

func (m *mapped) locate(to []Piece, off, n int64) ([]Piece, error) {
	if m.shared {
		return nil, ErrNotPlain
	}
	for n > 0 {
		at, err := m.at(off, n)
		if err != nil {
			return nil, err
		}
		if at.dev != nil {
			if to, err = at.dev.locate(to, at.off, at.n); err != nil {
				return nil, err
			}
		}
		off, n = off+at.n, n-at.n
	}
	return to, nil
}

// linear is one device after the other.
type linear struct {
	parts  []place
	starts []int64 // of each, bytes
}

// concat puts places in a row. Those that are not within their device are ErrDamaged.
func concat(parts []place) (device, error) {
	l := &linear{parts: parts}
	size := int64(0)
	for _, p := range parts {
		if p.n <= 0 || p.off < 0 || p.dev != nil && p.off > p.dev.Size()-p.n || size+p.n < size {
			return nil, guest.Damaged("a part of %d bytes from %d on, past the end of what it is on", p.n, p.off)
		}
		l.starts = append(l.starts, size)
		size += p.n
	}
	return &mapped{layout: l, size: size}, nil
}

// section is a part of a device.
func section(dev device, off, n int64) (device, error) { return concat([]place{{dev, off, n}}) }

func (l *linear) at(off, n int64) (place, error) {
	i := 0
	if len(l.parts) > 1 {
		i = sort.Search(len(l.starts), func(i int) bool { return l.starts[i] > off }) - 1
	}
	p := l.parts[i]
	in := off - l.starts[i]
	return place{p.dev, p.off + in, min(n, p.n-in)}, nil
}

// stripes deals chunks out to devices in turn.
type stripes struct {
	parts []place
	chunk int64 // bytes
}

// striped makes a device of stripes, as long as whole rows are.
func striped(parts []place, chunk int64) (device, error) {
	if len(parts) == 0 || chunk <= 0 {
		return nil, guest.Damaged("%d stripes of %d bytes", len(parts), chunk)
	}
	least := parts[0].n
	for _, p := range parts {
		if p.n <= 0 || p.off < 0 || p.dev == nil || p.off > p.dev.Size()-p.n {
			return nil, guest.Damaged("a stripe of %d bytes from %d on, past the end of what it is on", p.n, p.off)
		}
		least = min(least, p.n)
	}
	least -= least % chunk
	return &mapped{layout: &stripes{parts, chunk}, size: least * int64(len(parts))}, nil
}

func (s *stripes) at(off, n int64) (place, error) {
	nr, in := off/s.chunk, off%s.chunk
	p := s.parts[nr%int64(len(s.parts))]
	return place{p.dev, p.off + nr/int64(len(s.parts))*s.chunk + in, min(n, s.chunk-in)}, nil
}
