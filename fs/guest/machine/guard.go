package machine

import (
	"fmt"
	"iter"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// guarded is a file system whose reader may panic over a disk that nobody has thought of: that is damage, and not the end of a
// mount that serves others. It has all optional abilities; those that the reader lacks are guest.ErrUnsupported.
type guarded struct{ fs guest.FS }

// caught makes an error of a panic.
func caught(err *error) {
	if p := recover(); p != nil {
		*err = panicked(p)
	}
}

func panicked(p any) error { return fmt.Errorf("%w: the reader panicked: %v", guest.ErrDamaged, p) }

// caughtSeq is caught for a sequence. A panic of whoever takes the values goes on.
func caughtSeq[T any](seq func() iter.Seq2[T, error]) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		taking, stopped := false, false
		run := func() (err error) {
			defer func() {
				if taking {
					return
				}
				if p := recover(); p != nil {
					err = panicked(p)
				}
			}()
			for v, err := range seq() {
				taking = true
				stopped = !yield(v, err)
				taking = false
				if stopped {
					break
				}
			}
			return nil
		}
		if err := run(); err != nil && !stopped {
			var none T
			yield(none, err)
		}
	}
}

func (g guarded) Info() guest.Info { return g.fs.Info() }
func (g guarded) Root() guest.Ino  { return g.fs.Root() }

func (g guarded) Stat(ino guest.Ino) (st guest.Stat, err error) {
	defer caught(&err)
	return g.fs.Stat(ino)
}

func (g guarded) Lookup(dir guest.Ino, name string) (ino guest.Ino, err error) {
	defer caught(&err)
	return g.fs.Lookup(dir, name)
}

func (g guarded) ReadDir(dir guest.Ino, from uint64) iter.Seq2[guest.Entry, error] {
	return caughtSeq(func() iter.Seq2[guest.Entry, error] { return g.fs.ReadDir(dir, from) })
}

func (g guarded) Readlink(ino guest.Ino) (target string, err error) {
	defer caught(&err)
	return g.fs.Readlink(ino)
}

func (g guarded) Open(ino guest.Ino) (f guest.File, err error) {
	defer caught(&err)
	return guard(g.fs.Open(ino))
}

func (g guarded) Xattrs(ino guest.Ino) (list []guest.Xattr, err error) {
	defer caught(&err)
	return g.fs.Xattrs(ino)
}

func (g guarded) Streams(ino guest.Ino) (names []string, err error) {
	defer caught(&err)
	if s, ok := g.fs.(guest.Streamer); ok {
		return s.Streams(ino)
	}
	return nil, nil
}

func (g guarded) OpenStream(ino guest.Ino, name string) (f guest.File, err error) {
	defer caught(&err)
	if s, ok := g.fs.(guest.Streamer); ok {
		return guard(s.OpenStream(ino, name))
	}
	return nil, guest.ErrNotExist
}

func (g guarded) Free() iter.Seq2[extent.Extent, error] {
	f, ok := g.fs.(guest.Freer)
	if !ok {
		return refuse("which blocks of it are free")
	}
	return caughtSeq(f.Free)
}

func (g guarded) Locate(ino guest.Ino) iter.Seq2[extent.Extent, error] {
	l, ok := g.fs.(guest.Locator)
	if !ok {
		return refuse("where a file of it lies")
	}
	return caughtSeq(func() iter.Seq2[extent.Extent, error] { return l.Locate(ino) })
}

func refuse(what string) iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) { yield(extent.Extent{}, guest.Unsupported("%s", what)) }
}

// Default is the root that a mount without options shows.
func (g guarded) Default() (ino guest.Ino, err error) {
	defer caught(&err)
	if d, ok := g.fs.(interface{ Default() (guest.Ino, error) }); ok {
		return d.Default()
	}
	return g.fs.Root(), nil
}

// mountPoints are the directories that Windows may have mounted volumes at.
func (g guarded) mountPoints() iter.Seq2[guest.Ino, error] {
	w, ok := g.fs.(interface {
		MountPoints() iter.Seq2[guest.Ino, error]
	})
	if !ok {
		return func(func(guest.Ino, error) bool) {}
	}
	return caughtSeq(w.MountPoints)
}

// guardedFile is a guarded file's content.
type guardedFile struct{ guest.File }

func guard(f guest.File, err error) (guest.File, error) {
	if err != nil {
		return nil, err
	}
	return guardedFile{f}, nil
}

func (f guardedFile) ReadAt(p []byte, off int64) (n int, err error) {
	defer caught(&err)
	return f.File.ReadAt(p, off)
}

func (f guardedFile) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	return caughtSeq(func() iter.Seq2[extent.Extent, error] { return f.File.Allocated(granularity) })
}

var (
	_ guest.Streamer = guarded{}
	_ guest.Freer    = guarded{}
	_ guest.Locator  = guarded{}
)
