package lease

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sort"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/fs/vdisk"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// pass is one time that the stream comes. One goroutine takes grains from it into the window as long as
// there is room; readers unpack them from there and give them up.
//
// Why nobody waits for ever: a reader waits only for the stream to pass its place. Of those that
// read, the one furthest behind waits with nothing in the window before its own range, which is
// small; so the window has room, and the stream goes on. Where readers leave something out, or ask for
// something far ahead, or extents are pulled far ahead of what is read, that does not hold: then
// Options.Patience ends the waiting.
type pass struct {
	opt    *Options
	ctx    context.Context
	cancel context.CancelCauseFunc
	unhook func() bool
	done   chan struct{}     // closed when the goroutine has ended
	stream *vdisk.VMDKStream // set before the first grain is in the window
	whole  sync.Pool         // of *[]byte, for a grain of which a part is read

	mu   sync.Mutex
	cond sync.Cond // whenever one of the following changes
	// guards following
	grains  []grain // came; ascending; those before head are forgotten
	head    int
	low     int64           // what lies before was given up, and nothing is known of it
	front   int64           // what lies before came, or is a hole
	reads   []*reading      // under way
	waiting int             // readers that wait for the stream
	pulling bool            // Extents waits for it
	pending []extent.Extent // came, not yielded yet
	yielded int64           // end of what was
	rest    bool            // the next extent is all the rest
	moves   int             // counts what readers do
	cur     *slab           // takes the next grain; nil: none
	free    []*slab
	slabs   int   // in all
	err     error // why no more comes: io.EOF when all is there
}

// grain is a grain of the window.
type grain struct {
	off  int64 // on the disk
	n    int32 // bytes on the disk
	left int32 // of these not read yet
	at   int32 // in the slab
	size int32 // packed
	slab *slab // nil: given up
}

func (g grain) end() int64 { return g.off + int64(g.n) }

// slab holds packed grains, one behind the other.
type slab struct {
	b     []byte
	used  int // bytes
	users int // grains not given up, and whoever fills or unpacks one
}

// reading is a read on its way.
type reading struct{ at int64 }

const (
	slabSize   = 1 << 20
	maxPending = 1 << 16
)

func newPass(ctx context.Context, opt *Options) *pass {
	p := &pass{opt: opt, done: make(chan struct{})}
	p.ctx, p.cancel = context.WithCancelCause(ctx)
	p.cond.L = &p.mu
	p.unhook = context.AfterFunc(p.ctx, p.wake)
	go p.run()
	return p
}

// stop ends the pass, and waits until the connection is closed.
func (p *pass) stop(why error) {
	p.cancel(why)
	<-p.done
	p.unhook()
}

func (p *pass) wake() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cond.Broadcast()
}

// run takes the stream into the window.
func (p *pass) run() {
	defer close(p.done)
	src := newSource(p.ctx, p.opt)
	defer src.close()
	err := p.take(src)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err = err; err == io.EOF {
		p.front = p.opt.Size
	}
	p.cond.Broadcast()
}

func (p *pass) take(src *source) error {
	s, err := vdisk.ReadStreamVMDK(src, p.opt.Name)
	if err != nil {
		return err
	}
	src.complete = s.Complete
	unit := int64(s.GrainSize())
	// The stream may count whole grains.
	if s.Size() < p.opt.Size || s.Size() > (p.opt.Size+unit-1)/unit*unit {
		return fmt.Errorf("%s: the stream is of a disk of %d bytes, but the disk has %d", p.opt.Name, s.Size(), p.opt.Size)
	}
	p.stream = s
	p.whole.New = func() any { b := make([]byte, unit); return &b }
	for {
		off, packed, err := s.NextPacked(p.makeRoom)
		if err != nil {
			return err
		}
		p.add(off, packed)
	}
}

// makeRoom reserves n bytes of the window, and waits until there are any.
func (p *pass) makeRoom(n int) ([]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for !p.hasRoom(n) {
		if err := p.waitForRoom(n); err != nil {
			return nil, err
		}
	}
	if p.cur == nil {
		p.cur = p.newSlab()
	}
	s := p.cur
	b := s.b[s.used : s.used+n : s.used+n]
	s.used += n
	s.users++
	return b, nil
}

