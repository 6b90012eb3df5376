package volume

import (
	"github.com/holdfast-backup/holdfast/fs/guest"
)

// raid10 keeps several copies of each chunk (md(4), RAID10): near ones in neighbouring members, far ones in later parts of
// the members, or (offset) in the next rows.
type raid10 struct {
	legs      []leg
	chunk     int64
	near, far int64
	offset    bool
	stride    int64 // between far copies, bytes
}

// newRAID10 makes RAID 10 over members of size bytes. layout: copies near in bits 0-7 and far in bits 8-15, offset in bit 16.
func newRAID10(legs []leg, size, chunk int64, layout int) (device, error) {
	r := &raid10{legs: legs, chunk: chunk, near: int64(layout & 0xff), far: int64(layout >> 8 & 0xff), offset: layout&(1<<16) != 0}
	n := int64(len(legs))
	if chunk <= 0 || r.near < 1 || r.far < 1 || r.near*r.far > n {
		return nil, guest.Damaged("RAID 10 of %d members in layout %x", n, layout)
	}
	if layout>>17 != 0 {
		return nil, guest.Unsupported("RAID 10 in layout %x", layout)
	}
	// As many chunks as fit when each far copy has its own part of a member.
	chunks := size / chunk / r.far * n / r.near
	perMember := (chunks*r.near*r.far + n - 1) / n
	r.stride = perMember / r.far * chunk
	if r.offset {
		r.stride = chunk
	}
	if chunks <= 0 {
		return nil, guest.Damaged("RAID 10 of members of %d bytes", size)
	}
	if !r.complete() {
		return nil, guest.Damaged("RAID 10 with all copies of something missing")
	}
	return &mapped{layout: r, size: chunks * chunk, shared: true}, nil
}

// complete reports whether a copy of every chunk is there: the first row of each member tells.
func (r *raid10) complete() bool {
	for nr := range int64(len(r.legs)) {
		ok := false
		for member := range r.copies(nr * r.chunk) {
			ok = ok || r.legs[member].dev != nil
		}
		if !ok {
			return false
		}
	}
	return true
}

// copies yields where the copies of a byte are: the member and the place in it.
func (r *raid10) copies(off int64) func(func(int, int64) bool) {
	return func(yield func(int, int64) bool) {
		n := int64(len(r.legs))
		first, in := off/r.chunk*r.near, off%r.chunk
		for i := range r.near {
			member, row := (first+i)%n, (first+i)/n
			if r.offset {
				row *= r.far
			}
			for f := range r.far {
				if !yield(int((member+f*r.near)%n), row*r.chunk+f*r.stride+in) {
					return
				}
			}
		}
	}
}

func (r *raid10) at(off, n int64) (place, error) {
	return firstGood(r.legs, r.copies(off), min(n, r.chunk-off%r.chunk))
}
