// Package nfsd is the process that serves the folders of boots on platforms by NFS. There is one for a directory of boots: all
// platforms ask the same port.
//
//	s := nfsd.Service{Root: boots, Repo: repo, Listen: ":2049", Portmap: ":111"}
//	err := s.Run(ctx, ready)
//
//	c := nfsd.Client{Root: boots}            // in the commands that begin and end boots
//	err := c.Export(ctx, id)
//
// It finds what it is to serve in the boots' own states. So after its death, whatever the cause, another one serves the same folders
// under the same handles, with all that was answered; VMs wait meanwhile.
package nfsd

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/boot"
	"github.com/holdfast-backup/holdfast/fs/nfs"
	"github.com/holdfast-backup/holdfast/fs/nfs/folder"
	"github.com/holdfast-backup/holdfast/store"
)

// ErrRuns: another process serves the boots.
var ErrRuns = errors.New("another process serves NFS for these boots")

// Service serves the folders of boots.
type Service struct {
	Root       string // of the boots
	Repo       *store.Repo
	Repository string // where that is
	Listen     string // HOST:PORT or :PORT
	Portmap    string // the same, or empty for none
	// CacheBytes is how much of what was read of the repository is kept decoded, for all boots together.
	CacheBytes int64
	// Idle is for how long it stays when there is nothing to serve; 0: until it is told to end.
	Idle time.Duration
	Log  func(error) // from several goroutines

	srv   nfs.Server
	cache *store.Cache

	mu sync.Mutex // guards following
	// served: id => what is exported.
	served map[string]*served
	// awaited are those that cannot be served now, for a reason that may pass: id => what clients know it by.
	awaited map[string]uint64
	unused  time.Time // since when there is nothing to serve
	ending  bool
}

type served struct {
	path    string
	session *boot.Session
	folder  *folder.Folder
}

func (s *served) close() error { return errors.Join(s.folder.Close(), s.session.Close()) }

// Files below Root.
const (
	dirName     = "nfs"
	lockName    = "lock"
	controlName = "control.sock"
	addressName = "address.json"
)

// Run serves until ctx ends. ready is called when clients and commands are answered.
func (s *Service) Run(ctx context.Context, ready func()) (err error) {
	dir := filepath.Join(s.Root, dirName)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	lock, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("nfsd: %w", ErrRuns)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s.cache = store.NewCache(s.CacheBytes)
	s.srv.Log, s.served, s.awaited, s.unused = s.Log, map[string]*served{}, map[string]uint64{}, time.Now()
	defer func() { err = errors.Join(err, s.closeAll()) }()
	s.serveAgain(ctx)
	if err := s.srv.Listen(s.Listen); err != nil {
		return err
	}
	if s.Portmap != "" {
		if err := s.srv.ListenPortmap(s.Portmap); err != nil {
			return err
		}
	}
	if err := s.keepAddresses(dir); err != nil {
		return err
	}
	control := filepath.Join(dir, controlName)
	os.Remove(control) // of a process that is no more
	ln, err := net.Listen("unix", control)
	if err != nil {
		return err
	}
	defer ln.Close()
	var work sync.WaitGroup
	work.Go(func() { s.answerAll(ctx, ln) })
	work.Go(func() { s.endIdle(ctx, cancel) })
	work.Go(func() { s.tryAgain(ctx) })
	ended := make(chan error, 1)
	go func() { ended <- s.srv.Serve(ctx) }()
	if ready != nil {
		ready()
	}
	err = <-ended
	cancel()
	ln.Close()
	work.Wait()
	return err
}

// Addresses are where NFS was served the last time: hosts that have mounted an export look for it there.
type Addresses struct {
	Listen  string `json:"listen"`
	Portmap string `json:"portmap"`
}

func (s *Service) keepAddresses(dir string) error {
	text, err := json.Marshal(Addresses{s.Listen, s.Portmap})
	if err != nil {
		return err
	}
	tmp := filepath.Join(dir, addressName+".new")
	if err := os.WriteFile(tmp, text, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(dir, addressName))
}

// LastAddresses gives where NFS was served for boots the last time; ok is false when it never was.
func LastAddresses(root string) (a Addresses, ok bool) {
	text, err := os.ReadFile(filepath.Join(root, dirName, addressName))
	return a, err == nil && json.Unmarshal(text, &a) == nil && a.Listen != ""
}

// serveAgain exports what was exported before. What cannot be is tried again later; clients wait for it meanwhile.
func (s *Service) serveAgain(ctx context.Context) {
	list, err := boot.List(s.Root)
	if err != nil {
		s.log(err)
	}
	for _, st := range list {
		if st.Export == nil || st.Step == boot.StepKept || st.Step == boot.StepMade {
			continue
		}
		err := s.export(ctx, st.ID)
		if err == nil {
			continue
		}
		s.log(fmt.Errorf("nfsd: %s: %w", st.Name, err))
		s.mu.Lock()
		s.srv.Expect(st.Export.ID, st.Export.Clients)
		if !errors.Is(err, errOther) {
			s.awaited[st.ID] = st.Export.ID
		}
		s.mu.Unlock()
	}
}

