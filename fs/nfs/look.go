package nfs

import (
	"errors"
	"io"
	"math"
	"syscall"
)

// Procedures of NFS, RFC 1813 §3.
const (
	procSetAttr     = 2
	procRead        = 6
	procWrite       = 7
	procReadDir     = 16
	procReadDirPlus = 17
)

var nfsProgram = program{id: progNFS, version: versNFS, procs: []procedure{
	{name: "NULL", serve: func(*request) {}},
	{name: "GETATTR", serve: (*request).getattr},
	{name: "SETATTR", serve: (*request).setattr, once: true},
	{name: "LOOKUP", serve: (*request).lookup},
	{name: "ACCESS", serve: (*request).access},
	{name: "READLINK", serve: (*request).readlink},
	{name: "READ", serve: (*request).read},
	{name: "WRITE", serve: (*request).write},
	{name: "CREATE", serve: (*request).create, once: true},
	{name: "MKDIR", serve: (*request).mkdir, once: true},
	{name: "SYMLINK", serve: (*request).symlink},
	{name: "MKNOD", serve: (*request).mknod},
	{name: "REMOVE", serve: (*request).remove, once: true},
	{name: "RMDIR", serve: (*request).rmdir, once: true},
	{name: "RENAME", serve: (*request).rename, once: true},
	{name: "LINK", serve: (*request).link},
	{name: "READDIR", serve: (*request).readdir},
	{name: "READDIRPLUS", serve: (*request).readdirplus},
	{name: "FSSTAT", serve: (*request).fsstat},
	{name: "FSINFO", serve: (*request).fsinfo},
	{name: "PATHCONF", serve: (*request).pathconf},
	{name: "COMMIT", serve: (*request).commit},
}}

func (w *encoder) status(st status) { w.u32(uint32(st)) }

// look opens a file that is not to be changed.
func (r *request) look(fh []byte) (ID, known, status) {
	id, st := r.open(fh)
	if st != statOK {
		return id, known{}, st
	}
	a, err := r.e.FS.Attr(r.ctx, id)
	return id, known{a, err == nil}, r.status(err)
}

func (r *request) getattr() {
	fh := r.args.handle()
	if r.garbage() {
		return
	}
	id, a, st := r.look(fh)
	r.w.status(st)
	if st == statOK {
		r.w.attr(r.e.ID, id, &a.Attr)
	}
}

func (r *request) lookup() {
	fh, name := r.args.handle(), r.args.name()
	if r.garbage() {
		return
	}
	dir, a, st := r.look(fh)
	var id ID
	if st == statOK {
		id, st = r.find(dir, &a.Attr, name)
	}
	r.w.status(st)
	if st == statOK {
		r.w.handle(handle{r.e.ID, id})
		r.lookAttr(id)
	}
	r.postAttr(dir, &a)
}

func (r *request) find(dir ID, a *Attr, name []byte) (ID, status) {
	switch {
	case a.Kind != KindDir:
		return ID{}, statNotDir
	case !r.who.may(a, permExecute):
		return ID{}, statAccess
	case string(name) == ".":
		return dir, statOK
	case string(name) == "..":
		id, err := r.e.FS.Parent(r.ctx, dir)
		return id, r.status(err)
	}
	if st := checkName(name); st != statOK {
		return ID{}, st
	}
	id, err := r.e.FS.Lookup(r.ctx, dir, string(name))
	return id, r.status(err)
}

func (r *request) access() {
	fh, asked := r.args.handle(), r.args.u32()
	if r.garbage() {
		return
	}
	id, a, st := r.look(fh)
	r.w.status(st)
	r.postAttr(id, &a)
	if st == statOK {
		r.w.u32(asked & r.who.accessOf(&a.Attr, r.e.writable != nil))
	}
}

func (r *request) readlink() {
	fh := r.args.handle()
	if r.garbage() {
		return
	}
	id, a, st := r.look(fh)
	var target string
	switch {
	case st != statOK:
	case a.Kind != KindLink:
		st = statInval
	default:
		var err error
		target, err = r.e.FS.Readlink(r.ctx, id)
		st = r.status(err)
	}
	if len(target) > maxDir {
		st = statNameTooLong
	}
	r.w.status(st)
	r.postAttr(id, &a)
	if st == statOK {
		r.w.str(target)
	}
}

// readBuffer is the size of the buffer for a READ of count bytes.
func readBuffer(count uint32) int { return headroom + int(min(count, maxData)) + len(padding) }

