package nfs

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Limits bound what clients can make a server hold. A zero is its default.
type Limits struct {
	Conns         int // connections at a time; more are closed at once; 1024
	AddressConns  int // of them from one address; 256
	StrangerConns int // of them from addresses that no export allows; 16
	// StrangerTime is after what they are closed; 10 s.
	StrangerTime  time.Duration
	Requests      int   // of one connection at work or with an unsent reply, at most as many goroutines; 64
	ConnData      int64 // bytes of memory of one connection's requests and replies; 16 MiB, at least 4 MiB
	TotalRequests int   // the same for all connections together, and one for each of them; 1024
	TotalData     int64 // the same for all connections together, and one request for each of them; 256 MiB
	// Stall is the time for a client to take a reply or to send the rest of a record, or 1 MiB of it; 2 min.
	Stall time.Duration
}

// Server serves exports. Its fields are not changed after the first call of a method.
type Server struct {
	Limits Limits
	// Log is told about errors that clients or file systems cause, from several goroutines; nil for nobody.
	Log func(error)
	// Now is the clock; nil for that of the machine.
	Now func() time.Time

	gate    gate
	once    onceCache
	mounts  mounts
	exports atomic.Pointer[exports] // nil before start
	base    context.Context         // of all calls of an FS
	cancel  context.CancelFunc

	mu sync.Mutex
	// guards following
	started   bool
	closing   bool
	listeners []*listener
	conns     map[*conn]bool
	addrs     map[netip.Addr]int // connections by address
	strangers int                // connections of strangers
	refused   refusals
}

// A listener is an address where some programs are served.
type listener struct {
	programs []*program
	tcp      net.Listener
	overUDP  []*program
	udp      *net.UDPConn // nil for none
}

func (l *listener) port() uint32 { return uint32(l.tcp.Addr().(*net.TCPAddr).Port) }

// ErrPortmapInUse is for an address of the portmapper that another program has,
// most likely the rpcbind of the system.
var ErrPortmapInUse = errors.New("another portmapper is running")

// start fills in what has not been said; s.mu is held.
func (s *Server) start() {
	if s.started {
		return
	}
	s.started = true
	s.Limits.fill()
	l := &s.Limits
	s.gate = gate{connRequests: l.Requests, connBytes: l.ConnData, requests: l.TotalRequests, bytes: l.TotalData}
	s.once.entries = make(map[onceKey]*onceEntry)
	s.mounts.table = make(map[mount]bool)
	s.exports.Store(newExports(nil, nil))
	s.base, s.cancel = context.WithCancel(context.Background())
	s.conns, s.addrs = make(map[*conn]bool), make(map[netip.Addr]int)
}

func (l *Limits) fill() {
	l.Conns = orDefault(l.Conns, 1024)
	l.AddressConns = orDefault(l.AddressConns, 256)
	l.StrangerConns = orDefault(l.StrangerConns, 16)
	l.StrangerTime = orDefault(l.StrangerTime, 10*time.Second)
	l.Requests = orDefault(l.Requests, 64)
	l.ConnData = max(orDefault(l.ConnData, 16<<20), 4<<20)
	l.TotalRequests = orDefault(l.TotalRequests, 1024)
	l.TotalData = orDefault(l.TotalData, 256<<20)
	l.Stall = orDefault(l.Stall, 2*time.Minute)
}

func orDefault[T ~int | ~int64 | ~uint32](v, def T) T {
	if v == 0 {
		return def
	}
	return v
}

func (s *Server) now() time.Time {
	if s.Now != nil {
		return s.Now()
	}
	return time.Now()
}

func (s *Server) log(err error) {
	if s.Log != nil {
		s.Log(err)
	}
}

