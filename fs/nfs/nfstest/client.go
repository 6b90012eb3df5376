package nfstest

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"time"
)

// Cred is who a client says that it is; nil stands for AUTH_NONE.
type Cred struct {
	UID, GID uint32
	Groups   []uint32
}

// Root is the superuser.
var Root = &Cred{}

// Numbers of programs.
const (
	Portmap = 100000
	NFS     = 100003
	Mount   = 100005
)

// A Client sends calls over one connection. Its methods may be called at once by many goroutines.
type Client struct {
	*link
	cred *Cred
}

// link is a connection, shared by the clients of several users.
type link struct {
	nc      net.Conn
	sending sync.Mutex // held while a call is written

	mu sync.Mutex
	// guards following
	xid     uint32
	waiting map[uint32]chan []byte // xid => where its reply goes
	err     error                  // of the connection, when it has ended
}

// patience is how long a reply may take.
const patience = 30 * time.Second

// Dial connects to a server.
func Dial(addr string, cred *Cred) (*Client, error) {
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	l := &link{nc: nc, xid: rand.Uint32(), waiting: make(map[uint32]chan []byte)}
	go l.receive()
	return &Client{l, cred}, nil
}

// As gives the client of another user over the same connection.
func (c *Client) As(cred *Cred) *Client { return &Client{c.link, cred} }

// Close ends the connection.
func (c *Client) Close() error { return c.nc.Close() }

func (l *link) receive() {
	br := bufio.NewReader(l.nc)
	var err error
	for err == nil {
		var p []byte
		if p, err = ReadRecord(br); err == nil && len(p) >= 4 {
			l.deliver(binary.BigEndian.Uint32(p), p)
		}
	}
	l.nc.Close()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.err = err
	for _, ch := range l.waiting {
		close(ch)
	}
	l.waiting = nil
}

func (l *link) deliver(xid uint32, p []byte) {
	l.mu.Lock()
	ch := l.waiting[xid]
	delete(l.waiting, xid)
	l.mu.Unlock()
	if ch != nil {
		ch <- p
	}
}

// ReadRecord reads a record of one or more fragments (RFC 5531 §11).
func ReadRecord(r io.Reader) ([]byte, error) {
	var rec []byte
	for {
		var head [4]byte
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return nil, err
		}
		mark := binary.BigEndian.Uint32(head[:])
		p := make([]byte, mark&0x7fffffff)
		if _, err := io.ReadFull(r, p); err != nil {
			return nil, err
		}
		if rec = append(rec, p...); mark>>31 == 1 {
			return rec, nil
		}
	}
}

// Record gives a message with its mark.
func Record(msg []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, 1<<31|uint32(len(msg))), msg...)
}

// CallMessage is a call without its mark (RFC 5531 §9).
func CallMessage(xid, prog, vers, proc uint32, cred *Cred, args []byte) []byte {
	a := new(Args).U32(xid).U32(0).U32(2).U32(prog).U32(vers).U32(proc)
	if cred == nil {
		a.U32(0).U32(0)
	} else {
		body := new(Args).U32(42).Text("client").U32(cred.UID).U32(cred.GID).U32(uint32(len(cred.Groups)))
		for _, g := range cred.Groups {
			body.U32(g)
		}
		a.U32(1).Opaque(body.B)
	}
	a.U32(0).U32(0)
	return append(a.B, args...)
}

// NextXID gives a number that no call had.
func (c *Client) NextXID() uint32 {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.xid++
	return c.xid
}

// Call calls a procedure, and gives its results.
func (c *Client) Call(prog, vers, proc uint32, args []byte) (*Results, error) {
	return c.CallAs(c.NextXID(), prog, vers, proc, args)
}

// CallAs is Call with a number of the caller's.
func (c *Client) CallAs(xid, prog, vers, proc uint32, args []byte) (*Results, error) {
	return c.Send(xid, Record(CallMessage(xid, prog, vers, proc, c.cred, args)))
}

// Send sends the bytes of a call and waits for its reply.
func (c *Client) Send(xid uint32, p []byte) (*Results, error) {
	ch := make(chan []byte, 1)
	c.mu.Lock()
	if c.waiting == nil {
		c.mu.Unlock()
		return nil, fmt.Errorf("connection is over: %w", c.err)
	}
	c.waiting[xid] = ch
	c.mu.Unlock()
	c.sending.Lock()
	_, err := c.nc.Write(p)
	c.sending.Unlock()
	if err != nil {
		return nil, err
	}
	select {
	case p, ok := <-ch:
		if !ok {
			return nil, fmt.Errorf("connection is over: %w", c.err)
		}
		return ParseReply(p)
	case <-time.After(patience):
		return nil, errors.New("no reply")
	}
}

