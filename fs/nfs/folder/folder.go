package folder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/nfs"
)

// Content is what a placed file holds. Safe for concurrent use. ReadAt gives fewer bytes than asked for only with an error.
//
// A Content that can be written is an io.WriterAt, and may have Flush() error, which makes durable what was written before. One that has
// Used() int64 says how many bytes it takes up; else that is its size. Size and Used should be quick: they are asked for with each reply.
type Content interface {
	io.ReaderAt
	Size() int64 // bytes
}

// Placed is a file whose contents are not in data/.
type Placed struct {
	Path    string // where it is first, below the root: "vm/disk0-flat.vmdk"; its directories are made
	Key     string // what the file is, up to 1024 bytes: the same after every restart
	Content Content
	Time    time.Time // of its first appearance; zero for now
	Mode    uint32    // then, too
}

// Options of a folder.
type Options struct {
	// Now is the clock; nil for the system's.
	Now func() time.Time
	// OpenFiles is how many files and directories of data/ are kept open besides those in use; 0 for 256.
	OpenFiles int
}

var (
	// ErrBusy: another process has the folder open.
	ErrBusy = errors.New("folder is in use")
	// ErrDamaged: the state cannot be read.
	ErrDamaged = errors.New("state of the folder is damaged")
	// ErrNoIdentity: the file system of the folder cannot tell a file from one that had its inode before.
	ErrNoIdentity = errors.New("file system knows neither birth times nor handles of files")
)

// Folder is a directory and the files placed in it. Safe for concurrent use.
//
// Locks are taken in the order in which they stand here.
type Folder struct {
	dir   string
	now   func() time.Time
	lock  *os.File
	root  *handle
	mount mount
	stage int // directory new/
	cache cache
	lists lists
	byID  map[nfs.ID]*place // all placed files; never changes

	gate   sync.RWMutex // held by Close; for reading by everything else
	closed bool         // guarded by gate

	names  sync.RWMutex // held by what changes names of placed files; for reading by what changes names of others
	saving sync.Mutex   // held while the state is written; guards following
	kept   []entry      // of keys that Open was not given

	mu    sync.RWMutex // never held while something is synced; guards following
	nodes map[nfs.ID]node
	slots map[slot]*place
	turn  uint64 // of the last move
	made  uint64 // files made in new/
}

var _ nfs.WritableFS = (*Folder)(nil)

// node is a file of data/.
type node struct {
	kind   nfs.Kind
	parent nfs.ID
	name   string
	turn   uint64 // another one each time that the file is moved, also if it is moved back
}

// slot is a name in a directory.
type slot struct {
	dir  nfs.ID
	name string
}

// The names in a folder's directory.
const (
	dataName  = "data"
	stageName = "new"
	stateName = "state"
	lockName  = "lock"
)

// Open opens the folder in dir, which it makes if need be. ErrBusy, ErrDamaged, ErrNoIdentity; EEXIST when a file is to be placed for the first time where
// there is one.
func Open(dir string, placed []Placed, opt Options) (*Folder, error) {
	f, err := open(dir, opt)
	if err == nil {
		if err = f.start(placed); err != nil {
			f.shut()
		}
	}
	if err != nil {
		return nil, fmt.Errorf("folder %s: %w", dir, err)
	}
	return f, nil
}

// open locks the folder and opens its directories.
func open(dir string, opt Options) (*Folder, error) {
	if opt.Now == nil {
		opt.Now = time.Now
	}
	if opt.OpenFiles == 0 {
		opt.OpenFiles = 256
	}
	if err := os.MkdirAll(dir, 0o700); err != nil { // clients come in by NFS only
		return nil, err
	}
	for _, name := range []string{dataName, stageName} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return nil, err
		}
	}
	lock, err := lockFile(filepath.Join(dir, lockName))
	if err != nil {
		return nil, err
	}
	f := &Folder{dir: dir, now: opt.Now, lock: lock, stage: -1, nodes: map[nfs.ID]node{}, slots: map[slot]*place{}, byID: map[nfs.ID]*place{}}
	f.cache = cache{limit: opt.OpenFiles, handles: map[nfs.ID]*handle{}, lost: map[nfs.ID]error{}}
	f.root = &handle{fd: -1, dir: true, refs: 1}
	if f.root.fd, err = unix.Open(filepath.Join(dir, dataName), openDir, 0); err == nil {
		f.stage, err = unix.Open(filepath.Join(dir, stageName), openDir, 0)
	}
	if err == nil {
		f.root.id, f.mount, err = rootID(f.root.fd)
	}
	if err != nil {
		f.shut()
		return nil, err
	}
	f.nodes[f.root.id] = node{kind: nfs.KindDir}
	return f, nil
}

