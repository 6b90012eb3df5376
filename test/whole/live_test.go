package whole

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// names lists a directory of a mount.
func names(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for _, e := range entries {
		list = append(list, e.Name())
	}
	return strings.Join(list, " ")
}

// TestNewPointsAppear: what other processes commit shows in a running mount, and
// what was there stays as it was.
func TestNewPointsAppear(t *testing.T) {
	needs(t, "fuse")
	t.Parallel()
	r, first := newKept(t)
	m := r.mount(t)
	open, err := os.Open(m.dir + "/kept/latest/disk0.raw")
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	before, err := os.Stat(m.dir + "/kept")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(m.dir + "/other"); !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	time.Sleep(1100 * time.Millisecond) // a second later, so that times and names differ
	changed := newText(t, newDir(t)+"/kept.raw", 2, 4<<20).file
	second, other := r.keep(t, "kept", changed), r.keep(t, "other", changed)

	if got, want := names(t, m.dir), "kept other"; got != want {
		t.Errorf("the mount shows %q, want %q", got, want)
	}
	if got, want := names(t, m.dir+"/kept"), first.Name+" "+second.Name+" latest"; got != want {
		t.Errorf("the VM has %q, want %q", got, want)
	}
	if to, err := os.Readlink(m.dir + "/kept/latest"); to != second.Name {
		t.Errorf("latest leads to %q, %v", to, err)
	}
	if after, err := os.Stat(m.dir + "/kept"); err != nil || !after.ModTime().After(before.ModTime()) {
		t.Errorf("the VM's folder is as old as before: %v", err)
	}
	for _, k := range []kept{first, second, other} {
		tool(t, "cmp", k.copy, filepath.Join(m.dir, k.path(), "disk0.raw"))
	}
	tool(t, "cmp", second.copy, m.dir+"/kept/latest/disk0.raw")
	tool(t, "cmp", other.copy, m.dir+"/other/latest/disk0.raw")
	want, err := os.ReadFile(first.copy)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(open); err != nil || !bytes.Equal(got, want) {
		t.Errorf("a file opened before reads wrong: %v", err)
	}
	open.Close()
	var p struct{ ID string }
	if b, err := os.ReadFile(m.dir + "/kept/latest/point.json"); err != nil || json.Unmarshal(b, &p) != nil || p.ID != second.ID {
		t.Errorf("point.json is of %q, want %q; %v", p.ID, second.ID, err)
	}
	m.stop(t, terminate)
}

// TestMountEnds: signals and both ways to unmount end it with exit 0.
func TestMountEnds(t *testing.T) {
	needs(t, "fuse")
	t.Parallel()
	r, k := newKept(t)
	for name, end := range map[string]func(*mounted) error{
		"SIGINT":          func(m *mounted) error { return m.cmd.Process.Signal(interrupt) },
		"SIGTERM":         func(m *mounted) error { return m.cmd.Process.Signal(terminate) },
		"holdfast umount": func(m *mounted) error { r.must(t, "umount", m.dir); return nil },
		"umount(8)":       func(m *mounted) error { tool(t, "umount", m.dir); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			m := r.mount(t)
			tool(t, "cmp", k.copy, m.dir+"/kept/latest/disk0.raw")
			if err := end(m); err != nil {
				t.Fatal(err)
			}
			m.endedWell(t)
			if left := names(t, m.dir); left != "" {
				t.Errorf("left %s", left)
			}
			r.intact(t, k)
		})
	}
	t.Run("in use", func(t *testing.T) {
		m := r.mount(t)
		f, err := os.Open(m.dir + "/kept/latest/disk0.raw")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		res := r.wants(t, 1, "device or resource busy", "umount", m.dir)
		if !strings.Contains(res.err, "hint: a program still uses") {
			t.Errorf("no hint: %s", res.err)
		}
		if mountKind(t, m.dir) == "" {
			t.Fatal("it is gone all the same")
		}
		// A signal takes it out of the tree; who has a file open may finish.
		if err := m.cmd.Process.Signal(terminate); err != nil {
			t.Fatal(err)
		}
		until(t, "the mount to go", func() bool { return mountKind(t, m.dir) == "" })
		want, err := os.ReadFile(k.copy)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(f); err != nil || !bytes.Equal(got, want) {
			t.Errorf("an open file reads wrong after SIGTERM: %v", err)
		}
		f.Close()
		m.endedWell(t)
	})
	t.Run("background", func(t *testing.T) {
		dir := mkdir(t, newDir(t)+"/mnt")
		t.Cleanup(func() { detach(dir) })
		res := r.must(t, "mount", dir, "--background", "--json")
		var started struct{ PID int }
		if err := json.Unmarshal([]byte(res.out), &started); err != nil || started.PID == 0 {
			t.Fatalf("%v: %s", err, res.out)
		}
		t.Cleanup(func() {
			if p, err := os.FindProcess(started.PID); err == nil && t.Failed() {
				_ = p.Signal(terminate)
			}
		})
		tool(t, "cmp", k.copy, dir+"/kept/latest/disk0.raw")
		r.must(t, "umount", dir)
		until(t, "the process to end", func() bool {
			_, err := os.Stat(fmt.Sprint("/proc/", started.PID, "/exe"))
			return err != nil
		})
		r.wants(t, 1, "no holdfast mount", "umount", dir)
	})
}

