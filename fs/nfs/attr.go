package nfs

import (
	"math"
	"time"
)

// ftypes maps kinds to ftype3 of RFC 1813 §2.5.
var ftypes = [...]uint32{KindFile: 1, KindDir: 2, KindLink: 5}

// attr encodes fattr3 (RFC 1813 §2.5), 84 bytes.
func (w *encoder) attr(export uint64, id ID, a *Attr) {
	w.u32(ftypes[a.Kind])
	w.u32(a.Mode & 0o7777)
	w.u32(a.Links)
	w.u32(a.UID)
	w.u32(a.GID)
	w.u64(uint64(a.Size))
	w.u64(uint64(a.Used))
	w.u64(0) // rdev
	w.u64(export)
	w.u64(id.File)
	w.time(a.Accessed)
	w.time(a.Modified)
	w.time(a.Changed)
}

// time encodes nfstime3, which knows the years 1970 to 2106 only.
func (w *encoder) time(t time.Time) {
	sec := t.Unix()
	switch {
	case sec < 0:
		w.u64(0)
	case sec > math.MaxUint32:
		w.u64(math.MaxUint32<<32 | 999_999_999)
	default:
		w.u32(uint32(sec))
		w.u32(uint32(t.Nanosecond()))
	}
}

// known is attributes, if they could be had.
type known struct {
	Attr
	ok bool
}

// postAttr encodes post_op_attr.
func (r *request) postAttr(id ID, a *known) {
	r.w.boolean(a.ok)
	if a.ok {
		r.w.attr(r.e.ID, id, &a.Attr)
	}
}

// lookAttr encodes post_op_attr of a file to look at.
func (r *request) lookAttr(id ID) {
	var a known
	var err error
	a.Attr, err = r.e.FS.Attr(r.ctx, id)
	a.ok = err == nil
	r.postAttr(id, &a)
}

// Of set_it and time_how, RFC 1813 §2.5.
const (
	dontSetTime = 0
	serverTime  = 1
	clientTime  = 2
)

// A sattr is sattr3: what a client wants to set.
type sattr struct {
	Change
	clientTimes bool // a time is the client's own, not now
}

func (d *decoder) sattr(now func() time.Time) (s sattr) {
	s.Mode = d.optional()
	if s.Mode != nil {
		*s.Mode &= 0o7777
	}
	s.UID, s.GID = d.optional(), d.optional()
	if d.boolean() {
		// More than fits is more than any FS has.
		size := int64(min(d.u64(), math.MaxInt64))
		s.Size = &size
	}
	s.Accessed = d.setTime(&s, now)
	s.Modified = d.setTime(&s, now)
	return s
}

func (d *decoder) optional() *uint32 {
	if !d.boolean() {
		return nil
	}
	v := d.u32()
	return &v
}

func (d *decoder) setTime(s *sattr, now func() time.Time) *time.Time {
	var t time.Time
	switch d.u32() {
	case dontSetTime:
		return nil
	case serverTime:
		t = now()
	case clientTime:
		t = d.time()
		s.clientTimes = true
	default:
		d.bad = true
	}
	return &t
}

func (d *decoder) time() time.Time {
	sec, nsec := d.u32(), d.u32()
	return time.Unix(int64(sec), int64(nsec))
}
