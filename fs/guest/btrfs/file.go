package btrfs

import (
	"io"
	"iter"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// A file is the content of a regular file or a link.
type file struct {
	fs *FS
	n  inode
}

// Open implements guest.FS.
func (fs *FS) Open(ino guest.Ino) (guest.File, error) {
	n, err := fs.inode(ino)
	if err != nil {
		return nil, err
	}
	if n.kind() != guest.ModeRegular || n.p.empty {
		return nil, guest.Unsupported("inode %d: reading what is no regular file", n.p.ino)
	}
	return &file{fs, n}, nil
}

// Size implements guest.File.
func (f *file) Size() int64 { return f.n.size }

// ReadAt implements io.ReaderAt.
func (f *file) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, guest.Damaged("a read at %d", off)
	}
	if off >= f.n.size {
		return 0, io.EOF
	}
	var end error
	if int64(len(p)) > f.n.size-off {
		p, end = p[:f.n.size-off], io.EOF
	}
	for n := 0; n < len(p); {
		k, err := f.part(p[n:], uint64(off)+uint64(n))
		n += k
		if err != nil {
			return n, err
		}
	}
	return len(p), end
}

// part reads as much as lies in one extent, or in the hole before one.
func (f *file) part(p []byte, off uint64) (int, error) {
	e, err := f.find(off)
	if err != nil {
		return 0, err
	}
	p = p[:min(uint64(len(p)), e.end-off)]
	in := off - e.off
	switch {
	case e.kind == extentHole || e.kind == extentUnwritten:
		clear(p)
	case e.comp != 0:
		var b []byte
		if b, err = f.decompressed(e); err == nil {
			clear(p[copy(p, b[min(e.in+in, uint64(len(b))):]):])
		}
	case e.kind == extentInline:
		clear(p[copy(p, e.inline[min(in, uint64(len(e.inline))):]):])
	default:
		err = f.fs.data(p, e.disk+e.in+in, f.n.flags&flagNoSum == 0)
	}
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// Kinds of extents; the first is ours.
const (
	extentInline    = 0
	extentRegular   = 1
	extentUnwritten = 2
	extentHole      = 3
)

// maxPart is how large an extent may be that is compressed, either way, bytes. Linux makes none beyond 128 KiB.
const maxPart = 1 << 20

// A fileExtent is a range of a file and what it holds (BTRFS, On-disk Format, EXTENT_DATA).
type fileExtent struct {
	off, end  uint64 // bytes of the file
	gen       uint64
	kind      uint8
	comp      uint8
	disk, len uint64 // logical address and bytes on the disk
	in        uint64 // where the range begins in what that holds
	ram       uint64 // bytes that it holds
	inline    []byte
}

const extentHead, extentSize = 21, 53

func (fs *FS) parseExtent(off uint64, b []byte) (fileExtent, error) {
	if len(b) < extentHead {
		return fileExtent{}, guest.Damaged("an extent of %d bytes", len(b))
	}
	e := fileExtent{off: off, gen: le.Uint64(b), ram: le.Uint64(b[8:]), comp: b[16], kind: b[20]}
	switch {
	case b[17] != 0 || b[18] != 0 || b[19] != 0:
		return e, guest.Unsupported("an encrypted extent")
	case e.comp > 3:
		return e, guest.Unsupported("compression of kind %d", e.comp)
	case e.comp != 0 && e.ram > maxPart:
		return e, guest.Damaged("a compressed extent of %d bytes", e.ram)
	}
	if e.kind == extentInline {
		unit := uint64(fs.sb.sector)
		if e.inline = b[extentHead:]; off != 0 || e.ram > 65536 || e.comp == 0 && uint64(len(e.inline)) < e.ram {
			return e, guest.Damaged("an inline extent of %d bytes at %d", e.ram, off)
		}
		e.end = (max(e.ram, 1) + unit - 1) / unit * unit
		return e, nil
	}
	if len(b) < extentSize || e.kind > extentUnwritten {
		return e, guest.Damaged("an extent of kind %d and %d bytes", e.kind, len(b))
	}
	e.disk, e.len, e.in = le.Uint64(b[21:]), le.Uint64(b[29:]), le.Uint64(b[37:])
	n := le.Uint64(b[45:])
	e.end = off + n
	unit := uint64(fs.sb.sector)
	if n == 0 || e.end < off || e.end > 1<<63 || off%unit != 0 {
		return e, guest.Damaged("an extent of %d bytes at %d", n, off)
	}
	if e.disk == 0 {
		e.kind, e.comp = extentHole, 0
		return e, nil
	}
	if e.disk > 1<<62 || e.len > 1<<62 || e.disk%unit != 0 || e.len%unit != 0 || e.comp != 0 && e.len > maxPart ||
		e.comp == 0 && (e.in > e.len || n > e.len-e.in) || e.comp != 0 && (e.in > e.ram || n > e.ram-e.in) {
		return e, guest.Damaged("an extent at %d with %d bytes at %d, from %d on", off, e.len, e.disk, e.in)
	}
	return e, nil
}

// find gives the extent or the hole that has byte off of the file.
func (f *file) find(off uint64) (fileExtent, error) {
	p := f.n.p
	k, b, ok, err := p.floor(key{p.ino, kindExtentData, off})
	if err != nil {
		return fileExtent{}, err
	}
	if ok && k.id == p.ino && k.kind == kindExtentData {
		e, err := f.fs.parseExtent(k.off, b)
		if err != nil || e.end > off {
			return e, err
		}
	}
	hole := fileExtent{off: off, end: 1 << 63, kind: extentHole}
	err = p.walk(key{p.ino, kindExtentData, off}, func(k key, _ []byte) bool {
		if k.id == p.ino && k.kind == kindExtentData {
			hole.end = k.off
		}
		return false
	})
	return hole, err
}

// extents yields those of a file from the first on, without holes that no item stands for.
func (p place) extents(fn func(fileExtent) bool) error {
	var bad error
	last := uint64(0)
	err := p.walk(key{p.ino, kindExtentData, 0}, func(k key, b []byte) bool {
		if k.id != p.ino || k.kind != kindExtentData {
			return false
		}
		var e fileExtent
		if e, bad = p.fs.parseExtent(k.off, b); bad == nil && e.off < last {
			bad = guest.Damaged("inode %d: overlapping extents", p.ino)
		}
		last = e.end
		return bad == nil && fn(e)
	})
	if bad != nil {
		return bad
	}
	return err
}

// Allocated implements guest.File.
func (f *file) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	return extent.Coarsen(f.written, max(granularity, 1), f.n.size)
}

// written yields the extents that hold data, up to the file's end.
func (f *file) written(yield func(extent.Extent, error) bool) {
	stopped := false
	err := f.n.p.extents(func(e fileExtent) bool {
		if e.off >= uint64(f.n.size) {
			return false
		}
		if e.kind == extentRegular || e.kind == extentInline {
			stopped = !yield(extent.Extent{Off: int64(e.off), Len: int64(min(e.end, uint64(f.n.size)) - e.off)}, nil)
		}
		return !stopped
	})
	if err != nil && !stopped {
		yield(extent.Extent{}, err)
	}
}
