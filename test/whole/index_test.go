package whole

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// indexed is a repository and its index at several times of its life.
type indexed struct {
	*repository
	all  []kept // points that are there
	olds map[string]string
	next string // a disk that was not backed up yet
}

// Moments of which newIndexed keeps the index.
const (
	atFirst  = "before further backups"
	atForget = "before a forget"
	atGC     = "before a collection"
	atKill   = "of an owner that was killed"
	atLast   = "as it is"
)

// newIndexed makes a repository that has packs that are wholly alive, partly alive
// and dead, and packs that were collected.
func newIndexed(t *testing.T) *indexed {
	t.Helper()
	x := &indexed{repository: newRepository(t, "--no-encryption", "--chunk-size", "64K"), olds: map[string]string{}}
	dir := newDir(t)
	save := func(name string) {
		x.olds[name] = fmt.Sprint(dir, "/index", len(x.olds))
		tool(t, "cp", "-a", x.dir+"/index", x.olds[name])
	}
	disk := func(seed int64) string {
		return newRaw(t, fmt.Sprint(dir, "/", seed, ".raw"), 16*mib+seed, piece{0, 2 * mib}, piece{5*mib + seed, 3 * mib}).file
	}
	a := disk(1)
	x.all = append(x.all, x.keep(t, "a", a))
	save(atFirst)
	tool(t, "dd", "if="+disk(2), "of="+a, "bs=1M", "skip=5", "seek=1", "count=2", "conv=notrunc", "status=none")
	second := x.keep(t, "a", a)
	x.all = append(x.all, x.keep(t, "b", disk(3)), x.keep(t, "c", disk(4)))
	dead := x.keep(t, "b", disk(5))
	save(atForget)
	x.must(t, "forget", "--force", x.all[0].ID, dead.ID)
	x.all = append(x.all[1:], second)
	save(atGC)
	var rep struct {
		Removed int `json:"packs_removed"`
	}
	if err := json.Unmarshal([]byte(x.must(t, "gc", "--json", "--repack-below", "90%").out), &rep); err != nil || rep.Removed < 2 {
		t.Fatalf("gc removed %d packs, %v", rep.Removed, err)
	}
	// What the next collection is to find: something dead again.
	gone := x.keep(t, "d", disk(6))
	x.all = append(x.all, x.keep(t, "d", disk(7)))
	x.must(t, "forget", gone.ID)
	save(atLast)
	m := x.start(t, "mount", mkdir(t, dir+"/mnt"))
	t.Cleanup(func() { detach(dir + "/mnt") })
	until(t, "the mount", func() bool { return mountKind(t, dir+"/mnt") != "" })
	x.all = append(x.all, x.keep(t, "e", disk(8)))
	_ = m.cmd.Process.Kill()
	m.code(t)
	detach(dir + "/mnt")
	save(atKill)
	x.next = disk(9)
	return x
}

// copy gives a copy of the repository with the index of a moment. What is immutable
// is shared.
func (x *indexed) copy(t *testing.T, index string) *repository {
	t.Helper()
	r := &repository{dir: newDir(t) + "/repo", password: x.password}
	tool(t, "cp", "-al", x.dir, r.dir)
	if err := os.RemoveAll(r.dir + "/index"); err != nil {
		t.Fatal(err)
	}
	tool(t, "cp", "-a", index, r.dir+"/index")
	return r
}

// survives runs the commands that matter in any order, then looks at everything.
func (x *indexed) survives(t *testing.T, r *repository, rnd *rand.Rand) {
	t.Helper()
	all := x.all
	for _, what := range rnd.Perm(4) {
		switch what {
		case 0:
			listed := r.points(t)
			for _, k := range x.all {
				if !slices.ContainsFunc(listed, func(p point) bool { return p.ID == k.ID && p.Damaged == "" }) {
					t.Errorf("%s is not listed: %+v", k.path(), listed)
				}
			}
		case 1:
			r.reads(t, x.all[rnd.IntN(len(x.all))])
		case 2:
			k := kept{copy: x.next}
			k.point, _ = r.backup(t, "--vm", "next", x.next)
			all = append(slices.Clone(all), k)
		case 3:
			r.must(t, "gc", "--repack-below", "90%")
		}
		if t.Failed() {
			return
		}
	}
	r.must(t, "gc", "--repack-below", "90%")
	r.must(t, "verify", "--read-data")
	if rnd.IntN(8) == 0 {
		r.intact(t, all...)
		r.withoutIndex(t)
	}
	if n := len(r.points(t)); n != len(all) {
		t.Errorf("%d points are listed, of %d", n, len(all))
	}
	r.reads(t, all[rnd.IntN(len(all))])
}

// indexFiles lists the files of an index.
func indexFiles(t *testing.T, dir string) (files []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		files = append(files, e.Name())
	}
	return files
}

