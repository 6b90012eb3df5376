package vsphere

import (
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// Choose gives the VMs that patterns ask for, in the order of the list, each once. A pattern is a name or a path in the inventory, either with
// * and ? as in a shell; folder:PATH is all that is below a folder, pool:NAME all in a resource pool, tag:TAG or
// tag:CATEGORY/TAG all that have a tag. Templates are only what is named: a pattern
// with * leaves them out. A pattern that nothing matches is an error.
func Choose(list []VM, patterns []string) ([]VM, error) {
	chosen := make([]bool, len(list))
	for _, p := range patterns {
		match, err := matcher(p)
		if err != nil {
			return nil, err
		}
		any := false
		for i := range list {
			if match(&list[i]) {
				chosen[i], any = true, true
			}
		}
		if also := called(list, p); !any && len(also) > 0 {
			return nil, fmt.Errorf("vsphere: VM %q: %w: %q", p, ErrAmbiguous, also)
		}
		if !any {
			return nil, fmt.Errorf("vsphere: no VM is called %q: %w", p, fs.ErrNotExist)
		}
	}
	var out []VM
	for i := range list {
		if chosen[i] {
			out = append(out, list[i])
		}
	}
	return out, nil
}

func matcher(p string) (func(*VM) bool, error) {
	if dir, ok := strings.CutPrefix(p, "folder:"); ok {
		below := "/" + strings.Trim(dir, "/") + "/"
		return func(vm *VM) bool { return !vm.Template && strings.HasPrefix(vm.Path, below) }, nil
	}
	if pool, ok := strings.CutPrefix(p, "pool:"); ok {
		return func(vm *VM) bool { return !vm.Template && vm.Pool == pool }, nil
	}
	if tag, ok := strings.CutPrefix(p, "tag:"); ok {
		return func(vm *VM) bool { return !vm.Template && vm.tagged(tag) }, nil
	}
	if !strings.ContainsAny(p, "*?[") {
		return func(vm *VM) bool { return vm.Name == p || vm.Path == p || vm.ID == p }, nil
	}
	if _, err := path.Match(p, ""); err != nil {
		return nil, fmt.Errorf("vsphere: pattern %q: %w", p, err)
	}
	return func(vm *VM) bool {
		of := vm.Name
		if strings.HasPrefix(p, "/") {
			of = vm.Path
		}
		ok, _ := path.Match(p, of)
		return ok && !vm.Template
	}, nil
}

// tagged reports whether the VM has a tag, given with its category or without.
func (vm *VM) tagged(tag string) bool {
	return slices.ContainsFunc(vm.Tags, func(t string) bool {
		_, name, _ := strings.Cut(t, "/")
		return t == tag || name == tag
	})
}

// called gives the unique names of VMs that are called name.
func called(list []VM, name string) []string {
	var out []string
	for i := range list {
		if path.Base(list[i].Path) == name {
			out = append(out, list[i].Name)
		}
	}
	return out
}
