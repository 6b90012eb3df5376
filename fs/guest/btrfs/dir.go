package btrfs

import (
	"errors"
	"iter"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// dirTypes are the kinds of a directory's entries, by number.
var dirTypes = [8]uint32{0, guest.ModeRegular, guest.ModeDir, guest.ModeChar, guest.ModeBlock, guest.ModeFIFO, guest.ModeSocket, guest.ModeLink}

// An entry is a name in a directory, or an extended attribute (BTRFS, On-disk Format, DIR_ITEM).
type entry struct {
	at         key
	kind       uint8
	name, data []byte
}

const entrySize = 30

// parseEntry reads the first entry of b and gives those behind it.
func parseEntry(b []byte) (e entry, rest []byte, err error) {
	if len(b) < entrySize {
		return e, nil, guest.Damaged("a directory's entry of %d bytes", len(b))
	}
	data, name := int(le.Uint16(b[25:])), int(le.Uint16(b[27:]))
	e = entry{at: parseKey(b), kind: b[29]}
	if b = b[entrySize:]; name+data > len(b) {
		return e, nil, guest.Damaged("a directory's entry with a name of %d bytes", name)
	}
	e.name, e.data = b[:name:name], b[name:name+data:name+data]
	return e, b[name+data:], nil
}

// entry finds a name in a directory. guest.ErrNotExist.
func (t *tree) entry(dir uint64, name string) (entry, error) {
	b, ok, err := t.get(key{dir, kindDirItem, nameHash(name)})
	for ok && err == nil && len(b) > 0 {
		var e entry
		if e, b, err = parseEntry(b); err == nil && string(e.name) == name {
			return e, nil
		}
	}
	if err == nil {
		err = guest.ErrNotExist
	}
	return entry{}, err
}

// target gives what an entry of a directory names.
func (p place) target(e entry) (guest.Ino, error) {
	switch e.at.kind {
	case kindInode:
		return pack(p.id, e.at.id)
	case kindRoot:
	default:
		return 0, guest.Damaged("directory %d: an entry of kind %d", p.ino, e.at.kind)
	}
	linked, err := p.links(e)
	if err != nil {
		return 0, err
	}
	if linked {
		return pack(e.at.id, objectFirst)
	}
	dir, err := pack(p.id, p.ino)
	return dir | inoEmpty, err
}

// links reports whether a subvolume is in the place that an entry gives it: a snapshot has the entries too, but not the subvolumes.
func (p place) links(e entry) (bool, error) {
	b, ok, err := p.fs.roots.root.get(key{p.id, kindRootRef, e.at.id})
	if err != nil || !ok {
		return false, err
	}
	if len(b) < 18 || int(le.Uint16(b[16:])) != len(b)-18 {
		return false, guest.Damaged("the reference of subvolume %d", e.at.id)
	}
	if le.Uint64(b) != p.ino || string(b[18:]) != string(e.name) {
		return false, nil
	}
	_, err = p.fs.subvolume(e.at.id)
	if errors.Is(err, guest.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// dir gives a directory that can be listed.
func (fs *FS) dir(ino guest.Ino) (place, error) {
	p, err := fs.place(ino)
	if err != nil || p.empty {
		return p, err
	}
	n, err := p.inode()
	if err == nil && n.kind() != guest.ModeDir {
		err = guest.ErrNotDir
	}
	return p, err
}

// Lookup implements guest.FS.
func (fs *FS) Lookup(dir guest.Ino, name string) (guest.Ino, error) {
	p, err := fs.dir(dir)
	if err != nil {
		return 0, err
	}
	if p.empty {
		return 0, guest.ErrNotExist
	}
	e, err := p.entry(p.ino, name)
	if err != nil {
		return 0, err
	}
	return p.target(e)
}

// ReadDir implements guest.FS. Entries are in the order in which they were made.
func (fs *FS) ReadDir(dir guest.Ino, from uint64) iter.Seq2[guest.Entry, error] {
	return func(yield func(guest.Entry, error) bool) {
		p, err := fs.dir(dir)
		if err != nil {
			yield(guest.Entry{}, err)
			return
		}
		if p.empty {
			return
		}
		var bad error
		stopped := false
		err = p.walk(key{p.ino, kindDirIndex, from}, func(k key, b []byte) bool {
			if k.id != p.ino || k.kind != kindDirIndex {
				return false
			}
			var e entry
			var ino guest.Ino
			if e, _, bad = parseEntry(b); bad == nil {
				ino, bad = p.target(e)
			}
			if bad != nil || k.off == maxID {
				return false
			}
			stopped = !yield(guest.Entry{Name: string(e.name), Ino: ino, Type: dirTypes[e.kind&7], Next: k.off + 1}, nil)
			return !stopped
		})
		if err = errors.Join(err, bad); err != nil && !stopped {
			yield(guest.Entry{}, err)
		}
	}
}
