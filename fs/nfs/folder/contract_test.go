package folder

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/nfs"
)

// TestNames: what is no name of a file is refused everywhere.
func TestNames(t *testing.T) {
	f := mustOpen(t, tempDir(t), Options{})
	root := f.Root()
	create(t, f, root, "a", "")
	long := strings.Repeat("x", 255)
	create(t, f, root, long, "")
	create(t, f, root, "\xff\n\x01 *", "") // any other bytes are
	for name, no := range map[string]syscall.Errno{
		"": syscall.EINVAL, ".": syscall.EINVAL, "..": syscall.EINVAL, "a/b": syscall.EINVAL, "/": syscall.EINVAL, "../a": syscall.EINVAL,
		"a\x00b": syscall.EINVAL, long + "x": syscall.ENAMETOOLONG,
	} {
		for what, err := range map[string]error{
			"lookup":      second(f.Lookup(ctx, root, name)),
			"create":      second(f.Create(ctx, root, name, nfs.Creation{})),
			"mkdir":       second(f.Mkdir(ctx, root, name, nfs.Change{})),
			"remove":      f.Remove(ctx, root, name),
			"rmdir":       f.Rmdir(ctx, root, name),
			"rename from": f.Rename(ctx, root, name, root, "b"),
			"rename to":   f.Rename(ctx, root, "a", root, name),
		} {
			if !errors.Is(err, no) {
				t.Errorf("%s %q: %v, not %v", what, name, err, no)
			}
		}
	}
}

func second[T any](_ T, err error) error { return err }

