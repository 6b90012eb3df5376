package vsphere

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/view"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// target is where a VM is restored to.
type target struct {
	datacenter     types.ManagedObjectReference
	datacenterPath string
	folder, pool   types.ManagedObjectReference
	host           types.ManagedObjectReference // which has the datastore
	folderPath     string
	datastoreName  string
	networks       []thing
}

// thing is an object that has a name.
type thing struct {
	name string
	ref  types.ManagedObjectReference
}

// ErrNoTarget: what a VM is to be restored to is not there.
var ErrNoTarget = errors.New("not on this server")

// find finds the place of the new VM: as told, or where the old one was.
func (r *restoring) find(ctx context.Context) error {
	var was inventory
	if len(r.what.Inventory) > 0 {
		if err := json.Unmarshal(r.what.Inventory, &was); err != nil {
			return fmt.Errorf("inventory.json: %w", err)
		}
	}
	s := r.src
	v, err := view.NewManager(s.c.Client).CreateContainerView(ctx, s.c.ServiceContent.RootFolder, []string{"Folder", "Datacenter", "ResourcePool"}, true)
	if err != nil {
		return err
	}
	defer v.Destroy(context.WithoutCancel(ctx))
	all, err := placesOf(ctx, v)
	if err != nil {
		return err
	}
	if err := r.findFolder(all, cmp.Or(r.what.Folder, path.Dir(was.Path))); err != nil {
		return err
	}
	in, err := r.inDatacenter(ctx, "HostSystem", "Datastore", "Network")
	if err != nil {
		return err
	}
	defer in.Destroy(context.WithoutCancel(ctx))
	if r.to.host, r.to.pool, err = r.findHost(ctx, in, all, "", &was); err != nil {
		return err
	}
	return r.findStores(ctx, in, &was)
}

// inDatacenter is a view of what is in the datacenter that was found: names are unique in one, not in a server.
func (r *restoring) inDatacenter(ctx context.Context, kinds ...string) (*view.ContainerView, error) {
	return view.NewManager(r.src.c.Client).CreateContainerView(ctx, r.to.datacenter, kinds, true)
}

// findFolder finds the folder, and with it the datacenter. The old one's that is not there any more becomes the first of its datacenter.
func (r *restoring) findFolder(all places, want string) error {
	var roots []string
	for ref, e := range all {
		if ref.Type != "Folder" || e.Parent == nil || !vmFolder(all, ref) {
			continue
		}
		at := all.path(e.Parent, e.Name)
		if at == path.Clean("/"+want) {
			r.to.folder, r.to.folderPath = ref, at
		}
		if e.Parent.Type == "Datacenter" {
			roots = append(roots, at)
		}
	}
	if r.to.folderPath == "" {
		slices.Sort(roots)
		same := slices.IndexFunc(roots, func(p string) bool { return strings.HasPrefix(want+"/", p+"/") })
		switch {
		case r.what.Folder != "", len(roots) == 0, same < 0 && len(roots) > 1:
			return fmt.Errorf("folder %q: %w; there are %q and those below", want, ErrNoTarget, roots)
		case want != "" && want != ".":
			r.warnf("there is no folder %s: it is in %s", want, roots[max(same, 0)])
		}
		return r.findFolder(all, roots[max(same, 0)])
	}
	for ref := r.to.folder; ; {
		e := all[ref]
		if e.Parent == nil {
			return fmt.Errorf("folder %s: %w: it is in no datacenter", r.to.folderPath, ErrNoTarget)
		}
		if ref = *e.Parent; ref.Type == "Datacenter" {
			r.to.datacenter, r.to.datacenterPath = ref, all.path(all[ref].Parent, all[ref].Name)
			return nil
		}
	}
}

// vmFolder reports whether a folder is that of a datacenter for VMs, or below it: vSphere API, Datacenter.vmFolder, which is called vm.
func vmFolder(all places, ref types.ManagedObjectReference) bool {
	for range maxDepth {
		e, ok := all[ref]
		if !ok || e.Parent == nil {
			return false
		}
		if e.Parent.Type == "Datacenter" {
			return e.Name == "vm"
		}
		ref = *e.Parent
	}
	return false
}

// findHost finds the host that is to run the VM and a resource pool of its cluster: those that are told, or that the old VM had, or else the first.
func (r *restoring) findHost(ctx context.Context, in *view.ContainerView, all places, want string, was *inventory) (host, pool types.ManagedObjectReference, err error) {
	var hosts []mo.HostSystem
	if err := in.Retrieve(ctx, []string{"HostSystem"}, []string{"name", "parent", "runtime.connectionState", "runtime.inMaintenanceMode"}, &hosts); err != nil {
		return host, pool, err
	}
	slices.SortFunc(hosts, func(a, b mo.HostSystem) int {
		if aWas, bWas := unescape(a.Name) == was.Host, unescape(b.Name) == was.Host; aWas != bWas {
			return map[bool]int{true: -1, false: 1}[aWas]
		}
		return strings.Compare(a.Name, b.Name)
	})
	var able, pools []string
	for _, h := range hosts {
		if h.Parent == nil || h.Runtime.ConnectionState != types.HostSystemConnectionStateConnected || h.Runtime.InMaintenanceMode {
			continue
		}
		able = append(able, unescape(h.Name))
		if want != "" && unescape(h.Name) != want {
			continue
		}
		pool, names, err := r.findPool(ctx, all, *h.Parent, was.Pool)
		if err != nil {
			return host, pool, err
		}
		if pools = append(pools, names...); pool.Value != "" {
			return h.Self, pool, nil
		}
	}
	if r.what.Pool != "" && len(pools) > 0 {
		slices.Sort(pools)
		return host, pool, fmt.Errorf("resource pool %q: %w; there are %q", r.what.Pool, ErrNoTarget, slices.Compact(pools))
	}
	return host, pool, fmt.Errorf("host %q: %w, or cannot run VMs now; there are %q", want, ErrNoTarget, able)
}

