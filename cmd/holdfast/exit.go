package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/fs/boot"
	"github.com/holdfast-backup/holdfast/fs/boot/qemu"
	"github.com/holdfast-backup/holdfast/fs/extract"
	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/volume"
	"github.com/holdfast-backup/holdfast/fs/overlay"
	"github.com/holdfast-backup/holdfast/fs/vdisk"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
	"github.com/holdfast-backup/holdfast/store/remote/agent"
	"github.com/holdfast-backup/holdfast/vsphere"
	"github.com/holdfast-backup/holdfast/vsphere/vddk"
)

// Exit codes, a contract that scripts build on. 2 is left out because shells
// and the Go runtime use it for their own failures.
const (
	exitOK           = 0
	exitFailed       = 1   // nothing more specific below fits
	exitPartly       = 3   // some of the work was done, the rest failed
	exitDamage       = 4   // the repository or a point has damaged bytes
	exitNoRepository = 10  // the path holds no repository
	exitLocked       = 11  // another process holds what is needed
	exitAccess       = 12  // the password or token is missing or wrong, or does not allow it
	exitUsage        = 64  // the command line or the config file is wrong; nothing was touched
	exitInterrupted  = 130 // SIGINT or SIGTERM
)

// What a command returns, wrapped or as it is, to end with the code of the same name.
var (
	errPartlyDone  = errors.New("partly done")
	errDamageFound = errors.New("damage found")
	errInterrupted = errors.New("interrupted")
)

// failure says how errors of one kind end the program.
type failure struct {
	is   func(error) bool
	code int
	hint string // shown when the error carries none of its own; may be empty
}

// failures lists every kind of error with an exit code of its own. The first
// match wins, all others are exitFailed. Errors of other packages that users
// can act on belong here and nowhere else.
func failures() []failure {
	return []failure{
		{isAny(errInterrupted, context.Canceled), exitInterrupted, ""},
		{isAny(errDamageFound), exitDamage, ""},
		{isAny(errPartlyDone), exitPartly, ""},
		{isType[*usageError], exitUsage, "see 'holdfast help'"},
		{isType[*configError], exitUsage, ""},
		{isAny(backup.ErrSameRepository), exitUsage, "name another repository with --to"},
		{isType[*accessError], exitAccess, ""},
		{isAny(store.ErrPassphrase), exitAccess, ""},
		{isAny(vsphere.ErrLogin), exitAccess, "user and password_file of the source in the config name the account"},
		{isAny(vsphere.ErrUntrusted), exitAccess, "name the authority's certificate as ca_file, or, once you know that the thumbprint is the server's, that as thumbprint"},
		{isAny(vsphere.ErrNoPrivilege), exitAccess, "give the account a role with that privilege; README lists all"},
		{isAny(vsphere.ErrNoTarget), exitFailed, "name another one: --datastore, --network, --folder, --pool"},
		{isAny(vsphere.ErrRunning), exitFailed, "shut the VM down first"},
		{isAny(vsphere.ErrNoWrite), exitFailed, "name vddk_libdir in the config, or restore it as a new VM: without --in-place"},
		{isAny(vsphere.ErrAmbiguous), exitFailed, "'holdfast vms --source NAME' shows names that are unique"},
		{isAny(agent.ErrOtherServer), exitAccess, "the token is of another repository, or somebody else answers at this address; it was not sent"},
		{isAny(store.ErrToken, agent.ErrVM), exitAccess, "at the repository 'holdfast agent-token list' shows what tokens there are and which VMs they are for"},
		{isAny(store.ErrNoRepository), exitNoRepository, "'holdfast init DIR' makes a repository"},
		{isAny(boot.ErrServed, overlay.ErrBusy), exitLocked, "end the process that serves it, or use the boot through that: 'holdfast boot ls'"},
		{isAny(qemu.ErrNotInstalled), exitFailed, "on Debian: apt-get install qemu-system-x86 ovmf"},
		{isAny(boot.ErrNoBoot), exitFailed, "'holdfast boot ls' shows the names"},
		{isAny(store.ErrLocked), exitLocked, "end the process that holds it, or wait for it"},
		{isAny(store.ErrNewerFormat), exitFailed, "use a newer holdfast"},
		{isAny(store.ErrDamaged), exitDamage, "'holdfast verify --read-data' lists all damage"},
		{isAny(volume.ErrLocked), exitAccess, "give its passphrase or key with --guest-key-file"},
		{isAny(store.ErrLockedPoint), exitFailed, "no command lifts a lock or makes it shorter: it ends by itself"},
		{isAny(store.ErrLastKey), exitFailed, "'holdfast key add' or 'holdfast key recovery' makes another one first"},
		{isAny(store.ErrKeyInUse), exitFailed, "open the repository with another password to remove this one, or use 'holdfast key change'"},
		{isAny(store.ErrAmbiguous), exitFailed, "give more digits of the id"},
		{isAny(bucket.ErrFull), exitFailed, "free some space; what was stored so far is found again by the next run"},
		{isAny(bucket.ErrReadOnly), exitFailed, "the repository cannot be written: check its mount and its owner"},
		{isAny(store.ErrUnsure), exitFailed, "'holdfast key list' shows whether it was"},
		{isAny(agent.ErrUnreachable), exitFailed, "is 'holdfast serve' running there, and do firewalls let this port through?"},
		{isAny(agent.ErrVersion), exitFailed, "use the same version of holdfast on both hosts"},
		{isAny(agent.ErrGone), exitFailed, "the messages of 'holdfast serve' may say why; run the backup again"},
		{isAny(guest.ErrDamaged), exitDamage, "the guest's own file system is damaged there; its fsck or chkdsk says more"},
		{isAny(extract.ErrExists), exitFailed, "nothing is overwritten: name another place"},
		{isAny(backup.ErrTargetExists), exitFailed, "nothing is overwritten: name another place, or restore --onto it"},
		{isAny(vdisk.ErrRefused), exitFailed, "if you trust the image, use --allow-outside-backing"},
	}
}

