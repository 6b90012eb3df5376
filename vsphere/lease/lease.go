package lease

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/store/extent"
)

var (
	// ErrNoResume is what Options.Open gives when the server cannot begin in the middle.
	ErrNoResume = errors.New("the server cannot resume a download")
	// ErrChanged: after a lost connection the server sent something else.
	ErrChanged = errors.New("the server sends another disk than before the connection was lost")
	// ErrOutOfReach: a read of what was given up, or before Extents was asked for.
	ErrOutOfReach = errors.New("out of reach: this disk can be read once, in order")
	// ErrClosed: the disk was closed.
	ErrClosed = errors.New("the disk was closed")

	errAnew = errors.New("its extents were asked for anew")
)

// Options of a Disk. Zero values stand for the defaults.
type Options struct {
	Name string // what errors call the disk
	Size int64  // of the disk in bytes, as the platform says
	// Open begins the download, skip bytes from its beginning, which may be ErrNoResume for
	// other than 0. The body ends when ctx does, or when it is closed beside a Read.
	Open func(ctx context.Context, skip int64) (io.ReadCloser, error)
	// Window is the memory for packed grains in bytes; 96 MiB, and at least 16 MiB. Besides come
	// up to a tenth of it for their places, and what vdisk.ReadStreamVMDK takes.
	Window int64
	// Attempts is how many connections in a row may bring nothing new, and how often in all
	// the stream may be begun anew; 5.
	Attempts int
	// Backoff is the wait before the second of them, doubled for each further one; 1 s.
	Backoff time.Duration
	// Idle is after what time without a byte a connection counts as lost; 2 minutes.
	Idle time.Duration
	// Patience is how long the window may stay full while nobody reads and somebody waits; 30 s. After it,
	// the oldest of the window is given up for a reader that waits for later bytes. Or Extents, if
	// it is that what waits, gives all of the rest as one extent, holes included, and ends: who asks
	// for extents far ahead of what is read gets on, too.
	Patience time.Duration
	// Progress is told how many bytes of the stream came, each time some do, also when they come
	// again after a lost connection. Nothing comes while nobody reads the disk.
	Progress func(bytes int64)
}

// minWindow holds what one read needs at once, with chunks of 4 MiB, in slabs.
const minWindow = 16 << 20

// Disk is a disk that comes as a stream.
type Disk struct {
	opt Options

	mu sync.Mutex
	// guards following
	pass   *pass // nil before Extents
	closed bool
}

var _ io.ReaderAt = (*Disk)(nil)

// New makes a Disk; nothing is opened before its Extents are asked for.
func New(opt Options) *Disk {
	opt.Window = max(cmp.Or(opt.Window, 96<<20), minWindow)
	opt.Attempts = cmp.Or(opt.Attempts, 5)
	opt.Backoff = cmp.Or(opt.Backoff, time.Second)
	opt.Idle = cmp.Or(opt.Idle, 2*time.Minute)
	opt.Patience = cmp.Or(opt.Patience, 30*time.Second)
	opt.Name = cmp.Or(opt.Name, "disk")
	if opt.Progress == nil {
		opt.Progress = func(int64) {}
	}
	return &Disk{opt: opt}
}

// Size is the size of the disk in bytes.
func (d *Disk) Size() int64 { return d.opt.Size }

// Extents begins the stream, and yields ascending ranges as they come, outside of which the disk is
// all zeros. What was read before can then be read again; readers that still wait for it get an
// error. The stream goes on while nobody asks for the next range, as far as the window holds it and
// readers need it; it ends with ctx, with Close, or when Extents is ranged over again.
func (d *Disk) Extents(ctx context.Context) iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) {
		p, err := d.begin(ctx)
		for err == nil {
			var e extent.Extent
			if e, err = p.pull(); err == nil && !yield(e, nil) {
				return
			}
		}
		if err != io.EOF {
			yield(extent.Extent{}, err)
		}
	}
}

// begin begins a pass, and ends the one before it.
func (d *Disk) begin(ctx context.Context) (*pass, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, d.wrap(ErrClosed)
	}
	if d.pass != nil {
		d.pass.stop(errAnew)
	}
	d.pass = newPass(ctx, &d.opt)
	return d.pass, nil
}

func (d *Disk) wrap(err error) error { return fmt.Errorf("%s: %w", d.opt.Name, err) }

// ReadAt reads what has come, and waits for what is to come. A read of the last byte of the disk waits for the
// end of the stream, and gives its error. Safe for concurrent use. Bytes that were read
// are given up, and to read them again is ErrOutOfReach.
func (d *Disk) ReadAt(b []byte, off int64) (int, error) {
	d.mu.Lock()
	p, closed := d.pass, d.closed
	d.mu.Unlock()
	switch {
	case off < 0:
		return 0, d.wrap(fmt.Errorf("negative offset %d", off))
	case len(b) == 0:
		return 0, nil
	case off >= d.opt.Size:
		return 0, io.EOF
	case closed:
		return 0, d.wrap(ErrClosed)
	case p == nil:
		return 0, d.wrap(fmt.Errorf("byte %d: %w", off, ErrOutOfReach))
	}
	whole := b[:min(int64(len(b)), d.opt.Size-off)]
	n, err := p.readAt(whole, off)
	if err != nil {
		return n, err
	}
	if len(whole) < len(b) {
		return n, io.EOF
	}
	return n, nil
}

// Close ends the stream, and all that wait for it. It may be called twice.
func (d *Disk) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	if d.pass != nil {
		d.pass.stop(ErrClosed)
	}
	return nil
}
