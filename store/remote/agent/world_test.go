package agent

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
	"github.com/holdfast-backup/holdfast/store/remote/wire"
)

// The tests here speak the protocol by hand, as a client would that means harm.

const chunkSize = store.MinChunkSize

type world struct {
	t      testing.TB
	bucket bucket.Bucket
	repo   *store.Repo
	leases *store.MemoryLeases
	srv    *Server
	addr   string
	mu     sync.Mutex // guards following
	log    strings.Builder
}

func newWorld(t testing.TB, opt ServerOptions, b bucket.Bucket, tweak ...func(*Server)) *world {
	t.Helper()
	w := &world{t: t, bucket: b, leases: &store.MemoryLeases{}}
	if w.bucket == nil {
		w.bucket = bucket.NewMemory()
	}
	if err := store.Init(t.Context(), w.bucket, store.InitOptions{Passphrase: []byte("secret"), ChunkSize: chunkSize}, time.Now()); err != nil {
		t.Fatal(err)
	}
	w.repo = w.open()
	say := func(s string) {
		w.mu.Lock()
		defer w.mu.Unlock()
		fmt.Fprintln(&w.log, s)
	}
	opt.Note, opt.Warn = say, say
	srv, err := NewServer(w.repo, opt)
	if err != nil {
		t.Fatal(err)
	}
	srv.checkEvery = 50 * time.Millisecond
	srv.handshake = 5 * time.Second
	for _, fn := range tweak {
		fn(srv)
	}
	w.srv = srv
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w.addr = ln.Addr().String()
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(ln) }()
	t.Cleanup(func() {
		srv.Close()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if live, err := w.leases.Live(context.Background()); err != nil || len(live) != 0 {
			t.Errorf("leases are left: %d, %v", len(live), err)
		}
	})
	return w
}

func (w *world) open() *store.Repo {
	w.t.Helper()
	open := store.MemoryIndex()
	if g, ok := w.bucket.(*gated); ok {
		open = g.index
	}
	r, err := store.Open(w.t.Context(), w.bucket, open, store.OpenOptions{Leases: w.leases, Passphrase: func() ([]byte, error) { return []byte("secret"), nil }})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { r.Close() })
	return r
}

func (w *world) token(info store.AgentInfo) (Token, store.AgentInfo) {
	w.t.Helper()
	secret, info, err := w.repo.AddAgent(w.t.Context(), info, time.Now())
	if err != nil {
		w.t.Fatal(err)
	}
	token, err := NewToken(w.repo, info, secret)
	if err != nil {
		w.t.Fatal(err)
	}
	return token, info
}

// quiet waits until no session is left.
func (w *world) quiet() {
	w.t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		w.srv.mu.Lock()
		n := w.srv.inUse[""]
		w.srv.mu.Unlock()
		if n == 0 {
			return
		}
		if time.Now().After(end) {
			w.t.Fatalf("%d sessions do not end", n)
		}
	}
}

// points are the paths of all points.
func (w *world) points() (paths []string) {
	w.t.Helper()
	list, err := w.repo.Points(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	for _, s := range list {
		paths = append(paths, s.Path())
	}
	return paths
}

// peer is one connection to the server.
type peer struct {
	t    testing.TB
	conn *tls.Conn
	in   *bufio.Reader
	n    uint64
}

// dial only does the TLS handshake.
func (w *world) dial() *peer {
	w.t.Helper()
	raw, err := net.Dial("tcp", w.addr)
	if err != nil {
		w.t.Fatal(err)
	}
	raw.SetDeadline(time.Now().Add(30 * time.Second))
	pin, err := pinOf(w.repo.AgentTLSKey())
	if err != nil {
		w.t.Fatal(err)
	}
	conn := tls.Client(raw, clientTLS(pin))
	w.t.Cleanup(func() { raw.Close() })
	return &peer{t: w.t, conn: conn, in: bufio.NewReader(conn)}
}

// frame is a request. Its length is right.
func frame(n uint64, op uint8, payload []byte) []byte {
	b, err := wire.Finish(append(wire.NewFrame(n, op), payload...), 1<<30)
	if err != nil {
		panic(err)
	}
	return b
}

// ask sends a request and gives all of the response behind its length, nil when the
// connection ended.
func (p *peer) ask(op uint8, payload []byte) []byte {
	p.t.Helper()
	p.n++
	if op == opHello {
		p.n = 0
	}
	p.conn.Write(frame(p.n, op, payload)) // an end shows in the answer
	return p.answer()
}

func (p *peer) answer() []byte {
	p.t.Helper()
	resp, err := wire.ReadFrame(p.in, nil, maxAnswer)
	if err != nil {
		if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() {
			p.t.Fatal("no answer and no end of the connection")
		}
		return nil
	}
	return resp
}

// ok wants a request to be done and gives what it returned.
func (p *peer) ok(op uint8, payload []byte) []byte {
	p.t.Helper()
	resp := p.ask(op, payload)
	if resp == nil || resp[8] != statusOK {
		p.t.Fatalf("operation %#x: %.300q", op, resp)
	}
	return resp[wire.HeadLen:]
}

// refused wants a request to get that status and, unless it is one of access, the connection to end.
func (p *peer) refused(status uint8, op uint8, payload []byte) []byte {
	p.t.Helper()
	resp := p.ask(op, payload)
	switch {
	case resp == nil && status == statusRefused: // the answer may be lost with the connection
		return nil
	case resp == nil || resp[8] != status:
		p.t.Errorf("operation %#x: %.300q, want status %d", op, resp, status)
		return resp
	case status == statusRefused && p.answer() != nil:
		p.t.Errorf("operation %#x: the connection goes on", op)
	}
	return resp
}

func hello(t Token) []byte {
	b := binary.LittleEndian.AppendUint32(nil, Version)
	return append(append(b, t.ID[:]...), t.Secret[:]...)
}

func vmNamed(name string) []byte { return fmt.Appendf(nil, `{"name":%q,"source":"test"}`, name) }

// login connects and shows a token.
func (w *world) login(t Token) *peer {
	w.t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		p := w.dial()
		resp := p.ask(opHello, hello(t))
		// A session that was refused something takes a moment to end.
		if resp != nil && resp[8] == statusRefused && time.Now().Before(end) {
			continue
		}
		if resp == nil || resp[8] != statusOK {
			w.t.Fatalf("login: %q", resp)
		}
		return p
	}
}

