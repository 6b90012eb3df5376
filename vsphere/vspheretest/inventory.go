package vspheretest

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// wait waits for a task.
func wait(ctx *simulator.Context, ref types.ManagedObjectReference) (types.AnyType, types.BaseMethodFault) {
	t := ctx.Map.Get(ref).(*simulator.Task)
	t.Wait()
	if t.Info.Error != nil {
		return nil, t.Info.Error.Fault
	}
	return t.Info.Result, nil
}

// task runs f as a task of the entity. Unlike a task of vcsim it does not hold the lock of the entity while it runs, so that its
// properties can be read, and its context has locks of its own.
func (s *Server) task(ctx *simulator.Context, entity types.ManagedObjectReference, name string, f func(ctx *simulator.Context) (types.AnyType, types.BaseMethodFault)) types.ManagedObjectReference {
	own := *ctx
	lock := types.ManagedObjectReference{Type: entity.Type, Value: fmt.Sprintf("%s-task-%d", entity.Value, s.id())}
	t := simulator.CreateTask(lock, name+"_Task", func(*simulator.Task) (types.AnyType, types.BaseMethodFault) {
		fault := s.fault(func(f *Faults) types.BaseMethodFault { return next(f.Tasks, name+"_Task") })
		if fault != nil {
			return nil, fault
		}
		return f(&own)
	})
	t.Info.DescriptionId = entity.Type + "." + strings.ToLower(name[:1]) + name[1:]
	run, update := *ctx, *ctx // contexts that share no locks
	ref := t.Run(&run)
	if vm, ok := ctx.Map.Get(entity).(*simulator.VirtualMachine); ok {
		ctx.WithLock(vm, func() { vm.RecentTask = append(vm.RecentTask, ref) })
	}
	update.Map.AtomicUpdate(&update, t, []types.PropertyChange{{Name: "info.entity", Val: entity}, {Name: "info.entityName", Val: entity.Value}})
	return ref
}

// datacenterOf finds the datacenter that something is in.
func (s *Server) datacenterOf(ref types.ManagedObjectReference) *simulator.Datacenter {
	for {
		switch e := s.model.Map().Get(ref).(type) {
		case *simulator.Datacenter:
			return e
		case mo.Entity:
			if up := e.Entity().Parent; up != nil {
				ref = *up
				continue
			}
		}
		s.t.Fatalf("vspheretest: %s is in no datacenter", ref)
	}
}

// nameDatastores gives datastores of different datacenters different names: the double finds them by these.
func (s *Server) nameDatastores() {
	for _, e := range s.model.Map().All("Datastore") {
		if ds, dc := e.(*simulator.Datastore), s.datacenterOf(e.Reference()); s.opt.Datacenters > 1 && dc.Name != "DC0" {
			name := ds.Name + "_" + dc.Name
			s.changeDatastore(ds, types.PropertyChange{Name: "name", Val: name}, types.PropertyChange{Name: "summary.name", Val: name})
		}
	}
}

// folder finds a folder of VMs of the host's datacenter, and makes what is missing of its path.
func (s *Server) folder(ctx *simulator.Context, path string, host types.ManagedObjectReference) (*simulator.Folder, error) {
	dc := s.datacenterOf(host)
	f := s.model.Map().Get(dc.VmFolder).(*simulator.Folder)
	for _, name := range strings.Split(path, "/") {
		if name == "" {
			continue
		}
		var child mo.Entity
		ctx.WithLock(f, func() { child = ctx.Map.FindByName(name, f.ChildEntity) })
		if child != nil {
			f = child.(*simulator.Folder)
			continue
		}
		var err error
		ctx.WithLock(f, func() {
			res := f.CreateFolder(ctx, &types.CreateFolder{This: f.Self, Name: name}).(*methods.CreateFolderBody)
			if res.Fault_ != nil {
				err = fmt.Errorf("folder %s: %s", name, res.Fault_.String)
				return
			}
			f = ctx.Map.Get(res.Res.Returnval).(*simulator.Folder)
		})
		if err != nil {
			return nil, err
		}
	}
	return f, nil
}

