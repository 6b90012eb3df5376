package ext

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// source makes a small tree on the host.
func source(t *testing.T) string {
	t.Helper()
	d := t.TempDir()
	write := func(p string, n int) {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(i*7 + n)
		}
		if err := errors.Join(os.MkdirAll(filepath.Dir(d+"/"+p), 0o755), os.WriteFile(d+"/"+p, b, 0o640)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 300 {
		write(fmt.Sprintf("dir/a Name of Some Length, number %d", i), i*50)
	}
	write("sub/large", 3<<20)
	if err := errors.Join(os.Symlink("short", d+"/short"), os.Symlink(strings.Repeat("long", 50), d+"/long"), os.Link(d+"/sub/large", d+"/link")); err != nil {
		t.Fatal(err)
	}
	return d
}

// TestMadeByMkfs reads what mkfs.ext4 itself fills, in forms that the kernel of a test machine may not mount. The tree on the host is the
// truth, but for what every file system counts in its own way, and for times, which mkfs sets to when it ran, or without nanoseconds.
func TestMadeByMkfs(t *testing.T) {
	guesttest.Needs(t, "mkfs.ext4", "e2fsck")
	for _, mkfs := range [][]string{
		{"-b", "65536"},
		{"-b", "4096", "-O", "casefold", "-E", "encoding=utf8"},
		{"-b", "1024", "-O", "mmp,project"},
		{"-b", "4096", "-O", "verity,encrypt,orphan_file"},
		{"-b", "1024", "-O", "^filetype,^extents,^64bit,^flex_bg"},
		{"-b", "1024", "-O", "bigalloc,meta_bg,^resize_inode", "-C", "4096"},
		{"-b", "1024", "-r", "0", "-O", "none"},
		{"-b", "2048", "-O", "^sparse_super,^resize_inode", "-g", "8192"},
		{"-b", "1024", "-O", "bigalloc", "-C", "65536", "-I", "1024"},
	} {
		t.Run(strings.Join(mkfs, " "), func(t *testing.T) {
			dir := source(t)
			image := guesttest.Sparse(t, 300<<20)
			guesttest.Run(t, append(append([]string{"mkfs.ext4", "-q", "-F", "-d", dir}, mkfs...), image)...)
			guesttest.Run(t, "e2fsck", "-fn", image)
			want, err := guesttest.Walk(dir)
			if err != nil {
				t.Fatal(err)
			}
			f := open(t, image, guest.Options{})
			got, err := guesttest.WalkFS(f)
			if err != nil {
				t.Fatal(err)
			}
			guesttest.Same(t, want, dropSizes(want, got), "blocks", "atime", "ctime", "mtime", "btime")
			if w := f.Info().Warnings; len(w) > 0 {
				t.Error(w)
			}
			checkFree(t, f, image)
		})
	}
}

// dropSizes takes the sizes of directories out, which every file system counts in its own way, and what mkfs gives the root.
func dropSizes(lists ...[]guesttest.Line) []guesttest.Line {
	for _, list := range lists {
		for _, l := range list {
			if l.Fields["type"] == "d" {
				delete(l.Fields, "size")
			}
			if l.Path == "" {
				delete(l.Fields, "mode")
				delete(l.Fields, "nlink") // of lost+found
			}
		}
	}
	return lists[len(lists)-1]
}

// TestCasefold looks names up in a directory that ignores case, whose index e2fsck made.
func TestCasefold(t *testing.T) {
	guesttest.Needs(t, "mkfs.ext4", "e2fsck", "debugfs")
	image := guesttest.Sparse(t, 100<<20)
	guesttest.Run(t, "mkfs.ext4", "-q", "-F", "-b", "1024", "-O", "casefold", "-E", "encoding=utf8", "-d", source(t), image)
	guesttest.Run(t, "debugfs", "-w", "-R", "sif dir flags 0x40080000", image)
	out := fmt.Sprint(guesttest.Run(t, "sh", "-c", "e2fsck -fyD "+image+"; test $? -lt 4"))
	f := open(t, image, guest.Options{})
	d, err := guesttest.Find(f, "dir")
	if err != nil {
		t.Fatal(err)
	}
	in, err := f.dir(d)
	if err != nil || in.flags&(flagCasefold|flagIndex) != flagCasefold|flagIndex {
		t.Fatalf("%#x %v\n%s", in.flags, err, out)
	}
	for i := range 300 {
		n := fmt.Sprintf("a Name of Some Length, number %d", i)
		if _, ok := f.lookupIndex(&in, &sought{name: n}); !ok {
			t.Fatal(n, " is not where its hash says")
		}
		if _, err := f.Lookup(d, n); err != nil {
			t.Fatal(err)
		}
	}
}

// TestEncrypted makes sure that what is encrypted says so. The flags are set on plain things; no key is needed to see that.
func TestEncrypted(t *testing.T) {
	guesttest.Needs(t, "mkfs.ext4", "debugfs")
	image := guesttest.Sparse(t, 100<<20)
	guesttest.Run(t, "mkfs.ext4", "-q", "-F", "-O", "encrypt", "-d", source(t), image)
	for _, p := range []string{"dir", "sub/large", "long"} {
		guesttest.Run(t, "debugfs", "-w", "-R", "sif "+p+" flags 0x80800", image)
	}
	f := open(t, image, guest.Options{})
	find := func(p string) guest.Ino {
		ino, err := guesttest.Find(f, p)
		if err == nil {
			_, err = f.Stat(ino)
		}
		if err != nil {
			t.Fatal(err)
		}
		return ino
	}
	_, err1 := f.Open(find("sub/large"))
	_, err2 := f.Readlink(find("long"))
	_, err3 := f.Lookup(find("dir"), "x")
	var err4 error
	for _, err4 = range f.ReadDir(find("dir"), 0) {
	}
	for _, err := range []error{err1, err2, err3, err4} {
		if !errors.Is(err, guest.ErrUnsupported) || !strings.Contains(err.Error(), "encrypted") {
			t.Error(err)
		}
	}
}

// TestBackups damages the first superblock and the first group descriptors.
func TestBackups(t *testing.T) {
	guesttest.Needs(t, "mkfs.ext4")
	for _, mkfs := range [][]string{{"-b", "1024"}, {"-b", "4096", "-O", "^metadata_csum,uninit_bg"}, {"-b", "2048", "-O", "sparse_super2"}, {"-b", "4096", "-O", "^metadata_csum,^resize_inode,sparse_super2"}} {
		dir := source(t)
		image := guesttest.Sparse(t, 300<<20)
		guesttest.Run(t, append(append([]string{"mkfs.ext4", "-q", "-F", "-d", dir}, mkfs...), image)...)
		clean := open(t, image, guest.Options{})
		want, err := guesttest.WalkFS(clean)
		if err != nil {
			t.Fatal(err)
		}
		sums := clean.ro&(roMetadataCsum|roGDTCsum) != 0
		damage := func(what string, off int64, b []byte, warnings int) {
			t.Run(fmt.Sprint(mkfs, what), func(t *testing.T) {
				damaged := guesttest.Copy(t, image)
				patchImage(t, damaged, off, b)
				f := open(t, damaged, guest.Options{})
				got, err := guesttest.WalkFS(f)
				if err != nil || len(f.Info().Warnings) != warnings {
					t.Error(err, f.Info())
				}
				guesttest.Same(t, want, got)
				if warnings > 0 && f.certain() == nil {
					t.Error("what is free is certain")
				}
			})
		}
		damage("superblock", superOffset+0x18, make([]byte, 16), 1) // sizes: wrong even without a checksum
		if sums {
			damage("magic", superOffset, make([]byte, 1024), 1)
			damage("descriptors", (superOffset/clean.blockSize+1)*clean.blockSize, []byte("damaged descriptors"), 0)
		}
		gone := guesttest.Copy(t, image)
		patchImage(t, gone, 0, make([]byte, 64<<10))
		if _, err := Open(guesttest.OpenDevice(t, gone), guest.Options{}); !errors.Is(err, guest.ErrUnknown) {
			t.Error(err)
		}
	}
}

// TestBackupDirty damages the first superblock, which alone says that the journal holds changes.
func TestBackupDirty(t *testing.T) {
	d := dirties()[1]
	d.tree.Files, d.tree.Names = 50, 50
	image := d.make(t, func(dir string) error { return guesttest.Burst(dir, 6, 50) })
	want := guesttest.Truth(t, image, "ext4", "")
	patchImage(t, image, superOffset+0x18, make([]byte, 16))
	f := open(t, image, guest.Options{})
	got, err := guesttest.WalkFS(f)
	if err != nil || len(f.Info().Warnings) != 1 || !f.Info().Replayed {
		t.Error(f.Info(), err)
	}
	guesttest.Same(t, want, got)
}

// TestRefused opens what cannot be read.
func TestRefused(t *testing.T) {
	guesttest.Needs(t, "mkfs.ext4")
	image := guesttest.Sparse(t, 50<<20)
	guesttest.Run(t, "mkfs.ext4", "-q", "-F", "-O", "^metadata_csum", image)
	check := func(image string, want error, words string) {
		t.Helper()
		_, err := Open(guesttest.OpenDevice(t, image), guest.Options{})
		if !errors.Is(err, want) || !strings.Contains(fmt.Sprint(err), words) {
			t.Error(err)
		}
	}
	for feature, words := range map[byte]string{0x03: "compression", 0x42: "feature 0x1000000"} {
		other := guesttest.Copy(t, image)
		if feature == 0x42 {
			patchImage(t, other, superOffset+0x63, []byte{1})
		} else {
			patchImage(t, other, superOffset+0x60, []byte{feature})
		}
		check(other, guest.ErrUnsupported, words)
	}
	journal := guesttest.Sparse(t, 50<<20)
	guesttest.Run(t, "mkfs.ext4", "-q", "-F", "-O", "journal_dev", journal)
	check(journal, guest.ErrUnsupported, "external journal")
	check(guesttest.Sparse(t, 10<<20), guest.ErrUnknown, "")
	check(guesttest.Sparse(t, 100), guest.ErrUnknown, "")
	// A journal elsewhere, with changes in it.
	other := guesttest.Copy(t, image)
	patchImage(t, other, superOffset+0xe0, make([]byte, 4))
	patchImage(t, other, superOffset+0x60, []byte{0x46})
	if f := open(t, other, guest.Options{}); len(f.Info().Warnings) != 1 || !strings.Contains(f.Info().Warnings[0], "another device") {
		t.Error(f.Info())
	}
	// Its own superblock's copy of where the journal is, when the journal's inode is lost.
	lost := guesttest.Copy(t, image)
	f := open(t, lost, guest.Options{})
	d, err := f.desc(0)
	if err != nil {
		t.Fatal(err)
	}
	patchImage(t, lost, d.inodeTable*f.blockSize+7*f.inodeSize, make([]byte, f.inodeSize))
	patchImage(t, lost, superOffset+0x60, []byte{0x46})
	if f := open(t, lost, guest.Options{}); len(f.Info().Warnings) != 0 {
		t.Error(f.Info())
	}
}
