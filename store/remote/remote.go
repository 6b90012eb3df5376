// Package remote shares one repository between processes. The first process
// that opens a repository owns its index and serves it on a socket inside the repository,
// open to the same user only; later ones use it through that socket without noticing; when
// the owner ends or dies, one of them takes over.
//
//	repo, err := store.Open(ctx, bucket, remote.Index(dir), options)
//
// Only the index goes over the socket. Processes on one host read and write packs
// themselves, so an owner that is killed takes nothing with it: what a client has made
// durable it tells the next owner.
package remote

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
)

const (
	lockName   = "owner.lock"
	socketName = "owner.sock"
	indexDir   = "index"
	// electionTimeout is how long a process waits for an owner that neither answers nor ends.
	electionTimeout = 15 * time.Second
)

// Index opens the index of the repository in dir: as its owner, through its
// owner, or, where nothing may be written, for reading alone.
func Index(dir string) store.IndexOpener {
	return func(ctx context.Context, repo [16]byte, check store.IndexCheck) (store.Index, error) {
		x := &index{dir: dir, repo: repo, check: check}
		if _, err := x.elect(ctx, 0); err != nil {
			return nil, err
		}
		return x, nil
	}
}

// NewIndex is Index, but makes the index anew. ErrLocked when another process has it.
func NewIndex(dir string) store.IndexOpener {
	return func(ctx context.Context, repo [16]byte, check store.IndexCheck) (store.Index, error) {
		x := &index{dir: dir, repo: repo, check: check, anew: true}
		if _, err := x.elect(ctx, 0); err != nil {
			return nil, err
		}
		return x, nil
	}
}

// index is owner or client, whichever its process is at the moment.
type index struct {
	dir   string
	repo  [16]byte
	check store.IndexCheck
	anew  bool // to be the owner of a new index, or nothing

	electing sync.Mutex // held while a new owner is sought; guards following
	lowNext  bool       // low, inMemory, frozen and seen of what become has opened
	memNext  bool
	icedNext bool
	seenNext string
	private  store.Index // in memory, of a process that may write nothing; nil before it is needed

	using sync.RWMutex // held for reading while cur is used; never taken with mu held

	mu       sync.Mutex // guards following
	cur      store.Index
	term     int // counts elections
	srv      *server
	lock     *os.File
	low      bool   // cur cannot be written, since there is too little room
	memory   bool   // if so, one in memory is wanted
	inMemory bool   // cur is the owner's, and in memory
	frozen   bool   // nobody tells cur what changes: it was opened for reading alone
	seen     string // if so, what the repository looked like then
	closed   bool
}

var (
	_ store.Index       = (*index)(nil)
	_ store.IndexWriter = (*index)(nil)
)

// do runs fn with the present index, and again with the next one when the owner
// went away. Every operation may be carried out twice without harm.
func (x *index) do(ctx context.Context, fn func(store.Index) error) error {
	for {
		x.using.RLock()
		x.mu.Lock()
		cur, term, frozen, seen := x.cur, x.term, x.frozen, x.seen
		x.mu.Unlock()
		err := errGone // what a frozen index says of a repository that has changed means nothing
		if !frozen || seen == x.look() {
			err = fn(cur)
		}
		x.using.RUnlock()
		if !errors.Is(err, errGone) {
			return err
		}
		if _, err = x.elect(ctx, term); err != nil {
			return err
		}
	}
}

// look is another text whenever a pack or a point came or went.
func (x *index) look() string {
	s := ""
	for _, folder := range []string{"packs", "points", "gc"} {
		if st, err := os.Stat(filepath.Join(x.dir, folder)); err == nil {
			s += fmt.Sprint(st.ModTime().UnixNano(), " ")
			if age := time.Since(st.ModTime()); age >= 0 && age < timeGrain {
				s += fmt.Sprint(age) // it may change again at what is the same time
			}
		}
	}
	return s
}

// timeGrain is more than the steps in which file systems here count time: 10 ms at most.
const timeGrain = 20 * time.Millisecond

