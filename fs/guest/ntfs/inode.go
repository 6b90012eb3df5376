package ntfs

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// inode is a file, parsed. It is shared and must not be changed.
type inode struct {
	number   int64
	sequence uint16
	links    uint16
	dir      bool
	std      standard
	attrs    []attr
	held     int64     // bytes of attributes that an attribute list has elsewhere
	names    []nameRef // where names are that an attribute list has elsewhere
}

// standard is $STANDARD_INFORMATION (NTFS doc); times in 100 ns since 1601.
type standard struct {
	born, modified, changed, read int64
	flags                         uint32
	security                      uint32 // id in $Secure, or 0
}

type nameRef struct {
	record int64
	id     uint16
}

const (
	maxList  = 256 << 10 // bytes of an attribute list, which is also what Windows allows
	maxAttrs = 1 << 14   // of a file
	maxHeld  = 4 << 20   // bytes of a file's attributes
)

// inode loads the file that a reference names; its sequence number is not looked at when it is 0.
func (f *FS) inode(ino guest.Ino) (*inode, error) {
	n, sequence := int64(ino&refMask), uint16(ino>>48)
	i, ok := f.inodes.Get(n)
	if !ok {
		var err error
		if i, err = f.load(n); err != nil {
			return nil, err
		}
		f.inodes.Put(n, i, i.cost(f.geo.record))
	}
	if sequence != 0 && sequence != i.sequence {
		return nil, guest.Damaged("record %d of the MFT has sequence number %d, and %d is asked for", n, i.sequence, sequence)
	}
	return i, nil
}

// cost is about the memory that an inode takes, bytes.
func (i *inode) cost(record int64) int64 {
	n := 256 + record + i.held + int64(len(i.names))*16
	for _, a := range i.attrs {
		n += 192 + int64(len(a.name)) + int64(len(a.parts))*64
	}
	return n
}

func (f *FS) load(n int64) (*inode, error) {
	r, err := f.record(n)
	if err != nil {
		return nil, err
	}
	if r.base() != 0 {
		return nil, guest.ErrNotExist
	}
	r = slices.Clone(r) // a piece is not kept for one record of it
	i := &inode{number: n, sequence: r.sequence(), links: le.Uint16(r[0x12:]), dir: le.Uint16(r[0x16:])&isDirectory != 0}
	if err := i.parse(r); err != nil {
		return nil, err
	}
	if list := i.find(attrList, ""); list != nil {
		if err := f.loadList(i, list, r); err != nil {
			return nil, err
		}
	}
	return i, i.standard()
}

// parse takes all attributes of the base record.
func (i *inode) parse(r record) error {
	var bad error
	err := r.attributes(func(h header) bool {
		if h[8] != 0 && len(h) >= 0x18 && le.Uint64(h[0x10:]) != 0 {
			return true // not the first part of what it belongs to: the list has it
		}
		var a attr
		if a, bad = h.parse(i.number, i.number); bad == nil {
			i.attrs = append(i.attrs, a)
		}
		return bad == nil
	})
	if err == nil {
		err = bad
	}
	if err != nil {
		return fmt.Errorf("record %d of the MFT: %w", i.number, err)
	}
	return nil
}

// find gives the attribute of that type and name, or nil.
func (i *inode) find(kind uint32, name string) *attr {
	for n := range i.attrs {
		if a := &i.attrs[n]; a.kind == kind && a.name == name {
			return a
		}
	}
	return nil
}

func (i *inode) standard() error {
	a := i.find(attrStandard, "")
	if a == nil || len(a.value) < 0x24 {
		return guest.Damaged("record %d of the MFT: no standard information", i.number)
	}
	time := func(off int) int64 { return int64(le.Uint64(a.value[off:])) }
	i.std = standard{born: time(0), modified: time(8), changed: time(16), read: time(24), flags: le.Uint32(a.value[32:])}
	if len(a.value) >= 0x48 { // NTFS 3.0 and later
		i.std.security = le.Uint32(a.value[0x34:])
	}
	return nil
}

// An entry of an attribute list (NTFS doc, "$ATTRIBUTE_LIST"):
//
//	0x00  type (4)   0x04  length (2)   0x06  length of the name (1)   0x07  its offset (1)
//	0x08  first cluster (8)   0x10  reference to the record (8)   0x18  id in it (2)
const listEntry = 0x1a

