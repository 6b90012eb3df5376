package registry

import (
	"fmt"
	"iter"
	"strings"
	"time"
	"unicode"
	"unicode/utf16"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// Key is a key of a hive.
type Key struct {
	Name    string
	Written time.Time // UTC

	hive             *Hive
	off              uint32
	depth            int
	subkeys, subList uint32
	values, valList  uint32
}

// Flags of a key node and of a value ("Flags").
const (
	nodePredefined = 0x40 // a handle instead of the number of values
	nodeLatin      = 0x20
	valueLatin     = 0x01
)

// The longest names, bytes ("Registry Element Size Limits": 255 and 16383 characters).
const (
	nodeHead     = 76
	valueHead    = 20
	maxKeyName   = 1 << 10
	maxValueName = 64 << 10
)

// Root gives the key at the top.
func (h *Hive) Root() (*Key, error) { return h.node(h.root, 0) }

// Key gives the key at a path of names with backslashes between them, from the root on; without regard to case. ErrNotExist.
func (h *Hive) Key(path string) (*Key, error) {
	k, err := h.Root()
	if err != nil {
		return nil, err
	}
	return k.Key(path)
}

// node reads a key node ("Key node"):
//
//	0 "nk" | 2 flags 2 | 4 written 8 | 12 access 4 | 16 parent 4 | 20 number of subkeys 4 | 24 of volatile ones 4 | 28 list of subkeys 4
//	32 volatile list 4 | 36 number of values 4 | 40 list of values 4 | 44 security 4 | 48 class 4 | 52 … | 72 bytes of the name 2
//	74 bytes of the class 2 | 76 name
func (h *Hive) node(off uint32, depth int) (*Key, error) {
	b, err := h.cell(off, nodeHead, nodeHead+maxKeyName)
	if err != nil {
		return nil, err
	}
	n := int(le.Uint16(b[72:]))
	if string(b[:2]) != "nk" || n > len(b)-nodeHead {
		return nil, guest.Damaged("the key node at %#x", off)
	}
	flags := le.Uint16(b[2:])
	k := &Key{
		Name: name(b[nodeHead:nodeHead+n], flags&nodeLatin != 0), Written: filetime(le.Uint64(b[4:])), hive: h, off: off, depth: depth,
		subkeys: le.Uint32(b[20:]), subList: le.Uint32(b[28:]), values: le.Uint32(b[36:]), valList: le.Uint32(b[40:]),
	}
	if flags&nodePredefined != 0 {
		k.values = 0
	}
	return k, nil
}

// child reads the node of a subkey, which must know its parent: otherwise keys could go in a circle.
func (k *Key) child(off uint32) (*Key, error) {
	if k.depth >= maxDepth || off == k.hive.root {
		return nil, guest.Damaged("keys in a circle, at %#x", off)
	}
	c, err := k.hive.node(off, k.depth+1)
	if err != nil {
		return nil, err
	}
	var parent [4]byte
	if err := k.hive.read(parent[:], int64(off)+4+16); err != nil {
		return nil, err
	}
	if p := le.Uint32(parent[:]); p != k.off {
		return nil, guest.Damaged("the key %q is below the one at %#x, and says %#x", c.Name, k.off, p)
	}
	return c, nil
}

// elements yields where the nodes of the subkeys are, and what their list says of the name: its kind "li" (nothing), "lf" (the first
// four characters) or "lh" (a hash).
func (k *Key) elements(yield func(off uint32, kind string, hint []byte) bool) error {
	if k.subkeys == 0 {
		return nil
	}
	kind, list, err := k.hive.list(k.subList)
	if err != nil {
		return err
	}
	if kind != "ri" {
		_, err := k.leaf(kind, list, 0, yield)
		return err
	}
	total := 0
	for ; len(list) > 0; list = list[4:] {
		kind, leaf, err := k.hive.list(le.Uint32(list))
		if err != nil {
			return err
		}
		if total, err = k.leaf(kind, leaf, total, yield); err != nil || total < 0 {
			return err
		}
	}
	return nil
}

// elementSizes maps the kinds of lists to the bytes of an element.
var elementSizes = map[string]int{"ri": 4, "li": 4, "lf": 8, "lh": 8}

// list reads a list of subkeys, or of such lists: kind 2 | number 2 | elements.
func (h *Hive) list(off uint32) (kind string, elements []byte, err error) {
	head, err := h.cell(off, 4, 4)
	if err != nil {
		return "", nil, err
	}
	kind = string(head[:2])
	size := elementSizes[kind]
	if size == 0 {
		return "", nil, guest.Damaged("a list of subkeys %q at %#x", kind, off)
	}
	n := 4 + size*int(le.Uint16(head[2:]))
	b, err := h.cell(off, n, n)
	if err != nil {
		return "", nil, err
	}
	return kind, b[4:], nil
}

// leaf yields the elements of a list of subkeys. It counts on from total; -1 is the wish to stop.
func (k *Key) leaf(kind string, list []byte, total int, yield func(uint32, string, []byte) bool) (int, error) {
	size := elementSizes[kind]
	if kind == "ri" || int64(total)+int64(len(list)/size) > int64(k.subkeys) {
		return 0, guest.Damaged("a list %q of %d subkeys, of %d", kind, len(list)/size, k.subkeys)
	}
	for ; len(list) > 0; list = list[size:] {
		if !yield(le.Uint32(list), kind, list[4:size]) {
			return -1, nil
		}
		total++
	}
	return total, nil
}

// Keys yields the subkeys. An error ends them; what was yielded before it is good.
func (k *Key) Keys() iter.Seq2[*Key, error] {
	return func(yield func(*Key, error) bool) {
		seen := map[uint32]bool{}
		var bad error
		stopped := false
		err := k.elements(func(off uint32, _ string, _ []byte) bool {
			var c *Key
			if c, bad = k.child(off); bad == nil && seen[off] {
				bad = guest.Damaged("the key %q is listed twice", c.Name)
			}
			if bad != nil {
				return false
			}
			seen[off] = true
			stopped = !yield(c, nil)
			return !stopped
		})
		switch {
		case stopped:
			return
		case err == nil:
			err = bad
		}
		if err == nil && len(seen) != int(k.subkeys) {
			err = guest.Damaged("%d subkeys of %d", len(seen), k.subkeys)
		}
		if err != nil {
			yield(nil, fmt.Errorf("registry: key %q: %w", k.Name, err))
		}
	}
}

// Key gives the key at a path below this one, without regard to case. ErrNotExist.
func (k *Key) Key(path string) (*Key, error) {
	for part := range strings.SplitSeq(path, `\`) {
		if part == "" {
			continue
		}
		next, err := k.subkey(part)
		if err != nil {
			return nil, fmt.Errorf("registry: key %q in %q: %w", part, k.Name, err)
		}
		k = next
	}
	return k, nil
}

func (k *Key) subkey(part string) (*Key, error) {
	want := upper(part)
	hash, plain := hashOf(want)
	var found *Key
	var bad error
	err := k.elements(func(off uint32, kind string, hint []byte) bool {
		switch { // what hints say of other than ASCII depends on the table of upper case of the Windows that wrote them
		case !plain:
		case kind == "lh" && le.Uint32(hint) != hash, kind == "lf" && !hinted(want, hint):
			return true
		}
		c, err := k.child(off)
		if err != nil {
			bad = err
			return false
		}
		if upper(c.Name) == want {
			found = c
		}
		return found == nil
	})
	switch {
	case err != nil:
		return nil, err
	case bad != nil:
		return nil, bad
	case found == nil:
		return nil, guest.ErrNotExist
	}
	return found, nil
}

// upper makes a name comparable, each character by itself, as Windows does it.
func upper(s string) string { return strings.Map(unicode.ToUpper, s) }

// hashOf is the hash of a name in upper case ("Hash leaf"); plain is whether it is ASCII.
func hashOf(name string) (hash uint32, plain bool) {
	for i := range len(name) {
		if name[i] >= 0x80 {
			return 0, false
		}
		hash = 37*hash + uint32(name[i])
	}
	return hash, true
}

// hinted reports whether a name may have this beginning ("Fast leaf"): four characters, zeros behind the end, and no first one when it is not
// Latin-1.
func hinted(name string, hint []byte) bool {
	if hint[0] == 0 {
		return true
	}
	for i, c := range hint {
		var own byte
		if i < len(name) {
			own = name[i]
		}
		if c >= 0x80 {
			return true
		}
		if c >= 'a' && c <= 'z' {
			c -= 'a' - 'A'
		}
		if c != own {
			return false
		}
	}
	return true
}

// name makes text of a name: Latin-1 or UTF-16.
func name(b []byte, latin bool) string {
	if !latin {
		return text(b)
	}
	r := make([]rune, len(b))
	for i, c := range b {
		r[i] = rune(c)
	}
	return string(r)
}

// text makes UTF-16 UTF-8.
func text(b []byte) string {
	units := make([]uint16, len(b)/2)
	for i := range units {
		units[i] = le.Uint16(b[2*i:])
	}
	return string(utf16.Decode(units))
}
