package btrfs

import (
	"bytes"
	"cmp"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// copied checks a copy of an image that was mounted: what the reader shows is what the kernel shows when it has replayed
// the log. It gives how much differs without the log.
func copied(t *testing.T, image string) int {
	t.Helper()
	start := time.Now()
	want := truth(t, image)
	fs := open(t, image, guest.Options{})
	got, err := guesttest.WalkFS(fs)
	if err != nil {
		t.Fatal(err)
	}
	forget(start, want, got)
	guesttest.Same(t, want, got)
	if i := fs.Info(); len(i.Warnings) > 0 {
		t.Errorf("%+v", i)
	}
	for _, l := range want {
		if _, err := guesttest.Find(fs, l.Path); err != nil {
			t.Error(err)
		}
	}
	stale, err := guesttest.WalkFS(open(t, image, guest.Options{NoReplay: true}))
	if err != nil {
		t.Fatal(err)
	}
	return len(guesttest.Diff(want, stale, "ctime")) // of which some are forgotten
}

// forget takes the times out of both that the kernel made up while it replayed the log: of inodes that lost a name.
func forget(start time.Time, want, got []guesttest.Line) {
	made := map[string]bool{}
	for _, l := range want {
		sec, _, _ := strings.Cut(l.Fields["ctime"], ".")
		if n, err := strconv.ParseInt(sec, 10, 64); err == nil && l.Fields["type"] != "d" && n >= start.Unix() && l.Fields["mtime"] != l.Fields["ctime"] {
			made[l.Path] = true
			delete(l.Fields, "ctime")
		}
	}
	for _, l := range got {
		if made[l.Path] {
			delete(l.Fields, "ctime")
		}
	}
}

func TestDirty(t *testing.T) {
	guesttest.Needs(t, "mkfs.btrfs", "mount")
	for _, test := range []struct {
		name, mount string
		mkfs        []string
	}{
		{"default", "", nil},
		{"holes", "", []string{"-O", "^no-holes", "-n", "4096", "--csum", "sha256"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			image := guesttest.Sparse(t, 1<<30)
			guesttest.Run(t, append(append([]string{"mkfs.btrfs", "-q"}, test.mkfs...), image)...)
			dir, unmount := guesttest.Mount(t, image, "btrfs", "rw,nobarrier,commit=1000"+test.mount)
			if _, err := guesttest.Fill(dir, guesttest.Tree{Seed: 1, Files: 50, Names: 50, Big: 1 << 16, NoHuge: true}); err != nil {
				t.Fatal(err)
			}
			var copies []string
			for i := range 3 {
				if err := guesttest.Burst(dir, uint64(i), 20+i*80); err != nil {
					t.Fatal(err)
				}
				if i%3 == 0 { // without it, Burst makes most logs give way to a commit
					for j := range 20 {
						p := fmt.Sprintf("%s/burst/more %d", dir, j)
						if err := cmp.Or(os.WriteFile(p, bytes.Repeat([]byte{byte(i)}, j*1000), 0o600), fsync(p)); err != nil {
							t.Fatal(err)
						}
					}
				}
				copies = append(copies, guesttest.Copy(t, image))
			}
			unmount() // the kernel does not mount two of one id
			differ := 0
			for _, c := range copies {
				n := copied(t, c)
				t.Logf("without replay %d differences", n)
				differ += n
			}
			if differ < 20 {
				t.Errorf("without replay, only %d differences", differ)
			}
		})
	}
}

func fsync(p string) error {
	f, err := os.Open(p)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

func inFile(p string, fn func(w *os.File) error) error {
	w, err := os.OpenFile(p, os.O_RDWR|os.O_CREATE, 0o640)
	if err != nil {
		return err
	}
	defer w.Close()
	return cmp.Or(fn(w), w.Sync())
}

// logTests are what is done to a directory between a commit and the copy.
var logTests = []struct {
	name   string
	change func(d string) error
	synced string // what is made durable at last
}{
	{"create", func(d string) error {
		for i := range 100 {
			if err := os.WriteFile(fmt.Sprintf("%s/a longer name %d", d, i), bytes.Repeat([]byte{1}, i*100), 0o600); err != nil {
				return err
			}
		}
		return nil
	}, "/"},
	{"create, one synced", func(d string) error {
		return cmp.Or(os.WriteFile(d+"/x", []byte("x"), 0o600), os.WriteFile(d+"/y", bytes.Repeat([]byte("y"), 50000), 0o600))
	}, "/y"},
	{"mkdir", func(d string) error {
		return cmp.Or(os.Mkdir(d+"/sub", 0o750), os.WriteFile(d+"/sub/x", []byte("x"), 0o600), os.Mkdir(d+"/sub/deeper", 0o700), os.WriteFile(d+"/sub/deeper/y", []byte("y"), 0o600))
	}, "/"},
	{"mkdir, file synced", func(d string) error {
		return cmp.Or(os.Mkdir(d+"/sub", 0o750), os.WriteFile(d+"/sub/x", []byte("x"), 0o600), os.Mkdir(d+"/sub/deeper", 0o700), os.WriteFile(d+"/sub/deeper/y", []byte("y"), 0o600))
	}, "/sub/deeper/y"},
	{"mkdir, directory synced", func(d string) error {
		return cmp.Or(os.Mkdir(d+"/sub", 0o750), os.WriteFile(d+"/sub/x", []byte("x"), 0o600), os.Mkdir(d+"/sub/deeper", 0o700), os.WriteFile(d+"/sub/deeper/y", []byte("y"), 0o600))
	}, "/sub"},
	{"unlink", func(d string) error { return cmp.Or(os.Remove(d+"/f1"), os.Remove(d+"/l2"), os.Remove(d+"/big")) }, "/"},
	{"unlink of a link, file synced", func(d string) error { return os.Remove(d + "/l2") }, "/f2"},
	{"unlink of a link, directory synced", func(d string) error { return os.Remove(d + "/l2") }, "/"},
	{"rmdir", func(d string) error { return os.Remove(d + "/empty") }, "/"},
	{"rename", func(d string) error {
		return cmp.Or(os.Rename(d+"/f1", d+"/g1"), os.Rename(d+"/f2", d+"/f3"), os.Rename(d+"/f4", d+"/other/f4"))
	}, "/"},
	{"rename, file synced", func(d string) error { return os.Rename(d+"/f1", d+"/g1") }, "/g1"},
	{"rename elsewhere, file synced", func(d string) error { return os.Rename(d+"/f4", d+"/other/f4") }, "/other/f4"},
	{"rename elsewhere, there synced", func(d string) error { return os.Rename(d+"/f4", d+"/other/f4") }, "/other"},
	{"rename over", func(d string) error { return os.Rename(d+"/f2", d+"/f3") }, "/f3"},
	{"rename of a directory", func(d string) error { return os.Rename(d+"/other", d+"/another") }, "/"},
	{"rename of a directory, its file synced", func(d string) error {
		return cmp.Or(os.Rename(d+"/other", d+"/another"), os.WriteFile(d+"/another/new", []byte("new"), 0o600))
	}, "/another/new"},
	{"exchange", func(d string) error {
		return cmp.Or(os.Rename(d+"/f1", d+"/tmp"), os.Rename(d+"/f3", d+"/f1"), os.Rename(d+"/tmp", d+"/f3"))
	}, "/f3"},
	{"exchange at once", func(d string) error {
		return unix.Renameat2(unix.AT_FDCWD, d+"/f1", unix.AT_FDCWD, d+"/f3", unix.RENAME_EXCHANGE)
	}, "/f1"},
	{"link", func(d string) error { return cmp.Or(os.Link(d+"/f1", d+"/l1"), os.Link(d+"/f1", d+"/other/l1")) }, "/f1"},
	{"many links", func(d string) error {
		for i := range 300 {
			if err := os.Link(d+"/f1", fmt.Sprintf("%s/%d %s", d, i, strings.Repeat("long name ", 20))); err != nil {
				return err
			}
		}
		return os.Chmod(d+"/f1", 0o604)
	}, "/f1"},
	{"fewer of many links", func(d string) error {
		for i := range 60 {
			if err := os.Remove(fmt.Sprintf("%s/many/%d %s", d, i*3, strings.Repeat("long name ", 20))); err != nil {
				return err
			}
		}
		return os.Chmod(d+"/many/file", 0o604)
	}, "/many"},
	{"reuse of a name", func(d string) error {
		return cmp.Or(os.Remove(d+"/f1"), os.WriteFile(d+"/f1", []byte("again"), 0o600), os.Remove(d+"/f1"), os.WriteFile(d+"/f1", []byte("and again"), 0o600))
	}, "/f1"},
	{"reuse of a link's name", func(d string) error {
		return cmp.Or(os.Remove(d+"/l2"), os.WriteFile(d+"/l2", []byte("again"), 0o600))
	}, "/l2"},
	{"shorter", func(d string) error { return cmp.Or(os.Truncate(d+"/big", 70000)) }, "/big"},
	{"longer", func(d string) error { return cmp.Or(os.Truncate(d+"/f1", 100000)) }, "/f1"},
	{"punch", func(d string) error {
		return inFile(d+"/big", func(w *os.File) error {
			return unix.Fallocate(int(w.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 8192, 500000)
		})
	}, "/big"},
	{"unwritten", func(d string) error {
		return inFile(d+"/f3", func(w *os.File) error {
			_, err := w.WriteAt([]byte("here"), 40000)
			return cmp.Or(unix.Fallocate(int(w.Fd()), 0, 10000, 1<<20), err)
		})
	}, "/f3"},
	{"unwritten behind the end", func(d string) error {
		return inFile(d+"/f3", func(w *os.File) error { return unix.Fallocate(int(w.Fd()), unix.FALLOC_FL_KEEP_SIZE, 40000, 1<<20) })
	}, "/f3"},
	{"fragments", func(d string) error {
		return inFile(d+"/f3", func(w *os.File) error {
			for i := range int64(900) {
				if _, err := w.WriteAt([]byte("here"), i*20000); err != nil {
					return err
				}
			}
			return nil
		})
	}, "/f3"},
	{"overwrite in the middle", func(d string) error {
		return inFile(d+"/big", func(w *os.File) error {
			_, err := w.WriteAt(bytes.Repeat([]byte("middle"), 3000), 100000)
			return err
		})
	}, "/big"},
	{"append, twice", func(d string) error {
		for range 2 {
			err := inFile(d+"/f1", func(w *os.File) error {
				_, err := w.Seek(0, 2)
				_, err2 := w.Write(bytes.Repeat([]byte("more"), 3000))
				return cmp.Or(err, err2)
			})
			if err != nil {
				return err
			}
		}
		return nil
	}, "/f1"},
	{"overwrite", func(d string) error { return os.WriteFile(d+"/f3", bytes.Repeat([]byte("new"), 30000), 0o600) }, "/f3"},
	{"xattrs", func(d string) error {
		return cmp.Or(unix.Setxattr(d+"/f1", "user.new", []byte("1"), 0), unix.Setxattr(d+"/x", "user.b", []byte("other"), 0), unix.Removexattr(d+"/x", "user.a"),
			unix.Setxattr(d+"/other", "user.d", []byte("1"), 0), fsync(d+"/f1"), fsync(d+"/other"))
	}, "/x"},
	{"owner", func(d string) error { return cmp.Or(os.Chown(d+"/f3", 70000, 5), os.Chmod(d+"/f3", 0o4755)) }, "/f3"},
	{"no checksums", func(d string) error { return os.WriteFile(d+"/nocow/new", bytes.Repeat([]byte("new"), 30000), 0o600) }, "/nocow/new"},
	{"special", func(d string) error {
		return cmp.Or(unix.Mknod(d+"/dev", unix.S_IFCHR|0o600, 0x103), unix.Mkfifo(d+"/fifo", 0o600), os.Symlink("target", d+"/symlink"), os.Symlink(strings.Repeat("t", 2000), d+"/long"))
	}, "/"},
	{"without a name", func(d string) error {
		w, err := os.OpenFile(d, unix.O_TMPFILE|os.O_RDWR, 0o600)
		if err != nil {
			return err
		}
		defer w.Close()
		_, err = w.WriteString("lost")
		return cmp.Or(err, w.Sync(), os.WriteFile(d+"/kept", []byte("kept"), 0o600))
	}, "/kept"},
	{"unlinked while open", func(d string) error {
		w, err := os.OpenFile(d+"/f3", os.O_RDWR, 0o600)
		if err != nil {
			return err
		}
		defer w.Close()
		_, err = w.WriteString("lost")
		return cmp.Or(err, os.Remove(d+"/f3"), w.Sync(), os.WriteFile(d+"/kept", []byte("kept"), 0o600))
	}, "/kept"},
	{"many names, some gone", func(d string) error {
		for i := range 60 {
			if err := os.Remove(fmt.Sprintf("%s/many/name %d", d, i*3)); err != nil {
				return err
			}
			if err := os.WriteFile(fmt.Sprintf("%s/many/new %d", d, i), nil, 0o600); err != nil {
				return err
			}
		}
		return nil
	}, "/many"},
	{"subvolume", func(d string) error {
		return cmp.Or(os.WriteFile(d+"/subvolume/a", bytes.Repeat([]byte("a"), 9000), 0o600), fsync(d+"/subvolume/a"), os.Remove(d+"/subvolume/old"), fsync(d+"/subvolume"),
			os.WriteFile(d+"/b", []byte("b"), 0o600))
	}, "/b"},
}

// logBase makes an image with a directory for the tests of the log.
func logBase(t *testing.T) string {
	t.Helper()
	image := guesttest.Sparse(t, 256<<20)
	guesttest.Run(t, "mkfs.btrfs", "-q", image)
	dir, unmount := guesttest.Mount(t, image, "btrfs", "rw,nobarrier")
	defer unmount()
	d := dir + "/d"
	write := func(name string, n int) error {
		return os.WriteFile(d+"/"+name, bytes.Repeat([]byte{5, byte(n)}, n/2), 0o600)
	}
	err := cmp.Or(os.Mkdir(d, 0o755), os.Mkdir(d+"/other", 0o755), os.Mkdir(d+"/empty", 0o755), os.Mkdir(d+"/many", 0o755), os.Mkdir(d+"/nocow", 0o755),
		write("f1", 10), write("f2", 10000), write("f3", 20000), write("f4", 4096), write("big", 3<<20), write("x", 100), os.Link(d+"/f2", d+"/l2"), write("many/file", 7),
		unix.Setxattr(d+"/x", "user.a", []byte("1"), 0), unix.Setxattr(d+"/x", "user.b", []byte("2"), 0))
	for i := 0; i < 200 && err == nil; i++ {
		err = cmp.Or(write(fmt.Sprint("many/name ", i), i%50), os.Link(d+"/many/file", fmt.Sprintf("%s/many/%d %s", d, i, strings.Repeat("long name ", 20))))
	}
	if err != nil {
		t.Fatal(err)
	}
	guesttest.Run(t, "chattr", "+C", d+"/nocow")
	guesttest.Run(t, "btrfs", "subvolume", "create", d+"/subvolume")
	if err := write("subvolume/old", 99); err != nil {
		t.Fatal(err)
	}
	return image
}

// logImage gives a copy of an image after changes that were made durable.
func logImage(t *testing.T, base string, change func(d string) error, synced string) string {
	t.Helper()
	image := guesttest.Copy(t, base)
	dir, unmount := guesttest.Mount(t, image, "btrfs", "rw,nobarrier,commit=1000")
	if err := cmp.Or(change(dir+"/d"), fsync(dir+"/d"+synced)); err != nil {
		t.Fatal(err)
	}
	out := guesttest.Copy(t, image)
	unmount()
	return out
}

func TestLog(t *testing.T) {
	guesttest.Needs(t, "mkfs.btrfs", "btrfs", "mount", "chattr")
	base, logged, ran := logBase(t), 0, 0
	for i, test := range logTests {
		if testing.Short() && i%8 > 0 {
			continue
		}
		t.Run(test.name, func(t *testing.T) {
			image := logImage(t, base, test.change, test.synced)
			ran++
			if copied(t, image) > 0 {
				logged++
			}
		})
	}
	// Linux makes a commit of a few.
	if ran > 5 && logged < ran*3/4 {
		t.Errorf("only %d of %d have a log", logged, ran)
	}
}
