package main

import (
	"context"
	"errors"
	"net"
	"strings"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/remote/agent"
)

// awayScheme begins the name of a repository behind a server on another host.
const awayScheme = "tls://"

// isAway reports whether a repository is on another host.
func isAway(repo string) bool { return strings.HasPrefix(repo, awayScheme) }

// onlyAdds refuses what a token cannot do.
func onlyAdds(what, repo string) error {
	return withHint(&accessError{errors.New(what + ": " + repo + " is a server on another host, and a token only adds restore points to its repository")},
		"run it where the repository is")
}

// away is the repository of the call behind its server.
func (c *call) away(ctx context.Context) (backup.Target, error) {
	addr := strings.TrimPrefix(c.repo, awayScheme)
	if _, port, err := net.SplitHostPort(addr); err != nil || port == "" || strings.Contains(port, "/") {
		return nil, withHint(usagef("%s names no server", c.repo), "write %sHOST:PORT", awayScheme)
	}
	if c.String("lock-for") != "" {
		return nil, withHint(usagef("backup: --lock-for: %v", backup.ErrNoLock), "set backup: {lock_for: …} in the config of the server")
	}
	if !c.cfg.backup.lockFor.IsZero() {
		c.progress.warn("lock_for in the config has no effect: %v", backup.ErrNoLock)
	}
	if err := agent.CheckTags(c.StringSlice("tag")); err != nil {
		return nil, usagef("--tag: %v", err)
	}
	text, err := c.passwordIn(ctx, passwordPlaces{kind: "token", file: c.String("token-file"), variable: "HOLDFAST_TOKEN",
		config: c.cfg.repository.tokenFile, question: "Token: ",
		what: "no token given", hint: "use --token-file FILE or HOLDFAST_TOKEN_FILE; 'holdfast agent-token add' at the repository makes one"}, false)
	if err != nil {
		return nil, err
	}
	token, err := agent.ParseToken(string(text))
	if err != nil {
		return nil, withHint(&accessError{err}, "'holdfast agent-token add' at the repository makes one")
	}
	return backup.Away(agent.Client{Addr: addr, Token: token}), nil
}

// withTarget runs fn with what points are added to: the repository, or the server of one.
func (c *call) withTarget(ctx context.Context, fn func(to backup.Target) error) error {
	if isAway(c.repo) {
		to, err := c.away(ctx)
		if err != nil {
			return err
		}
		return fn(to)
	}
	return c.withRepo(ctx, func(r *store.Repo) error { return fn(backup.Local(r)) })
}
