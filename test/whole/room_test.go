package whole

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// fill leaves about free bytes on a medium, all that there is for 0.
func fill(t *testing.T, at string, free int64) {
	t.Helper()
	filler := at + "/rest"
	if err := os.RemoveAll(filler); err != nil {
		t.Fatal(err)
	}
	if free == 0 {
		tool(t, "sh", "-c", "cat /dev/zero >"+filler+" 2>/dev/null || true")
		return
	}
	var blocks, size int64
	if _, err := fmt.Sscan(tool(t, "stat", "-f", "-c", "%a %S", at), &blocks, &size); err != nil {
		t.Fatal(err)
	}
	if n := blocks*size - free; n > 0 {
		tool(t, "sh", "-c", fmt.Sprintf("head -c %d /dev/zero >%s", n, filler))
	}
}

// TestDiskFullInEachPhase fills the medium of a repository before each of its
// commands. Each says so or does without; what is there reads; forget and gc give back room with
// next to none; nothing is lost, and when there is room all works as ever.
func TestDiskFullInEachPhase(t *testing.T) {
	needs(t, "root", "fuse")
	t.Parallel()
	dir := newDir(t)
	const vms = 8
	var disks []string
	for i := range int64(vms) {
		disks = append(disks, newRaw(t, fmt.Sprint(dir, "/", i, ".raw"), 9*mib+i, piece{0, 8 * mib}).file)
	}
	big := newRaw(t, dir+"/big.raw", 300*mib, piece{0, 300 * mib}).file
	for i, medium := range media {
		t.Run(medium.name, func(t *testing.T) {
			at, grow := medium.make(t, []int64{280, 320}[i]*mib)
			r := &repository{dir: at + "/repo", password: "correct horse"}
			r.must(t, "init", r.dir)
			var all []kept
			for i, file := range disks {
				all = append(all, r.keep(t, fmt.Sprint("vm", i), file))
			}
			// A second point that shares half of a pack with nothing: that is to be rewritten.
			tool(t, "dd", "if=/dev/zero", "of="+all[0].copy+".half", "bs=1M", "count=9", "status=none")
			tool(t, "dd", "if="+disks[0], "of="+all[0].copy+".half", "bs=1M", "count=2", "conv=notrunc", "status=none")
			half := r.keep(t, "vm0", all[0].copy+".half")
			all = append(all, half)

			// Filled by a backup.
			r.wants(t, 1, "no space left", "backup", big)
			r.intact(t, all...)
			r.must(t, "forget", all[0].ID) // of its pack a quarter stays in use
			all = all[1:]
			r.intact(t, all...)

			for _, free := range []int64{90 * mib, 60 * mib, 40 * mib, 20 * mib, 2 * mib, 0} {
				fill(t, at, free)
				name := fmt.Sprint(free/mib, " MiB free")
				r.must(t, "verify", "--read-data")
				if free < 64*mib {
					r.wants(t, 1, "no space left", "backup", big)
					r.wants(t, 1, "no space left", "backup", "--vm", "tiny", all[0].copy) // nothing new in it, but a point
				}
				m := r.mount(t)
				for _, k := range all {
					tool(t, "cmp", k.copy, filepath.Join(m.dir, k.path(), "disk0.raw"))
				}
				// Forgetting takes no room, and the mount sees it.
				gone := all[0]
				r.must(t, "forget", "--force", gone.ID)
				all = all[1:]
				r.intact(t, all...)
				m.stop(t, terminate)

				res := r.run(t, "gc", "--json", "--repack-below", "10%")
				var rep struct {
					Removed int `json:"packs_removed"`
				}
				_ = json.Unmarshal([]byte(res.out), &rep)
				t.Logf("%s %s: gc exit %d, %d packs removed", medium.name, name, res.code, rep.Removed)
				if res.code != 0 || rep.Removed == 0 {
					t.Errorf("gc with %s: exit %d\n%s%s", name, res.code, res.out, res.err)
				}
				r.intact(t, all...)
				if len(all) == 1 {
					break
				}
			}
			if err := os.Remove(at + "/rest"); err != nil {
				t.Fatal(err)
			}
			grow(t)
			r.must(t, "gc", "--repack-below", "90%")
			r.intact(t, all...)
			for i, file := range disks {
				all = append(all, r.keep(t, fmt.Sprint("vm", i), file))
			}
			all = append(all, r.keep(t, "big", big))
			r.intact(t, all...)
			r.must(t, "gc")
			r.intact(t, all...)
			r.must(t, "verify", "--read-data")
		})
	}
}

