package buckettest

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/holdfast-backup/holdfast/store/bucket"
)

// Put commits one object, or ends the test.
func Put(t *testing.T, b bucket.Bucket, name string, content []byte) {
	t.Helper()
	if err := put(t.Context(), b, name, content); err != nil {
		t.Fatal(err)
	}
}

// Get reads one object whole, or ends the test.
func Get(t *testing.T, b bucket.Bucket, name string) []byte {
	t.Helper()
	content, err := get(t.Context(), b, name)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

func put(ctx context.Context, b bucket.Bucket, name string, content []byte) error {
	w, err := b.Create(ctx, name)
	if err != nil {
		return err
	}
	if _, err := w.WriteAt(content, 0); err != nil {
		return errors.Join(err, w.Abort())
	}
	return w.Commit()
}

func get(ctx context.Context, b bucket.Bucket, name string) ([]byte, error) {
	o, err := b.Open(ctx, name)
	if err != nil {
		return nil, err
	}
	defer o.Close()
	return io.ReadAll(io.NewSectionReader(o, 0, o.Size()))
}

func create(t *testing.T, b bucket.Bucket, name string) bucket.Writer {
	t.Helper()
	w, err := b.Create(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.Abort() })
	return w
}

func write(t *testing.T, w bucket.Writer, off int64, p []byte) {
	t.Helper()
	if n, err := w.WriteAt(p, off); err != nil || n != len(p) {
		t.Fatalf("WriteAt(%d bytes, %d) = %d, %v", len(p), off, n, err)
	}
}

func open(t *testing.T, b bucket.Bucket, name string) bucket.Object {
	t.Helper()
	o, err := b.Open(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func readAll(t *testing.T, o bucket.Object) []byte {
	t.Helper()
	got, err := io.ReadAll(io.NewSectionReader(o, 0, o.Size()))
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func wantContent(t *testing.T, b bucket.Bucket, name string, want []byte) {
	t.Helper()
	got := Get(t, b, name)
	if !bytes.Equal(got, want) {
		t.Fatalf("%s: %d bytes, want %d; first difference at %d", name, len(got), len(want), difference(got, want))
	}
}

func difference(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

func wantMissing(t *testing.T, b bucket.Bucket, name string) {
	t.Helper()
	if _, err := b.Open(t.Context(), name); !errors.Is(err, bucket.ErrNotExist) {
		t.Errorf("Open(%q) = %v, want ErrNotExist", name, err)
	}
}

func wantList(t *testing.T, b bucket.Bucket, prefix string, want ...bucket.Info) {
	t.Helper()
	var got []bucket.Info
	for info, err := range b.List(t.Context(), prefix) {
		if err != nil {
			t.Fatalf("List(%q): %v", prefix, err)
		}
		got = append(got, info)
	}
	byName := func(a, b bucket.Info) int { return cmp.Compare(a.Name, b.Name) }
	slices.SortFunc(got, byName)
	slices.SortFunc(want, byName)
	if !slices.Equal(got, want) {
		t.Errorf("List(%q) = %v, want %v", prefix, got, want)
	}
}

// inParallel runs fn(0) … fn(n-1) at once.
func inParallel(t *testing.T, n int, fn func(int) error) {
	t.Helper()
	errs := make(chan error, n)
	for i := range n {
		go func() { errs <- fn(i) }()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

func random(seed uint64, n int) []byte {
	p := make([]byte, n)
	c := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24)})
	_, _ = c.Read(p)
	return p
}
