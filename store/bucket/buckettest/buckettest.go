// Package buckettest is the conformance suite of bucket.Bucket: every
// implementation runs it.
//
//	func TestMemory(t *testing.T) {
//		buckettest.TestBucket(t, func(t *testing.T) bucket.Bucket { return bucket.NewMemory() })
//	}
//
// It proves what the interface promises within one process. What a power cut or
// a dying process leaves behind is each implementation's own test.
package buckettest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/holdfast-backup/holdfast/store/bucket"
)

// TestBucket checks a Bucket against its contract. open returns a new, empty
// one for each call and arranges its own clean-up.
func TestBucket(t *testing.T, open func(t *testing.T) bucket.Bucket) {
	for _, c := range []struct {
		name string
		test func(*testing.T, bucket.Bucket)
	}{
		{"RoundTrip", testRoundTrip},
		{"Empty", testEmpty},
		{"Missing", testMissing},
		{"Names", testNames},
		{"DraftInvisible", testDraftInvisible},
		{"AbortedDraft", testAbortedDraft},
		{"Finished", testFinished},
		{"Replace", testReplace},
		{"Remove", testRemove},
		{"List", testList},
		{"ListWhileChanging", testListWhileChanging},
		{"SparseAndRandomOrder", testRandomOrder},
		{"ReadAt", testReadAt},
		{"ConcurrentWriteAt", testConcurrentWriteAt},
		{"ConcurrentObjects", testConcurrentObjects},
		{"SameNameRace", testSameNameRace},
		{"Cancelled", testCancelled},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, open(t)) })
	}
}

func testRoundTrip(t *testing.T, b bucket.Bucket) {
	content := map[string][]byte{
		"config":                  random(1, 300),
		"packs/ab/abcdef.pack":    random(2, 70_001),
		"packs/ab/abcdf0.pack":    random(3, 1),
		"points/vm-1/0a.manifest": random(4, 4096),
		"a_b/c-d/e.f/g":           random(5, 65_536),
	}
	for name, c := range content {
		Put(t, b, name, c)
	}
	for name, c := range content {
		wantContent(t, b, name, c)
	}
	var want []bucket.Info
	for name, c := range content {
		want = append(want, bucket.Info{Name: name, Size: int64(len(c))})
	}
	wantList(t, b, "", want...)
}

func testEmpty(t *testing.T, b bucket.Bucket) {
	wantList(t, b, "")
	wantList(t, b, "packs/")
	Put(t, b, "packs/nothing", nil)
	wantContent(t, b, "packs/nothing", nil)
	wantList(t, b, "packs/", bucket.Info{Name: "packs/nothing"})
}

func testMissing(t *testing.T, b bucket.Bucket) {
	Put(t, b, "packs/aa/one", []byte("x"))
	for _, name := range []string{"two", "packs/aa/two", "packs/bb/one", "packs/aa", "packs", "packs/aa/one/below"} {
		if _, err := b.Open(t.Context(), name); !errors.Is(err, bucket.ErrNotExist) {
			t.Errorf("Open(%q) = %v, want ErrNotExist", name, err)
		}
		err := b.Remove(t.Context(), name)
		if !errors.Is(err, bucket.ErrNotExist) {
			t.Errorf("Remove(%q) = %v, want ErrNotExist", name, err)
		}
		if err != nil && !strings.Contains(err.Error(), name) {
			t.Errorf("Remove(%q): the error does not name it: %v", name, err)
		}
	}
	wantContent(t, b, "packs/aa/one", []byte("x"))
}

func testNames(t *testing.T, b bucket.Bucket) {
	bad := []string{
		"", "/", "/abs", "end/", "a//b", ".", "./a", "a/./b", "..", "../a", "a/..", "a..b", "a/../../b",
		"A", "a b", "a\\b", "a\x00b", "a\nb", "ä", "a:b", "*", "tmp", "tmp/x",
		strings.Repeat("a", 256), strings.Repeat("a/", 600) + "a",
	}
	for _, name := range bad {
		if w, err := b.Create(t.Context(), name); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("Create(%q) = %v, want ErrInvalid", name, err)
			if err == nil {
				_ = w.Abort()
			}
		}
		if _, err := b.Open(t.Context(), name); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("Open(%q) = %v, want ErrInvalid", name, err)
		}
		if err := b.Remove(t.Context(), name); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("Remove(%q) = %v, want ErrInvalid", name, err)
		}
	}
	good := []string{"0", ".hidden", "-dash", "_", "tmpx/tmp/a", "a.b.c", strings.Repeat("a", 255), strings.Repeat("a/", 500) + "b"}
	for _, name := range good {
		Put(t, b, name, []byte(name))
		wantContent(t, b, name, []byte(name))
	}
}

func testDraftInvisible(t *testing.T, b bucket.Bucket) {
	w := create(t, b, "packs/x")
	write(t, w, 0, []byte("draft"))
	wantMissing(t, b, "packs/x")
	wantList(t, b, "")
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
	wantContent(t, b, "packs/x", []byte("draft"))
}

