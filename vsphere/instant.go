package vsphere

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/view"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// Instant is a VM that runs out of an NFS export of ours: what is, or is to be, on the server. Whoever keeps it (as JSON) before each step can finish or
// undo the steps after a crash: each of them may be done twice.
type Instant struct {
	Host      string `json:"host"`      // that mounts the export: managed object, "host-12"
	Datastore string `json:"datastore"` // what the export is called there
	Server    string `json:"server"`    // address of the NFS server, as the host reaches it
	Export    string `json:"export"`    // path of the export
	VMX       string `json:"vmx"`       // path in the export: "web/web.vmx"
	Name      string `json:"name"`      // of the VM
	Folder    string `json:"folder"`    // of the inventory: managed object
	Pool      string `json:"pool"`      // managed object
	Keep      bool   `json:"keep"`      // the identity of the VM of the point
	VM        string `json:"vm,omitempty"`
	Store     string `json:"store,omitempty"` // the datastore: managed object, once it was mounted
	// Portgroup of a distributed switch that the cards are in, managed object; empty: as the .vmx says.
	Portgroup string `json:"portgroup,omitempty"`
}

// InstantState is what is on the server.
type InstantState struct {
	Mounted    bool
	Registered bool
	On         bool
	// Ours reports whether files of the VM are on the export; not any more when it was moved away.
	Ours bool
	Busy bool // a task of the VM is not over
	// Partly: some of its disks are elsewhere.
	Partly bool
	VM     string // managed object
}

// InstantPlace says where a VM is to run; empty: as the VM of the point did, or else the first that can.
type InstantPlace struct {
	Host, Folder, Pool string
	Network            string // name; empty: as the .vmx says
	Inventory          []byte // inventory.json of the point; may be empty
}

// FindPlace chooses where a VM runs.
func (s *Source) FindPlace(ctx context.Context, p InstantPlace, i *Instant) (warnings []string, err error) {
	r := &restoring{src: s, what: &Restore{Folder: p.Folder, Pool: p.Pool, Inventory: p.Inventory}}
	var was inventory
	if len(p.Inventory) > 0 {
		if err := json.Unmarshal(p.Inventory, &was); err != nil {
			return nil, fmt.Errorf("inventory.json: %w", err)
		}
	}
	v, err := view.NewManager(s.c.Client).CreateContainerView(ctx, s.c.ServiceContent.RootFolder,
		[]string{"Folder", "Datacenter", "ResourcePool"}, true)
	if err != nil {
		return nil, fmt.Errorf("vsphere: %w", missing(err))
	}
	defer v.Destroy(context.WithoutCancel(ctx))
	all, err := placesOf(ctx, v)
	if err != nil {
		return nil, err
	}
	folder := p.Folder
	if folder == "" && was.Path != "" {
		folder = path.Dir(was.Path)
	}
	if err := r.findFolder(all, folder); err != nil {
		return nil, fmt.Errorf("vsphere: %w", err)
	}
	in, err := r.inDatacenter(ctx, "HostSystem", "Datastore", "Network")
	if err != nil {
		return nil, fmt.Errorf("vsphere: %w", missing(err))
	}
	defer in.Destroy(context.WithoutCancel(ctx))
	stores, err := r.stores(ctx, in)
	if err != nil {
		return nil, fmt.Errorf("vsphere: %w", missing(err))
	}
	// It runs from the export, but is to be moved to where it was: a host that can is chosen first.
	want, err := r.wantedStore(stores, &was)
	if err != nil {
		return nil, fmt.Errorf("vsphere: %w", err)
	}
	has := func(host types.ManagedObjectReference) bool { return want == "" || onHost(stores[want], host) }
	host, pool, err := r.findHost(ctx, in, all, p.Host, &was, has)
	if err != nil {
		return nil, fmt.Errorf("vsphere: %w", err)
	}
	i.Host, i.Folder, i.Pool, i.Portgroup = host.Value, r.to.folder.Value, pool.Value, ""
	if p.Network != "" {
		if err := r.findNetworks(ctx, in); err != nil {
			return nil, fmt.Errorf("vsphere: %w", missing(err))
		}
		net, err := r.networkNamed(p.Network)
		if err != nil {
			return nil, fmt.Errorf("vsphere: %w", err)
		}
		if net.Type == portgroup {
			i.Portgroup = net.Value
		}
	}
	return r.warnings, nil
}

