package whole

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

const mib = 1 << 20

// medium is a small file system for a repository.
type medium struct {
	name string
	make func(t *testing.T, size int64) (dir string, grow func(t *testing.T))
}

var media = []medium{
	{"tmpfs", func(t *testing.T, size int64) (string, func(*testing.T)) {
		dir, _ := kernelMount(t, "-t", "tmpfs", "-o", fmt.Sprint("mode=755,size=", size), "none")
		return dir, func(t *testing.T) { tool(t, "mount", "-o", fmt.Sprint("remount,size=", 1<<30), dir) }
	}},
	{"ext4", func(t *testing.T, size int64) (string, func(*testing.T)) {
		needs(t, "losetup", "mkfs.ext4")
		image := newRaw(t, newDir(t)+"/ext4", size+600*mib).file
		tool(t, "mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", image)
		dir, _ := kernelMount(t, loop(t, image))
		filler := dir + "/filler"
		free := int64(0)
		if _, err := fmt.Sscan(tool(t, "stat", "-f", "-c", "%a", dir), &free); err != nil {
			t.Fatal(err)
		}
		tool(t, "fallocate", "-l", fmt.Sprint(free*4096-size), filler)
		return dir, func(t *testing.T) {
			if err := os.Remove(filler); err != nil {
				t.Fatal(err)
			}
		}
	}},
}

// TestFullRepository fills the medium of a repository by a backup: that fails
// without a crash, what was committed before still reads, and when there is room
// again the next backup works.
func TestFullRepository(t *testing.T) {
	needs(t, "root")
	t.Parallel()
	dir := newDir(t)
	small := newRaw(t, dir+"/small.raw", 3*mib, piece{0, 2 * mib}).file
	big := newRaw(t, dir+"/big.raw", 200*mib, piece{0, 200 * mib}).file
	tiny := newRaw(t, dir+"/tiny.raw", 4096, piece{0, 4096}).file
	for i, medium := range media {
		for _, size := range [][]int64{{72, 137, 200}, {80, 150, 230}}[i] {
			t.Run(fmt.Sprint(medium.name, " of ", size, " MiB"), func(t *testing.T) {
				at, grow := medium.make(t, size*mib)
				r := &repository{dir: at + "/repo", password: "correct horse"}
				r.must(t, "init", r.dir)
				all := []kept{r.keep(t, "small", small)}
				for range 2 {
					r.wants(t, 1, "no space left", "backup", big)
					r.intact(t, all...)
				}
				if left, _ := filepath.Glob(r.dir + "/tmp/*"); len(left) > 0 {
					t.Errorf("left over: %q", left)
				}
				// With no byte left all that reads still does.
				tool(t, "sh", "-c", "cat /dev/zero >"+at+"/rest 2>/dev/null || true")
				r.intact(t, all...)
				r.wants(t, 1, "no space left", "backup", big)
				r.wants(t, 1, "no space left", "backup", tiny)
				r.must(t, "verify", "--read-data")
				m := r.mount(t)
				tool(t, "cmp", small, m.dir+"/small/latest/disk0.raw")
				r.intact(t, all...) // beside the mount
				m.stop(t, terminate)
				if err := os.Remove(at + "/rest"); err != nil {
					t.Fatal(err)
				}
				grow(t)
				r.intact(t, all...)
				k := kept{copy: big}
				k.point, _ = r.backup(t, big)
				all = append(all, k)
				r.intact(t, all...)
				r.must(t, "verify", "--read-data")
			})
		}
	}
}

// TestSmallRepository: on a medium too small for its index, a repository takes no
// backup and says so; it does when the medium has grown.
func TestSmallRepository(t *testing.T) {
	needs(t, "root")
	t.Parallel()
	small := newRaw(t, newDir(t)+"/small.raw", 3*mib, piece{0, 2 * mib}).file
	for _, medium := range media {
		t.Run(medium.name, func(t *testing.T) {
			at, grow := medium.make(t, 20*mib)
			r := &repository{dir: at + "/repo", password: "correct horse"}
			r.must(t, "init", r.dir)
			r.wants(t, 1, "MiB are free, 64 are kept for the index", "backup", small)
			r.intact(t)
			r.must(t, "verify", "--read-data")
			grow(t)
			r.intact(t, r.keep(t, "small", small))
		})
	}
}

// TestFullWhileMounted: a backup that fills the medium as the client of a mount
// neither ends the mount nor keeps it from showing what comes later.
func TestFullWhileMounted(t *testing.T) {
	needs(t, "root", "fuse")
	t.Parallel()
	dir := newDir(t)
	small := newRaw(t, dir+"/small.raw", 3*mib, piece{0, 2 * mib}).file
	big := newRaw(t, dir+"/big.raw", 200*mib, piece{0, 200 * mib}).file
	for _, medium := range media {
		t.Run(medium.name, func(t *testing.T) {
			at, grow := medium.make(t, 150*mib)
			r := &repository{dir: at + "/repo", password: "correct horse"}
			r.must(t, "init", r.dir)
			all := []kept{r.keep(t, "small", small)}
			m := r.mount(t)
			for range 3 {
				r.wants(t, 1, "no space left", "backup", big)
				tool(t, "cmp", small, m.dir+"/small/latest/disk0.raw")
			}
			tool(t, "sh", "-c", "cat /dev/zero >"+at+"/rest 2>/dev/null || true")
			r.wants(t, 1, "no space left", "backup", big)
			r.intact(t, all...)
			if err := os.Remove(at + "/rest"); err != nil {
				t.Fatal(err)
			}
			grow(t)
			k := kept{copy: big}
			k.point, _ = r.backup(t, big)
			all = append(all, k)
			tool(t, "cmp", big, m.dir+"/big/latest/disk0.raw")
			m.stop(t, terminate)
			r.intact(t, all...)
			r.must(t, "verify", "--read-data")
		})
	}
}

// TestFullTarget: a restore that fills its target's medium leaves no file.
func TestFullTarget(t *testing.T) {
	needs(t, "root")
	t.Parallel()
	r := newRepository(t)
	k := r.keep(t, "vm", newRaw(t, newDir(t)+"/d.raw", 40*mib, piece{0, 40 * mib}).file)
	for _, medium := range media {
		t.Run(medium.name, func(t *testing.T) {
			at, grow := medium.make(t, 20*mib)
			for _, format := range []string{"raw", "qcow2", "vmdk", "vmdk-stream", "vhdx", "vhd"} {
				r.wants(t, 1, "no space left on device", "restore", "vm/latest", "--to", at+"/out", "--format", format)
				if left, _ := os.ReadDir(at + "/out"); len(left) > 0 {
					t.Errorf("%s: left %v", format, left)
				}
			}
			r.wants(t, 1, "no space left on device", "cp", "vm/latest/disk0.raw", at+"/copy")
			gone(t, at+"/copy", at+"/copy.partial")
			newRaw(t, at+"/onto", 40*mib)
			r.wants(t, 1, "no space left on device", "restore", "vm/latest", "--onto", at+"/onto", "--disk", "disk0")
			grow(t)
			r.must(t, "restore", "vm/latest", "--onto", at+"/onto", "--disk", "disk0")
			tool(t, "cmp", k.copy, at+"/onto")
			r.must(t, "restore", "vm/latest", "--to", at+"/out")
			tool(t, "cmp", k.copy, at+"/out/disk0.raw")
		})
	}
	r.intact(t, k)
}
