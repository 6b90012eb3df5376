package fuse

import (
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs"
)

// ListXAttr implements fuse.RawFileSystem.
func (s *server) ListXAttr(_ <-chan struct{}, in *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	x, ok := s.nodes.node(in.NodeId).(fs.Xattrer)
	if !ok {
		return 0, fuse.OK
	}
	list, err := x.Xattrs(ctx)
	if err != nil {
		return 0, s.status(err)
	}
	var names []byte
	for _, a := range list {
		if a.Listed() {
			names = append(append(names, a.Name...), 0)
		}
	}
	return uint32(len(names)), copyOut(dest, names)
}

// GetXAttr implements fuse.RawFileSystem.
func (s *server) GetXAttr(_ <-chan struct{}, in *fuse.InHeader, name string, dest []byte) (uint32, fuse.Status) {
	x, ok := s.nodes.node(in.NodeId).(fs.Xattrer)
	if !ok {
		return 0, fuse.ENODATA
	}
	list, err := x.Xattrs(ctx)
	if err != nil {
		return 0, s.status(err)
	}
	for _, a := range list {
		if a.Name == name {
			return uint32(len(a.Value)), copyOut(dest, a.Value)
		}
	}
	return 0, fuse.ENODATA
}

// copyOut copies into the caller's memory; with none of it the caller only wants to know how much it takes.
func copyOut(dest, src []byte) fuse.Status {
	if len(dest) == 0 {
		return fuse.OK
	}
	if len(dest) < len(src) {
		return fuse.ERANGE
	}
	copy(dest, src)
	return fuse.OK
}

// Statx implements fuse.RawFileSystem: statx(2) alone asks for the time of birth.
func (s *server) Statx(_ <-chan struct{}, in *fuse.StatxIn, out *fuse.StatxOut) fuse.Status {
	n := s.nodes.node(in.NodeId)
	if n == nil {
		return stale
	}
	a, err := n.Attr(ctx)
	if err != nil {
		return s.status(err)
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
	out.SetTimeout(ttl(a))
	return fuse.OK
}
