//go:build linux

package reader_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/backup/imagefile"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/test/reader"
)

// TestReadsSparseFiles backs up raw files whose chunk maps have two to four
// levels, and compares what the reader finds with the file's own data.
func TestReadsSparseFiles(t *testing.T) {
	for _, c := range []struct {
		chunk int
		size  int64
	}{{64 << 10, 64<<30 + 4097}, {128 << 10, 3 << 40}, {4 << 20, 6<<40 - 512}, {64 << 10, 16<<20 + 1}} {
		t.Run(fmt.Sprintf("chunk %d size %d", c.chunk, c.size), func(t *testing.T) {
			t.Parallel()
			name := filepath.Join(t.TempDir(), "disk.raw")
			f, err := os.Create(name)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := f.Truncate(c.size); err != nil {
				t.Skipf("no file of %d bytes here: %v", c.size, err)
			}
			dir := t.TempDir()
			repo := makeRepo(t, dir, store.InitOptions{ChunkSize: c.chunk})
			rnd := rand.New(rand.NewPCG(8, uint64(c.size)))
			for range 3 {
				writeAround(t, f, c.size, rnd)
				snap, err := imagefile.New(imagefile.VM{Name: "vm", Files: []string{name}}).Freeze(t.Context(), "vm")
				if err != nil {
					t.Fatal(err)
				}
				p, err := backup.Run(t.Context(), repo, snap, backup.Options{})
				if err != nil {
					t.Fatal(err)
				}
				snap.Close()
				r, err := reader.Open(os.DirFS(dir), reader.Options{Passphrase: secret})
				if err != nil {
					t.Fatal(err)
				}
				wantFile(t, r, p.ID, f)
			}
		})
	}
}

// writeAround writes at the ends and at the borders of chunks and pages.
func writeAround(t *testing.T, f *os.File, size int64, rnd *rand.Rand) {
	t.Helper()
	b := make([]byte, 5000)
	for _, off := range []int64{0, 16<<20 - 100, 1<<30 - 4096, 32 << 30, size / 2, size - 1, rnd.Int64N(size), rnd.Int64N(size)} {
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		if off >= size {
			continue
		}
		if _, err := f.WriteAt(b[:min(int64(len(b)), size-off)], off); err != nil {
			t.Fatal(err)
		}
	}
}

// wantFile compares a point's only disk with a sparse file: what the reader gives
// must be equal, and what it leaves out must be zeros in the file.
func wantFile(t *testing.T, r *reader.Repo, id store.PointID, f *os.File) {
	t.Helper()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range r.Points {
		if p.ID != id.String() {
			continue
		}
		d, err := p.Disk("disk0")
		if err != nil || d.Size != size {
			t.Fatalf("%d bytes, %v", d.Size, err)
		}
		var done int64
		err = r.Walk(d, func(off int64, got []byte) error {
			if err := wantZeros(f, done, off); err != nil {
				return err
			}
			want := make([]byte, len(got))
			if _, err := f.ReadAt(want, off); err != nil {
				return err
			}
			if !bytes.Equal(got, want) {
				return fmt.Errorf("wrong data at %d", off)
			}
			done = off + int64(len(got))
			return nil
		})
		if err == nil {
			err = wantZeros(f, done, size)
		}
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Fatalf("there is no point %s", id)
}

// wantZeros checks that a file has nothing but zeros in a range, skipping holes.
func wantZeros(f *os.File, from, to int64) error {
	const seekData, seekHole = 3, 4 // lseek(2)
	buf := make([]byte, 1<<20)
	for at := from; at < to; {
		data, err := f.Seek(at, seekData)
		if errors.Is(err, syscall.ENXIO) || data >= to {
			return nil
		}
		if err != nil {
			return err
		}
		hole, err := f.Seek(data, seekHole)
		if err != nil {
			return err
		}
		for at = data; at < min(hole, to); {
			n, err := f.ReadAt(buf[:min(int64(len(buf)), min(hole, to)-at)], at)
			if err != nil {
				return err
			}
			for i, c := range buf[:n] {
				if c != 0 {
					return fmt.Errorf("data at %d was left out", at+int64(i))
				}
			}
			at += int64(n)
		}
	}
	return nil
}
