package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/urfave/cli/v2"
)

// shells lists the shells that completion is written for.
func shells() []string { return []string{"bash", "zsh", "fish"} }

// runCompletion writes a script for a shell. It is made from the command table,
// so it can offer neither more nor less than the parser takes.
func runCompletion(_ context.Context, c *call) error {
	switch shell := c.args[0]; shell {
	case "bash":
		writeBash(c.out.w, c.commands)
	case "zsh":
		writeZsh(c.out.w, c.commands)
	case "fish":
		writeFish(c.out.w, c.commands)
	default:
		return withHint(usagef("completion: unknown shell %q", shell), "choose one of %s", strings.Join(shells(), ", "))
	}
	return nil
}

// offer is one flag as a shell offers it.
type offer struct {
	spellings []string
	usage     string
	value     bool
	repeats   bool
	words     words // of the value
}

// offers lists flags in the order in which the table has them.
func offers(flags []cli.Flag) []offer {
	var all []offer
	for _, f := range flags {
		o := offer{spellings: spellings(f), value: takesValue(f)}
		if d, ok := f.(cli.DocGenerationFlag); ok {
			o.usage = strings.ReplaceAll(d.GetUsage(), "`", "")
		}
		switch f := f.(type) {
		case *choiceFlag:
			o.words.list = f.choices
		case *cli.StringFlag:
			o.words.files = f.TakesFile
		case *cli.StringSliceFlag:
			o.repeats = true
		}
		all = append(all, o)
	}
	return all
}

// helpOffer is the flag that the parser takes by itself.
func helpOffer() offer {
	return offer{spellings: []string{"--help", "-h"}, usage: "show help"}
}

// quote makes s one word of any of the three shells.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// writeBash needs bash 4, not the bash-completion package. Bash splits words at
// "=", so "--repo=x" arrives as three.
func writeBash(w io.Writer, cmds []command) {
	global := append(offers(globalFlags()), helpOffer())
	fmt.Fprint(w, `# bash completion for holdfast
_holdfast() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} command= flags= list= files= ended= i
    if [[ $cur == = ]]; then
        cur=
    elif [[ $prev == = ]]; then
        prev=${COMP_WORDS[COMP_CWORD-2]}
    fi
    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${COMP_WORDS[i]} in
`)
	var valued []string
	for _, o := range global {
		if o.value {
			valued = append(valued, o.spellings...)
		}
	}
	fmt.Fprintf(w, "            %s) [[ -z $command ]] && ((i++)); [[ ${COMP_WORDS[i]} == = ]] && ((i++)) ;;\n", strings.Join(valued, "|"))
	fmt.Fprint(w, `            --) ended=1 ;;
            -*|=) ;;
            *) [[ -z $command ]] && command=${COMP_WORDS[i]} ;;
        esac
    done
    case $command in
`)
	fmt.Fprintf(w, "        '') list=%s ;;\n", quote(commandNames(cmds)))
	for _, c := range cmds {
		fmt.Fprintf(w, "        %s) flags=%s list=%s files=%s ;;\n", c.name, quote(flagWords(offers(c.flags))),
			quote(strings.Join(c.completes.list, " ")), yes(c.completes.files))
	}
	fmt.Fprintf(w, `    esac
    flags="$flags %s"
    if [[ -z $ended ]]; then
        case "$command $prev" in
`, flagWords(global))
	for _, c := range cmds {
		writeBashValues(w, c.name, offers(c.flags))
	}
	writeBashValues(w, "*", global)
	fmt.Fprint(w, `            *) [[ $cur == -* ]] && list=$flags files= ;;
        esac
    fi
    COMPREPLY=()
    if [[ -n $files ]]; then
        compopt -o filenames 2>/dev/null
        mapfile -t COMPREPLY < <(compgen -f -- "$cur")
    elif [[ -n $list ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$list" -- "$cur")
    fi
}
complete -F _holdfast holdfast
`)
}

// writeBashValues says what the values of the flags of a command are.
func writeBashValues(w io.Writer, command string, flags []offer) {
	for _, o := range flags {
		if !o.value {
			continue
		}
		var patterns []string
		for _, s := range o.spellings {
			patterns = append(patterns, command+`" `+s+`"`)
		}
		fmt.Fprintf(w, "            %s) list=%s files=%s ;;\n", strings.Join(patterns, "|"),
			quote(strings.Join(o.words.list, " ")), yes(o.words.files))
	}
}