// TestStaleMount: what a killed mount leaves is cleared by mount and by umount,
// by whatever path it is named.
func TestStaleMount(t *testing.T) {
	needs(t, "fuse")
	t.Parallel()
	r, k := newKept(t)
	dir := newDir(t)
	at := mkdir(t, dir+"/m n t")
	symlink(t, "m n t", dir+"/link")
	killed := func() {
		m := r.mountAt(t, at)
		if _, err := os.Stat(at); err != nil { // the kernel keeps what it learns
			t.Fatal(err)
		}
		tool(t, "cmp", k.copy, at+"/kept/latest/disk0.raw")
		_ = m.cmd.Process.Kill()
		m.code(t)
		if mountKind(t, at) == "" {
			t.Fatal("the mount went by itself")
		}
	}
	for _, path := range []string{at, dir + "/link", at + "/"} {
		killed()
		m := r.mountAt(t, path)
		if !strings.Contains(m.err.String(), "cleared what a killed mount had left") {
			t.Errorf("mount does not say that it cleared something: %s", m.err.String())
		}
		tool(t, "cmp", k.copy, at+"/kept/latest/disk0.raw")
		_ = m.cmd.Process.Signal(interrupt)
		if m.code(t) != 0 || mountKind(t, at) != "" {
			t.Errorf("%s: exit %d, still mounted: %q", path, m.code(t), mountKind(t, at))
		}
		killed()
		r.must(t, "umount", path)
		if kind := mountKind(t, at); kind != "" {
			t.Errorf("umount %s left %s", path, kind)
		}
	}
	killed()
	r.must(t, "mount", "--background", at)
	tool(t, "cmp", k.copy, at+"/kept/latest/disk0.raw")
	r.must(t, "umount", at)
	// A mount of something else is not ours to clear.
	other, _ := kernelMount(t, "-t", "tmpfs", "none")
	r.wants(t, 1, "no holdfast mount", "umount", other)
}

// TestManyReaders: 64 readers at once get the right bytes, in bounded memory.
func TestManyReaders(t *testing.T) {
	needs(t, "fuse")
	t.Parallel()
	r := newRepository(t)
	src := newRaw(t, newDir(t)+"/vm.raw", 300*mib+513, piece{0, 90 * mib}, piece{120*mib + 5, 100 * mib}, piece{290 * mib, 10*mib + 513})
	r.backup(t, src.file)
	m := r.mount(t)
	source, err := os.Open(src.file)
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	var readers sync.WaitGroup
	began := time.Now()
	for i := range 64 {
		readers.Go(func() {
			flags := os.O_RDONLY
			if i%2 == 0 {
				flags |= syscall.O_DIRECT // past the page cache
			}
			f, err := os.OpenFile(m.dir+"/vm/latest/"+[]string{"disk0.raw", "disk0-flat.vmdk"}[i/2%2], flags, 0)
			if err != nil {
				t.Error(err)
				return
			}
			defer f.Close()
			rnd := rand.New(rand.NewPCG(uint64(i), 5))
			got, want := make([]byte, 300_000), make([]byte, 300_000)
			for range 50 {
				n := 1 + rnd.IntN(len(got))
				if i%4 == 3 {
					n = 4096
				}
				off := rnd.Int64N(src.size - int64(n))
				if _, err := f.ReadAt(got[:n], off); err != nil {
					t.Errorf("%d bytes at %d: %v", n, off, err)
					return
				}
				if _, err := source.ReadAt(want[:n], off); err != nil {
					t.Error(err)
					return
				}
				if !bytes.Equal(got[:n], want[:n]) {
					t.Errorf("%d bytes at %d differ", n, off)
					return
				}
			}
		})
	}
	readers.Wait()
	took := time.Since(began)
	tool(t, "cmp", src.file, m.dir+"/vm/latest/disk0.raw")
	rss, err := highWater(m.cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("64 readers: %.1fs, the mount used up to %d MiB", took.Seconds(), rss>>20)
	if rss > 300*mib {
		t.Errorf("the mount used %d MiB of memory", rss>>20)
	}
	m.stop(t, terminate)
}

// dataRanges asks a file for what is no hole.
func dataRanges(t *testing.T, file string) (list []piece) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for off := int64(0); ; {
		from, err := f.Seek(off, unix.SEEK_DATA)
		if errors.Is(err, syscall.ENXIO) {
			return list
		}
		if err != nil {
			t.Fatal(err)
		}
		to, err := f.Seek(from, unix.SEEK_HOLE)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, piece{from, to - from})
		off = to
	}
}