// HostAddresses are those from which the host of i may mount an export.
func (s *Source) HostAddresses(ctx context.Context, i *Instant) ([]netip.Prefix, error) {
	var h mo.HostSystem
	if err := s.c.retrieve(ctx, i.hostRef(), []string{"config.network.vnic"}, &h); err != nil {
		return nil, fmt.Errorf("vsphere: %w", missing(err))
	}
	if h.Config == nil || h.Config.Network == nil {
		return nil, nil
	}
	var out []netip.Prefix
	for _, nic := range h.Config.Network.Vnic {
		if nic.Spec.Ip == nil {
			continue
		}
		addrs := []string{nic.Spec.Ip.IpAddress}
		if v6 := nic.Spec.Ip.IpV6Config; v6 != nil {
			for _, a := range v6.IpV6Address {
				addrs = append(addrs, a.IpAddress)
			}
		}
		for _, text := range addrs {
			if a, err := netip.ParseAddr(text); err == nil {
				out = append(out, netip.PrefixFrom(a.WithZone(""), a.BitLen()))
			}
		}
	}
	return out, nil
}

// LocalAddress is the address of this computer from which a server is reached. Nothing is sent.
func LocalAddress(server string) (string, error) {
	u, err := parseURL(server)
	if err != nil {
		return "", err
	}
	port := u.Port()
	if port == "" {
		port = "443"
	}
	conn, err := net.Dial("udp", net.JoinHostPort(u.Hostname(), port))
	if err != nil {
		return "", fmt.Errorf("vsphere: %w", err)
	}
	defer conn.Close()
	host, _, err := net.SplitHostPort(conn.LocalAddr().String())
	return host, err
}

// Look says what of it is there.
func (s *Source) Look(ctx context.Context, i *Instant) (st InstantState, err error) {
	ds, err := s.datastoreOf(ctx, i)
	if err != nil {
		return st, err
	}
	var vms []types.ManagedObjectReference
	if ds != nil {
		st.Mounted, vms = true, ds.Vm
	}
	if i.VM != "" && !slices.ContainsFunc(vms, func(r types.ManagedObjectReference) bool { return r.Value == i.VM }) {
		vms = append(vms, i.vmRef())
	}
	for _, ref := range vms {
		var vm mo.VirtualMachine
		err := s.c.retrieve(ctx, ref, []string{"config.files.vmPathName", "config.hardware.device", "runtime.powerState", "runtime.connectionState", "datastore", "recentTask"}, &vm)
		if fault.Is(err, &types.ManagedObjectNotFound{}) {
			continue
		}
		if err != nil {
			return st, fmt.Errorf("vsphere: %w", missing(err))
		}
		if ref.Value != i.VM && (vm.Config == nil || vm.Config.Files.VmPathName != i.vmxPath(ds)) {
			continue
		}
		st.Registered, st.VM, st.On = true, ref.Value, vm.Runtime.PowerState != types.VirtualMachinePowerStatePoweredOff
		if err := i.place(&vm, ds, &st); err != nil {
			return st, fmt.Errorf("vsphere: %w", err)
		}
		if st.Busy, err = s.busy(ctx, vm.RecentTask); err != nil {
			return st, fmt.Errorf("vsphere: %w", missing(err))
		}
	}
	return st, nil
}

// ErrUnknownState: the server does not know whether the VM runs.
var ErrUnknownState = errors.New("nobody knows whether it runs")

// place finds out whether the VM has its files on the export. That it has not is only said where it is seen to have all of them somewhere else: what serves it
// ends then.
func (i *Instant) place(vm *mo.VirtualMachine, ds *mo.Datastore, st *InstantState) error {
	switch c := vm.Runtime.ConnectionState; {
	case c == types.VirtualMachineConnectionStateDisconnected, c == types.VirtualMachineConnectionStateInaccessible:
		return fmt.Errorf("%s is %s: %w", i.Name, c, ErrUnknownState)
	case len(vm.Datastore) == 0:
		return fmt.Errorf("the server does not say where the files of %s are", i.Name)
	}
	ours := func(ref types.ManagedObjectReference) bool {
		return ref.Value == i.Store || ds != nil && ref == ds.Self
	}
	st.Ours = slices.ContainsFunc(vm.Datastore, ours)
	if ds == nil && (st.Ours || i.Store == "" || vm.Config == nil || strings.HasPrefix(vm.Config.Files.VmPathName, "["+i.Datastore+"] ")) {
		return fmt.Errorf("%s runs from %s:%s, which no host has mounted now", i.Name, i.Server, i.Export)
	}
	if vm.Config == nil || !st.Ours {
		return nil
	}
	for _, d := range vm.Config.Hardware.Device {
		disk, ok := d.(*types.VirtualDisk)
		if !ok {
			continue
		}
		if b, ok := disk.Backing.(types.BaseVirtualDeviceFileBackingInfo); ok {
			at := b.GetVirtualDeviceFileBackingInfo().Datastore
			st.Partly = st.Partly || at != nil && !ours(*at)
		}
	}
	return nil
}