// pool finds a resource pool of the host or its cluster, or makes it below the root; the root's own name is Resources.
func (s *Server) pool(ctx *simulator.Context, name string, host types.ManagedObjectReference) (types.ManagedObjectReference, error) {
	owner := s.model.Map().Get(host).(*simulator.HostSystem).Parent
	var root *simulator.ResourcePool
	for _, e := range s.model.Map().All("ResourcePool") {
		p := e.(*simulator.ResourcePool)
		if p.Owner != *owner {
			continue
		}
		if p.Name == name || name == "" && p.Parent.Type != "ResourcePool" {
			return p.Self, nil
		}
		if p.Parent.Type != "ResourcePool" {
			root = p
		}
	}
	req := &types.CreateResourcePool{This: root.Self, Name: name, Spec: types.DefaultResourceConfigSpec()}
	var res *methods.CreateResourcePoolBody
	ctx.WithLock(root, func() { res = root.CreateResourcePool(ctx, req).(*methods.CreateResourcePoolBody) })
	if res.Fault_ != nil {
		return types.ManagedObjectReference{}, fmt.Errorf("pool %s: %s", name, res.Fault_.String)
	}
	return res.Res.Returnval, nil
}

// Hosts are the names of the hosts.
func (s *Server) Hosts() []string { return s.names("HostSystem") }

// Datastores are the names of the datastores.
func (s *Server) Datastores() []string { return s.names("Datastore") }

func (s *Server) names(kind string) []string {
	var all []string
	for _, e := range s.model.Map().All(kind) {
		switch e := e.(type) {
		case *simulator.HostSystem:
			all = append(all, e.Name)
		case *simulator.Datastore:
			all = append(all, e.Name)
		}
	}
	slices.Sort(all)
	return all
}

// host finds a host, or the first of all.
func (s *Server) host(name string) *types.ManagedObjectReference {
	if name == "" {
		name = s.Hosts()[0]
	}
	for _, e := range s.model.Map().All("HostSystem") {
		if h := e.(*simulator.HostSystem); h.Name == name {
			ref := h.Self
			return &ref
		}
	}
	s.t.Fatalf("vspheretest: no host %q", name)
	return nil
}

// setAttribute sets a custom attribute, which is made when there is none of the name.
func (s *Server) setAttribute(ctx *simulator.Context, vm *simulator.VirtualMachine, name, value string) error {
	m := ctx.Map.CustomFieldsManager()
	var err error
	ctx.WithLock(m, func() {
		key := int32(-1)
		for _, f := range m.Field {
			if f.Name == name {
				key = f.Key
			}
		}
		if key < 0 {
			res := m.AddCustomFieldDef(ctx, &types.AddCustomFieldDef{This: m.Self, Name: name, MoType: "VirtualMachine"}).(*methods.AddCustomFieldDefBody)
			if res.Fault_ != nil {
				err = fmt.Errorf("custom attribute %s: %s", name, res.Fault_.String)
				return
			}
			key = res.Res.Returnval.Key
		}
		m.SetField(ctx, &types.SetField{This: m.Self, Entity: vm.Self, Key: key, Value: value})
	})
	return err
}

// IDs are those of all objects of a type.
func (s *Server) IDs(kind string) []string {
	var all []string
	for _, e := range s.model.Map().All(kind) {
		all = append(all, e.Reference().Value)
	}
	slices.Sort(all)
	return all
}

// NameOf is the name of a host or resource pool, by its id.
func (s *Server) NameOf(id string) string {
	for _, kind := range []string{"HostSystem", "ResourcePool"} {
		if e, ok := s.model.Map().Get(types.ManagedObjectReference{Type: kind, Value: id}).(mo.Entity); ok {
			return e.Entity().Name
		}
	}
	return ""
}

// Directory is where on this machine a folder of a datastore is.
func (s *Server) Directory(datastore, folder string) string {
	ds, err := s.datastore(datastore)
	s.must(err)
	return filepath.Join(ds.Summary.Url, folder)
}
