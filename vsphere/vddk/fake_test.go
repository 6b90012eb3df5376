//go:build linux

package vddk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	kib = 1 << 10
	mib = 1 << 20
)

// need skips the test when a program is missing, and in short runs; with HOLDFAST_TEST_ALL=1 a missing one is an error.
func need(t testing.TB, programs ...string) {
	t.Helper()
	if testing.Short() {
		t.Skip("-short: not running " + programs[0])
	}
	for _, p := range programs {
		_, err := exec.LookPath(p)
		switch {
		case err == nil:
		case os.Getenv("HOLDFAST_TEST_ALL") == "1":
			t.Fatalf("the oracle is missing: %v", err)
		default:
			t.Skipf("the oracle is missing: %v", err)
		}
	}
}

func mustRun(t testing.TB, args ...string) []byte {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return out
}

// fake stands in for nbdkit with the vddk plugin: it notes how it was called and then becomes the real nbdkit with another plugin.
type fake struct {
	path string
	runs string // folder: 1, 2, … for each run
}

// newFake makes one that becomes nbdkit with these arguments, after the shell has done what before says. There $run is a
// folder of this run and $n its number.
func newFake(t testing.TB, before string, args ...string) *fake {
	t.Helper()
	dir := t.TempDir()
	f := &fake{path: filepath.Join(dir, "nbdkit"), runs: filepath.Join(dir, "runs")}
	if err := os.Mkdir(f.runs, 0o700); err != nil {
		t.Fatal(err)
	}
	for i, a := range args {
		args[i] = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
	}
	script := `#!/bin/sh
n=1; while ! mkdir '` + f.runs + `'/$n 2>/dev/null; do n=$((n+1)); done
run='` + f.runs + `'/$n
cat /proc/$$/cmdline > $run/cmdline
cat /proc/$$/environ > $run/environ
count=$#; i=0; plugin=; password=
while [ $i -lt $count ]; do
	a=$1; shift; i=$((i+1))
	case "$plugin$a" in
	vddk) plugin=1 ;;
	1password=-3) password=1 ;;
	1*) ;;
	*/socket) stat -c '%a %U' "${a%/*}" > $run/mode; ls -A "${a%/*}" > $run/files; set -- "$@" "$a" ;;
	*) set -- "$@" "$a" ;;
	esac
done
if [ -n "$password" ]; then
	cat <&3 > $run/password
	exec 3< $run/password
fi
echo $$ > $run/pid
` + before + `
exec nbdkit "$@" ` + strings.Join(args, " ") + "\n"
	if err := os.WriteFile(f.path, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	return f
}

// note gives what run n noted, empty when there was none.
func (f *fake) note(n int, name string) string {
	b, _ := os.ReadFile(filepath.Join(f.runs, strconv.Itoa(n), name))
	return string(b)
}

// count is how often it was run.
func (f *fake) count(t testing.TB) int {
	t.Helper()
	all, err := os.ReadDir(f.runs)
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

func (f *fake) pid(t testing.TB, n int) int {
	t.Helper()
	pid, err := strconv.Atoi(strings.TrimSpace(f.note(n, "pid")))
	if err != nil {
		t.Fatalf("run %d has no process: %v", n, err)
	}
	return pid
}

// runs reports whether a process runs; one that has ended and that nobody has asked about does not.
func runs(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	return len(fields) > 0 && string(fields[0]) != "Z"
}

// ends waits until a process has ended.
func ends(t testing.TB, pid int) {
	t.Helper()
	for range 1000 {
		if !runs(pid) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	syscall.Kill(pid, syscall.SIGKILL)
	t.Fatalf("nbdkit %d still runs", pid)
}

// allEnd makes sure that no run of the fake is left.
func (f *fake) allEnd(t testing.TB) {
	t.Helper()
	for n := range f.count(t) {
		if f.note(n+1, "pid") != "" && runs(f.pid(t, n+1)) {
			t.Errorf("nbdkit of run %d still runs", n+1)
		}
	}
}

const secret = "pass word=+'\"$HOME\\ü"

// options are those of a disk of the fake.
func (f *fake) options() Options {
	return Options{Nbdkit: f.path, Server: "vc.example", User: `LAB\backup`, Password: secret,
		Thumbprint: strings.Repeat("ab", 20), VM: "vm-16", File: "[store 1] web/web.vmdk", pause: 10 * time.Millisecond}
}

func open(t testing.TB, o Options) *Disk {
	t.Helper()
	d, err := Open(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// hintOf is the hint of an error, which must be an *Error.
func hintOf(t testing.TB, err error) string {
	t.Helper()
	var e *Error
	if !errors.As(err, &e) {
		t.Fatalf("no *Error: %v", err)
	}
	return e.Hint
}
