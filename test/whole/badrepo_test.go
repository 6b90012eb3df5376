package whole

import (
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/zeebo/blake3"
)

// commands is one call of each command that opens a repository; @ is a scratch
// directory of its own. Each works on what newKept makes.
var commands = [][]string{
	{"backup", "@/disk.raw"},
	{"points"},
	{"show", "kept/latest"},
	{"ls"},
	{"cp", "kept/latest/point.json", "@/out"},
	{"restore", "kept/latest", "--to", "@/out"},
	{"mount", "@/mnt"},
	{"mount", "@/mnt", "--background"},
	{"verify", "--read-data"},
	{"stats"},
	{"key", "list"},
	{"key", "recovery"},
}

// refused wants every command to end with that code and text, and to make nothing.
func (r *repository) refused(t *testing.T, code int, says string) {
	t.Helper()
	var before []string
	if _, err := os.Stat(r.dir); err == nil {
		before = contents(t, r.dir)
	}
	for _, words := range commands {
		dir := newDir(t)
		newText(t, dir+"/disk.raw", 7, 100_000)
		mkdir(t, dir+"/mnt")
		args := slices.Clone(words)
		for i := range args {
			args[i] = strings.Replace(args[i], "@", dir, 1)
		}
		r.wants(t, code, says, args...)
		gone(t, dir+"/out")
		if mountKind(t, dir+"/mnt") != "" {
			t.Errorf("%q left a mount", args)
			detach(dir + "/mnt")
		}
	}
	if before == nil {
		gone(t, r.dir)
	} else if after := contents(t, r.dir); !slices.Equal(before, after) {
		t.Errorf("the repository changed from\n%s\nto\n%s", strings.Join(before, "\n"), strings.Join(after, "\n"))
	}
}

// TestNoRepository: whatever is no repository is exit 10 and stays as it is.
func TestNoRepository(t *testing.T) {
	needs(t, "fuse")
	t.Parallel()
	dir := newDir(t)
	other := mkdir(t, dir+"/other")
	write(t, other+"/config.txt", "of something else")
	mkdir(t, other+"/points")
	restic := mkdir(t, dir+"/restic") // another program's, with a file of the same name
	write(t, restic+"/config", strings.Repeat("\x17 encrypted ", 20))
	mkdir(t, restic+"/data")
	for _, c := range []struct {
		dir  string
		code int
		says string
	}{
		{dir + "/missing", 10, dir + "/missing: not a holdfast repository"},
		{mkdir(t, dir+"/empty"), 10, dir + "/empty: store: not a holdfast repository"},
		{other, 10, other + ": store: not a holdfast repository"},
		{write(t, dir+"/file", "x"), 10, dir + "/file: not a holdfast repository"},
		{restic, 10, restic + ": store: not a holdfast repository"},
	} {
		r := &repository{dir: c.dir, password: "x"}
		r.refused(t, c.code, c.says)
	}
}

// TestInitRefuses: init touches nothing that is there.
func TestInitRefuses(t *testing.T) {
	needs(t)
	t.Parallel()
	r, k := newKept(t)
	dir := newDir(t)
	other := mkdir(t, dir+"/other")
	write(t, other+"/notes.txt", "important")
	file := write(t, dir+"/file", "x")
	before := contents(t, dir)
	r.wants(t, 1, "not empty: \"notes.txt\" already exists", "init", other)
	r.wants(t, 1, file+" already exists", "init", file)
	r.wants(t, 1, "is no directory", "init", file+"/repo")
	r.wants(t, 1, "a repository already exists in "+r.dir, "init", r.dir)
	r.wants(t, 64, "no such chunk size", "init", dir+"/new", "--chunk-size", "100K")
	r.wants(t, 64, "too many arguments", "init", dir+"/new", dir+"/newer")
	(&repository{}).wants(t, 12, "no password", "init", dir+"/new")
	if after := contents(t, dir); !slices.Equal(before, after) {
		t.Errorf("init left\n%s", strings.Join(after, "\n"))
	}
	// A repository without its first config is one all the same.
	if err := os.Rename(r.dir+"/config", dir+"/config"); err != nil {
		t.Fatal(err)
	}
	r.wants(t, 1, "already exists", "init", r.dir)
	r.intact(t, k)
	locked := mkdir(t, dir+"/locked")
	r.unprivileged(t)
	r.wants(t, 1, locked+"/repo: permission denied", "init", locked+"/repo")
}

