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
	stdfs "io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs"
	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/volume"
	"github.com/holdfast-backup/holdfast/store"
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
	vmTTL        = time.Second // for names of VMs
	// For names of points: one that is forgotten is gone at once for whoever looks, and who takes thousands of files by their whole
	// paths does not ask for it thousands of times.
	pointTTL = 2 * time.Millisecond
)

// Server is a mounted tree.
type Server struct {
	fuse *fuse.Server
	dir  string
}

// Mount mounts tree at dir. It returns when the mount works.
func Mount(dir string, tree *fs.Tree, opt Options) (*Server, error) {
	c := &conn{log: opt.Log}
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
		EnableSymlinkCaching:     true, // a link that changes is another one
	}
	at, err := realPath(dir)
	if err != nil {
		return nil, fmt.Errorf("fuse: mount %s: %w", dir, err)
	}
	s, err := fuse.NewServer(newServer(c, tree.Root()), at, &mount)
	if err != nil {
		return nil, fmt.Errorf("fuse: mount %s: %w", dir, err)
	}
	// It is mounted: requests wait for their answers. Nothing here may ask for one itself, as
	// WaitMount does: should this process be killed at that moment, the kernel waits for ever for
	// the answer, and the process does not go (seen 2026-11-21).
	go s.Serve()
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
	log func(string)
}

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
