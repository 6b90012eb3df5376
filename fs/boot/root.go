package boot

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/store"
)

// Files of a directory of sessions.
const (
	rootID   = "id"   // tells it from every other one
	rootLock = "lock" // held while a session is made
)

// lockRoot keeps others from making sessions below root until the file is closed.
func lockRoot(root string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(root, rootLock), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// homeID gives the identity of a directory of sessions; empty when it has none.
func homeID(root string) (string, error) {
	b, err := os.ReadFile(filepath.Join(root, rootID))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return strings.TrimSpace(string(b)), err
}

// ensureHomeID gives it one. The root is locked.
func ensureHomeID(root string) error {
	id, err := homeID(root)
	if err != nil || id != "" {
		return err
	}
	var b [16]byte
	rand.Read(b[:])
	tmp := filepath.Join(root, rootID+".new")
	os.Remove(tmp)
	if err := writeSynced(tmp, []byte(hex.EncodeToString(b[:])+"\n")); err != nil {
		return err
	}
	if err := os.Rename(tmp, filepath.Join(root, rootID)); err != nil {
		return err
	}
	return syncDir(root)
}

// Sweep removes what is left below root of sessions that were not made to their end, or not removed to theirs.
func Sweep(root string) error {
	entries, err := os.ReadDir(root)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var left []string
	for _, e := range entries {
		if e.IsDir() && isSessionID(e.Name()) && !hasState(filepath.Join(root, e.Name())) {
			left = append(left, e.Name())
		}
	}
	if len(left) == 0 {
		return nil
	}
	lock, err := lockRoot(root) // and so none of them is being made
	if err != nil {
		return err
	}
	defer lock.Close()
	var errs []error
	for _, id := range left {
		s := &State{ID: id, Name: id, dir: filepath.Join(root, id)}
		if hasState(s.dir) {
			continue
		}
		f, err := s.lock()
		if errors.Is(err, ErrServed) || errors.Is(err, fs.ErrNotExist) {
			continue // whoever removes it is at it
		}
		if err == nil {
			err = os.RemoveAll(s.dir)
			f.Close()
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func isSessionID(name string) bool {
	b, err := hex.DecodeString(name)
	return err == nil && len(b) == 4
}

func hasState(dir string) bool {
	_, err := os.Lstat(filepath.Join(dir, stateFile))
	return !errors.Is(err, fs.ErrNotExist)
}

// pinID is the name of the pin of a session on its point.
func pinID(home, id string) string { return "boot-" + home + "-" + id }

// pin keeps the session's point from being forgotten for as long as there is the session. Where the repository cannot be written that is for another time.
func (s *Session) pin(ctx context.Context) error {
	err := s.Repin(ctx)
	if errors.Is(err, store.ErrNotPinned) {
		return nil
	}
	return err
}

// Repin pins the point, unless it is pinned.
func (s *Session) Repin(ctx context.Context) error {
	s.Unpinned = s.repin(ctx)
	return s.Unpinned
}

func (s *Session) repin(ctx context.Context) error {
	home, err := homeID(filepath.Dir(s.dir))
	if err != nil {
		return err
	}
	if home == "" {
		return errors.New("boot: the directory of boots has no id")
	}
	id := pinID(home, s.ID)
	if there, err := s.repo.Pinned(ctx, id); err == nil && there {
		return nil
	}
	host, machine := thisComputer()
	return s.repo.Pin(ctx, store.Pin{ID: id, Point: s.Point, Since: s.Created, What: "boot " + s.Name, Host: host, Machine: machine, Home: home, Place: s.dir})
}

// thisComputer gives its name and, where there is one, its id, machine-id(5).
func thisComputer() (host, machine string) {
	host, _ = os.Hostname()
	b, _ := os.ReadFile("/etc/machine-id")
	return host, strings.TrimSpace(string(b))
}

// Unpin lets the point of a session that was removed be forgotten.
func (s *State) Unpin(ctx context.Context, repo *store.Repo) error {
	home, err := homeID(filepath.Dir(s.dir))
	if err != nil || home == "" {
		return err
	}
	return repo.Unpin(ctx, pinID(home, s.ID))
}

// Ended reports whether the session was removed.
func (s *State) Ended() bool { return !hasState(s.dir) }

// Discard closes and removes the session, with all that its VM wrote.
func (s *Session) Discard(ctx context.Context) error {
	if err := errors.Join(s.Close(), s.Remove()); err != nil {
		return err
	}
	return s.Unpin(ctx, s.repo)
}

// Lost reports whether a pin is of a session that is no more: of a command that was killed, or that could not reach the repository. Of other computers'
// sessions nobody knows.
func Lost(p store.Pin) bool {
	if p.Home == "" || p.Place == "" {
		return false
	}
	if host, machine := thisComputer(); p.Host != host || p.Machine != machine {
		return false // which this directory may be a copy from
	}
	home, err := homeID(filepath.Dir(p.Place)) // a directory that is not mounted now is another one
	return err == nil && home == p.Home && !hasState(p.Place)
}
