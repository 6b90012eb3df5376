package vspheretest

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// tracking is the changed block tracking of a disk. A snapshot takes a copy, and the epoch after it begins.
type tracking struct {
	uuid    string
	seq     int64           // the epoch that writes fall into
	changed map[int64]int64 // unit => the last epoch in which it was written
}

func newTracking() *tracking {
	return &tracking{uuid: vmwareUUID(), seq: 0, changed: map[int64]int64{}}
}

// next begins an epoch.
func (t *tracking) next() { t.seq++ }

// id is the change id: what was written since is what has this epoch or a later one.
func (t *tracking) id() string { return fmt.Sprintf("%s/%d", t.uuid, t.seq) }

// frozenDisk is what a snapshot knows of a disk.
type frozenDisk struct {
	layer     *layer
	size      int64
	thick     bool
	track     *tracking // nil when changes are not tracked
	allocated map[int64]bool
}

func (d *disk) freeze() *frozenDisk {
	if d.unscanned { // all of it, for all that is known
		for u := int64(0); u*unit < d.size; u++ {
			d.allocated[u] = true
		}
		d.unscanned = false
	}
	f := &frozenDisk{layer: d.active, size: d.size, thick: d.thick, allocated: maps.Clone(d.allocated)}
	if d.track != nil {
		f.track = &tracking{uuid: d.track.uuid, seq: d.track.seq, changed: maps.Clone(d.track.changed)}
	}
	return f
}

// areas are the changed ones since the change id, or those that are allocated for "*".
func (f *frozenDisk) areas(changeID string) ([]extent.Extent, types.BaseMethodFault) {
	if f.track == nil {
		return nil, &types.InvalidArgument{InvalidProperty: "deviceKey"}
	}
	if changeID == "*" {
		if f.thick {
			return []extent.Extent{{Len: f.size}}, nil
		}
		return f.extents(maps.Keys(f.allocated)), nil
	}
	id, text, _ := strings.Cut(changeID, "/")
	seq, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return nil, &types.InvalidArgument{InvalidProperty: "changeId"}
	}
	if id != f.track.uuid || seq > f.track.seq {
		return nil, &types.FileFault{File: f.layer.dir.ref(f.layer.name)}
	}
	return f.extents(func(yield func(int64) bool) {
		for u, epoch := range f.track.changed {
			if epoch >= seq && epoch < f.track.seq && !yield(u) {
				return
			}
		}
	}), nil
}

func (f *frozenDisk) extents(units func(func(int64) bool)) []extent.Extent {
	var es []extent.Extent
	for _, u := range slices.Sorted(units) {
		es = append(es, extent.Intersect(extent.Extent{Off: u * unit, Len: unit}, extent.Extent{Len: f.size}))
	}
	return extent.Normalise(es)
}

// page answers from start on: up to n areas, and the length goes as far as the answer is complete.
func page(areas []extent.Extent, start, size int64, n int, emptyPages bool) types.DiskChangeInfo {
	info := types.DiskChangeInfo{StartOffset: start, Length: size - start}
	for _, a := range areas {
		a = extent.Intersect(a, extent.Extent{Off: start, Len: size - start})
		if a.Empty() {
			continue
		}
		if emptyPages && start > 0 && len(info.ChangedArea) == 0 && a.Off > start {
			info.Length = a.Off - start
			return info
		}
		if len(info.ChangedArea) == n {
			info.Length = a.Off - start
			if last := info.ChangedArea[n-1]; emptyPages {
				info.Length = last.Start + last.Length - start
			}
			return info
		}
		info.ChangedArea = append(info.ChangedArea, types.DiskChangeExtent{Start: a.Off, Length: a.Len})
	}
	return info
}

// QueryChangedDiskAreas is for a snapshot, or for the disk itself when the VM is off (VirtualMachine, vSphere API 8.0).
func (o *vmObject) QueryChangedDiskAreas(ctx *simulator.Context, req *types.QueryChangedDiskAreas) soap.HasFault {
	body := new(methods.QueryChangedDiskAreasBody)
	info, fault := o.vm.changedAreas(req)
	if fault != nil {
		body.Fault_ = simulator.Fault(faultText(fault), fault)
		return body
	}
	body.Res = &types.QueryChangedDiskAreasResponse{Returnval: info}
	return body
}

func (vm *VM) changedAreas(req *types.QueryChangedDiskAreas) (info types.DiskChangeInfo, fault types.BaseMethodFault) {
	lies := vm.s.areasFaults(req.ChangeId)
	if lies.fault != nil {
		return info, lies.fault
	}
	f, fault := vm.frozenDisk(req.Snapshot, req.DeviceKey)
	if fault != nil {
		return info, fault
	}
	if req.StartOffset < 0 || req.StartOffset >= f.size {
		return info, &types.InvalidArgument{InvalidProperty: "startOffset"}
	}
	areas, fault := f.areas(req.ChangeId)
	if fault != nil {
		return info, fault
	}
	if lies.whole && req.ChangeId == "*" {
		areas = []extent.Extent{{Len: f.size}}
	}
	if (lies.hide && req.ChangeId != "*" || lies.hideAll) && len(areas) > 0 {
		last := &areas[len(areas)-1]
		last.Len -= min(last.Len, unit)
		areas = extent.Normalise(areas)
	}
	info = page(areas, req.StartOffset, f.size, lies.perPage, lies.emptyPages)
	if lies.wrongStart {
		info.StartOffset += unit
	}
	if lies.noProgress {
		info.Length, info.ChangedArea = 0, nil
	}
	return info, nil
}

// frozenDisk finds a disk in a snapshot.
func (vm *VM) frozenDisk(snapshot *types.ManagedObjectReference, key int32) (*frozenDisk, types.BaseMethodFault) {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if snapshot == nil {
		if vm.on {
			return nil, &types.InvalidArgument{InvalidProperty: "snapshot"}
		}
		if d := vm.diskByKey(key); d != nil && d.dependent {
			f := d.freeze()
			if f.track != nil {
				f.track.next() // what was written up to now
			}
			return f, nil
		}
		return nil, &types.InvalidArgument{InvalidProperty: "deviceKey"}
	}
	snap := vm.snapshots[*snapshot]
	if snap == nil {
		return nil, &types.ManagedObjectNotFound{Obj: *snapshot}
	}
	if f := snap.disks[key]; f != nil {
		return f, nil
	}
	return nil, &types.InvalidArgument{InvalidProperty: "deviceKey"}
}

// faultText is what a user of a client would read.
func faultText(f types.BaseMethodFault) string {
	switch f := f.(type) {
	case *types.FileFault:
		return fmt.Sprintf("Error caused by file %s", f.File)
	case *types.InvalidArgument:
		return "A specified parameter was not correct: " + f.InvalidProperty
	}
	return fmt.Sprintf("%T", f)
}