// TestWrongPassphrase: exit 12 for every command, nothing touched, and the right
// one works afterwards.
func TestWrongPassphrase(t *testing.T) {
	needs(t, "fuse")
	t.Parallel()
	r, k := newKept(t)
	for _, wrong := range []string{"incorrect horse", "correct horse ", strings.Repeat("x", 10_000)} {
		(&repository{dir: r.dir, password: wrong}).refused(t, 12, "wrong passphrase")
	}
	(&repository{dir: r.dir}).refused(t, 12, "no password given")
	// Also of a process that would be a client of another.
	m := r.mount(t)
	(&repository{dir: r.dir, password: "incorrect horse"}).wants(t, 12, "wrong passphrase", "points")
	r.intact(t, k)
	m.stop(t, terminate)
}

// rewriteConfig changes both copies of the config and makes their sums right; see store/doc.go.
func (r *repository) rewriteConfig(t *testing.T, change func(json string) string) {
	t.Helper()
	for _, name := range []string{"config", "config.copy"} {
		b, err := os.ReadFile(filepath.Join(r.dir, name))
		if err != nil {
			t.Fatal(err)
		}
		body, _, ok := strings.Cut(string(b), "\nblake3 ")
		if !ok {
			t.Fatal("no sum in the config")
		}
		changed := change(body)
		if changed == body {
			t.Fatalf("nothing to change in %s", body)
		}
		sum := blake3.Sum256([]byte(changed))
		write(t, filepath.Join(r.dir, name), changed+"\nblake3 "+hex.EncodeToString(sum[:])+"\n")
	}
}

// TestNewerFormat: exit 1, and neither damage nor a wrong passphrase.
func TestNewerFormat(t *testing.T) {
	needs(t, "fuse")
	t.Parallel()
	r, k := newKept(t)
	r.rewriteConfig(t, func(s string) string {
		return strings.NewReplacer(`"version": 1`, `"version": 2`, `"cipher": "aes-256-gcm"`, `"cipher": {"name": "better"}`).Replace(s)
	})
	r.refused(t, 1, "newer than this program: version 2")
	r.wants(t, 1, "already exists", "init", r.dir)
	r.rewriteConfig(t, func(s string) string {
		return strings.NewReplacer(`"version": 2`, `"version": 1`, `{"name": "better"}`, `"aes-256-gcm"`).Replace(s)
	})
	r.intact(t, k)
	// What the passphrase protects cannot be changed without it.
	r.rewriteConfig(t, func(s string) string { return strings.Replace(s, `"chunk_size": 131072`, `"chunk_size": 262144`, 1) })
	r.refused(t, 12, "wrong passphrase")
}

// TestConfigLost: one copy of the config is enough, and the next backup mends the
// other; without both it is damage.
func TestConfigLost(t *testing.T) {
	needs(t, "fuse")
	t.Parallel()
	r, k := newKept(t)
	both := []string{filepath.Join(r.dir, "config"), filepath.Join(r.dir, "config.copy")}
	good, err := os.ReadFile(both[0])
	if err != nil {
		t.Fatal(err)
	}
	all := []kept{k}
	for i, file := range both {
		for _, text := range []string{"", "garbage", string(good[:len(good)/2]), strings.Replace(string(good), "aes", "aEs", 1)} {
			write(t, file, text)
			r.intact(t, all...)
			if res := r.wants(t, 4, "damage found", "verify"); !strings.Contains(res.out, filepath.Base(file)+":") {
				t.Errorf("verify does not name %s: %s", file, res.out)
			}
		}
		all = append(all, kept{copy: k.copy})
		res := r.must(t, "backup", "--json", "--vm", fmt.Sprint("mends", i), k.copy)
		all[len(all)-1].point = summaryOf(res.out)[0]
		if b, err := os.ReadFile(file); err != nil || string(b) != string(good) {
			t.Errorf("%s was not mended", file)
		}
		r.must(t, "verify", "--read-data")
	}
	write(t, both[0], "garbage")
	write(t, both[1], string(good[:100]))
	r.refused(t, 4, "damaged")
	write(t, both[1], string(good))
	r.intact(t, all...)
}

