package extract

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs"
)

// ToDir copies sources into a directory that exists. A source that is a directory is merged with one of its name. An error
// means that the copy ended early; what was left out is in the result.
func ToDir(ctx context.Context, dir string, sources []Source, opt Options) (Result, error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return Result{}, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	var run [4]byte
	rand.Read(run[:])
	n := workers()
	d := &dirSink{
		tally: newTally(opt), run: hex.EncodeToString(run[:]), links: links{},
		jobs: make(chan job, n), bufs: newBuffers(n + runtime.GOMAXPROCS(0)),
	}
	d.clean(fd)
	top := &place{open: &openDir{fd: fd, inherits: inherits(fd)}}
	top.open.pending.Store(1)
	g, gctx := errgroup.WithContext(ctx)
	for range n {
		g.Go(func() error { return d.work(gctx) })
	}
	g.Go(func() error {
		defer close(d.jobs)
		return d.walk(gctx, d, top, sources)
	})
	err = g.Wait()
	for j := range d.jobs { // those that an error left
		d.release(gctx, j.at)
	}
	// Once for all instead of fsync for each.
	if serr := unix.Syncfs(fd); err == nil && serr != nil {
		err = &os.PathError{Op: "syncfs", Path: dir, Err: serr}
	}
	d.release(gctx, top)
	if err == nil {
		err = ctx.Err()
	}
	return d.r, err
}

// unfinished is a file in a directory that is not complete.
const unfinished = leftoverPrefix + "unfinished"

// Unfinished reports whether a directory is what a copy with Options.Mark had made when it was stopped.
func Unfinished(dir string) bool {
	_, err := os.Lstat(filepath.Join(dir, unfinished))
	return err == nil
}

// dirSink copies to a directory: one walker makes directories, workers the rest.
type dirSink struct {
	*tally
	run  string // in the names of temporary files
	seq  atomic.Int64
	jobs chan job
	bufs buffers

	links links // of the walker alone
}

// openDir is a directory while it is copied to.
type openDir struct {
	fd int
	f  *found // whose attributes it gets; nil for the destination itself
	// inherits: it has a default ACL, which what is made in it must not get.
	inherits bool
	marked   bool // with a file that says unfinished
	// pending is what is under way in it, and one for the walk. When there is none left it gets its attributes.
	pending atomic.Int64
}

// job is a node to copy, other than a directory.
type job struct {
	*found
	link  *linked // nil when it has one name
	first bool    // of the names of link
}

// linked is a node with several names. What is not first waits for it: first was taken from the queue before.
type linked struct {
	first found         // without its node
	left  uint32        // names that have not been seen
	done  chan struct{} // closed when the following is set
	err   error
}

// links are the nodes of which not all names have been seen.
type links map[uint64]*linked // inode => what is known of it

// name notes a name, and whether it is the first. nil when there are too many of them.
func (ls links) name(f *found) (l *linked, first bool) {
	l = ls[f.attr.Inode]
	if l == nil {
		if len(ls) >= maxLinked {
			return nil, false
		}
		a := fs.Attr{Kind: f.attr.Kind, Size: f.attr.Size, Time: f.attr.Time}
		l, first = &linked{first: found{at: f.at, name: f.name, attr: a}, left: f.attr.Guest.Nlink, done: make(chan struct{})}, true
		ls[f.attr.Inode] = l
	}
	if l.left--; l.left == 0 {
		delete(ls, f.attr.Inode)
	}
	return l, first
}

// is reports whether f is what l is. An inode's number is a hash: no two of what a guest has get the same one by its doing, and
// none by accident if these are the same, too.
func (l *linked) is(f *found) bool {
	a := l.first.attr
	return f.attr.Kind == a.Kind && f.attr.Size == a.Size && f.attr.Time.Equal(a.Time)
}

// leftovers are the names of temporary files.
const leftoverPrefix, leftoverSuffix = ".holdfast-", ".partial"

func (d *dirSink) temporary() string {
	return fmt.Sprintf("%s%s-%x%s", leftoverPrefix, d.run, d.seq.Add(1), leftoverSuffix)
}

