package whole

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/test/reader"
)

// load is a repository on which everything happens at once, and what is known of it.
type load struct {
	*repository
	seed uint64
	end  time.Time

	kills, whole atomic.Int64 // of all processes; runs that came to their end
	compared     atomic.Int64 // bytes that a read gave and that were right
	collected    atomic.Int64 // packs removed
	held         atomic.Int64 // files that stayed open until after their points were collected
	again        atomic.Int64 // collections that asked to be run again

	mu     sync.Mutex // guards following
	tries  map[string][32]byte
	points map[string]*loadPoint // id => what is known of it
}

// loadPoint is a point that was seen.
type loadPoint struct {
	point
	content [32]byte // sha256 of the disk
	fate    fate
	order   int // in which it was seen
}

// fate is what has become of a point.
type fate int

const (
	stays  fate = iota
	goes        // a forget that may choose it is under way
	isGone      // reported as forgotten
)

const (
	loadDisk    = 12*mib + 517 // bytes
	loadWriters = 4
)

// worker is a killer for one of several goroutines.
func (l *load) worker(t *testing.T, n int, most time.Duration) *killer {
	k := &killer{rnd: rand.New(rand.NewPCG(l.seed, uint64(n))), end: l.end, most: most}
	t.Cleanup(func() {
		t.Logf("worker %d: %d kills, %d runs came to their end", n, k.kills, k.whole)
	})
	return k
}

// perhaps kills p at a random moment, or in half of the cases lets it end. It
// reports whether it was killed.
func (l *load) perhaps(t *testing.T, k *killer, p *process) (killed bool) {
	if k.rnd.IntN(2) == 0 {
		killed = k.kill(t, p)
	} else {
		killed = p.code(t) == -1
		k.whole++
	}
	if killed {
		l.kills.Add(1)
	} else {
		l.whole.Add(1)
	}
	return killed
}

// write is one of the writers: it backs up its own disk, over and over.
func (l *load) write(t *testing.T, n int, dir string) {
	vm := fmt.Sprint("w", n)
	file := newRaw(t, filepath.Join(dir, vm+".raw"), loadDisk, piece{mib, 3 * mib}).file
	k := l.worker(t, n, 400*time.Millisecond)
	for try := 0; k.goesOn(t); try++ {
		f, err := os.OpenFile(file, os.O_RDWR, 0)
		if err != nil {
			t.Error(err)
			return
		}
		for range 3 {
			// Some data is met again, by this writer or by another.
			b := randomBytes(k.rnd.Uint64N(40), k.rnd.Int64N(2*mib))
			if _, err := f.WriteAt(b, k.rnd.Int64N((loadDisk-int64(len(b)))>>17)<<17); err != nil {
				t.Error(err)
			}
		}
		f.Close()
		content := sum(t, file)
		tag := fmt.Sprint(vm, "-", try)
		l.mu.Lock()
		l.tries[tag] = content
		l.mu.Unlock()
		p := l.start(t, "backup", "--json", "--tag", tag, file)
		killed := l.perhaps(t, k, p)
		if !killed && p.code(t) != 0 {
			t.Errorf("backup ended with %d:\n%s", p.code(t), p.err.String())
		}
		l.mu.Lock()
		for _, made := range summaryOf(p.out.String()) {
			l.found(made, content)
		}
		l.mu.Unlock()
	}
}

// found adds a point. l.mu is held.
func (l *load) found(p point, content [32]byte) *loadPoint {
	if l.points[p.ID] == nil {
		l.points[p.ID] = &loadPoint{point: p, content: content, order: len(l.points)}
	}
	return l.points[p.ID]
}

