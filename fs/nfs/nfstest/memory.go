package nfstest

import (
	"context"
	"io"
	"iter"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/holdfast-backup/holdfast/fs/nfs"
)

// Memory is a file system in memory. It knows what is durable: Crash forgets the rest.
type Memory struct {
	// Before is called before every method with its name, without a lock: it may
	// wait, or fail the call with an error. It is nil, or set before first use.
	Before func(op string, id nfs.ID) error

	mu sync.RWMutex
	// guards following, and all nodes
	nodes map[nfs.ID]*node
	root  nfs.ID
	free  []nfs.ID // of files that are gone: their numbers are used again
	last  uint64   // File that was given
	clock time.Time
	syncs int // that began
}

type node struct {
	attr    nfs.Attr
	data    []byte
	durable []byte   // what data was at the last Sync
	synced  int      // which one that was
	mark    *[8]byte // of an exclusive creation

	// Of a directory.
	parent nfs.ID
	names  map[string]nfs.ID
	list   []nfs.Entry // by cookie
	cookie uint64      // the last one
}

const (
	maxFile = 64 << 20 // bytes of a file
	maxName = 255      // bytes of a name
)

var _ nfs.WritableFS = (*Memory)(nil)

// NewMemory gives one with an empty root, mode 0777.
func NewMemory() *Memory {
	m := &Memory{nodes: make(map[nfs.ID]*node)}
	m.root, _ = m.make(nfs.KindDir, nfs.Change{Mode: Ptr(uint32(0o777))})
	m.nodes[m.root].parent = m.root
	return m
}

// Crash takes back all that was written and not synced.
func (m *Memory) Crash() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, n := range m.nodes {
		n.data = slices.Clone(n.durable)
		n.attr.Size = int64(len(n.data))
	}
}

// Syncs is how often Sync was called.
func (m *Memory) Syncs() int {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.syncs
}

// AddLink makes a symbolic link in the root, which clients cannot.
func (m *Memory) AddLink(name, target string) nfs.ID {
	m.mu.Lock()
	defer m.mu.Unlock()
	id, n := m.make(nfs.KindLink, nfs.Change{})
	n.data = []byte(target)
	n.attr.Size = int64(len(target))
	m.add(m.nodes[m.root], name, id)
	return id
}

func (m *Memory) before(op string, id nfs.ID) error {
	if m.Before == nil {
		return nil
	}
	return m.Before(op, id)
}

// tick gives a time that none was before.
func (m *Memory) tick() time.Time {
	now := time.Now().Round(0)
	if !now.After(m.clock) {
		now = m.clock.Add(1)
	}
	m.clock = now
	return now
}

func (m *Memory) make(kind nfs.Kind, c nfs.Change) (nfs.ID, *node) {
	var id nfs.ID
	if len(m.free) > 0 {
		id = m.free[0]
		id.Generation++
		m.free = m.free[1:]
	} else {
		m.last++
		id = nfs.ID{File: m.last, Generation: 1}
	}
	n := &node{attr: nfs.Attr{Kind: kind, Mode: 0o644, Links: 1}}
	if kind == nfs.KindDir {
		n.attr.Mode, n.attr.Links, n.names = 0o755, 2, make(map[string]nfs.ID)
	}
	now := m.tick()
	n.attr.Accessed, n.attr.Modified, n.attr.Changed = now, now, now
	m.set(n, c)
	n.durable = slices.Clone(n.data)
	m.nodes[id] = n
	return id, n
}

func (m *Memory) set(n *node, c nfs.Change) {
	now := m.tick()
	a := &n.attr
	a.Changed = now
	if c.Mode != nil {
		a.Mode = *c.Mode
	}
	if c.UID != nil {
		a.UID = *c.UID
	}
	if c.GID != nil {
		a.GID = *c.GID
	}
	if c.Size != nil {
		n.resize(*c.Size)
		n.durable, n.synced = slices.Clone(n.data), m.syncs
		a.Modified = now
	}
	if c.Accessed != nil {
		a.Accessed = *c.Accessed
	}
	if c.Modified != nil {
		a.Modified = *c.Modified
	}
}

