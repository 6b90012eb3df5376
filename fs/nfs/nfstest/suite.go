package nfstest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fs/nfs"
)

// TestFS checks that what open gives keeps the promises of nfs.FS, and of
// nfs.WritableFS if it is one; then open gives one that the test may fill, a new one each time.
func TestFS(t *testing.T, open func(t *testing.T) nfs.FS) {
	t.Run("Tree", func(t *testing.T) { testTree(t, open(t)) })
	if _, ok := open(t).(nfs.WritableFS); !ok {
		return
	}
	for name, test := range map[string]func(*suite){
		"Names": (*suite).names, "Exclusive": (*suite).exclusive, "Data": (*suite).data, "Sizes": (*suite).sizes, "Attributes": (*suite).attributes,
		"Kinds": (*suite).kinds, "Rename": (*suite).rename, "Stale": (*suite).stale, "Listing": (*suite).listing, "Concurrent": (*suite).concurrent,
	} {
		t.Run(name, func(t *testing.T) {
			fs := open(t).(nfs.WritableFS)
			s := &suite{t, t.Context(), fs, fs.Root()}
			test(s)
			testTree(t, fs)
		})
	}
}

// TestReopen fills fs and closes it by reopen, which gives what is there
// afterwards: the same, with the same IDs and cookies.
func TestReopen(t *testing.T, fs nfs.WritableFS, reopen func() nfs.WritableFS) {
	s := &suite{t, t.Context(), fs, fs.Root()}
	dir := s.mkdir(s.root, "dir")
	file := s.create(dir, "file")
	s.write(file, []byte("durable"), 1<<16)
	s.ok(fs.Sync(s.ctx, file))
	mark := [8]byte{1, 2, 3}
	marked, err := fs.Create(s.ctx, dir, "marked", nfs.Creation{Exclusive: &mark})
	s.ok(err)
	gone := s.create(dir, "gone")
	s.ok(fs.Remove(s.ctx, dir, "gone"))
	s.ok(fs.SetAttr(s.ctx, file, nfs.Change{Mode: Ptr(uint32(0o600)), Modified: Ptr(time.Unix(1e9, 0))}))
	s.ok(fs.Rename(s.ctx, dir, "file", s.root, "renamed"))
	for i := range 50 {
		s.create(dir, fmt.Sprint("entry", i))
	}
	before, root := s.list(dir, 0), fs.Root()

	s.fs = reopen()
	if s.fs.Root() != root {
		t.Errorf("the root is %v, was %v", s.fs.Root(), root)
	}
	if got := s.lookup(s.root, "renamed"); got != file {
		t.Errorf("a file is %v, was %v", got, file)
	}
	if got := s.lookup(s.root, "dir"); got != dir {
		t.Errorf("a directory is %v, was %v", got, dir)
	}
	a := s.attr(file)
	if a.Size != 1<<16+7 || a.Mode != 0o600 || !a.Modified.Equal(time.Unix(1e9, 0)) {
		t.Errorf("%+v", a)
	}
	s.reads(file, []byte("durable"), 1<<16)
	if after := s.list(dir, 0); !slices.Equal(after, before) {
		t.Errorf("another listing:\n%v, was\n%v", after, before)
	}
	if half := s.list(dir, before[20].Cookie); !slices.Equal(half, before[21:]) {
		t.Errorf("another listing from a cookie of before:\n%v", half)
	}
	again, err := s.fs.Create(s.ctx, dir, "marked", nfs.Creation{Exclusive: &mark})
	if err != nil || again != marked {
		t.Errorf("an exclusive creation by the same mark: %v, %v; was %v", again, err, marked)
	}
	mark[0]++
	_, err = s.fs.Create(s.ctx, dir, "marked", nfs.Creation{Exclusive: &mark})
	s.is("an exclusive creation by another mark", err, syscall.EEXIST)
	_, err = s.fs.Attr(s.ctx, gone)
	s.is("Attr of what was removed", err, syscall.ESTALE)
	for i := range 20 {
		if id := s.create(dir, fmt.Sprint("new", i)); id == gone {
			t.Errorf("a new file has the ID of one that was removed")
		}
	}
}

