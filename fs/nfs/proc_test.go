package nfs_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fs/nfs"
	"github.com/holdfast-backup/holdfast/fs/nfs/nfstest"
)

type (
	args  = nfstest.Args
	sattr = nfstest.Sattr
)

func ptr[T any](v T) *T { return &v }

// TestAttributes compares what GETATTR says with what was set.
func TestAttributes(t *testing.T) {
	m := nfstest.NewMemory()
	_, c, root := mounted(t, m)
	at, mt := nfstest.Time{Sec: 1e9, Nsec: 5}, nfstest.Time{Sec: 4e9, Nsec: 999_999_999}
	f := must(c.Create(root, "f", true, &sattr{Mode: ptr(uint32(0o4751)), UID: ptr(uint32(7)), GID: ptr(uint32(8)), Size: ptr(uint64(12345)), Atime: &at, Mtime: &mt}))(t)
	a := must(c.Getattr(f.FH))(t)
	id := must(m.Lookup(t.Context(), m.Root(), "f"))(t)
	want := nfstest.Fattr{Type: 1, Mode: 0o4751, Nlink: 1, UID: 7, GID: 8, Size: 12345, Used: 12345, FSID: 77, FileID: id.File, Atime: at, Mtime: mt, Ctime: a.Ctime}
	if *a != want || *f.Attr != want {
		t.Errorf("%+v\n%+v\nwant %+v", *a, *f.Attr, want)
	}
	if dir := must(c.Getattr(root))(t); dir.Type != 2 || dir.Nlink != 2 {
		t.Errorf("%+v", dir)
	}
	before := time.Now()
	w := must(c.Setattr(f.FH, &sattr{Mode: ptr(uint32(0o600)), AtimeNow: true, MtimeNow: true}, nil))(t)
	if w.After.Mode != 0o600 || int64(w.After.Mtime.Sec) < before.Unix() || int64(w.After.Atime.Sec) < before.Unix() || w.After.Size != 12345 {
		t.Errorf("%+v", w.After)
	}
	checkBefore(t, "SETATTR", w, a)
	// A guard.
	_, err := c.Setattr(f.FH, &sattr{Size: ptr(uint64(1))}, &a.Ctime)
	wants(t, "SETATTR with an old guard", err, nfstest.NotSync)
	w = must(c.Setattr(f.FH, &sattr{Size: ptr(uint64(1))}, &w.After.Ctime))(t)
	if w.After.Size != 1 {
		t.Errorf("%+v", w.After)
	}
	_, err = c.Setattr(f.FH, &sattr{Size: ptr(uint64(1 << 63))}, nil)
	wants(t, "SETATTR of a size that none has", err, nfstest.FBig)
	_, err = c.Setattr(root, &sattr{Size: ptr(uint64(0))}, nil)
	wants(t, "SETATTR of a directory's size", err, nfstest.IsDir)
	if w := must(c.Setattr(f.FH, &sattr{}, nil))(t); w.After.Size != 1 {
		t.Errorf("%+v", w.After)
	}
}

// checkBefore checks that a change tells the attributes of before it.
func checkBefore(t *testing.T, what string, w nfstest.Wcc, a *nfstest.Fattr) {
	t.Helper()
	if w.Before == nil || *w.Before != (nfstest.WccAttr{Size: a.Size, Mtime: a.Mtime, Ctime: a.Ctime}) || w.After == nil {
		t.Errorf("%s: %+v before, want %+v; after %v", what, w.Before, a, w.After)
	}
}