func lockFile(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrBusy
		}
		return nil, err
	}
	return f, nil
}

// start reads what is there and places the files.
func (f *Folder) start(placed []Placed) error {
	if err := os.RemoveAll(filepath.Join(f.dir, stateName+".new")); err != nil {
		return err
	}
	left, err := namesIn(f.stage)
	if err != nil {
		return err
	}
	for _, name := range left {
		if err := os.RemoveAll(filepath.Join(f.dir, stageName, name)); err != nil {
			return err
		}
	}
	known, err := loadState(f.dir)
	if err != nil {
		return err
	}
	if err := f.walk(); err != nil {
		return err
	}
	if err := f.place(placed, known); err != nil {
		return err
	}
	f.saving.Lock()
	defer f.saving.Unlock()
	return f.save(f.entries())
}

// enter begins a call; the caller calls f.gate.RUnlock.
func (f *Folder) enter() error {
	f.gate.RLock()
	if f.closed {
		f.gate.RUnlock()
		return os.ErrClosed
	}
	return nil
}

// Close syncs files that were written to, writes the state, and closes all but the contents of the placed files. It waits for calls under way, and may be called twice.
func (f *Folder) Close() error {
	f.gate.Lock()
	defer f.gate.Unlock()
	if f.closed {
		return nil
	}
	f.closed = true
	f.saving.Lock()
	defer f.saving.Unlock()
	list := f.entries()
	for i := range list {
		list[i].ceiling = 0 // nobody writes any more
	}
	err := f.save(list)
	return errors.Join(err, f.shut())
}

// shut closes what is open.
func (f *Folder) shut() error {
	err := f.cache.close()
	for _, fd := range []int{f.root.fd, f.stage} {
		if fd >= 0 {
			err = errors.Join(err, unix.Close(fd))
		}
	}
	return errors.Join(err, f.lock.Close())
}

// Removed gives the keys of the placed files that were removed, in order.
func (f *Folder) Removed() []string {
	var keys []string
	f.saving.Lock()
	defer f.saving.Unlock()
	for _, e := range f.entries() {
		if e.removed {
			keys = append(keys, e.key)
		}
	}
	slices.Sort(keys)
	return keys
}

// Root is the directory data.
func (f *Folder) Root() nfs.ID { return f.root.id }

// Space is that of the file system that data/ is on.
func (f *Folder) Space(context.Context) (nfs.Space, error) {
	if err := f.enter(); err != nil {
		return nfs.Space{}, err
	}
	defer f.gate.RUnlock()
	var st unix.Statfs_t
	if err := unix.Fstatfs(f.root.fd, &st); err != nil {
		return nfs.Space{}, err
	}
	unit := int64(st.Bsize)
	if st.Frsize > 0 {
		unit = int64(st.Frsize)
	}
	return nfs.Space{
		Total: int64(st.Blocks) * unit, Free: int64(st.Bfree) * unit, Available: int64(st.Bavail) * unit,
		Files: int64(st.Files), FreeFiles: int64(st.Ffree),
	}, nil
}

// maxName is the longest name of a file, in bytes.
const maxName = 255

// checkName refuses what is no name of a file.
func checkName(name string) error {
	if len(name) > maxName {
		return syscall.ENAMETOOLONG
	}
	if name == "" || name == "." || name == ".." {
		return syscall.EINVAL
	}
	for i := range len(name) {
		if name[i] == '/' || name[i] == 0 {
			return syscall.EINVAL
		}
	}
	return nil
}
