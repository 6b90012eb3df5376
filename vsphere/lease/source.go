package lease

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cespare/xxhash/v2"
)

// source reads the stream over as many connections as it takes. For one goroutine.
type source struct {
	ctx      context.Context
	opt      *Options
	complete func() bool // whether the stream may end where it is
	body     *body       // nil: none is open
	at       int64       // bytes given on
	sum      *xxhash.Digest
	fails    int   // connections in a row that brought nothing new
	anew     int   // times that the stream was begun again
	last     error // why the last connection ended
}

func newSource(ctx context.Context, opt *Options) *source {
	return &source{ctx: ctx, opt: opt, sum: xxhash.New(), complete: func() bool { return false }}
}

// Read implements io.Reader. It gives io.EOF only where the stream may end.
func (s *source) Read(p []byte) (int, error) {
	for {
		if err := s.connect(); err != nil {
			return 0, err
		}
		n, err := s.body.Read(p)
		if n > 0 {
			s.fails = 0
			s.at += int64(n)
			s.sum.Write(p[:n])
			s.opt.Progress(s.at)
			return n, nil
		}
		if s.complete() {
			return 0, io.EOF
		}
		s.drop(err)
	}
}

// drop closes a connection that is lost.
func (s *source) drop(err error) {
	switch {
	case err == nil:
		err = io.ErrNoProgress
	case errors.Is(err, io.EOF):
		err = io.ErrUnexpectedEOF
	}
	s.last = err
	s.fails++
	s.close()
}

func (s *source) close() {
	if s.body != nil {
		s.body.Close()
		s.body = nil
	}
}

// connect makes sure that there is a connection, at the right place of the stream.
func (s *source) connect() error {
	for s.body == nil {
		if s.ctx.Err() != nil {
			return context.Cause(s.ctx)
		}
		if s.fails >= s.opt.Attempts {
			return fmt.Errorf("after %d attempts: %w", s.fails, s.last)
		}
		if err := s.wait(); err != nil {
			return err
		}
		err := s.open()
		if errors.Is(err, ErrChanged) {
			s.close()
			return err
		}
		if err != nil {
			s.drop(err)
		}
	}
	return nil
}

// wait waits the longer the more connections failed.
func (s *source) wait() error {
	if s.fails == 0 {
		return nil
	}
	t := time.NewTimer(s.opt.Backoff << min(s.fails-1, 6))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-s.ctx.Done():
		return context.Cause(s.ctx)
	}
}

func (s *source) open() error {
	if s.at > 0 {
		err := s.dial(s.at)
		if !errors.Is(err, ErrNoResume) {
			return err
		}
		if s.anew++; s.anew > s.opt.Attempts {
			s.fails = s.opt.Attempts // no more of them
			return fmt.Errorf("begun anew %d times: %w", s.anew-1, s.last)
		}
	}
	if err := s.dial(0); err != nil {
		return err
	}
	return s.again()
}

func (s *source) dial(skip int64) error {
	ctx, cancel := context.WithCancel(s.ctx)
	r, err := s.opt.Open(ctx, skip)
	if err != nil {
		cancel()
		return err
	}
	s.body = newBody(ctx, cancel, r, s.opt.Idle)
	return nil
}

// again reads what came before once more, which has to be the same.
func (s *source) again() error {
	sum := xxhash.New()
	p := make([]byte, min(s.at, 128<<10))
	for left := s.at; left > 0; {
		n, err := s.body.Read(p[:min(int64(len(p)), left)])
		sum.Write(p[:n])
		left -= int64(n)
		if n > 0 {
			s.opt.Progress(s.at)
		} else if err != nil {
			return err
		}
	}
	if sum.Sum64() != s.sum.Sum64() {
		return fmt.Errorf("in its first %d bytes: %w", s.at, ErrChanged)
	}
	return nil
}

// body is a connection that is closed when its context ends, and when no byte comes for long.
type body struct {
	io.ReadCloser
	close  func() error
	cancel context.CancelFunc
	unhook func() bool
	idle   time.Duration
	timer  *time.Timer
	late   atomic.Bool
}

func newBody(ctx context.Context, cancel context.CancelFunc, r io.ReadCloser, idle time.Duration) *body {
	b := &body{ReadCloser: r, close: sync.OnceValue(r.Close), cancel: cancel, idle: idle}
	b.unhook = context.AfterFunc(ctx, func() { b.close() })
	b.timer = time.AfterFunc(idle, func() {
		b.late.Store(true)
		b.close()
	})
	b.timer.Stop()
	return b
}

// Read implements io.Reader. The time runs while it waits, not between the reads.
func (b *body) Read(p []byte) (int, error) {
	b.timer.Reset(b.idle)
	n, err := b.ReadCloser.Read(p)
	b.timer.Stop()
	if n == 0 && b.late.Load() {
		err = fmt.Errorf("nothing came for %v", b.idle)
	}
	return n, err
}

// Close implements io.Closer.
func (b *body) Close() error {
	b.timer.Stop()
	b.unhook()
	b.cancel()
	return b.close()
}
