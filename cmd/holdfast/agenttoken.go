package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/remote/agent"
)

// tokenActions are what `holdfast agent-token` can be told to do.
func tokenActions() []string { return []string{"list", "add", "remove"} }

// checkToken refuses what no action takes.
func checkToken(c *call) error {
	action, rest := c.args[0], c.args[1:]
	takes := 0
	switch action {
	case "list", "add":
	case "remove":
		takes = 1
	default:
		err := usagef("agent-token: unknown action %q", action)
		if near := nearest(action, tokenActions()); near != "" {
			return withHint(err, "did you mean 'holdfast agent-token %s'?", near)
		}
		return err
	}
	switch {
	case len(rest) < takes:
		return withHint(usagef("agent-token remove: which one?"), "'holdfast agent-token list' shows the ids")
	case len(rest) > takes:
		return usagef("agent-token %s: too many arguments", action)
	}
	if action != "add" {
		for _, name := range []string{"label", "vm", "expires"} {
			if c.IsSet(name) {
				return usagef("agent-token %s takes no --%s", action, name)
			}
		}
	}
	if _, err := c.tokenExpiry(); err != nil {
		return usagef("--expires: %v", err)
	}
	if err := store.CheckAgentVMs(c.StringSlice("vm")); err != nil {
		return usagef("--vm: %v", err)
	}
	return nil
}

// tokenExpiry is after how long a token ends; zero for never.
func (c *call) tokenExpiry() (backup.Duration, error) {
	if s := c.String("expires"); s != "" {
		return backup.ParseDuration(s)
	}
	return backup.Duration{}, nil
}

func runToken(ctx context.Context, c *call) error {
	return c.withRepo(ctx, func(r *store.Repo) error {
		switch c.args[0] {
		case "add":
			return c.addToken(ctx, r)
		case "remove":
			return c.removeToken(ctx, r, c.args[1])
		}
		return c.listTokens(ctx, r)
	})
}

func (c *call) listTokens(ctx context.Context, r *store.Repo) error {
	list, err := r.Agents(ctx)
	if err != nil {
		return err
	}
	t := newTable("ID", "CREATED", "EXPIRES", "STATE", "VMS", "LABEL")
	for _, a := range list {
		state, expires := "valid", "never"
		if !a.Expires.IsZero() {
			expires = timeText(a.Expires)
		}
		switch {
		case a.Forged:
			state = "REFUSED: not made with a key of this repository, or by a newer holdfast"
		case a.Expired(c.clock.now()):
			state = "expired"
		}
		t.row(a.ID, timeText(a.Created), expires, state, strings.Join(a.VMs, " "), a.Label)
		if err := c.tokenObject("agent_token", a, ""); err != nil {
			return err
		}
	}
	c.out.table(t)
	return nil
}

// tokenObject prints a token as JSON, and its text when it has just been made.
func (c *call) tokenObject(what string, a store.AgentInfo, text string) error {
	return c.out.object(struct {
		Type string `json:"type"`
		store.AgentInfo
		Expired bool   `json:"expired,omitempty"`
		Token   string `json:"token,omitempty"`
	}{what, a, a.Expired(c.clock.now()), text})
}

// addToken shows the token once. If it cannot be shown it is removed again: nobody would ever have it.
func (c *call) addToken(ctx context.Context, r *store.Repo) error {
	info := store.AgentInfo{Label: c.String("label"), VMs: c.StringSlice("vm")}
	after, err := c.tokenExpiry()
	if err != nil {
		return err
	}
	if !after.IsZero() {
		info.Expires = after.After(c.clock.now())
	}
	secret, info, err := r.AddAgent(ctx, info, c.clock.now())
	if err != nil {
		return err
	}
	token, err := agent.NewToken(r, info, secret)
	if err == nil {
		c.out.line("%s", token.Text())
		err = c.tokenObject("agent_token_added", info, token.Text())
	}
	if err == nil {
		err = c.out.flush()
	}
	if err != nil {
		return errors.Join(fmt.Errorf("print the token: %w", err), r.RemoveAgent(context.WithoutCancel(ctx), info.ID))
	}
	c.progress.note("token %s adds restore points through 'holdfast serve' and does nothing else; it is shown only now: put it into a file of mode 600 on the helper's host", info.ID)
	if len(info.VMs) == 0 {
		c.progress.note("it may add to any VM that nobody else has backed up; --vm PATTERN names the ones it is for")
	}
	return nil
}

func (c *call) removeToken(ctx context.Context, r *store.Repo, id string) error {
	switch err := r.RemoveAgent(ctx, id); {
	case errors.Is(err, store.ErrNotExist):
		return withHint(err, "'holdfast agent-token list' shows the ids")
	case err != nil:
		return err
	}
	c.out.line("token %s removed", id)
	return c.out.object(struct {
		Type string `json:"type"`
		ID   string `json:"id"`
	}{"agent_token_removed", id})
}
