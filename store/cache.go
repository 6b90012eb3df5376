package store

import (
	"container/list"
	"sync"
)

const cacheShards = 16

// chunkCache keeps decoded frames of chunks, least recently used out first, in a
// bounded number of bytes. A frame that many readers want at once is decoded once.
// Memory of evicted frames is used again.
type chunkCache struct {
	shards [cacheShards]chunkShard
	free   sync.Pool // *[]byte of frameLen
}

// frameKey names a frame: bytes [n·frameLen, (n+1)·frameLen) of a chunk.
type frameKey struct {
	id ID
	n  uint8 // a chunk has at most 64
}

type chunkShard struct {
	mu      sync.Mutex // guards following
	entries map[frameKey]*cachedChunk
	lru     list.List // of *cachedChunk, the newest in front
	limit   int       // entries
}

// cachedChunk is one frame, or its being loaded.
type cachedChunk struct {
	key   frameKey
	ready chan struct{} // closed when data or err is set
	data  *[]byte
	err   error
	refs  int // readers and the cache itself; under the shard's mutex
	elem  *list.Element
}

func newChunkCache(limit int64) *chunkCache {
	c := &chunkCache{}
	c.free.New = func() any { b := make([]byte, frameLen); return &b }
	for i := range c.shards {
		c.shards[i].entries = map[frameKey]*cachedChunk{}
		c.shards[i].limit = max(1, int(limit/frameLen/cacheShards))
	}
	return c
}

func (c *chunkCache) shard(k frameKey) *chunkShard {
	return &c.shards[(k.id[31]+k.n)%cacheShards]
}

// get gives a frame, loading it with load when nobody has. The caller releases it.
// Failures are not kept.
func (c *chunkCache) get(k frameKey, load func(dst []byte) error) (*cachedChunk, error) {
	s := c.shard(k)
	s.mu.Lock()
	if e := s.entries[k]; e != nil {
		return c.wait(s, e)
	}
	e := &cachedChunk{key: k, ready: make(chan struct{}), data: c.free.Get().(*[]byte), refs: 2}
	s.entries[k] = e
	e.elem = s.lru.PushFront(e)
	for s.lru.Len() > s.limit {
		c.drop(s, s.lru.Back().Value.(*cachedChunk))
	}
	s.mu.Unlock()
	e.err = load(*e.data)
	close(e.ready)
	if e.err == nil {
		return e, nil
	}
	s.mu.Lock()
	if s.entries[k] == e {
		c.drop(s, e)
	}
	s.mu.Unlock()
	err := e.err
	c.release(e)
	return nil, err
}

// peek gives a frame, which the caller releases, if somebody has loaded or is loading it; nil otherwise.
func (c *chunkCache) peek(k frameKey) *cachedChunk {
	s := c.shard(k)
	s.mu.Lock()
	e := s.entries[k]
	if e == nil {
		s.mu.Unlock()
		return nil
	}
	e, _ = c.wait(s, e)
	return e
}

// wait gives a frame of s when it is there. The caller holds s.mu, which it gives up.
func (c *chunkCache) wait(s *chunkShard, e *cachedChunk) (*cachedChunk, error) {
	s.lru.MoveToFront(e.elem)
	e.refs++
	s.mu.Unlock()
	<-e.ready
	if e.err != nil {
		err := e.err
		c.release(e)
		return nil, err
	}
	return e, nil
}

// fill puts a frame that somebody has decoded into the cache, unless it is there.
func (c *chunkCache) fill(k frameKey, frame []byte) {
	s := c.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.entries[k] != nil {
		return
	}
	e := &cachedChunk{key: k, ready: make(chan struct{}), data: c.free.Get().(*[]byte), refs: 1}
	copy(*e.data, frame)
	close(e.ready)
	s.entries[k] = e
	e.elem = s.lru.PushFront(e)
	for s.lru.Len() > s.limit {
		c.drop(s, s.lru.Back().Value.(*cachedChunk))
	}
}

// drop takes an entry out of the cache. Callers hold s.mu.
func (c *chunkCache) drop(s *chunkShard, e *cachedChunk) {
	delete(s.entries, e.key)
	s.lru.Remove(e.elem)
	c.unref(e)
}

// unref gives memory back when nobody uses it. Callers hold the shard's mutex.
func (c *chunkCache) unref(e *cachedChunk) {
	if e.refs--; e.refs == 0 {
		c.free.Put(e.data)
		e.data = nil
	}
}

func (c *chunkCache) release(e *cachedChunk) {
	s := c.shard(e.key)
	s.mu.Lock()
	defer s.mu.Unlock()
	c.unref(e)
}

// leaf is a decoded page and, at level 0, where its chunks are stored.
type leaf struct {
	page

	mu       sync.Mutex // guards following
	locs     []Loc      // of a level-0 page, filled on demand
	resolved bool       // all of locs
}

// leafCost is the memory of a leaf in the cache, bytes.
const leafCost = PageEntries*(32+20) + 128

// pageCache keeps decoded pages in a bounded number of bytes.
type pageCache struct {
	mu      sync.Mutex // guards following
	entries map[ID]*list.Element
	lru     list.List // of pageEntry, the newest in front
	limit   int       // entries
}

type pageEntry struct {
	id   ID
	leaf *leaf
}

func newPageCache(limit int64) *pageCache {
	return &pageCache{entries: map[ID]*list.Element{}, limit: max(16, int(limit/leafCost))}
}

func (c *pageCache) get(id ID) *leaf {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[id]
	if e == nil {
		return nil
	}
	c.lru.MoveToFront(e)
	return e.Value.(pageEntry).leaf
}

func (c *pageCache) put(id ID, l *leaf) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.entries[id] != nil {
		return
	}
	c.entries[id] = c.lru.PushFront(pageEntry{id, l})
	for c.lru.Len() > c.limit {
		back := c.lru.Back()
		delete(c.entries, back.Value.(pageEntry).id)
		c.lru.Remove(back)
	}
}
