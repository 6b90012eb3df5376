package xfs

import (
	"github.com/holdfast-backup/holdfast/fs/guest"
)

// Flags of a buffer (XFSDS, Buffer Log Item).
const (
	bufInodes = 1 << 0 // only the links of unlinked inodes count
	bufCancel = 1 << 1
	bufQuota  = 1<<2 | 1<<3 | 1<<4
)

const (
	bufChunk  = 128       // bytes that a bit of the map stands for
	maxBuffer = 128 << 10 // bytes
)

// A buffer says which parts of a buffer follow as regions.
type buffer struct {
	place
	flags uint16
	bits  []byte // little-endian words
}

func parseBuffer(b []byte) (buffer, error) {
	if len(b) < 24 {
		return buffer{}, guest.Damaged("a buffer's item of %d bytes", len(b))
	}
	f := buffer{place: place{le.Uint64(b[8:]), uint64(le.Uint16(b[6:]))}, flags: le.Uint16(b[4:])}
	if words := le.Uint32(b[16:]); uint64(words) <= uint64(len(b)-20)/4 {
		f.bits = b[20 : 20+words*4]
		return f, nil
	}
	return buffer{}, guest.Damaged("the map of a buffer's item")
}

// run is the first run of dirty chunks at or behind one; n is 0 when there is none.
func (f *buffer) run(from int) (first, n int) {
	dirty := func(i int) bool { return f.bits[i/8]>>(i%8)&1 == 1 }
	for first = from; first < len(f.bits)*8 && !dirty(first); first++ {
	}
	for first+n < len(f.bits)*8 && dirty(first+n) {
		n++
	}
	return first, n
}

// buffer replays the parts of a buffer, unless it is cancelled later, or what the disk has is not older.
func (r *replayer) buffer(f buffer, parts [][]byte) error {
	if f.flags&(bufInodes|bufQuota) != 0 || r.cancelled[f.place] > 0 {
		return nil
	}
	size := int64(f.n) * sector
	if size == 0 || size > maxBuffer || f.at > uint64(r.over.Size()-size)/sector {
		return guest.Damaged("a buffer of %d bytes at sector %d", size, f.at)
	}
	b, err := r.read(int64(f.at)*sector, size)
	if err != nil {
		return err
	}
	if at, ok := r.stampOf(b); ok {
		if lsn := be.Uint64(b[at.lsn:]); lsn != 0 && lsn != nullIno && lsn >= r.lsn {
			return nil
		}
	}
	next := 0
	for _, part := range parts {
		first, n := f.run(next)
		// A run may come in several regions.
		if n = min(n, len(part)/bufChunk); n == 0 || (first+n)*bufChunk > len(b) {
			return guest.Damaged("the regions of the buffer at sector %d", f.at)
		}
		copy(b[first*bufChunk:], part[:n*bufChunk])
		next = first + n
	}
	r.dirty = append(r.dirty, f.place)
	return r.write(int64(f.at)*sector, b)
}

// stamps are where blocks of version 5 that begin with a magic number of 4 bytes have theirs.
var stamps = map[string]stamp{
	"XFSB": {crc: 224, lsn: 240, uuid: 32}, "XAGF": agfStamp, "XAFL": {crc: 32, lsn: 24, uuid: 8}, "XAGI": {crc: 312, lsn: 320, uuid: 296},
	"AB3B": shortStamp, "AB3C": shortStamp, "IAB3": shortStamp, "FIB3": shortStamp, "RMB3": shortStamp, "R3FC": shortStamp,
	"BMA3": mapStamp, "XSLM": {crc: 12, lsn: 48, uuid: 16}, "XDB3": dataStamp, "XDD3": dataStamp, "XDF3": dataStamp,
}

// stampOf tells where a buffer has its stamp; not ok when it has none, or is not of this file system.
func (r *replayer) stampOf(b []byte) (stamp, bool) {
	sb := r.fs.sb
	if !sb.v5 {
		return stamp{}, false
	}
	at, ok := stamps[string(b[:4])]
	if !ok {
		switch be.Uint16(b[8:]) {
		case magicLeaf1v5, magicLeafNv5, magicNodev5, magicAttrv5:
			at = treeStamp
		default:
			return stamp{}, false
		}
	}
	uuid := sb.meta
	if string(b[:4]) == "XFSB" {
		uuid = sb.uuid
	}
	return at, [16]byte(b[at.uuid:at.uuid+16]) == uuid
}

// stampAll gives the buffers that were replayed their sequence number and checksum. It waits until all transactions of that number are
// carried out: to the later ones the buffer must look as it was before.
func (r *replayer) stampAll() error {
	for _, p := range r.dirty {
		off := int64(p.at) * sector
		b, err := r.read(off, int64(p.n)*sector)
		if err != nil {
			return err
		}
		at, ok := r.stampOf(b)
		if !ok {
			continue
		}
		be.PutUint64(b[at.lsn:], r.lsn)
		le.PutUint32(b[at.crc:], checksum(b, at.crc))
		if (at == dataStamp || at == treeStamp) && int64(len(b)) < r.fs.sb.dirSize() {
			r.unsummed[off] = true
		}
		if err := r.write(off, b); err != nil {
			return err
		}
	}
	r.dirty = r.dirty[:0]
	return nil
}