// TestIndexDamage: whatever happens to the index, the next commands work, whichever
// they are, and a collection removes nothing that is in use.
func TestIndexDamage(t *testing.T) {
	needs(t, "fuse")
	t.Parallel()
	x := newIndexed(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	for _, when := range []string{atLast, atKill} {
		t.Logf("index %s: %q", when, indexFiles(t, x.olds[when]))
	}
	n := 0
	check := func(name, index string, harm func(dir string)) {
		n++
		rnd := rand.New(rand.NewPCG(seed, uint64(n)))
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := x.copy(t, index)
			harm(r.dir + "/index")
			x.survives(t, r, rnd)
			if err := os.RemoveAll(filepath.Dir(r.dir)); err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(func() { t.Logf("%d ways of damage", n) })
	for when, index := range x.olds {
		check("the index "+when, index, func(string) {})
	}
	check("deleted", x.olds[atLast], func(dir string) {
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	})
	check("of another repository", newIndexed(t).olds[atLast], func(string) {})
	for _, when := range []string{atLast, atKill} {
		tables := 0
		for _, file := range indexFiles(t, x.olds[when]) {
			ext := filepath.Ext(file)
			if ext == ".sst" {
				tables++
			}
			if tables > 2 && ext == ".sst" || when == atKill && ext != ".mem" && file != "MANIFEST" {
				continue // the others are like those
			}
			st, err := os.Stat(filepath.Join(x.olds[when], file))
			if err != nil {
				t.Fatal(err)
			}
			check(fmt.Sprint(file, " ", when, " missing"), x.olds[when], func(dir string) {
				if err := os.Remove(filepath.Join(dir, file)); err != nil {
					t.Fatal(err)
				}
			})
			sizes := []int64{0, 1, 20, st.Size() / 2, st.Size() - 1}
			for _, size := range slices.Compact(sizes) {
				if size < 0 || size >= st.Size() {
					continue
				}
				check(fmt.Sprint(file, " ", when, " cut to ", size), x.olds[when], func(dir string) {
					if err := os.Truncate(filepath.Join(dir, file), size); err != nil {
						t.Fatal(err)
					}
				})
			}
		}
	}
}

// TestIndexDamageAnywhere flips bytes anywhere in the files of an index.
func TestIndexDamageAnywhere(t *testing.T) {
	needs(t, "fuse")
	t.Parallel()
	x := newIndexed(t)
	flips := 0
	for k := newKiller(t, time.Second); k.goesOn(t); {
		when := []string{atLast, atKill}[k.rnd.IntN(2)]
		files := indexFiles(t, x.olds[when])
		r := x.copy(t, x.olds[when])
		var where []string
		for range 1 + k.rnd.IntN(3) {
			name := files[k.rnd.IntN(len(files))]
			st, err := os.Stat(filepath.Join(r.dir, "index", name))
			if err != nil || st.Size() == 0 {
				continue
			}
			off := k.rnd.Int64N(st.Size())
			if k.rnd.IntN(3) == 0 { // what is at the ends matters most
				off = st.Size() - 1 - min(off, k.rnd.Int64N(200))
			}
			// Logs are mostly empty.
			if filepath.Ext(name) != ".sst" && k.rnd.IntN(2) == 0 {
				off = min(off, k.rnd.Int64N(4000))
			}
			flip(t, filepath.Join(r.dir, "index", name), off)
			where = append(where, fmt.Sprint(name, " at ", off))
			flips++
		}
		x.survives(t, r, k.rnd)
		if t.Failed() {
			t.Logf("with the index %s, flipped %q", when, where)
		}
		if err := os.RemoveAll(filepath.Dir(r.dir)); err != nil {
			t.Error(err)
		}
	}
	t.Logf("%d bytes flipped", flips)
}

// TestIndexRebuildSpeed prints how long it takes to make an index anew.
func TestIndexRebuildSpeed(t *testing.T) {
	needs(t)
	r := newRepository(t)
	dir := newDir(t)
	file := dir + "/big.raw"
	newRaw(t, file, 1<<30+7, piece{0, 256 * mib}, piece{256 * mib, 256 * mib}, piece{512 * mib, 256 * mib}, piece{768*mib + 7, 256 * mib})
	want := sum(t, file)
	p, _ := r.backup(t, file)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	size, _ := usage(t, r.dir+"/packs")
	if size < 1<<30 {
		t.Fatalf("packs of %d bytes only", size)
	}
	with := r.must(t, "points").took
	var best time.Duration
	for range 3 {
		r.withoutIndex(t)
		res := r.must(t, "points")
		if !strings.Contains(res.err, "made anew out of") {
			t.Errorf("nobody says that the index was made anew: %q", res.err)
		}
		if best == 0 || res.took < best {
			best = res.took
		}
	}
	t.Logf("%.2f GiB of packs: points takes %v, %v with the index made anew: %.0f GiB of repository per second",
		float64(size)/(1<<30), with.Round(time.Millisecond), best.Round(time.Millisecond),
		float64(size)/(1<<30)/max(best-with, time.Millisecond).Seconds())
	r.must(t, "restore", p.ID, "--to", dir)
	if sum(t, dir+"/disk0.raw") != want {
		t.Error("restored wrong after that")
	}
}
