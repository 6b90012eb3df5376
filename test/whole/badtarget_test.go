package whole

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestBadTarget: restores and copies that cannot be done touch nothing.
func TestBadTarget(t *testing.T) {
	needs(t, "root", "losetup")
	t.Parallel()
	r, k := newKept(t)
	dir := newDir(t)
	two, _ := r.backup(t, "--vm", "two", k.copy, newText(t, dir+"/second.raw", 4, 1<<20).file)
	taken := mkdir(t, dir+"/taken")
	write(t, taken+"/disk0.raw", "mine")
	half := mkdir(t, dir+"/half") // its second disk is in the way
	symlink(t, "nowhere", half+"/disk1.raw")
	file := write(t, dir+"/file", "mine")
	small := loop(t, newRaw(t, dir+"/small.raw", 1<<20).file)
	before := contents(t, dir)
	for _, c := range []struct {
		code int
		says string
		args []string
	}{
		{1, taken + "/disk0.raw: target exists", []string{"restore", k.path(), "--to", taken}},
		{1, half + "/disk1.raw: target exists", []string{"restore", two.path(), "--to", half}},
		{1, file, []string{"restore", k.path(), "--to", file}},
		{1, file, []string{"restore", k.path(), "--to", file + "/below"}},
		{1, `no disk "disk7"`, []string{"restore", k.path(), "--to", dir + "/new", "--disk", "disk7"}},
		{1, `no point "kept/2001"`, []string{"restore", "kept/2001", "--to", dir + "/new"}},
		{1, `no point`, []string{"restore", "nobody/latest", "--to", dir + "/new"}},
		{1, `no point`, []string{"show", "0123456789abcdef"}},
		{1, `no point`, []string{"verify", "kept/1999"}},
		{1, `no VM "nobody"`, []string{"points", "nobody"}},
		{1, "nobody", []string{"ls", "nobody"}},
		{1, "disk9.raw", []string{"cp", k.path() + "/disk9.raw", dir + "/new"}},
		{1, file + ": target exists", []string{"cp", k.path() + "/point.json", file}},
		{1, "no such file", []string{"cp", k.path() + "/point.json", dir + "/no/such/dir"}},
		{1, "no such file", []string{"restore", k.path(), "--onto", dir + "/new", "--disk", "disk0"}},
		{1, "directory", []string{"restore", k.path(), "--onto", taken, "--disk", "disk0"}},
		{1, "/dev/null is neither", []string{"restore", k.path(), "--onto", "/dev/null", "--disk", "disk0"}},
		{1, small + " has 1048576 bytes", []string{"restore", k.path(), "--onto", small, "--disk", "disk0"}},
		{64, "--to or --onto", []string{"restore", k.path()}},
		{64, "exclude each other", []string{"restore", k.path(), "--to", dir + "/new", "--onto", file, "--disk", "disk0"}},
		{64, "needs --disk", []string{"restore", k.path(), "--onto", file}},
		{64, "takes no --format", []string{"restore", k.path(), "--onto", file, "--disk", "disk0", "--format", "raw"}},
		{64, `unknown value "vdi"`, []string{"restore", k.path(), "--to", dir + "/new", "--format", "vdi"}},
		{64, "too few arguments", []string{"restore", "--to", dir + "/new"}},
		{64, "unknown flag --too", []string{"restore", k.path(), "--too", dir + "/new"}},
		{64, "needs a value", []string{"restore", k.path(), "--to"}},
		{64, "too few arguments", []string{"backup"}},
		{64, "takes no value", []string{"backup", "--full=yes", k.copy}},
		{64, "would both be VM", []string{"backup", k.copy, dir + "/../" + filepath.Base(filepath.Dir(k.copy)) + "/copy.raw"}},
		{64, "cannot be the name of a VM", []string{"backup", "--vm", "a/b", k.copy}},
		{64, "cannot be the name of a VM", []string{"backup", "--vm", "..", k.copy}},
		{64, "unknown command", []string{"restor", k.path()}},
		{64, "is not a directory", []string{"cp", k.path() + "/point.json", two.path() + "/point.json", dir + "/new"}},
	} {
		r.wants(t, c.code, c.says, c.args...)
	}
	if after := contents(t, dir); !slices.Equal(before, after) {
		t.Errorf("changed to\n%s", strings.Join(after, "\n"))
	}
	r.reads(t, k)
	if n := len(r.points(t)); n != 2 {
		t.Errorf("%d points", n)
	}
}

// TestBadMountPoint: a mount point must be an empty directory.
func TestBadMountPoint(t *testing.T) {
	needs(t, "fuse")
	t.Parallel()
	r, k := newKept(t)
	dir := newDir(t)
	full := mkdir(t, dir+"/full")
	file := write(t, full+"/file", "mine")
	empty := mkdir(t, dir+"/empty")
	for _, background := range []string{"", "--background"} {
		args := func(dir string) []string {
			return slices.DeleteFunc([]string{"mount", dir, background}, func(s string) bool { return s == "" })
		}
		r.wants(t, 1, full+" is not empty", args(full)...)
		r.wants(t, 1, "not a directory", args(file)...)
		r.wants(t, 1, "no such file", args(dir+"/missing")...)
	}
	r.wants(t, 1, "no holdfast mount", "umount", empty)
	r.wants(t, 1, "no holdfast mount", "umount", "/proc")
	r.wants(t, 1, "no such file", "umount", dir+"/missing")
	m := r.mountAt(t, empty)
	r.wants(t, 1, "is a holdfast mount already", "mount", empty)
	r.wants(t, 1, "is a holdfast mount already", "mount", empty, "--background")
	tool(t, "cmp", k.copy, empty+"/kept/latest/disk0.raw")
	if err := os.WriteFile(empty+"/kept/new", nil, 0o600); err == nil {
		t.Error("the mount can be written")
	}
	m.stop(t, terminate)
	if b, err := os.ReadFile(file); err != nil || string(b) != "mine" {
		t.Errorf("%q, %v", b, err)
	}
}
