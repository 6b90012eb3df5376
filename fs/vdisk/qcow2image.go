package vdisk

import (
	"fmt"
	"io"
	"iter"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// QCOW2Image is an open qcow2 image with its backing files: a disk. Safe for
// concurrent use.
//
// Its Allocated reads tables only. It counts as data what any file of the chain
// holds, unless a file above it says zero; compressed clusters are data.
type QCOW2Image struct {
	r        io.ReaderAt
	fileSize int64
	h        qcowHeaderFields
	name     string
	backing  Source // nil: none
	tables   *tableCache
	packed   *packedCache
}

var _ Source = (*QCOW2Image)(nil)

func newQCOW2Image(r io.ReaderAt, size int64, h qcowHeaderFields, opts QCOW2Options) *QCOW2Image {
	return &QCOW2Image{
		r:        r,
		fileSize: size,
		h:        h,
		name:     opts.Name,
		tables:   newTableCache(r, size, h.cluster(), opts.TableCache),
		packed:   newPackedCache(r, size, h.cluster(), h.zstd),
	}
}

// Size is the size of the disk in bytes.
func (q *QCOW2Image) Size() int64 { return q.h.size }

func (q *QCOW2Image) walk() walk { return walk{cursor{tables: q.tables}, cursor{tables: q.tables}} }

// kind says where the bytes of a part of the disk are.
type kind byte

const (
	fromBacking kind = iota // in the backing file; zeros when there is none
	zeroes
	plain  // in the file, at host
	packed // compressed in the file; host is the L2 entry
)

// span is a part of the disk that is all of one kind.
type span struct {
	extent.Extent
	kind kind
	host int64
}

// unit is the smallest part of the disk that has a kind of its own: a cluster,
// or with extended L2 entries the 32nd part of one.
func (q *QCOW2Image) unit() int64 {
	if q.h.extendedL2 {
		return q.h.cluster() / 32
	}
	return q.h.cluster()
}

// lookup finds the span at off, cut at the end of its unit, or of all that one
// L2 table maps when there is no table.
func (q *QCOW2Image) lookup(w *walk, off int64) (span, error) {
	perTable := q.h.l2Entries() << q.h.clusterBits // bytes of disk; at most 2^39
	l1Index := off / perTable
	l1, err := w.l1.uint64(q.h.l1At + l1Index*8)
	if err != nil {
		return span{}, err
	}
	const reservedL1 = 0x7F00_0000_0000_01FF
	table := int64(l1 & 0x00FF_FFFF_FFFF_FE00)
	if l1&reservedL1 != 0 || table&(q.h.cluster()-1) != 0 {
		return span{}, corrupt("L1 entry %d is %#x", l1Index, l1)
	}
	if table == 0 {
		return span{Extent: to(off, roundUp(off+1, perTable))}, nil
	}
	width := int64(8)
	if q.h.extendedL2 {
		width = 16
	}
	at := table + off%perTable>>q.h.clusterBits*width
	entry, err := w.l2.uint64(at)
	if err != nil {
		return span{}, err
	}
	bitmap := uint64(0)
	if q.h.extendedL2 {
		if bitmap, err = w.l2.uint64(at + 8); err != nil {
			return span{}, err
		}
	}
	s, err := q.decode(off, entry, bitmap)
	if err != nil {
		return s, fmt.Errorf("L2 entry at %d: %w", at, err)
	}
	return s, nil
}

// decode reads an L2 entry: qcow2 specification, "L2 table entry", "Standard
// Cluster Descriptor" and "Extended L2 Entries".
//
//	bit 63 copied, bit 62 compressed
//	compressed: the rest belongs to packedCache
//	else: bits 9..55 offset in the file, bit 0 "reads as zeros" (version 3,
//	not extended), all others reserved
//	bitmap (extended): bits 0..31 subcluster is in the file, 32..63 is zeros
func (q *QCOW2Image) decode(off int64, entry, bitmap uint64) (span, error) {
	cluster := q.h.cluster()
	if entry>>62&1 == 1 {
		if bitmap != 0 {
			return span{}, corrupt("compressed cluster with subclusters %#x", bitmap)
		}
		return span{Extent: to(off, roundUp(off+1, cluster)), kind: packed, host: int64(entry &^ (3 << 62))}, nil
	}
	host := int64(entry & 0x00FF_FFFF_FFFF_FE00)
	reserved := uint64(0x3F00_0000_0000_01FE)
	if q.h.version < 3 || q.h.extendedL2 {
		reserved |= 1
	}
	if entry&reserved != 0 || host&(cluster-1) != 0 {
		return span{}, corrupt("entry %#x", entry)
	}
	s := span{Extent: to(off, roundUp(off+1, q.unit()))}
	in := off & (cluster - 1)
	isZero, isPlain := entry&1 == 1, host != 0
	if q.h.extendedL2 {
		sub := in / q.unit()
		isPlain, isZero = bitmap>>sub&1 == 1, bitmap>>(32+sub)&1 == 1
		if isPlain && (isZero || host == 0) {
			return span{}, corrupt("entry %#x with subclusters %#x", entry, bitmap)
		}
	}
	switch {
	case isZero:
		s.kind = zeroes
	case isPlain:
		s.kind, s.host = plain, host+in
	}
	return s, nil
}

// to is the range [off, end).
func to(off, end int64) extent.Extent { return extent.Extent{Off: off, Len: end - off} }

// next finds the longest span from off on, at most to end; off < end. What is
// compressed is never longer than a cluster.
func (q *QCOW2Image) next(w *walk, off, end int64) (span, error) {
	s, err := q.lookup(w, off)
	for err == nil && s.End() < end && s.kind != packed {
		var more span
		if more, err = q.lookup(w, s.End()); err != nil || !continues(s, more) {
			// An error is met again if the reader gets there.
			err = nil
			break
		}
		s.Len += more.Len
	}
	s.Len = min(s.Len, end-off)
	if err != nil {
		err = q.wrap(off, err)
	}
	return s, err
}

func continues(s, more span) bool {
	return s.kind == more.kind && (s.kind != plain || s.host+s.Len == more.host)
}

func (q *QCOW2Image) wrap(off int64, err error) error {
	return fmt.Errorf("%s: reading at %d: %w", q.name, off, err)
}

// ReadAt reads neighbouring clusters at once where they are neighbours in the
// file, too.
func (q *QCOW2Image) ReadAt(p []byte, off int64) (int, error) {
	p, end := clip(p, off, q.h.size)
	w := q.walk()
	done := 0
	for done < len(p) {
		s, err := q.next(&w, off+int64(done), off+int64(len(p)))
		if err != nil {
			return done, err
		}
		n, err := q.readSpan(p[done:done+int(s.Len)], s)
		done += n
		if err != nil {
			return done, err
		}
	}
	return done, end
}

func (q *QCOW2Image) readSpan(p []byte, s span) (int, error) {
	switch s.kind {
	case plain:
		if s.Len > q.fileSize-s.host {
			return 0, q.wrap(s.Off, corrupt("data at %d lies past the end of the file at %d", s.host+s.Len, q.fileSize))
		}
		n, err := readFull(q.r, p, s.host)
		if err != nil {
			err = q.wrap(s.Off+int64(n), err)
		}
		return n, err
	case packed:
		if err := q.packed.read(p, uint64(s.host), s.Off&(q.h.cluster()-1)); err != nil {
			return 0, q.wrap(s.Off, err)
		}
		return len(p), nil
	case fromBacking:
		if q.backing != nil {
			return readPadded(q.backing, p, s.Off) // its error names its own file
		}
	}
	clear(p)
	return len(p), nil
}

// Allocated implements Source.
func (q *QCOW2Image) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	if granularity <= 0 {
		return failed(fmt.Errorf("%s: granularity %d", q.name, granularity))
	}
	return extent.Coarsen(q.data(granularity), granularity, q.h.size)
}

// data walks the tables, and the backing file beside them.
func (q *QCOW2Image) data(granularity int64) iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) {
		below := noBacking
		if q.backing != nil {
			next, stop := iter.Pull2(q.backing.Allocated(granularity))
			defer stop()
			below = (&backingData{next: next}).within
		}
		w := q.walk()
		const step = 1 << 40 // so that a walk through an empty disk ends a span now and then
		for off := int64(0); off < q.h.size; {
			s, err := q.next(&w, off, min(q.h.size, off+step))
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