func (n *node) resize(size int64) {
	if size > int64(cap(n.data)) {
		n.data = slices.Grow(n.data, int(size)-len(n.data))
	}
	old := len(n.data)
	n.data = n.data[:size]
	if int(size) > old {
		clear(n.data[old:])
	}
	n.attr.Size, n.attr.Used = size, size
}

func (m *Memory) add(dir *node, name string, id nfs.ID) {
	dir.cookie++
	dir.names[name] = id
	dir.list = append(dir.list, nfs.Entry{Name: name, ID: id, Cookie: dir.cookie})
	m.touch(dir)
	if n := m.nodes[id]; n.attr.Kind == nfs.KindDir {
		dir.attr.Links++
	}
}

func (m *Memory) touch(n *node) {
	now := m.tick()
	n.attr.Modified, n.attr.Changed = now, now
}

// unlink takes a name away; the file is still there.
func (m *Memory) unlink(dir *node, name string) {
	id := dir.names[name]
	delete(dir.names, name)
	dir.list = slices.DeleteFunc(dir.list, func(e nfs.Entry) bool { return e.Name == name })
	m.touch(dir)
	if m.nodes[id].attr.Kind == nfs.KindDir {
		dir.attr.Links--
	}
}

func (m *Memory) drop(id nfs.ID) {
	delete(m.nodes, id)
	m.free = append(m.free, id)
}

func (m *Memory) node(id nfs.ID) (*node, error) {
	if n := m.nodes[id]; n != nil {
		return n, nil
	}
	return nil, syscall.ESTALE
}

func (m *Memory) dir(id nfs.ID) (*node, error) {
	n, err := m.node(id)
	if err == nil && n.attr.Kind != nfs.KindDir {
		err = syscall.ENOTDIR
	}
	return n, err
}

func (m *Memory) file(id nfs.ID) (*node, error) {
	n, err := m.node(id)
	switch {
	case err != nil:
		return nil, err
	case n.attr.Kind == nfs.KindDir:
		return nil, syscall.EISDIR
	case n.attr.Kind != nfs.KindFile:
		return nil, syscall.EINVAL
	}
	return n, nil
}

// Root implements nfs.FS.
func (m *Memory) Root() nfs.ID { return m.root }

