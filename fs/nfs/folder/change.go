package folder

import (
	"bytes"
	"context"
	"errors"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/nfs"
)

// markName is the extended attribute with the mark of an EXCLUSIVE creation.
const markName = "user.holdfast.exclusive"

// The permissions of what is made without saying.
const (
	fileMode = 0o644
	dirMode  = 0o755
)

// SetAttr is that of nfs.WritableFS. When it fails, a part of c may be set (RFC 1813 §3.3.2).
func (f *Folder) SetAttr(_ context.Context, id nfs.ID, c nfs.Change) error {
	if err := f.enter(); err != nil {
		return err
	}
	defer f.gate.RUnlock()
	if id.File&placedBit != 0 {
		p, err := f.placed(id)
		if err != nil {
			return err
		}
		return f.setPlaced(p, c)
	}
	if n, ok := f.where(id); ok && n.kind == nfs.KindLink {
		return f.setLink(id, c)
	}
	h, err := f.open(id, 0)
	if err != nil {
		return err
	}
	defer f.release(h)
	if err := set(h, c); err != nil {
		return err
	}
	if !h.dir {
		if err := unix.Fremovexattr(h.fd, markName); err != nil && !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.EOPNOTSUPP) {
			return err
		}
	}
	return fsync(h.fd)
}

// set changes an open file or directory. The order matters: another size moves the times, another owner takes mode bits away.
func set(h *handle, c nfs.Change) error {
	if c.Size != nil {
		if err := setSize(h, *c.Size); err != nil {
			return err
		}
	}
	if c.UID != nil || c.GID != nil {
		if err := unix.Fchown(h.fd, owner(c.UID), owner(c.GID)); err != nil {
			return err
		}
	}
	if c.Mode != nil {
		if err := unix.Fchmod(h.fd, *c.Mode&0o7777); err != nil {
			return err
		}
	}
	return setTimes(h.fd, "", c, unix.AT_EMPTY_PATH)
}

func setSize(h *handle, size int64) error {
	switch {
	case h.dir:
		return syscall.EISDIR
	case size < 0:
		return syscall.EINVAL
	case !h.writable:
		return syscall.EACCES
	}
	for {
		if err := unix.Ftruncate(h.fd, size); err != unix.EINTR {
			return err
		}
	}
}

// owner is an argument of chown(2).
func owner(id *uint32) int {
	if id == nil {
		return -1
	}
	return int(*id)
}

func setTimes(dir int, name string, c nfs.Change, flags int) (err error) {
	if c.Accessed == nil && c.Modified == nil {
		return nil
	}
	t := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Nsec: unix.UTIME_OMIT}}
	if c.Accessed != nil {
		t[0], err = unix.TimeToTimespec(*c.Accessed)
	}
	if c.Modified != nil && err == nil {
		t[1], err = unix.TimeToTimespec(*c.Modified)
	}
	if err != nil {
		return err
	}
	return unix.UtimesNanoAt(dir, name, t, flags)
}

