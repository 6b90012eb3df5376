//go:build linux

// Command benchdisk measures the disks of a restore point as machines use them: by fio through the mount and
// through NBD with an overlay, beside nbdkit on the same disk in a plain file; and with --boots, how long a Debian system
// takes to boot in QEMU from a point, beside the plain file; with --files, a guest's many small files, beside the kernel's own
// mount of the disk; with --nfs, a point by NFS with an overlay, beside nfs-ganesha on the same disk in a plain file, to one client for both (libnfs).
//
//	go run ./test/benchdisk --size 2G --passes 3
//	go run ./test/benchdisk --boots --passes 3
//	go run ./test/benchdisk --files 1000000
//	go run ./test/benchdisk --nfs --passes 5
//
// Figures are medians of all passes of one run; compare within a run. Caches of the kernel are dropped before every
// row, as root. What to know of them:
//
//   - nbdkit reads a file of the file system: it has nothing to decode. Its cow filter keeps what is
//     written in a temporary file and syncs nothing.
//   - Every row reads or writes for some seconds, at random places where the disk has data.
//   - nfs-ganesha (Debian's, downloaded and unpacked for the run; FSAL_VFS) writes in place and syncs when the protocol asks for it: fsync(2), seen by
//     strace. Caches are cold: those of the kernel were dropped and the server was just started; or warm: then all of the disk was read once. A
//     server's CPU time is from its /proc/PID/stat.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/holdfast-backup/holdfast/test/command"
	"github.com/holdfast-backup/holdfast/test/testimage"
)

type options struct {
	parent, holdfast string
	size             testimage.SizeFlag
	passes, seconds  int
	boots            bool
	files            int
	fileSystem       string
	nfs              bool
	rows             string
	serve            string
}

func main() {
	o := options{size: 2 << 30}
	flag.StringVar(&o.parent, "dir", os.TempDir(), "where to work")
	flag.Var(&o.size, "size", "size of the image that fio reads")
	flag.IntVar(&o.passes, "passes", 3, "how often to measure everything; figures are medians")
	flag.IntVar(&o.seconds, "seconds", 3, "how long fio reads or writes for one figure")
	flag.BoolVar(&o.boots, "boots", false, "measure boots instead of fio")
	flag.IntVar(&o.files, "files", 0, "measure a guest's files instead, on a disk with so many")
	flag.StringVar(&o.fileSystem, "fs", "ext4", "the file system that has them: ext4, xfs or btrfs")
	flag.BoolVar(&o.nfs, "nfs", false, "measure NFS instead, beside nfs-ganesha")
	flag.StringVar(&o.rows, "rows", "", "of --nfs, only rows with this in their names")
	flag.StringVar(&o.serve, "serve", "", "what --nfs starts: serves this folder by NFS")
	flag.StringVar(&o.holdfast, "holdfast", "", "holdfast to measure (default: build it)")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintf(os.Stderr, "benchdisk: %v\n", err)
		os.Exit(1)
	}
}

// bench is where and what is measured.
type bench struct {
	options
	dir string
	env []string
}

func run(ctx context.Context, o options) (err error) {
	if o.serve != "" {
		return serveFolder(ctx, o.serve)
	}
	if os.Geteuid() != 0 {
		return errors.New("needs root: to drop caches and to build images")
	}
	dir, err := os.MkdirTemp(o.parent, "holdfast-benchdisk-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, testimage.Clean(dir)) }()
	b := &bench{options: o, dir: dir, env: []string{"HOLDFAST_REPO=" + filepath.Join(dir, "repo"), "HOLDFAST_PASSWORD=bench",
		"HOLDFAST_CONFIG=/dev/null", "HOLDFAST_BOOTS=" + filepath.Join(dir, "boots")}}
	if b.holdfast == "" {
		b.holdfast = filepath.Join(dir, "holdfast")
		if _, err := command.Run(ctx, "go", "build", "-trimpath", "-o", b.holdfast, "./cmd/holdfast"); err != nil {
			return err
		}
	}
	switch {
	case o.boots:
		return b.boots(ctx)
	case o.files > 0:
		return b.filesOfGuest(ctx)
	case o.nfs:
		return b.nfs(ctx)
	}
	return b.fio(ctx)
}

// run runs holdfast.
func (b *bench) run(ctx context.Context, args ...string) (command.Result, error) {
	return command.Command{Args: append([]string{b.holdfast, "--no-progress"}, args...), Env: b.env}.Run(ctx)
}

// start starts holdfast, or another program, and leaves it running.
func (b *bench) start(ctx context.Context, words ...string) (*command.Process, error) {
	return command.Command{Args: words, Env: b.env}.Start(ctx)
}

// backup makes a repository with one point of the image.
func (b *bench) backup(ctx context.Context, image string) error {
	if _, err := b.run(ctx, "init", filepath.Join(b.dir, "repo")); err != nil {
		return err
	}
	_, err := b.run(ctx, "backup", image, "--vm", "vm")
	return err
}

// cool empties the page cache, as root: proc_sys_vm(5).
func cool() error {
	syscall.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}

// median is the middle one; of an even number, the larger of the two.
func median(list []float64) float64 {
	list = slices.Sorted(slices.Values(list))
	return list[len(list)/2]
}

// table prints rows in Markdown.
func table(head []string, rows [][]string) {
	fmt.Printf("| %s |\n|%s\n", strings.Join(head, " | "), strings.Repeat("---|", len(head)))
	for _, r := range rows {
		fmt.Printf("| %s |\n", strings.Join(r, " | "))
	}
}
