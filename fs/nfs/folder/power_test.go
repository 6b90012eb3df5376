package folder

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/nfs"
	"github.com/holdfast-backup/holdfast/test/command"
)

// needs skips a test that cannot run here; with HOLDFAST_TEST_ALL=1 that is an error.
func needs(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		_, err := exec.LookPath(p)
		switch {
		case err == nil:
		case os.Getenv("HOLDFAST_TEST_ALL") == "1":
			t.Fatal(err)
		default:
			t.Skip(err)
		}
	}
}

func run(t *testing.T, args ...string) {
	t.Helper()
	if _, err := command.Run(context.Background(), args...); err != nil {
		t.Fatal(err)
	}
}

// mountImage mounts a file. Nothing is written to it for a while but what somebody syncs.
func mountImage(t *testing.T, image, on, options string) (unmount func()) {
	t.Helper()
	if err := os.MkdirAll(on, 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, "mount", "-o", "loop,noatime,"+options, image, on)
	return func() {
		if err := unix.Unmount(on, 0); err != nil {
			t.Error(err)
		}
	}
}

// TestPowerCut takes the disk away, by a copy of it as it is, the moment an operation has returned. On the copy, after the kernel
// has replayed the journal, everything is as the operation left it.
func TestPowerCut(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounts file systems, which takes root")
	}
	needs(t, "mkfs.ext4", "mkfs.xfs", "mount", "losetup", "cp")
	t.Run("ext4", func(t *testing.T) { powerCut(t, 64<<20, "commit=3600", "mkfs.ext4", "-q") })
	t.Run("xfs", func(t *testing.T) { powerCut(t, 320<<20, "nouuid", "mkfs.xfs", "-q") }) // it writes its log each 30 s
}

