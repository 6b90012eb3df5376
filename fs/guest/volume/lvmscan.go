package volume

import "fmt"

// physical keeps a physical volume until its group is assembled.
func (s *scan) physical(f found) {
	pv, err := openPhysical(f.name, f.dev)
	if err != nil {
		s.warn(f.name, "%v", err)
		return
	}
	pv.depth = f.depth
	s.pvs = append(s.pvs, pv)
}

// groups assembles the volume groups whose physical volumes are all there; all of them when partial. It reports whether
// it found any.
func (s *scan) groups(partial bool) bool {
	groups, bad := newest(s.pvs)
	any := false
	for _, g := range groups {
		pv := map[string]device{}
		depth := 0
		for _, p := range s.pvs {
			switch {
			case !g.member(p.id):
			case pv[p.id] == nil:
				pv[p.id] = p.dev
				depth = max(depth, p.depth)
			default:
				s.warn(p.name, "has the id of another physical volume and is left out")
			}
		}
		if len(pv) < len(g.pvs) && !partial {
			continue
		}
		any = true
		s.pvs = without(s.pvs, g)
		s.group(g, pv, depth)
	}
	if partial {
		for _, err := range bad {
			s.warn("LVM2", "%v", err)
		}
	}
	return any
}

// newest finds the newest metadata of each group on all physical volumes.
func newest(pvs []*physical) (groups []*group, bad []error) {
	at := map[string]int{} // id => index into groups
	for _, pv := range pvs {
		texts, err := pv.texts()
		if err != nil {
			bad = append(bad, err)
		}
		for _, text := range texts {
			g, err := parseGroup(text)
			if err != nil {
				bad = append(bad, fmt.Errorf("%s: %w", pv.name, err))
				continue
			}
			i, ok := at[g.id]
			switch {
			case !ok:
				at[g.id] = len(groups)
				groups = append(groups, g)
			case g.seqno > groups[i].seqno:
				groups[i] = g
			}
		}
	}
	return groups, bad
}

func (g *group) member(id string) bool {
	for _, pv := range g.pvs {
		if pv.id == id {
			return true
		}
	}
	return false
}

func without(pvs []*physical, g *group) (left []*physical) {
	for _, pv := range pvs {
		if !g.member(pv.id) {
			left = append(left, pv)
		}
	}
	return left
}

// group shows the logical volumes of a group.
func (s *scan) group(g *group, pv map[string]device, depth int) {
	for _, p := range g.pvs {
		if pv[p.id] == nil {
			s.warn(g.name, "the physical volume %s (%s) is missing", p.name, p.id)
		}
	}
	b := &builder{group: g, pv: pv, opt: s.opt, built: map[string]result{}, pools: map[string]*thinPool{}, notes: map[string]string{},
		warn: func(format string, args ...any) { s.warn(g.name, format, args...) }}
	b.snapshots()
	for _, name := range g.order {
		lv := g.lvs[name]
		snapshot, ok := b.stores[name]
		if !ok && !lv.shown() {
			continue
		}
		f := found{name: clean(mapperName(g.name, name)), kind: KindLogical, detail: lv.detail(), depth: depth + 1}
		if ok {
			f.detail = "snapshot of " + snapshot.text("origin")
		}
		dev, err := b.device(name)
		if note := b.notes[name]; note != "" {
			f.detail += ", " + note
		}
		if err != nil {
			s.add(Volume{Name: f.name, Kind: f.kind, Detail: f.detail, Err: err})
			continue
		}
		f.dev = dev
		s.look(f)
	}
}

// left warns of parts that nothing was made of.
func (s *scan) left() {
	for _, pv := range s.pvs {
		if len(pv.meta) > 0 {
			continue // a physical volume of no group, or damage that was said
		}
		s.warn(pv.name, "a physical volume without a volume group")
	}
}
