package vsphere_test

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/vsphere/vspheretest"
)

// TestHidden: where the account may not see the host or the networks of a VM, their names are not in the point, and that is said; the disks are.
func TestHidden(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	spec := oneDisk("web")
	spec.Networks = []string{"VM Network"}
	vm := r.add(spec)
	src := r.source()
	for _, kind := range []string{"HostSystem", "Network"} {
		hidden := map[string]bool{}
		for _, id := range r.server.IDs(kind) {
			hidden[id] = true
		}
		r.server.Misbehave(func(f *vspheretest.Faults) { f.Hidden = hidden })
		p := r.mustBackup(src, "web")
		r.wantDisks(p, r.truth(vm))
		if len(p.Warnings) != 1 {
			t.Fatalf("%s: it warns %q", kind, p.Warnings)
		}
		var was struct {
			Host     string
			Networks map[string]string
		}
		if err := json.Unmarshal(r.configFile(p, "inventory.json"), &was); err != nil {
			t.Fatal(err)
		}
		for _, has := range []struct {
			kind  string
			known bool
		}{{"HostSystem", was.Host != ""}, {"Network", len(was.Networks) > 0}} {
			if has.known == (has.kind == kind) {
				t.Errorf("%s hidden: of %s the point knows %+v", kind, has.kind, was)
			}
		}
		if !slices.ContainsFunc(slices.Collect(maps.Keys(hidden)), func(id string) bool {
			return strings.HasPrefix(p.Warnings[0], "the name of "+id+" is not in this point: ") && strings.Contains(p.Warnings[0], "System.Read")
		}) {
			t.Errorf("%s: it warns %q", kind, p.Warnings)
		}
	}
	r.nothingLeft(vm)
}
