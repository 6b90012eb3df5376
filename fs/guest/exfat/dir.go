package exfat

import (
	"errors"
	"fmt"
	"iter"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/cluster"
)

// maxDir is the largest directory, bytes (§7.4: "256MB").
const maxDir = 256 << 20

// directory is what is kept of a directory.
type directory struct {
	chain   *cluster.Chain
	noChain guest.Ino // 1 for one without a chain in the table
	size    int64     // bytes that can be read
	index   cluster.Index
	bad     error // what of it is damaged
}

// directory gives a directory that was read once.
func (f *FS) directory(ino guest.Ino) (*directory, error) {
	if d, ok := f.dirs.Get(ino); ok {
		return d, nil
	}
	d := &directory{}
	if ino == rootIno {
		d.chain = f.table.Chain(f.geo.root)
	} else {
		s, err := f.set(ino)
		if err != nil {
			return nil, err
		}
		if !s.dir() {
			return nil, guest.ErrNotDir
		}
		d.chain, d.size = s.chain(f.table), s.size()
		d.noChain = guest.Ino(s.stream[1] & flagNoChain / flagNoChain)
	}
	n, err := d.chain.Len()
	if err != nil && !errors.Is(err, guest.ErrDamaged) {
		return nil, err
	}
	switch d.bad = err; {
	case ino == rootIno:
		d.size = n
	case n < d.size:
		d.note(guest.Damaged("a directory of %d bytes with %d", d.size, n))
		d.size = n
	}
	if d.size > maxDir {
		d.note(guest.Damaged("a directory of %d bytes", d.size))
		d.size = maxDir
	}
	if err := d.read(f, ino); err != nil {
		return nil, err
	}
	f.dirs.Put(ino, d, d.index.Cost()+d.chain.Cost())
	return d, nil
}

// read makes the index, and notes what is damaged.
func (d *directory) read(f *FS, ino guest.Ino) error {
	for s, err := range d.sets(f, 0) {
		if err != nil {
			if !bad(err) {
				return err
			}
			d.note(err)
			continue
		}
		if s.dir() {
			if err := f.child(ino, s); err != nil {
				d.note(err)
			}
			d.index.Dirs++
		}
		d.index.Add(cluster.Hash(f.upcase.fold(s.name)), s.slot)
	}
	d.index.Done()
	return nil
}

// bad reports whether an error is about one file, and not about reading the device.
func bad(err error) bool {
	return errors.Is(err, guest.ErrDamaged) || errors.Is(err, guest.ErrUnsupported)
}

func (d *directory) note(err error) {
	if d.bad == nil {
		d.bad = err
	}
}

// child makes sure that a directory is in this one alone.
func (f *FS) child(dir guest.Ino, s *set) error {
	if s.first() == f.geo.root {
		return guest.Damaged("directory %q is the root", s.name)
	}
	return f.parents.Claim(s.ino, dir)
}

// sets yields the files and directories in a directory from a slot on. Behind a damaged one, it goes on.
func (d *directory) sets(f *FS, from uint32) iter.Seq2[*set, error] {
	return func(yield func(*set, error) bool) {
		for it := cluster.NewSlots(f.cache, d.chain, d.size, from); ; {
			slot := it.Pos()
			b, err := it.Next()
			if err != nil {
				yield(nil, err)
				return
			}
			if b == nil || b[0] == 0 {
				return
			}
			if b[0] != entryFile {
				continue
			}
			at, err := d.chain.Where(int64(slot) * cluster.SlotSize)
			if err != nil {
				yield(nil, err)
				return
			}
			s, err := readSet(b, it)
			s.slot, s.next, s.ino = slot, it.Pos(), guest.Ino(at/cluster.SlotSize)<<1|d.noChain
			if err != nil {
				it.Seek(slot + 1) // how many belong to it is not certain
			}
			if !yield(&s, err) {
				return
			}
		}
	}
}

// set reads the entries that an inode number names.
func (f *FS) set(ino guest.Ino) (*set, error) {
	at := int64(ino>>1)*cluster.SlotSize - f.geo.heap
	if ino > 1<<60 || at < 0 || at/f.geo.cluster >= f.geo.clusters {
		return nil, guest.ErrNotExist
	}
	b := make([]byte, cluster.SlotSize)
	if err := guest.ReadFull(f.cache, b, at+f.geo.heap); err != nil {
		return nil, err
	}
	if b[0] != entryFile {
		return nil, guest.ErrNotExist
	}
	first, off := uint32(at/f.geo.cluster+cluster.First), at%f.geo.cluster
	need := off + (int64(b[1])+1)*cluster.SlotSize
	chain := f.table.Chain(first)
	if ino&1 != 0 {
		clusters := (need-1)/f.geo.cluster + 1
		chain = f.table.Run(first, min(clusters, f.geo.clusters-at/f.geo.cluster))
	}
	size := f.geo.cluster
	if need > size {
		n, err := chain.Len()
		if err != nil && !errors.Is(err, guest.ErrDamaged) {
			return nil, err
		}
		size = n
	}
	it := cluster.NewSlots(f.cache, chain, size, uint32(off/cluster.SlotSize)+1)
	s, err := readSet(b, it)
	s.ino = ino
	return &s, err
}

// ReadDir implements guest.FS. The names come in the order of the disk; what is damaged is told at the end.
func (f *FS) ReadDir(dir guest.Ino, from uint64) iter.Seq2[guest.Entry, error] {
	return func(yield func(guest.Entry, error) bool) {
		d, err := f.directory(dir)
		if err != nil {
			yield(guest.Entry{}, err)
			return
		}
		for s, err := range d.sets(f, uint32(min(from, maxDir))) {
			if err != nil && !bad(err) {
				yield(guest.Entry{}, err)
				return
			}
			if err != nil || s.dir() && f.child(dir, s) != nil {
				continue
			}
			if !yield(guest.Entry{Name: s.name, Ino: s.ino, Type: s.kind(), Next: uint64(s.next)}, nil) {
				return
			}
		}
		if d.bad != nil {
			yield(guest.Entry{}, fmt.Errorf("exfat: %w", d.bad))
		}
	}
}

// Lookup implements guest.FS. A name in the same case comes before one in another.
func (f *FS) Lookup(dir guest.Ino, name string) (guest.Ino, error) {
	d, err := f.directory(dir)
	if err != nil {
		return 0, err
	}
	want := f.upcase.fold(name)
	if want == nil {
		return 0, guest.ErrNotExist
	}
	var found *set
	for slot := range d.index.Find(cluster.Hash(want)) {
		for s, err := range d.sets(f, slot) {
			if err != nil {
				return 0, err
			}
			if s.name == name || found == nil && f.upcase.same(s.name, want) {
				found = s
			}
			break
		}
	}
	switch {
	case found == nil && d.bad != nil:
		return 0, fmt.Errorf("exfat: %q may be in what is not readable: %w", name, d.bad)
	case found == nil:
		return 0, guest.ErrNotExist
	case found.dir():
		err = f.child(dir, found)
	}
	return found.ino, err
}
