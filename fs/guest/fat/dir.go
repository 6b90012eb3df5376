package fat

import (
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/cluster"
)

// An entry of a directory (fatgen, "FAT Directory Structure"):
//
//	0 name (11)   11 attributes (1)   12 lower case (1)   13 tenths of created: 10 ms (1)   14 created: time, date (2+2)   18 read: date (2)
//	20 first cluster, high (2)   22 written: time, date (2+2)   26 first cluster, low (2)   28 size (4)
const (
	attrReadOnly = 0x01
	attrLabel    = 0x08
	attrDir      = 0x10
	attrLong     = 0x0f
	attrMask     = 0x3f // of them; the other two bits are reserved
	deleted      = 0xe5
)

// maxDir is the largest directory, bytes (fatgen: 65,536 entries); it is what Linux reads, too.
const maxDir = 65536 * cluster.SlotSize

// directory is what is kept of a directory.
type directory struct {
	chain *cluster.Chain
	size  int64 // bytes that can be read
	index cluster.Index
	bad   error // what of it is damaged
}

// found is an entry with its name.
type found struct {
	raw
	name  string
	alias string // the short name, when it is another one
	slot  uint32 // the first
	next  uint32 // the one behind it
	ino   guest.Ino
}

// slots reads a directory from a slot on.
func (d *directory) slots(f *FS, from uint32) *cluster.Slots {
	return cluster.NewSlots(f.cache, d.chain, d.size, from)
}

// directory gives a directory that was read once.
func (f *FS) directory(ino guest.Ino) (*directory, error) {
	if d, ok := f.dirs.Get(ino); ok {
		return d, nil
	}
	chain, err := f.dirChain(ino)
	if err != nil {
		return nil, err
	}
	d := &directory{chain: chain}
	if d.size, err = chain.Len(); err != nil && !errors.Is(err, guest.ErrDamaged) {
		return nil, err
	}
	d.bad = err
	if d.size > max(maxDir, f.geo.cluster) {
		d.size, d.bad = maxDir, guest.Damaged("a directory of %d bytes", d.size)
	}
	if err := d.read(f, ino); err != nil {
		return nil, err
	}
	f.dirs.Put(ino, d, d.index.Cost()+chain.Cost())
	return d, nil
}

// read makes the index, and notes what is damaged.
func (d *directory) read(f *FS, ino guest.Ino) error {
	for e, err := range d.entries(f, 0) {
		switch {
		case err == nil:
		case errors.Is(err, guest.ErrDamaged):
			d.note(err)
			continue
		default:
			return err
		}
		if e.dir() {
			if err := f.child(ino, &e); err != nil {
				d.note(err)
			}
			d.index.Dirs++
		}
		d.index.Add(cluster.Hash(folded(e.name)), e.slot)
		if e.alias != "" {
			d.index.Add(cluster.Hash(folded(e.alias)), e.slot)
		}
	}
	d.index.Done()
	return nil
}

func (d *directory) note(err error) {
	if d.bad == nil {
		d.bad = err
	}
}

// child makes sure that a directory is in this one alone.
func (f *FS) child(dir guest.Ino, e *found) error {
	if first := f.first(e.raw); first == 0 || first == f.geo.root {
		return guest.Damaged("directory %q starts at cluster %d", e.name, first)
	}
	return f.parents.Claim(e.ino, dir)
}

func (f *FS) dirChain(ino guest.Ino) (*cluster.Chain, error) {
	if ino == rootIno {
		if f.geo.bits == 32 {
			return f.table.Chain(f.geo.root), nil
		}
		return f.rootAt.Run(cluster.First, 1), nil
	}
	e, err := f.entry(ino)
	switch {
	case err != nil:
		return nil, err
	case !e.dir():
		return nil, guest.ErrNotDir
	case f.first(e) == 0:
		return nil, guest.Damaged("a directory without a cluster")
	}
	return f.table.Chain(f.first(e)), nil
}

