package iso9660

import (
	"cmp"
	"errors"
	"hash/maphash"
	"iter"
	"slices"
	"strings"
	"unicode/utf16"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// scan yields the records of a directory from an offset on, but for the first two, those of further extents and associated files; next is
// the offset behind it. An error of one ends it.
func (f *FS) scan(dir guest.Ino, from int64, yield func(at, next int64, r record) bool) error {
	self, err := f.directory(dir)
	if err != nil {
		return err
	}
	more := false // the record before has further extents
	var at int64
	var first record
	for off := from; off < self.size; {
		sector, err := f.sectors.Block((int64(dir)+off)/sectorSize, nil)
		if err != nil {
			return err
		}
		b := sector[(int64(dir)+off)%sectorSize:]
		if b[0] == 0 { // the rest of the sector
			off += int64(len(b))
			continue
		}
		r, err := parseRecord(b)
		if err != nil {
			return err
		}
		if !more {
			at, first = int64(dir)+off, r
		}
		off += r.length
		if more = r.flags&flagMore != 0; more || first.own() || first.flags&flagAssociated != 0 {
			continue
		}
		if !yield(at, off, first) {
			return nil
		}
	}
	if more {
		return guest.Damaged("the directory at %d ends within a file", dir)
	}
	return nil
}

// entry makes an entry of a record; ok is false for a directory that is shown elsewhere.
func (f *FS) entry(at int64, r *record) (e guest.Entry, ok bool, err error) {
	e = guest.Entry{Ino: guest.Ino(at), Type: guest.ModeRegular}
	if r.flags&flagDir != 0 {
		e.Ino, e.Type = f.home(*r), guest.ModeDir
	}
	switch {
	case f.rock:
		x, err := f.extras(r)
		if err != nil || x.moved {
			return e, false, err
		}
		if x.mode != 0 && r.flags&flagDir == 0 {
			e.Type = x.mode & guest.ModeType
		}
		if x.child >= 0 {
			e.Ino, e.Type = guest.Ino(x.child*f.block), guest.ModeDir
		}
		if e.Name = string(x.name); e.Name == "" {
			e.Name = plainName(r.name)
		}
	case f.joliet:
		e.Name = jolietName(r.name)
	default:
		e.Name = plainName(r.name)
	}
	if e.Name == "" || e.Name == "." || e.Name == ".." || len(e.Name) > 3*maxName || strings.ContainsAny(e.Name, "/\x00") {
		return e, false, guest.Damaged("a file with the name %.300q", e.Name)
	}
	return e, true, nil
}

// plainName is the name in lower case, without the version 1, and a dot for what is before another (mount(8), "map=normal").
func plainName(b []byte) string {
	name := make([]byte, 0, len(b))
	if s, ok := strings.CutSuffix(string(b), ";1"); ok {
		b = []byte(strings.TrimSuffix(s, "."))
	}
	for _, c := range b {
		switch {
		case c >= 'A' && c <= 'Z':
			c += 'a' - 'A'
		case c == ';' || c == '/':
			c = '.'
		}
		name = append(name, c)
	}
	return string(name)
}

// jolietName is the name without the version 1 and dots at the end.
func jolietName(b []byte) string {
	name := strings.TrimSuffix(wideText(b), ";1")
	for len(name) > 1 && name[len(name)-1] == '.' {
		name = name[:len(name)-1]
	}
	return name
}

// wideText makes big-endian UTF-16 UTF-8.
func wideText(b []byte) string {
	units := make([]uint16, len(b)/2)
	for i := range units {
		units[i] = uint16(b[2*i])<<8 | uint16(b[2*i+1])
	}
	return string(utf16.Decode(units))
}

// ReadDir implements guest.FS.
func (f *FS) ReadDir(dir guest.Ino, from uint64) iter.Seq2[guest.Entry, error] {
	return func(yield func(guest.Entry, error) bool) {
		var bad error // for the end: the others are good
		stopped := false
		err := f.scan(dir, int64(min(from, 1<<40)), func(at, next int64, r record) bool {
			e, ok, err := f.entry(at, &r)
			if ok && e.Type == guest.ModeDir {
				err = f.child(dir, e.Ino)
			}
			if err != nil {
				bad = err
				return true
			}
			if !ok {
				return true
			}
			e.Next = uint64(next)
			stopped = !yield(e, nil)
			return !stopped
		})
		if err = cmp.Or(err, bad); err != nil && !stopped {
			yield(guest.Entry{}, err)
		}
	}
}

// Lookup implements guest.FS.
func (f *FS) Lookup(dir guest.Ino, name string) (guest.Ino, error) {
	x, err := f.index(dir)
	if err != nil {
		return 0, err
	}
	hash := uint32(maphash.String(f.seed, name))
	i, _ := slices.BinarySearchFunc(x.list, hash, func(p place, h uint32) int { return cmp.Compare(p.hash, h) })
	for ; i < len(x.list) && x.list[i].hash == hash; i++ {
		at := int64(dir) + int64(x.list[i].off)
		r, err := f.record(at)
		if err != nil {
			return 0, err
		}
		e, ok, err := f.entry(at, &r)
		if err != nil || !ok || e.Name != name {
			continue
		}
		if e.Type == guest.ModeDir {
			return e.Ino, f.child(dir, e.Ino)
		}
		return e.Ino, nil
	}
	return 0, cmp.Or(x.err, error(guest.ErrNotExist))
}

// A dirIndex finds names in a directory.
type dirIndex struct {
	list []place
	err  error // of what could not be read: a name that is not found may be there
}

// A place is where the record of a name is.
type place struct{ hash, off uint32 }

// index gives the index of a directory, made when it is not among those used last.
func (f *FS) index(dir guest.Ino) (*dirIndex, error) {
	if x, ok := f.indexes.Get(dir); ok {
		return x, nil
	}
	x := &dirIndex{}
	var bad error
	err := f.scan(dir, 0, func(at, _ int64, r record) bool {
		e, ok, err := f.entry(at, &r)
		if err != nil {
			bad = err
		} else if ok {
			x.list = append(x.list, place{uint32(maphash.String(f.seed, e.Name)), uint32(at - int64(dir))})
		}
		return true
	})
	if errors.Is(err, guest.ErrNotDir) || err != nil && !errors.Is(err, guest.ErrDamaged) {
		return nil, err
	}
	x.err = cmp.Or(err, bad)
	slices.SortFunc(x.list, func(a, b place) int { return cmp.Or(cmp.Compare(a.hash, b.hash), cmp.Compare(a.off, b.off)) })
	f.indexes.Put(dir, x, int64(cap(x.list))*8+128)
	return x, nil
}
