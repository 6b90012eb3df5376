package boot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/fs/nbd"
	"github.com/holdfast-backup/holdfast/fs/overlay"
)

// RunOptions of a session that is served.
type RunOptions struct {
	// Ready is called when the VM runs.
	Ready func(s *State)
	// Log is told what goes wrong while it does, from several goroutines.
	Log func(error)
	// Commit makes a point of the disks as they are; see Session.Frozen.
	Commit func(ctx context.Context, s *Session, tags []string) (any, error)
	// Patience is how long the guest has to shut down when ctx ends.
	Patience time.Duration
}

// StopRequest says how a session is to end.
type StopRequest struct {
	Patience time.Duration `json:"patience"` // for the guest to shut down
	Keep     bool          `json:"keep"`     // keep what it wrote
}

// Run serves the disks, starts the VM or finds it running, and returns when it has ended: by itself,
// by a request on the control socket, or since ctx ended. drop: what it wrote is not to be
// kept.
func (s *Session) Run(ctx context.Context, host Host, opt RunOptions) (drop bool, err error) {
	ln, err := nbd.Listen("unix:" + s.File(NBDSocket))
	if err != nil {
		return false, err
	}
	srv := s.server(opt.Log)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(context.WithoutCancel(ctx), ln) }()
	defer func() {
		err = errors.Join(err, srv.Close(), <-served, s.Flush())
		os.Remove(s.File(NBDSocket))
	}()

	guest, err := host.Attach(ctx, &s.State)
	if errors.Is(err, ErrGone) {
		defer s.readAhead(ctx, opt.Log)()
		guest, err = host.Boot(ctx, &s.State)
	}
	if err != nil {
		return false, err
	}
	defer guest.Close()
	if err := s.save(); err != nil { // with the process that runs it
		return false, errors.Join(err, guest.Stop(context.WithoutCancel(ctx), 0))
	}
	stop := make(chan StopRequest, 1)
	s.mu.Lock()
	s.guest = guest
	s.stop = func(how StopRequest) {
		select {
		case stop <- how:
		default: // one is enough
		}
	}
	s.mu.Unlock()
	control, err := s.listen(ctx, opt)
	if err != nil {
		return false, errors.Join(err, guest.Stop(context.WithoutCancel(ctx), 0))
	}
	defer control.close()
	if opt.Ready != nil {
		opt.Ready(&s.State)
	}
	how := StopRequest{Keep: true}
	select {
	case <-guest.Done():
	case how = <-stop:
		err = guest.Stop(context.WithoutCancel(ctx), how.Patience)
	case <-ctx.Done():
		err = guest.Stop(context.WithoutCancel(ctx), opt.Patience)
	}
	if err != nil && !errors.Is(err, ErrGone) {
		return false, err
	}
	<-guest.Done()
	s.Process = Process{}
	return !how.Keep, errors.Join(s.save(), s.finishMoves(context.WithoutCancel(ctx)))
}

// readAhead replays the last boot, and keeps the list of this one when it is booted or over. What it gives ends it.
func (s *Session) readAhead(ctx context.Context, log func(error)) (end func()) {
	ctx, cancel := context.WithCancel(ctx)
	over := make(chan struct{})
	var work sync.WaitGroup
	work.Go(func() { s.replay(ctx) })
	work.Go(func() {
		select {
		case <-over:
		case <-time.After(time.Until(s.rec.until)):
		}
		if err := s.saveTouched(context.WithoutCancel(ctx)); err != nil && log != nil {
			log(err)
		}
	})
	return func() {
		close(over)
		cancel()
		work.Wait()
	}
}

// Frozen pauses the VM, when it runs, while fn reads the disks.
func (s *Session) Frozen(ctx context.Context, fn func() error) error {
	s.mu.Lock()
	guest := s.guest
	s.mu.Unlock()
	if guest == nil {
		return fn()
	}
	err := guest.Pause(ctx)
	if errors.Is(err, ErrGone) {
		return fn()
	}
	if err != nil {
		return fmt.Errorf("boot: pause: %w", err)
	}
	err = errors.Join(s.Flush(), fn())
	if rerr := guest.Resume(context.WithoutCancel(ctx)); rerr != nil && !errors.Is(rerr, ErrGone) {
		err = errors.Join(err, fmt.Errorf("boot: the VM stays paused: %w", rerr))
	}
	return err
}

