package vsphere

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/vmware/govmomi/session"
	"github.com/vmware/govmomi/view"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/holdfast-backup/holdfast/backup"
)

// Finding is what a check of a server found.
type Finding struct {
	Level Level  `json:"level"`
	About string `json:"about"`
	Text  string `json:"text"`
}

// Level says whether anything is to be done.
type Level string

// The levels.
const (
	OK      Level = "ok"
	Warning Level = "warning" // backups work, but not as well as they could
	Failed  Level = "failed"  // backups do not work
)

// privileges that backups need, by the kind of object they are needed on: vSphere Security, "Defined Privileges".
var privileges = map[string][]string{
	"VirtualMachine": {
		"VirtualMachine.State.CreateSnapshot", "VirtualMachine.State.RemoveSnapshot",
		"VirtualMachine.Provisioning.DiskRandomRead", // changed areas, and reading of disks
		"VirtualMachine.Provisioning.GetVmFiles",     // export
	},
	"Datastore": {"Datastore.Browse", "Datastore.FileManagement"},
}

// trackingPrivilege is needed to switch changed block tracking on.
const trackingPrivilege = "VirtualMachine.Config.ChangeTracking"

// abilities are what an account may be good for besides backups, and what that takes: vSphere Web Services API, "Required privileges" of ImportVApp,
// CreateVM_Task, Destroy_Task, ExportVm, PowerOnVM_Task, CreateNasDatastore, RegisterVM_Task and RelocateVM_Task, and of VDDK for writing.
var abilities = []struct {
	name  string
	needs map[string][]string
}{
	{"a restore", map[string][]string{
		"Datastore": {"Datastore.AllocateSpace"},
		"Folder": {"VApp.Import", "VirtualMachine.Inventory.Create", "VirtualMachine.Inventory.Delete", "VirtualMachine.Config.AddNewDisk", "VirtualMachine.Config.AddRemoveDevice",
			"VirtualMachine.Config.AdvancedConfig", "VirtualMachine.Interact.PowerOn"},
		"Network":      {"Network.Assign"},
		"ResourcePool": {"VApp.Import", "Resource.AssignVMToPool"},
	}},
	{"a restore in place", map[string][]string{
		"VirtualMachine": {"VirtualMachine.Provisioning.DiskRandomAccess", trackingPrivilege},
	}},
	{"a boot from a point", map[string][]string{
		"Datastore":    {"Datastore.AllocateSpace"},
		"Folder":       {"VirtualMachine.Inventory.Register"},
		"HostSystem":   {"Host.Config.Storage"},
		"Network":      {"Network.Assign"},
		"ResourcePool": {"Resource.AssignVMToPool"},
		"VirtualMachine": {"VirtualMachine.Inventory.Unregister", "VirtualMachine.Interact.PowerOn", "VirtualMachine.Interact.PowerOff", "VirtualMachine.Interact.AnswerQuestion",
			"VirtualMachine.Config.EditDevice", "Resource.HotMigrate"},
	}},
	{"exports (transport: lease)", map[string][]string{
		"VirtualMachine": {"VApp.Export"},
	}},
}

// Check looks at a server without changing anything on it.
func (s *Source) Check(ctx context.Context) ([]Finding, error) {
	c := checker{src: s}
	for _, look := range []func(context.Context) error{c.server, c.clock, c.inventory, c.privileges, c.datastores, c.files, c.leftovers} {
		if err := look(ctx); err != nil {
			if ctx.Err() != nil {
				return c.found, ctx.Err()
			}
			c.add(Failed, "server", "%v", missing(err))
		}
	}
	return c.found, nil
}

type checker struct {
	src   *Source
	found []Finding
	vms   []VM
}

func (c *checker) add(l Level, about, format string, a ...any) {
	c.found = append(c.found, Finding{l, about, fmt.Sprintf(format, a...)})
}

func (c *checker) server(context.Context) error {
	a := c.src.c.ServiceContent.About
	c.add(OK, "server", "%s, API %s %s, as %s", a.FullName, a.ApiType, a.ApiVersion, c.src.cfg.User)
	return nil
}

// maxSkew is how far the clocks of server and host may be apart until that is said: it makes times of points wrong.
const maxSkew = 2 * time.Minute

func (c *checker) clock(ctx context.Context) error {
	t, err := c.src.c.serverTime(ctx)
	if err != nil {
		return err
	}
	if skew := time.Until(t).Round(time.Second); skew.Abs() > maxSkew {
		c.add(Warning, "clock", "the server's clock is %s ahead of this host's", skew)
	} else {
		c.add(OK, "clock", "agrees with this host's")
	}
	return nil
}

