//go:build linux

package bucket

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Local keeps every object in a file of the same name below one directory, and
// drafts in its folder tmp. Folders are made as objects need them (0700, files
// 0600) and never removed. Several processes may use one directory at a time.
//
// Durability rests on fsync of the file, rename(2), and fsync of the folder;
// a medium that lies about fsync is beyond it. An object whose name is a folder
// of another object ("a" and "a/b") cannot exist here.
type Local struct {
	dir string

	mu sync.Mutex
	// guards following
	durable map[string]bool // folder, relative to dir => its entry was fsynced
}

var (
	_ Bucket = (*Local)(nil)
	_ Spacer = (*Local)(nil)

	_ Reserver = (*Local)(nil)
)

// OpenLocal returns the bucket in dir, which must exist. It writes nothing.
func OpenLocal(dir string) (*Local, error) {
	st, err := os.Stat(dir)
	if err != nil {
		return nil, fmt.Errorf("bucket: open: %w", err)
	}
	if !st.IsDir() {
		return nil, fmt.Errorf("bucket: open: %s: %w", dir, unix.ENOTDIR)
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("bucket: open: %w", err)
	}
	return &Local{dir: abs, durable: map[string]bool{".": true}}, nil
}

// Free implements Spacer.
func (l *Local) Free() (int64, error) { return FreeBytes(l.dir) }

// FreeBytes is what users other than root can still write to the file system of dir.
func FreeBytes(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("bucket: room in %s: %w", dir, err)
	}
	return int64(st.Bavail) * int64(st.Bsize), nil
}

// reserveName is a file that holds room and nothing else.
const reserveName = "reserve"

// Reserve implements Reserver by fallocate(2).
func (l *Local) Reserve(n int64) (err error) {
	name := l.file(reserveName)
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_CLOEXEC, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return writeError("reserve", name, err)
	}
	err = unix.Fallocate(int(f.Fd()), 0, 0, n)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		os.Remove(name)
		return writeError("reserve", name, err)
	}
	return nil
}

// Unreserve implements Reserver.
func (l *Local) Unreserve() error {
	if err := os.Remove(l.file(reserveName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return writeError("remove", reserveName, err)
	}
	return nil
}

// Create implements Bucket. It fails at once where the medium is read-only;
// a full one may show only in WriteAt or Commit.
func (l *Local) Create(ctx context.Context, name string) (Writer, error) {
	if err := checkCall(ctx, name); err != nil {
		return nil, err
	}
	f, err := l.newDraft()
	if err != nil {
		return nil, writeError("create", name, err)
	}
	return &localWriter{bucket: l, name: name, f: f}, nil
}

// Open implements Bucket.
func (l *Local) Open(ctx context.Context, name string) (Object, error) {
	if err := checkCall(ctx, name); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(l.file(name), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ENXIO) {
		err = ErrNotExist
	}
	if err != nil {
		return nil, fmt.Errorf("bucket: open %s: %w", name, err)
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = ErrNotExist
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("bucket: open %s: %w", name, err)
	}
	return &localObject{File: f, size: st.Size()}, nil
}

// Remove implements Bucket.
func (l *Local) Remove(ctx context.Context, name string) error {
	if err := checkCall(ctx, name); err != nil {
		return err
	}
	// os.Remove would also take an empty folder of that name.
	err := unix.Unlink(l.file(name))
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.EISDIR) {
		err = ErrNotExist
	}
	if err == nil {
		err = syncFolder(filepath.Dir(l.file(name)))
	}
	if err != nil {
		return writeError("remove", name, err)
	}
	return nil
}

// listBatch is how many folder entries List holds in memory per level.
const listBatch = 1024

// List implements Bucket. Files whose names no object can have, and anything
// but regular files, are not listed.
func (l *Local) List(ctx context.Context, prefix string) iter.Seq2[Info, error] {
	return func(yield func(Info, error) bool) {
		folder := strings.TrimSuffix(prefix[:strings.LastIndexByte(prefix, '/')+1], "/")
		if folder != "" && CheckName(folder) != nil {
			if err := ctx.Err(); err != nil {
				yield(Info{}, err)
			}
			return
		}
		l.walk(ctx, folder, prefix, true, yield)
	}
}

