package vspheretest

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
)

// Options say what kind of server it is.
type Options struct {
	ESX          bool          // a host of its own, not a vCenter
	Datacenters  int           // of a vCenter; 0 for 1: DC0, DC1… The datastores of others than the first have its name at their ends: LocalDS_0_DC1
	Clusters     int           // of a datacenter, each of two hosts; 0 for 1: DC0_C0, DC0_C1…
	AreasPerPage int           // of QueryChangedDiskAreas; 0 for 4
	LeaseTimeout time.Duration // of a lease without progress; 0 for 5 minutes, as vCenter has it
	DeltaFormat  string        // of the deltas of snapshots: "seSparse" (the default, as on VMFS 6) or "vmfsSparse"
}

// Server is a running double.
type Server struct {
	placing sync.Mutex // held while a VM is registered or a datastore removed: vcsim cannot do both at once

	User, Password string

	t       testing.TB
	opt     Options
	model   *simulator.Model
	service *simulator.Service
	http    *httptest.Server
	caFile  string
	scratch string // a directory for what is not on a datastore
	up      atomic.Bool
	done    chan struct{}  // closed when the test ends
	work    sync.WaitGroup // what writes to scratch; added to under mu, and not once closed is set

	mu        sync.Mutex // guards following
	faults    Faults
	hooks     Hooks
	counts    counters
	vms       map[types.ManagedObjectReference]*VM
	planted   map[types.ManagedObjectReference][]*simulator.Registry // object => sessions with a wrapper of it
	lost      map[string]bool                                        // keys of sessions that the server has forgotten
	denied    map[string]bool                                        // privileges that the user does not have
	leases    map[string]*lease                                      // token => lease
	questions map[types.ManagedObjectReference]*asked                // VM => that waits for an answer
	answers   []string
	nextID    int
	closed    bool
}

// Hooks are called at moments that a test wants to know of, without any lock held. They may use everything here.
type Hooks struct {
	OnFrozen func(vm *VM, snapshot string)                   // inside CreateSnapshot_Task, when the disks are frozen
	OnRead   func(file string, off, n int64)                 // before /folder answers a GET: "[datastore] path", the range
	OnMount  func(host, path string) (dir string, err error) // CreateNasDatastore: where on this machine that export is
	OnCall   func(method string, object *VM)                 // before a method of a VM runs
	OnAny    func(method string)                             // before any method of a session runs
	OnLease  func(vm *VM, file string, up bool)              // before a disk goes through a lease
}

// creating lets one double be built at a time: vcsim builds its inventory through one session that all models of a process share.
var creating sync.Mutex

// New starts a server without VMs: one datacenter, a cluster of two hosts and two resource pools, two datastores, two
// networks. It ends with the test.
func New(t testing.TB, o Options) *Server {
	t.Helper()
	if o.AreasPerPage == 0 {
		o.AreasPerPage = 4
	}
	if o.LeaseTimeout == 0 {
		o.LeaseTimeout = 5 * time.Minute
	}
	if o.DeltaFormat == "" {
		o.DeltaFormat = seSparse
	}
	s := &Server{
		User: "backup@vsphere.local", Password: "secret-" + newUUID(),
		t: t, opt: o, model: newModel(o), scratch: t.TempDir(), done: make(chan struct{}),
		counts:  newCounters(),
		vms:     map[types.ManagedObjectReference]*VM{},
		planted: map[types.ManagedObjectReference][]*simulator.Registry{},
		lost:    map[string]bool{}, denied: map[string]bool{}, leases: map[string]*lease{}, questions: map[types.ManagedObjectReference]*asked{},
	}
	creating.Lock()
	err := s.model.Create()
	creating.Unlock()
	if err != nil {
		t.Fatalf("vspheretest: %v", err)
	}
	s.service = s.model.Service
	s.nameDatastores()
	s.serve()
	t.Cleanup(s.close)
	return s
}

func newModel(o Options) *simulator.Model {
	m := simulator.VPX()
	if o.ESX {
		m = simulator.ESX()
	} else {
		m.Datacenter, m.Host, m.Cluster, m.ClusterHost, m.Pool, m.Portgroup = max(o.Datacenters, 1), 0, max(o.Clusters, 1), 2, 1, 1
	}
	m.Machine, m.Datastore, m.Autostart = 0, 2, false
	return m
}

