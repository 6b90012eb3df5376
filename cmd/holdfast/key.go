package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/holdfast-backup/holdfast/store"
)

// keyActions are what `holdfast key` can be told to do.
func keyActions() []string { return []string{"list", "add", "remove", "change", "recovery"} }

// checkKey refuses what no action takes.
func checkKey(c *call) error {
	action, rest := c.args[0], c.args[1:]
	takes := 0
	switch action {
	case "list", "add", "change", "recovery":
	case "remove":
		takes = 1
	default:
		err := usagef("key: unknown action %q", action)
		if near := nearest(action, keyActions()); near != "" {
			return withHint(err, "did you mean 'holdfast key %s'?", near)
		}
		return err
	}
	switch {
	case len(rest) < takes:
		return withHint(usagef("key remove: which one?"), "'holdfast key list' shows the ids")
	case len(rest) > takes:
		// What stands here may be a password, so it is not repeated.
		return withHint(usagef("key %s: too many arguments", action), "a password is never an argument: use --new-password-file FILE")
	case action != "add" && action != "change" && c.IsSet("label"):
		return usagef("key %s takes no --label", action)
	}
	return nil
}

func runKey(ctx context.Context, c *call) error {
	return c.withRepo(ctx, func(r *store.Repo) error {
		// Before anybody is asked for a new password in vain.
		list, err := r.Keys(ctx)
		if err != nil {
			return err
		}
		switch c.args[0] {
		case "add":
			return c.addKey(ctx, r)
		case "remove":
			return c.removeKey(ctx, r, c.args[1])
		case "change":
			return c.changeKey(ctx, r, list)
		case "recovery":
			return c.addRecoveryKey(ctx, r)
		}
		return c.listKeys(list)
	})
}

func (c *call) listKeys(list []store.KeyInfo) error {
	t := newTable("ID", "CREATED", "KIND", "IN USE", "LABEL")
	for _, k := range list {
		kind, used := "password", ""
		if k.Recovery {
			kind = "recovery key"
		}
		if k.InUse {
			used = "yes"
		}
		t.row(k.ID, timeText(k.Created), kind, used, k.Label)
		if err := c.keyObject("key", k, ""); err != nil {
			return err
		}
	}
	c.out.table(t)
	return nil
}

// keyObject prints a key as JSON, and the secret when it has just been made.
func (c *call) keyObject(what string, k store.KeyInfo, secret string) error {
	return c.out.object(struct {
		Type string `json:"type"`
		store.KeyInfo
		Secret string `json:"recovery_key,omitempty"`
	}{what, k, secret})
}

func (c *call) addKey(ctx context.Context, r *store.Repo) error {
	p, err := c.replacement(ctx)
	if err != nil {
		return err
	}
	k, err := r.AddKey(ctx, p, c.String("label"), c.clock.now())
	if err != nil {
		return err
	}
	c.out.line("key %s added: its password opens the repository, too", k.ID)
	return c.keyObject("key_added", k, "")
}

func (c *call) changeKey(ctx context.Context, r *store.Repo, list []store.KeyInfo) error {
	was := ""
	for _, k := range list {
		if k.InUse {
			was = k.ID
		}
		if k.InUse && k.Recovery {
			return withHint(fmt.Errorf("the repository was opened with recovery key %s: that is no password to change", k.ID),
				"'holdfast key add' adds a password, then 'holdfast key remove' the lost one")
		}
	}
	p, err := c.replacement(ctx)
	if err != nil {
		return err
	}
	k, err := r.ChangeKey(ctx, p, c.String("label"), c.clock.now())
	if err != nil {
		return err
	}
	c.out.line("password changed: key %s takes the place of %s", k.ID, was)
	c.noteOldConfigs()
	return c.keyObject("key_changed", k, "")
}

func (c *call) removeKey(ctx context.Context, r *store.Repo, id string) error {
	switch err := r.RemoveKey(ctx, id); {
	case errors.Is(err, store.ErrNotExist):
		return withHint(err, "'holdfast key list' shows the ids")
	case err != nil:
		return err
	}
	c.out.line("key %s removed", id)
	c.noteOldConfigs()
	return c.out.object(struct {
		Type string `json:"type"`
		ID   string `json:"id"`
	}{"key_removed", id})
}

func (c *call) noteOldConfigs() {
	c.progress.note("the old password still works with any copy of the repository's config from before")
}

// addRecoveryKey shows the key once. If it cannot be shown it is removed again: nobody
// would ever know it.
func (c *call) addRecoveryKey(ctx context.Context, r *store.Repo) error {
	secret, k, err := r.AddRecoveryKey(ctx, c.clock.now())
	if err != nil {
		return err
	}
	c.out.line("%s", secret)
	err = c.keyObject("recovery_key", k, secret)
	if err == nil {
		err = c.out.flush()
	}
	if err != nil {
		return errors.Join(fmt.Errorf("print the recovery key: %w", err), r.RemoveKey(context.WithoutCancel(ctx), k.ID))
	}
	c.progress.note("recovery key %s opens the repository wherever its password is asked for; spaces, dashes and case do not matter", k.ID)
	c.progress.note("it is shown only now: keep it on paper, away from the repository; 'holdfast key remove %s' ends it", k.ID)
	return nil
}

// replacement returns a password that the repository is to have: that of --new-password-file
// or HOLDFAST_NEW_PASSWORD_FILE, HOLDFAST_NEW_PASSWORD, or of a prompt that asks twice.
// As with password, the first that is set decides.
func (c *call) replacement(ctx context.Context) ([]byte, error) {
	if file := c.String("new-password-file"); file != "" {
		return c.passwordFrom(file)
	}
	if p := os.Getenv("HOLDFAST_NEW_PASSWORD"); p != "" {
		return []byte(p), nil
	}
	if !c.canAsk() {
		return nil, withHint(&accessError{errors.New("no new password given and no terminal to ask on")},
			"use --new-password-file FILE or HOLDFAST_NEW_PASSWORD_FILE")
	}
	return c.promptTwice(ctx, "New password: ")
}