// elect makes this process the owner, or connects it to the one there is. It
// does nothing when that has happened since term.
func (x *index) elect(ctx context.Context, term int) (store.Index, error) {
	x.electing.Lock()
	defer x.electing.Unlock()
	x.mu.Lock()
	cur, now, closed := x.cur, x.term, x.closed
	x.mu.Unlock()
	switch {
	case closed:
		return nil, fs.ErrClosed
	case now != term:
		return cur, nil
	}
	old := cur
	var last error
	for deadline := time.Now().Add(electionTimeout); ; {
		cur, srv, lock, err := x.become(ctx)
		if err == nil {
			x.mu.Lock()
			x.cur, x.srv, x.lock, x.term, x.low, x.frozen, x.seen = cur, srv, lock, term+1, x.lowNext, x.icedNext, x.seenNext
			x.inMemory = x.memNext
			x.mu.Unlock()
			if old != nil && old != cur {
				x.using.Lock() // others may be in the middle of a call
				old.Close()
				x.using.Unlock()
			}
			if cur != x.private {
				x.private = nil
			}
			return cur, nil
		}
		if !errors.Is(err, errGone) {
			return nil, err
		}
		last = err
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("%w by another process that does not answer: %v", store.ErrLocked, last)
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// become tries once: owner, else client. errGone says try again.
func (x *index) become(ctx context.Context) (store.Index, *server, *os.File, error) {
	lock, err := os.OpenFile(filepath.Join(x.dir, lockName), os.O_RDWR|os.O_CREATE|syscall.O_CLOEXEC, 0o600)
	if !x.anew && (errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EROFS) || errors.Is(err, syscall.ENOSPC)) {
		x.lowNext, x.memNext, x.icedNext, x.seenNext = false, false, true, x.look()
		cur, err := x.mayNotWrite(ctx)
		return cur, nil, nil, err
	}
	if err != nil {
		return nil, nil, nil, named(err)
	}
	err = unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	free, ferr := bucket.FreeBytes(x.dir)
	x.mu.Lock()
	memory := x.memory
	x.mu.Unlock()
	low := err == nil && ferr == nil && free < store.MinFree
	x.memNext = low && memory
	x.lowNext, x.icedNext, x.seenNext = low && !memory, low && !memory, x.look()
	if x.lowNext {
		lock.Close() // a reader serves nobody
		if x.anew {
			return nil, nil, nil, fmt.Errorf("index: %w", bucket.ErrFull)
		}
		cur, err := x.readOnly(ctx)
		return cur, nil, nil, err
	} else if err == nil {
		open := store.LocalIndex(filepath.Join(x.dir, indexDir), false)
		switch {
		case x.anew:
			open = store.NewLocalIndex(filepath.Join(x.dir, indexDir))
		case low:
			open = store.MemoryIndex()
		}
		cur, srv, err := x.own(ctx, open)
		if err != nil {
			lock.Close()
			return nil, nil, nil, err
		}
		return cur, srv, lock, nil
	}
	lock.Close()
	if !errors.Is(err, syscall.EWOULDBLOCK) {
		return nil, nil, nil, fmt.Errorf("lock: %w", err)
	}
	if x.anew {
		return nil, nil, nil, fmt.Errorf("index: %w by another process", store.ErrLocked)
	}
	path, done, err := x.socketPath()
	if err != nil {
		return nil, nil, nil, err
	}
	defer done()
	conn, err := net.Dial("unix", path)
	if err != nil {
		return nil, nil, nil, errors.Join(errGone, err)
	}
	c, err := newClient(conn, x.repo)
	if err != nil {
		conn.Close()
		return nil, nil, nil, err
	}
	return c, nil, nil, nil
}

// Write implements store.IndexWriter. Where there is too little room for an index
// that can be written, one in memory takes its place for the rest of the owner's process: what it is
// told follows from the objects in the repository, so the one on the medium is brought up to
// date by the next owner that has room.
func (x *index) Write(ctx context.Context) error {
	x.mu.Lock()
	term, low, owner := x.term, x.low, x.srv != nil
	x.memory = true
	x.mu.Unlock()
	switch {
	case low:
		_, err := x.elect(ctx, term)
		return err
	case owner:
		return x.intoMemory(ctx)
	}
	return x.do(ctx, func(i store.Index) error {
		if w, ok := i.(store.IndexWriter); ok {
			return w.Write(ctx)
		}
		return nil // a process that may write nothing will be told so
	})
}

// intoMemory makes the owner's index one in memory if the medium has become too full to
// write the one it has. Clients wait meanwhile, and find other numbers of packs after it.
func (x *index) intoMemory(ctx context.Context) error {
	if free, err := bucket.FreeBytes(x.dir); err != nil || free >= store.MinFree {
		return nil
	}
	if !x.electing.TryLock() {
		return nil // somebody else is about to, or it ends and waits for this answer
	}
	defer x.electing.Unlock()
	x.using.Lock()
	defer x.using.Unlock()
	x.mu.Lock()
	old, srv, done := x.cur, x.srv, x.closed || x.inMemory
	x.mu.Unlock()
	if done || srv == nil {
		return nil
	}
	cur, err := store.MemoryIndex()(ctx, x.repo, x.check)
	if err != nil {
		return err
	}
	x.mu.Lock()
	x.cur, x.inMemory = cur, true
	x.mu.Unlock()
	srv.index = cur
	return old.Close()
}

// own opens the index and serves it. The lock is held.
func (x *index) own(ctx context.Context, open store.IndexOpener) (store.Index, *server, error) {
	local, err := open(ctx, x.repo, x.check)
	if err != nil {
		return nil, nil, err
	}
	x.anew = false
	path, done, err := x.socketPath()
	if err != nil {
		local.Close()
		return nil, nil, err
	}
	defer done()
	os.Remove(path) // left by an owner that was killed; we hold the lock
	ln, err := net.Listen("unix", path)
	if err != nil {
		local.Close()
		return nil, nil, fmt.Errorf("socket: %w", err)
	}
	ln.(*net.UnixListener).SetUnlinkOnClose(false) // by the path in use at close, below
	if err := os.Chmod(path, 0o600); err != nil {
		ln.Close()
		local.Close()
		return nil, nil, err
	}
	return local, serve(ln, local, x), nil
}

// readOnly opens what there is without writing: the index as it lies there, or
// one in memory made from the packs.
func (x *index) readOnly(ctx context.Context) (store.Index, error) {
	cur, err := store.LocalIndex(filepath.Join(x.dir, indexDir), true)(ctx, x.repo, x.check)
	if err == nil {
		return cur, nil
	}
	return store.MemoryIndex()(ctx, x.repo, x.check)
}

// mayNotWrite opens what there is the first time. When the repository has changed since, only an
// index in memory can be brought up to date.
func (x *index) mayNotWrite(ctx context.Context) (store.Index, error) {
	x.mu.Lock()
	first := x.cur == nil
	x.mu.Unlock()
	if first {
		if cur, err := store.LocalIndex(filepath.Join(x.dir, indexDir), true)(ctx, x.repo, x.check); err == nil {
			return cur, nil
		}
	}
	if x.private == nil {
		own, err := store.MemoryIndex()(ctx, x.repo, x.check)
		if err != nil {
			return nil, err
		}
		x.private = own
		return own, nil
	}
	return x.private, x.check(ctx, x.private, false)
}

// socketPath names the socket by way of a descriptor of its directory, since a
// socket's path may not be longer than 107 bytes.
func (x *index) socketPath() (string, func(), error) {
	d, err := os.Open(x.dir)
	if err != nil {
		return "", nil, err
	}
	return fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), socketName), func() { d.Close() }, nil
}

