//go:build linux

package testimage

import (
	"bytes"
	"context"
	"errors"
	"hash/fnv"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// errBudget ends a copy that has used up its bytes.
var errBudget = errors.New("budget used up")

// copier copies trees of the host into a mounted image, in name order.
type copier struct {
	budget int64                  // bytes that may still be copied
	keep   float64                // share of the files to take, picked by a hash of their path
	skip   func(path string) bool // nil, or tells what to leave out; for a folder, all below it
	filter func([]byte)           // nil, or changes content in place on its way
}

// tree copies src to dst: files, folders and symbolic links with their modes
// and times; nothing else. Files that cannot be read are left out. A src that
// does not exist is empty.
func (c *copier) tree(ctx context.Context, src, dst string) error {
	err := filepath.WalkDir(src, func(path string, d fs.DirEntry, err error) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err != nil || c.skip != nil && c.skip(path) {
			return skipEntry(d)
		}
		rel, err := filepath.Rel(src, path)
		if err != nil {
			return err
		}
		return c.entry(path, filepath.Join(dst, rel), d)
	})
	if errors.Is(err, errBudget) {
		return nil
	}
	return err
}

func skipEntry(d fs.DirEntry) error {
	if d != nil && d.IsDir() {
		return fs.SkipDir
	}
	return nil
}

func (c *copier) entry(src, dst string, d fs.DirEntry) error {
	switch {
	case d.IsDir():
		return os.MkdirAll(dst, 0o755)
	case d.Type() == fs.ModeSymlink:
		return copyLink(src, dst)
	case !d.Type().IsRegular() || !c.picks(src):
		return nil
	}
	st, err := d.Info()
	if err != nil {
		return nil // gone meanwhile
	}
	if st.Size() > c.budget {
		return errBudget
	}
	if err := c.file(src, dst, st); err != nil {
		return err
	}
	c.budget -= st.Size()
	return nil
}

// picks decides by a hash, so that the same files are taken every time.
func (c *copier) picks(path string) bool {
	h := fnv.New32a()
	_, _ = io.WriteString(h, path)
	return float64(h.Sum32()) < c.keep*(1<<32)
}

func copyLink(src, dst string) error {
	to, err := os.Readlink(src)
	if err != nil {
		return nil // gone meanwhile
	}
	if err := os.Symlink(to, dst); !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

func (c *copier) file(src, dst string, st fs.FileInfo) error {
	in, err := os.Open(src)
	if err != nil {
		return nil // not ours to read
	}
	defer in.Close()
	if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
		return err
	}
	out, err := os.OpenFile(dst, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, st.Mode().Perm()|0o200)
	if err != nil {
		return err
	}
	defer out.Close()
	var w io.Writer = out
	if c.filter != nil {
		w = filterWriter{out, c.filter}
	}
	if _, err := io.Copy(w, in); err != nil {
		return err
	}
	if err := out.Close(); err != nil {
		return err
	}
	return os.Chtimes(dst, st.ModTime(), st.ModTime())
}

// filterWriter changes what passes. It writes into the caller's buffer, which
// io.Copy allows nobody to rely on; here the buffer is io.Copy's own.
type filterWriter struct {
	w      io.Writer
	filter func([]byte)
}

func (f filterWriter) Write(p []byte) (int, error) {
	f.filter(p)
	return f.w.Write(p)
}

// CopySparse copies an image and looks for holes anew: every block of 4 KiB
// that is all zero becomes one. The copy is on disk when it returns.
func CopySparse(ctx context.Context, src, dst string) error {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	st, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := os.OpenFile(dst, os.O_CREATE|os.O_RDWR|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	if err := out.Truncate(st.Size()); err != nil {
		return err
	}
	err = eachData(ctx, in, st.Size(), func(p []byte, off int64) error {
		for len(p) > 0 {
			n := min(len(p), 4096)
			if !isZero(p[:n]) {
				if _, err := out.WriteAt(p[:n], off); err != nil {
					return err
				}
			}
			p, off = p[n:], off+int64(n)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := out.Sync(); err != nil {
		return err
	}
	return out.Close()
}

// eachData calls fn with the allocated parts of f in pieces of up to 1 MiB that
// begin at multiples of 4 KiB. p is good until fn returns.
func eachData(ctx context.Context, f *os.File, size int64, fn func(p []byte, off int64) error) error {
	var ranges [][2]int64
	err := dataRanges(f, size, func(off, end int64) { ranges = append(ranges, [2]int64{off, end}) })
	if err != nil {
		return err
	}
	buf := make([]byte, mib)
	for _, r := range ranges {
		for off := r[0]; off < r[1]; {
			if err := ctx.Err(); err != nil {
				return err
			}
			n, err := f.ReadAt(buf[:min(int64(len(buf)), r[1]-off)], off)
			if n == 0 && err != nil {
				return err
			}
			if err := fn(buf[:n], off); err != nil {
				return err
			}
			off += int64(n)
		}
	}
	return nil
}

// dataRanges calls fn with each allocated range of f, widened to multiples of
// 4 KiB and clipped to size.
func dataRanges(f *os.File, size int64, fn func(off, end int64)) error {
	for off := int64(0); off < size; {
		data, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // nothing but a hole is left
		}
		if err != nil {
			return err
		}
		hole, err := unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		off = max(off, data&^4095)
		end := min((hole+4095)&^4095, size)
		fn(off, end)
		off = end
	}
	return nil
}

func isZero(p []byte) bool { return bytes.Count(p, []byte{0}) == len(p) }

// hasPrefix makes a skip function from prefixes of paths.
func hasPrefix(prefixes ...string) func(string) bool {
	return func(path string) bool {
		for _, p := range prefixes {
			if strings.HasPrefix(path, p) {
				return true
			}
		}
		return false
	}
}

// Extents lists the allocated ranges of a file, in order.
func Extents(path string) ([]extent.Extent, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	var es []extent.Extent
	err = dataRanges(f, st.Size(), func(off, end int64) {
		es = append(es, extent.Extent{Off: off, Len: end - off})
	})
	return extent.Normalise(es), err
}
