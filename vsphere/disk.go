package vsphere

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"strings"
	"time"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// A reader reads a frozen disk.
type reader interface {
	io.ReaderAt
	// Via is what it is read through, for the user: "folder", "vddk", "lease".
	Via() string
	// Allocated yields ascending ranges outside of which the disk is zeros.
	Allocated(granularity int64) iter.Seq2[extent.Extent, error]
	Close() error
}

// disk is a frozen disk.
type disk struct {
	device
	snap      *snapshot
	reader    reader
	untracked string // why its changes are not known; empty when they are
	noted     string // what Verify has to say
}

var (
	_ backup.Disk      = (*disk)(nil)
	_ backup.Untracked = (*disk)(nil)
	_ backup.Via       = (*disk)(nil)
	_ backup.InOrder   = (*disk)(nil)
	_ backup.Whole     = (*disk)(nil)
)

// ReadAt implements backup.Disk.
func (d *disk) ReadAt(p []byte, off int64) (int, error) { return d.reader.ReadAt(p, off) }

// Key implements backup.Disk.
func (d *disk) Key() string { return d.identity(d.snap.config.InstanceUuid) }

// Size implements backup.Disk.
func (d *disk) Size() int64 { return d.size }

// Via implements backup.Via.
func (d *disk) Via() string { return d.reader.Via() }

// InOrder implements backup.InOrder.
func (d *disk) InOrder() bool { return d.reader.Via() == TransportLease }

// ChangeID implements backup.Disk.
func (d *disk) ChangeID() string {
	if d.untracked != "" {
		return ""
	}
	return d.changeID
}

// Untracked implements backup.Untracked.
func (d *disk) Untracked() string { return d.untracked }

// Extents implements backup.Disk.
func (d *disk) Extents(ctx context.Context, since string) iter.Seq2[extent.Extent, error] {
	if since == "" {
		return d.allocated(ctx)
	}
	return func(yield func(extent.Extent, error) bool) {
		areas, err := d.changed(ctx, since)
		if err != nil {
			yield(extent.Extent{}, err)
			return
		}
		for _, e := range areas {
			if !yield(e, nil) {
				return
			}
		}
	}
}

// changed asks for what changed since a change id. Every doubt is ErrChangesLost.
func (d *disk) changed(ctx context.Context, since string) ([]extent.Extent, error) {
	if before, now := trackingOf(since), trackingOf(d.changeID); before != now {
		return nil, fmt.Errorf("%w: the host began tracking anew (%s is now %s)", backup.ErrChangesLost, before, now)
	}
	areas, err := d.areas(ctx, since)
	if err != nil && ctx.Err() == nil {
		err = fmt.Errorf("%w: %w", backup.ErrChangesLost, missing(err))
	}
	return areas, err
}

// trackingOf is the part of a change id that says which tracking it is of: "UUID/number", VMware's Virtual Disk Programming Guide.
func trackingOf(id string) string {
	uuid, _, _ := strings.Cut(id, "/")
	return uuid
}

// Whole implements backup.Whole: the files are read, whatever the host tracks.
func (d *disk) Whole(context.Context) iter.Seq2[extent.Extent, error] {
	return d.reader.Allocated(1 << 16)
}

// allocated yields what the host says is allocated, where it tracks that, and else what the files say.
func (d *disk) allocated(ctx context.Context) iter.Seq2[extent.Extent, error] {
	if d.untracked == "" {
		areas, err := d.areas(ctx, "*")
		if err == nil {
			return extent.All(areas)
		}
		d.snap.src.logf("%s: %s: the host does not say what is allocated (%v): all of it is read", d.snap.vm.Path, d.label, err)
	}
	return d.reader.Allocated(1 << 16)
}

// areas asks page by page for what changed since a change id, "*" for what is allocated. An empty page in the middle is no end:
// the pages have to cover the disk.
func (d *disk) areas(ctx context.Context, since string) ([]extent.Extent, error) {
	var all []extent.Extent
	for off := int64(0); off < d.size; {
		res, err := methods.QueryChangedDiskAreas(ctx, d.snap.src.c, &types.QueryChangedDiskAreas{This: d.snap.vm.ref, Snapshot: d.snap.ref,
			DeviceKey: d.key, StartOffset: off, ChangeId: since})
		if err != nil {
			return nil, err
		}
		page := res.Returnval
		switch {
		case page.StartOffset != off:
			return nil, fmt.Errorf("the host was asked for changes from byte %d on, and answers from %d on", off, page.StartOffset)
		case page.Length <= 0 || page.Length > d.size-off:
			return nil, fmt.Errorf("the host answers for %d bytes at byte %d of a disk of %d", page.Length, off, d.size)
		}
		last := off
		for _, a := range page.ChangedArea {
			if a.Start < last || a.Length < 0 || a.Length > off+page.Length-a.Start {
				return nil, fmt.Errorf("the host names changes of %d bytes at byte %d, outside of the part that it answers for", a.Length, a.Start)
			}
			last = a.Start + a.Length
			if a.Length > 0 {
				all = append(all, extent.Extent{Off: a.Start, Len: a.Length})
			}
		}
		off += page.Length
	}
	return all, nil
}

// Verify implements backup.Disk: what was read is the frozen disk as long as the snapshot is there.
func (d *disk) Verify() (warning string, err error) {
	if d.snap.ref == nil {
		return "", nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), verifyTime)
	defer cancel()
	var have mo.VirtualMachineSnapshot
	err = d.snap.src.c.retrieve(ctx, *d.snap.ref, []string{"config"}, &have)
	if fault.Is(err, &types.ManagedObjectNotFound{}) {
		return "", errors.New("somebody removed the snapshot while it was read")
	}
	if err != nil {
		return "", err
	}
	return d.noted, nil
}

// verifyTime is how long the question may take whether the snapshot is still there.
const verifyTime = 2 * time.Minute
