package remote

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
	"github.com/holdfast-backup/holdfast/store/remote/wire"
)

// maxInFlight bounds the requests of one connection that are worked on at once.
const maxInFlight = 16

// server gives other processes the use of an index that this process owns.
type server struct {
	owner *index
	index store.Index // changes while owner.using is held for writing
	ln    net.Listener
	stop  context.CancelFunc
	ctx   context.Context
	wg    sync.WaitGroup // connections

	mu    sync.Mutex // guards following
	conns map[net.Conn]bool
}

func serve(ln net.Listener, local store.Index, owner *index) *server {
	s := &server{owner: owner, index: local, ln: ln, conns: map[net.Conn]bool{}}
	s.ctx, s.stop = context.WithCancel(context.Background())
	s.wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			if !sameUser(c) {
				c.Close()
				continue
			}
			s.mu.Lock()
			if s.ctx.Err() != nil {
				s.mu.Unlock()
				c.Close()
				return
			}
			s.conns[c] = true
			s.mu.Unlock()
			s.wg.Go(func() {
				s.connection(c)
				s.mu.Lock()
				delete(s.conns, c)
				s.mu.Unlock()
			})
		}
	})
	return s
}

// sameUser lets in processes of our own user and root's. The socket's mode says
// the same; this holds even if somebody changed it.
func sameUser(c net.Conn) bool {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return false
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return false
	}
	allowed := false
	err = raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		allowed = err == nil && (cred.Uid == 0 || int(cred.Uid) == os.Geteuid())
	})
	return err == nil && allowed
}

// close ends all connections after the requests already read are answered.
func (s *server) close() {
	s.stop()
	s.ln.Close()
	s.mu.Lock()
	for c := range s.conns {
		if u, ok := c.(*net.UnixConn); ok {
			u.CloseRead()
		}
	}
	s.mu.Unlock()
	s.wg.Wait()
}

// connection answers one client until it goes or misbehaves.
func (s *server) connection(c net.Conn) {
	defer c.Close()
	in := bufio.NewReaderSize(c, 64<<10)
	first, err := readFrame(in)
	if err != nil {
		return
	}
	if !s.hello(c, first) {
		return
	}
	var wmu sync.Mutex
	var requests sync.WaitGroup
	defer requests.Wait()
	slots := make(chan struct{}, maxInFlight)
	for {
		req, err := readFrame(in)
		if err != nil {
			return
		}
		slots <- struct{}{}
		requests.Go(func() {
			defer func() { <-slots }()
			number := binary.LittleEndian.Uint64(req)
			resp, err := finish(s.answer(number, req[8], newCursor(req[9:])))
			if err != nil {
				resp, _ = finish(failure(number, err))
			}
			wmu.Lock()
			defer wmu.Unlock()
			c.Write(resp) // a client that is gone is noticed by the read
		})
	}
}

// hello checks that both sides mean the same protocol and repository.
func (s *server) hello(c net.Conn, req []byte) bool {
	number := binary.LittleEndian.Uint64(req)
	in := newCursor(req[9:])
	version, repo := in.U32(), in.Take(16)
	ok := req[8] == opHello && in.Err() == nil && version == protocolVersion && [16]byte(repo) == s.owner.repo
	status := uint8(statusOK)
	if !ok {
		status = statusVersion
	}
	b, _ := finish(binary.LittleEndian.AppendUint32(wire.NewFrame(number, status), protocolVersion))
	_, err := c.Write(b)
	return ok && err == nil
}

func failure(number uint64, err error) []byte {
	status := uint8(statusError)
	switch {
	case errors.Is(err, store.ErrNotExist):
		status = statusNotExist
	case errors.Is(err, bucket.ErrFull):
		status = statusFull
	}
	return append(wire.NewFrame(number, status), err.Error()...)
}

