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
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

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
	r, err := store.Open(w.t.Context(), w.bucket, store.MemoryIndex(), store.OpenOptions{Leases: w.leases, Passphrase: func() ([]byte, error) { return []byte("secret"), nil }})
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

// TestAdd: the helpers above can do what a client may do.
func TestAdd(t *testing.T) {
	w := newWorld(t, ServerOptions{}, nil)
	token, info := w.token(store.AgentInfo{})
	p, root := w.add(token, "web", noise(1), noise(2))
	p.refused(statusRefused, opCommit, describe(2*chunkSize, root)) // one session, one point
	s, err := w.repo.Latest(t.Context(), "web")
	if err != nil {
		t.Fatal(err)
	}
	point, err := w.repo.Point(t.Context(), s.ID)
	if err != nil || point.Agent != info.ID || point.Disks[0].Name != "disk0" || point.Stats.New != 2*chunkSize {
		t.Fatalf("%+v, %v", point, err)
	}
	img, err := w.repo.OpenDisk(point, "disk0")
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 2*chunkSize)
	if _, err := img.Checked().ReadAt(got, 0); err != nil && err != io.EOF || !bytes.Equal(got, append(noise(1), noise(2)...)) {
		t.Error("it does not read back")
	}
}

// TestOperationsOfTheSocket: nothing of the protocol between processes of one host is known here.
func TestOperationsOfTheSocket(t *testing.T) {
	w := newWorld(t, ServerOptions{}, nil)
	token, _ := w.token(store.AgentInfo{})
	w.local("web", noise(1))
	before := w.points()
	socketHello := append(binary.LittleEndian.AppendUint32(nil, 2), make([]byte, 16)...)
	for op := range 256 {
		if op >= opHello && op <= opPing {
			continue
		}
		for _, payload := range [][]byte{nil, socketHello, make([]byte, 36)} {
			if resp := w.dial().ask(uint8(op), payload); resp != nil {
				t.Errorf("operation %d before a token: %q", op, resp)
			}
		}
		if op > 40 && op%16 != 0 { // the socket has 23
			continue
		}
		w.login(token).refused(statusRefused, uint8(op), nil)
		p, _ := w.begin(token, "mine")
		p.refused(statusRefused, uint8(op), nil)
		p, _ = w.begin(token, "mine")
		p.refused(statusRefused, uint8(op), make([]byte, 36))
	}
	if after := w.points(); len(after) != len(before) {
		t.Errorf("points %q, before %q", after, before)
	}
}

// TestForeignChunks: an id without the receipt of this session is refused in the very same
// bytes whether the chunk is stored or not, and whoever stored it.
func TestForeignChunks(t *testing.T) {
	w := newWorld(t, ServerOptions{}, nil)
	mine, _ := w.token(store.AgentInfo{})
	other, _ := w.token(store.AgentInfo{})
	secret := noise(7)
	w.local("bank", secret)
	foreign, _ := w.begin(other, "theirs")
	theirs := foreign.put(secret)
	old, _ := w.begin(mine, "one")
	earlier := old.put(noise(8))
	committed, root := w.add(mine, "own", noise(8))
	_ = committed
	random := make([]byte, receiptLen)
	rand.NewChaCha8([32]byte{9}).Read(random)

	for name, receipt := range map[string][]byte{
		"none": make([]byte, receiptLen), "random": random,
		"of the other token":              theirs,
		"of an earlier session of my own": earlier,
	} {
		var answers [][]byte
		for _, chunk := range [][]byte{secret, noise(8), noise(99)} { // of others, of mine, of nobody
			p, _ := w.begin(mine, "x")
			p.ok(opMap, mapOf(0, chunkSize))
			answers = append(answers, p.refused(statusRefused, opWrite, entry(0, w.id(chunk), receipt)))
		}
		if answers[0] == nil || !bytes.Equal(answers[0], answers[1]) || !bytes.Equal(answers[0], answers[2]) {
			t.Errorf("receipt %s: the answers differ: %q", name, answers)
		}
	}
	// A receipt of one chunk for another.
	p, _ := w.begin(mine, "x")
	receipt := p.put(noise(10))
	p.ok(opMap, mapOf(0, chunkSize))
	p.refused(statusRefused, opWrite, entry(0, w.id(secret), receipt))
	// Shorter entries.
	p, _ = w.begin(mine, "x")
	p.ok(opMap, mapOf(0, chunkSize))
	p.refused(statusRefused, opWrite, entry(0, w.id(secret), nil))
	// The root of a map that was not finished here: of somebody's point, and of one's own.
	bank, err := w.repo.Latest(t.Context(), "bank")
	if err != nil {
		t.Fatal(err)
	}
	point, err := w.repo.Point(t.Context(), bank.ID)
	if err != nil {
		t.Fatal(err)
	}
	var answers [][]byte
	for _, r := range [][]byte{point.Disks[0].Root, root, bytes.Repeat([]byte{1}, 32)} {
		p, _ := w.begin(mine, "x")
		answers = append(answers, p.refused(statusRefused, opCommit, describe(chunkSize, r)))
		answers[len(answers)-1] = bytes.ReplaceAll(answers[len(answers)-1], fmt.Appendf(nil, "%x", r), []byte("ROOT"))
	}
	if answers[0] == nil || !bytes.Equal(answers[0], answers[1]) || !bytes.Equal(answers[0], answers[2]) {
		t.Errorf("foreign roots: %q", answers)
	}
	if got := w.points(); len(got) != 2 {
		t.Errorf("there are points %q", got)
	}
}

