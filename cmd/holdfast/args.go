package main

import (
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// arrange puts a command line into the one order that urfave/cli/v2 reads in
// full: global flags, command, its flags, "--", arguments. Left to itself the
// library takes flags after an argument for arguments, refuses global flags
// after the command, and ends with code 3 on an unknown command (seen in v2.27.7).
//
// The rules are those of GNU getopt_long without abbreviation and without
// bundling: "--name value", "--name=value", "-n value", "-n=value"; "--" ends the
// flags; "-" alone is an argument. A boolean flag takes no value. A value that
// begins with "-" needs the "=" form, so that "-r --json" is not a repository
// called "--json". A flag given twice has its last value, or both if it is a list.
//
// A request for help becomes the command "help".
func arrange(app *cli.App, argv []string) ([]string, error) {
	var global, local, args []string
	var cmd *cli.Command
	help, ended := false, false
	for i := 0; i < len(argv); i++ {
		arg := argv[i]
		switch {
		case !ended && arg == "--":
			ended = true
			continue
		case ended || arg == "-" || !strings.HasPrefix(arg, "-"):
			if cmd != nil {
				args = append(args, arg)
			} else if cmd = app.Command(arg); cmd == nil {
				return nil, unknownCommand(app, arg)
			}
			continue
		}
		name, value, hasValue := strings.Cut(arg, "=")
		if name == "--help" || name == "-h" {
			if hasValue {
				return nil, usagef("flag %s takes no value", name)
			}
			help = true
			continue
		}
		flag, own := findFlag(app, cmd, name)
		if flag == nil {
			return nil, unknownFlag(app, cmd, name)
		}
		ordered := "--" + flag.Names()[0]
		if !takesValue(flag) {
			if hasValue {
				return nil, withHint(usagef("flag %s takes no value", name), "write %s alone", name)
			}
		} else {
			if !hasValue {
				i++
				if i == len(argv) || len(argv[i]) > 1 && argv[i][0] == '-' {
					return nil, withHint(usagef("flag %s needs a value", name), "write %s=VALUE if the value begins with '-'", name)
				}
				value = argv[i]
			}
			ordered += "=" + value
		}
		if own {
			local = append(local, ordered)
		} else {
			global = append(global, ordered)
		}
	}
	if cmd == nil && !help {
		return nil, usagef("no command given")
	}
	if help {
		global, local, args = nil, nil, nil
		if cmd != nil {
			args = []string{cmd.Name}
		}
		cmd = app.Command("help")
	}
	ordered := append(global, cmd.Name)
	ordered = append(ordered, local...)
	ordered = append(ordered, "--")
	return append(ordered, args...), nil
}

// findFlag looks for a flag as it is written, "-r" or "--repo", among those of
// cmd, which may be nil, and the global ones. own says that it is one of cmd.
func findFlag(app *cli.App, cmd *cli.Command, written string) (flag cli.Flag, own bool) {
	if cmd != nil {
		for _, f := range cmd.Flags {
			if slices.Contains(spellings(f), written) {
				return f, true
			}
		}
	}
	for _, f := range app.Flags {
		if slices.Contains(spellings(f), written) {
			return f, false
		}
	}
	return nil, false
}

// spellings lists the ways to write a flag: one dash for one letter, else two.
func spellings(f cli.Flag) []string {
	var all []string
	for _, name := range f.Names() {
		if len(name) == 1 {
			all = append(all, "-"+name)
		} else {
			all = append(all, "--"+name)
		}
	}
	return all
}

// takesValue reports whether a flag is more than a switch.
func takesValue(f cli.Flag) bool {
	d, ok := f.(cli.DocGenerationFlag)
	return ok && d.TakesValue()
}

func unknownCommand(app *cli.App, name string) error {
	var known []string
	for _, c := range app.Commands {
		known = append(known, c.Name)
	}
	err := usagef("unknown command %q", name)
	if near := nearest(name, known); near != "" {
		return withHint(err, "did you mean 'holdfast %s'?", near)
	}
	return withHint(err, "'holdfast help' lists the commands")
}

func unknownFlag(app *cli.App, cmd *cli.Command, written string) error {
	if cmd == nil {
		return unknownGlobal(app, written)
	}
	known := []string{"--help"}
	for _, f := range slices.Concat(cmd.Flags, app.Flags) {
		known = append(known, spellings(f)...)
	}
	err := usagef("%s: unknown flag %s", cmd.Name, written)
	if near := nearestFlag(written, known); near != "" {
		return withHint(err, "did you mean %s?", near)
	}
	return withHint(err, "see 'holdfast help %s'", cmd.Name)
}

// unknownGlobal explains a flag that stands before the command and is none of
// the global ones. It may well be a flag of the command.
func unknownGlobal(app *cli.App, written string) error {
	err := usagef("unknown flag %s", written)
	bare := strings.TrimLeft(written, "-")
	if app.Command(bare) != nil {
		return withHint(err, "did you mean 'holdfast %s'?", bare)
	}
	for _, c := range app.Commands {
		if f, _ := findFlag(app, c, written); f != nil {
			return withHint(err, "flags of a command stand after its name: 'holdfast %s %s'", c.Name, written)
		}
	}
	known := []string{"--help"}
	for _, f := range app.Flags {
		known = append(known, spellings(f)...)
	}
	if near := nearestFlag(written, known); near != "" {
		return withHint(err, "did you mean %s?", near)
	}
	return withHint(err, "see 'holdfast help'")
}

// nearestFlag is nearest, blind to the number of dashes: "-repo" is "--repo".
func nearestFlag(written string, known []string) string {
	var bare []string
	for _, k := range known {
		if len(k) > 2 { // a single letter resembles every other
			bare = append(bare, strings.TrimLeft(k, "-"))
		}
	}
	if near := nearest(strings.TrimLeft(written, "-"), bare); near != "" {
		return "--" + near
	}
	return ""
}
