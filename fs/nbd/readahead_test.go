//go:build linux

package nbd

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// farDisk is a disk whose chunks take a while to come, once.
type farDisk struct {
	memory
	delay time.Duration

	mu     sync.Mutex
	chunks map[int64]*sync.Once // guarded by mu
	asked  []extent.Extent      // guarded by mu: by Prefetch
}

const farChunk = 128 * kib

func (d *farDisk) load(i int64) {
	d.mu.Lock()
	once := d.chunks[i]
	if once == nil {
		once = new(sync.Once)
		d.chunks[i] = once
	}
	d.mu.Unlock()
	once.Do(func() { time.Sleep(d.delay) })
}

func (d *farDisk) ReadAt(p []byte, off int64) (int, error) {
	for i := off / farChunk; i*farChunk < off+int64(len(p)); i++ {
		d.load(i)
	}
	return d.memory.ReadAt(p, off)
}

func (d *farDisk) Prefetch(off, n int64) {
	d.mu.Lock()
	d.asked = append(d.asked, extent.Extent{Off: off, Len: n})
	d.mu.Unlock()
	var wg sync.WaitGroup
	for i := off / farChunk; i*farChunk < off+n; i++ {
		wg.Go(func() { d.load(i) })
	}
	wg.Wait()
}

func newFarDisk(size int, delay time.Duration) *farDisk {
	return &farDisk{memory: make(memory, size), delay: delay, chunks: make(map[int64]*sync.Once)}
}

func (d *farDisk) prefetched() []extent.Extent {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.asked)
}

func TestReadAhead(t *testing.T) {
	const size = 16*mib + 5
	d := newFarDisk(size, 0)
	c := dial(t, "unix:"+serve(t, &Server{Exports: exports(d, false), Limits: Limits{ReadAhead: 2 * mib}}), ClientOptions{})
	rnd := rand.New(rand.NewPCG(1, 1))
	p := make([]byte, 64*kib)
	for i := range int64(200) { // far apart
		if _, err := c.ReadAt(p, (i%2*8+rnd.Int64N(4))*mib+rnd.Int64N(mib/2)); err != nil {
			t.Fatal(err)
		}
	}
	if got := d.prefetched(); len(got) != 0 {
		t.Errorf("random reads: %v", got)
	}
	for off := int64(0); off < size; off += int64(len(p)) {
		c.ReadAt(p, off)
	}
	c.Close()
	got := d.prefetched()
	for i, e := range got {
		if e.Empty() || e.End() > size || e.Len > 2*mib || i > 0 && e.Off < got[i-1].End() {
			t.Errorf("sequential reads: %v in %v", e, got)
		}
	}
	// How much depends on how fast the machine is: what comes while a call is at work is left out.
	if total := extent.Total(got); total < size/8 || len(got) > 40 {
		t.Errorf("sequential reads: %d bytes in %d calls", total, len(got))
	}
}

// TestCache sends NBD_CMD_CACHE.
func TestCache(t *testing.T) {
	d := newFarDisk(mib, 0)
	c := dial(t, "unix:"+serve(t, &Server{Exports: exports(d, false)}), ClientOptions{})
	c.Prefetch(4096, 8192)
	c.Prefetch(mib-1, 8192)
	c.Prefetch(mib, 1)
	want := []extent.Extent{{Off: 4096, Len: 8192}, {Off: mib - 1, Len: 1}}
	if got := d.prefetched(); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// BenchmarkReadAhead reads a disk of which each 128 KiB take 5 ms to come.
func BenchmarkReadAhead(b *testing.B) {
	for _, window := range []int64{-1, mib, 4 * mib, 16 * mib} {
		b.Run(fmt.Sprintf("window=%d", window), func(b *testing.B) {
			const size = 32 * mib
			p := make([]byte, 128*kib)
			b.SetBytes(size)
			for b.Loop() {
				d := newFarDisk(size, 5*time.Millisecond)
				c := dial(b, "unix:"+serve(b, &Server{Exports: exports(d, false), Limits: Limits{ReadAhead: window}}), ClientOptions{})
				for off := int64(0); off < size; off += int64(len(p)) {
					if _, err := c.ReadAt(p, off); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}

// BenchmarkRead reads from a plain file through client and server.
func BenchmarkRead(b *testing.B) {
	d := newFileDisk(b, 48*mib)
	for _, n := range []int{4 * kib, 128 * kib, mib} {
		for _, parallel := range []int{1, 16} {
			b.Run(fmt.Sprintf("%dk/%d", n/kib, parallel), func(b *testing.B) {
				c := dial(b, "unix:"+serve(b, &Server{Exports: exports(d, false)}), ClientOptions{})
				b.SetBytes(int64(n))
				b.ReportAllocs()
				b.ResetTimer()
				var wg sync.WaitGroup
				for range parallel {
					wg.Go(func() {
						p := make([]byte, n)
						for i := range b.N / parallel {
							if _, err := c.ReadAt(p, int64(i*n)%(32*mib)); err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				wg.Wait()
			})
		}
	}
}
