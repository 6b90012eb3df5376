package cluster

import (
	"errors"
	"io"
	"iter"
	"sort"
	"sync"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// First is the number of the first cluster of a volume.
const First = 2

// Table is a volume's clusters.
type Table struct {
	Data  int64 // byte of the device where cluster First is
	Size  int64 // bytes of a cluster
	Count int64 // number of clusters
	// Links gives what follows chains: it takes a cluster of the volume and gives the next one, 0 behind the last. Each is used by one
	// goroutine.
	Links func() func(c uint32) (uint32, error)
}

// Holds reports whether n clusters from c on are on the volume.
func (t *Table) Holds(c uint32, n int64) bool {
	return c >= First && n >= 0 && n <= t.Count && int64(c)-First <= t.Count-n && int64(c)-First < t.Count
}

// At is the byte of the device where cluster c begins.
func (t *Table) At(c uint32) int64 { return t.Data + (int64(c)-First)*t.Size }

// maxRuns is how many runs are kept of a chain; of one with more, every second, fourth … is.
const maxRuns = 4096

// A run is clusters that follow each other on the disk.
type run struct {
	at      int64 // where it is in the chain, clusters
	cluster uint32
	n       int64 // clusters
}

// Chain is the clusters of a file or directory. Safe for concurrent use.
type Chain struct {
	t     *Table
	first uint32

	mu    sync.Mutex // guards following, which change no more once built is set
	built bool
	runs  []run // ascending; those left out lie between them
	n     int64 // clusters that can be read
	err   error // why there are no more, when the chain does not end there
}

// Chain is the chain that starts at a cluster; 0 is an empty one.
func (t *Table) Chain(first uint32) *Chain { return &Chain{t: t, first: first} }

// Run is a chain of n clusters that follow each other on the disk, whatever the table says.
func (t *Table) Run(first uint32, n int64) *Chain {
	c := &Chain{t: t, first: first, built: true}
	switch {
	case n == 0:
	case !t.Holds(first, n):
		c.err = guest.Damaged("%d clusters from %d on, of %d", n, first, t.Count)
	default:
		c.runs, c.n = []run{{cluster: first, n: n}}, n
	}
	return c
}

// steps yields the clusters of a chain from first on, and nothing behind an error.
func (t *Table) steps(first uint32) iter.Seq2[uint32, error] {
	return func(yield func(uint32, error) bool) {
		if first == 0 {
			return
		}
		next := t.Links()
		// Brent's way to find a circle: compare with a cluster that is left behind at each power of two.
		mark, length, power := uint32(0), int64(0), int64(1)
		for c := first; c != 0; {
			if !t.Holds(c, 1) {
				yield(0, guest.Damaged("a chain to cluster %d, of %d", c, t.Count))
				return
			}
			if c == mark {
				yield(0, errCircle)
				return
			}
			if length++; length == power {
				mark, length, power = c, 0, power*2
			}
			if !yield(c, nil) {
				return
			}
			var err error
			if c, err = next(c); err != nil {
				yield(0, err)
				return
			}
		}
	}
}

var (
	errCircle = guest.Damaged("a chain of clusters that goes in a circle")
	errEnd    = guest.Damaged("a table that the device does not hold")
)

// build follows the chain. An error of reading the device is not kept.
func (c *Chain) build() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.built {
		return nil
	}
	b := builder{stride: 1}
	n, last, bad := int64(0), run{}, error(nil)
	for at, err := range c.t.steps(c.first) {
		if err != nil {
			bad = err
			break
		}
		if last.n > 0 && at == last.cluster+uint32(last.n) {
			last.n++
		} else {
			b.add(last)
			last = run{at: n, cluster: at, n: 1}
		}
		n++
	}
	switch {
	case bad == nil:
	case errors.Is(bad, errCircle):
		b, n, last = builder{stride: 1}, 1, run{cluster: c.first, n: 1}
	case !errors.Is(bad, guest.ErrDamaged):
		return bad
	}
	b.add(last)
	c.runs, c.n, c.err, c.built = b.runs, n, bad, true
	return nil
}

// A builder keeps every stride-th run.
type builder struct {
	runs   []run
	seen   int
	stride int
}

func (b *builder) add(r run) {
	if r.n == 0 {
		return
	}
	if b.seen%b.stride == 0 {
		b.runs = append(b.runs, r)
	}
	b.seen++
	if len(b.runs) < maxRuns {
		return
	}
	for i := range maxRuns / 2 {
		b.runs[i] = b.runs[2*i]
	}
	b.runs, b.stride = b.runs[:maxRuns/2], b.stride*2
}

// Len is how many bytes can be read; the error is why there are no more, when the chain does not end there.
func (c *Chain) Len() (int64, error) {
	if err := c.build(); err != nil {
		return 0, err
	}
	return c.n * c.t.Size, c.err
}

