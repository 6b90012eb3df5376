package vsphere_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/vsphere"
	"github.com/holdfast-backup/holdfast/vsphere/vspheretest"
)

// places are where a VM may come to be, of a server with two clusters or two datacenters; what is told of it, and what becomes of that. The VM was on
// the first host of the second cluster, or datacenter, in the pool "gold" and on the only datastore that its hosts have.
var places = []struct {
	name                           string
	datacenters                    bool
	host, folder, pool, datastore  string   // told
	gone                           []string // hosts in maintenance
	want, wantOwner, wantPool, err string
	warning                        string
	moved                          string // that a restore warns besides
}{
	{name: "as it was", want: "DC0_C1_H0", wantPool: "gold"},
	{name: "its host is gone", gone: []string{"DC0_C1_H0"}, want: "DC0_C1_H1", wantPool: "gold"},
	{name: "its cluster is gone", gone: []string{"DC0_C1_H0", "DC0_C1_H1"}, want: "DC0_C0_H0", wantPool: "Resources", warning: "no resource pool gold: it is in Resources", moved: "no host for it has the datastore LocalDS_1: it is on LocalDS_0"},
	{name: "the datastore of the other cluster", datastore: "LocalDS_0", want: "DC0_C0_H0", wantPool: "Resources", warning: "no resource pool gold"},
	{name: "a pool of its cluster", pool: "DC0_C1_RP1", want: "DC0_C1_H0", wantPool: "DC0_C1_RP1"},
	{name: "a pool of another cluster than the datastore", datastore: "LocalDS_0", pool: "gold", err: "no host has the datastore"},
	{name: "as it was, two datacenters", datacenters: true, want: "DC1_C0_H0", wantPool: "gold"},
	{name: "its host is gone, two datacenters", datacenters: true, gone: []string{"DC1_C0_H0"}, want: "DC1_C0_H1", wantPool: "gold"},
	{name: "its datacenter is gone", datacenters: true, gone: []string{"DC1_C0_H0", "DC1_C0_H1"}, err: "a host of /DC1 that can run VMs now: not on this server"},
	{name: "another datacenter", datacenters: true, folder: "/DC0/vm", datastore: "LocalDS_0", want: "DC0_C0_H0", wantPool: "Resources", warning: "no resource pool gold"},
	{name: "the datastore of another datacenter", datacenters: true, datastore: "LocalDS_0", err: `datastore "LocalDS_0": not on this server; there are ["LocalDS_0_DC1"`},
	{name: "a datacenter without the datastore", datacenters: true, folder: "/DC0/vm", datastore: "LocalDS_0_DC1", err: `there are ["LocalDS_0"`},
}

// TestPlaces: a restored VM, and one that runs from an export, come to be where the datastore is.
func TestPlaces(t *testing.T) {
	needsQemuImg(t)
	for _, c := range places {
		t.Run(c.name, func(t *testing.T) {
			o, home := vspheretest.Options{Clusters: 2}, "LocalDS_1"
			if c.datacenters {
				o, home = vspheretest.Options{Datacenters: 2}, "LocalDS_0_DC1"
			}
			r := newRig(t, o)
			hosts := r.server.Hosts() // the first two are of the first cluster, or datacenter
			if len(hosts) != 4 {
				t.Fatalf("hosts are %q", hosts)
			}
			r.server.SetDatastoreHosts("LocalDS_0", hosts[:2]...)
			r.server.SetDatastoreHosts(home, hosts[2:]...)
			spec := oneDisk("web")
			spec.Host, spec.Datastore, spec.Pool, spec.Folder = hosts[2], home, "gold", "prod"
			vm := r.add(spec)
			src := r.source()
			p := r.mustBackup(src, "web")
			r.wantDisks(p, r.truth(vm))
			for _, h := range c.gone {
				r.server.SetMaintenance(h, true)
			}
			if c.err == "" && c.wantOwner == "" {
				c.wantOwner = c.want[:len("DC0_C0")]
			}
			what := r.restoreOf(p, "new")
			what.Folder, what.Pool, what.Datastore = c.folder, c.pool, c.datastore
			made, err := src.Restore(t.Context(), what)
			switch {
			case c.err != "":
				if !errors.Is(err, vsphere.ErrNoTarget) || !strings.Contains(err.Error(), c.err) {
					t.Errorf("it is restored with %v, want %q", err, c.err)
				}
			case err != nil:
				t.Error(err)
			default:
				at := r.server.VM(made.ID)
				if pool, owner := at.Pool(); at.Host() != c.want || pool != c.wantPool || owner != c.wantOwner {
					t.Errorf("it is restored to %s, pool %s of %s", at.Host(), pool, owner)
				}
				if said := strings.Join(made.Warnings, "\n"); !strings.Contains(said, c.warning) || !strings.Contains(said, c.moved) || c.warning == "" && said != "" {
					t.Errorf("it warns %q, want %q", said, c.warning)
				}
				r.wantFlat(r.server.Directory(at.Datastore(), "new"), r.truth(vm))
			}
			if c.datastore != "" {
				return // of no use to what runs from an export
			}
			i := &vsphere.Instant{}
			warnings, err := src.FindPlace(t.Context(), vsphere.InstantPlace{Folder: c.folder, Pool: c.pool, Inventory: r.configFile(p, "inventory.json")}, i)
			if c.err != "" {
				if !errors.Is(err, vsphere.ErrNoTarget) || !strings.Contains(err.Error(), c.err) {
					t.Errorf("it would run on %+v, %v", i, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if host, pool := r.server.NameOf(i.Host), r.server.NameOf(i.Pool); host != c.want || pool != c.wantPool || !strings.Contains(strings.Join(warnings, "\n"), c.warning) {
				t.Errorf("it would run on %s, pool %s; %q", host, pool, warnings)
			}
		})
	}
}

// TestPlaceOfStore: where a VM has no host and no pool any more, it runs where it can be moved to its datastore.
func TestPlaceOfStore(t *testing.T) {
	r := newRig(t, vspheretest.Options{Clusters: 2})
	hosts := r.server.Hosts()
	for _, c := range []struct{ store, want string }{{"LocalDS_0", hosts[0]}, {"LocalDS_1", hosts[2]}, {"gone", hosts[0]}} {
		r.server.SetDatastoreHosts("LocalDS_0", hosts[:2]...)
		r.server.SetDatastoreHosts("LocalDS_1", hosts[2:]...)
		i := &vsphere.Instant{}
		if _, err := r.source().FindPlace(t.Context(), vsphere.InstantPlace{Inventory: []byte(`{"path": "/DC0/vm/web", "host": "old", "datastores": {"datastore-1": "` + c.store + `"}}`)}, i); err != nil {
			t.Fatal(err)
		}
		if got := r.server.NameOf(i.Host); got != c.want {
			t.Errorf("with its datastore %s it would run on %s, want %s", c.store, got, c.want)
		}
	}
}
