package vsphere_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
	"github.com/holdfast-backup/holdfast/vsphere"
	"github.com/holdfast-backup/holdfast/vsphere/vspheretest"
)

// rig is a server with a repository that its VMs are backed up to. What the guests' disks hold the test itself keeps.
type rig struct {
	t       *testing.T
	server  *vspheretest.Server
	repo    *store.Repo
	journal *backup.Journal
	cfg     vsphere.Config

	mu     sync.Mutex // guards following
	rnd    *rand.Rand
	disks  map[*vspheretest.VM][][]byte
	frozen map[*vspheretest.VM][][]byte // as of the last snapshot
	still  bool                         // a snapshot is being made: guests write nothing, so that the test knows what it holds
	log    []string
}

func newRig(t *testing.T, o vspheretest.Options) *rig {
	t.Helper()
	r := &rig{t: t, server: vspheretest.New(t, o), rnd: rand.New(rand.NewPCG(1, 2)), disks: map[*vspheretest.VM][][]byte{}, frozen: map[*vspheretest.VM][][]byte{}}
	b := bucket.NewMemory()
	if err := store.Init(t.Context(), b, store.InitOptions{NoEncryption: true, ChunkSize: 64 << 10}, time.Now()); err != nil {
		t.Fatal(err)
	}
	var err error
	if r.repo, err = store.Open(t.Context(), b, store.MemoryIndex(), store.OpenOptions{Warn: func(s string) { t.Log(s) }}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.repo.Close() })
	if r.journal, err = backup.OpenJournal(t.TempDir()); err != nil {
		t.Fatal(err)
	}
	r.cfg = vsphere.Config{Name: "lab", URL: r.server.URL(), User: r.server.User, Password: r.server.Password, Thumbprint: r.server.Thumbprint(), Journal: r.journal,
		Log: func(s string) { r.mu.Lock(); defer r.mu.Unlock(); r.log = append(r.log, s) }, Sleep: shortSleep}
	r.server.SetHooks(vspheretest.Hooks{
		OnCall: func(method string, _ *vspheretest.VM) {
			if strings.HasPrefix(method, "CreateSnapshot") {
				r.hold(true)
			}
		},
		OnFrozen: func(vm *vspheretest.VM, _ string) { r.freeze(vm) },
	})
	return r
}

// shortSleep makes pauses short.
func shortSleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(min(d, 20*time.Millisecond)):
	case <-ctx.Done():
	}
	return ctx.Err()
}

func (r *rig) hold(still bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.still = still
}

func (r *rig) freeze(vm *vspheretest.VM) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all [][]byte
	for _, d := range r.disks[vm] {
		all = append(all, bytes.Clone(d))
	}
	r.frozen[vm], r.still = all, false
}

func (r *rig) truth(vm *vspheretest.VM) [][]byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.frozen[vm]
}

// said reports whether the source logged a text.
func (r *rig) said(text string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.ContainsFunc(r.log, func(s string) bool { return strings.Contains(s, text) })
}

// source connects.
func (r *rig) source() *vsphere.Source {
	r.t.Helper()
	src, err := vsphere.Connect(r.t.Context(), r.cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { src.Close() })
	return src
}

const mib = 1 << 20

// threeDisks is a VM with three disks on two controllers.
func threeDisks(name string) vspheretest.VMSpec {
	return vspheretest.VMSpec{Name: name, ChangeTracking: true, Folder: "prod", Disks: []vspheretest.DiskSpec{
		{Size: 16 * mib, Controller: "lsilogic"}, {Size: 24*mib + 1024, Controller: "lsilogic"}, {Size: 8 * mib, Controller: "pvscsi", Bus: 1},
	}}
}

// oneDisk is a small VM.
func oneDisk(name string) vspheretest.VMSpec {
	return vspheretest.VMSpec{Name: name, ChangeTracking: true, Disks: []vspheretest.DiskSpec{{Size: 8 * mib}}}
}

// add makes a VM, whose guest has written something on each disk.
func (r *rig) add(spec vspheretest.VMSpec) *vspheretest.VM {
	vm := r.server.AddVM(spec)
	var disks [][]byte
	for _, d := range spec.Disks {
		disks = append(disks, make([]byte, d.Size))
	}
	r.mu.Lock()
	r.disks[vm] = disks
	r.mu.Unlock()
	r.write(vm, 12)
	return vm
}

