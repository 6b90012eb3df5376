package main

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"
)

// outcome is what one command line came to.
type outcome struct {
	code           int
	stdout, stderr string
	ran            string // name of the command that ran, "" if none
	args           []string
	options        options
	values         map[string]string // flags of the command that were given
	tags           []string
}

// runLine runs a command line of the real table with every action replaced by
// one that takes notes.
func runLine(t *testing.T, argv ...string) outcome {
	t.Helper()
	for _, name := range []string{"HOLDFAST_REPO", "HOLDFAST_CONFIG", "HOLDFAST_PASSWORD_FILE", "HOLDFAST_PASSWORD"} {
		t.Setenv(name, "")
	}
	var o outcome
	cmds := commands()
	for i := range cmds {
		if cmds[i].name == "help" {
			continue
		}
		cmds[i].needs = needNothing
		cmds[i].run = func(_ context.Context, c *call) error {
			o.ran, o.args, o.options = c.Command.Name, c.args, c.options
			o.values = map[string]string{}
			for _, f := range c.Command.Flags {
				if name := f.Names()[0]; c.IsSet(name) && name != "tag" {
					o.values[name] = fmt.Sprint(c.Value(name))
				}
			}
			o.tags = c.StringSlice("tag")
			return nil
		}
	}
	var stdout, stderr bytes.Buffer
	o.code = run(t.Context(), env{stdout: &stdout, stderr: &stderr, clock: wallClock{}, commands: cmds}, argv)
	o.stdout, o.stderr = stdout.String(), stderr.String()
	return o
}

func TestFlagPlacement(t *testing.T) {
	want := outcome{ran: "backup", args: []string{"disk.raw"}, options: options{repoFlag: "R"},
		values: map[string]string{"vm": "web"}}
	for _, line := range []string{
		"backup disk.raw --vm web -r R",
		"backup --vm web -r R disk.raw",
		"-r R backup disk.raw --vm web",
		"-r R backup --vm web disk.raw",
		"--repo R backup --vm=web disk.raw",
		"--repo=R backup disk.raw --vm=web",
		"-r=R backup disk.raw --vm web",
		"backup disk.raw -r=R --vm web",
		"backup -r Q disk.raw --vm db -r R --vm web", // the last value counts
		"-r Q backup disk.raw --vm web -r R",
		"backup --vm web -r R -- disk.raw",
		"-r R -- backup disk.raw --vm web", // "--" before the command is odd; see below
	} {
		got := runLine(t, strings.Fields(line)...)
		if strings.HasPrefix(line, "-r R -- ") {
			// After "--" there are no flags, wherever it stands.
			if !slices.Equal(got.args, []string{"disk.raw", "--vm", "web"}) {
				t.Errorf("%s: arguments %q", line, got.args)
			}
			continue
		}
		if got.code != 0 || got.stderr != "" {
			t.Errorf("%s: exit %d, %s", line, got.code, got.stderr)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s:\n got %+v\nwant %+v", line, got, want)
		}
	}
}

// TestFlagPlacementRandom puts the same flags at every possible place among the
// arguments, again and again, and wants the same outcome.
func TestFlagPlacementRandom(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	units := [][]string{{"--vm", "web"}, {"--tag=a,b"}, {"--full"}, {"-r", "R"}, {"--json"}, {"-v"}, {"--password-file=p=q"}}
	want := outcome{ran: "backup", args: []string{"a", "-", "b c"}, tags: []string{"a,b"},
		options: options{repoFlag: "R", passwordFile: "p=q", json: true, verbose: true},
		values:  map[string]string{"vm": "web", "full": "true"}}
	for range 300 {
		line := [][]string{{"backup"}, {"a"}, {"-"}, {"b c"}}
		for _, u := range units {
			first := 1 // flags of the command stand after its name
			if u[0] != "--vm" && u[0] != "--full" && !strings.HasPrefix(u[0], "--tag") {
				first = 0
			}
			// Never before the command once a local flag moved it: find it anew.
			at := slices.IndexFunc(line, func(w []string) bool { return w[0] == "backup" })
			if first == 1 {
				first = at + 1
			}
			line = slices.Insert(line, first+rng.IntN(len(line)-first+1), u)
		}
		argv := slices.Concat(line...)
		if got := runLine(t, argv...); !reflect.DeepEqual(got, want) {
			t.Fatalf("%q:\n got %+v\nwant %+v", argv, got, want)
		}
	}
}

