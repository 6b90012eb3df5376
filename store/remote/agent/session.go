package agent

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
	"github.com/holdfast-backup/holdfast/store/remote/wire"
)

const (
	maxPutsAtWork = 4    // of one session: each has its frame and the memory of two chunks
	maxWaiting    = 4    // requests that wait for their turn
	maxMaps       = 8192 // finished in one session
)

// session is one proven connection: it makes one point.
type session struct {
	srv   *Server
	conn  net.Conn
	token store.AgentInfo
	from  string // its address
	key   receiptKey

	wmu sync.Mutex // one response at a time

	// Of the requests that are carried out in order, set by begin.
	vm      store.VM
	time    time.Time // when it began, by the clock of this host
	parent  *store.Point
	usable  map[uint32]bool // disks of the parent that the point may share => true
	release func()          // of the parent
	draft   atomic.Pointer[store.Draft]
	m       *store.MapBuilder // that is open; nil for none
	size    int64             // of its disk, bytes
	maps    map[finished]bool
	done    bool // the point is committed

	slots  chan struct{} // one for each put at work
	fresh  atomic.Int64  // bytes in chunks that the repository did not hold
	failed atomic.Pointer[error]
}

// finished is a map that can be part of the point.
type finished struct {
	page store.ID
	size int64
}

// name is the session in messages.
func (x *session) name() string {
	name := "token " + x.token.ID
	if x.token.Label != "" {
		name += fmt.Sprintf(" (%s)", x.token.Label)
	}
	return name + " from " + x.from
}

// serve answers requests until the peer goes, is silent, or breaks the protocol.
func (x *session) serve(in *bufio.Reader) {
	ctx, cancel := context.WithCancel(x.srv.ctx)
	cs := x.srv.repo.ChunkSize()
	x.srv.opt.Note(x.name() + ": connected")
	inOrder := make(chan []byte, maxWaiting)
	var lane sync.WaitGroup
	lane.Go(func() {
		for req := range inOrder {
			if ctx.Err() == nil {
				x.answer(ctx, req)
			}
		}
	})
	x.slots = make(chan struct{}, maxPutsAtWork)
	var puts sync.WaitGroup
	writers := make(chan *store.ChunkWriter, maxPutsAtWork) // that are not in use
	for {
		req, err := readRequest(in, cs)
		if err != nil {
			if errors.Is(err, errProtocol) {
				x.refuse(0, err)
			}
			break
		}
		switch req[8] {
		case opPing:
			x.send(wire.NewFrame(binary.LittleEndian.Uint64(req), statusOK))
		case opPut:
			x.slots <- struct{}{}
			puts.Go(func() {
				defer func() { <-x.slots }()
				x.put(ctx, req, writers)
			})
		default:
			inOrder <- req
		}
	}
	cancel()
	close(inOrder)
	lane.Wait()
	puts.Wait()
	close(writers)
	for w := range writers {
		w.Close()
	}
	x.end()
}

// end gives up what the session holds. Chunks that it stored stay for gc.
func (x *session) end() {
	x.dropMap()
	if d := x.draft.Load(); d != nil {
		if err := d.Close(); err != nil {
			x.srv.opt.Warn(fmt.Sprintf("%s: %v", x.name(), err))
		}
	}
	if x.release != nil {
		x.release()
	}
	if x.done {
		return
	}
	x.srv.opt.Note(x.name() + ": disconnected without a point")
}

func (x *session) dropMap() {
	if x.m != nil {
		x.m.Close(context.Background()) // it only puts pages into the index, which is a cache
		x.m = nil
	}
}

// send writes a response. A peer that is gone is noticed by the read.
func (x *session) send(b []byte) {
	b, err := wire.Finish(b, maxAnswer)
	if err != nil {
		x.conn.Close()
		return
	}
	x.wmu.Lock()
	defer x.wmu.Unlock()
	if _, err := x.conn.Write(b); err != nil {
		x.conn.Close()
	}
}

// refuse ends a session whose peer does not keep to the protocol.
func (x *session) refuse(number uint64, err error) {
	x.srv.refuse("%s: %v", x.name(), err)
	x.send(append(wire.NewFrame(number, statusRefused), err.Error()...))
	x.conn.Close()
}

// fail logs an error and tells the peer of it.
func (x *session) fail(number uint64, err error) {
	switch {
	case errors.Is(err, errProtocol), errors.Is(err, wire.ErrMalformed):
		x.refuse(number, err)
		return
	case errors.Is(err, store.ErrToken), errors.Is(err, ErrVM):
		x.srv.refuse("%s: %v", x.name(), err)
	case x.srv.ctx.Err() == nil && !errors.Is(err, context.Canceled):
		x.srv.opt.Warn(fmt.Sprintf("%s: %v", x.name(), err))
	}
	x.tell(number, err)
}