// entries yields the entries of a directory from a slot on, without "." and "..". Behind a damaged one, it goes on.
func (d *directory) entries(f *FS, from uint32) iter.Seq2[found, error] {
	return func(yield func(found, error) bool) {
		var long longName
		for it := d.slots(f, from); ; {
			slot := it.Pos()
			b, err := it.Next()
			if err != nil {
				yield(found{}, err)
				return
			}
			if b == nil || b[0] == 0 {
				return
			}
			switch attr := b[11] & attrMask; {
			case b[0] == deleted:
				long.ok = false
				continue
			case attr == attrLong:
				long.add(b, slot)
				continue
			case attr&attrLabel != 0, string(b[:11]) == ".          ", string(b[:11]) == "..         ":
				long.ok = false
				continue
			}
			e, err := d.found(b, slot, &long)
			long.ok = false
			if !yield(e, err) {
				return
			}
		}
	}
}

// found makes an entry of a slot and the long name before it.
func (d *directory) found(b []byte, slot uint32, long *longName) (e found, err error) {
	e = found{raw: raw(b), slot: slot, next: slot + 1}
	at, err := d.chain.Where(int64(slot) * cluster.SlotSize)
	if err != nil {
		return e, err
	}
	e.ino = guest.Ino(at / cluster.SlotSize)
	short := shortName(b, b[12])
	if units, ok := long.of(b); ok {
		e.name, e.slot = cluster.Text(units), long.first
		if e.name != short {
			e.alias = short
		}
	} else {
		e.name = short
	}
	if e.name == "" || e.name == "." || e.name == ".." || strings.ContainsAny(e.name, "/\x00") {
		return e, guest.Damaged("an entry with the name %q", e.name)
	}
	return e, nil
}

// ReadDir implements guest.FS. The names come in the order of the disk; what is damaged is told at the end.
func (f *FS) ReadDir(dir guest.Ino, from uint64) iter.Seq2[guest.Entry, error] {
	return func(yield func(guest.Entry, error) bool) {
		d, err := f.directory(dir)
		if err != nil {
			yield(guest.Entry{}, err)
			return
		}
		for e, err := range d.entries(f, uint32(min(from, maxDir))) {
			if err != nil && !errors.Is(err, guest.ErrDamaged) {
				yield(guest.Entry{}, err)
				return
			}
			if err != nil || e.dir() && f.child(dir, &e) != nil {
				continue
			}
			if !yield(guest.Entry{Name: e.name, Ino: e.ino, Type: e.kind(), Next: uint64(e.next)}, nil) {
				return
			}
		}
		if d.bad != nil {
			yield(guest.Entry{}, fmt.Errorf("fat: %w", d.bad))
		}
	}
}

// Lookup implements guest.FS. A name in the same case comes before one in another, and that before a short one. As Linux does, it leaves out dots
// at the end that no name on the disk has.
func (f *FS) Lookup(dir guest.Ino, name string) (guest.Ino, error) {
	d, err := f.directory(dir)
	if err != nil {
		return 0, err
	}
	e, err := d.lookup(f, name)
	if bare := strings.TrimRight(name, "."); errors.Is(err, guest.ErrNotExist) && bare != "" && bare != name {
		e, err = d.lookup(f, bare)
	}
	if err == nil && e.dir() {
		err = f.child(dir, e)
	}
	if err != nil {
		return 0, err
	}
	return e.ino, nil
}

func (d *directory) lookup(f *FS, name string) (*found, error) {
	want := folded(name)
	if want == nil {
		return nil, guest.ErrNotExist
	}
	var best *found
	rank := 0
	for slot := range d.index.Find(cluster.Hash(want)) {
		e, err := d.at(f, slot)
		if err != nil {
			return nil, err
		}
		n := 0
		switch {
		case e.name == name:
			return e, nil
		case slices.Equal(folded(e.name), want):
			n = 2
		case e.alias != "" && slices.Equal(folded(e.alias), want):
			n = 1
		}
		if n > rank {
			best, rank = e, n
		}
	}
	if best != nil {
		return best, nil
	}
	if d.bad != nil {
		return nil, fmt.Errorf("fat: %q may be in what is not readable: %w", name, d.bad)
	}
	return nil, guest.ErrNotExist
}

// at gives the entry that starts at a slot.
func (d *directory) at(f *FS, slot uint32) (*found, error) {
	for e, err := range d.entries(f, slot) {
		return &e, err
	}
	return nil, guest.Damaged("a directory that changed")
}
