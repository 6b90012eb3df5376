package guesttest

import (
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"testing"
)

// Memory is a disk in memory.
type Memory []byte

// Size implements guest.Device.
func (m Memory) Size() int64 { return int64(len(m)) }

// ReadAt implements io.ReaderAt.
func (m Memory) ReadAt(p []byte, off int64) (int, error) { return bytes.NewReader(m).ReadAt(p, off) }

// Pack writes testdata/name.gz.
func Pack(t *testing.T, name string, b []byte) {
	t.Helper()
	var out bytes.Buffer
	w, _ := gzip.NewWriterLevel(&out, gzip.BestCompression)
	w.Write(b)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll("testdata", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("testdata/"+name+".gz", out.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
}

// Unpack reads it.
func Unpack(t testing.TB, name string) []byte {
	t.Helper()
	f, err := os.Open("testdata/" + name + ".gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

var ofBytes = regexp.MustCompile(` of \d+ bytes`)

// Kinds are what Fill skipped without the sizes.
func Kinds(skipped []string) []string {
	var kinds []string
	for _, s := range skipped {
		kinds = append(kinds, ofBytes.ReplaceAllString(s, ""))
	}
	slices.Sort(kinds)
	return slices.Compact(kinds)
}

// Saved writes a disk to a file, for programs.
func Saved(t *testing.T, m Memory) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, m, 0o600); err != nil {
		t.Fatal(err)
	}
	return image
}
