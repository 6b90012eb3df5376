package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/vsphere"
	"github.com/holdfast-backup/holdfast/vsphere/vddk"
)

func TestExplain(t *testing.T) {
	wrap := func(err error) error { return fmt.Errorf("backup web: %w", err) }
	for _, c := range []struct {
		err           error
		code          int
		message, hint string
	}{
		{nil, exitOK, "", ""},
		{errors.New("disk on fire"), exitFailed, "disk on fire", ""},
		{fs.ErrNotExist, exitFailed, "file does not exist", ""},
		{context.DeadlineExceeded, exitFailed, "context deadline exceeded", ""},
		{wrap(errPartlyDone), exitPartly, "backup web: partly done", ""},
		{wrap(errDamageFound), exitDamage, "backup web: damage found", ""},
		{wrap(store.ErrLockedPoint), exitFailed, "backup web: point is locked", "no command lifts a lock or makes it shorter: it ends by itself"},
		{errors.Join(errPartlyDone, errDamageFound), exitDamage, "partly done\ndamage found", ""},
		{wrap(&accessError{errors.New("wrong password")}), exitAccess, "backup web: wrong password", ""},
		{wrap(&vddk.Error{Err: errors.New("refused"), Hint: "open port 902"}), exitFailed, "backup web: refused", "open port 902"},
		{wrap(vsphere.ErrRunning), exitFailed, "backup web: the VM is switched on", "shut the VM down first"},
		{usagef("what?"), exitUsage, "what?", "see 'holdfast help'"},
		{wrap(withHint(usagef("what?"), "try %d", 2)), exitUsage, "backup web: what?", "try 2"},
		{withHint(withHint(errors.New("x"), "inner"), "outer"), exitFailed, "x", "outer"},
		{&configError{withHint(errors.New("x"), "inner")}, exitUsage, "x", "inner"},
		{wrap(context.Canceled), exitInterrupted, "interrupted", ""},
		{&accessError{context.Canceled}, exitInterrupted, "interrupted", ""},
	} {
		code, message, hint := explain(c.err)
		if code != c.code || message != c.message || hint != c.hint {
			t.Errorf("%v: %d, %q, %q", c.err, code, message, hint)
		}
	}
}

func TestReport(t *testing.T) {
	var b bytes.Buffer
	err := withHint(errors.Join(errors.New("web: gone"), errors.New("db\x1b[2J: gone")), "look")
	if code := report(&b, err); code != exitFailed {
		t.Errorf("exit %d", code)
	}
	want := "holdfast: web: gone\nholdfast: db\uFFFD[2J: gone\nhint: look\n"
	if b.String() != want {
		t.Errorf("got %q", b.String())
	}
	b.Reset()
	if code := report(&b, nil); code != 0 || b.Len() > 0 {
		t.Errorf("no error: exit %d, %q", code, b.String())
	}
}

// TestInterruption: after a signal every failure is an interruption, and only then.
func TestInterruption(t *testing.T) {
	broken := errors.New("write: broken pipe")
	live, stop := context.WithCancelCause(t.Context())
	defer stop(nil)
	if code, _, _ := explain(interruption(live, broken)); code != exitFailed {
		t.Errorf("without a signal: exit %d", code)
	}
	gone, cancel := context.WithCancelCause(t.Context())
	cancel(errInterrupted)
	if code, message, _ := explain(interruption(gone, broken)); code != exitInterrupted || strings.Contains(message, "broken") {
		t.Errorf("after a signal: exit %d, %s", code, message)
	}
	if err := interruption(gone, nil); err != nil {
		t.Errorf("success after a signal: %v", err)
	}
}
