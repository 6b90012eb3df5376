package nfs

import (
	"slices"
	"sync"
)

// A gate bounds the requests that are at work and their bytes, of every
// connection and of all together, until the replies have been sent.
//
// Fairness: a connection asks for one request at a time, so it stands in the
// queue at most once, and the queue is served in order: the connections take
// turns, whatever each of them would like to have. A connection that holds
// nothing need not wait: clients that do not fetch their replies can keep others
// from many requests at a time, never from one. So all hold at most what the
// gate allows, and one request for each connection.
type gate struct {
	connRequests int
	connBytes    int64

	mu sync.Mutex
	// guards following, and all shares
	requests int   // free
	bytes    int64 // free
	queue    []*share
}

// A share is what one connection has of a gate.
type share struct {
	requests int
	bytes    int64
	want     int64         // bytes of the request that waits; 0 for none
	queued   bool          // in the queue; else its own limits are what it waits for
	ready    chan struct{} // is sent to when the request may go on
}

func newShare() *share { return &share{ready: make(chan struct{}, 1)} }

// take asks for a request of n bytes. When it must wait, it may go on when ready
// was sent to. A share is taken for by one goroutine at a time.
func (g *gate) take(s *share, n int64) (mustWait bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	s.want = n
	return !g.try(s)
}

// give gives back what a request took.
func (g *gate) give(s *share, n int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	s.requests--
	s.bytes -= n
	g.requests++
	g.bytes += n
	if s.want != 0 && g.try(s) {
		s.ready <- struct{}{}
	}
	for len(g.queue) > 0 && g.fits(g.queue[0]) {
		head := g.queue[0]
		g.queue = g.queue[1:]
		g.admit(head)
		head.ready <- struct{}{}
	}
}

// try admits the request of s, or queues it once its own limits allow it.
func (g *gate) try(s *share) bool {
	own := s.requests < g.connRequests && s.bytes+s.want <= g.connBytes
	switch {
	case s.requests == 0, own && !s.queued && len(g.queue) == 0 && g.fits(s):
		if s.queued {
			g.queue = slices.DeleteFunc(g.queue, func(q *share) bool { return q == s })
		}
		g.admit(s)
		return true
	case own && !s.queued:
		s.queued = true
		g.queue = append(g.queue, s)
	}
	return false
}

func (g *gate) fits(s *share) bool { return g.requests > 0 && g.bytes >= s.want }

func (g *gate) admit(s *share) {
	s.requests++
	s.bytes += s.want
	g.requests--
	g.bytes -= s.want
	s.want, s.queued = 0, false
}