// errOther is for a boot of another repository, which this service will never serve.
var errOther = errors.New("it is of another repository than the NFS service")

// againTime is between two attempts to serve what could not be.
const againTime = 5 * time.Second

func (s *Service) tryAgain(ctx context.Context) {
	every(ctx, againTime, func() (over bool) {
		s.mu.Lock()
		ids := slices.Collect(maps.Keys(s.awaited))
		s.mu.Unlock()
		for _, id := range ids {
			switch err := s.export(ctx, id); {
			case err == nil:
				s.log(fmt.Errorf("nfsd: %s is served again", id))
			case errors.Is(err, boot.ErrNoBoot):
				s.forget(id)
			}
		}
		s.pinAgain(ctx)
		return false
	})
}

// pinAgain pins points that could not be, such as while the repository had no room.
func (s *Service) pinAgain(ctx context.Context) {
	s.mu.Lock()
	list := slices.Collect(maps.Values(s.served))
	s.mu.Unlock()
	for _, x := range list { // a forget may be waited for; the pin of a session that has ended meanwhile is one that is lost
		if x.session.Unpinned != nil && x.session.Repin(ctx) == nil {
			s.log(fmt.Errorf("nfsd: %s: its point is kept from being forgotten now", x.session.Name))
		}
	}
}

// every calls do again and again, until it says that it is over, or ctx ends.
func every(ctx context.Context, d time.Duration, do func() (over bool)) {
	t := time.NewTicker(d)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		if do() {
			return
		}
	}
}

// forget ends the waiting for a session.
func (s *Service) forget(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forgetLocked(id)
}

func (s *Service) forgetLocked(id string) {
	if of, ok := s.awaited[id]; ok {
		s.srv.Unexpect(of)
		delete(s.awaited, id)
		s.unused = time.Now()
	}
}

func (s *Service) log(err error) {
	if s.Log != nil {
		s.Log(err)
	}
}

// exportAgain is export for whoever is not at work on the session: one that ends is left alone.
func (s *Service) exportAgain(ctx context.Context, id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	st, err := boot.Get(s.Root, id)
	if errors.Is(err, boot.ErrNoBoot) || err == nil && (st.Step == boot.StepEnding || st.Step == boot.StepKept) {
		return nil
	}
	return s.exportLocked(ctx, id)
}

// export serves a session, unless it does.
func (s *Service) export(ctx context.Context, id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.exportLocked(ctx, id)
}

func (s *Service) exportLocked(ctx context.Context, id string) (err error) {
	if s.ending {
		return ErrGone
	}
	if s.served[id] != nil {
		return nil
	}
	st, err := boot.Get(s.Root, id)
	if err != nil {
		return err
	}
	if st.Export == nil {
		return fmt.Errorf("nfsd: %s is not of a platform", st.Name)
	}
	if !st.Of(s.Repo, s.Repository) {
		return fmt.Errorf("nfsd: %w: %s of %s, the service of %s", errOther, st.Name, st.Repository, s.Repository)
	}
	x := &served{path: st.Export.Path}
	if x.session, err = boot.Open(ctx, st, s.Repo, s.cache); err != nil {
		return err
	}
	var placed []folder.Placed
	for i, d := range st.Machine.Disks {
		placed = append(placed, folder.Placed{Path: st.Export.Folder + "/" + boot.FlatName(d.Name), Key: d.Name, Content: x.session.Disk(i), Time: st.Created, Mode: 0o600})
	}
	if x.folder, err = folder.Open(st.File(boot.FolderDir), placed, folder.Options{}); err != nil {
		return errors.Join(err, x.session.Close())
	}
	err = s.srv.Export(nfs.Export{Path: x.path, ID: st.Export.ID, FS: x.folder, Writable: true, Clients: st.Export.Clients, NoRootSquash: true})
	if err != nil {
		return errors.Join(err, x.close())
	}
	s.served[id] = x
	delete(s.awaited, id)
	return nil
}

// unexport ends the serving of a session.
func (s *Service) unexport(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forgetLocked(id)
	x := s.served[id]
	if x == nil {
		return nil
	}
	err := errors.Join(s.srv.Unexport(x.path), x.close())
	delete(s.served, id)
	s.unused = time.Now()
	return err
}

func (s *Service) closeAll() error {
	errs := []error{s.srv.Close()}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range s.served {
		errs = append(errs, x.close())
	}
	s.served = nil
	return errors.Join(errs...)
}

// endIdle ends the service when there has been nothing to serve for a time.
func (s *Service) endIdle(ctx context.Context, end func()) {
	if s.Idle <= 0 {
		return
	}
	every(ctx, max(s.Idle/10, 10*time.Millisecond), func() bool {
		s.mu.Lock()
		over := len(s.served) == 0 && len(s.awaited) == 0 && time.Since(s.unused) > s.Idle
		s.ending = over
		s.mu.Unlock()
		if over {
			end()
		}
		return over
	})
}

// A request is a line of JSON, and so is its answer; one of each per connection.
type request struct {
	Do string `json:"do"` // "export", "export again", "unexport", "status"
	ID string `json:"id,omitempty"`
}

