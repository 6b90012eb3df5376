package agent

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
	"github.com/holdfast-backup/holdfast/store/remote/wire"
)

// Errors of a client, matched with errors.Is, besides ErrOtherServer and ErrVM, store.ErrToken,
// bucket.ErrFull and store.ErrDamaged (of the parent).
var (
	// ErrUnreachable: nothing answers at the address, or no such server.
	ErrUnreachable = errors.New("no holdfast server answers")
	// ErrVersion: the server speaks another version of the protocol.
	ErrVersion = errors.New("the server is of another version of holdfast")
	// ErrGone: the connection ended. If it was in a commit the point may exist.
	ErrGone = errors.New("the connection to the server ended")
)

const (
	dialTimeout = 15 * time.Second
	maxAnswer   = 8 << 20 // bytes of a response: what was in a commit, as JSON may spell it, or maxIDs of 49 each
	maxPuts     = 24      // on their way at once, so that the way may be long
)

// Client adds points to the repository behind a server.
type Client struct {
	Addr  string // host:port
	Token Token
}

// Session is a restore point in the making at a server. Its methods may be called
// by several goroutines at once, those of its Map and Base by one.
type Session struct {
	conn      net.Conn
	repo      [16]byte
	chunkSize int
	idKey     [32]byte
	vm        store.VM
	parent    *store.Point // nil: none
	receipts  receipts
	puts      chan struct{} // a slot for each that is on its way

	wmu sync.Mutex // one frame at a time

	mu      sync.Mutex // guards following
	number  uint64
	waiting map[uint64]func(resp []byte, err error) // request => what to do with its response
	err     error                                   // why the connection ended
	ended   chan struct{}                           // closed when err is set

	sent atomic.Int64 // bytes of puts
}

// Begin connects and begins a point of a VM. The caller closes the session.
func (c Client) Begin(ctx context.Context, vm store.VM) (*Session, error) {
	s, err := c.connect(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.begin(ctx, vm); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// connect dials, proves that this is the server, and shows the token.
func (c Client) connect(ctx context.Context) (*Session, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	raw, err := new(net.Dialer).DialContext(ctx, "tcp", c.Addr)
	if err != nil {
		return nil, unreachable(ctx, c.Addr, err)
	}
	peer := newPeerConn(raw, silence)
	conn := tls.Client(peer, clientTLS(c.Token.Pin))
	s := newSession(conn)
	defer context.AfterFunc(ctx, func() { raw.SetDeadline(time.Unix(1, 0)) })()
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		if errors.Is(err, ErrOtherServer) {
			return nil, fmt.Errorf("%s: %w", c.Addr, ErrOtherServer)
		}
		return nil, unreachable(ctx, c.Addr, err)
	}
	in := bufio.NewReaderSize(conn, 64<<10)
	if err := s.hello(in, c.Token); err != nil {
		raw.Close()
		return nil, fmt.Errorf("%s: %w", c.Addr, err)
	}
	peer.proven.Store(true)
	go s.receive(in)
	go s.ping()
	return s, nil
}

func newSession(conn net.Conn) *Session {
	s := &Session{conn: conn, waiting: map[uint64]func([]byte, error){}, ended: make(chan struct{}), puts: make(chan struct{}, maxPuts)}
	s.receipts.init()
	return s
}

func unreachable(ctx context.Context, addr string, err error) error {
	if cerr := ctx.Err(); cerr != nil && !errors.Is(cerr, context.DeadlineExceeded) {
		return cerr
	}
	return fmt.Errorf("%s: %w: %w", addr, ErrUnreachable, err)
}

// hello shows the token. The server has proven its key by now.
func (s *Session) hello(in io.Reader, t Token) error {
	b := binary.LittleEndian.AppendUint32(wire.NewFrame(0, opHello), Version)
	b, err := wire.Finish(append(append(b, t.ID[:]...), t.Secret[:]...), maxHello)
	if err != nil {
		return err
	}
	if _, err := s.conn.Write(b); err != nil {
		return fmt.Errorf("%w: %w", ErrGone, err)
	}
	resp, err := wire.ReadFrame(in, nil, maxAnswer)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrGone, err)
	}
	return s.welcome(resp)
}

// welcome reads the answer to hello.
func (s *Session) welcome(resp []byte) error {
	c, err := answered(resp)
	if err != nil {
		return err
	}
	version := c.U32()
	copy(s.repo[:], c.Take(16))
	s.chunkSize = int(c.U32())
	copy(s.idKey[:], c.Take(32))
	if err := c.End(); err != nil {
		return err
	}
	if version != Version || !store.ValidChunkSize(s.chunkSize) {
		return fmt.Errorf("%w: version %d with chunks of %d bytes", ErrVersion, version, s.chunkSize)
	}
	return nil
}

// answered takes a response apart: its payload, or the error that it is.
func answered(resp []byte) (*wire.Cursor, error) {
	c := wire.NewCursor(resp[wire.HeadLen:])
	status := resp[wire.HeadLen-1]
	if status == statusOK {
		return &c, nil
	}
	text := string(c.Rest()[:min(len(c.Rest()), maxText)])
	switch status {
	case statusAccess:
		return nil, &refusal{text}
	case statusVersion:
		return nil, fmt.Errorf("%w: it speaks version %d of the protocol, this program %d", ErrVersion, c.U32(), Version)
	case statusFull:
		return nil, fmt.Errorf("the repository at the server: %w", bucket.ErrFull)
	case statusDamaged:
		return nil, fmt.Errorf("the last point at the server is %w", store.ErrDamaged)
	case statusRefused:
		return nil, fmt.Errorf("the server refuses: %s", text)
	}
	return nil, errors.New("the server failed; its messages say why")
}

