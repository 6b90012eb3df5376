package nbd

import "sync"

// After aheadRun bytes read one after the other a client is taken for a
// sequential reader.
const aheadRun = 256 << 10

// A readAhead asks the disk for what a sequential reader will read next: an NBD
// client such as QEMU has no read-ahead of its own.
type readAhead struct {
	disk   prefetcher
	window int64 // bytes
	size   int64 // of the disk

	// Of the reader of requests.
	next  int64 // where the reads seen so far end
	run   int64 // bytes that came in sequence
	asked int64 // all before it has been asked for

	work    chan [2]int64 // from, to; nil before the first
	workers sync.WaitGroup
}

func (a *readAhead) init(c *conn) {
	if c.prefetch == nil || c.srv.Limits.ReadAhead < 0 {
		return
	}
	a.disk, a.window, a.size = c.prefetch, c.srv.Limits.ReadAhead, c.size
}

// saw is told about every read. Reads of a client with several in flight may
// come a little out of order: those within the window count as sequential.
func (a *readAhead) saw(off, n int64) {
	if a.disk == nil {
		return
	}
	if off > a.next+a.window/2 || off < a.next-a.window/2 {
		a.run, a.asked, a.next = 0, 0, off+n
		return
	}
	a.run += n
	a.next = max(a.next, off+n)
	if a.run < aheadRun {
		return
	}
	// Half a window at a time, so that the disk sees few large requests.
	from, to := max(a.asked, a.next), min(a.next+a.window, a.size)
	if to-from < a.window/2 && to < a.size || from >= to {
		return
	}
	if a.work == nil {
		a.work = make(chan [2]int64)
		a.workers.Add(1)
		go a.fetch()
	}
	select {
	case a.work <- [2]int64{from, to}:
		a.asked = to
	default: // it is still at the last one
	}
}

func (a *readAhead) fetch() {
	defer a.workers.Done()
	for w := range a.work {
		a.disk.Prefetch(w[0], w[1]-w[0])
	}
}

// stop waits for the call of Prefetch that is under way.
func (a *readAhead) stop() {
	if a.work != nil {
		close(a.work)
		a.workers.Wait()
	}
}
