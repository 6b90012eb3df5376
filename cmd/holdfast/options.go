package main

import "github.com/urfave/cli/v2"

// options are the flags that every command has.
type options struct {
	repoFlag, configFile, passwordFile string
	json, quiet, verbose, noProgress   bool
}

// globalFlags are accepted before and after the name of the command.
func globalFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "repo", Aliases: []string{"r"}, EnvVars: []string{"HOLDFAST_REPO"}, TakesFile: true,
			Usage: "`DIR` of the repository; for backup also tls://HOST:PORT"},
		&cli.StringFlag{Name: "config", EnvVars: []string{"HOLDFAST_CONFIG"}, TakesFile: true,
			Usage: "config `FILE` (default: /etc/holdfast/config.yaml, if it exists)"},
		&cli.StringFlag{Name: "password-file", EnvVars: []string{"HOLDFAST_PASSWORD_FILE"}, TakesFile: true,
			Usage: "`FILE` with the password of the repository"},
		&cli.BoolFlag{DisableDefaultText: true, Name: "json", Usage: "print results as JSON, one object per line"},
		&cli.BoolFlag{DisableDefaultText: true, Name: "quiet", Usage: "print neither progress nor notes, only results, warnings and errors"},
		&cli.BoolFlag{DisableDefaultText: true, Name: "verbose", Aliases: []string{"v"}, Usage: "print more; with --json also progress, as JSON on stderr"},
		&cli.BoolFlag{DisableDefaultText: true, Name: "no-progress", Usage: "print no progress"},
	}
}
