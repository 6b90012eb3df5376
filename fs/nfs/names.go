package nfs

import (
	"context"
	"errors"
	"syscall"
)

// createmode3 of RFC 1813 §3.3.8.
const (
	createUnchecked = 0
	createGuarded   = 1
	createExclusive = 2
)

const (
	modeSetGID = 0o2000
	modeSticky = 0o1000
)

// mayEdit says whether the caller may add and remove names of a directory.
func (r *request) mayEdit(dir *Attr) status {
	switch {
	case dir.Kind != KindDir:
		return statNotDir
	case !r.who.may(dir, permWrite|permExecute):
		return statAccess
	}
	return statOK
}

// mayAdd says whether the caller may make a file of that name.
func (r *request) mayAdd(dir *watch, name []byte) status {
	if st := r.mayEdit(&dir.before.Attr); st != statOK {
		return st
	}
	if dotted(name) {
		return statExist
	}
	return checkName(name)
}

// mayTake says whether the caller may remove a name: in a directory with the
// sticky bit, that is for the owner of the file or the directory.
func (r *request) mayTake(dir *watch, name string) status {
	a := &dir.before.Attr
	if a.Mode&modeSticky == 0 || r.who.root() || r.who.uid == a.UID {
		return statOK
	}
	id, err := r.e.FS.Lookup(r.ctx, dir.id, name)
	if err != nil {
		return r.status(err)
	}
	file, err := r.e.FS.Attr(r.ctx, id)
	if err == nil && file.UID != r.who.uid {
		return statPerm
	}
	return r.status(err)
}

func dotted(name []byte) bool { return string(name) == "." || string(name) == ".." }

// own makes a new file the caller's, if he does not ask for something else that he may.
func (r *request) own(dir *Attr, s *sattr) status {
	who := &r.who
	switch {
	case s.UID == nil:
		s.UID = &who.uid
	case *s.UID != who.uid && !who.root():
		return statPerm
	}
	switch {
	case s.GID == nil && dir.Mode&modeSetGID != 0:
		s.GID = &dir.GID
	case s.GID == nil:
		s.GID = &who.gid
	case !who.in(*s.GID) && !who.root():
		return statPerm
	}
	return statOK
}

// made encodes the results of CREATE and MKDIR.
func (r *request) made(dir *watch, id ID, st status) {
	r.w.status(st)
	if st == statOK {
		r.w.boolean(true)
		r.w.handle(handle{r.e.ID, id})
		r.lookAttr(id)
	}
	r.wcc(dir)
}

func (r *request) create() {
	fh, name, mode := r.args.handle(), r.args.name(), r.args.u32()
	how := Creation{Guarded: mode == createGuarded}
	var s sattr
	switch mode {
	case createUnchecked, createGuarded:
		s = r.args.sattr(r.srv.now)
	case createExclusive:
		how.Exclusive = new([8]byte)
		copy(how.Exclusive[:], r.args.fixed(8))
	default:
		r.args.bad = true
	}
	if r.garbage() {
		return
	}
	dir, st := r.change(fh)
	var id ID
	if st == statOK {
		st = r.mayAdd(dir, name)
	}
	if st == statOK {
		id, st = r.createFile(dir, string(name), how, &s)
	}
	r.made(dir, id, st)
}

func (r *request) createFile(dir *watch, name string, how Creation, s *sattr) (ID, status) {
	fs := r.e.writable
	there, err := fs.Lookup(r.ctx, dir.id, name)
	fresh := errors.Is(err, syscall.ENOENT)
	if err != nil && !fresh {
		return ID{}, r.status(err)
	}
	if !fresh && !how.Guarded && how.Exclusive == nil {
		return r.openThere(there, s)
	}
	if st := r.own(&dir.before.Attr, s); st != statOK {
		return ID{}, st
	}
	if how.Set = s.Change; how.Exclusive != nil { // the client sets the rest, and has to be who may
		how.Set = Change{UID: s.UID, GID: s.GID}
	}
	id, err := fs.Create(r.ctx, dir.id, name, how)
	return id, r.status(err)
}

// openThere is for an unchecked creation of a file that is there: its size alone is set (RFC 1813 §3.3.8).
func (r *request) openThere(id ID, s *sattr) (ID, status) {
	file := &r.watches[1]
	file.changes = s.Size != nil
	if st := r.begin(file, id); st != statOK {
		return id, st
	}
	if file.before.Kind != KindFile {
		return id, statExist
	}
	if s.Size == nil {
		return id, statOK
	}
	if !r.who.mayWrite(&file.before.Attr) {
		return id, statAccess
	}
	return id, r.status(r.e.writable.SetAttr(r.ctx, id, Change{Size: s.Size}))
}

