package vspheretest

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// backup is an image that is kept up to date as a backup program does it: changed areas, read by /folder.
type backup struct {
	c        *client
	vm       *VM
	image    []byte
	changeID string
}

// run takes a snapshot, brings the image up to date, and removes the snapshot. The truth is what the hook copied.
func (b *backup) run(truth *[]byte) (read int64, err error) {
	ref := b.c.snapshot(b.vm, "backup")
	defer b.c.removeSnapshot(ref)
	d := b.c.snapshotDisks(ref)[0]
	since := b.changeID
	if since == "" {
		since = "*"
		b.image = make([]byte, d.size)
	}
	es, _, err := b.c.areas(b.vm, ref, d, since)
	if err != nil {
		return 0, err
	}
	for _, e := range es {
		copy(b.image[e.Off:], b.c.s.readRange(b.c.t, flatOf(d.file), e))
	}
	b.changeID = d.changeID
	if !bytes.Equal(b.image, *truth) {
		return extent.Total(es), fmt.Errorf("the image is not what was frozen")
	}
	return extent.Total(es), nil
}

// files are the names of those in the VM's folder.
func (vm *VM) files(t testing.TB) []string {
	t.Helper()
	list, err := os.ReadDir(vm.File(""))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range list {
		names = append(names, f.Name())
	}
	return names
}

func flatOf(file string) string { return file[:len(file)-len(".vmdk")] + "-flat.vmdk" }

// Guests that write, trim and are backed up at random times: every image is what the test knows to have been written.
func TestRandomIncrementals(t *testing.T) {
	const size = 4<<20 - 7*1024
	for seed := range uint64(3) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		s := New(t, Options{AreasPerPage: 1 + rnd.IntN(4)})
		vm := s.AddVM(VMSpec{Name: "web01", ChangeTracking: true, Disks: []DiskSpec{{Size: size}}})
		b := &backup{c: connect(t, s), vm: vm}
		model := make([]byte, size) // what the guest's disk holds, kept by the test
		write := func() {
			off := rnd.Int64N(size)
			n := min(size-off, 1+rnd.Int64N(200000))
			if rnd.IntN(4) == 0 {
				vm.Zero(0, off, n)
				clear(model[off : off+n])
				return
			}
			p := noise(rnd.Uint64(), int(n))
			vm.WriteAt(0, p, off)
			copy(model[off:], p)
		}
		var truth []byte
		s.SetHooks(Hooks{OnFrozen: func(*VM, string) {
			truth = slices.Clone(model)
			write()
		}})
		for round := range 8 {
			for range rnd.IntN(6) {
				write()
			}
			s.Misbehave(func(f *Faults) { f.EmptyPages = round%2 == 0 })
			read, err := b.run(&truth)
			if err != nil {
				t.Fatalf("seed %d, round %d: %v", seed, round, err)
			}
			if round > 0 && read > 14*(200000+2*unit) {
				t.Errorf("seed %d, round %d: %d bytes read", seed, round, read)
			}
			wantBytes(t, "the guest's view", readAll(t, vm, 0), model)
			if files := vm.files(t); len(files) != 5 {
				t.Fatalf("the files are %v", files)
			}
		}
	}
}

// The comparison above sees a block that change tracking leaves out.
func TestRandomIncrementalsCanFail(t *testing.T) {
	s, vm, c := newVM(t, Options{})
	b := &backup{c: c, vm: vm}
	var truth []byte
	s.SetHooks(Hooks{OnFrozen: func(*VM, string) { truth = readAll(t, vm, 0) }})
	if _, err := b.run(&truth); err != nil {
		t.Fatal(err)
	}
	vm.WriteAt(0, []byte("changed"), 3*unit)
	s.Misbehave(func(f *Faults) { f.HideChange = true })
	if _, err := b.run(&truth); err == nil {
		t.Error("a hidden change was not seen")
	}
}

// Many clients at once: snapshots of several VMs, guests that write, properties that are read, sessions that are lost.
func TestConcurrentClients(t *testing.T) {
	s := New(t, Options{})
	var vms []*VM
	for i := range 3 {
		vms = append(vms, s.AddVM(VMSpec{Name: fmt.Sprint("vm", i), ChangeTracking: true, Disks: []DiskSpec{{Size: 1 << 20}}}))
	}
	stop := make(chan struct{})
	var wg, readers sync.WaitGroup
	watcher := connect(t, s)
	for _, vm := range vms {
		readers.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				case <-time.After(time.Millisecond):
				}
				vm.WriteAt(0, []byte{byte(i)}, int64(i)*999%(1<<20))
			}
		})
		readers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				var m mo.VirtualMachine
				_ = watcher.RetrieveOne(watcher.ctx, vm.Ref(), nil, &m)
			}
		})
		wg.Go(func() {
			c := connect(t, s)
			for range 4 {
				info, err := c.try(c.object(vm).CreateSnapshot(c.ctx, "s", "", false, false))
				if err != nil {
					t.Error(err)
					return
				}
				ref := info.Result.(types.ManagedObjectReference)
				if _, _, err := c.areas(vm, ref, c.snapshotDisks(ref)[0], "*"); err != nil {
					t.Error(err)
				}
				if _, err := c.try(c.tryRemove(ref, true)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	readers.Wait()
	if n := s.Counts(); n.Snapshots != 0 || n.MaxSnapshots[""] < 1 || n.MaxSnapshots[""] > 3 || n.Calls["CreateSnapshot_Task"] != 12 {
		t.Errorf("%+v", n)
	}
}

// The hooks are called where they say, and may call the server themselves.
func TestHooks(t *testing.T) {
	s, vm, c := newVM(t, Options{})
	var mu sync.Mutex
	var seen []string
	note := func(what string) {
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, what)
	}
	s.SetHooks(Hooks{
		OnFrozen: func(_ *VM, name string) {
			var m mo.VirtualMachine
			c.properties(vm.Ref(), []string{"name"}, &m)
			note("frozen " + name + " of " + m.Name)
		},
		OnRead: func(file string, off, n int64) { note(fmt.Sprint("read ", file, " ", off, "+", n)) },
		OnCall: func(method string, _ *VM) { note("call " + method) },
	})
	c.snapshot(vm, "backup")
	s.readRange(t, vm.FilePath("web01-flat.vmdk"), extent.Extent{Off: 512, Len: 1024})
	want := []string{"call CreateSnapshot_Task", "frozen backup of web01", "read [LocalDS_0] web01/web01-flat.vmdk 512+1024"}
	if !slices.Equal(seen, want) {
		t.Errorf("seen %q, want %q", seen, want)
	}
	// A VM whose snapshot takes long can be asked for its properties meanwhile.
	s.SetHooks(Hooks{})
	s.Misbehave(func(f *Faults) { f.SnapshotDelay = 2 * time.Second })
	task, err := c.object(vm).CreateSnapshot(c.ctx, "slow", "", false, false)
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	c.liveDisks(vm)
	if d := time.Since(began); d > time.Second {
		t.Errorf("properties took %v", d)
	}
	c.run(task, nil)
}
