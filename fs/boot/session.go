package boot

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/fs/nbd"
	"github.com/holdfast-backup/holdfast/fs/overlay"
	"github.com/holdfast-backup/holdfast/store"
)

// Options of a new session.
type Options struct {
	Name       string // empty: that of the VM, with a number when it is taken
	Repository string // where it is, for who opens the session again
	Host       string
	Machine    Machine // without disks: those of the point are given
	// Bus of a disk of the point.
	Bus func(d *store.Disk) Bus
	// NVRAM is what the variables of UEFI are at first.
	NVRAM []byte
	// Clients may mount the folder of the session, for a VM on a platform; nil for one on this computer.
	Clients []netip.Prefix
	// Files are in that folder at first, besides the disks.
	Files map[string][]byte
	// Temporary is for a session that ends with this process: its point needs no protection beyond that.
	Temporary bool
	Now       func() time.Time // the clock
}

// Session is a session that this process serves.
type Session struct {
	State
	repo    *store.Repo
	point   *store.Point
	release func() // of the point
	locked  *os.File
	work    *os.File             // of a new session on a platform
	images  []*store.CachedImage // of the point
	disks   []*overlay.Disk      // over them
	rec     *recorder
	cache   *store.Cache
	// Unpinned is why nothing keeps the point from being forgotten; nil when something does. See Repin.
	Unpinned error

	mu sync.Mutex // guards following
	// guest is nil before it runs.
	guest Guest
	moved map[string]string // disk => file that is to hold it when the session ends
	stop  func(how StopRequest)
}

// Create makes a session of a point below root. The caller closes it.
func Create(ctx context.Context, root string, repo *store.Repo, id store.PointID, opt Options) (*Session, error) {
	if opt.Now == nil {
		opt.Now = time.Now
	}
	p, release, err := repo.Hold(ctx, id)
	if err != nil {
		return nil, err
	}
	s := &Session{repo: repo, point: p, release: release, State: State{
		Version: stateVersion, Point: p.ID, Path: p.Path(), Repository: opt.Repository, RepositoryID: repo.ID(), Created: opt.Now().UTC(), Host: opt.Host, Machine: opt.Machine,
	}}
	err = s.create(root, opt)
	if err == nil && !opt.Temporary {
		err = s.pin(ctx)
	}
	if err != nil {
		s.Close()
		if s.dir != "" {
			err = errors.Join(err, s.Remove())
		}
		return nil, fmt.Errorf("boot: %w", err)
	}
	return s, nil
}

func (s *Session) create(root string, opt Options) (err error) {
	if root, err = filepath.Abs(root); err != nil {
		return err
	}
	if err := os.MkdirAll(root, 0o700); err != nil {
		return err
	}
	lock, err := lockRoot(root)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := ensureHomeID(root); err != nil {
		return err
	}
	if s.Name, err = freeName(root, opt.Name, s.point.VM.Name); err != nil {
		return err
	}
	var b [4]byte
	rand.Read(b[:])
	s.ID = hex.EncodeToString(b[:])
	dir := filepath.Join(root, s.ID)
	if n := len(filepath.Join(dir, ControlSocket)); n > maxSocketPath {
		return fmt.Errorf("%s is too long a path for sockets (%d bytes, not %d)", dir, n, maxSocketPath)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	s.dir = dir
	if s.locked, err = s.lock(); err != nil {
		return err
	}
	for i := range s.point.Disks {
		d := &s.point.Disks[i]
		s.Machine.Disks = append(s.Machine.Disks, Disk{Name: d.Name, Bus: opt.Bus(d), Size: d.Size})
	}
	if s.Machine.Firmware == UEFI {
		if err := os.WriteFile(s.File(NVRAMFile), opt.NVRAM, 0o600); err != nil {
			return err
		}
	}
	if err := s.overlays(overlay.Create); err != nil {
		return err
	}
	if opt.Clients != nil {
		if err := s.makeFolder(opt); err != nil {
			return err
		}
	}
	if err := s.save(); err != nil {
		return err
	}
	return syncDir(root)
}

// freeName gives name, or, without one, one that begins with vm.
func freeName(root, name, vm string) (string, error) {
	list, _ := List(root)
	taken := map[string]bool{}
	for _, s := range list {
		taken[s.Name] = true
	}
	if name != "" {
		if taken[name] {
			return "", fmt.Errorf("%w: %q", ErrNameTaken, name)
		}
		return name, nil
	}
	name = vm
	for n := 2; taken[name]; n++ {
		name = fmt.Sprintf("%s-%d", vm, n)
	}
	return name, nil
}

// Open opens a session again, to serve its disks or to read them. What is read of the repository is kept in cache, which several sessions may share; nil: in
// one of its own, of CacheBytes. The caller closes it.
func Open(ctx context.Context, st *State, repo *store.Repo, cache *store.Cache) (*Session, error) {
	s := &Session{State: *st, repo: repo, release: func() {}, cache: cache}
	var err error
	if s.locked, err = s.lock(); err != nil {
		return nil, err
	}
	if s.point, s.release, err = repo.Hold(ctx, s.Point); err != nil {
		s.release = func() {}
		s.Close()
		return nil, fmt.Errorf("boot: the point of %s: %w", s.Name, err)
	}
	err = s.overlays(overlay.Open)
	if err == nil {
		err = s.pin(ctx) // of a repository that could not be written when the session was made
	}
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("boot: %w", err)
	}
	return s, nil
}

func (s *Session) overlays(get func(string, overlay.Image, overlay.Options) (*overlay.Disk, error)) error {
	if s.cache == nil {
		s.cache = store.NewCache(CacheBytes)
	}
	s.rec = &recorder{until: time.Now().Add(touchTime), seen: map[touched]bool{}}
	for i, d := range s.Machine.Disks {
		whole, err := s.repo.OpenDisk(s.point, d.Name)
		if err != nil {
			return err
		}
		img := &touchedImage{whole.Cached(s.cache), uint32(i), s.rec}
		s.images = append(s.images, img.CachedImage)
		o, err := get(s.File(d.Name), img, overlay.Options{Base: s.Point.String() + "/" + d.Name})
		if err != nil {
			return err
		}
		s.disks = append(s.disks, o)
	}
	return nil
}

// Repo is the repository that the point is in.
func (s *Session) Repo() *store.Repo { return s.repo }

// Started reports whether the VM ran since the session was created or opened.
func (s *Session) Started() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.guest != nil
}

// BootedPoint is the point that the session is of.
func (s *Session) BootedPoint() *store.Point { return s.point }

// Disk is a disk with what the VM wrote, by its place.
func (s *Session) Disk(i int) *overlay.Disk { return s.disks[i] }

// Flush makes what was written to all disks durable.
func (s *Session) Flush() error {
	var errs []error
	for _, d := range s.disks {
		errs = append(errs, d.Flush())
	}
	return errors.Join(errs...)
}

// Close ends the serving; the session stays. It may be called twice.
func (s *Session) Close() error {
	var errs []error
	for _, d := range s.disks {
		errs = append(errs, d.Close())
	}
	s.disks = nil
	s.release()
	s.release = func() {}
	for _, f := range []**os.File{&s.locked, &s.work} {
		if *f != nil {
			errs = append(errs, (*f).Close())
			*f = nil
		}
	}
	return errors.Join(errs...)
}

// server gives the disks over NBD.
func (s *Session) server(log func(error)) *nbd.Server {
	srv := &nbd.Server{Log: log}
	for i, d := range s.Machine.Disks {
		srv.Exports = append(srv.Exports, nbd.Export{Name: d.Name, Disk: s.disks[i], Writable: true})
	}
	return srv
}
