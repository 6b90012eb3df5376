package extract_test

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/backup/imagefile"
	"github.com/holdfast-backup/holdfast/fs"
	"github.com/holdfast-backup/holdfast/fs/extract"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
)

// treeOf backs an image up and gives the tree of the repository.
func treeOf(t *testing.T, image string) *fs.Tree {
	t.Helper()
	key := func() ([]byte, error) { return []byte("x"), nil }
	b := bucket.NewMemory()
	if err := store.Init(t.Context(), b, store.InitOptions{Passphrase: []byte("x")}, time.Now()); err != nil {
		t.Fatal(err)
	}
	r, err := store.Open(t.Context(), b, store.MemoryIndex(), store.OpenOptions{Passphrase: key})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	snap, err := imagefile.New(imagefile.VM{Name: "vm", Files: []string{image}}).Freeze(t.Context(), "vm")
	if err != nil {
		t.Fatal(err)
	}
	defer snap.Close()
	if _, err := backup.Run(t.Context(), r, snap, backup.Options{}); err != nil {
		t.Fatal(err)
	}
	return fs.New(r)
}

// filled makes an image of ext4 with a demanding tree.
func filled(t *testing.T) string {
	t.Helper()
	image := guesttest.Sparse(t, 2<<30)
	guesttest.Run(t, "mkfs.ext4", "-q", "-O", "ea_inode", image)
	dir, unmount := guesttest.Mount(t, image, "ext4", "rw")
	if _, err := guesttest.Fill(dir, guesttest.Tree{Seed: 5, Files: 1500, Big: 24 << 20, Names: 800}); err != nil {
		t.Fatal(err)
	}
	unmount()
	return image
}

// target makes a mounted file system to copy to, one that refuses nothing of what ext4 has.
func target(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	guesttest.Run(t, "mount", "-t", "tmpfs", "-o", "noatime,size=1g", "tmpfs", dir)
	t.Cleanup(func() { guesttest.Run(t, "umount", dir) })
	return dir
}

// backedUp is a backup of a file system and what the kernel's own mount of it shows.
type backedUp struct {
	image string
	want  []guesttest.Line
	tree  *fs.Tree
}

// TestAgainstKernel copies a whole file system in all ways and compares with the kernel's own mount of it.
func TestAgainstKernel(t *testing.T) {
	guesttest.Needs(t, "mkfs.ext4", "mount", "rsync", "bsdtar", "tar", "unzip")
	image := filled(t)
	g := &backedUp{image, guesttest.Truth(t, image, "ext4", ""), treeOf(t, image)}
	t.Run("dir", g.dir)
	t.Run("stopped", g.stopped)
	t.Run("others", g.others)
	t.Run("tar", g.tar)
	t.Run("zip", g.zip)
}

