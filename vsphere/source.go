package vsphere

import (
	"context"
	"fmt"
	"iter"
	"sync"
	"time"

	"github.com/vmware/govmomi/property"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/holdfast-backup/holdfast/backup"
)

// Config says how to reach a server, and how its VMs are backed up.
type Config struct {
	Name           string // of the source, for messages and the journal
	URL            string // https://HOST/sdk
	User, Password string
	CAFile         string // certificates of authorities, PEM; empty for the system's
	Thumbprint     string // SHA-256 or SHA-1 of the only certificate that is believed; empty for none

	// Transport is how disks are read: one of the Transports; empty for the first of them that a disk can be read with.
	Transport string
	VDDK      VDDK

	Quiesce  Quiesce
	Tracking Tracking

	// At once on one datastore and on one host: each snapshot makes every write of its VM a little slower, and its removal stops the VM for a
	// moment. 0 stands for 4.
	SnapshotsPerDatastore, SnapshotsPerHost int

	// Journal is told of snapshots before they are made. Required for Freeze.
	Journal *backup.Journal
	// Log is told what is done on the host, a line each; nil: nobody listens.
	Log func(string)
	// Sleep waits between attempts; nil for the clock's.
	Sleep func(ctx context.Context, d time.Duration) error
}

// Transports, in the order in which they are preferred.
const (
	TransportVDDK   = "vddk"   // nbdkit with VMware's library, where the user gave that
	TransportFolder = "folder" // files of datastores over HTTPS; not from vSAN and vVols
	TransportLease  = "lease"  // an export of the whole disk
)

// VDDK says where VMware's Virtual Disk Development Kit is, which nobody but VMware may give away.
type VDDK struct {
	LibDir      string // the unpacked vmware-vix-disklib-distrib; empty: there is none
	Nbdkit      string // program; empty for that of the path
	Transports  string // VDDK's own, such as nbdssl:nbd
	Compression string // zlib, fastlz or skipz
}

// Quiesce says whether the guest is asked to bring its files in order before a snapshot.
type Quiesce uint8

// The policies.
const (
	QuiesceTry     Quiesce = iota // and take a crash-consistent snapshot when it cannot
	QuiesceRequire                // and fail when it cannot
	QuiesceOff
)

// Tracking says what use is made of changed block tracking.
type Tracking uint8

// The policies.
const (
	TrackingUse    Tracking = iota // where the VM has it switched on
	TrackingEnable                 // and switch it on
	TrackingOff
)

// Source gives the VMs of one server. Safe for concurrent use.
type Source struct {
	c      *client
	cfg    Config
	limits limits

	mu     sync.Mutex // guards following
	listed []VM       // when the inventory was looked at last
}

var _ backup.Source = (*Source)(nil)

// Connect logs in.
func Connect(ctx context.Context, cfg Config) (*Source, error) {
	if cfg.Log == nil {
		cfg.Log = func(string) {}
	}
	if cfg.Sleep == nil {
		cfg.Sleep = sleep
	}
	c, err := connect(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return &Source{c: c, cfg: cfg, limits: newLimits(cfg)}, nil
}

// Close logs out.
func (s *Source) Close() error { return s.c.close() }

func (s *Source) logf(format string, a ...any) { s.cfg.Log(fmt.Sprintf(format, a...)) }

// VMs implements backup.Source.
func (s *Source) VMs(ctx context.Context) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		list, err := s.List(ctx)
		if err != nil {
			yield("", err)
			return
		}
		for _, vm := range list {
			if !yield(vm.Name, nil) {
				return
			}
		}
	}
}

// retrieve reads properties of one object.
func (c *client) retrieve(ctx context.Context, ref types.ManagedObjectReference, props []string, dst any) error {
	return property.DefaultCollector(c.Client).RetrieveOne(ctx, ref, props, dst)
}

// serverTime is the server's clock.
func (c *client) serverTime(ctx context.Context) (time.Time, error) {
	t, err := methods.GetCurrentTime(ctx, c.Client)
	if err != nil {
		return time.Time{}, err
	}
	return *t, nil
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
