package nfs

// A file handle is made of what it names alone, so it outlives the server
// (RFC 1813 §3.3.1 to 3.3.3 call it opaque; at most 64 bytes, §2.4):
//
//	| version 1 | id of the export 8 | ID.File 8 | ID.Generation 8 |   big-endian
const (
	handleLen     = 1 + 3*8
	handleVersion = 1
	maxHandle     = 64 // NFS3_FHSIZE
)

// A handle names a file of an export.
type handle struct {
	export uint64
	id     ID
}

// parseHandle is false for what this server never gave out.
func parseHandle(p []byte) (handle, bool) {
	if len(p) != handleLen || p[0] != handleVersion {
		return handle{}, false
	}
	return handle{be.Uint64(p[1:]), ID{be.Uint64(p[9:]), be.Uint64(p[17:])}}, true
}

func (w *encoder) handle(h handle) {
	w.u32(handleLen)
	w.b = append(w.b, handleVersion)
	w.u64(h.export)
	w.u64(h.id.File)
	w.u64(h.id.Generation)
	w.b = append(w.b, padding[:padLen(handleLen)]...)
}

// handle gives a file handle as it came.
func (d *decoder) handle() []byte { return d.opaque(maxHandle) }

// open finds what a handle names, and keeps its export until the request is over.
func (r *request) open(fh []byte) (ID, status) {
	h, ok := parseHandle(fh)
	if !ok {
		return ID{}, statBadHandle
	}
	x := r.srv.exports.Load()
	e := x.byID[h.export]
	if e == nil {
		return ID{}, x.missing(h.export)
	}
	if !e.enter() {
		return ID{}, statStale
	}
	r.e = e
	if !e.allows(r.addr) {
		return ID{}, statAccess
	}
	e.ops[r.proc].Add(1)
	if r.conn != nil {
		r.conn.uses(e)
	}
	r.who = e.identify(&r.cred)
	return h.id, statOK
}

// openToo finds what a second handle names, in the same export as the first.
func (r *request) openToo(fh []byte) (ID, status) {
	h, ok := parseHandle(fh)
	switch {
	case !ok:
		return ID{}, statBadHandle
	case h.export == r.e.ID:
		return h.id, statOK
	case r.srv.exports.Load().byID[h.export] == nil:
		return ID{}, statStale
	}
	return ID{}, statXDev
}
