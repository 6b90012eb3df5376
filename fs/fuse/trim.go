package fuse

import (
	"sync"

	gofs "github.com/hanwen/go-fuse/v2/fs"
)

// maxKnown is how many files of guests the kernel may remember, each of which takes about 1 KiB here. What it looked at first it is
// told to forget; it does so by itself only when the machine runs out of memory.
const maxKnown = 32 << 10

// trimmer keeps the kernel from remembering too many files.
type trimmer struct {
	mu sync.Mutex
	// guards following
	known []knownFile // a ring, in the order of being looked up
	next  int
	drop  chan knownFile
}

// knownFile is a name that the kernel was told of.
type knownFile struct {
	dir  *gofs.Inode
	name string
}

func newTrimmer() *trimmer {
	drop := make(chan knownFile, 1024)
	t := &trimmer{drop: drop}
	go func() {
		// Not within a request: the kernel may hold what the notice wants.
		for f := range drop {
			f.dir.NotifyEntry(f.name) // of no use any more when it fails
		}
	}()
	return t
}

// saw is told of every name that the kernel is given.
func (t *trimmer) saw(dir *gofs.Inode, name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	f := knownFile{dir, name}
	if len(t.known) < maxKnown {
		t.known = append(t.known, f)
		return
	}
	f, t.known[t.next] = t.known[t.next], f
	t.next = (t.next + 1) % maxKnown
	select {
	case t.drop <- f:
	default: // it lags behind: the kernel remembers one more
	}
}

// end lets the goroutine go, when no more requests come.
func (t *trimmer) end() {
	t.mu.Lock()
	defer t.mu.Unlock()
	close(t.drop)
	t.drop = nil
}
