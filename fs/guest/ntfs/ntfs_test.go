package ntfs

import (
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

func open(t testing.TB, image string) *FS {
	t.Helper()
	return guesttest.Open(t, Open, image, guest.Options{})
}

// volume makes a volume by mkntfs.
func volume(t *testing.T, size int64, options ...string) string {
	t.Helper()
	guesttest.Needs(t, "mkntfs", "ntfs-3g")
	image := guesttest.Sparse(t, size)
	guesttest.Run(t, append([]string{"mkntfs", "-q", "-F", "-f", "-L", "läbel"}, append(options, image)...)...)
	return image
}

// same compares what ntfs-3g shows with what the reader does.
func same(t *testing.T, image, options string, ignore ...string) {
	t.Helper()
	want := guesttest.TruthNTFS(t, image, options)
	f := open(t, image)
	if w := f.Info().Warnings; len(w) > 0 {
		t.Errorf("%q", w)
	}
	got, err := guesttest.WalkFS(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Log(len(want), "lines")
	guesttest.Same(t, want, got, ignore...)
}

// refused is what ntfs-3g refuses to make of guesttest.Fill's tree: names that are no UTF-8, and what fallocate does.
var refused = []string{
	"a directory's name: EILSEQ", "collapsed: ENOTSUP", "inserted: ENOTSUP", `name "\xff\xfe invalid \x80": EILSEQ`, "punched oddly: ENOTSUP", "punched: ENOTSUP",
	"symbolic link: EILSEQ", "unwritten behind the end: ENOTSUP", "unwritten, written in places: ENOTSUP", "unwritten: ENOTSUP", "zeroed: ENOTSUP",
}

// filled makes a volume with a tree in it.
func filled(t *testing.T, tree guesttest.Tree, size int64, mount string, options ...string) string {
	t.Helper()
	image := volume(t, size, options...)
	dir, unmount := guesttest.MountNTFS(t, image, mount)
	skipped, err := guesttest.Fill(dir, tree)
	if err != nil {
		t.Fatal(err)
	}
	skipped = slices.DeleteFunc(skipped, func(s string) bool {
		return strings.Contains(mount, "permissions") && s == "system xattr of 60 bytes: ENOTSUP"
	})
	if !slices.Equal(skipped, refused) {
		t.Errorf("ntfs-3g refused %q", skipped)
	}
	unmount()
	return image
}

func TestTree(t *testing.T) {
	tree := guesttest.Tree{Seed: 1, Big: 16 << 20}
	if testing.Short() {
		tree = guesttest.Tree{Seed: 1, Files: 1000, Names: 500, Big: 4 << 20}
	}
	image := filled(t, tree, 3<<30, "")
	same(t, image, "")
}
