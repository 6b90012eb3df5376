//go:build linux

package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/store/extent"
	"github.com/holdfast-backup/holdfast/test/command"
	"github.com/holdfast-backup/holdfast/test/testimage"
)

// password of all repositories of this run.
var password = rand.Text()

// The steps of a pass.
const (
	stepFirst     = "first"
	stepNext      = "next"
	stepUnchanged = "unchanged"
	stepRestore   = "restore"
)

// bench is one run.
type bench struct {
	dir     string // of this run; everything is below
	tools   []tool
	v1, v2  string
	extents []extent.Extent // allocated in v2
	res     *results
}

// takeImages copies the pair, so that it can be moved about, and notes how
// they are made.
func (b *bench) takeImages(ctx context.Context, pair testimage.Bench) error {
	b.v1, b.v2 = filepath.Join(b.dir, "image-v1"), filepath.Join(b.dir, "image-v2")
	for _, c := range [][2]string{{pair.V1, b.v1}, {pair.V2, b.v2}} {
		// Holes stay as they are: in v1 some zeros are allocated.
		if _, err := command.Run(ctx, "cp", "--sparse=auto", "--preserve=timestamps", c[0], c[1]); err != nil {
			return err
		}
	}
	n1, err1 := testimage.Allocated(b.v1)
	n2, err2 := testimage.Allocated(b.v2)
	es, err3 := testimage.Extents(b.v2)
	b.extents = es
	b.res.Image = image{Size: pair.Size, V1: n1, V2: n2, Changed: pair.Changed * 4096}
	return errors.Join(err1, err2, err3)
}

// measureAll runs the passes, each with the programs in another order.
func (b *bench) measureAll(ctx context.Context, o options) error {
	for pass := range o.passes {
		last := pass == o.passes-1
		var kept []*repository
		for i := range b.tools {
			t := b.tools[(i+pass)%len(b.tools)]
			r, err := b.measure(ctx, t, pass, last, o.mounts)
			if err != nil {
				return fmt.Errorf("%s: %w", t.name, err)
			}
			if last && o.points > 2 && t.backup != nil {
				kept = append(kept, r)
				continue
			}
			if err := os.RemoveAll(r.dir); err != nil {
				return err
			}
		}
		if len(kept) > 0 {
			if err := b.grow(ctx, kept, o.points); err != nil {
				return err
			}
		}
	}
	return nil
}

// repository is one program's, with its place for caches.
type repository struct {
	tool  tool
	dir   string
	image string // path the image is backed up from
	count int    // of backups made
}

func (r *repository) repo() string    { return filepath.Join(r.dir, "repo") }
func (r *repository) archive() string { return fmt.Sprintf("point-%d", r.count) }

func (r *repository) command(dir string, args []string) command.Command {
	return command.Command{
		Args: append([]string{r.tool.program}, args...),
		Dir:  dir,
		Env:  r.tool.env(filepath.Join(r.dir, "home")),
	}
}

// measure takes one program through one pass.
func (b *bench) measure(ctx context.Context, t tool, pass int, compare, mounts bool) (*repository, error) {
	r := &repository{tool: t, dir: filepath.Join(b.dir, "with-"+t.name)}
	r.image = filepath.Join(r.dir, "image", imageName)
	for _, sub := range []string{"image", "home", "out", "mnt"} {
		if err := os.MkdirAll(filepath.Join(r.dir, sub), 0o700); err != nil {
			return nil, err
		}
	}
	if t.backup != nil {
		if err := b.backups(ctx, r, pass); err != nil {
			return nil, err
		}
	}
	// v2 lies at the image's path now, or is put there for the baseline.
	return r, b.withImage(b.v2, r.image, func() error {
		if err := b.restore(ctx, r, pass, compare); err != nil {
			return err
		}
		if !mounts || t.mount == nil {
			return nil
		}
		return b.readMount(ctx, r, pass)
	})
}

// backups makes the repository and three points.
func (b *bench) backups(ctx context.Context, r *repository, pass int) error {
	for _, args := range r.tool.init(r.repo()) {
		if _, err := r.command(r.dir, args).Run(ctx); err != nil {
			return err
		}
	}
	err := b.withImage(b.v1, r.image, func() error { return b.backup(ctx, r, pass, stepFirst) })
	if err != nil {
		return err
	}
	return b.withImage(b.v2, r.image, func() error {
		if err := b.backup(ctx, r, pass, stepNext); err != nil {
			return err
		}
		return b.backup(ctx, r, pass, stepUnchanged)
	})
}

