package vsphere

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/vmware/govmomi/vim25/types"

	"github.com/holdfast-backup/holdfast/fs/vdisk"
	"github.com/holdfast-backup/holdfast/store/extent"
	"github.com/holdfast-backup/holdfast/vsphere/vddk"
)

// InPlace says which VM gets its disks back.
type InPlace struct {
	VM    string // name, as the listing has it
	UUID  string // instance UUID of the VM that the point is of; another VM of that name is refused
	Disks []InPlaceDisk
	// Progress is as in Restore.
	Progress func(disk string, total int64) (done func(n int64), end func(error))
}

// InPlaceDisk is a disk of a point.
type InPlaceDisk struct {
	Name     string
	Key      string // by which the backup knew it
	ChangeID string // of the point
	Image    vdisk.Source
}

// Written is what became of a disk.
type Written struct {
	Disk              string
	Compared, Written int64 // bytes
	Why               string
}

// Errors of a restore in place.
var (
	ErrRunning = errors.New("the VM is switched on")
	ErrNoWrite = errors.New("disks of this platform can only be written through VDDK")
)

// InPlaceDone is what a restore in place did.
type InPlaceDone struct {
	Path     string // of the VM
	Disks    []Written
	Warnings []string
}

// RestoreInPlace gives the disks of a VM the contents that they had. Only blocks that differ are written, and where change tracking tells what changed
// since the point only those are compared. The VM must be off and have no snapshots; its configuration stays as it is.
//
// Change tracking is switched off while disks are written, as VMware's Virtual Disk Programming Guide asks for, and on again afterwards: it begins
// anew, so that the next backup reads the disks whole rather than trust what was tracked before.
func (s *Source) RestoreInPlace(ctx context.Context, what InPlace) (done InPlaceDone, err error) {
	vm, err := s.find(ctx, what.VM)
	if err != nil {
		return done, err
	}
	m := &machine{VM: vm}
	if err := s.read(ctx, m); err != nil {
		return done, m.failed("read its configuration", err)
	}
	done.Path = m.Path
	if err := s.mayWrite(m, what.UUID); err != nil {
		return done, fmt.Errorf("vsphere: %s: %w", m.Path, err)
	}
	all, err := s.plan(ctx, m, &what)
	if err != nil {
		return done, fmt.Errorf("vsphere: %s: %w", m.Path, err)
	}
	if m.Tracked {
		before, err := s.trackings(ctx, m)
		if err == nil {
			err = s.setTracking(ctx, m, false)
		}
		if err != nil {
			return done, m.failed("switch changed block tracking off", err)
		}
		defer func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), trackingTime)
			defer cancel()
			if w := s.trackAnew(ctx, m, before); w != "" {
				done.Warnings = append(done.Warnings, w)
			}
		}()
	}
	for i := range all {
		err := s.rewrite(ctx, m, &all[i], what.Progress)
		if err != nil {
			return done, m.failed("restore "+all[i].Name, err)
		}
		done.Disks = append(done.Disks, all[i].Written)
	}
	return done, nil
}

// trackings gives which tracking each disk is of, by its key. Of a VM that is off only a snapshot tells.
func (s *Source) trackings(ctx context.Context, m *machine) (map[int32]string, error) {
	if s.cfg.Journal == nil {
		return nil, errors.New("vsphere: no journal")
	}
	snap := &snapshot{src: s, vm: m}
	if err := s.create(ctx, m, snap, false); err != nil {
		return nil, errors.Join(err, snap.remove())
	}
	out := map[int32]string{}
	for _, d := range disksOf(snap.config.Hardware.Device) {
		out[d.key] = trackingOf(d.changeID)
	}
	return out, snap.remove()
}

// trackAnew switches tracking on again, and off when it is not certain that it begins anew: what was written must not be missing in what it
// tells. It says what the user should know; empty when all is well.
func (s *Source) trackAnew(ctx context.Context, m *machine, before map[int32]string) (warning string) {
	err := s.setTracking(ctx, m, true)
	if err == nil {
		err = s.beganAnew(ctx, m, before)
	}
	if err == nil {
		return ""
	}
	off := s.settle(ctx, m.ref) // it may have been heard all the same
	if off == nil {
		off = s.setTracking(ctx, m, false)
	}
	if off == nil {
		off = s.read(ctx, m)
	}
	if off != nil || m.Tracked {
		return fmt.Sprintf("changed block tracking may be on (%v), though it has not seen what was written: switch it off, or make the next backup with --full", errors.Join(err, off))
	}
	return fmt.Sprintf("changed block tracking is switched off now: %v", missing(err))
}

// beganAnew is an error unless each disk that was tracked is of another tracking than before.
func (s *Source) beganAnew(ctx context.Context, m *machine, before map[int32]string) error {
	now, err := s.trackings(ctx, m)
	if err != nil {
		return err
	}
	for key, was := range before {
		if was != "" && (now[key] == "" || now[key] == was) {
			return fmt.Errorf("the host would go on with the old tracking of disk %d, which has not seen what was written", key)
		}
	}
	return nil
}

// trackingTime is how long switching tracking on again may take when the restore was cancelled.
const trackingTime = 2 * time.Minute

