package vddk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/fs/nbd"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// Disk is a disk of a VM. It is safe for concurrent use: calls of several goroutines are in flight together.
type Disk struct {
	o      Options
	ctx    context.Context // of Open; ends with Close, too
	cancel context.CancelCauseFunc
	size   int64          // bytes; negative until the first nbdkit has told
	alive  sync.WaitGroup // servers

	mu sync.Mutex
	// guards following
	now    *server // where new requests go; nil when none runs
	closed bool
}

var (
	errClosed = fmt.Errorf("the disk is closed: %w", os.ErrClosed)
	errLost   = errors.New("an earlier error ended nbdkit while the disk was written: what was written since the last flush may be missing")
)

const (
	// attempts is how often something is tried, each time with a new nbdkit.
	attempts = 3
	// lastWords is how long an error waits for an nbdkit that is told to end, so as to say all that it said.
	lastWords = time.Second
	// sector is what VDDK reads in: nbdkit-vddk-plugin(1), "Sector size limitation".
	sector = 512
	// allocation is the metadata context that tells data from zeros.
	allocation = "base:allocation"
)

// Open starts nbdkit and connects to it. When ctx ends, so do Open and all that is done with the disk later; it still must be
// closed then. An error of nbdkit or VDDK is an *Error.
func Open(ctx context.Context, o Options) (*Disk, error) {
	o, err := o.complete()
	if err != nil {
		return nil, fmt.Errorf("vddk: %w", err)
	}
	d := &Disk{o: o, size: -1}
	d.ctx, d.cancel = context.WithCancelCause(ctx)
	s, err := d.enter()
	if err != nil {
		d.Close()
		return nil, d.failure("open", err)
	}
	d.size = s.client.Size()
	d.leave(s)
	return d, nil
}

// Size is in bytes.
func (d *Disk) Size() int64 { return d.size }

// Close ends nbdkit and waits until it is gone: 10 seconds at most, then it is killed. Calls in flight get an error. Closing twice
// is harmless.
func (d *Disk) Close() error {
	d.cancel(errClosed)
	d.mu.Lock()
	d.closed = true
	d.mu.Unlock()
	d.alive.Wait()
	return nil
}

// ReadAt reads in requests of up to Options.MaxRead. What fails is tried again with a new nbdkit, three times in all.
func (d *Disk) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, d.failure("read", fmt.Errorf("offset %d", off))
	}
	if off >= d.size && len(p) > 0 {
		return 0, io.EOF
	}
	if short := int64(len(p)) - (d.size - off); short > 0 {
		p, err = p[:int64(len(p))-short], io.EOF
	}
	for n < len(p) {
		at := off + int64(n)
		piece := p[n:min(len(p), n+d.most(at))]
		e := d.again(func(c *nbd.Client) error {
			_, err := c.ReadContext(d.ctx, piece, at)
			return err
		})
		if e != nil {
			return n, d.failure(fmt.Sprintf("read of %d bytes at %d", len(piece), at), e)
		}
		n += len(piece)
	}
	return n, err
}

// most is how long a request at off may be, bytes: with the sectors at its ends made whole it is no longer than MaxRead.
func (d *Disk) most(off int64) int { return d.o.MaxRead - int(off%sector) }

// WriteAt writes to a disk that is Writable, in requests of up to Options.MaxRead. Offset and length must be multiples of 512. It is
// not tried again, and after an error neither that nor anything else works: open the disk anew, and write anew what was
// written since the last Flush.
func (d *Disk) WriteAt(p []byte, off int64) (n int, err error) {
	if off < 0 || off > d.size || int64(len(p)) > d.size-off || (off|int64(len(p)))%sector != 0 {
		return 0, d.failure("write", fmt.Errorf("%d bytes at %d of %d", len(p), off, d.size))
	}
	for n < len(p) {
		at := off + int64(n)
		piece := p[n:min(len(p), n+d.most(at))]
		err := d.write(func(c *nbd.Client) error {
			_, err := c.WriteAt(piece, at)
			return err
		})
		if err != nil {
			return n, d.failure(fmt.Sprintf("write of %d bytes at %d", len(piece), at), err)
		}
		n += len(piece)
	}
	return n, nil
}

// Flush makes durable what was written.
func (d *Disk) Flush() error {
	if err := d.write((*nbd.Client).Flush); err != nil {
		return d.failure("flush", err)
	}
	return nil
}