// tell tells the peer of an error. It gets the words of those that are about what it asked for
// alone; others may name files, chunks and points of this host.
func (x *session) tell(number uint64, err error) {
	status, text := uint8(statusFailed), ""
	switch {
	case errors.Is(err, store.ErrToken), errors.Is(err, ErrVM):
		status, text = statusAccess, err.Error()
	case errors.Is(err, bucket.ErrFull):
		status = statusFull
	case errors.Is(err, store.ErrDamaged):
		status = statusDamaged
	}
	x.send(append(wire.NewFrame(number, status), text...))
}

// put decodes, answers, and then stores: the time of the answer says nothing of what the
// repository holds.
func (x *session) put(ctx context.Context, req []byte, writers chan *store.ChunkWriter) {
	number, c := binary.LittleEndian.Uint64(req), wire.NewCursor(req[wire.HeadLen:])
	draft := x.draft.Load()
	if draft == nil {
		x.fail(number, fmt.Errorf("%w: put before begin", errProtocol))
		return
	}
	if err := x.failed.Load(); err != nil { // the point is lost
		x.tell(number, *err)
		return
	}
	var w *store.ChunkWriter
	select {
	case w = <-writers:
	default:
		var err error
		if w, err = draft.Writer(); err != nil {
			x.fail(number, err)
			return
		}
	}
	defer func() { writers <- w }() // there is room for as many as there are slots
	n := c.Count(5)
	if n > chunksOfPut(x.srv.repo.ChunkSize()) {
		x.fail(number, fmt.Errorf("%w: a put of %d chunks", errProtocol, n))
		return
	}
	chunks := make([]store.CodedChunk, n)
	out := wire.NewFrame(number, statusOK)
	for i := range chunks {
		chunks[i].Codec, chunks[i].Body = c.U8(), c.Bytes()
		if c.Err() != nil {
			break
		}
		if err := w.Decode(&chunks[i]); err != nil {
			x.fail(number, fmt.Errorf("%w: chunk %d of a put: %v", errProtocol, i, err))
			return
		}
		r := x.key.of(chunks[i].ID)
		out = append(out, r[:]...)
	}
	if err := c.End(); err != nil {
		x.fail(number, err)
		return
	}
	x.send(out)
	written, err := w.WriteCoded(context.WithoutCancel(ctx), chunks)
	if err != nil {
		x.failed.CompareAndSwap(nil, &err)
		x.srv.opt.Warn(fmt.Sprintf("%s: %v", x.name(), err))
		return
	}
	x.fresh.Add(written.New)
}

// answer carries out a request in its turn.
func (x *session) answer(ctx context.Context, req []byte) {
	number, op, c := binary.LittleEndian.Uint64(req), req[8], wire.NewCursor(req[wire.HeadLen:])
	var out []byte
	var err error
	if began := x.draft.Load() != nil; op == opHello || began == (op == opBegin) || x.done {
		err = fmt.Errorf("%w: operation %#x is out of its turn", errProtocol, op)
	} else {
		out, err = x.carryOut(ctx, op, &c, wire.NewFrame(number, statusOK))
	}
	if err != nil {
		x.fail(number, err)
		return
	}
	x.send(out)
}

func (x *session) carryOut(ctx context.Context, op uint8, in *wire.Cursor, out []byte) ([]byte, error) {
	switch op {
	case opBegin:
		return x.begin(ctx, in.Rest(), out)
	case opBase:
		disk := in.U32()
		if err := in.End(); err != nil {
			return nil, err
		}
		whole, err := x.base(ctx, disk)
		if whole {
			return append(out, 1), err
		}
		return append(out, 0), err
	case opIDs:
		disk, first, n := in.U32(), in.U64(), in.U32()
		if err := in.End(); err != nil {
			return nil, err
		}
		return x.ids(ctx, disk, first, n, out)
	case opMap:
		disk, size := in.U32(), in.U64()
		if err := in.End(); err != nil {
			return nil, err
		}
		return out, x.newMap(ctx, disk, size)
	case opWrite:
		err := x.write(ctx, in)
		if err != nil {
			x.dropMap()
		}
		return out, err
	case opFinish:
		if err := in.End(); err != nil {
			return nil, err
		}
		root, err := x.finish(ctx)
		return append(out, root[:]...), err
	case opCommit:
		return x.commit(ctx, in.Rest(), out)
	}
	return nil, fmt.Errorf("%w: operation %#x", errProtocol, op)
}

