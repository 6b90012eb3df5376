// Package overlaid is a backup source of a VM that was booted from a restore point: the disks of the
// point with what the VM wrote. Of these the engine reads only what was written.
package overlaid

import (
	"context"
	"iter"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/fs/overlay"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// Snapshot is a booted VM that is held still, or has ended.
type Snapshot struct {
	Machine backup.VM
	Point   backup.PointID // that it was booted from
	Taken   time.Time
	State   string // consistency
	Files   []backup.ConfigFile
	disks   []backup.Disk
}

var _ backup.Snapshot = (*Snapshot)(nil)

// Add adds the overlay of the next disk of the point, by the name and the key that it has there.
func (s *Snapshot) Add(name, key string, d *overlay.Disk) {
	s.disks = append(s.disks, &disk{Disk: d, point: s.Point, name: name, key: key})
}

// VM implements backup.Snapshot.
func (s *Snapshot) VM() backup.VM { return s.Machine }

// Time implements backup.Snapshot.
func (s *Snapshot) Time() time.Time { return s.Taken }

// Consistency implements backup.Snapshot.
func (s *Snapshot) Consistency() string { return s.State }

// Config implements backup.Snapshot.
func (s *Snapshot) Config(context.Context) ([]backup.ConfigFile, error) { return s.Files, nil }

// Disks implements backup.Snapshot.
func (s *Snapshot) Disks() []backup.Disk { return s.disks }

// Close implements backup.Snapshot; the overlays are their owner's.
func (s *Snapshot) Close() error { return nil }

// disk is an overlay as a disk to be backed up.
type disk struct {
	*overlay.Disk
	point backup.PointID
	name  string
	key   string
}

var _ backup.Derived = (*disk)(nil)

func (d *disk) Key() string { return d.key }

// ChangeID is empty: what the source of the point tracked is not what is here.
func (d *disk) ChangeID() string { return "" }

func (d *disk) From() (backup.PointID, string) { return d.point, d.name }

func (d *disk) Changed(context.Context) iter.Seq2[extent.Extent, error] {
	return d.Disk.Changed(overlay.Block)
}

func (d *disk) Extents(_ context.Context, since string) iter.Seq2[extent.Extent, error] {
	if since != "" {
		return func(yield func(extent.Extent, error) bool) { yield(extent.Extent{}, backup.ErrChangesLost) }
	}
	return d.Disk.Allocated(overlay.Block)
}

func (d *disk) Verify() (string, error) { return "", nil }
