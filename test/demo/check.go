//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"

	"github.com/holdfast-backup/holdfast/test/command"
	"github.com/holdfast-backup/holdfast/test/testimage"
)

// check is the work of one row.
type check = func(ctx context.Context) (string, error)

// file is a computed disk file of point i in the mounted tree.
func (d *demo) file(i int, name string) string {
	return filepath.Join(d.mounted.dir, d.points[i], name)
}

// compare has qemu-img compare a disk file of point i with the kept copy.
func (d *demo) compare(i int, format string) check {
	return func(ctx context.Context) (string, error) {
		_, err := command.Run(ctx, "qemu-img", "compare", "-f", format, "-F", "raw", d.file(i, "disk0."+format), d.kept[i])
		return "", err
	}
}

// pointsDiffer makes sure that the comparison can fail.
func (d *demo) pointsDiffer(ctx context.Context) (string, error) {
	out, err := command.Run(ctx, "qemu-img", "compare", "-f", "raw", "-F", "raw", d.file(0, "disk0.raw"), d.kept[1])
	if err == nil {
		return "", errors.New("point 1 equals the disk after the change")
	}
	// qemu-img(1): 1 is "images differ", more is an error.
	if exit := new(exec.ExitError); !errors.As(err, &exit) || exit.ExitCode() != 1 {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return "", nil
}

func (d *demo) checkVHDX(i int) check {
	return func(ctx context.Context) (string, error) {
		_, err := command.Run(ctx, "qemu-img", "check", "-f", "vhdx", d.file(i, "disk0.vhdx"))
		return "", err
	}
}

// root is the root partition in some copy of the disk, not to be written.
func (d *demo) root(image string) testimage.Part {
	p := d.disk.On(image).Root
	p.ReadOnly = true
	return p
}

func (d *demo) fsck(i int) check {
	return func(ctx context.Context) (string, error) {
		dev, detach, err := testimage.Attach(ctx, d.root(d.file(i, "disk0.raw")))
		if err != nil {
			return "", err
		}
		_, err = command.Run(ctx, "e2fsck", "-fn", dev)
		return "", errors.Join(err, detach())
	}
}

// someFiles are looked at through the kernel; the first to come to mind, and
// what the change touches.
var someFiles = []string{
	"etc/os-release", "etc/fstab", "etc/hostname", "usr/bin/bash", "usr/bin/perl", "usr/bin/dpkg",
	"usr/lib/*-linux-gnu/libc.so.6", "var/lib/dpkg/status", "var/log/app.log", "root/new.bin",
}

// compareFiles mounts the root partition of point i and of the kept copy, and
// has cmp compare some files.
func (d *demo) compareFiles(i int) check {
	return func(ctx context.Context) (note string, err error) {
		ours, theirs := d.path("root-point"), d.path("root-kept")
		unmount, err := testimage.Mount(ctx, d.root(d.file(i, "disk0.raw")), "ext4", ours)
		if err != nil {
			return "", err
		}
		defer func() { err = errors.Join(err, unmount()) }()
		unmountKept, err := testimage.Mount(ctx, d.root(d.kept[i]), "ext4", theirs)
		if err != nil {
			return "", err
		}
		defer func() { err = errors.Join(err, unmountKept()) }()
		n, err := compareSome(ctx, ours, theirs)
		return fmt.Sprintf("%d files", n), err
	}
}

func compareSome(ctx context.Context, ours, theirs string) (int, error) {
	n := 0
	for _, pattern := range someFiles {
		files, err := filepath.Glob(filepath.Join(theirs, pattern))
		if err != nil {
			return n, err
		}
		for _, file := range files {
			rel, err := filepath.Rel(theirs, file)
			if err != nil {
				return n, err
			}
			if _, err := command.Run(ctx, "cmp", filepath.Join(ours, rel), file); err != nil {
				return n, err
			}
			n++
		}
	}
	if n < 7 { // the last two come with the change
		return n, fmt.Errorf("only %d of the files exist on the disk", n)
	}
	return n, nil
}

// compareESP reads the EFI system partition of point i with mtools.
func (d *demo) compareESP(i int) check {
	return func(ctx context.Context) (string, error) {
		esp := fmt.Sprintf("%s@@%d", d.file(i, "disk0.raw"), d.disk.ESP.Off)
		want := d.disk.ESPFiles()
		for name, content := range want {
			got, err := command.Run(ctx, "mtype", "-i", esp, "::"+name)
			if err != nil {
				return "", err
			}
			if string(got) != content {
				return "", fmt.Errorf("%s has %d bytes, or others than the %d written", name, len(got), len(content))
			}
		}
		return fmt.Sprintf("%d files", len(want)), nil
	}
}