// Listen opens HOST:PORT or :PORT for NFS and MOUNT over TCP, and MOUNT over UDP
// too if that port is free. It is called before Serve.
func (s *Server) Listen(addr string) error {
	tcp, err := net.Listen("tcp", addr)
	if err != nil {
		return fmt.Errorf("nfs: %w", err)
	}
	udp, err := listenUDP(tcp)
	if err != nil {
		s.log(fmt.Errorf("nfs: no MOUNT over UDP: %w", err))
	}
	return s.add(&listener{[]*program{&nfsProgram, &mountProgram}, tcp, []*program{&mountProgram}, udp})
}

// ListenPortmap opens HOST:PORT or :PORT, of which the port should be 111, for
// the portmapper over TCP and UDP. Clients that are not told the port of NFS ask
// there. ErrPortmapInUse is for an address that is taken. It is called before Serve.
func (s *Server) ListenPortmap(addr string) error {
	tcp, err := net.Listen("tcp", addr)
	if err == nil {
		var udp *net.UDPConn
		if udp, err = listenUDP(tcp); err == nil {
			return s.add(&listener{[]*program{&portmapProgram}, tcp, []*program{&portmapProgram}, udp})
		}
		tcp.Close()
	}
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("nfs: %w: %w", ErrPortmapInUse, err)
	}
	return fmt.Errorf("nfs: portmapper: %w", err)
}

func listenUDP(tcp net.Listener) (*net.UDPConn, error) {
	a := tcp.Addr().(*net.TCPAddr)
	return net.ListenUDP("udp", &net.UDPAddr{IP: a.IP, Port: a.Port, Zone: a.Zone})
}

func (s *Server) add(l *listener) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		l.close()
		return errors.New("nfs: server is closed")
	}
	s.start()
	s.listeners = append(s.listeners, l)
	return nil
}

func (l *listener) close() {
	l.tcp.Close()
	if l.udp != nil {
		l.udp.Close()
	}
}

// find gives the first listener that serves a program; nil for none.
func (s *Server) find(prog uint32) *listener {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.listeners {
		for _, p := range l.programs {
			if p.id == prog {
				return l
			}
		}
	}
	return nil
}

// Addr is where NFS is served; nil before Listen.
func (s *Server) Addr() net.Addr {
	if l := s.find(progNFS); l != nil {
		return l.tcp.Addr()
	}
	return nil
}

// PortmapAddr is where the portmapper is; nil before ListenPortmap.
func (s *Server) PortmapAddr() net.Addr {
	if l := s.find(progPortmap); l != nil {
		return l.tcp.Addr()
	}
	return nil
}

// Serve serves what Listen opened until ctx ends or Shutdown or Close is called;
// then it answers the requests at work, and returns nil.
func (s *Server) Serve(ctx context.Context) error {
	s.mu.Lock()
	listeners := s.listeners
	s.mu.Unlock()
	if len(listeners) == 0 {
		return errors.New("nfs: Serve before Listen")
	}
	stop := context.AfterFunc(ctx, func() { s.drain() })
	defer stop()
	errs := make(chan error, 2*len(listeners))
	var all sync.WaitGroup
	for _, l := range listeners {
		all.Go(func() { errs <- s.accept(l) })
		if l.udp != nil {
			all.Go(func() { errs <- s.serveUDP(l) })
		}
	}
	err := <-errs
	conns := s.drain()
	all.Wait()
	for _, c := range append(conns, s.drain()...) {
		<-c.ended
	}
	return err
}

// Shutdown stops Serve and waits for the requests at work. When ctx ends first
// it cuts the connections and cancels the calls of file systems, and returns the
// error of ctx, perhaps before the last of the calls has returned.
func (s *Server) Shutdown(ctx context.Context) error {
	for _, c := range s.drain() {
		select {
		case <-c.ended:
		case <-ctx.Done():
			s.cut()
			return ctx.Err()
		}
	}
	return nil
}

// Close cuts all connections and returns when no FS is in use any more.
func (s *Server) Close() error {
	conns := s.drain()
	s.cut()
	for _, c := range conns {
		<-c.ended
	}
	return nil
}

