package ntfs

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

var makeGolden = flag.Bool("golden", false, "make testdata/tiny.* anew; needs root")

// TestMakeGolden makes a small volume and what ntfs-3g shows of it, for tests that need neither.
func TestMakeGolden(t *testing.T) {
	if !*makeGolden {
		t.Skip("asked for by -golden")
	}
	image := tiny(t)
	disk, err := os.ReadFile(image)
	must(t, err)
	truth, err := json.Marshal(withoutWOF(guesttest.TruthNTFS(t, image, "")))
	must(t, err)
	for name, b := range map[string][]byte{"tiny.img.gz": disk, "tiny.json.gz": truth} {
		guesttest.Zip(t, "testdata/"+name, b)
	}
}

// withoutWOF leaves out what ntfs-3g cannot read.
func withoutWOF(lines []guesttest.Line) []guesttest.Line {
	return slices.DeleteFunc(lines, func(l guesttest.Line) bool { return strings.HasPrefix(l.Path, "wof ") })
}

// wofContent is what the files of WOF have.
func wofContent() []byte {
	var b []byte
	for i := range 3000 {
		b = fmt.Appendf(b, "%d call \xe8%c%c\x00\x00 ", i, i%50, i%3)
	}
	return b
}

// tiny makes a volume of 4 MiB with something of all kinds.
func tiny(t *testing.T) (image string) {
	t.Helper()
	image = volume(t, 4<<20, "-c", "512")
	dir, unmount := guesttest.MountNTFS(t, image, "compression,permissions")
	rng := rand.New(rand.NewPCG(9, 9))
	d := dir + "/compressed"
	must(t, os.Mkdir(d, 0o755))
	must(t, unix.Setxattr(d, "system.ntfs_attrib_be", binary.BigEndian.AppendUint32(nil, 0x820), 0))
	must(t, os.WriteFile(d+"/file", []byte(strings.Repeat("some text ", 4000)), 0o644))
	must(t, os.WriteFile(d+"/mixed", mixed(rng, 90000), 0o644))
	must(t, os.MkdirAll(dir+"/a/b/c", 0o755))
	for i := range 40 {
		must(t, os.WriteFile(fmt.Sprintf("%s/a/%d %s", dir, i, strings.Repeat("n", 60)), mixed(rng, i*40), 0o644))
	}
	for i := range 12 {
		must(t, os.Link(dir+"/compressed/mixed", fmt.Sprintf("%s/a/b/%d %s", dir, i, strings.Repeat("l", 100))))
		must(t, unix.Setxattr(dir+"/compressed/mixed", fmt.Sprint("user.", i), mixed(rng, i*30), 0))
	}
	must(t, os.Symlink("a/b", dir+"/link"))
	w, err := os.Create(dir + "/sparse")
	must(t, err)
	for i := range int64(150) {
		_, err := w.WriteAt([]byte("x"), i*1024)
		must(t, err)
	}
	must(t, w.Close())
	for algorithm, format := range []string{"XPRESS", "LZX"} {
		p := fmt.Sprint(dir, "/wof ", algorithm)
		must(t, os.WriteFile(p, nil, 0o644))
		b := packed(t, map[string][]byte{"x": wofContent()}, format, int(wofAlgorithms[algorithm].chunk))["x"]
		must(t, unix.Setxattr(p, "user."+wofStream, b, 0))
		must(t, os.Truncate(p, int64(len(wofContent()))))
		must(t, unix.Setxattr(p, "system.ntfs_reparse_data", wofReparse(uint32(algorithm)), 0))
	}
	must(t, os.WriteFile(dir+"/relative", nil, 0o644))
	must(t, unix.Lsetxattr(dir+"/relative", "system.ntfs_reparse_data", link(tagSymlink, "A/b", true), 0))
	unmount()
	return image
}

var golden = sync.OnceValues(func() ([]byte, error) { return guesttest.Unzip("testdata/tiny.img.gz") })

// goldenDisk is a copy of the volume.
func goldenDisk(t testing.TB) memory {
	t.Helper()
	b, err := golden()
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Clone(b)
}

func TestGolden(t *testing.T) {
	b, err := guesttest.Unzip("testdata/tiny.json.gz")
	must(t, err)
	var want []guesttest.Line
	must(t, json.Unmarshal(b, &want))
	f, err := Open(goldenDisk(t), guest.Options{})
	must(t, err)
	got, err := guesttest.WalkFS(f)
	must(t, err)
	for _, l := range got {
		if sum := fmt.Sprintf("%x", sha256.Sum256(wofContent())); strings.HasPrefix(l.Path, "wof ") && l.Fields["sum"] != sum {
			t.Errorf("%s: %v", l.Path, l.Fields)
		}
	}
	if len(want) < 60 {
		t.Errorf("only %d lines", len(want))
	}
	guesttest.Same(t, want, withoutWOF(got))
	guesttest.Conform(t, f)
}
