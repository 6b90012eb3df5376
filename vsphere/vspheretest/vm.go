package vspheretest

import (
	"fmt"
	"io"
	"path"
	"slices"
	"sync"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// VM is a VM of the server. What its guest does is safe for concurrent use.
//
// Locks, the first taken first: ops, a lock of vcsim, mu.
type VM struct {
	s   *Server
	ref types.ManagedObjectReference
	ops sync.Mutex // one task at a time

	mu           sync.Mutex // guards following
	dir          *directory
	vmx          string // name of the configuration file
	instanceUUID string
	on           bool
	wanted       bool // change tracking is enabled; each disk begins at the next stun
	disks        []*disk
	snapshots    map[types.ManagedObjectReference]*snapshot
	next         int // of the numbers in the names of deltas
	gone         bool
}

// snapshot is one that exists.
type snapshot struct {
	name     string
	quiesced bool
	file     string   // the .vmsn
	counted  []string // keys of the gauge
	disks    map[int32]*frozenDisk
}

// VM gives the VM of an id, "vm-12"; nil when there is none.
func (s *Server) VM(id string) *VM {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.vms[types.ManagedObjectReference{Type: "VirtualMachine", Value: id}]
}

// adopt makes a VM of ours of one that vcsim has, and of the files that it names.
func (s *Server) adopt(ctx *simulator.Context, ref types.ManagedObjectReference) (*VM, error) {
	sim := ctx.Map.Get(ref).(*simulator.VirtualMachine)
	vm := &VM{s: s, ref: ref, snapshots: map[types.ManagedObjectReference]*snapshot{}}
	var err error
	ctx.WithLock(sim, func() {
		if vm.dir, vm.vmx, err = s.parsePath(sim.Config.Files.VmPathName); err != nil {
			return
		}
		vm.instanceUUID = sim.Config.InstanceUuid
		vm.wanted = sim.Config.ChangeTrackingEnabled != nil && *sim.Config.ChangeTrackingEnabled
		err = vm.adoptDisks(sim.Config.Hardware.Device)
	})
	if err != nil {
		vm.close()
		return nil, fmt.Errorf("adopt %s: %w", ref.Value, err)
	}
	s.mu.Lock()
	s.vms[ref] = vm
	s.mu.Unlock()
	return vm, nil
}

// adoptDisks opens the files of disks that are new to us.
func (vm *VM) adoptDisks(devices []types.BaseVirtualDevice) error {
	for _, dev := range devices {
		dev, ok := dev.(*types.VirtualDisk)
		if !ok || vm.diskByKey(dev.Key) != nil {
			continue
		}
		d, err := vm.openDisk(dev, sharedBus(devices, dev.ControllerKey))
		if err != nil {
			return err
		}
		vm.disks = append(vm.disks, d)
	}
	return nil
}

// sharedBus says whether the bus of the controller is shared with other hosts.
func sharedBus(devices []types.BaseVirtualDevice, controller int32) bool {
	for _, dev := range devices {
		if c, ok := dev.(types.BaseVirtualSCSIController); ok && dev.GetVirtualDevice().Key == controller {
			return c.GetVirtualSCSIController().SharedBus != types.VirtualSCSISharingNoSharing && c.GetVirtualSCSIController().SharedBus != ""
		}
	}
	return false
}

// Ref is the reference of the VM.
func (vm *VM) Ref() types.ManagedObjectReference { return vm.ref }

// sim is the VM as vcsim has it, or nil when it is no more.
func (vm *VM) sim() *simulator.VirtualMachine {
	sim, _ := vm.s.model.Map().Get(vm.ref).(*simulator.VirtualMachine)
	return sim
}

// InstanceUUID is what vCenter knows the VM by.
func (vm *VM) InstanceUUID() string {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return vm.instanceUUID
}

// ChangeTracking says whether it is enabled; it begins at the next snapshot.
func (vm *VM) ChangeTracking() bool {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return vm.wanted
}

// PoweredOn says whether the VM runs.
func (vm *VM) PoweredOn() bool {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return vm.on
}

func (vm *VM) powered(on bool) {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	vm.on = on
	if on {
		vm.stun()
	}
}

// Datastore is the name of the one with the configuration file.
func (vm *VM) Datastore() string {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return vm.dir.datastore
}

// Host is the name of the one that the VM is on.
func (vm *VM) Host() (name string) {
	sim := vm.sim()
	var ref types.ManagedObjectReference
	vm.s.context().WithLock(sim, func() { ref = *sim.Runtime.Host })
	return vm.s.model.Map().Get(ref).(*simulator.HostSystem).Name
}

// Pool is the name of the resource pool, and of the cluster or host that it is of.
func (vm *VM) Pool() (name, owner string) {
	sim := vm.sim()
	var ref types.ManagedObjectReference
	vm.s.context().WithLock(sim, func() { ref = *sim.ResourcePool })
	pool := vm.s.model.Map().Get(ref).(*simulator.ResourcePool)
	return pool.Name, vm.s.model.Map().Get(pool.Owner).(mo.Entity).Entity().Name
}

// File is where a file of the VM is on this machine. The test may read it, or break it.
func (vm *VM) File(name string) string {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return vm.dir.file(name)
}

// FilePath is the datastore path of a file of the VM: "[LocalDS_0] web01/web01.vmdk".
func (vm *VM) FilePath(name string) string {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return vm.dir.ref(name)
}

// Disks is how many there are.
func (vm *VM) Disks() int {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return len(vm.disks)
}

// DiskKey is the device key of the disk.
func (vm *VM) DiskKey(disk int) int32 {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return vm.disks[disk].key
}

// DiskSize is in bytes.
func (vm *VM) DiskSize(disk int) int64 {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return vm.disks[disk].size
}

// ReadAt reads what the guest sees now.
func (vm *VM) ReadAt(disk int, p []byte, off int64) (int, error) {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return vm.disks[disk].active.ReadAt(p, off)
}

// Contents is a disk as the guest sees it at the moment of each read.
func (vm *VM) Contents(disk int) *io.SectionReader {
	return io.NewSectionReader(guestDisk{vm, disk}, 0, vm.DiskSize(disk))
}

type guestDisk struct {
	vm   *VM
	disk int
}

// ReadAt implements io.ReaderAt.
func (g guestDisk) ReadAt(p []byte, off int64) (int, error) { return g.vm.ReadAt(g.disk, p, off) }

// WriteAt writes as the guest does. An error ends the test.
func (vm *VM) WriteAt(disk int, p []byte, off int64) {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	vm.s.must(vm.disks[disk].writeAt(p, off))
}

// Zero is a TRIM by the guest.
func (vm *VM) Zero(disk int, off, n int64) {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	vm.s.must(vm.disks[disk].zero(off, n))
}

// ResetTracking begins the change tracking of a disk anew: an older change id is refused from the next snapshot on.
func (vm *VM) ResetTracking(disk int) {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if vm.disks[disk].track != nil {
		vm.disks[disk].track = newTracking()
	}
}

func (vm *VM) diskByKey(key int32) *disk {
	for _, d := range vm.disks {
		if d.key == key {
			return d
		}
	}
	return nil
}

// SnapshotInfo is a snapshot that exists.
type SnapshotInfo struct {
	Ref      types.ManagedObjectReference
	Name     string
	Quiesced bool
}

// Snapshots are those that exist, by reference.
func (vm *VM) Snapshots() []SnapshotInfo {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	var all []SnapshotInfo
	for ref, snap := range vm.snapshots {
		all = append(all, SnapshotInfo{ref, snap.name, snap.quiesced})
	}
	slices.SortFunc(all, func(a, b SnapshotInfo) int {
		if len(a.Ref.Value) != len(b.Ref.Value) {
			return len(a.Ref.Value) - len(b.Ref.Value)
		}
		return map[bool]int{true: -1, false: 1}[a.Ref.Value < b.Ref.Value]
	})
	return all
}

// close closes the files.
func (vm *VM) close() {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	vm.gone = true
	for _, d := range vm.disks {
		for _, l := range d.layers {
			_ = l.raw.Close()
		}
	}
}

// layerAt finds the disk and the layer that a file on a datastore belongs to.
func (vm *VM) layerAt(root, file string) (*disk, *layer) {
	for _, d := range vm.disks {
		for _, l := range d.layers {
			if l.dir.root == root && (path.Join(l.dir.path, l.extent()) == file || path.Join(l.dir.path, l.name) == file) {
				return d, l
			}
		}
	}
	return nil, nil
}

// setDevices replaces the devices that a managed object has: others may be reading the old ones.
func setDevices(ctx *simulator.Context, obj mo.Reference, devices []types.BaseVirtualDevice) {
	ctx.Update(obj, []types.PropertyChange{{Name: "config.hardware.device", Val: devices}})
}

// Destroy removes the VM and its files. It is off.
func (vm *VM) Destroy() { vm.destroy(vm.s.context()) }
