package folder

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fs/nfs"
)

func three() []Placed {
	var list []Placed
	for _, key := range []string{"a", "b", "c"} {
		list = append(list, Placed{Path: "vm/" + key, Key: key, Content: newDisk(1000), Time: day, Mode: 0o600})
	}
	return list
}

// TestPlacedMoves: renames and removals of placed files outlive the process, and a removed one never comes back.
func TestPlacedMoves(t *testing.T) {
	dir, list := tempDir(t), three()
	f := mustOpen(t, dir, Options{}, list...)
	vm := lookup(t, f, "vm")
	a, b, c := lookup(t, f, "vm", "a"), lookup(t, f, "vm", "b"), lookup(t, f, "vm", "c")
	sub := mkdir(t, f, vm, "sub")
	want(t, f.Rename(ctx, vm, "a", sub, "A"), 0)
	want(t, f.Rename(ctx, vm, "b", vm, "c"), 0)         // in place of c
	want(t, f.Rename(ctx, vm, "sub", f.Root(), "s"), 0) // with A in it
	see := func(f *Folder) {
		t.Helper()
		if lookup(t, f, "s", "A") != a || lookup(t, f, "vm", "c") != b {
			t.Error("not where they were put")
		}
		want(t, second(f.Attr(ctx, c)), syscall.ESTALE)
		want(t, second(f.WriteAt(ctx, c, []byte{1}, 0)), syscall.ESTALE)
		want(t, f.Sync(ctx, c), syscall.ESTALE)
		if got := fmt.Sprint(names(t, f.ReadDir(ctx, vm, 0)), f.Removed()); got != "[c] [c]" {
			t.Error(got)
		}
	}
	see(f)
	kill(t, f)
	f = mustOpen(t, dir, Options{}, list...)
	see(f)
	// Without a key, its file is not there; with it, it is where it was.
	f.Close()
	f = mustOpen(t, dir, Options{}, list[1:]...)
	want(t, second(f.Attr(ctx, a)), syscall.ESTALE)
	f.Close()
	f = mustOpen(t, dir, Options{}, list...)
	see(f)
	want(t, f.Remove(ctx, lookup(t, f, "s"), "A"), 0)
	want(t, f.Rmdir(ctx, f.Root(), "s"), 0)
	kill(t, f)
	f = mustOpen(t, dir, Options{}, list...)
	if got := fmt.Sprint(f.Removed(), names(t, f.ReadDir(ctx, f.Root(), 0))); got != "[a c] [vm]" {
		t.Error(got)
	}
}

// TestPlacedAndReal: a placed file in place of one in data/, and the other way round, also if the process dies between the steps.
func TestPlacedAndReal(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(t *testing.T, f *Folder, vm nfs.ID)
		see  string
	}{
		{"placed over real", func(t *testing.T, f *Folder, vm nfs.ID) { want(t, f.Rename(ctx, vm, "a", vm, "real"), 0) }, "[b c real] []"},
		{"placed over real, stopped", func(t *testing.T, f *Folder, vm nfs.ID) {
			want(t, f.commit(edit{f.slot(vm, "a"), moveTo(slot{vm, "real"}, lookup(t, f, "vm", "real"))}), 0)
		}, "[b c real] []"},
		{"real over placed", func(t *testing.T, f *Folder, vm nfs.ID) { want(t, f.Rename(ctx, vm, "real", vm, "a"), 0) }, "[a b c] [a]"},
		{"real over placed, stopped before", func(t *testing.T, f *Folder, vm nfs.ID) {
			id := lookup(t, f, "vm", "real")
			want(t, f.commit(edit{f.slot(vm, "a"), func(e *entry) { e.yields = id }}), 0)
		}, "[a b c real] []"},
		{"real over placed, stopped after", func(t *testing.T, f *Folder, vm nfs.ID) {
			id := lookup(t, f, "vm", "real")
			want(t, f.commit(edit{f.slot(vm, "a"), func(e *entry) { e.yields = id }}), 0)
			if err := os.Rename(dataFile(f.dir, "vm", "real"), dataFile(f.dir, "vm", "a")); err != nil {
				t.Fatal(err)
			}
		}, "[a b c] [a]"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir, list := tempDir(t), three()
			f := mustOpen(t, dir, Options{}, list...)
			vm := lookup(t, f, "vm")
			a, real := lookup(t, f, "vm", "a"), create(t, f, vm, "real", "text")
			c.do(t, f, vm)
			kill(t, f)
			f = mustOpen(t, dir, Options{}, list...)
			if got := fmt.Sprint(names(t, f.ReadDir(ctx, vm, 0)), f.Removed()); got != c.see {
				t.Fatal(got)
			}
			onDisk, _ := os.ReadDir(dataFile(dir, "vm"))
			if f.Removed() != nil { // the real one won
				if lookup(t, f, "vm", "a") != real || read(t, f, real) != "text" {
					t.Error("not the file that was renamed")
				}
				want(t, second(f.Attr(ctx, a)), syscall.ESTALE)
				return
			}
			attr(t, f, a)
			if f.slot(vm, "real") != nil && len(onDisk) > 0 {
				t.Error("what was replaced is in data still:", onDisk)
			}
			// Nothing hidden appears when the placed one goes.
			for _, name := range names(t, f.ReadDir(ctx, vm, 0)) {
				want(t, f.Remove(ctx, vm, name), 0)
				want(t, second(f.Lookup(ctx, vm, name)), syscall.ENOENT)
			}
		})
	}
}

