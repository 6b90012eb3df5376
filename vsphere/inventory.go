package vsphere

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"path"
	"slices"
	"strings"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/view"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// VM is what a listing says of a machine.
type VM struct {
	Name         string // unique on the server, and what Freeze takes: the VM's name, with its folder where that is not unique
	Path         string // in the inventory: /DC/vm/folder/name
	ID           string // of the managed object: vm-123
	InstanceUUID string
	Pool         string // name of the resource pool; empty for a template
	Guest        string // operating system, as the configuration says
	On           bool
	Template     bool
	Tracked      bool     // changed block tracking is switched on
	Size         int64    // of all disks that are backed up, bytes
	Disks        int      // that are backed up
	Skipped      []string // disks that are not, and why
	Tags         []string // as CATEGORY/TAG; only ListTagged fills them in

	ref types.ManagedObjectReference
}

// List gives all VMs and templates, by path.
func (s *Source) List(ctx context.Context) ([]VM, error) {
	list, err := s.list(ctx)
	if fault.Is(err, &types.ManagedObjectNotFound{}) { // the view went with the session, or a VM with its folder
		list, err = s.list(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("vsphere: list VMs: %w", missing(err))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listed = list
	return slices.Clone(list), nil
}

// ListTagged is List with the tags of the VMs.
func (s *Source) ListTagged(ctx context.Context) ([]VM, error) {
	list, err := s.List(ctx)
	if err != nil {
		return nil, err
	}
	refs := make([]types.ManagedObjectReference, len(list))
	for i := range list {
		refs[i] = list[i].ref
	}
	all, err := s.tagsOf(ctx, refs)
	if err != nil {
		return nil, fmt.Errorf("vsphere: tags: %w", missing(err))
	}
	for i := range list {
		list[i].Tags = all[list[i].ID]
	}
	return list, nil
}

// listedProperties are the properties that a listing takes.
var listedProperties = []string{"name", "parent", "resourcePool", "runtime.powerState", "config.template", "config.instanceUuid", "config.guestFullName",
	"config.changeTrackingEnabled", "config.hardware.device", "parentVApp"}

func (s *Source) list(ctx context.Context) ([]VM, error) {
	v, err := view.NewManager(s.c.Client).CreateContainerView(ctx, s.c.ServiceContent.RootFolder, []string{"VirtualMachine", "Folder", "Datacenter", "ResourcePool"}, true)
	if err != nil {
		return nil, err
	}
	defer v.Destroy(context.WithoutCancel(ctx))
	var vms []mo.VirtualMachine
	if err := v.Retrieve(ctx, []string{"VirtualMachine"}, listedProperties, &vms); err != nil {
		return nil, err
	}
	places, err := placesOf(ctx, v)
	if err != nil {
		return nil, err
	}
	list := make([]VM, 0, len(vms))
	for i := range vms {
		list = append(list, s.describe(&vms[i], places))
	}
	nameAll(list)
	slices.SortFunc(list, func(a, b VM) int { return cmp.Or(cmp.Compare(a.Path, b.Path), cmp.Compare(a.ID, b.ID)) })
	return list, nil
}

// places maps folders, datacenters and pools to what they are called and lie in.
type places map[types.ManagedObjectReference]mo.ManagedEntity

func placesOf(ctx context.Context, v *view.ContainerView) (places, error) {
	p := places{}
	for _, kind := range []string{"Folder", "Datacenter", "ResourcePool"} {
		var all []mo.ManagedEntity
		if err := v.Retrieve(ctx, []string{kind}, []string{"name", "parent"}, &all); err != nil {
			return nil, err
		}
		for _, e := range all {
			p[e.Self] = e
		}
	}
	return p, nil
}

// path is where something lies in the inventory; the root folder has no name.
func (p places) path(parent *types.ManagedObjectReference, name string) string {
	out := unescape(name)
	for range maxDepth {
		if parent == nil {
			break
		}
		e, ok := p[*parent]
		if !ok {
			break
		}
		out = path.Join(unescape(e.Name), out)
		parent = e.Parent
	}
	return "/" + out
}

// maxDepth bounds a way up the inventory.
const maxDepth = 100

// unescape undoes what the server does to %, / and \ in names: vSphere Web Services API, ManagedEntity.name.
func unescape(name string) string {
	if plain, err := url.PathUnescape(name); err == nil {
		return strings.ReplaceAll(plain, "/", "_")
	}
	return name
}

func (s *Source) describe(m *mo.VirtualMachine, p places) VM {
	vm := VM{Name: unescape(m.Name), ID: m.Self.Value, On: m.Runtime.PowerState == types.VirtualMachinePowerStatePoweredOn, ref: m.Self}
	vm.Path = p.path(m.Parent, m.Name)
	if m.ResourcePool != nil {
		vm.Pool = unescape(p[*m.ResourcePool].Name)
	}
	c := m.Config
	if c == nil { // the host that has it does not answer
		return vm
	}
	vm.Template, vm.InstanceUUID, vm.Guest = c.Template, c.InstanceUuid, c.GuestFullName
	vm.Tracked = c.ChangeTrackingEnabled != nil && *c.ChangeTrackingEnabled
	for _, d := range s.disksOf(c.Hardware.Device) {
		if d.skip != "" {
			vm.Skipped = append(vm.Skipped, d.label+" "+d.skip)
			continue
		}
		vm.Disks++
		vm.Size += d.size
	}
	return vm
}

// nameAll makes the names of VMs unique, as far as it takes: by their folder, then by their ids.
func nameAll(list []VM) {
	same := map[string][]int{}
	for i := range list {
		same[list[i].Name] = append(same[list[i].Name], i)
	}
	for _, all := range same {
		if len(all) == 1 {
			continue
		}
		folders := map[string]int{}
		for _, i := range all {
			folders[path.Base(path.Dir(list[i].Path))]++
		}
		for _, i := range all {
			folder := path.Base(path.Dir(list[i].Path))
			if folders[folder] > 1 {
				folder = list[i].ID
			}
			list[i].Name += " (" + folder + ")"
		}
	}
}

// lookUp finds a VM by its name, or else by its path, or else by its id: a VM may be called like another one's id.
func lookUp(list []VM, name string) (VM, bool) {
	for _, what := range []func(*VM) string{func(v *VM) string { return v.Name }, func(v *VM) string { return v.Path }, func(v *VM) string { return v.ID }} {
		for i := range list {
			if what(&list[i]) == name {
				return list[i], true
			}
		}
	}
	return VM{}, false
}

// ErrAmbiguous: several VMs are called so.
var ErrAmbiguous = errors.New("several VMs have this name")

// find gives the VM of a name, of a path in the inventory, or of an id.
func (s *Source) find(ctx context.Context, name string) (VM, error) {
	s.mu.Lock()
	list := s.listed
	s.mu.Unlock()
	if vm, ok := lookUp(list, name); ok { // all that may have changed of it is read anew
		return vm, nil
	}
	list, err := s.List(ctx)
	if err != nil {
		return VM{}, err
	}
	if vm, ok := lookUp(list, name); ok {
		return vm, nil
	}
	if also := called(list, name); len(also) > 0 {
		return VM{}, fmt.Errorf("vsphere: VM %q: %w: %q", name, ErrAmbiguous, also)
	}
	return VM{}, fmt.Errorf("vsphere: no VM %q on %s: %w", name, s.c.URL().Host, fs.ErrNotExist)
}
