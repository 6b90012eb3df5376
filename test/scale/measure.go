//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
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
	var group *memoryGroup
	if o.memory > 0 {
		var err error
		if group, err = newMemoryGroup(int64(o.memory)); err != nil {
			fmt.Printf("memory is not limited: %v\n", err)
		} else {
			fmt.Printf("all in %d MiB of memory, page cache and mapped files included\n", o.memory>>20)
		}
		defer group.close()
	}
	env := []string{"HOLDFAST_PASSWORD=" + password, "HOLDFAST_REPO=" + o.measure}
	run := func(args ...string) (command.Result, error) {
		return command.Command{Args: group.command(append([]string{program, "--no-progress"}, args...)), Env: env}.Run(ctx)
	}
	// One real point; its backup is also the first use after the repository was made.
	image := filepath.Join(work, "real.raw")
	if err := os.WriteFile(image, []byte("the first byte of a real disk"), 0o600); err != nil {
		return err
	}
	fmt.Println("| step | s | CPU s | peak memory, MiB: own | with mapped files |\n|---|---|---|---|---|")
	step := func(name string, args ...string) error {
		if group != nil { // what is in the page cache belongs to the group that brought it in
			if err := dropCaches(); err != nil {
				return err
			}
		}
		own := make(chan int64, 1)
		ended := make(chan struct{})
		go func() { own <- peakOwn(ended) }()
		r, err := run(args...)
		close(ended)
		anon := <-own
		if err != nil {
			return err
		}
		fmt.Printf("| %s | %.2f | %.2f | %d | %d |\n", name, r.Wall.Seconds(), r.CPU.Seconds(), anon>>20, r.MaxRSS>>20)
		return nil
	}
	for _, s := range [][]string{
		{"backup of another VM", "backup", image, "--vm", "real"},
		{"open, one point shown", "show", "real/latest"},
		{"list all points", "points", "--json"},
		{"forget, dry run, by six rules", "forget", "--json", "--dry-run", "--keep-last", "3", "--keep-hourly", "24", "--keep-daily", "7", "--keep-weekly", "5", "--keep-monthly", "12", "--keep-yearly", "5"},
		{"gc, dry run: marks everything", "gc", "--dry-run"},
		{"stats, what each point uses alone", "stats", "--json"},
	} {
		if err := step(s[0], s[1:]...); err != nil {
			return err
		}
	}
	if os.Geteuid() == 0 {
		if err := firstByte(ctx, group.command([]string{program}), env, work); err != nil {
			return err
		}
	}
	return nil
}

// peakOwn looks at the memory of the only child of this process until it has ended
// and gives the most of it that no file backs, bytes. The tables of the index are mapped files, which
// the kernel takes back when it needs the room.
func peakOwn(ended <-chan struct{}) (most int64) {
	for {
		select {
		case <-ended:
			return most
		case <-time.After(20 * time.Millisecond):
		}
		children, err := filepath.Glob("/proc/self/task/*/children")
		if err != nil {
			continue
		}
		for _, file := range children {
			text, _ := os.ReadFile(file)
			for _, pid := range strings.Fields(string(text)) {
				most = max(most, statusKiB(pid, "RssAnon")<<10)
			}
		}
	}
}

// dropCaches empties the page cache, as root: proc_sys_vm(5).
func dropCaches() error {
	syscall.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}

// statusKiB reads a field of proc_pid_status(5).
func statusKiB(pid, field string) int64 {
	text, _ := os.ReadFile("/proc/" + pid + "/status")
	_, rest, _ := strings.Cut(string(text), field+":")
	line, _, _ := strings.Cut(rest, "kB")
	n, _ := strconv.ParseInt(strings.TrimSpace(line), 10, 64)
	return n
}

// firstByte mounts and reads the beginning of the real disk.
func firstByte(ctx context.Context, program, env []string, work string) error {
	dir := filepath.Join(work, "mnt")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	began := time.Now()
	p, err := command.Command{Args: append(slices.Clone(program), "--no-progress", "mount", dir), Env: env}.Start(ctx)
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
	fmt.Printf("| mount, first byte | %.2f | | | |\n", time.Since(began).Seconds())
	return nil
}
