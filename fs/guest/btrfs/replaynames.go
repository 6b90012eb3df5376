package btrfs

import (
	"hash/crc32"
	"slices"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// A ref is a name of an inode, as the inode has it (BTRFS, On-disk Format, INODE_REF and INODE_EXTREF).
type ref struct {
	dir, index uint64
	name       string
}

// parseRefs reads the item of names k.
func parseRefs(k key, b []byte) ([]ref, error) {
	var list []ref
	head := 10
	if k.kind == kindInodeExtref {
		head = 18
	}
	for len(b) > 0 {
		if len(b) < head || len(b) < head+int(le.Uint16(b[head-2:])) {
			return nil, guest.Damaged("the names of inode %d", k.id)
		}
		r := ref{dir: k.off}
		if k.kind == kindInodeExtref {
			r.dir = le.Uint64(b)
		}
		end := head + int(le.Uint16(b[head-2:]))
		r.index, r.name = le.Uint64(b[head-10:]), string(b[head:end])
		list, b = append(list, r), b[end:]
	}
	return list, nil
}

func (r ref) append(b []byte, kind uint8) []byte {
	if kind == kindInodeExtref {
		b = le.AppendUint64(b, r.dir)
	}
	b = le.AppendUint16(le.AppendUint64(b, r.index), uint16(len(r.name)))
	return append(b, r.name...)
}

// refKeys are the items that may have a name of an inode. The second is by the CRC-32C of the name, begun with the directory and not inverted.
func refKeys(ino, dir uint64, name string) [2]key {
	return [2]key{{ino, kindInodeRef, dir}, {ino, kindInodeExtref, uint64(^crc32.Update(^uint32(dir), castagnoli, []byte(name)))}}
}

// findRef looks a name of an inode up.
func findRef(get func(key) ([]byte, bool, error), ino, dir uint64, name string) (ref, bool, error) {
	for _, k := range refKeys(ino, dir, name) {
		b, ok, err := get(k)
		if err != nil {
			return ref{}, false, err
		}
		if !ok {
			continue
		}
		list, err := parseRefs(k, b)
		if err != nil {
			return ref{}, false, err
		}
		for _, r := range list {
			if r.dir == dir && r.name == name {
				return r, true, nil
			}
		}
	}
	return ref{}, false, nil
}

// dropRef removes a name from an inode.
func (d *draft) dropRef(ino, dir uint64, name string) error {
	for _, k := range refKeys(ino, dir, name) {
		b, ok, err := d.get(k)
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		list, err := parseRefs(k, b)
		if err != nil {
			return err
		}
		rest := slices.DeleteFunc(slices.Clone(list), func(r ref) bool { return r.dir == dir && r.name == name })
		if len(rest) == len(list) {
			continue
		}
		if len(rest) == 0 {
			return d.del(k)
		}
		var out []byte
		for _, r := range rest {
			out = r.append(out, k.kind)
		}
		return d.put(k, out)
	}
	return nil
}

// maxRefs is how many bytes of names an item grows to, about; further names have items of their own.
const maxRefs = 3000

// addRef adds a name to an inode.
func (d *draft) addRef(ino uint64, r ref) error {
	keys := refKeys(ino, r.dir, r.name)
	k := keys[0]
	b, _, err := d.get(k)
	if len(b) > maxRefs {
		k = keys[1]
		b, _, err = d.get(k)
	}
	if err != nil {
		return err
	}
	return d.put(k, r.append(slices.Clone(b), k.kind))
}

// find looks a name of a directory up.
func (d *draft) find(dir uint64, name string) (e entry, ok bool, err error) {
	b, ok, err := d.get(key{dir, kindDirItem, nameHash(name)})
	for ok && err == nil && len(b) > 0 {
		if e, b, err = parseEntry(b); err == nil && string(e.name) == name {
			return e, true, nil
		}
	}
	return entry{}, false, err
}

func (d *draft) exists(ino uint64) (b []byte, ok bool, err error) {
	return d.get(key{ino, kindInode, 0})
}

// unlink removes a name of a directory, and from the inode that has it.
func (d *draft) unlink(dir, index uint64, e entry) error {
	k := key{dir, kindDirItem, nameHash(string(e.name))}
	b, ok, err := d.get(k)
	if err != nil {
		return err
	}
	var out []byte
	for ok && len(b) > 0 {
		at := b
		var other entry
		if other, b, err = parseEntry(b); err != nil {
			return err
		}
		if string(other.name) != string(e.name) {
			out = append(out, at[:len(at)-len(b)]...)
		}
	}
	switch {
	case len(out) > 0:
		err = d.put(k, out)
	case ok:
		err = d.del(k)
	}
	if err != nil {
		return err
	}
	if err := d.del(key{dir, kindDirIndex, index}); err != nil {
		return err
	}
	d.grown[dir] -= 2 * int64(len(e.name))
	if e.at.kind != kindInode {
		return nil
	}
	d.links[e.at.id] = true
	return d.dropRef(e.at.id, dir, string(e.name))
}

// unlinkName removes a name of a directory, of which the inode tells the place.
func (d *draft) unlinkName(dir uint64, e entry) error {
	r, ok, err := findRef(d.get, e.at.id, dir, string(e.name))
	if err != nil {
		return err
	}
	if !ok {
		return guest.Damaged("inode %d does not have its name in directory %d", e.at.id, dir)
	}
	return d.unlink(dir, r.index, e)
}

// link adds a name to a directory, and to the inode that has it.
func (d *draft) link(dir, index uint64, e entry) error {
	var b []byte
	b = append(le.AppendUint64(b, e.at.id), e.at.kind)
	b = le.AppendUint64(le.AppendUint64(b, e.at.off), 0)
	b = append(le.AppendUint16(le.AppendUint16(b, 0), uint16(len(e.name))), e.kind)
	b = append(b, e.name...)
	k := key{dir, kindDirItem, nameHash(string(e.name))}
	item, _, err := d.get(k)
	if err != nil {
		return err
	}
	if err := d.put(k, append(slices.Clone(item), b...)); err != nil {
		return err
	}
	if err := d.put(key{dir, kindDirIndex, index}, b); err != nil {
		return err
	}
	d.grown[dir] += 2 * int64(len(e.name))
	d.links[e.at.id] = true
	return d.addRef(e.at.id, ref{dir, index, string(e.name)})
}

// makeRoom removes what is where a name is to be added: the same name, and another in its place. there is that nothing is to be added.
func (d *draft) makeRoom(dir, index uint64, e entry) (there bool, err error) {
	old, ok, err := d.find(dir, string(e.name))
	if err != nil {
		return false, err
	}
	b, placed, err := d.get(key{dir, kindDirIndex, index})
	if err != nil {
		return false, err
	}
	var at entry
	if placed {
		if at, _, err = parseEntry(b); err != nil {
			return false, err
		}
	}
	same := placed && string(at.name) == string(e.name) && at.at == e.at
	if ok && same && old.at == e.at {
		return true, nil
	}
	if placed && !same {
		if err := d.unlink(dir, index, at); err != nil {
			return false, err
		}
		if ok && string(at.name) == string(e.name) {
			ok = false
		}
	}
	if ok {
		return false, d.unlinkName(dir, old)
	}
	return false, nil
}

// dirIndex replays a name that a directory's part of the log has. Where the inode's part has it too, that comes later.
func (d *draft) dirIndex(k key, b []byte) error {
	e, _, err := parseEntry(b)
	if err != nil || e.at.kind != kindInode || d.ignored[e.at.id] {
		return err
	}
	if _, ok, err := d.exists(k.id); err != nil || !ok {
		return err
	}
	there, err := d.makeRoom(k.id, k.off, e)
	if err != nil || there {
		return err
	}
	if _, ok, err := findRef(d.log.get, e.at.id, k.id, string(e.name)); err != nil || ok {
		return err
	}
	if _, ok, err := d.exists(e.at.id); err != nil || !ok {
		return err
	}
	return d.link(k.id, k.off, e)
}

// refs replays the names that an inode has in a directory.
func (d *draft) refs(k key, b []byte) error {
	list, err := parseRefs(k, b)
	if err != nil {
		return err
	}
	item, ok, err := d.exists(k.id)
	if err != nil || !ok || len(item) < inodeSize {
		return err
	}
	mode := le.Uint32(item[52:]) & guest.ModeType
	for _, r := range list {
		if _, ok, err := d.exists(r.dir); err != nil || !ok {
			if err != nil {
				return err
			}
			continue
		}
		if err := d.dropOldRefs(k.id, r.dir); err != nil {
			return err
		}
		e := entry{at: key{k.id, kindInode, 0}, kind: uint8(max(0, slices.Index(dirTypes[:], mode))), name: []byte(r.name)}
		if k.id == r.dir {
			continue // ".." of the top
		}
		there, err := d.makeRoom(r.dir, r.index, e)
		if err == nil && !there {
			err = d.link(r.dir, r.index, e)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// dropOldRefs removes the names of an inode in a directory that the log does not have. Once is enough.
func (d *draft) dropOldRefs(ino, dir uint64) error {
	if d.pruned[[2]uint64{ino, dir}] {
		return nil
	}
	d.pruned[[2]uint64{ino, dir}] = true
	var old []ref
	for _, kind := range []uint8{kindInodeRef, kindInodeExtref} {
		err := d.each(ino, kind, 0, func(k key, b []byte) error {
			list, err := parseRefs(k, b)
			for _, r := range list {
				if r.dir == dir && ino != dir {
					old = append(old, r)
				}
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	for _, r := range old {
		_, ok, err := findRef(d.log.get, ino, dir, r.name)
		if err != nil {
			return err
		}
		if ok {
			continue
		}
		if err := d.unlink(dir, r.index, entry{at: key{ino, kindInode, 0}, name: []byte(r.name)}); err != nil {
			return err
		}
	}
	return nil
}

// countLinks sets how many names the inodes have that won or lost some. One without a name is gone, and a directory's names with it.
func (d *draft) countLinks() error {
	for len(d.links) > 0 {
		for ino := range d.links {
			delete(d.links, ino)
			if err := d.countLinksOf(ino); err != nil {
				return err
			}
		}
	}
	return nil
}

func (d *draft) countLinksOf(ino uint64) error {
	b, ok, err := d.exists(ino)
	if err != nil || !ok || len(b) < inodeSize {
		return err
	}
	n := 0
	for _, kind := range []uint8{kindInodeRef, kindInodeExtref} {
		err := d.each(ino, kind, 0, func(k key, b []byte) error {
			list, err := parseRefs(k, b)
			n += len(list)
			return err
		})
		if err != nil {
			return err
		}
	}
	if n > 0 {
		if le.Uint32(b[40:]) == uint32(n) {
			return nil
		}
		return d.edit(ino, func(b []byte) { le.PutUint32(b[40:], uint32(n)) })
	}
	if le.Uint32(b[52:])&guest.ModeType == guest.ModeDir {
		err := d.each(ino, kindDirIndex, 0, func(k key, b []byte) error {
			e, _, err := parseEntry(b)
			if err == nil {
				err = d.unlink(ino, k.off, e)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return d.del(key{ino, kindInode, 0})
}
