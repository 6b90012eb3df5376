//go:build linux

// Package command runs other programs for tests and benchmarks: every one in a
// process group of its own, stopped when its context ends, and measured.
//
//	res, err := command.Command{Args: []string{"restic", "backup", path}, Env: env}.Run(ctx)
//	fmt.Println(res.Wall, res.CPU, res.MaxRSS)
//
// An error carries the end of what the program wrote to stderr, or else to stdout.
package command

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// patience is how long a program may take to stop when asked to.
const patience = 20 * time.Second

// Command is a program to run.
type Command struct {
	Args []string  // the program and its arguments
	Dir  string    // working directory; empty for that of the caller
	Env  []string  // added to the caller's
	In   io.Reader // nil for none
}

// Result is what a finished program did.
type Result struct {
	Out    []byte        // stdout
	Wall   time.Duration // from start to end
	CPU    time.Duration // user and system, its own waited-for children included
	MaxRSS int64         // bytes, of the largest process; never below that of the caller (it starts as a copy)
}

// Run runs a program that needs no measuring and returns its stdout.
func Run(ctx context.Context, args ...string) ([]byte, error) {
	res, err := Command{Args: args}.Run(ctx)
	return res.Out, err
}

// Run runs the program to its end. When ctx ends first, the program's whole
// process group is asked to stop, later killed, and the error is that of ctx.
func (c Command) Run(ctx context.Context) (Result, error) {
	if err := ctx.Err(); err != nil {
		return Result{}, err
	}
	var out, errs bytes.Buffer
	cmd := c.build(ctx, &errs)
	cmd.Stdout = &out
	start := time.Now()
	err := cmd.Run()
	res := Result{Out: out.Bytes(), Wall: time.Since(start)}
	if ps := cmd.ProcessState; ps != nil {
		res.CPU = ps.UserTime() + ps.SystemTime()
		if ru, ok := ps.SysUsage().(*syscall.Rusage); ok {
			res.MaxRSS = ru.Maxrss * 1024 // ru_maxrss is in KiB: getrusage(2)
		}
	}
	if ctx.Err() != nil {
		return res, ctx.Err()
	}
	words := errs.Bytes()
	if len(words) == 0 {
		words = res.Out // some programs complain there
	}
	return res, c.explain(err, words)
}

func (c Command) build(ctx context.Context, stderr io.Writer) *exec.Cmd {
	cmd := exec.CommandContext(ctx, c.Args[0], c.Args[1:]...)
	cmd.Dir, cmd.Stdin, cmd.Stderr = c.Dir, c.In, stderr
	cmd.Env = append(os.Environ(), c.Env...)
	// A Ctrl-C at the terminal reaches us alone; we stop the others in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = patience
	return cmd
}

// explain adds the command and its last words to err.
func (c Command) explain(err error, words []byte) error {
	if err == nil {
		return nil
	}
	const most = 2000 // bytes
	if len(words) > most {
		words = append([]byte("…"), words[len(words)-most:]...)
	}
	return fmt.Errorf("%s: %w: %s", strings.Join(c.Args, " "), err, bytes.TrimSpace(words))
}

// Process is a program that runs until it is stopped, such as a mount.
type Process struct {
	PID  int
	cmd  *exec.Cmd
	errs *bytes.Buffer
	done chan struct{} // closed when it has ended
	err  error         // of its end; read after done
	c    Command
}

// Start starts the program. The caller must call Stop.
func (c Command) Start(ctx context.Context) (*Process, error) {
	p := &Process{errs: new(bytes.Buffer), done: make(chan struct{}), c: c}
	p.cmd = c.build(context.WithoutCancel(ctx), p.errs)
	if err := p.cmd.Start(); err != nil {
		return nil, c.explain(err, nil)
	}
	p.PID = p.cmd.Process.Pid
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// Ended reports, with its error, whether the program has ended by itself.
func (p *Process) Ended() (bool, error) {
	select {
	case <-p.done:
		return true, p.c.explain(p.err, p.errs.Bytes())
	default:
		return false, nil
	}
}

// Wait waits for the program's end, at most for d. It reports whether it ended.
func (p *Process) Wait(d time.Duration) bool {
	select {
	case <-p.done:
		return true
	case <-time.After(d):
		return false
	}
}

// Stop asks the program to stop and kills it when it does not. It may be called
// twice, and after the program's end.
func (p *Process) Stop() {
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGKILL} {
		if ended, _ := p.Ended(); ended {
			return
		}
		_ = syscall.Kill(-p.PID, sig)
		if p.Wait(patience / 4) {
			return
		}
	}
}