// withImage runs fn with an image moved to path.
func (b *bench) withImage(image, path string, fn func() error) error {
	if err := os.Rename(image, path); err != nil {
		return err
	}
	err := fn()
	return errors.Join(err, os.Rename(path, image))
}

// backup measures one backup and notes how large the repository is then.
func (b *bench) backup(ctx context.Context, r *repository, pass int, step string) error {
	r.count++
	args := r.tool.backup(r.repo(), r.image, r.archive())
	if _, err := b.timed(ctx, r.command(filepath.Dir(r.image), args), sample{Pass: pass, Tool: r.tool.name, Step: step}); err != nil {
		return err
	}
	return b.noteSize(r, pass)
}

func (b *bench) noteSize(r *repository, pass int) error {
	n, err := allocatedBelow(r.repo())
	b.res.Sizes = append(b.res.Sizes, repoSize{Pass: pass, Tool: r.tool.name, Points: r.count, Bytes: n})
	return err
}

// restore measures a restore of the last backup into an empty folder.
func (b *bench) restore(ctx context.Context, r *repository, pass int, compare bool) error {
	out := filepath.Join(r.dir, "out")
	args := r.tool.restore(r.repo(), out, r.image, r.archive())
	s, err := b.timed(ctx, r.command(out, args), sample{Pass: pass, Tool: r.tool.name, Step: stepRestore})
	if err != nil {
		return err
	}
	start := time.Now()
	if err := syncAll(b.dir); err != nil {
		return err
	}
	s.Sync = time.Since(start).Seconds()
	restored := r.tool.restored(out, r.image)
	if compare {
		if _, err := command.Run(ctx, "cmp", restored, r.image); err != nil {
			return fmt.Errorf("restored wrongly: %w", err)
		}
	} else if _, err := os.Stat(restored); err != nil {
		return err
	}
	return os.RemoveAll(out)
}

// timed runs a step from cold and adds it to the results.
func (b *bench) timed(ctx context.Context, c command.Command, s sample) (*sample, error) {
	if err := b.cool(); err != nil {
		return nil, err
	}
	res, err := c.Run(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.Step, err)
	}
	s.Wall, s.CPU, s.RSS = res.Wall.Seconds(), res.CPU.Seconds(), res.MaxRSS
	progress("pass %d: %s: %s: %.2f s", s.Pass+1, s.Tool, s.Step, s.Wall)
	b.res.Samples = append(b.res.Samples, s)
	return &b.res.Samples[len(b.res.Samples)-1], nil
}

// grow makes further points of an image that changes, up to so many in all.
func (b *bench) grow(ctx context.Context, rs []*repository, points int) error {
	img := filepath.Join(b.dir, "image-grown")
	if err := testimage.CopySparse(ctx, b.v2, img); err != nil {
		return err
	}
	for generation := 1; generation <= points-2; generation++ {
		if err := testimage.Increment(ctx, img, generation); err != nil {
			return err
		}
		progress("point %d of %d", generation+2, points)
		for _, r := range rs {
			err := b.withImage(img, r.image, func() error { return b.addPoint(ctx, r) })
			if err != nil {
				return fmt.Errorf("%s: %w", r.tool.name, err)
			}
		}
	}
	for _, r := range rs {
		// One more than are counted: the unchanged third backup added nothing.
		r.count = points
		if err := b.noteSize(r, 0); err != nil {
			return err
		}
		if err := os.RemoveAll(r.dir); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) addPoint(ctx context.Context, r *repository) error {
	r.count++
	args := r.tool.backup(r.repo(), r.image, r.archive())
	_, err := r.command(filepath.Dir(r.image), args).Run(ctx)
	return err
}

// cool makes what was written durable and, as root, forgets what was read.
func (b *bench) cool() error {
	if err := syncAll(b.dir); err != nil {
		return err
	}
	if !b.res.Cold {
		return nil
	}
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}

// syncAll syncs the file system that dir is on.
func syncAll(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return unix.Syncfs(int(d.Fd()))
}

// allocatedBelow is what the files below dir take of the medium, in bytes.
func allocatedBelow(dir string) (int64, error) {
	var total int64
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		n, err := testimage.Allocated(path)
		total += n
		return err
	})
	return total, err
}
