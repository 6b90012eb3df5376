package ext

// fastNames is where the places of names in a directory begin that only fast commits know.
const fastNames = 1 << 62

// inode gives an inode that fast commits changed; nil when they did not. Like all methods here, it is for a nil fastCommits too.
func (c *fastCommits) inode(no uint32) *changedInode {
	if c == nil {
		return nil
	}
	return c.inodes[no]
}

// changes gives what is changed in a directory, nil when nothing is.
func (c *fastCommits) changes(dir uint32) *changedDir {
	if c == nil {
		return nil
	}
	return c.dirs[dir]
}

// made reports whether a directory is new, so that none of its names is on the disk.
func (c *fastCommits) made(dir uint32) bool {
	d := c.changes(dir)
	return d != nil && d.made
}

// removed reports whether a name on the disk is not there any more.
func (c *fastCommits) removed(dir uint32, n name) bool {
	d := c.changes(dir)
	return d != nil && d.gone[string(n.bytes)]
}

// added calls fn for the names that are not on the disk.
func (c *fastCommits) added(dir uint32, from int64, fn func(name) bool) {
	d := c.changes(dir)
	if d == nil {
		return
	}
	for i := max(0, from-fastNames); i < int64(len(d.new)); i++ {
		n := d.new[i]
		n.next = fastNames + i + 1
		if n.bytes != nil && !fn(n) {
			return
		}
	}
}

// lookup finds a name that is not on the disk.
func (c *fastCommits) lookup(dir uint32, want *sought) (found name, ok bool) {
	d := c.changes(dir)
	if d == nil {
		return name{}, false
	}
	if i, ok := d.at[want.name]; ok {
		return d.new[i], true
	}
	if want.folds {
		c.added(dir, 0, func(n name) bool {
			if want.is(n.bytes) {
				found, ok = n, true
			}
			return !ok
		})
	}
	return found, ok
}
