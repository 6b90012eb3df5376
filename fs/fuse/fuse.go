// Package fuse mounts the tree of a repository: a thin adapter of package fs to
// the kernel. The mount is read-only, nosuid and nodev.
//
// Files below a point never change, so the kernel keeps their pages; directories that new
// points appear in are asked about every time. Damage is EIO and a line in the log naming
// point, disk and offset.
package fuse

import (
	"context"
	"errors"
	"fmt"
	"io"
	stdfs "io/fs"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	gofs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs"
	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/volume"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// Options of a mount.
type Options struct {
	AllowOther bool // other users may read it
	Debug      bool // log every request
	// Log is told of damage and of what could not be set up. Required.
	Log func(string)
}

// Sizes of the conversation with the kernel.
const (
	maxRead      = 1 << 20 // bytes of one request
	maxInFlight  = 64 << 20
	background   = 64      // requests that the kernel may have under way for read-ahead
	readAhead    = 4 << 20 // bytes, set through the bdi: MaxReadAhead does not raise it
	immutableTTL = time.Hour
	vmTTL        = time.Second // for names of VMs; points are asked about every time: one that is forgotten is gone
)

// Server is a mounted tree.
type Server struct {
	fuse *fuse.Server
	dir  string
}

// Mount mounts tree at dir. It returns when the mount works.
func Mount(dir string, tree *fs.Tree, opt Options) (*Server, error) {
	c := &conn{log: opt.Log}
	var none time.Duration // what may be kept says so itself
	mount := fuse.MountOptions{
		FsName:                   "holdfast",
		Name:                     "holdfast",
		AllowOther:               opt.AllowOther,
		Debug:                    opt.Debug,
		MaxWrite:                 maxRead,
		MaxReadAhead:             readAhead,
		MaxBackground:            background,
		MaxInflightRequestBytes:  maxInFlight,
		DisableSplice:            true, // slower than copying: a 1 MiB read never fits the pipe
		DirectMount:              true,
		DirectMountFlags:         syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_RDONLY,
		Options:                  []string{"ro"},
		ExplicitDataCacheControl: true,
	}
	root := gofs.NewNodeFS(&dirNode{conn: c, dir: tree.Root()}, &gofs.Options{
		MountOptions:    mount,
		EntryTimeout:    &none,
		AttrTimeout:     &none,
		NegativeTimeout: &none,
		NullPermissions: true, // a guest's file that nobody may read is shown as that
		RootStableAttr:  &gofs.StableAttr{Ino: 1},
	})
	at, err := realPath(dir)
	if err != nil {
		return nil, fmt.Errorf("fuse: mount %s: %w", dir, err)
	}
	s, err := fuse.NewServer(root, at, &mount)
	if err != nil {
		return nil, fmt.Errorf("fuse: mount %s: %w", dir, err)
	}
	// It is mounted: requests wait for their answers. Nothing here may ask for one itself, as
	// WaitMount does: should this process be killed at that moment, the kernel waits for ever for
	// the answer, and the process does not go (seen 2026-11-21).
	c.trim = newTrimmer()
	go func() {
		s.Serve()
		c.trim.end()
	}()
	if err := raiseReadAhead(at); err != nil && opt.Log != nil {
		opt.Log(fmt.Sprintf("read-ahead stays small: %v", err))
	}
	return &Server{fuse: s, dir: dir}, nil
}

// realPath is the absolute path of dir without links, as the kernel lists mounts.
func realPath(dir string) (string, error) {
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return "", err
	}
	return filepath.Abs(real)
}

// raiseReadAhead sets the kernel's read-ahead of the mount through sysfs, which
// needs root: 128 KiB, the default, makes a slow repository read eight times slower.
func raiseReadAhead(dir string) error {
	device, ok := mountOf(dir)
	if !ok {
		return fmt.Errorf("%s is not among the mounts", dir)
	}
	return os.WriteFile("/sys/class/bdi/"+device+"/read_ahead_kb", fmt.Append(nil, readAhead>>10), 0o644)
}

// Wait returns when the mount has ended.
func (s *Server) Wait() { s.fuse.Wait() }

// Unmount ends the mount. While files of it are open it fails with EBUSY; force
// then detaches it, and it ends when they are closed.
func (s *Server) Unmount(force bool) error {
	err := s.fuse.Unmount()
	if err == nil || !force {
		return err
	}
	return Detach(s.dir)
}

