package whole

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// hangs is how long a command may take before it is taken to hang: it then gets a
// SIGQUIT, so that the test shows where.
const hangs = 2 * time.Minute

// result is how a run of the program ended.
type result struct {
	code     int // -1: killed
	out, err string
	took     time.Duration
	rss      int64 // bytes, at its peak
}

// repository is a repository and how the program is called on it.
type repository struct {
	dir      string
	password string
	as       []string // words before the program's own, such as those of setpriv
}

// newRepository makes one, with further arguments for init.
func newRepository(t *testing.T, args ...string) *repository {
	t.Helper()
	r := &repository{dir: filepath.Join(newDir(t), "repo"), password: "correct horse"}
	r.must(t, append([]string{"init", r.dir}, args...)...)
	return r
}

// command makes a run of the program.
func (r *repository) command(ctx context.Context, args ...string) *exec.Cmd {
	words := append(append(append([]string{}, r.as...), program), args...)
	cmd := exec.CommandContext(ctx, words[0], words[1:]...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGQUIT) }
	cmd.WaitDelay = 10 * time.Second
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=/nonexistent", "HOLDFAST_CONFIG=/dev/null",
		"HOLDFAST_REPO=" + r.dir, "HOLDFAST_PASSWORD=" + r.password}
	// If the test dies its children must not stay.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	return cmd
}

// run runs the program to its end.
func (r *repository) run(t *testing.T, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), hangs)
	defer cancel()
	cmd := r.command(ctx, args...)
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	began := time.Now()
	err := cmd.Start()
	if err != nil {
		t.Fatalf("%q: %v", args, err)
	}
	peak := watchMemory(cmd.Process.Pid)
	err = cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%q: %v", args, err)
	}
	res := result{code: cmd.ProcessState.ExitCode(), out: out.String(), err: stderr.String(), took: time.Since(began)}
	res.rss = peak()
	if ctx.Err() != nil {
		t.Fatalf("holdfast %q hangs:\n%.4000s", args, res.err)
	}
	if strings.Contains(res.err, "goroutine ") || res.code == 2 || res.code < 0 {
		t.Errorf("holdfast %q crashed (%v):\n%.4000s", args, cmd.ProcessState, res.err)
	}
	return res
}

// watchMemory looks at the most memory that a process has used until it ends.
// Its ru_maxrss is no use: that begins with what the parent had at the fork.
func watchMemory(pid int) (peak func() int64) {
	ended, seen := make(chan struct{}), make(chan int64)
	go func() {
		var most int64
		for {
			if rss, err := highWater(pid); err == nil {
				most = max(most, rss)
			}
			select {
			case <-ended:
				seen <- most
				return
			case <-time.After(3 * time.Millisecond):
			}
		}
	}()
	return func() int64 {
		close(ended)
		return <-seen
	}
}

// highWater is the most memory that a running process has used, bytes.
func highWater(pid int) (rss int64, err error) {
	exe, err := os.Readlink(fmt.Sprint("/proc/", pid, "/exe"))
	if err != nil || exe != program {
		return 0, errors.New("not started yet, or over")
	}
	text, err := os.ReadFile(fmt.Sprint("/proc/", pid, "/status"))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(text), "VmHWM:")
	_, err = fmt.Sscan(rest, &rss)
	return rss << 10, err
}

// must runs the program and wants exit code 0.
func (r *repository) must(t *testing.T, args ...string) result {
	t.Helper()
	return r.wants(t, 0, "", args...)
}

// wants runs the program and wants an exit code and, unless it is 0, a line
// "holdfast: …" that contains text.
func (r *repository) wants(t *testing.T, code int, text string, args ...string) result {
	t.Helper()
	res := r.run(t, args...)
	if res.code != code {
		t.Fatalf("holdfast %q: exit %d, want %d\n%s%.4000s", args, res.code, code, res.out, res.err)
	}
	if code == 0 {
		return res
	}
	for line := range strings.Lines(res.err) {
		if strings.HasPrefix(line, "holdfast: ") && strings.Contains(line, text) {
			return res
		}
	}
	t.Fatalf("holdfast %q says nothing of %q:\n%s", args, text, res.err)
	return res
}

// point is what --json says of a restore point.
type point struct {
	Type     string   `json:"type"`
	ID       string   `json:"id"`
	VM       string   `json:"vm"`
	Name     string   `json:"name"`
	New      int64    `json:"bytes_new"`
	Stored   int64    `json:"bytes_stored"`
	Read     int64    `json:"bytes_read"`
	Damaged  string   `json:"damaged"`
	Warnings any      `json:"warnings"`
	Tags     []string `json:"tags"`
}

func (p point) path() string { return p.VM + "/" + p.Name }

// backup backs up one VM and gives its point.
func (r *repository) backup(t *testing.T, args ...string) (point, result) {
	t.Helper()
	res := r.must(t, append([]string{"backup", "--json"}, args...)...)
	points := summaryOf(res.out)
	if len(points) != 1 {
		t.Fatalf("backup %q made %d points:\n%s", args, len(points), res.out)
	}
	return points[0], res
}

// summaryOf finds the points in what `backup --json` said, none if it did not come to its end.
func summaryOf(out string) []point {
	var s struct {
		Type   string  `json:"type"`
		Points []point `json:"points"`
	}
	for line := range strings.Lines(out) {
		if json.Unmarshal([]byte(line), &s) == nil && s.Type == "summary" {
			return s.Points
		}
	}
	return nil
}

// points lists the points.
func (r *repository) points(t *testing.T) (all []point) {
	t.Helper()
	for line := range strings.Lines(r.must(t, "points", "--json").out) {
		var p point
		if err := json.Unmarshal([]byte(line), &p); err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	return all
}

// buffer is a bytes.Buffer for two goroutines.
type buffer struct {
	mu sync.Mutex // guards following
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// process is a run of the program that goes on while the test does.
type process struct {
	cmd      *exec.Cmd
	out, err buffer
	ended    chan struct{}
}

// start starts the program; it is killed at the end of the test.
func (r *repository) start(t *testing.T, args ...string) *process {
	t.Helper()
	p := &process{cmd: r.command(context.Background(), args...), ended: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.err
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.ended)
		_ = p.cmd.Wait() // the state is looked at in code
	}()
	t.Cleanup(func() {
		if !p.running() {
			return
		}
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-p.ended:
		case <-time.After(10 * time.Second):
			_ = p.cmd.Process.Kill()
			<-p.ended
		}
	})
	return p
}

func (p *process) running() bool {
	select {
	case <-p.ended:
		return false
	default:
		return true
	}
}

// code waits for the end and gives the exit code, -1 after a signal.
func (p *process) code(t *testing.T) int {
	t.Helper()
	select {
	case <-p.ended:
	case <-time.After(hangs):
		_ = p.cmd.Process.Signal(syscall.SIGQUIT)
		<-p.ended
		t.Fatalf("%q hangs:\n%.4000s", p.cmd.Args, p.err.String())
	}
	return p.cmd.ProcessState.ExitCode()
}

// until waits for something that takes a moment.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited for %s in vain", what)
		}
	}
}