// look lists the points and compares that with what is known: all that were known
// to stay before must be there, none that was gone may be. Backups that were killed after their
// commit show here for the first time.
func (l *load) look(t *testing.T) map[string]bool {
	l.mu.Lock()
	must, mustNot := map[string]string{}, map[string]string{}
	for id, p := range l.points {
		switch p.fate {
		case stays:
			must[id] = p.path()
		case isGone:
			mustNot[id] = p.path()
		}
	}
	l.mu.Unlock()
	res := l.run(t, "points", "--json")
	if res.code != 0 {
		t.Errorf("points ended with %d:\n%s", res.code, res.err)
		return nil
	}
	listed := map[string]bool{}
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(res.out) {
		var p point
		if err := json.Unmarshal([]byte(line), &p); err != nil {
			t.Error(err)
			continue
		}
		listed[p.ID] = true
		if p.Damaged != "" {
			t.Errorf("%s: %s", p.path(), p.Damaged)
			continue
		}
		if path := mustNot[p.ID]; path != "" {
			t.Errorf("%s was forgotten and is listed", path)
		}
		if len(p.Tags) != 1 {
			t.Errorf("%s has tags %q", p.path(), p.Tags)
			continue
		}
		content, ok := l.tries[p.Tags[0]]
		if !ok {
			t.Errorf("%s is of a backup that never was: %q", p.path(), p.Tags)
		}
		l.found(p, content)
	}
	for id, path := range must {
		if p := l.points[id]; !listed[id] && p.fate == stays {
			t.Errorf("%s (%s) is not listed", path, id)
		}
	}
	return listed
}

// stay lists the points of a VM that are there, from old to new. l.mu is held.
func (l *load) stay(vm string) (list []*loadPoint) {
	for _, p := range l.points {
		if p.VM == vm && p.fate == stays {
			list = append(list, p)
		}
	}
	slices.SortFunc(list, func(a, b *loadPoint) int {
		// Names of one second: …Z, …Z-2, …Z-10.
		at, bt := strings.SplitN(a.Name, "Z", 2), strings.SplitN(b.Name, "Z", 2)
		if at[0] != bt[0] {
			return strings.Compare(at[0], bt[0])
		}
		return a.order - b.order
	})
	return list
}

// forgetting forgets points by rule and by id.
func (l *load) forgetting(t *testing.T) {
	k := l.worker(t, loadWriters, 250*time.Millisecond)
	for k.goesOn(t) {
		l.look(t)
		vm := fmt.Sprint("w", k.rnd.IntN(loadWriters))
		l.mu.Lock()
		may := l.stay(vm)
		l.mu.Unlock()
		if len(may) == 0 {
			continue // not even the VM is known yet
		}
		args := []string{"forget", "--json", vm, "--keep-last", "3"}
		byID := k.rnd.IntN(2) == 0
		if byID {
			if len(may) < 4 {
				time.Sleep(100 * time.Millisecond)
				continue
			}
			may = may[:1+k.rnd.IntN(len(may)-3)]
			may = may[len(may)-1:]
			args = []string{"forget", "--json", may[0].ID}
		}
		// A rule may also choose points that come while it runs, and so are not in may; those
		// are not reported to anybody as staying before the run is over. Newest come last.
		l.mu.Lock()
		for _, p := range may {
			p.fate = goes
		}
		l.mu.Unlock()
		p := l.start(t, args...)
		killed := l.perhaps(t, k, p)
		if code := p.code(t); !killed && code != 0 {
			t.Errorf("%q ended with %d:\n%s", args, code, p.err.String())
		}
		decided := map[string]bool{} // id => keep
		for line := range strings.Lines(p.out.String()) {
			var d struct {
				Type, ID string
				Keep     any
			}
			if json.Unmarshal([]byte(line), &d) == nil && d.Type == "decision" {
				decided[d.ID] = d.Keep == true
			}
		}
		l.mu.Lock()
		for _, p := range may {
			keep, known := decided[p.ID]
			_, err := os.Lstat(filepath.Join(l.dir, "points", p.ID))
			gone := errors.Is(err, fs.ErrNotExist)
			switch {
			case !killed && known && !keep && !gone:
				t.Errorf("%s was reported as forgotten and has a manifest", p.path())
			case gone && known && keep, gone && !killed && !known:
				t.Errorf("%s was not chosen and is gone", p.path())
			}
			switch {
			case !gone:
				p.fate = stays
			case !killed: // else an owner that lives on may list it until it looks again
				p.fate = isGone
			}
		}
		// Of those that stay some may be so new that nobody was told of them yet.
		kept := 0
		for _, keep := range decided {
			if keep {
				kept++
			}
		}
		if !byID && !killed && len(may) >= 3 && kept < 3 {
			t.Errorf("%d points of %s are left by --keep-last 3", kept, vm)
		}
		l.mu.Unlock()
	}
}

