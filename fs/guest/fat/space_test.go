package fat

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// TestFree: as many clusters are free as fsck.vfat counts, and a volume with other bytes in them is what it was.
func TestFree(t *testing.T) {
	guesttest.NeedsPrograms(t, "fsck.vfat")
	for _, name := range goldens {
		m := golden(t, name)
		f, err := Open(m, guest.Options{})
		must(t, err)
		want, err := guesttest.WalkFS(f)
		must(t, err)
		var free []extent.Extent
		for e, err := range f.Free() {
			must(t, err)
			free = append(free, e)
			for i := range e.Len {
				m[e.Off+i] = 0xa5
			}
		}
		out := guesttest.Run(t, "fsck.vfat", "-n", "-v", guesttest.Saved(t, m))
		n := regexp.MustCompile(`(\d+)/(\d+) clusters`).FindStringSubmatch(out)
		if n == nil {
			t.Fatal(out)
		}
		used, _ := strconv.ParseInt(n[1], 10, 64)
		all, _ := strconv.ParseInt(n[2], 10, 64)
		if got := extent.Total(free) / f.geo.cluster; got != all-used || all != f.geo.clusters {
			t.Errorf("%s: %d free clusters of %d, fsck.vfat: %d of %d", name, got, f.geo.clusters, all-used, all)
		}
		f, err = Open(m, guest.Options{})
		must(t, err)
		got, err := guesttest.WalkFS(f)
		must(t, err)
		guesttest.Same(t, want, got)
	}
}

// TestLocate: files lie where mshowfat says.
func TestLocate(t *testing.T) {
	guesttest.NeedsPrograms(t, "mshowfat")
	for _, name := range goldens {
		m := golden(t, name)
		image := guesttest.Saved(t, m)
		f, err := Open(m, guest.Options{})
		must(t, err)
		for _, path := range []string{"taking turns 0", "taking turns 2", "size 65536", "size 1", "size 0"} {
			ino, err := guesttest.Find(f, path)
			must(t, err)
			want := map[int64]bool{}
			out := guesttest.Run(t, "mshowfat", "-i", image, "::/"+path)
			for _, r := range regexp.MustCompile(`<(\d+)(?:-(\d+))?>`).FindAllStringSubmatch(out, -1) {
				from, _ := strconv.ParseInt(r[1], 10, 64)
				to, err := strconv.ParseInt(r[2], 10, 64)
				if err != nil {
					to = from
				}
				for c := from; c <= to; c++ {
					want[f.table.At(uint32(c))] = true
				}
			}
			n := 0
			for e, err := range f.Locate(ino) {
				must(t, err)
				for off := e.Off; off < e.End(); off += f.geo.cluster {
					n++
					if !want[off] {
						t.Errorf("%s: %s: %d is not its", name, path, off)
					}
				}
			}
			if n != len(want) || n == 0 && path != "size 0" {
				t.Errorf("%s: %s: %d clusters, mshowfat: %s", name, path, n, strings.TrimSpace(out))
			}
		}
	}
}

// TestMtools: mtools reads the same names and bytes, and what it writes is read.
func TestMtools(t *testing.T) {
	guesttest.NeedsPrograms(t, "mkfs.vfat", "mcopy", "mmd")
	image := guesttest.Sparse(t, 8<<20)
	guesttest.Run(t, "mkfs.vfat", "-F", "16", "-s", "1", "-n", "MTOOLS", image)
	dir := t.TempDir()
	for i, name := range []string{"ALLUPPER.TXT", "lower.txt", "Some long name.text"} { // others depend on the locale
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(strings.Repeat(name, 100*i)), 0o644))
	}
	guesttest.Run(t, "mcopy", "-i", image, "-s", "-m", dir, "::/sub")
	f := open(t, image)
	got, err := guesttest.WalkFS(f)
	must(t, err)
	want, err := guesttest.Walk(dir)
	must(t, err)
	for _, l := range want {
		if l.Path != "" {
			l.Path = "sub/" + l.Path
		} else {
			l.Path = "sub"
		}
		found := false
		for _, g := range got {
			if g.Path == l.Path {
				found = true
				if fmt.Sprint(g.Fields["type"], g.Fields["sum"]) != fmt.Sprint(l.Fields["type"], l.Fields["sum"]) {
					t.Errorf("%s: %v", l.Path, g.Fields)
				}
			}
		}
		if !found {
			t.Errorf("%s: missing", l.Path)
		}
	}
}

// TestMany: a large volume that mtools filled has the names and bytes of the directory that it copied.
func TestMany(t *testing.T) {
	guesttest.NeedsPrograms(t, "mkfs.vfat", "mcopy", "fsck.vfat")
	dir := t.TempDir()
	files, image := 20000, guesttest.Sparse(t, 800<<20)
	if testing.Short() {
		files = 1000
	}
	rng := rand.New(rand.NewPCG(6, 6))
	for i := range files {
		sub := fmt.Sprintf("%s/directory %d/%d of it", dir, i/1300, i/130)
		must(t, os.MkdirAll(sub, 0o755))
		b := make([]byte, rng.IntN(900)+i%50/49*rng.IntN(200<<10))
		for j := range b {
			b[j] = byte(rng.Uint32())
		}
		must(t, os.WriteFile(fmt.Sprintf("%s/file number %05d.text", sub, i), b, 0o644))
	}
	guesttest.Run(t, "mkfs.vfat", "-F", "32", "-s", "1", image)
	tops, err := filepath.Glob(dir + "/*")
	must(t, err)
	guesttest.Run(t, append(append([]string{"mcopy", "-i", image, "-s", "-Q"}, tops...), "::")...)
	f := open(t, image)
	got, err := guesttest.WalkFS(f)
	must(t, err)
	want, err := guesttest.Walk(dir)
	must(t, err)
	// What a directory takes, who owns it and when it was made, mtools does not copy.
	guesttest.Same(t, sizeless(want), sizeless(got), "mode", "nlink", "uid", "gid", "blocks", "mtime", "atime", "ctime", "btime")
	for _, l := range want {
		if _, err := guesttest.Find(f, strings.ToUpper(l.Path)); err != nil {
			t.Errorf("%s: %v", l.Path, err)
		}
	}
	t.Log(len(got), "lines")
}

// sizeless takes the sizes of directories away.
func sizeless(lines []guesttest.Line) []guesttest.Line {
	for _, l := range lines {
		if l.Fields["type"] == "d" {
			l.Fields["size"] = ""
		}
	}
	return lines
}

// BenchmarkWalk walks and hashes the image that FAT_IMAGE names.
func BenchmarkWalk(b *testing.B) {
	image := os.Getenv("FAT_IMAGE")
	if image == "" {
		b.Skip("needs FAT_IMAGE, the path of an image")
	}
	dev := guesttest.OpenDevice(b, image)
	b.ReportAllocs()
	for b.Loop() {
		f, err := Open(dev, guest.Options{})
		must(b, err)
		list, err := guesttest.WalkFS(f)
		must(b, err)
		b.ReportMetric(float64(len(list)), "things")
	}
}
