package folder

import (
	"context"
	"errors"
	"io"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/nfs"
)

// regular gives an open file of data/. EISDIR for a directory, EINVAL for a link.
func (f *Folder) regular(id nfs.ID) (*handle, error) {
	h, err := f.open(id, 0)
	if err == nil && h.dir {
		f.release(h)
		return nil, syscall.EISDIR
	}
	return h, err
}

// ReadAt is that of nfs.FS. EISDIR for a directory, EINVAL for a link.
func (f *Folder) ReadAt(_ context.Context, file nfs.ID, p []byte, off int64) (int, error) {
	if err := f.enter(); err != nil {
		return 0, err
	}
	defer f.gate.RUnlock()
	if off < 0 {
		return 0, syscall.EINVAL
	}
	if file.File&placedBit != 0 {
		q, err := f.placed(file)
		if err != nil {
			return 0, err
		}
		return readContent(q.content, p, off)
	}
	h, err := f.regular(file)
	if err != nil {
		return 0, err
	}
	defer f.release(h)
	return pread(h.fd, p, off)
}

// readContent reads up to the end of a content.
func readContent(c Content, p []byte, off int64) (int, error) {
	left := c.Size() - off
	if left >= int64(len(p)) {
		n, err := c.ReadAt(p, off)
		if n == len(p) {
			err = nil // at the very end it may be io.EOF
		}
		return n, notShort(err)
	}
	if left <= 0 {
		return 0, io.EOF
	}
	n, err := c.ReadAt(p[:left], off)
	if n == int(left) {
		return n, io.EOF
	}
	return n, notShort(err)
}

// notShort makes an end of a content before its size an error.
func notShort(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

func pread(fd int, p []byte, off int64) (done int, err error) {
	for done < len(p) {
		n, err := unix.Pread(fd, p[done:], off+int64(done))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return done, err
		}
		if n == 0 {
			return done, io.EOF
		}
		done += n
	}
	return done, nil
}

// WriteAt is that of nfs.WritableFS. EFBIG, and nothing written, past the end of a placed file; EROFS for one that cannot be written.
func (f *Folder) WriteAt(_ context.Context, file nfs.ID, p []byte, off int64) (int, error) {
	if err := f.enter(); err != nil {
		return 0, err
	}
	defer f.gate.RUnlock()
	if off < 0 {
		return 0, syscall.EINVAL
	}
	if file.File&placedBit != 0 {
		return f.writePlaced(file, p, off)
	}
	h, err := f.regular(file)
	if err != nil {
		return 0, err
	}
	defer f.release(h)
	if !h.writable {
		return 0, syscall.EACCES
	}
	h.dirty.Store(true)
	return pwrite(h.fd, p, off)
}

func (f *Folder) writePlaced(file nfs.ID, p []byte, off int64) (int, error) {
	q, err := f.placed(file)
	if err != nil {
		return 0, err
	}
	if q.writer == nil {
		return 0, syscall.EROFS
	}
	if int64(len(p)) > q.content.Size()-off {
		return 0, syscall.EFBIG
	}
	n, err := q.writer.WriteAt(p, off)
	if n < len(p) && err == nil {
		err = io.ErrShortWrite
	}
	if n == 0 {
		return 0, err
	}
	// After the data: who sees the new time, sees them.
	return n, errOr(err, f.touch(q))
}

func pwrite(fd int, p []byte, off int64) (done int, err error) {
	for done < len(p) {
		n, err := unix.Pwrite(fd, p[done:], off+int64(done))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// Sync is that of nfs.WritableFS.
func (f *Folder) Sync(_ context.Context, file nfs.ID) error {
	if err := f.enter(); err != nil {
		return err
	}
	defer f.gate.RUnlock()
	if file.File&placedBit != 0 {
		p, err := f.placed(file)
		if err != nil || p.flusher == nil {
			return err
		}
		return p.flusher.Flush()
	}
	h, err := f.regular(file)
	if err != nil {
		return err
	}
	defer f.release(h)
	h.dirty.Store(false)
	err = fdatasync(h.fd)
	if err != nil {
		h.dirty.Store(true)
	}
	return errOr(f.cache.lostOf(file), err)
}

func fdatasync(fd int) error {
	for {
		if err := unix.Fdatasync(fd); err != unix.EINTR {
			return err
		}
	}
}

// fsync makes durable the files and directories that are open: contents, attributes, names.
func fsync(fds ...int) error {
	for i := 0; i < len(fds); {
		if i > 0 && fds[i] == fds[i-1] {
			i++
			continue
		}
		err := unix.Fsync(fds[i])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		i++
	}
	return nil
}
