package main

import (
	"bufio"
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

	"github.com/rogpeppe/go-internal/testscript"
)

// TestMain lets this binary be two programs for the scripts: holdfast itself,
// and probe, which has its parser, output and exit codes but commands that do
// what only a test wants.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"holdfast": main,
		"probe":    probe,
	})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: filepath.Join("testdata", "script"),
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":   exits,
			"idof":    idOf,
			"lower":   lower,
			"mistype": mistype,
		},
		Setup: func(e *testscript.Env) error {
			// The config of the machine must not reach the scripts.
			none := filepath.Join(e.WorkDir, ".none.yaml")
			e.Setenv("HOLDFAST_CONFIG", none)
			return os.WriteFile(none, nil, 0o600)
		},
	})
}

// exits CODE COMMAND [ARGUMENT...] runs a command and wants this exit code.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND [ARGUMENT...]")
	}
	want, err := strconv.Atoi(args[0])
	if err != nil {
		ts.Fatalf("exits: %v", err)
	}
	got := 0
	err = ts.Exec(args[1], args[2:]...)
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		got = exit.ExitCode()
	} else if err != nil {
		ts.Fatalf("exits: %v", err)
	}
	if got != want {
		ts.Fatalf("%q: exit %d, want %d", args[1:], got, want)
	}
}

// idOf WHICH PASSWORD-FILE puts the id of a key into $ID: the one that PASSWORD-FILE opens
// ("used"), one that it does not ("unused"), or the first of all ("other").
func idOf(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: idof used|unused|other PASSWORD-FILE")
	}
	ts.Check(ts.Exec("holdfast", "key", "list", "--json", "--password-file", args[1]))
	for line := range strings.Lines(ts.ReadFile("stdout")) {
		used := strings.Contains(line, `"in_use":true`)
		if args[0] == "other" || used == (args[0] == "used") {
			_, rest, _ := strings.Cut(line, `"id":"`)
			ts.Setenv("ID", rest[:8])
			return
		}
	}
	ts.Fatalf("no such key")
}

// lower FROM TO writes a recovery key as it may be typed.
func lower(ts *testscript.TestScript, _ bool, args []string) {
	text := strings.ToLower(strings.ReplaceAll(ts.ReadFile(args[0]), "-", " "))
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), []byte(text), 0o600))
}

// mistype FROM TO exchanges two characters that differ.
func mistype(ts *testscript.TestScript, _ bool, args []string) {
	b := []byte(strings.ReplaceAll(ts.ReadFile(args[0]), "-", ""))
	for i := range b[1:] {
		if b[i] != b[i+1] {
			b[i], b[i+1] = b[i+1], b[i]
			break
		}
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), b, 0o600))
}

// probe is holdfast with these commands:
//
//	ask         print the password that was found
//	ask-new     the same for a new repository
//	fail WHAT   end with an error of this kind
//	repo        print the repository that would be opened
//	wait        print "ready" and wait for a signal
//	hang        the same, and ignore the first one
//	work        run two tasks and say something
func probe() {
	ask := func(get func(*call, context.Context) ([]byte, error)) func(context.Context, *call) error {
		return func(ctx context.Context, c *call) error {
			p, err := get(c, ctx)
			if err != nil {
				return err
			}
			c.out.line("password %q", p)
			return c.out.object(map[string]string{"password": string(p)})
		}
	}
	ctx, stop := interruptible(context.Background(), os.Exit)
	defer stop()
	os.Exit(run(ctx, env{
		stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, clock: wallClock{},
		config: os.Getenv("PROBE_CONFIG"),
		commands: []command{
			{name: "ask", needs: needConfig, run: ask((*call).password)},
			{name: "ask-new", needs: needConfig, run: ask((*call).newPassword)},
			{name: "fail", min: 1, max: 1, run: func(_ context.Context, c *call) error {
				c.out.line("before the failure")
				return fmt.Errorf("probe: %w", map[string]error{
					"plain": errors.New("plain"), "partly": errPartlyDone, "damage": errDamageFound,
					"access": &accessError{errors.New("no")}, "cancel": context.Canceled,
				}[c.args[0]])
			}},
			{name: "repo", needs: needRepository, run: func(_ context.Context, c *call) error {
				c.out.line("%s", c.repo)
				return nil
			}},
			{name: "wait", run: func(ctx context.Context, c *call) error {
				fmt.Println("ready")
				<-ctx.Done()
				return errors.New("write: broken pipe")
			}},
			{name: "hang", run: func(ctx context.Context, c *call) error {
				fmt.Println("ready")
				<-ctx.Done()
				fmt.Println("hanging")
				time.Sleep(time.Minute)
				return nil
			}},
			{name: "work", run: func(ctx context.Context, c *call) error {
				one, two := c.progress.task("web/disk0", "new", 1<<30), c.progress.task("web/disk1", "new", -1)
				one.add(1 << 30)
				one.count(3 << 20)
				two.add(5)
				c.progress.warn("no change tracking")
				c.progress.note("a note")
				c.progress.detail("a detail")
				one.end(nil)
				two.end(errors.New("gone"))
				c.progress.task("web/disk2", "", 9).add(1) // forgotten
				c.out.line("result")
				return c.out.object(map[string]any{"type": "summary", "warnings": c.progress.warned()})
			}},
		},
	}, os.Args[1:]))
}

// TestSignals sends real signals to a real process.
func TestSignals(t *testing.T) {
	for _, sig := range []os.Signal{syscall.SIGINT, syscall.SIGTERM} {
		for _, name := range []string{"wait", "hang"} {
			t.Run(fmt.Sprint(name, " ", sig), func(t *testing.T) {
				cmd := exec.Command("probe", name)
				out, err := cmd.StdoutPipe()
				if err != nil {
					t.Fatal(err)
				}
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				said := bufio.NewScanner(out)
				begin := time.Now()
				said.Scan()
				if err := cmd.Process.Signal(sig); err != nil {
					t.Fatal(err)
				}
				if name == "hang" {
					if said.Scan(); said.Text() != "hanging" {
						t.Errorf("after one signal: %q", said.Text())
					}
					if err := cmd.Process.Signal(sig); err != nil {
						t.Fatal(err)
					}
				}
				_ = cmd.Wait()
				if code := cmd.ProcessState.ExitCode(); code != exitInterrupted {
					t.Errorf("exit %d", code)
				}
				if took := time.Since(begin); took > 30*time.Second {
					t.Errorf("ended only after %v", took)
				}
			})
		}
	}
}
