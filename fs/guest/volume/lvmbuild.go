package volume

import (
	"fmt"
	"strings"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// builder makes devices of a group's logical volumes.
type builder struct {
	*group
	pv    map[string]device // id => device; those that are there
	opt   Options
	built map[string]result    // name of a logical volume => what became of it; nil device and error while it is made
	pools map[string]*thinPool // name of a pool => it
	warn  func(format string, args ...any)
	notes map[string]string // name of a logical volume => something to add to its detail

	stores     map[string]segment // store of a snapshot => the segment that says so
	origins    map[string]bool    // origin of snapshots => one is being merged
	poolCount  int                // thin pools
	exceptions int                // of all snapshots
	depth      int                // of volumes in volumes, while one is made
}

// maxNesting is how deep volumes may be in each other; a thin volume in a cached pool of RAID is five deep.
const maxNesting = 16

type result struct {
	dev device
	err error
}

// device makes the device of a logical volume, once.
func (b *builder) device(name string) (device, error) {
	if r, ok := b.built[name]; ok {
		if r.dev == nil && r.err == nil {
			return nil, guest.Damaged("LVM2: %s is made of itself", name)
		}
		return r.dev, r.err
	}
	lv := b.lvs[name]
	if lv == nil {
		return nil, guest.Damaged("LVM2: no logical volume %q", name)
	}
	b.depth++
	defer func() { b.depth-- }()
	if b.depth > maxNesting {
		return nil, guest.Damaged("LVM2: more than %d volumes in each other", maxNesting)
	}
	b.built[name] = result{}
	dev, err := b.assemble(lv)
	if err == nil {
		if s, ok := b.stores[name]; ok {
			dev, err = b.snapshot(s, dev)
		} else {
			dev, err = b.origin(name, dev)
		}
	}
	if err != nil {
		dev = nil
	}
	b.built[name] = result{dev, err}
	return dev, err
}

// assemble puts the segments of a logical volume in a row.
func (b *builder) assemble(lv *logical) (device, error) {
	if len(lv.segments) == 0 {
		return nil, guest.Damaged("LVM2: %s has no segments", lv.name)
	}
	var parts []place
	at := int64(0)
	for _, s := range lv.segments {
		if s.start != at {
			return nil, guest.Damaged("LVM2: %s has a segment at extent %d, not at %d", lv.name, s.start, at)
		}
		at += s.count
		dev, err := b.segment(lv, s)
		if err != nil {
			return nil, err
		}
		size := s.count * b.extent
		if dev != nil && dev.Size() < size {
			return nil, guest.Damaged("LVM2: a segment of %s with %d bytes instead of %d", lv.name, dev.Size(), size)
		}
		parts = append(parts, place{dev, 0, size})
	}
	if len(parts) == 1 && parts[0].dev != nil && parts[0].dev.Size() == parts[0].n {
		return parts[0].dev, nil
	}
	return concat(parts)
}

// segment makes the device of one segment; nil for zeros.
func (b *builder) segment(lv *logical, s segment) (device, error) {
	kind, flags, _ := strings.Cut(s.kind, "+")
	if strings.Contains(flags, "RESHAPE") {
		return nil, guest.Unsupported("LVM2: %s is being reshaped", lv.name)
	}
	switch {
	case kind == "striped" || kind == "linear":
		return b.stripes(s)
	case kind == "mirror":
		return b.mirror(s)
	case kind == "thin":
		return b.thin(lv, s)
	case kind == "cache":
		return b.cached(lv, s)
	case kind == "zero":
		return nil, nil
	case kind == "error":
		return nil, guest.Damaged("LVM2: %s has a segment that is an error", lv.name)
	case strings.HasPrefix(kind, "raid"):
		return b.raid(lv, s, kind)
	}
	return nil, guest.Unsupported("LVM2: a segment of type %s", s.kind)
}

// area is a list's pair of name and extent: a place on a physical volume, or in another logical volume.
func (b *builder) area(list []any, i int, extents int64) (place, error) {
	name, ok := list[2*i].(string)
	start, ok2 := list[2*i+1].(int64)
	if !ok || !ok2 || start < 0 || start > maxExtents {
		return place{}, guest.Damaged("LVM2: an area that is %v %v", list[2*i], list[2*i+1])
	}
	n := extents * b.extent
	pv, ok := b.pvs[name]
	if !ok {
		dev, err := b.device(name)
		return place{dev, start * b.extent, n}, err
	}
	if start+extents > pv.count {
		return place{}, guest.Damaged("LVM2: extents %d+%d of %s, which has %d", start, extents, name, pv.count)
	}
	dev := b.pv[pv.id]
	if dev == nil {
		return place{}, guest.Damaged("LVM2: the physical volume %s (%s) is missing", name, pv.id)
	}
	return place{dev, pv.start + start*b.extent, n}, nil
}

func (b *builder) stripes(s segment) (device, error) {
	list := s.list("stripes")
	count := int64(len(list) / 2)
	if count == 0 || len(list)%2 != 0 || s.count%count != 0 || s.number("stripe_count", count) != count {
		return nil, guest.Damaged("LVM2: %d extents in %d stripes", s.count, count)
	}
	var parts []place
	for i := range int(count) {
		p, err := b.area(list, i, s.count/count)
		if err != nil {
			return nil, err
		}
		parts = append(parts, p)
	}
	if count == 1 {
		return concat(parts)
	}
	chunk := s.number("stripe_size", 0) * sectorSize
	if chunk <= 0 || b.extent*(s.count/count)%chunk != 0 {
		return nil, guest.Damaged("LVM2: stripes of %d bytes", chunk)
	}
	return striped(parts, chunk)
}

// mirror reads the first leg that is there: the older kind of mirror copies from the first to the others.
func (b *builder) mirror(s segment) (device, error) {
	list := s.list("mirrors")
	if len(list) < 2 || len(list)%2 != 0 {
		return nil, guest.Damaged("LVM2: a mirror without legs")
	}
	p, err := b.area(list, 0, s.count)
	if err != nil {
		return nil, fmt.Errorf("the first leg of a mirror: %w", err)
	}
	dev, err := section(p.dev, p.off, p.n)
	if err != nil {
		return nil, err
	}
	return shared(dev), nil
}

// shared is a device whose bytes are not at one place each.
func shared(dev device) device {
	return &mapped{layout: &linear{parts: []place{{dev, 0, dev.Size()}}, starts: []int64{0}}, size: dev.Size(), shared: true}
}

// cached is a volume with a cache before it. One that writes through holds nothing of its own.
func (b *builder) cached(lv *logical, s segment) (device, error) {
	mode := s.text("cache_mode")
	if pool := b.lvs[s.text("cache_pool")]; pool != nil && len(pool.segments) > 0 {
		if m := pool.segments[0].text("cache_mode"); m != "" && mode == "" {
			mode = m
		}
	}
	if mode != "writethrough" && mode != "passthrough" {
		return nil, guest.Unsupported("LVM2: %s has a cache (%s) that may hold what its origin lacks", lv.name, mode)
	}
	b.notes[lv.name] = mode + " cache left out"
	return b.device(s.text("origin"))
}