func (d *Disk) write(do func(*nbd.Client) error) error {
	if !d.o.Writable {
		return fmt.Errorf("opened for reading: %w", os.ErrPermission)
	}
	return d.once(do)
}

// Allocated yields the ranges outside of which the disk is zeros, as VDDK knows them, made multiples of granularity; all of the disk
// when it cannot tell. Asking takes up to 24 MiB of memory.
func (d *Disk) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	return extent.Coarsen(func(yield func(extent.Extent, error) bool) {
		for off := int64(0); off < d.size; {
			all, err := d.status(off)
			if err != nil {
				yield(extent.Extent{}, d.failure(fmt.Sprintf("allocation at %d", off), err))
				return
			}
			for _, s := range all {
				if s.Flags&nbd.StateZero == 0 && !yield(s.Extent, nil) {
					return
				}
				off = s.End()
			}
		}
	}, max(granularity, 1), d.size)
}

// status is what is known of a range that begins at off; never nothing.
func (d *Disk) status(off int64) (all []nbd.Status, err error) {
	err = d.again(func(c *nbd.Client) (err error) {
		rest := extent.Extent{Off: off, Len: d.size - off}
		if !slices.Contains(c.Contexts(), allocation) {
			all = []nbd.Status{{Extent: rest}}
			return nil
		}
		all, err = c.BlockStatus(d.ctx, allocation, rest.Off, rest.Len)
		return err
	})
	return all, err
}

// again does something that may be done twice. Of a disk that is written it is not: see errLost.
func (d *Disk) again(do func(*nbd.Client) error) error {
	pause := d.o.pause
	for i := 1; ; i++ {
		err := d.once(do)
		if err == nil || i == attempts || d.o.Writable || lasting(err) || d.ctx.Err() != nil {
			return err
		}
		if d.o.Log != nil {
			d.o.Log(fmt.Sprintf("trying again in %v: %v", pause, err))
		}
		select {
		case <-time.After(pause):
		case <-d.ctx.Done():
		}
		pause *= 4
	}
}

// once does something with the nbdkit that runs. When that fails, no other request goes there.
func (d *Disk) once(do func(*nbd.Client) error) error {
	s, err := d.enter()
	if err != nil {
		return err
	}
	err = do(s.client)
	if d.ctx.Err() != nil && err != nil {
		err = context.Cause(d.ctx)
	} else if err != nil {
		d.retire(s)
	}
	d.leave(s)
	if err == nil || d.ctx.Err() != nil {
		return err
	}
	select {
	case <-s.gone:
	case <-time.After(lastWords):
	case <-d.ctx.Done():
	}
	return s.explain(err)
}

// enter gives the nbdkit that runs, having started one if need be; to be given back to leave.
func (d *Disk) enter() (*server, error) {
	s, err := d.current()
	if err != nil {
		return nil, err
	}
	select {
	case <-s.ready:
		err = s.err
	case <-d.ctx.Done():
		err = context.Cause(d.ctx)
	}
	if err != nil {
		d.leave(s)
		return nil, err
	}
	return s, nil
}

func (d *Disk) current() (*server, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.closed:
		return nil, errClosed
	case d.ctx.Err() != nil:
		return nil, context.Cause(d.ctx)
	case d.now == nil && d.o.Writable && d.size >= 0:
		return nil, errLost
	case d.now == nil:
		d.now = newServer(d.o)
		d.alive.Add(1)
		go d.serve(d.now)
	}
	d.now.users++
	return d.now, nil
}

func (d *Disk) leave(s *server) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s.users--
	s.endUnused()
}

// retire takes s out of use: it ends when all have left it, so that one failed read does not fail those beside it.
func (d *Disk) retire(s *server) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.now == s {
		d.now = nil
	}
	s.retired = true
	s.endUnused()
}

// serve is the life of a server.
func (d *Disk) serve(s *server) {
	defer d.alive.Done()
	defer close(s.gone)
	s.err = s.start(d.ctx, d.size)
	if s.err != nil {
		d.retire(s)
		close(s.ready)
		return
	}
	close(s.ready)
	select {
	case <-s.unused:
	case <-s.process.ended:
	case <-d.ctx.Done():
	}
	d.retire(s)
	s.client.Close()
	s.process.stop()
	s.said.end()
}
