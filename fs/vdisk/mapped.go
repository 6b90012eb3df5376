package vdisk

import (
	"fmt"
	"io"
	"iter"
	"sync"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// mapping is what an image format has of its own: the way from a place on the
// disk to a place in the file. Safe for concurrent use.
type mapping interface {
	// lookup finds the span at off, which is on the disk, cut at the end of its
	// unit, or later when that costs nothing.
	lookup(w *walk, off int64) (span, error)
	// unpack fills p with the bytes of a packed span from its start on.
	unpack(p []byte, s span) error
}

// mapped is a disk read through a mapping: what all image formats have in
// common. Safe for concurrent use.
type mapped struct {
	mapping  mapping
	r        io.ReaderAt
	fileSize int64
	size     int64 // of the disk, bytes
	name     string
	backing  Source // nil: none
	tables   *tableCache
	walks    sync.Pool // of *walk, not in use
}

// Size is the size of the disk in bytes.
func (m *mapped) Size() int64 { return m.size }

// walk gives the state of one reader, for the caller to put back into walks.
func (m *mapped) walk() *walk {
	if w, ok := m.walks.Get().(*walk); ok {
		return w
	}
	return &walk{cursor{tables: m.tables}, cursor{tables: m.tables}}
}

// kind says where the bytes of a part of the disk are.
type kind byte

const (
	fromBacking kind = iota // in the backing file; zeros when there is none
	zeroes
	plain  // in the file, at host
	packed // compressed in the file; host is for the mapping to read
)

// span is a part of the disk that is all of one kind.
type span struct {
	extent.Extent
	kind kind
	host int64
}

// to is the range [off, end).
func to(off, end int64) extent.Extent { return extent.Extent{Off: off, Len: end - off} }

// next finds the longest span from off on, at most to end; off < end. What is
// compressed is never longer than a cluster.
func (m *mapped) next(w *walk, off, end int64) (span, error) {
	s, err := m.mapping.lookup(w, off)
	for err == nil && s.End() < end && s.kind != packed {
		var more span
		if more, err = m.mapping.lookup(w, s.End()); err != nil || !continues(s, more) {
			// An error is met again if the reader gets there.
			err = nil
			break
		}
		s.Len += more.Len
	}
	s.Len = min(s.Len, end-off)
	if err != nil {
		err = m.wrap(off, err)
	}
	return s, err
}

func continues(s, more span) bool {
	return s.kind == more.kind && (s.kind != plain || s.host+s.Len == more.host)
}

func (m *mapped) wrap(off int64, err error) error {
	return fmt.Errorf("%s: reading at %d: %w", m.name, off, err)
}

// ReadAt reads neighbouring clusters at once where they are neighbours in the
// file, too.
func (m *mapped) ReadAt(p []byte, off int64) (int, error) {
	p, end := clip(p, off, m.size)
	w := m.walk()
	defer m.walks.Put(w)
	done := 0
	for done < len(p) {
		s, err := m.next(w, off+int64(done), off+int64(len(p)))
		if err != nil {
			return done, err
		}
		n, err := m.readSpan(p[done:done+int(s.Len)], s)
		done += n
		if err != nil {
			return done, err
		}
	}
	return done, end
}

func (m *mapped) readSpan(p []byte, s span) (int, error) {
	switch s.kind {
	case plain:
		if s.Len > m.fileSize-s.host {
			return 0, m.wrap(s.Off, corrupt("data at %d lies past the end of the file at %d", s.host+s.Len, m.fileSize))
		}
		n, err := readFull(m.r, p, s.host)
		if err != nil {
			err = m.wrap(s.Off+int64(n), err)
		}
		return n, err
	case packed:
		if err := m.mapping.unpack(p, s); err != nil {
			return 0, m.wrap(s.Off, err)
		}
		return len(p), nil
	case fromBacking:
		if m.backing != nil {
			return readPadded(m.backing, p, s.Off) // its error names its own file
		}
	}
	clear(p)
	return len(p), nil
}

// Allocated implements Source.
func (m *mapped) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	return m.AllocatedFrom(0, granularity)
}

// AllocatedFrom is Allocated without the ranges that end at off or before.
func (m *mapped) AllocatedFrom(off, granularity int64) iter.Seq2[extent.Extent, error] {
	if granularity <= 0 || off < 0 {
		return failed(fmt.Errorf("%s: data from %d on, granularity %d", m.name, off, granularity))
	}
	return extent.Coarsen(m.data(off-off%granularity, granularity), granularity, m.size)
}

// data walks the tables, and the backing file beside them.
func (m *mapped) data(off, granularity int64) iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) {
		below := noBacking
		if m.backing != nil {
			next, stop := iter.Pull2(allocatedFrom(m.backing, off, granularity))
			defer stop()
			below = (&backingData{next: next}).within
		}
		w := m.walk()
		defer m.walks.Put(w)
		const step = 1 << 40 // so that a walk through an empty disk ends a span now and then
		for off := off; off < m.size; {
			s, err := m.next(w, off, min(m.size, off+step))
			switch {
			case err != nil:
				yield(extent.Extent{}, err)
				return
			case s.kind == fromBacking:
				if !below(s.Extent, yield) {
					return
				}
			case s.kind != zeroes:
				if !yield(s.Extent, nil) {
					return
				}
			}
			off = s.End()
		}
	}
}

// allocatedFrom is src.Allocated without ranges that end at off or before.
func allocatedFrom(src Source, off, granularity int64) iter.Seq2[extent.Extent, error] {
	if s, ok := src.(interface {
		AllocatedFrom(off, granularity int64) iter.Seq2[extent.Extent, error]
	}); ok {
		return s.AllocatedFrom(off, granularity)
	}
	return func(yield func(extent.Extent, error) bool) {
		for e, err := range src.Allocated(granularity) {
			if err == nil && e.End() <= off {
				continue
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

func noBacking(extent.Extent, func(extent.Extent, error) bool) bool { return true }

// backingData gives the ranges of a backing file in ascending order.
type backingData struct {
	next func() (extent.Extent, error, bool)
	cur  extent.Extent
	done bool
}

// within yields what the backing file has in window. Windows ascend.
func (b *backingData) within(window extent.Extent, yield func(extent.Extent, error) bool) bool {
	for !b.done {
		if e := extent.Intersect(b.cur, window); !e.Empty() && !yield(e, nil) {
			return false
		}
		if b.cur.End() >= window.End() {
			return true // and perhaps in the next window as well
		}
		e, err, ok := b.next()
		if err != nil {
			yield(extent.Extent{}, err)
			return false
		}
		b.cur, b.done = e, !ok
	}
	return true
}
