package vsphere_test

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmware/govmomi/vim25/types"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/vsphere"
	"github.com/holdfast-backup/holdfast/vsphere/vspheretest"
)

func (r *rig) inPlaceOf(p *store.Point) vsphere.InPlace {
	r.t.Helper()
	what := vsphere.InPlace{VM: p.VM.Name, UUID: p.VM.UUID}
	for i := range p.Disks {
		d := &p.Disks[i]
		img, err := r.repo.OpenDisk(p, d.Name)
		if err != nil {
			r.t.Fatal(err)
		}
		what.Disks = append(what.Disks, vsphere.InPlaceDisk{Name: d.Name, Key: d.Key, ChangeID: d.ChangeID, Image: img})
	}
	return what
}

// TestRestoreInPlace gives three disks back what they held, of which two were changed: only what differs is written, and only what changed is compared
// where changes are tracked.
func TestRestoreInPlace(t *testing.T) {
	for _, tracked := range []bool{true, false} {
		t.Run(fmt.Sprint("tracked ", tracked), func(t *testing.T) {
			r := newRig(t, vspheretest.Options{})
			spec := threeDisks("web")
			spec.ChangeTracking = tracked
			vm := r.add(spec)
			r.cfg.VDDK.LibDir = t.TempDir()
			dir := filepath.Dir(vm.File("x"))
			r.cfg.VDDK.Nbdkit, _ = vspheretest.FakeVDDK(t, filepath.Dir(dir))
			src := r.source()
			p := r.mustBackup(src, "web")
			truth := r.truth(vm)
			vm.WriteAt(0, []byte(strings.Repeat("changed ", 20_000)), 3*mib+100)
			vm.WriteAt(1, []byte("changed"), 24*mib+1000)
			r.mustBackup(src, "web") // the change id of the newest point is later than what is undone
			what := r.inPlaceOf(p)
			if _, err := src.RestoreInPlace(t.Context(), what); !errors.Is(err, vsphere.ErrRunning) {
				t.Errorf("the VM runs: %v", err)
			}
			vm.PowerOff()
			what.UUID = "other"
			if _, err := src.RestoreInPlace(t.Context(), what); err == nil || !strings.Contains(err.Error(), "not the VM that the point is of") {
				t.Errorf("another VM: %v", err)
			}
			done, err := src.RestoreInPlace(t.Context(), r.inPlaceOf(p))
			if err != nil {
				t.Fatal(err)
			}
			r.wantFlat(dir, truth)
			if vm.ChangeTracking() != tracked || len(done.Warnings) > 0 {
				t.Errorf("tracking is on: %v; %q", vm.ChangeTracking(), done.Warnings)
			}
			// 160,000 bytes from 3 MiB + 100 on touch three pieces of 64 KiB; the second disk ends within its piece.
			for i, want := range []int64{3 * 64 << 10, 1024, 0} {
				w := done.Disks[i]
				if w.Written != want {
					t.Errorf("%+v, want %d bytes written", w, want)
				}
				if most := int64(1 * mib); tracked && w.Compared > most || !tracked && w.Compared < 8*mib {
					t.Errorf("%+v: compared too much, or too little", w)
				}
			}
			// What was written behind the back of tracking is seen by the next backup.
			after := r.mustBackup(src, "web")
			r.wantDisks(after, truth)
		})
	}
}

