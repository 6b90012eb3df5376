package vsphere

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path"
	"strings"
	"time"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/nfc"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/holdfast-backup/holdfast/fs/vdisk"
)

// Restore says which VM is made, and out of what.
type Restore struct {
	Name string
	// Of a VM of this platform, as a point keeps them: vm.json, inventory.json, disks.json. Without the first, Machine says what the VM is like.
	Config, Inventory, Mapping []byte
	Machine                    Machine
	NVRAM                      []byte // empty: there is none
	Disks                      []RestoreDisk

	Datastore, Network, Folder, Pool string // empty: as the VM had; the folder is a path in the inventory
	KeepIdentity                     bool   // UUIDs and MAC addresses, for one that replaces the old VM
	Connect                          bool   // network cards, when it is switched on
	PowerOn                          bool

	// Progress is told of each disk as it begins; what it gives is told how many bytes more of it are dealt with.
	Progress func(disk string, total int64) (done func(n int64), end func(error))
}

// Machine is a VM of another platform.
type Machine struct {
	EFI    bool
	CPUs   int32
	Memory int64  // MiB
	Guest  string // as VirtualMachineGuestOsIdentifier has it; empty for otherGuest64
}

// RestoreDisk is a disk of a point.
type RestoreDisk struct {
	Name  string // disk0…
	Image vdisk.Source
}

// Restored is the VM that was made.
type Restored struct {
	ID, Path string
	Warnings []string // what was left out
}

// restoring is a restore on its way.
type restoring struct {
	src  *Source
	what *Restore
	spec types.VirtualMachineConfigSpec
	to   target

	disks    []restoredDisk
	macs     []string // that the VM is to have
	warnings []string
}

// restoredDisk is where a disk of the point goes.
type restoredDisk struct {
	RestoreDisk
	place string // "VirtualLsiLogicController0:1"
}

func (r *restoring) warnf(format string, a ...any) {
	r.warnings = append(r.warnings, fmt.Sprintf(format, a...))
}

// Restore makes a new VM out of a point. It is switched off, and its network cards are not connected, unless told otherwise. When anything fails
// the VM is removed again.
func (s *Source) Restore(ctx context.Context, what Restore) (*Restored, error) {
	r := &restoring{src: s, what: &what}
	made, err := r.run(ctx)
	if err != nil {
		return nil, fmt.Errorf("vsphere: restore %s: %w", what.Name, missing(err))
	}
	return made, nil
}

func (r *restoring) run(ctx context.Context) (*Restored, error) {
	if err := r.find(ctx); err != nil {
		return nil, err
	}
	if err := r.describe(ctx); err != nil {
		return nil, err
	}
	ref, err := r.fill(ctx)
	if err != nil {
		return nil, err
	}
	made := &Restored{ID: ref.Value, Path: path.Join(r.to.folderPath, r.what.Name)}
	var vm mo.VirtualMachine
	if err := r.src.c.retrieve(ctx, ref, []string{"config.files", "config.hardware.device"}, &vm); err != nil {
		return nil, err
	}
	r.lookAtMACs(&vm)
	if len(r.what.NVRAM) > 0 && vm.Config != nil {
		if err := r.nvram(ctx, vm.Config.Files.VmPathName); err != nil {
			r.warnf("the NVRAM could not be restored, the VM begins with an empty one: %v", missing(err))
		}
	}
	if r.what.PowerOn {
		if err := r.src.powerOn(ctx, ref, r.what.Name, r.what.KeepIdentity); err != nil {
			return nil, fmt.Errorf("it is restored, but could not be switched on: %w", err)
		}
	}
	made.Warnings = r.warnings
	return made, nil
}

// lookAtMACs says which addresses the server did not let the VM have.
func (r *restoring) lookAtMACs(vm *mo.VirtualMachine) {
	have := map[string]bool{}
	if vm.Config != nil {
		for _, d := range vm.Config.Hardware.Device {
			if card, ok := d.(types.BaseVirtualEthernetCard); ok {
				have[strings.ToLower(card.GetVirtualEthernetCard().MacAddress)] = true
			}
		}
	}
	for _, mac := range r.macs {
		if !have[strings.ToLower(mac)] {
			r.warnf("the server gave a network card another MAC address than %s", mac)
		}
	}
}