// TestOrder: what Open must know of a rename that is interrupted is on the disk before a name is changed.
func TestOrder(t *testing.T) {
	for _, c := range []struct {
		from, to string
		said     func(e entry) nfs.ID
	}{
		{"real", "a", func(e entry) nfs.ID { return e.yields }},
		{"a", "real", func(e entry) nfs.ID { return e.over }},
	} {
		dir := tempDir(t)
		f := mustOpen(t, dir, Options{}, three()...)
		vm := lookup(t, f, "vm")
		real := create(t, f, vm, "real", "")
		done := make(chan error, 1)
		f.mu.RLock() // no name can be changed
		go func() { done <- f.Rename(ctx, vm, c.from, vm, c.to) }()
		said := false
		for end := time.Now().Add(10 * time.Second); !said && time.Now().Before(end); {
			list, err := loadState(dir)
			want(t, errors.Join(err, second(os.Stat(dataFile(dir, "vm", "real")))), 0)
			said = slices.ContainsFunc(list, func(e entry) bool { return e.key == "a" && c.said(e) == real })
		}
		f.mu.RUnlock()
		want(t, <-done, 0)
		if !said {
			t.Errorf("%s to %s: nothing was said before", c.from, c.to)
		}
	}
}

// TestPlacedTimes: they move with writes, what is set stays, and they never go back.
func TestPlacedTimes(t *testing.T) {
	dir, list := tempDir(t), three()
	c := &clock{t: day.Add(time.Hour)}
	f := mustOpen(t, dir, Options{Now: c.now}, list...)
	id := lookup(t, f, "vm", "a")
	last := attr(t, f, id)
	state, _ := os.ReadFile(filepath.Join(dir, stateName))
	write := func() {
		t.Helper()
		if _, err := f.WriteAt(ctx, id, []byte("x"), 5); err != nil {
			t.Fatal(err)
		}
		a := attr(t, f, id)
		if !a.Modified.After(last.Modified) || !a.Changed.After(last.Changed) {
			t.Fatalf("time stood still or went back: %v, was %v", a.Modified, last.Modified)
		}
		last = a
	}
	for range 100 {
		write()
		c.add(time.Millisecond)
	}
	if !last.Modified.Equal(c.now().Add(-time.Millisecond)) {
		t.Error("not the time of the clock:", last.Modified, c.now())
	}
	if now, _ := os.ReadFile(filepath.Join(dir, stateName)); bytes.Equal(now, state) {
		t.Error("nothing was written down before the first write was answered")
	}
	for range 5 { // as often as it dies
		kill(t, f)
		c.add(-time.Hour) // and if the clock goes back
		f = mustOpen(t, dir, Options{Now: c.now}, list...)
		if a := attr(t, f, id); a.Modified.Before(last.Modified) || a.Modified.Sub(last.Modified) > ahead+time.Second {
			t.Fatal("after a crash", a.Modified, "was", last.Modified)
		}
		write()
		c.add(time.Hour + time.Minute)
		write()
	}
	c.add(time.Hour)
	write()
	want(t, f.Close(), 0)
	f = mustOpen(t, dir, Options{Now: c.now}, list...)
	if a := attr(t, f, id); a != last {
		t.Errorf("after Close %+v, was %+v", a, last)
	}
	set := nfs.Change{Modified: ptr(day.Add(-time.Hour)), Accessed: ptr(day.Add(-time.Minute)), Mode: ptr(uint32(0o640)), UID: ptr(uint32(7)), GID: ptr(uint32(8))}
	c.add(time.Second)
	want(t, f.SetAttr(ctx, id, set), 0)
	kill(t, f)
	f = mustOpen(t, dir, Options{Now: c.now}, list...)
	a := attr(t, f, id)
	if !a.Modified.Equal(*set.Modified) || !a.Accessed.Equal(*set.Accessed) || a.Mode != 0o640 || a.UID != 7 || a.GID != 8 || !a.Changed.After(last.Changed) {
		t.Errorf("after SetAttr %+v", a)
	}
}