func (s *Server) serve() {
	m := s.model.Map()
	s.service.Listen = &url.URL{User: url.UserPassword(s.User, s.Password)}
	m.SessionManager().ValidLogin = s.validLogin
	m.Handler = s.dispatch
	m.AddHandler(&watcher{s: s, self: types.ManagedObjectReference{Type: "Watcher", Value: "vspheretest"}})
	s.service.RegisterSDK(m, m.Path+"/vimService")
	mux := s.service.ServeMux
	mux.HandleFunc(m.Path+"/vimServiceVersions.xml", s.service.ServiceVersions)
	mux.HandleFunc("/folder/", s.serveFolder)
	mux.HandleFunc("/nfc/", s.serveLease)
	s.serveREST()

	s.http = httptest.NewUnstartedServer(s.front(mux))
	cert := newCertificate(s.t)
	s.http.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}}
	s.http.Config.ConnState = s.connState
	s.http.Config.ErrorLog = log.New(io.Discard, "", 0) // clients that do not trust the certificate are part of tests
	s.http.StartTLS()
	m.SessionManager().ServiceHostName = s.Host()
	m.SessionManager().TLS = func() *tls.Config { return s.http.TLS }
	s.caFile = filepath.Join(s.scratch, "ca.pem")
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]})
	if err := os.WriteFile(s.caFile, block, 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.up.Store(true)
}

func (s *Server) close() {
	close(s.done)
	s.http.CloseClientConnections()
	_ = s.http.Config.Close()
	s.finishWork()
	for _, vm := range s.allVMs() {
		vm.close()
	}
	s.model.Remove()
}

// begin says whether work may begin that writes to scratch; end ends it.
func (s *Server) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.work.Add(1)
	return true
}

func (s *Server) end() { s.work.Done() }

// finishWork waits for work, so that nothing is written while the directory is removed, but not forever for a test that blocks it.
func (s *Server) finishWork() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	idle := make(chan struct{})
	go func() {
		s.work.Wait()
		close(idle)
	}()
	select {
	case <-idle:
	case <-time.After(10 * time.Second):
	}
}

// URL is where the SDK is: https://127.0.0.1:PORT/sdk.
func (s *Server) URL() string { return s.http.URL + s.model.Map().Path }

// Host is 127.0.0.1:PORT.
func (s *Server) Host() string { return strings.TrimPrefix(s.http.URL, "https://") }

// URLWithUser is URL with the user and the password in it, as govmomi.NewClient takes it.
func (s *Server) URLWithUser() *url.URL {
	return &url.URL{Scheme: "https", User: url.UserPassword(s.User, s.Password), Host: s.Host(), Path: s.model.Map().Path}
}

// Thumbprint is the SHA-256 of the certificate, with colons.
func (s *Server) Thumbprint() string {
	sum := sha256.Sum256(s.http.TLS.Certificates[0].Certificate[0])
	return strings.ReplaceAll(fmt.Sprintf("% X", sum[:]), " ", ":")
}

// CAFile is a PEM file with the certificate, which vouches for itself.
func (s *Server) CAFile() string { return s.caFile }

// SetHooks sets what is called from now on.
func (s *Server) SetHooks(h Hooks) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hooks = h
}

func (s *Server) getHooks() Hooks {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hooks
}

// context is a context of vcsim whose locks are its own.
func (s *Server) context() *simulator.Context {
	c := *s.service.Context
	c.Context = context.Background()
	return &c
}

// sleep waits, but not longer than the test runs.
func (s *Server) sleep(d time.Duration) {
	if d <= 0 {
		return
	}
	select {
	case <-time.After(d):
	case <-s.done:
	}
}

// id counts, for names that must differ.
func (s *Server) id() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nextID++
	return s.nextID
}

func (s *Server) connState(c net.Conn, st http.ConnState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch st {
	case http.StateNew:
		s.counts.connections.add("", 1)
	case http.StateClosed, http.StateHijacked:
		s.counts.connections.add("", -1)
	}
}

func (s *Server) allVMs() []*VM {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*VM
	for _, vm := range s.vms {
		all = append(all, vm)
	}
	return all
}

func (s *Server) vm(ref types.ManagedObjectReference) *VM {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.vms[ref]
}

func (s *Server) must(err error) {
	if err != nil {
		s.t.Helper()
		s.t.Fatalf("vspheretest: %v", err)
	}
}
