package xfs

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// TestLookupLarge finds names in a directory of 100,000 with few reads, and continues a listing of it anywhere.
func TestLookupLarge(t *testing.T) {
	const names = 100000
	v := variant{"large directory", nil, 600 << 20, tiny}
	image := v.empty(t)
	dir, unmount := guesttest.Mount(t, image, "xfs", "rw")
	if err := os.WriteFile(dir+"/file", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for i := range names {
		// Links are quicker to make than files.
		if err := os.Link(dir+"/file", fmt.Sprintf("%s/entry number %d", dir, i)); err != nil {
			t.Fatal(err)
		}
	}
	unmount()
	dev := &guesttest.Counted{Device: guesttest.OpenDevice(t, image)}
	for _, i := range []int{0, 1, 777, 31415, 99998, 99999} {
		fs, err := Open(dev, guest.Options{})
		if err != nil {
			t.Fatal(err)
		}
		before := dev.Reads.Load()
		ino, err := fs.Lookup(fs.Root(), fmt.Sprint("entry number ", i))
		if n := dev.Reads.Load() - before; err != nil || n > 8 {
			t.Errorf("entry %d: inode %d in %d reads, %v", i, ino, n, err)
		}
		if _, err := fs.Lookup(fs.Root(), fmt.Sprint("no entry ", i)); err == nil {
			t.Error("a name that is not there was found")
		}
	}
	fs, _ := Open(dev, guest.Options{})
	before := dev.Reads.Load()
	for i := range names {
		if _, err := fs.Lookup(fs.Root(), fmt.Sprint("entry number ", i)); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d lookups in %d reads", names, dev.Reads.Load()-before)
	resumed(t, fs, names+1)
}

// resumed lists a directory in pieces.
func resumed(t *testing.T, fs *FS, want int) {
	t.Helper()
	seen, next := map[string]bool{}, uint64(0)
	for more := true; more; {
		more = false
		n := 0
		for e, err := range fs.ReadDir(fs.Root(), next) {
			if err != nil || seen[e.Name] {
				t.Fatalf("%q again, or %v", e.Name, err)
			}
			seen[e.Name], next = true, e.Next
			if n++; n == 1000 {
				more = true
				break
			}
		}
	}
	if len(seen) != want {
		t.Errorf("%d names of %d", len(seen), want)
	}
}

// TestLookupAll looks up every name that a listing has, in all forms of directories, and where the index is damaged.
func TestLookupAll(t *testing.T) {
	disk := goldenDisk(t)
	fs, err := Open(disk, guest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	paths := 0
	for _, l := range goldenTruth(t) {
		if _, err := guesttest.Find(fs, l.Path); err != nil {
			t.Error(err)
		}
		paths++
	}
	for _, name := range []string{"", ".", "..", "churn/x", strings.Repeat("n", 300), "none"} {
		if ino, err := fs.Lookup(fs.Root(), name); err == nil {
			t.Errorf("%q is inode %d", name, ino)
		}
	}
	guesttest.Conform(t, fs)
	if paths < 200 {
		t.Errorf("only %d paths", paths)
	}
}

// TestConcurrent asks one file system from many goroutines, with a cache that is too small.
func TestConcurrent(t *testing.T) {
	fs, err := Open(goldenDisk(t), guest.Options{Cache: 20000})
	if err != nil {
		t.Fatal(err)
	}
	want := goldenTruth(t)
	var all sync.WaitGroup
	for range 6 {
		all.Go(func() {
			got, err := guesttest.WalkFS(fs)
			if err != nil {
				t.Error(err)
			}
			for _, d := range guesttest.Diff(want, got) {
				t.Error(d)
			}
		})
	}
	all.Wait()
}

// BenchmarkWalk walks an image and reads everything in it; XFS_IMAGE names another than the golden one.
func BenchmarkWalk(b *testing.B) {
	var dev guest.Device = goldenDisk(b)
	if name := os.Getenv("XFS_IMAGE"); name != "" {
		dev = guesttest.OpenDevice(b, name)
	}
	b.ReportAllocs()
	entries, bytes := 0, int64(0)
	for b.Loop() {
		fs, err := Open(dev, guest.Options{})
		if err != nil {
			b.Fatal(err)
		}
		entries, bytes = 0, 0
		var visit func(ino guest.Ino)
		buf := make([]byte, 256<<10)
		visit = func(ino guest.Ino) {
			for e, err := range fs.ReadDir(ino, 0) {
				if err != nil {
					b.Fatal(err)
				}
				st, err := fs.Stat(e.Ino)
				if err != nil {
					b.Fatal(err)
				}
				entries++
				if f, err := fs.Open(e.Ino); err == nil && st.Size < 256<<20 {
					n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, io.NewSectionReader(f, 0, st.Size), buf)
					if bytes += n; err != nil {
						b.Fatal(err)
					}
				}
				if st.IsDir() {
					visit(e.Ino)
				}
			}
		}
		visit(fs.Root())
	}
	b.ReportMetric(float64(entries)*float64(b.N)/b.Elapsed().Seconds(), "entries/s")
	b.SetBytes(bytes)
}
