package btrfs

import (
	"errors"
	"slices"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// run replays the log: first what is gone and the inodes, then names that a directory's own part of the log has, then
// names that an inode's part has, attributes and extents. An earlier step makes room for the later ones.
func (d *draft) run() error {
	for _, step := range []func(key, []byte) error{d.first, d.second, d.third} {
		err := d.log.each(key{}, func(k key, b []byte) error {
			if d.ignored[k.id] {
				return nil
			}
			return step(k, b)
		})
		if err != nil {
			return err
		}
	}
	if err := errors.Join(d.countLinks(), d.countBytes(), d.growDirs()); err != nil {
		return err
	}
	var err error
	d.used = append(d.used, d.log.nodes(&err)...)
	return err
}

func (d *draft) first(k key, b []byte) error {
	if k.kind == kindInode {
		return d.inode(k, b)
	}
	return nil
}

func (d *draft) second(k key, b []byte) error {
	if k.kind == kindDirIndex {
		return d.dirIndex(k, b)
	}
	return nil
}

func (d *draft) third(k key, b []byte) error {
	switch k.kind {
	case kindXattr:
		return d.put(k, slices.Clone(b))
	case kindInodeRef, kindInodeExtref:
		return d.refs(k, b)
	case kindExtentData:
		return d.extent(k, b)
	case kindExtentCsum:
		if *d.room -= changeCost + int64(len(b)); *d.room < 0 {
			return guest.Unsupported("a large log")
		}
		size := d.base.fs.sb.csum.size
		d.csums = append(d.csums, logSum{k.off, slices.Clone(b[:len(b)-len(b)%size])})
	}
	return nil
}

// inode replays an inode. All of its attributes are in the log with it, and so is what names of a directory are gone.
func (d *draft) inode(k key, b []byte) error {
	n, err := parseInode(place{tree: d.log, ino: k.id}, b)
	if err != nil {
		return err
	}
	if le.Uint32(b[40:]) == 0 {
		d.ignored[k.id] = true // never had a name, or has lost the last
		return nil
	}
	d.links[k.id] = true
	if err := d.dropXattrs(k.id); err != nil {
		return err
	}
	if n.kind() == guest.ModeDir {
		if err := d.dropNames(k.id); err != nil {
			return err
		}
	}
	size, err := d.overwrite(k, slices.Clone(b), n)
	if err != nil || n.kind() == guest.ModeDir {
		return err
	}
	d.counted[k.id] = true
	if n.kind() != guest.ModeRegular {
		return nil
	}
	unit := uint64(d.base.fs.sb.sector)
	return d.cut(k.id, (uint64(size)+unit-1)/unit*unit, maxID)
}

// overwrite puts an inode in place of what is there, and gives the size that it has then. One that was logged only because a name leads to it
// has no generation, and tells nothing of what is there, except a size that an earlier fsync made durable.
func (d *draft) overwrite(k key, b []byte, n inode) (size int64, err error) {
	old, ok, err := d.get(k)
	if err != nil {
		return 0, err
	}
	if !ok {
		le.PutUint64(b[24:], 0)
		if n.kind() == guest.ModeDir {
			le.PutUint64(b[16:], 0) // grows with its names
		}
		return n.size, d.put(k, b)
	}
	was, err := parseInode(n.p, old)
	if err != nil {
		return 0, err
	}
	if le.Uint64(b) == 0 {
		if n.kind() != guest.ModeRegular || was.kind() != guest.ModeRegular || n.size == 0 {
			return was.size, nil
		}
		old = slices.Clone(old)
		le.PutUint64(old[16:], uint64(n.size))
		return n.size, d.put(k, old)
	}
	copy(b[24:32], old[24:32])
	if n.kind() == guest.ModeDir {
		copy(b[16:24], old[16:24])
	}
	return n.size, d.put(k, b)
}

// dropXattrs removes the attributes that the log does not have.
func (d *draft) dropXattrs(ino uint64) error {
	return d.each(ino, kindXattr, 0, func(k key, _ []byte) error {
		_, ok, err := d.log.get(k)
		if err != nil || ok {
			return err
		}
		return d.del(k)
	})
}

// dropNames removes the names of a directory that are in a range which the log has all of, and that the log does not have (BTRFS, On-disk
// Format, DIR_LOG_INDEX).
func (d *draft) dropNames(dir uint64) error {
	return d.log.each(key{dir, kindDirLogIndex, 0}, func(k key, b []byte) error {
		if k.id != dir || k.kind != kindDirLogIndex {
			return errStop
		}
		if len(b) < 8 {
			return guest.Damaged("a range of the log of directory %d", dir)
		}
		end := le.Uint64(b)
		return d.each(dir, kindDirIndex, k.off, func(k key, b []byte) error {
			if k.off > end {
				return errStop
			}
			e, _, err := parseEntry(b)
			if err != nil {
				return err
			}
			if now, ok, err := d.log.get(k); err != nil {
				return err
			} else if ok {
				l, _, err := parseEntry(now)
				if err != nil || string(l.name) == string(e.name) {
					return err
				}
			}
			return d.unlink(dir, k.off, e)
		})
	})
}

// extent replays an extent of a file: it takes the place of all that was in its range.
func (d *draft) extent(k key, b []byte) error {
	e, err := d.base.fs.parseExtent(k.off, b)
	if err != nil {
		return err
	}
	if e.kind != extentInline && e.kind != extentHole {
		d.used = append(d.used, extent.Extent{Off: int64(e.disk), Len: int64(e.len)})
		if *d.room -= changeCost; *d.room < 0 {
			return guest.Unsupported("a large log")
		}
	}
	d.counted[k.id] = true
	if err := d.cut(k.id, e.off, e.end); err != nil {
		return err
	}
	return d.put(k, slices.Clone(b))
}

// cut removes what a file has in a range, and shortens what reaches into it.
func (d *draft) cut(ino, from, to uint64) error {
	fs := d.base.fs
	start := from
	// The extent before may reach into the range.
	if k, ok, err := d.before(ino, from); err != nil {
		return err
	} else if ok {
		start = k
	}
	return d.each(ino, kindExtentData, start, func(k key, b []byte) error {
		if k.off >= to {
			return errStop
		}
		e, err := fs.parseExtent(k.off, b)
		if err != nil {
			return err
		}
		if e.end <= from {
			return nil
		}
		d.counted[ino] = true
		// An inline extent goes as a whole.
		if e.kind != extentInline && e.end > to {
			tail := slices.Clone(b)
			if e.kind != extentHole {
				le.PutUint64(tail[37:], e.in+to-e.off)
			}
			le.PutUint64(tail[45:], e.end-to)
			if err := d.put(key{ino, kindExtentData, to}, tail); err != nil {
				return err
			}
		}
		if e.kind == extentInline || e.off >= from {
			return d.del(k)
		}
		head := slices.Clone(b)
		le.PutUint64(head[45:], from-e.off)
		return d.put(k, head)
	})
}

// before gives where the last extent before off begins.
func (d *draft) before(ino, off uint64) (at uint64, ok bool, err error) {
	if off == 0 {
		return 0, false, nil
	}
	t := *d.base
	if c := d.changes[bucket{ino, kindExtentData}]; c != nil {
		c.sort()
		t.patch = c.list
	}
	k, _, ok, err := t.floor(key{ino, kindExtentData, off - 1})
	return k.off, ok && k.id == ino && k.kind == kindExtentData, err
}

// countBytes sets how many bytes the files have that changed.
func (d *draft) countBytes() error {
	for ino := range d.counted {
		n := uint64(0)
		err := d.each(ino, kindExtentData, 0, func(k key, b []byte) error {
			e, err := d.base.fs.parseExtent(k.off, b)
			switch {
			case err != nil:
				return err
			case e.kind == extentInline:
				n += e.ram
			case e.kind != extentHole:
				n += e.end - e.off
			}
			return nil
		})
		if err == nil {
			err = d.edit(ino, func(b []byte) { le.PutUint64(b[24:], n) })
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// growDirs sets the sizes of directories.
func (d *draft) growDirs() error {
	for dir, n := range d.grown {
		err := d.edit(dir, func(b []byte) { le.PutUint64(b[16:], uint64(max(0, int64(le.Uint64(b[16:]))+n))) })
		if err != nil {
			return err
		}
	}
	return nil
}

// edit changes an inode that is there.
func (d *draft) edit(ino uint64, fn func(b []byte)) error {
	k := key{ino, kindInode, 0}
	b, ok, err := d.get(k)
	if err != nil || !ok || len(b) < inodeSize {
		return err
	}
	b = slices.Clone(b)
	fn(b)
	return d.put(k, b)
}
