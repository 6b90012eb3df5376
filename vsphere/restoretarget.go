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
	v, err := view.NewManager(s.c.Client).CreateContainerView(ctx, s.c.ServiceContent.RootFolder,
		[]string{"Folder", "Datacenter", "ResourcePool", "Datastore", "Network"}, true)
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
	if err := r.findPool(all, cmp.Or(r.what.Pool, was.Pool)); err != nil {
		return err
	}
	return r.findStores(ctx, v, &was)
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

// findPool finds a resource pool of the datacenter by its name; the old one's that is not there any more becomes the first.
func (r *restoring) findPool(all places, want string) error {
	var pools []thing
	for ref, e := range all {
		if ref.Type == "ResourcePool" {
			pools = append(pools, thing{unescape(e.Name), ref})
		}
	}
	slices.SortFunc(pools, func(a, b thing) int {
		return cmp.Or(cmp.Compare(a.name, b.name), cmp.Compare(a.ref.Value, b.ref.Value))
	})
	i := slices.IndexFunc(pools, func(p thing) bool { return p.name == want })
	if i < 0 && (r.what.Pool != "" || len(pools) == 0) {
		return fmt.Errorf("resource pool %q: %w; there are %q", want, ErrNoTarget, namesIn(pools))
	}
	if i < 0 {
		if i = max(0, slices.IndexFunc(pools, func(p thing) bool { return p.name == "Resources" })); want != "" {
			r.warnf("there is no resource pool %s: it is in %s", want, pools[i].name)
		}
	}
	r.to.pool = pools[i].ref
	return nil
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
	if err := v.Retrieve(ctx, []string{"Datastore"}, []string{"name", "summary"}, &stores); err != nil {
		return ref, err
	}
	usable := map[string]types.ManagedObjectReference{}
	for _, d := range stores {
		if d.Summary.Accessible {
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
