package nfs

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// A conn is a client over TCP. Its workers take turns: one reads the next call,
// lets another read the one after it, and answers its own.
type conn struct {
	srv      *Server
	programs []*program
	nc       net.Conn
	addr     netip.Addr
	ended    chan struct{} // closed when all is over

	share    *share // of the gate
	draining atomic.Bool
	broken   atomic.Bool            // replies cannot be sent any more
	used     atomic.Pointer[export] // the last one; all of them know the connection
	waiting  atomic.Int32           // workers that want to read
	started  atomic.Int32           // workers
	quick    atomic.Int32           // calls in a row
	workers  sync.WaitGroup

	readMu sync.Mutex
	// guards following
	br   *bufio.Reader
	over bool // nothing more is read

	out sender
}

func newConn(s *Server, programs []*program, nc net.Conn) *conn {
	c := &conn{srv: s, programs: programs, nc: nc, ended: make(chan struct{}), share: newShare(), br: bufio.NewReaderSize(nc, 16<<10)}
	if a, ok := nc.RemoteAddr().(*net.TCPAddr); ok {
		c.addr = plain(a.AddrPort().Addr())
	}
	c.out.c = c
	return c
}

// run serves the client to the end.
func (c *conn) run() {
	c.start()
	c.work()
	c.workers.Wait()
	if c.draining.Load() {
		c.part()
	}
	c.nc.Close()
	x := c.srv.exports.Load()
	for _, e := range x.byPath {
		e.mu.Lock()
		delete(e.conns, c)
		e.mu.Unlock()
	}
}

func (c *conn) start() {
	c.started.Add(1)
	c.workers.Add(1)
}

// partTime is for the client to take the last replies.
const partTime = 3 * time.Second

// part ends the sending and waits for the client to do the same: calls that have
// not been read would make the system drop the replies that are on their way.
func (c *conn) part() {
	t, ok := c.nc.(*net.TCPConn)
	if !ok || c.broken.Load() || t.CloseWrite() != nil {
		return
	}
	t.SetReadDeadline(time.Now().Add(partTime))
	io.Copy(io.Discard, io.LimitReader(t, 64<<20))
}

// uses notes that the connection uses e.
func (c *conn) uses(e *export) {
	if c.used.Load() == e {
		return
	}
	e.mu.Lock()
	e.conns[c] = true
	e.mu.Unlock()
	c.used.Store(e)
}

// drain makes the connection end when the calls at work have been answered.
func (c *conn) drain() {
	c.draining.Store(true)
	c.rearm()
}

// rearm keeps the reader from waiting for more when the connection drains: a
// deadline that was set meanwhile would have undone it.
func (c *conn) rearm() {
	if c.draining.Load() {
		c.nc.SetReadDeadline(time.Unix(1, 0))
	}
}

