package ext

import (
	"bytes"
	"cmp"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// A variant is a way to make a file system.
type variant struct {
	name  string
	mkfs  []string
	mount string
	tree  guesttest.Tree
	// used is how many bytes the disk has, when it is not empty at the start.
	used int64
	// skips are what the file system refuses of the tree.
	skips []string
}

// smallTree is one that has everything, and little of it.
func smallTree(seed uint64) guesttest.Tree {
	return guesttest.Tree{Seed: seed, Files: 700, Names: 700, Big: 2 << 20, Fragments: 100}
}

// Refusals: of values beyond a block without ea_inode, of files beyond what 32 bits of blocks address or without extents, of links
// longer than a block.
var (
	noLarge   = []string{"many xattrs", "user xattr of 10000 bytes: ENOSPC", "user xattr of 40000 bytes: ENOSPC", "user xattr of 5000 bytes: ENOSPC", "user xattr of 65536 bytes: ENOSPC"}
	noExtents = []string{"a file of 15393162788864 bytes: EFBIG", "collapsed: ENOTSUP", "inserted: ENOTSUP", "unwritten behind the end: ENOTSUP",
		"unwritten, written in places: ENOTSUP", "unwritten: ENOTSUP", "zeroed: ENOTSUP"}
	not2K = []string{"a file of 15393162788864 bytes: EFBIG", "symbolic link of 3000 bytes: ENAMETOOLONG", "symbolic link of 4000 bytes: ENAMETOOLONG",
		"symbolic link of 4095 bytes: ENAMETOOLONG", "user xattr of 3000 bytes: ENOSPC", "user xattr of 3900 bytes: ENOSPC"}
	not1K = slices.Concat(not2K, []string{"symbolic link of 1024 bytes: ENAMETOOLONG", "symbolic link of 2000 bytes: ENAMETOOLONG", "user xattr of 1900 bytes: ENOSPC", "xattr: ENOSPC"})
)

func variants() []variant {
	join := slices.Concat[[]string]
	return []variant{
		{name: "default", tree: guesttest.Tree{Seed: 1}, skips: noLarge},
		{name: "inline", mkfs: []string{"-I", "256", "-O", "inline_data,metadata_csum,64bit,ea_inode,large_dir,metadata_csum_seed"}, tree: smallTree(2), skips: []string{"many xattrs"}},
		{name: "bigalloc", mkfs: []string{"-b", "1024", "-C", "16384", "-I", "128", "-O", "bigalloc,^64bit,^metadata_csum"}, tree: smallTree(3), skips: join(noLarge, not1K)},
		{name: "meta_bg", mkfs: []string{"-O", "meta_bg,^resize_inode"}, tree: smallTree(4), skips: noLarge},
		{name: "ext3", mkfs: []string{"-t", "ext3"}, tree: smallTree(5), skips: join(noLarge, noExtents)},
		{name: "ext2", mkfs: []string{"-t", "ext2", "-b", "1024"}, mount: "ext2", tree: smallTree(6), skips: join(noLarge, noExtents, not1K)},
		{name: "2K", mkfs: []string{"-b", "2048", "-I", "512", "-O", "orphan_file"}, used: 300 << 20, tree: smallTree(7), skips: join(noLarge, not2K)},
		{name: "sparse_super2", mkfs: []string{"-O", "sparse_super2,^resize_inode,uninit_bg,^metadata_csum"}, tree: smallTree(8), skips: noLarge},
		{name: "fast_commit", mkfs: []string{"-O", "fast_commit"}, tree: smallTree(9), skips: noLarge},
		{name: "1K", mkfs: []string{"-b", "1024", "-O", "^64bit"}, tree: smallTree(10), skips: join(noLarge, not1K)},
	}
}

func (v variant) fstype() string {
	if v.mount != "" {
		return v.mount
	}
	return "ext4"
}

// make makes an image and fills it.
func (v variant) make(t *testing.T) string {
	t.Helper()
	guesttest.Needs(t, "mkfs.ext4", "mount", "dumpe2fs", "blkid")
	image := guesttest.Sparse(t, cmp.Or(v.used, 700<<20))
	if v.used > 0 {
		// What was there before must not show in what is allocated and not written.
		if err := os.WriteFile(image, bytes.Repeat([]byte("old data"), int(v.used/8)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	guesttest.Run(t, append(append([]string{"mkfs.ext4", "-q", "-F", "-L", "the label", "-E", "nodiscard,lazy_itable_init=1"}, v.mkfs...), image)...)
	dir, unmount := guesttest.Mount(t, image, v.fstype(), "rw")
	skipped, err := guesttest.Fill(dir, v.tree)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range skipped {
		if !slices.Contains(v.skips, s) {
			t.Error("refused: ", s)
		}
	}
	unmount()
	return image
}

func open(t testing.TB, image string, opt guest.Options) *FS {
	t.Helper()
	return guesttest.Open(t, Open, image, opt)
}

func TestVariants(t *testing.T) {
	for i, v := range variants() {
		if testing.Short() && i > 2 {
			break
		}
		if testing.Short() {
			v.tree.Files, v.tree.Names, v.tree.Big = 200, 200, 1<<20
		}
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			image := v.make(t)
			want := guesttest.Truth(t, image, v.fstype(), "")
			f := open(t, image, guest.Options{})
			guesttest.SameFS(t, want, f)
			if w := f.Info().Warnings; len(w) > 0 {
				t.Error(w)
			}
			if !testing.Short() && (v.name == "inline" || v.name == "ext2") {
				guesttest.Conform(t, f, 0, 9, 20000)
			}
			checkInfo(t, f, image)
			checkFree(t, f, image)
			checkLocate(t, f, image, v)
			t.Log(len(want), f.Info())
		})
	}
}

// checkInfo compares what is said of the file system with blkid.
func checkInfo(t *testing.T, f *FS, image string) {
	t.Helper()
	i := f.Info()
	for tag, got := range map[string]string{"TYPE": i.Type, "UUID": i.UUID, "LABEL": i.Label} {
		out, _ := exec.Command("blkid", "-p", "-s", tag, "-o", "value", image).Output()
		if want := strings.TrimSuffix(string(out), "\n"); got != want {
			t.Errorf("%s: %q, blkid says %q", tag, got, want)
		}
	}
}