// read gives the attributes from before the read: a client that sees data newer
// than its attributes fetches them again, the other way round it would not.
func (r *request) read() {
	fh, off, count := r.args.handle(), r.args.u64(), r.args.u32()
	if r.garbage() {
		return
	}
	id, a, st := r.look(fh)
	n, eof := 0, false
	if st == statOK {
		n, eof, st = r.readData(id, &a.Attr, off, count)
	}
	r.w.status(st)
	r.postAttr(id, &a)
	if st != statOK {
		return
	}
	r.w.u32(uint32(n))
	r.w.boolean(eof)
	r.w.u32(uint32(n))
	if r.out != nil {
		copy(r.out.mem[headroom+n:], padding[:])
		r.dataLen = n + padLen(n)
	}
	r.e.bytesRead.Add(uint64(n))
}

// fileStatus is that of reading or writing something that is perhaps no file.
func fileStatus(a *Attr) status {
	switch a.Kind {
	case KindFile:
		return statOK
	case KindDir:
		return statIsDir
	}
	return statInval
}

// readData reads into r.out, after its headroom.
func (r *request) readData(id ID, a *Attr, off uint64, count uint32) (n int, eof bool, st status) {
	if st := fileStatus(a); st != statOK {
		return 0, false, st
	}
	if !r.who.mayRead(a) {
		return 0, false, statAccess
	}
	if off >= uint64(a.Size) {
		return 0, true, statOK
	}
	left := uint64(a.Size) - off
	want := int(min(uint64(count), maxData, left))
	if want == 0 {
		return 0, false, statOK
	}
	r.out = getBuffer(readBuffer(uint32(want)))
	n, err := r.e.FS.ReadAt(r.ctx, id, r.out.mem[headroom:headroom+want], int64(off))
	switch {
	case n == want:
		return n, uint64(n) == left, statOK
	case errors.Is(err, io.EOF): // it has become shorter
		return n, true, statOK
	case err == nil:
		err = io.ErrUnexpectedEOF
	}
	r.out.free()
	r.out = nil
	return 0, false, r.status(err)
}

func (r *request) fsstat() {
	fh := r.args.handle()
	if r.garbage() {
		return
	}
	id, a, st := r.look(fh)
	var sp Space
	if st == statOK {
		var err error
		sp, err = r.e.FS.Space(r.ctx)
		st = r.status(err)
	}
	r.w.status(st)
	r.postAttr(id, &a)
	if st != statOK {
		return
	}
	for _, v := range [...]int64{sp.Total, sp.Free, sp.Available, sp.Files, sp.FreeFiles, sp.FreeFiles} {
		r.w.u64(uint64(max(v, 0)))
	}
	r.w.u32(0) // invarsec: it may change at any time
}

// Properties of FSINFO, RFC 1813 §3.3.19. There are no hard and symbolic links to be made.
const (
	fsHomogeneous = 0x08
	fsCanSetTime  = 0x10
)

const (
	ioMultiple  = 4096
	maxFileSize = 1 << 60
)

func (r *request) fsinfo() {
	fh := r.args.handle()
	if r.garbage() {
		return
	}
	id, a, st := r.look(fh)
	r.w.status(st)
	r.postAttr(id, &a)
	if st != statOK {
		return
	}
	for _, v := range [...]uint32{maxData, maxData, ioMultiple, maxData, maxData, ioMultiple, maxDir} {
		r.w.u32(v)
	}
	r.w.u64(maxFileSize)
	r.w.u32(0) // time_delta: a nanosecond
	r.w.u32(1)
	r.w.u32(fsHomogeneous | fsCanSetTime)
}

const (
	maxName  = 255
	maxLinks = 32000
)

func (r *request) pathconf() {
	fh := r.args.handle()
	if r.garbage() {
		return
	}
	id, a, st := r.look(fh)
	r.w.status(st)
	r.postAttr(id, &a)
	if st != statOK {
		return
	}
	r.w.u32(maxLinks)
	r.w.u32(maxName)
	r.w.boolean(true)  // no_trunc
	r.w.boolean(true)  // chown_restricted
	r.w.boolean(false) // case_insensitive
	r.w.boolean(true)  // case_preserving
}

// name gives a name as it came.
func (d *decoder) name() []byte { return d.opaque(math.MaxInt32) }

// checkName refuses names that no file can have (RFC 1813 §3.2).
func checkName(name []byte) status {
	if len(name) > maxName {
		return statNameTooLong
	}
	if len(name) == 0 {
		return statAccess
	}
	for _, c := range name {
		if c == 0 || c == '/' {
			return statAccess
		}
	}
	return statOK
}

// invalid is what an FS says of a cookie that it never gave.
func invalid(err error) bool { return errors.Is(err, syscall.EINVAL) }