// TestPlacedTimesParallel: the times of one file move on while several write to it and others set them.
func TestPlacedTimesParallel(t *testing.T) {
	dir, list := tempDir(t), three()
	f := mustOpen(t, dir, Options{}, list...)
	id := lookup(t, f, "vm", "a")
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			last := time.Time{}
			for j := range 300 {
				var err error
				if j%100 == 50 && i == 0 {
					err = f.SetAttr(ctx, id, nfs.Change{Mode: ptr(uint32(j))})
				} else {
					_, err = f.WriteAt(ctx, id, []byte("abc"), 7)
				}
				a, aerr := f.Attr(ctx, id)
				if err := errors.Join(err, aerr); err != nil || !a.Changed.After(last) {
					t.Errorf("%v after %v: %v", a.Changed, last, err)
					return
				}
				last = a.Changed
			}
		})
	}
	wg.Wait()
}

// TestTimeWaits: while a change of a placed file is written down its time does not move, for what is written would be behind then.
func TestTimeWaits(t *testing.T) {
	f := mustOpen(t, tempDir(t), Options{}, three()...)
	id := lookup(t, f, "vm", "a")
	want(t, second(f.WriteAt(ctx, id, []byte("a"), 0)), 0) // from now on the ceiling is high
	before, calls := attr(t, f, id).Changed, 0
	wrote := make(chan error, 1)
	want(t, f.commit(edit{f.byID[id], func(e *entry) {
		if calls++; calls > 1 {
			return
		}
		go func() { wrote <- second(f.WriteAt(ctx, id, []byte("b"), 0)) }()
		select {
		case <-wrote:
			t.Error("a write was answered")
		case <-time.After(50 * time.Millisecond):
		}
		if now := attr(t, f, id).Changed; !now.Equal(before) {
			t.Error("the time moved")
		}
	}}), 0)
	want(t, <-wrote, 0)
	if now := attr(t, f, id).Changed; !now.After(before) {
		t.Error("the time stood still")
	}
}

// TestPlacedRefused: lists of placed files that make no sense.
func TestPlacedRefused(t *testing.T) {
	d := newDisk(10)
	for name, list := range map[string][]Placed{
		"same key":   {{Path: "a", Key: "k", Content: d}, {Path: "b", Key: "k", Content: d}},
		"same path":  {{Path: "a", Key: "k", Content: d}, {Path: "a", Key: "l", Content: d}},
		"no key":     {{Path: "a", Content: d}},
		"no path":    {{Key: "k", Content: d}},
		"out of it":  {{Path: "../a", Key: "k", Content: d}},
		"absolute":   {{Path: "a//b", Key: "k", Content: d}},
		"no content": {{Path: "a", Key: "k"}},
		"in a file":  {{Path: "f/a", Key: "k", Content: d}},
		"on a file":  {{Path: "f", Key: "k", Content: d}},
		"by a link":  {{Path: "l/a", Key: "k", Content: d}},
	} {
		dir := tempDir(t)
		if err := errors.Join(os.Mkdir(dataFile(dir), 0o755), os.WriteFile(dataFile(dir, "f"), nil, 0o644), os.Symlink("..", dataFile(dir, "l"))); err != nil {
			t.Fatal(err)
		}
		if f, err := Open(dir, list, Options{}); err == nil {
			f.Close()
			t.Errorf("%s: opened", name)
		}
		mustOpen(t, dir, Options{}) // nothing was left locked
	}
}

