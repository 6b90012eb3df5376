package btrfs

import (
	"github.com/holdfast-backup/holdfast/fs/guest"
)

// A tree is one of the file system's trees, with what the log changes of it.
type tree struct {
	fs    *FS
	id    uint64
	root  want
	patch patch // ascending; nil without a log
}

// A span of keys is what a pointer says of the node below it.
type span struct {
	first, end key // end is that of the next pointer
	open       bool
}

// below gives the node that pointer i leads to, and the keys that it may have.
func (t *tree) below(n *node, i int, s span) (*node, span, error) {
	sub := span{n.key(i), s.end, s.open}
	if i+1 < n.n {
		sub.end, sub.open = n.key(i+1), false
	}
	addr, gen := n.ptr(i)
	c, err := t.fs.node(want{addr, gen, n.level - 1})
	if err != nil {
		return nil, sub, err
	}
	// Without this a tree that shares nodes in itself could be walked without end.
	if c.n == 0 || c.key(0) != sub.first || !sub.open && !c.key(c.n-1).less(sub.end) {
		return nil, sub, guest.Damaged("the node at %d has other keys than its parent says", addr)
	}
	return c, sub, nil
}

// base yields the items from k on as the disk has them, until fn returns false.
func (t *tree) base(k key, fn func(k key, b []byte) bool) error {
	n, err := t.fs.node(t.root)
	if err != nil {
		return err
	}
	_, err = t.baseIn(n, span{open: true}, k, fn)
	return err
}

func (t *tree) baseIn(n *node, s span, k key, fn func(key, []byte) bool) (more bool, err error) {
	i := n.slot(k)
	if n.level == 0 {
		if i < 0 || n.key(i) != k {
			i++
		}
		for ; i < n.n; i++ {
			if !fn(n.key(i), n.item(i)) {
				return false, nil
			}
		}
		return true, nil
	}
	for i = max(i, 0); i < n.n; i++ {
		c, sub, err := t.below(n, i, s)
		if err != nil {
			return false, err
		}
		if more, err := t.baseIn(c, sub, k, fn); !more || err != nil {
			return more, err
		}
	}
	return true, nil
}

// baseFloor gives the last item of the disk whose key is not behind k; ok is false when there is none.
func (t *tree) baseFloor(k key) (found key, b []byte, ok bool, err error) {
	n, err := t.fs.node(t.root)
	s := span{open: true}
	for err == nil {
		i := n.slot(k)
		if i < 0 {
			return key{}, nil, false, nil
		}
		if n.level == 0 {
			return n.key(i), n.item(i), true, nil
		}
		n, s, err = t.below(n, i, s)
	}
	return key{}, nil, false, err
}

// walk yields the items from k on until fn returns false. Their bytes are shared and must not be changed.
func (t *tree) walk(k key, fn func(k key, b []byte) bool) error {
	if t.patch == nil {
		return t.base(k, fn)
	}
	// Both ascend: what the log changed comes before, or instead of, what the disk has.
	changed := t.patch.from(k)
	more := true
	emit := func(upTo key) bool {
		for ; more && len(changed) > 0 && changed[0].key.less(upTo); changed = changed[1:] {
			more = changed[0].gone || fn(changed[0].key, changed[0].b)
		}
		return more
	}
	err := t.base(k, func(k key, b []byte) bool {
		if !emit(k) {
			return false
		}
		if len(changed) > 0 && changed[0].key == k {
			return true // by the next emit
		}
		more = fn(k, b)
		return more
	})
	if err == nil && emit(lastKey) && len(changed) > 0 && !changed[0].gone {
		fn(changed[0].key, changed[0].b)
	}
	return err
}

// get gives what an item holds; ok is false when there is none.
func (t *tree) get(k key) (b []byte, ok bool, err error) {
	found, b, ok, err := t.floor(k)
	if err != nil || !ok || found != k {
		return nil, false, err
	}
	return b, true, nil
}

// floor gives the last item whose key is not behind k; ok is false when there is none.
func (t *tree) floor(k key) (found key, b []byte, ok bool, err error) {
	if t.patch == nil {
		return t.baseFloor(k)
	}
	for at := k; ; at = found.prev() {
		found, b, ok, err = t.baseFloor(at)
		if err != nil {
			return found, nil, false, err
		}
		p := t.patch.floor(k)
		switch {
		case ok && t.patch.has(found):
			if p != nil && !p.key.less(found) {
				return p.key, p.b, true, nil
			}
			continue // it is gone
		case p != nil && (!ok || found.less(p.key)):
			return p.key, p.b, true, nil
		}
		return found, b, ok, nil
	}
}
