package ext

import "sync"

const (
	// maxSound bounds how many directories are remembered.
	maxSound = 1 << 14
	// maxLeaves bounds the blocks of a directory whose index is compared, 48 bytes of memory each while that goes on. In a
	// larger one, every name that is not there is looked for everywhere.
	maxLeaves = 1 << 18
)

// soundSet remembers directories whose index leads to each of their names: a name that it does not lead to is not there.
type soundSet struct {
	mu   sync.Mutex // guards following
	dirs map[uint32]bool
}

func (s *soundSet) has(no uint32) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dirs[no]
}

func (s *soundSet) add(no uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dirs == nil || len(s.dirs) >= maxSound {
		s.dirs = map[uint32]bool{}
	}
	s.dirs[no] = true
}

// indexCheck compares the names of a directory with its index: each has to be in a leaf that its hash leads to. It is nil for a directory
// without an index that can be used.
type indexCheck struct {
	f      *FS
	in     *inode
	kind   int
	leaves map[int64]leaf // block of the directory => what it holds
	wrong  bool
}

// A leaf holds the hashes from first up to last.
type leaf struct{ first, last uint32 }

// newIndexCheck reads the whole index.
func (f *FS) newIndexCheck(in *inode) *indexCheck {
	x, ok := f.openIndex(in)
	if !ok || in.size/f.blockSize > maxLeaves {
		return nil
	}
	c := &indexCheck{f: f, in: in, kind: x.kind, leaves: map[int64]leaf{}}
	c.read(x.root, x.deep, leaf{0, 1<<32 - 1})
	if c.wrong {
		return nil
	}
	return c
}

// read notes the leaves below a node that holds the hashes of r. No block may be in the index twice, so that this ends.
func (c *indexCheck) read(x index, deep int, r leaf) {
	for x.i = 0; x.i < x.len() && !c.wrong; x.i++ {
		at := leaf{r.first, r.last}
		if x.i > 0 {
			at.first = x.hash(x.i) &^ 1 // the lowest bit: it goes on with the last hash of the one before
		}
		if x.i+1 < x.len() {
			next := x.hash(x.i + 1)
			at.last = next&^1 - 1 + next&1*2 // with that bit, up to and with the next one's first hash
		}
		if _, twice := c.leaves[x.block()]; twice || at.first < r.first || at.first > at.last || at.last > r.last {
			c.wrong = true
			return
		}
		c.leaves[x.block()] = at
		if deep == 0 {
			continue
		}
		b, err := c.f.fileBlock(c.in, x.block())
		var below index
		if err != nil || !below.parse(b[nodeIndex:]) {
			c.wrong = true
			return
		}
		c.read(below, deep-1, at)
	}
}

// see looks at a name.
func (c *indexCheck) see(n name) {
	if c == nil || c.wrong || n.next > fastNames {
		return
	}
	hash, ok := c.f.hash(c.in, c.kind, string(n.bytes))
	at, is := c.leaves[(n.next-1)/c.f.blockSize]
	if !ok || !is || hash < at.first || hash > at.last {
		c.wrong = true
	}
}

// sound reports whether all names that were seen are where the index leads to.
func (c *indexCheck) sound() bool { return c != nil && !c.wrong }
