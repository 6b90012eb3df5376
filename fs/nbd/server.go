package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// Export is a disk under a name.
type Export struct {
	Name        string // unique; empty for the default export
	Description string // for people
	Disk        Disk
	Writable    bool  // Disk must be a WritableDisk
	Granularity int64 // of block status, bytes; 0 stands for 4096
}

// Limits bound what clients can make a server hold. A zero is its default.
type Limits struct {
	Conns     int           // connections at a time; more are closed at once; 256
	Requests  int           // of one connection at work at a time, a goroutine each; 32
	ConnData  int64         // bytes of data of one connection's requests in memory; 64 MiB, at least 32 MiB
	TotalData int64         // the same for all connections together; 256 MiB, at least 32 MiB
	Handshake time.Duration // for a client to choose its export; 20 s
	Stall     time.Duration // for a client to take or send 1 MiB of data; 2 min
	ReadAhead int64         // bytes asked of a Disk's Prefetch ahead of a sequential reader; 4 MiB, negative for none
}

// Server serves disks. Its fields are not changed after the first Serve.
type Server struct {
	Exports []Export // when there is one alone, it is the default export too

	TLS        *tls.Config // nil for a server without TLS; below 1.2 is never spoken
	RequireTLS bool        // refuse clients that do not start TLS

	Limits Limits
	// Log is told about errors that clients or disks cause, from several
	// goroutines; nil for nobody.
	Log func(error)

	total budget

	mu sync.Mutex
	// guards following
	started   bool
	closing   bool
	listeners map[net.Listener]bool
	conns     map[*conn]bool
}

// Serve accepts connections until ctx ends or Shutdown or Close is called; then
// it closes ln, lets the requests at work finish, and returns nil. It may run
// for several listeners at once.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	defer ln.Close()
	if err := s.start(ln); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { s.drain(ln) })
	defer stop()
	err := s.accept(ln)
	for _, c := range s.drain(ln) {
		<-c.ended
	}
	return err
}

// Shutdown stops all that Serve does and waits for the requests at work. When
// ctx ends first it cuts the connections and returns the error of ctx, perhaps
// before the last call of a Disk has returned.
func (s *Server) Shutdown(ctx context.Context) error {
	for _, c := range s.drain(nil) {
		select {
		case <-c.ended:
		case <-ctx.Done():
			s.cut()
			return ctx.Err()
		}
	}
	return nil
}

// Close cuts all connections and returns when no Disk is in use any more.
func (s *Server) Close() error {
	conns := s.drain(nil)
	s.cut()
	for _, c := range conns {
		<-c.ended
	}
	return nil
}

func (s *Server) start(ln net.Listener) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return errors.New("nbd: server is closed")
	}
	if !s.started {
		if err := s.check(); err != nil {
			return err
		}
		s.Limits.fill()
		s.total.free = s.Limits.TotalData
		s.listeners, s.conns = make(map[net.Listener]bool), make(map[*conn]bool)
		if s.TLS != nil {
			s.TLS = s.TLS.Clone()
			s.TLS.MinVersion = max(s.TLS.MinVersion, tls.VersionTLS12) // proto, "TLS versions"
		}
		s.started = true
	}
	s.listeners[ln] = true
	return nil
}

func (s *Server) check() error {
	seen := make(map[string]bool)
	for i := range s.Exports {
		e := &s.Exports[i]
		if _, ok := e.Disk.(WritableDisk); e.Writable && !ok {
			return fmt.Errorf("nbd: export %q cannot be written", e.Name)
		}
		if seen[e.Name] {
			return fmt.Errorf("nbd: two exports are called %q", e.Name)
		}
		if len(e.Name) > maxString || len(e.Description) > maxString {
			return fmt.Errorf("nbd: name or description of export %.20q is longer than %d bytes", e.Name, maxString)
		}
		seen[e.Name] = true
	}
	if s.RequireTLS && s.TLS == nil {
		return errors.New("nbd: TLS is required, but there is no certificate")
	}
	return nil
}

func (l *Limits) fill() {
	def := Limits{Conns: 256, Requests: 32, ConnData: 64 << 20, TotalData: 256 << 20,
		Handshake: 20 * time.Second, Stall: 2 * time.Minute, ReadAhead: 4 << 20}
	l.Conns = orDefault(l.Conns, def.Conns)
	l.Requests = orDefault(l.Requests, def.Requests)
	l.ConnData = max(orDefault(l.ConnData, def.ConnData), maxPayload)
	l.TotalData = max(orDefault(l.TotalData, def.TotalData), maxPayload)
	l.Handshake = orDefault(l.Handshake, def.Handshake)
	l.Stall = orDefault(l.Stall, def.Stall)
	l.ReadAhead = orDefault(l.ReadAhead, def.ReadAhead)
}

func orDefault[T ~int | ~int64](v, def T) T {
	if v == 0 {
		return def
	}
	return v
}

// accept serves the clients of ln until it is closed.
func (s *Server) accept(ln net.Listener) error {
	pause := time.Duration(0)
	for {
		nc, err := ln.Accept()
		switch {
		case err == nil:
			pause = 0
			s.admit(ln, nc)
		case errors.Is(err, net.ErrClosed):
			return nil
		case pause > 10*time.Second:
			return fmt.Errorf("nbd: %w", err)
		default: // such as no file descriptors left: they come back
			s.log(fmt.Errorf("nbd: %w", err))
			pause = 2*pause + 10*time.Millisecond
			time.Sleep(pause)
		}
	}
}

func (s *Server) admit(ln net.Listener, nc net.Conn) {
	c := newConn(s, ln, nc)
	s.mu.Lock()
	refused := s.closing || !s.listeners[ln] || len(s.conns) >= s.Limits.Conns
	if !refused {
		s.conns[c] = true
	}
	s.mu.Unlock()
	if refused {
		nc.Close()
		s.log(fmt.Errorf("nbd: %v: refused: too many connections, or shutting down", nc.RemoteAddr()))
		return
	}
	go func() {
		c.run()
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
		close(c.ended)
	}()
}

// drain stops listening on ln (nil for all, and for good) and lets its
// connections, which it returns, end with the requests they are at.
func (s *Server) drain(ln net.Listener) []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ln == nil {
		s.closing = true
	}
	for l := range s.listeners {
		if ln == nil || l == ln {
			delete(s.listeners, l)
			l.Close()
		}
	}
	var conns []*conn
	for c := range s.conns {
		if ln == nil || c.ln == ln {
			conns = append(conns, c)
			c.drain()
		}
	}
	return conns
}

func (s *Server) cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		c.raw.Close()
	}
}

// export finds an export by its name; nil when there is none.
func (s *Server) export(name string) *Export {
	for i := range s.Exports {
		if s.Exports[i].Name == name {
			return &s.Exports[i]
		}
	}
	if name == "" && len(s.Exports) == 1 {
		return &s.Exports[0]
	}
	return nil
}

func (s *Server) log(err error) {
	if s.Log != nil {
		s.Log(err)
	}
}