// Runs reports whether the VM runs.
func (s *Session) Runs() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.guest == nil {
		return false
	}
	select {
	case <-s.guest.Done():
		return false
	default:
		return true
	}
}

// Migrate copies a disk with all that was written to a new raw file. While the VM runs it goes on, and
// then has its disk in the file; when it ends before that, or does not run, the file is
// finished without it.
func (s *Session) Migrate(ctx context.Context, disk, file string, progress func(done, total int64)) error {
	i := s.index(disk)
	if i < 0 {
		return fmt.Errorf("boot: %s has no disk %q", s.Name, disk)
	}
	if at := s.Machine.Disks[i].File; at != "" {
		return fmt.Errorf("boot: %s of %s is in %s already", disk, s.Name, at)
	}
	if !s.Runs() {
		return s.moveOut(ctx, i, file, progress)
	}
	s.mu.Lock()
	if s.moved[disk] != "" {
		s.mu.Unlock()
		return fmt.Errorf("boot: %s is on its way to %s", disk, s.moved[disk])
	}
	if s.moved == nil {
		s.moved = map[string]string{}
	}
	s.moved[disk] = file
	guest := s.guest
	s.mu.Unlock()
	err := guest.Migrate(ctx, disk, file, progress)
	if errors.Is(err, ErrGone) {
		return nil // Run finishes it
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.moved, disk)
	if err != nil {
		return err
	}
	s.Machine.Disks[i].File = file
	return s.save()
}

func (s *Session) index(disk string) int {
	for i := range s.Machine.Disks {
		if s.Machine.Disks[i].Name == disk {
			return i
		}
	}
	return -1
}

// finishMoves copies what was on its way when the VM ended.
func (s *Session) finishMoves(ctx context.Context) error {
	s.mu.Lock()
	moved := s.moved
	s.moved = nil
	s.mu.Unlock()
	var errs []error
	for disk, file := range moved {
		errs = append(errs, s.moveOut(ctx, s.index(disk), file, nil))
	}
	return errors.Join(errs...)
}

// moveOut copies a disk to a raw file; the VM does not run.
func (s *Session) moveOut(ctx context.Context, i int, file string, progress func(done, total int64)) error {
	if err := s.disks[i].Flush(); err != nil {
		return err
	}
	if err := copyOut(ctx, s.disks[i], file, progress); err != nil {
		return fmt.Errorf("boot: %s to %s: %w", s.Machine.Disks[i].Name, file, err)
	}
	s.Machine.Disks[i].File = file
	return s.save()
}

// copyPart is how much is copied at a time, bytes; copyAtOnce how many parts at once.
const (
	copyPart   = 1 << 20
	copyAtOnce = 4
)

// copyOut writes all of a disk to file, sparse where it is, and syncs it.
func copyOut(ctx context.Context, d overlay.Image, file string, progress func(done, total int64)) error {
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(d.Size()); err != nil {
		return err
	}
	free := make(chan []byte, copyAtOnce)
	for range copyAtOnce {
		free <- make([]byte, copyPart)
	}
	g, gctx := errgroup.WithContext(ctx)
	var done atomic.Int64
	for e, err := range d.Allocated(copyPart) {
		if err != nil {
			return errors.Join(err, g.Wait())
		}
		for at := e.Off; at < e.End() && gctx.Err() == nil; at += copyPart {
			buf := <-free
			g.Go(func() error {
				defer func() { free <- buf }()
				p := buf[:min(copyPart, e.End()-at)]
				if n, err := d.ReadAt(p, at); n < len(p) {
					return err
				}
				if progress != nil {
					progress(done.Add(int64(len(p))), d.Size())
				}
				_, err := f.WriteAt(p, at)
				return err
			})
		}
	}
	if err := errors.Join(g.Wait(), ctx.Err()); err != nil {
		return err
	}
	return f.Sync()
}
