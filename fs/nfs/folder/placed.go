package folder

import (
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/zeebo/blake3"
	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/nfs"
)

// ahead is how far a ceiling is put.
const ahead = 30 * time.Second

// place is a placed file that Open was given.
type place struct {
	id      nfs.ID
	content Content
	writer  io.WriterAt // nil if it cannot be written
	flusher interface{ Flush() error }
	used    interface{ Used() int64 }

	mu sync.Mutex // guards following
	e  entry
}

func newPlace(p Placed) *place {
	sum := blake3.Sum256([]byte(p.Key))
	q := &place{content: p.Content, id: nfs.ID{
		File: binary.LittleEndian.Uint64(sum[:]) | placedBit, Generation: binary.LittleEndian.Uint64(sum[8:]),
	}}
	q.writer, _ = p.Content.(io.WriterAt)
	q.flusher, _ = p.Content.(interface{ Flush() error })
	q.used, _ = p.Content.(interface{ Used() int64 })
	t := p.Time.UnixNano()
	q.e = entry{
		key: p.Key, mode: p.Mode & 0o7777, uid: uint32(os.Getuid()), gid: uint32(os.Getgid()),
		accessed: t, modified: t, changed: t,
	}
	return q
}

// placed gives the placed file of an ID. ESTALE if it was removed or never was.
func (f *Folder) placed(id nfs.ID) (*place, error) {
	p := f.byID[id]
	if p == nil || p.gone() {
		return nil, syscall.ESTALE
	}
	return p, nil
}

func (p *place) gone() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.e.removed
}

// slot gives the placed file of that name, or nil.
func (f *Folder) slot(dir nfs.ID, name string) *place {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.slots[slot{dir, name}]
}

// slotsIn lists the names of placed files in a directory. f.mu is held.
func (f *Folder) slotsIn(dir nfs.ID) (names []string) {
	for s := range f.slots {
		if s.dir == dir {
			names = append(names, s.name)
		}
	}
	return names
}

func (p *place) attr() nfs.Attr {
	size := p.content.Size()
	used := size
	if p.used != nil {
		used = p.used.Used()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return nfs.Attr{
		Kind: nfs.KindFile, Mode: p.e.mode, Links: 1, UID: p.e.uid, GID: p.e.gid, Size: size, Used: used,
		Accessed: time.Unix(0, p.e.accessed), Modified: time.Unix(0, p.e.modified), Changed: time.Unix(0, p.e.changed),
	}
}

// touch moves the time of a placed file that was written to.
func (f *Folder) touch(p *place) error {
	for {
		now := f.now().UnixNano()
		p.mu.Lock()
		t := max(now, p.e.changed+1)
		ok := t <= p.e.ceiling
		if ok {
			p.e.modified, p.e.changed = t, t
		}
		p.mu.Unlock()
		if ok {
			return nil
		}
		if err := f.raise(p, t); err != nil {
			return err
		}
	}
}

// raise puts the ceiling over t.
func (f *Folder) raise(p *place, t int64) error {
	f.saving.Lock()
	defer f.saving.Unlock()
	p.mu.Lock()
	done := t <= p.e.ceiling
	p.mu.Unlock()
	if done {
		return nil
	}
	return f.commitLocked(edit{p, func(e *entry) { e.ceiling = t + int64(ahead) }})
}

// edit is a change of what is kept of a placed file. do is called twice: for what is written, and when that is on the disk.
type edit struct {
	p  *place
	do func(*entry)
}

// commit writes down the changes, then makes them.
func (f *Folder) commit(edits ...edit) error {
	f.saving.Lock()
	defer f.saving.Unlock()
	return f.commitLocked(edits...)
}

func (f *Folder) commitLocked(edits ...edit) error {
	for _, d := range edits {
		d.p.mu.Lock()
		d.p.e.ceiling = 0 // no time moves before this is done
		d.p.mu.Unlock()
	}
	list := f.entries()
	for _, d := range edits {
		for i := range list {
			if list[i].key == d.p.e.key {
				d.do(&list[i])
			}
		}
	}
	if err := f.save(list); err != nil {
		return err
	}
	for _, d := range edits {
		f.apply(d.p, d.do)
	}
	return nil
}

// apply makes a change in memory.
func (f *Folder) apply(p *place, do func(*entry)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	if f.slots[p.e.at] == p {
		delete(f.slots, p.e.at)
	}
	do(&p.e)
	if !p.e.removed {
		f.slots[p.e.at] = p
	}
}

// entries is the state as it is now. f.saving is held.
func (f *Folder) entries() []entry {
	list := append(make([]entry, 0, len(f.kept)+len(f.byID)), f.kept...)
	for _, p := range f.byID {
		p.mu.Lock()
		e := p.e
		p.mu.Unlock()
		if path, ok := f.path(e.at.dir); ok {
			e.path = path
		}
		list = append(list, e)
	}
	return list
}

// path is where a directory is, below data/; "" for data/ itself.
func (f *Folder) path(dir nfs.ID) (string, bool) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	var names []string
	for size := 0; dir != f.root.id; {
		n, ok := f.nodes[dir]
		if size += len(n.name) + 1; !ok || size > maxPath {
			return "", false
		}
		names = append(names, n.name)
		dir = n.parent
	}
	for i, j := 0, len(names)-1; i < j; i, j = i+1, j-1 {
		names[i], names[j] = names[j], names[i]
	}
	return strings.Join(names, "/"), true
}

