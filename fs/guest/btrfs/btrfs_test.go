package btrfs

import (
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
}

// small is a tree that has everything, and little of it.
func small(seed uint64) guesttest.Tree {
	return guesttest.Tree{Seed: seed, Files: 300, Names: 300, Big: 2 << 20}
}

func variants() []variant {
	full := guesttest.Tree{Seed: 1}
	if testing.Short() {
		full = small(1)
	}
	return []variant{
		{name: "default", tree: full},
		{name: "mixed", mkfs: []string{"-M"}, tree: small(2)},
		{name: "zstd", mount: ",compress-force=zstd", tree: small(3)},
		{name: "lzo", mount: ",compress-force=lzo", mkfs: []string{"-O", "^no-holes"}, tree: small(4)},
		{name: "zlib", mount: ",compress-force=zlib", tree: small(5)},
		{name: "4K", mkfs: []string{"-n", "4096", "-O", "^no-holes", "--csum", "xxhash"}, tree: small(6)},
		{name: "64K", mkfs: []string{"-n", "65536", "--csum", "sha256"}, tree: small(7)},
		{name: "blake2", mkfs: []string{"--csum", "blake2", "-m", "single", "-R", "^free-space-tree"}, mount: ",space_cache=v1", tree: small(8)},
	}
}

// make makes an image and fills it.
func (v variant) make(t *testing.T) string {
	t.Helper()
	guesttest.Needs(t, "mkfs.btrfs", "btrfs", "mount")
	image := guesttest.Sparse(t, 2<<30)
	guesttest.Run(t, append(append([]string{"mkfs.btrfs", "-q"}, v.mkfs...), image)...)
	dir, unmount := guesttest.Mount(t, image, "btrfs", "rw,nobarrier"+v.mount)
	skipped, err := guesttest.Fill(dir, v.tree)
	if err != nil {
		t.Fatal(err)
	}
	// Btrfs shifts no ranges, and has no attribute larger than a node.
	for _, s := range skipped {
		if !strings.HasSuffix(s, "ed: ENOTSUP") && !strings.Contains(s, "xattr of") && !strings.HasPrefix(s, "symbolic link of") && s != "many xattrs" {
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

// truth is what the kernel shows of the top level.
func truth(t *testing.T, image string) []guesttest.Line {
	t.Helper()
	return guesttest.Truth(t, image, "btrfs", "subvolid=5")
}

func TestVariants(t *testing.T) {
	for i, v := range variants() {
		if testing.Short() && i%3 > 0 {
			continue
		}
		t.Run(v.name, func(t *testing.T) {
			image := v.make(t)
			fs := open(t, image, guest.Options{})
			if i := fs.Info(); i.Replayed || len(i.Warnings) > 0 {
				t.Errorf("%+v", i)
			}
			want := truth(t, image)
			guesttest.SameFS(t, want, fs)
			if v.name == "zstd" || v.name == "4K" {
				guesttest.Conform(t, fs, 0, 1<<40+257)
			}
			t.Log(len(want), " lines")
		})
	}
}