// TestHandles calls every procedure with handles that name nothing.
func TestHandles(t *testing.T) {
	m := nfstest.NewMemory()
	r, c, root := mounted(t, m)
	wants(t, "Export", r.Export(nfs.Export{Path: "/ds2", ID: 78, FS: nfstest.NewMemory(), Writable: true}), nil)
	root2 := must(c.Mount("/ds2"))(t)
	f := must(c.Create(root, "f", false, &sattr{}))(t)
	must(c.Remove(root, "f"))(t)
	g := must(c.Create(root, "g", false, &sattr{}))(t) // has the number of f
	if bytes.Equal(f.FH, g.FH) || f.Attr.FileID != g.Attr.FileID {
		t.Fatal("the test needs a number that is used again")
	}
	change := func(i int, b byte) nfstest.FH {
		fh := bytes.Clone(root)
		fh[i] ^= b
		return fh
	}
	for what, v := range map[string]struct {
		fh   nfstest.FH
		want error
	}{
		"empty":          {nil, nfstest.BadHandle},
		"short":          {root[:len(root)-1], nfstest.BadHandle},
		"long":           {append(bytes.Clone(root), 0), nfstest.BadHandle},
		"64 bytes":       {make([]byte, 64), nfstest.BadHandle},
		"other version":  {change(0, 2), nfstest.BadHandle},
		"unknown export": {change(1, 2), nfstest.Stale},
		"unknown file":   {change(10, 2), nfstest.Stale},
		"other time":     {change(24, 64), nfstest.Stale},
		"file that went": {f.FH, nfstest.Stale},
	} {
		for proc, call := range everyCall(c, v.fh, root) {
			wants(t, what+": "+proc, call(), v.want)
		}
		_, _, err := c.Rename(root, "g", v.fh, "h")
		wants(t, what+": RENAME to", err, v.want)
		_, _, err = c.Link(g.FH, v.fh, "h")
		wants(t, what+": LINK to", err, v.want)
	}
	_, _, err := c.Rename(root, "g", root2, "g")
	wants(t, "RENAME to another export", err, nfstest.XDev)
	_, _, err = c.Link(g.FH, root2, "g")
	wants(t, "LINK to another export", err, nfstest.XDev)
}

// everyCall calls each procedure that has a handle with fh.
func everyCall(c *nfstest.Client, fh, dir nfstest.FH) map[string]func() error {
	return map[string]func() error{
		"GETATTR":     func() error { return second(c.Getattr(fh)) },
		"SETATTR":     func() error { return second(c.Setattr(fh, &sattr{MtimeNow: true}, nil)) },
		"LOOKUP":      func() error { return second(c.Lookup(fh, "a")) },
		"ACCESS":      func() error { return second(c.Access(fh, 63)) },
		"READLINK":    func() error { return second(c.Readlink(fh)) },
		"READ":        func() error { return second(c.Read(fh, 0, 10)) },
		"WRITE":       func() error { return second(c.Write(fh, 0, []byte("1"), nfstest.Unstable)) },
		"CREATE":      func() error { return second(c.Create(fh, "a", false, &sattr{})) },
		"EXCLUSIVE":   func() error { return second(c.CreateExclusive(fh, "a", 1)) },
		"MKDIR":       func() error { return second(c.Mkdir(fh, "a", &sattr{})) },
		"SYMLINK":     func() error { return second(c.Symlink(fh, "a", "b")) },
		"MKNOD":       func() error { return second(c.Mknod(fh, "a")) },
		"REMOVE":      func() error { return second(c.Remove(fh, "a")) },
		"RMDIR":       func() error { return second(c.Rmdir(fh, "a")) },
		"RENAME":      func() error { _, _, err := c.Rename(fh, "a", dir, "b"); return err },
		"LINK":        func() error { _, _, err := c.Link(fh, dir, "b"); return err },
		"READDIR":     func() error { return second(c.Readdir(fh, 0, 0, 1000)) },
		"READDIRPLUS": func() error { return second(c.Readdirplus(fh, 0, 0, 1000, 1000)) },
		"FSSTAT":      func() error { _, _, err := c.Fsstat(fh); return err },
		"FSINFO":      func() error { return second(c.Fsinfo(fh)) },
		"PATHCONF":    func() error { return second(c.Pathconf(fh)) },
		"COMMIT":      func() error { _, _, err := c.Commit(fh, 0, 0); return err },
	}
}