// setLink changes a symbolic link, which has no mode and no size to be set.
func (f *Folder) setLink(id nfs.ID, c nfs.Change) error {
	if c.Size != nil {
		return syscall.EINVAL
	}
	return f.at(id, 0, func(dir *handle, n node) error {
		if is, _, err := identify(dir.fd, n.name, f.mount); err != nil || is != id {
			return errMoved
		}
		if c.UID != nil || c.GID != nil {
			if err := unix.Fchownat(dir.fd, n.name, owner(c.UID), owner(c.GID), unix.AT_SYMLINK_NOFOLLOW); err != nil {
				return err
			}
		}
		if err := setTimes(dir.fd, n.name, c, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		return syncFS(dir.fd) // a link cannot be opened to be synced
	})
}

func syncFS(fd int) error { return unix.Syncfs(fd) }

// Create is that of nfs.WritableFS. EEXIST, too, for what is there and is no file (RFC 1813 §3.3.8 has no better one).
func (f *Folder) Create(_ context.Context, dir nfs.ID, name string, how nfs.Creation) (nfs.ID, error) {
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
	for {
		id, err := f.openExisting(d, name, how)
		if !errors.Is(err, syscall.ENOENT) {
			return id, err
		}
		id, err = f.create(d, name, how)
		if !errors.Is(err, syscall.EEXIST) || how.Guarded {
			return id, err
		}
		// Somebody was faster; it may have been this client, by another request.
	}
}

// openExisting answers a Create for what is there. ENOENT if nothing is.
func (f *Folder) openExisting(d *handle, name string, how nfs.Creation) (nfs.ID, error) {
	if p := f.slot(d.id, name); p != nil {
		if how.Guarded || how.Exclusive != nil {
			return nfs.ID{}, syscall.EEXIST
		}
		if how.Set.Size == nil {
			return p.id, nil
		}
		return p.id, f.setPlaced(p, nfs.Change{Size: how.Set.Size})
	}
	if _, _, err := identify(d.fd, name, f.mount); errors.Is(err, errHidden) {
		return nfs.ID{}, syscall.EEXIST
	}
	id, n, err := f.child(d, name)
	if err != nil {
		return nfs.ID{}, err
	}
	if n.kind != nfs.KindFile || how.Guarded {
		return nfs.ID{}, syscall.EEXIST
	}
	h, err := f.open(id, 0)
	if errors.Is(err, syscall.ESTALE) {
		return nfs.ID{}, syscall.ENOENT
	}
	if err != nil {
		return nfs.ID{}, err
	}
	defer f.release(h)
	if how.Exclusive != nil {
		var mark [9]byte
		n, err := unix.Fgetxattr(h.fd, markName, mark[:])
		if err != nil || !bytes.Equal(mark[:max(n, 0)], how.Exclusive[:]) {
			return nfs.ID{}, syscall.EEXIST
		}
	} else if how.Set.Size != nil {
		if err := setSize(h, *how.Set.Size); err != nil {
			return nfs.ID{}, err
		}
	}
	// Who made it may not have synced it yet.
	return id, fsync(h.fd, d.fd)
}

// create makes a file that is not there. EEXIST if it is.
func (f *Folder) create(d *handle, name string, how nfs.Creation) (nfs.ID, error) {
	tmp := f.newName()
	fd, err := unix.Openat(f.stage, tmp, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nfs.ID{}, err
	}
	h := &handle{fd: fd, writable: true}
	if how.Exclusive != nil {
		err = unix.Fsetxattr(fd, markName, how.Exclusive[:], 0)
		how.Set = nfs.Change{UID: how.Set.UID, GID: how.Set.GID}
	}
	if err == nil {
		err = f.finish(d, h, tmp, name, how.Set)
	}
	if err != nil {
		unix.Unlinkat(f.stage, tmp, 0)
		unix.Close(fd)
		return nfs.ID{}, err
	}
	h = f.cache.add(h)
	defer f.release(h)
	return h.id, fsync(h.fd, d.fd)
}

// newName is a name for new/.
func (f *Folder) newName() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.made++
	return strconv.FormatUint(f.made, 10)
}

// finish gives what was made in new/ its attributes and its name.
func (f *Folder) finish(d, h *handle, tmp, name string, c nfs.Change) error {
	if err := inherit(d, h, &c); err != nil {
		return err
	}
	err := set(h, c)
	if errors.Is(err, unix.EPERM) && (c.UID != nil || c.GID != nil) { // who may give nothing away makes it his own
		c.UID, c.GID = nil, nil
		err = set(h, c)
	}
	if err != nil {
		return err
	}
	f.names.RLock()
	defer f.names.RUnlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.slots[slot{d.id, name}] != nil {
		return syscall.EEXIST
	}
	err = unix.Renameat2(f.stage, tmp, d.fd, name, unix.RENAME_NOREPLACE)
	if err != nil {
		return inRemoved(err)
	}
	id, st, err := identify(h.fd, "", f.mount)
	if err != nil {
		return err
	}
	h.id = id
	f.put(id, &st, d.id, name)
	return nil
}

// inherit is what a new file has of its directory: with S_ISGID the group, mkdir(2).
func inherit(d, h *handle, c *nfs.Change) error {
	var st unix.Stat_t
	if err := unix.Fstat(d.fd, &st); err != nil {
		return err
	}
	if c.Mode == nil {
		mode := uint32(fileMode)
		if h.dir {
			mode = dirMode
		}
		c.Mode = &mode
	}
	if st.Mode&unix.S_ISGID == 0 {
		return nil
	}
	if c.GID == nil {
		c.GID = &st.Gid
	}
	if h.dir {
		mode := *c.Mode | unix.S_ISGID
		c.Mode = &mode
	}
	return nil
}

// inRemoved is the error of an operation in a directory that is open: it gives ENOENT when it was removed.
func inRemoved(err error) error {
	if errors.Is(err, unix.ENOENT) {
		return syscall.ESTALE
	}
	return err
}

// Mkdir is that of nfs.WritableFS.
func (f *Folder) Mkdir(_ context.Context, dir nfs.ID, name string, c nfs.Change) (nfs.ID, error) {
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
	c.Size = nil
	return f.mkdir(d, name, c)
}