// TestPutTellsNothing: a chunk that is stored and one that is not are answered alike, and
// before the repository is asked.
func TestPutTellsNothing(t *testing.T) {
	gate := &gated{Memory: bucket.NewMemory(), waiting: make(chan struct{}, 10), pass: make(chan struct{})}
	w := newWorld(t, ServerOptions{}, gate)
	token, _ := w.token(store.AgentInfo{})
	w.local("bank", noise(1))
	gate.on.Store(true)
	p, _ := w.begin(token, "x")
	for _, chunk := range [][]byte{noise(1), noise(2)} {
		if resp := p.ask(opPut, raw(chunk)); resp == nil || resp[8] != statusOK || len(resp) != wire.HeadLen+receiptLen {
			t.Errorf("%.100q", resp)
		}
	}
	// The write of the second is still held up.
	select {
	case <-gate.waiting:
	case <-time.After(20 * time.Second):
		t.Error("nothing is written")
	}
	close(gate.pass)
}

// gated is a bucket whose new packs wait.
type gated struct {
	*bucket.Memory
	on      atomic.Bool
	waiting chan struct{} // receives when one begins to
	pass    chan struct{}
}

func (g *gated) Create(ctx context.Context, name string) (bucket.Writer, error) {
	if g.on.Load() && strings.HasPrefix(name, "packs/") {
		g.waiting <- struct{}{}
		<-g.pass
	}
	return g.Memory.Create(ctx, name)
}

