//go:build linux

// Command mkimage builds the disk images of the benchmark and of the
// demonstration.
//
//	mkimage bench --dir DIR [--size 4G]     DIR/v1.img and DIR/v2.img
//	mkimage demo --out FILE [--size 2G]     a partitioned disk with Debian
//	mkimage change --image FILE [--generation N]
//	                                        change a bench image in place
//
// It needs root for loop mounts.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/holdfast-backup/holdfast/test/testimage"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "mkimage: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("want one of: bench, demo, change")
	}
	flags := flag.NewFlagSet(args[0], flag.ExitOnError)
	switch args[0] {
	case "bench":
		return runBench(ctx, flags, args[1:])
	case "demo":
		return runDemo(ctx, flags, args[1:])
	case "change":
		return runChange(ctx, flags, args[1:])
	}
	return fmt.Errorf("unknown kind of image %q: want bench, demo or change", args[0])
}

func runBench(ctx context.Context, flags *flag.FlagSet, args []string) error {
	size := testimage.SizeFlag(testimage.FullSize)
	flags.Var(&size, "size", "size of each image")
	dir := flags.String("dir", ".", "folder for v1.img and v2.img")
	if err := flags.Parse(args); err != nil {
		return err
	}
	b, err := testimage.MakeBench(ctx, *dir, int64(size))
	if err != nil {
		return err
	}
	for _, img := range []string{b.V1, b.V2} {
		n, err := testimage.Allocated(img)
		if err != nil {
			return err
		}
		fmt.Printf("%s: %d MiB allocated\n", img, n>>20)
	}
	fmt.Printf("%d of %d 4 KiB blocks differ (%.2f %%)\n", b.Changed, b.Size/4096, float64(b.Changed)*409600/float64(b.Size))
	return nil
}

func runDemo(ctx context.Context, flags *flag.FlagSet, args []string) error {
	size := testimage.SizeFlag(2 << 30)
	flags.Var(&size, "size", "size of the disk")
	out := flags.String("out", "demo.raw", "file to write")
	cache := flags.String("cache", testimage.DefaultCache(), "folder that keeps the Debian tree")
	if err := flags.Parse(args); err != nil {
		return err
	}
	_, err := testimage.MakeDemo(ctx, *out, *cache, int64(size))
	return err
}

func runChange(ctx context.Context, flags *flag.FlagSet, args []string) error {
	image := flags.String("image", "", "bench image to change in place")
	generation := flags.Int("generation", 1, "which change; do them in order")
	if err := flags.Parse(args); err != nil {
		return err
	}
	return testimage.Increment(ctx, *image, *generation)
}
