package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/term"
)

// maxPassword bounds a password file, so that a wrong path, such as that of a
// disk, is refused instead of read. 64 KiB
const maxPassword = 64 << 10

// password returns the password of an existing repository. It looks at, in this
// order: --password-file or HOLDFAST_PASSWORD_FILE, HOLDFAST_PASSWORD, the
// password_file of the config, a prompt. The first that is set decides, even if
// it turns out to be unusable: falling through would try a password that was not
// meant. Errors are accessErrors, or the context's.
func (c *call) password(ctx context.Context) ([]byte, error) {
	return c.findPassword(ctx, false)
}

// newPassword is password for a repository that is about to be made: a prompt
// asks twice.
func (c *call) newPassword(ctx context.Context) ([]byte, error) {
	return c.findPassword(ctx, true)
}

// toPassword returns the password of the repository that --to names. It looks at
// --to-password-file or HOLDFAST_TO_PASSWORD_FILE, HOLDFAST_TO_PASSWORD, a prompt; never at
// where the other one comes from.
func (c *call) toPassword(ctx context.Context) ([]byte, error) { return c.otherPassword(ctx, "to") }

// fromPassword does so for --from.
func (c *call) fromPassword(ctx context.Context) ([]byte, error) { return c.otherPassword(ctx, "from") }

// otherPassword returns the password of the repository that a flag names.
func (c *call) otherPassword(ctx context.Context, flag string) ([]byte, error) {
	variable := "HOLDFAST_" + strings.ToUpper(flag) + "_PASSWORD"
	return c.passwordIn(ctx, passwordPlaces{kind: "password", file: c.String(flag + "-password-file"), variable: variable,
		question: "Password of " + printable(c.String(flag)) + ": ",
		what:     "no password given for " + c.String(flag), hint: "use --" + flag + "-password-file FILE or " + variable + "_FILE"}, false)
}

func (c *call) findPassword(ctx context.Context, twice bool) ([]byte, error) {
	return c.passwordIn(ctx, passwordPlaces{kind: "password", file: c.passwordFile, variable: "HOLDFAST_PASSWORD", config: c.cfg.repository.passwordFile,
		question: "Password: ", what: "no password given", hint: "use --password-file FILE or HOLDFAST_PASSWORD_FILE"}, twice)
}

// passwordPlaces say where a password is looked for, in this order.
type passwordPlaces struct {
	kind     string // "password" or "token"
	file     string // of a flag or its variable; may be empty
	variable string // that holds the password
	config   string // file that the config names; may be empty
	question string
	// what is said when it is in none of them and nobody can be asked.
	what, hint string
}

func (c *call) passwordIn(ctx context.Context, in passwordPlaces, twice bool) ([]byte, error) {
	if in.file != "" {
		return c.secretFrom(in.kind, in.file)
	}
	// Set but empty is what "HOLDFAST_PASSWORD= holdfast …" and unset secrets
	// of CI systems leave behind: nothing was given.
	if p := os.Getenv(in.variable); p != "" {
		return []byte(p), nil
	}
	if in.config != "" {
		return c.secretFrom(in.kind, in.config)
	}
	if !c.canAsk() {
		return nil, withHint(&accessError{errors.New(in.what + " and no terminal to ask on")}, "%s", in.hint)
	}
	if twice {
		return c.promptTwice(ctx, in.question)
	}
	return c.prompt(ctx, in.question)
}

// canAsk reports whether there is a terminal to ask on.
func (c *call) canAsk() bool { return c.stdin != nil && term.IsTerminal(int(c.stdin.Fd())) }

// promptTwice asks for a new password: nobody sees what is typed.
func (c *call) promptTwice(ctx context.Context, question string) ([]byte, error) {
	p, err := c.prompt(ctx, question)
	if err != nil {
		return nil, err
	}
	again, err := c.prompt(ctx, "The same again: ")
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(p, again) {
		return nil, &accessError{errors.New("the two passwords differ")}
	}
	return p, nil
}

// passwordFrom reads a password file.
func (c *call) passwordFrom(path string) ([]byte, error) { return c.secretFrom("password", path) }

// secretFrom reads the file of a secret and warns of one that others can read.
func (c *call) secretFrom(kind, path string) ([]byte, error) {
	p, open, err := readPasswordFile(path)
	if err != nil {
		return nil, &accessError{fmt.Errorf("%s file: %w", kind, err)}
	}
	if open {
		c.progress.warn("%s file %s can be read by others; chmod 600 it", kind, path)
	}
	return p, nil
}

// readPasswordFile returns the content of the file without one newline, "\n" or
// "\r\n", at its end: editors add it, and nobody types it. open reports that the
// group or all may read the file; a pipe is never open.
func readPasswordFile(path string) (password []byte, open bool, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, false, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, false, err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxPassword+1))
	if err != nil {
		return nil, false, err
	}
	if len(b) > maxPassword {
		return nil, false, fmt.Errorf("%s: larger than %s", path, sizeText(maxPassword))
	}
	if line, ok := bytes.CutSuffix(b, []byte("\n")); ok {
		b = bytes.TrimSuffix(line, []byte("\r"))
	}
	if len(b) == 0 {
		return nil, false, fmt.Errorf("%s: empty", path)
	}
	return b, info.Mode().IsRegular() && info.Mode().Perm()&0o044 != 0, nil
}

// prompt asks on the terminal without echo.
func (c *call) prompt(ctx context.Context, question string) ([]byte, error) {
	fd := int(c.stdin.Fd())
	state, err := term.GetState(fd)
	if err != nil {
		return nil, &accessError{fmt.Errorf("ask for the password: %w", err)}
	}
	fmt.Fprint(c.stderr, question)
	type answer struct {
		password []byte
		err      error
	}
	answered := make(chan answer, 1)
	go func() {
		p, err := term.ReadPassword(fd)
		answered <- answer{p, err}
	}()
	var a answer
	select {
	case a = <-answered:
		fmt.Fprintln(c.stderr)
	case <-ctx.Done():
		// The read cannot be cancelled and ends with the process. The echo is
		// given back here, as the process may end first.
		_ = term.Restore(fd, state)
		fmt.Fprintln(c.stderr)
		return nil, context.Cause(ctx)
	}
	if a.err != nil && !errors.Is(a.err, io.EOF) {
		return nil, &accessError{fmt.Errorf("ask for the password: %w", a.err)}
	}
	if len(a.password) == 0 {
		return nil, &accessError{errors.New("no password typed")}
	}
	if len(a.password) > maxPassword {
		return nil, &accessError{errors.New("password too long")}
	}
	return a.password, nil
}

// ask asks for a line on the terminal.
func (c *call) ask(ctx context.Context, question string) (string, error) {
	fmt.Fprint(c.stderr, question)
	type answer struct {
		line string
		err  error
	}
	answered := make(chan answer, 1)
	go func() {
		line, err := bufio.NewReader(c.stdin).ReadString('\n')
		answered <- answer{strings.TrimSpace(line), err}
	}()
	select {
	case a := <-answered: // the read cannot be cancelled and ends with the process
		return a.line, a.err
	case <-ctx.Done():
		fmt.Fprintln(c.stderr)
		return "", context.Cause(ctx)
	}
}
