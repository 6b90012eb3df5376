//go:build linux

// Command bench measures Holdfast and other backup programs side by side on the
// same image: first backup, next backup, unchanged backup, restore, and reads
// through a mount. It prints tables in Markdown, with ratios to the goals of the
// design, and on demand everything as JSON.
//
//	go run ./test/bench --size 1G --passes 3 --out bench.json
//	go run ./test/bench --points 31 --tools restic,holdfast
//
// Ratios within one run mean something; seconds from different machines or hours
// do not. What to know of the figures:
//
//   - Every program encrypts, with a password of this run. Before every step
//     files are synced and, as root, the kernel's caches dropped; the medium or
//     a host below may still cache.
//   - Wall times of restores are given as the program takes, and with a sync of
//     the file system after it, since not every program syncs.
//   - Of an unchanged file some programs compare the times only, and read nothing;
//     borg reads it, as it does not trust the times of a file changed lately.
//   - Peak memory is what getrusage(2) says and never below that of this
//     program; for mounts it is VmHWM of proc(5).
//   - Random reads go to allocated parts of the image, at the same places for
//     every program. The caches of the mounting program itself stay warm from
//     row to row.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/holdfast-backup/holdfast/test/testimage"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		if ctx.Err() != nil {
			os.Exit(130)
		}
		os.Exit(1)
	}
}

// options are the flags.
type options struct {
	parent, images, out string
	holdfast, tools     string
	size                testimage.SizeFlag
	passes, points      int
	mounts              bool
}

func parseFlags() options {
	o := options{size: testimage.FullSize}
	flag.StringVar(&o.parent, "dir", os.TempDir(), "where to work; needs about 8 times the image's content")
	flag.StringVar(&o.images, "images", "", "folder with v1.img and v2.img; made there if need be, and kept (default: made anew)")
	flag.Var(&o.size, "size", "size of the image; published figures are for 4G")
	flag.IntVar(&o.passes, "passes", 3, "how often to measure everything; figures are medians")
	flag.IntVar(&o.points, "points", 2, "grow the repositories to this many restore points and note their size (slow)")
	flag.BoolVar(&o.mounts, "mounts", true, "measure reads through mounts")
	flag.StringVar(&o.tools, "tools", "", "programs to measure, of restic, borg, borg-fixed, kopia, holdfast, cp (default: those in PATH)")
	flag.StringVar(&o.holdfast, "holdfast", "", "holdfast to measure (default: build it)")
	flag.StringVar(&o.out, "out", "", "write everything measured to this file as JSON")
	flag.Parse()
	return o
}

func run(ctx context.Context) (err error) {
	o := parseFlags()
	if os.Geteuid() != 0 && o.images == "" {
		return errors.New("needs root to build the images: run \"mkimage bench\" as root, then give --images")
	}
	if o.passes < 1 || o.points < 2 {
		return errors.New("want at least 1 pass and 2 points")
	}
	dir, err := os.MkdirTemp(o.parent, "holdfast-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, testimage.Clean(dir)) }()
	b, err := newBench(ctx, dir, o)
	if err != nil {
		return err
	}
	if err := b.measureAll(ctx, o); err != nil {
		return err
	}
	b.res.LoadEnd, b.res.Seconds = loadAverage(), time.Since(b.res.Date).Seconds()
	if o.out != "" {
		if err := b.res.writeJSON(o.out); err != nil {
			return err
		}
	}
	return b.res.writeMarkdown(os.Stdout)
}

// newBench builds what is measured and what measures.
func newBench(ctx context.Context, dir string, o options) (*bench, error) {
	b := &bench{dir: dir, res: &results{Date: time.Now(), LoadStart: loadAverage(), Host: describeHost(ctx), Cold: os.Geteuid() == 0}}
	tools, err := b.pickTools(ctx, o)
	if err != nil {
		return nil, err
	}
	b.tools = tools
	images := o.images
	if images == "" {
		images = dir
	}
	progress("building images")
	pair, err := testimage.MakeBench(ctx, images, int64(o.size))
	if err != nil {
		return nil, err
	}
	return b, b.takeImages(ctx, pair)
}

// pickTools returns the programs asked for; when none are, all that are there.
func (b *bench) pickTools(ctx context.Context, o options) ([]tool, error) {
	var picked []tool
	wanted := strings.FieldsFunc(o.tools, func(r rune) bool { return r == ',' })
	all := len(wanted) == 0
	for _, t := range allTools(b.dir) {
		asked := slices.Contains(wanted, t.name)
		if !all && !asked {
			continue
		}
		wanted = slices.DeleteFunc(wanted, func(s string) bool { return s == t.name })
		if t.name == "holdfast" {
			if err := buildHoldfast(ctx, t.program, o.holdfast); err != nil {
				return nil, err
			}
		}
		version, err := t.ask(ctx)
		if err != nil && asked {
			return nil, err
		}
		if err != nil {
			progress("leaving out %s: %v", t.name, err)
			continue
		}
		b.res.Tools = append(b.res.Tools, toolVersion{t.name, version})
		picked = append(picked, t)
	}
	if len(wanted) > 0 {
		return nil, fmt.Errorf("no such program: %s", strings.Join(wanted, ", "))
	}
	return picked, nil
}

// progress tells the user what goes on, apart from the results on stdout.
func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%s  %s\n", time.Now().Format("15:04:05"), fmt.Sprintf(format, args...))
}
