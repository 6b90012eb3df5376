package overlay

import "sync"

// ranges excludes those who work on the same blocks from each other.
type ranges struct {
	mu   sync.Mutex // guards following
	busy []*busyRange
	free []*busyRange
}

// busyRange is blocks that somebody works on.
type busyRange struct {
	from, to int64
	over     sync.Cond // of ranges.mu
	waiting  int
	done     bool
}

// take waits until nobody works on blocks [from, to), and then is the one.
func (r *ranges) take(from, to int64) *busyRange {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		b := r.overlapping(from, to)
		if b == nil {
			break
		}
		b.waiting++
		for !b.done {
			b.over.Wait()
		}
		if b.waiting--; b.waiting == 0 {
			r.free = append(r.free, b)
		}
	}
	var b *busyRange
	if n := len(r.free); n > 0 {
		b, r.free = r.free[n-1], r.free[:n-1]
	} else {
		b = &busyRange{}
		b.over.L = &r.mu
	}
	b.from, b.to, b.done = from, to, false
	r.busy = append(r.busy, b)
	return b
}

func (r *ranges) overlapping(from, to int64) *busyRange {
	for _, b := range r.busy {
		if from < b.to && b.from < to {
			return b
		}
	}
	return nil
}

// give ends the work.
func (r *ranges) give(b *busyRange) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range r.busy {
		if r.busy[i] == b {
			last := len(r.busy) - 1
			r.busy[i], r.busy = r.busy[last], r.busy[:last]
			break
		}
	}
	b.done = true
	if b.waiting == 0 {
		r.free = append(r.free, b)
		return
	}
	b.over.Broadcast()
}
