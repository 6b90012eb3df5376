package fat

import (
	"encoding/json"
	"flag"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

func TestMain(m *testing.M) {
	guesttest.Main(m, map[string]guesttest.Filler{"tree": guesttest.Fill, "odd": guesttest.Odd, "little": guesttest.Little})
}

// mountOptions are those whose view the reader has.
const mountOptions = "utf8=1,tz=UTC,codepage=437,umask=022"

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func open(t testing.TB, image string) *FS {
	t.Helper()
	f, err := Open(guesttest.OpenDevice(t, image), guest.Options{})
	must(t, err)
	return f
}

// variant is a volume of mkfs.vfat.
type variant struct {
	name string
	size int64 // MiB
	make string
	fill string
	tree guesttest.Tree
}

// TestMany has a larger tree.
var variants = []variant{
	{"FAT32", 800, "-F 32 -s 8 -n LABEL32", "tree", guesttest.Tree{Seed: 1, Files: 1500, Names: 1000, Big: 6 << 20, NoHuge: true, NoHoles: true}},
	{"FAT32, clusters of 512", 200, "-F 32 -s 1 -f 1", "odd", guesttest.Tree{}},
	{"FAT16", 200, "-F 16 -s 8 -n label", "tree", guesttest.Tree{Seed: 3, Files: 300, Names: 200, Big: 2 << 20, Fragments: 50, NoHuge: true, NoHoles: true}},
	{"FAT12", 12, "-F 12 -s 8 -n twelve", "odd", guesttest.Tree{}},
	{"FAT12, clusters of 512", 2, "-F 12 -s 1 -r 512", "odd", guesttest.Tree{}},
	{"FAT16, clusters of 64 KiB", 300, "-F 16 -s 128", "odd", guesttest.Tree{}},
	{"FAT16, clusters of 512", 20, "-F 16 -s 1 -f 2", "odd", guesttest.Tree{}},
	{"FAT32, sectors of 4096", 300, "-F 32 -S 4096 -s 1 -n four", "odd", guesttest.Tree{}},
	{"FAT32, clusters of 256 KiB", 400, "-F 32 -S 4096 -s 64", "odd", guesttest.Tree{}},
	{"FAT32, sectors of 2048", 200, "-F 32 -S 2048 -s 2", "odd", guesttest.Tree{}},
}

// refused is what Linux refuses to make of guesttest.Fill's tree, without the sizes.
var refused = []string{
	"a directory's name: EINVAL", "block device: EPERM", "character device: EPERM", "collapsed: ENOTSUP", "fifo: EPERM", "hard link: EPERM", "inserted: ENOTSUP",
	"large device: EPERM", "many xattrs", "mode: EPERM", `name "...": ENOENT`, `name "\x01control": EINVAL`, `name "\xff\xfe invalid \x80": EINVAL`, `name "a:b": EINVAL`,
	`name "back\\slash": EINVAL`, `name "new\nline": EINVAL`, `name "q?*|<>": EINVAL`, `name "quote\"'": EINVAL`, `name "tab\t": EINVAL`, `name "trailing ": EINVAL`,
	"owner: EPERM", "punched oddly: ENOTSUP", "punched: ENOTSUP", "security xattr: ENOTSUP", "socket: EPERM", "symbolic link: EPERM",
	"system xattr: ENOTSUP", "trusted xattr: ENOTSUP", "user xattr: ENOTSUP", "xattr: ENOTSUP", "zeroed: ENOTSUP",
}

func (v variant) image(t *testing.T) string {
	t.Helper()
	image := guesttest.Sparse(t, v.size<<20)
	guesttest.Run(t, append(append([]string{"mkfs.vfat", "-i", "1234ABCD"}, strings.Fields(v.make)...), image)...)
	return image
}

// TestVariants compares with what the kernel of a guest shows of volumes that it filled, of which one stays mounted.
func TestVariants(t *testing.T) {
	guesttest.Needs(t, "mkfs.vfat", "fsck.vfat", "blkid")
	var jobs []guesttest.Job
	for _, v := range variants {
		jobs = append(jobs, guesttest.Job{Image: v.image(t), Type: "vfat", Options: mountOptions, Fill: v.fill, Tree: v.tree})
	}
	jobs = append(jobs, guesttest.Job{Image: variants[1].image(t), Type: "vfat", Options: mountOptions, Fill: "odd", Keep: true})
	done := guesttest.InGuest(t, jobs)
	for i, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			if v.fill == "tree" && !slices.Equal(guesttest.Kinds(done[i].Skipped), refused) {
				t.Errorf("refused: %q", guesttest.Kinds(done[i].Skipped))
			}
			sameAs(t, jobs[i].Image, done[i].Lines)
		})
	}
	t.Run("mounted", func(t *testing.T) {
		f := open(t, jobs[len(variants)].Image)
		if w := f.Info().Warnings; len(w) != 1 || !strings.Contains(w[0], "not unmounted") {
			t.Errorf("warnings %q", w)
		}
		for _, err := range f.Free() {
			if err == nil {
				t.Error("tells what is free")
			}
		}
	})
}

