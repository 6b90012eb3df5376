package exfat

import (
	"encoding/json"
	"flag"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/cluster"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

func TestMain(m *testing.M) {
	guesttest.Main(m, map[string]guesttest.Filler{"tree": guesttest.Fill, "odd": guesttest.Odd, "little": guesttest.Little})
}

// mountOptions are those whose view the reader has.
const mountOptions = "iocharset=utf8,time_offset=0,umask=022"

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

// variant is a volume of mkfs.exfat, of sectors of 512 bytes unless it says otherwise.
type variant struct {
	name string
	size int64 // MiB
	make string
	fill string
	tree guesttest.Tree
}

var variants = []variant{
	{"default", 1500, "-L label", "tree", guesttest.Tree{Seed: 1, Files: 1500, Names: 1000, Big: 6 << 20, NoHuge: true, NoHoles: true}},
	{"clusters of 512", 100, "-c 512 -L label_512", "odd", guesttest.Tree{}},
	{"clusters of 4 KiB", 300, "-c 4096 -L eleven_char", "tree", guesttest.Tree{Seed: 3, Files: 300, Names: 200, Big: 2 << 20, Fragments: 50, NoHuge: true, NoHoles: true}},
	{"clusters of 32 MiB", 16000, "-c 32M", "little", guesttest.Tree{}},
	{"clusters of 1 MiB", 2000, "-c 1M --pack-bitmap", "odd", guesttest.Tree{}},
}

// refused is what Linux refuses to make of guesttest.Fill's tree, without the sizes.
var refused = []string{
	"a directory's name: EILSEQ", "block device: EPERM", "character device: EPERM", "collapsed: ENOTSUP", "fifo: EPERM", "hard link: EPERM", "inserted: ENOTSUP",
	"large device: EPERM", "many xattrs", "mode: EPERM", `name "...": ENOENT`, `name "\x01control": EINVAL`, `name "\xff\xfe invalid \x80": EILSEQ`, `name "a:b": EINVAL`,
	`name "back\\slash": EINVAL`, `name "new\nline": EINVAL`, `name "q?*|<>": EINVAL`, `name "quote\"'": EINVAL`, `name "tab\t": EINVAL`, "owner: EPERM",
	"punched oddly: ENOTSUP", "punched: ENOTSUP", "security xattr: ENOTSUP", "socket: EPERM", "symbolic link: EPERM", "system xattr: ENOTSUP",
	"trusted xattr: ENOTSUP", "unwritten behind the end: ENOTSUP", "unwritten, written in places: ENOTSUP", "unwritten: ENOTSUP", "user xattr: ENOTSUP", "xattr: ENOTSUP",
	"zeroed: ENOTSUP",
}

func (v variant) image(t *testing.T) string {
	t.Helper()
	guesttest.Needs(t, "mkfs.exfat", "fsck.exfat", "blkid")
	t.Setenv("LC_ALL", "C.UTF-8")
	image := guesttest.Sparse(t, v.size<<20)
	guesttest.Run(t, append(append([]string{"mkfs.exfat"}, strings.Fields(v.make)...), image)...)
	return image
}

// TestVariants compares with what the kernel of a guest shows of volumes that it filled.
func TestVariants(t *testing.T) {
	var jobs []guesttest.Job
	for _, v := range variants {
		jobs = append(jobs, guesttest.Job{Image: v.image(t), Type: "exfat", Options: mountOptions, Fill: v.fill, Tree: v.tree})
	}
	done := guesttest.InGuest(t, jobs)
	for i, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			if v.fill == "tree" && !slices.Equal(guesttest.Kinds(done[i].Skipped), refused) {
				t.Errorf("refused: %q", guesttest.Kinds(done[i].Skipped))
			}
			sameAs(t, jobs[i].Image, done[i].Lines)
		})
	}
}

// timeless takes the times of the root away: Linux shows when it was mounted.
func timeless(lines []guesttest.Line) []guesttest.Line {
	for _, l := range lines {
		if l.Path == "" {
			for _, field := range []string{"atime", "btime", "ctime", "mtime"} {
				l.Fields[field] = ""
			}
		}
	}
	return lines
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
	guesttest.Same(t, timeless(want), got)
	for _, l := range want {
		ino, err := guesttest.Find(f, l.Path)
		if err != nil {
			t.Error(err)
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
	checked(t, f, image)
}

// checked has fsck.exfat look at a volume. That of exfatprogs 1.2.0 asks the same question without end when the entries of a file lie in three
// clusters, which the kernel reads: such volumes are left out.
func checked(t *testing.T, f *FS, image string) {
	t.Helper()
	if f.geo.cluster > 19*cluster.SlotSize {
		guesttest.Run(t, "fsck.exfat", "-n", image)
	}
}

var makeGolden = flag.Bool("golden", false, "make testdata/*.img.gz anew, in a guest")

// goldens are small volumes that Linux filled with guesttest.Little's tree.
var goldens = []string{"c512", "c4096"}

// TestMakeGolden makes small volumes for tests that need no guest, and what Linux shows of them.
func TestMakeGolden(t *testing.T) {
	if !*makeGolden {
		t.Skip("asked for by -golden")
	}
	var jobs []guesttest.Job
	for _, v := range []variant{{size: 5, make: "-c 512 -L golden"}, {size: 8, make: "-c 4096"}} {
		jobs = append(jobs, guesttest.Job{Image: v.image(t), Type: "exfat", Options: mountOptions, Fill: "little"})
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
		f, err := Open(guesttest.Memory(guesttest.Unpack(t, name+".img")), guest.Options{})
		must(t, err)
		got, err := guesttest.WalkFS(f)
		must(t, err)
		if len(want) < 100 {
			t.Errorf("only %d lines", len(want))
		}
		guesttest.Same(t, timeless(want), got)
		guesttest.Conform(t, f)
	}
}
