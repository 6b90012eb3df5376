package vspheretest

import (
	"crypto/sha1"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// ExportSnapshot gives the disks as they were when the snapshot was taken.
func (o *snapshotObject) ExportSnapshot(ctx *simulator.Context, _ *types.ExportSnapshot) soap.HasFault {
	body := new(methods.ExportSnapshotBody)
	vm := o.s.vm(o.Vm)
	if vm == nil {
		body.Fault_ = simulator.Fault("", &types.ManagedObjectNotFound{Obj: o.Vm})
		return body
	}
	vm.mu.Lock()
	var disks map[int32]*frozenDisk
	if snap := vm.snapshots[o.Self]; snap != nil {
		disks = maps.Clone(snap.disks)
	}
	vm.mu.Unlock()
	l := vm.s.export(ctx, vm, clonedDevices(o.Config.Hardware.Device), disks)
	body.Res = &types.ExportSnapshotResponse{Returnval: l.Self}
	return body
}

// ExportVm gives the disks of a VM that is off.
func (o *vmObject) ExportVm(ctx *simulator.Context, _ *types.ExportVm) soap.HasFault {
	body := new(methods.ExportVmBody)
	if o.vm.PoweredOn() {
		fault := &types.InvalidPowerState{RequestedState: types.VirtualMachinePowerStatePoweredOff, ExistingState: types.VirtualMachinePowerStatePoweredOn}
		body.Fault_ = simulator.Fault("the VM runs", fault)
		return body
	}
	disks := map[int32]*frozenDisk{}
	o.vm.mu.Lock()
	for _, d := range o.vm.disks {
		if d.layers[0].kind != passRaw {
			disks[d.key] = d.freeze()
		}
	}
	o.vm.mu.Unlock()
	l := o.vm.s.export(ctx, o.vm, clonedDevices(o.Config.Hardware.Device), disks)
	body.Res = &types.ExportVmResponse{Returnval: l.Self}
	return body
}

// leasePlace is what a lease calls a disk.
func (s *Server) leasePlace(devices []types.BaseVirtualDevice, dev types.BaseVirtualDevice, number int) string {
	if s.lies(func(f *Faults) bool { return f.LeaseNumbers }) {
		return fmt.Sprintf("disk:%d", number)
	}
	return devicePlace(devices, dev)
}

// export makes a lease with the disks, and the nvram as vCenter 8 gives it along.
func (s *Server) export(ctx *simulator.Context, vm *VM, devices []types.BaseVirtualDevice, disks map[int32]*frozenDisk) *lease {
	l := s.newLease(ctx, vm)
	fault := s.fault(func(f *Faults) types.BaseMethodFault {
		if take(&f.LeaseFails) {
			return orFault(f.LeaseFault, &types.InvalidState{})
		}
		return nil
	})
	dir, err := os.MkdirTemp(s.scratch, "lease-")
	if err != nil || fault != nil {
		go l.end(s.context(), orFault(fault, &types.FileFault{File: fmt.Sprint(err)}))
		return l
	}
	l.close = func(bool) { _ = os.RemoveAll(dir) }
	var names []string
	keys := map[string]int32{}
	for _, dev := range devices {
		key := dev.GetVirtualDevice().Key
		if _, ok := dev.(*types.VirtualDisk); !ok || disks[key] == nil {
			continue
		}
		name := fmt.Sprintf("disk-%d.vmdk", len(names))
		names, keys[name] = append(names, name), key
		place := s.leasePlace(devices, dev, len(names)-1)
		l.files[name] = &leaseFile{key: "/" + vm.ref.Value + "/" + place, importKey: "/" + vm.name() + "/" + place, file: filepath.Join(dir, name), size: disks[key].size}
	}
	if _, err := os.Stat(vm.File(vm.fileName(".nvram"))); err == nil {
		name := vm.fileName(".nvram")
		names = append(names, name)
		l.files[name] = &leaseFile{key: "/" + vm.ref.Value + "/nvram", importKey: "/" + vm.name() + "/nvram", file: vm.File(name)}
	}
	go func() {
		if !s.begin() {
			return
		}
		defer s.end()
		for name, key := range keys {
			if err := vm.stream(disks[key], l.files[name].file); err != nil {
				l.end(s.context(), &types.FileFault{File: err.Error()})
				return
			}
		}
		l.ready(names)
	}()
	return l
}

// name is that of the directory, which is what the VM was called.
func (vm *VM) name() string { return strings.TrimSuffix(vm.vmx, ".vmx") }

// devicePlace is how a lease names where a disk is: "ParaVirtualSCSIController0:0".
func devicePlace(devices []types.BaseVirtualDevice, dev types.BaseVirtualDevice) string {
	d := dev.GetVirtualDevice()
	for _, c := range devices {
		if ctl, ok := c.(types.BaseVirtualController); ok && c.GetVirtualDevice().Key == d.ControllerKey && d.UnitNumber != nil {
			kind := strings.TrimPrefix(fmt.Sprintf("%T", c), "*types.")
			return fmt.Sprintf("%s%d:%d", kind, ctl.GetVirtualController().BusNumber, *d.UnitNumber)
		}
	}
	return fmt.Sprint("device", d.Key)
}

// stream writes a disk as streamOptimized VMDK. qemu-img does it.
func (vm *VM) stream(d *frozenDisk, to string) error {
	raw := to + ".raw"
	f, err := os.OpenFile(raw, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer os.Remove(raw)
	defer f.Close()
	if err := vm.copyFrozen(f, d); err != nil {
		return err
	}
	return qemuImg("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, to)
}

// copyFrozen writes the allocated bytes of a disk; the VM may go on between them.
func (vm *VM) copyFrozen(f *os.File, d *frozenDisk) error {
	b := make([]byte, unit)
	for _, u := range slices.Sorted(maps.Keys(d.allocated)) {
		p := b[:min(unit, d.size-u*unit)]
		vm.mu.Lock()
		_, err := d.layer.ReadAt(p, u*unit)
		vm.mu.Unlock()
		if err != nil {
			return err
		}
		if _, err := f.WriteAt(p, u*unit); err != nil {
			return err
		}
	}
	return f.Truncate(d.size)
}

func qemuImg(args ...string) error {
	out, err := exec.Command("qemu-img", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("qemu-img %s: %w: %s", args[0], err, out)
	}
	return nil
}

// receive takes a disk, and puts it into the files of the VM.
func (l *lease) receive(w http.ResponseWriter, r *http.Request, name string, f *leaseFile, cut int64) {
	tmp, err := os.CreateTemp(l.s.scratch, "upload-*.vmdk")
	if err != nil {
		http.Error(w, "", http.StatusInternalServerError)
		return
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	var from io.Reader = r.Body
	if cut >= 0 {
		from = io.LimitReader(r.Body, cut)
	}
	sum := sha1.New()
	n, err := io.Copy(io.MultiWriter(tmp, sum), from)
	l.s.count(func(c *counters) { c.lease[name] += n })
	if cut >= 0 {
		f.done(n, "", fmt.Errorf("%s ended early", name))
		panic(http.ErrAbortHandler)
	}
	if err == nil {
		err = l.vm.unpack(f.disk, tmp.Name())
	}
	f.done(n, hex.EncodeToString(sum.Sum(nil)), err)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.WriteHeader(http.StatusCreated)
}

// unpack reads a VMDK with qemu-img and makes it the content of the disk.
func (vm *VM) unpack(d *disk, file string) error {
	out, err := exec.Command("qemu-img", "info", "-f", "vmdk", "--output=json", file).CombinedOutput()
	if err != nil {
		return fmt.Errorf("qemu-img info: %w: %s", err, out)
	}
	var info struct {
		Size    int64 `json:"virtual-size"`
		Details struct {
			Data struct {
				Kind string `json:"create-type"`
			} `json:"data"`
		} `json:"format-specific"`
	}
	if err := json.Unmarshal(out, &info); err != nil {
		return err
	}
	vm.mu.Lock()
	size := d.size
	vm.mu.Unlock()
	if info.Size != size || info.Details.Data.Kind != "streamOptimized" {
		return fmt.Errorf("a disk of %d bytes of the kind %q, want %d of streamOptimized", info.Size, info.Details.Data.Kind, size)
	}
	defer os.Remove(file + ".raw")
	if err := qemuImg("convert", "-f", "vmdk", "-O", "raw", file, file+".raw"); err != nil {
		return err
	}
	raw, err := os.Open(file + ".raw")
	if err != nil {
		return err
	}
	defer raw.Close()
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return d.load(raw)
}
