package vsphere_test

import (
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/vsphere/vspheretest"
)

// TestBackup makes a full and five incremental points of a VM with three disks on two controllers, whose guest writes between the snapshots and while
// they are read. Every point is what was frozen; what is read is in proportion to what changed.
func TestBackup(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	vm := r.add(threeDisks("web"))
	src := r.source()
	var points []*store.Point
	var truths [][][]byte
	for round := range 6 {
		changed := r.write(vm, 3)
		// The guest writes on while the disks are read.
		stop, done := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(done)
			for {
				select {
				case <-stop:
					return
				case <-time.After(5 * time.Millisecond):
					if round%2 == 1 && len(vm.Snapshots()) > 0 {
						r.write(vm, 1)
					}
				}
			}
		}()
		before := vspheretest.Sum(r.server.Counts().FolderBytes)
		p, err := r.backup(src, "web", backup.Options{})
		close(stop)
		<-done
		if err != nil {
			t.Fatal(err)
		}
		read := vspheretest.Sum(r.server.Counts().FolderBytes) - before
		points, truths = append(points, p), append(truths, r.truth(vm))
		t.Logf("round %d: %d bytes written before, %d read, %d over the network", round, changed, p.Stats.Read, read)
		r.wantRead(p, map[bool]string{true: "full: first backup of this disk", false: "changes"}[round == 0])
		if len(p.Warnings) > 0 {
			t.Errorf("round %d: warnings %q", round, p.Warnings)
		}
		if p.Consistency != "application" || p.Disks[0].Via != "folder" {
			t.Errorf("round %d is %s-consistent, read through %q", round, p.Consistency, p.Disks[0].Via)
		}
		// Each write touches its bytes rounded to chunks on both sides; configuration and descriptors are small.
		if most := p.Stats.Read + 256<<10; read > most {
			t.Errorf("round %d: %d bytes over the network, want at most %d", round, read, most)
		}
		if most := changed + 3*3*2*64<<10; round%2 == 1 && round > 1 && p.Stats.Read > most {
			t.Errorf("round %d: %d bytes read after %d had changed, want at most %d", round, p.Stats.Read, changed, most)
		}
		r.nothingLeft(vm)
	}
	for i, p := range points {
		r.wantDisks(p, truths[i])
	}
	r.mustBackup(src, "web")
	if p := r.mustBackup(src, "web"); p.Stats.Read != 0 {
		t.Errorf("of an unchanged VM %d bytes were read", p.Stats.Read)
	}
}