// clean removes what a copy that was killed has left in a directory. Every copy holds a shared lock of the directories it
// works in: one that can be had alone has nobody else's temporary files.
func (d *dirSink) clean(fd int) {
	if unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) == nil {
		if dup, err := unix.Openat(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err == nil {
			dir := os.NewFile(uintptr(dup), "")
			for {
				names, err := dir.Readdirnames(1000)
				for _, n := range names {
					if strings.HasPrefix(n, leftoverPrefix) && strings.HasSuffix(n, leftoverSuffix) {
						_ = unix.Unlinkat(fd, n, 0)
					}
				}
				if err != nil {
					break
				}
			}
			dir.Close()
		}
	}
	_ = unix.Flock(fd, unix.LOCK_SH) // where there are no locks, there is no cleaning
}

// enter makes a directory, or opens the one that is there.
func (d *dirSink) enter(ctx context.Context, f *found) (*place, error) {
	in := f.at.open
	err := unix.Mkdirat(in.fd, f.name, 0o700)
	there := errors.Is(err, unix.EEXIST)
	if err != nil && !there {
		return nil, d.skip(f.at, f.name, fmt.Errorf("mkdir: %w", err))
	}
	fd, err := openBelow(in.fd, f.name)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		err = ErrExists
	}
	if err != nil {
		return nil, d.skip(f.at, f.name, err)
	}
	o := &openDir{fd: fd, f: f}
	switch {
	case there:
		// Of an earlier run that got as far as its attributes, which may keep its owner out.
		if err := unix.Access(procPath(fd), unix.W_OK|unix.X_OK); err != nil {
			_ = unix.Fchmod(fd, 0o700)
		}
		d.clean(fd)
		o.inherits = inherits(fd)
	default:
		if in.inherits {
			dropACLs(fd)
		}
		_ = unix.Flock(fd, unix.LOCK_SH)
	}
	if d.Mark && f.at.parent == nil {
		o.marked = d.mark(fd, there)
	}
	o.pending.Store(1)
	in.pending.Add(1)
	d.copied(f, false, there)
	return &place{parent: f.at, name: f.name, inode: f.attr.Inode, depth: f.at.depth + 1, open: o}, nil
}

