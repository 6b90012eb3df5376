package boot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/overlay"
	"github.com/holdfast-backup/holdfast/store"
)

const stateVersion = 1

// State is what is kept of a session.
type State struct {
	Version    int           `json:"version"`
	ID         string        `json:"id"`   // 8 hexadecimal digits, the name of its directory
	Name       string        `json:"name"` // unique below a root
	Repository string        `json:"repository"`
	Point      store.PointID `json:"point"`
	Path       string        `json:"path"` // VM/POINT
	Created    time.Time     `json:"created"`
	Host       string        `json:"host"`
	Machine    Machine       `json:"machine"`
	// Process is what the host started on this computer; zero when it does not run.
	Process Process `json:"process,omitzero"`
	// Of a VM that runs on a platform, out of an NFS export.
	Step     Step            `json:"step,omitempty"`
	Keep     bool            `json:"keep,omitempty"`     // with StepEnding: what it wrote
	Export   *Export         `json:"export,omitempty"`   // nil for a VM on this computer
	Platform json.RawMessage `json:"platform,omitempty"` // what the platform has of it, for its Remote
	// RepositoryID tells the repository wherever it is; empty in sessions of older programs.
	RepositoryID string `json:"repository_id,omitempty"`

	// What Settle saw, which is not kept: how the VM is; that it is the platform's alone.
	Seen *RemoteState `json:"-"`
	Away bool         `json:"-"`

	dir string
}

// Of reports whether the session is of a repository, by its id, or, of older programs, its path.
func (s *State) Of(repo *store.Repo, path string) bool {
	if s.RepositoryID != "" {
		return s.RepositoryID == repo.ID()
	}
	return s.Repository == path
}

// Process names a process, whatever became of it.
type Process struct {
	PID   int   `json:"pid"`
	Start int64 `json:"start"` // in clock ticks since the computer was started, proc_pid_stat(5)
}

// Dir is the directory of the session.
func (s *State) Dir() string { return s.dir }

// File is the path of a file of the session.
func (s *State) File(name string) string { return filepath.Join(s.dir, name) }

// The names of files of a session.
const (
	stateFile     = "boot.json"
	lockFile      = "lock"
	ControlSocket = "control.sock"
	NBDSocket     = "nbd.sock"
	NVRAMFile     = "nvram"
	SerialLog     = "serial.log"
)

// maxSocketPath is the longest name a socket may have, unix(7), but for the 0 at its end.
const maxSocketPath = 107

var (
	// ErrNoBoot: there is no such session.
	ErrNoBoot = errors.New("no such boot")
	// ErrServed: a process serves the session already.
	ErrServed = errors.New("boot is served by another process")
	// ErrNameTaken: there is a session of that name.
	ErrNameTaken = errors.New("there is a boot of that name")
)

// save replaces the state durably.
func (s *State) save() error {
	text, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	tmp := s.File(stateFile + ".new")
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(text, '\n'))
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(tmp, s.File(stateFile))
	}
	if err != nil {
		return err
	}
	return syncDir(s.dir)
}

func load(dir string) (*State, error) {
	text, err := os.ReadFile(filepath.Join(dir, stateFile))
	if err != nil {
		return nil, err
	}
	s := &State{dir: dir}
	if err := json.Unmarshal(text, s); err != nil {
		return nil, fmt.Errorf("boot: %s: %w", filepath.Join(dir, stateFile), err)
	}
	if s.Version != stateVersion {
		return nil, fmt.Errorf("boot: %s: version %d is not known to this program", dir, s.Version)
	}
	return s, nil
}

// List gives the sessions below root, from old to new. Those that cannot be read are in the error, beside
// the rest.
func List(root string) (list []*State, err error) {
	entries, err := os.ReadDir(root)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var bad []error
	for _, e := range entries {
		if !isSessionID(e.Name()) {
			continue
		}
		s, err := load(filepath.Join(root, e.Name()))
		switch {
		case errors.Is(err, fs.ErrNotExist):
			// Being made, or none of ours.
		case err != nil:
			bad = append(bad, err)
		default:
			list = append(list, s)
		}
	}
	slices.SortStableFunc(list, func(a, b *State) int { return a.Created.Compare(b.Created) })
	return list, errors.Join(bad...)
}

// Get gives a session by its id. ErrNoBoot only when there is none: one whose state cannot be read is another error.
func Get(root, id string) (*State, error) {
	if !isSessionID(id) {
		return nil, fmt.Errorf("%w: %q", ErrNoBoot, id)
	}
	s, err := load(filepath.Join(root, id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %q", ErrNoBoot, id)
	}
	return s, err
}

// Find gives a session by its name, or by at least 4 digits that its id begins with.
func Find(root, name string) (*State, error) {
	list, err := List(root)
	var found *State
	for _, s := range list {
		if s.Name == name {
			return s, nil
		}
		if len(name) >= 4 && strings.HasPrefix(s.ID, name) {
			if found != nil {
				return nil, fmt.Errorf("%w: %q may be %s or %s", ErrNoBoot, name, found.ID, s.ID)
			}
			found = s
		}
	}
	if found == nil && err != nil {
		return nil, fmt.Errorf("no boot that can be read is %q: %w", name, err)
	}
	if found == nil {
		return nil, fmt.Errorf("%w: %q", ErrNoBoot, name)
	}
	return found, nil
}

// Served reports whether a process serves the session.
func (s *State) Served() bool {
	f, err := s.lock()
	if err == nil {
		f.Close()
	}
	return errors.Is(err, ErrServed)
}

// lock makes this process the one that serves the session, until the file is closed.
func (s *State) lock() (*os.File, error) {
	f, err := os.OpenFile(s.File(lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrServed
		}
		return nil, fmt.Errorf("boot: %s: %w", s.Name, err)
	}
	return f, nil
}

// Stored is the bytes that the overlays take up.
func (s *State) Stored() (n int64) {
	for _, d := range s.Machine.Disks {
		n += overlay.StoredIn(s.File(d.Name))
	}
	return n
}

// AwaitEnd waits until the process that serves the session has ended.
func (s *State) AwaitEnd(ctx context.Context) error {
	for s.Served() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
	return nil
}

// Remove ends a session that nobody serves, with all that its VM wrote.
func (s *State) Remove() error {
	f, err := s.lock()
	if err != nil {
		return err
	}
	defer f.Close()
	// Without its state a directory is no session any more, should the rest be interrupted.
	if err := os.Remove(s.File(stateFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.RemoveAll(s.dir) // and so does Sweep
}