// collecting collects, so that packs are rewritten whenever something in them is dead.
func (l *load) collecting(t *testing.T) {
	k := l.worker(t, loadWriters+1, 500*time.Millisecond)
	for k.goesOn(t) {
		p := l.start(t, "gc", "--json", "--repack-below", "90%")
		killed := l.perhaps(t, k, p)
		if text := p.err.String(); !killed && p.code(t) != 0 {
			if p.code(t) == 1 && strings.Contains(text, "run it again") {
				l.again.Add(1)
				continue
			}
			t.Errorf("gc ended with %d:\n%s", p.code(t), text)
		}
		var rep struct {
			Removed int64 `json:"packs_removed"`
		}
		if json.Unmarshal([]byte(p.out.String()), &rep) == nil {
			l.collected.Add(rep.Removed)
		}
		time.Sleep(time.Duration(k.rnd.Int64N(int64(300 * time.Millisecond))))
	}
}

// life is one life of the mount.
type life struct {
	*mounted
	over atomic.Bool // set before it is killed
}

// readMounted reads through the mount while it is killed and mounted again.
func (l *load) readMounted(t *testing.T, dir string) {
	k := l.worker(t, loadWriters+2, 3*time.Second)
	for lives := uint64(0); k.goesOn(t); lives++ {
		m := &life{mounted: l.mountAt(t, dir)}
		var readers sync.WaitGroup
		for i := range uint64(2) {
			readers.Go(func() { l.readPoints(t, m, rand.New(rand.NewPCG(l.seed, 100*lives+i))) })
		}
		readers.Go(func() { l.hold(t, m, rand.New(rand.NewPCG(l.seed, 100*lives+50))) })
		time.Sleep(time.Second + time.Duration(k.rnd.Int64N(int64(k.most))))
		if !m.running() {
			t.Errorf("the mount ended with %d:\n%s", m.code(t), m.err.String())
		}
		m.over.Store(true)
		_ = m.cmd.Process.Kill()
		m.code(t)
		k.kills++
		l.kills.Add(1)
		readers.Wait()
		// An index that a killed process left is made anew, and that is said.
		for line := range strings.Lines(m.err.String()) {
			if strings.Contains(line, "damage") && !strings.HasPrefix(line, "the index was lost or damaged") {
				t.Errorf("the mount says:\n%s", line)
			}
		}
	}
	l.run(t, "umount", dir)
}

// pick gives any point that is there, nil when there is none.
func (l *load) pick(rnd *rand.Rand) *loadPoint {
	l.mu.Lock()
	defer l.mu.Unlock()
	var list []*loadPoint
	for _, id := range slices.Sorted(maps.Keys(l.points)) {
		if l.points[id].fate == stays {
			list = append(list, l.points[id])
		}
	}
	if len(list) == 0 {
		return nil
	}
	return list[rnd.IntN(len(list))]
}

// oldest gives the point of any VM that is likely to be forgotten next.
func (l *load) oldest(rnd *rand.Rand) *loadPoint {
	l.mu.Lock()
	defer l.mu.Unlock()
	if list := l.stay(fmt.Sprint("w", rnd.IntN(loadWriters))); len(list) > 3 {
		return list[rnd.IntN(len(list)-3)]
	}
	return nil
}

func (l *load) fateOf(p *loadPoint) fate {
	l.mu.Lock()
	defer l.mu.Unlock()
	return p.fate
}