// begin says which VM the point is of, and gets what it is compared with.
func (x *session) begin(ctx context.Context, text, out []byte) ([]byte, error) {
	var vm store.VM
	if err := decode(text, &vm); err != nil {
		return nil, err
	}
	if err := errors.Join(checkText(vm.UUID, 128), checkText(vm.Source, 64)); err != nil {
		return nil, err
	}
	if err := x.srv.mayAdd(ctx, x.token, vm.Name); err != nil {
		return nil, err
	}
	parent, release, err := x.srv.parentOf(ctx, x.token, vm.Name)
	if err != nil {
		return nil, err
	}
	draft, err := x.srv.newDraft(ctx)
	if err != nil {
		release()
		return nil, err
	}
	x.vm, x.time, x.parent, x.release, x.usable = vm, x.srv.opt.Now(), parent, release, map[uint32]bool{}
	x.draft.Store(draft)
	var m parentMessage
	if parent != nil {
		m.ID = &parent.ID
		for _, d := range parent.Disks {
			m.Disks = append(m.Disks, parentDisk{d.Name, d.Key, d.Size, d.ChangeID, d.Compared, d.Stats.Data})
		}
	}
	b, err := json.Marshal(m)
	return append(out, b...), err
}

// image opens a disk of the parent.
func (x *session) image(disk uint32) (*store.Image, *store.Disk, error) {
	if x.parent == nil || int64(disk) >= int64(len(x.parent.Disks)) {
		return nil, nil, fmt.Errorf("%w: the parent has no disk %d", errProtocol, disk)
	}
	d := &x.parent.Disks[disk]
	img, err := x.srv.repo.OpenDisk(x.parent, d.Name)
	return img, d, err
}

// base reports whether the new point may share what a disk of the parent consists of.
func (x *session) base(ctx context.Context, disk uint32) (bool, error) {
	img, _, err := x.image(disk)
	if err != nil {
		return false, err
	}
	whole, err := x.srv.repo.Whole(ctx)
	if err == nil && !whole {
		whole, err = img.Complete(ctx)
	}
	if whole && err == nil {
		x.usable[disk] = true
	}
	return x.usable[disk], err
}

// shared wants that base has said yes to a disk.
func (x *session) shared(disk uint32) (*store.Image, *store.Disk, error) {
	img, d, err := x.image(disk)
	if err == nil && !x.usable[disk] {
		err = fmt.Errorf("%w: nothing of disk %d of the parent may be shared", errProtocol, disk)
	}
	return img, d, err
}

// ids gives chunks of a disk of the parent, each with its receipt.
func (x *session) ids(ctx context.Context, disk uint32, first uint64, n uint32, out []byte) ([]byte, error) {
	img, d, err := x.shared(disk)
	if err != nil {
		return nil, err
	}
	cs := int64(x.srv.repo.ChunkSize())
	chunks := (d.Size + cs - 1) / cs
	if n > maxIDs || first > uint64(chunks) || int64(n) > chunks-int64(first) {
		return nil, fmt.Errorf("%w: ids of chunks %d to %d of %d", errProtocol, first, first+uint64(n), chunks)
	}
	ids := make([]store.ID, n)
	if err := img.IDs(ctx, int64(first), ids); err != nil {
		return nil, err
	}
	for _, id := range ids {
		if id.IsZero() {
			out = append(out, 0)
			continue
		}
		r := x.key.of(id)
		out = append(append(append(out, 1), id[:]...), r[:]...)
	}
	return out, nil
}

// newMap begins a map; one that is not finished is dropped.
func (x *session) newMap(ctx context.Context, disk uint32, size uint64) error {
	if size > maxDiskSize || len(x.maps) >= maxMaps {
		return fmt.Errorf("%w: a disk of %d bytes, after %d others", errProtocol, size, len(x.maps))
	}
	if err := x.srv.repo.AgentValid(ctx, x.token.ID, x.srv.opt.Now()); err != nil {
		return err
	}
	var root store.Root
	if disk > 0 {
		_, d, err := x.shared(disk - 1)
		if err != nil {
			return err
		}
		root = d.Map()
	}
	x.dropMap()
	m, err := x.draft.Load().Map(ctx, root, int64(size))
	if err != nil {
		return err
	}
	x.m, x.size = m, int64(size)
	return nil
}

