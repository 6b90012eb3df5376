package nbd

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// A conn is a client of a Server. In transmission, workers take turns: one
// reads the next request, lets another read the one after it, and serves its
// own, so a request is served by whom it woke.
type conn struct {
	srv   *Server
	ln    net.Listener
	raw   net.Conn
	ended chan struct{} // closed when all is over

	// Of the handshake; fixed in transmission.
	nc         net.Conn // raw, or TLS over it
	secure     bool     // over TLS
	fixed      bool     // the client speaks fixed newstyle
	noZeroes   bool
	structured bool    // replies
	statusOf   *string // the export that base:allocation was selected of; nil for none
	export     *Export // nil until it has been chosen
	disk       Disk
	size       int64        // of disk, bytes
	writable   WritableDisk // nil for a read-only export
	prefetch   prefetcher   // nil when disk has none
	status     bool         // base:allocation is selected for the export

	data     budget // of this connection
	draining atomic.Bool
	broken   atomic.Bool // the stream to the client ended in the middle
	waiting  atomic.Int32
	quick    atomic.Int32 // requests in a row
	workers  sync.WaitGroup

	readMu sync.Mutex
	// guards following
	br      *bufio.Reader // of nc
	over    bool          // no more requests are read
	started int           // workers
	unread  func() bool   // whether bytes wait in the socket; nil when that cannot be known
	ahead   readAhead

	out sender
}

// sendBuffer is asked for of Unix sockets, bytes; Linux gives less by default.
// TCP sizes its own.
const sendBuffer = 1 << 20

func newConn(s *Server, ln net.Listener, nc net.Conn) *conn {
	c := &conn{srv: s, ln: ln, raw: nc, nc: nc, ended: make(chan struct{}), br: bufio.NewReaderSize(nc, 16<<10)}
	c.data.free = s.Limits.ConnData
	c.unread = unreadOf(nc)
	if u, ok := nc.(*net.UnixConn); ok {
		u.SetWriteBuffer(sendBuffer) // a larger one saves waits; without it all works the same
	}
	return c
}

// run serves the client to the end.
func (c *conn) run() {
	err := c.withTimeout(c.srv.Limits.Handshake)
	if err == nil {
		c.transmit()
	} else if !quiet(err) && !c.draining.Load() {
		c.logf("handshake: %w", err)
	}
	c.nc.Close()
}

func (c *conn) transmit() {
	c.out.init(c)
	c.ahead.init(c)
	c.started = 1
	c.workers.Add(1)
	c.work()
	c.workers.Wait()
	c.ahead.stop()
}

// drain makes the connection end when the requests at work have been answered.
func (c *conn) drain() {
	c.draining.Store(true)
	c.rearm()
}

// rearm keeps the reader from waiting for more when the connection drains: a
// deadline that was set meanwhile would have undone it.
func (c *conn) rearm() {
	if c.draining.Load() {
		c.raw.SetReadDeadline(time.Unix(1, 0))
	}
}

func (c *conn) logf(format string, args ...any) {
	err := fmt.Errorf(format, args...)
	if c.export != nil {
		err = fmt.Errorf("nbd: export %q: %w", c.export.Name, err)
	} else {
		err = fmt.Errorf("nbd: %v: %w", c.raw.RemoteAddr(), err)
	}
	c.srv.log(err)
}

func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// A request is one command from its header to its reply.
type request struct {
	flags  uint16
	cmd    uint16
	cookie uint64
	off    uint64
	n      uint32 // length
	bad    Errno  // what is wrong with it, when that was seen while it was read

	buf   *buffer  // its data; nil for none
	held  int64    // of the budgets, bytes
	head  []byte   // headers of the reply, when not in buf
	parts [][]byte // the reply
}

var requestPool = sync.Pool{New: func() any { return &request{head: make([]byte, 0, 128)} }}

// done gives back what r holds. r must not be used any more.
func (c *conn) done(r *request) {
	if r.buf != nil {
		r.buf.free()
	}
	if r.held > 0 {
		c.data.give(r.held)
		c.srv.total.give(r.held)
	}
	clear(r.parts)
	if cap(r.head) > 64<<10 {
		r.head = nil // of a large block status
	}
	*r = request{head: r.head[:0], parts: r.parts[:0]}
	requestPool.Put(r)
}

func (c *conn) work() {
	defer c.workers.Done()
	for r := c.next(); r != nil; r = c.next() {
		c.answer(r)
	}
}

// answer serves r and sends the reply.
func (c *conn) answer(r *request) {
	start := time.Now()
	c.serve(r)
	c.pace(r, time.Since(start))
	c.out.send(r)
}

// A request for at most quickData bytes that is served in its time, quickTime and what quickRate needs for the data, is a
// quick one. After quickRun of them in a row, such requests are served before the next one is read: to hand over the
// reading would take longer than to serve them. One of more than quickSmall, which takes longer than that, is
// handed over all the same when the next request is there already.
const (
	quickData  = 256 << 10
	quickSmall = 16 << 10
	quickTime  = 50 * time.Microsecond
	quickRate  = 500 // bytes in a microsecond
	quickRun   = 256
)

// mayBeQuick leaves out what waits for a disk: nobody reads the next request meanwhile.
func (r *request) mayBeQuick() bool {
	return (r.cmd == cmdRead || r.cmd == cmdWrite) && r.flags&flagFUA == 0 && r.n <= quickData
}

// isQuick reports whether d is in time for r.
func (r *request) isQuick(d time.Duration) bool {
	return d <= quickTime+time.Duration(r.n/quickRate)*time.Microsecond
}