// conn is what all nodes of a mount share.
type conn struct {
	log  func(string)
	trim *trimmer
}

// uninterrupted leaves out that the caller got a signal meanwhile. Programs that have timers or signals of their own,
// QEMU for one, do not expect EINTR from a file system and give up; all that is done with ctx is short.
func uninterrupted(ctx context.Context) context.Context { return context.WithoutCancel(ctx) }

// errno is the one place that turns errors into error numbers.
func (c *conn) errno(err error) syscall.Errno {
	var e syscall.Errno
	switch {
	case err == nil:
		return 0
	case errors.Is(err, store.ErrDamaged):
		c.log(err.Error())
		return syscall.EIO
	case errors.Is(err, stdfs.ErrNotExist):
		return syscall.ENOENT
	case errors.Is(err, guest.ErrUnsupported):
		c.log(err.Error())
		return syscall.EOPNOTSUPP
	case errors.Is(err, volume.ErrLocked):
		c.log(err.Error())
		return syscall.EACCES
	case errors.Is(err, guest.ErrNotDir):
		return syscall.ENOTDIR
	case errors.Is(err, context.Canceled):
		return syscall.EINTR
	case errors.As(err, &e):
		c.log(err.Error())
		return e
	default:
		c.log(err.Error())
		return syscall.EIO
	}
}

// fill writes attributes in the form of stat(2).
func fill(a fs.Attr, out *fuse.Attr) {
	out.Ino = a.Inode
	out.Size = uint64(a.Size)
	out.Blocks = uint64(a.Blocks+511) / 512
	out.Blksize = 128 << 10
	out.Nlink = 1
	out.Mode = modeOf(a.Kind)
	switch a.Kind {
	case fs.KindDir:
		out.Mode |= 0o555
		out.Nlink = 2
	case fs.KindLink:
		out.Mode |= 0o777
	default:
		out.Mode |= 0o444
	}
	out.SetTimes(&a.Time, &a.Time, &a.Time)
	if a.Guest != nil {
		fillGuest(a.Guest, out)
	}
}

// fillGuest writes what a guest says of a file.
func fillGuest(g *guest.Stat, out *fuse.Attr) {
	out.Mode, out.Nlink = g.Mode, g.Nlink
	out.Owner = fuse.Owner{Uid: g.UID, Gid: g.GID}
	out.Rdev = uint32(unix.Mkdev(g.Major, g.Minor))
	setTime(&out.Atime, &out.Atimensec, g.Atime)
	setTime(&out.Mtime, &out.Mtimensec, g.Mtime)
	setTime(&out.Ctime, &out.Ctimensec, g.Ctime)
}

// setTime sets a time; one that the file system does not have is 1970's beginning.
func setTime(sec *uint64, nsec *uint32, t time.Time) {
	if t.IsZero() {
		t = time.Unix(0, 0)
	}
	*sec, *nsec = uint64(t.Unix()), uint32(t.Nanosecond())
}

var modes = map[fs.Kind]uint32{
	fs.KindDir: syscall.S_IFDIR, fs.KindLink: syscall.S_IFLNK, fs.KindFile: syscall.S_IFREG, fs.KindChar: syscall.S_IFCHR,
	fs.KindBlock: syscall.S_IFBLK, fs.KindFIFO: syscall.S_IFIFO, fs.KindSocket: syscall.S_IFSOCK,
}

func modeOf(k fs.Kind) uint32 { return modes[k] }

// getattr answers for every kind of node.
func (c *conn) getattr(ctx context.Context, n fs.Node, out *fuse.AttrOut) syscall.Errno {
	a, err := n.Attr(uninterrupted(ctx))
	if err != nil {
		return c.errno(err)
	}
	fill(a, &out.Attr)
	if a.Immutable {
		out.SetTimeout(immutableTTL)
	} else {
		out.SetTimeout(0)
	}
	return 0
}

type dirNode struct {
	gofs.Inode
	conn      *conn
	dir       fs.Dir
	immutable bool // so are its entries
}

var (
	_ gofs.NodeLookuper  = (*dirNode)(nil)
	_ gofs.NodeReaddirer = (*dirNode)(nil)
	_ gofs.NodeGetattrer = (*dirNode)(nil)
)

