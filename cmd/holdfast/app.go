package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/urfave/cli/v2"

	"github.com/holdfast-backup/holdfast/fs/boot"
)

// env is everything from outside that a run touches, besides the environment
// variables and the files that a user names.
type env struct {
	stdin    *os.File  // a password is asked for when it is a terminal
	stdout   io.Writer // results
	stderr   io.Writer // messages and progress; bars when it is a terminal
	clock    clock
	config   string // config file that is read, if it exists, when none is named
	commands []command
}

// command is one line of the command table: all that help, the parser, shell
// completion and the run need to know of it.
type command struct {
	name      string
	usage     string // arguments and flags as the synopsis shows them
	short     string // one line of the list of commands
	long      string // the rest of what its help says; may be empty
	min, max  int    // number of arguments; max < 0 means any number
	completes words  // what a shell offers for an argument
	flags     []cli.Flag
	needs     need
	away      bool                // it works with a repository on another host, too
	check     func(c *call) error // usage that counts and types do not catch; may be nil
	run       func(ctx context.Context, c *call) error
}

// need is what a command wants resolved before it starts.
type need int

const (
	needNothing    need = iota
	needConfig          // the config file, if any, is read
	needRepository      // and call.repo names a repository
)

// call is one run of one command.
type call struct {
	*cli.Context // the values of its flags
	env
	options
	args     []string
	cfg      config // set when the command needs it
	repo     string // path of the repository, likewise
	out      *results
	progress *progress                    // closed, and so flushed, when the command returns
	seen     map[string]*boot.RemoteState // of boots on platforms, by their ids
}

// run runs one command line, without the name of the program, and returns the
// exit code. All output is flushed when it returns.
func run(ctx context.Context, e env, argv []string) int {
	app := newApp(e)
	ordered, err := arrange(app, argv)
	if err == nil {
		err = app.RunContext(ctx, append([]string{app.Name}, ordered...))
	}
	return report(e.stderr, interruption(ctx, err))
}

// newApp builds the command tree. What it runs must come from arrange, which
// puts the arguments into the one order that urfave/cli/v2 reads in full.
func newApp(e env) *cli.App {
	app := &cli.App{
		Name:      "holdfast",
		HelpName:  "holdfast",
		Usage:     "back up virtual machines, use every restore point at once",
		UsageText: "holdfast COMMAND [ARGUMENT...] [FLAG...]",
		Description: "Flags may stand anywhere, before or after the command; -- ends them.\n" +
			"The password comes from --password-file, HOLDFAST_PASSWORD_FILE, HOLDFAST_PASSWORD,\n" +
			"the config file or a prompt, in this order, and never from an argument.\n" +
			"Exit codes: 0 done, 1 failed, 3 partly done, 4 damage found, 10 no repository,\n" +
			"11 locked, 12 access refused, 64 wrong usage, 130 interrupted.",
		Flags:     globalFlags(),
		Writer:    e.stdout,
		ErrWriter: e.stderr,
		// arrange handles help: the built-in one prints errors of its own
		// and takes an argument "help" of any command for itself.
		HideHelp:    true,
		HideVersion: true,
		// A tag may have a comma in it.
		DisableSliceFlagSeparator: true,
		// The default handler exits the process for any error that has a
		// method ExitCode, such as exec.ExitError.
		ExitErrHandler: func(*cli.Context, error) {},
		OnUsageError:   func(_ *cli.Context, err error, _ bool) error { return usagef("%v", err) },
	}
	for i := range e.commands {
		cmd := &e.commands[i]
		app.Commands = append(app.Commands, &cli.Command{
			Name:               cmd.name,
			Usage:              cmd.short,
			UsageText:          synopsis(cmd),
			Description:        cmd.long,
			Flags:              cmd.flags,
			HideHelp:           true,
			CustomHelpTemplate: cli.CommandHelpTemplate + "\nFlags of every command: see 'holdfast help'.\n",
			OnUsageError:       app.OnUsageError,
			Action:             func(flags *cli.Context) error { return perform(flags, e, cmd) },
		})
	}
	return app
}

// synopsis is the usage line of a command.
func synopsis(cmd *command) string {
	if cmd.usage == "" {
		return "holdfast " + cmd.name
	}
	return "holdfast " + cmd.name + " " + cmd.usage
}

// perform resolves what cmd needs, runs it, and flushes its output.
func perform(flags *cli.Context, e env, cmd *command) (err error) {
	c := &call{Context: flags, env: e, args: flags.Args().Slice()}
	c.options = options{
		repoFlag:     flags.String("repo"),
		configFile:   flags.String("config"),
		passwordFile: flags.String("password-file"),
		json:         flags.Bool("json"),
		quiet:        flags.Bool("quiet"),
		verbose:      flags.Bool("verbose"),
		noProgress:   flags.Bool("no-progress"),
	}
	if err := checkCount(cmd, len(c.args)); err != nil {
		return err
	}
	if cmd.check != nil {
		if err := cmd.check(c); err != nil {
			return withUsage(err, cmd)
		}
	}
	if err := c.resolve(cmd.needs); err != nil {
		return err
	}
	if isAway(c.repo) && !cmd.away {
		return onlyAdds(cmd.name, c.repo)
	}
	c.out = newResults(e.stdout, c.json)
	c.progress = newProgress(e.clock, choosePrinter(e.stderr, c.options))
	defer func() {
		c.progress.close()
		if ferr := c.out.flush(); ferr != nil {
			err = errors.Join(err, fmt.Errorf("print results: %w", ferr))
		}
	}()
	return cmd.run(flags.Context, c)
}

// checkCount refuses too few and too many arguments.
func checkCount(cmd *command, n int) error {
	switch {
	case n < cmd.min:
		return withUsage(usagef("%s: too few arguments", cmd.name), cmd)
	case cmd.max >= 0 && n > cmd.max:
		return withUsage(usagef("%s: too many arguments", cmd.name), cmd)
	}
	return nil
}

// withUsage hints at the synopsis, unless err has a better hint.
func withUsage(err error, cmd *command) error {
	if isType[*hinted](err) {
		return err
	}
	return withHint(err, "usage: %s", synopsis(cmd))
}

// resolve reads the config and finds the repository, as far as needed.
func (c *call) resolve(n need) error {
	if n == needNothing {
		return nil
	}
	var err error
	if c.cfg, err = findConfig(c.configFile, c.env.config); err != nil {
		return err
	}
	if n != needRepository {
		return nil
	}
	c.repo = c.repoFlag
	if c.repo == "" {
		c.repo = c.cfg.repository.path
	}
	if c.repo == "" {
		return withHint(usagef("no repository named"), "use -r DIR, HOLDFAST_REPO or the config file")
	}
	return nil
}