var makeGolden = flag.Bool("golden", false, "make testdata/*.img.gz anew, in a guest")

// TestMakeGolden makes small volumes for tests that need no guest, and what Linux shows of them.
func TestMakeGolden(t *testing.T) {
	if !*makeGolden {
		t.Skip("asked for by -golden")
	}
	var jobs []guesttest.Job
	for _, v := range []variant{{size: 2, make: "-F 12 -s 1"}, {size: 5, make: "-F 16 -s 1"}, {size: 35, make: "-F 32 -s 1"}} {
		jobs = append(jobs, guesttest.Job{Image: v.image(t), Type: "vfat", Options: mountOptions, Fill: "little"})
	}
	for i, d := range guesttest.InGuest(t, jobs) {
		disk, err := os.ReadFile(jobs[i].Image)
		must(t, err)
		truth, err := json.Marshal(d.Lines)
		must(t, err)
		guesttest.Pack(t, goldens[i]+".img", disk)
		guesttest.Pack(t, goldens[i]+".json", truth)
	}
}

// TestGolden compares with what Linux showed when the volumes were made.
func TestGolden(t *testing.T) {
	for _, name := range goldens {
		var want []guesttest.Line
		must(t, json.Unmarshal(guesttest.Unpack(t, name+".json"), &want))
		f, err := Open(golden(t, name), guest.Options{})
		must(t, err)
		got, err := guesttest.WalkFS(f)
		must(t, err)
		if len(want) < 100 {
			t.Errorf("only %d lines", len(want))
		}
		guesttest.Same(t, want, got)
		guesttest.Conform(t, f)
	}
}

// sameAs compares an image with what the kernel shows, by walking it and by looking for each path.
func sameAs(t *testing.T, image string, want []guesttest.Line) {
	t.Helper()
	f := open(t, image)
	if w := f.Info().Warnings; len(w) > 0 {
		t.Errorf("%q", w)
	}
	got, err := guesttest.WalkFS(f)
	must(t, err)
	t.Log(len(want), "lines")
	guesttest.Same(t, want, got)
	for _, l := range want {
		ino, err := guesttest.Find(f, l.Path)
		if err != nil {
			t.Error(err)
			continue
		}
		if l.Path == "" {
			continue
		}
		other, err := guesttest.Find(f, strings.ToUpper(l.Path))
		if strings.ToLower(strings.ToUpper(l.Path)) == strings.ToLower(l.Path) && (err != nil || other != ino) {
			t.Errorf("%s in upper case: %d, %v", guesttest.Quote(l.Path), other, err)
		}
	}
	if id := guesttest.Run(t, "blkid", "-p", "-o", "value", "-s", "UUID", image); strings.TrimSpace(id) != f.Info().UUID {
		t.Errorf("UUID %q, blkid says %q", f.Info().UUID, id)
	}
	if label := guesttest.Label(t, image); label != f.Info().Label {
		t.Errorf("label %q, blkid says %q", f.Info().Label, label)
	}
	guesttest.Run(t, "fsck.vfat", "-n", image)
}
