package nbd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// A link is one connection of a Client in transmission.
type link struct {
	nc         net.Conn
	br         *bufio.Reader // of the receiver alone
	structured bool
	contexts   map[uint32]string // id => metadata context

	ended   chan struct{} // closed when the receiver has ended
	sending chan struct{} // holds one while something is sent
	// Of the one that sends.
	head [requestLen]byte
	vec  [2][]byte
	left net.Buffers

	mu sync.Mutex
	// guards following
	calls  map[uint64]*call // cookie => request in flight
	cookie uint64           // the last one
	err    error            // why the connection is dead
}

// A call is a request in flight.
type call struct {
	cmd   uint16
	flags uint16
	off   int64
	n     int64  // length
	p     []byte // of a read; n bytes

	// Of the receiver until done.
	err      error
	got      []extent.Extent // of a read: what has come, ascending
	extras   int             // chunks without data
	status   []Status        // of a block status: of context
	context  string
	seen     []uint32 // contexts that have come
	done     chan struct{}
	finished bool

	// Guarded by link.mu.
	busy      bool // the receiver writes to p
	abandoned bool // nobody waits; p is not to be touched
}

var callPool = sync.Pool{New: func() any { return &call{done: make(chan struct{}, 1)} }}

// newCall gives a call; it may be freed when it has been done without being abandoned.
func newCall(cmd uint16, off, n int64) *call {
	k := callPool.Get().(*call)
	*k = call{cmd: cmd, off: off, n: n, done: k.done, got: k.got[:0]}
	return k
}

func (k *call) free() {
	if k.abandoned {
		return
	}
	k.p, k.status = nil, nil
	callPool.Put(k)
}

func newLink(h *hello) *link {
	l := &link{nc: h.nc, br: h.br, structured: h.structured, contexts: h.contexts,
		ended: make(chan struct{}), sending: make(chan struct{}, 1), calls: make(map[uint64]*call)}
	go l.receive()
	return l
}

// do sends k with its data and waits for the reply, or for the end of ctx.
func (l *link) do(ctx context.Context, k *call, data []byte) error {
	cookie, err := l.register(k)
	if err != nil {
		return err
	}
	if err := l.send(ctx, cookie, k, data); err != nil {
		if l.dead() != nil {
			<-k.done // k may be in the receiver's hands
			return err
		}
		return l.abandon(ctx, cookie, k, false)
	}
	select {
	case <-k.done:
		return k.err
	case <-ctx.Done():
		return l.abandon(ctx, cookie, k, true)
	}
}

func (l *link) register(k *call) (cookie uint64, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return 0, l.err
	}
	l.cookie++
	l.calls[l.cookie] = k
	return l.cookie, nil
}

// send writes a request. An error in the middle of it ends the connection.
func (l *link) send(ctx context.Context, cookie uint64, k *call, data []byte) error {
	select {
	case l.sending <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	case <-l.ended:
		return l.dead()
	}
	defer func() { <-l.sending }()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if ctx.Done() != nil {
		ran := make(chan struct{})
		stop := context.AfterFunc(ctx, func() {
			l.nc.SetWriteDeadline(time.Unix(1, 0))
			close(ran)
		})
		defer func() {
			if !stop() {
				<-ran
				l.nc.SetWriteDeadline(time.Time{})
			}
		}()
	}
	if err := l.write(cookie, k, data); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		l.kill(fmt.Errorf("connection given up: sending: %w", err))
		return err
	}
	return nil
}

func (l *link) write(cookie uint64, k *call, data []byte) error {
	p := l.head[:]
	be.PutUint32(p, magicRequest)
	be.PutUint16(p[4:], k.flags)
	be.PutUint16(p[6:], k.cmd)
	be.PutUint64(p[8:], cookie)
	be.PutUint64(p[16:], uint64(k.off))
	be.PutUint32(p[24:], uint32(k.n))
	if len(data) == 0 {
		_, err := l.nc.Write(p)
		return err
	}
	l.vec = [2][]byte{p, data}
	l.left = l.vec[:]
	_, err := l.left.WriteTo(l.nc)
	l.vec = [2][]byte{}
	return err
}

// cancelGrace is how long a cancelled read waits for the receiver to be done
// with its memory, before it ends the connection.
const cancelGrace = time.Second

