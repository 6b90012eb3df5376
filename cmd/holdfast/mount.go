package main

import (
	"context"
	"errors"
	"os"
	"runtime/debug"
	"syscall"

	"github.com/holdfast-backup/holdfast/fs/fuse"
	"github.com/holdfast-backup/holdfast/store"
)

func runMount(ctx context.Context, c *call) error {
	dir, cleared, err := fuse.Prepare(c.args[0])
	if err != nil {
		return err
	}
	if cleared {
		c.progress.note("cleared what a killed mount had left at %s", dir)
	}
	if !inBackground() && c.Bool("background") {
		return c.mountInBackground(ctx, dir)
	}
	say := reporter()
	err = c.mount(ctx, dir, func() { say("", nil) })
	say("", err)
	return err
}

// mount mounts and waits for the end: umount, SIGINT or SIGTERM.
func (c *call) mount(ctx context.Context, dir string, ready func()) error {
	return c.withRepo(ctx, func(r *store.Repo) error {
		tree, err := c.tree(r)
		if err != nil {
			return err
		}
		defer tree.Close()
		// It runs for days, beside what else the machine does: memory is worth more here than the CPU for collecting it.
		if os.Getenv("GOGC") == "" {
			debug.SetGCPercent(40)
		}
		s, err := fuse.Mount(dir, tree, fuse.Options{
			AllowOther: c.Bool("allow-other"),
			Log:        func(text string) { c.progress.warn("%s", text) },
		})
		if err != nil {
			return err
		}
		c.progress.note("mounted at %s; end it with 'holdfast umount %s'", dir, dir)
		ready()
		ended := make(chan struct{})
		go func() {
			select {
			case <-ended:
			case <-ctx.Done():
				if err := s.Unmount(true); err != nil {
					c.progress.warn("unmount %s: %v", dir, err)
				}
			}
		}()
		s.Wait()
		close(ended)
		return nil
	})
}

// mountInBackground starts this program again, waits until its mount works, and
// leaves it running.
func (c *call) mountInBackground(ctx context.Context, dir string) error {
	args := []string{"mount"}
	if c.Bool("allow-other") {
		args = append(args, "--allow-other")
	}
	for _, file := range c.StringSlice("guest-key-file") {
		args = append(args, "--guest-key-file", file)
	}
	_, pid, err := c.goBackground(ctx, append(args, "--", dir))
	if err != nil {
		return err
	}
	if _, err := os.Stat(dir); err != nil || !fuse.Mounted(dir) {
		return errors.New("the process in the background ended before the mount worked")
	}
	c.out.line("mounted at %s; end it with 'holdfast umount %s'", dir, dir)
	return c.out.object(struct {
		Type string `json:"type"`
		Path string `json:"path"`
		PID  int    `json:"pid"`
	}{"mount", dir, pid})
}

func runUmount(_ context.Context, c *call) error {
	dir := c.args[0]
	if err := fuse.Unmount(dir); err != nil {
		if errors.Is(err, syscall.EBUSY) {
			return withHint(err, "a program still uses a file or folder there; 'fuser -vm %s' names it", dir)
		}
		return err
	}
	return c.out.object(struct {
		Type string `json:"type"`
		Path string `json:"path"`
	}{"umount", dir})
}