// TestHolesThroughMount: programs that look for holes find them in a mount, so
// that copying a sparse 10 TiB disk takes moments.
func TestHolesThroughMount(t *testing.T) {
	needs(t, "fuse", "qemu-img")
	t.Parallel()
	dir := newDir(t)
	src := newHuge(t, dir+"/huge.raw")
	r := newRepository(t)
	r.backup(t, src.file)
	m := r.mount(t)
	disk := m.dir + "/huge/latest/disk0.raw"
	shown := dataRanges(t, disk)
	for _, want := range dataRanges(t, src.file) {
		covered := false
		for _, p := range shown {
			covered = covered || p.off <= want.off && want.off+want.len <= p.off+p.len
		}
		if !covered {
			t.Errorf("data at %d is shown as a hole", want.off)
		}
	}
	total := int64(0)
	for _, p := range shown {
		total += p.len
	}
	if total > 8*mib {
		t.Errorf("%d bytes are shown as data, the disk has 3.3 MiB", total)
	}
	for _, how := range []string{"auto", "always"} {
		if how == "always" && len(shown) == 0 {
			continue
		}
		began := time.Now()
		tool(t, "cp", "--sparse="+how, disk, dir+"/copy.raw")
		t.Logf("cp --sparse=%s of 10 TiB: %.2fs", how, time.Since(began).Seconds())
		tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", src.file, dir+"/copy.raw")
		if got := allocated(t, dir+"/copy.raw"); got > 8*mib {
			t.Errorf("the copy takes up %d bytes", got)
		}
	}
	m.stop(t, terminate)
}

// TestBackupsAtOnce: backups of the same VM and of others run at once, while a
// mount that owns the repository is read; each makes its own point.
func TestBackupsAtOnce(t *testing.T) {
	needs(t, "fuse")
	t.Parallel()
	r, k := newKept(t)
	dir := newDir(t)
	a := newRaw(t, dir+"/a.raw", 30*mib, piece{0, 20 * mib}).file
	b := newRaw(t, dir+"/b.raw", 30*mib, piece{0, 20 * mib}, piece{25 * mib, mib}).file
	for _, owner := range []string{"mount", "backup"} {
		var m *mounted
		if owner == "mount" {
			m = r.mount(t)
		}
		running := map[string]*process{}
		for _, vm := range []string{"same", "same ", "other"} {
			file := map[string]string{"same": a, "same ": b, "other": b}[vm]
			running[vm] = r.start(t, "backup", "--json", "--full", "--vm", strings.TrimSpace(vm), file)
		}
		if m == nil {
			m = r.mount(t)
		}
		tool(t, "cmp", k.copy, m.dir+"/kept/latest/disk0.raw")
		made := map[string]bool{}
		for vm, p := range running {
			if code := p.code(t); code != 0 {
				t.Fatalf("backup of %q: exit %d\n%s", vm, code, p.err.String())
			}
			points := summaryOf(p.out.String())
			if len(points) != 1 || made[points[0].path()] {
				t.Fatalf("points %+v, others are %v", points, made)
			}
			made[points[0].path()] = true
			want := kept{points[0], a}
			if vm != "same" {
				want.copy = b
			}
			tool(t, "cmp", want.copy, filepath.Join(m.dir, want.path(), "disk0.raw"))
			r.reads(t, want)
		}
		m.stop(t, terminate)
	}
	r.must(t, "verify", "--read-data")
	if n := len(r.points(t)); n != 7 {
		t.Errorf("%d points, want 7", n)
	}
	// What three backups stored at once is there about once, not three times.
	if apparent, _ := usage(t, r.dir+"/packs"); apparent > 100*mib {
		t.Errorf("packs of %d MiB for 41 MiB of data", apparent>>20)
	}
}

// TestOwnerKilled: the owner dies while a backup and a second mount are its
// clients. Both go on, the point reads back, and the second mount shows it.
func TestOwnerKilled(t *testing.T) {
	needs(t, "fuse")
	t.Parallel()
	r, k := newKept(t)
	big := newRaw(t, newDir(t)+"/big.raw", 400*mib, piece{0, 300 * mib}).file
	owner := r.mount(t)
	second := r.mount(t)
	backup := r.start(t, "backup", "--json", big)
	until(t, "the backup to write", func() bool {
		drafts, _ := filepath.Glob(r.dir + "/tmp/*")
		return len(drafts) > 0 || !backup.running()
	})
	if !backup.running() {
		t.Error("the backup was quicker than the test")
	}
	_ = owner.cmd.Process.Kill()
	owner.code(t)
	detach(owner.dir)
	tool(t, "cmp", k.copy, second.dir+"/kept/latest/disk0.raw")
	if code := backup.code(t); code != 0 {
		t.Fatalf("the backup ended with %d:\n%s", code, backup.err.String())
	}
	points := summaryOf(backup.out.String())
	if len(points) != 1 {
		t.Fatal("no point")
	}
	tool(t, "cmp", big, filepath.Join(second.dir, points[0].path(), "disk0.raw"))
	r.intact(t, k, kept{points[0], big})
	second.stop(t, terminate)
	r.must(t, "verify", "--read-data")
}
