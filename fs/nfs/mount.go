package nfs

import (
	"cmp"
	"maps"
	"net/netip"
	"path"
	"slices"
	"strings"
	"sync"
)

// A mountStat is mountstat3, RFC 1813 §5.1.5.
type mountStat uint32

const (
	mountOK          mountStat = 0
	mountNoEnt       mountStat = 2
	mountIO          mountStat = 5
	mountAccess      mountStat = 13
	mountNotDir      mountStat = 20
	mountInval       mountStat = 22
	mountNameTooLong mountStat = 63
	mountFault       mountStat = 10006
)

var mountProgram = program{id: progMount, version: versMount, procs: []procedure{
	{name: "MOUNT NULL", serve: func(*request) {}},
	{name: "MNT", serve: (*request).mnt},
	{name: "DUMP", serve: (*request).dump},
	{name: "UMNT", serve: (*request).umnt},
	{name: "UMNTALL", serve: (*request).umntall},
	{name: "EXPORT", serve: (*request).exportList},
}}

// mounts is what clients said that they mounted. It is for people and Clients:
// nothing depends on it, clients go without a word.
type mounts struct {
	mu sync.Mutex
	// guards following
	table map[mount]bool
}

type mount struct {
	addr netip.Addr
	path string
}

// Bounds of the table: of all mounts, and of one client's.
const (
	maxMounts       = 4096
	maxClientMounts = 64
)

func (m *mounts) add(n mount) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.table) >= maxMounts {
		return
	}
	of := 0
	for o := range m.table {
		if o.addr == n.addr {
			of++
		}
	}
	if of < maxClientMounts {
		m.table[n] = true
	}
}

func (m *mounts) remove(gone func(mount) bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	maps.DeleteFunc(m.table, func(n mount, _ bool) bool { return gone(n) })
}

// list gives the mounts, sorted.
func (m *mounts) list() []mount {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.SortedFunc(maps.Keys(m.table), func(a, b mount) int {
		return cmp.Or(a.addr.Compare(b.addr), cmp.Compare(a.path, b.path))
	})
}

// path gives a path to mount as it came.
func (d *decoder) path() string { return string(d.opaque(maxRecord)) }

func (r *request) mnt() {
	p := r.args.path()
	if r.garbage() {
		return
	}
	id, st := r.resolve(p)
	r.w.u32(uint32(st))
	if st != mountOK {
		return
	}
	r.srv.mounts.add(mount{r.addr, path.Clean(p)})
	r.w.handle(handle{r.e.ID, id})
	r.w.u32(2)
	r.w.u32(flavorSys)
	r.w.u32(flavorNone)
}

// resolve finds the directory that is to be mounted.
func (r *request) resolve(p string) (ID, mountStat) {
	switch {
	case len(p) > maxPath:
		return ID{}, mountNameTooLong
	case !path.IsAbs(p) || strings.ContainsRune(p, 0):
		return ID{}, mountInval
	}
	e, rest := r.srv.exports.Load().holding(path.Clean(p))
	if e == nil || !e.enter() {
		return ID{}, mountNoEnt
	}
	r.e = e
	if !e.allows(r.addr) {
		return ID{}, mountAccess
	}
	return r.walk(rest)
}

// walk goes down from the root of the export.
func (r *request) walk(rest string) (ID, mountStat) {
	id := r.e.FS.Root()
	for name := range strings.SplitSeq(rest, "/") {
		if name == "" {
			break
		}
		if len(name) > maxName {
			return id, mountNameTooLong
		}
		var err error
		if id, err = r.e.FS.Lookup(r.ctx, id, name); err != nil {
			return id, r.mountStatus(err)
		}
	}
	a, err := r.e.FS.Attr(r.ctx, id)
	if err != nil {
		return id, r.mountStatus(err)
	}
	if a.Kind != KindDir {
		return id, mountNotDir
	}
	return id, mountOK
}

// mountStatus says in the words of MOUNT how a look went.
func (r *request) mountStatus(err error) mountStat {
	switch st := r.status(err); st {
	case statPerm, statNoEnt, statAccess, statNotDir, statInval, statNameTooLong, statNotSupp:
		return mountStat(st) // the same numbers
	case statStale:
		return mountNoEnt
	case statIO:
		return mountIO
	}
	return mountFault
}

// maxList is where the lists of MOUNT end, bytes: there is no way to ask for the rest.
func (r *request) maxList() int {
	if r.udp {
		return maxUDP - 64
	}
	return maxDir
}

func (r *request) dump() {
	x := r.srv.exports.Load()
	for _, m := range r.srv.mounts.list() {
		if e, _ := x.holding(m.path); e == nil || !e.allows(r.addr) { // nothing for strangers
			continue
		}
		host := m.addr.String()
		if len(r.w.b)+len(host)+len(m.path)+24 > r.maxList() {
			break
		}
		r.w.boolean(true)
		r.w.str(host)
		r.w.str(m.path)
	}
	r.w.boolean(false)
}

func (r *request) umnt() {
	p := r.args.path()
	if r.garbage() {
		return
	}
	p = path.Clean(p)
	r.srv.mounts.remove(func(m mount) bool { return m.addr == r.addr && m.path == p })
}

func (r *request) umntall() {
	r.srv.mounts.remove(func(m mount) bool { return m.addr == r.addr })
}

// exportList shows a client what it may use. The groups are who may.
func (r *request) exportList() {
	for _, e := range r.srv.exports.Load().byPath {
		size := 24 + len(e.Path) + len(e.allowed)*(8+len("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128"))
		if !e.allows(r.addr) || len(r.w.b)+size > r.maxList() {
			continue
		}
		r.w.boolean(true)
		r.w.str(e.Path)
		for _, p := range e.allowed {
			r.w.boolean(true)
			r.w.str(p.String())
		}
		r.w.boolean(false)
	}
	r.w.boolean(false)
}