// hasRoom also closes a slab that is too full for n bytes.
func (p *pass) hasRoom(n int) bool {
	if p.crowded() {
		return false
	}
	if s := p.cur; s != nil {
		if s.used+n <= len(s.b) {
			return true
		}
		p.cur = nil
		p.release(s, 0)
	}
	return len(p.free) > 0 || p.slabs < p.maxSlabs()
}

// crowded bounds the list of grains: one for each sector of the window.
func (p *pass) crowded() bool { return int64(len(p.grains)-p.head) >= p.opt.Window/512 }

func (p *pass) slabLen() int { return max(slabSize, p.stream.MaxPacked()) }

func (p *pass) maxSlabs() int { return max(4, int(p.opt.Window)/p.slabLen()) }

func (p *pass) newSlab() *slab {
	if n := len(p.free); n > 0 {
		s := p.free[n-1]
		p.free = p.free[:n-1]
		return s
	}
	p.slabs++
	return &slab{b: make([]byte, p.slabLen())}
}

// release takes users off a slab, and makes one without any free.
func (p *pass) release(s *slab, users int) {
	if s.users -= users; s.users > 0 {
		return
	}
	s.used = 0
	if s != p.cur {
		p.free = append(p.free, s)
	}
	p.cond.Broadcast()
}

// waitForRoom waits until there is room, or for Options.Patience while no reader moves.
func (p *pass) waitForRoom(n int) error {
	var late bool
	t := time.AfterFunc(p.opt.Patience, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		late = true
		p.cond.Broadcast()
	})
	defer t.Stop()
	for moves := p.moves; !p.hasRoom(n); {
		switch {
		case p.ctx.Err() != nil:
			return context.Cause(p.ctx)
		case late && p.moves != moves:
			return nil // once more, from now on
		case late && p.waiting > 0:
			p.giveUpOldest()
			return nil
		case late && p.pulling:
			p.rest = true
			p.cond.Broadcast()
			return nil
		case late:
			return nil // nobody misses it
		}
		p.cond.Wait()
	}
	return nil
}

// giveUpOldest gives up the grains of the slab that came first.
func (p *pass) giveUpOldest() {
	var s *slab
	for i := p.head; i < len(p.grains); i++ {
		g := &p.grains[i]
		if g.slab == nil {
			continue
		}
		if s == nil {
			s = g.slab
		}
		if g.slab != s {
			break
		}
		g.slab = nil
		p.release(s, 1)
	}
	p.trim()
}

// add takes a grain for which makeRoom was called.
func (p *pass) add(off int64, packed []byte) {
	n := int32(min(int64(p.stream.GrainSize()), p.opt.Size-off))
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.cur
	p.grains = append(p.grains, grain{off: off, n: n, left: n, at: int32(s.used - len(packed)), size: int32(len(packed)), slab: s})
	p.front = off + int64(n)
	switch last := len(p.pending) - 1; {
	case p.rest:
	case last >= 0 && (p.pending[last].End() == off || last == maxPending):
		p.pending[last].Len = p.front - p.pending[last].Off // too many: with the hole
	default:
		p.pending = append(p.pending, extent.Extent{Off: off, Len: int64(n)})
	}
	p.cond.Broadcast()
}

// pull gives the next extent; io.EOF when there are no more.
func (p *pass) pull() (extent.Extent, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pulling = true
	defer func() { p.pulling = false }()
	for {
		switch {
		case p.ctx.Err() != nil:
			return extent.Extent{}, p.gone()
		case len(p.pending) > 0:
			e := p.pending[0]
			p.pending = p.pending[1:]
			p.yielded = e.End()
			return e, nil
		case p.rest && p.yielded < p.opt.Size:
			e := extent.Extent{Off: p.yielded, Len: p.opt.Size - p.yielded}
			p.yielded = p.opt.Size
			return e, nil
		case p.err != nil:
			return extent.Extent{}, p.err
		case p.rest:
			return extent.Extent{}, io.EOF // who reads the end of the disk hears of what is wrong
		}
		p.cond.Wait()
	}
}

// gone is the error of those who wait when the pass was ended.
func (p *pass) gone() error { return fmt.Errorf("%s: %w", p.opt.Name, context.Cause(p.ctx)) }

