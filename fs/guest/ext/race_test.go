package ext

import (
	"bytes"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// TestConcurrent reads one file system in many goroutines, with hardly any cache, and compares with what one reads alone.
func TestConcurrent(t *testing.T) {
	for name, image := range seeds(t) {
		f, err := Open(guesttest.Memory(image), guest.Options{Cache: 8 << 10})
		if err != nil {
			t.Fatal(err)
		}
		guesttest.Conform(t, f)
		want, err := guesttest.WalkFS(f)
		if err != nil {
			t.Fatal(err)
		}
		ino, err := guesttest.Find(f, "sparse")
		if err != nil {
			t.Fatal(err)
		}
		file, err := f.Open(ino)
		if err != nil {
			t.Fatal(err)
		}
		whole := make([]byte, file.Size())
		if _, err := file.ReadAt(whole, 0); err != nil {
			t.Fatal(err)
		}
		var wait sync.WaitGroup
		for g := range uint64(8) {
			wait.Go(func() {
				rng := rand.New(rand.NewPCG(g, 1))
				for range 60 {
					p := make([]byte, rng.IntN(50000))
					off := rng.Int64N(file.Size())
					n, err := file.ReadAt(p, off)
					if err != nil && err != io.EOF || !bytes.Equal(p[:n], whole[off:][:n]) {
						t.Error(name, off, n, err)
					}
				}
				for _, l := range want {
					if _, err := guesttest.Find(f, l.Path+"/none"); err == nil {
						t.Error(l.Path, " has what it has not")
					}
				}
				if got, err := guesttest.WalkFS(f); err != nil || len(guesttest.Diff(want, got)) > 0 {
					t.Error(name, err)
				}
			})
		}
		wait.Wait()
	}
}

// TestWindows reads files in pieces of odd sizes, and makes sure that what is said to be allocated covers all that is not zero.
func TestWindows(t *testing.T) {
	for name, image := range seeds(t) {
		f, err := Open(guesttest.Memory(image), bounds)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range []string{"sparse", "big", "inline"} {
			ino, err := guesttest.Find(f, p)
			if err != nil {
				t.Fatal(err)
			}
			file, err := f.Open(ino)
			if err != nil {
				t.Fatal(err)
			}
			whole, err := io.ReadAll(io.NewSectionReader(file, 0, file.Size()+10))
			if err != nil || int64(len(whole)) != file.Size() {
				t.Fatal(name, p, len(whole), err)
			}
			for _, step := range []int{1, 7, 1023, 1025, 70001} {
				b := make([]byte, step)
				for off := 0; off < len(whole); off += step + len(whole)/300 {
					n, err := file.ReadAt(b, int64(off))
					if want := whole[off:min(off+step, len(whole))]; !bytes.Equal(b[:n], want) || (err == io.EOF) != (n < step) && err != nil {
						t.Fatal(name, p, off, n, err)
					}
				}
			}
			if n, err := file.ReadAt(make([]byte, 1), file.Size()); n != 0 || err != io.EOF {
				t.Error(n, err)
			}
			if _, err := file.ReadAt(make([]byte, 1), -1); err == nil {
				t.Error("a read before the beginning")
			}
			for _, unit := range []int64{1, 512, 65536} {
				left := bytes.Clone(whole)
				for e, err := range file.Allocated(unit) {
					if err != nil || e.Off%unit != 0 || e.End() > file.Size() {
						t.Fatal(e, err)
					}
					clear(left[e.Off:e.End()])
				}
				if !bytes.Equal(left, make([]byte, len(left))) {
					t.Error(name, p, ": data in a hole")
				}
			}
		}
	}
}

// BenchmarkWalk reads all of an image, whose path the environment gives, as a walk of a mount does.
func BenchmarkWalk(b *testing.B) {
	image := os.Getenv("EXT_IMAGE")
	if image == "" {
		b.Skip("needs EXT_IMAGE, the path of an image")
	}
	dev := guesttest.OpenDevice(b, image)
	for b.Loop() {
		f, err := Open(dev, guest.Options{})
		if err != nil {
			b.Fatal(err)
		}
		list, err := guesttest.WalkFS(f)
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(len(list)), "things")
	}
}
