package fat

import (
	"errors"
	"fmt"
	"io"
	"iter"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/cluster"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// file is the content of a file.
type file struct {
	dev   guest.Device
	chain *cluster.Chain
	size  int64
}

// Open implements guest.FS.
func (f *FS) Open(ino guest.Ino) (guest.File, error) {
	e, err := f.regular(ino)
	if err != nil {
		return nil, err
	}
	return file{f.dev, f.chain(f.first(e), e.size()), e.size()}, nil
}

func (f *FS) regular(ino guest.Ino) (raw, error) {
	if ino == rootIno {
		return raw{}, errDirectory
	}
	e, err := f.entry(ino)
	if err == nil && e.dir() {
		err = errDirectory
	}
	return e, err
}

var errDirectory = errors.New("fat: a directory has no content")

// chain gives the chain of a file, which is followed once however often the file is opened.
func (f *FS) chain(first uint32, size int64) *cluster.Chain {
	if size <= f.geo.cluster {
		return f.table.Chain(first)
	}
	c, ok := f.chains.Get(first)
	if !ok {
		c = f.table.Chain(first)
		f.chains.Put(first, c, c.Cost())
	}
	return c
}

// Size implements guest.File.
func (f file) Size() int64 { return f.size }

// ReadAt implements io.ReaderAt.
func (f file) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("fat: read at %d", off)
	}
	n := int(max(0, min(int64(len(p)), f.size-off)))
	if err := f.chain.ReadAt(f.dev, p[:n], off); err != nil {
		return 0, fmt.Errorf("fat: %w", err)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Allocated implements guest.File: there are no holes.
func (f file) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	return extent.Coarsen(extent.All([]extent.Extent{{Len: f.size}}), granularity, f.size)
}

// Readlink implements guest.FS. There are no symbolic links.
func (f *FS) Readlink(ino guest.Ino) (string, error) {
	if _, err := f.Stat(ino); err != nil {
		return "", err
	}
	return "", errors.New("fat: no symbolic link")
}

// Xattrs implements guest.FS.
func (f *FS) Xattrs(ino guest.Ino) ([]guest.Xattr, error) {
	if ino == rootIno {
		return nil, nil
	}
	_, err := f.entry(ino)
	return nil, err
}
