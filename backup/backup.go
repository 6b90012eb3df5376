// Package backup is the engine: it takes a frozen VM from a Source, reads what
// has changed, and commits a restore point to a repository.
//
//	point, err := backup.Run(ctx, repo, snapshot, backup.Options{})
//
// It promises that a point is committed whole or not at all, that change
// tracking which is lost or doubtful is never trusted, and that memory is bounded whatever the
// size of the disks. It knows no platform and no disk format.
package backup

import (
	"context"
	"errors"
	"io"
	"iter"
	"time"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// ErrChangesLost: the source cannot say what changed since the given change id.
// The engine then reads the whole disk.
var ErrChangesLost = errors.New("change tracking was lost")

// Source is a place that VMs are backed up from.
type Source interface {
	// VMs lists what can be backed up, by the names that Freeze takes.
	VMs(ctx context.Context) iter.Seq2[string, error]
	// Freeze makes a Snapshot of one VM. The caller closes it.
	Freeze(ctx context.Context, vm string) (Snapshot, error)
}

// VM identifies a machine; sources import this package, not the store.
type VM = store.VM

// PointID names a point.
type PointID = store.PointID

// Snapshot is a VM held still while it is read.
type Snapshot interface {
	// VM identifies the machine. Its name is a single path element.
	VM() VM
	// Time is when the VM was frozen.
	Time() time.Time
	// Consistency is "crash", "application" or "offline".
	Consistency() string
	// Config gives the VM's configuration files, small enough to be held in memory.
	Config(ctx context.Context) ([]ConfigFile, error)
	// Disks are in the VM's own order; they become disk0, disk1…
	Disks() []Disk
	// Close thaws the VM and removes what Freeze made. It uses a context of its
	// own, so that a cancelled run cleans up too. Calling it twice is harmless.
	Close() error
}

// ConfigFile is one file of a VM's configuration.
type ConfigFile struct {
	Name string // slash-separated, below config/
	Data []byte
}

// Disk is one frozen disk. ReadAt is safe for concurrent use; a read beyond what
// the disk still has (it shrank) is an error, never zeros.
type Disk interface {
	io.ReaderAt
	// Key names the disk at its source, the same in every run.
	Key() string
	// Size is in bytes.
	Size() int64
	// ChangeID is what a later run passes to Extents as since; empty when the
	// source tracks no changes.
	ChangeID() string
	// Extents yields ascending ranges: with an empty since those outside of which
	// the disk is all zeros, otherwise those that changed since that change id, or
	// ErrChangesLost.
	Extents(ctx context.Context, since string) iter.Seq2[extent.Extent, error]
	// Verify is called after the last read. An error says that what was read is not
	// the disk (it was resized); a warning that it may not be one state of it.
	Verify() (warning string, err error)
}

// Derived is a Disk that began as a disk of a point and knows what became of it since then, such as
// that of a VM that was booted from the point. Where that point is the parent nothing else
// is read.
type Derived interface {
	Disk
	// From is the point, and the name of the disk in it.
	From() (PointID, string)
	// Changed yields ascending ranges outside of which the disk is what it began as.
	Changed(ctx context.Context) iter.Seq2[extent.Extent, error]
}

// Warner is a Snapshot that has something to say of the VM: a disk that is left out, a guest that was not asked.
type Warner interface {
	// Warnings is called after the last disk and the configuration were read.
	Warnings() []string
}

// Untracked is a Disk that says why its source tracks no changes of it.
type Untracked interface {
	// Untracked is empty when changes are tracked.
	Untracked() string
}

// Via is a Disk that there are several ways to read.
type Via interface {
	// Via names the way that was chosen.
	Via() string
}

// Whole is a Disk that may be asked for its allocated ranges without trust in change tracking, which may have its part in what Extents
// says of them.
type Whole interface {
	// Whole is Extents without since, by what the disk itself shows.
	Whole(ctx context.Context) iter.Seq2[extent.Extent, error]
}

// InOrder is a Disk that may only be readable once, from its beginning to its end, as Extents yields.
type InOrder interface {
	// InOrder reports whether it is.
	InOrder() bool
}