// Close gives the index up: clients are answered and then find the next owner.
func (x *index) Close() error {
	x.electing.Lock()
	defer x.electing.Unlock()
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.closed {
		return nil
	}
	x.closed = true
	if x.srv != nil {
		os.Remove(filepath.Join(x.dir, socketName))
		x.srv.close()
	}
	err := x.cur.Close()
	if x.lock != nil {
		x.lock.Close()
	}
	return err
}

func (x *index) Lookup(ctx context.Context, ids []store.ID, locs []store.Loc) error {
	return x.do(ctx, func(i store.Index) error { return i.Lookup(ctx, ids, locs) })
}

func (x *index) AddPack(ctx context.Context, pack store.PackInfo, recs []store.PackRecord) error {
	return x.do(ctx, func(i store.Index) error { return i.AddPack(ctx, pack, recs) })
}

func (x *index) Packs(ctx context.Context) iter.Seq2[store.NumberedPack, error] {
	return listed(ctx, x, func(i store.Index) iter.Seq2[store.NumberedPack, error] { return i.Packs(ctx) })
}

// listed gathers a listing before it gives any of it: should the owner end in the
// middle, the next one lists again from the beginning.
func listed[T any](ctx context.Context, x *index, from func(store.Index) iter.Seq2[T, error]) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var list []T
		err := x.do(ctx, func(i store.Index) error {
			list = list[:0]
			for v, err := range from(i) {
				if err != nil {
					return err
				}
				list = append(list, v)
			}
			return nil
		})
		if err != nil {
			var none T
			yield(none, err)
			return
		}
		for _, v := range list {
			if !yield(v, nil) {
				return
			}
		}
	}
}