// TestErrors: each operation on what is of the wrong kind, taken, or not there.
func TestErrors(t *testing.T) {
	dir := tempDir(t)
	f := mustOpen(t, dir, Options{}, Placed{Path: "d/p", Key: "p", Content: newDisk(100), Time: day},
		Placed{Path: "ro", Key: "ro", Content: image{newDisk(100)}, Time: day})
	root, d := f.Root(), lookup(t, f, "d")
	file, full := create(t, f, root, "file", "abc"), mkdir(t, f, root, "full")
	empty := mkdir(t, f, root, "empty")
	create(t, f, full, "x", "")
	sub := mkdir(t, f, full, "sub")
	if err := os.Symlink("/etc/passwd", dataFile(dir, "link")); err != nil {
		t.Fatal(err)
	}
	link, p, ro := lookup(t, f, "link"), lookup(t, f, "d", "p"), lookup(t, f, "ro")
	if s, err := f.Readlink(ctx, link); err != nil || s != "/etc/passwd" || attr(t, f, link).Kind != nfs.KindLink {
		t.Error(s, err)
	}
	buf := make([]byte, 10)
	readAt := func(id nfs.ID, off int64) error { return second(f.ReadAt(ctx, id, buf, off)) }
	writeAt := func(id nfs.ID, off int64) error { return second(f.WriteAt(ctx, id, buf, off)) }
	list := func(id nfs.ID) (err error) {
		for _, err = range f.ReadDir(ctx, id, 0) {
		}
		return err
	}
	other := nfs.ID{File: file.File, Generation: file.Generation + 1}
	noPlaced := nfs.ID{File: p.File, Generation: p.Generation + 1}
	rename := func(a nfs.ID, x string, b nfs.ID, y string) error { return f.Rename(ctx, a, x, b, y) }
	size := func(id nfs.ID, n int64) error { return f.SetAttr(ctx, id, nfs.Change{Size: &n}) }
	for i, c := range []struct {
		err error
		no  syscall.Errno
	}{
		{second(f.Lookup(ctx, root, "none")), syscall.ENOENT},
		{second(f.Lookup(ctx, file, "x")), syscall.ENOTDIR},
		{second(f.Lookup(ctx, p, "x")), syscall.ENOTDIR},
		{second(f.Lookup(ctx, link, "x")), syscall.ENOTDIR},
		{second(f.Lookup(ctx, other, "x")), syscall.ESTALE},
		{second(f.Parent(ctx, file)), syscall.ENOTDIR},
		{second(f.Attr(ctx, other)), syscall.ESTALE},
		{second(f.Attr(ctx, noPlaced)), syscall.ESTALE},
		{second(f.Attr(ctx, nfs.ID{})), syscall.ESTALE},
		{list(file), syscall.ENOTDIR},
		{list(p), syscall.ENOTDIR},
		{list(other), syscall.ESTALE},
		{readAt(d, 0), syscall.EISDIR},
		{readAt(root, 0), syscall.EISDIR},
		{readAt(link, 0), syscall.EINVAL},
		{readAt(file, -1), syscall.EINVAL},
		{readAt(p, -1), syscall.EINVAL},
		{readAt(other, 0), syscall.ESTALE},
		{readAt(noPlaced, 0), syscall.ESTALE},
		{writeAt(d, 0), syscall.EISDIR},
		{writeAt(link, 0), syscall.EINVAL},
		{writeAt(file, -1), syscall.EINVAL},
		{writeAt(other, 0), syscall.ESTALE},
		{writeAt(p, 91), syscall.EFBIG},
		{writeAt(p, 1<<62), syscall.EFBIG},
		{writeAt(p, 90), 0},
		{writeAt(ro, 0), syscall.EROFS},
		{f.Sync(ctx, other), syscall.ESTALE},
		{f.Sync(ctx, d), syscall.EISDIR},
		{f.Sync(ctx, ro), 0},
		{second(f.Readlink(ctx, file)), syscall.EINVAL},
		{second(f.Readlink(ctx, p)), syscall.EINVAL},
		{second(f.Readlink(ctx, root)), syscall.EINVAL},
		{size(p, 99), syscall.EINVAL},
		{size(p, 100), 0},
		{size(ro, 0), syscall.EINVAL},
		{size(d, 0), syscall.EISDIR},
		{size(file, -1), syscall.EINVAL},
		{size(link, 1), syscall.EINVAL},
		{size(other, 1), syscall.ESTALE},
		{second(f.Create(ctx, root, "file", nfs.Creation{Guarded: true})), syscall.EEXIST},
		{second(f.Create(ctx, root, "full", nfs.Creation{})), syscall.EEXIST},
		{second(f.Create(ctx, root, "link", nfs.Creation{})), syscall.EEXIST},
		{second(f.Create(ctx, d, "p", nfs.Creation{Guarded: true})), syscall.EEXIST},
		{second(f.Create(ctx, d, "p", nfs.Creation{Exclusive: &[8]byte{}})), syscall.EEXIST},
		{second(f.Create(ctx, d, "p", nfs.Creation{Set: nfs.Change{Size: new(int64)}})), syscall.EINVAL},
		{second(f.Create(ctx, d, "p", nfs.Creation{})), 0},
		{second(f.Create(ctx, file, "x", nfs.Creation{})), syscall.ENOTDIR},
		{second(f.Mkdir(ctx, root, "full", nfs.Change{})), syscall.EEXIST},
		{second(f.Mkdir(ctx, root, "file", nfs.Change{})), syscall.EEXIST},
		{second(f.Mkdir(ctx, d, "p", nfs.Change{})), syscall.EEXIST},
		{f.Remove(ctx, root, "none"), syscall.ENOENT},
		{f.Remove(ctx, root, "empty"), syscall.EISDIR},
		{f.Remove(ctx, file, "x"), syscall.ENOTDIR},
		{f.Rmdir(ctx, root, "none"), syscall.ENOENT},
		{f.Rmdir(ctx, root, "file"), syscall.ENOTDIR},
		{f.Rmdir(ctx, root, "full"), syscall.ENOTEMPTY},
		{f.Rmdir(ctx, root, "d"), syscall.ENOTEMPTY}, // there is only a placed file in it
		{f.Rmdir(ctx, d, "p"), syscall.ENOTDIR},
		{rename(root, "none", root, "y"), syscall.ENOENT},
		{rename(root, "file", root, "empty"), syscall.EEXIST},
		{rename(root, "empty", root, "file"), syscall.EEXIST},
		{rename(root, "empty", root, "full"), syscall.EEXIST},
		{rename(root, "empty", root, "d"), syscall.EEXIST},
		{rename(root, "empty", d, "p"), syscall.EEXIST},
		{rename(d, "p", root, "empty"), syscall.EEXIST},
		{rename(root, "none", d, "p"), syscall.ENOENT},
		{rename(root, "full", full, "y"), syscall.EINVAL},
		{rename(root, "full", sub, "y"), syscall.EINVAL},
		{rename(root, "file", root, "file"), 0},
		{rename(d, "p", d, "p"), 0},
		{rename(file, "x", root, "y"), syscall.ENOTDIR},
		{rename(root, "file", p, "y"), syscall.ENOTDIR},
		{rename(root, "file", other, "y"), syscall.ESTALE},
		{f.Rmdir(ctx, root, "empty"), 0},
		{second(f.Create(ctx, empty, "x", nfs.Creation{})), syscall.ESTALE},
		{rename(d, "p", empty, "x"), syscall.ESTALE},
		{f.SetAttr(ctx, empty, nfs.Change{}), syscall.ESTALE},
	} {
		if c.no == 0 && c.err != nil || c.no != 0 && !errors.Is(c.err, c.no) {
			t.Errorf("%d: %v, not %v", i, c.err, c.no)
		}
	}
	if read(t, f, file) != "abc" {
		t.Error("file was changed")
	}
	if n, err := f.ReadAt(ctx, p, buf, 95); n != 5 || err != io.EOF {
		t.Error(n, err)
	}
	if n, err := f.ReadAt(ctx, p, buf, 100); n != 0 || err != io.EOF {
		t.Error(n, err)
	}
}