// drain stops listening, and lets the connections, which it returns, end with the requests they are at.
func (s *Server) drain() []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.start()
	s.closing = true
	for _, l := range s.listeners {
		l.close()
	}
	var conns []*conn
	for c := range s.conns {
		conns = append(conns, c)
		c.drain()
	}
	return conns
}

func (s *Server) cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cancel()
	for c := range s.conns {
		c.nc.Close()
	}
}

// accept serves the clients of l until it is closed.
func (s *Server) accept(l *listener) error {
	pause := time.Duration(0)
	for {
		nc, err := l.tcp.Accept()
		switch {
		case err == nil:
			pause = 0
			s.admit(l, nc)
		case errors.Is(err, net.ErrClosed):
			return nil
		case pause > 10*time.Second:
			return fmt.Errorf("nfs: %w", err)
		default: // such as no file descriptors left: they come back
			s.log(fmt.Errorf("nfs: %w", err))
			pause = 2*pause + 10*time.Millisecond
			time.Sleep(pause)
		}
	}
}

// refusals counts connections that were refused, of which the log is not to be flooded.
type refusals struct {
	n    int
	said time.Time
}

// add gives how many there were since that was said last; 0 when it need not be said again yet.
func (r *refusals) add(now time.Time) int {
	r.n++
	if now.Sub(r.said) < 10*time.Second {
		return 0
	}
	n := r.n
	r.n, r.said = 0, now
	return n
}

func (s *Server) admit(l *listener, nc net.Conn) {
	c := newConn(s, l.programs, nc)
	stranger := !s.exports.Load().allows(c.addr)
	s.mu.Lock()
	refused := s.closing || len(s.conns) >= s.Limits.Conns || s.addrs[c.addr] >= s.Limits.AddressConns || stranger && s.strangers >= s.Limits.StrangerConns
	told := 0
	if refused {
		told = s.refused.add(s.now())
	} else {
		s.conns[c] = true
		s.addrs[c.addr]++
		if stranger {
			s.strangers++
		}
	}
	s.mu.Unlock()
	if refused {
		nc.Close()
		if told > 0 {
			s.log(fmt.Errorf("nfs: %v: refused: too many connections, or shutting down (%d refused since this was last said)", c.addr, told))
		}
		return
	}
	go func() {
		if stranger { // it has the time to be told so
			defer time.AfterFunc(s.Limits.StrangerTime, func() {
				if !s.exports.Load().allows(c.addr) {
					nc.Close()
				}
			}).Stop()
		}
		c.run()
		s.mu.Lock()
		delete(s.conns, c)
		if s.addrs[c.addr]--; s.addrs[c.addr] == 0 {
			delete(s.addrs, c.addr)
		}
		if stranger {
			s.strangers--
		}
		s.mu.Unlock()
		close(c.ended)
	}()
}

// maxUDP is the largest call or reply over UDP, bytes (RFC 1813 §2.4 has none; this
// is the UDPMSGSIZE of most RPC libraries).
const maxUDP = 8800

// serveUDP answers one call after the other: they are few and small.
func (s *Server) serveUDP(l *listener) error {
	p := make([]byte, maxUDP)
	r := new(request)
	for {
		n, from, err := l.udp.ReadFromUDPAddrPort(p)
		switch {
		case errors.Is(err, net.ErrClosed):
			return nil
		case err != nil:
			time.Sleep(10 * time.Millisecond)
			continue
		}
		s.answerUDP(r, l, p[:n], from)
	}
}

func (s *Server) answerUDP(r *request, l *listener, p []byte, from netip.AddrPort) {
	defer r.free()
	r.srv, r.ctx, r.programs, r.addr, r.udp = s, s.base, l.overUDP, plain(from.Addr()), true
	args, err := parseCall(&r.call, p)
	if err != nil {
		return
	}
	r.args.p = args
	r.run()
	if len(r.msg) > markLen {
		l.udp.WriteToUDPAddrPort(r.msg[markLen:], from) // what is lost is asked for again
	}
}
