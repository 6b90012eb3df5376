package boot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// world is a platform and the service that serves folders, with a fuse: at its count the process dies, before or after what is done then.
type world struct {
	exported, mounted, registered, on, away bool

	calls, dies int
	after       bool
	late        bool // a mount that a command which is no more asked for comes through just before the export ends
	busy        int  // looks for which the platform is at work on the VM
}

type death struct{}

func (w *world) do(what func() error) error {
	w.calls++
	if w.calls == w.dies && !w.after {
		panic(death{})
	}
	err := what()
	if w.calls == w.dies {
		panic(death{})
	}
	return err
}

func set(b *bool, to bool) func() error {
	return func() error { *b = to; return nil }
}

func (w *world) Export(context.Context, string) error { return w.do(set(&w.exported, true)) }
func (w *world) Unexport(context.Context, string) error {
	w.mounted = w.mounted || w.late
	return w.do(set(&w.exported, false))
}
func (w *world) Record() (json.RawMessage, error) { return json.RawMessage(`{}`), nil }
func (w *world) Register(context.Context) error   { return w.do(set(&w.registered, true)) }
func (w *world) PowerOn(context.Context) error    { return w.do(set(&w.on, true)) }

func (w *world) Look(context.Context) (RemoteState, error) {
	w.busy--
	return RemoteState{Mounted: w.mounted, Registered: w.registered, On: w.on, Ours: w.registered && !w.away, Busy: w.busy >= 0}, nil
}

func (w *world) Mount(context.Context) error {
	return w.do(func() error {
		if w.mounted = w.exported; !w.exported {
			return errors.New("there is no such export")
		}
		return nil
	})
}

func (w *world) PowerOff(context.Context, time.Duration) error {
	return w.do(func() error {
		if w.on && !w.away && !w.exported {
			return errors.New("its disks are gone")
		}
		w.on = w.on && w.away
		return nil
	})
}

func (w *world) Remove(context.Context) error {
	return w.do(func() error {
		if w.on && !w.away {
			return errors.New("the VM runs from it")
		}
		w.mounted, w.registered = false, w.registered && w.away
		return nil
	})
}

func (w *world) Move(context.Context, string, func(int)) error {
	return w.do(set(&w.away, true))
}

