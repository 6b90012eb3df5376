package fuse

import (
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/holdfast-backup/holdfast/fs"
)

// server answers the kernel's requests.
type server struct {
	fuse.RawFileSystem // ENOSYS for all that is not here
	*conn
	nodes   *nodes
	handles handles
}

func newServer(c *conn, root fs.Node) *server {
	return &server{RawFileSystem: fuse.NewDefaultRawFileSystem(), conn: c, nodes: newNodes(root)}
}

// String implements fuse.RawFileSystem.
func (s *server) String() string { return "holdfast" }

// handles are what is open.
type handles struct {
	mu   sync.RWMutex // guards following
	open map[uint64]any
	last uint64
}

func (h *handles) add(v any) uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.open == nil {
		h.open = map[uint64]any{}
	}
	h.last++
	h.open[h.last] = v
	return h.last
}

func (h *handles) get(id uint64) any {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return h.open[id]
}

func (h *handles) remove(id uint64) any {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := h.open[id]
	delete(h.open, id)
	return v
}

// status is errno in the library's words.
func (c *conn) status(err error) fuse.Status { return fuse.Status(c.errno(err)) }

const stale = fuse.Status(syscall.ESTALE)

// Forget implements fuse.RawFileSystem.
func (s *server) Forget(id, lookups uint64) { s.nodes.forget(id, lookups) }

// Lookup implements fuse.RawFileSystem.
func (s *server) Lookup(_ <-chan struct{}, in *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if name == "." { // asked by who knows a node by its number alone, as a NFS server does
		return s.tell(s.nodes.node(in.NodeId), out)
	}
	dir := s.nodes.dir(in.NodeId)
	if dir == nil || name == ".." {
		return stale
	}
	child, err := dir.Lookup(ctx, name)
	if err != nil {
		return s.status(err)
	}
	switch {
	case in.NodeId == fuse.FUSE_ROOT_ID:
		out.SetEntryTimeout(vmTTL)
	case s.nodes.immutable(in.NodeId): // an entry may be kept for long only where its directory cannot change
		out.SetEntryTimeout(immutableTTL)
	default:
		out.SetEntryTimeout(pointTTL)
	}
	return s.tell(child, out)
}

// tell tells the kernel of a node.
func (s *server) tell(n fs.Node, out *fuse.EntryOut) fuse.Status {
	if n == nil {
		return stale
	}
	a, err := n.Attr(ctx)
	if err != nil {
		return s.status(err)
	}
	fill(a, &out.Attr)
	out.SetAttrTimeout(ttl(a))
	out.NodeId = s.nodes.add(n, a)
	return fuse.OK
}

func ttl(a fs.Attr) time.Duration {
	if a.Immutable {
		return immutableTTL
	}
	return 0
}

// GetAttr implements fuse.RawFileSystem.
func (s *server) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	n := s.nodes.node(in.NodeId)
	if n == nil {
		return stale
	}
	a, err := n.Attr(ctx)
	if err != nil {
		return s.status(err)
	}
	fill(a, &out.Attr)
	out.SetTimeout(ttl(a))
	return fuse.OK
}

// Access implements fuse.RawFileSystem. Who may use the mount may read all of it; that nothing can be written the kernel knows.
// To execute needs a bit that says so.
func (s *server) Access(_ <-chan struct{}, in *fuse.AccessIn) fuse.Status {
	const execute = 1
	if in.Mask&execute == 0 {
		return fuse.OK
	}
	var out fuse.AttrOut
	if st := s.GetAttr(nil, &fuse.GetAttrIn{InHeader: in.InHeader}, &out); !st.Ok() {
		return st
	}
	if out.Mode&syscall.S_IFMT != syscall.S_IFDIR && out.Mode&0o111 == 0 {
		return fuse.EACCES
	}
	return fuse.OK
}

// Readlink implements fuse.RawFileSystem.
func (s *server) Readlink(_ <-chan struct{}, in *fuse.InHeader) ([]byte, fuse.Status) {
	l := s.nodes.link(in.NodeId)
	if l == nil {
		return nil, stale
	}
	target, err := l.Target(ctx)
	return []byte(target), s.status(err)
}

// StatFs implements fuse.RawFileSystem.
func (s *server) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	out.NameLen = 255
	return fuse.OK
}

// Ioctl implements fuse.RawFileSystem.
func (s *server) Ioctl(<-chan struct{}, *fuse.IoctlIn, []byte, *fuse.IoctlOut, []byte) fuse.Status {
	return fuse.Status(syscall.ENOTTY)
}