func (n *dirNode) Getattr(ctx context.Context, _ gofs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	return n.conn.getattr(ctx, n.dir, out)
}

func (n *dirNode) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*gofs.Inode, syscall.Errno) {
	ctx = uninterrupted(ctx)
	child, err := n.dir.Lookup(ctx, name)
	if err != nil {
		return nil, n.conn.errno(err)
	}
	a, err := child.Attr(ctx)
	if err != nil {
		return nil, n.conn.errno(err)
	}
	fill(a, &out.Attr)
	out.SetAttrTimeout(0)
	if a.Immutable {
		out.SetAttrTimeout(immutableTTL)
	}
	// An entry may be kept for long only where its directory cannot change.
	switch {
	case n.immutable:
		out.SetEntryTimeout(immutableTTL)
	case n.IsRoot():
		out.SetEntryTimeout(vmTTL)
	}
	var node gofs.InodeEmbedder
	switch child := child.(type) {
	case fs.Dir:
		node = &dirNode{conn: n.conn, dir: child, immutable: a.Immutable}
	case fs.Link:
		node = &linkNode{conn: n.conn, link: child}
	case fs.File:
		node = &fileNode{conn: n.conn, file: child}
	default:
		node = &specialNode{conn: n.conn, node: child}
	}
	if a.Guest != nil && a.Kind != fs.KindDir { // to lose a directory that somebody works in would be noticed
		n.conn.trim.saw(n.EmbeddedInode(), name)
	}
	return n.NewInode(ctx, node, gofs.StableAttr{Mode: modeOf(a.Kind), Ino: a.Inode}), 0
}

func (n *dirNode) Readdir(ctx context.Context) (gofs.DirStream, syscall.Errno) {
	if l, ok := n.dir.(fs.Lister); ok {
		return newListing(n.conn, l.List(uninterrupted(ctx)))
	}
	entries, err := n.dir.Entries(uninterrupted(ctx))
	if err != nil {
		return nil, n.conn.errno(err)
	}
	list := make([]fuse.DirEntry, len(entries))
	for i, e := range entries {
		list[i] = fuse.DirEntry{Name: e.Name, Ino: e.Inode, Mode: modeOf(e.Kind)}
	}
	return gofs.NewListDirStream(list), 0
}

type linkNode struct {
	gofs.Inode
	conn *conn
	link fs.Link
}

var (
	_ gofs.NodeReadlinker = (*linkNode)(nil)
	_ gofs.NodeGetattrer  = (*linkNode)(nil)
)

func (n *linkNode) Getattr(ctx context.Context, _ gofs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	return n.conn.getattr(ctx, n.link, out)
}

func (n *linkNode) Readlink(ctx context.Context) ([]byte, syscall.Errno) {
	target, err := n.link.Target(uninterrupted(ctx))
	return []byte(target), n.conn.errno(err)
}

type fileNode struct {
	gofs.Inode
	conn *conn
	file fs.File
}

var (
	_ gofs.NodeOpener    = (*fileNode)(nil)
	_ gofs.NodeGetattrer = (*fileNode)(nil)
)

func (n *fileNode) Getattr(ctx context.Context, _ gofs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	return n.conn.getattr(ctx, n.file, out)
}

func (n *fileNode) Open(ctx context.Context, flags uint32) (gofs.FileHandle, uint32, syscall.Errno) {
	if flags&syscall.O_ACCMODE != syscall.O_RDONLY {
		return nil, 0, syscall.EROFS
	}
	ctx = uninterrupted(ctx)
	release, err := n.file.Hold(ctx)
	if err != nil {
		return nil, 0, n.conn.errno(err)
	}
	img, err := n.file.Image(ctx)
	if err != nil {
		release()
		return nil, 0, n.conn.errno(err)
	}
	holes := int64(holeGranularity)
	if fs.OfGuest(n.file) {
		holes = guestHoles
	}
	return &handle{conn: n.conn, img: img, holes: holes, release: release}, fuse.FOPEN_KEEP_CACHE, 0
}

// handle is an open file.
type handle struct {
	conn    *conn
	img     fs.Image
	holes   int64  // how finely holes are told, bytes
	release func() // of the hold

	mu   sync.Mutex // guards following
	seek *holeCursor
}

var (
	_ gofs.FileReader   = (*handle)(nil)
	_ gofs.FileLseeker  = (*handle)(nil)
	_ gofs.FileReleaser = (*handle)(nil)
)

