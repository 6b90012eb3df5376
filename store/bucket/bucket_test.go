package bucket_test

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/holdfast-backup/holdfast/store/bucket"
	"github.com/holdfast-backup/holdfast/store/bucket/buckettest"
)

func TestMemory(t *testing.T) {
	buckettest.TestBucket(t, func(*testing.T) bucket.Bucket { return bucket.NewMemory() })
}

func TestFaultyWithoutFaults(t *testing.T) {
	buckettest.TestBucket(t, func(*testing.T) bucket.Bucket { return bucket.NewFaulty(bucket.NewMemory(), nil) })
}

func TestCrashKeepsWhatWasCommitted(t *testing.T) {
	m := bucket.NewMemory()
	buckettest.Put(t, m, "packs/a", []byte("whole"))
	w, err := m.Create(t.Context(), "packs/b")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteAt([]byte("draft"), 0); err != nil {
		t.Fatal(err)
	}
	after := m.Crash()
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
	buckettest.Put(t, after, "packs/c", []byte("later"))
	wantNames(t, m, "packs/a", "packs/b")
	wantNames(t, after, "packs/a", "packs/c")
}

// run makes each kind of call at least once: 13 calls.
func run(t *testing.T, b bucket.Bucket) error {
	ctx := t.Context()
	for i := range 2 {
		w, err := b.Create(ctx, fmt.Sprintf("packs/%d", i))
		if err != nil {
			return err
		}
		for off := range 2 {
			if _, err := w.WriteAt([]byte("01234567"), int64(off*8)); err != nil {
				return errors.Join(err, w.Abort())
			}
		}
		if err := w.Commit(); err != nil {
			return err
		}
	}
	for range 2 {
		o, err := b.Open(ctx, "packs/0")
		if err != nil {
			return err
		}
		defer o.Close()
		p := make([]byte, 16)
		if _, err := o.ReadAt(p, 0); err != nil {
			return err
		}
		if string(p) != "0123456701234567" {
			return errWrongBytes
		}
	}
	for _, err := range b.List(ctx, "") {
		if err != nil {
			return err
		}
	}
	return b.Remove(ctx, "packs/1")
}

var errWrongBytes = errors.New("wrong bytes")

// calls is what run does, in order.
var calls = []bucket.Op{
	bucket.OpCreate, bucket.OpWriteAt, bucket.OpWriteAt, bucket.OpCommit,
	bucket.OpCreate, bucket.OpWriteAt, bucket.OpWriteAt, bucket.OpCommit,
	bucket.OpOpen, bucket.OpReadAt, bucket.OpOpen, bucket.OpReadAt,
	bucket.OpList, bucket.OpRemove,
}

func TestFaultyCountsCalls(t *testing.T) {
	var seen []bucket.Op
	f := bucket.NewFaulty(bucket.NewMemory(), func(c bucket.Call) bucket.Fault {
		seen = append(seen, c.Op)
		if c.N != int64(len(seen)) {
			t.Errorf("call %d numbered %d", len(seen), c.N)
		}
		return bucket.Fault{}
	})
	if err := run(t, f); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(seen, calls) || f.Calls() != int64(len(calls)) {
		t.Errorf("%d calls: %v", f.Calls(), seen)
	}
}

// TestFaultyAtEveryCall injects every kind at every call of a run.
func TestFaultyAtEveryCall(t *testing.T) {
	cause := errors.New("cause")
	for kind := bucket.Fail; kind <= bucket.FlipBit; kind++ {
		for i, op := range calls {
			n := int64(i + 1)
			m := bucket.NewMemory()
			f := bucket.NewFaulty(m, bucket.At(n, bucket.Fault{Kind: kind, Err: cause, Bit: 1001}))
			err := run(t, f)
			want := cause
			switch {
			case kind == bucket.Gone:
				want = bucket.ErrGone
			case kind == bucket.FlipBit && op == bucket.OpReadAt:
				want = errWrongBytes
			}
			if !errors.Is(err, want) {
				t.Errorf("kind %d at call %d (%s): %v, want %v", kind, n, op, err, want)
			}
			wantNames(t, m.Crash(), expected(kind, i)...)
			if kind == bucket.Gone {
				wantGone(t, f)
			}
		}
	}
}

// expected is what must be visible when run failed at calls[i].
func expected(kind bucket.Kind, i int) []string {
	did := i // calls that took effect
	if kind == bucket.LostAck && (calls[i] == bucket.OpCommit || calls[i] == bucket.OpRemove) {
		did++
	}
	var names []string
	if did > 3 {
		names = append(names, "packs/0")
	}
	if did > 7 && did < len(calls) {
		names = append(names, "packs/1")
	}
	return names
}

func wantGone(t *testing.T, b *bucket.Faulty) {
	t.Helper()
	before := b.Calls()
	if _, err := b.Create(t.Context(), "x"); !errors.Is(err, bucket.ErrGone) {
		t.Errorf("Create after the end: %v", err)
	}
	for _, err := range b.List(t.Context(), "") {
		if !errors.Is(err, bucket.ErrGone) {
			t.Errorf("List after the end: %v", err)
		}
	}
	if b.Calls() != before+2 {
		t.Errorf("%d calls counted after the end, want 2", b.Calls()-before)
	}
}

func TestFaultyShort(t *testing.T) {
	m := bucket.NewMemory()
	f := bucket.NewFaulty(m, func(c bucket.Call) bucket.Fault {
		if c.Op == bucket.OpCreate || c.Op == bucket.OpOpen || c.Op == bucket.OpCommit {
			return bucket.Fault{}
		}
		return bucket.Fault{Kind: bucket.Short}
	})
	w, err := f.Create(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	if n, err := w.WriteAt([]byte("abcdef"), 0); n != 3 || !errors.Is(err, bucket.ErrInjected) {
		t.Errorf("WriteAt = %d, %v", n, err)
	}
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
	if got := buckettest.Get(t, m, "x"); string(got) != "abc" {
		t.Errorf("content %q", got)
	}
	o, err := f.Open(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 2)
	if n, err := o.ReadAt(p, 0); n != 1 || !errors.Is(err, bucket.ErrInjected) || !bytes.Equal(p, []byte("a\x00")) {
		t.Errorf("ReadAt = %d, %v, %q", n, err, p)
	}
	buckettest.Put(t, m, "y", nil)
	var seen, failed int
	for _, err := range f.List(t.Context(), "") {
		if err != nil {
			failed++
			continue
		}
		seen++
	}
	if seen != 1 || failed != 1 {
		t.Errorf("List gave %d objects and %d errors", seen, failed)
	}
}

func wantNames(t *testing.T, b bucket.Bucket, want ...string) {
	t.Helper()
	var got []string
	for info, err := range b.List(t.Context(), "") {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, info.Name)
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("objects %v, want %v", got, want)
	}
}
