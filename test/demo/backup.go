//go:build linux

package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/holdfast-backup/holdfast/test/command"
	"github.com/holdfast-backup/holdfast/test/testimage"
)

// vm is the name the disk is backed up under.
const vm = "demo"

func (d *demo) makeDisk(ctx context.Context) (string, error) {
	disk, err := testimage.MakeDemo(ctx, d.path("disk.raw"), d.cache, d.size)
	if err != nil {
		return "", err
	}
	d.disk = disk
	n, err := testimage.Allocated(disk.Path)
	return fmt.Sprintf("GPT, VFAT, ext4, swap; %s, %s of it allocated", size(d.size), size(n)), err
}

func (d *demo) change(ctx context.Context) (string, error) {
	if err := testimage.ChangeDemo(ctx, d.disk); err != nil {
		return "", err
	}
	n, err := testimage.ChangedBlocks(ctx, d.disk.Path, d.kept[0])
	return size(n*4096) + " in blocks of 4 KiB", err
}

func (d *demo) build(ctx context.Context) (string, error) {
	if d.bin != "" {
		return d.bin, nil
	}
	d.bin = d.path("holdfast")
	_, err := command.Run(ctx, "go", "build", "-o", d.bin, "github.com/holdfast-backup/holdfast/cmd/holdfast")
	return "", err
}

// holdfast runs the program with this demo's repository and a password that
// nobody else knows.
func (d *demo) holdfast(args ...string) command.Command {
	return command.Command{
		Args: append([]string{d.bin}, args...),
		Env: []string{
			"HOLDFAST_REPO=" + d.path("repo"),
			"HOLDFAST_PASSWORD_FILE=" + d.path("password"),
			"XDG_CONFIG_HOME=" + d.path("config"),
		},
	}
}

func (d *demo) initRepo(ctx context.Context) (string, error) {
	if err := os.WriteFile(d.path("password"), []byte(rand.Text()+"\n"), 0o600); err != nil {
		return "", err
	}
	_, err := d.holdfast("init", d.path("repo")).Run(ctx)
	return "encrypted", err
}

// backup keeps a copy of the disk and backs it up.
func (d *demo) backup(ctx context.Context) (string, error) {
	kept := d.path(fmt.Sprintf("kept-%d.raw", len(d.kept)+1))
	if err := testimage.CopySparse(ctx, d.disk.Path, kept); err != nil {
		return "", err
	}
	d.kept = append(d.kept, kept)
	res, err := d.holdfast("backup", d.disk.Path, "--vm", vm, "--json", "--no-progress").Run(ctx)
	if err != nil {
		return "", err
	}
	p, err := summary(res.Out)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s logical, %s read, %s new, %s stored; program alone %.1f s",
		size(p.Total), size(p.Read), size(p.New), size(p.Stored), res.Wall.Seconds()), nil
}

// saved is what backup --json says of a point.
type saved struct {
	ID     string `json:"id"`
	Total  int64  `json:"bytes_total"`
	Read   int64  `json:"bytes_read"`
	New    int64  `json:"bytes_new"`
	Stored int64  `json:"bytes_stored"`
}

// summary finds the one point in the object that ends backup's output.
func summary(out []byte) (saved, error) {
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var v struct {
			Type   string  `json:"type"`
			Points []saved `json:"points"`
		}
		if err := dec.Decode(&v); err != nil {
			return saved{}, fmt.Errorf("no summary in the output of backup: %w: %.300s", err, out)
		}
		if v.Type != "summary" {
			continue
		}
		if len(v.Points) != 1 {
			return saved{}, fmt.Errorf("backup made %d points, not one", len(v.Points))
		}
		return v.Points[0], nil
	}
}

func (d *demo) verify(ctx context.Context) (string, error) {
	_, err := d.holdfast("verify", "--read-data").Run(ctx)
	return "", err
}

// mountedTree is a running "holdfast mount".
type mountedTree struct {
	process *command.Process
	dir     string
}

func (d *demo) mount(ctx context.Context) (string, error) {
	dir := d.path("mnt")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", err
	}
	start := time.Now()
	p, err := d.holdfast("mount", dir).Start(ctx)
	if err != nil {
		return "", err
	}
	d.mounted = &mountedTree{process: p, dir: dir}
	if err := waitFor(ctx, p, filepath.Join(dir, vm)); err != nil {
		return "", err
	}
	ready := time.Since(start)
	d.points, err = pointsIn(dir)
	if err != nil {
		return "", err
	}
	if len(d.points) != 2 {
		return "", fmt.Errorf("points in the mount: %v, want two", d.points)
	}
	return fmt.Sprintf("there after %.0f ms: %v", ready.Seconds()*1000, d.points), nil
}

// waitFor waits until path exists, p has ended, or half a minute is over.
func waitFor(ctx context.Context, p *command.Process, path string) error {
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		_, err := os.Stat(path)
		if err == nil {
			return nil
		}
		if ended, why := p.Ended(); ended {
			return errors.Join(errors.New("the mount has ended by itself"), why)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the mount does not come up: %w", err)
		}
	}
}

// pointsIn lists the points of the VM in a mounted tree, oldest first.
func pointsIn(dir string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(dir, vm))
	if err != nil {
		return nil, err
	}
	var points []string
	for _, e := range entries {
		if e.Name() != "latest" {
			points = append(points, vm+"/"+e.Name())
		}
	}
	slices.Sort(points)
	return points, nil
}

func (d *demo) umount(ctx context.Context) (string, error) {
	if _, err := d.holdfast("umount", d.mounted.dir).Run(ctx); err != nil {
		return "", err
	}
	if !d.mounted.process.Wait(10 * time.Second) {
		return "", errors.New("the mount's process goes on after umount")
	}
	_, err := d.mounted.process.Ended()
	return "", err
}

func (d *demo) restore(ctx context.Context) (string, error) {
	if _, err := d.holdfast("restore", d.points[0], "--to", d.path("restored"), "--no-progress").Run(ctx); err != nil {
		return "", err
	}
	n, err := testimage.Allocated(d.path("restored/disk0.raw"))
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("restore left no disk0.raw: %w", err)
	}
	return size(n) + " allocated", err
}

func (d *demo) compareRestored(ctx context.Context) (string, error) {
	_, err := command.Run(ctx, "cmp", d.path("restored/disk0.raw"), d.kept[0])
	return "", err
}

// size writes bytes for people.
func size(n int64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 10<<20:
		return fmt.Sprintf("%d MiB", n>>20)
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%d KiB", n>>10)
}
