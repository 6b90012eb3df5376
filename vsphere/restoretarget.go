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
	stores, err := r.stores(ctx, in)
	if err != nil {
		return err
	}
	want, err := r.wantedStore(stores, &was)
	if err != nil {
		return err
	}
	has := func(host types.ManagedObjectReference) bool { return want == "" || onHost(stores[want], host) }
	if r.to.host, r.to.pool, err = r.findHost(ctx, in, all, "", &was, has); err != nil {
		return err
	}
	if _, err := r.chooseStore(stores, want); err != nil {
		return err
	}
	old := slices.Sorted(maps.Values(was.Datastores))
	if r.what.Datastore == "" && len(old) > 0 && !slices.Contains(old, r.to.datastoreName) {
		r.warnf("no host for it has the datastore %s: it is on %s", strings.Join(old, ", "), r.to.datastoreName)
	}
	return r.findNetworks(ctx, in)
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

// able are hosts that can run VMs, each with its pools.
type ableHost struct {
	ref   types.ManagedObjectReference
	name  string
	pool  types.ManagedObjectReference // that is wanted, or the root
	pools []string                     // names of all
	ranks [3]int                       // the lowest first
}

// findHost finds the host that is to run the VM and a resource pool of its cluster: those that are told; or one that has the datastore, is the one
// that the old VM was on, has the pool that it was in, in that order.
func (r *restoring) findHost(ctx context.Context, in *view.ContainerView, all places, want string, was *inventory, has func(host types.ManagedObjectReference) bool) (host, pool types.ManagedObjectReference, err error) {
	hosts, names, err := r.ableHosts(ctx, in, all, want, was, has)
	if err != nil {
		return host, pool, err
	}
	var pools []string
	for _, h := range hosts {
		if pools = append(pools, h.pools...); h.pool.Value == "" || r.what.Datastore != "" && h.ranks[0] > 0 {
			continue
		}
		if r.what.Pool == "" && was.Pool != "" && !slices.Contains(h.pools, was.Pool) {
			r.warnf("there is no resource pool %s: it is in %s", was.Pool, unescape(all[h.pool].Name))
		}
		return h.ref, h.pool, nil
	}
	if slices.Sort(pools); r.what.Pool != "" && len(pools) > 0 && !slices.Contains(pools, r.what.Pool) {
		return host, pool, fmt.Errorf("resource pool %q: %w; there are %q", r.what.Pool, ErrNoTarget, slices.Compact(pools))
	}
	if len(hosts) > 0 {
		return host, pool, fmt.Errorf("no host has the datastore %q and the resource pool %q: %w", r.what.Datastore, r.what.Pool, ErrNoTarget)
	}
	if want == "" {
		return host, pool, fmt.Errorf("a host of %s that can run VMs now: %w", r.to.datacenterPath, ErrNoTarget)
	}
	return host, pool, fmt.Errorf("host %q: %w, or cannot run VMs now; there are %q", want, ErrNoTarget, names)
}

// ableHosts lists the hosts that can run VMs, the best first; names are those of all that can, whatever is wanted.
func (r *restoring) ableHosts(ctx context.Context, in *view.ContainerView, all places, want string, was *inventory, has func(host types.ManagedObjectReference) bool) (able []ableHost, names []string, err error) {
	var hosts []mo.HostSystem
	if err := in.Retrieve(ctx, []string{"HostSystem"}, []string{"name", "parent", "runtime.connectionState", "runtime.inMaintenanceMode"}, &hosts); err != nil {
		return nil, nil, err
	}
	for _, h := range hosts {
		if h.Parent == nil || h.Runtime.ConnectionState != types.HostSystemConnectionStateConnected || h.Runtime.InMaintenanceMode {
			continue
		}
		a := ableHost{ref: h.Self, name: unescape(h.Name)}
		if names = append(names, a.name); want != "" && a.name != want {
			continue
		}
		if a.pool, a.pools, err = r.findPool(ctx, all, *h.Parent, was.Pool); err != nil {
			return nil, nil, err
		}
		for i, good := range []bool{has(h.Self), a.name == was.Host, was.Pool == "" || slices.Contains(a.pools, was.Pool)} {
			if !good {
				a.ranks[i] = 1
			}
		}
		able = append(able, a)
	}
	slices.SortFunc(able, func(a, b ableHost) int {
		return cmp.Or(slices.Compare(a.ranks[:], b.ranks[:]), strings.Compare(a.name, b.name))
	})
	slices.Sort(names)
	return able, names, nil
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
	refs := slices.SortedFunc(maps.Keys(all), func(a, b types.ManagedObjectReference) int { return strings.Compare(a.Value, b.Value) })
	for _, ref := range refs {
		if ref.Type != "ResourcePool" || !below(all, ref, *c.ResourcePool) {
			continue
		}
		name := unescape(all[ref].Name)
		if !slices.Contains(names, name) && name == cmp.Or(r.what.Pool, was) { // the first of a name
			found = ref
		}
		names = append(names, name)
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

// stores are the datastores that can be used, by name: those of the host once that is chosen.
func (r *restoring) stores(ctx context.Context, v *view.ContainerView) (map[string]*mo.Datastore, error) {
	var list []mo.Datastore
	if err := v.Retrieve(ctx, []string{"Datastore"}, []string{"name", "summary", "host"}, &list); err != nil {
		return nil, err
	}
	out := map[string]*mo.Datastore{}
	for i := range list {
		if list[i].Summary.Accessible && (r.to.host.Value == "" || onHost(&list[i], r.to.host)) {
			out[list[i].Name] = &list[i]
		}
	}
	return out, nil
}

// onHost reports whether a host has a datastore.
func onHost(d *mo.Datastore, host types.ManagedObjectReference) bool {
	return slices.ContainsFunc(d.Host, func(m types.DatastoreHostMount) bool { return m.Key == host })
}

// wantedStore is the datastore that is told, or one that the old VM was on; empty when that is no more.
func (r *restoring) wantedStore(stores map[string]*mo.Datastore, was *inventory) (string, error) {
	if want := r.what.Datastore; want != "" {
		if stores[want] == nil {
			return "", noStore(want, stores)
		}
		return want, nil
	}
	for _, name := range append([]string{r.home()}, slices.Sorted(maps.Values(was.Datastores))...) {
		if stores[name] != nil {
			return name, nil
		}
	}
	return "", nil
}

func noStore(want string, stores map[string]*mo.Datastore) error {
	return fmt.Errorf("datastore %q: %w; there are %q", want, ErrNoTarget, slices.Sorted(maps.Keys(stores)))
}

// chooseStore gives the wanted datastore, if the host has it, or the only one that it has.
func (r *restoring) chooseStore(stores map[string]*mo.Datastore, want string) (ref types.ManagedObjectReference, err error) {
	on := map[string]*mo.Datastore{}
	for name, d := range stores {
		if onHost(d, r.to.host) {
			on[name] = d
		}
	}
	if on[want] == nil && r.what.Datastore == "" && len(on) == 1 {
		for name := range on {
			want = name
		}
	}
	if on[want] == nil {
		return ref, noStore(want, on)
	}
	r.to.datastoreName = want
	return on[want].Self, nil
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
	ref, err := r.networkNamed(want)
	if err != nil {
		return nil, err
	}
	if ref.Type == portgroup {
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
