package machine

import (
	"cmp"
	"errors"
	"fmt"
	"sync"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/btrfs"
	"github.com/holdfast-backup/holdfast/fs/guest/exfat"
	"github.com/holdfast-backup/holdfast/fs/guest/ext"
	"github.com/holdfast-backup/holdfast/fs/guest/fat"
	"github.com/holdfast-backup/holdfast/fs/guest/iso9660"
	"github.com/holdfast-backup/holdfast/fs/guest/ntfs"
	"github.com/holdfast-backup/holdfast/fs/guest/volume"
	"github.com/holdfast-backup/holdfast/fs/guest/xfs"
)

// Options of opening a guest's disks.
type Options struct {
	Volumes volume.Options
	FS      guest.Options // of each file system
}

// Machine is what the disks of a guest hold.
type Machine struct {
	Volumes  []*Volume
	Warnings []string // what is odd about the volumes; complete after Views

	views func() []*View
}

// Volume is a volume and its file system.
type Volume struct {
	volume.Volume
	machine *Machine
	opt     guest.Options

	mu  sync.Mutex // guards following
	fs  guest.FS
	err error // that will not go away; one of reading the disk may
}

// Open finds the volumes.
func Open(disks []volume.Disk, opt Options) *Machine {
	m := &Machine{}
	list, err := m.scan(disks, opt.Volumes)
	if err != nil {
		m.Warnings = append(m.Warnings, err.Error())
	}
	for _, v := range list {
		m.Volumes = append(m.Volumes, &Volume{Volume: v, machine: m, opt: opt.FS})
	}
	m.views = sync.OnceValue(m.findViews)
	return m
}

func (m *Machine) scan(disks []volume.Disk, opt volume.Options) (list []volume.Volume, err error) {
	defer caught(&err)
	list, m.Warnings = volume.Scan(disks, opt)
	return list, nil
}

// Volume gives a volume by its name; nil when there is none.
func (m *Machine) Volume(name string) *Volume {
	for _, v := range m.Volumes {
		if v.Name == name {
			return v
		}
	}
	return nil
}

// readers maps a signature to what reads that file system.
var readers = map[string]func(*Volume) (guest.FS, error){
	"ext2": openAs(ext.Open), "ext3": openAs(ext.Open), "ext4": openAs(ext.Open),
	"xfs":     openAs(xfs.Open),
	"ntfs":    openAs(ntfs.Open),
	"vfat":    openAs(fat.Open),
	"exfat":   openAs(exfat.Open),
	"iso9660": openAs(iso9660.Open),
	"btrfs":   openBtrfs,
}

func openAs[F guest.FS](open func(guest.Device, guest.Options) (F, error)) func(*Volume) (guest.FS, error) {
	return func(v *Volume) (guest.FS, error) {
		f, err := open(v.Device, v.opt)
		if err != nil {
			return nil, err
		}
		return f, nil
	}
}

// openBtrfs opens a Btrfs with all volumes that it lies on.
func openBtrfs(v *Volume) (guest.FS, error) {
	mine, _, ok := btrfs.Member(v.Device)
	if !ok {
		return nil, guest.ErrUnknown
	}
	devs := []guest.Device{v.Device}
	for _, o := range v.machine.Volumes {
		if o == v || o.Device == nil || o.Signature != "btrfs" {
			continue
		}
		if id, _, ok := btrfs.Member(o.Device); ok && id == mine {
			devs = append(devs, o.Device)
		}
	}
	f, err := btrfs.OpenAll(devs, v.opt)
	if err != nil {
		return nil, err
	}
	return f, nil
}

// HasReader reports whether there is a reader for what the volume's first bytes look like.
func (v *Volume) HasReader() bool { return v.Device != nil && readers[v.Signature] != nil }

// FS opens the volume's file system, once. Its reader may not panic. guest.ErrUnsupported when nothing reads it; the reason why the volume itself cannot
// be read, when it cannot.
func (v *Volume) FS() (guest.FS, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.fs != nil || v.err != nil {
		return v.fs, v.err
	}
	if v.Device == nil {
		return nil, fmt.Errorf("%s: %s: %w", v.Name, cmp.Or(v.Encryption, v.Signature, v.Kind), v.Err)
	}
	open := readers[v.Signature]
	switch {
	case open == nil && v.Signature == "":
		return nil, guest.Unsupported("%s: holds nothing that is known", v.Name)
	case open == nil:
		return nil, guest.Unsupported("%s: %s", v.Name, v.Signature)
	}
	f, err := v.open(open)
	if err == nil {
		v.fs = guarded{f}
		return v.fs, nil
	}
	err = fmt.Errorf("%s: %s: %w", v.Name, v.Signature, err)
	for _, lasting := range []error{guest.ErrDamaged, guest.ErrUnsupported, guest.ErrUnknown} {
		if errors.Is(err, lasting) {
			v.err = err
		}
	}
	return nil, err
}

// open opens the file system.
func (v *Volume) open(with func(*Volume) (guest.FS, error)) (f guest.FS, err error) {
	defer caught(&err)
	return with(v)
}