// TestReadOnlyRepository: where nothing can be written all that reads works, and
// a backup says why it does not.
func TestReadOnlyRepository(t *testing.T) {
	needs(t, "root", "fuse")
	t.Parallel()
	r, k := newKept(t)
	writable := *r
	reader := func(t *testing.T, r *repository) {
		src := newText(t, newDir(t)+"/new.raw", 3, 1<<20).file
		for _, during := range []string{"alone", "beside a writer"} {
			t.Run(during, func(t *testing.T) {
				if during != "alone" {
					owner := writable.mount(t)
					defer owner.stop(t, terminate)
				}
				before := contents(t, r.dir)
				r.intact(t, k)
				r.must(t, "show", "kept/latest")
				r.must(t, "stats")
				r.must(t, "verify", "--read-data")
				if out := r.must(t, "ls", "kept/latest").out; !strings.Contains(out, "disk0.raw") {
					t.Errorf("ls: %s", out)
				}
				m := r.mount(t)
				tool(t, "cmp", k.copy, m.dir+"/kept/latest/disk0.raw")
				r.intact(t, k)
				r.wants(t, 1, "repository is not writable", "backup", src)
				m.stop(t, terminate)
				r.wants(t, 1, "repository is not writable", "backup", src)
				r.wants(t, 1, "already exists", "init", r.dir)
				if after := contents(t, r.dir); during == "alone" && !slices.Equal(before, after) {
					t.Errorf("changed to\n%s", strings.Join(after, "\n"))
				}
			})
		}
	}
	t.Run("read-only mount", func(t *testing.T) {
		at, _ := kernelMount(t, "--bind", r.dir)
		tool(t, "mount", "-o", "remount,bind,ro", at)
		reader(t, &repository{dir: at, password: r.password})
		// As after a crash on another host: the index is not up to date.
		if err := os.RemoveAll(r.dir + "/index"); err != nil {
			t.Fatal(err)
		}
		reader(t, &repository{dir: at, password: r.password})
	})
	t.Run("of another user", func(t *testing.T) {
		tool(t, "chmod", "-R", "a+rX", r.dir)
		other := &repository{dir: r.dir, password: r.password,
			as: []string{"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"}}
		other.intact(t, k)
		other.must(t, "verify", "--read-data")
		other.wants(t, 1, "repository is not writable", "backup", k.copy)
		r.intact(t, k)
	})
	t.Run("before a writer", func(t *testing.T) {
		at, _ := kernelMount(t, "--bind", r.dir)
		tool(t, "mount", "-o", "remount,bind,ro", at)
		m := (&repository{dir: at, password: r.password}).mount(t)
		tool(t, "cmp", k.copy, m.dir+"/kept/latest/disk0.raw")
		later := r.keep(t, "later", newText(t, newDir(t)+"/later.raw", 8, 1<<20).file)
		tool(t, "cmp", k.copy, m.dir+"/kept/latest/disk0.raw")
		// It sees what comes and goes, and reads what a collection has moved.
		until(t, "the new point", func() bool { return names(t, m.dir) == "kept later" })
		tool(t, "cmp", later.copy, m.dir+"/later/latest/disk0.raw")
		dir := newDir(t)
		random := newRaw(t, dir+"/moved.raw", 8*mib, piece{0, 8 * mib}).file
		gone := r.keep(t, "gone", random)
		tool(t, "truncate", "-s", "1M", random)
		moved := r.keep(t, "moved", random) // an eighth of a pack
		until(t, "the point to be moved", func() bool { return names(t, m.dir) == "gone kept later moved" })
		tool(t, "head", "-c", "4096", m.dir+"/moved/latest/disk0.raw")
		r.must(t, "forget", "--force", gone.ID)
		if res := r.must(t, "gc"); !strings.Contains(res.out, "1 packs removed") {
			t.Errorf("gc: %s", res.out)
		}
		tool(t, "cmp", moved.copy, m.dir+"/moved/latest/disk0.raw")
		until(t, "the point to go", func() bool { return names(t, m.dir) == "kept later moved" })
		m.stop(t, terminate)
		r.intact(t, k, later, moved)
	})
	t.Run("init", func(t *testing.T) {
		at, _ := kernelMount(t, "-t", "tmpfs", "-o", "ro,size=1m", "none")
		r.wants(t, 1, at+"/repo: read-only file system", "init", at+"/repo")
		r.wants(t, 1, syscall.EROFS.Error(), "init", at)
	})
}
