package folder

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/nfs"
)

// cache keeps files and directories open, those used last.
type cache struct {
	limit int

	mu      sync.Mutex // guards following
	handles map[nfs.ID]*handle
	newest  *handle // of those that nobody uses
	oldest  *handle
	lost    map[nfs.ID]error // of files that could not be synced when they were closed
}

// handle is an open file or directory. A user of it calls release.
type handle struct {
	id       nfs.ID
	fd       int
	dir      bool
	writable bool
	dirty    atomic.Bool // written to since it was synced

	// Guarded by the cache's mu.
	refs         int
	gone         bool // from the cache
	newer, older *handle
}

// get gives the handle of what is open already, or nil.
func (c *cache) get(id nfs.ID) *handle {
	c.mu.Lock()
	defer c.mu.Unlock()
	h := c.handles[id]
	if h != nil {
		c.use(h)
	}
	return h
}

// use counts a user. c.mu is held.
func (c *cache) use(h *handle) {
	if h.refs == 0 {
		c.unlink(h)
	}
	h.refs++
}

// add puts a handle there for its first user; the result is the one that is there already, if any.
func (c *cache) add(h *handle) *handle {
	c.mu.Lock()
	if was := c.handles[h.id]; was != nil {
		c.use(was)
		c.mu.Unlock()
		unix.Close(h.fd)
		return was
	}
	h.refs = 1
	c.handles[h.id] = h
	old := c.surplus()
	c.mu.Unlock()
	c.evict(old)
	return h
}

// release ends a use of h.
func (c *cache) release(h *handle) {
	c.mu.Lock()
	h.refs--
	if h.refs > 0 {
		c.mu.Unlock()
		return
	}
	if h.gone {
		c.mu.Unlock()
		unix.Close(h.fd)
		return
	}
	h.older = c.newest
	if c.newest != nil {
		c.newest.newer = h
	} else {
		c.oldest = h
	}
	c.newest = h
	old := c.surplus()
	c.mu.Unlock()
	c.evict(old)
}

// unlink takes h from the list of those that nobody uses. c.mu is held.
func (c *cache) unlink(h *handle) {
	if h.newer != nil {
		h.newer.older = h.older
	} else {
		c.newest = h.older
	}
	if h.older != nil {
		h.older.newer = h.newer
	} else {
		c.oldest = h.newer
	}
	h.newer, h.older = nil, nil
}

// surplus takes a handle away if there are too many, the one unused for the longest time. One came, so one goes. c.mu is held.
func (c *cache) surplus() *handle {
	h := c.oldest
	if len(c.handles) <= c.limit || h == nil {
		return nil
	}
	c.unlink(h)
	delete(c.handles, h.id)
	h.gone = true
	return h
}

// evict closes what surplus took away, synced: who opens it again may not hear of an error of the write-back before (fsync(2), Linux reports it to
// those who had the file open).
func (c *cache) evict(h *handle) {
	if h == nil {
		return
	}
	if h.dirty.Load() {
		if err := fdatasync(h.fd); err != nil {
			c.mu.Lock()
			c.lost[h.id] = err
			c.mu.Unlock()
		}
	}
	unix.Close(h.fd)
}

// lostOf gives the error of a sync of the file that nobody was told of yet.
func (c *cache) lostOf(id nfs.ID) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	err := c.lost[id]
	delete(c.lost, id)
	return err
}

// drop forgets a file that is not there any more.
func (c *cache) drop(id nfs.ID) {
	c.mu.Lock()
	delete(c.lost, id)
	h := c.handles[id]
	if h == nil {
		c.mu.Unlock()
		return
	}
	delete(c.handles, id)
	h.gone = true
	unused := h.refs == 0
	if unused {
		c.unlink(h)
	}
	c.mu.Unlock()
	if unused {
		unix.Close(h.fd)
	}
}

// close syncs and closes all. Nobody uses any.
func (c *cache) close() (err error) {
	for id, h := range c.handles {
		delete(c.handles, id)
		c.evict(h)
	}
	c.newest, c.oldest = nil, nil
	for _, err = range c.lost {
		return err
	}
	return nil
}
