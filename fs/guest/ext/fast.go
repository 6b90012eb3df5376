package ext

import (
	"bytes"
	"errors"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// Fast commits follow the ring: records of a tag (16 bits), a length (16 bits) and a value, all in little-endian order (ext4 doc,
// Fast commits; the values' layout is what Linux 6.18 was seen to write). None crosses a block.
//
//	head    features (32 bits), number of the transaction that they follow (32): first of all
//	range   inode (32), extent (12 bytes, as in an extent tree): those blocks are there now
//	hole    inode (32), first block (32), blocks (32): those blocks are gone
//	create, link, unlink
//	        directory (32), inode (32), name
//	inode   inode (32), the inode as in its table, of which i_block does not count if it has extents
//	tail    transaction (32), CRC-32C (32) of all records since the tail before, this one up to here
const (
	fastRange  = 1
	fastHole   = 2
	fastCreate = 3
	fastLink   = 4
	fastUnlink = 5
	fastInode  = 6
	fastPad    = 7
	fastTail   = 8
	fastHead   = 9
)

// A record is one of a fast commit.
type record struct {
	tag   uint16
	value []byte
}

// replayFast shows what fast commits behind transaction end change. Names, inodes and extents are kept beside those on the disk, and bitmaps
// stay as they are.
func (j *journal) replayFast(end uint32, room int64) error {
	c := &fastCommits{f: j.f, room: room, inodes: map[uint32]*changedInode{}, dirs: map[uint32]*changedDir{}}
	applied := false
	err := j.fastCommits(end, room, func(list []record) error {
		if !applied {
			applied, j.f.fast, j.f.info.Replayed = true, c, true
			j.f.doubt("fast commits were replayed")
		}
		for _, r := range list {
			if err := c.apply(r); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil && applied {
		j.f.warn("a fast commit in the journal cannot be replayed, so what is shown may not be consistent: %v", err)
		return nil
	}
	return err
}

// fastCommits calls fn for the records of each fast commit that is whole.
func (j *journal) fastCommits(end uint32, room int64, fn func([]record) error) error {
	first := j.end + 1
	if (j.maxlen-first)*j.f.blockSize > room {
		return guest.Unsupported("more fast commits than fit into memory")
	}
	var list []record
	sum := uint32(0)
	for n := first; n < j.maxlen; n++ {
		b := make([]byte, j.f.blockSize)
		if err := j.read(n, b); err != nil {
			return err
		}
		for at := 0; at+4 <= len(b); {
			r, size := parseRecord(b[at:])
			if size == 0 || n == first && at == 0 && !r.follows(end) {
				return nil
			}
			if r.tag == fastTail {
				if sum = crc32c(sum, b[at:at+8]); sum != le.Uint32(r.value[4:]) || le.Uint32(r.value) != end {
					return nil
				}
				if err := fn(list); err != nil {
					return err
				}
				list, sum = nil, 0
				break // a tail goes up to the end of its block
			}
			sum = crc32c(sum, b[at:at+size])
			list = append(list, r)
			at += size
		}
	}
	return nil
}

// parseRecord reads a record and its size in bytes; 0 when there is none.
func parseRecord(b []byte) (r record, size int) {
	least := map[uint16]int{fastRange: 16, fastHole: 12, fastCreate: 9, fastLink: 9, fastUnlink: 9, fastInode: 4 + 128, fastPad: 0, fastTail: 8, fastHead: 8}
	tag, n := le.Uint16(b), int(le.Uint16(b[2:]))
	if min, ok := least[tag]; !ok || n < min || 4+n > len(b) {
		return record{}, 0
	}
	return record{tag, b[4 : 4+n]}, 4 + n
}

// follows reports whether it is the head of fast commits that follow transaction end.
func (r record) follows(end uint32) bool {
	return r.tag == fastHead && le.Uint32(r.value) == 0 && le.Uint32(r.value[4:]) == end
}

// fastCommits is what fast commits change.
type fastCommits struct {
	f      *FS
	room   int64                    // bytes of memory left, and of work
	inodes map[uint32]*changedInode // inode number => what it is now
	dirs   map[uint32]*changedDir   // inode number of a directory => its names
}

type changedInode struct {
	raw  []byte
	runs *[]run
}

// changedDir is what names are gone from a directory on the disk, and what names are new in it.
type changedDir struct {
	made bool            // the directory itself is new: what is on the disk is not its own
	gone map[string]bool // names on the disk
	new  []name          // one without a name was removed again
	at   map[string]int  // name => its place in new
}

// apply applies a record.
func (c *fastCommits) apply(r record) error {
	v := r.value
	switch r.tag {
	case fastInode:
		return c.setInode(le.Uint32(v), v[4:])
	case fastRange:
		return c.setRange(le.Uint32(v), node{entries: v[4:16]}.extent(0))
	case fastHole:
		return c.setRange(le.Uint32(v), run{at: int64(le.Uint32(v[4:])), n: int64(le.Uint32(v[8:]))})
	case fastCreate, fastLink:
		return c.link(le.Uint32(v), le.Uint32(v[4:]), v[8:], r.tag == fastCreate)
	case fastUnlink:
		return c.unlink(le.Uint32(v), le.Uint32(v[4:]), v[8:])
	}
	return nil
}

// spend takes from the memory, and from the work.
func (c *fastCommits) spend(n int64) error {
	if c.room -= n; c.room < 0 {
		return guest.Unsupported("more fast commits than fit into memory")
	}
	return nil
}

// change gives an inode to be changed, as it is so far.
func (c *fastCommits) change(no uint32) (*changedInode, error) {
	if i := c.inodes[no]; i != nil {
		return i, nil
	}
	in, err := c.f.rawInode(guest.Ino(no))
	if err != nil {
		return nil, err
	}
	i := &changedInode{raw: bytes.Clone(in.raw), runs: new([]run)}
	used := in.mode != 0 && (in.is(guest.ModeRegular) || in.is(guest.ModeDir) || in.is(guest.ModeLink) && !in.short(c.f))
	if used && !in.inline() {
		for r, err := range c.f.runs(&in, c.f.mostBlocks(&in)) {
			if err == nil {
				err = c.spend(64)
			}
			if err != nil {
				return nil, err
			}
			*i.runs = append(*i.runs, r)
		}
	}
	c.inodes[no] = i
	return i, c.spend(c.f.inodeSize + 128)
}

// setInode takes an inode as a record has it, but for where its blocks are, which ranges tell.
func (c *fastCommits) setInode(no uint32, raw []byte) error {
	i, err := c.change(no)
	if err != nil {
		return err
	}
	const block, generation = 0x28, 0x64
	if !bytes.Equal(i.raw[generation:generation+4], raw[generation:generation+4]) {
		*i.runs = nil // another file has the inode now
	}
	copy(i.raw, raw[:block])
	copy(i.raw[generation:], raw[generation:])
	if le.Uint32(raw[0x20:])&flagExtents == 0 {
		copy(i.raw[block:generation], raw[block:generation])
	}
	return nil
}

// setRange says where blocks of an inode are, or that they are not there.
func (c *fastCommits) setRange(no uint32, r run) error {
	i, err := c.change(no)
	if err != nil {
		return err
	}
	list := *i.runs
	if err := c.spend(64 + int64(len(list))/16); err != nil {
		return err
	}
	out := make([]run, 0, len(list)+2)
	for _, old := range list {
		if old.at < r.at {
			left := old
			left.n = min(old.n, r.at-old.at)
			out = append(out, left)
		}
	}
	if r.phys != 0 && r.n > 0 {
		out = append(out, r)
	}
	for _, old := range list {
		if old.end() > r.end() {
			out = append(out, old.from(max(old.at, r.end())))
		}
	}
	*i.runs = out
	return nil
}

// dir gives the changes of a directory.
func (c *fastCommits) dir(no uint32) *changedDir {
	d := c.dirs[no]
	if d == nil {
		d = &changedDir{gone: map[string]bool{}, at: map[string]int{}}
		c.dirs[no] = d
	}
	return d
}

// link makes a name for an inode. One that is there already stays.
func (c *fastCommits) link(dir, no uint32, n []byte, create bool) error {
	if err := c.spend(256); err != nil {
		return err
	}
	i, err := c.change(no)
	if err != nil {
		return err
	}
	if !legal(n) || no > c.f.inodes {
		return guest.Damaged("a name in directory %d", dir)
	}
	mode := uint32(le.Uint16(i.raw)) & guest.ModeType
	if create && mode == guest.ModeDir {
		c.dir(no).made = true
	}
	_, err = c.f.Lookup(guest.Ino(dir), string(n))
	if !errors.Is(err, guest.ErrNotExist) {
		return err
	}
	d := c.dir(dir)
	d.at[string(n)] = len(d.new)
	d.new = append(d.new, name{bytes: n, ino: no, kind: kindOf(mode)})
	if links := le.Uint16(i.raw[0x1a:]); create {
		le.PutUint16(i.raw[0x1a:], 1)
	} else {
		le.PutUint16(i.raw[0x1a:], links+1)
	}
	return nil
}

// kindOf is the type in a directory entry.
func kindOf(mode uint32) byte {
	for k, m := range types {
		if m == mode {
			return byte(k)
		}
	}
	return 0
}

// unlink takes a name from an inode.
func (c *fastCommits) unlink(dir, no uint32, n []byte) error {
	if err := c.spend(256); err != nil {
		return err
	}
	i, err := c.change(no)
	if err != nil {
		return err
	}
	found, err := c.f.lookup(guest.Ino(dir), string(n))
	if err != nil && !errors.Is(err, guest.ErrNotExist) {
		return err
	}
	if links := le.Uint16(i.raw[0x1a:]); links > 0 {
		le.PutUint16(i.raw[0x1a:], links-1)
	}
	if err != nil || found.ino != no {
		return nil // the name is another inode's by now
	}
	d := c.dir(dir)
	stored := string(found.bytes)
	if k, ok := d.at[stored]; ok {
		d.new[k].bytes = nil
		delete(d.at, stored)
		return nil
	}
	d.gone[stored] = true
	return nil
}