// busy reports whether one of the tasks is not over.
func (s *Source) busy(ctx context.Context, tasks []types.ManagedObjectReference) (bool, error) {
	for _, ref := range tasks {
		var t mo.Task
		err := s.c.retrieve(ctx, ref, []string{"info.state"}, &t)
		if fault.Is(err, &types.ManagedObjectNotFound{}) {
			continue
		}
		if err != nil {
			return false, err
		}
		if t.Info.State == types.TaskInfoStateRunning || t.Info.State == types.TaskInfoStateQueued {
			return true, nil
		}
	}
	return false, nil
}

// vmxPath is the configuration file on the datastore, which may have been given another name.
func (i *Instant) vmxPath(ds *mo.Datastore) string {
	name := i.Datastore
	if ds != nil {
		name = ds.Name
	}
	return "[" + name + "] " + i.VMX
}

// datastoreOf finds the datastore of the export, whatever it is called; nil when there is none. Another one of its name is an error.
func (s *Source) datastoreOf(ctx context.Context, i *Instant) (*mo.Datastore, error) {
	v, err := view.NewManager(s.c.Client).CreateContainerView(ctx, s.c.ServiceContent.RootFolder, []string{"Datastore"}, true)
	if err != nil {
		return nil, fmt.Errorf("vsphere: %w", missing(err))
	}
	defer v.Destroy(context.WithoutCancel(ctx))
	var all []mo.Datastore
	if err := v.Retrieve(ctx, []string{"Datastore"}, []string{"name", "info", "vm", "host"}, &all); err != nil {
		return nil, fmt.Errorf("vsphere: %w", missing(err))
	}
	for k := range all {
		if nas, ok := all[k].Info.(*types.NasDatastoreInfo); ok && nas.Nas != nil && nas.Nas.RemoteHost == i.Server && nas.Nas.RemotePath == i.Export {
			return &all[k], nil
		}
	}
	for k := range all {
		if all[k].Name == i.Datastore {
			return nil, fmt.Errorf("vsphere: there is a datastore %s that is not %s:%s", i.Datastore, i.Server, i.Export)
		}
	}
	return nil, nil
}

func (s *Source) datastoreSystem(ctx context.Context, i *Instant) (ref types.ManagedObjectReference, err error) {
	var h mo.HostSystem
	if err := s.c.retrieve(ctx, i.hostRef(), []string{"configManager.datastoreSystem"}, &h); err != nil {
		return ref, err
	}
	if h.ConfigManager.DatastoreSystem == nil {
		return ref, errors.New("the host has no datastores")
	}
	return *h.ConfigManager.DatastoreSystem, nil
}

func (i *Instant) hostRef() types.ManagedObjectReference {
	return types.ManagedObjectReference{Type: "HostSystem", Value: i.Host}
}

func (i *Instant) vmRef() types.ManagedObjectReference {
	return types.ManagedObjectReference{Type: "VirtualMachine", Value: i.VM}
}

// Mount makes the export a datastore of the host, unless it is.
func (s *Source) Mount(ctx context.Context, i *Instant) error {
	ds, err := s.datastoreOf(ctx, i)
	if err != nil {
		return err
	}
	if ds != nil {
		i.Store = ds.Self.Value
		if slices.ContainsFunc(ds.Host, func(m types.DatastoreHostMount) bool { return m.Key == i.hostRef() }) {
			return nil
		}
	}
	sys, err := s.datastoreSystem(ctx, i)
	var res *types.CreateNasDatastoreResponse
	if err == nil {
		res, err = methods.CreateNasDatastore(ctx, s.c, &types.CreateNasDatastore{This: sys, Spec: types.HostNasVolumeSpec{
			RemoteHost: i.Server, RemotePath: i.Export, LocalPath: i.Datastore, AccessMode: string(types.HostMountModeReadWrite), Type: string(types.HostFileSystemVolumeFileSystemTypeNFS)}})
	}
	if err != nil {
		return fmt.Errorf("vsphere: mount %s:%s as %s: %w", i.Server, i.Export, i.Datastore, missing(err))
	}
	i.Store = res.Returnval.Value
	s.logf("%s: mounted", i.Datastore)
	return nil
}

