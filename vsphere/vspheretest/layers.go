package vspheretest

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
)

// openDisk opens the files that the backing of a disk names. vcsim has made the descriptor, and an extent without bytes.
func (vm *VM) openDisk(dev *types.VirtualDisk, shared bool) (*disk, error) {
	file, mode := backingFile(dev.Backing)
	if file == nil {
		return nil, fmt.Errorf("disk %d: a backing of type %T", dev.Key, dev.Backing)
	}
	dir, name, err := vm.s.parsePath(file.FileName)
	if err != nil {
		return nil, err
	}
	if *dir == *vm.dir {
		dir = vm.dir
	}
	l := &layer{dir: dir, name: name, kind: flat, size: dev.CapacityInBytes}
	d := &disk{key: dev.Key, size: l.size, dependent: mode == string(types.VirtualDiskModePersistent) && !shared}
	switch b := dev.Backing.(type) {
	case *types.VirtualDiskFlatVer2BackingInfo:
		l.uuid = b.Uuid
		d.thick = b.ThinProvisioned == nil || !*b.ThinProvisioned
	case *types.VirtualDiskRawDiskMappingVer1BackingInfo:
		l.uuid, l.kind = b.Uuid, rawMapping
		if b.CompatibilityMode == string(types.VirtualDiskCompatibilityModePhysicalMode) {
			l.kind, d.dependent = passRaw, false
		}
	}
	if err := l.open(); err != nil {
		return nil, err
	}
	d.push(l)
	if strings.Contains(l.dir.root, nasMark) { // which does not say where holes are
		d.allocated, d.unscanned = map[int64]bool{}, true
		return d, nil
	}
	return d, d.scan()
}

// open opens the extent of a bottom layer, and makes it as large as the disk.
func (l *layer) open() error {
	text, err := os.ReadFile(l.dir.file(l.name))
	if err != nil {
		return err
	}
	if l.raw, err = os.OpenFile(l.dir.file(l.extent()), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return err
	}
	if st, err := l.raw.Stat(); err != nil || st.Size() < l.size {
		if err := l.raw.Truncate(l.size); err != nil {
			return err
		}
	}
	if strings.Contains(string(text), "ddb.longContentID") {
		_, cid, _ := strings.Cut(string(text), "\nCID=")
		n, _ := strconv.ParseUint(strings.SplitN(cid, "\n", 2)[0], 16, 32)
		l.cid = uint32(n)
		return nil
	}
	l.cid = rand.Uint32()
	return os.WriteFile(l.dir.file(l.name), []byte(l.descriptor()), 0o600)
}

// newDelta makes an empty delta over the active layer.
func (vm *VM) newDelta(d *disk) (*layer, error) {
	l := &layer{
		dir: vm.dir, kind: vm.s.opt.DeltaFormat, parent: d.active, size: d.size, uuid: d.active.uuid,
		cid: rand.Uint32(), have: map[int64]byte{}, stale: true,
	}
	stem := strings.TrimSuffix(d.layers[0].name, ".vmdk")
	taken := map[string]bool{}
	for _, other := range d.layers {
		taken[other.name] = true
	}
	for i := 1; l.name == "" || taken[l.name]; i++ {
		l.name = fmt.Sprintf("%s-%06d.vmdk", stem, i)
	}
	var err error
	if l.raw, err = os.OpenFile(filepath.Join(vm.s.scratch, fmt.Sprintf("delta-%d", vm.s.id())), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
		return nil, err
	}
	if err := os.WriteFile(l.dir.file(l.extent()), nil, 0o600); err != nil {
		return nil, err
	}
	return l, os.WriteFile(l.dir.file(l.name), []byte(l.descriptor()), 0o600)
}

// stun is a moment at which change tracking begins or ends: a snapshot, a start. It begins only where no snapshot exists
// (VDDK Programming Guide, "Enable Changed Block Tracking").
func (vm *VM) stun() {
	for _, d := range vm.disks {
		switch {
		case !vm.wanted || !d.dependent:
			d.track = nil
		case d.track == nil && len(vm.snapshots) == 0:
			d.track = newTracking()
		}
	}
}