// TestErrors has every method of the FS fail with every error that it may give.
func TestErrors(t *testing.T) {
	m := nfstest.NewMemory()
	var failing atomic.Pointer[string]
	var failure atomic.Pointer[error]
	m.Before = func(op string, _ nfs.ID) error {
		if p := failing.Load(); p != nil && *p == op {
			return *failure.Load()
		}
		return nil
	}
	r, c, root := mounted(t, m)
	fh := must(c.Create(root, "f", false, &sattr{Size: ptr(uint64(10))}))(t).FH
	must(c.Mkdir(root, "d", &sattr{}))(t)
	calls := map[string]func() error{
		"Attr":    func() error { return second(c.Getattr(fh)) },
		"Lookup":  func() error { return second(c.Lookup(root, "f")) },
		"ReadDir": func() error { return second(c.Readdir(root, 0, 0, 1000)) },
		"ReadAt":  func() error { return second(c.Read(fh, 0, 10)) },
		"Space":   func() error { _, _, err := c.Fsstat(fh); return err },
		"WriteAt": func() error { return second(c.Write(fh, 0, []byte("1"), nfstest.Unstable)) },
		"Sync":    func() error { _, _, err := c.Commit(fh, 0, 0); return err },
		"SetAttr": func() error { return second(c.Setattr(fh, &sattr{MtimeNow: true}, nil)) },
		"Create":  func() error { return second(c.Create(root, "new", true, &sattr{})) },
		"Mkdir":   func() error { return second(c.Mkdir(root, "newdir", &sattr{})) },
		"Remove":  func() error { return second(c.Remove(root, "f")) },
		"Rmdir":   func() error { return second(c.Rmdir(root, "d")) },
		"Rename":  func() error { _, _, err := c.Rename(root, "f", root, "g"); return err },
	}
	for err, want := range map[error]nfstest.Status{
		syscall.EPERM: 1, syscall.ENOENT: 2, syscall.EIO: 5, syscall.EACCES: 13, syscall.EEXIST: 17, syscall.EXDEV: 18, syscall.ENOTDIR: 20,
		syscall.EISDIR: 21, syscall.EINVAL: 22, syscall.EFBIG: 27, syscall.ENOSPC: 28, syscall.EROFS: 30, syscall.ENAMETOOLONG: 63,
		syscall.ENOTEMPTY: 66, syscall.EDQUOT: 69, syscall.ESTALE: 70,
		errors.New("damage at 4096"): 5, io.ErrUnexpectedEOF: 5, syscall.EBADF: 5,
	} {
		err = fmt.Errorf("wrapped: %w", err)
		failure.Store(&err)
		for op, call := range calls {
			failing.Store(&op)
			wants(t, fmt.Sprintf("%s: %v", op, err), call(), want)
		}
		failing.Store(nil)
		if want == 5 {
			r.log.has(t, err.Error())
		}
	}
}

// TestPanic has a method panic: that call fails, the others do not.
func TestPanic(t *testing.T) {
	m := nfstest.NewMemory()
	var armed atomic.Bool
	m.Before = func(op string, _ nfs.ID) error {
		if (op == "ReadAt" || op == "Sync" || op == "Mkdir") && armed.Load() {
			panic("oops in " + op)
		}
		return nil
	}
	r, c, root := mounted(t, m)
	fh := must(c.Create(root, "f", false, &sattr{Size: ptr(uint64(10))}))(t).FH
	armed.Store(true)
	systemErr := nfstest.RPCError{Stat: 5}
	wantsRPC(t, "READ", second(c.Read(fh, 0, 10)), systemErr)
	_, err := c.Write(fh, 0, []byte("1"), nfstest.FileSync)
	wantsRPC(t, "WRITE", err, systemErr)
	wantsRPC(t, "MKDIR", second(c.Mkdir(root, "d", &sattr{})), systemErr)
	for _, op := range []string{"ReadAt", "Sync", "Mkdir"} {
		r.log.has(t, "oops in "+op)
	}
	armed.Store(false)
	wants(t, "READ afterwards", second(c.Read(fh, 0, 10)), nil)
	w, err := c.Write(fh, 0, []byte("1"), nfstest.FileSync)
	wants(t, "WRITE afterwards", err, nil)
	if w.Wcc.Before == nil {
		t.Error("a call that ended by a panic counts as at work")
	}
	wants(t, "MKDIR afterwards", second(c.Mkdir(root, "d", &sattr{})), nil)
}

