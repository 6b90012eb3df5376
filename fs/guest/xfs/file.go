package xfs

import (
	"io"
	"iter"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// A file is the content of a regular file.
type file struct {
	fs   *FS
	data fork
	size int64
}

// regular gives the data of a regular file that can be read.
func (fs *FS) regular(ino guest.Ino) (inode, error) {
	n, err := fs.inode(ino)
	switch {
	case err != nil:
		return n, err
	case n.kind() != guest.ModeRegular:
		return n, guest.Unsupported("inode %d: reading what is no regular file", n.num)
	case n.flags&flagRealtime != 0:
		return n, guest.Unsupported("inode %d: a file on the real-time device", n.num)
	case fs.log.unfinished[n.num]&unfinishedMap != 0:
		return n, guest.Unsupported("inode %d: the log holds an unfinished change of where it lies", n.num)
	case n.data.form != formExtents && n.data.form != formTree && n.data.form != formList:
		return n, guest.Damaged("inode %d: a file of form %d", n.num, n.data.form)
	}
	return n, nil
}

// Open implements guest.FS.
func (fs *FS) Open(ino guest.Ino) (guest.File, error) {
	n, err := fs.regular(ino)
	if err != nil {
		return nil, err
	}
	return &file{fs, n.data, n.size}, nil
}

// Size implements guest.File.
func (f *file) Size() int64 { return f.size }

// ReadAt implements io.ReaderAt.
func (f *file) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, guest.Damaged("a read at %d", off)
	}
	var end error
	if off >= f.size {
		return 0, io.EOF
	}
	if int64(len(p)) > f.size-off {
		p, end = p[:f.size-off], io.EOF
	}
	for n := 0; n < len(p); {
		k, err := f.part(p[n:], off+int64(n))
		n += k
		if err != nil {
			return n, err
		}
	}
	return len(p), end
}

// part reads as much as lies in one extent, or in the hole before one.
func (f *file) part(p []byte, off int64) (int, error) {
	log := f.fs.sb.blockLog
	block := uint64(off) >> log
	s, err := f.fs.find(&f.data, block)
	if err != nil {
		return 0, err
	}
	if s.n == 0 || s.off > block || s.unwritten {
		end := f.blocks()
		switch {
		case s.n != 0 && s.off > block:
			end = min(end, s.off)
		case s.n != 0:
			end = min(end, s.end())
		}
		p = p[:min(uint64(len(p)), end<<log-uint64(off))]
		clear(p)
		return len(p), nil
	}
	at, err := f.fs.sb.offset(s.block, s.n)
	if err != nil {
		return 0, err
	}
	from := off - int64(s.off<<log)
	p = p[:min(int64(len(p)), int64(s.n<<log)-from)]
	if err := guest.ReadFull(f.fs.dev, p, at+from); err != nil {
		return 0, err
	}
	return len(p), nil
}

// spans yields a fork's extents in order.
func (fs *FS) spans(f *fork) iter.Seq2[span, error] {
	return func(yield func(span, error) bool) {
		for next := uint64(0); ; {
			s, err := fs.find(f, next)
			if err == nil && s.n == 0 {
				return
			}
			if err == nil && s.off < next {
				err = guest.Damaged("inode %d: overlapping extents", f.ino)
			}
			if !yield(s, err) || err != nil {
				return
			}
			next = s.end()
		}
	}
}

// Allocated implements guest.File.
func (f *file) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	return extent.Coarsen(f.written, max(granularity, 1), f.size)
}

// written yields the extents that hold data, up to the file's end.
func (f *file) written(yield func(extent.Extent, error) bool) {
	log := f.fs.sb.blockLog
	blocks := f.blocks()
	for s, err := range f.fs.spans(&f.data) {
		switch {
		case err != nil:
			yield(extent.Extent{}, err)
			return
		case s.off >= blocks:
			return
		case s.unwritten:
			continue
		}
		if !yield(extent.Extent{Off: int64(s.off << log), Len: int64(min(s.n, blocks-s.off) << log)}, nil) {
			return
		}
	}
}

// blocks is how many blocks the file has up to its end.
func (f *file) blocks() uint64 {
	return (uint64(f.size) + 1<<f.fs.sb.blockLog - 1) >> f.fs.sb.blockLog
}