// allocated is the memory that fn allocates, bytes, all goroutines together.
func allocated(fn func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	fn()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// TestBadChunks: what no client makes ends the session, and costs no memory.
func TestBadChunks(t *testing.T) {
	w := newWorld(t, ServerOptions{}, nil)
	token, _ := w.token(store.AgentInfo{})
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	bomb := enc.EncodeAll(make([]byte, 256<<20), nil)
	coded := func(codec byte, body []byte) []byte {
		return wire.AppendBytes(append(binary.LittleEndian.AppendUint32(nil, 1), codec), body)
	}
	flipped := enc.EncodeAll(bytes.Repeat([]byte("text"), chunkSize/4), nil)
	flipped[len(flipped)/2] ^= 0x55
	for name, payload := range map[string][]byte{
		"bomb": coded(1, bomb), "zeros": raw(make([]byte, chunkSize)), "short": raw(noise(1)[1:]), "long": raw(append(noise(1), 1)),
		"codec": coded(7, noise(1)), "damaged": coded(1, flipped), "empty": coded(1, nil), "nothing": nil,
		"one announced": binary.LittleEndian.AppendUint32(nil, 1), "four billion announced": binary.LittleEndian.AppendUint32(nil, 1<<32-1),
		"a long body announced": append(binary.LittleEndian.AppendUint32(nil, 1), 0, 0xff, 0xff, 0xff, 0xff),
		"rest":                  append(raw(noise(1)), 0),
		"too many":              raw(noise(1), noise(1), noise(1), noise(1), noise(1), noise(1), noise(1), noise(1), noise(1), noise(1), noise(1), noise(1), noise(1), noise(1), noise(1), noise(1), noise(1)),
	} {
		p, _ := w.begin(token, "x")
		if n := allocated(func() { p.refused(statusRefused, opPut, payload) }); n > 24<<20 {
			t.Errorf("%s costs %d MiB", name, n>>20)
		}
	}
	// What is not what it is called: the receipt is of what was sent.
	p, _ := w.begin(token, "x")
	receipt := p.put(noise(1))
	p.ok(opMap, mapOf(0, chunkSize))
	p.refused(statusRefused, opWrite, entry(0, w.id(noise(2)), receipt))
	if got := w.points(); got != nil {
		t.Error(got)
	}
}

// TestLengthsThatLie: a frame costs what was sent of it, not what it says.
func TestLengthsThatLie(t *testing.T) {
	w := newWorld(t, ServerOptions{}, nil)
	token, _ := w.token(store.AgentInfo{})
	for _, stage := range []func() *peer{
		w.dial,
		func() *peer { return w.login(token) },
		func() *peer { p, _ := w.begin(token, "x"); return p },
	} {
		for op := opHello; op <= opPing; op++ {
			for _, n := range []uint32{0, 8, uint32(bound(uint8(op), chunkSize)) + wire.HeadLen + 1, 1 << 30, 1<<32 - 1} {
				p := stage()
				used := allocated(func() {
					b := binary.LittleEndian.AppendUint32(nil, n)
					p.conn.Write(append(binary.LittleEndian.AppendUint64(b, 1), byte(op)))
					for resp := p.answer(); resp != nil; resp = p.answer() {
						if resp[8] != statusRefused {
							t.Errorf("operation %#x of %d bytes: %.100q", op, n, resp)
						}
					}
				})
				if used > 2<<20 {
					t.Errorf("operation %#x of %d bytes costs %d KiB", op, n, used>>10)
				}
			}
		}
		// As long as may be, but it never comes.
		p := stage()
		used := allocated(func() {
			b := binary.LittleEndian.AppendUint32(nil, uint32(bound(opPut, chunkSize)))
			p.conn.Write(append(binary.LittleEndian.AppendUint64(b, 1), opPut))
			p.conn.CloseWrite()
			p.answer()
		})
		if used > 1<<20 {
			t.Errorf("a put that does not come costs %d KiB", used>>10)
		}
	}
}

// TestMaps: what is out of place ends the session.
func TestMaps(t *testing.T) {
	w := newWorld(t, ServerOptions{}, nil)
	token, _ := w.token(store.AgentInfo{})
	w.add(token, "vm", noise(1), noise(2), noise(3))
	u32 := func(v uint32) []byte { return binary.LittleEndian.AppendUint32(nil, v) }
	ids := func(disk uint32, first uint64, n uint32) []byte {
		return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint64(u32(disk), first), n)
	}
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	for name, fn := range map[string]func(p *peer, r []byte, id store.ID){
		"chunk past the end": func(p *peer, r []byte, id store.ID) {
			p.ok(opMap, mapOf(0, 2*chunkSize-5))
			p.refused(statusRefused, opWrite, entry(2, id, r))
		},
		"chunk far past the end": func(p *peer, r []byte, id store.ID) {
			p.ok(opMap, mapOf(0, chunkSize))
			p.refused(statusRefused, opWrite, entry(1<<63+5, id, r))
		},
		"hole past the end": func(p *peer, _ []byte, _ store.ID) {
			p.ok(opMap, mapOf(0, chunkSize))
			p.refused(statusRefused, opWrite, hole(0, 2))
		},
		"hole backwards": func(p *peer, _ []byte, _ store.ID) {
			p.ok(opMap, mapOf(0, 5*chunkSize))
			p.refused(statusRefused, opWrite, hole(3, 2))
		},
		"hole without end": func(p *peer, _ []byte, _ store.ID) {
			p.ok(opMap, mapOf(0, 5*chunkSize))
			p.refused(statusRefused, opWrite, hole(1<<63, 1<<64-1))
		},
		"chunk twice": func(p *peer, r []byte, id store.ID) {
			p.ok(opMap, mapOf(0, 5*chunkSize))
			p.refused(statusRefused, opWrite, join(entry(1, id, r), entry(1, id, r)))
		},
		"out of order": func(p *peer, r []byte, id store.ID) {
			p.ok(opMap, mapOf(0, 5*chunkSize))
			p.ok(opWrite, entry(3, id, r))
			p.refused(statusRefused, opWrite, entry(2, id, r))
		},
		"zero id": func(p *peer, r []byte, _ store.ID) {
			p.ok(opMap, mapOf(0, chunkSize))
			p.refused(statusRefused, opWrite, entry(0, store.ID{}, r))
		},
		"unknown entry": func(p *peer, _ []byte, _ store.ID) {
			p.ok(opMap, mapOf(0, chunkSize))
			p.refused(statusRefused, opWrite, []byte{9})
		},
		"half an entry": func(p *peer, r []byte, id store.ID) {
			p.ok(opMap, mapOf(0, chunkSize))
			p.refused(statusRefused, opWrite, entry(0, id, r)[:40])
		},
		"write without map":  func(p *peer, r []byte, id store.ID) { p.refused(statusRefused, opWrite, entry(0, id, r)) },
		"finish without map": func(p *peer, _ []byte, _ store.ID) { p.refused(statusRefused, opFinish, nil) },
		"commit without finish": func(p *peer, r []byte, id store.ID) {
			p.ok(opMap, mapOf(0, chunkSize))
			p.ok(opWrite, entry(0, id, r))
			p.refused(statusRefused, opCommit, describe(chunkSize, nil))
		},
		"commit with a map open": func(p *peer, _ []byte, _ store.ID) {
			p.ok(opMap, mapOf(0, 0))
			p.ok(opFinish, nil)
			p.ok(opMap, mapOf(0, chunkSize))
			p.refused(statusRefused, opCommit, describe(0, nil))
		},
		"commit without map": func(p *peer, _ []byte, _ store.ID) {
			p.refused(statusRefused, opCommit, describe(chunkSize, nil))
		},
		"another size": func(p *peer, r []byte, id store.ID) {
			p.ok(opMap, mapOf(0, chunkSize))
			p.ok(opWrite, entry(0, id, r))
			p.refused(statusRefused, opCommit, describe(2*chunkSize, p.ok(opFinish, nil)))
		},
		"negative size":       func(p *peer, _ []byte, _ store.ID) { p.refused(statusRefused, opCommit, describe(-1, nil)) },
		"huge disk":           func(p *peer, _ []byte, _ store.ID) { p.refused(statusRefused, opMap, mapOf(0, 1<<62)) },
		"endless disk":        func(p *peer, _ []byte, _ store.ID) { p.refused(statusRefused, opMap, mapOf(0, 1<<64-1)) },
		"base not asked for":  func(p *peer, _ []byte, _ store.ID) { p.refused(statusRefused, opMap, mapOf(1, chunkSize)) },
		"ids not asked for":   func(p *peer, _ []byte, _ store.ID) { p.refused(statusRefused, opIDs, ids(0, 0, 1)) },
		"no such disk":        func(p *peer, _ []byte, _ store.ID) { p.refused(statusRefused, opBase, u32(1)) },
		"no such disk at all": func(p *peer, _ []byte, _ store.ID) { p.refused(statusRefused, opBase, u32(1<<32-1)) },
		"ids past the end": func(p *peer, _ []byte, _ store.ID) {
			p.ok(opBase, u32(0))
			p.refused(statusRefused, opIDs, ids(0, 2, 2))
		},
		"ids far away": func(p *peer, _ []byte, _ store.ID) {
			p.ok(opBase, u32(0))
			p.refused(statusRefused, opIDs, ids(0, 1<<63+1, 1))
		},
		"too many ids": func(p *peer, _ []byte, _ store.ID) {
			p.ok(opBase, u32(0))
			p.refused(statusRefused, opIDs, ids(0, 0, 1<<32-1))
		},
		"begin twice": func(p *peer, _ []byte, _ store.ID) { p.refused(statusRefused, opBegin, vmNamed("vm")) },
		"hello twice": func(p *peer, _ []byte, _ store.ID) { p.refused(statusRefused, opHello, hello(token)) },
		"rest":        func(p *peer, _ []byte, _ store.ID) { p.refused(statusRefused, opFinish, []byte{1}) },
	} {
		t.Run(name, func(t *testing.T) {
			p, parent := w.begin(token, "vm")
			if parent.ID == nil || len(parent.Disks) != 1 {
				t.Fatalf("%+v", parent)
			}
			p.t = t
			fn(p, p.put(noise(1)), w.id(noise(1)))
		})
	}
	for _, op := range []uint8{opBase, opIDs, opPut, opMap, opWrite, opFinish, opCommit} {
		w.login(token).refused(statusRefused, op, nil) // before begin
	}
	if got := w.points(); len(got) != 1 {
		t.Error(got)
	}
	// A huge disk of holes is no work.
	p, _ := w.begin(token, "huge")
	p.ok(opMap, mapOf(0, maxDiskSize))
	p.ok(opWrite, hole(0, maxDiskSize/chunkSize))
	p.ok(opFinish, nil)
}