// An RPCError is a reply that says that a call was not done.
type RPCError struct {
	Denied bool   // else it was accepted
	Stat   uint32 // reject_stat, or accept_stat
	Auth   uint32 // auth_stat
	// Low and High are the versions that are served, when it is for one that is not.
	Low, High uint32
}

func (e *RPCError) Error() string { return fmt.Sprintf("refused: %+v", *e) }

// ParseReply takes a reply apart (RFC 5531 §9).
func ParseReply(p []byte) (*Results, error) {
	r := &Results{P: p}
	r.U32() // xid
	if kind := r.U32(); kind != 1 {
		return nil, fmt.Errorf("a message of type %d is no reply", kind)
	}
	switch r.U32() {
	case 0:
		if flavor, body := r.U32(), r.Opaque(); flavor != 0 || len(body) != 0 {
			return nil, fmt.Errorf("a verifier of flavor %d", flavor)
		}
		e := &RPCError{Stat: r.U32()}
		if e.Stat == 0 {
			return r, r.Err
		}
		if e.Stat == 2 {
			e.Low, e.High = r.U32(), r.U32()
		}
		return nil, errors.Join(e, r.End())
	case 1:
		e := &RPCError{Denied: true, Stat: r.U32()}
		if e.Stat == 0 {
			e.Low, e.High = r.U32(), r.U32()
		} else {
			e.Auth = r.U32()
		}
		return nil, errors.Join(e, r.End())
	}
	return nil, errors.New("neither accepted nor denied")
}

// Args are put together as XDR (RFC 4506).
type Args struct{ B []byte }

func (a *Args) U32(v uint32) *Args { a.B = binary.BigEndian.AppendUint32(a.B, v); return a }
func (a *Args) U64(v uint64) *Args { a.B = binary.BigEndian.AppendUint64(a.B, v); return a }

// Fixed adds bytes without their length.
func (a *Args) Fixed(p []byte) *Args {
	a.B = append(a.B, p...)
	for len(p)%4 != 0 {
		a.B, p = append(a.B, 0), append(p[:len(p):len(p)], 0)
	}
	return a
}

// Opaque adds bytes with their length.
func (a *Args) Opaque(p []byte) *Args { return a.U32(uint32(len(p))).Fixed(p) }

// Text adds a string.
func (a *Args) Text(s string) *Args { return a.Opaque([]byte(s)) }

// Results are taken apart as XDR. From the first thing that is not as it should be, Err says what.
type Results struct {
	P   []byte // the rest
	Err error
}

// Fixed takes n bytes and their padding, which must be zero.
func (r *Results) Fixed(n int) []byte {
	padded := (n + 3) / 4 * 4
	if r.Err == nil && padded > len(r.P) {
		r.Err = fmt.Errorf("%d bytes wanted, %d left: %w", padded, len(r.P), io.ErrUnexpectedEOF)
	}
	if r.Err != nil {
		return make([]byte, min(n, 64))
	}
	v := r.P[:n]
	for _, b := range r.P[n:padded] {
		if b != 0 {
			r.Err = errors.New("padding that is not zero")
		}
	}
	r.P = r.P[padded:]
	return v
}

func (r *Results) U32() uint32    { return binary.BigEndian.Uint32(r.Fixed(4)) }
func (r *Results) U64() uint64    { return binary.BigEndian.Uint64(r.Fixed(8)) }
func (r *Results) Opaque() []byte { return r.Fixed(int(r.U32())) }
func (r *Results) Text() string   { return string(r.Opaque()) }

// Bool takes a boolean, which must be 0 or 1.
func (r *Results) Bool() bool {
	v := r.U32()
	if v > 1 && r.Err == nil {
		r.Err = fmt.Errorf("a boolean of %d", v)
	}
	return v == 1
}

// End is for what must be the end; it gives the first error.
func (r *Results) End() error {
	if r.Err == nil && len(r.P) != 0 {
		r.Err = fmt.Errorf("%d bytes too many", len(r.P))
	}
	return r.Err
}
