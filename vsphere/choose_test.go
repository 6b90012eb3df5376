package vsphere

import (
	"errors"
	"io/fs"
	"slices"
	"testing"
)

func inventoryOf() []VM {
	list := []VM{
		{Name: "web", Path: "/DC0/vm/prod/web", ID: "vm-1", Pool: "gold", Tags: []string{"backup/daily"}},
		{Name: "web", Path: "/DC0/vm/test/web", ID: "vm-2", Pool: "silver"},
		{Name: "web", Path: "/DC0/vm/test/web", ID: "vm-3"},
		{Name: "db", Path: "/DC0/vm/prod/db", ID: "vm-4", Pool: "gold", Tags: []string{"backup/daily", "owner/ann"}},
		{Name: "db-image", Path: "/DC0/vm/prod/db-image", ID: "vm-5", Template: true, Tags: []string{"backup/daily"}},
		{Name: "prod2", Path: "/DC0/vm/prod2", ID: "vm-6"},
	}
	nameAll(list)
	return list
}

// TestNames: names are made unique by as little as it takes, and those that are unique stay as they are.
func TestNames(t *testing.T) {
	var names []string
	for _, vm := range inventoryOf() {
		names = append(names, vm.Name)
	}
	want := []string{"web (prod)", "web (vm-2)", "web (vm-3)", "db", "db-image", "prod2"}
	if !slices.Equal(names, want) {
		t.Errorf("names are %q, want %q", names, want)
	}
}

func TestChoose(t *testing.T) {
	for _, c := range []struct {
		patterns []string
		want     []string // ids
	}{
		{[]string{"db"}, []string{"vm-4"}},
		{[]string{"vm-2", "db", "db"}, []string{"vm-2", "vm-4"}},
		{[]string{"/DC0/vm/prod/web"}, []string{"vm-1"}},
		{[]string{"web*"}, []string{"vm-1", "vm-2", "vm-3"}},
		{[]string{"*"}, []string{"vm-1", "vm-2", "vm-3", "vm-4", "vm-6"}}, // no template
		{[]string{"db-image"}, []string{"vm-5"}},                          // but when it is named
		{[]string{"/DC0/vm/*/db"}, []string{"vm-4"}},
		{[]string{"folder:/DC0/vm/prod"}, []string{"vm-1", "vm-4"}},
		{[]string{"folder:DC0/vm/prod/"}, []string{"vm-1", "vm-4"}},
		{[]string{"pool:gold"}, []string{"vm-1", "vm-4"}},
		{[]string{"tag:daily"}, []string{"vm-1", "vm-4"}},
		{[]string{"tag:owner/ann"}, []string{"vm-4"}},
		{[]string{"web"}, nil}, // three have that name
		{[]string{"db", "nope*"}, nil},
		{[]string{"folder:/DC0/vm/pro"}, nil},
		{[]string{"tag:backup"}, nil},
		{[]string{"[x"}, nil},
	} {
		got, err := Choose(inventoryOf(), c.patterns)
		if (err == nil) != (c.want != nil) {
			t.Errorf("%q: %v", c.patterns, err)
			continue
		}
		var ids []string
		for _, vm := range got {
			ids = append(ids, vm.ID)
		}
		if !slices.Equal(ids, c.want) {
			t.Errorf("%q chose %q, want %q", c.patterns, ids, c.want)
		}
	}
	if _, err := Choose(inventoryOf(), []string{"nope"}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a VM that is not there: %v", err)
	}
	if _, err := Choose(inventoryOf(), []string{"web"}); !errors.Is(err, ErrAmbiguous) {
		t.Errorf("three VMs of one name: %v", err)
	}
}