// Read gives all bytes asked for up to the end of the file, or an error: the
// kernel takes a short read in the middle of a file for its end.
func (h *handle) Read(_ context.Context, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n, err := h.img.ReadAt(dest, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, h.conn.errno(err)
	}
	return fuse.ReadResultData(dest[:n]), 0
}

// Lseek answers SEEK_DATA and SEEK_HOLE.
func (h *handle) Lseek(_ context.Context, off uint64, whence uint32) (uint64, syscall.Errno) {
	size := h.img.Size()
	if off >= uint64(size) {
		return 0, syscall.ENXIO
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.seek == nil || int64(off) < h.seek.from {
		if h.seek != nil {
			h.seek.stop()
		}
		h.seek = newHoleCursor(h.img, h.holes)
	}
	e, err := h.seek.at(int64(off))
	if err != nil {
		return 0, h.conn.errno(err)
	}
	switch {
	case whence == unix.SEEK_DATA && e.Empty():
		return 0, syscall.ENXIO
	case whence == unix.SEEK_DATA:
		return max(off, uint64(e.Off)), 0
	case whence == unix.SEEK_HOLE && (e.Empty() || int64(off) < e.Off):
		return off, 0
	case whence == unix.SEEK_HOLE:
		return uint64(min(e.End(), size)), 0
	default:
		return 0, syscall.EINVAL
	}
}

func (h *handle) Release(context.Context) syscall.Errno {
	h.release()
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.seek != nil {
		h.seek.stop()
		h.seek = nil
	}
	return 0
}

// holeCursor goes through the allocated ranges of a file once, as copying
// programs ask for them, instead of from the start for each question.
type holeCursor struct {
	next func() (extent.Extent, error, bool)
	stop func()
	from int64         // questions before it need a new cursor
	cur  extent.Extent // the range at or after from; empty when there is none
}

// How finely holes are told, bytes: the smallest chunk; in a guest's file, the block that most file systems have.
const (
	holeGranularity = store.MinChunkSize
	guestHoles      = 4096
)

func newHoleCursor(img fs.Image, granularity int64) *holeCursor {
	c := &holeCursor{}
	c.next, c.stop = iter.Pull2(img.Allocated(granularity))
	c.cur = extent.Extent{Len: 0}
	return c
}

// at gives the range that holds off or the first one after it.
func (c *holeCursor) at(off int64) (extent.Extent, error) {
	for c.cur.End() <= off {
		e, err, ok := c.next()
		if err != nil {
			return e, err
		}
		if !ok {
			c.cur = extent.Extent{Off: off}
			break
		}
		c.cur = e
	}
	c.from = off
	return c.cur, nil
}

// Detach takes a mount out of the tree of directories at once; it ends when
// nobody uses it any more.
func Detach(dir string) error {
	err := unix.Unmount(dir, unix.MNT_DETACH)
	if errors.Is(err, unix.EPERM) {
		return fusermount("-u", "-z", dir)
	}
	return err
}

// Stale reports whether dir is a mount of ours whose process is gone.
func Stale(dir string) bool {
	// Not stat(2): the kernel may answer that from what it has kept.
	var st unix.Statfs_t
	err := unix.Statfs(dir, &st)
	return (errors.Is(err, syscall.ENOTCONN) || errors.Is(err, syscall.ECONNABORTED)) && isOurs(dir)
}

// Mounted reports whether a mount of holdfast is at dir, an absolute path without links.
func Mounted(dir string) bool { return isOurs(dir) }

// isOurs reports whether the mount at dir is one of holdfast's.
func isOurs(dir string) bool {
	_, ok := mountOf(dir)
	return ok
}

// mountOf gives the device, as MAJOR:MINOR, of the newest mount of holdfast's at dir.
func mountOf(dir string) (device string, ok bool) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", false
	}
	for line := range strings.Lines(string(text)) {
		// man 5 proc: field 3 is the device, 5 the mount point, after " - " comes the type.
		f := strings.Fields(line)
		_, rest, fuse := strings.Cut(line, " - ")
		if fuse && len(f) > 5 && unescape(f[4]) == dir && strings.HasPrefix(rest, "fuse.holdfast ") {
			device, ok = f[2], true
		}
	}
	return device, ok
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}