func source(t *testing.T, tree *fs.Tree, name, path string) extract.Source {
	t.Helper()
	n, err := tree.Walk(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	return extract.Source{Name: name, Node: n}
}

// ofCopies are fields that a copy cannot have like the original: times that the kernel alone sets, and how much is
// allocated, which sameHoles looks at.
var ofCopies = []string{"ctime", "btime", "blocks"}

func sameTree(t *testing.T, want []guesttest.Line, dir string, ignore ...string) {
	t.Helper()
	got, err := guesttest.Walk(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, lines := range [][]guesttest.Line{want, got} {
		for _, l := range lines {
			if l.Fields["type"] == "d" {
				// How large a directory is, is up to the file system; what is in it is compared by itself.
				delete(l.Fields, "size")
				delete(l.Fields, "nlink")
			}
		}
	}
	guesttest.Same(t, want, got, append(ignore, ofCopies...)...)
}

// dir copies to a directory, twice.
func (g *backedUp) dir(t *testing.T) {
	dest := target(t)
	copyAll := func(ctx context.Context) (extract.Result, error) {
		return extract.ToDir(ctx, dest, []extract.Source{source(t, g.tree, "copy", "vm/latest/files/disk0")}, extract.Options{
			Report: func(i extract.Item) {
				if i.Err != nil {
					t.Errorf("%s: %v", i.Path, i.Err)
				}
			},
		})
	}
	r, err := copyAll(t.Context())
	if err != nil || r.Failed != 0 || len(r.Lost) != 0 || r.There != 0 {
		t.Fatalf("%+v, %v", r, err)
	}
	t.Logf("%+v", r)
	sameTree(t, g.want, dest+"/copy")
	dir, unmount := guesttest.Mount(t, guesttest.Copy(t, g.image), "ext4", "ro,noload,noatime")
	defer unmount()
	for _, name := range []string{"sparse/14 TiB", "sparse/600 extents", "sparse/all", "allocated/punched", "sparse/tail"} {
		var a, b unix.Stat_t
		if err := errors.Join(unix.Stat(dir+"/"+name, &a), unix.Stat(dest+"/copy/"+name, &b)); err != nil {
			t.Error(err)
		}
		if b.Blocks > a.Blocks+64 {
			t.Errorf("%s: %d blocks, of %d", name, b.Blocks, a.Blocks)
		}
	}
	if diff := guesttest.Run(t, "rsync", "-aHAXn", "--itemize-changes", "--exclude=/lost+found", "--exclude=/sparse/14*", "--delete", dir+"/", dest+"/copy/"); diff != "" {
		t.Errorf("rsync sees: %s", diff)
	}

	// Again: all is there.
	again, err := copyAll(t.Context())
	if err != nil || again.There != again.Things() || again.Things() != r.Things() {
		t.Fatalf("again: %+v, %v", again, err)
	}
	sameTree(t, g.want, dest+"/copy")
}

// stopped stops a copy at many places and goes on, until it is complete.
func (g *backedUp) stopped(t *testing.T) {
	dest := target(t)
	src := []extract.Source{source(t, g.tree, "copy", "vm/latest/files/disk0")}
	stops := 0
	for bytes := int64(100 << 10); ; bytes = bytes*3 + 77777 {
		ctx, cancel := context.WithCancel(t.Context())
		var done atomic.Int64
		var there atomic.Int64
		r, err := extract.ToDir(ctx, dest, src, extract.Options{
			Done: func(n int64) {
				if n < 2<<30 && done.Add(n) > bytes {
					cancel()
				}
			},
			Report: func(i extract.Item) {
				if i.There {
					there.Add(1)
				}
				if i.Err != nil {
					t.Errorf("%s: %v", i.Path, i.Err)
				}
			},
		})
		cancel()
		if names := guesttest.Run(t, "find", dest, "-name", ".holdfast-*"); names != "" {
			t.Fatalf("left: %s", names)
		}
		if err == nil {
			if there.Load() == 0 || r.Failed > 0 || stops == 0 {
				t.Errorf("%+v", r)
			}
			break
		}
		if !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		stops++
		// What a process that was killed leaves.
		for _, d := range []string{dest, dest + "/copy"} {
			if err := os.WriteFile(d+"/.holdfast-0badc0de-1.partial", []byte("x"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Log(stops, "stops")
	sameTree(t, g.want, dest+"/copy")
}

// others: what is there is left alone.
func (g *backedUp) others(t *testing.T) {
	dest := t.TempDir()
	outside := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(dest+"/c/links", 0o755))
	must(os.WriteFile(dest+"/c/links/file", []byte("not the same"), 0o644))
	must(os.Symlink(outside, dest+"/c/big"))
	must(os.Symlink(outside+"/passwd", dest+"/c/deep"))
	must(os.WriteFile(dest+"/c/owners", nil, 0o644))
	must(os.Mkdir(dest+"/c/special", 0o755))
	must(os.Symlink(outside+"/x", dest+"/c/special/fifo"))
	failed := map[string]error{}
	r, err := extract.ToDir(t.Context(), dest, []extract.Source{source(t, g.tree, "c", "vm/latest/files/disk0")}, extract.Options{
		Skip: func(_ fs.Dir, name string) bool { return name == "nested" || name == "many" || name == "xattrs" },
		Report: func(i extract.Item) {
			if i.Err != nil {
				failed[i.Path] = i.Err
			}
		},
	})
	must(err)
	// The first name of the linked file is refused, so the others are too: 61 names.
	links := 0
	for _, p := range slices.Sorted(maps.Keys(failed)) {
		if !errors.Is(failed[p], extract.ErrExists) {
			t.Errorf("%s: %v", p, failed[p])
		}
		if strings.HasPrefix(p, "c/links/") {
			links++
			delete(failed, p)
		}
	}
	if got := slices.Sorted(maps.Keys(failed)); !slices.Equal(got, []string{"c/big", "c/deep", "c/owners", "c/special/fifo"}) || r.Failed != int64(4+links) || links == 0 {
		t.Errorf("%q, %d links, %+v", got, links, r)
	}
	if b, _ := os.ReadFile(dest + "/c/links/file"); string(b) != "not the same" {
		t.Errorf("overwritten: %q", b)
	}
	if l, _ := os.ReadDir(outside); len(l) != 0 {
		t.Errorf("outside: %v", l)
	}
	if _, err := os.Stat(filepath.Join(dest, "c/special/socket")); err != nil {
		t.Error(err)
	}
}