// readPoints reads whole disks and compares them, one open after the other.
func (l *load) readPoints(t *testing.T, m *life, rnd *rand.Rand) {
	for !m.over.Load() && !t.Failed() {
		p := l.pick(rnd)
		if p == nil {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		f := l.open(t, m, p)
		if f == nil {
			continue
		}
		l.compare(t, m, p, f)
		f.Close()
	}
}

// open opens the disk of a point in the mount; nil when the point or the mount is gone.
func (l *load) open(t *testing.T, m *life, p *loadPoint) *os.File {
	f, err := os.OpenFile(filepath.Join(m.dir, p.path(), "disk0.raw"), os.O_RDONLY|syscall.O_DIRECT, 0)
	switch {
	case err == nil:
		return f
	case m.over.Load():
	case l.fateOf(p) != stays && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESTALE)):
	default:
		t.Errorf("open %s, fate %d: %v\nthe mount says: %s", p.path(), l.fateOf(p), err, m.err.String())
	}
	return nil
}

// compare reads an open disk to its end, past the kernel's cache.
func (l *load) compare(t *testing.T, m *life, p *loadPoint, f *os.File) bool {
	h := sha256.New()
	n, err := io.Copy(h, io.NewSectionReader(f, 0, 1<<40))
	switch {
	case m.over.Load() && err != nil:
		return false
	case err != nil:
		t.Errorf("read %s after %d bytes, fate %d: %v\nthe mount says: %s", p.path(), n, l.fateOf(p), err, m.err.String())
		return false
	case n != loadDisk || [32]byte(h.Sum(nil)) != p.content:
		if m.over.Load() && n < loadDisk {
			return false
		}
		t.Errorf("%s reads wrong through the mount: %d bytes", p.path(), n)
		return false
	}
	l.compared.Add(n)
	return true
}

// hold opens files and keeps them open until their points are forgotten and a
// collection has removed packs after that; then they are read.
func (l *load) hold(t *testing.T, m *life, rnd *rand.Rand) {
	type heldFile struct {
		p      *loadPoint
		f      *os.File
		gone   bool
		packs  int64 // collected when it was seen to be gone
		opened time.Time
	}
	var open []*heldFile
	defer func() {
		for _, h := range open {
			h.f.Close()
		}
	}()
	for !m.over.Load() && !t.Failed() {
		if len(open) < 12 {
			if p := l.oldest(rnd); p != nil {
				if f := l.open(t, m, p); f != nil {
					open = append(open, &heldFile{p: p, f: f, opened: time.Now()})
				}
			}
		}
		open = slices.DeleteFunc(open, func(h *heldFile) bool {
			switch packs := l.collected.Load(); {
			case !h.gone && l.fateOf(h.p) == isGone:
				h.gone, h.packs = true, packs
			case h.gone && packs > h.packs:
				if l.compare(t, m, h.p, h.f) {
					l.held.Add(1)
				}
				h.f.Close()
				return true
			case !h.gone && time.Since(h.opened) > time.Second && rnd.IntN(50) == 0:
				h.f.Close()
				return true
			}
			return false
		})
		time.Sleep(20 * time.Millisecond)
	}
}

// TestLoadUnderKill: four writers, forget, gc and a mount that is read, on one
// repository at once, and each process may be killed at any moment. Nothing that was reported is
// lost, nothing that was forgotten comes back, and no read is ever wrong.
func TestLoadUnderKill(t *testing.T) {
	needs(t, "fuse")
	l := &load{repository: newRepository(t), tries: map[string][32]byte{}, points: map[string]*loadPoint{}}
	one := newKiller(t, time.Second) // for the seed and the time
	l.seed, l.end = one.rnd.Uint64(), one.end.Add(10*time.Second)
	dir := newDir(t)
	var all sync.WaitGroup
	for n := range loadWriters {
		all.Go(func() { l.write(t, n, dir) })
	}
	all.Go(func() { l.forgetting(t) })
	all.Go(func() { l.collecting(t) })
	all.Go(func() { l.readMounted(t, mkdir(t, dir+"/mnt")) })
	all.Wait()
	t.Logf("%d kills, %d runs came to their end, %d packs collected, %d bytes compared through the mount, "+
		"%d open files outlived their points, %d collections ran again", l.kills.Load(), l.whole.Load(),
		l.collected.Load(), l.compared.Load(), l.held.Load(), l.again.Load())
	l.settle(t, dir)
}

