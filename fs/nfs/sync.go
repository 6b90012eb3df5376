package nfs

import (
	"errors"
	"sync"
)

// syncs lets those who wait for the same file to become durable share one Sync.
// Who comes while one is at work is served by the next one: the one at work may
// have begun before his writes.
type syncs struct {
	mu sync.Mutex
	// guards following
	files map[ID]*syncing // that somebody waits for
}

type syncing struct {
	now, next *syncRun
}

type syncRun struct {
	done chan struct{} // closed when err is set
	err  error
}

var errSyncEnded = errors.New("sync did not return")

// do calls sync, or waits for the call of another that begins after do did.
func (s *syncs) do(id ID, sync func() error) error {
	s.mu.Lock()
	f := s.files[id]
	if f == nil {
		f = &syncing{}
		s.files[id] = f
	}
	run := &syncRun{done: make(chan struct{}), err: errSyncEnded}
	switch {
	case f.now == nil:
		f.now = run
		s.mu.Unlock()
	case f.next == nil:
		f.next = run
		before := f.now
		s.mu.Unlock()
		<-before.done
		s.mu.Lock()
		f.now, f.next = run, nil
		s.mu.Unlock()
	default:
		run = f.next
		s.mu.Unlock()
		<-run.done
		return run.err
	}
	defer s.end(id, f, run)
	run.err = sync()
	return run.err
}

// end is also for a sync that panics.
func (s *syncs) end(id ID, f *syncing, run *syncRun) {
	s.mu.Lock()
	if f.next == nil {
		delete(s.files, id)
	}
	s.mu.Unlock()
	close(run.done)
}