// quiet errors are how connections end.
func quiet(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

func (c *conn) logf(format string, args ...any) {
	c.srv.log(fmt.Errorf("nfs: %v: %w", c.addr, fmt.Errorf(format, args...)))
}

var requestPool = sync.Pool{New: func() any { return &request{w: encoder{make([]byte, 0, 1<<10)}} }}

// done gives back what r holds. r must not be used any more.
func (c *conn) done(r *request) {
	if r.held > 0 {
		c.srv.gate.give(c.share, r.held)
	}
	r.free()
	requestPool.Put(r)
}

func (c *conn) work() {
	defer c.workers.Done()
	defer c.started.Add(-1)
	for r := c.next(); r != nil; r = c.next() {
		c.answer(r)
		c.out.flush()
	}
}

// answer serves r; the reply is sent by the next flush.
func (c *conn) answer(r *request) {
	start := time.Now()
	r.run()
	c.pace(r, time.Since(start))
	c.out.add(r)
}

// After quickRun calls in a row that were answered in quickTime each, such calls
// are answered before the next one is read: to hand over the reading would take
// longer than to serve them.
const (
	quickTime = 50 * time.Microsecond
	quickRun  = 64
	quickHeld = 32 << 10 // bytes of memory, at most
)

// mayBeQuick leaves out what is large, and what makes a disk durable: nobody reads the next call meanwhile.
func (r *request) mayBeQuick() bool {
	return r.held <= quickHeld && r.prog == progNFS && r.proc <= procWrite && r.proc != procSetAttr
}

// pace notes how long r took.
func (c *conn) pace(r *request, d time.Duration) {
	switch {
	case d > quickTime:
		c.quick.Store(0)
	case r.mayBeQuick() && c.quick.Load() < quickRun:
		c.quick.Add(1)
	}
}

// maxPutOff bounds the replies that wait for the next ones, to go out in one write.
const maxPutOff = 16

// maxIdle is how many workers wait for their turn to read; more of them leave.
const maxIdle = 4

// stay counts a worker that waits to read, unless there are enough: one that
// leaves must never be counted, handOver relies on those who are.
func (c *conn) stay() bool {
	for {
		n := c.waiting.Load()
		if n >= maxIdle {
			return false
		}
		if c.waiting.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

// next reads the next call that is not answered at once; nil when there are no
// more, or others are there to read them.
func (c *conn) next() *request {
	if !c.stay() {
		return nil
	}
	c.readMu.Lock()
	c.waiting.Add(-1)
	defer c.out.flush() // when the next one reads already
	defer c.readMu.Unlock()
	putOff := 0
	for !c.over && !c.broken.Load() {
		r := requestPool.Get().(*request)
		if err := c.read(r); err != nil {
			c.done(r)
			c.end(err)
			return nil
		}
		if !r.mayBeQuick() || c.quick.Load() < quickRun {
			c.handOver()
			return r
		}
		c.answer(r)
		if putOff++; putOff == maxPutOff || !c.callWaits() {
			c.out.flush()
			putOff = 0
		}
	}
	return nil
}

// callWaits reports whether the next call has been read from the connection, so that nothing of it is to be waited for.
func (c *conn) callWaits() bool {
	if c.br.Buffered() < markLen {
		return false
	}
	p, _ := c.br.Peek(markLen)
	mark := be.Uint32(p)
	return mark&lastFragment != 0 && uint32(c.br.Buffered()-markLen) >= mark&^lastFragment
}

// end stops reading, because of err.
func (c *conn) end(err error) {
	c.over = true
	if !quiet(err) && !(c.draining.Load() && errors.Is(err, os.ErrDeadlineExceeded)) {
		c.logf("%w", err)
	}
}

// handOver makes sure that somebody reads the next call.
func (c *conn) handOver() {
	if c.waiting.Load() == 0 && int(c.started.Load()) < c.srv.Limits.Requests {
		c.start()
		go c.work()
	}
}

// peekLen is what is looked at of a record before there is memory for it, bytes:
// the longest start of a call, and the arguments of READ with the longest handle.
const peekLen = maxHeader + 4 + maxHandle + 8 + 4

// read reads a call, for which it waits until there is room.
func (c *conn) read(r *request) error {
	p, err := c.br.Peek(markLen)
	if err != nil {
		return err
	}
	r.srv, r.ctx, r.conn, r.addr, r.programs = c.srv, c.srv.base, c, c.addr, c.programs
	mark := be.Uint32(p)
	n := int(mark &^ lastFragment)
	if n > maxRecord {
		return errRecord
	}
	if mark&lastFragment == 0 {
		return c.readFragments(r)
	}
	head := markLen + min(n, peekLen)
	if err := c.inTime(head, func() error { p, err = c.br.Peek(head); return err }); err != nil {
		return err
	}
	args, err := parseCall(&r.call, p[markLen:])
	if err != nil {
		return err
	}
	start := head - len(args) // of the arguments, after the mark
	c.hold(r, n, replyRoom(&r.call, args))
	rec := r.rec.mem[:n]
	if err := c.inTime(markLen+n, func() error { return c.fill(rec) }); err != nil {
		return err
	}
	if !r.short && r.auth == authOK {
		r.args.p = rec[start-markLen:]
	}
	return nil
}

// hold takes the memory for a record of n bytes and a reply of that room.
func (c *conn) hold(r *request, n int, room int64) {
	held := bufferSize(n) + room
	if c.srv.gate.take(c.share, held) {
		c.out.flush() // replies that are put off hold what is waited for
		<-c.share.ready
	}
	r.held = held
	r.rec = getBuffer(n)
}

// fill skips the mark of a record and reads it.
func (c *conn) fill(rec []byte) error {
	c.br.Discard(markLen)
	_, err := io.ReadFull(c.br, rec)
	return err
}

var (
	errRecord    = fmt.Errorf("a record of more than %d bytes", maxRecord)
	errFragments = fmt.Errorf("a record of more than %d fragments", maxFragments)
)

// maxFragments of one record; real clients send one, or a few.
const maxFragments = 1024

// readFragments reads a record of more than one fragment. How large it is and
// what is asked are not known before its end, so it holds the most there can be.
func (c *conn) readFragments(r *request) error {
	c.hold(r, maxRecord, bufferSize(readBuffer(maxData)))
	n, err := 0, error(nil)
	c.inTime(math.MaxInt, func() error { n, err = c.gather(r.rec.mem[:maxRecord]); return nil })
	if err != nil {
		return noEnd(err)
	}
	r.args.p, err = parseCall(&r.call, r.rec.mem[:n])
	return err
}

// gather reads fragments up to the last one.
func (c *conn) gather(p []byte) (n int, err error) {
	for range maxFragments {
		m, err := c.br.Peek(markLen)
		if err != nil {
			return 0, err
		}
		mark := be.Uint32(m)
		size := int(mark &^ lastFragment)
		if size > len(p)-n {
			return 0, errRecord
		}
		if err := c.fill(p[n : n+size]); err != nil {
			return 0, err
		}
		n += size
		if mark&lastFragment != 0 {
			return n, nil
		}
	}
	return 0, errFragments
}

// inTime calls f, which reads n bytes, and gives the client the time for them to come.
func (c *conn) inTime(n int, f func() error) error {
	if c.br.Buffered() >= n {
		return f()
	}
	c.nc.SetReadDeadline(time.Now().Add(c.srv.Limits.Stall))
	c.rearm()
	err := noEnd(f())
	c.nc.SetReadDeadline(time.Time{})
	c.rearm()
	return err
}

// noEnd is for an end of the stream within a record.
func noEnd(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