func (f *Folder) mkdir(d *handle, name string, c nfs.Change) (nfs.ID, error) {
	tmp := f.newName()
	if err := unix.Mkdirat(f.stage, tmp, 0o700); err != nil {
		return nfs.ID{}, err
	}
	fd, err := unix.Openat(f.stage, tmp, openDir, 0)
	h := &handle{fd: fd, dir: true}
	if err == nil {
		if err = f.finish(d, h, tmp, name, c); err != nil {
			unix.Close(fd)
		}
	}
	if err != nil {
		unix.Unlinkat(f.stage, tmp, unix.AT_REMOVEDIR)
		return nfs.ID{}, err
	}
	h = f.cache.add(h)
	defer f.release(h)
	return h.id, fsync(h.fd, d.fd)
}

// Remove is that of nfs.WritableFS. EISDIR for a directory.
func (f *Folder) Remove(_ context.Context, dir nfs.ID, name string) error {
	return f.remove(dir, name, f.unlink, f.removePlaced)
}

// Rmdir is that of nfs.WritableFS. ENOTDIR for anything else, ENOTEMPTY also when there is something in it that is not shown.
func (f *Folder) Rmdir(_ context.Context, dir nfs.ID, name string) error {
	return f.remove(dir, name, f.rmdir, func(*handle, *place) error { return syscall.ENOTDIR })
}

// remove removes a file of data/ by how, a placed one by placed.
func (f *Folder) remove(dir nfs.ID, name string, how func(*handle, string) error, placed func(*handle, *place) error) error {
	if err := f.enter(); err != nil {
		return err
	}
	defer f.gate.RUnlock()
	d, err := f.openDir(dir)
	if err != nil {
		return err
	}
	defer f.release(d)
	if err := checkName(name); err != nil {
		return err
	}
	f.names.RLock()
	if f.slot(d.id, name) == nil {
		err := how(d, name)
		f.names.RUnlock()
		if err != nil {
			return err
		}
		return fsync(d.fd)
	}
	f.names.RUnlock()

	f.names.Lock()
	defer f.names.Unlock()
	if p := f.slot(d.id, name); p != nil {
		return placed(d, p)
	}
	if err := how(d, name); err != nil {
		return err
	}
	return fsync(d.fd)
}

// unlink removes a file or a link of data/. f.names is held.
func (f *Folder) unlink(d *handle, name string) error {
	// While this is open, the blocks of the file stay: they are given back when no lock is held.
	if fd, err := unix.Openat(d.fd, name, openPath, 0); err == nil {
		defer unix.Close(fd)
	}
	return f.take(d, name, func(id nfs.ID, kind nfs.Kind) error {
		if kind == nfs.KindDir {
			return syscall.EISDIR
		}
		return unix.Unlinkat(d.fd, name, 0)
	})
}

// rmdir removes a directory of data/. f.names is held.
func (f *Folder) rmdir(d *handle, name string) error {
	return f.take(d, name, func(id nfs.ID, kind nfs.Kind) error {
		if kind != nfs.KindDir {
			return syscall.ENOTDIR
		}
		if len(f.slotsIn(id)) > 0 {
			return syscall.ENOTEMPTY
		}
		err := unix.Unlinkat(d.fd, name, unix.AT_REMOVEDIR)
		if errors.Is(err, unix.EEXIST) { // POSIX allows either
			err = syscall.ENOTEMPTY
		}
		return err
	})
}

// take removes a name by how, which is called with f.mu held, and forgets the file.
func (f *Folder) take(d *handle, name string, how func(nfs.ID, nfs.Kind) error) error {
	f.mu.Lock()
	id, st, err := identify(d.fd, name, f.mount)
	if err == nil {
		err = how(id, kindOf(&st))
	}
	if err == nil {
		f.forgetAt(id, slot{d.id, name})
	}
	f.mu.Unlock()
	if err == nil {
		f.removed(id, &st)
	}
	return absent(err)
}

// forgetAt forgets a file if it is known at that name. f.mu is held.
func (f *Folder) forgetAt(id nfs.ID, at slot) {
	if n := f.nodes[id]; n.parent == at.dir && n.name == at.name {
		delete(f.nodes, id)
	}
}

// removed ends the use of a file that lost a name; st is of before. Others may have given it more, which makes it the same file still.
func (f *Folder) removed(id nfs.ID, st *unix.Statx_t) {
	if _, known := f.where(id); known {
		return
	}
	if st.Nlink > 1 && kindOf(st) != nfs.KindDir {
		f.walk() // what cannot be read now is found by its name later
		return
	}
	f.cache.drop(id)
}
