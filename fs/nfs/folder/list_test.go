package folder

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fs/nfs"
)

// fill makes files from outside, which costs no sync.
func fill(t testing.TB, dir string, n int) {
	t.Helper()
	for i := range n {
		if err := os.WriteFile(dataFile(dir, fmt.Sprint("file", i)), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// pages lists a directory in pages, as a client does that gets no more at once. between gives the folder for the next one.
func pages(f *Folder, dir nfs.ID, size int, between func() *Folder) (list []nfs.Entry, err error) {
	for after := uint64(0); ; {
		n := 0
		for e, err := range f.ReadDir(ctx, dir, after) {
			if err != nil {
				return list, err
			}
			list = append(list, e)
			after = e.Cookie
			if n++; n == size {
				break
			}
		}
		if n < size {
			return list, nil
		}
		if between != nil {
			f = between()
		}
	}
}

// TestPages: 10,000 entries come once each, also when the process is killed between the pages and others come and go.
func TestPages(t *testing.T) {
	n := 10_000
	if testing.Short() {
		n = 2000
	}
	dir := tempDir(t)
	f := mustOpen(t, dir, Options{})
	fill(t, dir, n)
	start := time.Now()
	plain, err := pages(f, f.Root(), 100, nil)
	if err != nil || len(plain) != n {
		t.Fatal(len(plain), err)
	}
	first := time.Since(start)
	start = time.Now()
	if _, err = pages(f, f.Root(), n+1, nil); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d entries in pages of 100: %v, at once: %v", n, first, time.Since(start))
	last := uint64(0)
	for _, e := range plain {
		if e.Cookie <= last || e.ID != lookup(t, f, e.Name) {
			t.Fatalf("%+v after %d", e, last)
		}
		last = e.Cookie
	}
	r := rand.New(rand.NewPCG(1, 1))
	turn := 0
	list, err := pages(f, f.Root(), 500, func() *Folder {
		for range 20 {
			i := r.IntN(n/2) * 2 // odd ones stay
			os.Remove(dataFile(dir, fmt.Sprint("file", i)))
			os.WriteFile(dataFile(dir, fmt.Sprint("new", r.IntN(n))), nil, 0o644)
		}
		if turn++; turn%5 == 0 {
			kill(t, f)
			f = mustOpen(t, dir, Options{})
		}
		return f
	})
	if err != nil {
		t.Fatal(err)
	}
	count := map[string]int{}
	for _, e := range list {
		if count[e.Name]++; count[e.Name] > 1 {
			t.Errorf("%s comes twice", e.Name)
		}
	}
	for i := 1; i < n; i += 2 {
		if count[fmt.Sprint("file", i)] != 1 {
			t.Fatalf("file%d is not listed", i)
		}
	}
}

// TestListedWhileChanged: what is there all the time is listed once by everybody while others change the directory through the folder.
func TestListedWhileChanged(t *testing.T) {
	dir := tempDir(t)
	var placed []Placed
	for i := range 20 {
		placed = append(placed, Placed{Path: fmt.Sprint("stay-p", i), Key: fmt.Sprint(i), Content: newDisk(1), Time: day})
	}
	for i := range 60 {
		placed = append(placed, Placed{Path: fmt.Sprint("stay-q", i), Key: fmt.Sprint("q", i), Content: newDisk(1), Time: day})
	}
	placed = append(placed, Placed{Path: "go-p", Key: "go", Content: newDisk(1), Time: day})
	f := mustOpen(t, dir, Options{OpenFiles: 4}, placed...)
	for i := range 300 {
		if err := os.WriteFile(dataFile(dir, fmt.Sprint("stay", i)), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var wg sync.WaitGroup
	var stop atomic.Bool
	for i := range 2 {
		wg.Go(func() {
			a, b := fmt.Sprint("go", i), fmt.Sprint("gone", i)
			for !stop.Load() {
				_, err := f.Create(ctx, f.Root(), a, nfs.Creation{Guarded: true})
				if err = errors.Join(err, f.Rename(ctx, f.Root(), a, f.Root(), b), f.Remove(ctx, f.Root(), b)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Go(func() {
		for i := 0; !stop.Load(); i++ {
			from, to := "go-p", "went-p"
			if i%2 == 1 {
				from, to = to, from
			}
			if err := f.Rename(ctx, f.Root(), from, f.Root(), to); err != nil {
				t.Error(err)
				return
			}
		}
	})
	wg.Go(func() { // replaces placed files by others
		for i := 0; i < 60; i++ {
			_, err := f.Create(ctx, f.Root(), "go-q", nfs.Creation{Guarded: true})
			if err = errors.Join(err, f.Rename(ctx, f.Root(), "go-q", f.Root(), fmt.Sprint("stay-q", i))); err != nil {
				t.Error(err)
				return
			}
		}
	})
	var all sync.WaitGroup
	for range 3 {
		all.Go(func() {
			for range 100 {
				list, err := pages(f, f.Root(), 50, nil)
				stay := map[string]int{}
				for _, e := range list {
					if strings.HasPrefix(e.Name, "stay") {
						stay[e.Name]++
					}
				}
				for name, n := range stay {
					if n != 1 {
						t.Errorf("%s %d times", name, n)
					}
				}
				if err != nil || len(stay) != 380 {
					t.Errorf("%d listed, %v", len(stay), err)
				}
			}
		})
	}
	all.Wait()
	stop.Store(true)
	wg.Wait()
}

// TestFreshListing: a listing that begins shows what was made before it, however often others list.
func TestFreshListing(t *testing.T) {
	f := mustOpen(t, tempDir(t), Options{Now: (&clock{t: day}).now})
	for i := range 30 {
		create(t, f, f.Root(), fmt.Sprint(i), "")
		list, err := pages(f, f.Root(), 4, nil)
		if err != nil || len(list) != i+1 {
			t.Fatal(len(list), err)
		}
	}
}

// TestLists: what is kept is bounded, and the listing of a directory that began last.
func TestLists(t *testing.T) {
	var l lists
	d := nfs.ID{File: 1}
	first, last := l.begin(), l.begin()
	l.put(listing{dir: d, seq: last, at: day, lines: make([]line, 2)})
	l.put(listing{dir: d, seq: first, at: day, lines: make([]line, 1)})
	if lines, ok := l.get(d, day); !ok || len(lines) != 2 {
		t.Error(len(lines), ok)
	}
	if _, ok := l.get(d, day.Add(listAge)); ok {
		t.Error("an old one")
	}
	for i := range 100 {
		l.put(listing{dir: nfs.ID{File: uint64(i)}, seq: l.begin(), at: day, lines: make([]line, i*1000)})
		sum := 0
		for _, x := range l.kept {
			sum += len(x.lines)
		}
		if sum > maxLines || len(l.kept) > maxLists || len(l.kept) == 0 {
			t.Fatal(sum, len(l.kept))
		}
	}
	l.put(listing{dir: d, seq: l.begin(), at: day, lines: make([]line, maxLines+1)})
	if len(l.kept) != 0 {
		t.Error("too large a one is kept")
	}
}

// TestBadCookies: a cookie that was never given, and one of another directory.
func TestBadCookies(t *testing.T) {
	f := mustOpen(t, tempDir(t), Options{})
	d := mkdir(t, f, f.Root(), "d")
	create(t, f, d, "x", "")
	create(t, f, f.Root(), "x", "")
	cookies := []uint64{1, 2, 1 << 16, 12345, 1 << 63, 1<<64 - 1}
	for e := range f.ReadDir(ctx, f.Root(), 0) {
		if e.Name == "x" {
			cookies = append(cookies, e.Cookie, e.Cookie+1, e.Cookie+1<<16)
		}
	}
	for _, c := range cookies {
		for _, err := range f.ReadDir(ctx, d, c) {
			want(t, err, syscall.EINVAL)
		}
	}
	for e := range f.ReadDir(ctx, d, 0) { // of what was removed it is good still
		want(t, f.Remove(ctx, d, "x"), 0)
		for e, err := range f.ReadDir(ctx, d, e.Cookie) {
			t.Error(e, err)
		}
	}
}

// TestPlaces: names of the same hash have places of their own.
func TestPlaces(t *testing.T) {
	var names []string
	for i := range 1000 {
		names = append(names, fmt.Sprint(i))
	}
	weak := func(name string) uint64 { return hashOf(name)%50 + 1 }
	lines := placesOf(append(names, names...), weak)
	if len(lines) != len(names) {
		t.Fatal(len(lines))
	}
	var got []string
	for i, l := range lines {
		got = append(got, l.name)
		if i > 0 && l.place <= lines[i-1].place {
			t.Fatal("order", i)
		}
	}
	slices.Sort(got)
	slices.Sort(names)
	if !slices.Equal(got, names) {
		t.Error("not all names")
	}
}

// TestMany: 20,000 files in 200 directories are found again.
func TestMany(t *testing.T) {
	dirs, files := 200, 100
	if testing.Short() {
		files = 10
	}
	dir := tempDir(t)
	mustOpen(t, dir, Options{}).Close()
	for i := range dirs {
		d := dataFile(dir, fmt.Sprint(i%14), fmt.Sprint(i))
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
		for j := range files {
			if err := os.WriteFile(fmt.Sprint(d, "/", j), nil, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	start := time.Now()
	f := mustOpen(t, dir, Options{})
	first := time.Since(start)
	ids := map[string]nfs.ID{}
	for i := range dirs {
		d := lookup(t, f, fmt.Sprint(i%14), fmt.Sprint(i))
		for e, err := range f.ReadDir(ctx, d, 0) {
			if err != nil {
				t.Fatal(err)
			}
			ids[fmt.Sprint(i, "/", e.Name)] = e.ID
		}
	}
	seen := map[nfs.ID]bool{}
	for _, id := range ids {
		seen[id] = true
	}
	if len(ids) != dirs*files || len(seen) != dirs*files {
		t.Fatal(len(ids), len(seen))
	}
	f.Close()
	f = mustOpen(t, dir, Options{})
	start = time.Now()
	for name, id := range ids {
		if _, err := f.Attr(ctx, id); err != nil {
			t.Fatal(name, err)
		}
	}
	t.Logf("Open %v, Attr of %d files in random order %v", first, len(ids), time.Since(start))
}
