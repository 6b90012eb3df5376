package boot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/vdisk"
)

// Step is how far a session on a platform has come. It is kept before what it is called after is done, so that after a crash the next command
// knows what to finish or to undo.
type Step string

// The steps.
const (
	StepMade        Step = "made"
	StepExporting   Step = "exporting"
	StepMounting    Step = "mounting"
	StepRegistering Step = "registering"
	StepStarting    Step = "starting"
	StepRunning     Step = "running"
	StepMoving      Step = "moving"
	StepEnding      Step = "ending"
	StepKept        Step = "kept" // nothing of it is on the platform
)

// Export is a session's folder as NFS clients see it.
type Export struct {
	Path    string         `json:"path"`
	ID      uint64         `json:"id"`
	Folder  string         `json:"folder"` // of the VM, in the export
	Clients []netip.Prefix `json:"clients"`
}

// RemoteState is what a platform has of a session.
type RemoteState struct {
	Mounted, Registered, On bool
	Ours                    bool // its files are on our export; false only where they are seen to be elsewhere
	Busy                    bool // the platform is at work on it
}

// Remote is the VM of a session on a platform. All methods may be called again after a crash, whatever was done.
type Remote interface {
	// Record is what is to be kept of it to find it again.
	Record() (json.RawMessage, error)
	Look(ctx context.Context) (RemoteState, error)
	Mount(ctx context.Context) error
	Register(ctx context.Context) error
	PowerOn(ctx context.Context) error
	// PowerOff asks the guest to shut down, and switches it off when it has not after a time; at once when that is 0.
	PowerOff(ctx context.Context, patience time.Duration) error
	// Remove takes the VM, if its files are ours, and the mount away; an error while it runs from there.
	Remove(ctx context.Context) error
	// Move brings all files of the VM to a place of the platform's own, while it runs.
	Move(ctx context.Context, to string, progress func(percent int)) error
}

// Exporter serves the folders of sessions. Both methods may be called again.
type Exporter interface {
	Export(ctx context.Context, id string) error
	Unexport(ctx context.Context, id string) error
}

// FolderDir is where the folder of a session on a platform is.
const FolderDir = "folder"

// FlatName is the file of a disk in the folder.
func FlatName(disk string) string { return disk + "-flat.vmdk" }

// makeFolder writes what is in the folder besides the contents of disks.
func (s *Session) makeFolder(opt Options) error {
	n, err := strconv.ParseUint(s.ID, 16, 64)
	if err != nil {
		return err
	}
	// Before the session can be seen: nobody else is to take it for one that was left behind.
	if s.work, err = s.lockWork(); err != nil {
		return err
	}
	s.Step, s.Export = StepMade, &Export{Path: "/" + s.ID, ID: n, Folder: plainName(s.Name), Clients: opt.Clients}
	dir := filepath.Join(s.File(FolderDir), "data", s.Export.Folder)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	files := map[string][]byte{}
	for name, data := range opt.Files {
		files[name] = data
	}
	for i := range s.Machine.Disks {
		d := &s.Machine.Disks[i]
		if d.Size%sector != 0 { // a VMDK has whole sectors
			d.Size += sector - d.Size%sector
			if err := s.disks[i].Resize(d.Size); err != nil {
				return err
			}
		}
		var id vdisk.Identity
		copy(id[:], s.Point[:])
		id[0] ^= byte(i + 1)
		text, err := vdisk.VMDKDescriptor(vdisk.VMFS, d.Size, FlatName(d.Name), id)
		if err != nil {
			return err
		}
		files[d.Name+".vmdk"] = append(text, "ddb.thinProvisioned = \"1\"\n"...) // and so it is when it is moved away
	}
	for name, data := range files {
		if err := writeSynced(filepath.Join(dir, name), data); err != nil {
			return err
		}
	}
	for ; dir != s.dir; dir = filepath.Dir(dir) {
		if err := syncDir(dir); err != nil {
			return err
		}
	}
	return nil
}

const sector = 512 // bytes

// Elsewhere says why the session's disks are not all that its VM wrote: it has snapshots, or disks in other places. It is nil for a VM on this computer.
func (s *State) Elsewhere() error {
	if s.Export == nil {
		return nil
	}
	dir := filepath.Join(s.File(FolderDir), "data", s.Export.Folder)
	list, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	ours := map[string]bool{} // descriptors of disks that the .vmx names
	for _, d := range s.Machine.Disks {
		ours[d.Name+".vmdk"] = false
	}
	for _, e := range list {
		name := strings.ToLower(e.Name())
		if _, ok := ours[e.Name()]; !ok && strings.HasSuffix(name, ".vmdk") {
			return fmt.Errorf("it has a file %s, as of a snapshot", e.Name())
		}
		if !strings.HasSuffix(name, ".vmx") {
			continue
		}
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return err
		}
		for _, file := range vmxFiles(text) {
			if _, ok := ours[file]; !ok {
				return fmt.Errorf("its disk is %s", file)
			}
			ours[file] = true
		}
	}
	for name, named := range ours {
		if !named {
			return fmt.Errorf("it has no disk %s any more", name)
		}
	}
	return nil
}

