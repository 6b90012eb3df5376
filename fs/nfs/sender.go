package nfs

import (
	"net"
	"sync"
	"time"
)

// A sender writes replies. Whoever finds it idle writes, also what others bring
// meanwhile: they go on with the next call, and many small replies go out in one
// write. What it holds is bounded by the gate.
type sender struct {
	c *conn

	mu sync.Mutex
	// guards following
	queue   []*request
	spare   []*request // memory of the queue before
	writing bool

	// Of the one that is writing.
	vec      net.Buffers // of the pieces of a write
	left     net.Buffers // what the write has not sent yet
	deadline time.Time   // to which the connection's is set
}

// maxWrite is what goes out in one write, bytes; the client has Limits.Stall to take it.
const maxWrite = maxData + slack

// add takes r with its reply, which goes out with the next flush, or before.
func (s *sender) add(r *request) {
	s.mu.Lock()
	s.queue = append(s.queue, r)
	s.mu.Unlock()
}

// flush sends what there is, if nobody else is at it, and frees what has been sent.
func (s *sender) flush() {
	s.mu.Lock()
	if s.writing {
		s.mu.Unlock()
		return
	}
	s.writing = true
	for len(s.queue) > 0 {
		batch := s.queue
		s.queue, s.spare = s.spare[:0], nil
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
	for len(batch) > 0 {
		size, n := 0, 0
		for n < len(batch) && (n == 0 || size+len(batch[n].msg) <= maxWrite) {
			size += len(batch[n].msg)
			n++
		}
		if !s.c.broken.Load() {
			s.writev(batch[:n])
		}
		for _, r := range batch[:n] {
			s.c.done(r)
		}
		batch = batch[n:]
	}
}

func (s *sender) writev(batch []*request) {
	s.limit()
	var err error
	if len(batch) == 1 {
		_, err = s.c.nc.Write(batch[0].msg)
	} else {
		s.vec = s.vec[:0]
		for _, r := range batch {
			s.vec = append(s.vec, r.msg)
		}
		s.left = s.vec // not a variable: it would be allocated
		_, err = s.left.WriteTo(s.c.nc)
		clear(s.vec)
	}
	if err == nil {
		return
	}
	s.c.broken.Store(true)
	if !quiet(err) {
		s.c.logf("sending: %w", err)
	}
	s.c.nc.Close()
}

// limit sets the time for the next write; not every time, it is not for free.
func (s *sender) limit() {
	stall := s.c.srv.Limits.Stall
	if now := time.Now(); s.deadline.Sub(now) < stall*3/4 {
		s.deadline = now.Add(stall)
		s.c.nc.SetWriteDeadline(s.deadline)
	}
}