// rewriting is a disk that gets back what it held.
type rewriting struct {
	*InPlaceDisk
	Written
	dev    *device
	ranges []extent.Extent // to be compared
}

// plan finds the disks, all of them before one is written, and what has to be compared.
func (s *Source) plan(ctx context.Context, m *machine, what *InPlace) ([]rewriting, error) {
	have := disksOf(m.mo.Config.Hardware.Device)
	var all []rewriting
	for i := range what.Disks {
		d := &what.Disks[i]
		dev, err := diskFor(d, have, m.mo.Config.InstanceUuid)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", d.Name, err)
		}
		w := rewriting{InPlaceDisk: d, dev: dev, Written: Written{Disk: d.Name, Why: "what changed since the point"}}
		if w.ranges, err = s.changedSince(ctx, m, d, dev); err != nil {
			w.Why = fmt.Sprintf("the whole disk was compared: %v", err)
			w.ranges = []extent.Extent{{Len: dev.size}}
		}
		all = append(all, w)
	}
	return all, ctx.Err()
}

// mayWrite refuses a VM whose disks must not be written now.
func (s *Source) mayWrite(m *machine, uuid string) error {
	switch {
	case s.cfg.VDDK.LibDir == "":
		return ErrNoWrite
	case uuid != m.mo.Config.InstanceUuid:
		return errors.New("this is not the VM that the point is of, but another one of its name")
	case m.Template:
		return errors.New("it is a template")
	case m.mo.Runtime.PowerState != types.VirtualMachinePowerStatePoweredOff:
		return ErrRunning
	case chain(m.mo.Snapshot) > 0:
		return errors.New("it has snapshots: remove them first")
	}
	return nil
}

// diskFor finds the disk that one of the point was. It must still be the same one.
func diskFor(d *InPlaceDisk, have []device, uuid string) (*device, error) {
	for i := range have {
		if dev := &have[i]; dev.identity(uuid) == d.Key {
			if dev.skip != "" {
				return nil, fmt.Errorf("%s %s", dev.label, dev.skip)
			}
			if dev.size != d.Image.Size() {
				return nil, fmt.Errorf("%s has %d bytes, in the point %d", dev.label, dev.size, d.Image.Size())
			}
			return dev, nil
		}
	}
	return nil, errors.New("the VM does not have this disk any more: restore the point as a new VM")
}

// rewrite makes a disk what it was.
func (s *Source) rewrite(ctx context.Context, m *machine, w *rewriting, progress func(string, int64) (func(int64), func(error))) (err error) {
	done, end := func(int64) {}, func(error) {}
	if progress != nil {
		done, end = progress(w.Name, w.dev.size)
	}
	defer func() { end(err) }()
	o := s.vddkOptions(m, w.dev)
	o.Writable = true
	disk, err := vddk.Open(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, disk.Close()) }()
	at := int64(0)
	for _, e := range w.ranges {
		done(e.Off - at)
		at = e.End()
		if err := w.equalise(ctx, disk, w.Image, e, done); err != nil {
			return err
		}
	}
	done(w.dev.size - at)
	return disk.Flush()
}

// Pieces in which a disk is read, and in which what differs is written, bytes.
const (
	comparePiece = 1 << 20
	writePiece   = 64 << 10
)

// equalise compares a range and writes what differs.
func (w *Written) equalise(ctx context.Context, disk *vddk.Disk, image io.ReaderAt, e extent.Extent, done func(int64)) error {
	is, was := make([]byte, min(comparePiece, e.Len)), make([]byte, min(comparePiece, e.Len))
	for off := e.Off; off < e.End(); off += int64(len(is)) {
		if err := ctx.Err(); err != nil {
			return err
		}
		is, was = is[:min(int64(len(is)), e.End()-off)], was[:min(int64(len(was)), e.End()-off)]
		if n, err := disk.ReadAt(is, off); n < len(is) {
			return err
		}
		if n, err := image.ReadAt(was, off); n < len(was) {
			return err
		}
		w.Compared += int64(len(is))
		for k := 0; k < len(is); k += writePiece {
			old := was[k:min(len(was), k+writePiece)]
			if bytes.Equal(is[k:k+len(old)], old) {
				continue
			}
			if _, err := disk.WriteAt(old, off+int64(k)); err != nil {
				return err
			}
			w.Written += int64(len(old))
		}
		done(int64(len(is)))
	}
	return nil
}

// changedSince asks which ranges of the disk, as it is now, changed since the point.
func (s *Source) changedSince(ctx context.Context, m *machine, d *InPlaceDisk, dev *device) ([]extent.Extent, error) {
	switch {
	case !m.Tracked || s.cfg.Tracking == TrackingOff:
		return nil, errors.New("changes are not tracked")
	case d.ChangeID == "":
		return nil, errors.New("the point has no change id")
	}
	snap := &snapshot{src: s, vm: m} // none: what is asked for is the disk as it is, which a VM that is off has
	areas, err := (&disk{device: *dev, snap: snap}).changed(ctx, d.ChangeID)
	for i, e := range areas {
		areas[i] = extent.Intersect(extent.Align(e, writePiece), extent.Extent{Len: dev.size})
	}
	return extent.Normalise(areas), err
}