func testAbortedDraft(t *testing.T, b bucket.Bucket) {
	w := create(t, b, "packs/x")
	write(t, w, 0, []byte("draft"))
	for range 2 {
		if err := w.Abort(); err != nil {
			t.Fatal(err)
		}
	}
	wantMissing(t, b, "packs/x")
	wantList(t, b, "")
}

func testFinished(t *testing.T, b bucket.Bucket) {
	for _, end := range []func(bucket.Writer) error{bucket.Writer.Commit, bucket.Writer.Abort} {
		w := create(t, b, "x")
		if err := end(w); err != nil {
			t.Fatal(err)
		}
		if err := w.Commit(); !errors.Is(err, fs.ErrClosed) {
			t.Errorf("second Commit = %v, want ErrClosed", err)
		}
		if _, err := w.WriteAt([]byte("late"), 0); !errors.Is(err, fs.ErrClosed) {
			t.Errorf("late WriteAt = %v, want ErrClosed", err)
		}
		if err := w.Abort(); err != nil {
			t.Errorf("late Abort = %v", err)
		}
	}
	wantContent(t, b, "x", nil)
}

func testReplace(t *testing.T, b bucket.Bucket) {
	Put(t, b, "x", []byte("the old one, longer"))
	old := open(t, b, "x")
	defer old.Close()
	Put(t, b, "x", []byte("new"))
	wantContent(t, b, "x", []byte("new"))
	wantList(t, b, "", bucket.Info{Name: "x", Size: 3})
	if got := readAll(t, old); string(got) != "the old one, longer" {
		t.Errorf("an object open before the replacement reads %q", got)
	}
}

func testRemove(t *testing.T, b bucket.Bucket) {
	Put(t, b, "packs/x", []byte("1"))
	Put(t, b, "packs/y", []byte("2"))
	if err := b.Remove(t.Context(), "packs/x"); err != nil {
		t.Fatal(err)
	}
	wantMissing(t, b, "packs/x")
	if err := b.Remove(t.Context(), "packs/x"); !errors.Is(err, bucket.ErrNotExist) {
		t.Errorf("second Remove = %v, want ErrNotExist", err)
	}
	wantList(t, b, "", bucket.Info{Name: "packs/y", Size: 1})
	Put(t, b, "packs/x", []byte("again"))
	wantContent(t, b, "packs/x", []byte("again"))
}

func testList(t *testing.T, b bucket.Bucket) {
	for _, name := range []string{"packs/aa/1", "packs/aa/2", "packs/ab/3", "packs.old", "packs-2/4", "points/5", "config"} {
		Put(t, b, name, []byte(name))
	}
	for prefix, names := range map[string][]string{
		"":            {"packs/aa/1", "packs/aa/2", "packs/ab/3", "packs.old", "packs-2/4", "points/5", "config"},
		"p":           {"packs/aa/1", "packs/aa/2", "packs/ab/3", "packs.old", "packs-2/4", "points/5"},
		"packs":       {"packs/aa/1", "packs/aa/2", "packs/ab/3", "packs.old", "packs-2/4"},
		"packs/":      {"packs/aa/1", "packs/aa/2", "packs/ab/3"},
		"packs/a":     {"packs/aa/1", "packs/aa/2", "packs/ab/3"},
		"packs/aa":    {"packs/aa/1", "packs/aa/2"},
		"packs/aa/":   {"packs/aa/1", "packs/aa/2"},
		"packs/aa/2":  {"packs/aa/2"},
		"packs/aa/2/": nil,
		"packs/zz/":   nil,
		"config":      {"config"},
		"config/":     nil,
		"zz":          nil,
		"/":           nil,
		"../":         nil,
		"/etc/":       nil,
		"packs/../p":  nil,
		"packs//":     nil,
	} {
		var want []bucket.Info
		for _, name := range names {
			want = append(want, bucket.Info{Name: name, Size: int64(len(name))})
		}
		wantList(t, b, prefix, want...)
	}
	n := 0
	for range b.List(t.Context(), "packs/") {
		n++
		break
	}
	if n != 1 {
		t.Errorf("a listing cut short gave %d objects", n)
	}
}

// testListWhileChanging demands that what stays throughout is listed once.
func testListWhileChanging(t *testing.T, b bucket.Bucket) {
	const stay = 200
	for i := range stay {
		Put(t, b, fmt.Sprintf("packs/stay-%d", i), []byte("x"))
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		for i := range 100 {
			name := fmt.Sprintf("packs/come-%d", i)
			if err := put(t.Context(), b, name, []byte("y")); err != nil {
				t.Error(err)
			}
			if i%2 == 0 {
				if err := b.Remove(t.Context(), name); err != nil {
					t.Error(err)
				}
			}
		}
	})
	for range 10 {
		seen := map[string]int{}
		for info, err := range b.List(t.Context(), "packs/") {
			if err != nil {
				t.Fatal(err)
			}
			seen[info.Name]++
		}
		for i := range stay {
			if n := seen[fmt.Sprintf("packs/stay-%d", i)]; n != 1 {
				t.Fatalf("object %d listed %d times", i, n)
			}
		}
	}
}

