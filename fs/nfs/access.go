package nfs

import "slices"

// Permissions, as in the lowest bits of a mode.
const (
	permRead    = 4
	permWrite   = 2
	permExecute = 1
)

// Bits of ACCESS, RFC 1813 §3.3.4.
const (
	accessRead    = 0x01
	accessLookup  = 0x02
	accessModify  = 0x04
	accessExtend  = 0x08
	accessDelete  = 0x10
	accessExecute = 0x20
)

// nobody is who the unknown and the squashed are when an export does not say.
const nobody = 65534

// who is behind a request, after squashing.
type who struct {
	uid, gid uint32
	groups   []uint32
}

// identify says as whom an export treats a caller.
func (e *export) identify(c *cred) who {
	if !c.known {
		return who{uid: e.AnonUID, gid: e.AnonGID}
	}
	w := who{c.uid, c.gid, c.groups[:c.n]}
	if e.NoRootSquash {
		return w
	}
	if w.uid == 0 {
		w.uid = e.AnonUID
	}
	if w.gid == 0 {
		w.gid = e.AnonGID
	}
	for i, g := range w.groups {
		if g == 0 {
			w.groups[i] = e.AnonGID
		}
	}
	return w
}

func (w *who) root() bool { return w.uid == 0 }

func (w *who) in(group uint32) bool { return w.gid == group || slices.Contains(w.groups, group) }

// may reports whether the mode of a file lets w do all of what.
func (w *who) may(a *Attr, what uint32) bool {
	mode := a.Mode
	switch {
	case w.root():
		return what&permExecute == 0 || a.Kind == KindDir || mode&0o111 != 0
	case w.uid == a.UID:
		mode >>= 6
	case w.in(a.GID):
		mode >>= 3
	}
	return mode&what == what
}

// mayRead is for READ: whoever may execute a file may read it, and its owner may
// always, who had it open before he took the permission away (RFC 1813 §4.4).
func (w *who) mayRead(a *Attr) bool {
	return w.uid == a.UID || w.may(a, permRead) || w.may(a, permExecute)
}

// mayWrite is for WRITE and a new size, as mayRead.
func (w *who) mayWrite(a *Attr) bool { return w.uid == a.UID || w.may(a, permWrite) }

// accessOf gives the bits of ACCESS that w has.
func (w *who) accessOf(a *Attr, writable bool) (bits uint32) {
	dir := a.Kind == KindDir
	if w.may(a, permRead) {
		bits |= accessRead
	}
	if w.may(a, permExecute) && dir {
		bits |= accessLookup
	} else if w.may(a, permExecute) {
		bits |= accessExecute
	}
	if writable && w.may(a, permWrite) {
		bits |= accessModify | accessExtend
		if dir {
			bits |= accessDelete
		}
	}
	return bits
}
