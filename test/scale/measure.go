//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/holdfast-backup/holdfast/test/command"
)

// measure runs commands on a repository and prints what each took.
func measure(ctx context.Context, o options) error {
	work := filepath.Dir(o.measure)
	program := o.holdfast
	if program == "" {
		program = filepath.Join(work, "holdfast")
		if _, err := command.Run(ctx, "go", "build", "-trimpath", "-o", program, "./cmd/holdfast"); err != nil {
			return err
		}
	}
	env := []string{"HOLDFAST_PASSWORD=" + password, "HOLDFAST_REPO=" + o.measure}
	run := func(args ...string) (command.Result, error) {
		return command.Command{Args: append([]string{program, "--no-progress"}, args...), Env: env}.Run(ctx)
	}
	// One real point; its backup is also the first use after the repository was made.
	image := filepath.Join(work, "real.raw")
	if err := os.WriteFile(image, []byte("the first byte of a real disk"), 0o600); err != nil {
		return err
	}
	fmt.Println("| step | s | CPU s | peak memory, MiB |\n|---|---|---|---|")
	step := func(name string, args ...string) error {
		r, err := run(args...)
		if err != nil {
			return err
		}
		fmt.Printf("| %s | %.2f | %.2f | %d |\n", name, r.Wall.Seconds(), r.CPU.Seconds(), r.MaxRSS>>20)
		return nil
	}
	for _, s := range [][]string{
		{"backup of another VM", "backup", image, "--vm", "real"},
		{"open, one point shown", "show", "real/latest"},
		{"list all points", "points", "--json"},
		{"forget, dry run, by six rules", "forget", "--json", "--dry-run", "--keep-last", "3", "--keep-hourly", "24", "--keep-daily", "7", "--keep-weekly", "5", "--keep-monthly", "12", "--keep-yearly", "5"},
		{"gc, dry run: marks everything", "gc", "--dry-run"},
	} {
		if err := step(s[0], s[1:]...); err != nil {
			return err
		}
	}
	if os.Geteuid() == 0 {
		if err := firstByte(ctx, program, env, work); err != nil {
			return err
		}
	}
	return nil
}

// firstByte mounts and reads the beginning of the real disk.
func firstByte(ctx context.Context, program string, env []string, work string) error {
	dir := filepath.Join(work, "mnt")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	began := time.Now()
	p, err := command.Command{Args: []string{program, "--no-progress", "mount", dir}, Env: env}.Start(ctx)
	if err != nil {
		return err
	}
	defer p.Stop()
	buf := make([]byte, 4096)
	for {
		f, err := os.Open(filepath.Join(dir, "real", "latest", "disk0.raw"))
		if err == nil {
			n, err := f.Read(buf)
			f.Close()
			if n == 0 {
				return fmt.Errorf("first byte: %w", errors.Join(err, io.ErrUnexpectedEOF))
			}
			break
		}
		if time.Since(began) > time.Minute {
			return err
		}
		time.Sleep(time.Millisecond)
	}
	fmt.Printf("| mount, first byte | %.2f | | |\n", time.Since(began).Seconds())
	return nil
}
