package nfs

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
)

// Export is a file system under a path.
type Export struct {
	Path string // absolute and clean: what clients mount. Directories below it can be mounted too
	// ID is in the file handles and is the fsid that clients see: unique, and the same after a restart.
	ID uint64
	FS FS
	// Writable lets clients change it; FS must be a WritableFS.
	Writable bool
	// Clients may use the export; nobody else. When it is empty, those of this machine may.
	Clients []netip.Prefix
	// NoRootSquash lets the clients' root be root. ESXi needs it.
	NoRootSquash bool
	// AnonUID and AnonGID are who callers without a name are, and root when it is squashed; 0 stands for 65534, nobody.
	AnonUID, AnonGID uint32
}

// Errors of Export and Unexport.
var (
	ErrExported    = errors.New("exported already")
	ErrNotExported = errors.New("not exported")
)

// An export is one that is served.
type export struct {
	Export
	allowed  []netip.Prefix // Clients, or this machine
	writable WritableFS     // nil for a read-only one
	verifier atomic.Uint64  // of writes, RFC 1813 §3.3.7
	changes  changes
	syncs    syncs
	guard    sync.Mutex // held while a guarded SETATTR is at work

	bytesRead, bytesWritten atomic.Uint64
	ops                     [22]atomic.Uint64 // procedure => calls

	use  sync.RWMutex // held for reading while a request is at work
	gone bool         // guarded by use

	mu sync.Mutex
	// guards following
	conns map[*conn]bool // that are open and have used it
}

// enter keeps the FS in use until leave, if it is still exported.
func (e *export) enter() bool {
	e.use.RLock()
	if e.gone {
		e.use.RUnlock()
		return false
	}
	return true
}

func (e *export) leave() { e.use.RUnlock() }

func (e *export) allows(addr netip.Addr) bool {
	for _, p := range e.allowed {
		if p.Contains(addr) {
			return true
		}
	}
	return false
}

// exports are those at one time; they are never changed, but replaced.
type exports struct {
	byID    map[uint64]*export
	byPath  []*export // sorted
	awaited []*export // by Expect
}

// allows reports whether a machine may use one of them, or of those that are to come.
func (x *exports) allows(addr netip.Addr) bool {
	may := func(e *export) bool { return e.allows(addr) }
	return slices.ContainsFunc(x.byPath, may) || slices.ContainsFunc(x.awaited, may)
}

// missing is what clients are told of an export that there is not.
func (x *exports) missing(id uint64) status {
	if slices.ContainsFunc(x.awaited, func(e *export) bool { return e.ID == id }) {
		return statJukebox
	}
	return statStale
}

func (x *exports) find(path string) *export {
	i, ok := slices.BinarySearchFunc(x.byPath, path, func(e *export, path string) int { return cmp.Compare(e.Path, path) })
	if !ok {
		return nil
	}
	return x.byPath[i]
}

// holding finds the export that a path is in, and the rest of the path.
func (x *exports) holding(p string) (e *export, rest string) {
	for dir := p; ; dir = path.Dir(dir) {
		if e := x.find(dir); e != nil {
			return e, strings.Trim(strings.TrimPrefix(p, dir), "/")
		}
		if dir == "/" {
			return nil, ""
		}
	}
}

// newExports has the exports of list, and of those that are awaited the ones that it does not have.
func newExports(list, awaited []*export) *exports {
	x := &exports{byID: make(map[uint64]*export), byPath: list}
	for _, e := range list {
		x.byID[e.ID] = e
	}
	slices.SortFunc(list, func(a, b *export) int { return cmp.Compare(a.Path, b.Path) })
	for _, e := range awaited {
		if x.byID[e.ID] == nil {
			x.awaited = append(x.awaited, e)
		}
	}
	return x
}

// maxPath is MNTPATHLEN, RFC 1813 §5.1.3.
const maxPath = 1024

func (x *Export) check() (WritableFS, error) {
	if !path.IsAbs(x.Path) || path.Clean(x.Path) != x.Path || len(x.Path) > maxPath || strings.ContainsRune(x.Path, 0) {
		return nil, errors.New("not a clean absolute path")
	}
	if x.FS == nil {
		return nil, errors.New("no file system")
	}
	for _, p := range x.Clients {
		if !p.IsValid() {
			return nil, errors.New("clients without an address")
		}
	}
	w, ok := x.FS.(WritableFS)
	if x.Writable && !ok {
		return nil, fmt.Errorf("cannot be written: %w", syscall.EROFS)
	}
	if !x.Writable {
		return nil, nil
	}
	return w, nil
}

