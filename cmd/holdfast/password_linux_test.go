package main

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
)

// TestPrompt types passwords.
func TestPrompt(t *testing.T) {
	for _, c := range []struct {
		name  string
		twice bool
		typed []string
		want  string
		err   string
	}{
		{"once", false, []string{"open sesame\n"}, "open sesame", ""},
		{"twice", true, []string{"open\n", "open\n"}, "open", ""},
		{"differing", true, []string{"open\n", "Open\n"}, "", "differ"},
		{"nothing", false, []string{"\n"}, "", "no password typed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Setenv("HOLDFAST_PASSWORD", "")
			x := newTerminal(t, 80, 24)
			call := &call{env: env{stdin: x.tty, stderr: x.tty}}
			var got []byte
			var err error
			asked := make(chan struct{})
			go func() {
				defer close(asked)
				got, err = call.findPassword(t.Context(), c.twice)
			}()
			for i, s := range c.typed {
				waitFor(t, "a prompt without echo", func() bool {
					return strings.Count(x.output(), ": ") == i+1 && !x.echoes(t)
				})
				if _, err := x.other.WriteString(s); err != nil {
					t.Fatal(err)
				}
			}
			<-asked
			if !x.echoes(t) {
				t.Error("the echo is still off")
			}
			if string(got) != c.want || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Errorf("%q, %v", got, err)
			}
			if err != nil && !isType[*accessError](err) {
				t.Errorf("%v has exit code 1", err)
			}
			x.hangUp()
			if out := x.output(); slices.ContainsFunc(c.typed, func(s string) bool {
				return len(s) > 1 && strings.Contains(out, strings.TrimSpace(s))
			}) {
				t.Errorf("the password was shown: %q", out)
			}
		})
	}
}

// TestPromptInterrupted: a cancelled prompt returns at once and gives the echo back.
func TestPromptInterrupted(t *testing.T) {
	t.Setenv("HOLDFAST_PASSWORD", "")
	x := newTerminal(t, 80, 24)
	ctx, cancel := context.WithCancelCause(t.Context())
	call := &call{env: env{stdin: x.tty, stderr: x.tty}}
	asked := make(chan error)
	go func() {
		_, err := call.password(ctx)
		asked <- err
	}()
	waitFor(t, "a prompt without echo", func() bool { return !x.echoes(t) })
	cancel(errInterrupted)
	if err := <-asked; !errors.Is(err, errInterrupted) {
		t.Error(err)
	}
	if !x.echoes(t) {
		t.Error("the echo is still off")
	}
	_, _ = x.other.WriteString("\n") // ends the read that is left behind
}
