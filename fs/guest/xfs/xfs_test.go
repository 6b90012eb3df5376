package xfs

import (
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// A variant is a way to make the file system.
type variant struct {
	name string
	mkfs []string
	size int64
	tree guesttest.Tree
}

var (
	small    = guesttest.Tree{Seed: 2, Files: 600, Big: 3 << 20, Names: 700}
	variants = []variant{
		{"default", nil, 2 << 30, guesttest.Tree{Seed: 1}},
		{"1 KiB blocks", []string{"-b", "size=1024", "-m", "rmapbt=1,reflink=1,bigtime=1,inobtcount=1", "-i", "sparse=1"}, 1 << 30, small},
		{"large directory blocks", []string{"-b", "size=1024", "-n", "size=8192"}, 1 << 30, small},
		{"largest directory blocks", []string{"-n", "size=65536"}, 1 << 30, small},
		{"many extents", []string{"-i", "nrext64=1"}, 1 << 30, small},
		{"large sectors", []string{"-s", "size=4096", "-m", "bigtime=0,finobt=0,reflink=0"}, 1 << 30, small},
		{"inodes of 1024", []string{"-i", "size=1024"}, 1 << 30, small},
		{"inode numbers of 64 bits", []string{"-l", "size=64m"}, 4 << 40, tiny},
		{"inodes of 2048", []string{"-i", "size=2048", "-i", "sparse=0"}, 1 << 30, small},
	}
)

// empty makes an image with nothing in it.
func (v variant) empty(t *testing.T) string {
	t.Helper()
	if testing.Short() {
		t.Skip("makes an image; the golden one is for short runs")
	}
	guesttest.Needs(t, "mkfs.xfs", "mount")
	image := guesttest.Sparse(t, v.size)
	// mkfs.xfs makes logs below 64 MiB only with these.
	env := []string{"env", "TEST_DIR=1", "TEST_DEV=1", "QA_CHECK_FS=1", "mkfs.xfs", "-q"}
	guesttest.Run(t, append(append(env, v.mkfs...), image)...)
	return image
}

// make makes a filled image.
func (v variant) make(t *testing.T) string {
	t.Helper()
	image := v.empty(t)
	dir, unmount := guesttest.Mount(t, image, "xfs", "rw")
	skipped, err := guesttest.Fill(dir, v.tree)
	if err != nil {
		t.Fatal(err)
	}
	// XFS has no links of more than 1023 bytes, and no lists of names beyond 64 KiB.
	for _, s := range skipped {
		t.Log("refused: ", s)
	}
	unmount()
	return image
}

func open(t testing.TB, image string, opt guest.Options) *FS {
	t.Helper()
	return guesttest.Open(t, Open, image, opt)
}

func TestClean(t *testing.T) {
	for _, v := range variants {
		t.Run(strings.ReplaceAll(v.name, " ", "-"), func(t *testing.T) {
			t.Parallel()
			image := v.make(t)
			fs := open(t, image, guest.Options{})
			if i := fs.Info(); i.Replayed || len(i.Warnings) > 0 {
				t.Errorf("%+v", i)
			}
			guesttest.SameFS(t, guesttest.Truth(t, image, "xfs", "nouuid"), fs)
			if v.name == "1 KiB blocks" {
				guesttest.Conform(t, fs)
			}
		})
	}
}
