//go:build linux

package main

import (
	"context"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// mountSlow shows the files of dir at mnt, each read delayed and none kept by the kernel.
func mountSlow(dir, mnt string, delay time.Duration) (unmount func() error, err error) {
	root := &slowDir{dir: dir, delay: delay}
	s, err := fs.Mount(mnt, root, &fs.Options{MountOptions: fuse.MountOptions{DirectMount: true, DisableReadDirPlus: true, MaxBackground: 64}})
	if err != nil {
		return nil, err
	}
	return s.Unmount, nil
}

// slowDir is a directory of plain files.
type slowDir struct {
	fs.Inode
	dir   string
	delay time.Duration
}

var (
	_ fs.NodeLookuper  = (*slowDir)(nil)
	_ fs.NodeReaddirer = (*slowDir)(nil)
	_ fs.NodeOpener    = (*slowFile)(nil)
	_ fs.NodeGetattrer = (*slowFile)(nil)
	_ fs.FileReader    = (*slowHandle)(nil)
	_ fs.FileReleaser  = (*slowHandle)(nil)
)

func (d *slowDir) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	f := &slowFile{path: d.dir + "/" + name, delay: d.delay}
	var st syscall.Stat_t
	if err := syscall.Stat(f.path, &st); err != nil {
		return nil, fs.ToErrno(err)
	}
	out.Attr.FromStat(&st)
	return d.NewInode(ctx, f, fs.StableAttr{Mode: syscall.S_IFREG, Ino: st.Ino}), 0
}

func (d *slowDir) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	return fs.NewLoopbackDirStream(d.dir)
}

type slowFile struct {
	fs.Inode
	path  string
	delay time.Duration
}

func (f *slowFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	var st syscall.Stat_t
	if err := syscall.Stat(f.path, &st); err != nil {
		return fs.ToErrno(err)
	}
	out.Attr.FromStat(&st)
	return 0
}

func (f *slowFile) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	fd, err := syscall.Open(f.path, syscall.O_RDONLY, 0)
	if err != nil {
		return nil, 0, fs.ToErrno(err)
	}
	return &slowHandle{fd, f.delay}, fuse.FOPEN_DIRECT_IO, 0
}

type slowHandle struct {
	fd    int
	delay time.Duration
}

func (h *slowHandle) Read(_ context.Context, p []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	time.Sleep(h.delay)
	n, err := syscall.Pread(h.fd, p, off)
	if err != nil {
		return nil, fs.ToErrno(err)
	}
	return fuse.ReadResultData(p[:n]), 0
}

func (h *slowHandle) Release(context.Context) syscall.Errno { return fs.ToErrno(syscall.Close(h.fd)) }