func (p *pass) readAt(b []byte, off int64) (done int, err error) {
	r := &reading{off}
	p.mu.Lock()
	p.reads = append(p.reads, r)
	p.moves++
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.reads = slices.DeleteFunc(p.reads, func(o *reading) bool { return o == r })
		p.moves++
		p.trim()
	}()
	for done < len(b) {
		n, err := p.readSome(b[done:], r)
		if err != nil {
			return done, err
		}
		done += n
	}
	if r.at == p.opt.Size {
		return done, p.ended()
	}
	return done, nil
}

// ended waits until the stream has ended, and its tables were held against what came.
func (p *pass) ended() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.waiting++
	defer func() { p.waiting-- }()
	for p.err == nil && p.ctx.Err() == nil {
		p.cond.Wait()
	}
	switch {
	case p.err == io.EOF:
		return nil
	case p.ctx.Err() != nil:
		return p.gone()
	}
	return p.err
}

// readSome reads from a grain, or zeros.
func (p *pass) readSome(b []byte, r *reading) (int, error) {
	p.mu.Lock()
	g, hole, err := p.find(r.at)
	if err == nil && hole == 0 {
		g.slab.users++ // it stays while it is unpacked
	}
	p.mu.Unlock()
	if err != nil {
		return 0, err
	}
	if hole > 0 {
		b = b[:min(int64(len(b)), hole)]
		clear(b)
		p.mu.Lock()
		defer p.mu.Unlock()
		r.at += int64(len(b))
		return len(b), nil
	}
	b = b[:min(int64(len(b)), g.end()-r.at)]
	err = p.unpack(b, g, r.at)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.moves++
	if err == nil {
		p.took(g.off, len(b))
		r.at += int64(len(b))
		p.trim()
	}
	p.release(g.slab, 1)
	return len(b), err
}

// find finds the grain of a place, or how many zeros are there. It waits until the stream has passed it.
func (p *pass) find(at int64) (g grain, hole int64, err error) {
	for {
		if at < p.low {
			return g, 0, p.outOfReach(at)
		}
		switch i := p.search(at); {
		case i < len(p.grains) && p.grains[i].off > at:
			return g, p.grains[i].off - at, nil
		case i < len(p.grains) && p.grains[i].slab == nil:
			return g, 0, p.outOfReach(at)
		case i < len(p.grains):
			return p.grains[i], 0, nil
		case at < p.front:
			return g, p.front - at, nil
		case p.ctx.Err() != nil:
			return g, 0, p.gone()
		case p.err != nil:
			return g, 0, p.err
		}
		p.waiting++
		p.cond.Wait()
		p.waiting--
	}
}

// search is the index of the first grain that ends behind a place.
func (p *pass) search(at int64) int {
	return p.head + sort.Search(len(p.grains)-p.head, func(i int) bool { return p.grains[p.head+i].end() > at })
}

func (p *pass) outOfReach(at int64) error {
	return fmt.Errorf("%s: byte %d, while the stream is at %d: %w", p.opt.Name, at, p.front, ErrOutOfReach)
}

func (p *pass) unpack(b []byte, g grain, at int64) error {
	packed := g.slab.b[g.at : g.at+g.size]
	if len(b) == int(g.n) {
		return p.stream.Unpack(b, packed, g.off)
	}
	whole := p.whole.Get().(*[]byte)
	defer p.whole.Put(whole)
	err := p.stream.Unpack((*whole)[:g.n], packed, g.off)
	copy(b, (*whole)[at-g.off:])
	return err
}

// took counts n bytes of a grain as read, and gives it up when that was all.
func (p *pass) took(off int64, n int) {
	i := p.search(off)
	if i == len(p.grains) || p.grains[i].off != off || p.grains[i].slab == nil {
		return // given up meanwhile
	}
	g := &p.grains[i]
	if g.left -= int32(n); g.left <= 0 {
		s := g.slab
		g.slab = nil
		p.release(s, 1)
	}
}

// trim forgets the grains at the beginning that were given up, but for those that a read on its way is
// not past: that has to know a hole when it comes to one.
func (p *pass) trim() {
	n, full := p.head, p.crowded()
	for n < len(p.grains) && p.grains[n].slab == nil && !slices.ContainsFunc(p.reads, func(r *reading) bool { return r.at < p.grains[n].end() }) {
		n++
	}
	if n == p.head {
		return
	}
	p.low = p.grains[n-1].end()
	if p.head = n; n >= len(p.grains)/2 {
		p.grains, p.head = p.grains[:copy(p.grains, p.grains[n:])], 0
	}
	if full {
		p.cond.Broadcast()
	}
}