// vmxFiles are the files of disks that a .vmx names.
func vmxFiles(text []byte) (files []string) {
	for line := range strings.Lines(string(text)) {
		key, value, ok := strings.Cut(line, "=")
		value = strings.Trim(strings.TrimSpace(value), `"`)
		if ok && strings.HasSuffix(strings.ToLower(strings.TrimSpace(key)), ".filename") && strings.HasSuffix(strings.ToLower(value), ".vmdk") {
			files = append(files, value)
		}
	}
	return files
}

// plainName is what a folder may be called on every platform.
func plainName(name string) string {
	b := []byte(name)
	for i, c := range b {
		if (c < '0' || c > '9') && (c < 'A' || c > 'Z') && (c < 'a' || c > 'z') && c != '-' && c != '_' && (c != '.' || i == 0) {
			b[i] = '_'
		}
	}
	return string(b[:min(len(b), 64)])
}

func writeSynced(file string, data []byte) error {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// ErrAtWork: another command is at work on the session.
var ErrAtWork = errors.New("another command is at work on this boot")

// Work makes this process the one that takes a session on a platform from step to step, until release is called. The state is read anew. Another one
// that is at work is waited for: ErrAtWork after that time.
func (s *State) Work(ctx context.Context, patience time.Duration) (release func(), err error) {
	f, err := s.lockWork()
	for end := time.Now().Add(patience); errors.Is(err, ErrAtWork) && time.Now().Before(end); f, err = s.lockWork() {
		if err := pause(ctx, 50*time.Millisecond); err != nil {
			return nil, err
		}
	}
	if err != nil {
		return nil, err
	}
	now, err := load(s.dir)
	if err != nil {
		f.Close()
		return nil, err
	}
	*s = *now
	return func() { f.Close() }, nil
}

// Launching hands over a new session: its disks are not open in this process any more, and nobody else works on it until release is called.
func (s *Session) Launching() (st *State, release func(), err error) {
	f := s.work
	s.work = nil
	if err := s.Close(); err != nil {
		f.Close()
		return nil, nil, err
	}
	return &s.State, func() { f.Close() }, nil
}

func (s *State) lockWork() (*os.File, error) {
	f, err := os.OpenFile(s.File(workFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrAtWork
		}
		return nil, fmt.Errorf("boot: %s: %w", s.Name, err)
	}
	return f, nil
}

const workFile = "work"

// enter keeps the step and what the platform has.
func (s *State) enter(step Step, r Remote) (err error) {
	if s.Platform, err = r.Record(); err != nil {
		return err
	}
	s.Step = step
	return s.save()
}

// Launch exports the folder, and has the platform mount it and run the VM. When a step fails, all of them are undone, and what the session wrote
// is dropped; with Keep, as of one that was kept, it still is.
func (s *State) Launch(ctx context.Context, r Remote, x Exporter) error {
	for _, step := range []struct {
		name Step
		do   func(context.Context) error
	}{
		{StepExporting, func(ctx context.Context) error { return x.Export(ctx, s.ID) }},
		{StepMounting, r.Mount}, {StepRegistering, r.Register}, {StepStarting, r.PowerOn},
	} {
		err := s.enter(step.name, r)
		if err == nil {
			err = step.do(ctx)
		}
		if err != nil {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
			defer cancel()
			return errors.Join(err, s.End(ctx, r, x, StopRequest{Keep: s.Keep}))
		}
	}
	s.Keep = false
	return s.enter(StepRunning, r)
}

// undoTime is how long undoing a start may take.
const undoTime = 5 * time.Minute

// End ends the VM and takes all of it from the platform. What it wrote is kept or dropped.
func (s *State) End(ctx context.Context, r Remote, x Exporter, how StopRequest) error {
	s.Keep = how.Keep
	err := s.enter(StepEnding, r)
	if errors.Is(err, unix.ENOSPC) && !how.Keep {
		err = nil // what is to be dropped is what takes up the room
	}
	if err == nil {
		_, err = s.awaitIdle(ctx, r)
	}
	if err == nil {
		err = r.PowerOff(ctx, how.Patience)
	}
	if errors.Is(err, ErrPlatformBusy) || err != nil && ctx.Err() != nil {
		return errors.Join(err, s.giveUp(context.WithoutCancel(ctx), r))
	}
	if err != nil {
		return err
	}
	return s.leave(ctx, r, x)
}

// giveUp is for an end that was given up before the VM was off: it is as if nobody had asked for it. What it wrote stays, also when the guest shuts
// down all the same.
func (s *State) giveUp(ctx context.Context, r Remote) error {
	s.Keep = false
	return s.enter(StepRunning, r)
}

// ErrPlatformBusy: the platform is at work on the VM, such as moving it.
var ErrPlatformBusy = errors.New("the platform is at work on the VM")

// Times of waiting for a platform. Tests have others.
var (
	busyTime = time.Minute     // until it is done with a VM that is to end
	onTheWay = 2 * time.Second // for what a command that was killed asked for to begin
)

// awaitIdle waits for the platform to end what it does with the VM.
func (s *State) awaitIdle(ctx context.Context, r Remote) (RemoteState, error) {
	for end := time.Now().Add(busyTime); ; {
		st, err := r.Look(ctx)
		if err != nil || !st.Busy {
			return st, err
		}
		if time.Now().After(end) {
			return st, fmt.Errorf("boot: %s: %w", s.Name, ErrPlatformBusy)
		}
		if err := pause(ctx, busyTime/60); err != nil {
			return st, err
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// leave takes away what serves a VM that does not need it any more.
func (s *State) leave(ctx context.Context, r Remote, x Exporter) error {
	if err := r.Remove(ctx); err != nil {
		return err
	}
	if err := x.Unexport(ctx, s.ID); err != nil {
		return err
	}
	// What a command that was killed had begun may have been done since; now it can be no more.
	now, err := r.Look(ctx)
	if err == nil && (now.Mounted || now.Registered && now.Ours) {
		err = r.Remove(ctx)
	}
	if err != nil {
		return err
	}
	if s.Keep {
		return s.enter(StepKept, r)
	}
	return s.Remove()
}

// MoveAway brings the VM to a place of the platform's own, while it runs, and ends the session.
func (s *State) MoveAway(ctx context.Context, r Remote, x Exporter, to string, progress func(percent int)) error {
	if s.Step != StepRunning {
		return fmt.Errorf("boot: %s does not run: it is %s", s.Name, s.Step)
	}
	if err := s.enter(StepMoving, r); err != nil {
		return err
	}
	if err := r.Move(ctx, to, progress); err != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
		defer cancel()
		_, serr := s.Settle(ctx, r, x)
		return errors.Join(err, serr)
	}
	what, err := s.Settle(ctx, r, x)
	if err == nil && what != movedAway {
		err = fmt.Errorf("boot: the platform says that %s was moved, but its files are where they were", s.Name)
	}
	return err
}

// movedAway is what Settle says of a VM that has its files elsewhere.
const movedAway = "it was moved away"

// Settle finishes or undoes what an earlier command began, and says which of them it did; nothing when there was nothing to do. A VM that runs stays,
// unless it was moved away by whomever: then only our part ends.
func (s *State) Settle(ctx context.Context, r Remote, x Exporter) (what string, err error) {
	switch s.Step {
	case "", StepKept:
		return "", nil
	case StepMade:
		return "its start was undone", s.Remove()
	case StepEnding:
		st, err := r.Look(ctx)
		if err != nil {
			return "", err
		}
		if st.On && st.Ours { // whoever ended it gave up before it was off, and may want to keep what it wrote
			s.Keep = false
			return "it was not ended", s.enter(StepRunning, r)
		}
		return "its end was finished", s.End(ctx, r, x, StopRequest{Keep: s.Keep})
	case StepRunning, StepMoving:
		st, err := r.Look(ctx)
		if err == nil && s.Step == StepMoving && !st.Busy && st.Ours {
			if err = pause(ctx, onTheWay); err == nil {
				st, err = r.Look(ctx)
			}
		}
		if err != nil {
			return "", err
		}
		s.Seen = &st
		if st.Registered && !st.Ours {
			s.Keep = false
			s.Away = true
			return movedAway, s.leave(ctx, r, x)
		}
		if st.Busy {
			return "", nil // the platform still moves it
		}
		if s.Step == StepMoving {
			return "it was not moved", s.enter(StepRunning, r)
		}
		return "", nil
	}
	if s.Step == StepStarting {
		st, err := s.awaitIdle(ctx, r)
		if err != nil {
			return "", err
		}
		if st.On && st.Ours { // since when nobody knows: somebody may work in it
			s.Keep = false
			return "it was started", s.enter(StepRunning, r)
		}
	}
	return "its start was undone", s.End(ctx, r, x, StopRequest{Keep: s.Keep})
}