// Register makes the folder a VM, unless it is one. i.VM is set.
func (s *Source) Register(ctx context.Context, i *Instant) error {
	st, err := s.Look(ctx, i)
	if err != nil {
		return err
	}
	if st.Registered {
		i.VM = st.VM
		return s.plug(ctx, i)
	}
	ds, err := s.datastoreOf(ctx, i)
	if err != nil {
		return err
	}
	host := i.hostRef()
	res, err := methods.RegisterVM_Task(ctx, s.c, &types.RegisterVM_Task{This: types.ManagedObjectReference{Type: "Folder", Value: i.Folder}, Path: i.vmxPath(ds), Name: i.Name,
		Pool: &types.ManagedObjectReference{Type: "ResourcePool", Value: i.Pool}, Host: &host})
	var made types.AnyType
	if err == nil {
		made, err = s.wait(ctx, res.Returnval)
	}
	if err != nil {
		return fmt.Errorf("vsphere: register %s: %w", i.vmxPath(ds), missing(err))
	}
	ref, ok := made.(types.ManagedObjectReference)
	if !ok {
		return fmt.Errorf("vsphere: register %s: the server does not say which VM it is", i.vmxPath(ds))
	}
	i.VM = ref.Value
	return s.plug(ctx, i)
}

// PowerOn starts the VM, and answers what the host asks about files that were moved or copied.
func (s *Source) PowerOn(ctx context.Context, i *Instant) error {
	if err := s.powerOn(ctx, i.vmRef(), i.Name, i.Keep); err != nil {
		return fmt.Errorf("vsphere: switch %s on: %w", i.Name, missing(err))
	}
	return nil
}

// PowerOff switches the VM off; with patience the guest is asked to shut down before that. One that was moved away is left alone.
func (s *Source) PowerOff(ctx context.Context, i *Instant, patience time.Duration) error {
	st, err := s.Look(ctx, i)
	if err != nil || !st.On || !st.Ours {
		return err
	}
	if st.Partly {
		return fmt.Errorf("vsphere: %s: %w", i.Name, ErrPartlyMoved)
	}
	i.VM = st.VM // which a crash may have kept from being noted
	if patience > 0 {
		if _, err := methods.ShutdownGuest(ctx, s.c, &types.ShutdownGuest{This: i.vmRef()}); err == nil {
			for end := time.Now().Add(patience); time.Now().Before(end); {
				if err := s.cfg.Sleep(ctx, time.Second); err != nil {
					return err
				}
				if st, err := s.Look(ctx, i); err != nil || !st.On {
					return err
				}
			}
		}
	}
	res, err := methods.PowerOffVM_Task(ctx, s.c, &types.PowerOffVM_Task{This: i.vmRef()})
	if err == nil {
		_, err = s.wait(ctx, res.Returnval)
	}
	if err != nil && !fault.Is(err, &types.InvalidPowerState{}) {
		return fmt.Errorf("vsphere: switch %s off: %w", i.Name, missing(err))
	}
	return nil
}

// ErrStillUsed: the VM runs, or has its files on the export.
var ErrStillUsed = errors.New("the VM runs from it")

// ErrPartlyMoved: the VM has disks on the export and elsewhere, which only its owner can tell what is to become of.
var ErrPartlyMoved = errors.New("some of its disks are on other datastores: move all of them there, or delete the VM")