// refusal is an answer to who the client is, in the server's words.
type refusal struct{ text string }

func (r *refusal) Error() string { return r.text }

// Is makes every refusal match store.ErrToken: it is a matter of access.
func (r *refusal) Is(target error) bool { return target == store.ErrToken }

// begin says which VM it is and learns what it is compared with.
func (s *Session) begin(ctx context.Context, vm store.VM) error {
	b, err := json.Marshal(vm)
	if err != nil {
		return err
	}
	c, err := s.call(ctx, opBegin, b)
	if err != nil {
		return err
	}
	s.vm = vm
	s.parent, err = parentIn(c.Rest())
	return err
}

// parentIn reads the answer to begin.
func parentIn(text []byte) (*store.Point, error) {
	var m parentMessage
	if err := json.Unmarshal(text, &m); err != nil {
		return nil, fmt.Errorf("the server's answer: %w", err)
	}
	if m.ID == nil {
		return nil, nil
	}
	p := &store.Point{ID: *m.ID}
	for _, d := range m.Disks {
		if d.Size < 0 || d.Size > maxDiskSize {
			return nil, fmt.Errorf("the server's answer: a disk of %d bytes", d.Size)
		}
		p.Disks = append(p.Disks, store.Disk{Name: d.Name, Key: d.Key, Size: d.Size, ChangeID: d.ChangeID, Compared: d.Compared, Stats: store.Stats{Data: d.Data}})
	}
	return p, nil
}

// receive hands responses to those who wait for them, until the connection ends.
func (s *Session) receive(in io.Reader) {
	for {
		resp, err := wire.ReadFrame(in, nil, maxAnswer)
		if err != nil {
			s.end(fmt.Errorf("%w: %w", ErrGone, err))
			return
		}
		n := binary.LittleEndian.Uint64(resp)
		s.mu.Lock()
		take := s.waiting[n]
		delete(s.waiting, n)
		s.mu.Unlock()
		if take != nil {
			take(resp, nil)
			continue
		}
		if n == 0 && resp[wire.HeadLen-1] != statusOK { // it ends the session
			_, err := answered(resp)
			s.end(err)
			return
		}
	}
}

// fail keeps the first error: nothing is sent after it.
func (s *Session) fail(err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
		close(s.ended)
	}
	return s.err
}

// end ends the session, and tells all who wait why.
func (s *Session) end(err error) {
	err = s.fail(err)
	s.mu.Lock()
	waiting := s.waiting
	s.waiting = map[uint64]func([]byte, error){}
	s.mu.Unlock()
	s.conn.Close()
	for _, take := range waiting {
		take(nil, err)
	}
}

// ping keeps the server from taking a session for dead whose source is slow.
func (s *Session) ping() {
	for {
		select {
		case <-s.ended:
			return
		case <-time.After(pingInterval):
		}
		if err := s.send(wire.NewFrame(0, opPing), nil); err != nil {
			return
		}
	}
}

// send sends a request, of which only the number is still to be set. take is called once,
// with the response or the error of the session, unless send returns an error.
func (s *Session) send(b []byte, take func(resp []byte, err error)) error {
	if take == nil {
		take = func([]byte, error) {}
	}
	s.mu.Lock()
	if s.err != nil {
		defer s.mu.Unlock()
		return s.err
	}
	s.number++
	n := s.number
	s.waiting[n] = take
	s.mu.Unlock()
	binary.LittleEndian.PutUint64(b[4:], n)
	b, err := wire.Finish(b, maxPut(store.MaxChunkSize)+wire.HeadLen)
	if err == nil {
		s.wmu.Lock()
		_, err = s.conn.Write(b)
		s.wmu.Unlock()
		if err == nil {
			return nil
		}
		err = fmt.Errorf("%w: %w", ErrGone, err)
	}
	s.mu.Lock()
	_, mine := s.waiting[n]
	delete(s.waiting, n)
	s.mu.Unlock()
	if !mine {
		return nil // take has been called with what the server said, or with the session's end
	}
	return err
}

// call sends a request and waits for its response.
func (s *Session) call(ctx context.Context, op uint8, payload []byte) (*wire.Cursor, error) {
	type answer struct {
		resp []byte
		err  error
	}
	ch := make(chan answer, 1)
	if err := s.send(append(wire.NewFrame(0, op), payload...), func(resp []byte, err error) { ch <- answer{resp, err} }); err != nil {
		return nil, err
	}
	select {
	case a := <-ch:
		if a.err != nil {
			return nil, a.err
		}
		return answered(a.resp)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Close ends the session. Calling it twice, and after Commit, is harmless.
func (s *Session) Close() error {
	s.end(ErrGone)
	return nil
}

// ChunkSize is the unit in which disks are stored, bytes.
func (s *Session) ChunkSize() int { return s.chunkSize }

// Parent is the newest point of the VM that the same token made, nil for none. It has an id
// and disks; of these name, key, size, change id and stats.Data.
func (s *Session) Parent() *store.Point { return s.parent }

// Stored is the bytes of chunks sent so far, compressed. What of them the repository had is not known.
func (s *Session) Stored() int64 { return s.sent.Load() }
