package xfs

import (
	"cmp"
	"slices"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// A mapChange maps blocks into a file, or takes them out of it: what the kernel does at the end of its replay when the log
// only announces it (XFSDS, File Block Mapping Intent: 32 bytes of owner, block, offset, length, flags). It happens to files that share
// blocks and were written to at the time of the crash.
type mapChange struct {
	ino uint64
	span
	flags uint32
}

// Flags of a change; measured (Linux 6.18).
const (
	mapIn        = 1
	mapOut       = 2
	mapKinds     = 0xff
	mapUnwritten = 1 << 30
	mapOthers    = 1<<31 | 1<<29 // attributes, real-time
)

// maxPatched is how many extents a file may have that is changed so.
const maxPatched = 1 << 18

// A patched file has other extents than its inode says.
type patched struct {
	spans []span
	added int64 // blocks more than the inode says
}

func parseMapChange(b []byte) mapChange {
	flags := le.Uint32(b[28:])
	return mapChange{ino: le.Uint64(b), flags: flags,
		span: span{block: le.Uint64(b[8:]), off: le.Uint64(b[16:]), n: uint64(le.Uint32(b[24:])), unwritten: flags&mapUnwritten != 0}}
}

// remap carries out a change of mapping on the extents that readers see.
func (fs *FS) remap(c mapChange) error {
	if c.flags&mapOthers != 0 || c.n > 1<<21 || c.off > 1<<54 {
		return guest.Unsupported("a change of mapping of inode %d", c.ino)
	}
	p, err := fs.patchable(c.ino)
	if err != nil {
		return err
	}
	switch c.flags & mapKinds {
	case mapIn:
		err = p.in(fs.sb, c.span)
	case mapOut:
		p.out(c.off, c.end())
	default:
		err = guest.Unsupported("a change of mapping of type %d", c.flags&mapKinds)
	}
	return err
}

// patchable gives a file's extents in memory.
func (fs *FS) patchable(ino uint64) (*patched, error) {
	if p := fs.log.patched[ino]; p != nil {
		return p, nil
	}
	n, err := fs.regular(guest.Ino(ino))
	if err != nil {
		return nil, err
	}
	p := &patched{}
	for s, err := range fs.spans(&n.data) {
		if err != nil {
			return nil, err
		}
		if p.spans = append(p.spans, s); len(p.spans) > maxPatched {
			return nil, guest.Unsupported("inode %d: more than %d extents", ino, maxPatched)
		}
	}
	fs.log.patched[ino] = p
	return p, nil
}

// in maps an extent into a hole.
func (p *patched) in(sb *super, s span) error {
	if err := s.valid(sb); err != nil {
		return err
	}
	i, _ := slices.BinarySearchFunc(p.spans, s.off, func(a span, off uint64) int { return cmp.Compare(a.end(), off+1) })
	if i < len(p.spans) && p.spans[i].off < s.end() {
		return guest.Damaged("blocks to be mapped where there are some")
	}
	p.spans = slices.Insert(p.spans, i, s)
	p.added += int64(s.n)
	return nil
}

// out takes out what lies between two blocks.
func (p *patched) out(from, to uint64) {
	var kept []span
	for _, s := range p.spans {
		if s.end() <= from || s.off >= to {
			kept = append(kept, s)
			continue
		}
		p.added -= int64(min(s.end(), to) - max(s.off, from))
		if s.off < from {
			left := s
			left.n = from - s.off
			kept = append(kept, left)
		}
		if s.end() > to {
			right := s
			right.off, right.block, right.n = to, s.block+to-s.off, s.end()-to
			kept = append(kept, right)
		}
	}
	p.spans = kept
}