func (r *request) mkdir() {
	fh, name := r.args.handle(), r.args.name()
	s := r.args.sattr(r.srv.now)
	if r.garbage() {
		return
	}
	dir, st := r.change(fh)
	if st == statOK {
		st = r.mayAdd(dir, name)
	}
	if st == statOK {
		st = r.own(&dir.before.Attr, &s)
	}
	var id ID
	if st == statOK {
		var err error
		s.Size = nil
		id, err = r.e.writable.Mkdir(r.ctx, dir.id, string(name), s.Change)
		st = r.status(err)
	}
	r.made(dir, id, st)
}

func (r *request) remove() {
	fh, name := r.args.handle(), r.args.name()
	if r.garbage() {
		return
	}
	dir, st := r.change(fh)
	if st == statOK && dotted(name) {
		st = statInval
	}
	if st == statOK {
		st = r.takeName(dir, name, WritableFS.Remove)
	}
	r.w.status(st)
	r.wcc(dir)
}

func (r *request) rmdir() {
	fh, name := r.args.handle(), r.args.name()
	if r.garbage() {
		return
	}
	dir, st := r.change(fh)
	switch {
	case st != statOK:
	case string(name) == ".": // RFC 1813 §3.3.13
		st = statInval
	case string(name) == "..":
		st = statExist
	default:
		st = r.takeName(dir, name, WritableFS.Rmdir)
	}
	r.w.status(st)
	r.wcc(dir)
}

func (r *request) takeName(dir *watch, name []byte, take func(WritableFS, context.Context, ID, string) error) status {
	if st := r.mayEdit(&dir.before.Attr); st != statOK {
		return st
	}
	if st := checkName(name); st != statOK {
		return st
	}
	if st := r.mayTake(dir, string(name)); st != statOK {
		return st
	}
	return r.status(take(r.e.writable, r.ctx, dir.id, string(name)))
}

func (r *request) rename() {
	fromFH, name := r.args.handle(), r.args.name()
	toFH, as := r.args.handle(), r.args.name()
	if r.garbage() {
		return
	}
	from, st := r.change(fromFH)
	to := from
	if st == statOK && string(fromFH) != string(toFH) {
		to, st = r.changeToo(toFH)
	}
	if st == statOK {
		st = r.renameName(from, name, to, as)
	}
	r.w.status(st)
	start := len(r.w.b)
	r.wcc(from)
	switch {
	case to != from:
		r.wcc(to)
	case string(fromFH) == string(toFH):
		r.w.b = append(r.w.b, r.w.b[start:]...) // the same once more
	default: // the second was not looked at
		r.wcc(&r.watches[1])
	}
}

func (r *request) renameName(from *watch, name []byte, to *watch, as []byte) status {
	for _, dir := range []*watch{from, to} {
		if st := r.mayEdit(&dir.before.Attr); st != statOK {
			return st
		}
	}
	if dotted(name) || dotted(as) {
		return statInval
	}
	for _, n := range [][]byte{name, as} {
		if st := checkName(n); st != statOK {
			return st
		}
	}
	if st := r.mayTake(from, string(name)); st != statOK {
		return st
	}
	if st := r.mayTake(to, string(as)); st != statOK && st != statNoEnt {
		return st
	}
	return r.status(r.e.writable.Rename(r.ctx, from.id, string(name), to.id, string(as)))
}

// There are no links and special files to be made: an image of disks needs none.

func (r *request) symlink() {
	fh, _, _ := r.args.handle(), r.args.name(), r.args.sattr(r.srv.now)
	r.args.name() // the target
	r.refuse(fh)
}

// Of ftype3, RFC 1813 §2.5: what MKNOD has arguments for.
const (
	typeBlock  = 3
	typeChar   = 4
	typeSocket = 6
	typeFIFO   = 7
)

func (r *request) mknod() {
	fh, _ := r.args.handle(), r.args.name()
	switch r.args.u32() {
	case typeBlock, typeChar:
		r.args.sattr(r.srv.now)
		r.args.u64()
	case typeSocket, typeFIFO:
		r.args.sattr(r.srv.now)
	}
	r.refuse(fh)
}

// refuse answers that nothing can be made in a directory so.
func (r *request) refuse(fh []byte) {
	if r.garbage() {
		return
	}
	dir, st := r.change(fh)
	if st == statOK || st == statROFS {
		st = statNotSupp
	}
	r.w.status(st)
	r.wcc(dir)
}

func (r *request) link() {
	fh, dirFH := r.args.handle(), r.args.handle()
	r.args.name()
	if r.garbage() {
		return
	}
	id, a, st := r.look(fh)
	dir := &r.watches[1]
	if st == statOK {
		dir, st = r.changeToo(dirFH)
	}
	if st == statOK || st == statROFS {
		st = statNotSupp
	}
	r.w.status(st)
	r.postAttr(id, &a)
	r.wcc(dir)
}