// answer carries out one request.
func (s *server) answer(number uint64, op uint8, in *cursor) []byte {
	out := wire.NewFrame(number, statusOK)
	out, err := s.carryOut(op, in, out)
	if err != nil {
		return failure(number, err)
	}
	return out
}

func (s *server) carryOut(op uint8, in *cursor, out []byte) ([]byte, error) {
	ctx := context.WithoutCancel(s.ctx) // a request that was read is finished
	if op == opWrite {
		if err := in.End(); err != nil {
			return nil, err
		}
		return out, s.owner.intoMemory(ctx)
	}
	s.owner.using.RLock()
	defer s.owner.using.RUnlock()
	le := binary.LittleEndian
	switch op {
	case opLookup:
		ids := takeIDs[store.ID](in)
		if err := in.End(); err != nil {
			return nil, err
		}
		locs := make([]store.Loc, len(ids))
		if err := s.index.Lookup(ctx, ids, locs); err != nil {
			return nil, err
		}
		for _, l := range locs {
			out = putLoc(out, l)
		}
		return out, nil
	case opAddPack:
		pack := in.pack()
		recs := make([]store.PackRecord, in.Count(45))
		for i := range recs {
			r := &recs[i]
			copy(r.ID[:], in.Take(32))
			r.Off, r.Len, r.Plain = in.U32(), in.U32(), in.U32()
			r.Kind = in.U8()
		}
		if err := in.End(); err != nil {
			return nil, err
		}
		return out, s.index.AddPack(ctx, pack, recs)
	case opPacks:
		after := in.U32()
		if err := in.End(); err != nil {
			return nil, err
		}
		return s.packs(ctx, after, out)
	case opPack:
		n := in.U32()
		if err := in.End(); err != nil {
			return nil, err
		}
		p, err := s.index.Pack(ctx, n)
		return putPack(out, p), err
	case opDropPack:
		var pack store.PackID
		copy(pack[:], in.Take(32))
		ids := takeIDs[store.ID](in)
		if err := in.End(); err != nil {
			return nil, err
		}
		return out, s.index.DropPack(ctx, pack, ids)
	case opIncarnation:
		if err := in.End(); err != nil {
			return nil, err
		}
		n, err := s.index.Incarnation(ctx)
		return le.AppendUint64(out, n), err
	case opNextPack:
		if err := in.End(); err != nil {
			return nil, err
		}
		n, err := s.index.NextPack(ctx)
		return le.AppendUint32(out, n), err
	case opCondemn:
		var old [16]byte
		var c store.Condemned
		copy(old[:], in.Take(16))
		copy(c.Epoch[:], in.Take(16))
		c.Packs = takeIDs[store.PackID](in)
		if err := in.End(); err != nil {
			return nil, err
		}
		done, err := s.index.Condemn(ctx, old, c)
		return append(out, flag(done)), err
	case opEpoch:
		if err := in.End(); err != nil {
			return nil, err
		}
		e, err := s.index.Epoch(ctx)
		return append(out, e[:]...), err
	case opSuspect:
		ids := takeIDs[store.ID](in)
		if err := in.End(); err != nil {
			return nil, err
		}
		return out, s.index.Suspect(ctx, ids)
	case opWhole:
		if err := in.End(); err != nil {
			return nil, err
		}
		whole, err := s.index.Whole(ctx)
		return append(out, flag(whole)), err
	case opSetWhole:
		if err := in.End(); err != nil {
			return nil, err
		}
		return out, s.index.SetWhole(ctx)
	case opPage:
		var id store.ID
		copy(id[:], in.Take(32))
		if err := in.End(); err != nil {
			return nil, err
		}
		page, err := s.index.Page(ctx, id)
		return append(out, page...), err
	case opPutPages:
		ids, pages := make([]store.ID, in.Count(36)), [][]byte(nil)
		for i := range ids {
			copy(ids[i][:], in.Take(32))
			pages = append(pages, in.Bytes())
		}
		if err := in.End(); err != nil {
			return nil, err
		}
		return out, s.index.PutPages(ctx, ids, pages)
	case opPageIDs:
		var after store.ID
		copy(after[:], in.Take(32))
		if err := in.End(); err != nil {
			return nil, err
		}
		return s.pageIDs(ctx, after, out)
	case opDropPages:
		ids := takeIDs[store.ID](in)
		if err := in.End(); err != nil {
			return nil, err
		}
		return out, s.index.DropPages(ctx, ids)
	case opPoints:
		var after store.PointID
		copy(after[:], in.Take(16))
		if err := in.End(); err != nil {
			return nil, err
		}
		return s.points(ctx, after, out)
	case opChanges:
		since := in.U64()
		if err := in.End(); err != nil {
			return nil, err
		}
		c, err := s.index.Changes(ctx, since)
		if err != nil {
			return nil, err
		}
		out = append(le.AppendUint64(out, c.Generation), flag(c.Unknown))
		out = le.AppendUint32(out, uint32(len(c.Dropped)))
		for _, id := range c.Dropped {
			out = append(out, id[:]...)
		}
		out = le.AppendUint32(out, uint32(len(c.Put)))
		for _, p := range c.Put {
			out = putPoint(out, p)
		}
		return out, nil
	case opPutPoint:
		p := in.point()
		if err := in.End(); err != nil {
			return nil, err
		}
		return out, s.index.PutPoint(ctx, p)
	case opDropPoint:
		var id store.PointID
		copy(id[:], in.Take(16))
		if err := in.End(); err != nil {
			return nil, err
		}
		return out, s.index.DropPoint(ctx, id)
	case opGeneration:
		if err := in.End(); err != nil {
			return nil, err
		}
		gen, err := s.index.Generation(ctx)
		return le.AppendUint64(out, gen), err
	case opReserve:
		name := string(in.Bytes())
		if err := in.End(); err != nil {
			return nil, err
		}
		n, err := s.index.Reserve(ctx, name)
		return le.AppendUint32(out, uint32(n)), err
	default:
		return nil, wire.ErrMalformed
	}
}