// write puts chunks and holes into the map. A chunk without its receipt is not looked up.
func (x *session) write(ctx context.Context, in *wire.Cursor) error {
	if x.m == nil {
		return fmt.Errorf("%w: no map is open", errProtocol)
	}
	chunks := (x.size + int64(x.srv.repo.ChunkSize()) - 1) / int64(x.srv.repo.ChunkSize())
	next := uint64(0) // in the order of this request; the builder knows the rest
	for in.More() {
		switch kind := in.U8(); kind {
		case 0:
			i, b, r := in.U64(), in.Take(32), in.Take(receiptLen)
			if in.Err() != nil {
				break
			}
			id := store.ID(b)
			if id.IsZero() || !x.key.shows(id, r) {
				return fmt.Errorf("%w: chunk %d was not sent, nor is it one of the parent", errProtocol, i)
			}
			if i < next || i >= uint64(chunks) {
				return fmt.Errorf("%w: chunk %d of %d", errProtocol, i, chunks)
			}
			if err := inOrder(x.m.Set(ctx, int64(i), id)); err != nil {
				return err
			}
			next = i + 1
		case 1:
			from, to := in.U64(), in.U64()
			if in.Err() != nil {
				break
			}
			if from < next || from > to || to > uint64(chunks) {
				return fmt.Errorf("%w: holes from %d to %d of %d", errProtocol, from, to, chunks)
			}
			if err := inOrder(x.m.Punch(ctx, int64(from), int64(to))); err != nil {
				return err
			}
			next = to
		default:
			return fmt.Errorf("%w: entry of kind %d", errProtocol, kind)
		}
	}
	return in.End()
}

// inOrder makes an error of what is the client's fault alone one of the protocol.
func inOrder(err error) error {
	if errors.Is(err, store.ErrOrder) {
		return fmt.Errorf("%w: %v", errProtocol, err)
	}
	return err
}

func (x *session) finish(ctx context.Context) (store.ID, error) {
	if x.m == nil {
		return store.ID{}, fmt.Errorf("%w: no map is open", errProtocol)
	}
	m := x.m
	x.m = nil
	root, err := m.Finish(ctx, x.size)
	if err != nil {
		m.Close(context.WithoutCancel(ctx))
		return store.ID{}, err
	}
	x.maps[finished{root.Page, root.Size}] = true
	return root.Page, nil
}

// commit makes the point of what the client says of it and of what only this host knows.
func (x *session) commit(ctx context.Context, text, out []byte) ([]byte, error) {
	if x.m != nil {
		return nil, fmt.Errorf("%w: a map is not finished", errProtocol)
	}
	p, err := x.point(text)
	if err != nil {
		return nil, err
	}
	// Puts that came before are written when all slots are free, and those that come now have
	// to wait: no map can name what they bring.
	for range maxPutsAtWork {
		x.slots <- struct{}{}
		defer func() { <-x.slots }()
	}
	if err := x.failed.Load(); err != nil {
		return nil, *err
	}
	// A commit that has begun is finished.
	ctx = context.WithoutCancel(ctx)
	now := x.srv.opt.Now()
	if err := x.srv.repo.AgentValid(ctx, x.token.ID, now); err != nil {
		return nil, err
	}
	if err := x.srv.mayAdd(ctx, x.token, x.vm.Name); err != nil {
		return nil, err
	}
	if x.srv.opt.Lock != nil {
		if err := x.srv.opt.Lock(ctx, p); err != nil {
			return nil, err
		}
	}
	// Of all that was sent, configuration files too; Commit sets what was stored.
	p.Stats.New, p.Stats.Duration = x.fresh.Load(), now.Sub(x.time).Seconds()
	draft := x.draft.Load()
	if err := draft.Commit(ctx, p); err != nil {
		return nil, err
	}
	x.done = true
	x.srv.opt.Note(fmt.Sprintf("%s: added %s: %d bytes, %d new, %d stored", x.name(), p.Path(), p.Stats.Total, p.Stats.New, p.Stats.Stored))
	for _, w := range p.Warnings {
		x.srv.opt.Warn(fmt.Sprintf("%s: %s", p.Path(), w))
	}
	b, err := json.Marshal(committedMessage{p.ID, p.Name, p.Time})
	return append(out, b...), err
}

// rootOf wants a map that was finished in this session.
func (x *session) rootOf(page []byte, size int64) ([]byte, error) {
	var f finished
	if len(page) != 0 && len(page) != len(f.page) {
		return nil, fmt.Errorf("%w: a root of %d bytes", errProtocol, len(page))
	}
	copy(f.page[:], page)
	if f.size = size; !x.maps[f] {
		return nil, fmt.Errorf("%w: no map of %d bytes with the root %s was finished", errProtocol, size, hex.EncodeToString(page))
	}
	if f.page.IsZero() {
		return nil, nil
	}
	return f.page[:], nil
}
