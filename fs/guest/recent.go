package guest

import "sync"

// Recent keeps what was used last of what was made from a disk, in a bounded number of bytes. Safe for concurrent use; what it gives
// is shared, and must not be changed.
type Recent[K comparable, V any] struct {
	limit int64 // bytes of a generation; there are two

	mu    sync.Mutex // guards following
	young map[K]costly[V]
	old   map[K]costly[V]
	used  int64 // bytes of the young
}

type costly[V any] struct {
	value V
	cost  int64 // bytes
}

// NewRecent makes one of at most limit bytes, or of one value when that is larger.
func NewRecent[K comparable, V any](limit int64) *Recent[K, V] {
	return &Recent[K, V]{limit: limit / 2, young: map[K]costly[V]{}}
}

// Get finds what was put for a key, if it is still there.
func (r *Recent[K, V]) Get(key K) (V, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c, ok := r.young[key]
	if !ok {
		if c, ok = r.old[key]; ok {
			delete(r.old, key)
			r.keep(key, c)
		}
	}
	return c.value, ok
}

// Put keeps a value that takes cost bytes.
func (r *Recent[K, V]) Put(key K, value V, cost int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.keep(key, costly[V]{value, cost})
}

func (r *Recent[K, V]) keep(key K, c costly[V]) {
	if r.used += c.cost; r.used > r.limit {
		r.old, r.young, r.used = r.young, map[K]costly[V]{}, c.cost
	}
	r.young[key] = c
}
