package volume

import (
	"fmt"
	"strings"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

const sectorSize = 512 // what LVM2, md and device-mapper count in, bytes

// group is a volume group, as its newest metadata has it.
type group struct {
	name, id string
	seqno    int64
	extent   int64 // bytes
	pvs      map[string]groupPV
	lvs      map[string]*logical
	order    []string // of lvs
}

type groupPV struct {
	name, id string
	start    int64 // of its first extent, bytes
	count    int64 // extents
}

// logical is a logical volume.
type logical struct {
	name, id string
	visible  bool
	status   *textNode
	segments []segment
}

// segment is a run of extents of a logical volume that are mapped alike.
type segment struct {
	start, count int64 // extents
	kind         string
	*textNode
}

// The bounds of what a group may say.
const (
	maxExtents  = 1 << 32
	maxSegments = 1 << 16
)

// parseGroup reads the text of a metadata area: one section with the group's name, and numbers about the text itself.
func parseGroup(text []byte) (*group, error) {
	root, err := parseText(text)
	if err != nil {
		return nil, err
	}
	for _, name := range root.names {
		t := root.section(name)
		if t == nil {
			continue
		}
		size := t.number("extent_size", 0)
		if size <= 0 || size > 1<<32 {
			return nil, guest.Damaged("LVM2: extents of %d sectors", size)
		}
		g := &group{name: name, id: plainID(t.text("id")), seqno: t.number("seqno", 0), extent: size * sectorSize,
			pvs: map[string]groupPV{}, lvs: map[string]*logical{}}
		if err := g.readPVs(t.section("physical_volumes")); err != nil {
			return nil, err
		}
		return g, g.readLVs(t.section("logical_volumes"))
	}
	return nil, guest.Damaged("LVM2: a text without a volume group")
}

// plainID is an id without the dashes that the text has.
func plainID(id string) string { return strings.ReplaceAll(id, "-", "") }

func (g *group) readPVs(t *textNode) error {
	if t == nil {
		return nil
	}
	for _, name := range t.names {
		pv := t.section(name)
		if pv == nil {
			continue
		}
		start, count := pv.number("pe_start", 0), pv.number("pe_count", 0)
		if start < 0 || start > 1<<50 || count < 0 || count > maxExtents {
			return guest.Damaged("LVM2: %d extents from sector %d of %s", count, start, name)
		}
		g.pvs[name] = groupPV{name, plainID(pv.text("id")), start * sectorSize, count}
	}
	return nil
}

func (g *group) readLVs(t *textNode) error {
	if t == nil {
		return nil
	}
	for _, name := range t.names {
		lv := t.section(name)
		if lv == nil {
			continue
		}
		l := &logical{name: name, id: lv.text("id"), visible: lv.has("status", "VISIBLE"), status: lv}
		count := lv.number("segment_count", 0)
		if count < 0 || count > maxSegments {
			return guest.Damaged("LVM2: %d segments of %s", count, name)
		}
		for i := range count {
			s := lv.section(fmt.Sprintf("segment%d", i+1))
			if s == nil {
				return guest.Damaged("LVM2: %s without segment %d", name, i+1)
			}
			seg := segment{s.number("start_extent", -1), s.number("extent_count", 0), s.text("type"), s}
			// A type may carry flags behind a +, as raid5+RESHAPE.
			if seg.start < 0 || seg.count <= 0 || seg.start > maxExtents || seg.count > maxExtents {
				return guest.Damaged("LVM2: segment %d of %s: %d extents from %d on", i+1, name, seg.count, seg.start)
			}
			l.segments = append(l.segments, seg)
		}
		g.lvs[name] = l
		g.order = append(g.order, name)
	}
	return nil
}

// shown reports whether a logical volume is one that a user knows: visible, and no pool.
func (l *logical) shown() bool {
	if !l.visible || len(l.segments) == 0 {
		return false
	}
	switch l.segments[0].kind {
	case "thin-pool", "cache-pool", "vdo-pool", "snapshot":
		return false
	}
	return true
}

// detail describes the segments, for people.
func (l *logical) detail() string {
	var kinds []string
	seen := map[string]bool{}
	for _, s := range l.segments {
		kind := s.kind
		if kind == "striped" && len(s.list("stripes")) == 2 {
			kind = "linear"
		}
		if !seen[kind] {
			seen[kind] = true
			kinds = append(kinds, kind)
		}
	}
	out := strings.Join(kinds, ", ")
	if len(l.segments) > 1 {
		out += fmt.Sprintf(", %d segments", len(l.segments))
	}
	return out
}

// mapperName is the name of a logical volume below /dev/mapper: dashes of the names are doubled.
func mapperName(vg, lv string) string {
	return strings.ReplaceAll(vg, "-", "--") + "-" + strings.ReplaceAll(lv, "-", "--")
}
