package overlay

import (
	"context"
	"errors"
	"io"
	"os"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	gofs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// guestDisk is a file system of one file, "disk", which is a Disk: what a loop device takes.
type guestDisk struct {
	gofs.Inode
	root   *diskRoot
	syncs  atomic.Int64
	punch  atomic.Int64
	writes atomic.Int64
}

type diskRoot struct {
	gofs.Inode
	disk *Disk
	file *guestDisk
}

var (
	_ gofs.NodeOnAdder   = (*diskRoot)(nil)
	_ gofs.NodeGetattrer = (*guestDisk)(nil)
	_ gofs.NodeSetattrer = (*guestDisk)(nil)
	_ gofs.NodeOpener    = (*guestDisk)(nil)
	_ gofs.NodeReader    = (*guestDisk)(nil)
	_ gofs.NodeWriter    = (*guestDisk)(nil)
	_ gofs.NodeFsyncer   = (*guestDisk)(nil)
	_ gofs.NodeAllocater = (*guestDisk)(nil)
	_ gofs.NodeStatfser  = (*guestDisk)(nil)
)

// serveDisk mounts d at dir. Nothing here asks the mount for anything: this process answers.
func serveDisk(d *Disk, dir string) (*guestDisk, *fuse.Server, error) {
	root := &diskRoot{disk: d}
	root.file = &guestDisk{root: root}
	long := time.Hour
	mount := fuse.MountOptions{FsName: "overlay", DirectMount: true, MaxWrite: 1 << 20, DisableXAttrs: true}
	s, err := fuse.NewServer(gofs.NewNodeFS(root, &gofs.Options{
		MountOptions: mount, EntryTimeout: &long, AttrTimeout: &long,
	}), dir, &mount)
	if err != nil {
		return nil, nil, err
	}
	go s.Serve()
	return root.file, s, keepFuse()
}

// keepFuse keeps /dev/fuse, which go-fuse opens without O_CLOEXEC, from children: a guest that had it would wait
// for itself once this process is gone.
func keepFuse() error {
	list, err := os.ReadDir("/proc/self/fd")
	for _, e := range list {
		if to, _ := os.Readlink("/proc/self/fd/" + e.Name()); to == "/dev/fuse" {
			fd, err := strconv.Atoi(e.Name())
			if err != nil {
				return err
			}
			unix.CloseOnExec(fd)
		}
	}
	return err
}

func (r *diskRoot) OnAdd(ctx context.Context) {
	r.AddChild("disk", r.NewPersistentInode(ctx, r.file, gofs.StableAttr{Mode: syscall.S_IFREG}), true)
}

func (f *guestDisk) Getattr(_ context.Context, _ gofs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size, out.Blksize = syscall.S_IFREG|0o600, uint64(f.root.disk.Size()), Block
	return 0
}

func (f *guestDisk) Setattr(ctx context.Context, h gofs.FileHandle, _ *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	return f.Getattr(ctx, h, out)
}

func (f *guestDisk) Open(context.Context, uint32) (gofs.FileHandle, uint32, syscall.Errno) {
	return nil, 0, 0
}

func (f *guestDisk) Read(_ context.Context, _ gofs.FileHandle, p []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n, err := f.root.disk.ReadAt(p, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, syscall.EIO
	}
	return fuse.ReadResultData(p[:n]), 0
}

func (f *guestDisk) Write(_ context.Context, _ gofs.FileHandle, p []byte, off int64) (uint32, syscall.Errno) {
	f.writes.Add(1)
	n, err := f.root.disk.WriteAt(p, off)
	return uint32(n), errnoOf(err)
}

func (f *guestDisk) Fsync(context.Context, gofs.FileHandle, uint32) syscall.Errno {
	f.syncs.Add(1)
	return errnoOf(f.root.disk.Flush())
}

// Allocate is how a loop device discards and writes zeros.
func (f *guestDisk) Allocate(_ context.Context, _ gofs.FileHandle, off, n uint64, mode uint32) syscall.Errno {
	switch mode &^ unix.FALLOC_FL_KEEP_SIZE {
	case unix.FALLOC_FL_PUNCH_HOLE:
		f.punch.Add(1)
		return errnoOf(f.root.disk.Zero(int64(off), int64(n), true))
	case unix.FALLOC_FL_ZERO_RANGE:
		return errnoOf(f.root.disk.Zero(int64(off), int64(n), false))
	}
	return syscall.EOPNOTSUPP
}

func (f *guestDisk) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	out.Bsize = Block // the granularity of discards, drivers/block/loop.c
	return 0
}

func errnoOf(err error) syscall.Errno {
	if err != nil {
		return syscall.EIO
	}
	return 0
}
