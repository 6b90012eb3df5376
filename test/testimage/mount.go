//go:build linux

// Package testimage builds disk images with real content for tests,
// demonstrations and benchmarks, and mounts what is inside them with the
// kernel's own drivers. Nearly all of it needs root.
//
//	dev, detach, err := testimage.Attach(ctx, testimage.Part{Image: img, Off: off, Len: n})
//	defer detach()
//
// Everything attached or mounted is let go by the returned function, which
// works after ctx has ended and may be called twice.
package testimage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/test/command"
)

// Part is a byte range of an image file.
type Part struct {
	Image    string
	Off, Len int64 // bytes; Len 0 means up to the end
	ReadOnly bool
}

// Attach gives the part a loop device.
func Attach(ctx context.Context, p Part) (dev string, detach func() error, err error) {
	args := []string{"losetup", "--find", "--show", "--offset", strconv.FormatInt(p.Off, 10)}
	if p.Len > 0 {
		args = append(args, "--sizelimit", strconv.FormatInt(p.Len, 10))
	}
	if p.ReadOnly {
		args = append(args, "--read-only")
	}
	out, err := command.Run(ctx, append(args, p.Image)...)
	dev = string(bytes.TrimSpace(out))
	if err != nil {
		// losetup may have been stopped between its work and its answer.
		return "", nil, errors.Join(err, detachAll(p.Image))
	}
	detach = sync.OnceValue(func() error {
		_, err := command.Run(context.WithoutCancel(ctx), "losetup", "--detach", dev)
		return err
	})
	return dev, detach, nil
}

// detachAll frees every loop device that has image behind it.
func detachAll(image string) error {
	ctx := context.Background()
	out, err := command.Run(ctx, "losetup", "--noheadings", "--output", "NAME", "--associated", image)
	for dev := range strings.FieldsSeq(string(out)) {
		_, e := command.Run(ctx, "losetup", "--detach", dev)
		err = errors.Join(err, e)
	}
	return err
}

// Mount mounts the file system inside the part at dir, which it makes and later
// removes. A read-only mount does not replay an ext4 journal.
func Mount(ctx context.Context, p Part, fstype, dir string) (unmount func() error, err error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	dev, detach, err := Attach(ctx, p)
	if err != nil {
		return nil, errors.Join(err, os.Remove(dir))
	}
	flags, data := uintptr(unix.MS_NOATIME|unix.MS_NODEV|unix.MS_NOSUID), ""
	if p.ReadOnly {
		flags |= unix.MS_RDONLY
		if fstype == "ext4" {
			data = "noload"
		}
	}
	if err := unix.Mount(dev, dir, fstype, flags, data); err != nil {
		err = fmt.Errorf("mount %s at offset %d: %w", p.Image, p.Off, err)
		return nil, errors.Join(err, detach(), os.Remove(dir))
	}
	return sync.OnceValue(func() error {
		err := unmountPatiently(dir)
		if err != nil {
			return err
		}
		return errors.Join(detach(), os.Remove(dir))
	}), nil
}

// unmountPatiently waits a little for others to let go of dir.
func unmountPatiently(dir string) error {
	var err error
	for range 50 {
		if err = unix.Unmount(dir, 0); err == nil || !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return nil
}

// InMount runs fn with the part's file system mounted, then makes the changes
// durable in the image and unmounts.
func InMount(ctx context.Context, p Part, fstype, dir string, fn func(root string) error) error {
	unmount, err := Mount(ctx, p, fstype, dir)
	if err != nil {
		return err
	}
	if err = fn(dir); err == nil && !p.ReadOnly {
		err = syncAt(dir)
	}
	if err := errors.Join(err, unmount()); err != nil {
		return err
	}
	return syncFile(p.Image)
}

func syncAt(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return unix.Syncfs(int(d.Fd()))
}

func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// Clean removes dir and what is below it. What is still mounted there is
// unmounted first, and loop devices of image files there are freed; when that
// cannot be done, nothing is removed.
func Clean(dir string) error {
	mounts, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if err := unmountPatiently(m); err != nil {
			if err := unix.Unmount(m, unix.MNT_DETACH); err != nil {
				return fmt.Errorf("unmount %s: %w", m, err)
			}
		}
	}
	if left, err := mountsBelow(dir); err != nil || len(left) > 0 {
		return errors.Join(fmt.Errorf("still mounted: %v", left), err)
	}
	if err := detachBelow(dir); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

// mountsBelow lists mount points at and below dir, the last mounted first.
func mountsBelow(dir string) ([]string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var mounts []string
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line) // proc_pid_mountinfo(5): the fifth is the mount point
		if len(f) < 5 {
			continue
		}
		m := unescapeOctal(f[4])
		if m == dir || strings.HasPrefix(m, dir+"/") {
			mounts = append(mounts, m)
		}
	}
	slices.Reverse(mounts)
	return mounts, nil
}

// unescapeOctal undoes the \040 for a space and its like of mountinfo.
func unescapeOctal(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// detachBelow frees loop devices whose image lies below dir.
func detachBelow(dir string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return err
	}
	var errs []error
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil || !strings.HasPrefix(string(b), dir+"/") {
			continue // freed meanwhile, or not ours
		}
		dev := "/dev/" + filepath.Base(filepath.Dir(filepath.Dir(file)))
		_, err = command.Run(context.Background(), "losetup", "--detach", dev)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
