package vdisk

import (
	"encoding/binary"
	"fmt"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// A computed qcow2, in clusters of 64 KiB (qcow2 specification, "General"):
//
//	header | refcount table | refcount blocks | L1 table | L2 tables | data
//
// L2 tables exist only where the disk has data. Every cluster is used once.
const (
	qcowCluster     = 64 * kib
	qcowRefs        = qcowCluster / 2 // clusters per refcount block, 16 bits each
	qcowL2Entries   = qcowCluster / 8 // clusters per L2 table
	qcowCopied      = 1 << 63         // refcount is exactly one: may be written in place
	qcowMaxL1       = 32 * mib        // bytes; QEMU refuses more
	qcowMaxComputed = qcowMaxL1 / 8 * qcowL2Entries * qcowCluster
)

// QCOW2 computes a qcow2 of version 3 of src, with clusters of 64 KiB.
//
// The disk in it is src padded with zeros to whole sectors. A disk above 2 PiB
// is ErrTooLarge: its L1 table would be larger than QEMU accepts.
func QCOW2(src Source) (File, error) {
	disk := src.Size()
	if disk > qcowMaxComputed {
		return nil, fmt.Errorf("qcow2: %d bytes, at most %d: %w", disk, int64(qcowMaxComputed), ErrTooLarge)
	}
	disk = roundUp(disk, sector)
	blocks, err := allocatedBlocks(src, qcowCluster)
	if err != nil {
		return nil, err
	}
	l1Entries := divUp(disk, qcowL2Entries*qcowCluster)
	l2 := newBitmap(l1Entries)
	for i := range l1Entries {
		if blocks.rank((i+1)*qcowL2Entries) > blocks.rank(i*qcowL2Entries) {
			l2.set(i, i+1)
		}
	}
	l2.seal()

	// The refcount structures count themselves: grow them until they fit.
	l1Clusters := divUp(l1Entries*8, qcowCluster)
	refTable, refBlocks, total := int64(1), int64(1), int64(0)
	for {
		total = 1 + refTable + refBlocks + l1Clusters + l2.ones + blocks.ones
		needBlocks := divUp(total, qcowRefs)
		needTable := divUp(needBlocks*8, qcowCluster)
		if needBlocks == refBlocks && needTable == refTable {
			break
		}
		refBlocks, refTable = max(refBlocks, needBlocks), max(refTable, needTable)
	}
	refBlocksAt := (1 + refTable) * qcowCluster
	l1At := refBlocksAt + refBlocks*qcowCluster
	l2At := l1At + l1Clusters*qcowCluster
	c := &computed{src: src, blocks: blocks, unit: qcowCluster, data: l2At + l2.ones*qcowCluster}

	refTableEntry := func(i int64) uint64 {
		if i >= refBlocks {
			return 0
		}
		return uint64(refBlocksAt + i*qcowCluster)
	}
	refcount := func(i int64) uint64 {
		if i >= total {
			return 0
		}
		return 1
	}
	l1Entry := func(i int64) uint64 {
		if !l2.has(i) {
			return 0
		}
		return uint64(l2At+l2.rank(i)*qcowCluster) | qcowCopied
	}
	c.meta = []region{
		bytesRegion(0, qcowHeader(disk, l1Entries, l1At, refTable)),
		tableRegion(qcowCluster, refTable*qcowCluster, 8, refTableEntry),
		tableRegion(refBlocksAt, refBlocks*qcowCluster, 2, refcount),
		tableRegion(l1At, l1Clusters*qcowCluster, 8, l1Entry),
		{
			Extent: extent.Extent{Off: l2At, Len: l2.ones * qcowCluster},
			fill:   func(p []byte, off int64) { c.fillL2(p, off, l2) },
		},
	}
	return c.finish(), nil
}

func tableRegion(off, length int64, width int, entry func(i int64) uint64) region {
	return region{
		Extent: extent.Extent{Off: off, Len: length},
		fill:   func(p []byte, off int64) { table{width: width, big: true}.fill(p, off, entry) },
	}
}

// fillL2 goes table by table, since finding which part of the disk a table is
// for costs a search.
func (c *computed) fillL2(p []byte, off int64, l2 *bitmap) {
	for len(p) > 0 {
		in := off % qcowCluster
		n := min(int64(len(p)), qcowCluster-in)
		first := l2.pick(off/qcowCluster) * qcowL2Entries
		table{width: 8, big: true}.fill(p[:n], in, func(i int64) uint64 {
			if !c.blocks.has(first + i) {
				return 0 // no backing file: reads as zeros
			}
			return uint64(c.place(first+i)) | qcowCopied
		})
		p, off = p[n:], off+n
	}
}

// qcowHeader, qcow2 specification, "Header": 104 bytes without extensions, then
// the end-of-extensions mark, which is 8 zero bytes.
func qcowHeader(disk, l1Entries, l1At, refTable int64) []byte {
	b := make([]byte, 104+8)
	be := binary.BigEndian
	copy(b, qcowMagic)
	be.PutUint32(b[4:], 3)
	be.PutUint32(b[20:], 16) // cluster_bits
	be.PutUint64(b[24:], uint64(disk))
	be.PutUint32(b[36:], uint32(l1Entries))
	be.PutUint64(b[40:], uint64(l1At))
	be.PutUint64(b[48:], qcowCluster) // refcount_table_offset
	be.PutUint32(b[56:], uint32(refTable))
	be.PutUint32(b[96:], 4) // refcount_order: 16 bits
	be.PutUint32(b[100:], 104)
	return b
}

const qcowMagic = "QFI\xfb"
