package vspheretest

import (
	"slices"
	"strconv"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// required is what each method needs: vSphere Web Services API 8.0, "Required privileges" on the page of the method.
var required = map[string][]string{
	"CreateSnapshot_Task":     {"VirtualMachine.State.CreateSnapshot"},
	"CreateSnapshotEx_Task":   {"VirtualMachine.State.CreateSnapshot"},
	"RemoveSnapshot_Task":     {"VirtualMachine.State.RemoveSnapshot"},
	"RemoveAllSnapshots_Task": {"VirtualMachine.State.RemoveSnapshot"},
	"ConsolidateVMDisks_Task": {"VirtualMachine.State.RemoveSnapshot"},
	"RevertToSnapshot_Task":   {"VirtualMachine.State.RevertToSnapshot"},
	"QueryChangedDiskAreas":   {"VirtualMachine.Provisioning.DiskRandomRead"},
	"ExportVm":                {"VApp.Export"},
	"ExportSnapshot":          {"VApp.Export"},
	"ImportVApp":              {"VApp.Import"},
	"CreateVM_Task":           {"VirtualMachine.Inventory.Create", "Resource.AssignVMToPool", "Datastore.AllocateSpace"},
	"RegisterVM_Task":         {"VirtualMachine.Inventory.Register", "Resource.AssignVMToPool"},
	"UnregisterVM":            {"VirtualMachine.Inventory.Unregister"},
	"Destroy_Task":            {"VirtualMachine.Inventory.Delete"},
	"PowerOnVM_Task":          {"VirtualMachine.Interact.PowerOn"},
	"PowerOffVM_Task":         {"VirtualMachine.Interact.PowerOff"},
	"AnswerVM":                {"VirtualMachine.Interact.AnswerQuestion"},
	"RelocateVM_Task":         {"Resource.ColdMigrate"},
	"CreateNasDatastore":      {"Host.Config.Storage"},
	"RemoveDatastore":         {"Host.Config.Storage"},
}

// What a reconfiguration needs depends on what it changes.
const (
	changeTracking = "VirtualMachine.Config.ChangeTracking"
	addNewDisk     = "VirtualMachine.Config.AddNewDisk"
	addOldDisk     = "VirtualMachine.Config.AddExistingDisk"
	removeDisk     = "VirtualMachine.Config.RemoveDisk"
	advancedConfig = "VirtualMachine.Config.AdvancedConfig"
)

// What /folder needs.
const (
	browse   = "Datastore.Browse"
	lowLevel = "Datastore.FileManagement"
)

// Deny takes privileges from the user, on everything.
func (s *Server) Deny(privileges ...string) { s.setDenied(true, privileges) }

// Allow gives them back.
func (s *Server) Allow(privileges ...string) { s.setDenied(false, privileges) }

func (s *Server) setDenied(denied bool, privileges []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range privileges {
		s.denied[p] = denied
	}
}

func (s *Server) isDenied(privilege string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.denied[privilege]
}

// denies says which privilege a call lacks.
func (s *Server) denies(m *simulator.Method) types.BaseMethodFault {
	needs := required[m.Name]
	if req, ok := m.Body.(*types.ReconfigVM_Task); ok {
		needs = reconfigNeeds(&req.Spec)
	}
	for _, p := range needs {
		if s.isDenied(p) {
			missing := []types.NoPermissionEntityPrivileges{{Entity: m.This, PrivilegeIds: []string{p}}}
			return &types.NoPermission{Object: &m.This, PrivilegeId: p, MissingPrivileges: missing}
		}
	}
	return nil
}

func reconfigNeeds(spec *types.VirtualMachineConfigSpec) []string {
	var needs []string
	if spec.ChangeTrackingEnabled != nil {
		needs = append(needs, changeTracking)
	}
	if len(spec.ExtraConfig) > 0 {
		needs = append(needs, advancedConfig)
	}
	for _, c := range spec.DeviceChange {
		c := c.GetVirtualDeviceConfigSpec()
		_, isDisk := c.Device.(*types.VirtualDisk)
		switch {
		case !isDisk:
		case c.Operation == types.VirtualDeviceConfigSpecOperationRemove:
			needs = append(needs, removeDisk)
		case c.Operation == types.VirtualDeviceConfigSpecOperationAdd && c.FileOperation != "":
			needs = append(needs, addNewDisk)
		case c.Operation == types.VirtualDeviceConfigSpecOperationAdd:
			needs = append(needs, addOldDisk)
		}
	}
	return needs
}

type authorizationObject struct {
	*simulator.AuthorizationManager
	s *Server
}

func (o *authorizationObject) granted(ids []string) []types.PrivilegeAvailability {
	var all []types.PrivilegeAvailability
	for _, id := range ids {
		all = append(all, types.PrivilegeAvailability{PrivId: id, IsGranted: !o.s.isDenied(id)})
	}
	return all
}

// HasPrivilegeOnEntityResponse is the response with words in it: the encoder of govmomi leaves false out of a list.
type HasPrivilegeOnEntityResponse struct {
	Returnval []string `xml:"returnval"`
}

type hasPrivilegeBody struct {
	Res *HasPrivilegeOnEntityResponse `xml:"HasPrivilegeOnEntityResponse,omitempty"`
}

// Fault implements soap.HasFault.
func (*hasPrivilegeBody) Fault() *soap.Fault { return nil }

// HasPrivilegeOnEntity answers for the user, whatever the session.
func (o *authorizationObject) HasPrivilegeOnEntity(req *types.HasPrivilegeOnEntity) soap.HasFault {
	res := new(HasPrivilegeOnEntityResponse)
	for _, p := range o.granted(req.PrivId) {
		res.Returnval = append(res.Returnval, strconv.FormatBool(p.IsGranted))
	}
	return &hasPrivilegeBody{Res: res}
}

// HasPrivilegeOnEntities is the same for several objects.
func (o *authorizationObject) HasPrivilegeOnEntities(req *types.HasPrivilegeOnEntities) soap.HasFault {
	res := new(types.HasPrivilegeOnEntitiesResponse)
	for _, e := range req.Entity {
		res.Returnval = append(res.Returnval, types.EntityPrivilege{Entity: e, PrivAvailability: o.granted(req.PrivId)})
	}
	return &methods.HasPrivilegeOnEntitiesBody{Res: res}
}

// HasUserPrivilegeOnEntities is the same for a user that is named. Others than ours have nothing.
func (o *authorizationObject) HasUserPrivilegeOnEntities(req *types.HasUserPrivilegeOnEntities) soap.HasFault {
	res := new(types.HasUserPrivilegeOnEntitiesResponse)
	for _, e := range req.Entities {
		all := o.granted(req.PrivId)
		for i := range all {
			all[i].IsGranted = all[i].IsGranted && req.UserName == o.s.User
		}
		res.Returnval = append(res.Returnval, types.EntityPrivilege{Entity: e, PrivAvailability: all})
	}
	return &methods.HasUserPrivilegeOnEntitiesBody{Res: res}
}

// FetchUserPrivilegeOnEntities lists what a user has.
func (o *authorizationObject) FetchUserPrivilegeOnEntities(req *types.FetchUserPrivilegeOnEntities) soap.HasFault {
	res := o.AuthorizationManager.FetchUserPrivilegeOnEntities(req).(*methods.FetchUserPrivilegeOnEntitiesBody)
	for i := range res.Res.Returnval {
		p := &res.Res.Returnval[i]
		p.Privileges = slices.DeleteFunc(slices.Clone(p.Privileges), func(id string) bool { return o.s.isDenied(id) || req.UserName != o.s.User })
	}
	return res
}
