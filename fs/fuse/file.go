package fuse

import (
	"errors"
	"io"
	"iter"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// handle is an open file.
type handle struct {
	conn    *conn
	img     fs.Image
	holes   int64  // how finely holes are told, bytes
	release func() // of the hold

	mu   sync.Mutex // guards following
	seek *holeCursor
}

// Open implements fuse.RawFileSystem.
func (s *server) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if in.Flags&syscall.O_ACCMODE != syscall.O_RDONLY {
		return fuse.EROFS
	}
	file := s.nodes.file(in.NodeId)
	if file == nil {
		return stale
	}
	release, err := file.Hold(ctx)
	if err != nil {
		return s.status(err)
	}
	img, err := file.Image(ctx)
	if err != nil {
		release()
		return s.status(err)
	}
	holes := int64(holeGranularity)
	if fs.OfGuest(file) {
		holes = guestHoles
	}
	out.Fh = s.handles.add(&handle{conn: s.conn, img: img, holes: holes, release: release})
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE
	return fuse.OK
}

// Flush implements fuse.RawFileSystem. There is never anything to write: the kernel does not ask again.
func (s *server) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.ENOSYS }

// Release implements fuse.RawFileSystem.
func (s *server) Release(_ <-chan struct{}, in *fuse.ReleaseIn) {
	if h, ok := s.handles.remove(in.Fh).(*handle); ok {
		h.close()
	}
}

// Read implements fuse.RawFileSystem. It gives all bytes asked for up to the end of the file, or an error: the
// kernel takes a short read in the middle of a file for its end.
func (s *server) Read(_ <-chan struct{}, in *fuse.ReadIn, dest []byte) (fuse.ReadResult, fuse.Status) {
	h, ok := s.handles.get(in.Fh).(*handle)
	if !ok {
		return nil, stale
	}
	n, err := h.img.ReadAt(dest, int64(in.Offset))
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, s.status(err)
	}
	return fuse.ReadResultData(dest[:n]), fuse.OK
}

// Lseek implements fuse.RawFileSystem.
func (s *server) Lseek(_ <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	h, ok := s.handles.get(in.Fh).(*handle)
	if !ok {
		return stale
	}
	at, errno := h.lseek(in.Offset, in.Whence)
	out.Offset = at
	return fuse.Status(errno)
}

// lseek answers SEEK_DATA and SEEK_HOLE.
func (h *handle) lseek(off uint64, whence uint32) (uint64, syscall.Errno) {
	size := h.img.Size()
	if off >= uint64(size) {
		return 0, syscall.ENXIO
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.seek == nil || int64(off) < h.seek.from {
		if h.seek != nil {
			h.seek.stop()
		}
		h.seek = newHoleCursor(h.img, h.holes)
	}
	e, err := h.seek.at(int64(off))
	if err != nil {
		return 0, h.conn.errno(err)
	}
	switch {
	case whence == unix.SEEK_DATA && e.Empty():
		return 0, syscall.ENXIO
	case whence == unix.SEEK_DATA:
		return max(off, uint64(e.Off)), 0
	case whence == unix.SEEK_HOLE && (e.Empty() || int64(off) < e.Off):
		return off, 0
	case whence == unix.SEEK_HOLE:
		return uint64(min(e.End(), size)), 0
	default:
		return 0, syscall.EINVAL
	}
}

// close ends it.
func (h *handle) close() {
	h.release()
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.seek != nil {
		h.seek.stop()
		h.seek = nil
	}
}

// holeCursor goes through the allocated ranges of a file once, as copying
// programs ask for them, instead of from the start for each question.
type holeCursor struct {
	next func() (extent.Extent, error, bool)
	stop func()
	from int64         // questions before it need a new cursor
	cur  extent.Extent // the range at or after from; empty when there is none
}

// How finely holes are told, bytes: the smallest chunk; in a guest's file, the block that most file systems have.
const (
	holeGranularity = store.MinChunkSize
	guestHoles      = 4096
)

func newHoleCursor(img fs.Image, granularity int64) *holeCursor {
	c := &holeCursor{}
	c.next, c.stop = iter.Pull2(img.Allocated(granularity))
	c.cur = extent.Extent{Len: 0}
	return c
}

// at gives the range that holds off or the first one after it.
func (c *holeCursor) at(off int64) (extent.Extent, error) {
	for c.cur.End() <= off {
		e, err, ok := c.next()
		if err != nil {
			return e, err
		}
		if !ok {
			c.cur = extent.Extent{Off: off}
			break
		}
		c.cur = e
	}
	c.from = off
	return c.cur, nil
}
