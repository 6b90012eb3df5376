package vsphere

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"

	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/holdfast-backup/holdfast/backup"
)

// maxConfigFile is the largest file that is kept of a configuration, bytes: it is held in memory.
const maxConfigFile = 16 << 20

// Config implements backup.Snapshot: vm.json is the configuration as the server tells it, inventory.json where the VM was and what it was connected
// to, disks.json which disk of the point was which; the .vmx and the NVRAM are as they lay on the datastore.
func (s *snapshot) Config(ctx context.Context) ([]backup.ConfigFile, error) {
	config := s.config
	if config.DatastoreUrl == nil { // the snapshot's does not say what the VM's does
		config.DatastoreUrl = s.vm.mo.Config.DatastoreUrl
	}
	where, err := s.inventory(ctx)
	if err != nil {
		return nil, s.vm.failed("read where it is in the inventory", err)
	}
	var files []backup.ConfigFile
	// In what is of the API each type has its name, or else nobody could read it back.
	var text, indented bytes.Buffer
	if err := types.NewJSONEncoder(&text).Encode(config); err != nil {
		return nil, err
	}
	if err := json.Indent(&indented, text.Bytes(), "", "  "); err != nil {
		return nil, err
	}
	files = append(files, backup.ConfigFile{Name: "vm.json", Data: indented.Bytes()})
	for _, f := range []struct {
		name string
		data any
	}{{"inventory.json", where}, {"disks.json", s.mapping()}} {
		text, err := json.MarshalIndent(f.data, "", "  ")
		if err != nil {
			return nil, err
		}
		files = append(files, backup.ConfigFile{Name: f.name, Data: append(text, '\n')})
	}
	raw, err := s.rawFiles(ctx)
	return append(files, raw...), err
}

// inventory is where a VM was, and what of the server it used.
type inventory struct {
	Path       string            `json:"path"`
	ID         string            `json:"id"`
	Host       string            `json:"host,omitempty"`
	Pool       string            `json:"resource_pool,omitempty"`
	Datastores map[string]string `json:"datastores"` // id => name
	Networks   map[string]string `json:"networks"`   // id => name
	Attributes map[string]string `json:"custom_attributes,omitempty"`
	Tags       []string          `json:"tags,omitempty"` // as CATEGORY/TAG
	PoweredOn  bool              `json:"powered_on"`
	Template   bool              `json:"template"`
}

func (s *snapshot) inventory(ctx context.Context) (*inventory, error) {
	m := &s.vm.mo
	out := &inventory{Path: s.vm.Path, ID: s.vm.ID, Pool: s.vm.Pool, PoweredOn: s.vm.On, Template: s.vm.Template}
	out.Datastores, out.Networks = s.names(ctx, m.Datastore), s.names(ctx, m.Network)
	if m.Runtime.Host != nil {
		out.Host = s.names(ctx, []types.ManagedObjectReference{*m.Runtime.Host})[m.Runtime.Host.Value]
	}
	fields, err := s.src.attributeNames(ctx)
	if err != nil {
		s.warn(fmt.Sprintf("the names of custom attributes are not in this point: %v", missing(err)))
	}
	for _, v := range m.CustomValue {
		if text, ok := v.(*types.CustomFieldStringValue); ok {
			if out.Attributes == nil {
				out.Attributes = map[string]string{}
			}
			out.Attributes[cmp.Or(fields[text.Key], fmt.Sprint(text.Key))] = text.Value
		}
	}
	all, err := s.src.tagsOf(ctx, []types.ManagedObjectReference{s.vm.ref})
	if err != nil {
		s.warn(fmt.Sprintf("the tags of the VM are not in this point: %v", err))
	}
	out.Tags = all[s.vm.ID]
	return out, nil
}

// names gives the names of objects, by their ids. One that cannot be read is left out, and said: the disks of the VM have been read.
func (s *snapshot) names(ctx context.Context, refs []types.ManagedObjectReference) map[string]string {
	out := map[string]string{}
	for _, ref := range refs {
		name, err := s.src.nameOf(ctx, ref)
		if err != nil {
			s.warn(fmt.Sprintf("the name of %s is not in this point: %v", ref.Value, missing(err)))
			continue
		}
		out[ref.Value] = unescape(name)
	}
	return out
}

