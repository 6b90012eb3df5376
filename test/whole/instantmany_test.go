package whole

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/vsphere/vspheretest"
)

// TestInstantMany boots 20 VMs at once, from two points, each by a command of its own, and ends them at once: each has its own disk, and nothing is left.
func TestInstantMany(t *testing.T) {
	const boots = 20
	l := newInstantLab(t)
	vms := []*vspheretest.VM{l.add("web", 2<<20), l.add("db", 1<<20)}
	names := []string{"web", "db"}
	l.must(t, l.platform("backup", "*")...)
	at := func(args func(i int) []string) {
		t.Helper()
		began := time.Now()
		var list []*process
		for i := range boots {
			list = append(list, l.start(t, args(i)...))
		}
		for _, p := range list {
			if code := p.code(t); code != 0 {
				t.Errorf("%q: exit %d\n%s", p.cmd.Args, code, p.err.String())
			}
		}
		t.Logf("%d x %s: %v", boots, args(0)[1], time.Since(began))
		if t.Failed() {
			t.FailNow()
		}
	}
	name := func(i int) string { return fmt.Sprintf("%s-%d", names[i%2], i) }
	at(func(i int) []string {
		return []string{"boot", names[i%2] + "/latest", "--on", "lab", "--allow", "127.0.0.1", "--name", name(i)}
	})
	var work sync.WaitGroup
	for i := range boots {
		vm := l.find(t, name(i))
		vm.WriteAt(0, []byte(name(i)), 4096)
		want := bytes.Clone(l.frozen[vms[i%2]])
		copy(want[4096:], name(i))
		work.Go(func() {
			got := make([]byte, len(want))
			if _, err := vm.ReadAt(0, got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s reads something else, %v", name(i), err)
			}
		})
	}
	work.Wait()
	at(func(i int) []string { return []string{"boot", "stop", name(i), "--patience", "0s"} })
	l.wantNothing(t, 2)
	for i, vm := range vms {
		l.wantFrozen(t, names[i]+"/latest", vm)
	}
}

// TestInstantLarge boots a VM of 1 TiB, and says how long that took.
func TestInstantLarge(t *testing.T) {
	const size = 1 << 40
	l := newInstantLab(t)
	big := l.server.AddVM(vspheretest.VMSpec{Name: "big", ChangeTracking: true, Disks: []vspheretest.DiskSpec{{Size: size}}})
	rnd := rand.New(rand.NewPCG(5, 5))
	p := make([]byte, 64<<10)
	var at []int64
	for range 200 {
		off := rnd.Int64N(size-int64(len(p))) &^ 4095
		for i := range p {
			p[i] = byte(off>>12) + byte(i)
		}
		big.WriteAt(0, p, off)
		at = append(at, off)
	}
	l.must(t, l.platform("backup", "big")...)
	for range 3 {
		t.Logf("from boot to power-on: %v", l.must(t, "boot", "big/latest", "--on", "lab", "--allow", "127.0.0.1").took)
		vm := l.find(t, "big-instant")
		vm.WriteAt(0, []byte("end"), size-3)
		got := make([]byte, len(p))
		for _, off := range at[100:] {
			if _, err := vm.ReadAt(0, got, off); err != nil || got[5] != byte(off>>12)+5 {
				t.Fatalf("at %d it reads %x, %v", off, got[:8], err)
			}
		}
		if _, err := vm.ReadAt(0, got[:4], size-4); err != nil || string(got[:4]) != "\x00end" {
			t.Errorf("at its end it reads %q, %v", got[:4], err)
		}
		l.must(t, "boot", "stop", "big-instant", "--patience", "0s")
	}
	l.wantNothing(t, 1)
}

// TestInstantMove moves a VM away while its guest writes: what it wrote, before, meanwhile and afterwards, is in the disk on production storage.
func TestInstantMove(t *testing.T) {
	l := newInstantLab(t)
	web := l.add("web", 16<<20)
	l.must(t, l.platform("backup", "web")...)
	want := bytes.Clone(l.frozen[web])
	l.must(t, "boot", "web/latest", "--on", "lab", "--allow", "127.0.0.1")
	vm := l.find(t, "web-instant")
	over, wrote := make(chan struct{}), make(chan int)
	go func() {
		rnd, n := rand.New(rand.NewPCG(9, 9)), 0
		for ; ; n++ {
			select {
			case <-over:
				wrote <- n
				return
			default:
			}
			off := rnd.IntN(len(want) - 9000)
			p := want[off : off+1+rnd.IntN(9000)]
			for i := range p {
				p[i] = byte(rnd.Uint32())
			}
			vm.WriteAt(0, p, int64(off))
		}
	}()
	res := l.must(t, "boot", "migrate", "web-instant", "--to", "LocalDS_1", "--json")
	close(over)
	n := <-wrote
	t.Logf("%d writes", n)
	if n < 50 {
		t.Errorf("the guest wrote %d times only", n)
	}
	var b struct{ To string }
	if err := json.Unmarshal([]byte(res.out), &b); err != nil || b.To != "LocalDS_1" {
		t.Errorf("%s: %v", res.out, err)
	}
	if got, err := os.ReadFile(vm.File("disk0-flat.vmdk")); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the disk of the VM that was moved is not what its guest wrote, %v", err)
	}
	if vm.Datastore() != "LocalDS_1" || !vm.PoweredOn() {
		t.Errorf("the VM is on %s, runs: %v", vm.Datastore(), vm.PoweredOn())
	}
	l.wantNothing(t, 2)
	l.wantFrozen(t, "web/latest", web)
}