func TestLookup(t *testing.T) {
	_, c, root := mounted(t, nfstest.NewMemory())
	d := must(c.Mkdir(root, "d", &sattr{}))(t)
	f := must(c.Create(d.FH, "f", false, &sattr{}))(t)
	got := must(c.Lookup(d.FH, "f"))(t)
	if !bytes.Equal(got.FH, f.FH) || got.Attr == nil || *got.Attr != *f.Attr || got.Dir.FileID != d.Attr.FileID {
		t.Errorf("%+v", got)
	}
	for name, want := range map[string]nfstest.FH{".": d.FH, "..": root} {
		if got := must(c.Lookup(d.FH, name))(t); !bytes.Equal(got.FH, want) {
			t.Errorf("another handle for %q", name)
		}
	}
	if got := must(c.Lookup(root, ".."))(t); !bytes.Equal(got.FH, root) {
		t.Error("there is something above the root")
	}
	got, err := c.Lookup(root, "missing")
	wants(t, "missing", err, nfstest.NoEnt)
	if got.Dir == nil {
		t.Error("no attributes of the directory with an error")
	}
	for name, want := range map[string]error{"": nfstest.Access, "a/b": nfstest.Access, "a\x00": nfstest.Access,
		strings.Repeat("n", 255): nfstest.NoEnt, strings.Repeat("n", 256): nfstest.NameTooLong, strings.Repeat("n", 100_000): nfstest.NameTooLong} {
		wants(t, fmt.Sprintf("LOOKUP %.10q", name), second(c.Lookup(root, name)), want)
		if want != nfstest.NoEnt {
			wants(t, fmt.Sprintf("CREATE %.10q", name), second(c.Create(root, name, false, &sattr{})), want)
			wants(t, fmt.Sprintf("MKDIR %.10q", name), second(c.Mkdir(root, name, &sattr{})), want)
			wants(t, fmt.Sprintf("REMOVE %.10q", name), second(c.Remove(root, name)), want)
			wants(t, fmt.Sprintf("RMDIR %.10q", name), second(c.Rmdir(root, name)), want)
			_, _, err := c.Rename(root, name, root, "x")
			wants(t, fmt.Sprintf("RENAME %.10q", name), err, want)
			_, _, err = c.Rename(root, "d", root, name)
			wants(t, fmt.Sprintf("RENAME to %.10q", name), err, want)
		}
	}
	for proc, call := range everyCall(c, f.FH, root) {
		want := map[string]error{"LOOKUP": nfstest.NotDir, "CREATE": nfstest.NotDir, "EXCLUSIVE": nfstest.NotDir, "MKDIR": nfstest.NotDir, "REMOVE": nfstest.NotDir,
			"RMDIR": nfstest.NotDir, "RENAME": nfstest.NotDir, "READDIR": nfstest.NotDir, "READDIRPLUS": nfstest.NotDir, "READLINK": nfstest.Inval,
			"SYMLINK": nfstest.NotSupp, "MKNOD": nfstest.NotSupp, "LINK": nfstest.NotSupp}[proc]
		wants(t, proc+" of a file", call(), want)
	}
	must(c.Create(root, "f", false, &sattr{}))(t)
	for proc, want := range map[string]error{"READ": nfstest.IsDir, "WRITE": nfstest.IsDir, "COMMIT": nfstest.IsDir, "READLINK": nfstest.Inval} {
		wants(t, proc+" of a directory", everyCall(c, d.FH, root)[proc](), want)
	}
}

