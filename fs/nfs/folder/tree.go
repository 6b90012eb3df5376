package folder

import (
	"context"
	"errors"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/nfs"
)

// maxDepth is how deep directories may lie in each other.
const maxDepth = 10_000

// errMoved: the node is not where it was.
var errMoved = errors.New("node has moved")

// where gives what is known of a file of data/.
func (f *Folder) where(id nfs.ID) (node, bool) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	n, ok := f.nodes[id]
	return n, ok
}

// at calls fn with the directory that a file is in and its name there. fn says errMoved when it does not find it; then it is
// called again if the file was renamed meanwhile, else the file is forgotten, and the error is ESTALE.
func (f *Folder) at(id nfs.ID, depth int, fn func(dir *handle, n node) error) error {
	for {
		n, ok := f.where(id)
		if !ok || depth > maxDepth {
			return syscall.ESTALE
		}
		dir, err := f.open(n.parent, depth+1)
		if err == nil {
			err = fn(dir, n)
			f.release(dir)
		}
		if !errors.Is(err, errMoved) && !errors.Is(err, syscall.ESTALE) {
			return err
		}
		if f.forget(id, n) {
			return syscall.ESTALE
		}
	}
}

// forget reports false when the file is elsewhere meanwhile.
func (f *Folder) forget(id nfs.ID, n node) bool {
	f.mu.Lock()
	now, ok := f.nodes[id]
	if ok && now != n {
		f.mu.Unlock()
		return false
	}
	delete(f.nodes, id)
	f.mu.Unlock()
	f.cache.drop(id)
	return true
}

// open gives an open file or directory of data/. EINVAL for a link.
func (f *Folder) open(id nfs.ID, depth int) (h *handle, err error) {
	if id == f.root.id {
		return f.root, nil
	}
	if h := f.cache.get(id); h != nil {
		return h, nil
	}
	err = f.at(id, depth, func(dir *handle, n node) error {
		if n.kind == nfs.KindLink {
			return syscall.EINVAL
		}
		h, err = f.openIn(dir.fd, id, n)
		return err
	})
	if err != nil {
		return nil, err
	}
	h = f.cache.add(h)
	if _, ok := f.where(id); !ok { // removed meanwhile, before it was there to be dropped
		f.cache.drop(id)
	}
	return h, nil
}

func (f *Folder) release(h *handle) {
	if h != f.root {
		f.cache.release(h)
	}
}

// openIn opens n in its directory, if it is the file of that ID.
func (f *Folder) openIn(dir int, id nfs.ID, n node) (*handle, error) {
	fd, err := unix.Openat(dir, n.name, openPath, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil, errMoved
	}
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	is, _, err := identify(fd, "", f.mount)
	if err != nil || is != id {
		return nil, errMoved
	}
	return reopen(fd, id, n.kind)
}

// reopen opens what is known to be a file or directory: an open by its name could meet a device by now.
func reopen(fd int, id nfs.ID, kind nfs.Kind) (*handle, error) {
	h := &handle{id: id, dir: kind == nfs.KindDir, writable: kind == nfs.KindFile}
	self := "/proc/self/fd/" + strconv.Itoa(fd)
	if h.dir {
		var err error
		h.fd, err = unix.Open(self, openDir&^unix.O_NOFOLLOW, 0)
		return h, err
	}
	var err error
	if h.fd, err = unix.Open(self, unix.O_RDWR|unix.O_CLOEXEC, 0); errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		h.writable = false
		h.fd, err = unix.Open(self, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	}
	return h, err
}

// openDir gives an open directory. ENOTDIR for anything else.
func (f *Folder) openDir(id nfs.ID) (*handle, error) {
	if id.File&placedBit != 0 {
		if _, err := f.placed(id); err != nil {
			return nil, err
		}
		return nil, syscall.ENOTDIR
	}
	if n, ok := f.where(id); ok && n.kind != nfs.KindDir {
		return nil, syscall.ENOTDIR
	}
	return f.open(id, 0)
}

// child says what has a name in a directory of data/, and remembers it. ENOENT for what is not shown, too.
func (f *Folder) child(dir *handle, name string) (nfs.ID, node, error) {
	id, st, err := identify(dir.fd, name, f.mount)
	if err != nil {
		return nfs.ID{}, node{}, absent(err)
	}
	if n, ok := f.where(id); ok && n.parent == dir.id && n.name == name {
		return id, n, nil
	}
	// No file is renamed here while f.mu is held.
	f.mu.Lock()
	defer f.mu.Unlock()
	if id, st, err = identify(dir.fd, name, f.mount); err != nil {
		return nfs.ID{}, node{}, absent(err)
	}
	return id, f.put(id, &st, dir.id, name), nil
}

// put remembers where a file is now. f.mu is held.
func (f *Folder) put(id nfs.ID, st *unix.Statx_t, dir nfs.ID, name string) node {
	f.turn++
	n := node{kind: kindOf(st), parent: dir, name: name, turn: f.turn}
	f.nodes[id] = n
	return n
}

// absent is the error for a name that identify did not like.
func absent(err error) error {
	if errors.Is(err, errHidden) {
		return syscall.ENOENT
	}
	return err
}

// Lookup is that of nfs.FS.
func (f *Folder) Lookup(_ context.Context, dir nfs.ID, name string) (nfs.ID, error) {
	if err := f.enter(); err != nil {
		return nfs.ID{}, err
	}
	defer f.gate.RUnlock()
	d, err := f.openDir(dir)
	if err != nil {
		return nfs.ID{}, err
	}
	defer f.release(d)
	if err := checkName(name); err != nil {
		return nfs.ID{}, err
	}
	return f.lookup(d, name)
}

