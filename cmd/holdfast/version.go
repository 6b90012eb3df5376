package main

import (
	"context"
	"fmt"
	"runtime/debug"

	"github.com/urfave/cli/v2"
)

// build is what the binary knows of itself.
type build struct {
	Type     string `json:"type"` // "version"
	Version  string `json:"version"`
	Commit   string `json:"commit,omitempty"`
	Modified bool   `json:"modified"` // the tree had changes that are not in Commit
	Go       string `json:"go"`
	OS       string `json:"os,omitempty"`
	Arch     string `json:"arch,omitempty"`
}

func runVersion(_ context.Context, c *call) error {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		info = &debug.BuildInfo{}
	}
	b := buildOf(info)
	c.out.line("%s", b)
	return c.out.object(b)
}

func buildOf(info *debug.BuildInfo) build {
	b := build{Type: "version", Version: info.Main.Version, Go: info.GoVersion}
	if b.Version == "" {
		b.Version = "(devel)"
	}
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			b.Commit = s.Value
		case "vcs.modified":
			b.Modified = s.Value == "true"
		case "GOOS":
			b.OS = s.Value
		case "GOARCH":
			b.Arch = s.Value
		}
	}
	return b
}

func (b build) String() string {
	s := "holdfast " + b.Version
	if b.Commit != "" {
		s += ", commit " + b.Commit
		if b.Modified {
			s += " with changes"
		}
	}
	return fmt.Sprintf("%s, %s %s/%s", s, b.Go, b.OS, b.Arch)
}

// programVersion is what points record as their maker.
func programVersion() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "holdfast"
	}
	return "holdfast " + buildOf(info).Version
}

// runHelp prints the help of one command, or of all.
func runHelp(_ context.Context, c *call) error {
	if len(c.args) == 0 {
		cli.HelpPrinter(c.out.w, cli.AppHelpTemplate, c.App)
		return nil
	}
	cmd := c.App.Command(c.args[0])
	if cmd == nil {
		return unknownCommand(c.App, c.args[0])
	}
	cli.HelpPrinter(c.out.w, cmd.CustomHelpTemplate, cmd)
	return nil
}
