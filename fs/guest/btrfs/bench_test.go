package btrfs

import (
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// BenchmarkWalk walks and hashes the image that HOLDFAST_BTRFS names, or a small one.
func BenchmarkWalk(b *testing.B) {
	image := os.Getenv("HOLDFAST_BTRFS")
	if image == "" {
		if _, err := exec.LookPath("mkfs.btrfs"); err != nil {
			b.Skip("needs mkfs.btrfs")
		}
		image = filepath.Join(b.TempDir(), "disk")
		root := b.TempDir()
		if _, err := guesttest.Fill(root, guesttest.Tree{Seed: 1, Files: 2000, Names: 500, Big: 48 << 20, NoHuge: true}); err != nil {
			b.Skip(err)
		}
		if out, err := exec.Command("mkfs.btrfs", "-q", "--rootdir", root, image).CombinedOutput(); err != nil {
			b.Skip(string(out))
		}
	}
	n := 0
	for b.Loop() {
		fs := open(b, image, guest.Options{})
		list, err := guesttest.WalkFS(fs)
		if err != nil {
			b.Fatal(err)
		}
		n = len(list)
	}
	b.ReportMetric(float64(n)*float64(b.N)/b.Elapsed().Seconds(), "entries/s")
}

// TestConcurrent asks for all from many goroutines, with a cache that holds little.
func TestConcurrent(t *testing.T) {
	m := hostile(t)
	fs, err := Open(m, guest.Options{Cache: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	guesttest.Conform(t, fs)
	want, err := guesttest.WalkFS(fs)
	if err != nil {
		t.Fatal(err)
	}
	var wait sync.WaitGroup
	for range 8 {
		wait.Go(func() {
			got, err := guesttest.WalkFS(fs)
			if diffs := guesttest.Diff(want, got); err != nil || len(diffs) > 0 {
				t.Error(err, diffs)
			}
		})
	}
	wait.Wait()
}
