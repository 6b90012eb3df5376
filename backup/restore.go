package backup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"syscall"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// Image is what can be restored: a disk of a point, or a disk format computed over one.
type Image interface {
	io.ReaderAt
	Size() int64 // bytes
	// Allocated yields ascending ranges outside of which all bytes are zero.
	Allocated(granularity int64) iter.Seq2[extent.Extent, error]
}

const (
	pieceBytes = 1 << 20  // what one worker reads and writes at once
	flushBytes = 16 << 20 // written data after which its write-back is started
	blockBytes = 4096     // unit in which zeros become holes and differences are found
)

// ErrTargetExists: a restore does not overwrite what is there.
var ErrTargetExists = errors.New("target exists")

// RestoreFile writes img to a new file, sparse where img is zero. The file appears
// under its name when all of it is on disk; an interrupted restore leaves a file with the ending
// .partial, which the next one replaces. done is told the bytes dealt with, from several goroutines.
func RestoreFile(ctx context.Context, img Image, name string, done func(int64)) error {
	return newFile(name, func(f *os.File) error {
		if err := f.Truncate(img.Size()); err != nil {
			return err
		}
		return copySparse(ctx, img, f, done)
	})
}

// RestoreStream makes a new file of what write writes, as RestoreFile does.
func RestoreStream(name string, write func(w io.Writer) error) error {
	return newFile(name, func(f *os.File) error {
		return write(&flushedFile{f: f, flush: newFlusher(f)})
	})
}

// flushedFile starts the write-back of what is written to it.
type flushedFile struct {
	f     *os.File
	flush *flusher
	off   int64
}

func (w *flushedFile) Write(p []byte) (int, error) {
	n, err := w.f.Write(p)
	w.flush.wrote(extent.Extent{Off: w.off, Len: int64(n)})
	w.off += int64(n)
	return n, err
}

// newFile makes a file of what fill writes, under another name until all of it
// is on disk.
func newFile(name string, fill func(f *os.File) error) (err error) {
	if _, err := os.Lstat(name); err == nil {
		return fmt.Errorf("%s: %w", name, ErrTargetExists)
	} else if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	partial := name + ".partial"
	f, err := openPartial(partial)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(partial)
		}
		f.Close()
	}()
	if err := fill(f); err != nil {
		return fmt.Errorf("restore %s: %w", name, err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("restore %s: %w", name, err)
	}
	if err := renameNew(partial, name); err != nil {
		return err
	}
	return syncDir(filepath.Dir(name))
}

// openPartial makes the file that is written to, and locks it against a second restore of the same name.
func openPartial(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		f.Close()
		return nil, fmt.Errorf("%s is being written by another restore", name)
	}
	if err := f.Truncate(0); err != nil { // left by a restore that was killed
		f.Close()
		return nil, err
	}
	return f, nil
}