type answer struct {
	Error  string   `json:"error,omitempty"`
	Gone   bool     `json:"gone,omitempty"` // the service ends: another one is needed
	Served []Served `json:"served,omitempty"`
	PID    int      `json:"pid,omitempty"`
	Addr   string   `json:"address,omitempty"`
}

// Served is a session that is exported.
type Served struct {
	ID           string   `json:"id"`
	Clients      []string `json:"clients"`
	BytesRead    uint64   `json:"bytes_read"`
	BytesWritten uint64   `json:"bytes_written"`
}

const (
	maxRequest = 4 << 10 // bytes
	talkTime   = time.Minute
)

func (s *Service) answerAll(ctx context.Context, ln net.Listener) {
	var work sync.WaitGroup
	defer work.Wait()
	for {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		work.Go(func() {
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(talkTime))
			line, err := bufio.NewReaderSize(conn, maxRequest).ReadSlice('\n')
			var req request
			if err == nil {
				err = json.Unmarshal(line, &req)
			}
			a := answer{PID: os.Getpid(), Addr: s.srv.Addr().String()}
			if err == nil {
				err = s.carryOut(ctx, req, &a)
			}
			if err != nil {
				a.Error, a.Gone = err.Error(), errors.Is(err, ErrGone)
			}
			json.NewEncoder(conn).Encode(a)
		})
	}
}

func (s *Service) carryOut(ctx context.Context, req request, a *answer) error {
	switch req.Do {
	case "export":
		return s.export(ctx, req.ID)
	case "export again":
		return s.exportAgain(ctx, req.ID)
	case "unexport":
		return s.unexport(req.ID)
	case "status":
		return s.status(a)
	}
	return fmt.Errorf("request %q is not known", req.Do)
}

func (s *Service) status(a *answer) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, x := range s.served {
		st, err := s.srv.Stats(x.path)
		if err != nil {
			return err
		}
		v := Served{ID: id, BytesRead: st.BytesRead, BytesWritten: st.BytesWritten, Clients: []string{}}
		for _, c := range s.srv.Clients(x.path) {
			if c.Conns > 0 {
				v.Clients = append(v.Clients, c.Addr.String())
			}
		}
		a.Served = append(a.Served, v)
	}
	slices.SortFunc(a.Served, func(a, b Served) int { return strings.Compare(a.ID, b.ID) })
	return nil
}

// Client asks the service.
type Client struct {
	Root string
	// Start starts the service when none runs; nil: that is an error.
	Start func(ctx context.Context) error
}

var _ boot.Exporter = (*Client)(nil)

// ErrGone: no service runs.
var ErrGone = errors.New("no process serves NFS for these boots")

// startTime is for how long a service is waited for. Several commands may start one at the same time, of which all but one end at once; one that
// ends holds its place for a moment; one that takes over has overlays to sync first.
const startTime = 30 * time.Second

// Export has a session served; the service is started for that.
func (c *Client) Export(ctx context.Context, id string) error {
	return c.export(ctx, request{Do: "export", ID: id})
}

// ExportAgain is Export for whoever is not at work on the session: one that somebody ends meanwhile is left alone.
func (c *Client) ExportAgain(ctx context.Context, id string) error {
	return c.export(ctx, request{Do: "export again", ID: id})
}

func (c *Client) export(ctx context.Context, req request) error {
	var failed error // of the last start
	for end := time.Now().Add(startTime); ; {
		_, err := c.ask(ctx, req)
		if !errors.Is(err, ErrGone) || c.Start == nil {
			return err
		}
		if failed != nil && time.Now().After(end) {
			return errors.Join(err, failed)
		}
		if failed = c.Start(ctx); failed == nil {
			continue
		}
		if !errors.Is(failed, ErrRuns) { // somebody else's start would not fare better
			return failed
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// Unexport ends the serving of a session. Without a service there is nothing to end.
func (c *Client) Unexport(ctx context.Context, id string) error {
	_, err := c.ask(ctx, request{Do: "unexport", ID: id})
	if errors.Is(err, ErrGone) {
		return nil
	}
	return err
}

// Status says what is served.
func (c *Client) Status(ctx context.Context) ([]Served, error) {
	a, err := c.ask(ctx, request{Do: "status"})
	return a.Served, err
}

func (c *Client) ask(ctx context.Context, req request) (a answer, err error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", filepath.Join(c.Root, dirName, controlName))
	if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOENT) {
		return a, fmt.Errorf("nfsd: %w", ErrGone)
	}
	if err != nil {
		return a, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(talkTime))
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if err := json.NewEncoder(conn).Encode(req); err != nil {
		return a, fmt.Errorf("nfsd: %w", err)
	}
	if err := json.NewDecoder(conn).Decode(&a); err != nil {
		if errors.Is(err, io.EOF) {
			err = ErrGone
		}
		return a, errors.Join(ctx.Err(), fmt.Errorf("nfsd: %w", err))
	}
	if a.Gone {
		return a, fmt.Errorf("nfsd: %w", ErrGone)
	}
	if a.Error != "" {
		return a, errors.New(a.Error)
	}
	return a, nil
}
