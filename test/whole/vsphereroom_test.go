package whole

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vmware/govmomi/vim25/types"

	"github.com/holdfast-backup/holdfast/vsphere/vspheretest"
)

// wantNothingLeft makes sure that no VM has a snapshot, and the journal no entry.
func (l *lab) wantNothingLeft(t *testing.T) {
	t.Helper()
	for vm := range l.guests {
		l.wantNoSnapshot(t, vm)
	}
	if left, err := os.ReadDir(filepath.Join(l.state, "journal")); err != nil || len(left) > 0 {
		t.Errorf("the journal has %v, %v", left, err)
	}
}

// overwrite is a guest that writes n random bytes from off on.
func (l *lab) overwrite(vm *vspheretest.VM, seed byte, off, n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.guests[vm][off:][:n]
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(p)
	vm.WriteAt(0, p, int64(off))
}

// read is how many bytes of disks and other files the server has sent.
func (l *lab) read() int64 { return vspheretest.Sum(l.server.Counts().FolderBytes) }

// onceRead does something before a read, when so many bytes more have been sent.
func (l *lab) onceRead(n int64, do func()) {
	var once sync.Once
	n += l.read()
	l.server.SetHooks(vspheretest.Hooks{OnFrozen: l.freeze, OnRead: func(string, int64, int64) {
		if l.read() >= n {
			once.Do(do)
		}
	}})
}

// TestVSphereNoRoom: the medium of the repository is full while a disk is read. The program says which disk and what is full, there is no point, and nothing is
// left on the VM. When there is room the next backup reads what changed since the last point, and no more.
func TestVSphereNoRoom(t *testing.T) {
	needs(t, "root")
	const size, first, changed = 160 * mib, 24 * mib, 112 * mib
	for _, medium := range media {
		for name, room := range map[string]int64{"by the backup": 170 * mib, "by something else": 300 * mib} {
			t.Run(medium.name+" filled "+name, func(t *testing.T) {
				at, grow := medium.make(t, room)
				r := &repository{dir: at + "/repo", password: "correct horse"}
				r.must(t, "init", r.dir)
				l := newLabOf(t, r, "")
				vm := l.add("web", size)
				l.overwrite(vm, 1, 0, first)
				l.must(t, l.platform("backup", "web")...)
				was := bytes.Clone(l.frozen[vm])
				l.overwrite(vm, 2, first, changed)
				if name == "by something else" {
					l.onceRead(40*mib, func() {
						time.Sleep(2 * time.Second) // Badger tidies up at its beginning, see README, Limits
						_ = exec.Command("sh", "-c", "cat /dev/zero >"+at+"/rest").Run()
					})
				}
				before := l.read()
				res := l.wants(t, 1, "web disk0: ", l.platform("backup", "web")...)
				if !strings.Contains(res.err, "no space left in the repository") {
					t.Errorf("it does not say what is full:\n%s", res.err)
				}
				if n := l.read() - before; n < 32*mib {
					t.Errorf("it failed after %d bytes:\n%s", n, res.err)
				}
				t.Log(res.err)
				l.wantNothingLeft(t)
				if p := l.points(t); len(p) != 1 {
					t.Errorf("there are %d points", len(p))
				}
				l.wantDisk(t, "web/latest", was)
				if out := l.must(t, l.platform("doctor")...).out; !strings.Contains(out, "no earlier run of this host left one") {
					t.Errorf("doctor says:\n%s", out)
				}
				_ = os.Remove(at + "/rest")
				grow(t)
				p, res := l.backup(t, "web", "--config", l.config, "--source", "lab")
				if p.Read < changed || p.Read > changed+mib {
					t.Errorf("%d bytes were read, of which %d had changed:\n%s", p.Read, changed, res.err)
				}
				l.wantFrozen(t, "web/latest", vm)
				l.wantNothingLeft(t)
				l.must(t, "verify", "--read-data")
			})
		}
	}
}

// TestVSphereNoRoomForJournal: where the journal cannot be written no snapshot is made.
func TestVSphereNoRoomForJournal(t *testing.T) {
	needs(t, "root")
	l := newLab(t, "")
	vm := l.add("web", 4*mib)
	full, _ := kernelMount(t, "-t", "tmpfs", "-o", "size=64k", "none")
	l.state = filepath.Join(full, "state")
	l.as = []string{"env", "HOLDFAST_STATE=" + l.state}
	l.must(t, l.platform("backup", "web")...)
	fill(t, full, 0)
	l.wants(t, 1, fmt.Sprintf("journal: write %s", l.state), l.platform("backup", "web")...)
	if n := l.server.Counts().Calls["CreateSnapshot_Task"]; n != 1 {
		t.Errorf("%d snapshots were made", n)
	}
	l.wantNothingLeft(t)
	if err := os.Remove(filepath.Join(full, "rest")); err != nil {
		t.Fatal(err)
	}
	l.must(t, l.platform("backup", "web")...)
	l.wantFrozen(t, "web/latest", vm)
	l.wantNothingLeft(t)
}

// TestVSphereFailsTwice: a backup that fails, and whose snapshot cannot be removed either, says both; the next one removes the snapshot.
func TestVSphereFailsTwice(t *testing.T) {
	needs(t, "root")
	at, grow := media[0].make(t, 20*mib) // too small for any backup
	r := &repository{dir: at + "/repo", password: "correct horse"}
	r.must(t, "init", r.dir)
	l := newLabOf(t, r, "")
	vm := l.add("web", 4*mib)
	l.server.Misbehave(func(f *vspheretest.Faults) { f.RemoveFails, f.RemoveFault = 1000, &types.NoPermission{} })
	res := l.wants(t, 1, "web disk0: store: no space left in the repository", l.platform("backup", "web")...)
	if !strings.Contains(res.err, "warning: ") || !strings.Contains(res.err, "remove snapshot holdfast-") {
		t.Errorf("of the snapshot that stays it says:\n%s", res.err)
	}
	if out := l.must(t, l.platform("doctor")...).out; !strings.Contains(out, "an earlier run left snapshot holdfast-") {
		t.Errorf("doctor says:\n%s", out)
	}
	l.server.Misbehave(func(f *vspheretest.Faults) { *f = vspheretest.Faults{} })
	grow(t)
	l.must(t, l.platform("backup", "web")...)
	l.wantFrozen(t, "web/latest", vm)
	l.wantNothingLeft(t)
}
