package volume

import (
	"encoding/binary"
	"slices"
	"sort"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// snapshots finds the segments that make logical volumes snapshots of the older kind: those of hidden volumes, which name the origin and
// the volume that holds what was overwritten in it.
func (b *builder) snapshots() {
	b.stores, b.origins = map[string]segment{}, map[string]bool{}
	for _, name := range b.order {
		for _, s := range b.lvs[name].segments {
			switch s.kind {
			case "snapshot":
				b.stores[s.text("cow_store")] = s
				origin := s.text("origin")
				b.origins[origin] = b.origins[origin] || s.text("merging_store") != ""
			case "thin-pool":
				b.poolCount++
			}
		}
	}
}

// origin marks a device whose snapshots lie over it: its bytes are not its alone. One that is being merged with a snapshot
// is a mix of both.
func (b *builder) origin(name string, dev device) (device, error) {
	merging, ok := b.origins[name]
	switch {
	case merging:
		return nil, guest.Unsupported("LVM2: %s is being merged with a snapshot", name)
	case ok:
		return shared(dev), nil
	}
	return dev, nil
}

// maxExceptions is how many chunks of all snapshots of a group may differ from their origins: 16 bytes of memory each.
const maxExceptions = 8 << 20

// exceptions is a snapshot: its origin, but for the chunks that were overwritten there since.
type exceptions struct {
	origin, store device
	chunk         int64 // bytes
	old, now      []uint64
}

// snapshot opens a snapshot by its store. Numbers are little-endian; chunk 0 of the store is
//
//	0 "SnAp" | 4 valid 4 | 8 version 4 | 12 sectors of a chunk 4
//
// and from chunk 1 on a chunk of pairs (chunk of the origin 8, chunk of the store 8) is before as many chunks of data as it has
// pairs. A pair whose second is 0 ends the list.
func (b *builder) snapshot(s segment, store device) (device, error) {
	origin, err := b.device(s.text("origin"))
	if err != nil {
		return nil, err
	}
	h := make([]byte, 16)
	if err := guest.ReadFull(store, h, 0); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	chunk := int64(le.Uint32(h[12:])) * sectorSize
	switch {
	case string(h[:4]) != "SnAp" || le.Uint32(h[8:]) != 1:
		return nil, guest.Damaged("LVM2: a snapshot without its header")
	case le.Uint32(h[4:]) != 1:
		return nil, guest.Damaged("LVM2: a snapshot that is no longer valid: its store was full")
	case chunk < 4096 || chunk > 1<<20 || chunk&(chunk-1) != 0:
		return nil, guest.Damaged("LVM2: a snapshot in chunks of %d bytes", chunk)
	}
	e := &exceptions{origin: origin, store: store, chunk: chunk}
	if err := e.load(maxExceptions - b.exceptions); err != nil {
		return nil, err
	}
	b.exceptions += len(e.old)
	size := min(s.count*b.extent, origin.Size())
	return &mapped{layout: e, size: size, shared: true}, nil
}

// load reads the list of exceptions, at most so many.
func (e *exceptions) load(most int) error {
	type pair struct{ old, now uint64 }
	var all []pair
	perChunk := e.chunk / 16
	b := make([]byte, e.chunk)
	le := binary.LittleEndian
list:
	for at := int64(1); (at+1)*e.chunk <= e.store.Size(); at += perChunk + 1 {
		if err := guest.ReadFull(e.store, b, at*e.chunk); err != nil {
			return err
		}
		for i := range perChunk {
			p := pair{le.Uint64(b[16*i:]), le.Uint64(b[16*i+8:])}
			if p.now == 0 {
				break list
			}
			if p.now >= uint64(e.store.Size()/e.chunk) {
				return guest.Damaged("LVM2: a snapshot's chunk at %d of its store", p.now)
			}
			if len(all) == most {
				return guest.Unsupported("LVM2: snapshots with more than %d chunks", maxExceptions)
			}
			all = append(all, p)
		}
	}
	slices.SortFunc(all, func(a, b pair) int {
		if a.old < b.old {
			return -1
		}
		return 1
	})
	for _, p := range all {
		e.old, e.now = append(e.old, p.old), append(e.now, p.now)
	}
	return nil
}

func (e *exceptions) at(off, n int64) (place, error) {
	chunk, in := uint64(off/e.chunk), off%e.chunk
	i := sort.Search(len(e.old), func(i int) bool { return e.old[i] >= chunk })
	if i < len(e.old) && e.old[i] == chunk {
		return place{e.store, int64(e.now[i])*e.chunk + in, min(n, e.chunk-in)}, nil
	}
	until := e.origin.Size()
	if i < len(e.old) && e.old[i] < 1<<40 {
		until = min(until, int64(e.old[i])*e.chunk)
	}
	if off >= until {
		return place{}, guest.Damaged("LVM2: byte %d of a snapshot, past the end of its origin", off)
	}
	return place{e.origin, off, min(n, until-off)}, nil
}
