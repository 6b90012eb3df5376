package extract

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs"
)

// fileTypes are the types of inode(7).
var fileTypes = map[fs.Kind]uint32{
	fs.KindDir: unix.S_IFDIR, fs.KindFile: unix.S_IFREG, fs.KindLink: unix.S_IFLNK, fs.KindChar: unix.S_IFCHR,
	fs.KindBlock: unix.S_IFBLK, fs.KindFIFO: unix.S_IFIFO, fs.KindSocket: unix.S_IFSOCK,
}

const aclAccess, aclDefault = "system.posix_acl_access", "system.posix_acl_default"

// procPath names what is open, a symbolic link itself included.
func procPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// inherits reports whether a directory gives what is made in it an ACL.
func inherits(fd int) bool {
	n, err := unix.Fgetxattr(fd, aclDefault, nil)
	return err == nil && n > 0
}

func dropACLs(fd int) {
	_ = unix.Fremovexattr(fd, aclAccess)
	_ = unix.Fremovexattr(fd, aclDefault)
}

// object is something open whose attributes are set.
type object struct {
	fd   int
	path bool // opened by O_PATH, which the calls that take a descriptor refuse
	link bool // a symbolic link
}

func (o object) chmod(mode uint32) error {
	if o.path {
		return unix.Chmod(procPath(o.fd), mode)
	}
	return unix.Fchmod(o.fd, mode)
}

func (o object) setXattr(name string, value []byte) error {
	if o.path {
		return unix.Setxattr(procPath(o.fd), name, value, 0)
	}
	return unix.Fsetxattr(o.fd, name, value, 0)
}

func (o object) removeXattr(name string) {
	if o.path {
		_ = unix.Removexattr(procPath(o.fd), name)
		return
	}
	_ = unix.Fremovexattr(o.fd, name)
}

func (o object) setTimes(atime, mtime unix.Timespec) error {
	ts := []unix.Timespec{atime, mtime}
	err := unix.UtimesNanoAt(o.fd, "", ts, unix.AT_EMPTY_PATH)
	if errors.Is(err, unix.EINVAL) { // Linux before 5.8
		return unix.UtimesNanoAt(unix.AT_FDCWD, procPath(o.fd), ts, 0)
	}
	return err
}

// timespec is a time as the kernel takes it. One that a file system does not have is 1970's beginning, as a mount shows it.
func timespec(t time.Time) unix.Timespec {
	if t.IsZero() {
		return unix.Timespec{}
	}
	return unix.Timespec{Sec: t.Unix(), Nsec: int64(t.Nanosecond())}
}

func mtime(f *found) unix.Timespec { return timespec(f.attr.Time) }

// extTimes is what ext4 has for times: it takes others for the nearest of these.
const extFirst, extLast = math.MinInt32, 15032385535

// sameTime reports whether a file's time is the one that it got when it was copied: file systems that know no nanoseconds
// cut them off, and take times out of their range for the nearest.
func sameTime(there, want unix.Timespec) bool {
	if there.Nsec == 0 {
		want.Nsec = 0
	}
	if there.Nsec == 0 && (there.Sec == extFirst || there.Sec == extLast) {
		want.Sec = min(max(want.Sec, extFirst), extLast)
	}
	return there == want
}

// attributes gives a copy what the guest's file has: the owner first, as changing it ends setuid and capabilities; the mode
// before an ACL, whose mask is in it; the times last. What the target refuses is counted; an error is of reading.
func (d *dirSink) attributes(ctx context.Context, o object, f *found) error {
	mode := f.mode()
	if g := f.attr.Guest; g != nil {
		if err := unix.Fchownat(o.fd, "", int(g.UID), int(g.GID), unix.AT_EMPTY_PATH); err != nil {
			d.lost("owner")
			mode &= 0o1777 // not setuid to whoever makes the copy
		}
	}
	if !o.link && o.chmod(mode) != nil {
		d.lost("mode")
	}
	list, err := f.xattrs(ctx)
	for _, x := range list {
		if err := o.setXattr(x.Name, x.Value); err != nil {
			d.lost(fmt.Sprintf("xattr %.80s: %v", x.Name, err))
		}
	}
	a := mtime(f)
	if g := f.attr.Guest; g != nil && !g.Atime.IsZero() {
		a = timespec(g.Atime)
	}
	if o.setTimes(a, mtime(f)) != nil {
		d.lost("times")
	}
	if err != nil {
		return fmt.Errorf("extended attributes: %w", err)
	}
	return nil
}
