package fuse

import (
	"context"
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/holdfast-backup/holdfast/fs"
	"github.com/holdfast-backup/holdfast/fs/guest"
)

// nodes gives numbers to what the kernel knows. What a guest has, which may be many millions of files, costs nothing here: its number says
// what it is. Of the rest, all that the kernel knows is kept until it forgets.
//
//	bit 63      1
//	bits 32-62  index of a prefix
//	bits 0-31   lower half of the guest's inode number
type nodes struct {
	mu sync.RWMutex
	// guards following
	prefixes []prefix
	indexes  map[prefixKey]uint64
	known    map[uint64]*knownNode
	numbers  map[uint64]uint64 // of those in known, by their inode numbers
	last     uint64
}

const ofGuest = 1 << 63

// A prefix is what many files of a guest have in common.
type prefix struct {
	volume fs.GuestVolume
	high   uint64 // upper half of their inode numbers, in place
}

type prefixKey struct{ volume, high uint64 }

type knownNode struct {
	node      fs.Node
	inode     uint64
	immutable bool
	lookups   uint64
}

func newNodes(root fs.Node) *nodes {
	return &nodes{
		indexes: map[prefixKey]uint64{},
		known:   map[uint64]*knownNode{fuse.FUSE_ROOT_ID: {node: root, inode: fuse.FUSE_ROOT_ID, lookups: 1}},
		numbers: map[uint64]uint64{fuse.FUSE_ROOT_ID: fuse.FUSE_ROOT_ID},
		last:    fuse.FUSE_ROOT_ID,
	}
}

// guest gives the number of what a guest has.
func (t *nodes) guest(g fs.GuestID) uint64 {
	high := uint64(g.Ino) >> 32 << 32
	key := prefixKey{g.Volume.Key(), high}
	t.mu.RLock()
	i, ok := t.indexes[key]
	t.mu.RUnlock()
	if !ok {
		t.mu.Lock()
		if i, ok = t.indexes[key]; !ok {
			i = uint64(len(t.prefixes))
			t.prefixes = append(t.prefixes, prefix{g.Volume, high})
			t.indexes[key] = i
		}
		t.mu.Unlock()
	}
	return ofGuest | i<<32 | uint64(uint32(g.Ino))
}

// add gives the number of a node that the kernel is about to be told of.
func (t *nodes) add(n fs.Node, a fs.Attr) uint64 {
	if g := fs.GuestIDOf(n); !g.IsZero() {
		return t.guest(g)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	id, ok := t.numbers[a.Inode]
	if !ok {
		t.last++
		id = t.last
		t.numbers[a.Inode] = id
		t.known[id] = &knownNode{node: n, inode: a.Inode, immutable: a.Immutable}
	}
	t.known[id].lookups++
	return id
}

// forget takes back that the kernel was told n times of a node.
func (t *nodes) forget(id, n uint64) {
	if id&ofGuest != 0 {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	k := t.known[id]
	if k == nil {
		return
	}
	if k.lookups -= min(n, k.lookups); k.lookups == 0 && id != fuse.FUSE_ROOT_ID {
		delete(t.known, id)
		delete(t.numbers, k.inode)
	}
}

// get gives a node; of a guest's, which is the zero GuestID otherwise, only that it is one.
func (t *nodes) get(id uint64) (fs.Node, fs.GuestID) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if i := id &^ ofGuest >> 32; id&ofGuest != 0 && i < uint64(len(t.prefixes)) {
		p := t.prefixes[i]
		return nil, guestID(p, id)
	}
	if k := t.known[id]; k != nil {
		return k.node, fs.GuestID{}
	}
	return nil, fs.GuestID{}
}

func guestID(p prefix, id uint64) fs.GuestID {
	return fs.GuestID{Volume: p.volume, Ino: guest.Ino(p.high | uint64(uint32(id)))}
}

// immutable reports whether a node is known never to change.
func (t *nodes) immutable(id uint64) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	k := t.known[id]
	return id&ofGuest != 0 || k != nil && k.immutable
}

// node gives a node as what can tell its attributes.
func (t *nodes) node(id uint64) fs.Node {
	n, g := t.get(id)
	if !g.IsZero() {
		return g.Node()
	}
	return n
}

// as gives a node as what the kernel takes it for; nil when it is none.
func as[N fs.Node](t *nodes, id uint64, ofGuest func(fs.GuestID) N) N {
	n, g := t.get(id)
	if !g.IsZero() {
		return ofGuest(g)
	}
	x, _ := n.(N)
	return x
}

func (t *nodes) dir(id uint64) fs.Dir {
	return as(t, id, func(g fs.GuestID) fs.Dir { return g.Dir() })
}

func (t *nodes) file(id uint64) fs.File { return as(t, id, fs.GuestID.File) }
func (t *nodes) link(id uint64) fs.Link { return as(t, id, fs.GuestID.Link) }

// ctx is that of all requests. That the caller got a signal meanwhile is left out: programs that have timers or signals of their own,
// QEMU for one, do not expect EINTR from a file system and give up; all that is done is short.
var ctx = context.Background()
