package guesttest

import (
	"bytes"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// Conform makes sure that a reader does what guest.FS says, over all that is in a file system without damage, from several goroutines at once. none
// are inodes that are not in use. What the file system holds is not looked at: Same does that.
func Conform(t *testing.T, f guest.FS, none ...guest.Ino) {
	t.Helper()
	start := time.Now()
	c := &conform{t: t, f: f}
	c.collect(f.Root(), 0)
	if len(c.order) < 10 || len(c.dirs) < 2 {
		t.Fatalf("only %d inodes", len(c.order))
	}
	none = append(none, math.MaxUint64, c.unused())
	var all sync.WaitGroup
	for g := range uint64(3) {
		all.Go(func() {
			rng := rand.New(rand.NewPCG(g, 1))
			c.absent(none)
			for _, at := range rng.Perm(len(c.order)) {
				if c.failed.Load() > 30 {
					return
				}
				c.inode(c.order[at], rng)
			}
		})
	}
	all.Wait()
	t.Logf("%d inodes, %d directories, %v", len(c.order), len(c.dirs), time.Since(start).Round(time.Millisecond))
}

// conform is a run of Conform.
type conform struct {
	t      *testing.T
	f      guest.FS
	order  []guest.Ino
	stats  map[guest.Ino]guest.Stat
	dirs   map[guest.Ino][]guest.Entry // directory => what it lists
	failed atomic.Int64
}

func (c *conform) errorf(format string, args ...any) {
	c.failed.Add(1)
	c.t.Errorf(format, args...)
}

// collect lists all directories.
func (c *conform) collect(ino guest.Ino, depth int) {
	if c.stats == nil {
		c.stats, c.dirs = map[guest.Ino]guest.Stat{}, map[guest.Ino][]guest.Entry{}
	}
	st, err := c.f.Stat(ino)
	if err != nil {
		c.errorf("inode %d: %v", ino, err)
		return
	}
	if _, again := c.stats[ino]; again {
		return
	}
	c.stats[ino] = st
	c.order = append(c.order, ino)
	if !st.IsDir() || depth > maxDepth {
		return
	}
	list, err := listing(c.f, ino, 0)
	if err != nil {
		c.errorf("inode %d: %v", ino, err)
	}
	c.dirs[ino] = list
	for _, e := range list {
		c.collect(e.Ino, depth+1)
		if st := c.stats[e.Ino]; e.Type != 0 && e.Type != st.Mode&guest.ModeType {
			c.errorf("inode %d: %q is listed as %o and is %o", ino, e.Name, e.Type, st.Mode)
		}
	}
}

func listing(f guest.FS, dir guest.Ino, from uint64) (list []guest.Entry, err error) {
	for e, err := range f.ReadDir(dir, from) {
		if err != nil {
			return list, err
		}
		list = append(list, e)
	}
	return list, nil
}

// unused is an inode beyond those that are there.
func (c *conform) unused() guest.Ino { return slices.Max(c.order) + 1<<20 }

// absent asks for what is not there. A reader may take a number that no inode of its format has for damage.
func (c *conform) absent(none []guest.Ino) {
	for i, ino := range none {
		_, e1 := c.f.Stat(ino)
		_, e2 := c.f.Lookup(ino, "x")
		_, e3 := listing(c.f, ino, 0)
		_, e4 := c.f.Readlink(ino)
		_, e5 := c.f.Open(ino)
		_, e6 := c.f.Xattrs(ino)
		for k, err := range []error{e1, e2, e3, e4, e5, e6} {
			if !errors.Is(err, guest.ErrNotExist) && (i < len(none)-2 || !errors.Is(err, guest.ErrDamaged)) {
				c.errorf("inode %d, which is not in use: %v (%d)", ino, err, k)
			}
		}
	}
}

func (c *conform) inode(ino guest.Ino, rng *rand.Rand) {
	st, err := c.f.Stat(ino)
	if err != nil || st != c.stats[ino] {
		c.errorf("inode %d: %+v, then %+v, %v", ino, c.stats[ino], st, err)
	}
	list, err := c.f.Xattrs(ino)
	byName := func(a, b guest.Xattr) int { return strings.Compare(a.Name, b.Name) }
	if err != nil || !slices.IsSortedFunc(list, byName) || len(slices.CompactFunc(list, func(a, b guest.Xattr) bool { return a.Name == b.Name })) != len(list) {
		c.errorf("inode %d: attributes %v, %v", ino, list, err)
	}
	target, err := c.f.Readlink(ino)
	if is := st.Mode&guest.ModeType == guest.ModeLink; is != (err == nil) || is && int64(len(target)) != st.Size {
		c.errorf("inode %d (%o, %d bytes): a link to %q, %v", ino, st.Mode, st.Size, target, err)
	}
	file, err := c.f.Open(ino)
	if is := st.Mode&guest.ModeType == guest.ModeRegular; is != (err == nil) || is && file.Size() != st.Size {
		c.errorf("inode %d (%o, %d bytes): open: %v", ino, st.Mode, st.Size, err)
	} else if is {
		c.file(ino, file, rng)
	}
	if st.IsDir() {
		c.directory(ino, c.dirs[ino], rng)
		return
	}
	_, err1 := c.f.Lookup(ino, "x")
	_, err2 := listing(c.f, ino, 0)
	if !errors.Is(err1, guest.ErrNotDir) || !errors.Is(err2, guest.ErrNotDir) {
		c.errorf("inode %d, which is no directory: %v, %v", ino, err1, err2)
	}
}

func (c *conform) directory(dir guest.Ino, list []guest.Entry, rng *rand.Rand) {
	for _, e := range list {
		if ino, err := c.f.Lookup(dir, e.Name); err != nil || ino != e.Ino {
			c.errorf("inode %d: %q is %d, the listing says %d: %v", dir, e.Name, ino, e.Ino, err)
		}
	}
	for _, name := range []string{"there is no such name", "", ".", "..", "a/b", "a\x00b", "\xff\xfe\x80", strings.Repeat("n", 256), strings.Repeat("n", 70000)} {
		if ino, err := c.f.Lookup(dir, name); !errors.Is(err, guest.ErrNotExist) {
			c.errorf("inode %d: %.30q, which is not there: %d, %v", dir, name, ino, err)
		}
	}
	from := []int{0, len(list) - 2, len(list) - 1}
	for range 5 {
		from = append(from, rng.IntN(len(list)+1))
	}
	for _, i := range from {
		if i < 0 || i >= len(list) {
			continue
		}
		if rest, err := listing(c.f, dir, list[i].Next); err != nil || !slices.Equal(rest, list[i+1:]) {
			c.errorf("inode %d: behind entry %d of %d there are %d: %v", dir, i, len(list), len(rest), err)
		}
	}
}

// conformWhole is up to which size a file is read from beginning to end.
const conformWhole = 4 << 20

func (c *conform) file(ino guest.Ino, f guest.File, rng *rand.Rand) {
	size := f.Size()
	read := func(off int64, n int) (p []byte) {
		p = make([]byte, n)
		got, err := f.ReadAt(p, off)
		want := int(max(0, min(int64(n), size-off)))
		// At the very end, io.ReaderAt leaves it open.
		if got != want || got < n && err != io.EOF || got == n && err != nil && (err != io.EOF || off+int64(n) < size) {
			c.errorf("inode %d of %d bytes: %d bytes at %d gave %d, %v", ino, size, n, off, got, err)
		}
		return p[:got]
	}
	for _, off := range []int64{0, size - 1, size, size + 1, size + 1<<20, math.MaxInt64 - 5, math.MaxInt64} {
		for _, n := range []int{0, 1, 10, 5000} {
			read(max(0, off), n)
		}
	}
	if n, err := f.ReadAt(make([]byte, 1), -1); n != 0 || err == nil || err == io.EOF {
		c.errorf("inode %d: %d bytes at -1, %v", ino, n, err)
	}
	var whole []byte
	if size <= conformWhole {
		whole = read(0, int(size))
	}
	for range 6 {
		off := rng.Int64N(size + 1)
		p := read(off, rng.IntN(70000))
		if whole != nil && !bytes.Equal(p, whole[off:][:len(p)]) {
			c.errorf("inode %d: %d bytes at %d are others in a read of all", ino, len(p), off)
		}
	}
	for _, unit := range []int64{1, 4096, 65536} {
		c.allocated(ino, f, unit, whole)
	}
}

// allocated makes sure that what is not in Allocated is zeros; in holes of large files, at both ends and in the middle.
func (c *conform) allocated(ino guest.Ino, f guest.File, unit int64, whole []byte) {
	size, end := f.Size(), int64(0)
	p := make([]byte, 16<<10)
	hole := func(to int64) {
		if whole != nil {
			if !zero(whole[end:to]) {
				c.errorf("inode %d: not all of %d to %d is zeros, which no range at granularity %d has", ino, end, to, unit)
			}
			return
		}
		for _, from := range []int64{end, (end + to) / 2, max(end, to-int64(len(p)))} {
			n, err := f.ReadAt(p[:min(int64(len(p)), to-from)], from)
			if err != nil && err != io.EOF || !zero(p[:n]) {
				c.errorf("inode %d: not all of %d to %d is zeros, which no range at granularity %d has: %v", ino, from, to, unit, err)
			}
		}
	}
	for e, err := range f.Allocated(unit) {
		if err != nil || e.Len <= 0 || e.Off < end || e.Off%unit != 0 || e.End() > size || e.End()%unit != 0 && e.End() != size {
			c.errorf("inode %d of %d bytes: range %v behind %d at granularity %d, %v", ino, size, e, end, unit, err)
			return
		}
		if e.Off > end {
			hole(e.Off)
		}
		end = e.End()
	}
	if end < size {
		hole(size)
	}
	for range f.Allocated(unit) {
		break // which must not be asked to go on
	}
}

func zero(p []byte) bool { return len(p) == 0 || p[0] == 0 && bytes.Equal(p[1:], p[:len(p)-1]) }