func TestArguments(t *testing.T) {
	for _, c := range []struct {
		argv []string
		args []string
		tags []string
	}{
		{[]string{"backup", "a", "--tag", "x", "--tag", "y,z"}, []string{"a"}, []string{"x", "y,z"}},
		{[]string{"backup", "a", "--tag", "", "--tag=-n"}, []string{"a"}, []string{"", "-n"}},
		{[]string{"backup", "--", "-5", "--vm", "--"}, []string{"-5", "--vm", "--"}, nil},
		{[]string{"backup", "-"}, []string{"-"}, nil},
		{[]string{"backup", ""}, []string{""}, nil},
		{[]string{"backup", "--json", "true"}, []string{"true"}, nil}, // a switch takes no value
		// Names that the library would take for commands or flags of its own.
		{[]string{"backup", "help"}, []string{"help"}, nil},
		{[]string{"backup", "h", "vm", "repo", "backup"}, []string{"h", "vm", "repo", "backup"}, nil},
		{[]string{"--repo", "x", "backup", "repo"}, []string{"repo"}, nil},
		{[]string{"backup", "a", "--", "--generate-bash-completion"}, []string{"a", "--generate-bash-completion"}, nil},
	} {
		got := runLine(t, c.argv...)
		if got.code != 0 || !slices.Equal(got.args, c.args) || !slices.Equal(got.tags, c.tags) {
			t.Errorf("%q: exit %d, arguments %q, tags %q, %s", c.argv, got.code, got.args, got.tags, got.stderr)
		}
	}
}

func TestUsageErrors(t *testing.T) {
	for _, c := range []struct{ line, message, hint string }{
		{"", "no command given", "holdfast help"},
		{"--json", "no command given", "holdfast help"},
		{"bakcup x", `unknown command "bakcup"`, "'holdfast backup'"},
		{"verif", `unknown command "verif"`, "'holdfast verify'"},
		{"frobnicate", `unknown command "frobnicate"`, "lists the commands"},
		{"docter", `unknown command "docter"`, "'holdfast doctor'"},
		{"points --jsno", "points: unknown flag --jsno", "--json"},
		{"points --rep x", "unknown flag --rep", "--repo"}, // no abbreviation
		{"points -repo x", "unknown flag -repo", "--repo"},
		{"ls -lv", "unknown flag -lv", "holdfast help ls"}, // no bundling
		{"points -rR", "unknown flag -rR", ""},
		{"points --vm x", "points: unknown flag --vm", ""},
		{"--vm x backup d", "unknown flag --vm", "after its name"},
		{"--version", "unknown flag --version", "'holdfast version'"},
		{"points --=x", "unknown flag --", ""},
		{"points ---", "unknown flag ---", ""},
		{"points -r", "flag -r needs a value", "-r=VALUE"},
		{"points -r --json", "flag -r needs a value", "-r=VALUE"},
		{"points --json=true", "flag --json takes no value", "--json alone"},
		{"points --help=yes", "--help takes no value", ""},
		{"backup", "backup: too few arguments", "usage: holdfast backup DISK..."},
		{"backup --vm x", "backup: too few arguments", ""},
		{"cp a", "cp: too few arguments", "PATH... DEST"},
		{"points a b", "points: too many arguments", "[VM]"},
		{"stats a b", "stats: too many arguments", ""},
		{"init", "init: too few arguments", ""},
		{"init r --chunk-size 96K", "96K", "power of two"},
		{"restore p", "restore: where to?", "--onto FILE"},
		{"restore p --to d --onto f", "exclude each other", ""},
		{"restore p --onto f", "--onto needs --disk", ""},
		{"restore p --onto f --disk disk0 --format raw", "takes no --format", ""},
		{"restore p --to d --format vdi", `unknown value "vdi"`, "raw, qcow2, vmdk, vmdk-stream, vhdx, vhd"},
		{"help nosuch", `unknown command "nosuch"`, ""},
		{"help a b", "too many arguments", ""},
	} {
		got := runLine(t, strings.Fields(c.line)...)
		message, hint, _ := strings.Cut(got.stderr, "\nhint: ")
		if got.code != exitUsage || got.ran != "" || got.stdout != "" ||
			!strings.HasPrefix(message, "holdfast: ") || !strings.Contains(message, c.message) || !strings.Contains(hint, c.hint) {
			t.Errorf("%q: exit %d, ran %q, stdout %q, stderr:\n%s", c.line, got.code, got.ran, got.stdout, got.stderr)
		}
	}
}