// settle looks at everything when all is quiet.
func (l *load) settle(t *testing.T, dir string) {
	for _, p := range l.points {
		if p.fate == goes {
			p.fate = isGone
		}
	}
	listed := l.look(t)
	for id := range listed {
		if l.points[id].fate == isGone {
			t.Errorf("%s was forgotten and is listed", l.points[id].path())
		}
	}
	l.must(t, "verify", "--read-data")
	l.readEverywhere(t, dir, listed)

	// What is stored is what is used, but for the tenth that is not worth rewriting.
	for range 2 {
		l.must(t, "gc", "--repack-below", "90%")
	}
	var rep struct {
		Live    int64 `json:"bytes_live"`
		Stored  int64 `json:"bytes_stored"`
		Pending int   `json:"packs_pending"`
		Missing int   `json:"missing"`
	}
	if err := json.Unmarshal([]byte(l.must(t, "gc", "--dry-run", "--json").out), &rep); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d points use %d of %d bytes stored", len(listed), rep.Live, rep.Stored)
	if on, _ := usage(t, l.dir+"/packs"); float64(rep.Live) < 0.85*float64(rep.Stored) || on > rep.Stored+mib || rep.Pending+rep.Missing > 0 {
		t.Errorf("after a collection %+v, the packs have %d bytes", rep, on)
	}
	for _, at := range []string{"/leases/*", "/tmp/*"} {
		if left, _ := filepath.Glob(l.dir + at); len(left) > 0 {
			t.Errorf("left over: %q", left)
		}
	}
	l.must(t, "verify", "--read-data")
	l.readEverywhere(t, dir, listed)
}

// readEverywhere compares every point as restore, a mount and a reader that
// shares no code with the program give it.
func (l *load) readEverywhere(t *testing.T, dir string, listed map[string]bool) {
	oracle, err := reader.Open(os.DirFS(l.dir), reader.Options{Passphrase: l.password})
	if err != nil {
		t.Fatal(err)
	}
	if len(oracle.Points) != len(listed) || len(oracle.Damage) > 0 {
		t.Errorf("the other reader sees %d points of %d, and damage: %v", len(oracle.Points), len(listed), oracle.Damage)
	}
	byID := map[string]*reader.Point{}
	for _, p := range oracle.Points {
		byID[p.ID] = p
	}
	m := l.mountAt(t, dir+"/mnt")
	out := filepath.Join(dir, "out")
	for id := range listed {
		p := l.points[id]
		if sum(t, filepath.Join(m.dir, p.path(), "disk0.raw")) != p.content {
			t.Errorf("the mount shows %s wrong", p.path())
		}
		l.must(t, "restore", id, "--to", out)
		if sum(t, out+"/disk0.raw") != p.content {
			t.Errorf("%s is restored wrong", p.path())
		}
		if err := os.RemoveAll(out); err != nil {
			t.Fatal(err)
		}
		if byID[id] == nil {
			t.Errorf("the other reader has no %s", p.path())
			continue
		}
		d, err := byID[id].Disk("disk0")
		f, cerr := os.Create(out)
		if err != nil || cerr != nil {
			t.Fatal(err, cerr)
		}
		if err := errors.Join(f.Truncate(d.Size), oracle.ReadDisk(d, f), f.Close()); err != nil {
			t.Errorf("%s: %v", p.path(), err)
		} else if sum(t, out) != p.content {
			t.Errorf("the other reader reads %s wrong", p.path())
		}
		if err := os.Remove(out); err != nil {
			t.Fatal(err)
		}
	}
	m.stop(t, terminate)
}