// findPool finds a pool of a host or cluster: that of the name, which may not be there, or the old VM's, or the root. names are those that there are.
func (r *restoring) findPool(ctx context.Context, all places, owner types.ManagedObjectReference, was string) (found types.ManagedObjectReference, names []string, err error) {
	var c mo.ComputeResource
	if err := r.src.c.retrieve(ctx, owner, []string{"resourcePool"}, &c); err != nil {
		return found, nil, err
	}
	if c.ResourcePool == nil {
		return found, nil, nil
	}
	if r.what.Pool == "" {
		found = *c.ResourcePool
	}
	for ref, e := range all {
		if ref.Type != "ResourcePool" || !below(all, ref, *c.ResourcePool) {
			continue
		}
		name := unescape(e.Name)
		if names = append(names, name); name == cmp.Or(r.what.Pool, was) {
			found = ref
		}
	}
	if r.what.Pool == "" && was != "" && !slices.Contains(names, was) {
		r.warnf("there is no resource pool %s: it is in %s", was, unescape(all[found].Name))
	}
	return found, names, nil
}

// below reports whether an object is another one or below it.
func below(all places, ref, root types.ManagedObjectReference) bool {
	for range maxDepth {
		if ref == root {
			return true
		}
		e, ok := all[ref]
		if !ok || e.Parent == nil {
			return false
		}
		ref = *e.Parent
	}
	return false
}

func namesIn(list []thing) []string {
	var out []string
	for _, n := range list {
		out = append(out, n.name)
	}
	return slices.Compact(out)
}

// findStores finds the datastore, and what networks there are.
func (r *restoring) findStores(ctx context.Context, v *view.ContainerView, was *inventory) error {
	if _, err := r.findDatastore(ctx, v, was); err != nil {
		return err
	}
	var nets []mo.Network
	if err := v.Retrieve(ctx, []string{"Network"}, []string{"name"}, &nets); err != nil {
		return err
	}
	for _, n := range nets {
		r.to.networks = append(r.to.networks, thing{unescape(n.Name), n.Self})
	}
	return nil
}

// findDatastore finds the datastore: as told, or one that the old VM was on. was may be nil.
func (r *restoring) findDatastore(ctx context.Context, v *view.ContainerView, was *inventory) (ref types.ManagedObjectReference, err error) {
	var stores []mo.Datastore
	if err := v.Retrieve(ctx, []string{"Datastore"}, []string{"name", "summary", "host"}, &stores); err != nil {
		return ref, err
	}
	usable := map[string]types.ManagedObjectReference{}
	for _, d := range stores {
		onHost := slices.ContainsFunc(d.Host, func(m types.DatastoreHostMount) bool { return m.Key == r.to.host })
		if d.Summary.Accessible && (onHost || r.to.host.Value == "") {
			usable[d.Name] = d.Self
		}
	}
	want := r.what.Datastore
	if want == "" && was != nil {
		for _, name := range append(slices.Sorted(maps.Values(was.Datastores)), r.home()) { // the last that is there
			if _, ok := usable[name]; ok {
				want = name
			}
		}
	}
	names := slices.Sorted(maps.Keys(usable))
	if want == "" && len(names) == 1 {
		want = names[0]
	}
	ref, ok := usable[want]
	if !ok {
		return ref, fmt.Errorf("datastore %q: %w; there are %q", want, ErrNoTarget, names)
	}
	r.to.datastoreName = want
	return ref, nil
}

// home is the datastore of the old VM's configuration file; empty when unknown.
func (r *restoring) home() string {
	var c struct {
		Files struct{ VMPathName string }
	}
	if json.Unmarshal(r.what.Config, &c) != nil {
		return ""
	}
	at, err := parsePlace(c.Files.VMPathName)
	if err != nil {
		return ""
	}
	return at.datastore
}

// network gives the backing of a card in the new place.
func (r *restoring) network(ctx context.Context, card *types.VirtualEthernetCard) (types.BaseVirtualDeviceBackingInfo, error) {
	want := r.what.Network
	if want == "" {
		want = r.networkOf(card)
	}
	i := slices.IndexFunc(r.to.networks, func(n thing) bool { return n.name == want })
	if i < 0 {
		return nil, fmt.Errorf("network %q: %w; there are %q", want, ErrNoTarget, namesIn(r.to.networks))
	}
	ref := r.to.networks[i].ref
	if ref.Type == "DistributedVirtualPortgroup" {
		return object.NewDistributedVirtualPortgroup(r.src.c.Client, ref).EthernetCardBackingInfo(ctx)
	}
	n := object.NewNetwork(r.src.c.Client, ref)
	n.SetInventoryPath("/" + want)
	return n.EthernetCardBackingInfo(ctx)
}

// networkOf is the name of the network that a card was in.
func (r *restoring) networkOf(card *types.VirtualEthernetCard) string {
	switch b := card.Backing.(type) {
	case *types.VirtualEthernetCardNetworkBackingInfo:
		return b.DeviceName
	case *types.VirtualEthernetCardDistributedVirtualPortBackingInfo:
		var was inventory
		if json.Unmarshal(r.what.Inventory, &was) == nil {
			return was.Networks[b.Port.PortgroupKey]
		}
	}
	return ""
}