// isAny matches errors that wrap one of the sentinels.
func isAny(sentinels ...error) func(error) bool {
	return func(err error) bool {
		for _, s := range sentinels {
			if errors.Is(err, s) {
				return true
			}
		}
		return false
	}
}

// isType matches errors that wrap a T.
func isType[T error](err error) bool {
	_, ok := errors.AsType[T](err)
	return ok
}

// explain maps an error to the exit code and to the text that a user sees. The
// hint nearest to the surface of err wins over the one of the table.
func explain(err error) (code int, message, hint string) {
	if err == nil {
		return exitOK, "", ""
	}
	code, message = exitFailed, err.Error()
	for _, f := range failures() {
		if f.is(err) {
			code, hint = f.code, f.hint
			break
		}
	}
	if e, ok := errors.AsType[*exitError](err); ok {
		code = e.code
	}
	if v, ok := errors.AsType[*vddk.Error](err); ok && v.Hint != "" {
		hint = v.Hint
	}
	if h, ok := errors.AsType[*hinted](err); ok {
		hint = h.hint
	}
	if code == exitInterrupted {
		// "context canceled" means nothing to a user who pressed Ctrl-C.
		message = errInterrupted.Error()
	}
	return code, message, hint
}

// report prints err for a user and returns the exit code. Every line of a
// message gets the prefix, so that logs of several programs can be told apart.
func report(w io.Writer, err error) int {
	code, message, hint := explain(err)
	if err == nil {
		return code
	}
	for line := range strings.Lines(message) {
		fmt.Fprintf(w, "holdfast: %s\n", printable(strings.TrimSuffix(line, "\n")))
	}
	if hint != "" {
		fmt.Fprintf(w, "hint: %s\n", printable(hint))
	}
	return code
}

// hinted is an error and what its user can do about it.
type hinted struct {
	err  error
	hint string
}

func (h *hinted) Error() string { return h.err.Error() }
func (h *hinted) Unwrap() error { return h.err }

// withHint adds to err what its user can do about it.
func withHint(err error, format string, a ...any) error {
	return &hinted{err, fmt.Sprintf(format, a...)}
}

// usageError is a command line that does not say anything that can be done.
type usageError struct{ message string }

func (e *usageError) Error() string { return e.message }

func usagef(format string, a ...any) error {
	return &usageError{fmt.Sprintf(format, a...)}
}

// accessError is a password or token that could not be had, was not accepted, or does not allow it.
type accessError struct{ err error }

func (e *accessError) Error() string { return e.err.Error() }
func (e *accessError) Unwrap() error { return e.err }

// interruptible returns a context that the first SIGINT or SIGTERM cancels, with
// errInterrupted as its cause. A second signal calls kill at once: clean-up that
// hangs must not hold the user. stop gives the signals back and may be called twice.
func interruptible(parent context.Context, kill func(code int)) (ctx context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(parent)
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	done := make(chan struct{})
	go func() {
		select {
		case <-signals:
			cancel(errInterrupted)
		case <-done:
			return
		}
		select {
		case <-signals:
			kill(exitInterrupted)
		case <-done:
		}
	}()
	return ctx, sync.OnceFunc(func() {
		signal.Stop(signals)
		close(done)
		cancel(nil)
	})
}

// interruption turns whatever error a cancelled run ended with into an
// interruption: "write: broken pipe" after Ctrl-C is no failure of its own. A run
// that ended without an error despite the signal, as a mount does, stays a success.
func interruption(ctx context.Context, err error) error {
	if err == nil || !errors.Is(context.Cause(ctx), errInterrupted) || errors.Is(err, errInterrupted) {
		return err
	}
	return fmt.Errorf("%w: %w", errInterrupted, err)
}
