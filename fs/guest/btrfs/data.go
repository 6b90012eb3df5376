package btrfs

import (
	"sync"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// maxRead is how many bytes of data are read and verified at once.
const maxRead = 256 << 10

// buffers are for reads that are not of whole sectors.
var buffers = sync.Pool{New: func() any { b := make([]byte, maxRead); return &b }}

// data reads what lies at a logical address, verified unless the file has no sums.
func (fs *FS) data(p []byte, logical uint64, sums bool) error {
	unit := uint64(fs.sb.sector)
	for len(p) > 0 {
		head := logical % unit
		n := min(uint64(len(p)), maxRead-head)
		// Whole sectors go to where they are wanted.
		if head == 0 && n >= unit {
			whole := n - n%unit
			if n-whole > 0 && n < maxRead/2 {
				whole = 0 // one read rather than two
			}
			if whole > 0 {
				if err := fs.sectors(p[:whole], logical, sums); err != nil {
					return err
				}
				p, logical = p[whole:], logical+whole
				continue
			}
		}
		room := buffers.Get().(*[]byte)
		b := (*room)[:(head+n+unit-1)/unit*unit]
		err := fs.sectors(b, logical-head, sums)
		copy(p[:n], b[head:])
		buffers.Put(room)
		if err != nil {
			return err
		}
		p, logical = p[n:], logical+n
	}
	return nil
}

// sectors reads whole sectors, at most maxPart bytes. One that does not match its sum, or cannot be read, is read from another copy.
func (fs *FS) sectors(p []byte, logical uint64, sums bool) error {
	copies, err := fs.vol.copies(logical)
	if err != nil {
		return err
	}
	var room [maxRead / 4096 * 4]byte
	want := room[:0]
	if sums {
		if want, err = fs.sums(want, logical, len(p)/fs.sb.sector); err != nil {
			return err
		}
	}
	first := fs.vol.read(p, logical, 0)
	if first == nil && !sums || first != nil && copies == 1 {
		return first
	}
	if first != nil && !sums {
		return fs.other(p, logical, copies, nil)
	}
	unit, size := fs.sb.sector, fs.sb.csum.size
	for i := 0; i*unit < len(p); i++ {
		b, sum := p[i*unit:(i+1)*unit], want[i*size:(i+1)*size]
		if first == nil && fs.sb.csum.matches(sum, b) {
			continue
		}
		if err := fs.other(b, logical+uint64(i*unit), copies, sum); err != nil {
			return err
		}
	}
	return nil
}

// other reads from a copy that is not the first; sum is nil when there is none.
func (fs *FS) other(b []byte, logical uint64, copies int, sum []byte) error {
	err := guest.Damaged("what lies at %d: the checksum", logical)
	for i := 1; i < copies; i++ {
		if e := fs.vol.read(b, logical, i); e != nil {
			err = e
		} else if sum == nil || fs.sb.csum.matches(sum, b) {
			return nil
		}
	}
	return err
}

// sums appends the checksums of n sectors of data (BTRFS, On-disk Format, EXTENT_CSUM).
func (fs *FS) sums(dst []byte, logical uint64, n int) ([]byte, error) {
	unit, size := uint64(fs.sb.sector), fs.sb.csum.size
	for t := fs.roots.csums; n > 0; {
		b, without := fs.log.find(logical, fs.sb)
		if b = b[:min(len(b), n*size)]; len(b) > 0 {
			dst = append(dst, b...)
			logical, n = logical+uint64(len(b)/size)*unit, n-len(b)/size
			continue
		}
		if t == nil {
			return nil, guest.Damaged("the tree of checksums")
		}
		k, b, ok, err := t.floor(key{objectCsum, kindExtentCsum, logical})
		if err != nil {
			return nil, err
		}
		skip := (logical - k.off) / unit * uint64(size)
		if !ok || k.id != objectCsum || k.kind != kindExtentCsum || skip >= uint64(len(b)-len(b)%size) {
			return nil, guest.Damaged("what lies at %d: there is no checksum", logical)
		}
		b = b[skip : len(b)-len(b)%size]
		b = b[:min(len(b), min(n, without)*size)]
		dst = append(dst, b...)
		logical, n = logical+uint64(len(b)/size)*unit, n-len(b)/size
	}
	return dst, nil
}
