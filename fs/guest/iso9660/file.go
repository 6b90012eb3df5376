package iso9660

import (
	"fmt"
	"io"
	"iter"
	"sort"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// Stat implements guest.FS.
func (f *FS) Stat(ino guest.Ino) (guest.Stat, error) {
	r, x, err := f.inode(ino)
	if err != nil {
		return guest.Stat{}, err
	}
	// What Linux shows of a volume without Rock Ridge: nobody may write, and links are not counted (mount(8), "mode=").
	st := guest.Stat{Mode: guest.ModeRegular | 0o555, Nlink: 1, Mtime: r.date, Atime: r.date, Ctime: r.date}
	if r.flags&flagDir != 0 {
		st.Mode, st.Size = guest.ModeDir|0o555, r.size
	} else if st.Size, err = f.size(ino, &r); err != nil {
		return st, err
	}
	st.Allocated = (st.Size + 511) &^ 511
	if x.mode != 0 {
		st.Mode, st.Nlink, st.UID, st.GID = x.mode&0xffff, x.nlink, x.uid, x.gid
	}
	if r.flags&flagDir != 0 != st.IsDir() {
		return st, guest.Damaged("a file with the type %o", st.Mode)
	}
	if !x.mtime.IsZero() {
		st.Mtime = x.mtime
	}
	if !x.atime.IsZero() {
		st.Atime = x.atime
	}
	if !x.ctime.IsZero() {
		st.Ctime = x.ctime
	}
	switch st.Mode & guest.ModeType {
	case guest.ModeLink:
		st.Size = int64(len(x.target))
	case guest.ModeChar, guest.ModeBlock:
		st.Major, st.Minor = device(x.high, x.low)
		st.Size = 0
	case guest.ModeRegular:
		if x.zisofs {
			st.Size = x.size
		}
	}
	return st, nil
}

// device gives the numbers of a device (RRIP §4.1.2), both of them in the lower word when it is larger than a minor number was.
func device(high, low uint32) (major, minor uint32) {
	if high == 0 && low > 0xff {
		return low >> 8, low & 0xff
	}
	return high, low
}

// inode reads the record of an inode.
func (f *FS) inode(ino guest.Ino) (r record, x extras, err error) {
	if r, err = f.record(int64(ino)); err != nil {
		return r, x, err
	}
	if r.flags&flagDir != 0 {
		if r, err = f.directory(ino); err != nil {
			return r, x, guest.Damaged("the directory at %d: %v", ino, err)
		}
	}
	if f.rock {
		x, err = f.extras(&r)
	}
	return r, x, err
}

// A piece is an extent of a file: bytes from..end of it are at start.
type piece struct {
	end   int64 // bytes
	start int64 // bytes of the device
}

// maxPieces is how many extents a file has: of 4 GiB each.
const maxPieces = 4096

// pieces yields the extents of a file: those of its record and of the records after it, as long as they say that there are more.
func (f *FS) pieces(ino guest.Ino, r record, yield func(record)) error {
	at := int64(ino)
	for range maxPieces {
		if r.interleaved {
			return guest.Unsupported("an interleaved file")
		}
		yield(r)
		if r.flags&flagMore == 0 {
			return nil
		}
		at += r.length
		b, err := f.sectors.Block(at/sectorSize, nil)
		if err != nil {
			return err
		}
		if b[at%sectorSize] == 0 { // the rest of the sector
			at += sectorSize - at%sectorSize
		}
		next, err := f.record(at)
		if err != nil {
			return err
		}
		if string(next.name) != string(r.name) {
			return guest.Damaged("a file of several extents ends within them")
		}
		r = next
	}
	return guest.Unsupported("a file of more than %d extents", maxPieces)
}

func (f *FS) size(ino guest.Ino, r *record) (n int64, err error) {
	if r.flags&flagMore == 0 {
		return r.size, nil
	}
	err = f.pieces(ino, *r, func(r record) { n += r.size })
	return n, err
}

// Readlink implements guest.FS.
func (f *FS) Readlink(ino guest.Ino) (string, error) {
	_, x, err := f.inode(ino)
	switch {
	case err != nil:
		return "", err
	case x.mode&guest.ModeType != guest.ModeLink:
		return "", fmt.Errorf("iso9660: not a symbolic link")
	case len(x.target) > maxTarget || !x.linkEnd:
		return "", guest.Damaged("a link of %d bytes", len(x.target))
	}
	return x.target, nil
}

// Open implements guest.FS.
func (f *FS) Open(ino guest.Ino) (guest.File, error) {
	r, x, err := f.inode(ino)
	switch {
	case err != nil:
		return nil, err
	case r.flags&flagDir != 0 || x.mode != 0 && x.mode&guest.ModeType != guest.ModeRegular:
		return nil, fmt.Errorf("iso9660: not a regular file")
	case x.sparse:
		return nil, guest.Unsupported("a sparse file of Rock Ridge")
	}
	c := &content{dev: f.dev}
	err = f.pieces(ino, r, func(r record) {
		if r.size > 0 {
			c.size += r.size
			c.pieces = append(c.pieces, piece{c.size, r.start * f.block})
		}
	})
	if err != nil {
		return nil, err
	}
	if x.zisofs {
		return openZisofs(c, &x)
	}
	return c, nil
}

// content is what a file has on the disk.
type content struct {
	dev    guest.Device
	size   int64
	pieces []piece
}

func (c *content) Size() int64 { return c.size }

func (c *content) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("iso9660: read at %d", off)
	}
	if off >= c.size {
		return 0, io.EOF
	}
	n := 0
	i := sort.Search(len(c.pieces), func(i int) bool { return c.pieces[i].end > off })
	for ; n < len(p) && i < len(c.pieces); i++ {
		from := int64(0)
		if i > 0 {
			from = c.pieces[i-1].end
		}
		at := off + int64(n)
		k := int(min(int64(len(p)-n), c.pieces[i].end-at))
		if err := guest.ReadFull(c.dev, p[n:n+k], c.pieces[i].start+at-from); err != nil {
			return n, err
		}
		n += k
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (c *content) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	return whole(c.size, granularity)
}

func whole(size, granularity int64) iter.Seq2[extent.Extent, error] {
	if size == 0 {
		return func(func(extent.Extent, error) bool) {}
	}
	return extent.Coarsen(extent.All([]extent.Extent{{Len: size}}), granularity, size)
}