// fill makes the VM by an import lease and sends its disks. The server removes a VM whose lease does not end well.
func (r *restoring) fill(ctx context.Context) (ref types.ManagedObjectReference, err error) {
	req := &types.ImportVApp{This: r.to.pool, Spec: &types.VirtualMachineImportSpec{ConfigSpec: r.spec}, Folder: &r.to.folder, Host: &r.to.host}
	res, err := methods.ImportVApp(ctx, r.src.c, req)
	if err != nil {
		return ref, err
	}
	e := &export{src: r.src, lease: nfc.NewLease(r.src.c.Client, res.Returnval), done: make(chan struct{})}
	defer func() {
		if err != nil {
			_ = e.abort()
			err = errors.Join(err, r.remove(e.entity))
		}
	}()
	if err := e.ready(ctx); err != nil {
		return ref, err
	}
	e.ended.Add(1)
	go e.live()
	defer e.stop()
	for i := range r.disks {
		if err := r.send(ctx, e, i); err != nil {
			return ref, fmt.Errorf("%s: %w", r.disks[i].Name, err)
		}
	}
	e.stop()
	if err := e.lease.Complete(ctx); err != nil {
		return ref, err
	}
	return e.entity, nil
}

// remove removes a VM whose disks did not come. A vCenter has done that when the lease was aborted.
func (r *restoring) remove(ref types.ManagedObjectReference) error {
	if ref.Value == "" {
		return nil // it was not made
	}
	ctx, cancel := context.WithTimeout(context.Background(), verifyTime)
	defer cancel()
	res, err := methods.Destroy_Task(ctx, r.src.c, &types.Destroy_Task{This: ref})
	if err == nil {
		_, err = r.src.wait(ctx, res.Returnval)
	}
	if err == nil || fault.Is(err, &types.ManagedObjectNotFound{}) {
		return nil
	}
	return fmt.Errorf("the VM that was begun could not be removed: %w", missing(err))
}

// send uploads a disk as a streamOptimized VMDK, which is made while it is sent.
func (r *restoring) send(ctx context.Context, e *export, number int) (err error) {
	d := &r.disks[number]
	at, err := e.urlOf(d.place, number)
	if err != nil {
		return err
	}
	u, err := url.Parse(at.Url)
	if err != nil {
		return err
	}
	if u.Hostname() == "*" {
		u.Host = r.src.c.URL().Host
	}
	client, err := r.src.downloader(u, at.SslThumbprint)
	if err != nil {
		return err
	}
	done, end := func(int64) {}, func(error) {}
	if r.what.Progress != nil {
		done, end = r.what.Progress(d.Name, d.Image.Size())
	}
	defer func() { end(err) }()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// How long it gets is not known before it is made: it goes in chunks, as the samples of VMware's vijava send it.
	body, to := io.Pipe()
	made := make(chan error, 1)
	go func() {
		_, err := vdisk.WriteStreamOptimized(ctx, to, d.Image, vdisk.Identity{}, d.Name+".vmdk", done)
		to.CloseWithError(err)
		made <- err
	}()
	// POST, for it is created by the import (OvfFileItem.create is false): vSphere API, HttpNfcLeaseDeviceUrl.
	err = upload(ctx, client, http.MethodPost, u, "application/x-vnd.vmware-streamVmdk", body)
	body.CloseWithError(errors.New("the host wants no more"))
	if werr := <-made; err == nil || werr != nil && !errors.Is(werr, io.ErrClosedPipe) && !strings.Contains(werr.Error(), "wants no more") {
		return werr // what could not be read is the cause of what could not be sent
	}
	return err
}

// upload sends a body.
func upload(ctx context.Context, client *http.Client, method string, u *url.URL, kind string, body io.Reader) error {
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", kind)
	res, err := client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode/100 != 2 {
		return statusError(res)
	}
	return nil
}

// nvramTime is how long the upload of an NVRAM may take.
const nvramTime = 2 * time.Minute

// nvram puts the NVRAM beside the .vmx, where the VM looks for it when it is switched on.
func (r *restoring) nvram(ctx context.Context, vmx string) error {
	at, err := parsePlace(vmx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, nvramTime)
	defer cancel()
	u := r.src.fileURL(r.to.datacenterPath, at.beside(replaceEnding(path.Base(at.path), ".nvram")))
	return upload(ctx, &r.src.c.Client.Client.Client, http.MethodPut, u, "application/octet-stream", bytes.NewReader(r.what.NVRAM))
}