// packs lists the registry in order of numbers, a part at a time: a byte says whether more follows.
func (s *server) packs(ctx context.Context, after uint32, out []byte) ([]byte, error) {
	var list []store.NumberedPack
	for p, err := range s.index.Packs(ctx) {
		if err != nil {
			return nil, err
		}
		if p.Number > after {
			list = append(list, p)
		}
	}
	slices.SortFunc(list, func(a, b store.NumberedPack) int { return int(int64(a.Number) - int64(b.Number)) })
	more := len(list) > pageOfListing/49
	if more {
		list = list[:pageOfListing/49]
	}
	out = append(out, flag(more))
	for _, p := range list {
		out = binary.LittleEndian.AppendUint32(out, p.Number)
		out = append(putPack(out, p.PackInfo), flag(p.Condemned))
	}
	return out, nil
}

// pageIDs lists pages in order of ids, likewise.
func (s *server) pageIDs(ctx context.Context, after store.ID, out []byte) ([]byte, error) {
	at := len(out)
	out = append(out, 0)
	for id, err := range s.index.PageIDs(ctx, after) {
		if err != nil {
			return nil, err
		}
		if len(out) > pageOfListing {
			out[at] = 1
			break
		}
		out = append(out, id[:]...)
	}
	return out, nil
}

// points lists the points in order of ids, likewise.
func (s *server) points(ctx context.Context, after store.PointID, out []byte) ([]byte, error) {
	at := len(out)
	out = append(out, 0)
	for p, err := range s.index.Points(ctx, after) {
		if err != nil {
			return nil, err
		}
		if len(out) > pageOfListing {
			out[at] = 1
			break
		}
		out = putPoint(out, p)
	}
	return out, nil
}

func flag(v bool) byte {
	if v {
		return 1
	}
	return 0
}
