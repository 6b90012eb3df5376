package guesttest

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"testing"
)

// Pack writes testdata/name.gz.
func Pack(t *testing.T, name string, b []byte) {
	t.Helper()
	if err := os.MkdirAll("testdata", 0o755); err != nil {
		t.Fatal(err)
	}
	Zip(t, "testdata/"+name+".gz", b)
}

// Unpack reads it.
func Unpack(t testing.TB, name string) []byte {
	t.Helper()
	b, err := Unzip("testdata/" + name + ".gz")
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
