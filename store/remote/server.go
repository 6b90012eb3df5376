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
)

// maxInFlight bounds the requests of one connection that are worked on at once.
const maxInFlight = 16

// server gives other processes the use of an index that this process owns.
type server struct {
	index store.Index
	repo  [16]byte
	ln    net.Listener
	stop  context.CancelFunc
	ctx   context.Context
	wg    sync.WaitGroup // connections

	mu    sync.Mutex // guards following
	conns map[net.Conn]bool
}

func serve(ln net.Listener, index store.Index, repo [16]byte) *server {
	s := &server{index: index, repo: repo, ln: ln, conns: map[net.Conn]bool{}}
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
	first, err := readFrame(in, nil)
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
		req, err := readFrame(in, nil)
		if err != nil {
			return
		}
		slots <- struct{}{}
		requests.Go(func() {
			defer func() { <-slots }()
			number := binary.LittleEndian.Uint64(req)
			resp, err := finish(s.answer(number, req[8], &cursor{b: req[9:]}))
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
	in := cursor{b: req[9:]}
	version, repo := in.u32(), in.take(16)
	ok := req[8] == opHello && in.err == nil && version == protocolVersion && [16]byte(repo) == s.repo
	status := uint8(statusOK)
	if !ok {
		status = statusVersion
	}
	b, _ := finish(binary.LittleEndian.AppendUint32(newFrame(number, status), protocolVersion))
	_, err := c.Write(b)
	return ok && err == nil
}

func failure(number uint64, err error) []byte {
	status := uint8(statusError)
	if errors.Is(err, store.ErrNotExist) {
		status = statusNotExist
	}
	return append(newFrame(number, status), err.Error()...)
}

// answer carries out one request.
func (s *server) answer(number uint64, op uint8, in *cursor) []byte {
	out := newFrame(number, statusOK)
	out, err := s.carryOut(op, in, out)
	if err != nil {
		return failure(number, err)
	}
	return out
}

func (s *server) carryOut(op uint8, in *cursor, out []byte) ([]byte, error) {
	ctx := context.WithoutCancel(s.ctx) // a request that was read is finished
	le := binary.LittleEndian
	switch op {
	case opLookup:
		ids := make([]store.ID, in.count(32))
		for i := range ids {
			copy(ids[i][:], in.take(32))
		}
		if err := in.end(); err != nil {
			return nil, err
		}
		locs := make([]store.Loc, len(ids))
		if err := s.index.Lookup(ctx, ids, locs); err != nil {
			return nil, err
		}
		for _, l := range locs {
			out = le.AppendUint32(le.AppendUint32(le.AppendUint32(out, l.Pack), l.Off), l.Len)
			out = append(out, flag(l.Suspect))
		}
		return out, nil
	case opAddPack:
		var pack store.PackInfo
		copy(pack.ID[:], in.take(32))
		pack.Size = int64(in.u64())
		recs := make([]store.PackRecord, in.count(45))
		for i := range recs {
			r := &recs[i]
			copy(r.ID[:], in.take(32))
			r.Off, r.Len, r.Plain = in.u32(), in.u32(), in.u32()
			if k := in.take(1); k != nil {
				r.Kind = k[0]
			}
		}
		if err := in.end(); err != nil {
			return nil, err
		}
		return out, s.index.AddPack(ctx, pack, recs)
	case opPacks:
		after := in.u32()
		if err := in.end(); err != nil {
			return nil, err
		}
		return s.packs(ctx, after, out)
	case opPack:
		n := in.u32()
		if err := in.end(); err != nil {
			return nil, err
		}
		p, err := s.index.Pack(ctx, n)
		return le.AppendUint64(append(out, p.ID[:]...), uint64(p.Size)), err
	case opDropPack:
		n := in.u32()
		if err := in.end(); err != nil {
			return nil, err
		}
		return out, s.index.DropPack(ctx, n)
	case opSuspect:
		ids := make([]store.ID, in.count(32))
		for i := range ids {
			copy(ids[i][:], in.take(32))
		}
		if err := in.end(); err != nil {
			return nil, err
		}
		return out, s.index.Suspect(ctx, ids)
	case opWhole:
		if err := in.end(); err != nil {
			return nil, err
		}
		whole, err := s.index.Whole(ctx)
		return append(out, flag(whole)), err
	case opSetWhole:
		if err := in.end(); err != nil {
			return nil, err
		}
		return out, s.index.SetWhole(ctx)
	case opPage:
		var id store.ID
		copy(id[:], in.take(32))
		if err := in.end(); err != nil {
			return nil, err
		}
		page, err := s.index.Page(ctx, id)
		return append(out, page...), err
	case opPutPages:
		ids, pages := make([]store.ID, in.count(36)), [][]byte(nil)
		for i := range ids {
			copy(ids[i][:], in.take(32))
			pages = append(pages, in.bytes())
		}
		if err := in.end(); err != nil {
			return nil, err
		}
		return out, s.index.PutPages(ctx, ids, pages)
	case opPoints:
		var after store.PointID
		copy(after[:], in.take(16))
		if err := in.end(); err != nil {
			return nil, err
		}
		return s.points(ctx, after, out)
	case opPutPoint:
		var p store.SealedPoint
		copy(p.ID[:], in.take(16))
		p.Summary = in.bytes()
		if err := in.end(); err != nil {
			return nil, err
		}
		return out, s.index.PutPoint(ctx, p)
	case opDropPoint:
		var id store.PointID
		copy(id[:], in.take(16))
		if err := in.end(); err != nil {
			return nil, err
		}
		return out, s.index.DropPoint(ctx, id)
	case opGeneration:
		if err := in.end(); err != nil {
			return nil, err
		}
		gen, err := s.index.Generation(ctx)
		return le.AppendUint64(out, gen), err
	case opReserve:
		name := string(in.bytes())
		if err := in.end(); err != nil {
			return nil, err
		}
		n, err := s.index.Reserve(ctx, name)
		return le.AppendUint32(out, uint32(n)), err
	default:
		return nil, errShort
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
	more := len(list) > pageOfListing/44
	if more {
		list = list[:pageOfListing/44]
	}
	out = append(out, flag(more))
	for _, p := range list {
		out = binary.LittleEndian.AppendUint32(out, p.Number)
		out = append(out, p.ID[:]...)
		out = binary.LittleEndian.AppendUint64(out, uint64(p.Size))
	}
	return out, nil
}

// points lists the points in order of ids, likewise.
func (s *server) points(ctx context.Context, after store.PointID, out []byte) ([]byte, error) {
	list, err := s.index.Points(ctx)
	if err != nil {
		return nil, err
	}
	slices.SortFunc(list, func(a, b store.SealedPoint) int { return slices.Compare(a.ID[:], b.ID[:]) })
	at := len(out)
	out = append(out, 0)
	for _, p := range list {
		if slices.Compare(p.ID[:], after[:]) <= 0 {
			continue
		}
		if len(out) > pageOfListing {
			out[at] = 1
			break
		}
		out = putBytes(append(out, p.ID[:]...), p.Summary)
	}
	return out, nil
}

func flag(v bool) byte {
	if v {
		return 1
	}
	return 0
}