// Names is List without the sizes, which cost a system call each.
func (l *Local) Names(ctx context.Context, prefix string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		folder := strings.TrimSuffix(prefix[:strings.LastIndexByte(prefix, '/')+1], "/")
		if folder == "" || CheckName(folder) == nil {
			l.walk(ctx, folder, prefix, false, func(i Info, err error) bool { return yield(i.Name, err) })
		}
	}
}

// walk yields what lies in folder ("" is the top) and below and starts with
// prefix, with sizes only when asked for. It returns false when the listing has ended early.
func (l *Local) walk(ctx context.Context, folder, prefix string, sizes bool, yield func(Info, error) bool) bool {
	d, err := os.Open(l.file(folder))
	if gone(err) {
		return true
	}
	if err != nil {
		return yieldError(yield, folder, err)
	}
	defer d.Close()
	for {
		if err := ctx.Err(); err != nil {
			return yieldError(yield, folder, err)
		}
		entries, err := d.ReadDir(listBatch)
		for _, e := range entries {
			if !l.walkEntry(ctx, path.Join(folder, e.Name()), e, prefix, sizes, yield) {
				return false
			}
		}
		// ReadDir says ENOTDIR for a file, and io.EOF at the end.
		if len(entries) == 0 && (err == nil || errors.Is(err, unix.ENOTDIR) || isEOF(err)) {
			return true
		}
		if err != nil && !isEOF(err) {
			return yieldError(yield, folder, err)
		}
	}
}

func (l *Local) walkEntry(ctx context.Context, name string, e fs.DirEntry, prefix string, sizes bool, yield func(Info, error) bool) bool {
	if CheckName(name) != nil {
		return true
	}
	if e.IsDir() {
		below := name + "/"
		if !strings.HasPrefix(below, prefix) && !strings.HasPrefix(prefix, below) {
			return true
		}
		return l.walk(ctx, name, prefix, sizes, yield)
	}
	if !e.Type().IsRegular() || !strings.HasPrefix(name, prefix) {
		return true
	}
	if !sizes {
		return yield(Info{Name: name}, nil)
	}
	st, err := e.Info()
	if gone(err) {
		return true
	}
	if err != nil {
		return yieldError(yield, name, err)
	}
	return yield(Info{Name: name, Size: st.Size()}, nil)
}

func yieldError(yield func(Info, error) bool, name string, err error) bool {
	yield(Info{}, fmt.Errorf("bucket: list %s: %w", name, err))
	return false
}

func (l *Local) file(name string) string { return filepath.Join(l.dir, filepath.FromSlash(name)) }

// inFolder runs fn, which puts a file into folder, with folder existing and
// known to survive a power cut. Should someone have removed the folder since it
// was last seen, it is made again and fn runs a second time.
func (l *Local) inFolder(folder string, fn func() error) error {
	err := l.makeFolder(folder)
	if err == nil {
		err = fn()
	}
	if !gone(err) {
		return err
	}
	l.mu.Lock()
	l.durable = map[string]bool{".": true}
	l.mu.Unlock()
	if err := l.makeFolder(folder); err != nil {
		return err
	}
	return fn()
}

func (l *Local) makeFolder(folder string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.makeFolderLocked(folder)
}

// makeFolderLocked makes folder and those above it. What this process has not
// yet seen durable is fsynced even when it exists already: another process may
// have made it and not come to its own fsync. l.mu is held.
func (l *Local) makeFolderLocked(folder string) error {
	if l.durable[folder] {
		return nil
	}
	parent := path.Dir(folder)
	if err := l.makeFolderLocked(parent); err != nil {
		return err
	}
	if err := os.Mkdir(l.file(folder), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := syncFolder(l.file(parent)); err != nil {
		return err
	}
	l.durable[folder] = true
	return nil
}

// syncFolder makes the entries of a folder durable.
func syncFolder(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// localObject reads with pread(2).
type localObject struct {
	*os.File
	size int64 // bytes
}

func (o *localObject) Size() int64 { return o.size }

// writeError names the object and adds the sentinel that err stands for.
func writeError(what, name string, err error) error {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("bucket: %s %s: %w: %w", what, name, ErrFull, err)
	case errors.Is(err, unix.EROFS), errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Errorf("bucket: %s %s: %w: %w", what, name, ErrReadOnly, err)
	}
	return fmt.Errorf("bucket: %s %s: %w", what, name, err)
}