// TestReadOnly changes nothing of an export for reading.
func TestReadOnly(t *testing.T) {
	m := nfstest.NewMemory()
	x := share(m)
	x.Writable = false
	r := serve(t, &nfs.Server{}, x, nfs.Export{Path: "/rw", ID: 1, FS: m, Writable: true, NoRootSquash: true})
	c := r.dial(nfstest.Root)
	f := must(c.Create(must(c.Mount("/rw"))(t), "a", false, &sattr{}))(t)
	root := must(c.Mount("/ds"))(t)
	fh := must(c.Lookup(root, "a"))(t).FH
	for proc, call := range everyCall(c, root, root) {
		var want error
		switch proc {
		case "SETATTR", "WRITE", "CREATE", "EXCLUSIVE", "MKDIR", "REMOVE", "RMDIR", "RENAME", "COMMIT":
			want = nfstest.ROFS
		case "SYMLINK", "MKNOD", "LINK":
			want = nfstest.NotSupp
		case "READLINK":
			want = nfstest.Inval
		case "READ":
			want = nfstest.IsDir
		}
		wants(t, proc, call(), want)
	}
	w, err := c.Write(fh, 0, []byte("1"), nfstest.Unstable)
	wants(t, "WRITE", err, nfstest.ROFS)
	if w.Wcc.After == nil {
		t.Error("no attributes with the error")
	}
	if a := must(c.Getattr(fh))(t); a.Size != 0 || a.FileID != f.Attr.FileID || a.FSID != 77 {
		t.Errorf("%+v", a)
	}
	if bits := must(c.Access(root, 63))(t); bits != 3 {
		t.Errorf("ACCESS gives %#x", bits)
	}
}

func TestRead(t *testing.T) {
	m := nfstest.NewMemory()
	m.AddLink("link", "some/where")
	r, c, root := mounted(t, m)
	data := make([]byte, 3<<20+5)
	for i := range data {
		data[i] = byte(i * 7 >> 3)
	}
	fh := must(c.Create(root, "f", false, &sattr{Size: ptr(uint64(len(data)))}))(t).FH
	for off := 0; off < len(data); off += 1 << 20 {
		must(c.Write(fh, uint64(off), data[off:min(off+1<<20, len(data))], nfstest.Unstable))(t)
	}
	size := uint64(len(data))
	for _, v := range []struct {
		off   uint64
		count uint32
	}{{0, 0}, {0, 1}, {1, 2}, {5, 3}, {0, 4096}, {12345, 1 << 20}, {0, 2 << 20}, {0, 1<<32 - 1}, {size - 1, 1}, {size - 5, 5}, {size - 5, 6}, {size - 5, 4},
		{size, 0}, {size, 1}, {size + 1, 10}, {1 << 63, 10}, {1<<64 - 1, 1<<32 - 1}} {
		d := must(c.Read(fh, v.off, v.count))(t)
		from := min(v.off, size)
		to := min(from+min(uint64(v.count), 1<<20), size)
		if !bytes.Equal(d.P, data[from:to]) || d.EOF != (to == size && v.off+uint64(v.count) >= size) && v.count > 0 || d.Attr == nil || d.Attr.Size != size {
			t.Errorf("READ %d at %d: %d bytes, eof %v", v.count, v.off, len(d.P), d.EOF)
		}
	}
	link := must(c.Lookup(root, "link"))(t)
	if target := must(c.Readlink(link.FH))(t); target != "some/where" || link.Attr.Type != 5 {
		t.Errorf("READLINK: %q of type %d", target, link.Attr.Type)
	}
	wants(t, "READ of a link", second(c.Read(link.FH, 0, 1)), nfstest.Inval)
	_, err := c.Write(link.FH, 0, []byte("1"), 0)
	wants(t, "WRITE of a link", err, nfstest.Inval)
	st, err := r.Stats("/ds")
	if err != nil || st.BytesWritten != size || st.BytesRead == 0 || st.Ops["WRITE"] != 5 || st.Ops["READLINK"] != 1 {
		t.Errorf("%+v, %v", st, err)
	}
}

