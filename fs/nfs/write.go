package nfs

import (
	"crypto/rand"
	"fmt"
	"math"
)

// stable_how of RFC 1813 §3.3.7.
const (
	unstable = 0
	dataSync = 1
	fileSync = 2
)

// newVerifier is a write verifier that none was before.
func newVerifier() uint64 {
	var p [8]byte
	rand.Read(p[:])
	return be.Uint64(p[:])
}

func (r *request) write() {
	fh, off, count, stable := r.args.handle(), r.args.u64(), r.args.u32(), r.args.u32()
	p := r.args.opaque(maxRecord)
	if r.garbage() || stable > fileSync {
		r.how = acceptGarbageArgs
		return
	}
	w, st := r.change(fh)
	var verf uint64
	if st == statOK {
		// From before the write: one that is lost afterwards changes it.
		verf = r.e.verifier.Load()
		st = r.writeData(w, off, count, stable, p)
	}
	r.w.status(st)
	r.wcc(w)
	if st == statOK {
		r.w.u32(uint32(len(p)))
		r.w.u32(stable)
		r.w.u64(verf)
		r.e.bytesWritten.Add(uint64(len(p)))
	}
}

func (r *request) writeData(w *watch, off uint64, count, stable uint32, p []byte) status {
	if st := fileStatus(&w.before.Attr); st != statOK {
		return st
	}
	switch {
	case uint64(count) != uint64(len(p)):
		return statInval
	case !r.who.mayWrite(&w.before.Attr):
		return statAccess
	case off > math.MaxInt64-uint64(len(p)):
		return statFBig
	}
	if len(p) > 0 {
		n, err := r.e.writable.WriteAt(r.ctx, w.id, p, int64(off))
		if err != nil {
			return r.status(err)
		}
		if n != len(p) {
			return r.status(fmt.Errorf("%d of %d bytes written without an error", n, len(p)))
		}
	}
	if stable == unstable {
		return statOK
	}
	return r.sync(w.id)
}

// sync makes durable what was written. After an error nobody knows what became
// of other clients' data: the new verifier makes them send it again.
func (r *request) sync(id ID) status {
	e := r.e
	err := e.syncs.do(id, func() error {
		err := e.writable.Sync(r.ctx, id)
		if err != nil {
			e.verifier.Store(newVerifier())
		}
		return err
	})
	return r.status(err)
}

func (r *request) commit() {
	fh := r.args.handle()
	r.args.u64() // offset and count: it is all made durable
	r.args.u32()
	if r.garbage() {
		return
	}
	w, st := r.watch(fh)
	if st == statOK {
		st = r.commitFile(w)
	}
	r.w.status(st)
	r.wcc(w)
	if st == statOK {
		// From after the sync: what was lost before it changed the verifier.
		r.w.u64(r.e.verifier.Load())
	}
}

func (r *request) commitFile(w *watch) status {
	if st := fileStatus(&w.before.Attr); st != statOK {
		return st
	}
	if !r.who.mayWrite(&w.before.Attr) {
		return statAccess
	}
	return r.sync(w.id)
}

func (r *request) setattr() {
	fh, s := r.args.handle(), r.args.sattr(r.srv.now)
	guarded := r.args.boolean()
	var changed encoder
	if guarded {
		changed.time(r.args.time())
	}
	if r.garbage() {
		return
	}
	w, st := r.change(fh)
	if st == statOK && guarded {
		// One at a time: between the look and the change nobody else's may come.
		r.e.guard.Lock()
		defer r.e.guard.Unlock()
		st = r.checkGuard(w, changed.b)
	}
	if st == statOK {
		st = r.maySet(&w.before.Attr, &s)
	}
	if st == statOK && s.Change != (Change{}) {
		st = r.status(r.e.writable.SetAttr(r.ctx, w.id, s.Change))
	}
	r.w.status(st)
	r.wcc(w)
}

func (r *request) checkGuard(w *watch, want []byte) status {
	a, err := r.e.FS.Attr(r.ctx, w.id)
	if err != nil {
		return r.status(err)
	}
	var is encoder
	is.time(a.Changed)
	if string(is.b) != string(want) {
		return statNotSync
	}
	return statOK
}

// maySet says whether the caller may change the attributes of a file so.
func (r *request) maySet(a *Attr, s *sattr) status {
	who := &r.who
	if s.Size != nil {
		if st := fileStatus(a); st != statOK {
			return st
		}
		if !who.mayWrite(a) {
			return statAccess
		}
	}
	if who.root() {
		return statOK
	}
	owner := who.uid == a.UID
	switch {
	case s.Mode != nil && !owner,
		s.UID != nil && (!owner || *s.UID != a.UID), // chown_restricted of PATHCONF
		s.GID != nil && *s.GID != a.GID && !(owner && who.in(*s.GID)),
		s.clientTimes && !owner:
		return statPerm
	case (s.Accessed != nil || s.Modified != nil) && !owner && !who.may(a, permWrite):
		return statAccess
	}
	return statOK
}
