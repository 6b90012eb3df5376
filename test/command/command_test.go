//go:build linux

package command

import (
	"context"
	"errors"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestRun(t *testing.T) {
	res, err := Command{Args: []string{"sh", "-c", "cat; echo $X"}, In: strings.NewReader("in\n"), Env: []string{"X=env"}}.Run(t.Context())
	if err != nil || string(res.Out) != "in\nenv\n" {
		t.Errorf("got %q, %v", res.Out, err)
	}
	if res.Wall <= 0 || res.MaxRSS < 1<<18 {
		t.Errorf("measured %+v", res)
	}
}

func TestRunExplains(t *testing.T) {
	_, err := Run(t.Context(), "sh", "-c", "echo because >&2; exit 7")
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 7 || !strings.Contains(err.Error(), "because") {
		t.Errorf("got %v", err)
	}
}

// TestRunStopsTheGroup: a cancelled run takes the program's children along.
func TestRunStopsTheGroup(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	start := time.Now()
	_, err := Run(ctx, "sh", "-c", "sleep 60 & sleep 60; wait")
	if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 10*time.Second {
		t.Errorf("after %v: %v", time.Since(start), err)
	}
}

func TestProcessStop(t *testing.T) {
	p, err := Command{Args: []string{"sh", "-c", "trap '' INT; sleep 60 & wait"}}.Start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if ended, _ := p.Ended(); ended {
		t.Fatal("ended by itself")
	}
	p.Stop()
	p.Stop()
	if err := syscall.Kill(p.PID, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("it still exists: %v", err)
	}
}
