package btrfs

import (
	"slices"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// A draft is a subvolume while a log is replayed into it.
type draft struct {
	base, log *tree
	room      *int64 // bytes of memory left, of all drafts together
	changes   map[bucket]*changes

	ignored map[uint64]bool    // inodes of the log that had no name
	links   map[uint64]bool    // inodes whose links are to be counted
	counted map[uint64]bool    // inodes whose bytes are to be counted
	grown   map[uint64]int64   // directory => bytes that its size changes by
	pruned  map[[2]uint64]bool // inode and directory whose names that are gone have been removed
	csums   []logSum
	used    []extent.Extent
}

// A bucket is the items of one kind that an inode has.
type bucket struct {
	id   uint64
	kind uint8
}

type changes struct {
	at     map[uint64]int // offset of the key => place in list
	list   []change
	sorted bool
}

// changeCost is the memory of a change besides its bytes.
const changeCost = 200

func newDraft(base, log *tree, room *int64) *draft {
	return &draft{base: base, log: log, room: room, changes: map[bucket]*changes{}, ignored: map[uint64]bool{},
		links: map[uint64]bool{}, counted: map[uint64]bool{}, grown: map[uint64]int64{}, pruned: map[[2]uint64]bool{}}
}

// get gives an item as it is by now.
func (d *draft) get(k key) (b []byte, ok bool, err error) {
	if c := d.changes[bucket{k.id, k.kind}]; c != nil {
		if i, ok := c.at[k.off]; ok {
			return c.list[i].b, !c.list[i].gone, nil
		}
	}
	return d.base.get(k)
}

// put makes an item read as b, which the draft keeps.
func (d *draft) put(k key, b []byte) error { return d.change(change{key: k, b: b}) }

func (d *draft) del(k key) error { return d.change(change{key: k, gone: true}) }

func (d *draft) change(n change) error {
	if *d.room -= changeCost + int64(len(n.b)); *d.room < 0 {
		return guest.Unsupported("a large log")
	}
	at := bucket{n.key.id, n.key.kind}
	c := d.changes[at]
	if c == nil {
		c = &changes{at: map[uint64]int{}, sorted: true}
		d.changes[at] = c
	}
	if i, ok := c.at[n.key.off]; ok {
		c.list[i] = n
		return nil
	}
	c.sorted = c.sorted && (len(c.list) == 0 || c.list[len(c.list)-1].key.off < n.key.off)
	c.at[n.key.off] = len(c.list)
	c.list = append(c.list, n)
	return nil
}

func (c *changes) sort() {
	if c.sorted {
		return
	}
	c.list = slices.Clone(c.list) // somebody may be at the one before
	slices.SortFunc(c.list, func(a, b change) int { return a.key.compare(b.key) })
	for i := range c.list {
		c.at[c.list[i].key.off] = i
	}
	c.sorted = true
}

// each yields an inode's items of a kind. fn may change them, and what it adds is not yielded.
func (d *draft) each(id uint64, kind uint8, from uint64, fn func(k key, b []byte) error) error {
	t := *d.base
	if c := d.changes[bucket{id, kind}]; c != nil {
		c.sort()
		t.patch = c.list
	}
	return t.each(key{id, kind, from}, func(k key, b []byte) error {
		if k.id != id || k.kind != kind {
			return errStop
		}
		return fn(k, b)
	})
}

// seal gives the changes.
func (d *draft) seal() patch {
	var p patch
	for _, c := range d.changes {
		p = append(p, c.list...)
	}
	slices.SortFunc(p, func(a, b change) int { return a.key.compare(b.key) })
	return p
}