// Remove takes the VM, if it is off and has its files on the export, and the datastore away from the server.
func (s *Source) Remove(ctx context.Context, i *Instant) error {
	st, err := s.Look(ctx, i)
	if err != nil {
		return err
	}
	if st.Registered && !st.Ours {
		if err := s.forgetBoot(ctx, i); err != nil {
			return err
		}
	}
	if st.Registered && st.Ours {
		if st.On {
			return fmt.Errorf("vsphere: %s: %w", i.Datastore, ErrStillUsed)
		}
		if st.Partly {
			return fmt.Errorf("vsphere: %s: %w", i.Name, ErrPartlyMoved)
		}
		_, err := methods.UnregisterVM(ctx, s.c, &types.UnregisterVM{This: types.ManagedObjectReference{Type: "VirtualMachine", Value: st.VM}})
		if err != nil && !fault.Is(err, &types.ManagedObjectNotFound{}) {
			return fmt.Errorf("vsphere: unregister %s: %w", i.Name, missing(err))
		}
	}
	ds, err := s.datastoreOf(ctx, i)
	if err != nil || ds == nil {
		return err
	}
	var errs []error
	for _, m := range ds.Host { // a VM that was moved to another host brought it along
		errs = append(errs, s.unmount(ctx, i, ds.Self, m.Key.Value))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	s.logf("%s: removed", i.Datastore)
	return nil
}

func (s *Source) unmount(ctx context.Context, i *Instant, ds types.ManagedObjectReference, host string) error {
	at := *i
	at.Host = host
	sys, err := s.datastoreSystem(ctx, &at)
	if err == nil {
		_, err = methods.RemoveDatastore(ctx, s.c, &types.RemoveDatastore{This: sys, Datastore: ds})
	}
	switch {
	case err == nil || fault.Is(err, &types.ManagedObjectNotFound{}) || fault.Is(err, &types.NotFound{}):
		return nil
	case fault.Is(err, &types.ResourceInUse{}):
		return fmt.Errorf("vsphere: %s: %w: %w", i.Datastore, ErrStillUsed, err)
	}
	return fmt.Errorf("vsphere: remove the datastore %s: %w", i.Datastore, missing(err))
}

// Relocate moves all files of the VM to another datastore, while it runs.
func (s *Source) Relocate(ctx context.Context, i *Instant, datastore string, progress func(percent int32)) error {
	var vm mo.VirtualMachine
	if err := s.c.retrieve(ctx, i.vmRef(), []string{"runtime.host"}, &vm); err != nil {
		return fmt.Errorf("vsphere: %w", missing(err))
	}
	v, err := view.NewManager(s.c.Client).CreateContainerView(ctx, s.c.ServiceContent.RootFolder, []string{"Datastore"}, true)
	if err != nil {
		return fmt.Errorf("vsphere: %w", missing(err))
	}
	defer v.Destroy(context.WithoutCancel(ctx))
	r := &restoring{src: s, what: &Restore{Datastore: datastore}}
	if vm.Runtime.Host == nil {
		return fmt.Errorf("vsphere: %s is on no host", i.Name)
	}
	r.to.host = *vm.Runtime.Host // names are only unique in a datacenter
	stores, err := r.stores(ctx, v)
	if err != nil {
		return fmt.Errorf("vsphere: %w", missing(err))
	}
	to, err := r.chooseStore(stores, datastore)
	if err != nil {
		return fmt.Errorf("vsphere: %w", err)
	}
	res, err := methods.RelocateVM_Task(ctx, s.c, &types.RelocateVM_Task{This: i.vmRef(), Spec: types.VirtualMachineRelocateSpec{Datastore: &to}})
	if err == nil {
		err = s.follow(ctx, res.Returnval, progress)
	}
	if err != nil {
		return fmt.Errorf("vsphere: move %s to %s: %w", i.Name, datastore, missing(err))
	}
	return nil
}

// forgetBoot takes what only a boot is answered by out of the configuration of a VM that stays.
func (s *Source) forgetBoot(ctx context.Context, i *Instant) error {
	spec := types.VirtualMachineConfigSpec{}
	for _, key := range []string{"msg.autoAnswer", "uuid.action"} {
		spec.ExtraConfig = append(spec.ExtraConfig, &types.OptionValue{Key: key, Value: ""})
	}
	res, err := methods.ReconfigVM_Task(ctx, s.c, &types.ReconfigVM_Task{This: i.vmRef(), Spec: spec})
	if err == nil {
		_, err = s.wait(ctx, res.Returnval)
	}
	if err != nil {
		s.logf("%s: msg.autoAnswer and uuid.action stay in its configuration: %v", i.Name, missing(err))
	}
	return ctx.Err()
}

// follow is wait with progress. A task whose watching is given up is cancelled.
func (s *Source) follow(ctx context.Context, ref types.ManagedObjectReference, progress func(percent int32)) error {
	done := make(chan struct{})
	defer close(done)
	if progress != nil {
		go func() {
			for s.cfg.Sleep(ctx, lastLook) == nil {
				var t mo.Task
				if s.c.retrieve(ctx, ref, []string{"info.progress"}, &t) != nil {
					return
				}
				select {
				case <-done:
					return
				default:
					progress(t.Info.Progress)
				}
			}
		}()
	}
	_, err := s.wait(ctx, ref)
	if ctx.Err() != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), verifyTime)
		defer cancel()
		_, _ = methods.CancelTask(ctx, s.c, &types.CancelTask{This: ref})
		_, werr := s.wait(ctx, ref)
		if werr == nil {
			return nil // it was over
		}
	}
	return err
}