// TestNotShown: devices, FIFOs and sockets are nowhere, and in nobody's way by hanging.
func TestNotShown(t *testing.T) {
	dir := tempDir(t)
	f := mustOpen(t, dir, Options{}, Placed{Path: "p", Key: "p", Content: newDisk(100), Time: day})
	root := f.Root()
	if err := unix.Mkfifo(dataFile(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	hidden := []string{"fifo"}
	if unix.Mknod(dataFile(dir, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))) == nil {
		hidden = append(hidden, "null")
	}
	create(t, f, root, "file", "abc")
	mkdir(t, f, root, "dir")
	for _, name := range hidden {
		want(t, second(f.Lookup(ctx, root, name)), syscall.ENOENT)
		want(t, second(f.Create(ctx, root, name, nfs.Creation{})), syscall.EEXIST)
		want(t, second(f.Create(ctx, root, name, nfs.Creation{Guarded: true})), syscall.EEXIST)
		want(t, second(f.Mkdir(ctx, root, name, nfs.Change{})), syscall.EEXIST)
		want(t, f.Remove(ctx, root, name), syscall.ENOENT)
		want(t, f.Rmdir(ctx, root, name), syscall.ENOENT)
		want(t, f.Rename(ctx, root, name, root, "x"), syscall.ENOENT)
		want(t, f.Rename(ctx, root, "file", root, name), syscall.EACCES)
		want(t, f.Rename(ctx, root, "p", root, name), syscall.EACCES)
	}
	if got := names(t, f.ReadDir(ctx, root, 0)); fmt.Sprint(got) != "[dir file p]" {
		t.Error(got)
	}
}

// TestMountedBelow: what is mounted in data/ is not shown, also if it is data/ itself.
func TestMountedBelow(t *testing.T) {
	dir := tempDir(t)
	f := mustOpen(t, dir, Options{}, Placed{Path: "p", Key: "p", Content: newDisk(100), Time: day})
	mkdir(t, f, f.Root(), "m")
	if err := unix.Mount(dataFile(dir), dataFile(dir, "m"), "", unix.MS_BIND, ""); err != nil {
		t.Skip("cannot mount: ", err)
	}
	defer unix.Unmount(dataFile(dir, "m"), unix.MNT_DETACH)
	want(t, second(f.Lookup(ctx, f.Root(), "m")), syscall.ENOENT)
	if got := names(t, f.ReadDir(ctx, f.Root(), 0)); fmt.Sprint(got) != "[p]" {
		t.Error(got)
	}
}

// TestReused: a file in the inode of another has another ID, however soon it came.
func TestReused(t *testing.T) {
	dir := tempDir(t)
	f := mustOpen(t, dir, Options{})
	seen, inodes := map[nfs.ID]bool{}, map[uint64]bool{}
	for range 1000 {
		// By others, who do not sync: thousands of times within a tick of the clock.
		if err := os.WriteFile(dataFile(dir, "x"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		id := lookup(t, f, "x")
		if seen[id] {
			t.Fatal("an ID came again")
		}
		seen[id], inodes[id.File] = true, true
		if err := os.Remove(dataFile(dir, "x")); err != nil {
			t.Fatal(err)
		}
		want(t, second(f.Attr(ctx, id)), syscall.ESTALE)
		want(t, second(f.ReadAt(ctx, id, make([]byte, 1), 0)), syscall.ESTALE)
	}
	t.Logf("%d files in %d inodes", len(seen), len(inodes))
	st := unix.Statx_t{Ino: 1, Mask: statMask, Btime: unix.StatxTimestamp{Sec: 5}}
	if idOf(&st, []byte{1}) == idOf(&st, []byte{2}) {
		t.Error("the file system's own generation is not in the ID")
	}
}

// TestOutside: files that others make, replace, rename and remove.
func TestOutside(t *testing.T) {
	dir := tempDir(t)
	f := mustOpen(t, dir, Options{})
	a := create(t, f, f.Root(), "a", "old")
	put := func(name, text string) {
		if err := os.WriteFile(dataFile(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	replace := func() {
		put("b", "new")
		if err := os.Rename(dataFile(dir, "b"), dataFile(dir, "a")); err != nil {
			t.Fatal(err)
		}
	}
	replace()
	want(t, second(f.Attr(ctx, a)), syscall.ESTALE) // it is open still
	for _, use := range []func(nfs.ID) error{
		func(id nfs.ID) error { return second(f.Attr(ctx, id)) },
		func(id nfs.ID) error { return second(f.ReadAt(ctx, id, make([]byte, 3), 0)) },
		func(id nfs.ID) error { return second(f.WriteAt(ctx, id, []byte("bad"), 0)) },
		func(id nfs.ID) error { return f.SetAttr(ctx, id, nfs.Change{Size: new(int64)}) },
		func(id nfs.ID) error { return f.Sync(ctx, id) },
	} {
		old := lookup(t, f, "a")
		replace()
		f.cache.drop(old)
		want(t, use(old), syscall.ESTALE)
	}
	b := lookup(t, f, "a")
	if b == a || read(t, f, b) != "new" {
		t.Error("the old file is there")
	}
	if err := os.Rename(dataFile(dir, "a"), dataFile(dir, "c")); err != nil {
		t.Fatal(err)
	}
	if c := lookup(t, f, "c"); c != b || read(t, f, c) != "new" {
		t.Error("a renamed file has another ID")
	}
	if got := names(t, f.ReadDir(ctx, f.Root(), 0)); fmt.Sprint(got) != "[c]" {
		t.Error(got)
	}
	d := mkdir(t, f, f.Root(), "d")
	x := create(t, f, d, "x", "in d")
	if err := os.Rename(dataFile(dir, "d"), dataFile(dir, "e")); err != nil {
		t.Fatal(err)
	}
	if lookup(t, f, "e") != d || lookup(t, f, "e", "x") != x || read(t, f, x) != "in d" {
		t.Error("a renamed directory has another ID")
	}
	if err := os.RemoveAll(dataFile(dir, "e")); err != nil {
		t.Fatal(err)
	}
	want(t, second(f.Lookup(ctx, d, "x")), syscall.ENOENT) // it is open still
	want(t, second(f.Attr(ctx, d)), syscall.ESTALE)
	want(t, second(f.Attr(ctx, x)), syscall.ESTALE)
	// A link from outside gives a file a second name; the file stays the same one.
	if err := os.Link(dataFile(dir, "c"), dataFile(dir, "hard")); err != nil {
		t.Fatal(err)
	}
	if id := lookup(t, f, "hard"); id != b || attr(t, f, id).Links != 2 {
		t.Error("a second name is another file")
	}
	want(t, f.Rename(ctx, f.Root(), "c", f.Root(), "hard"), 0)
	lookup(t, f, "c") // nothing was done
	want(t, f.Remove(ctx, f.Root(), "c"), 0)
	f.cache.drop(b)
	if read(t, f, b) != "new" {
		t.Error("it is gone with one of its names")
	}
}

// TestSpace agrees with df.
func TestSpace(t *testing.T) {
	dir := tempDir(t)
	f := mustOpen(t, dir, Options{})
	s, err := f.Space(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	if s.Total != int64(st.Blocks)*st.Bsize || s.Available <= 0 || s.Free < s.Available || s.Files != int64(st.Files) || s.FreeFiles != int64(st.Ffree) && s.FreeFiles <= 0 {
		t.Errorf("%+v", s)
	}
}

// TestBusy: a folder is open once, and after Close nothing works and nothing is lost.
func TestBusy(t *testing.T) {
	dir := tempDir(t)
	f := mustOpen(t, dir, Options{})
	if _, err := Open(dir, nil, Options{}); !errors.Is(err, ErrBusy) {
		t.Error(err)
	}
	id := create(t, f, f.Root(), "a", "abc")
	f.Close()
	if err := second(f.Attr(ctx, id)); !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
	if err := second(f.Create(ctx, f.Root(), "b", nfs.Creation{})); !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
	if read(t, mustOpen(t, dir, Options{}), id) != "abc" {
		t.Error("lost")
	}
}

// TestMadeWith: what is made has the attributes asked for, by stat.
func TestMadeWith(t *testing.T) {
	dir := tempDir(t)
	f := mustOpen(t, dir, Options{})
	at, mt := day.Add(time.Nanosecond), day.Add(-time.Hour)
	set := nfs.Change{Mode: ptr(uint32(0o4751)), Size: ptr(int64(12345)), Accessed: &at, Modified: &mt}
	if os.Getuid() == 0 {
		set.UID, set.GID = ptr(uint32(1234)), ptr(uint32(5678))
	}
	id, err := f.Create(ctx, f.Root(), "a", nfs.Creation{Set: set})
	want(t, err, 0)
	set.Size = nil
	d, err := f.Mkdir(ctx, f.Root(), "d", set)
	want(t, err, 0)
	for name, id := range map[string]nfs.ID{"a": id, "d": d} {
		var st unix.Stat_t
		if err := unix.Lstat(dataFile(dir, name), &st); err != nil {
			t.Fatal(err)
		}
		a := attr(t, f, id)
		if st.Mode&0o7777 != 0o4751 || set.UID != nil && (st.Uid != 1234 || st.Gid != 5678) || st.Mtim.Nano() != mt.UnixNano() || st.Atim.Nano() != at.UnixNano() {
			t.Errorf("%s: %+v", name, st)
		}
		if a.Mode != 0o4751 || a.UID != st.Uid || a.GID != st.Gid || a.Size != st.Size || a.Used != st.Blocks*512 || a.Changed.UnixNano() != st.Ctim.Nano() {
			t.Errorf("%s: %+v, %+v", name, a, st)
		}
	}
	if attr(t, f, id).Size != 12345 {
		t.Error("size")
	}
	left, err := os.ReadDir(dir + "/new")
	if err != nil || len(left) > 0 {
		t.Error(left, err)
	}
	if os.Getuid() != 0 {
		return
	}
	// A directory with S_ISGID hands down its group.
	want(t, f.SetAttr(ctx, d, nfs.Change{Mode: ptr(uint32(0o2755))}), 0)
	x, y := create(t, f, d, "x", ""), mkdir(t, f, d, "y")
	if a, b := attr(t, f, x), attr(t, f, y); a.GID != 5678 || b.GID != 5678 || b.Mode&0o2000 == 0 || a.Mode&0o2000 != 0 {
		t.Errorf("%+v, %+v", a, b)
	}
}

// TestLeftovers: what a process that was killed had begun to make is cleared away.
func TestLeftovers(t *testing.T) {
	dir := tempDir(t)
	mustOpen(t, dir, Options{}).Close()
	left := []string{"new/1", "new/2", "state.new"}
	if err := errors.Join(os.WriteFile(dir+"/new/1", nil, 0o600), os.Mkdir(dir+"/new/2", 0o700), os.WriteFile(dir+"/state.new", []byte("HFF"), 0o600)); err != nil {
		t.Fatal(err)
	}
	f := mustOpen(t, dir, Options{})
	create(t, f, f.Root(), "a", "") // its first name in new/ is 1
	for _, name := range left {
		if _, err := os.Lstat(dir + "/" + name); !errors.Is(err, os.ErrNotExist) {
			t.Error(name, err)
		}
	}
}

// TestAlwaysThere: a file that is renamed all the time is never stale, whoever looks for it by whichever name, nor is one in a directory that is.
func TestAlwaysThere(t *testing.T) {
	f := mustOpen(t, tempDir(t), Options{OpenFiles: 1}) // so that all is opened anew
	root := f.Root()
	d, e := mkdir(t, f, root, "d"), mkdir(t, f, root, "e")
	x := create(t, f, d, "x", "text")
	var stop atomic.Bool
	var wg, all sync.WaitGroup
	renames, looks := 0, atomic.Int64{}
	wg.Go(func() {
		from, to := d, e
		for ; !stop.Load(); renames++ {
			if err := errors.Join(f.Rename(ctx, from, "x", to, "x"), f.Rename(ctx, root, "d", root, "D"), f.Rename(ctx, root, "D", root, "d")); err != nil {
				t.Error(err)
				return
			}
			from, to = to, from
		}
	})
	for range 3 {
		all.Go(func() {
			for end := time.Now().Add(time.Second); time.Now().Before(end); looks.Add(1) {
				for _, dir := range []nfs.ID{d, e} {
					id, err := f.Lookup(ctx, dir, "x")
					if err == nil && id != x || err != nil && !errors.Is(err, syscall.ENOENT) {
						t.Errorf("%v %v", id, err)
						return
					}
				}
				b := make([]byte, 4)
				if err := errors.Join(second(f.Attr(ctx, x)), second(f.ReadAt(ctx, x, b, 0)), second(f.Attr(ctx, d))); err != nil || string(b) != "text" {
					t.Errorf("%q %v", b, err)
					return
				}
			}
		})
	}
	all.Wait()
	stop.Store(true)
	wg.Wait()
	t.Logf("%d times renamed, %d times looked for", 3*renames, looks.Load())
}
