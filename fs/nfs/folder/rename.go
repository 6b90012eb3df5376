package folder

import (
	"context"
	"errors"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/nfs"
)

// Rename is that of nfs.WritableFS. EEXIST for a target that is not of the same kind, or a directory that is not empty (RFC 1813 §3.3.14); EINVAL for
// a directory into itself; EACCES where something is that is not shown.
func (f *Folder) Rename(_ context.Context, from nfs.ID, name string, to nfs.ID, as string) error {
	if err := f.enter(); err != nil {
		return err
	}
	defer f.gate.RUnlock()
	a, err := f.openDir(from)
	if err != nil {
		return err
	}
	defer f.release(a)
	b, err := f.openDir(to)
	if err != nil {
		return err
	}
	defer f.release(b)
	if err := errOr(checkName(name), checkName(as)); err != nil {
		return err
	}
	f.names.RLock()
	if f.slot(a.id, name) == nil && f.slot(b.id, as) == nil {
		err := f.renameReal(a, name, b, as)
		f.names.RUnlock()
		if err != nil {
			return err
		}
		return fsync(a.fd, b.fd)
	}
	f.names.RUnlock()
	return f.renamePlaced(a, name, b, as)
}

// renameReal renames a file of data/. f.names is held; the caller syncs.
func (f *Folder) renameReal(a *handle, name string, b *handle, as string) error {
	if fd, err := unix.Openat(b.fd, as, openPath, 0); err == nil {
		defer unix.Close(fd) // as in unlink
	}
	f.mu.Lock()
	over, st, err := f.move(a, name, b, as)
	f.mu.Unlock()
	if err == nil && over.File != 0 {
		f.removed(over, &st)
	}
	return err
}

// move renames; over is what lay at the target and was replaced. f.mu is held.
func (f *Folder) move(a *handle, name string, b *handle, as string) (over nfs.ID, ost unix.Statx_t, err error) {
	id, st, err := identify(a.fd, name, f.mount)
	if err != nil {
		return over, ost, absent(err)
	}
	over, ost, err = identify(b.fd, as, f.mount)
	switch {
	case errors.Is(err, errHidden):
		return over, ost, syscall.EACCES
	case errors.Is(err, unix.ENOENT):
		over = nfs.ID{}
	case err != nil:
		return over, ost, err
	case over == id:
		return nfs.ID{}, ost, nil // RFC 1813 §3.3.14: nothing is done
	case len(f.slotsIn(over)) > 0:
		return over, ost, syscall.EEXIST
	}
	err = unix.Renameat(a.fd, name, b.fd, as)
	switch {
	case errors.Is(err, unix.ENOTEMPTY), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.EISDIR): // rename(2)
		return over, ost, syscall.EEXIST
	case err != nil:
		return over, ost, inRemoved(err)
	}
	f.forgetAt(over, slot{b.id, as})
	f.put(id, &st, b.id, as)
	return over, ost, nil
}

// renamePlaced renames where a placed file is concerned, or was a moment ago.
func (f *Folder) renamePlaced(a *handle, name string, b *handle, as string) error {
	f.names.Lock()
	defer f.names.Unlock()
	p, q := f.slot(a.id, name), f.slot(b.id, as)
	if _, ok := f.where(b.id); !ok {
		return syscall.ESTALE
	}
	var err error
	switch {
	case p != nil && p == q:
		return nil
	case p != nil && q != nil:
		err = f.commit(edit{q, remove}, edit{p, moveTo(slot{b.id, as}, nfs.ID{})})
	case p != nil:
		err = f.placeOver(p, b, as)
	case q != nil:
		err = f.renameOver(a, name, b, as, q)
	default:
		err = f.renameReal(a, name, b, as)
		if err == nil {
			err = fsync(a.fd, b.fd)
		}
	}
	if err == nil {
		touchDir(a)
		touchDir(b)
	}
	return err
}

func remove(e *entry) { e.removed, e.ceiling, e.over, e.yields = true, 0, nfs.ID{}, nfs.ID{} }

func moveTo(at slot, over nfs.ID) func(*entry) {
	return func(e *entry) {
		e.at, e.over, e.yields = at, over, nfs.ID{}
		e.changed++
	}
}

// placeOver renames a placed file to where none is, and removes what is there. f.names is held.
func (f *Folder) placeOver(p *place, b *handle, as string) error {
	over, st, err := identify(b.fd, as, f.mount)
	switch {
	case errors.Is(err, errHidden):
		return syscall.EACCES
	case errors.Is(err, unix.ENOENT):
		return f.commit(edit{p, moveTo(slot{b.id, as}, nfs.ID{})})
	case err != nil:
		return err
	case kindOf(&st) == nfs.KindDir:
		return syscall.EEXIST
	}
	if err := f.commit(edit{p, moveTo(slot{b.id, as}, over)}); err != nil {
		return err
	}
	if err := f.unlink(b, as); err != nil && !errors.Is(err, syscall.ENOENT) {
		return err
	}
	return fsync(b.fd)
}

// renameOver renames a file of data/ to the name of a placed one, which is removed. f.names is held.
func (f *Folder) renameOver(a *handle, name string, b *handle, as string, q *place) error {
	id, st, err := identify(a.fd, name, f.mount)
	if err != nil {
		return absent(err)
	}
	if kindOf(&st) == nfs.KindDir {
		return syscall.EEXIST
	}
	if err := f.commit(edit{q, func(e *entry) { e.yields = id }}); err != nil {
		return err
	}
	if err := f.renameReal(a, name, b, as); err != nil {
		// The next save will say so. Nothing of that ID is at the name, so until then it does not matter.
		f.apply(q, func(e *entry) { e.yields = nfs.ID{} })
		return err
	}
	err = fsync(a.fd, b.fd)
	if err == nil {
		err = f.commit(edit{q, remove})
	}
	if err != nil {
		f.apply(q, remove) // so it is now, if only by the file at the name
	}
	return err
}
