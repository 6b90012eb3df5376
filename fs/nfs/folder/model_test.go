package folder

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/nfs"
)

// twin does the same to a folder and, by the os package, to a plain directory.
type twin struct {
	t      testing.TB
	r      *rand.Rand
	f      *Folder
	plain  string
	ids    map[string]nfs.ID // path => what it must be
	placed map[string]*disk  // path => content
	gone   []nfs.ID          // removed ones
}

const placedSize = 50_000

func (w *twin) start(keys int) (list []Placed) {
	w.ids, w.placed = map[string]nfs.ID{"": {}}, map[string]*disk{}
	for i := range keys {
		p := Placed{Path: fmt.Sprintf("p%d", i), Key: fmt.Sprint("key", i), Content: newDisk(placedSize), Time: day, Mode: 0o644}
		w.placed[p.Path] = p.Content.(*disk)
		if err := os.WriteFile(w.file(p.Path), make([]byte, placedSize), 0o644); err != nil {
			w.t.Fatal(err)
		}
		list = append(list, p)
	}
	return list
}

func (w *twin) use(f *Folder) {
	w.f = f
	if w.ids[""] == (nfs.ID{}) {
		w.ids[""] = f.Root()
		for p := range w.placed {
			w.ids[p] = lookup(w.t, f, p)
		}
	}
}

func (w *twin) file(p string) string { return filepath.Join(w.plain, p) }

// dir gives some directory.
func (w *twin) dir() string {
	var list []string
	for p := range w.ids {
		if st, err := os.Stat(w.file(p)); err == nil && st.IsDir() {
			list = append(list, p)
		}
	}
	slices.Sort(list)
	return list[w.r.IntN(len(list))]
}

// name is one of a few.
func (w *twin) name() string { return string(rune('a' + w.r.IntN(6))) }

// step does one operation to both.
func (w *twin) step() {
	dir, name := w.dir(), w.name()
	if w.r.IntN(8) == 0 {
		if list := slices.Sorted(func(yield func(string) bool) {
			for p := range w.placed {
				if !yield(p) {
					return
				}
			}
		}); len(list) > 0 {
			dir, name = path.Split(list[w.r.IntN(len(list))])
			dir = strings.TrimSuffix(dir, "/")
		}
	}
	p := path.Join(dir, name)
	switch w.r.IntN(16) {
	case 0, 1, 2, 3:
		w.create(dir, name)
	case 4, 5:
		id, err := w.f.Mkdir(ctx, w.ids[dir], name, nfs.Change{Mode: ptr(uint32(0o700))})
		w.same("mkdir "+p, err, os.Mkdir(w.file(p), 0o700), nil)
		if err == nil {
			w.ids[p] = id
		}
	case 6:
		err := w.f.Remove(ctx, w.ids[dir], name)
		w.same("remove "+p, err, unix.Unlink(w.file(p)), nil)
		w.removed(p, err)
	case 7:
		err := w.f.Rmdir(ctx, w.ids[dir], name)
		w.same("rmdir "+p, err, unix.Rmdir(w.file(p)), nil)
		w.removed(p, err)
	case 8, 9, 10:
		w.rename(p, dir, name)
	case 11:
		w.attrs(p)
	default:
		w.write(p)
	}
}

// same fails when one succeeded and the other did not, or with another error. The folder has those of RFC 1813, listed in other.
func (w *twin) same(what string, got, plain error, other map[syscall.Errno]syscall.Errno) {
	w.t.Helper()
	var a, b syscall.Errno
	if plain != nil && !errors.As(plain, &b) {
		w.t.Fatalf("%s: %v by os", what, plain)
	}
	if o, ok := other[b]; ok {
		b = o
	}
	if errors.As(got, &a); a != b || (got == nil) != (plain == nil) {
		w.t.Fatalf("%s: %v, by os %v", what, got, plain)
	}
}

func (w *twin) removed(p string, err error) {
	if err == nil {
		w.gone = append(w.gone, w.ids[p])
		delete(w.ids, p)
		delete(w.placed, p)
	}
}

