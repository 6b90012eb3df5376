package volume

import (
	"fmt"
	"slices"
	"sort"
	"strings"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// arrays assembles all arrays of which a member was found. It reports whether there were any.
func (s *scan) arrays() bool {
	sets := map[string][]*member{}
	var order []string
	for _, m := range s.members {
		if sets[m.set] == nil {
			order = append(order, m.set)
		}
		sets[m.set] = append(sets[m.set], m)
	}
	s.members = nil
	for _, set := range order {
		s.array(sets[set])
	}
	return len(order) > 0
}

// array shows one array.
func (s *scan) array(members []*member) {
	// The newest superblock says what the array is.
	best := slices.MaxFunc(members, func(a, b *member) int {
		switch {
		case a.events < b.events:
			return -1
		case a.events > b.events:
			return 1
		}
		return 0
	})
	f := found{name: s.arrayName(best), kind: KindArray}
	legs, notes := s.legs(f.name, best, members)
	f.detail = best.levelName()
	missing := 0
	for _, l := range legs {
		if l.dev == nil {
			missing++
		}
	}
	if missing > 0 {
		f.detail += fmt.Sprintf(", degraded: %d of %d", len(legs)-missing, len(legs))
		if best.dirty && best.level >= 4 && best.level <= 6 {
			s.warn(f.name, "degraded, and not shut down in order: what was being written last may be wrong")
		}
	}
	for _, n := range notes {
		f.detail += ", " + n
	}
	for _, m := range members {
		f.depth = max(f.depth, m.depth+1)
	}
	dev, err := best.assemble(legs)
	if err != nil {
		s.add(Volume{Name: f.name, Kind: f.kind, Detail: f.detail, Err: err})
		s.leftovers(members)
		return
	}
	f.dev = dev
	s.look(f)
}

// leftovers goes into the partitions of disks with a superblock at their end, when no array comes of it: an earlier use of the
// disk may have left that, which no tool for partitions looks for.
func (s *scan) leftovers(members []*member) {
	for _, m := range members {
		carries := func(p partition) bool { return p.carries(m.dev) }
		if m.kind == KindDisk && m.minor <= 0 && slices.ContainsFunc(partitionsOf(m.dev), carries) {
			s.warn(m.name, "has the superblock of an array that is not complete, and a partition table; both are shown")
			s.table(found{name: m.name, kind: m.kind, dev: m.dev, depth: m.depth}, "")
		}
	}
}

// arrayName is the name that the array was given, without the host's before it; else md and its number.
func (s *scan) arrayName(m *member) string {
	name := m.array
	if _, after, ok := strings.Cut(name, ":"); ok {
		name = after
	}
	if m.number >= 0 {
		name = fmt.Sprint(m.number)
	}
	if name == "" {
		// As mdadm(8) and udev do for an array of no known number: from 127 downwards.
		for n := 127; ; n-- {
			if name = fmt.Sprint("md", n); !s.names[name] || n == 0 {
				return name
			}
		}
	}
	if strings.Trim(name, "0123456789") == "" {
		name = "md" + name
	}
	return clean(name)
}

func (m *member) levelName() string {
	if m.level == -1 {
		return "linear"
	}
	return fmt.Sprintf("RAID %d", m.level)
}

// leg is a place in an array.
type leg struct {
	dev  device // of the data; nil when it is missing
	good int64  // bytes from the start that are good, when it is being rebuilt
	bad  []extentRange
}

// has reports whether a range of a leg can be read.
func (l *leg) has(off, n int64) bool {
	if l.dev == nil || off+n > l.good {
		return false
	}
	for _, b := range l.bad {
		if off < b.off+b.n && b.off < off+n {
			return false
		}
	}
	return true
}

// legs puts members into their places. Those whose events lag behind missed writes and are left out, as md leaves them out: one event is what a
// crash between two superblocks makes.
func (s *scan) legs(name string, best *member, members []*member) ([]leg, []string) {
	legs := make([]leg, best.disks)
	var notes []string
	from := make([]*member, best.disks)
	for _, m := range members {
		switch {
		case m.role == roleJournal:
			notes = append(notes, "journal on "+m.name)
			continue
		case m.role < 0 || m.role >= best.disks:
			continue
		case m.events+1 < best.events, m.own < len(best.roles) && best.roles[m.own] < 0:
			s.warn(name, "%s is out of date and left out", m.name)
			continue
		}
		if old := from[m.role]; old != nil {
			if old.events > m.events || old.events == m.events && old.recovered < 0 {
				continue
			}
		}
		avail := min(m.avail, m.dev.Size()-m.start)
		data, err := section(m.dev, m.start, avail)
		if err != nil {
			s.warn(name, "%s: %v", m.name, err)
			continue
		}
		from[m.role] = m
		legs[m.role] = leg{dev: data, good: data.Size()}
		// Bad blocks are counted from the start of the device.
		for _, b := range m.bad {
			legs[m.role].bad = append(legs[m.role].bad, extentRange{b.off - m.start, b.n})
		}
		if m.recovered >= 0 {
			legs[m.role].good = min(m.recovered, data.Size())
		}
	}
	return legs, notes
}

// assemble makes the device of an array.
func (m *member) assemble(legs []leg) (device, error) {
	if m.reshaping {
		return nil, guest.Unsupported("md: an array that is being reshaped")
	}
	// An array of one half of its mirrors may have a member larger than the other.
	size := m.size
	for i := range legs {
		if m.level >= 1 && legs[i].dev != nil && legs[i].dev.Size() < size {
			return nil, guest.Damaged("md: a member with %d bytes instead of %d", legs[i].dev.Size(), size)
		}
	}
	switch m.level {
	case -1:
		return mdLinear(legs, m.chunk)
	case 0:
		return mdStripes(legs, m.chunk, m.layout)
	case 1:
		return newMirror(legs, size)
	case 4, 5, 6:
		level, algorithm := m.level, m.layout
		if level == 4 {
			level, algorithm = 5, parityLast
		}
		return newParity(legs, size, m.chunk, level, algorithm)
	case 10:
		return newRAID10(legs, size, m.chunk, m.layout)
	case -4, -5:
		return nil, guest.Unsupported("md: level %d", m.level)
	}
	return nil, guest.Unsupported("md: level %d", m.level)
}

func missingLeg(i int) error { return guest.Damaged("member %d is missing", i) }

// mdLinear is one member after the other, each rounded down to chunks.
func mdLinear(legs []leg, chunk int64) (device, error) {
	var parts []place
	for i, l := range legs {
		if l.dev == nil {
			return nil, missingLeg(i)
		}
		parts = append(parts, place{l.dev, 0, roundDown(l.dev.Size(), chunk)})
	}
	return concat(parts)
}

func roundDown(n, unit int64) int64 {
	if unit > 1 {
		n -= n % unit
	}
	return n
}

// mdZones is RAID 0 over members of unequal size: a zone of stripes over all, then one over those that have room left, and so on
// (md(4), RAID0).
type mdZones struct {
	zones    []mdZone
	chunk    int64
	original bool
}

type mdZone struct {
	start int64 // in the array, bytes
	at    int64 // in each member, bytes
	devs  []device
}

// The layouts of RAID 0, which differ in the member that the first chunk of a later zone is on (md(4), RAID0).
const (
	zonesOriginal  = 1
	zonesAlternate = 2
)

func mdStripes(legs []leg, chunk int64, layout int) (device, error) {
	if chunk <= 0 {
		return nil, guest.Damaged("md: chunks of %d bytes", chunk)
	}
	sizes := make([]int64, len(legs))
	for i, l := range legs {
		if l.dev == nil {
			return nil, missingLeg(i)
		}
		sizes[i] = roundDown(l.dev.Size(), chunk)
	}
	z := &mdZones{chunk: chunk, original: layout == zonesOriginal}
	size, at := int64(0), int64(0)
	for {
		var zone = mdZone{start: size, at: at}
		next := int64(0)
		for i, n := range sizes {
			if n > at {
				zone.devs = append(zone.devs, legs[i].dev)
				if next == 0 || n < next {
					next = n
				}
			}
		}
		if len(zone.devs) == 0 {
			break
		}
		z.zones = append(z.zones, zone)
		size += (next - at) * int64(len(zone.devs))
		at = next
	}
	if len(z.zones) > 1 && layout != zonesOriginal && layout != zonesAlternate {
		return nil, guest.Unsupported("md: RAID 0 over members of unequal size that does not say its layout")
	}
	return &mapped{layout: z, size: size}, nil
}

func (z *mdZones) at(off, n int64) (place, error) {
	i := sort.Search(len(z.zones), func(i int) bool { return z.zones[i].start > off }) - 1
	zone := z.zones[i]
	count := int64(len(zone.devs))
	nr, in := (off-zone.start)/z.chunk, off%z.chunk
	turn := nr
	if z.original {
		turn = off / z.chunk
	}
	return place{zone.devs[turn%count], zone.at + nr/count*z.chunk + in, min(n, z.chunk-in)}, nil
}

// mirror is RAID 1.
type mirror struct{ legs []leg }

func newMirror(legs []leg, size int64) (device, error) {
	for _, l := range legs {
		if l.dev != nil && l.good > 0 {
			return &mapped{layout: &mirror{legs}, size: size, shared: true}, nil
		}
	}
	return nil, guest.Damaged("no member of a mirror is there")
}

func (m *mirror) at(off, n int64) (place, error) {
	return firstGood(m.legs, func(yield func(int, int64) bool) {
		for i := range m.legs {
			if !yield(i, off) {
				return
			}
		}
	}, n)
}

// firstGood gives the first of several copies that can be read, as much of it as can be.
func firstGood(legs []leg, copies func(func(int, int64) bool), n int64) (p place, err error) {
	for ; n > 0; n /= 2 {
		for i, off := range copies {
			if legs[i].has(off, n) {
				return place{legs[i].dev, off, n}, nil
			}
		}
	}
	return place{}, guest.Damaged("no member has what was written here")
}
