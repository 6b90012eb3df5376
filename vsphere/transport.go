package vsphere

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/vmware/govmomi/vim25/mo"

	"github.com/holdfast-backup/holdfast/vsphere/vddk"
)

// openReader opens a disk in one of the ways, which is chosen for each disk and said with it.
func (s *Source) openReader(ctx context.Context, snap *snapshot, dev *device) (reader, error) {
	how, err := s.transport(ctx, snap, dev)
	if err != nil {
		return nil, err
	}
	switch how {
	case TransportVDDK:
		return s.openVDDK(ctx, snap, dev)
	case TransportFolder:
		dc, err := s.datacenter(ctx, snap.vm.ref)
		if err != nil {
			return nil, err
		}
		return s.openFolder(ctx, dc, dev)
	case TransportLease:
		return s.openLease(ctx, snap, dev)
	}
	return nil, fmt.Errorf("transport %q is not known", how)
}

// transport chooses.
func (s *Source) transport(ctx context.Context, snap *snapshot, dev *device) (string, error) {
	switch {
	case s.cfg.Transport != "":
		return s.cfg.Transport, nil
	case s.cfg.VDDK.LibDir != "":
		return TransportVDDK, nil
	case dev.mapping:
		return TransportLease, nil
	}
	at, err := parsePlace(dev.file)
	if err != nil {
		return "", err
	}
	for _, ref := range snap.vm.mo.Datastore {
		var d mo.Datastore
		if err := s.c.retrieve(ctx, ref, []string{"summary"}, &d); err != nil {
			return "", err
		}
		if d.Summary.Name == at.datastore && withoutFiles(d.Summary.Type) {
			return TransportLease, nil
		}
	}
	return TransportFolder, nil
}

// withoutFiles reports whether a datastore of this type keeps disks as objects: DatastoreSummary.type.
func withoutFiles(kind string) bool {
	return strings.EqualFold(kind, "vsan") || strings.EqualFold(kind, "vsanD") || strings.EqualFold(kind, "vvol")
}

// vddkReader reads through nbdkit.
type vddkReader struct{ *vddk.Disk }

// Via implements reader.
func (vddkReader) Via() string { return TransportVDDK }

// openVDDK starts nbdkit for a disk.
func (s *Source) openVDDK(ctx context.Context, snap *snapshot, dev *device) (reader, error) {
	o := s.vddkOptions(snap.vm, dev)
	if snap.ref != nil {
		o.Snapshot = snap.ref.Value
	}
	d, err := vddk.Open(ctx, o)
	if err != nil {
		return nil, err
	}
	if d.Size() != dev.size {
		return nil, errors.Join(fmt.Errorf("nbdkit gives a disk of %d bytes, but the VM has one of %d", d.Size(), dev.size), d.Close())
	}
	return vddkReader{d}, nil
}

// vddkOptions are those for a disk of a VM.
func (s *Source) vddkOptions(m *machine, dev *device) vddk.Options {
	u := s.c.URL()
	port, _ := strconv.Atoi(u.Port()) // which the URL's parser has looked at
	return vddk.Options{
		Nbdkit: s.cfg.VDDK.Nbdkit, LibDir: s.cfg.VDDK.LibDir, Transports: s.cfg.VDDK.Transports, Compression: s.cfg.VDDK.Compression,
		Server: u.Hostname(), Port: port, User: s.cfg.User, Password: s.cfg.Password, Thumbprint: s.c.thumbprint(),
		VM: m.ID, File: dev.file, Log: func(line string) { s.logf("%s: %s: %s", m.Path, dev.label, line) },
	}
}