func (x *index) Pack(ctx context.Context, number uint32) (p store.PackInfo, err error) {
	err = x.do(ctx, func(i store.Index) error { p, err = i.Pack(ctx, number); return err })
	return p, err
}

func (x *index) DropPack(ctx context.Context, pack store.PackID, ids []store.ID) error {
	return x.do(ctx, func(i store.Index) error { return i.DropPack(ctx, pack, ids) })
}

func (x *index) Incarnation(ctx context.Context) (n uint64, err error) {
	err = x.do(ctx, func(i store.Index) error { n, err = i.Incarnation(ctx); return err })
	return n, err
}

func (x *index) NextPack(ctx context.Context) (n uint32, err error) {
	err = x.do(ctx, func(i store.Index) error { n, err = i.NextPack(ctx); return err })
	return n, err
}

func (x *index) Condemn(ctx context.Context, old [16]byte, c store.Condemned) (done bool, err error) {
	err = x.do(ctx, func(i store.Index) error { done, err = i.Condemn(ctx, old, c); return err })
	return done, err
}

func (x *index) Epoch(ctx context.Context) (e [16]byte, err error) {
	err = x.do(ctx, func(i store.Index) error { e, err = i.Epoch(ctx); return err })
	return e, err
}

func (x *index) Suspect(ctx context.Context, ids []store.ID) error {
	return x.do(ctx, func(i store.Index) error { return i.Suspect(ctx, ids) })
}

func (x *index) Whole(ctx context.Context) (whole bool, err error) {
	err = x.do(ctx, func(i store.Index) error { whole, err = i.Whole(ctx); return err })
	return whole, err
}

func (x *index) SetWhole(ctx context.Context) error {
	return x.do(ctx, func(i store.Index) error { return i.SetWhole(ctx) })
}

func (x *index) Page(ctx context.Context, id store.ID) (b []byte, err error) {
	err = x.do(ctx, func(i store.Index) error { b, err = i.Page(ctx, id); return err })
	return b, err
}

func (x *index) PutPages(ctx context.Context, ids []store.ID, pages [][]byte) error {
	return x.do(ctx, func(i store.Index) error { return i.PutPages(ctx, ids, pages) })
}

func (x *index) PageIDs(ctx context.Context, after store.ID) iter.Seq2[store.ID, error] {
	return listed(ctx, x, func(i store.Index) iter.Seq2[store.ID, error] { return i.PageIDs(ctx, after) })
}

func (x *index) DropPages(ctx context.Context, ids []store.ID) error {
	return x.do(ctx, func(i store.Index) error { return i.DropPages(ctx, ids) })
}

func (x *index) Points(ctx context.Context, after store.PointID) iter.Seq2[store.SealedPoint, error] {
	return listed(ctx, x, func(i store.Index) iter.Seq2[store.SealedPoint, error] { return i.Points(ctx, after) })
}

func (x *index) Changes(ctx context.Context, since uint64) (c store.Changes, err error) {
	err = x.do(ctx, func(i store.Index) error { c, err = i.Changes(ctx, since); return err })
	return c, err
}

func (x *index) PutPoint(ctx context.Context, p store.SealedPoint) error {
	return x.do(ctx, func(i store.Index) error { return i.PutPoint(ctx, p) })
}

func (x *index) DropPoint(ctx context.Context, id store.PointID) error {
	return x.do(ctx, func(i store.Index) error { return i.DropPoint(ctx, id) })
}

func (x *index) Generation(ctx context.Context) (gen uint64, err error) {
	err = x.do(ctx, func(i store.Index) error { gen, err = i.Generation(ctx); return err })
	return gen, err
}

func (x *index) Reserve(ctx context.Context, name string) (n int, err error) {
	err = x.do(ctx, func(i store.Index) error { n, err = i.Reserve(ctx, name); return err })
	return n, err
}