// freeze puts a delta over each disk that takes part.
func (vm *VM) freeze() (map[int32]*frozenDisk, error) {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	vm.stun()
	frozen := map[int32]*frozenDisk{}
	for _, d := range vm.disks {
		if !d.dependent {
			continue
		}
		if d.track != nil {
			d.track.next()
		}
		l, err := vm.newDelta(d)
		if err != nil {
			return nil, err
		}
		frozen[d.key] = d.freeze()
		d.push(l)
	}
	return frozen, nil
}

// consolidate merges the layers that nothing needs of their own: a layer that no snapshot froze takes over the only one above it.
func (vm *VM) consolidate() error {
	for _, d := range vm.disks {
		for l := vm.needless(d); l != nil; l = vm.needless(d) {
			up := d.children(l)
			if len(up) == 0 {
				d.drop(l)
				continue
			}
			if err := up[0].merge(); err != nil {
				return err
			}
			if err := vm.replace(d, up[0], l); err != nil {
				return err
			}
			d.drop(up[0])
		}
	}
	return nil
}

// needless finds a layer that is neither written to nor frozen, and has one above it at most.
func (vm *VM) needless(d *disk) *layer {
	frozen := map[*layer]bool{d.active: true}
	for _, snap := range vm.snapshots {
		if f := snap.disks[d.key]; f != nil {
			frozen[f.layer] = true
		}
	}
	for _, l := range d.layers {
		if n := len(d.children(l)); !frozen[l] && (n == 1 || n == 0 && l.isDelta()) {
			return l
		}
	}
	return nil
}

// replace lets everything that stands on or points to a layer do so to another.
func (vm *VM) replace(d *disk, old, with *layer) error {
	with.size = old.size
	if err := with.rewrite(); err != nil {
		return err
	}
	for _, c := range d.children(old) {
		c.parent = with
		if err := c.rewrite(); err != nil { // it names its parent
			return err
		}
	}
	if d.active == old {
		d.active = with
	}
	for _, snap := range vm.snapshots {
		if f := snap.disks[d.key]; f != nil && f.layer == old {
			f.layer = with
		}
	}
	return nil
}

func (d *disk) drop(l *layer) {
	for i := range d.layers {
		if d.layers[i] == l {
			d.layers = append(d.layers[:i:i], d.layers[i+1:]...)
			break
		}
	}
	l.remove()
}

// chained says whether a disk has more layers than its snapshots account for.
func (vm *VM) chained() bool {
	for _, d := range vm.disks {
		if vm.needless(d) != nil {
			return true
		}
	}
	return false
}

// chainBacking is the backing of a disk whose top is l; what else it says is that of b.
func chainBacking(ctx *simulator.Context, b types.BaseVirtualDeviceBackingInfo, l *layer, changeID string) types.BaseVirtualDeviceBackingInfo {
	file := types.VirtualDeviceFileBackingInfo{FileName: l.dir.ref(l.name), Datastore: l.dir.object(ctx)}
	switch b := b.(type) {
	case *types.VirtualDiskFlatVer2BackingInfo:
		c := *b
		c.VirtualDeviceFileBackingInfo, c.ChangeId, c.Parent, c.DeltaDiskFormat, c.Uuid = file, changeID, nil, "", l.uuid
		c.ContentId = fmt.Sprintf("%032x", l.cid)
		if l.isDelta() {
			c.DeltaDiskFormat = map[string]string{seSparse: "seSparseFormat", vmfsSparse: "redoLogFormat"}[l.kind]
		}
		if l.parent != nil {
			c.Parent = chainBacking(ctx, b, l.parent, "").(*types.VirtualDiskFlatVer2BackingInfo)
		}
		return &c
	case *types.VirtualDiskRawDiskMappingVer1BackingInfo:
		c := *b
		c.VirtualDeviceFileBackingInfo, c.ChangeId, c.Parent, c.Uuid = file, changeID, nil, l.uuid
		if l.parent != nil {
			c.Parent = chainBacking(ctx, b, l.parent, "").(*types.VirtualDiskRawDiskMappingVer1BackingInfo)
		}
		return &c
	}
	return b
}

// object is the reference of the datastore.
func (d *directory) object(ctx *simulator.Context) *types.ManagedObjectReference {
	for _, e := range ctx.Map.All("Datastore") {
		if ds := e.(*simulator.Datastore); ds.Name == d.datastore {
			ref := ds.Self
			return &ref
		}
	}
	return nil
}

