package ntfs

import (
	"bytes"
	"errors"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// index is a B-tree of a file (NTFS doc, "$INDEX_ROOT", "$INDEX_ALLOCATION"): names of a directory, or others of the system's.
// A node has entries in ascending order, each with the node of what is less than it, and at its end one without a key.
type index struct {
	fs      *FS
	number  int64 // record of the file
	top     node
	blocks  *stream // nodes other than the top one; nil when there are none
	size    int64   // bytes of a node
	unit    int64   // bytes by which nodes are numbered
	compare func(a, b []byte) int
}

// node is the entries of a node: from its header on (NTFS doc, "Index Header"), of which the first word is where they start, the second where they end.
type node []byte

const (
	maxDepth = 32
	topNode  = -1 // as the number of a node
)

// An entry (NTFS doc, "Index Entry"):
//
//	0x00  reference to a file, or where the data is (8)   0x08  length (2)   0x0a  length of the key (2)
//	0x0c  flags (4): 1 a node is below, 2 the last        0x10  the key; and in the last 8 bytes the node below
type entry struct {
	head []byte
	key  []byte
	sub  int64 // number of the node below, or topNode
	last bool
	off  int // within the node
}

func (f *FS) index(i *inode, name string, compare func(a, b []byte) int) (*index, error) {
	root := i.find(attrIndexRoot, name)
	if root == nil || !root.resident || len(root.value) < 0x20 {
		return nil, guest.Damaged("record %d of the MFT: no index %q", i.number, name)
	}
	x := &index{fs: f, number: i.number, size: int64(le.Uint32(root.value[8:])), compare: compare, top: node(root.value[16:])}
	if err := x.top.check(); err != nil {
		return nil, err
	}
	if a := i.find(attrIndex, name); a != nil && !a.resident && a.plain() {
		if !power(x.size, 512, maxRecord*4) {
			return nil, guest.Damaged("record %d of the MFT: an index with nodes of %d bytes", i.number, x.size)
		}
		x.blocks = f.stream(a)
		// Nodes smaller than a cluster are numbered by 512 bytes (NTFS doc, "$INDEX_ROOT": clusters per index record).
		if x.unit = f.geo.cluster; x.size < x.unit {
			x.unit = stride
		}
	}
	return x, nil
}

func (n node) check() error {
	if len(n) < 16 {
		return guest.Damaged("an index node of %d bytes", len(n))
	}
	from, to := int64(le.Uint32(n)), int64(le.Uint32(n[4:]))
	if from < 16 || from > to || to > int64(len(n)) {
		return guest.Damaged("an index node with entries from %d to %d", from, to)
	}
	return nil
}

func (n node) first() int { return int(le.Uint32(n)) }

// entry gives the entry at off, and where the next is.
func (n node) entry(off int) (e entry, next int, err error) {
	end := int(le.Uint32(n[4:]))
	if off < 16 || off+16 > end {
		return e, 0, guest.Damaged("an index node ends without a last entry")
	}
	length, key, flags := int(le.Uint16(n[off+8:])), int(le.Uint16(n[off+10:])), le.Uint16(n[off+12:])
	e = entry{sub: topNode, last: flags&2 != 0, off: off}
	room := length - 16
	if flags&1 != 0 {
		room -= 8
	}
	if e.last {
		key = 0
	}
	if room < key || off+length > end {
		return e, 0, guest.Damaged("an index entry of %d bytes with a key of %d", length, key)
	}
	b := n[off : off+length]
	e.head, e.key = b, b[16:16+key]
	if flags&1 != 0 {
		e.sub = int64(le.Uint64(b[length-8:]))
	}
	return e, off + length, nil
}

// blockKey names a node: a file's record, the id of the attribute, and the place in it.
type blockKey struct {
	runKey
	off int64
}

// node reads the node of that number.
func (x *index) node(number int64) (node, error) {
	if number == topNode {
		return x.top, nil
	}
	if x.blocks == nil || number < 0 || number > x.blocks.a.size/x.unit {
		return nil, guest.Damaged("record %d of the MFT: no index node %d", x.number, number)
	}
	first := x.blocks.a.parts[0]
	key := blockKey{runKey{first.record, first.id}, number * x.unit}
	if n, ok := x.fs.nodes.Get(key); ok {
		return n, nil
	}
	n, err := x.load(number, key.off)
	if err != nil {
		return nil, err
	}
	x.fs.nodes.Put(key, n, x.size+128)
	return n, nil
}

// load reads a node (NTFS doc, "Index Record"): "INDX", the update sequence as in a record, at 0x10 its number, at 0x18 the header.
func (x *index) load(number, off int64) (node, error) {
	if off+x.size > x.blocks.a.valid {
		return nil, guest.Damaged("record %d of the MFT: no index node %d", x.number, number)
	}
	b := make([]byte, x.size)
	if err := x.blocks.read(b, off); err != nil {
		return nil, err
	}
	if !bytes.Equal(b[:4], []byte("INDX")) || le.Uint64(b[0x10:]) != uint64(number) {
		return nil, guest.Damaged("record %d of the MFT: index node %d is none", x.number, number)
	}
	if err := fixup(b); err != nil {
		return nil, err
	}
	n := node(b[0x18:])
	return n, n.check()
}

// lookup finds a key. ErrNotExist.
func (x *index) lookup(key []byte) (entry, error) {
	number := int64(topNode)
	for range maxDepth {
		n, err := x.node(number)
		if err != nil {
			return entry{}, err
		}
		e, found, err := x.search(n, key)
		if err != nil || found {
			return e, err
		}
		if e.sub == topNode {
			return entry{}, guest.ErrNotExist
		}
		number = e.sub
	}
	return entry{}, guest.Damaged("record %d of the MFT: an index more than %d nodes deep", x.number, maxDepth)
}

// search gives the first entry of a node that is not less than key.
func (x *index) search(n node, key []byte) (e entry, found bool, err error) {
	for off := n.first(); ; {
		if e, off, err = n.entry(off); err != nil || e.last {
			return e, false, err
		}
		if c := x.compare(e.key, key); c >= 0 {
			return e, c == 0, nil
		}
	}
}

// walk gives all entries in order, those above after when that is not nil, with the number of their node. It ends when yield says so.
// Entries that do not ascend are damage, and so no tree is endless.
func (x *index) walk(after []byte, yield func(number int64, e entry) bool) error {
	w := walker{index: x, last: after, skip: after != nil, yield: yield}
	err := w.node(topNode, 0)
	if errors.Is(err, errStop) {
		return nil
	}
	return err
}

var errStop = errors.New("stop")

type walker struct {
	*index
	last  []byte // key of the entry before, or nil
	skip  bool   // nothing was yielded yet, and what is not above last is left out
	yield func(int64, entry) bool
}

func (w *walker) node(number int64, depth int) error {
	if depth > maxDepth {
		return guest.Damaged("record %d of the MFT: an index more than %d nodes deep", w.number, maxDepth)
	}
	n, err := w.index.node(number)
	if err != nil {
		return err
	}
	var e entry
	for off := n.first(); !e.last; {
		if e, off, err = n.entry(off); err != nil {
			return err
		}
		if !e.last && w.skip && w.compare(e.key, w.last) <= 0 {
			continue // and so is what is below it
		}
		if e.sub != topNode {
			if err := w.node(e.sub, depth+1); err != nil {
				return err
			}
		}
		if e.last {
			return nil
		}
		if w.last != nil && w.compare(e.key, w.last) <= 0 {
			return guest.Damaged("record %d of the MFT: an index out of order", w.number)
		}
		if w.last, w.skip = e.key, false; !w.yield(number, e) {
			return errStop
		}
	}
	return nil
}