// begin does so and begins a point.
func (w *world) begin(t Token, vm string) (*peer, parentMessage) {
	w.t.Helper()
	p := w.login(t)
	var m parentMessage
	if err := json.Unmarshal(p.ok(opBegin, vmNamed(vm)), &m); err != nil {
		w.t.Fatal(err)
	}
	return p, m
}

func noise(seed uint64) []byte {
	b := make([]byte, chunkSize)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(b)
	return b
}

// raw is a put of chunks as they are.
func raw(chunks ...[]byte) []byte {
	b := binary.LittleEndian.AppendUint32(nil, uint32(len(chunks)))
	for _, c := range chunks {
		b = wire.AppendBytes(append(b, 0), c)
	}
	return b
}

// put sends a chunk and gives its receipt.
func (p *peer) put(chunk []byte) []byte { p.t.Helper(); return p.ok(opPut, raw(chunk)) }

func (w *world) id(chunk []byte) store.ID {
	c, err := store.NewChunkCoder(w.repo.ChunkIDKey())
	if err != nil {
		w.t.Fatal(err)
	}
	defer c.Close()
	return c.ID(chunk)
}

func mapOf(disk uint32, size uint64) []byte {
	return binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint32(nil, disk), size)
}

func entry(i uint64, id store.ID, receipt []byte) []byte {
	b := binary.LittleEndian.AppendUint64([]byte{0}, i)
	return append(append(b, id[:]...), receipt...)
}

func hole(from, to uint64) []byte {
	return binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64([]byte{1}, from), to)
}

func describe(size int64, root []byte) []byte {
	b, _ := json.Marshal(pointMessage{Consistency: "crash", Disks: list([]diskMessage{{Key: "k", Size: size, Root: root, ChangeID: "1"}})})
	return b
}

// add makes a point of one disk out of chunks.
func (w *world) add(t Token, vm string, chunks ...[]byte) (*peer, []byte) {
	w.t.Helper()
	p, _ := w.begin(t, vm)
	size := uint64(len(chunks) * chunkSize)
	p.ok(opMap, mapOf(0, size))
	for i, c := range chunks {
		p.ok(opWrite, entry(uint64(i), w.id(c), p.put(c)))
	}
	root := bytes.Clone(p.ok(opFinish, nil))
	p.ok(opCommit, describe(int64(size), root))
	return p, root
}

// local makes a point of this host out of one chunk.
func (w *world) local(vm string, chunk []byte) *store.Point {
	w.t.Helper()
	d, err := w.repo.NewDraft(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	defer d.Close()
	cw, err := d.Writer()
	if err != nil {
		w.t.Fatal(err)
	}
	defer cw.Close()
	ids := make([]store.ID, 1)
	if _, err := cw.Write(w.t.Context(), chunk, make([]store.ID, 1), ids); err != nil {
		w.t.Fatal(err)
	}
	m, err := d.Map(w.t.Context(), store.Root{}, chunkSize)
	if err == nil {
		err = m.Set(w.t.Context(), 0, ids[0])
	}
	if err != nil {
		w.t.Fatal(err)
	}
	root, err := m.Finish(w.t.Context(), chunkSize)
	if err != nil {
		w.t.Fatal(err)
	}
	p := &store.Point{VM: store.VM{Name: vm}, Time: time.Now(), Disks: []store.Disk{{Name: "disk0", Key: "k", Size: chunkSize, Root: root.Page[:]}}}
	if err := d.Commit(w.t.Context(), p); err != nil {
		w.t.Fatal(err)
	}
	return p
}