func (f *Folder) lookup(d *handle, name string) (nfs.ID, error) {
	if p := f.slot(d.id, name); p != nil {
		return p.id, nil
	}
	id, _, err := f.child(d, name)
	if err == syscall.ENOENT {
		// A placed file may have come and replaced what was there since it was not found.
		if p := f.slot(d.id, name); p != nil {
			return p.id, nil
		}
	}
	return id, err
}

// Parent is that of nfs.FS.
func (f *Folder) Parent(_ context.Context, dir nfs.ID) (nfs.ID, error) {
	if err := f.enter(); err != nil {
		return nfs.ID{}, err
	}
	defer f.gate.RUnlock()
	d, err := f.openDir(dir)
	if err != nil {
		return nfs.ID{}, err
	}
	defer f.release(d)
	if dir == f.root.id {
		return dir, nil
	}
	n, ok := f.where(dir)
	if !ok {
		return nfs.ID{}, syscall.ESTALE
	}
	return n.parent, nil
}

// Attr is that of nfs.FS.
func (f *Folder) Attr(_ context.Context, id nfs.ID) (nfs.Attr, error) {
	if err := f.enter(); err != nil {
		return nfs.Attr{}, err
	}
	defer f.gate.RUnlock()
	if id.File&placedBit != 0 {
		p, err := f.placed(id)
		if err != nil {
			return nfs.Attr{}, err
		}
		return p.attr(), nil
	}
	h := f.root
	if id != h.id {
		h = f.cache.get(id)
	}
	if h == nil {
		return f.attrByName(id)
	}
	defer f.release(h)
	var st unix.Stat_t
	if err := unix.Fstat(h.fd, &st); err != nil {
		return nfs.Attr{}, err
	}
	if st.Nlink == 0 { // removed by somebody else
		n, _ := f.where(id)
		f.forget(id, n)
		return nfs.Attr{}, syscall.ESTALE
	}
	return attrOf(&st), nil
}

// attrByName asks the directory that the file is in.
func (f *Folder) attrByName(id nfs.ID) (a nfs.Attr, err error) {
	err = f.at(id, 0, func(dir *handle, n node) error {
		is, st, err := identify(dir.fd, n.name, f.mount)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, errHidden) || err == nil && is != id {
			return errMoved
		}
		if err != nil {
			return err
		}
		a = nfs.Attr{
			Kind: kindOf(&st), Mode: uint32(st.Mode) & 0o7777, Links: st.Nlink, UID: st.Uid, GID: st.Gid,
			Size: int64(st.Size), Used: int64(st.Blocks) * 512,
			Accessed: timeOf(st.Atime), Modified: timeOf(st.Mtime), Changed: timeOf(st.Ctime),
		}
		return nil
	})
	return a, err
}

func timeOf(t unix.StatxTimestamp) time.Time { return time.Unix(t.Sec, int64(t.Nsec)) }

// attrOf is for files and directories.
func attrOf(st *unix.Stat_t) nfs.Attr {
	kind := nfs.KindFile
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		kind = nfs.KindDir
	}
	return nfs.Attr{
		Kind: kind, Mode: st.Mode & 0o7777, Links: uint32(st.Nlink), UID: st.Uid, GID: st.Gid,
		Size: st.Size, Used: st.Blocks * 512,
		Accessed: time.Unix(st.Atim.Unix()), Modified: time.Unix(st.Mtim.Unix()), Changed: time.Unix(st.Ctim.Unix()),
	}
}

// Readlink is that of nfs.FS. EINVAL for what is no link (RFC 1813 §2.6).
func (f *Folder) Readlink(_ context.Context, link nfs.ID) (target string, err error) {
	if err := f.enter(); err != nil {
		return "", err
	}
	defer f.gate.RUnlock()
	if link.File&placedBit != 0 {
		if _, err := f.placed(link); err != nil {
			return "", err
		}
		return "", syscall.EINVAL
	}
	if link == f.root.id {
		return "", syscall.EINVAL
	}
	err = f.at(link, 0, func(dir *handle, n node) error {
		if n.kind != nfs.KindLink {
			return syscall.EINVAL
		}
		if is, _, err := identify(dir.fd, n.name, f.mount); err != nil || is != link {
			return errMoved
		}
		b := make([]byte, unix.PathMax)
		k, err := unix.Readlinkat(dir.fd, n.name, b)
		if err != nil {
			return errMoved
		}
		target = string(b[:k])
		return nil
	})
	return target, err
}

// walk finds all that is in data/.
func (f *Folder) walk() error {
	for todo := []nfs.ID{f.root.id}; len(todo) > 0; {
		dir := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		below, err := f.walkDir(dir)
		if err != nil {
			return err
		}
		todo = append(todo, below...)
	}
	return nil
}

// walkDir gives the directories in a directory.
func (f *Folder) walkDir(dir nfs.ID) (below []nfs.ID, err error) {
	d, err := f.open(dir, 0)
	if errors.Is(err, syscall.ESTALE) || errors.Is(err, unix.EACCES) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.release(d)
	names, err := namesIn(d.fd)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		id, n, err := f.child(d, name)
		switch {
		case errors.Is(err, syscall.ENOENT): // not shown, or gone
		case err != nil:
			return nil, err
		case n.kind == nfs.KindDir:
			below = append(below, id)
		}
	}
	return below, nil
}
