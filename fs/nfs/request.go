package nfs

import (
	"context"
	"fmt"
	"net/netip"
	"runtime/debug"
)

// A program is one of RPC, and its one version.
type program struct {
	id, version uint32
	procs       []procedure
}

// A procedure decodes its arguments, does its work and encodes its results. It is called after the start of the reply was encoded.
type procedure struct {
	name  string
	serve func(*request)
	once  bool // to do it again would do harm, or give another answer
}

// A request is one call, from its record to its reply.
type request struct {
	call
	srv      *Server
	ctx      context.Context
	conn     *conn // nil over UDP
	addr     netip.Addr
	programs []*program // that are served where it came in
	udp      bool

	held int64   // bytes of the gate
	rec  *buffer // the call
	args decoder // in rec

	// The reply: w, and the data that are in out after headroom.
	how     acceptStat
	silent  bool // there is none
	w       encoder
	out     *buffer
	dataLen int
	msg     []byte // the reply as it is sent

	e       *export // in use by it; nil for none
	who     who     // calls, for that export
	watches [2]watch
}

// keepReply is the largest memory of small replies that is kept for the next request, bytes.
const keepReply = 8 << 10

// mark is what stands before a record, RFC 5531 §11.
const (
	markLen      = 4
	lastFragment = 1 << 31
)

// free gives back the memory of r but r itself, which is empty then.
func (r *request) free() {
	r.rec.free()
	r.out.free()
	b := r.w.b[:0]
	if cap(b) > keepReply {
		b = nil
	}
	*r = request{w: encoder{b}}
}

// run answers the call in r.args, whose start has been parsed.
func (r *request) run() {
	defer func() {
		v := recover()
		r.release()
		if v != nil {
			r.srv.log(fmt.Errorf("nfs: %v: %s: panic: %v\n%s", r.addr, r.procName(), v, debug.Stack()))
			r.fail(acceptSystemErr)
		}
		r.seal()
	}()
	r.w.b = append(r.w.b[:0], 0, 0, 0, 0) // the mark
	p := r.procedure()
	switch {
	case p == nil:
	case p.once:
		r.runOnce(p)
	default:
		r.runNow(p)
	}
}

// procedure finds what is called. When it is nil, the refusal is the reply.
func (r *request) procedure() *procedure {
	switch {
	case r.rpcVers != rpcVersion && !r.short:
		r.w.rpcMismatch(r.xid)
		return nil
	case r.auth != authOK:
		r.w.authError(r.xid, r.auth)
		return nil
	case r.short:
		r.w.accepted(r.xid, acceptGarbageArgs)
		return nil
	}
	p := r.program()
	switch {
	case p == nil:
		r.w.accepted(r.xid, acceptProgUnavail)
	case p.version != r.vers:
		r.w.progMismatch(r.xid, p.version, p.version)
	case uint64(r.proc) >= uint64(len(p.procs)):
		r.w.accepted(r.xid, acceptProcUnavail)
	default:
		return &p.procs[r.proc]
	}
	return nil
}

// program is the one that is called, of any version; nil when it is not served.
func (r *request) program() *program {
	for _, p := range r.programs {
		if p.id == r.prog {
			return p
		}
	}
	return nil
}

func (r *request) procName() string {
	p := r.program()
	if p == nil || uint64(r.proc) >= uint64(len(p.procs)) {
		return "?"
	}
	return p.procs[r.proc].name
}

func (r *request) runNow(p *procedure) {
	r.w.accepted(r.xid, acceptSuccess)
	p.serve(r)
	if r.how != acceptSuccess {
		r.fail(r.how)
	}
}

// garbage is to be asked when all arguments have been decoded.
func (r *request) garbage() bool {
	if r.args.bad {
		r.how = acceptGarbageArgs
	}
	return r.args.bad
}

// fail makes the reply one without results.
func (r *request) fail(how acceptStat) {
	r.out.free()
	r.out, r.dataLen = nil, 0
	r.w.b = append(r.w.b[:0], 0, 0, 0, 0)
	r.w.accepted(r.xid, how)
}

// release lets go of what the request used.
func (r *request) release() {
	if r.e == nil {
		return
	}
	for i := range r.watches {
		if w := &r.watches[i]; w.open {
			r.end(w)
		}
	}
	r.e.leave()
}

// seal makes one piece of the reply.
func (r *request) seal() {
	if r.silent {
		r.msg = nil
		return
	}
	r.msg = r.w.b
	if r.out != nil {
		start := headroom - len(r.w.b)
		copy(r.out.mem[start:], r.w.b)
		r.msg = r.out.mem[start : headroom+r.dataLen]
	}
	be.PutUint32(r.msg, lastFragment|uint32(len(r.msg)-markLen))
}

// replyRoom is the memory that the reply to a call may need beyond a small one, bytes.
func replyRoom(c *call, args []byte) int64 {
	if c.prog != progNFS || c.vers != versNFS {
		return 0
	}
	d := decoder{p: args}
	d.handle()
	switch c.proc {
	case procRead:
		d.u64()
		return bufferSize(readBuffer(d.u32()))
	case procReadDir, procReadDirPlus:
		return bufferSize(headroom + maxDir)
	}
	return 0
}
