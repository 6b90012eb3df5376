package agent

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
	"github.com/holdfast-backup/holdfast/store/remote/wire"
)

// TestAdd: what the tests here are made of can do what a client may do.
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
// before the repository is asked. A commit waits until it has answered, all the same.
func TestPutTellsNothing(t *testing.T) {
	gate := &gated{Memory: bucket.NewMemory(), waiting: make(chan struct{}, 1), pass: make(chan struct{})}
	defer close(gate.pass)
	w := newWorld(t, ServerOptions{}, gate)
	token, _ := w.token(store.AgentInfo{})
	w.local("bank", noise(1))
	for i, chunk := range [][]byte{noise(1), noise(2)} {
		p, _ := w.begin(token, fmt.Sprint("vm", i))
		gate.next.Store(true)
		resp := p.ask(opPut, raw(chunk))
		if resp == nil || resp[8] != statusOK || len(resp) != wire.HeadLen+receiptLen {
			t.Fatalf("%.100q", resp)
		}
		<-gate.waiting
		p.ok(opMap, mapOf(0, chunkSize))
		p.ok(opWrite, entry(0, w.id(chunk), resp[wire.HeadLen:]))
		root := bytes.Clone(p.ok(opFinish, nil))
		p.n++
		p.conn.Write(frame(p.n, opCommit, describe(chunkSize, root)))
		time.Sleep(100 * time.Millisecond)
		if n := len(w.points()); n != 1+i {
			t.Errorf("chunk %d: there are %d points before it is stored", i, n)
		}
		gate.pass <- struct{}{}
		if resp := p.answer(); resp == nil || resp[8] != statusOK {
			t.Errorf("commit: %.100q", resp)
		}
		s, err := w.repo.Latest(t.Context(), fmt.Sprint("vm", i))
		if err != nil {
			t.Fatal(err)
		}
		if s.New != int64(i)*chunkSize {
			t.Errorf("chunk %d: %d bytes are new", i, s.New)
		}
	}
}

// gated is a bucket with an index of which one look-up waits.
type gated struct {
	*bucket.Memory
	next    atomic.Bool   // it is the next one
	waiting chan struct{} // receives when it has begun
	pass    chan struct{} // lets it go on
}

type gatedIndex struct {
	store.Index
	gate *gated
}

func (g *gated) index(ctx context.Context, repo [16]byte, check store.IndexCheck) (store.Index, error) {
	x, err := store.MemoryIndex()(ctx, repo, check)
	return gatedIndex{x, g}, err
}

func (x gatedIndex) Lookup(ctx context.Context, ids []store.ID, locs []store.Loc) error {
	if x.gate.next.Swap(false) {
		x.gate.waiting <- struct{}{}
		<-x.gate.pass
	}
	return x.Index.Lookup(ctx, ids, locs)
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
