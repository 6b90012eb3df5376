package vdisk

import (
	"fmt"
	"io"
	"math/bits"
)

// QCOW2Image is an open qcow2 image with its backing files: a disk. Safe for
// concurrent use.
//
// Its Allocated reads tables only. It counts as data what any file of the chain
// holds, unless a file above it says zero; compressed clusters are data.
type QCOW2Image struct {
	mapped
	h      qcowHeaderFields
	packed *packedCache
}

var _ Source = (*QCOW2Image)(nil)

func newQCOW2Image(r io.ReaderAt, size int64, h qcowHeaderFields, opts QCOW2Options) *QCOW2Image {
	q := &QCOW2Image{h: h}
	q.mapped = mapped{
		mapping:  q,
		r:        r,
		fileSize: size,
		size:     h.size,
		name:     opts.Name,
		tables:   newTableCache(r, size, h.cluster(), opts.TableCache),
	}
	q.packed = newPackedCache(h.cluster(), q.decompress)
	return q
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
//	compressed: the rest belongs to decompress
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

func (q *QCOW2Image) unpack(p []byte, s span) error {
	return q.packed.read(p, packedKey{host: s.host}, s.Off&(q.h.cluster()-1))
}

// decompress decodes into dst, which is one cluster. The entry, qcow2
// specification, "Compressed Clusters Descriptor", with x = 70 - cluster_bits:
//
//	bits 0..x-1  offset in the file, not aligned
//	bits x..61   512-byte sectors used after the one with that offset
func (q *QCOW2Image) decompress(u *unpacker, dst []byte, key packedKey) error {
	x := 70 - bits.TrailingZeros64(uint64(q.h.cluster()))
	off := key.host & (1<<x - 1)
	n := (key.host>>x+1)*sector - off%sector
	if off >= q.fileSize {
		return corrupt("compressed data at %d lies past the end of the file at %d", off, q.fileSize)
	}
	n = min(n, q.fileSize-off) // the last sector need not be whole; too little will not decode
	if err := u.load(q.r, off, n); err != nil {
		return err
	}
	var err error
	if q.h.zstd {
		err = u.unzstd(dst)
	} else {
		err = u.inflate(dst)
	}
	if err != nil {
		return corrupt("compressed data at %d (%v)", off, err)
	}
	return nil
}
