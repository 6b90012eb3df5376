package nfs

import (
	"hash/maphash"
	"net/netip"
	"sync"
	"time"
)

// A onceCache keeps the replies to calls that must not be done twice: a client
// that lost its connection before the reply sends the call again, and would hear
// that the file that it made exists already, or that the one it removed does not
// (RFC 1813 §4.5). It is a ring of the last ones.
type onceCache struct {
	mu sync.Mutex
	// guards following
	entries map[onceKey]*onceEntry
	ring    [onceEntries]*onceEntry
	next    int // place in ring
}

const (
	onceEntries = 1024
	onceReply   = 512 // bytes of a reply that is kept; all of them are shorter
	// onceTime is how long a call may be repeated: later, the same number is another call of a client that started anew.
	onceTime = 2 * time.Minute
)

// A onceKey is a call as a client repeats it, perhaps from another port.
type onceKey struct {
	addr      netip.Addr
	xid, proc uint32
	sum       uint64 // of the credential and the arguments
}

type onceEntry struct {
	key   onceKey
	began time.Time
	done  chan struct{} // closed when reply is set
	reply []byte        // with its mark; nil for none
}

var onceSeed = maphash.MakeSeed()

// runOnce runs p, or gives the reply that there was.
func (r *request) runOnce(p *procedure) {
	sum := maphash.Comparable(onceSeed, r.cred) ^ maphash.Bytes(onceSeed, r.args.p)
	key := onceKey{r.addr, r.xid, r.proc, sum}
	e, mine := r.srv.once.begin(key, r.srv.now())
	if !mine {
		<-e.done
		if e.reply != nil {
			r.w.b = append(r.w.b[:0], e.reply...)
			return
		}
	}
	if mine {
		defer close(e.done) // also after a panic
	}
	r.runNow(p)
	if mine && r.out == nil && len(r.w.b) <= onceReply && r.how == acceptSuccess {
		e.reply = append([]byte(nil), r.w.b...)
	}
}

// begin finds a call, or notes it as one that the caller is to run.
func (o *onceCache) begin(key onceKey, now time.Time) (e *onceEntry, mine bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if e := o.entries[key]; e != nil && now.Sub(e.began) < onceTime {
		return e, false
	}
	if old := o.ring[o.next]; old != nil && o.entries[old.key] == old {
		delete(o.entries, old.key)
	}
	e = &onceEntry{key: key, began: now, done: make(chan struct{})}
	o.entries[key] = e
	o.ring[o.next] = e
	o.next = (o.next + 1) % len(o.ring)
	return e, true
}
