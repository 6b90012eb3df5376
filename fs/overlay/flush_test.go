package overlay

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"
)

// syncFile is a file that somebody watches being synced.
type syncFile struct {
	file
	before func() error // called by each Sync; an error is that of the Sync
}

func (f syncFile) Sync() error {
	if err := f.before(); err != nil {
		return err
	}
	return f.file.Sync()
}

// TestBroken: after a sync that failed no flush succeeds any more, whatever the system says of the syncs
// that follow, and so does no Resize and not Close.
func TestBroken(t *testing.T) {
	write := func(d *Disk) error {
		if _, err := d.WriteAt([]byte{1}, 3*Block); err != nil {
			return err
		}
		return d.Flush()
	}
	zero := func(d *Disk) error { return errors.Join(d.Zero(3*Block, Block, false), d.Flush()) } // not by the log
	resize := func(to int64) func(*Disk) error { return func(d *Disk) error { return d.Resize(to) } }
	type wrap func(*files, func() error)
	data := func(f *files, fail func() error) { f.data = syncFile{f.data, fail} }
	blocks := func(f *files, fail func() error) { f.blocks = syncFile{f.blocks, fail} }
	log := func(f *files, fail func() error) { f.log = syncFile{f.log, fail} }
	headOf := func(f *files, fail func() error) { f.head = syncFile{f.head, fail} }
	for _, c := range []struct {
		name string
		wrap wrap
		do   func(*Disk) error
	}{
		{"data", data, zero},
		{"map", blocks, zero},
		{"log", log, write},
		{"grow, data", data, resize(100 * Block)},
		{"grow, head", headOf, resize(100 * Block)},
		{"shrink, data", data, resize(2 * Block)},
		{"shrink, head", headOf, resize(2 * Block)},
	} {
		t.Run(c.name, func(t *testing.T) {
			image := someImage(rand.New(rand.NewPCG(1, 1)), 16*Block)
			f := lossyFiles(&power{left: -1})
			var fault error
			c.wrap(&f, func() error { err := fault; fault = nil; return err })
			d, err := create(f, image, head{seq: 1, size: 16 * Block, limit: 16 * Block})
			if err != nil {
				t.Fatal(err)
			}
			for range 2 { // the first flush makes the log
				if err := d.Flush(); err != nil {
					t.Fatal(err)
				}
				if _, err := d.WriteAt([]byte{2}, 5); err != nil {
					t.Fatal(err)
				}
			}
			fault = errBad
			for i, err := range []error{c.do(d), d.Flush(), d.Flush(), d.Resize(20 * Block), d.Resize(Block), d.Close()} {
				if !errors.Is(err, errBad) {
					t.Errorf("call %d: %v", i, err)
				}
			}
			if fault != nil {
				t.Error("no sync failed")
			}
		})
	}
}

// TestFlushTogether: those who flush while a flush goes on share the next one, and none comes back before syncs
// that all began after it called: of data and then of the map, or of the log.
func TestFlushTogether(t *testing.T) {
	t.Run("data", func(t *testing.T) { flushTogether(t, "data", "map") })
	t.Run("log", func(t *testing.T) { flushTogether(t, "log") })
}

func flushTogether(t *testing.T, steps ...string) {
	const many = 20
	image := someImage(rand.New(rand.NewPCG(1, 1)), 2*many*Block)
	f := lossyFiles(&power{left: -1})
	f.logSize = 100 * Block
	var mu sync.Mutex
	var log []string // "call 3", the steps, "back 3" in the order they happened; guarded by mu
	put := func(s string) {
		mu.Lock()
		defer mu.Unlock()
		log = append(log, s)
	}
	begun, goOn := make(chan bool), make(chan bool)
	slow := false
	watch := func(name string, to file) file {
		return syncFile{to, func() error {
			put(name)
			if slow && name == steps[0] {
				begun <- true
				<-goOn
			}
			return nil
		}}
	}
	f.data, f.blocks, f.log = watch("data", f.data), watch("map", f.blocks), watch("log", f.log)
	d, err := create(f, image, head{seq: 1, size: 2 * many * Block, limit: 2 * many * Block})
	if err != nil {
		t.Fatal(err)
	}
	d.flush.log.off = steps[0] != "log"
	if _, err := d.WriteAt([]byte{1}, Block); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(); err != nil { // makes the log
		t.Fatal(err)
	}
	slow, log = true, nil
	var wg sync.WaitGroup
	flush := func(i int) {
		wg.Go(func() {
			if _, err := d.WriteAt([]byte{1}, int64(i)*2*Block); err != nil {
				t.Error(err)
			}
			put(fmt.Sprint("call ", i))
			if err := d.Flush(); err != nil {
				t.Error(err)
			}
			put(fmt.Sprint("back ", i))
		})
	}
	flush(0)
	select {
	case <-begun:
	case <-time.After(10 * time.Second):
		t.Fatal("a flush did not sync")
	}
	for i := range many - 1 {
		flush(i + 1)
	}
	time.Sleep(100 * time.Millisecond) // all of them wait now, or nearly
	close(goOn)
	go func() {
		for range begun {
		}
	}()
	wg.Wait()
	close(begun)

	if syncs := syncsFor(t, log, many, steps); syncs > many/4 {
		t.Errorf("%d flushes took %d syncs", many, syncs)
	}
}

// syncsFor counts the first syncs of the log of many flushes and says which came back too early.
func syncsFor(t *testing.T, log []string, many int, steps []string) (syncs int) {
	t.Helper()
	state := map[string]string{} // who => the last that happened to him
	for _, s := range log {
		var what, who string
		if fmt.Sscan(s, &what, &who); what == steps[0] {
			syncs++
		}
		switch what {
		case "call":
			state[who] = what
		case "back":
			if state[who] != steps[len(steps)-1] {
				t.Errorf("flush %s came back after %q: %v", who, state[who], log)
			}
		default:
			i := slices.Index(steps, what)
			if i < 0 {
				t.Errorf("a sync of %s", what)
				continue
			}
			before := append([]string{"call"}, steps...)[i]
			for who, last := range state {
				if last == before {
					state[who] = what
				}
			}
		}
	}
	if len(state) != many {
		t.Errorf("%d flushes, not %d", len(state), many)
	}
	return syncs
}

// gatedFile lets no write pass before its gate opens.
type gatedFile struct {
	file
	came chan struct{}
	gate chan struct{}
}

func (f *gatedFile) WriteAt(p []byte, off int64) (int, error) {
	f.came <- struct{}{}
	<-f.gate
	return f.file.WriteAt(p, off)
}

// TestBitIsWrittenBeforeItIsSeen: a write to a block that another one has just brought into data is not answered before
// that is written down: else it would be lost with the process.
func TestBitIsWrittenBeforeItIsSeen(t *testing.T) {
	const size = 4 * Block
	f := lossyFiles(&power{left: -1})
	d, err := create(f, someImage(rand.New(rand.NewPCG(1, 1)), size), head{seq: 1, size: size, limit: size})
	if err != nil {
		t.Fatal(err)
	}
	live := &gatedFile{d.blocks.live, make(chan struct{}, 10), make(chan struct{})}
	d.blocks.live = live
	answered := make(chan error, 2)
	write := func(off int64) {
		_, err := d.WriteAt([]byte("x"), off)
		answered <- err
	}
	go write(0)
	<-live.came
	go write(1000)
	select {
	case <-answered:
		t.Fatal("a write was answered before it was written down that its block is in data")
	case <-time.After(50 * time.Millisecond):
	}
	close(live.gate)
	for range 2 {
		if err := <-answered; err != nil {
			t.Error(err)
		}
	}
}