// testRandomOrder compares pieces written in any order, with gaps, with a plain
// buffer. It writes enough to reach early write-back where there is one.
func testRandomOrder(t *testing.T, b bucket.Bucket) {
	rng := rand.New(rand.NewPCG(7, 7))
	want := make([]byte, 20<<20+77)
	w := create(t, b, "packs/x")
	piece := 100_003
	for _, i := range rng.Perm(len(want)/piece + 1) {
		if i%10 == 3 {
			continue // stays a hole
		}
		p := want[i*piece : min((i+1)*piece, len(want))]
		copy(p, random(uint64(i), len(p)))
		write(t, w, int64(i*piece), p)
	}
	for range 50 {
		off := rng.IntN(len(want) - 5000)
		p := random(rng.Uint64(), rng.IntN(5000))
		copy(want[off:], p)
		write(t, w, int64(off), p)
	}
	if _, err := w.WriteAt([]byte("x"), -1); err == nil {
		t.Error("WriteAt at a negative offset: no error")
	}
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
	wantContent(t, b, "packs/x", want)
}

func testReadAt(t *testing.T, b bucket.Bucket) {
	content := random(9, 10_000)
	Put(t, b, "x", content)
	o := open(t, b, "x")
	defer o.Close()
	rng := rand.New(rand.NewPCG(9, 9))
	for range 200 {
		off, n := rng.IntN(10_100), rng.IntN(3000)
		p := make([]byte, n)
		got, err := o.ReadAt(p, int64(off))
		want := content[min(off, len(content)):min(off+n, len(content))]
		if !bytes.Equal(p[:got], want) {
			t.Fatalf("ReadAt(%d bytes, %d): wrong bytes, %d of them", n, off, got)
		}
		if got < n && err != io.EOF || got == n && n > 0 && err != nil && (err != io.EOF || off+n < len(content)) {
			t.Fatalf("ReadAt(%d bytes, %d) = %d, %v", n, off, got, err)
		}
	}
	if _, err := o.ReadAt(make([]byte, 1), -1); err == nil || err == io.EOF {
		t.Errorf("ReadAt at a negative offset: %v", err)
	}
	if err := b.Remove(t.Context(), "x"); err != nil {
		t.Fatal(err)
	}
	if got := readAll(t, o); !bytes.Equal(got, content) {
		t.Error("an open object changed when it was removed")
	}
}

func testConcurrentWriteAt(t *testing.T, b bucket.Bucket) {
	want := random(11, 8<<20)
	w := create(t, b, "packs/x")
	inParallel(t, 8, func(i int) error {
		const part = 1 << 20
		for off := i * part; off < (i+1)*part; off += 64 << 10 {
			if _, err := w.WriteAt(want[off:off+64<<10], int64(off)); err != nil {
				return err
			}
		}
		return nil
	})
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
	wantContent(t, b, "packs/x", want)
}

func testConcurrentObjects(t *testing.T, b bucket.Bucket) {
	inParallel(t, 8, func(i int) error {
		for j := range 20 {
			name := fmt.Sprintf("packs/%d/%d", j%3, i*100+j)
			if err := put(t.Context(), b, name, random(uint64(i*100+j), 3000)); err != nil {
				return err
			}
		}
		return nil
	})
	for i := range 8 {
		for j := range 20 {
			wantContent(t, b, fmt.Sprintf("packs/%d/%d", j%3, i*100+j), random(uint64(i*100+j), 3000))
		}
	}
}

// testSameNameRace commits different contents under one name while others read:
// each reader sees one of them, whole.
func testSameNameRace(t *testing.T, b bucket.Bucket) {
	contents := make([][]byte, 4)
	for i := range contents {
		contents[i] = random(uint64(i), 5000+i)
	}
	Put(t, b, "x", contents[0])
	inParallel(t, 8, func(i int) error {
		for range 20 {
			if i < len(contents) {
				if err := put(t.Context(), b, "x", contents[i]); err != nil {
					return err
				}
				continue
			}
			got, err := get(t.Context(), b, "x")
			if err != nil {
				return err
			}
			if !slices.ContainsFunc(contents, func(c []byte) bool { return bytes.Equal(c, got) }) {
				return fmt.Errorf("%d bytes that nobody wrote", len(got))
			}
		}
		return nil
	})
}

func testCancelled(t *testing.T, b bucket.Bucket) {
	Put(t, b, "x", []byte("1"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := b.Create(ctx, "y"); !errors.Is(err, context.Canceled) {
		t.Errorf("Create = %v", err)
	}
	if _, err := b.Open(ctx, "x"); !errors.Is(err, context.Canceled) {
		t.Errorf("Open = %v", err)
	}
	if err := b.Remove(ctx, "x"); !errors.Is(err, context.Canceled) {
		t.Errorf("Remove = %v", err)
	}
	var last error
	for _, err := range b.List(ctx, "") {
		last = err
	}
	if !errors.Is(last, context.Canceled) {
		t.Errorf("List = %v", last)
	}
	wantContent(t, b, "x", []byte("1"))
}