// moreWaits reports whether the client has sent more than has been read.
func (c *conn) moreWaits() bool {
	return c.br.Buffered() > 0 || c.unread == nil || c.unread()
}

// pace notes how long r took.
func (c *conn) pace(r *request, d time.Duration) {
	switch {
	case !r.mayBeQuick():
	case !r.isQuick(d):
		c.quick.Store(0)
	case c.quick.Load() < quickRun:
		c.quick.Add(1)
	}
}

// next reads the next request that is not to be served at once. It is nil when
// there are no more.
func (c *conn) next() *request {
	c.waiting.Add(1)
	c.readMu.Lock()
	c.waiting.Add(-1)
	defer c.readMu.Unlock()
	for !c.over {
		r := requestPool.Get().(*request)
		if err := c.read(r); err != nil {
			c.done(r)
			c.end(err)
			return nil
		}
		if !r.mayBeQuick() || c.quick.Load() < quickRun || r.n > quickSmall && c.moreWaits() {
			c.handOver()
			return r
		}
		c.answer(r)
	}
	return nil
}

// end stops reading, because of err.
func (c *conn) end(err error) {
	c.over = true
	if !quiet(err) && !c.draining.Load() {
		c.logf("%w", err)
	}
}

// handOver makes sure that somebody reads the next request.
func (c *conn) handOver() {
	if c.waiting.Load() == 0 && c.started < c.srv.Limits.Requests {
		c.started++
		c.workers.Add(1)
		go c.work()
	}
}

// read reads a request with its data, for which it waits until there is room.
func (c *conn) read(r *request) error {
	p, err := c.br.Peek(requestLen)
	if err != nil {
		if len(p) > 0 && errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	if be.Uint32(p) != magicRequest {
		return errors.New("request without its magic number")
	}
	r.flags, r.cmd = be.Uint16(p[4:]), be.Uint16(p[6:])
	r.cookie, r.off, r.n = be.Uint64(p[8:]), be.Uint64(p[16:]), be.Uint32(p[24:])
	c.br.Discard(requestLen)
	switch r.cmd {
	case cmdDisc:
		return errGone
	case cmdRead:
		r.bad = c.check(r)
		if r.bad == 0 {
			c.hold(r)
			c.ahead.saw(int64(r.off), int64(r.n))
		}
	case cmdWrite:
		return c.readData(r)
	default:
		r.bad = c.check(r)
	}
	return nil
}

// hold takes the memory for the data of r.
func (c *conn) hold(r *request) {
	if r.n == 0 {
		return
	}
	r.held = bufferSize(int(r.n))
	c.data.take(r.held)
	c.srv.total.take(r.held)
	r.buf = getBuffer(int(r.n))
}

// stallPiece is the data to which a client has Limits.Stall each, bytes.
const stallPiece = 1 << 20

// readData reads what is to be written, or skips it.
func (c *conn) readData(r *request) error {
	if r.bad = c.check(r); r.bad != 0 {
		return c.inTime(int64(r.n), func(n int64) error {
			_, err := io.CopyN(io.Discard, c.br, n)
			return err
		})
	}
	c.hold(r)
	if r.n == 0 {
		return nil
	}
	p := r.buf.data(int(r.n))
	if len(p) <= c.br.Buffered() {
		_, err := io.ReadFull(c.br, p)
		return err
	}
	return c.inTime(int64(r.n), func(n int64) error {
		_, err := io.ReadFull(c.br, p[:n])
		p = p[n:]
		return err
	})
}

// inTime calls f for n bytes in pieces, each of which is to be read in time.
func (c *conn) inTime(n int64, f func(n int64) error) error {
	for n > 0 {
		c.raw.SetReadDeadline(time.Now().Add(c.srv.Limits.Stall))
		c.rearm()
		piece := min(n, stallPiece)
		if err := f(piece); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		n -= piece
	}
	c.raw.SetReadDeadline(time.Time{})
	c.rearm()
	return nil
}

// allowedFlags maps a command to the flags it may have; FUA may be with any
// (proto, "Command flags").
var allowedFlags = [...]uint16{
	cmdRead:        flagFUA | flagDF,
	cmdWrite:       flagFUA,
	cmdDisc:        flagFUA,
	cmdFlush:       flagFUA,
	cmdTrim:        flagFUA,
	cmdCache:       flagFUA,
	cmdWriteZeroes: flagFUA | flagNoHole,
	cmdBlockStatus: flagFUA | flagReqOne,
}

// check says what is wrong with r (proto, "Error values"); 0 for nothing.
func (c *conn) check(r *request) Errno {
	if int(r.cmd) >= len(allowedFlags) || r.flags&^allowedFlags[r.cmd] != 0 {
		return EINVAL
	}
	writes := r.cmd == cmdWrite || r.cmd == cmdTrim || r.cmd == cmdWriteZeroes
	past := r.off > uint64(c.size) || uint64(r.n) > uint64(c.size)-r.off
	switch {
	case r.cmd == cmdFlush:
		if r.off != 0 || r.n != 0 {
			return EINVAL
		}
	case writes && c.writable == nil:
		return EPERM
	case past && (r.cmd == cmdWrite || r.cmd == cmdWriteZeroes):
		return ENOSPC
	case past:
		return EINVAL
	case r.n > maxPayload && r.cmd == cmdRead && c.structured:
		return EOVERFLOW
	case r.n > maxPayload && (r.cmd == cmdRead || r.cmd == cmdWrite):
		return EINVAL
	case r.flags&flagDF != 0 && !c.structured:
		return EINVAL
	case r.cmd == cmdCache && c.prefetch == nil:
		return EINVAL
	case r.cmd == cmdBlockStatus && (!c.status || r.n == 0):
		return EINVAL
	}
	return 0
}
