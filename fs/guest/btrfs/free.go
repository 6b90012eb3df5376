package btrfs

import (
	"fmt"
	"iter"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// reserved are the bytes at the start of a device, and from each superblock on, that Btrfs keeps free of anything else
// (BTRFS, On-disk Format, Superblock; 64 KiB as "btrfs inspect-internal dump-tree" shows block groups to leave out).
const (
	reservedHead  = 1 << 20
	reservedSuper = 64 << 10
)

// Free implements guest.Freer. What the extent tree does not name is free, if for each block group that comes to as many bytes as its own
// item says.
func (fs *FS) Free() iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) {
		list, err := fs.free()
		if err != nil {
			yield(extent.Extent{}, fmt.Errorf("btrfs: the free space: %w", err))
			return
		}
		extent.All(list)(yield)
	}
}

// single gives the only device. Offsets say nothing where there are several.
func (fs *FS) single() (guest.Device, error) {
	if len(fs.vol.devs) == 1 && fs.sb.devices == 1 {
		for _, m := range fs.vol.devs {
			return m, nil
		}
	}
	return nil, guest.Unsupported("a file system on %d devices", fs.sb.devices)
}

func (fs *FS) free() ([]extent.Extent, error) {
	dev, err := fs.single()
	if err != nil {
		return nil, err
	}
	if fs.log.doubt != nil {
		return nil, fs.log.doubt
	}
	used, err := fs.used()
	if err != nil {
		return nil, err
	}
	var taken []extent.Extent
	for _, e := range used {
		if taken, err = fs.vol.onDevice(taken, e); err != nil {
			return nil, err
		}
	}
	taken = append(taken, extent.Extent{Len: reservedHead})
	for _, off := range superPlaces {
		taken = append(taken, extent.Extent{Off: off, Len: reservedSuper})
	}
	for _, c := range fs.vol.chunks {
		if c.columns == 1 && c.kind&(raid5|raid6) == 0 {
			continue
		}
		for _, s := range c.stripes { // all of it, and more
			taken = append(taken, extent.Extent{Off: s.off, Len: int64(c.length)})
		}
	}
	return gaps(extent.Normalise(taken), min(fs.sb.total, dev.Size())), nil
}

// gaps gives what is between ranges, up to size.
func gaps(taken []extent.Extent, size int64) []extent.Extent {
	var out []extent.Extent
	at := int64(0)
	for _, e := range append(taken, extent.Extent{Off: size}) {
		if end := min(e.Off, size); end > at {
			out = append(out, extent.Extent{Off: at, Len: end - at})
		}
		at = max(at, e.End())
	}
	return out
}

// onDevice appends where a range of logical addresses lies, in all copies.
func (v *volume) onDevice(dst []extent.Extent, e extent.Extent) ([]extent.Extent, error) {
	for e.Len > 0 {
		c, err := v.find(uint64(e.Off))
		if err != nil {
			return nil, err
		}
		off := uint64(e.Off) - c.logical
		n := min(e.Len, int64(c.length-off))
		if c.columns == 1 && c.kind&(raid5|raid6) == 0 {
			for _, s := range c.stripes {
				dst = append(dst, extent.Extent{Off: s.off + int64(off), Len: n})
			}
		}
		e.Off, e.Len = e.Off+n, e.Len-n
	}
	return dst, nil
}

// used gives the logical addresses that the extent tree and the log name.
func (fs *FS) used() ([]extent.Extent, error) {
	t, err := fs.tree(objectExtentTree)
	if err != nil {
		return nil, err
	}
	groups := map[uint64]int64{} // block group => bytes used, as its item says, less those found
	group := func(k key, b []byte) error {
		c, err := fs.vol.find(k.id)
		if err != nil || c.logical != k.id || c.length != k.off || len(b) < 8 {
			return guest.Damaged("the block group at %d", k.id)
		}
		groups[k.id] += int64(le.Uint64(b))
		return nil
	}
	var list []extent.Extent
	err = t.each(key{}, func(k key, b []byte) error {
		n := k.off
		switch k.kind {
		case kindBlockGroup:
			return group(k, b)
		case kindMetadata:
			n = uint64(fs.sb.node)
		case kindExtent:
		default:
			return nil
		}
		c, err := fs.vol.find(k.id)
		if err != nil || n > c.end()-k.id || len(list) > 0 && uint64(list[len(list)-1].End()) > k.id {
			return guest.Damaged("the extent at %d", k.id)
		}
		groups[c.logical] -= int64(n)
		list = append(list, extent.Extent{Off: int64(k.id), Len: int64(n)})
		return nil
	})
	if err == nil && fs.sb.compatRO&roGroupTree != 0 {
		if t, err = fs.tree(objectGroupTree); err == nil {
			err = t.each(key{}, func(k key, b []byte) error {
				if k.kind != kindBlockGroup {
					return nil
				}
				return group(k, b)
			})
		}
	}
	if err != nil {
		return nil, err
	}
	for at, n := range groups {
		if n != 0 {
			return nil, guest.Damaged("the block group at %d: %d bytes are missing", at, n)
		}
	}
	return append(list, fs.log.used...), nil
}

// Locate implements guest.Locator, for files that are written in place (nodatacow), as swap files are. What a snapshot or another file shares is left out, and so
// is what may be shared.
func (fs *FS) Locate(ino guest.Ino) iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) {
		list, err := fs.locate(ino)
		if err != nil {
			yield(extent.Extent{}, fmt.Errorf("btrfs: where inode %d lies: %w", ino, err))
			return
		}
		extent.All(list)(yield)
	}
}

func (fs *FS) locate(ino guest.Ino) ([]extent.Extent, error) {
	if _, err := fs.single(); err != nil {
		return nil, err
	}
	n, err := fs.inode(ino)
	if err != nil {
		return nil, err
	}
	if n.kind() != guest.ModeRegular || n.p.empty || n.flags&flagNoCow == 0 || fs.log.doubt != nil {
		return nil, guest.Unsupported("a file that is not written in place")
	}
	root, err := fs.rootOf(fs.roots.root, key{n.p.id, kindRoot, maxID})
	if err != nil {
		return nil, err
	}
	extents, err := fs.tree(objectExtentTree)
	if err != nil {
		return nil, err
	}
	var list []extent.Extent
	var bad error
	err = n.p.extents(func(e fileExtent) bool {
		// A snapshot shares the nodes, and the extents in them, without another reference to those.
		if e.kind != extentRegular && e.kind != extentUnwritten || e.comp != 0 || e.gen <= root.lastSnapshot {
			return true
		}
		var b []byte
		var ok bool
		if b, ok, bad = extents.get(key{e.disk, kindExtent, e.len}); ok && len(b) >= 8 && le.Uint64(b) == 1 {
			before := len(list)
			at := extent.Extent{Off: int64(e.disk + e.in), Len: int64(e.end - e.off)}
			if list, bad = fs.vol.onDevice(list, at); bad == nil && extent.Total(list[before:]) > at.Len {
				bad = guest.Unsupported("a file with several copies")
			}
		}
		return bad == nil
	})
	if err == nil {
		err = bad
	}
	return list, err
}