// loadList takes the attributes that the list of a file names. Of one in several parts it reads the first.
func (f *FS) loadList(i *inode, list *attr, own record) error {
	if list.size > maxList {
		return guest.Damaged("record %d of the MFT: an attribute list of %d bytes", i.number, list.size)
	}
	b := list.value
	if !list.resident {
		b = make([]byte, list.size)
		if err := f.stream(list).read(b, 0); err != nil {
			return err
		}
	}
	i.attrs = nil
	rest := further{}
	for len(b) >= listEntry {
		n := int(le.Uint16(b[4:]))
		if n < listEntry || n > len(b) {
			return guest.Damaged("record %d of the MFT: an entry of %d bytes in its attribute list", i.number, n)
		}
		if err := f.listed(i, b[:n], own, rest); err != nil {
			return err
		}
		b = b[n:]
	}
	if err := rest.attach(i.attrs); err != nil {
		return fmt.Errorf("record %d of the MFT: %w", i.number, err)
	}
	return nil
}

func (f *FS) listed(i *inode, e []byte, own record, rest further) error {
	kind, ref, id := le.Uint32(e), int64(le.Uint64(e[0x10:])&refMask), le.Uint16(e[0x18:])
	if kind == attrFileName {
		i.names = append(i.names, nameRef{ref, id})
		return nil
	}
	if le.Uint64(e[8:]) != 0 {
		return rest.add(e)
	}
	if len(i.attrs) >= maxAttrs || i.held > maxHeld {
		return guest.Damaged("record %d of the MFT: %d attributes of %d bytes", i.number, len(i.attrs), i.held)
	}
	var h header
	var err error
	if ref == i.number {
		h, err = own.attribute(kind, id)
	} else {
		h, err = f.attribute(i.number, ref, kind, id)
		i.held += int64(len(h))
	}
	if err != nil {
		return err
	}
	a, err := h.parse(i.number, ref)
	if err != nil {
		return fmt.Errorf("record %d of the MFT: %w", ref, err)
	}
	i.attrs = append(i.attrs, a)
	return nil
}

// further are the parts but the first of what an attribute list names, in whatever order it does so.
type further map[attrKey][]part

type attrKey struct {
	kind uint32
	name string
}

// add takes an entry of a list that is such a part.
func (f further) add(e []byte) error {
	n, off := 2*int(e[6]), int(e[7])
	if off+n > len(e) {
		return guest.Damaged("an attribute list with a name past the end of its entry")
	}
	key := attrKey{le.Uint32(e), text(e[off : off+n])}
	f[key] = append(f[key], part{low: int64(le.Uint64(e[8:])), high: -1, record: int64(le.Uint64(e[0x10:]) & refMask), id: le.Uint16(e[0x18:])})
	return nil
}

// attach gives the attributes their further parts, by their clusters. Parts of what has no first are damage.
func (f further) attach(attrs []attr) error {
	for n := range attrs {
		a := &attrs[n]
		key := attrKey{a.kind, a.name}
		parts := f[key]
		if len(parts) == 0 || a.resident {
			continue
		}
		delete(f, key)
		slices.SortFunc(parts, func(a, b part) int { return cmp.Compare(a.low, b.low) })
		for i, p := range parts {
			if p.low <= 0 || i > 0 && p.low == parts[i-1].low {
				return guest.Damaged("an attribute list with two parts from cluster %d on", p.low)
			}
		}
		a.parts = append(a.parts, parts...)
	}
	if len(f) > 0 {
		return guest.Damaged("an attribute list with parts of what is not there")
	}
	return nil
}

// attribute finds an attribute of a file in one of its records, of which it gives a copy.
func (f *FS) attribute(base, ref int64, kind uint32, id uint16) (header, error) {
	r, err := f.record(ref)
	if err != nil {
		return nil, guest.Damaged("record %d of the MFT, of file %d: %v", ref, base, err)
	}
	if ref != base && r.base() != base {
		return nil, guest.Damaged("record %d of the MFT does not belong to file %d", ref, base)
	}
	h, err := r.attribute(kind, id)
	if err != nil {
		return nil, fmt.Errorf("record %d of the MFT: %w", ref, err)
	}
	return slices.Clone(h), nil
}