// nameOf gives the name of an object. In networks govmomi has it in a field of their own.
func (s *Source) nameOf(ctx context.Context, ref types.ManagedObjectReference) (string, error) {
	if slices.Contains([]string{"Network", "DistributedVirtualPortgroup", "OpaqueNetwork"}, ref.Type) {
		var n mo.Network
		err := s.c.retrieve(ctx, ref, []string{"name"}, &n)
		return n.Name, err
	}
	var e mo.ManagedEntity
	err := s.c.retrieve(ctx, ref, []string{"name"}, &e)
	return e.Name, err
}

// mappedDisk says which disk of a VM a disk of the point is.
type mappedDisk struct {
	Disk       string `json:"disk,omitempty"` // disk0…; empty for one that is not in the point
	Skipped    string `json:"skipped,omitempty"`
	Label      string `json:"label"`
	Key        int32  `json:"device_key"`
	Controller string `json:"controller"`
	Bus        int32  `json:"bus"`
	Unit       int32  `json:"unit"`
	Size       int64  `json:"bytes"`
	File       string `json:"file"`
	UUID       string `json:"uuid,omitempty"`
	ChangeID   string `json:"change_id,omitempty"`
	Via        string `json:"via,omitempty"`
}

func (s *snapshot) mapping() []mappedDisk {
	out := []mappedDisk{}
	for _, dev := range s.src.disksOf(s.config.Hardware.Device) {
		m := mappedDisk{Skipped: dev.skip, Label: dev.label, Key: dev.key, Controller: dev.kind, Bus: dev.bus, Unit: dev.unit, Size: dev.size,
			File: dev.file, UUID: dev.uuid, ChangeID: dev.changeID}
		for i, d := range s.disks {
			if d.key == dev.key {
				m.Disk, m.Via = fmt.Sprintf("disk%d", i), d.Via()
			}
		}
		out = append(out, m)
	}
	return out
}

// rawFiles gives the .vmx and the NVRAM. One that is not there, as the NVRAM of a VM that never ran, is left out.
func (s *snapshot) rawFiles(ctx context.Context) ([]backup.ConfigFile, error) {
	at, err := parsePlace(s.vm.mo.Config.Files.VmPathName)
	if err != nil {
		return nil, err
	}
	dc, err := s.src.datacenter(ctx, s.vm.ref)
	if err != nil {
		s.warn(fmt.Sprintf("the .vmx and the NVRAM are not in this point, since its datacenter cannot be seen: %v", missing(err)))
		return nil, ctx.Err()
	}
	wanted := []place{at}
	for _, o := range s.vm.mo.Config.ExtraConfig {
		v := o.GetOptionValue()
		if name, ok := v.Value.(string); ok && v.Key == "nvram" && name != "" {
			wanted = append(wanted, at.beside(path.Base(name)))
		}
	}
	if len(wanted) == 1 {
		wanted = append(wanted, at.beside(replaceEnding(path.Base(at.path), ".nvram")))
	}
	var files []backup.ConfigFile
	for _, p := range wanted {
		data, err := s.src.readFile(ctx, dc, p)
		if err != nil {
			if p == at || !errors.Is(err, fs.ErrNotExist) {
				s.warn(fmt.Sprintf("%s is not in this point: %v", p, err))
			}
			continue
		}
		files = append(files, backup.ConfigFile{Name: path.Base(p.path), Data: data})
	}
	return files, ctx.Err()
}

func replaceEnding(name, ending string) string { return name[:len(name)-len(path.Ext(name))] + ending }

// readFile reads a small file whole.
func (s *Source) readFile(ctx context.Context, dc string, p place) ([]byte, error) {
	f, err := s.openFile(ctx, dc, p)
	if err != nil {
		return nil, err
	}
	if f.size > maxConfigFile {
		return nil, fmt.Errorf("%s is larger than %d MiB", p, maxConfigFile>>20)
	}
	data := make([]byte, f.size)
	if _, err := f.ReadAt(data, 0); err != nil && f.size > 0 {
		return nil, err
	}
	return data, nil
}
