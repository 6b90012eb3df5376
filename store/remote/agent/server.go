package agent

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/remote/wire"
)

const (
	maxUnproven = 32 // connections that have shown no token, 8 KiB and a goroutine each
	maxSessions = 32 // in all; see doc.go for the memory of one
	maxOfToken  = 4  // sessions of one token
	checkEvery  = 10 * time.Second
	recheck     = 10 * time.Minute // how old a comparison of index and packs may be
	// quietAfter is how many refused connections are logged in a minute; the rest is counted.
	quietAfter = 10
)

// ServerOptions of a server.
type ServerOptions struct {
	// Lock sets until when a new point is locked, before it is committed; nil locks none.
	Lock func(ctx context.Context, p *store.Point) error
	// Note is told of connections and points, Warn of refusals and failures. They are called from several
	// goroutines at once; nil drops it. Texts have what helpers said in them.
	Note, Warn func(text string)
	// Now is the clock; nil is time.Now.
	Now func() time.Time
}

// Server adds the points of helpers to a repository. The Repo must not be used for a GC
// meanwhile (see store.Repo.Recheck); other processes may do what they like.
type Server struct {
	repo *store.Repo
	opt  ServerOptions
	tls  *tls.Config
	// Constants but for tests.
	handshake, checkEvery, silence time.Duration

	ctx  context.Context // of all sessions
	stop context.CancelFunc
	wg   sync.WaitGroup // connections

	unproven chan struct{} // a slot for each connection that has shown no token

	mu       sync.Mutex // guards following
	conns    map[net.Conn]bool
	sessions map[*session]bool
	inUse    map[string]int // token => its sessions; "" => all
	checked  time.Time      // when the index was compared with the packs
	refused  int            // connections in this minute
	minute   time.Time

	makersMu sync.Mutex                   // guards following
	makers   map[store.PointID]pointMaker // point => who made it; points never change
}

// NewServer makes a server for an open repository.
func NewServer(repo *store.Repo, opt ServerOptions) (*Server, error) {
	if opt.Now == nil {
		opt.Now = time.Now
	}
	for _, say := range []*func(string){&opt.Note, &opt.Warn} {
		if *say == nil {
			*say = func(string) {}
		}
	}
	conf, err := serverTLS(repo.AgentTLSKey())
	if err != nil {
		return nil, fmt.Errorf("agent server: %w", err)
	}
	s := &Server{
		repo: repo, opt: opt, tls: conf, unproven: make(chan struct{}, maxUnproven), handshake: handshake, checkEvery: checkEvery, silence: silence,
		conns: map[net.Conn]bool{}, sessions: map[*session]bool{}, inUse: map[string]int{}, makers: map[store.PointID]pointMaker{},
	}
	s.ctx, s.stop = context.WithCancel(context.Background())
	return s, nil
}

// Serve takes connections until Close, which makes it return nil, or until ln is closed.
func (s *Server) Serve(ln net.Listener) error {
	defer context.AfterFunc(s.ctx, func() { ln.Close() })()
	go s.watch()
	for {
		c, err := ln.Accept()
		switch {
		case s.ctx.Err() != nil:
			if err == nil {
				c.Close()
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return err
		}
		if err != nil { // such as too many open files: what is open goes on
			s.opt.Warn(fmt.Sprintf("accept: %v", err))
			select {
			case <-s.ctx.Done():
			case <-time.After(time.Second):
			}
			continue
		}
		select {
		case s.unproven <- struct{}{}:
		default:
			c.Close()
			s.refuse("a connection from %s: %d others have shown no token yet", c.RemoteAddr(), maxUnproven)
			continue
		}
		s.mu.Lock()
		if s.ctx.Err() != nil {
			s.mu.Unlock()
			c.Close()
			return nil
		}
		s.conns[c] = true
		s.wg.Add(1)
		s.mu.Unlock()
		go func() {
			defer s.wg.Done()
			s.connection(c)
			c.Close()
			s.mu.Lock()
			delete(s.conns, c)
			s.mu.Unlock()
		}()
	}
}

// Close ends all sessions and waits for them. A commit that has begun is finished.
func (s *Server) Close() error {
	s.stop()
	s.mu.Lock()
	for c := range s.conns {
		c.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
	return nil
}

// refuse logs a peer that did not get in, unless there are so many that it would fill the log.
func (s *Server) refuse(format string, a ...any) {
	s.mu.Lock()
	now := time.Now()
	over := 0
	if now.Sub(s.minute) > time.Minute {
		over = max(0, s.refused-quietAfter)
		s.minute, s.refused = now, 0
	}
	s.refused++
	quiet := s.refused > quietAfter
	s.mu.Unlock()
	if over > 0 {
		s.opt.Warn(fmt.Sprintf("refused %d further connections", over))
	}
	if !quiet {
		s.opt.Warn("refused " + fmt.Sprintf(format, a...))
	}
}

// watch ends the sessions whose token was removed or has expired.
func (s *Server) watch() {
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-time.After(s.checkEvery):
		}
		s.mu.Lock()
		var all []*session
		for x := range s.sessions {
			all = append(all, x)
		}
		s.mu.Unlock()
		for _, x := range all {
			if err := s.repo.AgentValid(s.ctx, x.token.ID, s.opt.Now()); errors.Is(err, store.ErrToken) {
				x.conn.Close()
				s.opt.Warn(fmt.Sprintf("%s: the session ends: %v", x.name(), err))
			}
		}
	}
}