// TestWhole compares FSSTAT, FSINFO and PATHCONF with what was said.
func TestWhole(t *testing.T) {
	_, c, root := mounted(t, nfstest.NewMemory())
	n, invar, err := c.Fsstat(root)
	if want := [6]uint64{1 << 30, 1 << 29, 1 << 28, 1 << 20, 1<<20 - 1, 1<<20 - 1}; n != want || invar != 0 || err != nil {
		t.Errorf("FSSTAT: %v %v %v", n, invar, err)
	}
	i := must(c.Fsinfo(root))(t)
	if want := (nfstest.Info{RtMax: 1 << 20, RtPref: 1 << 20, RtMult: 4096, WtMax: 1 << 20, WtPref: 1 << 20, WtMult: 4096, DtPref: 1 << 16, MaxFileSize: 1 << 60,
		Delta: nfstest.Time{Nsec: 1}, Properties: 0x18}); i != want {
		t.Errorf("FSINFO: %+v", i)
	}
	if p := must(c.Pathconf(root))(t); p != (nfstest.Conf{LinkMax: 32000, NameMax: 255, NoTrunc: true, ChownRestricted: true, CasePreserving: true}) {
		t.Errorf("PATHCONF: %+v", p)
	}
}

// odd breaks the promises of an FS.
type odd struct {
	*nfstest.Memory
	read    int   // bytes that ReadAt gives
	readErr error // with them
	cookie  uint64
}

func (o *odd) ReadAt(context.Context, nfs.ID, []byte, int64) (int, error) { return o.read, o.readErr }

func (o *odd) WriteAt(_ context.Context, _ nfs.ID, p []byte, _ int64) (int, error) {
	return len(p) - 1, nil
}

func (o *odd) ReadDir(context.Context, nfs.ID, uint64) iter.Seq2[nfs.Entry, error] {
	return func(yield func(nfs.Entry, error) bool) {
		yield(nfs.Entry{Name: "f", ID: o.Root(), Cookie: o.cookie}, nil)
	}
}

// TestOdd never gives zeros or short data for what an FS did not give.
func TestOdd(t *testing.T) {
	o := &odd{Memory: nfstest.NewMemory()}
	r, c, root := mounted(t, o)
	fh := must(c.Create(root, "f", true, &sattr{Size: ptr(uint64(100))}))(t).FH
	o.read, o.readErr = 10, nil
	_, err := c.Read(fh, 0, 50)
	wants(t, "READ that was short without a reason", err, nfstest.IO)
	r.log.has(t, "READ: unexpected EOF")
	o.readErr = syscall.EIO
	_, err = c.Read(fh, 0, 50)
	wants(t, "READ that was short by an error", err, nfstest.IO)
	r.log.has(t, "input/output error")
	o.readErr = io.EOF // the file became shorter meanwhile
	if d := must(c.Read(fh, 0, 50))(t); len(d.P) != 10 || !d.EOF {
		t.Errorf("%d bytes, eof %v", len(d.P), d.EOF)
	}
	_, err = c.Write(fh, 0, []byte("12345"), 0)
	wants(t, "WRITE that was short without an error", err, nfstest.IO)
	r.log.has(t, "4 of 5 bytes")
	for _, o.cookie = range []uint64{0, 1<<64 - 1, 1<<64 - 2} {
		_, err = c.Readdir(root, 0, 0, 1000)
		wants(t, "READDIR", err, nfstest.IO)
		r.log.has(t, "is out of range")
	}
	o.cookie = 1<<64 - 3
	wants(t, "READDIR", second(c.Readdir(root, 0, 0, 1000)), nil)
}