// Export adds an export; it may be called while the server runs. ErrExported is for a path or an ID that is taken.
func (s *Server) Export(x Export) error {
	w, err := x.check()
	if err != nil {
		return fmt.Errorf("nfs: export %q: %w", x.Path, err)
	}
	x.Clients = slices.Clone(x.Clients)
	x.AnonUID, x.AnonGID = orDefault(x.AnonUID, nobody), orDefault(x.AnonGID, nobody)
	e := &export{Export: x, allowed: x.allowed(), writable: w, conns: make(map[*conn]bool)}
	e.verifier.Store(newVerifier())
	e.changes.files, e.syncs.files = make(map[ID]change), make(map[ID]*syncing)

	s.mu.Lock()
	defer s.mu.Unlock()
	s.start()
	now := s.exports.Load()
	if now.byID[x.ID] != nil || now.find(x.Path) != nil {
		return fmt.Errorf("nfs: export %q with ID %#x: %w", x.Path, x.ID, ErrExported)
	}
	s.exports.Store(newExports(append(slices.Clone(now.byPath), e), now.awaited))
	return nil
}

// Expect says that an export of this ID, for these clients, is to come, perhaps again: clients that have it mounted already are told to ask later
// (NFS3ERR_JUKEBOX, RFC 1813 §2.6) and not that their files are gone. It ends with Export, or Unexpect.
func (s *Server) Expect(id uint64, clients []netip.Prefix) {
	x := Export{ID: id, Clients: slices.Clone(clients)}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.start()
	now := s.exports.Load()
	s.exports.Store(newExports(slices.Clone(now.byPath), append(slices.Clone(now.awaited), &export{Export: x, allowed: x.allowed()})))
}

// Unexpect says that no export of this ID is to come.
func (s *Server) Unexpect(id uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.start()
	now := s.exports.Load()
	s.exports.Store(newExports(slices.Clone(now.byPath), slices.DeleteFunc(slices.Clone(now.awaited), func(e *export) bool { return e.ID == id })))
}

// allowed are the clients, or this machine.
func (x *Export) allowed() (list []netip.Prefix) {
	for _, p := range x.Clients {
		list = append(list, unmapped(p))
	}
	if len(list) == 0 {
		return thisMachine
	}
	return list
}

var thisMachine = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}

// plain gives an address as exports have them: IPv4 as such, and without a zone, which no prefix contains.
func plain(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }

// unmapped turns a prefix of IPv4 addresses in IPv6 into one of IPv4, as clients' addresses are.
func unmapped(p netip.Prefix) netip.Prefix {
	if p.Addr().Is4In6() && p.Bits() >= 96 {
		return netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p
}

// Unexport ends an export, and returns when its FS is not in use any more.
// Clients that have it mounted get ESTALE until it is exported again.
func (s *Server) Unexport(path string) error {
	s.mu.Lock()
	s.start()
	now := s.exports.Load()
	e := now.find(path)
	if e == nil {
		s.mu.Unlock()
		return fmt.Errorf("nfs: %q: %w", path, ErrNotExported)
	}
	s.exports.Store(newExports(slices.DeleteFunc(slices.Clone(now.byPath), func(o *export) bool { return o == e }), now.awaited))
	s.mu.Unlock()
	e.use.Lock()
	e.gone = true
	e.use.Unlock()
	return nil
}

// Exports gives what is exported, sorted by path.
func (s *Server) Exports() []Export {
	x := s.exports.Load()
	if x == nil {
		return nil
	}
	var list []Export
	for _, e := range x.byPath {
		list = append(list, e.Export)
	}
	return list
}

// Client is a machine that uses an export.
type Client struct {
	Addr  netip.Addr
	Conns int // that are open and have used the export
	// Mounts are the paths that it mounted and did not unmount, as far as clients say so.
	Mounts []string
}

// Clients gives the machines that use the export of that path, sorted by address.
func (s *Server) Clients(path string) []Client {
	x := s.exports.Load()
	if x == nil || x.find(path) == nil {
		return nil
	}
	e := x.find(path)
	found := make(map[netip.Addr]*Client)
	get := func(addr netip.Addr) *Client {
		if found[addr] == nil {
			found[addr] = &Client{Addr: addr}
		}
		return found[addr]
	}
	e.mu.Lock()
	for c := range e.conns {
		get(c.addr).Conns++
	}
	e.mu.Unlock()
	for _, m := range s.mounts.list() {
		if of, _ := x.holding(m.path); of == e {
			c := get(m.addr)
			c.Mounts = append(c.Mounts, m.path)
		}
	}
	byAddr := func(a, b *Client) int { return a.Addr.Compare(b.Addr) }
	var list []Client
	for _, c := range slices.SortedFunc(maps.Values(found), byAddr) {
		list = append(list, *c)
	}
	return list
}

// Stats is what an export did since it was exported.
type Stats struct {
	BytesRead, BytesWritten uint64
	Ops                     map[string]uint64 // name of the procedure, as READ => calls
}

// Stats gives the counters of the export of that path.
func (s *Server) Stats(path string) (Stats, error) {
	x := s.exports.Load()
	if x == nil || x.find(path) == nil {
		return Stats{}, fmt.Errorf("nfs: %q: %w", path, ErrNotExported)
	}
	e := x.find(path)
	st := Stats{BytesRead: e.bytesRead.Load(), BytesWritten: e.bytesWritten.Load(), Ops: make(map[string]uint64)}
	for i := range e.ops {
		if n := e.ops[i].Load(); n > 0 {
			st.Ops[nfsProgram.procs[i].name] = n
		}
	}
	return st, nil
}
