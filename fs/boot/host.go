package boot

import (
	"context"
	"errors"
	"io"
	"time"
)

// ErrGone: the VM does not run any more.
var ErrGone = errors.New("the VM does not run")

// Firmware is what starts a VM.
type Firmware string

// The kinds of firmware.
const (
	BIOS Firmware = "bios"
	UEFI Firmware = "uefi"
)

// Bus is how a VM sees its disks.
type Bus string

// The buses. Which of them a guest can boot from depends on the drivers it has.
const (
	SATA       Bus = "sata"
	IDE        Bus = "ide"
	NVMe       Bus = "nvme"
	VirtIO     Bus = "virtio"
	PVSCSI     Bus = "pvscsi" // VMware's paravirtual SCSI
	LSISAS     Bus = "lsisas" // LSI SAS1068
	VirtIOSCSI Bus = "virtio-scsi"
)

// Machine is the VM as a host is to make it.
type Machine struct {
	Name     string   `json:"name"`
	UUID     string   `json:"uuid"` // as the guest sees it
	Firmware Firmware `json:"firmware"`
	Memory   int64    `json:"memory"` // bytes
	CPUs     int      `json:"cpus"`
	Disks    []Disk   `json:"disks"`
	NICs     []NIC    `json:"nics,omitempty"`
	// VNC is where its screen is shown: HOST:PORT, or empty for the session's own socket.
	VNC string `json:"vnc,omitempty"`
}

// Disk is a disk of a Machine.
type Disk struct {
	Name string `json:"name"` // disk0…; also the name of its NBD export
	Bus  Bus    `json:"bus"`
	Size int64  `json:"size"` // bytes
	// File is a raw file that the disk was moved to; empty: it is served over NBD.
	File string `json:"file,omitempty"`
}

// NIC is a network card.
type NIC struct {
	Model   string `json:"model"`         // e1000, e1000e, vmxnet3 or virtio
	MAC     string `json:"mac,omitempty"` // of the original
	Network string `json:"network"`       // "none", "user", or "bridge:NAME"
}

// Host runs VMs.
type Host interface {
	// Boot starts the VM of a session. It runs when Boot returns, and does not end when ctx ends or this
	// process does.
	Boot(ctx context.Context, s *State) (Guest, error)
	// Attach finds the VM of a session that was started before; ErrGone when it does not
	// run any more.
	Attach(ctx context.Context, s *State) (Guest, error)
}

// Guest is a VM that runs, or did. Methods give ErrGone when it has ended.
type Guest interface {
	// Done is closed when the VM has ended.
	Done() <-chan struct{}
	// Pause halts the VM with all it wrote handed to its disks and flushed; Resume lets it go on.
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error
	// Stop asks the guest to shut down, and switches it off when it has not after a time;
	// at once when that is 0.
	Stop(ctx context.Context, patience time.Duration) error
	// Screenshot writes what is on the screen as a PNG.
	Screenshot(ctx context.Context, w io.Writer) error
	// Migrate copies a disk to a new raw file while the VM runs, then lets the VM go on with the file.
	// progress may be nil.
	Migrate(ctx context.Context, disk, file string, progress func(done, total int64)) error
	// Close lets go of the VM, which goes on.
	Close() error
}
