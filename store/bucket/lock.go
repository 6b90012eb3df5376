package bucket

import (
	"context"
	"errors"
	"sync"
	"time"
)

// Locker is a Bucket whose users can exclude each other, also those in other
// processes, while they read an object and replace it.
type Locker interface {
	// Lock waits until nobody else holds the lock of that name, or ctx is done. It ends
	// with unlock, which may be called twice, and with the process. A name is
	// as that of an object; no object may have it. ErrReadOnly where nothing can be written.
	Lock(ctx context.Context, name string) (unlock func(), err error)
}

var (
	_ Locker = (*Memory)(nil)
	_ Locker = (*Faulty)(nil)
)

// lockPoll is how often a lock is tried. Locks are held for milliseconds.
const lockPoll = 10 * time.Millisecond

// poll calls try until it is done, fails, or ctx is done.
func poll(ctx context.Context, try func() (done bool, err error)) error {
	for {
		if done, err := try(); done || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(lockPoll):
		}
	}
}

// Lock implements Locker.
func (m *Memory) Lock(ctx context.Context, name string) (unlock func(), err error) {
	if err := checkCall(ctx, name); err != nil {
		return nil, err
	}
	err = poll(ctx, func() (bool, error) {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.locks[name] {
			return false, nil
		}
		if m.locks == nil {
			m.locks = map[string]bool{}
		}
		m.locks[name] = true
		return true, nil
	})
	if err != nil {
		return nil, err
	}
	return sync.OnceFunc(func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.locks, name)
	}), nil
}

// OpLock is counted as the other calls are; unlock is not.
const OpLock Op = "lock"

// Lock implements Locker over a bucket that does; the lock ends also when the process is gone.
func (b *Faulty) Lock(ctx context.Context, name string) (unlock func(), err error) {
	if _, err := b.next(OpLock, name); err != nil {
		return nil, err
	}
	inner, ok := b.inner.(Locker)
	if !ok {
		return nil, b.err(OpLock, name, errors.ErrUnsupported)
	}
	return inner.Lock(ctx, name)
}
