package ext

// fastNames is where the places of names in a directory begin that only fast commits know.
const fastNames = 1 << 62

// fastCommits is what fast commits change.
type fastCommits struct {
	inodes map[uint32]*fastInode
	dirs   map[uint32]*fastDir
}

type fastInode struct {
	raw  []byte
	runs *[]run
}

type fastDir struct {
	gone map[string]bool
	new  []name
}

func (c *fastCommits) inode(no uint32) *fastInode {
	if c == nil {
		return nil
	}
	return c.inodes[no]
}

// removed reports whether a name on the disk is not there any more.
func (c *fastCommits) removed(dir uint32, n name) bool {
	if c == nil || c.dirs[dir] == nil {
		return false
	}
	return c.dirs[dir].gone[string(n.bytes)]
}

// added calls fn for the names that are not on the disk.
func (c *fastCommits) added(dir uint32, from int64, fn func(name) bool) {
	if c == nil || c.dirs[dir] == nil {
		return
	}
	list := c.dirs[dir].new
	for i := max(0, from-fastNames); i < int64(len(list)); i++ {
		n := list[i]
		n.next = fastNames + i + 1
		if !fn(n) {
			return
		}
	}
}

// lookup finds a name that is not on the disk.
func (c *fastCommits) lookup(dir uint32, want string) (uint32, bool) {
	if c == nil || c.dirs[dir] == nil {
		return 0, false
	}
	for _, n := range c.dirs[dir].new {
		if string(n.bytes) == want {
			return n.ino, true
		}
	}
	return 0, false
}

func (j *journal) replayFast(end uint32, room int64) error { return nil }
