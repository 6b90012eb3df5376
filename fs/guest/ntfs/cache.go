package ntfs

import "sync"

// cache keeps what was used last of what was made from the disk, in a bounded number of bytes. Safe for concurrent use; what it gives is
// shared, and must not be changed.
type cache[K comparable, V any] struct {
	limit int64 // bytes of a generation; there are two

	mu    sync.Mutex // guards following
	young map[K]cached[V]
	old   map[K]cached[V]
	used  int64 // bytes of the young
}

type cached[V any] struct {
	value V
	cost  int64 // bytes
}

func newCache[K comparable, V any](limit int64) *cache[K, V] {
	return &cache[K, V]{limit: limit / 2, young: map[K]cached[V]{}}
}

func (c *cache[K, V]) get(key K) (V, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.young[key]
	if !ok {
		if e, ok = c.old[key]; ok {
			delete(c.old, key)
			c.keep(key, e)
		}
	}
	return e.value, ok
}

func (c *cache[K, V]) put(key K, value V, cost int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.keep(key, cached[V]{value, cost})
}

func (c *cache[K, V]) keep(key K, e cached[V]) {
	if c.used += e.cost; c.used > c.limit {
		c.old, c.young, c.used = c.young, map[K]cached[V]{}, e.cost
	}
	c.young[key] = e
}
