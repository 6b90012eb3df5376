package btrfs

import "slices"

// A patch is what the log changes of a tree: items that are other than on the disk, new or gone, in order.
type patch []change

type change struct {
	key  key
	b    []byte
	gone bool
}

func (p patch) search(k key) (int, bool) {
	return slices.BinarySearchFunc(p, k, func(c change, k key) int { return c.key.compare(k) })
}

func (p patch) has(k key) bool {
	_, found := p.search(k)
	return found
}

// from gives the changes from k on.
func (p patch) from(k key) []change {
	i, _ := p.search(k)
	return p[i:]
}

// floor gives the last change that is no removal and not behind k, or nil.
func (p patch) floor(k key) *change {
	i, found := p.search(k)
	if !found {
		i--
	}
	for ; i >= 0; i-- {
		if !p[i].gone {
			return &p[i]
		}
	}
	return nil
}
