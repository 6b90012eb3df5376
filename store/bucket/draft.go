//go:build linux

package bucket

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// draftPrefix begins every draft's name; a random number follows.
const draftPrefix = "draft-"

// writeBackEvery is how many bytes may gather in the page cache before the
// kernel is asked to start writing, so that the fsync of Commit finds little
// left to wait for.
const writeBackEvery = 8 << 20

// newDraft makes an empty file in tmp and locks it, so that no CleanTemp takes
// it for one that a crash left behind.
func (l *Local) newDraft() (*os.File, error) {
	for {
		var f *os.File
		err := l.inFolder(draftFolder, func() (err error) {
			f, err = os.CreateTemp(l.file(draftFolder), draftPrefix+"*")
			return err
		})
		if err != nil {
			return nil, err
		}
		// A CleanTemp that came between the two calls has removed the file
		// by the time the lock is ours. File systems without locks have no
		// CleanTemp either, see there.
		_ = flock(f, unix.LOCK_EX)
		linked, err := isLinked(f)
		if err == nil && linked {
			return f, nil
		}
		f.Close()
		if err != nil {
			os.Remove(f.Name())
			return nil, err
		}
	}
}

// CleanTemp removes the drafts of processes that are gone and returns their
// number. Drafts of live writers, in this process or another on this host, are
// left alone, and so is every draft on a file system without flock(2). One
// caught between its making and its lock goes, and counts; its writer notices
// and makes another.
func (l *Local) CleanTemp() (int, error) {
	entries, err := os.ReadDir(l.file(draftFolder))
	if err != nil && !gone(err) {
		return 0, writeError("clean", draftFolder, err)
	}
	removed := 0
	var errs []error
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), draftPrefix) || !e.Type().IsRegular() {
			continue
		}
		name := path.Join(draftFolder, e.Name())
		ok, err := removeAbandoned(l.file(name))
		if ok {
			removed++
		}
		if err != nil {
			errs = append(errs, writeError("clean", name, err))
		}
	}
	return removed, errors.Join(errs...)
}

// removeAbandoned removes file when nobody holds a lock on it.
func removeAbandoned(file string) (bool, error) {
	f, err := os.OpenFile(file, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if gone(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	if flock(f, unix.LOCK_EX|unix.LOCK_NB) != nil {
		return false, nil
	}
	// Its writer may have renamed it since the glob, and then let go.
	mine, err := f.Stat()
	if err != nil {
		return false, err
	}
	there, err := os.Lstat(file)
	if gone(err) || err == nil && !os.SameFile(mine, there) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if err := os.Remove(file); err != nil {
		return false, err
	}
	return true, nil
}

// localWriter is a draft in tmp.
type localWriter struct {
	bucket *Local
	name   string
	f      *os.File

	dirty       atomic.Int64 // bytes written since the last early write-back
	noWriteBack atomic.Bool  // the file system cannot

	mu sync.Mutex
	// guards following
	done bool // committed, aborted or dropped
}

func (w *localWriter) WriteAt(p []byte, off int64) (int, error) {
	n, err := w.f.WriteAt(p, off)
	if err != nil {
		return n, writeError("write", w.name, err)
	}
	// One of several concurrent writers crosses the mark and pays the call.
	if d := w.dirty.Add(int64(n)); d >= writeBackEvery && w.dirty.CompareAndSwap(d, 0) {
		w.writeBack()
	}
	return n, nil
}

// writeBack starts, and does not wait for, the writing of what is dirty. It is
// a hint: errors of the medium come back from the fsync of Commit.
func (w *localWriter) writeBack() {
	if w.noWriteBack.Load() {
		return
	}
	err := control(w.f, func(fd int) error {
		return unix.SyncFileRange(fd, 0, 0, unix.SYNC_FILE_RANGE_WRITE)
	})
	if err != nil {
		w.noWriteBack.Store(true)
	}
}

func (w *localWriter) Commit() error {
	if !w.finish() {
		return writeError("commit", w.name, os.ErrClosed)
	}
	// The lock that the open file holds must outlive the rename.
	defer w.f.Close()
	if err := w.publish(); err != nil {
		return writeError("commit", w.name, err)
	}
	if err := syncFolder(filepath.Dir(w.bucket.file(w.name))); err != nil {
		return writeError("commit", w.name, err)
	}
	return nil
}

// publish makes the bytes durable, then visible. The draft is gone either way.
func (w *localWriter) publish() error {
	err := w.f.Sync()
	if err == nil {
		err = w.bucket.inFolder(path.Dir(w.name), func() error {
			return os.Rename(w.f.Name(), w.bucket.file(w.name))
		})
	}
	if err != nil {
		os.Remove(w.f.Name())
	}
	return err
}

func (w *localWriter) Abort() error {
	if !w.finish() {
		return nil
	}
	defer w.f.Close()
	if err := os.Remove(w.f.Name()); err != nil && !gone(err) {
		return writeError("abort", w.name, err)
	}
	return nil
}

// drop lets go of the draft as the death of the process would: the file stays.
func (w *localWriter) drop() {
	if w.finish() {
		w.f.Close()
	}
}

// finish claims the end of the draft; only the first caller gets true.
func (w *localWriter) finish() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	first := !w.done
	w.done = true
	return first
}

// flock locks f. The lock belongs to the open file: it ends when f is closed or
// the process dies, and also keeps out other openers in the same process.
func flock(f *os.File, how int) error {
	return control(f, func(fd int) error {
		for {
			if err := unix.Flock(fd, how); err != unix.EINTR {
				return err
			}
		}
	})
}

// control calls fn with the descriptor of f, which stays open meanwhile.
func control(f *os.File, fn func(fd int) error) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := c.Control(func(fd uintptr) { inner = fn(int(fd)) }); err != nil {
		return err
	}
	return inner
}

// isLinked reports whether f still has a name.
func isLinked(f *os.File) (bool, error) {
	var st unix.Stat_t
	err := control(f, func(fd int) error { return unix.Fstat(fd, &st) })
	return st.Nlink > 0, err
}

// gone reports that a path has no file, whichever part of it is missing.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR)
}

func isEOF(err error) bool { return errors.Is(err, io.EOF) }