// connection has one peer, from its first byte to its last.
func (s *Server) connection(raw net.Conn) {
	peer := newPeerConn(raw, s.silence)
	raw.SetDeadline(time.Now().Add(s.handshake))
	conn := tls.Server(peer, s.tls)
	in := bufio.NewReaderSize(conn, 4<<10)
	var token store.AgentInfo
	var release func()
	err := conn.HandshakeContext(s.ctx)
	if err == nil {
		token, err = s.prove(conn, in)
	}
	if err == nil {
		release, err = s.enter(token)
		if err != nil {
			s.respond(conn, 0, statusRefused, err.Error())
		}
	}
	<-s.unproven
	if err != nil {
		s.refuse("a connection from %s: %v", raw.RemoteAddr(), err)
		return
	}
	defer release()
	raw.SetDeadline(time.Time{})
	peer.proven.Store(true)
	x := s.newSession(conn, token)
	if _, err := rand.Read(x.key[:]); err != nil {
		s.opt.Warn(err.Error())
		return
	}
	s.mu.Lock()
	s.sessions[x] = true
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.sessions, x)
	}()
	if err := s.welcome(conn); err != nil {
		return
	}
	// What comes after hello may be longer: 64 KiB spares system calls.
	x.serve(bufio.NewReaderSize(in, 64<<10))
}

func (s *Server) newSession(conn net.Conn, token store.AgentInfo) *session {
	return &session{srv: s, conn: conn, token: token, from: conn.RemoteAddr().String(), maps: map[finished]bool{}}
}

// prove wants a valid token in the first request.
func (s *Server) prove(conn net.Conn, in *bufio.Reader) (store.AgentInfo, error) {
	none := store.AgentInfo{}
	req, err := readRequest(in, store.MinChunkSize)
	if err != nil {
		return none, err
	}
	number, op, c := binary.LittleEndian.Uint64(req), req[8], wire.NewCursor(req[wire.HeadLen:])
	if op != opHello {
		return none, fmt.Errorf("%w: operation %#x before a token", errProtocol, op)
	}
	if version := c.U32(); c.Err() != nil || version != Version {
		b := binary.LittleEndian.AppendUint32(wire.NewFrame(number, statusVersion), Version)
		b, _ = wire.Finish(b, maxSmall)
		conn.Write(b)
		return none, fmt.Errorf("it speaks version %d of the protocol, not %d", version, Version)
	}
	id, secret := c.Take(store.AgentIDLen), c.Take(store.AgentSecretLen)
	if err := c.End(); err != nil {
		return none, fmt.Errorf("%w: %v", errProtocol, err)
	}
	token, err := s.repo.CheckAgent(s.ctx, id, secret, s.opt.Now())
	switch {
	case errors.Is(err, store.ErrToken):
		s.respond(conn, number, statusAccess, err.Error())
		return none, fmt.Errorf("token %s: %w", hex.EncodeToString(id), err)
	case err != nil:
		s.respond(conn, number, statusFailed, "")
		return none, err
	}
	return token, nil
}

// enter takes one of the sessions of a token.
func (s *Server) enter(token store.AgentInfo) (release func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.inUse[""] >= maxSessions || s.inUse[token.ID] >= maxOfToken {
		return nil, fmt.Errorf("token %s has %d sessions at work, and all together %d: there are no more", token.ID, s.inUse[token.ID], s.inUse[""])
	}
	s.inUse[""]++
	s.inUse[token.ID]++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.inUse[""]--
		if s.inUse[token.ID]--; s.inUse[token.ID] == 0 {
			delete(s.inUse, token.ID)
		}
	}, nil
}

