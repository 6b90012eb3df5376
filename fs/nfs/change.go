package nfs

import "sync"

// changes counts what changes the files of an export, so that a client hears
// the attributes before its own change only if nobody else's fell into the same
// time (RFC 1813 §2.5, wcc_data). It knows nothing of changes that did not come
// through the server.
type changes struct {
	mu sync.Mutex
	// guards following
	files map[ID]change // of those that are watched
}

type change struct {
	open  int    // watches
	now   int    // changes at work
	began uint64 // changes since there was no watch
}

// begin starts to watch a file, for a change or only to see those of others.
// It says whether a change is at work already; its number is for end.
func (c *changes) begin(id ID, isChange bool) (alone bool, number uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	ch := c.files[id]
	alone = ch.now == 0
	ch.open++
	if isChange {
		ch.now++
		ch.began++
	}
	c.files[id] = ch
	return alone, ch.began
}

// end stops to watch, and says whether no change began after begin.
func (c *changes) end(id ID, isChange bool, number uint64) (last bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	ch := c.files[id]
	last = ch.began == number
	ch.open--
	if isChange {
		ch.now--
	}
	if ch.open == 0 {
		delete(c.files, id)
	} else {
		c.files[id] = ch
	}
	return last
}

// A watch is a file that a request changes.
type watch struct {
	id      ID
	before  known
	changes bool // else it only looks whether others do
	alone   bool
	number  uint64
	open    bool // begun and not ended
}

// change opens a file that is to be changed. The watch is to be given to wcc, whatever the status.
func (r *request) change(fh []byte) (*watch, status) {
	w := &r.watches[0]
	id, st := r.open(fh)
	if st != statOK {
		return w, st
	}
	w.changes = true
	return w, r.begin(w, id)
}

// changeToo opens a second file that is to be changed.
func (r *request) changeToo(fh []byte) (*watch, status) {
	w := &r.watches[1]
	id, st := r.openToo(fh)
	if st != statOK {
		return w, st
	}
	w.changes = true
	return w, r.begin(w, id)
}

// watch opens a file of which the attributes before are to be told, though the request does not change them.
func (r *request) watch(fh []byte) (*watch, status) {
	w := &r.watches[0]
	id, st := r.open(fh)
	if st != statOK {
		return w, st
	}
	return w, r.begin(w, id)
}

func (r *request) begin(w *watch, id ID) status {
	w.id, w.open = id, true
	w.alone, w.number = r.e.changes.begin(id, w.changes)
	var err error
	if w.before.Attr, err = r.e.FS.Attr(r.ctx, id); err != nil {
		return r.status(err)
	}
	w.before.ok = true
	if r.e.writable == nil {
		return statROFS
	}
	return statOK
}

// wcc encodes wcc_data of a file that has been changed, or not.
func (r *request) wcc(w *watch) {
	if !w.open {
		r.w.u32(0)
		r.w.u32(0)
		return
	}
	after, err := r.e.FS.Attr(r.ctx, w.id)
	mine := r.end(w)
	r.w.boolean(mine)
	if mine {
		r.w.u64(uint64(w.before.Size))
		r.w.time(w.before.Modified)
		r.w.time(w.before.Changed)
	}
	r.postAttr(w.id, &known{after, err == nil})
}

// end stops watching, and says whether no change of others fell into the time of the request.
func (r *request) end(w *watch) bool {
	w.open = false
	last := r.e.changes.end(w.id, w.changes, w.number)
	return last && w.alone && w.before.ok
}