func (w *twin) create(dir, name string) {
	p := path.Join(dir, name)
	how := nfs.Creation{Guarded: w.r.IntN(2) == 0, Set: nfs.Change{Mode: ptr(uint32(0o600 + 0o40*w.r.IntN(2)))}}
	flag := os.O_RDWR | os.O_CREATE
	if how.Guarded {
		flag |= os.O_EXCL
	}
	if w.r.IntN(2) == 0 {
		how.Set.Size = ptr(int64(w.r.IntN(3) * 7000))
	}
	_, was := w.ids[p]
	if w.placed[p] != nil && !how.Guarded && how.Set.Size != nil {
		_, err := w.f.Create(ctx, w.ids[dir], name, how)
		want(w.t, err, syscall.EINVAL)
		return
	}
	id, err := w.f.Create(ctx, w.ids[dir], name, how)
	o, perr := os.OpenFile(w.file(p), flag, 0o600)
	if perr == nil {
		if how.Set.Size != nil {
			o.Truncate(*how.Set.Size)
		}
		if !was {
			o.Chmod(os.FileMode(*how.Set.Mode))
		}
		o.Close()
	}
	w.same("create "+p, err, perr, map[syscall.Errno]syscall.Errno{syscall.EISDIR: syscall.EEXIST})
	if err == nil {
		if was && w.ids[p] != id {
			w.t.Fatalf("create %s: opened %v, not %v", p, id, w.ids[p])
		}
		w.ids[p] = id
	}
}

func (w *twin) rename(p, dir, name string) {
	to, as := w.dir(), w.name()
	q := path.Join(to, as)
	err := w.f.Rename(ctx, w.ids[dir], name, w.ids[to], as)
	perr := unix.Rename(w.file(p), w.file(q))
	if errors.Is(err, syscall.EEXIST) && errors.Is(perr, syscall.EINVAL) {
		return // a directory into itself, and where something is already
	}
	w.same("rename "+p+" "+q, err, perr, map[syscall.Errno]syscall.Errno{
		syscall.ENOTEMPTY: syscall.EEXIST, syscall.ENOTDIR: syscall.EEXIST, syscall.EISDIR: syscall.EEXIST,
	})
	if err != nil || p == q {
		return
	}
	if id, ok := w.ids[q]; ok {
		w.gone = append(w.gone, id)
		delete(w.ids, q)
		delete(w.placed, q)
	}
	for _, old := range slices.Collect(func(yield func(string) bool) {
		for x := range w.ids {
			if (x == p || strings.HasPrefix(x, p+"/")) && !yield(x) {
				return
			}
		}
	}) {
		now := q + old[len(p):]
		w.ids[now] = w.ids[old]
		delete(w.ids, old)
		if d := w.placed[old]; d != nil {
			w.placed[now] = d
			delete(w.placed, old)
		}
	}
}

func (w *twin) attrs(p string) {
	id, ok := w.ids[p]
	if !ok || p == "" {
		return
	}
	var c nfs.Change
	st, err := os.Stat(w.file(p))
	if err != nil {
		w.t.Fatal(err)
	}
	mode := uint32(0o700 + w.r.IntN(8)*8)
	at, mt := day.Add(time.Duration(w.r.Int64N(1e18))), day.Add(time.Duration(w.r.Int64N(1e18)))
	c.Mode, c.Accessed, c.Modified, c.UID, c.GID = &mode, &at, &mt, ptr(uint32(os.Getuid())), ptr(uint32(os.Getgid()))
	if !st.IsDir() && w.placed[p] == nil {
		c.Size = ptr(int64(w.r.IntN(30_000)))
		if err := os.Truncate(w.file(p), *c.Size); err != nil {
			w.t.Fatal(err)
		}
	}
	want(w.t, w.f.SetAttr(ctx, id, c), 0)
	if err := errors.Join(os.Chmod(w.file(p), os.FileMode(mode)), os.Chtimes(w.file(p), at, mt)); err != nil {
		w.t.Fatal(err)
	}
	a := attr(w.t, w.f, id)
	if !a.Accessed.Equal(at) || !a.Modified.Equal(mt) || time.Since(a.Changed).Abs() > time.Hour {
		w.t.Fatalf("%s: %+v", p, a)
	}
}

