package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"github.com/holdfast-backup/holdfast/store"
)

// The environment of the process that a command with --background leaves behind: it
// reads the password from descriptor 3 and reports on descriptor 4.
const (
	backgroundVar      = "HOLDFAST_BACKGROUND"
	backgroundPassword = 3
	backgroundReport   = 4
)

// inBackground reports whether this is the process that stays behind.
func inBackground() bool { return os.Getenv(backgroundVar) != "" }

// reporter gives what a process that may be in the background says, once: that it works, with a
// word for the process that waits, or why not.
func reporter() func(word string, err error) {
	if !inBackground() {
		return func(string, error) {}
	}
	// Programs that this one starts must not hold the other ends open.
	syscall.CloseOnExec(backgroundPassword)
	syscall.CloseOnExec(backgroundReport)
	report := os.NewFile(backgroundReport, "report")
	return func(word string, err error) {
		if err != nil {
			code, message, hint := explain(err)
			fmt.Fprintf(report, "%d\n%s\n%s", code, message, hint)
		} else if word != "" {
			fmt.Fprintf(report, "0\n%s\n", word)
		}
		report.Close() // the end of what was said; a second call finds it closed
	}
}

// goBackground starts this program again with args, waits until it says that it works, and
// leaves it running. word is what it said, empty when it ended without a word.
func (c *call) goBackground(ctx context.Context, args []string) (word string, pid int, err error) {
	password := []byte(nil)
	if b, err := openBucket(c.repo); err != nil {
		return "", 0, err
	} else if encrypted, err := store.NeedsPassphrase(ctx, b); err != nil {
		return "", 0, fmt.Errorf("open %s: %w", c.repo, err)
	} else if encrypted {
		if password, err = c.password(ctx); err != nil {
			return "", 0, err
		}
	}
	self, err := os.Executable()
	if err != nil {
		return "", 0, err
	}
	fromChild, report, err := os.Pipe()
	if err != nil {
		return "", 0, err
	}
	defer fromChild.Close()
	secret, toChild, err := os.Pipe()
	if err != nil {
		return "", 0, err
	}
	global := []string{"-r", c.repo, "--no-progress", "--password-file", fmt.Sprintf("/dev/fd/%d", backgroundPassword)}
	if c.configFile != "" {
		global = append(global, "--config", c.configFile)
	}
	cmd := exec.Command(self, append(global, args...)...)
	cmd.Env = append(os.Environ(), backgroundVar+"=1")
	cmd.ExtraFiles = []*os.File{secret, report}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return "", 0, err
	}
	secret.Close()
	report.Close()
	go func() {
		toChild.Write(password)
		toChild.Close()
	}()
	interrupted := context.AfterFunc(ctx, func() { cmd.Process.Signal(syscall.SIGTERM) })
	defer interrupted()
	said, err := io.ReadAll(fromChild)
	if err != nil {
		return "", 0, err
	}
	if word, ok := strings.CutPrefix(string(said), "0\n"); ok {
		return strings.TrimSuffix(word, "\n"), cmd.Process.Pid, nil
	}
	if len(said) > 0 {
		return "", 0, reportedError(string(said))
	}
	return "", cmd.Process.Pid, nil
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
