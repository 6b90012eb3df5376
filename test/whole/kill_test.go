package whole

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// killer ends processes by SIGKILL at random moments of their lives.
type killer struct {
	rnd   *rand.Rand
	end   time.Time
	most  time.Duration // how long to let them live; follows how long they take
	kills int
	whole int // runs that came to their end before they were killed
}

// newKiller starts the clock of one test.
func newKiller(t *testing.T, most time.Duration) *killer {
	t.Helper()
	each, err := time.ParseDuration(cmp.Or(os.Getenv("HOLDFAST_KILL_TIME"), "30s"))
	if err != nil {
		t.Fatal(err)
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	k := &killer{rnd: rand.New(rand.NewPCG(seed, 0)), end: time.Now().Add(each), most: most}
	t.Cleanup(func() { t.Logf("%d kills, %d runs came to their end", k.kills, k.whole) })
	return k
}

func (k *killer) goesOn(t *testing.T) bool { return !t.Failed() && time.Now().Before(k.end) }

// kill lets p live for a random time and reports whether it was killed.
func (k *killer) kill(t *testing.T, p *process) bool {
	t.Helper()
	select {
	case <-p.ended:
	case <-time.After(time.Duration(k.rnd.Int64N(int64(k.most)))):
		_ = p.cmd.Process.Kill() // it may have ended this moment
	}
	if p.code(t) == -1 {
		k.kills++
		k.most += k.most / 30
		return true
	}
	k.whole++
	k.most -= k.most / 10
	return false
}

// sum is the content of a file.
func sum(t *testing.T, file string) [32]byte {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return [32]byte(h.Sum(nil))
}

// history is a repository in which backups of a changing disk are killed.
type history struct {
	*repository
	disk   string
	tries  map[string][32]byte // tag of a backup => content of the disk
	points map[string][32]byte // id => content of the disk
	order  []string            // of points, as they were found
}

func newHistory(t *testing.T) *history {
	t.Helper()
	h := &history{repository: newRepository(t), disk: newDir(t) + "/vm.raw", tries: map[string][32]byte{}, points: map[string][32]byte{}}
	newRaw(t, h.disk, 24*mib+99, piece{3 * mib, 4 * mib})
	return h
}

// change writes some random data onto the disk.
func (h *history) change(t *testing.T, rnd *rand.Rand) {
	t.Helper()
	f, err := os.OpenFile(h.disk, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for range 3 {
		b := randomBytes(rnd.Uint64(), rnd.Int64N(3*mib))
		if _, err := f.WriteAt(b, rnd.Int64N(24*mib-int64(len(b)))); err != nil {
			t.Fatal(err)
		}
	}
}

// try starts a backup of the disk as it is now.
func (h *history) try(t *testing.T) *process {
	t.Helper()
	tag := fmt.Sprint("try", len(h.tries))
	h.tries[tag] = sum(t, h.disk)
	return h.start(t, "backup", "--json", "--tag", tag, h.disk)
}

// look is the next command after a kill: it lists the points. All that were there
// must be there. One that was killed between its commit and its report may
// have come; while another process owns the index it may come later.
func (h *history) look(t *testing.T, finished []point) {
	t.Helper()
	listed := h.repository.points(t)
	for _, p := range listed {
		if _, ok := h.points[p.ID]; !ok {
			if len(p.Tags) != 1 {
				t.Fatalf("%s has tags %q", p.path(), p.Tags)
			}
			content, ok := h.tries[p.Tags[0]]
			if !ok {
				t.Errorf("%s is a second point of %s", p.path(), p.Tags[0])
			}
			delete(h.tries, p.Tags[0])
			h.tries[p.Tags[0]+" made"] = content // the numbers go on
			h.points[p.ID] = content
			h.order = append(h.order, p.ID)
		}
		if p.Damaged != "" {
			t.Errorf("%s: %s", p.path(), p.Damaged)
		}
	}
	if len(listed) != len(h.points) {
		t.Errorf("%d points are listed, of %d", len(listed), len(h.points))
	}
	for _, p := range finished {
		if _, ok := h.points[p.ID]; !ok {
			t.Errorf("%s was reported and is not listed", p.path())
		}
	}
}

// check restores points and compares them.
func (h *history) check(t *testing.T, ids ...string) {
	t.Helper()
	for _, id := range ids {
		out := filepath.Join(filepath.Dir(h.disk), "out")
		h.must(t, "restore", id, "--to", out)
		if sum(t, out+"/disk0.raw") != h.points[id] {
			t.Errorf("point %s is not what was backed up", id)
		}
		if err := os.RemoveAll(out); err != nil {
			t.Fatal(err)
		}
	}
}

// checkAll restores every point, verifies every byte and wants nothing left over.
func (h *history) checkAll(t *testing.T) {
	t.Helper()
	h.check(t, h.order...)
	h.must(t, "verify", "--read-data")
	if left, _ := filepath.Glob(h.dir + "/tmp/*"); len(left) > 0 {
		t.Errorf("left over: %q", left)
	}
	t.Logf("%d points read back", len(h.order))
}

// checkSome restores the newest point and any other.
func (h *history) checkSome(t *testing.T, rnd *rand.Rand) {
	t.Helper()
	if n := len(h.order); n > 0 {
		h.check(t, h.order[n-1], h.order[rnd.IntN(n)])
	}
}

// TestKillBackup kills backups that own the repository.
func TestKillBackup(t *testing.T) {
	needs(t)
	t.Parallel()
	h := newHistory(t)
	for k := newKiller(t, 300*time.Millisecond); k.goesOn(t); {
		h.change(t, k.rnd)
		p := h.try(t)
		killed := k.kill(t, p)
		if code := p.code(t); !killed && code != 0 {
			t.Errorf("backup ended with %d:\n%s", code, p.err.String())
		}
		h.look(t, summaryOf(p.out.String()))
		if k.kills%4 == 0 {
			h.checkSome(t, k.rnd)
		}
	}
	h.checkAll(t)
}

// TestKillBesideMount kills backups that are clients of a mount, and mounts that
// backups are clients of: those go on, and their points read back.
func TestKillBesideMount(t *testing.T) {
	needs(t, "fuse")
	t.Parallel()
	h := newHistory(t)
	m := h.mount(t)
	survived := 0
	for k := newKiller(t, 300*time.Millisecond); k.goesOn(t); {
		h.change(t, k.rnd)
		p := h.try(t)
		if k.rnd.IntN(2) == 0 {
			k.kill(t, p)
		} else {
			time.Sleep(time.Duration(k.rnd.Int64N(int64(k.most))))
			if p.running() {
				survived++
			}
			_ = m.cmd.Process.Kill()
			m.code(t)
			k.kills++
			if code := p.code(t); code != 0 {
				t.Errorf("the mount was killed and the backup ended with %d:\n%s", code, p.err.String())
			}
			if k.rnd.IntN(2) == 0 {
				h.must(t, "umount", m.dir)
			}
			m = h.mountAt(t, m.dir)
		}
		h.look(t, summaryOf(p.out.String()))
		if len(h.order) == 0 {
			continue
		}
		last := h.order[len(h.order)-1]
		if k.kills%4 == 0 {
			h.checkSome(t, k.rnd)
		}
		var shown string
		for _, p := range h.repository.points(t) {
			if p.ID == last {
				shown = p.path()
			}
		}
		if sum(t, filepath.Join(m.dir, shown, "disk0.raw")) != h.points[last] {
			t.Errorf("the mount shows %s wrong", shown)
		}
	}
	m.stop(t, terminate)
	h.checkAll(t)
	t.Logf("%d backups lost their owner under way", survived)
}

// TestKillInit kills init: the next one makes the repository, or it is there.
func TestKillInit(t *testing.T) {
	needs(t)
	t.Parallel()
	dir := newDir(t)
	disk := newText(t, dir+"/disk.raw", 1, 100_000).file
	n := 0
	for k := newKiller(t, 70*time.Millisecond); k.goesOn(t); n++ {
		r := &repository{dir: fmt.Sprint(dir, "/", n), password: "correct horse"}
		// Where init's own directory is there already or not.
		if n%2 == 0 {
			mkdir(t, r.dir)
		}
		p := r.start(t, "init", r.dir)
		killed := k.kill(t, p)
		res := r.run(t, "init", r.dir)
		switch {
		case res.code == 1 && strings.Contains(res.err, "a repository already exists"):
		case res.code != 0 || !killed:
			t.Errorf("init after a kill: exit %d\n%s", res.code, res.err)
		}
		if k.kills%3 == 0 {
			r.intact(t, r.keep(t, "vm", disk))
			r.must(t, "verify", "--read-data")
		} else {
			r.intact(t)
		}
		for _, name := range []string{"/config", "/config.copy"} {
			if _, err := os.Stat(r.dir + name); err != nil && k.kills%3 == 0 {
				t.Error(err)
			}
		}
		if err := os.RemoveAll(r.dir); err != nil {
			t.Fatal(err)
		}
	}
}

// TestKillRestore kills restores: there is a whole file or none, and the next one
// needs no clearing up. A killed restore --onto is finished by the next one.
func TestKillRestore(t *testing.T) {
	needs(t)
	t.Parallel()
	h := newHistory(t)
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 3 {
		h.change(t, rnd)
		p := h.try(t)
		if p.code(t) != 0 {
			t.Fatal(p.err.String())
		}
		h.look(t, summaryOf(p.out.String()))
	}
	out := newDir(t)
	onto := newRaw(t, newDir(t)+"/onto.raw", 5*mib, piece{0, 5 * mib}).file
	for k := newKiller(t, 200*time.Millisecond); k.goesOn(t); {
		id := h.order[k.rnd.IntN(len(h.order))]
		if k.rnd.IntN(3) == 0 {
			args := []string{"restore", id, "--onto", onto, "--disk", "disk0"}
			k.kill(t, h.start(t, args...))
			h.must(t, args...)
			if sum(t, onto) != h.points[id] {
				t.Error("restored onto a file that a killed restore had left, and it differs")
			}
			continue
		}
		format := []string{"raw", "qcow2", "vmdk", "vhdx"}[k.rnd.IntN(4)]
		file := filepath.Join(out, "disk0."+format)
		args := []string{"restore", id, "--to", out, "--format", format}
		k.kill(t, h.start(t, args...))
		if _, err := os.Stat(file); err != nil {
			h.must(t, args...)
		}
		if format == "raw" && sum(t, file) != h.points[id] {
			t.Error("a killed restore left a wrong file")
		} else if format != "raw" {
			// Computed formats are the same every time: whole is whole.
			again := newDir(t)
			h.must(t, "restore", id, "--to", again, "--format", format)
			tool(t, "cmp", file, filepath.Join(again, "disk0."+format))
			os.RemoveAll(again)
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		gone(t, file+".partial")
	}
	h.checkAll(t)
}

// TestKillMount kills mounts while they start and while they are read: reads fail
// and do not hang, and the next mount or umount clears what is left.
func TestKillMount(t *testing.T) {
	needs(t, "fuse")
	t.Parallel()
	r, kept := newKept(t)
	dir := newDir(t)
	at := mkdir(t, dir+"/mnt")
	t.Cleanup(func() { detach(at) })
	stale := 0
	for k := newKiller(t, 250*time.Millisecond); k.goesOn(t); {
		p := r.start(t, "mount", at)
		reading := make(chan struct{})
		go func() {
			defer close(reading)
			for p.running() { // errors are what happens here
				b, err := os.ReadFile(at + "/kept/latest/disk0.raw")
				if err == nil && len(b) != 3<<20+5 {
					t.Errorf("a read of %d bytes", len(b))
				}
			}
		}()
		k.kill(t, p)
		select {
		case <-reading:
		case <-time.After(time.Minute):
			t.Fatal("a read of a killed mount hangs")
		}
		if mountKind(t, at) != "" {
			stale++
		}
		switch k.rnd.IntN(3) {
		case 0:
			m := r.mountAt(t, at)
			tool(t, "cmp", kept.copy, at+"/kept/latest/disk0.raw")
			m.stop(t, []syscall.Signal{interrupt, terminate}[k.rnd.IntN(2)])
		case 1:
			if mountKind(t, at) != "" {
				r.must(t, "umount", at)
			}
			if mountKind(t, at) != "" {
				t.Error("umount left it mounted")
			}
		}
		r.must(t, "points")
	}
	r.run(t, "umount", at)
	r.intact(t, kept)
	if left := slices.DeleteFunc(contents(t, at), func(s string) bool { return s == at }); len(left) > 0 {
		t.Errorf("left %q", left)
	}
	t.Logf("%d kills left a mount", stale)
}

// TestKillMountAtOnce kills mounts as soon as the kernel has them: the process is gone then, whatever
// it had asked its own mount.
func TestKillMountAtOnce(t *testing.T) {
	needs(t, "fuse")
	t.Parallel()
	r, _ := newKept(t)
	at := mkdir(t, newDir(t)+"/mnt")
	t.Cleanup(func() { detach(at) })
	for range 60 {
		p := r.start(t, "mount", at)
		for p.running() && mountKind(t, at) == "" {
		}
		time.Sleep(rand.N(2 * time.Millisecond))
		if err := p.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		select {
		case <-p.ended:
		case <-time.After(20 * time.Second):
			t.Fatal("a mount that was killed does not end")
		}
		detach(at)
	}
}