func (w *twin) write(p string) {
	id, ok := w.ids[p]
	if !ok {
		return
	}
	b := make([]byte, w.r.IntN(5000)+1)
	for i := range b {
		b[i] = byte(w.r.Uint32())
	}
	off := w.r.Int64N(60_000)
	if w.placed[p] != nil && off+int64(len(b)) > placedSize {
		n, err := w.f.WriteAt(ctx, id, b, off)
		want(w.t, err, syscall.EFBIG)
		if n != 0 {
			w.t.Fatal(n, "bytes")
		}
		return
	}
	_, err := w.f.WriteAt(ctx, id, b, off)
	o, perr := os.OpenFile(w.file(p), os.O_RDWR, 0)
	if perr == nil {
		defer o.Close()
		_, perr = o.WriteAt(b, off)
	}
	w.same("write "+p, err, perr, nil)
	if err != nil {
		return
	}
	if w.r.IntN(8) == 0 {
		want(w.t, w.f.Sync(ctx, id), 0)
	}
	off = max(0, off-w.r.Int64N(5000))
	x, y := make([]byte, 8000), make([]byte, 8000)
	n, err := w.f.ReadAt(ctx, id, x, off)
	m, perr := o.ReadAt(y, off)
	if n != m || (err == io.EOF) != (perr == io.EOF) || !bytes.Equal(x[:n], y[:m]) {
		w.t.Fatalf("read %s: %d %v, by os %d %v", p, n, err, m, perr)
	}
}

// check compares all of it, and data/ too.
func (w *twin) check(dir string) {
	w.t.Helper()
	seen := 0
	err := filepath.WalkDir(w.plain, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		p, _ := filepath.Rel(w.plain, file)
		if p = strings.TrimPrefix(p, "."); w.ids[p] == (nfs.ID{}) {
			return fmt.Errorf("%q has no id", p)
		}
		seen++
		return w.checkFile(dir, p, file)
	})
	if err != nil {
		w.t.Fatal(err)
	}
	if seen != len(w.ids) {
		w.t.Fatalf("%d files, not %d", seen, len(w.ids))
	}
	for _, id := range w.gone {
		if _, err := w.f.Attr(ctx, id); !errors.Is(err, syscall.ESTALE) {
			w.t.Fatalf("%v was removed: %v", id, err)
		}
	}
}

func (w *twin) checkFile(dir, p, file string) error {
	id := w.ids[p]
	st, err := os.Stat(file)
	if err != nil {
		return err
	}
	a := attr(w.t, w.f, id)
	if a.Mode&0o777 != uint32(st.Mode().Perm()) && p != "" || (a.Kind == nfs.KindDir) != st.IsDir() {
		return fmt.Errorf("%q: %+v, by os %v", p, a, st.Mode())
	}
	if p != "" {
		if got := lookup(w.t, w.f, strings.Split(p, "/")...); got != id {
			return fmt.Errorf("%q: %v, not %v", p, got, id)
		}
	}
	if st.IsDir() {
		var list []string
		entries, err := os.ReadDir(file)
		for _, e := range entries {
			list = append(list, e.Name())
		}
		if got := names(w.t, w.f.ReadDir(ctx, id, 0)); err != nil || !slices.Equal(got, list) {
			return fmt.Errorf("%q: %q, by os %q %v", p, got, list, err)
		}
		return nil
	}
	b, err := os.ReadFile(file)
	if err != nil || read(w.t, w.f, id) != string(b) {
		return fmt.Errorf("%q: other contents than by os, %v", p, err)
	}
	real, err := os.ReadFile(filepath.Join(dir, dataName, p))
	if w.placed[p] != nil {
		if err == nil {
			return fmt.Errorf("%q is in data", p)
		}
		return nil
	}
	if err != nil || !bytes.Equal(b, real) {
		return fmt.Errorf("%q: data has other contents, %v", p, err)
	}
	return nil
}

// TestModel: whatever is done to a folder, with restarts, leaves it as the same by the os package leaves a plain directory.
func TestModel(t *testing.T) {
	steps := 2000
	if testing.Short() {
		steps = 600
	}
	dir, plain := tempDir(t), tempDir(t)
	w := &twin{t: t, r: rand.New(rand.NewPCG(1, 1)), plain: plain}
	list := w.start(60)
	f := mustOpen(t, dir, Options{OpenFiles: 3}, list...)
	w.use(f)
	for i := range steps {
		w.step()
		if i%400 == 399 {
			w.check(dir)
			if w.r.IntN(2) == 0 {
				want(t, f.Close(), 0)
			} else {
				kill(t, f)
			}
			f = mustOpen(t, dir, Options{OpenFiles: 3}, list...)
			w.use(f)
			w.check(dir)
		}
	}
	removed := len(f.Removed())
	if removed != 60-len(w.placed) {
		t.Errorf("%d removed, %d left", removed, len(w.placed))
	}
	t.Logf("%d files and directories at the end, %d removed, %d of them placed", len(w.ids), len(w.gone), removed)
}