// respond says why not, to a peer that is about to go.
func (s *Server) respond(conn net.Conn, number uint64, status uint8, text string) {
	b, err := wire.Finish(append(wire.NewFrame(number, status), text...), maxAnswer)
	if err == nil {
		conn.Write(b)
	}
}

// welcome answers hello.
func (s *Server) welcome(conn net.Conn) error {
	le := binary.LittleEndian
	repo, key := s.repo.RawID(), s.repo.ChunkIDKey()
	b := le.AppendUint32(wire.NewFrame(0, statusOK), Version)
	b = le.AppendUint32(append(b, repo[:]...), uint32(s.repo.ChunkSize()))
	b, err := wire.Finish(append(b, key[:]...), maxHello)
	if err == nil {
		_, err = conn.Write(b)
	}
	return err
}

// pointMaker says who made a point.
type pointMaker struct {
	agent string // id of a token; empty for a backup of this host
	copy  bool   // of a point of another repository: its agent is a token of that one
}

// maxMakers bounds the points whose makers are remembered, about 100 bytes each.
const maxMakers = 1 << 18

// maker says who made a point: from its manifest, or from memory.
func (s *Server) maker(ctx context.Context, id store.PointID) (pointMaker, error) {
	s.makersMu.Lock()
	m, ok := s.makers[id]
	s.makersMu.Unlock()
	if ok {
		return m, nil
	}
	p, err := s.repo.Point(ctx, id)
	if err != nil {
		return m, err
	}
	m = pointMaker{p.Agent, p.CopiedFrom != nil}
	s.makersMu.Lock()
	defer s.makersMu.Unlock()
	if len(s.makers) >= maxMakers {
		clear(s.makers)
	}
	s.makers[id] = m
	return m, nil
}

// ErrVM: the token may not add points to the VM.
var ErrVM = errors.New("the token may not add points to this VM")

// mayAdd wants that the token may add points to the VM: by its patterns, or, when it has none, as
// nobody else has made a point of it.
func (s *Server) mayAdd(ctx context.Context, token store.AgentInfo, vm string) error {
	if err := store.CheckVMName(vm); err != nil {
		return fmt.Errorf("%w: %v", ErrVM, err)
	}
	allowed, decided := token.May(vm)
	switch {
	case allowed:
		return nil
	case decided:
		return fmt.Errorf("%w: its patterns do not name %q", ErrVM, vm)
	}
	list, err := s.repo.PointsOf(ctx, vm)
	if err != nil {
		return err
	}
	own, unknown := 0, 0
	for _, p := range list {
		m, err := s.maker(ctx, p.ID)
		switch {
		case errors.Is(err, store.ErrDamaged):
			unknown++
		case errors.Is(err, store.ErrNotExist): // forgotten meanwhile
		case err != nil:
			return err
		case m.agent != token.ID || m.copy:
			return fmt.Errorf("%w: others have made points of %q, and it has no pattern that names it", ErrVM, vm)
		default:
			own++
		}
	}
	if unknown > 0 && own == 0 {
		return fmt.Errorf("%w: nobody knows who made the points of %q, since they are damaged, and it has no pattern that names it", ErrVM, vm)
	}
	return nil
}

// parentOf holds the newest point of the VM that the token made; nil when there is none.
func (s *Server) parentOf(ctx context.Context, token store.AgentInfo, vm string) (p *store.Point, release func(), err error) {
	none := func() {}
	list, err := s.repo.PointsOf(ctx, vm)
	if err != nil {
		return nil, none, err
	}
	for i := len(list) - 1; i >= 0; i-- {
		m, err := s.maker(ctx, list[i].ID)
		switch {
		case errors.Is(err, store.ErrDamaged), errors.Is(err, store.ErrNotExist):
			continue
		case err != nil:
			return nil, none, err
		case m.agent != token.ID || m.copy:
			continue
		}
		p, release, err := s.repo.Hold(ctx, list[i].ID)
		switch {
		case errors.Is(err, store.ErrDamaged), errors.Is(err, store.ErrNotExist):
			continue
		case err != nil:
			return nil, none, err
		}
		return p, release, nil
	}
	return nil, none, nil
}

// newDraft begins a draft; every now and then the index is compared with the packs first, as
// at every start of a backup on this host.
func (s *Server) newDraft(ctx context.Context) (*store.Draft, error) {
	now := time.Now()
	s.mu.Lock()
	due := len(s.sessions) <= 1 || now.Sub(s.checked) > recheck
	if due {
		s.checked = now
	}
	s.mu.Unlock()
	if due {
		s.repo.Recheck()
	}
	return s.repo.NewDraft(ctx)
}