// Cost is what the chain takes at most, bytes of memory.
func (c *Chain) Cost() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.built {
		return 100 + maxRuns*24
	}
	return 100 + int64(len(c.runs))*24
}

// ReadAt fills p with what the chain holds from off on, as dev has it. What lies past the end of the chain is guest.ErrDamaged.
func (c *Chain) ReadAt(dev io.ReaderAt, p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	if off >= 0 && off+int64(len(p)) <= c.t.Size && c.t.Holds(c.first, 1) {
		return guest.ReadFull(dev, p, c.t.At(c.first)+off)
	}
	k, err := c.seek(off / c.t.Size)
	if err != nil {
		return err
	}
	skip := off % c.t.Size
	for {
		from, n, err := k.take((skip + int64(len(p)) + c.t.Size - 1) / c.t.Size)
		if err != nil {
			return err
		}
		part := p[:min(int64(len(p)), n*c.t.Size-skip)]
		if err := guest.ReadFull(dev, part, c.t.At(from)+skip); err != nil {
			return err
		}
		if p, skip = p[len(part):], 0; len(p) == 0 {
			return nil
		}
	}
}

// Where is the byte of the device that is byte off of the chain.
func (c *Chain) Where(off int64) (int64, error) {
	if off < c.t.Size && c.t.Holds(c.first, 1) {
		return c.t.At(c.first) + off, nil
	}
	k, err := c.seek(off / c.t.Size)
	if err != nil {
		return 0, err
	}
	from, _, err := k.take(1)
	return c.t.At(from) + off%c.t.Size, err
}

// Extents yields where on the device the first n bytes of the chain are, in their order.
func (c *Chain) Extents(n int64) iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) {
		if n <= 0 {
			return
		}
		k, err := c.seek(0)
		for left := n; err == nil && left > 0; {
			var from uint32
			var count int64
			if from, count, err = k.take((left + c.t.Size - 1) / c.t.Size); err == nil {
				e := extent.Extent{Off: c.t.At(from), Len: min(left, count*c.t.Size)}
				left -= e.Len
				if !yield(e, nil) {
					return
				}
			}
		}
		if err != nil {
			yield(extent.Extent{}, err)
		}
	}
}

// A cursor walks along a chain.
type cursor struct {
	c     *Chain
	i     int    // run at or before at
	at    int64  // clusters
	now   uint32 // the cluster there
	taken bool   // and it was given
	next  func(uint32) (uint32, error)
}

func (c *Chain) seek(at int64) (*cursor, error) {
	if err := c.build(); err != nil {
		return nil, err
	}
	if at < 0 || at >= c.n {
		return nil, c.short(at)
	}
	k := &cursor{c: c, i: sort.Search(len(c.runs), func(i int) bool { return c.runs[i].at > at }) - 1}
	r := c.runs[k.i]
	k.at, k.now = r.at, r.cluster
	if in := min(at-r.at, r.n-1); in > 0 {
		k.at, k.now = k.at+in, k.now+uint32(in)
	}
	for k.at < at {
		if err := k.step(); err != nil {
			return nil, err
		}
	}
	return k, nil
}

func (c *Chain) short(at int64) error {
	if c.err != nil {
		return c.err
	}
	return guest.Damaged("cluster %d of a chain of %d", at, c.n)
}

// step goes on by a cluster.
func (k *cursor) step() (err error) {
	k.at++
	r := k.c.runs[k.i]
	switch {
	case k.at >= k.c.n:
		return k.c.short(k.at)
	case k.at < r.at+r.n:
		k.now++
	case k.i+1 < len(k.c.runs) && k.c.runs[k.i+1].at == k.at:
		k.i++
		k.now = k.c.runs[k.i].cluster
	default:
		if k.next == nil {
			k.next = k.c.t.Links()
		}
		if k.now, err = k.next(k.now); err == nil && !k.c.t.Holds(k.now, 1) {
			err = guest.Damaged("a chain of clusters that changed")
		}
	}
	return err
}

// take gives the next clusters that follow each other on the disk, at least one and at most n, and goes behind them.
func (k *cursor) take(n int64) (from uint32, count int64, err error) {
	if k.taken {
		if err := k.step(); err != nil {
			return 0, 0, err
		}
	}
	from, count, k.taken = k.now, 1, true
	for count < n && k.at+1 < k.c.n {
		r, last := k.c.runs[k.i], k.now
		if more := min(n-count, r.at+r.n-1-k.at); more > 0 {
			k.at, k.now, count = k.at+more, k.now+uint32(more), count+more
			continue
		}
		if err := k.step(); err != nil {
			return 0, 0, err
		}
		if k.now != last+1 {
			k.taken = false
			break
		}
		count++
	}
	return from, count, nil
}