// sessionIn makes a session without disks.
func sessionIn(t *testing.T, root string) *State {
	t.Helper()
	s := &State{Version: stateVersion, ID: "0badcafe", Name: "web", Step: StepMade, Export: &Export{Path: "/0badcafe"}, dir: filepath.Join(root, "0badcafe")}
	if err := os.Mkdir(s.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := s.save(); err != nil {
		t.Fatal(err)
	}
	return s
}

func init() { onTheWay, busyTime = time.Millisecond, 2*time.Second }

// TestLate: what a killed command had asked for, and what came through only while the next one undid it, is undone, too.
func TestLate(t *testing.T) {
	s, w := sessionIn(t, t.TempDir()), &world{exported: true, late: true}
	s.Step = StepMounting
	if what, err := s.Settle(t.Context(), w, w); err != nil || what == "" {
		t.Fatalf("%q, %v", what, err)
	}
	if w.mounted || w.exported || !s.Ended() {
		t.Errorf("left: %+v", w)
	}
}

// TestBusy: a VM that the platform is at work on is waited for before it is ended, for a time.
func TestBusy(t *testing.T) {
	w := &world{exported: true, mounted: true, registered: true, on: true, busy: 3}
	s := sessionIn(t, t.TempDir())
	s.Step = StepRunning
	if err := s.End(t.Context(), w, w, StopRequest{}); err != nil || w.busy >= 0 || w.on || !s.Ended() {
		t.Errorf("%+v, %v", w, err)
	}
	w = &world{exported: true, mounted: true, registered: true, on: true, busy: 1e9}
	s = sessionIn(t, t.TempDir())
	s.Step = StepRunning
	if err := s.End(t.Context(), w, w, StopRequest{}); !errors.Is(err, ErrPlatformBusy) || !w.on || !w.exported || s.Step != StepRunning {
		t.Errorf("%+v, %v, %s", w, err, s.Step)
	}
}

// TestInterrupted: an end that was given up, while the guest shuts down, drops nothing later.
func TestInterrupted(t *testing.T) {
	w := &world{exported: true, mounted: true, registered: true, on: true}
	s := sessionIn(t, t.TempDir())
	s.Step = StepRunning
	ctx, cancel := context.WithCancel(t.Context())
	if err := s.End(ctx, &shuttingDown{w, cancel}, w, StopRequest{}); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	w.on = false // it did
	now, err := load(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	if what, err := now.Settle(t.Context(), w, w); err != nil || what != "" || now.Ended() || !w.exported || now.Seen == nil || now.Seen.On {
		t.Errorf("%q, %v, %+v", what, err, now)
	}
}

type shuttingDown struct {
	*world
	cancel func()
}

func (s *shuttingDown) PowerOff(ctx context.Context, _ time.Duration) error {
	s.cancel()
	return ctx.Err()
}

// TestRemoteDeath lets a command die at each of its steps, and the next one after it, too; the one after that leaves nothing half done.
func TestRemoteDeath(t *testing.T) {
	ctx := t.Context()
	commands := map[string]func(s *State, w *world) error{
		"launch": func(s *State, w *world) error { return s.Launch(ctx, w, w) },
		"end":    func(s *State, w *world) error { return s.End(ctx, w, w, StopRequest{}) },
		"keep":   func(s *State, w *world) error { return s.End(ctx, w, w, StopRequest{Keep: true}) },
		"move":   func(s *State, w *world) error { return s.MoveAway(ctx, w, w, "there", nil) },
	}
	for name, command := range commands {
		deaths := 0
		for at := 1; at < 7; at++ {
			for again := 0; again < 6; again++ {
				for _, after := range []bool{false, true} {
					died := die(t, name, command, at, again, after)
					if died {
						deaths++
					}
				}
			}
		}
		if deaths < 30 {
			t.Errorf("%s died %d times only", name, deaths)
		}
	}
}

// die lets a command die at a call, and what settles it at another one, if there are so many.
func die(t *testing.T, name string, command func(*State, *world) error, at, again int, after bool) (died bool) {
	t.Helper()
	root := t.TempDir()
	s, w := sessionIn(t, root), &world{after: after}
	if name != "launch" {
		if err := s.Launch(t.Context(), w, w); err != nil {
			t.Fatal(err)
		}
	}
	label := fmt.Sprintf("%s, death at call %d and %d, after it: %v", name, at, again, after)
	run := func(dies int, f func() error) (dead bool) {
		defer func() {
			if p := recover(); p != nil {
				if _, ok := p.(death); !ok {
					panic(p)
				}
				dead = true
			}
		}()
		w.calls, w.dies = 0, dies
		if err := f(); err != nil {
			t.Errorf("%s: %v", label, err)
		}
		return false
	}
	died = run(at, func() error { return command(s, w) })
	wasOn := w.on
	for _, dies := range []int{again, 0} {
		run(dies, func() error {
			now, err := load(s.dir)
			if errors.Is(err, os.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			release, err := now.Work(t.Context(), 0)
			if err != nil {
				return err
			}
			defer release()
			w.exported = w.exported || now.Step != StepKept && now.Step != StepMade // the next command has it served again
			_, err = now.Settle(t.Context(), w, w)
			return err
		})
	}
	now, err := load(s.dir)
	gone := errors.Is(err, os.ErrNotExist)
	runs := !gone && now.Step == StepRunning && w.on && w.registered && w.mounted && w.exported && !w.away
	nothing := !w.exported && !w.mounted && (!w.registered && !w.on || w.away)
	ok := false
	switch name {
	case "launch":
		ok = gone && nothing && !wasOn || runs
	case "end":
		ok = gone && nothing || died && runs
	case "keep":
		ok = !gone && now.Step == StepKept && nothing || died && runs
	case "move":
		ok = gone && nothing && w.away && w.on && w.registered || died && runs
	}
	if !ok {
		t.Errorf("%s: %+v, session gone: %v, %+v", label, w, gone, now)
	}
	return died
}

// TestRemoteFails: a step that fails undoes all before it.
func TestRemoteFails(t *testing.T) {
	root := t.TempDir()
	s, w := sessionIn(t, root), &world{}
	broken := errors.New("no memory")
	err := s.Launch(t.Context(), &failing{w, broken}, w)
	if !errors.Is(err, broken) || w.exported || w.mounted || w.registered || w.on {
		t.Errorf("%v, %+v", err, w)
	}
	if _, err := os.Stat(s.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the session is still there: %v", err)
	}
}

type failing struct {
	*world
	err error
}

func (f *failing) PowerOn(context.Context) error { return f.err }