// mark marks a directory that is new, and reports whether it is marked.
func (d *dirSink) mark(fd int, there bool) bool {
	if there {
		var st unix.Stat_t
		return unix.Fstatat(fd, unfinished, &st, unix.AT_SYMLINK_NOFOLLOW) == nil
	}
	file, err := unix.Openat(fd, unfinished, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err == nil {
		unix.Close(file)
	}
	return err == nil
}

// openBelow opens a directory's directory. One of our own that may not be read is made readable.
func openBelow(at int, name string) (int, error) {
	const how = unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fd, err := unix.Openat(at, name, unix.O_RDONLY|how, 0)
	if !errors.Is(err, unix.EACCES) {
		return fd, err
	}
	handle, herr := unix.Openat(at, name, unix.O_PATH|how, 0)
	if herr != nil {
		return -1, err
	}
	defer unix.Close(handle)
	if unix.Chmod(procPath(handle), 0o700) != nil {
		return -1, err
	}
	return unix.Openat(at, name, unix.O_RDONLY|how, 0)
}

// leave implements sink.
func (d *dirSink) leave(ctx context.Context, p *place) { d.release(ctx, p) }

// release counts one thing less that is under way in a directory. The last sets its attributes: what is made in it changes its
// time, and its mode may forbid to make anything.
func (d *dirSink) release(ctx context.Context, p *place) {
	for p != nil && p.open.pending.Add(-1) == 0 {
		if p.open.marked && ctx.Err() == nil {
			_ = unix.Unlinkat(p.open.fd, unfinished, 0)
		}
		if o := p.open; o.f != nil && ctx.Err() == nil && o.f.attr.Guest != nil {
			if err := d.attributes(ctx, object{fd: o.fd}, o.f); err != nil {
				d.fail(o.f.path(), err, true)
			}
		}
		unix.Close(p.open.fd)
		p = p.parent
	}
}

// put queues a node.
func (d *dirSink) put(ctx context.Context, f *found) error {
	j := job{found: f}
	if f.linked() {
		j.link, j.first = d.links.name(f)
	}
	f.at.open.pending.Add(1)
	select {
	case d.jobs <- j:
		return nil
	case <-ctx.Done():
		d.release(ctx, f.at)
		return ctx.Err()
	}
}

func (d *dirSink) work(ctx context.Context) error {
	for j := range d.jobs {
		err := d.do(ctx, j)
		if j.first {
			j.link.err = err
			close(j.link.done)
		}
		if err == nil {
			err = ctx.Err()
		}
		if errors.Is(err, errLeftOut) {
			d.lost(kindNames[j.attr.Kind])
			err = nil
		}
		ended := err != nil && (ends(err) || ctx.Err() != nil)
		if err != nil && !ended {
			d.fail(j.path(), err, false)
		}
		d.release(ctx, j.at)
		if ended {
			return fmt.Errorf("%s: %w", j.path(), err)
		}
	}
	return nil
}

// do copies one node.
func (d *dirSink) do(ctx context.Context, j job) error {
	if j.link != nil && !j.first {
		select {
		case <-j.link.done:
		case <-ctx.Done():
			return ctx.Err()
		}
		if j.link.err != nil {
			return j.link.err
		}
		if j.link.is(j.found) {
			if handled, err := d.hardLink(j.found, &j.link.first); handled {
				return err
			}
		}
		d.lost("hard link")
	}
	there, err := d.isThere(j.found)
	if err != nil {
		return err
	}
	if there {
		d.done(j.attr.Size)
	} else {
		there, err = d.make(ctx, j.found)
	}
	if err == nil {
		d.copied(j.found, false, there)
	}
	return err
}

// unlinkable are the errors of a file system on which something cannot have another name there.
var unlinkable = []error{unix.EMLINK, unix.EPERM, unix.EOPNOTSUPP, unix.ENOSYS, unix.EXDEV, unix.EACCES, unix.ENOENT}

// hardLink makes f another name of first. Not handled: it needs a copy of its own.
func (d *dirSink) hardLink(f, first *found) (handled bool, err error) {
	from, err := openAgain(first.at)
	if err != nil {
		return false, nil
	}
	defer unix.Close(from)
	err = unix.Linkat(from, first.name, f.at.open.fd, f.name, 0)
	for _, e := range unlinkable {
		if errors.Is(err, e) {
			return false, nil
		}
	}
	there := false
	if errors.Is(err, unix.EEXIST) {
		if there, err = d.isThere(f); !there && err == nil {
			err = ErrExists
		}
	}
	if err == nil {
		d.done(f.attr.Size)
		d.copied(f, true, there)
	}
	return true, err
}

// openAgain opens a directory of the copy that may have been left, from the destination down.
func openAgain(p *place) (int, error) {
	if p.parent == nil {
		return unix.Openat(p.open.fd, ".", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	}
	at, err := openAgain(p.parent)
	if err != nil {
		return -1, err
	}
	defer unix.Close(at)
	return unix.Openat(at, p.name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
}

// isThere reports whether the copy of a node is there, whole. ErrExists when something else is.
func (d *dirSink) isThere(f *found) (bool, error) {
	var st unix.Stat_t
	err := unix.Fstatat(f.at.open.fd, f.name, &st, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case errors.Is(err, unix.ENOENT):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("stat: %w", err)
	case st.Mode&unix.S_IFMT != fileTypes[f.attr.Kind] || f.attr.Kind == fs.KindFile && st.Size != f.attr.Size || !sameTime(st.Mtim, mtime(f)):
		return false, ErrExists
	}
	return true, nil
}

// make makes what is not a directory: under a temporary name, until it is complete with its attributes.
func (d *dirSink) make(ctx context.Context, f *found) (there bool, err error) {
	at := f.at.open
	name := d.temporary()
	fd, err := d.fill(ctx, at, name, f)
	if fd >= 0 {
		defer unix.Close(fd)
	}
	defer func() {
		if err != nil || there {
			_ = unix.Unlinkat(at.fd, name, 0)
		}
	}()
	if err != nil {
		return false, err
	}
	o := object{fd: fd, path: f.attr.Kind != fs.KindFile, link: f.attr.Kind == fs.KindLink}
	if at.inherits && !o.link {
		o.removeXattr(aclAccess)
	}
	aerr := d.attributes(ctx, o, f)
	if ends(aerr) {
		return false, aerr
	}
	err = renameNew(at.fd, name, f.name)
	if errors.Is(err, unix.EEXIST) { // another copy was faster
		if there, err = d.isThere(f); !there && err == nil {
			err = ErrExists
		}
	}
	if err == nil && aerr != nil {
		d.fail(f.path(), aerr, true)
	}
	return there, err
}

// renameNew renames without replacing.
func renameNew(at int, from, to string) error {
	err := unix.Renameat2(at, from, at, to, unix.RENAME_NOREPLACE)
	if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOSYS) {
		return err
	}
	// Not on this file system, such as NFS.
	var st unix.Stat_t
	if err := unix.Fstatat(at, to, &st, unix.AT_SYMLINK_NOFOLLOW); !errors.Is(err, unix.ENOENT) {
		return unix.EEXIST
	}
	return unix.Renameat(at, from, at, to)
}

// fill makes a node under a temporary name and opens it.
func (d *dirSink) fill(ctx context.Context, at *openDir, name string, f *found) (fd int, err error) {
	switch n := f.node.(type) {
	case fs.File:
		fd, err = unix.Openat(at.fd, name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return -1, fmt.Errorf("create: %w", err)
		}
		return fd, d.content(ctx, fd, n, f.attr.Size)
	case fs.Link:
		target, err := n.Target(ctx)
		if err != nil {
			return -1, err
		}
		if err := unix.Symlinkat(target, at.fd, name); err != nil {
			return -1, fmt.Errorf("symlink: %w", err)
		}
	default:
		dev := uint64(0)
		if g := f.attr.Guest; g != nil {
			dev = unix.Mkdev(g.Major, g.Minor)
		}
		if err := unix.Mknodat(at.fd, name, fileTypes[f.attr.Kind]|0o600, int(dev)); errors.Is(err, unix.EPERM) || errors.Is(err, unix.EOPNOTSUPP) {
			return -1, errLeftOut
		} else if err != nil {
			return -1, fmt.Errorf("mknod: %w", err)
		}
	}
	fd, err = unix.Openat(at.fd, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	return fd, err
}

// durableBytes is from which size on a file is on the disk before it gets its name. Smaller ones are written from
// beginning to end, so that after a loss of power they are whole or too short.
const durableBytes = 4 * pieceBytes

// content writes the content of a file with its holes.
func (d *dirSink) content(ctx context.Context, fd int, file fs.File, size int64) error {
	release, err := file.Hold(ctx)
	if err != nil {
		return err
	}
	defer release()
	img, err := file.Image(ctx)
	if err != nil {
		return err
	}
	if img.Size() != size {
		return fmt.Errorf("its size is %d and %d bytes", size, img.Size())
	}
	var settled atomic.Int64
	var end int64
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(1)
	if size >= durableBytes {
		g.SetLimit(runtime.GOMAXPROCS(0))
	}
	for e, err := range img.Allocated(holeBytes) {
		if err != nil {
			_ = g.Wait()
			return err
		}
		for e.Len > 0 && gctx.Err() == nil {
			off, n := e.Off, min(e.Len, pieceBytes-e.Off%pieceBytes)
			g.Go(func() error {
				settled.Add(n)
				return d.piece(gctx, fd, img, off, n)
			})
			e.Off, e.Len, end = off+n, e.Len-n, off+n
		}
		if gctx.Err() != nil {
			break
		}
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	d.done(size - settled.Load())
	if end < size {
		if err := unix.Ftruncate(fd, size); err != nil {
			return fmt.Errorf("truncate: %w", err)
		}
	}
	if end < size && end > 0 || size >= durableBytes && end > 0 {
		if err := unix.Fdatasync(fd); err != nil {
			return fmt.Errorf("fdatasync: %w", err)
		}
	}
	return nil
}

// piece copies a range.
func (d *dirSink) piece(ctx context.Context, fd int, img fs.Image, off, n int64) error {
	buf, err := d.bufs.get(ctx)
	if err != nil {
		return err
	}
	defer d.bufs.put(buf)
	if err := readFull(img, buf[:n], off); err != nil {
		return err
	}
	for b := buf[:n]; len(b) > 0; {
		w, err := unix.Pwrite(fd, b, off)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("write: %w", err)
		}
		b, off = b[w:], off+int64(w)
	}
	d.done(n)
	return nil
}

// readFull reads all of p.
func readFull(img io.ReaderAt, p []byte, off int64) error {
	n, err := img.ReadAt(p, off)
	switch {
	case n == len(p):
		return nil
	case err == nil || errors.Is(err, io.EOF):
		return fmt.Errorf("only %d of %d bytes at %d: %w", n, len(p), off, io.ErrUnexpectedEOF)
	}
	return err
}

var _ sink = (*dirSink)(nil)
