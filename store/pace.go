package store

import (
	"context"
	"io"
	"sync"
	"time"
)

// pacer keeps the reading of several goroutines together below a rate. The zero pacer has no limit.
type pacer struct {
	rate int64 // bytes in a second; 0: no limit

	mu   sync.Mutex // guards following
	free time.Time  // when all that was let through so far is paid for
}

// wait returns when n more bytes may be read. What it lets through is paid for by whoever comes next.
func (p *pacer) wait(ctx context.Context, n int64) error {
	if p.rate <= 0 {
		return nil
	}
	p.mu.Lock()
	now := time.Now()
	if p.free.Before(now) {
		p.free = now
	}
	delay := p.free.Sub(now)
	p.free = p.free.Add(time.Duration(float64(n) / float64(p.rate) * float64(time.Second)))
	p.mu.Unlock()
	if delay <= 0 {
		return nil
	}
	t := time.NewTimer(delay)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// reader gives r at that rate.
func (p *pacer) reader(ctx context.Context, r io.ReaderAt) io.ReaderAt {
	if p.rate <= 0 {
		return r
	}
	return &pacedReader{ctx, p, r}
}

type pacedReader struct {
	ctx context.Context // of one pack
	p   *pacer
	r   io.ReaderAt
}

func (r *pacedReader) ReadAt(b []byte, off int64) (int, error) {
	if err := r.p.wait(r.ctx, int64(len(b))); err != nil {
		return 0, err
	}
	return r.r.ReadAt(b, off)
}

// pacedObject is an object read at a rate.
type pacedObject struct {
	io.ReaderAt
	size int64
}

func (o pacedObject) Size() int64 { return o.size }