func powerCut(t *testing.T, size int64, options string, mkfs ...string) {
	dir := tempDir(t)
	image := filepath.Join(dir, "image")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, size)); err != nil {
		t.Fatal(err)
	}
	run(t, append(mkfs, image)...)
	if out, err := exec.Command("losetup", "-f").CombinedOutput(); err != nil {
		t.Skipf("no loop devices: %s", out)
	}
	on := filepath.Join(dir, "mnt")
	unmount := mountImage(t, image, on, options)
	defer unmount()
	list := three()
	f := mustOpen(t, filepath.Join(on, "f"), Options{OpenFiles: 2}, list...)
	defer f.Close()

	cuts := 0
	check := func(what string, see func(t *testing.T, f *Folder)) {
		t.Helper()
		cuts++
		cut := filepath.Join(dir, "cut")
		run(t, "cp", "--sparse=always", image, cut)
		t.Run(what, func(t *testing.T) {
			there := filepath.Join(dir, "mntcut")
			defer mountImage(t, cut, there, options)()
			g, err := Open(filepath.Join(there, "f"), list, Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer g.Close()
			see(t, g)
		})
	}
	is := func(want nfs.ID, path ...string) func(t *testing.T, f *Folder) {
		return func(t *testing.T, f *Folder) {
			t.Helper()
			if got := lookup(t, f, path...); got != want {
				t.Errorf("%v: %v, not %v", path, got, want)
			}
		}
	}
	none := func(path ...string) func(t *testing.T, f *Folder) {
		return func(t *testing.T, f *Folder) {
			t.Helper()
			last := len(path) - 1
			want(t, second(f.Lookup(ctx, lookup(t, f, path[:last]...), path[last])), syscall.ENOENT)
		}
	}
	both := func(fns ...func(t *testing.T, f *Folder)) func(t *testing.T, f *Folder) {
		return func(t *testing.T, f *Folder) {
			t.Helper()
			for _, fn := range fns {
				fn(t, f)
			}
		}
	}
	root, vm := f.Root(), lookup(t, f, "vm")
	a, b := lookup(t, f, "vm", "a"), lookup(t, f, "vm", "b")
	check("placed", both(is(a, "vm", "a"), is(vm, "vm")))
	id, err := f.Create(ctx, vm, "log", nfs.Creation{Guarded: true, Set: nfs.Change{Mode: ptr(uint32(0o640)), Size: ptr(int64(77))}})
	want(t, err, 0)
	check("create", both(is(id, "vm", "log"), func(t *testing.T, f *Folder) {
		if a := attr(t, f, id); a.Mode != 0o640 || a.Size != 77 {
			t.Errorf("%+v", a)
		}
	}))
	lck, err := f.Create(ctx, vm, ".lck-1", nfs.Creation{Exclusive: mark(5)})
	want(t, err, 0)
	replayed := func(t *testing.T, f *Folder) {
		if got, err := f.Create(ctx, vm, ".lck-1", nfs.Creation{Exclusive: mark(5)}); err != nil || got != lck {
			t.Error(got, err)
		}
	}
	check("exclusive", both(is(lck, "vm", ".lck-1"), replayed))
	want(t, f.SetAttr(ctx, lck, nfs.Change{Mode: ptr(uint32(0o666)), Modified: ptr(day)}), 0)
	check("setattr", func(t *testing.T, f *Folder) {
		if a := attr(t, f, lck); a.Mode != 0o666 || !a.Modified.Equal(day) {
			t.Errorf("%+v", a)
		}
		want(t, second(f.Create(ctx, vm, ".lck-1", nfs.Creation{Exclusive: mark(5)})), syscall.EEXIST)
	})
	sub := mkdir(t, f, vm, "sub")
	check("mkdir", is(sub, "vm", "sub"))
	want(t, f.SetAttr(ctx, sub, nfs.Change{Mode: ptr(uint32(0o711))}), 0)
	check("setattr of a directory", func(t *testing.T, f *Folder) {
		if a := attr(t, f, sub); a.Mode != 0o711 {
			t.Errorf("%+v", a)
		}
	})
	if _, err := f.WriteAt(ctx, id, []byte("synced"), 100); err != nil {
		t.Fatal(err)
	}
	want(t, f.Sync(ctx, id), 0)
	check("sync", func(t *testing.T, f *Folder) {
		if s := read(t, f, id); len(s) != 106 || s[100:] != "synced" {
			t.Errorf("%q", s)
		}
	})
	if _, err := f.WriteAt(ctx, id, []byte("closed"), 100); err != nil {
		t.Fatal(err)
	}
	for _, id := range []nfs.ID{sub, vm, lck} { // so that it is closed
		want(t, second(f.Create(ctx, sub, "none", nfs.Creation{Exclusive: mark(9)})), 0)
		h, err := f.open(id, 0)
		want(t, err, 0)
		f.release(h)
	}
	want(t, f.Remove(ctx, sub, "none"), 0)
	check("close to make room", func(t *testing.T, f *Folder) {
		if s := read(t, f, id); s[100:] != "closed" {
			t.Errorf("%q", s)
		}
	})
	want(t, f.Rename(ctx, vm, "log", sub, "LOG"), 0)
	check("rename", both(is(id, "vm", "sub", "LOG"), none("vm", "log")))
	want(t, f.Rename(ctx, vm, "sub", root, "SUB"), 0)
	check("rename of a directory", both(is(sub, "SUB"), is(id, "SUB", "LOG"), none("vm", "sub")))
	want(t, f.Remove(ctx, vm, ".lck-1"), 0)
	check("remove", none("vm", ".lck-1"))
	want(t, f.SetAttr(ctx, a, nfs.Change{Mode: ptr(uint32(0o444)), Modified: ptr(day.Add(-time.Hour))}), 0)
	check("setattr of a placed file", func(t *testing.T, f *Folder) {
		if x := attr(t, f, a); x.Mode != 0o444 || !x.Modified.Equal(day.Add(-time.Hour)) {
			t.Errorf("%+v", x)
		}
	})
	want(t, f.Rename(ctx, vm, "a", sub, "A"), 0)
	check("rename of a placed file", both(is(a, "SUB", "A"), none("vm", "a")))
	want(t, f.Rename(ctx, sub, "A", sub, "LOG"), 0)
	check("a placed file over another", both(is(a, "SUB", "LOG"), none("SUB", "A")))
	x := create(t, f, root, "x", "")
	want(t, f.Rename(ctx, root, "x", vm, "b"), 0)
	check("a file over a placed one", both(is(x, "vm", "b"), none("x"), func(t *testing.T, f *Folder) {
		want(t, second(f.Attr(ctx, b)), syscall.ESTALE)
	}))
	if _, err := f.WriteAt(ctx, a, []byte("y"), 0); err != nil {
		t.Fatal(err)
	}
	moved := attr(t, f, a).Modified
	check("time of a placed file", func(t *testing.T, f *Folder) {
		if now := attr(t, f, a).Modified; now.Before(moved) {
			t.Error(now, "was", moved)
		}
	})
	want(t, f.Remove(ctx, sub, "LOG"), 0)
	check("remove of a placed file", both(none("SUB", "LOG"), func(t *testing.T, f *Folder) {
		if got := fmt.Sprint(f.Removed()); got != "[a b]" {
			t.Error(got)
		}
	}))
	want(t, f.Rmdir(ctx, root, "SUB"), 0)
	check("rmdir", none("SUB"))
	t.Logf("%d cuts", cuts)
}
