package iso9660

import (
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// extras is what Rock Ridge says of a record.
type extras struct {
	mode          uint32 // 0: not said
	nlink         uint32
	uid, gid      uint32
	high, low     uint32 // of a device
	hasDevice     bool
	name          []byte
	target        string
	isLink        bool
	moved         bool  // RE: it is shown elsewhere
	child, parent int64 // CL, PL: blocks, or -1
	mtime         time.Time
	atime, ctime  time.Time
	sparse        bool
	zisofs        bool
	algorithm     string
	size          int64 // uncompressed

	linkOpen bool // the target goes on in the same component
	linkEnd  bool // no further SL
}

// The bounds of a record's system use entries.
const (
	maxContinued = 32       // areas
	maxUse       = 32 << 10 // bytes
	maxTarget    = 4 << 10
	maxName      = 255 // bytes, as Linux has it
)

// extras reads the system use entries of a record (SUSP §4): name 2 | length 1 | version 1 | …; they go on where "CE" says (§5.1):
// 4 block 8 | 12 offset 8 | 20 bytes 8.
func (f *FS) extras(r *record) (x extras, err error) {
	x.child, x.parent = -1, -1
	b := r.use
	if len(b) < f.skip {
		return x, nil
	}
	b = b[f.skip:]
	total := 0
	for range maxContinued {
		var next []byte
		for len(b) >= 4 {
			n := int(b[2])
			if n < 4 || n > len(b) {
				break // padding, or what is not of SUSP
			}
			e := b[:n]
			b = b[n:]
			switch string(e[:2]) {
			case "CE":
				if n >= 28 {
					next = e
				}
			case "ST":
				b = nil
			default:
				x.add(e)
			}
		}
		if next == nil {
			return x, nil
		}
		off, size := int64(le.Uint32(next[12:])), int64(le.Uint32(next[20:]))
		at := int64(le.Uint32(next[4:]))*f.block + off
		if total += int(size); total > maxUse || at > f.dev.Size()-size {
			return x, guest.Damaged("a system use area of %d bytes at %d", size, at)
		}
		b = make([]byte, size)
		if err := f.read(b, at); err != nil {
			return x, err
		}
	}
	return x, guest.Damaged("more than %d system use areas of a record", maxContinued)
}

// add reads one entry (RRIP §4.1).
func (x *extras) add(e []byte) {
	switch n := len(e); string(e[:2]) {
	case "PX": // 4 mode 8 | 12 links 8 | 20 user 8 | 28 group 8
		if n >= 36 {
			x.mode, x.nlink, x.uid, x.gid = le.Uint32(e[4:]), le.Uint32(e[12:]), le.Uint32(e[20:]), le.Uint32(e[28:])
		}
	case "PN": // 4 high 8 | 12 low 8
		if n >= 20 {
			x.hasDevice, x.high, x.low = true, le.Uint32(e[4:]), le.Uint32(e[12:])
		}
	case "NM": // 4 flags 1 | 5 part of the name
		const current, parent = 2, 4
		if n >= 5 && e[4]&(current|parent) == 0 && len(x.name) <= maxName {
			x.name = append(x.name, e[5:]...)
		}
	case "SL": // 4 flags 1 | 5 components
		if n >= 5 && !x.linkEnd {
			x.isLink = true
			x.linkTo(e[5:])
			x.linkEnd = e[4]&1 == 0
		}
	case "CL":
		if n >= 8 {
			x.child = int64(le.Uint32(e[4:]))
		}
	case "PL":
		if n >= 8 {
			x.parent = int64(le.Uint32(e[4:]))
		}
	case "RE":
		x.moved = true
	case "TF":
		x.times(e)
	case "SF":
		x.sparse = true
	case "ZF": // 4 algorithm 2 | 6 words of its head 1 | 7 log2 of a block 1 | 8 bytes 8
		if n >= 16 {
			x.zisofs, x.algorithm, x.size = true, string(e[4:6]), int64(le.Uint32(e[8:]))
		}
	}
}

// linkTo adds components of a target (RRIP §4.1.3.1): flags 1 | length 1 | name.
func (x *extras) linkTo(b []byte) {
	const goesOn, current, parent, root = 1, 2, 4, 8
	for len(b) >= 2 && 2+int(b[1]) <= len(b) && len(x.target) < maxTarget {
		flags, name := b[0], string(b[2:2+int(b[1])])
		b = b[2+int(b[1]):]
		if x.target != "" && !x.linkOpen && !strings.HasSuffix(x.target, "/") {
			x.target += "/"
		}
		x.linkOpen = flags&goesOn != 0
		switch {
		case flags&current != 0:
			x.target += "."
		case flags&parent != 0:
			x.target += ".."
		case flags&root != 0:
			x.target = "/"
		default:
			x.target += name
		}
	}
}

// times reads TF (RRIP §4.1.6): 4 flags 1 | 5 the dates whose flags are set, of 7 bytes, or of 17 in the long form (ECMA-119 §8.4.26.1).
func (x *extras) times(e []byte) {
	if len(e) < 5 {
		return
	}
	flags, b := e[4], e[5:]
	size := 7
	if flags&0x80 != 0 {
		size = 17
	}
	for bit, to := range []*time.Time{&x.ctime, &x.mtime, &x.atime, &x.ctime} { // made, changed, read, attributes changed
		if flags>>bit&1 == 0 {
			continue
		}
		if len(b) < size {
			return
		}
		if size == 7 {
			*to = date(b)
		} else if t, ok := longDate(b); ok {
			*to = t
		}
		b = b[size:]
	}
}

// longDate reads a date in digits: year 4, month 2, day 2, hour 2, minute 2, second 2, hundredths 2, and the zone in 15 minutes 1.
func longDate(b []byte) (time.Time, bool) {
	t, err := time.Parse("20060102150405", string(b[:14]))
	if err != nil {
		return t, false
	}
	return t.Add(-time.Duration(int8(b[16])) * 15 * time.Minute), true
}