// abandon leaves k, whose reply, if it has been sent, will be skipped when it comes.
func (l *link) abandon(ctx context.Context, cookie uint64, k *call, sent bool) error {
	l.mu.Lock()
	if !sent {
		delete(l.calls, cookie)
	}
	if k.finished {
		l.mu.Unlock()
		<-k.done
		return k.err
	}
	k.abandoned = true
	busy := k.busy
	l.mu.Unlock()
	if !busy {
		return ctx.Err()
	}
	t := time.NewTimer(cancelGrace)
	defer t.Stop()
	select {
	case <-k.done:
	case <-t.C:
		l.kill(fmt.Errorf("connection given up: %w in the middle of a reply", ctx.Err()))
		<-k.done
	}
	return ctx.Err()
}

// dead says why the connection is; nil when it is not.
func (l *link) dead() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// kill ends the connection; the receiver then tells all who wait.
func (l *link) kill(err error) {
	l.mu.Lock()
	if l.err == nil {
		l.err = err
	}
	l.mu.Unlock()
	l.nc.Close()
}

var errClosed = errors.New("the client is closed")

func (l *link) close() {
	if l.dead() == nil {
		select {
		case l.sending <- struct{}{}:
			l.nc.SetWriteDeadline(time.Now().Add(time.Second))
			_ = l.write(0, &call{cmd: cmdDisc}, nil) // the server may be gone
		default:
		}
	}
	l.kill(errClosed)
	<-l.ended
}

// receive reads replies until the connection ends, and gives what is still
// waiting then its error.
func (l *link) receive() {
	var err error
	for err == nil {
		err = l.reply()
	}
	l.kill(fmt.Errorf("connection given up: %w", noEOF(err)))
	l.mu.Lock()
	defer l.mu.Unlock()
	for cookie, k := range l.calls {
		k.err = l.err
		l.finish(cookie, k)
	}
	close(l.ended)
}

// finish ends k; l.mu is held.
func (l *link) finish(cookie uint64, k *call) {
	delete(l.calls, cookie)
	if k.finished {
		return
	}
	wake := !k.abandoned || k.busy
	k.finished, k.busy = true, false
	if wake {
		k.done <- struct{}{} // from here on k is the caller's
	}
}

// complete ends k with its last chunk.
func (l *link) complete(cookie uint64, k *call) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.finish(cookie, k)
}

// reply reads one reply, or one chunk of one.
func (l *link) reply() error {
	p, err := l.br.Peek(simpleLen)
	if err != nil {
		return err
	}
	cookie := be.Uint64(p[8:]) // at the same place in both kinds
	l.mu.Lock()
	k := l.calls[cookie]
	l.mu.Unlock()
	if k == nil {
		return fmt.Errorf("a reply to no request (cookie %#x)", cookie)
	}
	switch magic := be.Uint32(p); {
	case magic == magicSimple:
		return l.simple(cookie, k)
	case magic == magicStructured && l.structured:
		return l.chunk(cookie, k)
	default:
		return fmt.Errorf("a reply with the magic number %#x", magic)
	}
}

func (l *link) simple(cookie uint64, k *call) error {
	p, err := l.br.Peek(simpleLen)
	if err != nil {
		return err
	}
	e := Errno(be.Uint32(p[4:]))
	l.br.Discard(simpleLen)
	switch {
	case e != 0:
		k.err = e
	case k.cmd == cmdBlockStatus || k.cmd == cmdRead && l.structured:
		return fmt.Errorf("a simple reply to a %s at %d", commandNames[k.cmd], k.off)
	case k.cmd == cmdRead:
		if err := l.fill(k, 0, k.n); err != nil {
			return err
		}
	}
	l.complete(cookie, k)
	return nil
}

// fill reads n bytes of data to the place at in k.p, or skips them when nobody
// waits for k any more.
func (l *link) fill(k *call, at, n int64) error {
	if !l.begin(k) {
		_, err := l.br.Discard(int(n))
		return err
	}
	_, err := io.ReadFull(l.br, k.p[at:at+n])
	l.end(k, err)
	return err
}

// begin takes hold of k.p; it is false when that is not to be touched any more.
func (l *link) begin(k *call) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	k.busy = !k.abandoned
	return k.busy
}

// end lets go of k.p. After an error k is about to be finished, which does it.
func (l *link) end(k *call, err error) {
	if err != nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	k.busy = false
	if k.abandoned {
		k.done <- struct{}{}
	}
}