func (c *checker) inventory(ctx context.Context) (err error) {
	if c.vms, err = c.src.List(ctx); err != nil {
		return err
	}
	templates, tracked, disks := 0, 0, 0
	for i := range c.vms {
		vm := &c.vms[i]
		disks += vm.Disks
		if vm.Template {
			templates++
		}
		if vm.Tracked {
			tracked++
		}
		for _, why := range vm.Skipped {
			c.add(Warning, vm.Name, "%s", why)
		}
	}
	c.add(OK, "inventory", "%d VMs, %d of them templates, with %d disks; changed block tracking is on for %d", len(c.vms), templates, disks, tracked)
	if len(c.vms) == 0 {
		c.add(Warning, "inventory", "no VM can be seen: the account may lack System.View")
	}
	return nil
}

// checkedAtOnce bounds the objects of one question about privileges.
const checkedAtOnce = 100

func (c *checker) privileges(ctx context.Context) error {
	of, err := c.objects(ctx)
	if err != nil {
		return err
	}
	wanted := maps.Clone(privileges)
	if c.src.cfg.Tracking == TrackingEnable {
		wanted["VirtualMachine"] = append(slices.Clone(wanted["VirtualMachine"]), trackingPrivilege)
	}
	if c.src.cfg.Transport == TransportLease {
		wanted["VirtualMachine"] = append(slices.Clone(wanted["VirtualMachine"]), "VApp.Export")
	}
	if err := c.compare(ctx, "privileges", Failed, of, wanted); err != nil {
		return err
	}
	for _, a := range abilities {
		if err := c.compare(ctx, "privileges for "+a.name, Warning, of, a.needs); err != nil {
			return err
		}
	}
	return nil
}

// compare says which of the wanted privileges are missing, and on what.
func (c *checker) compare(ctx context.Context, about string, level Level, of map[string][]types.ManagedObjectReference, wanted map[string][]string) error {
	missing := false
	var all []string
	for _, kind := range slices.Sorted(maps.Keys(wanted)) {
		lack, err := c.lacking(ctx, of[kind], wanted[kind])
		if err != nil {
			return err
		}
		for _, p := range slices.Sorted(maps.Keys(lack)) {
			missing = true
			c.add(level, about, "%s is missing on %d of %d (%s…)", p, len(lack[p]), len(of[kind]), lack[p][0])
		}
		all = append(all, wanted[kind]...)
	}
	if !missing {
		slices.Sort(all)
		c.add(OK, about, "%s", strings.Join(slices.Compact(all), ", "))
	}
	return nil
}

// objects lists what privileges are asked about, by its kind.
func (c *checker) objects(ctx context.Context) (map[string][]types.ManagedObjectReference, error) {
	v, err := view.NewManager(c.src.c.Client).CreateContainerView(ctx, c.src.c.ServiceContent.RootFolder,
		[]string{"Folder", "Datacenter", "ResourcePool", "Datastore", "Network", "HostSystem"}, true)
	if err != nil {
		return nil, err
	}
	defer v.Destroy(context.WithoutCancel(ctx))
	all, err := placesOf(ctx, v)
	if err != nil {
		return nil, err
	}
	of := map[string][]types.ManagedObjectReference{}
	for ref := range all {
		if ref.Type == "Folder" && vmFolder(all, ref) || ref.Type == "ResourcePool" {
			of[ref.Type] = append(of[ref.Type], ref)
		}
	}
	for _, kind := range []string{"Datastore", "Network", "HostSystem"} {
		if of[kind], err = v.Find(ctx, []string{kind}, nil); err != nil {
			return nil, err
		}
	}
	for i := range c.vms {
		of["VirtualMachine"] = append(of["VirtualMachine"], c.vms[i].ref)
	}
	return of, nil
}

// lacking gives the objects on which the account lacks each privilege, by privilege.
func (c *checker) lacking(ctx context.Context, refs []types.ManagedObjectReference, wanted []string) (map[string][]string, error) {
	out := map[string][]string{}
	if c.src.c.ServiceContent.AuthorizationManager == nil {
		return out, nil
	}
	user, err := session.NewManager(c.src.c.Client).UserSession(ctx)
	if err != nil || user == nil {
		return out, err
	}
	for some := range slices.Chunk(refs, checkedAtOnce) {
		res, err := methods.HasPrivilegeOnEntities(ctx, c.src.c, &types.HasPrivilegeOnEntities{This: *c.src.c.ServiceContent.AuthorizationManager,
			Entity: some, SessionId: user.Key, PrivId: wanted})
		if err != nil {
			return nil, err
		}
		for _, e := range res.Returnval {
			for _, p := range e.PrivAvailability {
				if !p.IsGranted {
					out[p.PrivId] = append(out[p.PrivId], e.Entity.Value)
				}
			}
		}
	}
	return out, nil
}