// TestPlacedFlush: Sync is the Flush of a content, with its error.
func TestPlacedFlush(t *testing.T) {
	d := newDisk(1000)
	f := mustOpen(t, tempDir(t), Options{}, Placed{Path: "a", Key: "a", Content: d, Time: day})
	id := lookup(t, f, "a")
	if _, err := f.WriteAt(ctx, id, []byte("abc"), 10); err != nil {
		t.Fatal(err)
	}
	if d.flushed != nil {
		t.Error("flushed without being asked")
	}
	want(t, f.Sync(ctx, id), 0)
	if !slices.Equal(d.flushed[10:13], []byte("abc")) {
		t.Error("not flushed")
	}
	d.flush = syscall.ENOSPC
	want(t, f.Sync(ctx, id), syscall.ENOSPC)
}

// TestCopied: in a copy of a folder, where all inodes are others, the placed files are where they were.
func TestCopied(t *testing.T) {
	dir, list := tempDir(t), three()
	f := mustOpen(t, dir, Options{}, list...)
	sub := mkdir(t, f, lookup(t, f, "vm"), "sub")
	a := lookup(t, f, "vm", "a")
	want(t, f.Rename(ctx, lookup(t, f, "vm"), "a", sub, "A"), 0)
	want(t, f.Rename(ctx, f.Root(), "vm", f.Root(), "VM"), 0)
	f.Close()
	other := tempDir(t)
	if err := os.CopyFS(filepath.Join(other, "c"), os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	g := mustOpen(t, filepath.Join(other, "c"), Options{}, list...)
	if lookup(t, g, "VM", "sub", "A") != a {
		t.Error("not found")
	}
}

// TestDamagedState: a state that was not written by this program is refused, and left alone.
func TestDamagedState(t *testing.T) {
	dir, list := tempDir(t), three()
	mustOpen(t, dir, Options{}, list...).Close()
	name := filepath.Join(dir, stateName)
	good, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for i := range good {
		bad := slices.Clone(good)
		bad[i] ^= 1
		if _, err := decodeState(bad); !errors.Is(err, ErrDamaged) {
			t.Fatalf("byte %d: %v", i, err)
		}
	}
	if err := os.WriteFile(name, good[:len(good)-1], 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, list, Options{}); !errors.Is(err, ErrDamaged) {
		t.Error(err)
	}
	if now, _ := os.ReadFile(name); !bytes.Equal(now, good[:len(good)-1]) {
		t.Error("it was changed")
	}
}

// FuzzState: no state makes the decoder panic, and what it takes is what was written.
func FuzzState(f *testing.F) {
	f.Add(encodeState(nil))
	f.Add(encodeState([]entry{{key: "k", at: slot{nfs.ID{File: 1, Generation: 2}, "n"}, path: "a/b", ceiling: 3, removed: true}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= stateHead { // else the checksum keeps out everything
			b = slices.Clone(b)
			copy(b, stateMagic)
			copy(b[len(stateMagic):], sumOf(b[stateHead:]))
		}
		list, err := decodeState(b)
		if err != nil {
			return
		}
		if !bytes.Equal(encodeState(list), b) {
			t.Error("it would be written otherwise")
		}
	})
}

// TestNameAlwaysThere: a name at which placed files and others replace each other is always found and listed.
func TestNameAlwaysThere(t *testing.T) {
	var list []Placed
	for i := range 20 {
		list = append(list, Placed{Path: fmt.Sprint("p", i), Key: fmt.Sprint(i), Content: newDisk(10), Time: day})
	}
	f := mustOpen(t, tempDir(t), Options{}, list...)
	root := f.Root()
	create(t, f, root, "x", "")
	stop := make(chan bool)
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := f.Lookup(ctx, root, "x"); err != nil {
					t.Errorf("lookup %d: %v", n, err)
					return
				}
				if n%10 != 0 {
					continue
				}
				found := false
				for e, err := range f.ReadDir(ctx, root, 0) {
					found = found || err == nil && e.Name == "x"
				}
				if !found {
					t.Error("not listed")
					return
				}
			}
		})
	}
	for i := range list {
		_, err := f.Create(ctx, root, "y", nfs.Creation{})
		want(t, errors.Join(err, f.Rename(ctx, root, fmt.Sprint("p", i), root, "x"), f.Rename(ctx, root, "y", root, "x")), 0)
	}
	close(stop)
	wg.Wait()
}
