package buckettest

import (
	"context"
	"errors"
	"io/fs"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/store/bucket"
)

// TestLocker checks a bucket.Locker against its contract. open returns a new, empty bucket
// and another view of the same one, as a second process has it; they may be one.
func TestLocker(t *testing.T, open func(t *testing.T) (bucket.Bucket, bucket.Bucket)) {
	first, second := open(t)
	a, b := first.(bucket.Locker), second.(bucket.Locker)
	var wg sync.WaitGroup
	var inside, came atomic.Int32
	for i := range 8 {
		l := []bucket.Locker{a, b}[i%2]
		wg.Go(func() {
			for range 5 {
				unlock, err := l.Lock(t.Context(), "config.lock")
				if err != nil {
					t.Error(err)
					return
				}
				if n := inside.Add(1); n != 1 {
					t.Errorf("%d hold the lock at once", n)
				}
				came.Add(1)
				time.Sleep(100 * time.Microsecond)
				inside.Add(-1)
				unlock()
				unlock() // harmless, also while another has it
			}
		})
	}
	wg.Wait()
	if n := came.Load(); n != 40 {
		t.Errorf("%d of 40 came through", n)
	}
	unlock, err := a.Lock(t.Context(), "one.lock")
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := b.Lock(ctx, "one.lock"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a lock that is held: %v", err)
	}
	other, err := b.Lock(t.Context(), "other.lock")
	if err != nil {
		t.Fatalf("a lock of another name: %v", err)
	}
	other()
	if _, err := a.Lock(t.Context(), "../x"); !errors.Is(err, fs.ErrInvalid) {
		t.Errorf("a name that no object can have: %v", err)
	}
}