func (c *checker) allDatastores(ctx context.Context) (all []mo.Datastore, err error) {
	v, err := view.NewManager(c.src.c.Client).CreateContainerView(ctx, c.src.c.ServiceContent.RootFolder, []string{"Datastore"}, true)
	if err != nil {
		return nil, err
	}
	defer v.Destroy(context.WithoutCancel(ctx))
	err = v.Retrieve(ctx, []string{"Datastore"}, []string{"name", "summary"}, &all)
	return all, err
}

// lowSpace is which part of a datastore should be free before snapshots are made there, percent.
const lowSpace = 10

func (c *checker) datastores(ctx context.Context) error {
	all, err := c.allDatastores(ctx)
	for _, d := range all {
		switch sum := d.Summary; {
		case !sum.Accessible:
			c.add(Failed, "datastore "+d.Name, "is not accessible")
		case sum.Capacity > 0 && sum.FreeSpace*100 < sum.Capacity*lowSpace:
			c.add(Warning, "datastore "+d.Name, "%s, %d %% free: snapshots grow there while they are read", sum.Type, sum.FreeSpace*100/sum.Capacity)
		default:
			c.add(OK, "datastore "+d.Name, "%s", sum.Type)
		}
	}
	return err
}

// files tries whether files of datastores can be read.
func (c *checker) files(ctx context.Context) error {
	for i := range c.vms {
		var m mo.VirtualMachine
		if err := c.src.c.retrieve(ctx, c.vms[i].ref, []string{"config.files"}, &m); err != nil {
			return err
		}
		if m.Config == nil || m.Config.Files.VmPathName == "" {
			continue
		}
		at, err := parsePlace(m.Config.Files.VmPathName)
		if err != nil {
			return err
		}
		dc, err := c.src.datacenter(ctx, c.vms[i].ref)
		if err != nil {
			return err
		}
		f := &remoteFile{src: c.src, ctx: ctx, url: c.src.fileURL(dc, at), name: at.String()}
		res, err := f.do(http.MethodHead, "")
		if err == nil {
			res.Body.Close()
			if res.StatusCode != http.StatusOK {
				err = statusError(res)
			}
		}
		if err != nil {
			c.add(Warning, "files", "%s cannot be read over HTTPS: %v", at, err)
		} else {
			c.add(OK, "files", "%s can be read over HTTPS", at)
		}
		return nil
	}
	return nil
}

// leftovers looks for snapshots of earlier runs, and for VMs that need attention.
func (c *checker) leftovers(ctx context.Context) error {
	var ours []backup.Leftover
	if c.src.cfg.Journal != nil {
		left, err := c.src.cfg.Journal.Left(ctx, func(l backup.Leftover) bool { return l.Host == c.src.c.URL().Host })
		if err != nil {
			return err
		}
		for _, e := range left {
			ours = append(ours, e.Leftover)
			e.Leave()
		}
	}
	for _, l := range ours {
		c.add(Warning, l.VM, "an earlier run left snapshot %s: the next one removes it, and so does 'holdfast doctor --clean'", l.Name)
	}
	for i := range c.vms {
		var m mo.VirtualMachine
		if err := c.src.c.retrieve(ctx, c.vms[i].ref, []string{"snapshot", "runtime.consolidationNeeded"}, &m); err != nil {
			return err
		}
		if m.Runtime.ConsolidationNeeded {
			c.add(Warning, c.vms[i].Name, "its disks need consolidation: the next backup does that")
		}
		if n := chain(m.Snapshot); n > maxChain {
			c.add(Failed, c.vms[i].Name, "has %d snapshots one above the other; no backup makes one more", n)
		}
		if m.Snapshot == nil {
			continue
		}
		for _, name := range namesOf(m.Snapshot.RootSnapshotList) {
			if strings.HasPrefix(name, prefix) && !slices.ContainsFunc(ours, func(l backup.Leftover) bool { return l.Name == name }) {
				c.add(Warning, c.vms[i].Name, "snapshot %s is of a backup that runs now, or of another host's", name)
			}
		}
	}
	if len(ours) == 0 {
		c.add(OK, "snapshots", "no earlier run of this host left one")
	}
	return nil
}

func namesOf(list []types.VirtualMachineSnapshotTree) []string {
	var all []string
	for i := range list {
		all = append(append(all, list[i].Name), namesOf(list[i].ChildSnapshotList)...)
	}
	return all
}