// place puts the files where the state says, or where they are first.
func (f *Folder) place(placed []Placed, known []entry) error {
	was := map[string]entry{} // by key
	for _, e := range known {
		was[e.key] = e
	}
	for _, p := range placed {
		if p.Time.IsZero() {
			p.Time = f.now()
		}
		q := newPlace(p)
		if p.Key == "" || len(p.Key) > maxKey || p.Content == nil || f.byID[q.id] != nil {
			return fmt.Errorf("placed file %q: its key %q is empty, too long or another's too, or it has no content: %w", p.Path, p.Key, syscall.EINVAL)
		}
		e, old := was[p.Key]
		delete(was, p.Key)
		var err error
		if old {
			err = f.placeAgain(q, e)
		} else {
			err = f.placeFirst(q, p.Path)
		}
		if err == nil && !q.e.removed {
			if f.slots[q.e.at] != nil {
				err = syscall.EEXIST
			}
			f.slots[q.e.at] = q
		}
		if err != nil {
			return fmt.Errorf("placed file %q: %w", p.Path, err)
		}
		f.byID[q.id] = q
	}
	for _, e := range known {
		if _, left := was[e.key]; left {
			f.kept = append(f.kept, e)
		}
	}
	return nil
}

// placeFirst puts a file where none may be.
func (f *Folder) placeFirst(p *place, at string) error {
	if !fs.ValidPath(at) {
		return syscall.EINVAL
	}
	dir, name := path.Split(at)
	if err := checkName(name); err != nil {
		return err
	}
	d, err := f.makeDirs(strings.TrimSuffix(dir, "/"))
	if err != nil {
		return err
	}
	defer f.release(d)
	p.e.at = slot{d.id, name}
	if _, err := statx(d.fd, name); err != unix.ENOENT {
		return errOr(err, syscall.EEXIST)
	}
	return nil
}

func errOr(err, or error) error {
	if err != nil {
		return err
	}
	return or
}

// placeAgain puts a file where it was, and ends a rename that a crash interrupted.
func (f *Folder) placeAgain(p *place, e entry) error {
	if e.ceiling != 0 { // a crash
		e.modified, e.changed = e.ceiling, e.ceiling
	}
	p.e = e
	if e.removed {
		return nil
	}
	d, err := f.openDir(e.at.dir)
	if err != nil {
		d, err = f.makeDirs(e.path)
	}
	if err != nil {
		return err
	}
	defer f.release(d)
	p.e.at.dir = d.id
	is, _, err := identify(d.fd, e.at.name, f.mount)
	switch {
	case err != nil: // none, or one that is not shown
	case is == e.yields:
		p.e.removed = true
	case is == e.over:
		if err := f.unlink(d, e.at.name); err != nil {
			return err
		}
	}
	p.e.over, p.e.yields = nfs.ID{}, nfs.ID{}
	return nil
}

// makeDirs opens a directory below data/ and makes what is missing of it.
func (f *Folder) makeDirs(path string) (*handle, error) {
	d := f.root
	if path == "" {
		return d, nil
	}
	for name := range strings.SplitSeq(path, "/") {
		next, err := f.makeDir(d, name)
		f.release(d)
		if err != nil {
			return nil, err
		}
		d = next
	}
	return d, nil
}

func (f *Folder) makeDir(d *handle, name string) (*handle, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	id, _, err := f.child(d, name)
	if err == unix.ENOENT {
		id, err = f.mkdir(d, name, nfs.Change{})
	}
	if err != nil {
		return nil, err
	}
	return f.openDir(id)
}

// setPlaced changes attributes.
func (f *Folder) setPlaced(p *place, c nfs.Change) error {
	if c.Size != nil && *c.Size != p.content.Size() {
		return syscall.EINVAL
	}
	now := f.now().UnixNano()
	return f.commit(edit{p, func(e *entry) {
		for _, v := range []struct {
			from *uint32
			to   *uint32
		}{{c.Mode, &e.mode}, {c.UID, &e.uid}, {c.GID, &e.gid}} {
			if v.from != nil {
				*v.to = *v.from
			}
		}
		e.mode &= 0o7777
		if c.Accessed != nil {
			e.accessed = c.Accessed.UnixNano()
		}
		if c.Modified != nil {
			e.modified = c.Modified.UnixNano()
		}
		e.changed = max(now, e.changed+1)
		e.ceiling = 0
	}})
}

// removePlaced takes a file out of the folder. f.names is held.
func (f *Folder) removePlaced(d *handle, p *place) error {
	err := f.commit(edit{p, remove})
	if err == nil {
		touchDir(d)
	}
	return err
}

// touchDir moves the time of a directory in which a placed name changed, so that clients look again. If that does not work, they
// do so somewhat later.
func touchDir(d *handle) {
	unix.UtimesNanoAt(d.fd, "", []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Nsec: unix.UTIME_NOW}}, unix.AT_EMPTY_PATH)
}
