package nbd

import (
	"io"
	"iter"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// Disk is what an export serves. Its methods are safe for concurrent use.
type Disk interface {
	io.ReaderAt
	Size() int64 // bytes; does not change while a connection is open
	// Allocated yields ascending ranges, aligned to granularity and clipped to
	// Size, outside of which all bytes are zero.
	Allocated(granularity int64) iter.Seq2[extent.Extent, error]
}

// WritableDisk is a Disk that can be written.
type WritableDisk interface {
	Disk
	io.WriterAt
	// Flush returns when every write, Zero and Trim that had returned before it
	// was called is durable.
	Flush() error
	// Zero makes the range read as zeros; with punch its space may be given back.
	Zero(off, n int64, punch bool) error
	// Trim says that the range is no longer needed. It may do nothing.
	Trim(off, n int64) error
}

// allocatedFrom is Allocated for the part of the disk from off on; the first range may
// begin before off. It makes block status cheap on a large disk: without it
// every request walks the disk from its start.
type allocatedFrom interface {
	AllocatedFrom(off, granularity int64) iter.Seq2[extent.Extent, error]
}

// prefetcher is a Disk that can bring a range nearer before it is read. Prefetch
// may block until it is there. A connection has one call for its read-ahead at a time, besides
// the client's own requests (NBD_CMD_CACHE).
type prefetcher interface {
	Prefetch(off, n int64)
}

// allocated is the allocation of d from off on.
func allocated(d Disk, off, granularity int64) iter.Seq2[extent.Extent, error] {
	if a, ok := d.(allocatedFrom); ok {
		return a.AllocatedFrom(off, granularity)
	}
	return d.Allocated(granularity)
}