type suite struct {
	t    *testing.T
	ctx  context.Context
	fs   nfs.WritableFS
	root nfs.ID
}

func (s *suite) ok(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// is checks that err is one of those.
func (s *suite) is(what string, err error, want ...syscall.Errno) {
	s.t.Helper()
	for _, w := range want {
		if errors.Is(err, w) {
			return
		}
	}
	s.t.Errorf("%s: %v, want %v", what, err, want)
}

func (s *suite) create(dir nfs.ID, name string) nfs.ID {
	s.t.Helper()
	id, err := s.fs.Create(s.ctx, dir, name, nfs.Creation{Guarded: true})
	s.ok(err)
	return id
}

func (s *suite) mkdir(dir nfs.ID, name string) nfs.ID {
	s.t.Helper()
	id, err := s.fs.Mkdir(s.ctx, dir, name, nfs.Change{})
	s.ok(err)
	return id
}

func (s *suite) lookup(dir nfs.ID, name string) nfs.ID {
	s.t.Helper()
	id, err := s.fs.Lookup(s.ctx, dir, name)
	s.ok(err)
	return id
}

func (s *suite) attr(id nfs.ID) nfs.Attr {
	s.t.Helper()
	a, err := s.fs.Attr(s.ctx, id)
	s.ok(err)
	return a
}

func (s *suite) write(id nfs.ID, p []byte, off int64) {
	s.t.Helper()
	n, err := s.fs.WriteAt(s.ctx, id, p, off)
	if n != len(p) || err != nil {
		s.t.Fatalf("WriteAt: %d of %d bytes, %v", n, len(p), err)
	}
}

// reads checks that p is at off, and what ReadAt says of it.
func (s *suite) reads(id nfs.ID, p []byte, off int64) {
	s.t.Helper()
	got := make([]byte, len(p))
	n, err := s.fs.ReadAt(s.ctx, id, got, off)
	if n != len(p) || err != nil && err != io.EOF || !bytes.Equal(got, p) {
		s.t.Fatalf("ReadAt %d: %d of %d bytes, %v; the same: %v", off, n, len(p), err, bytes.Equal(got, p))
	}
}

func (s *suite) list(dir nfs.ID, after uint64) []nfs.Entry {
	s.t.Helper()
	var list []nfs.Entry
	for e, err := range s.fs.ReadDir(s.ctx, dir, after) {
		s.ok(err)
		list = append(list, e)
	}
	return list
}

// oddNames are all allowed, and all different.
var oddNames = []string{" ", "a b", "a", "A", "ä", "a\xff", "-rf", "...", ".lck-0123456789abcdef", "a\\b", "a:b", "new\nline", "*", "$HOME", strings.Repeat("n", 255)}

func (s *suite) names() {
	ids := make(map[nfs.ID]string)
	for _, name := range oddNames {
		id := s.create(s.root, name)
		if ids[id] != "" {
			s.t.Errorf("%q and %q have the same ID", name, ids[id])
		}
		ids[id] = name
	}
	for id, name := range ids {
		if got := s.lookup(s.root, name); got != id {
			s.t.Errorf("%q is %v, was made as %v", name, got, id)
		}
	}
	for _, e := range s.list(s.root, 0) {
		if ids[e.ID] != e.Name {
			continue // what was there before
		}
		delete(ids, e.ID)
		s.ok(s.fs.Remove(s.ctx, s.root, e.Name))
		_, err := s.fs.Lookup(s.ctx, s.root, e.Name)
		s.is(fmt.Sprintf("Lookup of %q when it is removed", e.Name), err, syscall.ENOENT)
	}
	if len(ids) != 0 {
		s.t.Errorf("not listed: %v", ids)
	}
	long := strings.Repeat("n", 256)
	_, err := s.fs.Create(s.ctx, s.root, long, nfs.Creation{})
	s.is("Create of a long name", err, syscall.ENAMETOOLONG)
	_, err = s.fs.Mkdir(s.ctx, s.root, long, nfs.Change{})
	s.is("Mkdir of a long name", err, syscall.ENAMETOOLONG)
	s.is("Remove of nothing", s.fs.Remove(s.ctx, s.root, "none"), syscall.ENOENT)
	s.is("Rmdir of nothing", s.fs.Rmdir(s.ctx, s.root, "none"), syscall.ENOENT)

	id := s.create(s.root, "file")
	_, err = s.fs.Create(s.ctx, s.root, "file", nfs.Creation{Guarded: true})
	s.is("a guarded Create again", err, syscall.EEXIST)
	s.write(id, []byte("12345"), 0)
	again, err := s.fs.Create(s.ctx, s.root, "file", nfs.Creation{})
	if err != nil || again != id || s.attr(id).Size != 5 {
		s.t.Errorf("Create of a file that is there: %v, %v; %d bytes", again, err, s.attr(id).Size)
	}
	if _, err := s.fs.Create(s.ctx, s.root, "file", nfs.Creation{Set: nfs.Change{Size: Ptr(int64(0))}}); err != nil || s.attr(id).Size != 0 {
		s.t.Errorf("Create with a size: %v; %d bytes", err, s.attr(id).Size)
	}
	_, err = s.fs.Mkdir(s.ctx, s.root, "file", nfs.Change{})
	s.is("Mkdir where a file is", err, syscall.EEXIST)
	dir := s.mkdir(s.root, "dir")
	_, err = s.fs.Mkdir(s.ctx, s.root, "dir", nfs.Change{})
	s.is("Mkdir again", err, syscall.EEXIST)
	s.create(dir, "file")
	s.is("Rmdir of a full directory", s.fs.Rmdir(s.ctx, s.root, "dir"), syscall.ENOTEMPTY)
	s.is("Remove of a directory", s.fs.Remove(s.ctx, s.root, "dir"), syscall.EISDIR)
	s.is("Rmdir of a file", s.fs.Rmdir(s.ctx, s.root, "file"), syscall.ENOTDIR)
	s.ok(s.fs.Remove(s.ctx, dir, "file"))
	s.ok(s.fs.Rmdir(s.ctx, s.root, "dir"))
}

func (s *suite) exclusive() {
	mark := [8]byte{0, 1, 0xff}
	id, err := s.fs.Create(s.ctx, s.root, "file", nfs.Creation{Exclusive: &mark})
	s.ok(err)
	s.write(id, []byte("12345"), 0)
	again, err := s.fs.Create(s.ctx, s.root, "file", nfs.Creation{Exclusive: &mark})
	if err != nil || again != id || s.attr(id).Size != 5 {
		s.t.Errorf("again by the same mark: %v, %v; %d bytes", again, err, s.attr(id).Size)
	}
	other := [8]byte{0, 1, 0xfe}
	_, err = s.fs.Create(s.ctx, s.root, "file", nfs.Creation{Exclusive: &other})
	s.is("by another mark", err, syscall.EEXIST)
	s.create(s.root, "plain")
	for _, mark := range [][8]byte{{}, mark} {
		_, err = s.fs.Create(s.ctx, s.root, "plain", nfs.Creation{Exclusive: &mark})
		s.is("of a file without a mark", err, syscall.EEXIST)
	}
}

// data writes at random and compares with a model.
func (s *suite) data() {
	id := s.create(s.root, "file")
	rnd := rand.New(rand.NewPCG(5, 5))
	var model []byte
	const most = 300_000
	for i := range 300 {
		off := rnd.IntN(most)
		p := make([]byte, rnd.IntN(min(most-off, 1<<[...]int{4, 12, 17}[i%3]))+1)
		for j := range p {
			p[j] = byte(rnd.Uint32())
		}
		switch i % 50 {
		case 20: // shorter
			size := int64(rnd.IntN(most))
			s.ok(s.fs.SetAttr(s.ctx, id, nfs.Change{Size: &size}))
			model = append(model, make([]byte, max(0, int(size)-len(model)))...)[:size]
		case 40:
			s.ok(s.fs.Sync(s.ctx, id))
		default:
			s.write(id, p, int64(off))
			model = append(model, make([]byte, max(0, off+len(p)-len(model)))...)
			copy(model[off:], p)
		}
		at := rnd.IntN(len(model) + 1)
		s.reads(id, model[at:at+rnd.IntN(len(model)-at+1)], int64(at))
	}
	s.reads(id, model, 0)
	if a := s.attr(id); a.Size != int64(len(model)) || a.Used < 0 {
		s.t.Errorf("%d bytes, want %d; %d used", a.Size, len(model), a.Used)
	}
}

// sizes reads and writes at the edges.
func (s *suite) sizes() {
	id := s.create(s.root, "file")
	p := make([]byte, 10)
	for _, off := range []int64{0, 1, 1 << 20, math.MaxInt64 - 10} {
		if n, err := s.fs.ReadAt(s.ctx, id, p, off); n != 0 || err != io.EOF {
			s.t.Errorf("ReadAt %d of an empty file: %d, %v", off, n, err)
		}
	}
	s.write(id, []byte("abcdef"), 3)
	for _, v := range []struct {
		off  int64
		want string
		eof  bool
	}{{0, "\x00\x00\x00abcdef", true}, {5, "cdef", true}, {9, "", true}, {10, "", true}} {
		n, err := s.fs.ReadAt(s.ctx, id, p, v.off)
		if string(p[:n]) != v.want || (err == io.EOF) != v.eof {
			s.t.Errorf("ReadAt %d: %q, %v", v.off, p[:n], err)
		}
	}
	if n, err := s.fs.ReadAt(s.ctx, id, p[:2], 3); n != 2 || err != nil {
		s.t.Errorf("ReadAt in the middle: %d, %v", n, err)
	}
	for _, size := range []int64{4, 9, 0, 5} {
		s.ok(s.fs.SetAttr(s.ctx, id, nfs.Change{Size: &size}))
		if got := s.attr(id).Size; got != size {
			s.t.Errorf("%d bytes, %d were set", got, size)
		}
	}
	s.reads(id, make([]byte, 5), 0) // nothing comes back
	if n, err := s.fs.WriteAt(s.ctx, id, nil, 1000); n != 0 || err != nil || s.attr(id).Size != 5 {
		s.t.Errorf("WriteAt of nothing: %d, %v; %d bytes", n, err, s.attr(id).Size)
	}
	s.ok(s.fs.Sync(s.ctx, id))
}

func (s *suite) attributes() {
	mt, at := time.Unix(1e9, 123_456_000), time.Unix(12e8, 0)
	id, err := s.fs.Create(s.ctx, s.root, "file", nfs.Creation{Guarded: true, Set: nfs.Change{Mode: Ptr(uint32(0o4751)), Size: Ptr(int64(99)), Modified: &mt, Accessed: &at}})
	s.ok(err)
	a := s.attr(id)
	if a.Kind != nfs.KindFile || a.Mode != 0o4751 || a.Size != 99 || a.Links != 1 || !a.Modified.Equal(mt) || !a.Accessed.Equal(at) || a.Changed.IsZero() {
		s.t.Errorf("made with attributes: %+v", a)
	}
	dir, err := s.fs.Mkdir(s.ctx, s.root, "dir", nfs.Change{Mode: Ptr(uint32(0o1711))})
	s.ok(err)
	if a := s.attr(dir); a.Kind != nfs.KindDir || a.Mode != 0o1711 || a.Links < 1 {
		s.t.Errorf("a directory: %+v", a)
	}
	for _, id := range []nfs.ID{id, dir} {
		was := s.attr(id)
		s.ok(s.fs.SetAttr(s.ctx, id, nfs.Change{Mode: Ptr(uint32(0o640))}))
		is := s.attr(id)
		if is.Mode != 0o640 || is.Size != was.Size || !is.Modified.Equal(was.Modified) || is.Changed.Before(was.Changed) {
			s.t.Errorf("a new mode: %+v, was %+v", is, was)
		}
		s.ok(s.fs.SetAttr(s.ctx, id, nfs.Change{Modified: &at}))
		if is := s.attr(id); !is.Modified.Equal(at) || is.Mode != 0o640 {
			s.t.Errorf("a new time: %+v", is)
		}
		if err := s.fs.SetAttr(s.ctx, id, nfs.Change{UID: Ptr(uint32(12)), GID: Ptr(uint32(34))}); err != nil {
			s.is("SetAttr of the owner", err, syscall.EPERM)
		} else if is := s.attr(id); is.UID != 12 || is.GID != 34 || is.Mode != 0o640 {
			s.t.Errorf("a new owner: %+v", is)
		}
	}
	start := time.Now().Add(-2 * time.Second) // clocks of file systems are coarse
	s.write(id, []byte("1"), 0)
	if a := s.attr(id); a.Modified.Before(start) || a.Changed.Before(start) {
		s.t.Errorf("written: %+v", a)
	}
	s.create(dir, "new")
	if a := s.attr(dir); a.Modified.Before(start) {
		s.t.Errorf("a directory with a new file: %+v", a)
	}
	sp, err := s.fs.Space(s.ctx)
	if err != nil || sp.Total < sp.Free || sp.Free < sp.Available || sp.Available < 0 || sp.Total == 0 {
		s.t.Errorf("Space: %+v, %v", sp, err)
	}
}

// kinds asks of files what directories can, and the other way round.
func (s *suite) kinds() {
	file, dir := s.create(s.root, "file"), s.mkdir(s.root, "dir")
	_, err := s.fs.Lookup(s.ctx, file, "a")
	s.is("Lookup in a file", err, syscall.ENOTDIR)
	for _, err = range s.fs.ReadDir(s.ctx, file, 0) {
	}
	s.is("ReadDir of a file", err, syscall.ENOTDIR)
	_, err = s.fs.Create(s.ctx, file, "a", nfs.Creation{})
	s.is("Create in a file", err, syscall.ENOTDIR)
	_, err = s.fs.Mkdir(s.ctx, file, "a", nfs.Change{})
	s.is("Mkdir in a file", err, syscall.ENOTDIR)
	s.is("Remove in a file", s.fs.Remove(s.ctx, file, "a"), syscall.ENOTDIR)
	s.is("Rmdir in a file", s.fs.Rmdir(s.ctx, file, "a"), syscall.ENOTDIR)
	s.is("Rename to a file", s.fs.Rename(s.ctx, s.root, "dir", file, "a"), syscall.ENOTDIR)
	_, err = s.fs.ReadAt(s.ctx, dir, make([]byte, 1), 0)
	s.is("ReadAt of a directory", err, syscall.EISDIR)
	_, err = s.fs.WriteAt(s.ctx, dir, make([]byte, 1), 0)
	s.is("WriteAt of a directory", err, syscall.EISDIR)
	s.is("SetAttr of a directory's size", s.fs.SetAttr(s.ctx, dir, nfs.Change{Size: Ptr(int64(0))}), syscall.EISDIR, syscall.EINVAL)
	for _, id := range []nfs.ID{file, dir} {
		_, err = s.fs.Readlink(s.ctx, id)
		s.is("Readlink of no link", err, syscall.EINVAL)
	}
	if up, err := s.fs.Parent(s.ctx, s.root); err != nil || up != s.root {
		s.t.Errorf("Parent of the root: %v, %v", up, err)
	}
}

func (s *suite) rename() {
	a, b := s.mkdir(s.root, "a"), s.mkdir(s.root, "b")
	file := s.create(a, "file")
	s.write(file, []byte("1234"), 0)
	s.ok(s.fs.Rename(s.ctx, a, "file", b, "other"))
	if got := s.lookup(b, "other"); got != file {
		s.t.Errorf("a renamed file is %v, was %v", got, file)
	}
	s.reads(file, []byte("1234"), 0)
	_, err := s.fs.Lookup(s.ctx, a, "file")
	s.is("Lookup of the old name", err, syscall.ENOENT)
	s.is("Rename of nothing", s.fs.Rename(s.ctx, a, "none", b, "x"), syscall.ENOENT)
	s.ok(s.fs.Rename(s.ctx, b, "other", b, "other"))
	old := s.create(a, "old")
	s.ok(s.fs.Rename(s.ctx, b, "other", a, "old"))
	if got := s.lookup(a, "old"); got != file {
		s.t.Errorf("a file in the place of another is %v, was %v", got, file)
	}
	_, err = s.fs.Attr(s.ctx, old)
	s.is("Attr of the one that was there", err, syscall.ESTALE)

	sub := s.mkdir(a, "sub")
	s.ok(s.fs.Rename(s.ctx, a, "sub", b, "sub"))
	if up, err := s.fs.Parent(s.ctx, sub); err != nil || up != b || s.lookup(b, "sub") != sub {
		s.t.Errorf("the parent of a renamed directory is %v, %v", up, err)
	}
	s.is("Rename into itself", s.fs.Rename(s.ctx, s.root, "b", sub, "x"), syscall.EINVAL)
	s.is("Rename to itself", s.fs.Rename(s.ctx, s.root, "b", b, "x"), syscall.EINVAL)
	s.is("Rename of a file over a directory", s.fs.Rename(s.ctx, a, "old", b, "sub"), syscall.EEXIST, syscall.EISDIR)
	s.is("Rename of a directory over a file", s.fs.Rename(s.ctx, b, "sub", a, "old"), syscall.EEXIST, syscall.ENOTDIR)
	s.is("Rename over a full directory", s.fs.Rename(s.ctx, b, "sub", s.root, "a"), syscall.EEXIST, syscall.ENOTEMPTY)
	s.ok(s.fs.Remove(s.ctx, a, "old"))
	s.ok(s.fs.Rename(s.ctx, b, "sub", s.root, "a"))
	if got := s.lookup(s.root, "a"); got != sub {
		s.t.Errorf("a directory in the place of another is %v, was %v", got, sub)
	}
	s.is("Rename to a long name", s.fs.Rename(s.ctx, s.root, "a", s.root, strings.Repeat("n", 256)), syscall.ENAMETOOLONG)
}

// stale uses the IDs of what has gone.
func (s *suite) stale() {
	seen := make(map[nfs.ID]bool)
	for range 50 {
		file, dir := s.create(s.root, "file"), s.mkdir(s.root, "dir")
		if seen[file] || seen[dir] || file.File == dir.File {
			s.t.Fatalf("an ID came again: %v or %v", file, dir)
		}
		seen[file], seen[dir] = true, true
		s.ok(s.fs.Remove(s.ctx, s.root, "file"))
		s.ok(s.fs.Rmdir(s.ctx, s.root, "dir"))
	}
	file, dir := s.create(s.root, "file"), s.mkdir(s.root, "dir") // perhaps with a File of before
	seen[nfs.ID{File: math.MaxUint64, Generation: math.MaxUint64}] = true
	seen[nfs.ID{}] = true
	for id := range seen {
		calls := map[string]error{
			"WriteAt": third(s.fs.WriteAt(s.ctx, id, []byte("1"), 0)), "ReadAt": third(s.fs.ReadAt(s.ctx, id, []byte("1"), 0)), "Sync": s.fs.Sync(s.ctx, id),
			"SetAttr": s.fs.SetAttr(s.ctx, id, nfs.Change{Mode: Ptr(uint32(0o777))}), "Remove": s.fs.Remove(s.ctx, id, "a"), "Rmdir": s.fs.Rmdir(s.ctx, id, "a"),
			"Rename": s.fs.Rename(s.ctx, s.root, "file", id, "a"),
		}
		_, calls["Attr"] = s.fs.Attr(s.ctx, id)
		_, calls["Lookup"] = s.fs.Lookup(s.ctx, id, "a")
		_, calls["Parent"] = s.fs.Parent(s.ctx, id)
		_, calls["Readlink"] = s.fs.Readlink(s.ctx, id)
		_, calls["Create"] = s.fs.Create(s.ctx, id, "a", nfs.Creation{})
		_, calls["Mkdir"] = s.fs.Mkdir(s.ctx, id, "a", nfs.Change{})
		for _, err := range s.fs.ReadDir(s.ctx, id, 0) {
			calls["ReadDir"] = err
		}
		for what, err := range calls {
			s.is(fmt.Sprintf("%s of %v", what, id), err, syscall.ESTALE)
		}
	}
	s.attr(file)
	s.attr(dir)
}

func third(_ int, err error) error { return err }

// listing lists while entries come and go.
func (s *suite) listing() {
	dir := s.mkdir(s.root, "dir")
	if list := s.list(dir, 0); len(list) != 0 {
		s.t.Errorf("an empty directory: %v", list)
	}
	const n = 1500
	ids := make(map[string]nfs.ID)
	for i := range n {
		name := fmt.Sprintf("name%d", i)
		ids[name] = s.create(dir, name)
	}
	full := s.list(dir, 0)
	cookies := make(map[uint64]bool)
	for _, e := range full {
		if ids[e.Name] != e.ID || e.Cookie == 0 || e.Cookie > math.MaxUint64-2 || cookies[e.Cookie] {
			s.t.Fatalf("%+v, made as %v; the cookie was there: %v", e, ids[e.Name], cookies[e.Cookie])
		}
		cookies[e.Cookie] = true
	}
	if len(full) != n {
		s.t.Fatalf("%d entries, want %d", len(full), n)
	}
	for _, i := range []int{0, 1, 2, 700, n - 2, n - 1} {
		if rest := s.list(dir, full[i].Cookie); !slices.Equal(rest, full[i+1:]) {
			s.t.Errorf("%d entries after the one of number %d", len(rest), i)
		}
	}
	s.comeAndGo(dir, full)
	for e, err := range s.fs.ReadDir(s.ctx, dir, math.MaxUint64-2) {
		if err == nil {
			s.t.Errorf("%v after a cookie that none has", e)
		} else {
			s.is("ReadDir with a cookie that none has", err, syscall.EINVAL)
		}
	}
}

// comeAndGo lists in pages and removes every third entry of full meanwhile.
func (s *suite) comeAndGo(dir nfs.ID, full []nfs.Entry) {
	seen := make(map[string]int)
	var cookie uint64
	for page := 0; ; page++ {
		n := 0
		for e, err := range s.fs.ReadDir(s.ctx, dir, cookie) {
			s.ok(err)
			s.attr(e.ID) // may be asked for meanwhile
			seen[e.Name]++
			cookie = e.Cookie
			if n++; n == 37 {
				break
			}
		}
		if n == 0 {
			break
		}
		for i := page * 30; i < min((page+1)*30, len(full)); i += 3 {
			s.ok(s.fs.Remove(s.ctx, dir, full[i].Name))
		}
		if page < 20 {
			s.create(dir, fmt.Sprint("come", page))
		}
	}
	for i, e := range full {
		if n := seen[e.Name]; n > 1 || n == 0 && i%3 != 0 {
			s.t.Errorf("%s was listed %d times", e.Name, n)
			return
		}
	}
}

// concurrent does all kinds of things at once.
func (s *suite) concurrent() {
	shared := s.create(s.root, "shared")
	dir := s.mkdir(s.root, "dir")
	const workers, part = 8, 20_000
	var all sync.WaitGroup
	for w := range workers {
		all.Go(func() {
			if err := s.worker(shared, dir, w, part); err != nil {
				s.t.Errorf("worker %d: %v", w, err)
			}
		})
	}
	all.Wait()
	for w := range workers {
		s.reads(shared, bytes.Repeat([]byte{byte(w + 1)}, part), int64(w*part))
	}
	if left := s.list(dir, 0); len(left) != workers {
		s.t.Errorf("left over: %v", left)
	}
}

func (s *suite) worker(shared, dir nfs.ID, w, part int) error {
	name, as := fmt.Sprint("file", w), fmt.Sprint("renamed", w)
	for i := range 20 {
		if _, err := s.fs.WriteAt(s.ctx, shared, bytes.Repeat([]byte{byte(w + 1)}, part/20), int64(w*part+i*part/20)); err != nil {
			return err
		}
		id, err := s.fs.Create(s.ctx, dir, name, nfs.Creation{Guarded: true})
		if err != nil {
			return err
		}
		for _, err := range s.fs.ReadDir(s.ctx, dir, 0) {
			if err != nil {
				return err
			}
		}
		if err := s.fs.Rename(s.ctx, dir, name, dir, as); err != nil {
			return err
		}
		got, err := s.fs.Lookup(s.ctx, dir, as)
		if err != nil || got != id {
			return fmt.Errorf("Lookup: %v, want %v: %w", got, id, err)
		}
		if i%5 == 0 {
			if err := s.fs.Sync(s.ctx, shared); err != nil {
				return err
			}
		}
		if i == 19 {
			return nil
		}
		if err := s.fs.Remove(s.ctx, dir, as); err != nil {
			return err
		}
	}
	return nil
}