func yes(b bool) string {
	if b {
		return "1"
	}
	return ""
}

func commandNames(cmds []command) string {
	var names []string
	for _, c := range cmds {
		names = append(names, c.name)
	}
	return strings.Join(names, " ")
}

func flagWords(flags []offer) string {
	var all []string
	for _, o := range flags {
		all = append(all, o.spellings...)
	}
	return strings.Join(all, " ")
}

// writeZsh works both as a file "_holdfast" of fpath and when sourced.
func writeZsh(w io.Writer, cmds []command) {
	fmt.Fprintf(w, `#compdef holdfast
_holdfast() {
    local curcontext=$curcontext state line
    local -a global commands
    global=(%s)
    commands=(
`, zshFlags(append(offers(globalFlags()), helpOffer())))
	for _, c := range cmds {
		fmt.Fprintf(w, "        %s\n", quote(c.name+":"+c.short))
	}
	fmt.Fprint(w, `    )
    _arguments -C $global '1: :->command' '*:: :->argument'
    case $state in
    command) _describe command commands ;;
    argument)
        case $words[1] in
`)
	for _, c := range cmds {
		fmt.Fprintf(w, "        %s) _arguments $global %s %s ;;\n", c.name, zshFlags(offers(c.flags)),
			quote("*:argument:"+zshAction(c.completes)))
	}
	fmt.Fprint(w, `        esac ;;
    esac
}
if [[ $funcstack[1] == _holdfast ]]; then
    _holdfast "$@"
else
    compdef _holdfast holdfast
fi
`)
}

// zshFlags writes flags the way _arguments of zsh wants them.
func zshFlags(flags []offer) string {
	var specs []string
	for _, o := range flags {
		for _, s := range o.spellings {
			spec := "(" + strings.Join(o.spellings, " ") + ")" + s
			if o.repeats {
				spec = "*" + s
			}
			if o.value {
				spec += "="
			}
			spec += "[" + strings.NewReplacer("[", `\[`, "]", `\]`).Replace(o.usage) + "]"
			if o.value {
				spec += ":value:" + zshAction(o.words)
			}
			specs = append(specs, quote(spec))
		}
	}
	return strings.Join(specs, " ")
}

func zshAction(w words) string {
	switch {
	case w.files:
		return "_files"
	case len(w.list) > 0:
		return "(" + strings.Join(w.list, " ") + ")"
	}
	return " "
}

func writeFish(w io.Writer, cmds []command) {
	fmt.Fprintln(w, "# fish completion for holdfast\ncomplete -c holdfast -f")
	writeFishFlags(w, "", append(offers(globalFlags()), helpOffer()))
	for _, c := range cmds {
		fmt.Fprintf(w, "complete -c holdfast -n __fish_use_subcommand -a %s -d %s\n", c.name, quote(c.short))
		seen := " -n " + quote("__fish_seen_subcommand_from "+c.name)
		writeFishFlags(w, seen, offers(c.flags))
		if c.completes.files {
			fmt.Fprintf(w, "complete -c holdfast%s -F\n", seen)
		}
		if len(c.completes.list) > 0 {
			fmt.Fprintf(w, "complete -c holdfast%s -a %s\n", seen, quote(strings.Join(c.completes.list, " ")))
		}
	}
}

// writeFishFlags offers flags where the condition, an argument of complete, holds.
func writeFishFlags(w io.Writer, condition string, flags []offer) {
	for _, o := range flags {
		line := "complete -c holdfast" + condition
		for _, s := range o.spellings {
			if long, ok := strings.CutPrefix(s, "--"); ok {
				line += " -l " + long
			} else {
				line += " -s " + s[1:]
			}
		}
		switch {
		case o.words.files:
			line += " -r -F"
		case len(o.words.list) > 0:
			line += " -x -a " + quote(strings.Join(o.words.list, " "))
		case o.value:
			line += " -x"
		}
		fmt.Fprintln(w, line+" -d "+quote(o.usage))
	}
}
