package ext

import (
	"fmt"
	"io"
	"iter"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// Open implements guest.FS.
func (f *FS) Open(ino guest.Ino) (guest.File, error) {
	in, err := f.inode(ino)
	if err != nil {
		return nil, err
	}
	if !in.is(guest.ModeRegular) {
		return nil, fmt.Errorf("inode %d: no regular file", ino)
	}
	if in.flags&flagEncrypt != 0 {
		return nil, guest.Unsupported("inode %d: an encrypted file", ino)
	}
	return f.content(&in)
}

// content gives what is in a file, a link or the value of an attribute.
func (f *FS) content(in *inode) (guest.File, error) {
	if !in.inline() {
		return &file{f, *in}, nil
	}
	b, err := f.inlineData(in)
	return &small{b, in.size}, err
}

// file is one whose content is in blocks.
type file struct {
	f  *FS
	in inode
}

// Size implements guest.File.
func (c *file) Size() int64 { return c.in.size }

// ReadAt implements io.ReaderAt.
func (c *file) ReadAt(p []byte, off int64) (n int, err error) {
	p, err = clip(p, off, c.in.size)
	bs := c.f.blockSize
	for n < len(p) {
		at := off + int64(n)
		r, err := c.f.find(&c.in, at/bs)
		if err != nil {
			return n, err
		}
		part := p[n:]
		if most := r.n*bs - at%bs; int64(len(part)) > most {
			part = part[:most]
		}
		if !r.data() {
			clear(part)
		} else if err := guest.ReadFull(c.f.dev, part, r.phys*bs+at%bs); err != nil {
			return n, fmt.Errorf("inode %d: %w", c.in.no, err)
		}
		n += len(part)
	}
	return n, err
}

// clip cuts p to what a file of size bytes has from off on; then the error is io.EOF.
func clip(p []byte, off, size int64) ([]byte, error) {
	switch {
	case off < 0:
		return nil, fmt.Errorf("read at %d", off)
	case off >= size && len(p) > 0:
		return nil, io.EOF
	case int64(len(p)) > size-off && len(p) > 0:
		return p[:size-off], io.EOF
	}
	return p, nil
}

// Allocated implements guest.File.
func (c *file) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	return extent.Coarsen(func(yield func(extent.Extent, error) bool) {
		for r, err := range c.f.runs(&c.in, (c.in.size+c.f.blockSize-1)/c.f.blockSize) {
			if err != nil {
				yield(extent.Extent{}, err)
				return
			}
			if r.data() && !yield(extent.Extent{Off: r.at * c.f.blockSize, Len: r.n * c.f.blockSize}, nil) {
				return
			}
		}
	}, granularity, c.in.size)
}

// runs yields all that is allocated of an inode up to a block of it, ascending. An inode with more blocks
// than the device is ErrDamaged, which also bounds how long this takes.
func (f *FS) runs(in *inode, end int64) iter.Seq2[run, error] {
	return func(yield func(run, error) bool) {
		total := int64(0)
		for at := int64(0); at < end; {
			r, err := f.find(in, at)
			if err == nil && r.phys != 0 {
				if total += r.n; total > f.blocks {
					err = guest.Damaged("inode %d: more blocks than the device", in.no)
				}
			}
			if err != nil {
				yield(run{}, err)
				return
			}
			at = r.end()
			if r.phys != 0 && !yield(r, nil) {
				return
			}
		}
	}
}

// small is a file whose content is in its inode: what is behind it are zeros.
type small struct {
	b    []byte
	size int64
}

// Size implements guest.File.
func (c *small) Size() int64 { return c.size }

// ReadAt implements io.ReaderAt.
func (c *small) ReadAt(p []byte, off int64) (int, error) {
	p, err := clip(p, off, c.size)
	n := 0
	if off >= 0 && off < int64(len(c.b)) {
		n = copy(p, c.b[off:])
	}
	clear(p[n:])
	return len(p), err
}

// Allocated implements guest.File.
func (c *small) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	return extent.Coarsen(extent.All([]extent.Extent{{Len: int64(len(c.b))}}), granularity, c.size)
}