func TestHelp(t *testing.T) {
	for _, line := range []string{"help", "--help", "-h", "--json --help"} {
		got := runLine(t, strings.Fields(line)...)
		if got.code != 0 || got.stderr != "" || !strings.Contains(got.stdout, "HOLDFAST_PASSWORD_FILE") {
			t.Errorf("%s: exit %d, stdout %q, stderr %q", line, got.code, got.stdout, got.stderr)
		}
	}
	for _, c := range commands() {
		for _, line := range [][]string{{c.name, "--help"}, {c.name, "-h", "x", "y", "z"}, {"help", c.name}, {"--help", c.name}, {c.name, "x", "--help", "--json"}} {
			got := runLine(t, line...)
			if got.code != 0 || got.stderr != "" || got.ran != "" || !strings.Contains(got.stdout, synopsis(&c)) {
				t.Errorf("%q: exit %d, ran %q, stdout %q, stderr %q", line, got.code, got.ran, got.stdout, got.stderr)
			}
		}
	}
}

func TestEnvironment(t *testing.T) {
	var repo string
	cmds := []command{{name: "points", max: -1, needs: needRepository,
		run: func(_ context.Context, c *call) error { repo = c.repo; return nil }}}
	runs := func(argv ...string) int {
		repo = ""
		return run(t.Context(), env{stdout: new(bytes.Buffer), stderr: new(bytes.Buffer), clock: wallClock{}, commands: cmds}, argv)
	}
	t.Setenv("HOLDFAST_CONFIG", "")
	t.Setenv("HOLDFAST_REPO", "")
	if code := runs("points"); code != exitUsage {
		t.Errorf("no repository named: exit %d", code)
	}
	t.Setenv("HOLDFAST_REPO", "from-env")
	if runs("points"); repo != "from-env" {
		t.Errorf("repository %q", repo)
	}
	if runs("points", "-r", "from-flag"); repo != "from-flag" {
		t.Errorf("repository %q", repo)
	}
}

// TestTableIsSound finds mistakes in the table that the parser cannot.
func TestTableIsSound(t *testing.T) {
	names := map[string]bool{}
	for _, c := range commands() {
		if names[c.name] {
			t.Errorf("%s is there twice", c.name)
		}
		names[c.name] = true
		if c.run == nil || c.short == "" || c.max >= 0 && c.max < c.min {
			t.Errorf("%s: incomplete", c.name)
		}
		seen := map[string]bool{"--help": true, "-h": true}
		for _, f := range slices.Concat(globalFlags(), c.flags) {
			for _, s := range spellings(f) {
				if seen[s] {
					t.Errorf("%s: two flags %s", c.name, s)
				}
				seen[s] = true
			}
		}
	}
}

// TestForeignExitCode: an error of a program that was run must not end this
// process, as the default of the library does.
func TestForeignExitCode(t *testing.T) {
	foreign := exec.Command("sh", "-c", "exit 77").Run()
	if _, ok := foreign.(cli.ExitCoder); !ok {
		t.Fatal("the trap is gone: exec.ExitError is no cli.ExitCoder any more")
	}
	cmds := []command{{name: "x", run: func(context.Context, *call) error { return foreign }}}
	var stderr bytes.Buffer
	if code := run(t.Context(), env{stdout: new(bytes.Buffer), stderr: &stderr, clock: wallClock{}, commands: cmds}, []string{"x"}); code != exitFailed {
		t.Errorf("exit %d", code)
	}
}

// FuzzArrange checks that a line that was arranged is read in full: the library
// finds nothing to complain about but the values and counts.
func FuzzArrange(f *testing.F) {
	for _, s := range []string{"backup\x00a\x00--vm\x00w", "-r\x00x\x00ls\x00-l\x00--", "help\x00ls", "--\x00ls\x00-", "restore\x00--to=\x00-h"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, line string) {
		cmds := commands()
		var ran *call
		for i := range cmds {
			cmds[i].check, cmds[i].needs, cmds[i].min, cmds[i].max = nil, needNothing, 0, -1
			cmds[i].run = func(_ context.Context, c *call) error { ran = c; return nil }
		}
		e := env{stdout: new(bytes.Buffer), stderr: new(bytes.Buffer), clock: wallClock{}, commands: cmds}
		app := newApp(e)
		ordered, err := arrange(app, strings.Split(line, "\x00"))
		if err != nil {
			if !isType[*usageError](err) {
				t.Fatalf("%v is no usage error", err)
			}
			return
		}
		err = app.Run(append([]string{"holdfast"}, ordered...))
		if err != nil && !strings.Contains(err.Error(), "--format: unknown value") {
			t.Fatalf("%q became %q: %v", line, ordered, err)
		}
		if err == nil {
			want := ordered[slices.Index(ordered, "--")+1:]
			if !slices.Equal(ran.args, want) && len(ran.args)+len(want) > 0 {
				t.Fatalf("%q became %q, arguments %q", line, ordered, ran.args)
			}
		}
	})
}