// TestRestoreInPlaceOldTracking: a host that would go on with tracking that has not seen what was written is not trusted with it.
func TestRestoreInPlaceOldTracking(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	vm := r.add(oneDisk("web"))
	r.cfg.VDDK.LibDir = t.TempDir()
	r.cfg.VDDK.Nbdkit, _ = vspheretest.FakeVDDK(t, filepath.Dir(filepath.Dir(vm.File("x"))))
	src := r.source()
	p := r.mustBackup(src, "web")
	truth := r.truth(vm)
	vm.WriteAt(0, []byte("changed"), 1000)
	r.mustBackup(src, "web")
	vm.PowerOff()
	r.server.Misbehave(func(f *vspheretest.Faults) { f.KeepTracking = true })
	done, err := src.RestoreInPlace(t.Context(), r.inPlaceOf(p))
	if err != nil || len(done.Warnings) != 1 || !strings.Contains(done.Warnings[0], "old tracking") || vm.ChangeTracking() {
		t.Errorf("done %+v, %v; tracking is on: %v", done, err, vm.ChangeTracking())
	}
	r.wantDisks(r.mustBackup(src, "web"), truth)
}

// TestRestoreInPlaceTrackingFails: a host that does not say how the switching of tracking went is asked to switch it off.
func TestRestoreInPlaceTrackingFails(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	vm := r.add(oneDisk("web"))
	r.cfg.VDDK.LibDir = t.TempDir()
	r.cfg.VDDK.Nbdkit, _ = vspheretest.FakeVDDK(t, filepath.Dir(filepath.Dir(vm.File("x"))))
	src := r.source()
	p := r.mustBackup(src, "web")
	truth := r.truth(vm)
	vm.WriteAt(0, []byte("changed"), 1000)
	r.mustBackup(src, "web")
	vm.PowerOff()
	// The snapshot that would tell the ids after the restore cannot be made.
	r.server.Misbehave(func(f *vspheretest.Faults) {
		f.KeepTracking = true
		f.Tasks = map[string][]types.BaseMethodFault{"CreateSnapshot_Task": {nil, &types.GenericVmConfigFault{}}}
	})
	done, err := src.RestoreInPlace(t.Context(), r.inPlaceOf(p))
	if err != nil || len(done.Warnings) != 1 || !strings.Contains(done.Warnings[0], "switched off now") || vm.ChangeTracking() {
		t.Errorf("done %+v, %v; tracking is on: %v", done, err, vm.ChangeTracking())
	}
	r.wantDisks(r.mustBackup(src, "web"), truth)
	r.nothingLeft(vm)
}

// TestRestoreInPlaceRefused: what is not the VM of the point any more is left alone.
func TestRestoreInPlaceRefused(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	vm := r.add(oneDisk("web"))
	src := r.source()
	p := r.mustBackup(src, "web")
	vm.PowerOff()
	what := r.inPlaceOf(p)
	if _, err := src.RestoreInPlace(t.Context(), what); !errors.Is(err, vsphere.ErrNoWrite) {
		t.Errorf("without VDDK: %v", err)
	}
	r.cfg.VDDK.LibDir = t.TempDir()
	r.cfg.VDDK.Nbdkit, _ = vspheretest.FakeVDDK(t, filepath.Dir(filepath.Dir(vm.File("x"))))
	src = r.source()
	vm.AddUserSnapshot("mine")
	if _, err := src.RestoreInPlace(t.Context(), what); err == nil || !strings.Contains(err.Error(), "snapshots") {
		t.Errorf("with a snapshot: %v", err)
	}
}

// TestRestoreInPlaceOtherDisk: a disk that was replaced is left alone, and so are the others.
func TestRestoreInPlaceOtherDisk(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	vm := r.add(threeDisks("web"))
	r.cfg.VDDK.LibDir = t.TempDir()
	r.cfg.VDDK.Nbdkit, _ = vspheretest.FakeVDDK(t, filepath.Dir(filepath.Dir(vm.File("x"))))
	src := r.source()
	p := r.mustBackup(src, "web")
	vm.WriteAt(0, []byte("changed"), 0)
	vm.PowerOff()
	vm.ReplaceDisk(2, strings.NewReader("another disk"))
	done, err := src.RestoreInPlace(t.Context(), r.inPlaceOf(p))
	if err == nil || !strings.Contains(err.Error(), "disk2") || len(done.Disks) > 0 {
		t.Errorf("done %+v, %v", done, err)
	}
}
