package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// terminal is a pseudo-terminal: a program talks to tty, the test reads and
// writes at the other end.
type terminal struct {
	tty, other *os.File
	done       chan struct{} // closed when all output was read

	mu sync.Mutex // guards following
	b  bytes.Buffer
}

func newTerminal(t *testing.T, width, height uint16) *terminal {
	t.Helper()
	other, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no pseudo-terminals here: %v", err)
	}
	fd := int(other.Fd())
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Col: width, Row: height}); err != nil {
		t.Fatal(err)
	}
	x := &terminal{tty: tty, other: other, done: make(chan struct{})}
	go func() {
		defer close(x.done)
		p := make([]byte, 4096)
		for {
			n, err := other.Read(p)
			x.mu.Lock()
			x.b.Write(p[:n])
			x.mu.Unlock()
			if err != nil {
				return // EIO: the last program has closed the tty
			}
		}
	}()
	t.Cleanup(func() { tty.Close(); other.Close() })
	return x
}

// output is all that was printed; hangUp first to have the last of it.
func (x *terminal) output() string {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.b.String()
}

func (x *terminal) hangUp() {
	x.tty.Close()
	<-x.done
}

// echoes reports whether typing is shown.
func (x *terminal) echoes(t *testing.T) bool {
	s, err := unix.IoctlGetTermios(int(x.other.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return s.Lflag&unix.ECHO != 0
}

// waitFor waits until ok, at most 10 s.
func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// screen is what a terminal without an upper end shows after output. It knows
// the two sequences that move the cursor of a bar, and refuses all others.
func screen(t *testing.T, output string) []string {
	t.Helper()
	up := regexp.MustCompile(`^\x1b\[(\d+)A\x1b\[J`)
	lines := []string{""}
	for output != "" {
		if m := up.FindStringSubmatch(output); m != nil {
			n, _ := strconv.Atoi(m[1])
			if n >= len(lines) {
				t.Fatalf("the cursor leaves the screen, %d up of %d", n, len(lines))
			}
			lines = append(lines[:len(lines)-1-n], "")
			output = output[len(m[0]):]
			continue
		}
		switch c := output[0]; c {
		case '\r':
		case '\n':
			lines = append(lines, "")
		case '\x1b':
			t.Fatalf("unknown sequence %.10q", output)
		default:
			lines[len(lines)-1] += string(c)
		}
		output = output[1:]
	}
	return lines
}

// TestBars draws bars on a real terminal while many goroutines talk: at the end
// every message is there as one whole line, once, and so is every task.
func TestBars(t *testing.T) {
	for _, size := range [][2]uint16{{120, 40}, {60, 3}, {20, 10}, {1, 1}} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			x := newTerminal(t, size[0], size[1])
			p := newProgress(wallClock{}, choosePrinter(x.tty, options{}))
			if _, ok := p.printer.(*bars); !ok {
				t.Fatalf("a terminal gets %T", p.printer)
			}
			p.warn("before all bars")
			var wg sync.WaitGroup
			for i := range 6 {
				wg.Go(func() {
					d := p.task(fmt.Sprint("vm/disk", i), "new", 100<<20)
					for j := range 10 {
						d.add(10 << 20)
						d.count(1 << 20)
						p.warn("disk %d says %d", i, j)
						p.detail("unheard")
						time.Sleep(25 * time.Millisecond)
					}
					switch i {
					case 0:
						d.end(errors.New("gone"))
					case 1: // left to close
					default:
						d.end(nil)
					}
				})
			}
			wg.Wait()
			p.close()
			p.warn("after all bars")
			x.hangUp()
			seen := map[string]int{}
			for _, line := range screen(t, x.output()) {
				seen[strings.TrimRight(line, " ")]++
			}
			want := []string{"warning: before all bars", "warning: after all bars"}
			for i := range 6 {
				for j := range 10 {
					want = append(want, fmt.Sprintf("warning: disk %d says %d", i, j))
				}
			}
			for _, line := range want {
				if seen[line] != 1 {
					t.Errorf("%q is there %d times", line, seen[line])
				}
			}
			if size[0] < 60 || size[1] < 6 {
				return // no room for all bars
			}
			ends := []string{"failed after 100.0 MiB, 10.0 MiB new", "stopped after 100.0 MiB, 10.0 MiB new"}
			for i := range 6 {
				end := append(ends, "100.0 MiB, 10.0 MiB new", "100.0 MiB, 10.0 MiB new", "100.0 MiB, 10.0 MiB new", "100.0 MiB, 10.0 MiB new")[i]
				n := 0
				for line := range seen {
					if strings.HasPrefix(line, fmt.Sprintf("vm/disk%d", i)) && strings.Contains(line, end) {
						n++
					}
				}
				if n != 1 {
					t.Errorf("disk %d is there %d times as %q", i, n, end)
				}
			}
			if t.Failed() {
				t.Logf("%s", strings.Join(screen(t, x.output()), "\n"))
			}
		})
	}
}

// TestBarsWhileRunning looks at what is drawn before the end.
func TestBarsWhileRunning(t *testing.T) {
	x := newTerminal(t, 120, 40)
	p := newProgress(wallClock{}, choosePrinter(x.tty, options{}))
	d := p.task("web/disk0", "new", 4<<30)
	d.add(1 << 30)
	d.count(300 << 20)
	bar := regexp.MustCompile(`web/disk0 \[=+>-+\] 25% 1\.0 GiB of 4\.0 GiB, 300\.0 MiB new, .*/s, .* left`)
	waitFor(t, "a bar", func() bool { return bar.MatchString(x.output()) })
	p.close()
	x.hangUp()
}

func TestDrawable(t *testing.T) {
	x := newTerminal(t, 80, 24)
	if !drawable(x.tty) {
		t.Error("a terminal is not drawable")
	}
	t.Setenv("TERM", "dumb")
	if drawable(x.tty) {
		t.Error("a dumb terminal is drawable")
	}
	t.Setenv("TERM", "xterm")
	if y := newTerminal(t, 0, 0); drawable(y.tty) {
		t.Error("a terminal without a size is drawable")
	}
	for _, o := range []options{{quiet: true}, {noProgress: true}, {json: true}, {json: true, verbose: true}} {
		if _, ok := choosePrinter(x.tty, o).(*lines); !ok {
			t.Errorf("%+v: bars", o)
		}
	}
}
