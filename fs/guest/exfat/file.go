package exfat

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"iter"
	"time"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/cluster"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// Stat implements guest.FS.
func (f *FS) Stat(ino guest.Ino) (guest.Stat, error) {
	st := guest.Stat{Mode: guest.ModeDir | 0o755, Nlink: 1}
	if ino == rootIno {
		return st, f.statDir(ino, &st)
	}
	s, err := f.set(ino)
	if err != nil {
		return guest.Stat{}, err
	}
	st.Mode = s.kind() | 0o755
	st.Mtime = timeOf(s.file[12:], s.file[21], s.file[23])
	st.Ctime = st.Mtime
	st.Atime = timeOf(s.file[16:], 0, s.file[24])
	st.Btime = timeOf(s.file[8:], s.file[20], s.file[22])
	if s.dir() {
		return st, f.statDir(ino, &st)
	}
	if le.Uint16(s.file[4:])&attrReadOnly != 0 {
		st.Mode &^= 0o222
	}
	st.Size, st.Allocated = s.size(), f.rounded(s.size())
	return st, nil
}

func (f *FS) statDir(ino guest.Ino, st *guest.Stat) error {
	d, err := f.directory(ino)
	if err != nil {
		return err
	}
	st.Nlink = 2 + d.index.Dirs
	st.Size, st.Allocated = d.size, f.rounded(d.size)
	return nil
}

// rounded is a size as whole clusters.
func (f *FS) rounded(n int64) int64 {
	whole := n &^ (f.geo.cluster - 1)
	if whole < n && whole <= 1<<62 {
		whole += f.geo.cluster
	}
	return whole
}

// timeOf makes a time of a timestamp, units of 10 ms, and a zone: quarters of an hour from UTC, seven bits with a sign, when bit 7 is
// set (§7.4.5 to §7.4.10).
func timeOf(stamp []byte, centi, zone byte) time.Time {
	t := cluster.Time(le.Uint16(stamp[2:]), le.Uint16(stamp), centi)
	if zone&0x80 != 0 {
		t = t.Add(-time.Duration(int8(zone<<1)>>1) * 15 * time.Minute)
	}
	return t
}

// file is the content of a file.
type file struct {
	dev   guest.Device
	chain *cluster.Chain
	size  int64
	valid int64 // bytes; those behind it are zeros
}

// Open implements guest.FS.
func (f *FS) Open(ino guest.Ino) (guest.File, error) {
	s, err := f.regular(ino)
	if err != nil {
		return nil, err
	}
	return file{f.dev, f.chain(s), s.size(), s.valid()}, nil
}

func (f *FS) regular(ino guest.Ino) (*set, error) {
	if ino == rootIno {
		return nil, errDirectory
	}
	s, err := f.set(ino)
	if err == nil && s.dir() {
		err = errDirectory
	}
	return s, err
}

var errDirectory = errors.New("exfat: a directory has no content")

// chain gives the chain of a file, which is followed once however often the file is opened.
func (f *FS) chain(s *set) *cluster.Chain {
	if s.size() <= f.geo.cluster || s.stream[1]&flagNoChain != 0 {
		return s.chain(f.table)
	}
	c, ok := f.chains.Get(s.first())
	if !ok {
		c = s.chain(f.table)
		f.chains.Put(s.first(), c, c.Cost())
	}
	return c
}

// Size implements guest.File.
func (f file) Size() int64 { return f.size }

// ReadAt implements io.ReaderAt.
func (f file) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("exfat: read at %d", off)
	}
	n := int(max(0, min(int64(len(p)), f.size-off)))
	valid := int(max(0, min(int64(n), f.valid-off)))
	if err := f.chain.ReadAt(f.dev, p[:valid], off); err != nil {
		return 0, fmt.Errorf("exfat: %w", err)
	}
	if valid < n { // zeros, but only in clusters that it has
		if have, err := f.chain.Len(); have < off+int64(n) {
			return 0, fmt.Errorf("exfat: %w", cmp.Or(err, guest.Damaged("a file of %d bytes with %d", f.size, have)))
		}
	}
	clear(p[valid:n])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Allocated implements guest.File.
func (f file) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	return extent.Coarsen(extent.All([]extent.Extent{{Len: f.valid}}), granularity, f.size)
}

// Readlink implements guest.FS. There are no symbolic links.
func (f *FS) Readlink(ino guest.Ino) (string, error) {
	if _, err := f.Stat(ino); err != nil {
		return "", err
	}
	return "", errors.New("exfat: no symbolic link")
}

// Xattrs implements guest.FS.
func (f *FS) Xattrs(ino guest.Ino) ([]guest.Xattr, error) {
	if ino == rootIno {
		return nil, nil
	}
	_, err := f.set(ino)
	return nil, err
}
