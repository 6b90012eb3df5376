package vsphere

import (
	"context"
	"fmt"
	"slices"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/view"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// findNetworks finds the networks of the datacenter.
func (r *restoring) findNetworks(ctx context.Context, in *view.ContainerView) error {
	var nets []mo.Network
	if err := in.Retrieve(ctx, []string{"Network"}, []string{"name"}, &nets); err != nil {
		return err
	}
	for _, n := range nets {
		r.to.networks = append(r.to.networks, thing{unescape(n.Name), n.Self})
	}
	return nil
}

// networkNamed finds a network by its name.
func (r *restoring) networkNamed(want string) (types.ManagedObjectReference, error) {
	i := slices.IndexFunc(r.to.networks, func(n thing) bool { return n.name == want })
	if i < 0 {
		return types.ManagedObjectReference{}, fmt.Errorf("network %q: %w; there are %q", want, ErrNoTarget, namesIn(r.to.networks))
	}
	return r.to.networks[i].ref, nil
}

// portgroup is the type of a network that a .vmx cannot name: it has a port of a distributed switch, which the server gives.
const portgroup = "DistributedVirtualPortgroup"

// plug plugs the cards of the VM into the port group that they are to be in.
func (s *Source) plug(ctx context.Context, i *Instant) error {
	if i.Portgroup == "" {
		return nil
	}
	backing, err := object.NewDistributedVirtualPortgroup(s.c.Client, types.ManagedObjectReference{Type: portgroup, Value: i.Portgroup}).EthernetCardBackingInfo(ctx)
	if err != nil {
		return fmt.Errorf("vsphere: %w", missing(err))
	}
	var vm mo.VirtualMachine
	if err := s.c.retrieve(ctx, i.vmRef(), []string{"config.hardware.device"}, &vm); err != nil {
		return fmt.Errorf("vsphere: %w", missing(err))
	}
	var spec types.VirtualMachineConfigSpec
	if vm.Config != nil {
		for _, d := range vm.Config.Hardware.Device {
			if card, ok := d.(types.BaseVirtualEthernetCard); ok {
				card.GetVirtualEthernetCard().Backing = backing
				spec.DeviceChange = append(spec.DeviceChange, &types.VirtualDeviceConfigSpec{Operation: types.VirtualDeviceConfigSpecOperationEdit, Device: d})
			}
		}
	}
	if len(spec.DeviceChange) == 0 {
		return nil
	}
	res, err := methods.ReconfigVM_Task(ctx, s.c, &types.ReconfigVM_Task{This: i.vmRef(), Spec: spec})
	if err == nil {
		_, err = s.wait(ctx, res.Returnval)
	}
	if err != nil {
		return fmt.Errorf("vsphere: plug %s into its network: %w", i.Name, missing(err))
	}
	return nil
}
