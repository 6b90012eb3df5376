package iso9660

import (
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// A record is a directory record (§9.1):
//
//	0 length 1 | 1 blocks of attributes before the data 1 | 2 first block 8 | 10 bytes 8 | 18 date 7 | 25 flags 1
//	26 unit of interleaving 1 | 27 its gap 1 | 28 … | 32 bytes of the name 1 | 33 name | to an even place | system use
//
// Numbers of 8 bytes are there twice, little-endian first.
type record struct {
	length      int64
	start       int64 // block
	size        int64 // bytes
	date        time.Time
	flags       byte
	interleaved bool
	name        []byte
	use         []byte
}

// Flags (§9.1.6).
const (
	flagDir        = 0x02
	flagAssociated = 0x04
	flagMore       = 0x80
	recordHead     = 33
)

// parseRecord reads the record at the start of b, which ends no later than its sector does.
func parseRecord(b []byte) (r record, err error) {
	n := int(b[0])
	if n <= recordHead || n > len(b) || recordHead+int(b[32]) > n || b[32] == 0 {
		return r, guest.Damaged("a directory record of %d bytes", n)
	}
	end := recordHead + int(b[32])
	r = record{
		length: int64(n), start: int64(le.Uint32(b[2:])) + int64(b[1]), size: int64(le.Uint32(b[10:])), date: date(b[18:25]), flags: b[25],
		interleaved: b[26] != 0 || b[27] != 0, name: b[recordHead:end],
	}
	if end += end & 1; end < n {
		r.use = b[end:n]
	}
	return r, nil
}

// own reports whether it is one of the first two of a directory: that of itself, or of the one above.
func (r *record) own() bool { return len(r.name) == 1 && r.name[0] <= 1 }

// date reads a date (§9.1.5): years since 1900, month, day, hour, minute, second, and the zone in 15 minutes, which Linux takes when it is between -12 and
// +13 hours.
func date(b []byte) time.Time {
	if b[1] == 0 {
		return time.Unix(0, 0).UTC()
	}
	zone := time.Duration(int8(b[6]))
	if zone < -52 || zone > 52 {
		zone = 0
	}
	t := time.Date(1900+int(b[0]), time.Month(b[1]), int(b[2]), int(b[3]), int(b[4]), int(b[5]), 0, time.UTC)
	return t.Add(-zone * 15 * time.Minute)
}

// record reads the record at a place.
func (f *FS) record(at int64) (r record, err error) {
	if at < 0 || at/sectorSize >= f.dev.Size()/sectorSize {
		return r, guest.Damaged("a directory record at %d", at)
	}
	b, err := f.sectors.Block(at/sectorSize, nil)
	if err != nil {
		return r, err
	}
	return parseRecord(b[at%sectorSize:])
}

// home gives where the first record of a directory is.
func (f *FS) home(r record) guest.Ino { return guest.Ino(r.start * f.block) }

// directory reads the first record of a directory, which is that of itself.
func (f *FS) directory(ino guest.Ino) (record, error) {
	r, err := f.record(int64(ino))
	switch {
	case err != nil:
		return r, err
	case r.flags&flagDir == 0 || r.name[0] != 0 || len(r.name) != 1:
		return r, guest.ErrNotDir
	case f.home(r) != ino:
		return r, guest.Damaged("the directory at %d says that it is at %d", ino, f.home(r))
	case r.size > f.dev.Size()-int64(ino):
		return r, guest.Damaged("the directory at %d has %d bytes", ino, r.size)
	}
	return r, nil
}

// child makes sure that a directory is in the one that names it, and in no other: otherwise directories could go in a circle. It
// says itself where it is, in its second record or, when it was moved, in what Rock Ridge says there.
func (f *FS) child(dir, ino guest.Ino) error {
	r, err := f.directory(ino)
	if err != nil {
		if err == guest.ErrNotDir {
			err = guest.Damaged("no directory at %d", ino)
		}
		return err
	}
	up, err := f.record(int64(ino) + r.length)
	if err != nil {
		return err
	}
	above := f.home(up)
	if f.rock {
		x, err := f.extras(&up)
		if err != nil {
			return err
		}
		if x.parent >= 0 {
			above = guest.Ino(x.parent * f.block)
		}
	}
	if above == ino {
		above = f.orphans.parent(ino, dir)
	}
	if len(up.name) != 1 || up.name[0] != 1 || above != dir || ino == f.root {
		return guest.Damaged("the directory at %d does not know that it is in the one at %d", ino, dir)
	}
	return nil
}

// orphans are directories that say that they are in themselves, as genisoimage makes those that were too deep for it: they are in
// the one that names them first.
type orphans struct {
	mu      sync.Mutex              // guards following
	parents map[guest.Ino]guest.Ino // directory => the one it is in
}

const maxOrphans = 1 << 16

func (o *orphans) parent(ino, dir guest.Ino) guest.Ino {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.parents == nil {
		o.parents = map[guest.Ino]guest.Ino{}
	}
	known, ok := o.parents[ino]
	if !ok && len(o.parents) < maxOrphans {
		o.parents[ino], known = dir, dir
	}
	return known
}
