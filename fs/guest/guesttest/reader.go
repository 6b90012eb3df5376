package guesttest

import (
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"sync/atomic"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// Open opens an image with a reader's Open.
func Open[F guest.FS](t testing.TB, open func(guest.Device, guest.Options) (F, error), image string, opt guest.Options) F {
	t.Helper()
	f, err := open(OpenDevice(t, image), opt)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// SameFS fails the test when a reader does not show what want says. It gives what it does show.
func SameFS(t *testing.T, want []Line, f guest.FS, ignore ...string) (got []Line) {
	t.Helper()
	got, err := WalkFS(f)
	if err != nil {
		t.Fatal(err)
	}
	Same(t, want, got, ignore...)
	return got
}

// Memory is a disk in memory.
type Memory []byte

// Size implements guest.Device.
func (m Memory) Size() int64 { return int64(len(m)) }

// ReadAt implements io.ReaderAt.
func (m Memory) ReadAt(p []byte, off int64) (int, error) { return bytes.NewReader(m).ReadAt(p, off) }

// Counted counts the reads of a device.
type Counted struct {
	guest.Device
	Reads, Bytes atomic.Int64
}

// ReadAt implements io.ReaderAt.
func (c *Counted) ReadAt(p []byte, off int64) (int, error) {
	c.Reads.Add(1)
	c.Bytes.Add(int64(len(p)))
	return c.Device.ReadAt(p, off)
}

// Unzip reads a file that gzip made.
func Unzip(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(z)
}

// Zip writes such a file.
func Zip(t *testing.T, name string, b []byte) {
	t.Helper()
	var out bytes.Buffer
	z, _ := gzip.NewWriterLevel(&out, gzip.BestCompression)
	z.Write(b)
	z.Close()
	if err := os.WriteFile(name, out.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
}
