package fuse

import (
	"context"
	"iter"
	"syscall"

	gofs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs"
)

// specialNode is a device, a FIFO or a socket of a guest: it can be looked at, and the kernel opens no device of
// a mount that is nodev.
type specialNode struct {
	gofs.Inode
	conn *conn
	node fs.Node
}

// Getattr implements gofs.NodeGetattrer.
func (n *specialNode) Getattr(ctx context.Context, _ gofs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	return n.conn.getattr(ctx, n.node, out)
}

// listing is a directory that is listed as it is read.
type listing struct {
	conn *conn
	next func() (fs.Entry, error, bool)
	stop func()
	cur  fs.Entry
	err  error
	more bool
	off  uint64
}

func newListing(c *conn, entries iter.Seq2[fs.Entry, error]) (gofs.DirStream, syscall.Errno) {
	l := &listing{conn: c}
	l.next, l.stop = iter.Pull2(entries)
	l.cur, l.err, l.more = l.next()
	return l, 0
}

// HasNext implements gofs.DirStream.
func (l *listing) HasNext() bool { return l.more }

// Next implements gofs.DirStream.
func (l *listing) Next() (fuse.DirEntry, syscall.Errno) {
	if l.err != nil {
		l.more = false
		return fuse.DirEntry{}, l.conn.errno(l.err)
	}
	l.off++
	e := fuse.DirEntry{Name: l.cur.Name, Ino: l.cur.Inode, Mode: modeOf(l.cur.Kind), Off: l.off}
	l.cur, l.err, l.more = l.next()
	return e, 0
}

// Close implements gofs.DirStream.
func (l *listing) Close() { l.stop() }

// xattrs answers listxattr(2) of any node.
func (c *conn) listxattr(ctx context.Context, n fs.Node, dest []byte) (uint32, syscall.Errno) {
	x, ok := n.(fs.Xattrer)
	if !ok {
		return 0, 0
	}
	list, err := x.Xattrs(uninterrupted(ctx))
	if err != nil {
		return 0, c.errno(err)
	}
	var names []byte
	for _, a := range list {
		if a.Listed() {
			names = append(append(names, a.Name...), 0)
		}
	}
	return uint32(len(names)), copyOut(dest, names)
}

// getxattr answers getxattr(2) of any node.
func (c *conn) getxattr(ctx context.Context, n fs.Node, name string, dest []byte) (uint32, syscall.Errno) {
	x, ok := n.(fs.Xattrer)
	if !ok {
		return 0, syscall.ENODATA
	}
	list, err := x.Xattrs(uninterrupted(ctx))
	if err != nil {
		return 0, c.errno(err)
	}
	for _, a := range list {
		if a.Name == name {
			return uint32(len(a.Value)), copyOut(dest, a.Value)
		}
	}
	return 0, syscall.ENODATA
}

// copyOut copies into the caller's memory; with none of it the caller only wants to know how much it takes.
func copyOut(dest, src []byte) syscall.Errno {
	if len(dest) == 0 {
		return 0
	}
	if len(dest) < len(src) {
		return syscall.ERANGE
	}
	copy(dest, src)
	return 0
}

// Listxattr implements gofs.NodeListxattrer.
func (n *dirNode) Listxattr(ctx context.Context, dest []byte) (uint32, syscall.Errno) {
	return n.conn.listxattr(ctx, n.dir, dest)
}

// Getxattr implements gofs.NodeGetxattrer.
func (n *dirNode) Getxattr(ctx context.Context, name string, dest []byte) (uint32, syscall.Errno) {
	return n.conn.getxattr(ctx, n.dir, name, dest)
}

// Listxattr implements gofs.NodeListxattrer.
func (n *fileNode) Listxattr(ctx context.Context, dest []byte) (uint32, syscall.Errno) {
	return n.conn.listxattr(ctx, n.file, dest)
}

// Getxattr implements gofs.NodeGetxattrer.
func (n *fileNode) Getxattr(ctx context.Context, name string, dest []byte) (uint32, syscall.Errno) {
	return n.conn.getxattr(ctx, n.file, name, dest)
}

// Listxattr implements gofs.NodeListxattrer.
func (n *linkNode) Listxattr(ctx context.Context, dest []byte) (uint32, syscall.Errno) {
	return n.conn.listxattr(ctx, n.link, dest)
}

// Getxattr implements gofs.NodeGetxattrer.
func (n *linkNode) Getxattr(ctx context.Context, name string, dest []byte) (uint32, syscall.Errno) {
	return n.conn.getxattr(ctx, n.link, name, dest)
}

// Listxattr implements gofs.NodeListxattrer.
func (n *specialNode) Listxattr(ctx context.Context, dest []byte) (uint32, syscall.Errno) {
	return n.conn.listxattr(ctx, n.node, dest)
}

// Getxattr implements gofs.NodeGetxattrer.
func (n *specialNode) Getxattr(ctx context.Context, name string, dest []byte) (uint32, syscall.Errno) {
	return n.conn.getxattr(ctx, n.node, name, dest)
}

// statx answers statx(2), which alone asks for the time of birth.
func (c *conn) statx(ctx context.Context, n fs.Node, out *fuse.StatxOut) syscall.Errno {
	a, err := n.Attr(uninterrupted(ctx))
	if err != nil {
		return c.errno(err)
	}
	var at fuse.Attr
	fill(a, &at)
	out.Mask = unix.STATX_BASIC_STATS
	out.Ino, out.Size, out.Blocks, out.Blksize = at.Ino, at.Size, at.Blocks, at.Blksize
	out.Mode, out.Nlink, out.Uid, out.Gid = uint16(at.Mode), at.Nlink, at.Uid, at.Gid
	out.RdevMajor, out.RdevMinor = unix.Major(uint64(at.Rdev)), unix.Minor(uint64(at.Rdev))
	out.Atime = fuse.SxTime{Sec: at.Atime, Nsec: at.Atimensec}
	out.Mtime = fuse.SxTime{Sec: at.Mtime, Nsec: at.Mtimensec}
	out.Ctime = fuse.SxTime{Sec: at.Ctime, Nsec: at.Ctimensec}
	if a.Guest != nil && !a.Guest.Btime.IsZero() {
		out.Mask |= unix.STATX_BTIME
		setTime(&out.Btime.Sec, &out.Btime.Nsec, a.Guest.Btime)
	}
	if a.Immutable {
		out.SetTimeout(immutableTTL)
	}
	return 0
}

// Statx implements gofs.NodeStatxer.
func (n *dirNode) Statx(ctx context.Context, _ gofs.FileHandle, _, _ uint32, out *fuse.StatxOut) syscall.Errno {
	return n.conn.statx(ctx, n.dir, out)
}

// Statx implements gofs.NodeStatxer.
func (n *fileNode) Statx(ctx context.Context, _ gofs.FileHandle, _, _ uint32, out *fuse.StatxOut) syscall.Errno {
	return n.conn.statx(ctx, n.file, out)
}

// Statx implements gofs.NodeStatxer.
func (n *linkNode) Statx(ctx context.Context, _ gofs.FileHandle, _, _ uint32, out *fuse.StatxOut) syscall.Errno {
	return n.conn.statx(ctx, n.link, out)
}

// Statx implements gofs.NodeStatxer.
func (n *specialNode) Statx(ctx context.Context, _ gofs.FileHandle, _, _ uint32, out *fuse.StatxOut) syscall.Errno {
	return n.conn.statx(ctx, n.node, out)
}