// TestParallel: many at once, each with names of its own in directories that all use and somebody renames.
func TestParallel(t *testing.T) {
	const workers = 8
	steps := 150
	if testing.Short() {
		steps = 50
	}
	dir := tempDir(t)
	var list []Placed
	for i := range workers {
		for j := range 2 {
			list = append(list, Placed{
				Path: fmt.Sprintf("d%d/w%d-%d", j, i, j), Key: fmt.Sprint(i, "-", j), Content: newDisk(placedSize), Time: day, Mode: 0o644,
			})
		}
	}
	f := mustOpen(t, dir, Options{OpenFiles: 5}, list...)
	var dirs []nfs.ID
	for i := range 2 {
		dirs = append(dirs, lookup(t, f, fmt.Sprint("d", i)))
	}
	var wg sync.WaitGroup
	var stop atomic.Bool
	var renames int
	wg.Go(func() { // renames the directories
		for i := 0; !stop.Load(); i++ {
			if err := f.Rename(ctx, f.Root(), fmt.Sprintf("d%d", i), f.Root(), fmt.Sprintf("d%d", i+2)); err != nil {
				t.Error(err)
				return
			}
			renames++
		}
	})
	var all sync.WaitGroup
	for i := range workers {
		all.Go(func() { worker(t, f, dirs, i, steps) })
	}
	all.Wait()
	stop.Store(true)
	wg.Wait()
	t.Logf("%d renames of directories meanwhile", renames)
}

// worker uses its own names in two directories, and knows what must be there.
func worker(t *testing.T, f *Folder, dirs []nfs.ID, me, steps int) {
	type at struct {
		dir  int
		name string
	}
	r := rand.New(rand.NewPCG(uint64(me), 3))
	holds := map[at]nfs.ID{}
	text := map[nfs.ID]string{} // what the first bytes are
	for j := range 2 {
		name := fmt.Sprintf("w%d-%d", me, j)
		id, err := f.Lookup(ctx, dirs[j], name)
		if err != nil {
			t.Error(err)
			return
		}
		holds[at{j, name}] = id
	}
	fail := func(what string, x at, err error) bool {
		if err != nil {
			t.Errorf("worker %d: %s %v: %v", me, what, x, err)
		}
		return err != nil
	}
	for i := range steps {
		x := at{r.IntN(2), fmt.Sprintf("w%d-%d", me, r.IntN(4))}
		id, here := holds[x]
		got, err := f.Lookup(ctx, dirs[x.dir], x.name)
		if here && (err != nil || got != id) || !here && !errors.Is(err, syscall.ENOENT) {
			t.Errorf("worker %d: lookup %v: %v %v, must be %v", me, x, got, err, id)
			return
		}
		if !here {
			id, err := f.Create(ctx, dirs[x.dir], x.name, nfs.Creation{Guarded: true})
			if fail("create", x, err) {
				return
			}
			holds[x] = id
			continue
		}
		switch r.IntN(5) {
		case 0:
			y := at{r.IntN(2), fmt.Sprintf("w%d-%d", me, r.IntN(4))}
			if fail("rename", x, f.Rename(ctx, dirs[x.dir], x.name, dirs[y.dir], y.name)) {
				return
			}
			delete(holds, x)
			holds[y] = id
		case 1:
			if fail("remove", x, f.Remove(ctx, dirs[x.dir], x.name)) {
				return
			}
			delete(holds, x)
			if _, err := f.Attr(ctx, id); !errors.Is(err, syscall.ESTALE) {
				t.Errorf("removed: %v", err)
			}
		case 2:
			s := fmt.Sprintf("%d %d", me, i)
			if _, err := f.WriteAt(ctx, id, []byte(s), 0); fail("write", x, err) {
				return
			}
			text[id] = s
		case 3:
			b := make([]byte, len(text[id]))
			if _, err := f.ReadAt(ctx, id, b, 0); fail("read", x, err) || string(b) != text[id] {
				t.Errorf("%q, not %q", b, text[id])
				return
			}
		case 4:
			mine := map[string]nfs.ID{}
			for e, err := range f.ReadDir(ctx, dirs[x.dir], 0) {
				if fail("list", x, err) {
					return
				}
				if strings.HasPrefix(e.Name, fmt.Sprintf("w%d-", me)) {
					mine[e.Name] = e.ID
				}
			}
			for y, id := range holds {
				if y.dir == x.dir && mine[y.name] != id {
					t.Errorf("worker %d: %v is not listed", me, y)
				}
				if y.dir == x.dir {
					delete(mine, y.name)
				}
			}
			if len(mine) > 0 {
				t.Errorf("worker %d: listed too much: %v", me, mine)
			}
		}
	}
}
