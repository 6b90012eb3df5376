package nfs

import (
	"fmt"
	"math"
)

// The cookies of a listing: those of an FS follow those of "." and "..". They
// keep their meaning for good, so the cookie verifier is always zero.
const (
	cookieDot    = 1
	cookieDotDot = 2
	firstCookie  = 2 // is added to those of the FS
)

// A listing is the results of READDIR or READDIRPLUS while they are put together.
type listing struct {
	r    *request
	dir  ID
	plus bool
	more bool // with attributes and handles
	room int  // bytes left of the results
	dirs int  // bytes left of what dircount counts
	any  bool // there is an entry
	w    encoder
}

func (r *request) readdir() {
	fh, cookie, verf, count := r.args.handle(), r.args.u64(), r.args.u64(), r.args.u32()
	if r.garbage() {
		return
	}
	r.list(fh, cookie, verf, &listing{room: clipDir(count), dirs: maxDir})
}

func (r *request) readdirplus() {
	fh, cookie, verf, dirCount, maxCount := r.args.handle(), r.args.u64(), r.args.u64(), r.args.u32(), r.args.u32()
	if r.garbage() {
		return
	}
	r.list(fh, cookie, verf, &listing{room: clipDir(maxCount), dirs: clipDir(dirCount), plus: true})
}

func clipDir(count uint32) int { return int(min(count, maxDir)) }

func (r *request) list(fh []byte, cookie, verf uint64, l *listing) {
	dir, a, st := r.look(fh)
	switch {
	case st != statOK:
	case a.Kind != KindDir:
		st = statNotDir
	case !r.who.may(&a.Attr, permRead):
		st = statAccess
	case verf != 0 && cookie != 0:
		st = statBadCookie
	default:
		l.r, l.dir, l.more = r, dir, r.who.may(&a.Attr, permExecute)
		st = l.fill(cookie)
	}
	if st != statOK {
		r.out.free()
		r.out = nil
	}
	r.w.status(st)
	r.postAttr(dir, &a)
	if st == statOK {
		r.w.u64(0) // the verifier
	}
}

// Sizes of READDIR3resok and READDIRPLUS3resok, bytes.
const (
	emptyList  = (4 + 84) + 8 + 4 + 4                          // attributes, verifier, no entry follows, eof
	entryLen   = 4 + 8 + 4 + 8                                 // an entry follows, fileid, length of the name, cookie
	entryDir   = 8 + 4 + 8                                     // of these, what dircount counts
	entryExtra = (4 + 84) + (4 + 4 + handleLen + -handleLen&3) // of READDIRPLUS
)

// fill puts the entries after the cookie into r.out.
func (l *listing) fill(cookie uint64) status {
	l.room -= emptyList
	if l.room < 0 {
		return statTooSmall
	}
	l.r.out = getBuffer(headroom + maxDir)
	l.w.b = l.r.out.mem[headroom:headroom]
	full, st := l.entries(cookie)
	if st != statOK {
		return st
	}
	if full && !l.any {
		return statTooSmall
	}
	l.w.boolean(false)
	l.w.boolean(!full)
	l.r.dataLen = len(l.w.b)
	return statOK
}

// entries adds the entries until the listing is full.
func (l *listing) entries(cookie uint64) (full bool, st status) {
	if cookie < cookieDot && !l.add(".", l.dir, cookieDot) {
		return true, statOK
	}
	if cookie < cookieDotDot {
		parent, err := l.r.e.FS.Parent(l.r.ctx, l.dir)
		if err != nil {
			return false, l.r.status(err)
		}
		if !l.add("..", parent, cookieDotDot) {
			return true, statOK
		}
	}
	after := max(cookie, firstCookie) - firstCookie
	for entry, err := range l.r.e.FS.ReadDir(l.r.ctx, l.dir, after) {
		switch {
		case err != nil && after != 0 && invalid(err):
			return false, statBadCookie
		case err != nil:
			return false, l.r.status(err)
		case entry.Cookie == 0 || entry.Cookie > math.MaxUint64-firstCookie:
			return false, l.r.status(fmt.Errorf("cookie %#x of %q is out of range", entry.Cookie, entry.Name))
		}
		if !l.add(entry.Name, entry.ID, entry.Cookie+firstCookie) {
			return true, statOK
		}
	}
	return false, statOK
}

// add adds an entry if there is room for it.
func (l *listing) add(name string, id ID, cookie uint64) bool {
	padded := len(name) + padLen(len(name))
	size := entryLen + padded
	if l.plus {
		size += entryExtra
	}
	if size > l.room || entryDir+padded > l.dirs && l.any {
		return false
	}
	l.room -= size
	l.dirs -= entryDir + padded
	l.any = true
	l.w.boolean(true)
	l.w.u64(id.File)
	l.w.str(name)
	l.w.u64(cookie)
	if l.plus {
		l.addPlus(id)
	}
	return true
}

// addPlus adds what READDIRPLUS has more; a file that has gone meanwhile has neither.
func (l *listing) addPlus(id ID) {
	e := l.r.e
	a, err := e.FS.Attr(l.r.ctx, id)
	if err != nil || !l.more {
		l.w.boolean(false)
		l.w.boolean(false)
		return
	}
	l.w.boolean(true)
	l.w.attr(e.ID, id, &a)
	l.w.boolean(true)
	l.w.handle(handle{e.ID, id})
}
