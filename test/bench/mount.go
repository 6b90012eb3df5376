//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/test/command"
)

// row is one way of reading through a mount.
type row struct {
	name  string
	block int64 // bytes per read
	jobs  int   // readers at once, with a file of their own each
	reads int   // of all jobs
}

// rows are what is measured, in this order.
var rows = []row{
	{"4K", 4 << 10, 1, 600},
	{"128K", 128 << 10, 1, 400},
	{"128K×4", 128 << 10, 4, 800},
}

// sequentialBytes is how much is read from the start, holes included.
const sequentialBytes = 1 << 30

// readMount mounts the last backup and measures reads.
func (b *bench) readMount(ctx context.Context, r *repository, pass int) (err error) {
	mnt := filepath.Join(r.dir, "mnt")
	if err := b.cool(); err != nil {
		return err
	}
	start := time.Now()
	p, err := r.command(r.dir, r.tool.mount(r.repo(), mnt, r.image, r.archive())).Start(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unmount(ctx, p, mnt)) }()
	file, err := firstByte(ctx, p, r.tool.mounted(mnt, r.image))
	if err != nil {
		return err
	}
	m := mountSample{Pass: pass, Tool: r.tool.name, FirstByte: time.Since(start).Seconds()}
	for _, row := range rows {
		if err := b.cool(); err != nil {
			return err
		}
		rs, err := b.readRandomly(ctx, file, row)
		if err != nil {
			return fmt.Errorf("mount: %s: %w", row.name, err)
		}
		progress("pass %d: %s: mount: %s: p50 %.2f ms, %.0f MB/s", pass+1, r.tool.name, row.name, rs.P50, rs.Rate)
		m.Rows = append(m.Rows, rs)
	}
	if err := b.cool(); err != nil {
		return err
	}
	if m.Sequential, err = readSequentially(ctx, file); err != nil {
		return fmt.Errorf("mount: sequential: %w", err)
	}
	progress("pass %d: %s: mount: first byte %.2f s, sequential %.0f MB/s", pass+1, r.tool.name, m.FirstByte, m.Sequential)
	m.RSS = peakMemory(p.PID)
	b.res.Mounts = append(b.res.Mounts, m)
	return nil
}

// firstByte waits until the first 4 KiB of the image can be read, and returns
// its path.
func firstByte(ctx context.Context, p *command.Process, pattern string) (string, error) {
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		if files, _ := filepath.Glob(pattern); len(files) > 0 {
			file := files[len(files)-1]
			if err := readStart(file); err == nil {
				return file, nil
			} else if !errors.Is(err, os.ErrNotExist) {
				return "", err
			}
		}
		if ended, err := p.Ended(); ended {
			return "", errors.Join(errors.New("the mount has ended by itself"), err)
		}
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
		if time.Now().After(deadline) {
			return "", fmt.Errorf("the mount shows no %s", pattern)
		}
	}
}

func readStart(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.ReadAt(make([]byte, 4096), 0)
	return err
}

// unmount ends the mount and the process that serves it.
func unmount(ctx context.Context, p *command.Process, mnt string) error {
	var err error
	for range 30 {
		if _, err = command.Run(context.WithoutCancel(ctx), "fusermount3", "-u", mnt); err == nil {
			break
		}
		if ended, _ := p.Ended(); ended {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if !p.Wait(10 * time.Second) {
		p.Stop()
	}
	return err
}

// readRandomly reads blocks at random, aligned places inside what is allocated;
// always the same ones.
func (b *bench) readRandomly(ctx context.Context, file string, r row) (readSample, error) {
	offsets := b.places(r)
	if len(offsets) == 0 {
		return readSample{}, fmt.Errorf("no block of %d bytes is wholly allocated", r.block)
	}
	took := make([]time.Duration, len(offsets))
	g, ctx := errgroup.WithContext(ctx)
	start := time.Now()
	for job := range r.jobs {
		g.Go(func() error {
			f, err := os.Open(file)
			if err != nil {
				return err
			}
			defer f.Close()
			// As fio does for random reads; without it the kernel reads ahead.
			if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
				return err
			}
			p := make([]byte, r.block)
			for i := job; i < len(offsets); i += r.jobs {
				begin := time.Now()
				if _, err := f.ReadAt(p, offsets[i]); err != nil {
					return err
				}
				took[i] = time.Since(begin)
				if ctx.Err() != nil {
					return ctx.Err()
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return readSample{}, err
	}
	return summarise(r, took, time.Since(start)), nil
}

// places picks where to read; nothing when no block is wholly allocated.
func (b *bench) places(r row) []int64 {
	var blocks []int64 // number of each block that is wholly allocated
	for _, e := range b.extents {
		for n := (e.Off + r.block - 1) / r.block; (n+1)*r.block <= e.End(); n++ {
			blocks = append(blocks, n)
		}
	}
	if len(blocks) == 0 {
		return nil
	}
	rng := rand.New(rand.NewPCG(uint64(r.block), uint64(r.jobs)))
	offsets := make([]int64, r.reads)
	for i := range offsets {
		offsets[i] = blocks[rng.IntN(len(blocks))] * r.block
	}
	return offsets
}

func summarise(r row, took []time.Duration, wall time.Duration) readSample {
	slices.Sort(took)
	var sum time.Duration
	for _, d := range took {
		sum += d
	}
	ms := func(d time.Duration) float64 { return d.Seconds() * 1000 }
	return readSample{
		Row:  r.name,
		P50:  ms(took[len(took)/2]),
		Mean: ms(sum) / float64(len(took)),
		P99:  ms(took[len(took)*99/100]),
		Rate: float64(int64(len(took))*r.block) / 1e6 / wall.Seconds(),
	}
}

// readSequentially returns MB/s.
func readSequentially(ctx context.Context, file string) (float64, error) {
	f, err := os.Open(file)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	p := make([]byte, 1<<20)
	start := time.Now()
	var total int64
	for total < sequentialBytes {
		n, err := f.ReadAt(p, total)
		total += int64(n)
		if err == io.EOF {
			break
		}
		if err := errors.Join(err, ctx.Err()); err != nil {
			return 0, err
		}
	}
	return float64(total) / 1e6 / time.Since(start).Seconds(), nil
}

// peakMemory is VmHWM of the process (proc(5)), in bytes; 0 when not known.
func peakMemory(pid int) int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if kib, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			n, _ := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(kib), "kB")), 10, 64)
			return n << 10
		}
	}
	return 0
}
