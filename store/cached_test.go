package store_test

import (
	"bytes"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
)

// storedImage stores data in a repository in memory.
func storedImage(t *testing.T, chunk int, data []byte) *store.Image {
	t.Helper()
	return storedImageIn(t, bucket.NewMemory(), chunk, data)
}

// storedImageIn stores data in a repository in b.
func storedImageIn(t *testing.T, b bucket.Bucket, chunk int, data []byte) *store.Image {
	t.Helper()
	ctx := t.Context()
	if err := store.Init(ctx, b, store.InitOptions{ChunkSize: chunk, Passphrase: []byte("secret")}, time.Now()); err != nil {
		t.Fatal(err)
	}
	r := mustOpenMemory(t, b)
	d, err := r.NewDraft(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	w, err := d.Writer()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	m, err := d.Map(ctx, store.Root{}, int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i*chunk < len(data); i++ {
		p := make([]byte, chunk)
		copy(p, data[i*chunk:])
		ids := make([]store.ID, 1)
		if _, err := w.Write(ctx, p, make([]store.ID, 1), ids); err != nil {
			t.Fatal(err)
		}
		if err := m.Set(ctx, int64(i), ids[0]); err != nil {
			t.Fatal(err)
		}
	}
	root, err := m.Finish(ctx, int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	p := &store.Point{VM: store.VM{Name: "vm"}, Time: time.Now(), Consistency: "crash", Disks: []store.Disk{{Name: "disk0", Key: "disk0", Size: root.Size, Root: root.Page[:]}}}
	if err := d.Commit(ctx, p); err != nil {
		t.Fatal(err)
	}
	img, err := r.OpenDisk(p, "disk0")
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// TestCachedImage: what is read through a cache is what the image holds, whatever the sizes of reads and chunks; and what
// was fetched before is not fetched again.
func TestCachedImage(t *testing.T) {
	for _, chunk := range []int{64 << 10, 128 << 10, 1 << 20} {
		const size = 5<<20 + 777
		want := make([]byte, size)
		r := rand.New(rand.NewPCG(uint64(chunk), 1))
		for off := 0; off < size; off += 200000 { // with holes between
			for i := range want[off:min(off+70000, size)] {
				want[off+i] = byte(r.Uint32())
			}
		}
		img, cache := storedImage(t, chunk, want), store.NewCache(8<<20)
		var wg sync.WaitGroup
		for w := range 6 {
			c := []func(*store.Image, *store.Cache) *store.CachedImage{(*store.Image).Cached, (*store.Image).Ahead, (*store.Image).Kept}[w%3](img, cache)
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(chunk), uint64(10+w)))
				for range 200 {
					off := r.IntN(size)
					p := make([]byte, 1+r.IntN([]int{100, 70000, 400000, 2 << 20}[r.IntN(4)]))
					if r.IntN(5) == 0 {
						c.Prefetch(int64(off), int64(len(p)))
					}
					n, err := c.ReadAt(p, int64(off))
					if n != min(len(p), size-off) || (err != nil && n == len(p)) || !bytes.Equal(p[:n], want[off:off+n]) {
						t.Errorf("chunks of %d: %d bytes at %d: %d, %v", chunk, len(p), off, n, err)
						return
					}
				}
			})
		}
		wg.Wait()
	}
}

// TestPrefetched: what was prefetched, or is kept, is not read again, in reads of any size.
func TestPrefetched(t *testing.T) {
	const chunk = 128 << 10
	want := make([]byte, 4<<20)
	r := rand.New(rand.NewPCG(1, 1))
	for i := range want {
		want[i] = byte(r.Uint32())
	}
	var reads atomic.Int64
	img := storedImageIn(t, bucket.NewFaulty(bucket.NewMemory(), func(c bucket.Call) bucket.Fault {
		if c.Op == bucket.OpReadAt && strings.HasPrefix(c.Name, "packs/") {
			reads.Add(1)
		}
		return bucket.Fault{}
	}), chunk, want)
	for i, n := range []int{4096, 65536, chunk, 1 << 20, 4 << 20, 4096, 65536, chunk, 1 << 20, 4 << 20} {
		c := img.Ahead(store.NewCache(64 << 20))
		if c.Prefetch(0, int64(len(want))); i >= 5 { // or, of one that keeps what was read, was read
			c = img.Kept(store.NewCache(64 << 20))
			if got := make([]byte, len(want)); true {
				if _, err := c.ReadAt(got, 0); err != nil && err != io.EOF || !bytes.Equal(got, want) {
					t.Fatal(err)
				}
			}
		}
		before := reads.Load()
		if before == 0 {
			t.Fatal("reads of packs are not counted")
		}
		for off := 0; off < len(want); off += n {
			p := make([]byte, n)
			if _, err := c.ReadAt(p, int64(off)); (err != nil && err != io.EOF) || !bytes.Equal(p, want[off:off+n]) {
				t.Fatalf("%d bytes at %d: %v", n, off, err)
			}
		}
		if again := reads.Load() - before; again > 0 {
			t.Errorf("reads of %d bytes: packs were read %d times again", n, again)
		}
	}
}
