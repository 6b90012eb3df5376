//go:build linux

// Command demo shows Holdfast at work on a disk of a real system, and has
// others check the result: qemu-img, e2fsck, the kernel's ext4 and mtools look
// at the mounted restore points, cmp at a restored one. Every check is against
// copies of the disk kept from the moment of each backup.
//
// It needs root for loop mounts, installs the programs it lacks, and leaves
// nothing behind but a tarball of Debian in the cache folder.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/holdfast-backup/holdfast/test/testimage"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "demo: %v\n", err)
		if ctx.Err() != nil {
			os.Exit(130)
		}
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	size := testimage.SizeFlag(2 << 30)
	flag.Var(&size, "size", "size of the disk")
	cache := flag.String("cache", testimage.DefaultCache(), "folder that keeps the Debian tree")
	parent := flag.String("dir", os.TempDir(), "where to work; needs three times the disk's content")
	bin := flag.String("holdfast", "", "program to show (default: build it)")
	flag.Parse()
	if os.Geteuid() != 0 {
		return errors.Join(errors.New("needs root, to mount what is inside disk images"), missing())
	}
	dir, err := os.MkdirTemp(*parent, "holdfast-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, testimage.Clean(dir)) }()
	d := &demo{dir: dir, cache: *cache, size: int64(size), bin: *bin}
	defer d.stop()
	return d.play(ctx)
}

// step is one row of the table. do returns what to say about it.
type step struct {
	name string
	do   func(ctx context.Context) (string, error)
}

// play runs the steps and prints a row for each when it is done.
func (d *demo) play(ctx context.Context) error {
	start := time.Now()
	for _, s := range d.steps() {
		fmt.Printf("%-46s ", s.name)
		begin := time.Now()
		note, err := s.do(ctx)
		if err != nil {
			fmt.Println(" no")
			return fmt.Errorf("%s: %w", s.name, err)
		}
		fmt.Printf("%7.1f s  %s\n", time.Since(begin).Seconds(), note)
	}
	fmt.Printf("%-46s %7.1f s\n", "all of it", time.Since(start).Seconds())
	return nil
}

func (d *demo) steps() []step {
	steps := []step{
		{"install what is missing", d.install},
		{"build a Debian disk", d.makeDisk},
		{"build holdfast", d.build},
		{"init", d.initRepo},
		{"backup", d.backup},
		{"change files on the disk", d.change},
		{"backup again", d.backup},
		{"verify --read-data", d.verify},
		{"mount", d.mount},
	}
	for i := range 2 {
		p := fmt.Sprintf("point %d: ", i+1)
		for _, format := range []string{"raw", "vmdk", "vhdx"} {
			steps = append(steps, step{p + format + " equals the disk (qemu-img)", d.compare(i, format)})
		}
		steps = append(steps,
			step{p + "VHDX is sound (qemu-img check)", d.checkVHDX(i)},
			step{p + "ext4 is sound (e2fsck)", d.fsck(i)},
			step{p + "files equal (kernel, cmp)", d.compareFiles(i)},
			step{p + "EFI partition equals (mtools)", d.compareESP(i)},
		)
	}
	return append(steps,
		step{"the points differ (qemu-img)", d.pointsDiffer},
		step{"umount", d.umount},
		step{"restore point 1", d.restore},
		step{"it equals the disk (cmp)", d.compareRestored},
	)
}

// demo is what the steps hand on to one another.
type demo struct {
	dir, cache string
	size       int64 // bytes, of the disk
	bin        string
	disk       testimage.Disk
	kept       []string // copies of the disk, one per backup
	points     []string // paths of the points in the tree: VM/POINT
	mounted    *mountedTree
}

func (d *demo) path(name string) string { return filepath.Join(d.dir, name) }

func (d *demo) stop() {
	if d.mounted != nil {
		d.mounted.process.Stop()
	}
}