// write is what a guest does: it writes at random places, and gives up some.
func (r *rig) write(vm *vspheretest.VM, writes int) (changed int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.still {
		return 0
	}
	for i, d := range r.disks[vm] {
		for range writes {
			off := r.rnd.IntN(len(d))
			p := d[off:min(len(d), off+1+r.rnd.IntN(200_000))]
			if r.rnd.IntN(5) == 0 {
				clear(p)
				vm.Zero(i, int64(off), int64(len(p)))
			} else {
				for k := range p {
					p[k] = byte(r.rnd.Uint32())
				}
				vm.WriteAt(i, p, int64(off))
			}
			changed += int64(len(p))
		}
	}
	return changed
}

// resize makes the only disk of a VM larger.
func (r *rig) resize(vm *vspheretest.VM, size int64) {
	vm.Resize(0, size)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.disks[vm][0] = append(r.disks[vm][0], make([]byte, size-int64(len(r.disks[vm][0])))...)
}

// backup makes a point.
func (r *rig) backup(src *vsphere.Source, vm string, opt backup.Options) (*store.Point, error) {
	return r.backupWith(r.t.Context(), src, vm, opt)
}

func (r *rig) backupWith(ctx context.Context, src *vsphere.Source, vm string, opt backup.Options) (_ *store.Point, err error) {
	snap, err := src.Freeze(ctx, vm)
	r.hold(false)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, snap.Close()) }()
	return backup.Run(ctx, r.repo, snap, opt)
}

func (r *rig) mustBackup(src *vsphere.Source, vm string) *store.Point {
	r.t.Helper()
	p, err := r.backup(src, vm, backup.Options{})
	if err != nil {
		r.t.Fatal(err)
	}
	return p
}

// wantDisks compares a point with what was frozen.
func (r *rig) wantDisks(p *store.Point, want [][]byte) {
	r.t.Helper()
	if len(p.Disks) != len(want) {
		r.t.Fatalf("%s has %d disks, want %d", p.Path(), len(p.Disks), len(want))
	}
	for i, w := range want {
		img, err := r.repo.OpenDisk(p, fmt.Sprint("disk", i))
		if err != nil {
			r.t.Fatal(err)
		}
		got := make([]byte, img.Size())
		if _, err := img.ReadAt(got, 0); err != nil && err != io.EOF {
			r.t.Fatal(err)
		}
		if !bytes.Equal(got, w) {
			at := 0
			for at < min(len(got), len(w)) && got[at] == w[at] {
				at++
			}
			r.t.Errorf("%s disk%d: %d bytes, want %d; the first difference is at %d", p.Path(), i, len(got), len(w), at)
		}
	}
}

// wantRead makes sure how each disk of a point was read.
func (r *rig) wantRead(p *store.Point, how string) {
	r.t.Helper()
	for _, d := range p.Disks {
		if d.Read != how {
			r.t.Errorf("%s %s: read %q, want %q", p.Path(), d.Name, d.Read, how)
		}
	}
}

// wantWarning makes sure that a point says something.
func (r *rig) wantWarning(p *store.Point, text string) {
	r.t.Helper()
	if !strings.Contains(strings.Join(p.Warnings, "\n"), text) {
		r.t.Errorf("%s warns %q, want %q", p.Path(), p.Warnings, text)
	}
}

// nothingLeft makes sure that the VM has no snapshot of ours, and the journal no entry.
func (r *rig) nothingLeft(vm *vspheretest.VM) {
	r.t.Helper()
	for _, s := range vm.Snapshots() {
		if strings.HasPrefix(s.Name, "holdfast-") {
			r.t.Errorf("snapshot %s is left", s.Name)
		}
	}
	left, err := r.journal.Left(r.t.Context(), func(backup.Leftover) bool { return true })
	if err != nil || len(left) > 0 {
		r.t.Errorf("%d entries are left in the journal, %v", len(left), err)
	}
	for _, e := range left {
		e.Leave()
	}
}