// TestRepackWithoutRoom: a collection that has to copy, and has no room for that,
// says so after it has removed the packs that hold nothing any more; with these gone it goes on.
func TestRepackWithoutRoom(t *testing.T) {
	needs(t, "root")
	t.Parallel()
	dir := newDir(t)
	a := newRaw(t, dir+"/a.raw", 20*mib, piece{0, 20 * mib}).file
	b := newRaw(t, dir+"/b.raw", 21*mib, piece{0, 21 * mib}).file
	part := newRaw(t, dir+"/part.raw", 20*mib).file
	tool(t, "dd", "if="+a, "of="+part, "bs=1M", "count=4", "conv=notrunc", "status=none")
	for _, medium := range media {
		t.Run(medium.name, func(t *testing.T) {
			at, grow := medium.make(t, 200*mib)
			r := &repository{dir: at + "/repo", password: "correct horse"}
			r.must(t, "init", r.dir)
			whole := r.keep(t, "a", a)
			dead := r.keep(t, "b", b)
			stays := r.keep(t, "a", part)
			r.must(t, "forget", "--force", whole.ID, dead.ID)
			fill(t, at, 10*mib)
			before, _ := usage(t, r.dir+"/packs")
			r.wants(t, 1, "no space left", "gc")
			r.intact(t, stays)
			after, _ := usage(t, r.dir+"/packs")
			if before-after < 20*mib {
				t.Errorf("packs of %d bytes shrank to %d only", before, after)
			}
			r.wants(t, 1, "no space left", "gc")
			r.must(t, "verify", "--read-data")
			if err := os.Remove(at + "/rest"); err != nil {
				t.Fatal(err)
			}
			grow(t)
			r.must(t, "gc")
			r.intact(t, stays)
			if after, _ := usage(t, r.dir+"/packs"); after > 6*mib {
				t.Errorf("%d bytes are left in packs, 4 MiB are in use", after)
			}
			r.must(t, "verify", "--read-data")
		})
	}
}

// TestMountWithoutRoom: a mount that begins where there is no room for an index that
// can be written follows what others do when there is room again: their points show, and what they
// collect does not disturb it.
func TestMountWithoutRoom(t *testing.T) {
	needs(t, "root", "fuse")
	t.Parallel()
	dir := newDir(t)
	disk := newRaw(t, dir+"/a.raw", 20*mib, piece{0, 20 * mib}).file
	for _, medium := range media {
		t.Run(medium.name, func(t *testing.T) {
			at, grow := medium.make(t, 160*mib)
			r := &repository{dir: at + "/repo", password: "correct horse"}
			r.must(t, "init", r.dir)
			first := r.keep(t, "a", disk)
			tool(t, "dd", "if=/dev/urandom", "of="+disk, "bs=1M", "count=6", "seek=2", "conv=notrunc", "status=none")
			second := r.keep(t, "a", disk)
			fill(t, at, 30*mib)
			m := r.mount(t)
			open, err := os.Open(filepath.Join(m.dir, first.path(), "disk0.raw"))
			if err != nil {
				t.Fatal(err)
			}
			defer open.Close()
			if err := os.Remove(at + "/rest"); err != nil {
				t.Fatal(err)
			}
			grow(t)
			r.must(t, "forget", first.ID)
			r.must(t, "gc", "--repack-below", "95%")
			third := r.keep(t, "b", disk)
			if got, want := names(t, m.dir), "a b"; got != want {
				t.Errorf("the mount shows %q, want %q", got, want)
			}
			wantNames(t, r, m, "a", second.Name)
			for _, k := range []kept{second, third} {
				tool(t, "cmp", k.copy, filepath.Join(m.dir, k.path(), "disk0.raw"))
			}
			tool(t, "cmp", first.copy, fmt.Sprint("/proc/", os.Getpid(), "/fd/", open.Fd()))
			open.Close()
			r.must(t, "gc", "--repack-below", "95%")
			tool(t, "cmp", second.copy, m.dir+"/a/latest/disk0.raw")
			m.stop(t, terminate)
			r.intact(t, second, third)
		})
	}
}

// TestFullUnderOwner fills the medium while a mount owns the index, with plenty of room when it began:
// forget and gc, its clients, give back room with not one byte left, and the mount goes on.
func TestFullUnderOwner(t *testing.T) {
	needs(t, "root", "fuse")
	t.Parallel()
	dir := newDir(t)
	for _, medium := range media {
		t.Run(medium.name, func(t *testing.T) {
			at, _ := medium.make(t, 200*mib)
			r := &repository{dir: at + "/repo", password: "correct horse"}
			r.must(t, "init", r.dir)
			var all []kept
			for i := range int64(4) {
				file := newRaw(t, fmt.Sprint(dir, "/", medium.name, i, ".raw"), 9*mib+i, piece{0, 8 * mib}).file
				all = append(all, r.keep(t, fmt.Sprint("vm", i), file))
			}
			m := r.mount(t)
			reads := func() {
				t.Helper()
				for _, k := range all {
					tool(t, "cmp", k.copy, filepath.Join(m.dir, k.path(), "disk0.raw"))
				}
			}
			tool(t, "cmp", all[3].copy, filepath.Join(m.dir, all[3].path(), "disk0.raw"))
			time.Sleep(2 * time.Second) // Badger tidies up at its beginning, and may not be surprised at that: see README, Limits
			for range 2 {               // the second time the index is in memory
				fill(t, at, 0)
				r.wants(t, 1, "no space left", "backup", "--vm", "tiny", all[0].copy)
				r.must(t, "forget", "--force", all[0].ID)
				all = all[1:]
				var rep struct {
					Removed int `json:"packs_removed"`
				}
				res := r.must(t, "gc", "--json")
				if err := json.Unmarshal([]byte(res.out), &rep); err != nil || rep.Removed == 0 {
					t.Errorf("gc removed %d packs, %v\n%s", rep.Removed, err, res.err)
				}
				reads()
			}
			if err := os.Remove(at + "/rest"); err != nil {
				t.Fatal(err)
			}
			all = append(all, r.keep(t, "later", all[0].copy))
			reads()
			m.stop(t, terminate)
			r.intact(t, all...)
			r.must(t, "gc")
			r.must(t, "verify", "--read-data")
			r.intact(t, all...)
		})
	}
}