// Attr implements nfs.FS.
func (m *Memory) Attr(_ context.Context, id nfs.ID) (nfs.Attr, error) {
	if err := m.before("Attr", id); err != nil {
		return nfs.Attr{}, err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	n, err := m.node(id)
	if err != nil {
		return nfs.Attr{}, err
	}
	return n.attr, nil
}

// Lookup implements nfs.FS.
func (m *Memory) Lookup(_ context.Context, dir nfs.ID, name string) (nfs.ID, error) {
	if err := m.before("Lookup", dir); err != nil {
		return nfs.ID{}, err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	d, err := m.dir(dir)
	if err != nil {
		return nfs.ID{}, err
	}
	id, ok := d.names[name]
	if !ok {
		return nfs.ID{}, syscall.ENOENT
	}
	return id, nil
}

// Parent implements nfs.FS.
func (m *Memory) Parent(_ context.Context, dir nfs.ID) (nfs.ID, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	d, err := m.dir(dir)
	if err != nil {
		return nfs.ID{}, err
	}
	return d.parent, nil
}

// ReadDir implements nfs.FS.
func (m *Memory) ReadDir(_ context.Context, dir nfs.ID, after uint64) iter.Seq2[nfs.Entry, error] {
	return func(yield func(nfs.Entry, error) bool) {
		if err := m.before("ReadDir", dir); err != nil {
			yield(nfs.Entry{}, err)
			return
		}
		for {
			some, err := m.entries(dir, after)
			if err != nil {
				yield(nfs.Entry{}, err)
				return
			}
			for _, e := range some {
				if !yield(e, nil) {
					return
				}
				after = e.Cookie
			}
			if len(some) == 0 {
				return
			}
		}
	}
}

// entries gives some of those after a cookie.
func (m *Memory) entries(dir nfs.ID, after uint64) ([]nfs.Entry, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	d, err := m.dir(dir)
	if err != nil {
		return nil, err
	}
	if after > d.cookie {
		return nil, syscall.EINVAL
	}
	i, _ := slices.BinarySearchFunc(d.list, after+1, func(e nfs.Entry, c uint64) int { return int(int64(e.Cookie) - int64(c)) })
	return slices.Clone(d.list[i:min(i+100, len(d.list))]), nil
}

// ReadAt implements nfs.FS.
func (m *Memory) ReadAt(_ context.Context, file nfs.ID, p []byte, off int64) (int, error) {
	if err := m.before("ReadAt", file); err != nil {
		return 0, err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	n, err := m.file(file)
	if err != nil {
		return 0, err
	}
	if off >= int64(len(n.data)) {
		return 0, io.EOF
	}
	c := copy(p, n.data[off:])
	if c < len(p) {
		return c, io.EOF
	}
	return c, nil
}

// Readlink implements nfs.FS.
func (m *Memory) Readlink(_ context.Context, link nfs.ID) (string, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	n, err := m.node(link)
	if err != nil {
		return "", err
	}
	if n.attr.Kind != nfs.KindLink {
		return "", syscall.EINVAL
	}
	return string(n.data), nil
}

// Space implements nfs.FS.
func (m *Memory) Space(context.Context) (nfs.Space, error) {
	if err := m.before("Space", m.root); err != nil {
		return nfs.Space{}, err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	return nfs.Space{Total: 1 << 30, Free: 1 << 29, Available: 1 << 28, Files: 1 << 20, FreeFiles: 1<<20 - int64(len(m.nodes))}, nil
}

// WriteAt implements nfs.WritableFS.
func (m *Memory) WriteAt(_ context.Context, file nfs.ID, p []byte, off int64) (int, error) {
	if err := m.before("WriteAt", file); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.file(file)
	if err != nil {
		return 0, err
	}
	if len(p) == 0 {
		return 0, nil
	}
	if off > maxFile || off+int64(len(p)) > maxFile {
		return 0, syscall.EFBIG
	}
	if end := off + int64(len(p)); end > int64(len(n.data)) {
		n.resize(end)
	}
	m.touch(n)
	return copy(n.data[off:], p), nil
}

// Sync implements nfs.WritableFS. What is written while Before has it is not durable by it.
func (m *Memory) Sync(_ context.Context, file nfs.ID) error {
	m.mu.Lock()
	m.syncs++
	turn := m.syncs
	n, err := m.file(file)
	var data []byte
	if err == nil {
		data = slices.Clone(n.data)
	}
	m.mu.Unlock()
	if err := m.before("Sync", file); err != nil {
		return err
	}
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if turn > n.synced {
		n.durable, n.synced = data, turn
	}
	return nil
}

// SetAttr implements nfs.WritableFS.
func (m *Memory) SetAttr(_ context.Context, id nfs.ID, c nfs.Change) error {
	if err := m.before("SetAttr", id); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.node(id)
	if err != nil {
		return err
	}
	if c.Size != nil {
		if _, err := m.file(id); err != nil {
			return err
		}
		if *c.Size < 0 {
			return syscall.EINVAL
		}
		if *c.Size > maxFile {
			return syscall.EFBIG
		}
	}
	m.set(n, c)
	n.mark = nil
	return nil
}

// Create implements nfs.WritableFS.
func (m *Memory) Create(_ context.Context, dir nfs.ID, name string, how nfs.Creation) (nfs.ID, error) {
	if err := m.before("Create", dir); err != nil {
		return nfs.ID{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	d, err := m.dir(dir)
	if err != nil {
		return nfs.ID{}, err
	}
	if how.Set.Size != nil && *how.Set.Size > maxFile {
		return nfs.ID{}, syscall.EFBIG
	}
	if len(name) > maxName {
		return nfs.ID{}, syscall.ENAMETOOLONG
	}
	if id, ok := d.names[name]; ok {
		return id, m.again(id, how)
	}
	if how.Exclusive != nil {
		how.Set = nfs.Change{UID: how.Set.UID, GID: how.Set.GID}
	}
	id, n := m.make(nfs.KindFile, how.Set)
	if how.Exclusive != nil {
		mark := *how.Exclusive
		n.mark = &mark
	}
	m.add(d, name, id)
	return id, nil
}

// again creates a file that is there.
func (m *Memory) again(id nfs.ID, how nfs.Creation) error {
	n := m.nodes[id]
	switch {
	case how.Exclusive != nil:
		if n.mark == nil || *n.mark != *how.Exclusive {
			return syscall.EEXIST
		}
		return nil
	case how.Guarded:
		return syscall.EEXIST
	case n.attr.Kind != nfs.KindFile:
		return syscall.EEXIST
	case how.Set.Size != nil:
		m.set(n, nfs.Change{Size: how.Set.Size})
	}
	return nil
}

// Mkdir implements nfs.WritableFS.
func (m *Memory) Mkdir(_ context.Context, dir nfs.ID, name string, c nfs.Change) (nfs.ID, error) {
	if err := m.before("Mkdir", dir); err != nil {
		return nfs.ID{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	d, err := m.dir(dir)
	if err != nil {
		return nfs.ID{}, err
	}
	if len(name) > maxName {
		return nfs.ID{}, syscall.ENAMETOOLONG
	}
	if _, ok := d.names[name]; ok {
		return nfs.ID{}, syscall.EEXIST
	}
	id, n := m.make(nfs.KindDir, c)
	n.parent = dir
	m.add(d, name, id)
	return id, nil
}

// Remove implements nfs.WritableFS.
func (m *Memory) Remove(_ context.Context, dir nfs.ID, name string) error {
	if err := m.before("Remove", dir); err != nil {
		return err
	}
	return m.take(dir, name, false)
}

// Rmdir implements nfs.WritableFS.
func (m *Memory) Rmdir(_ context.Context, dir nfs.ID, name string) error {
	if err := m.before("Rmdir", dir); err != nil {
		return err
	}
	return m.take(dir, name, true)
}

func (m *Memory) take(dir nfs.ID, name string, isDir bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, err := m.dir(dir)
	if err != nil {
		return err
	}
	id, ok := d.names[name]
	if !ok {
		return syscall.ENOENT
	}
	n := m.nodes[id]
	switch {
	case isDir && n.attr.Kind != nfs.KindDir:
		return syscall.ENOTDIR
	case !isDir && n.attr.Kind == nfs.KindDir:
		return syscall.EISDIR
	case len(n.names) > 0:
		return syscall.ENOTEMPTY
	}
	m.unlink(d, name)
	m.drop(id)
	return nil
}

// Rename implements nfs.WritableFS.
func (m *Memory) Rename(_ context.Context, from nfs.ID, name string, to nfs.ID, as string) error {
	if err := m.before("Rename", from); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	a, err := m.dir(from)
	if err != nil {
		return err
	}
	b, err := m.dir(to)
	if err != nil {
		return err
	}
	id, ok := a.names[name]
	if !ok {
		return syscall.ENOENT
	}
	if m.below(to, id) {
		return syscall.EINVAL
	}
	if len(as) > maxName {
		return syscall.ENAMETOOLONG
	}
	if old, ok := b.names[as]; ok {
		if old == id {
			return nil
		}
		if err := m.mayReplace(id, old); err != nil {
			return err
		}
		m.unlink(b, as)
		m.drop(old)
	}
	m.unlink(a, name)
	m.add(b, as, id)
	if n := m.nodes[id]; n.attr.Kind == nfs.KindDir {
		n.parent = to
	}
	m.nodes[id].attr.Changed = m.tick()
	return nil
}

func (m *Memory) mayReplace(id, old nfs.ID) error {
	n, o := m.nodes[id], m.nodes[old]
	switch {
	case (n.attr.Kind == nfs.KindDir) != (o.attr.Kind == nfs.KindDir):
		return syscall.EEXIST // RFC 1813 §3.3.14
	case len(o.names) > 0:
		return syscall.ENOTEMPTY
	}
	return nil
}

// below reports whether dir is top, or in it at any depth.
func (m *Memory) below(dir, top nfs.ID) bool {
	for dir != top {
		if dir == m.root {
			return false
		}
		dir = m.nodes[dir].parent
	}
	return true
}
