package nbd

import (
	"net"
	"sync"
	"time"
)

// A sender writes replies. Whoever finds it idle writes, also what others bring
// meanwhile: they go on with the next request, and many small replies go out in
// one call.
type sender struct {
	c *conn

	mu   sync.Mutex
	room sync.Cond // of mu: queue has become shorter
	// mu guards following
	queue   []*request
	spare   []*request // memory of the queue before
	writing bool

	// Of the one that is writing.
	vec      net.Buffers // of the pieces of a call
	left     net.Buffers // what the call has not sent yet
	deadline time.Time   // to which the connection's is set
}

func (s *sender) init(c *conn) {
	s.c = c
	s.room.L = &s.mu
}

// send takes r with its reply, and frees it when it has been sent.
func (s *sender) send(r *request) {
	s.mu.Lock()
	for s.writing && len(s.queue) >= s.c.srv.Limits.Requests {
		s.room.Wait()
	}
	s.queue = append(s.queue, r)
	if s.writing {
		s.mu.Unlock()
		return
	}
	s.writing = true
	for len(s.queue) > 0 {
		batch := s.queue
		s.queue, s.spare = s.spare[:0], nil
		s.room.Broadcast()
		s.mu.Unlock()
		s.write(batch)
		clear(batch)
		s.mu.Lock()
		s.spare = batch
	}
	s.writing = false
	s.mu.Unlock()
}

// write sends the replies of batch, and frees them.
func (s *sender) write(batch []*request) {
	defer func() {
		for _, r := range batch {
			s.c.done(r)
		}
	}()
	if s.c.broken.Load() {
		return
	}
	if err := s.flush(batch); err != nil {
		s.c.broken.Store(true)
		if !quiet(err) {
			s.c.logf("sending: %w", err)
		}
		s.c.raw.Close()
	}
}

func (s *sender) flush(batch []*request) error {
	vec, n := s.vec[:0], 0
	for _, r := range batch {
		for _, p := range r.parts {
			for len(p) > 0 {
				piece := p[:min(len(p), stallPiece-n)]
				vec, n, p = append(vec, piece), n+len(piece), p[len(piece):]
				if n < stallPiece {
					continue
				}
				if err := s.writev(vec); err != nil {
					return err
				}
				vec, n = vec[:0], 0
			}
		}
	}
	s.vec = vec
	if n == 0 {
		return nil
	}
	return s.writev(vec)
}

// writev sends at most stallPiece bytes.
func (s *sender) writev(vec net.Buffers) error {
	s.limit()
	var err error
	if len(vec) == 1 { // also all that goes over TLS, but what has holes or is in a batch
		_, err = s.c.nc.Write(vec[0])
	} else {
		s.left = vec // not a variable: it would be allocated
		_, err = s.left.WriteTo(s.c.nc)
	}
	clear(vec)
	return err
}

// limit sets the time for the next write; not every time, it is not for free.
func (s *sender) limit() {
	stall := s.c.srv.Limits.Stall
	if now := time.Now(); s.deadline.Sub(now) < stall*3/4 {
		s.deadline = now.Add(stall)
		s.c.raw.SetWriteDeadline(s.deadline)
	}
}
