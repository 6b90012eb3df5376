package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"github.com/holdfast-backup/holdfast/fs"
	"github.com/holdfast-backup/holdfast/fs/fuse"
	"github.com/holdfast-backup/holdfast/store"
)

// The environment of the process that `mount --background` leaves behind: it
// reads the password from descriptor 3 and reports on descriptor 4.
const (
	backgroundVar      = "HOLDFAST_BACKGROUND_MOUNT"
	backgroundPassword = 3
	backgroundReport   = 4
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
	ready := func(error) {}
	if inBackground() {
		report := os.NewFile(backgroundReport, "report")
		ready = func(err error) {
			if err != nil {
				code, message, hint := explain(err)
				fmt.Fprintf(report, "%d\n%s\n%s", code, message, hint)
			}
			report.Close() // the end of what was said; a second call finds it closed
		}
	}
	err = c.mount(ctx, dir, ready)
	ready(err)
	return err
}

// inBackground reports whether this is the process that stays behind.
func inBackground() bool { return os.Getenv(backgroundVar) != "" }

// mount mounts and waits for the end: umount, SIGINT or SIGTERM.
func (c *call) mount(ctx context.Context, dir string, ready func(error)) error {
	return c.withRepo(ctx, func(r *store.Repo) error {
		s, err := fuse.Mount(dir, fs.New(r), fuse.Options{
			AllowOther: c.Bool("allow-other"),
			Log:        func(text string) { c.progress.warn("%s", text) },
		})
		if err != nil {
			return err
		}
		c.progress.note("mounted at %s; end it with 'holdfast umount %s'", dir, dir)
		ready(nil)
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
	password := []byte(nil)
	if b, err := openBucket(c.repo); err != nil {
		return err
	} else if encrypted, err := store.NeedsPassphrase(ctx, b); err != nil {
		return fmt.Errorf("open %s: %w", c.repo, err)
	} else if encrypted {
		if password, err = c.password(ctx); err != nil {
			return err
		}
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	fromChild, report, err := os.Pipe()
	if err != nil {
		return err
	}
	defer fromChild.Close()
	secret, toChild, err := os.Pipe()
	if err != nil {
		return err
	}
	args := []string{"mount", "-r", c.repo, "--no-progress"}
	if c.Bool("allow-other") {
		args = append(args, "--allow-other")
	}
	cmd := exec.Command(self, append(args, "--password-file", fmt.Sprintf("/dev/fd/%d", backgroundPassword), "--", dir)...)
	cmd.Env = append(os.Environ(), backgroundVar+"=1")
	cmd.ExtraFiles = []*os.File{secret, report}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	secret.Close()
	report.Close()
	go func() {
		toChild.Write(password)
		toChild.Close()
	}()
	said, err := io.ReadAll(fromChild)
	if err != nil {
		return err
	}
	if len(said) > 0 {
		return reportedError(string(said))
	}
	if _, err := os.Stat(dir); err != nil || !fuse.Mounted(dir) {
		return errors.New("the process in the background ended before the mount worked")
	}
	c.out.line("mounted at %s; end it with 'holdfast umount %s'", dir, dir)
	return c.out.object(struct {
		Type string `json:"type"`
		Path string `json:"path"`
		PID  int    `json:"pid"`
	}{"mount", dir, cmd.Process.Pid})
}

// exitError is an error with the exit code that another process gave it.
type exitError struct {
	code    int
	message string
}

func (e *exitError) Error() string { return e.message }

// reportedError takes apart what the background process said.
func reportedError(said string) error {
	var code int
	rest := said
	if head, tail, ok := strings.Cut(said, "\n"); ok {
		if _, err := fmt.Sscan(head, &code); err == nil {
			rest = tail
		}
	}
	message, hint := rest, ""
	if i := strings.LastIndexByte(rest, '\n'); i >= 0 {
		message, hint = rest[:i], rest[i+1:]
	}
	err := error(&exitError{code, message})
	if hint != "" {
		err = withHint(err, "%s", hint)
	}
	return err
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
