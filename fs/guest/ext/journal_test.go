package ext

import (
	"bytes"
	"cmp"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// dirty is a way to leave changes in a journal.
type dirty struct {
	variant
	options string // of the mount that makes the changes
	steps   int
}

func dirties() []dirty {
	tree := guesttest.Tree{Seed: 20, Files: 300, Names: 300, Big: 1 << 20, Fragments: 20}
	v := func(name string, mkfs ...string) variant {
		return variant{name: name, mkfs: mkfs, tree: tree, skips: append(append(append([]string{}, noLarge...), noExtents...), not1K...)}
	}
	return []dirty{
		{v("ext3", "-t", "ext3"), "data=ordered", 150},
		{v("ext4"), "data=ordered", 150},
		{v("data in the journal", "-b", "1024"), "data=journal", 100},
		{v("no checksums", "-O", "^metadata_csum"), "data=ordered", 100},
		{v("first checksums", "-O", "^metadata_csum"), "journal_checksum", 100},
		{v("first checksums, async", "-O", "^metadata_csum,^64bit"), "journal_async_commit,data=writeback", 100},
		{v("async", "-b", "1024"), "journal_async_commit,data=writeback", 100},
		{v("32 bits", "-b", "1024", "-O", "^64bit"), "data=ordered", 100},
		{v("fast_commit", "-O", "fast_commit"), "data=ordered", 150},
		{v("inline and ea_inode", "-O", "inline_data,ea_inode,metadata_csum_seed"), "data=ordered", 100},
		{v("bigalloc", "-b", "1024", "-O", "bigalloc", "-C", "8192"), "data=ordered", 100},
	}
}

// make makes an image, and a copy of it while changes are in its journal and not yet in their places.
func (d dirty) make(t *testing.T, burst func(dir string) error) string {
	t.Helper()
	image := d.variant.make(t)
	dir, unmount := guesttest.Mount(t, image, "ext4", "rw,commit=1000,"+d.options)
	if err := burst(dir); err != nil {
		t.Fatal(err)
	}
	copied := guesttest.Copy(t, image)
	unmount()
	return copied
}

func TestDirty(t *testing.T) {
	for i, d := range dirties() {
		if testing.Short() && i != 2 {
			continue
		}
		t.Run(d.name, func(t *testing.T) {
			t.Parallel()
			image := d.make(t, func(dir string) error { return guesttest.Burst(dir, 5, d.steps) })
			want := guesttest.Truth(t, image, "ext4", "")
			f := open(t, image, guest.Options{})
			guesttest.SameFS(t, want, f)
			if i := f.Info(); len(i.Warnings) > 0 || !i.Replayed {
				t.Error(i)
			}
			t.Log(len(want), f.Info(), "blocks replayed: ", f.dev.(*guest.Overlay).Len())
			replayed := guesttest.Copy(t, image)
			_, unmount := guesttest.Mount(t, replayed, "ext4", "rw")
			unmount()
			checkFree(t, f, replayed)
			stale, err := guesttest.WalkFS(open(t, image, guest.Options{NoReplay: true}))
			if n := len(guesttest.Diff(want, stale)); n < 20 && err == nil {
				t.Errorf("without replay, only %d differences", n)
			}
		})
	}
}

// TestOrphans copies a disk while a file is open that has no name any more. The kernel frees it after the replay; this package does not, which
// does no harm: what it says is free is free.
func TestOrphans(t *testing.T) {
	for _, mkfs := range [][]string{{"-b", "4096"}, {"-b", "4096", "-O", "orphan_file"}} {
		v := variant{mkfs: mkfs, tree: guesttest.Tree{Seed: 3, Files: 20, Names: 20, Big: 1 << 20, Fragments: 20}, skips: noLarge}
		image := v.make(t)
		dir, unmount := guesttest.Mount(t, image, "ext4", "rw,commit=1000")
		held, err := os.Create(dir + "/held")
		if err == nil {
			_, err = held.Write(make([]byte, 5<<20))
			err = cmp.Or(err, held.Sync(), os.Remove(dir+"/held"), guesttest.Burst(dir, 8, 30))
		}
		if err != nil {
			t.Fatal(err)
		}
		copied := guesttest.Copy(t, image)
		held.Close()
		unmount()

		want := guesttest.Truth(t, copied, "ext4", "")
		f := open(t, copied, guest.Options{})
		guesttest.SameFS(t, want, f)
		replayed := guesttest.Copy(t, copied)
		_, unmount = guesttest.Mount(t, replayed, "ext4", "rw")
		unmount()
		free, all := collect(t, f.Free()), freeByDumpe2fs(t, replayed, f.blockSize, f.info.Block)
		if got := extent.Total(extent.Normalise(append(slices.Clone(all), free...))); got != extent.Total(all) {
			t.Error("what is not free is said to be")
		}
		if d := extent.Total(all) - extent.Total(free); d < 5<<20 {
			t.Errorf("only %d bytes are held", d)
		}
	}
}

// fastTests are what is done to a directory that exists, before one last file is made durable by a fast commit.
var fastTests = []struct {
	name   string
	change func(d string) error
	full   bool // Linux 6.18 makes a full commit of it
}{
	{"create", func(d string) error {
		for i := range 100 {
			if err := os.WriteFile(fmt.Sprintf("%s/a longer name %d", d, i), bytes.Repeat([]byte{1}, i*100), 0o600); err != nil {
				return err
			}
		}
		return nil
	}, false},
	{"mkdir", func(d string) error {
		return cmp.Or(os.Mkdir(d+"/sub", 0o750), os.WriteFile(d+"/sub/x", []byte("x"), 0o600), os.Mkdir(d+"/sub/deeper", 0o700))
	}, false},
	{"rmdir", func(d string) error { return os.Remove(d + "/empty") }, false},
	{"symlink", func(d string) error {
		return cmp.Or(os.Symlink("short", d+"/short"), os.Symlink(strings.Repeat("long/", 50), d+"/long"))
	}, true},
	{"mknod", func(d string) error {
		return cmp.Or(unix.Mknod(d+"/dev", unix.S_IFCHR|0o600, 0x103), unix.Mkfifo(d+"/fifo", 0o600))
	}, true},
	{"rename", func(d string) error {
		return cmp.Or(os.Rename(d+"/f1", d+"/g1"), os.Rename(d+"/f2", d+"/f3"), os.Rename(d+"/f4", d+"/other/f4"))
	}, false},
	{"unlink", func(d string) error { return cmp.Or(os.Remove(d+"/f1"), os.Remove(d+"/l2"), os.Remove(d+"/big")) }, false},
	{"link", func(d string) error { return cmp.Or(os.Link(d+"/f1", d+"/l1"), os.Link(d+"/f1", d+"/other/l1")) }, false},
	{"reuse", func(d string) error {
		return cmp.Or(os.Remove(d+"/f1"), os.WriteFile(d+"/f1", []byte("again"), 0o600), os.Remove(d+"/f1"), os.WriteFile(d+"/f1", []byte("and again"), 0o600))
	}, false},
	{"truncate", func(d string) error { return cmp.Or(os.Truncate(d+"/big", 70000), os.Truncate(d+"/f3", 100000)) }, false},
	{"punch", func(d string) error {
		return inFile(d+"/big", func(w *os.File) error {
			return unix.Fallocate(int(w.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 8192, 500000)
		})
	}, false},
	{"unwritten", func(d string) error {
		return inFile(d+"/f3", func(w *os.File) error {
			_, err := w.WriteAt([]byte("here"), 40000)
			return cmp.Or(unix.Fallocate(int(w.Fd()), 0, 10000, 1<<20), err)
		})
	}, false},
	{"fragments", func(d string) error {
		return inFile(d+"/f3", func(w *os.File) error {
			for i := range int64(900) {
				if _, err := w.WriteAt([]byte("here"), i*20000); err != nil {
					return err
				}
			}
			return nil
		})
	}, false},
	{"overwrite", func(d string) error { return os.WriteFile(d+"/f3", bytes.Repeat([]byte("new"), 30000), 0o600) }, false},
	{"commits", func(d string) error {
		for i := range 50 {
			err := cmp.Or(os.WriteFile(fmt.Sprint(d, "/new ", i), []byte("new"), 0o600), os.Rename(fmt.Sprint(d, "/new ", i), fmt.Sprint(d, "/newer ", i/2)),
				inFile(d+"/f3", func(w *os.File) error { _, err := w.WriteAt(make([]byte, i), int64(i)*5000); return err }))
			if err != nil {
				return err
			}
		}
		return nil
	}, false},
	{"owner", func(d string) error { return cmp.Or(os.Chown(d+"/f3", 70000, 5), os.Chmod(d+"/f2", 0o4755)) }, false},
}

func inFile(p string, fn func(w *os.File) error) error {
	w, err := os.OpenFile(p, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return cmp.Or(fn(w), w.Sync(), w.Close())
}

// fastImage makes an image with changes in fast commits.
func fastImage(t *testing.T, change func(d string) error, mkfs ...string) string {
	t.Helper()
	guesttest.Needs(t, "mkfs.ext4", "mount")
	image := guesttest.Sparse(t, 128<<20)
	guesttest.Run(t, append(append([]string{"mkfs.ext4", "-q", "-F", "-O", "fast_commit"}, mkfs...), image)...)
	dir, unmount := guesttest.Mount(t, image, "ext4", "rw,commit=1000")
	d := dir + "/d"
	sync := func(name string, n int) error {
		return cmp.Or(os.WriteFile(d+"/"+name, bytes.Repeat([]byte{5}, n), 0o600), inFile(d+"/"+name, func(*os.File) error { return nil }))
	}
	err := cmp.Or(os.Mkdir(d, 0o755), os.Mkdir(d+"/other", 0o755), os.Mkdir(d+"/empty", 0o755), sync("f1", 10), sync("f2", 10000), sync("f3", 20000), sync("f4", 4096), sync("big", 3<<20),
		os.Link(d+"/f2", d+"/l2"))
	if err != nil {
		t.Fatal(err)
	}
	guesttest.Run(t, "sync", "-f", dir)
	if err := cmp.Or(sync("one fast commit", 100), change(d), sync("last", 100)); err != nil {
		t.Fatal(err)
	}
	copied := guesttest.Copy(t, image)
	unmount()
	return copied
}

// forget takes what Linux makes anew while it replays a fast commit, and no record tells, out of the lines of directories: the times are those of
// the replay, and the size and blocks depend on where it finds room for names.
func forget(list []guesttest.Line) []guesttest.Line {
	for _, l := range list {
		if l.Fields["type"] == "d" {
			for _, f := range []string{"mtime", "ctime", "size", "blocks"} {
				delete(l.Fields, f)
			}
		}
	}
	return list
}

func TestFastCommits(t *testing.T) {
	for i, mkfs := range [][]string{{"-b", "1024"}, {"-b", "4096", "-O", "inline_data"}} {
		if testing.Short() && i > 0 {
			break
		}
		for _, test := range fastTests {
			t.Run(test.name+mkfs[1], func(t *testing.T) {
				image := fastImage(t, test.change, mkfs...)
				want := forget(guesttest.Truth(t, image, "ext4", ""))
				f := open(t, image, guest.Options{})
				got, err := guesttest.WalkFS(f)
				if err != nil {
					t.Fatal(err)
				}
				guesttest.Same(t, want, forget(got))
				if i := f.Info(); len(i.Warnings) > 0 || !i.Replayed || (f.fast == nil) != test.full {
					t.Error(i, f.fast)
				}
				for _, l := range want {
					if ino, err := guesttest.Find(f, l.Path); err != nil {
						t.Error(ino, err)
					}
				}
			})
		}
	}
}