// renameNew renames without replacing.
func renameNew(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	switch {
	case errors.Is(err, unix.EEXIST):
		return fmt.Errorf("%s: %w", to, ErrTargetExists)
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS): // not on this file system
		return os.Rename(from, to)
	case err != nil:
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// pieces cuts ranges into pieces, each within one aligned block of pieceBytes,
// and sends them until ctx ends.
func pieces(ctx context.Context, ranges iter.Seq2[extent.Extent, error], out chan<- extent.Extent) error {
	defer close(out)
	for e, err := range ranges {
		if err != nil {
			return err
		}
		for e.Len > 0 {
			n := min(e.Len, pieceBytes-e.Off%pieceBytes)
			select {
			case out <- extent.Extent{Off: e.Off, Len: n}:
			case <-ctx.Done():
				return ctx.Err()
			}
			e.Off, e.Len = e.Off+n, e.Len-n
		}
	}
	return nil
}

// copySparse writes all of img that is not zero to the new, empty file f.
func copySparse(ctx context.Context, img Image, f *os.File, done func(int64)) error {
	var settled atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	work := make(chan extent.Extent, 2*runtime.GOMAXPROCS(0))
	g.Go(func() error { return pieces(ctx, img.Allocated(blockBytes), work) })
	flush := newFlusher(f)
	for range runtime.GOMAXPROCS(0) {
		g.Go(func() error {
			buf := make([]byte, pieceBytes)
			for e := range work {
				b := buf[:e.Len]
				if err := (exactReader{img}).ReadAt(b, e.Off); err != nil {
					return err
				}
				if err := writeData(f, b, e.Off); err != nil {
					return err
				}
				flush.wrote(e)
				done(e.Len)
				settled.Add(e.Len)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	done(img.Size() - settled.Load()) // the holes
	return nil
}

var zeroBlock [blockBytes]byte

// writeData writes the blocks of b that are not all zeros, neighbours in one call.
func writeData(f io.WriterAt, b []byte, off int64) error {
	for i := 0; i < len(b); {
		n := min(blockBytes, len(b)-i)
		if bytes.Equal(b[i:i+n], zeroBlock[:n]) {
			i += n
			continue
		}
		from := i
		for i < len(b) {
			n := min(blockBytes, len(b)-i)
			if bytes.Equal(b[i:i+n], zeroBlock[:n]) {
				break
			}
			i += n
		}
		if _, err := f.WriteAt(b[from:i], off+int64(from)); err != nil {
			return err
		}
	}
	return nil
}

// flusher starts write-back early, so that the final fsync has little to wait for.
type flusher struct {
	fd      int
	pending atomic.Int64
}

func newFlusher(f *os.File) *flusher { return &flusher{fd: int(f.Fd())} }

func (w *flusher) wrote(e extent.Extent) {
	if w.pending.Add(e.Len) < flushBytes {
		return
	}
	w.pending.Store(0)
	// Only a hint: what it does not start, fsync does.
	_ = unix.SyncFileRange(w.fd, 0, e.End(), unix.SYNC_FILE_RANGE_WRITE)
}

// RestoreOnto makes an existing file or block device equal to img by writing only
// the blocks that differ, and gives the bytes written. A regular file is cut or extended
// to the size of img; a device must be large enough. hash, when given, names the chunks of img by
// content, so that chunks that are right already are not read from the repository.
func RestoreOnto(ctx context.Context, img Image, name string, hash func() ChunkNamer, done func(int64)) (written int64, err error) {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	switch {
	case st.Mode().IsRegular():
		if st.Size() != img.Size() {
			if err := f.Truncate(img.Size()); err != nil {
				return 0, err
			}
		}
	case st.Mode()&os.ModeDevice != 0 && st.Mode()&os.ModeCharDevice == 0:
		size, err := f.Seek(0, io.SeekEnd)
		if err != nil {
			return 0, err
		}
		if size < img.Size() {
			return 0, fmt.Errorf("%s has %d bytes, the disk needs %d", name, size, img.Size())
		}
	default:
		return 0, fmt.Errorf("%s is neither a file nor a block device", name)
	}
	var total atomic.Int64
	g, gctx := errgroup.WithContext(ctx)
	work := make(chan extent.Extent, 2*runtime.GOMAXPROCS(0))
	g.Go(func() error {
		return pieces(gctx, extent.All([]extent.Extent{{Len: img.Size()}}), work)
	})
	flush := newFlusher(f)
	for range runtime.GOMAXPROCS(0) {
		g.Go(func() error {
			o := onto{f: f, img: img, want: make([]byte, pieceBytes), have: make([]byte, pieceBytes)}
			if hash != nil {
				o.names = hash()
			}
			for e := range work {
				n, err := o.piece(gctx, e)
				if err != nil {
					return err
				}
				if n > 0 {
					flush.wrote(e)
				}
				total.Add(n)
				done(e.Len)
			}
			return nil
		})
	}
	err = g.Wait()
	if serr := f.Sync(); err == nil {
		err = serr
	}
	if err != nil {
		return total.Load(), fmt.Errorf("restore onto %s: %w", name, err)
	}
	return total.Load(), nil
}

// ChunkNamer tells whether bytes are what an image has at an offset without reading the image.
type ChunkNamer interface {
	// Same reports whether data, whole chunks from off on (the last may end with
	// the disk), is what the image holds there.
	Same(ctx context.Context, data []byte, off int64) (bool, error)
}

var _ ChunkNamer = (*store.Comparer)(nil)

// onto is one worker of RestoreOnto.
type onto struct {
	f          *os.File
	img        Image
	names      ChunkNamer // nil: compare by reading
	want, have []byte
}

// piece makes one range right and gives the bytes written.
func (o *onto) piece(ctx context.Context, e extent.Extent) (int64, error) {
	have, want := o.have[:e.Len], o.want[:e.Len]
	if err := (exactReader{o.f}).ReadAt(have, e.Off); err != nil {
		return 0, err
	}
	if o.names != nil {
		if same, err := o.names.Same(ctx, have, e.Off); err != nil || same {
			return 0, err
		}
	}
	if err := (exactReader{o.img}).ReadAt(want, e.Off); err != nil {
		return 0, err
	}
	var written int64
	for i := 0; i < len(want); {
		n := min(blockBytes, len(want)-i)
		if bytes.Equal(have[i:i+n], want[i:i+n]) {
			i += n
			continue
		}
		from := i
		for i < len(want) {
			n := min(blockBytes, len(want)-i)
			if bytes.Equal(have[i:i+n], want[i:i+n]) {
				break
			}
			i += n
		}
		if _, err := o.f.WriteAt(want[from:i], e.Off+int64(from)); err != nil {
			return written, err
		}
		written += int64(i - from)
	}
	return written, nil
}