// publish tells vcsim what the disks of the VM and of its snapshots are now. The lock of sim is held.
func (vm *VM) publish(ctx *simulator.Context, sim *simulator.VirtualMachine) {
	vm.mu.Lock()
	live := map[int32]*frozenDisk{}
	for _, d := range vm.disks {
		live[d.key] = &frozenDisk{layer: d.active, size: d.size, track: d.track}
	}
	devices := republished(ctx, sim.Config.Hardware.Device, live)
	frozen := map[types.ManagedObjectReference][]types.BaseVirtualDevice{}
	for ref, snap := range vm.snapshots {
		if obj, ok := ctx.Map.Get(ref).(*simulator.VirtualMachineSnapshot); ok {
			frozen[ref] = republished(ctx, obj.Config.Hardware.Device, snap.disks)
		}
	}
	needed := vm.chained()
	vm.mu.Unlock()

	setDevices(ctx, sim, devices)
	ctx.Update(sim, []types.PropertyChange{{Name: "runtime.consolidationNeeded", Val: needed}, {Name: "summary.runtime.consolidationNeeded", Val: needed}})
	for ref, devices := range frozen {
		obj := ctx.Map.Get(ref).(*simulator.VirtualMachineSnapshot)
		ctx.WithLock(obj, func() { setDevices(ctx, obj, devices) })
	}
	vm.refreshLayout(ctx, sim)
}

// republished is a copy of the devices with the backings that the disks have now.
func republished(ctx *simulator.Context, devices []types.BaseVirtualDevice, disks map[int32]*frozenDisk) []types.BaseVirtualDevice {
	devices = clonedDevices(devices)
	for _, dev := range devices {
		dev, ok := dev.(*types.VirtualDisk)
		if !ok || disks[dev.Key] == nil {
			continue
		}
		f := disks[dev.Key]
		id := ""
		if f.track != nil && f.track.seq > 0 {
			id = f.track.id()
		}
		dev.CapacityInBytes, dev.CapacityInKB = f.size, f.size/1024
		dev.Backing = chainBacking(ctx, dev.Backing, f.layer, id)
	}
	return devices
}

// ownLayout gives vcsim copies to work on: it changes them in place, while a client may be reading the old ones.
func ownLayout(sim *simulator.VirtualMachine) {
	if sim.Snapshot != nil {
		sim.Snapshot = cloned(sim.Snapshot)
	}
	sim.Layout, sim.LayoutEx, sim.Storage = cloned(sim.Layout), cloned(sim.LayoutEx), cloned(sim.Storage)
}

// refreshLayout lets vcsim list the files again. That gives them new keys, by which vcsim would delete the wrong ones with a snapshot:
// the keys in the snapshots' layouts follow.
func (vm *VM) refreshLayout(ctx *simulator.Context, sim *simulator.VirtualMachine) {
	ownLayout(sim)
	sim.RefreshStorageInfo(ctx, nil)
	vm.mu.Lock()
	defer vm.mu.Unlock()
	for i := range sim.LayoutEx.Snapshot {
		layout := &sim.LayoutEx.Snapshot[i]
		layout.DataKey = -1
		snap := vm.snapshots[layout.Key]
		for _, f := range sim.LayoutEx.File {
			if snap != nil && f.Name == vm.dir.ref(snap.file) {
				layout.DataKey = f.Key
			}
		}
	}
}

// snapshotFile is the name of the file that vcsim made for a snapshot.
func snapshotFile(sim *simulator.VirtualMachine, ref types.ManagedObjectReference) string {
	for _, layout := range sim.LayoutEx.Snapshot {
		for _, f := range sim.LayoutEx.File {
			if layout.Key == ref && f.Key == layout.DataKey {
				return path.Base(f.Name)
			}
		}
	}
	return ""
}

// rewrite writes the descriptor again, and makes the bytes as large as the disk.
func (l *layer) rewrite() error {
	if err := l.raw.Truncate(l.size); err != nil {
		return err
	}
	return os.WriteFile(l.dir.file(l.name), []byte(l.descriptor()), 0o600)
}
