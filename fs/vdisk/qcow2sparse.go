package vdisk

import (
	"fmt"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// maxQCOW2Sparse keeps the refcount table below the 8 MiB that QEMU accepts.
const maxQCOW2Sparse = 1 << 50

// QCOW2Sparse computes a qcow2 of version 3 of src in which every cluster of
// 64 KiB has a place of its own, whether it is used or not:
//
//	header | refcount table | L1 table | refcount blocks | L2 tables | disk
//
// Its size is a function of the disk's, so making one costs nothing, however
// large the disk, and it takes no memory: a read of an L2 table or a refcount
// block asks for the map of the part of the disk that it speaks of (512 MiB, or
// 2 GiB). A hole of the disk has an L2 entry and a refcount of 0, and its place
// in the file is a hole. The file is as long as the disk and more; copied
// without an eye on holes it takes as much. QCOW2 makes the short one.
//
// Both tables follow what src lists, so src must always list the same, wherever
// it is asked to begin: it should have AllocatedFrom(off, granularity), the
// same as Allocated without what ends at off or before, or each such read walks
// the map from the beginning. The disk is padded with zeros to whole sectors;
// above 1 PiB it is ErrTooLarge.
func QCOW2Sparse(src Source) (File, error) {
	disk := src.Size()
	if disk > maxQCOW2Sparse {
		return nil, fmt.Errorf("qcow2: %d bytes, at most %d: %w", disk, int64(maxQCOW2Sparse), ErrTooLarge)
	}
	disk = roundUp(disk, sector)
	clusters := divUp(disk, qcowCluster)
	l2Tables := divUp(clusters, qcowL2Entries)
	l1Clusters := divUp(l2Tables*8, qcowCluster)
	// The refcount structures count themselves: grow them until they fit.
	refTable, refBlocks, before := int64(1), int64(1), int64(0)
	for {
		before = 1 + refTable + l1Clusters + refBlocks + l2Tables // clusters before the disk
		needBlocks := divUp(before+clusters, qcowRefs)
		needTable := divUp(needBlocks*8, qcowCluster)
		if needBlocks == refBlocks && needTable == refTable {
			break
		}
		refBlocks, refTable = max(refBlocks, needBlocks), max(refTable, needTable)
	}
	l1At := (1 + refTable) * qcowCluster
	refBlocksAt := l1At + l1Clusters*qcowCluster
	l2At := refBlocksAt + refBlocks*qcowCluster
	data := before * qcowCluster

	pointers := func(at, n int64, flags uint64) func(i int64) uint64 { // to n tables from at on
		return func(i int64) uint64 {
			if i >= n {
				return 0
			}
			return uint64(at+i*qcowCluster) | flags
		}
	}
	return &inPlace{
		src:  src,
		unit: qcowCluster,
		data: data,
		size: data + clusters*qcowCluster,
		meta: []region{
			bytesRegion(0, qcowHeader(disk, l2Tables, l1At, refTable)),
			tableRegion(qcowCluster, refTable*qcowCluster, 8, pointers(refBlocksAt, refBlocks, 0)),
			tableRegion(l1At, l1Clusters*qcowCluster, 8, pointers(l2At, l2Tables, qcowCopied)),
		},
		maps: []mapTable{{
			Extent: extent.Extent{Off: refBlocksAt, Len: refBlocks * qcowCluster},
			table:  table{width: 2, big: true},
			lead:   before,
			entry:  func(int64) uint64 { return 1 },
		}, {
			Extent: extent.Extent{Off: l2At, Len: l2Tables * qcowCluster},
			table:  table{width: 8, big: true},
			entry:  func(b int64) uint64 { return uint64(data+b*qcowCluster) | qcowCopied },
		}},
	}, nil
}
