package iso9660

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// source makes a directory that fits on a CD.
func source(t *testing.T, tree guesttest.Tree) string {
	t.Helper()
	guesttest.Needs(t, "xorriso", "genisoimage")
	dir := t.TempDir()
	tree.NoHuge = true
	if _, err := guesttest.Fill(dir, tree); err != nil {
		t.Fatal(err)
	}
	err := filepath.Walk(dir, func(p string, fi os.FileInfo, err error) error {
		if err == nil && fi.Name() == "large" && fi.Mode()&os.ModeDevice != 0 { // there is no agreement on how its numbers are written
			return os.Remove(p)
		}
		if err == nil && (fi.Mode().IsRegular() && fi.Size() > 64<<20 || fi.Mode()&os.ModeSymlink != 0 && fi.Size() > 255) {
			return os.Remove(p)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	late, _ := filepath.Glob(dir + "/times/*[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9].*")
	for _, p := range late {
		if fi, err := os.Stat(p); err == nil && fi.ModTime().Year() > 2155 { // a date's year is one byte
			os.Remove(p)
		}
	}
	return dir
}

// plain is a small tree with names that ISO 9660 and Joliet can have.
func plain(t *testing.T) string {
	t.Helper()
	guesttest.NeedsPrograms(t, "xorriso", "genisoimage")
	dir := t.TempDir()
	for i, name := range []string{"README.TXT", "no extension", "Dir/Größe.txt", "Dir/日本語.bin", "Dir/Sub/a.b.c", "A/B/C/D/E/F/G/deep", "Long names are cut somewhere by plain names of ISO 9660.text", "x.tar.gz", "empty"} {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, bytes.Repeat([]byte(name), i*300), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "empty"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// genisoimage makes an image of a directory.
func genisoimage(t testing.TB, dir string, options ...string) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "iso")
	cmd := exec.Command("genisoimage", append(append([]string{"-quiet", "-V", "A Label", "-o", image}, options...), dir)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("genisoimage: %v\n%s", err, out)
	}
	return image
}

func xorriso(t testing.TB, dir string, options ...string) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "iso")
	args := append(append([]string{"-as", "mkisofs", "-quiet", "-V", "A Label", "-o", image}, options...), dir)
	if out, err := exec.Command("xorriso", args...).CombinedOutput(); err != nil {
		t.Fatalf("xorriso: %v\n%s", err, out)
	}
	return image
}

func open(t testing.TB, image string) *FS {
	t.Helper()
	f, err := Open(guesttest.OpenDevice(t, image), guest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func walk(t testing.TB, f guest.FS) []guesttest.Line {
	t.Helper()
	list, err := guesttest.WalkFS(f)
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// large is a directory with files that need several extents.
func large(t *testing.T) string {
	t.Helper()
	guesttest.NeedsPrograms(t, "xorriso", "genisoimage")
	dir := t.TempDir()
	for _, name := range []string{"a", "large", "z"} {
		guesttest.SparseAt(t, dir+"/"+name, 9<<29*int64(len(name)/5)+1000)
	}
	f, err := os.OpenFile(dir+"/large", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, off := range []int64{0, 1 << 30, 1<<32 - 4096, 1 << 32, 9<<29 + 900} {
		if _, err := f.WriteAt(fmt.Appendf(nil, "%100d", off), off); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// extents makes sure that a file of several has the content that it was made of, at their border too.
func extents(t *testing.T, dir string, f *FS) {
	t.Helper()
	ino, err := guesttest.Find(f, "large")
	if err != nil {
		t.Fatal(err)
	}
	file, err := f.Open(ino)
	if err != nil {
		t.Fatal(err)
	}
	if c := file.(*content); len(c.pieces) < 2 || c.Size() != 9<<29+1000 {
		t.Fatalf("%d pieces, %d bytes", len(c.pieces), c.Size())
	}
	want := guesttest.OpenDevice(t, dir+"/large")
	a, b := make([]byte, 1<<20), make([]byte, 1<<20)
	for _, off := range []int64{0, 1<<30 - 77, 1<<32 - 1<<19, 1<<32 - 4096 - 2048, 9<<29 - 100} {
		n, errA := want.ReadAt(a, off)
		m, errB := file.ReadAt(b, off)
		if n != m || errA != errB || !bytes.Equal(a[:n], b[:m]) {
			t.Errorf("at %d: %d bytes, %v; the source has %d, %v", off, m, errB, n, errA)
		}
	}
	for _, name := range []string{"a", "z"} {
		if _, err := f.Lookup(f.Root(), name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// images are one of each kind; the directory several is for that of large files. Directories deeper than eight are moved by genisoimage,
// and not by xorriso. TestSource has a larger tree.
func images(t *testing.T, several string) map[string]string {
	t.Helper()
	small, few := source(t, guesttest.Tree{Seed: 7, Files: 300, Big: 3 << 20, Names: 300, Fragments: 4}), plain(t)
	packed := t.TempDir() + "/z"
	guesttest.Run(t, "mkzftree", few, packed)
	return map[string]string{
		"rock ridge":            genisoimage(t, source(t, guesttest.Tree{Seed: 3, Files: 1500, Names: 1000, Big: 4 << 20, Fragments: 4}), "-R"),
		"rock ridge and joliet": genisoimage(t, few, "-R", "-J", "-joliet-long"),
		"rock ridge by xorriso": xorriso(t, small),
		"old rock ridge":        xorriso(t, small, "-R", "--rr_reloc_dir", "moved", "-iso-level", "1"),
		"joliet":                genisoimage(t, few, "-J", "-joliet-long"),
		"joliet by xorriso":     xorriso(t, few, "--norock", "-J"),
		"plain":                 genisoimage(t, few),
		"plain with versions":   genisoimage(t, few, "-iso-level", "2"),
		"plain, anything":       genisoimage(t, few, "-U", "-iso-level", "3"),
		"zisofs":                genisoimage(t, packed, "-R", "-z"),
		"extents":               xorriso(t, several, "-iso-level", "3", "-R"),
	}
}

func TestMain(m *testing.M) { guesttest.Main(m, nil) }

// TestKernel compares each kind with what the kernel of a guest shows.
func TestKernel(t *testing.T) {
	if os.Getenv("HOLDFAST_TEST_ALL") == "" {
		t.Skip("boots a guest, which takes a minute; HOLDFAST_TEST_ALL asks for it")
	}
	several := large(t) // 4.5 GiB on the CD
	all := images(t, several)
	var names []string
	var jobs []guesttest.Job
	for name, image := range all {
		names = append(names, name)
		jobs = append(jobs, guesttest.Job{Image: image, Type: "iso9660", Options: "iocharset=utf8"})
	}
	for i, done := range guesttest.InGuest(t, jobs) {
		t.Run(names[i], func(t *testing.T) {
			f := open(t, all[names[i]])
			// Linux 6.1 leaves the last part of names of 254 and 255 bytes out; TestSource has them whole.
			cut := func(l guesttest.Line) bool {
				return strings.HasPrefix(l.Path, "names/xxx") || strings.HasPrefix(l.Path, "names/ééé")
			}
			want, got := slices.DeleteFunc(done.Lines, cut), slices.DeleteFunc(walk(t, f), cut)
			for _, l := range append(want, got...) {
				for _, name := range []string{"mtime", "atime", "ctime"} { // of which Linux 6.1 keeps 32 bits
					var sec int64
					fmt.Sscanf(l.Fields[name], "%d.", &sec)
					l.Fields[name] = fmt.Sprint(int32(sec))
				}
			}
			guesttest.Same(t, want, got)
			if names[i] == "extents" {
				extents(t, several, f)
			}
			t.Logf("%d entries", len(got))
		})
	}
}

// TestSource compares Rock Ridge with the directory that the image was made of.
func TestSource(t *testing.T) {
	tree := guesttest.Tree{Seed: 3, Big: 8 << 20, Fragments: 4}
	if testing.Short() {
		tree = guesttest.Tree{Seed: 3, Files: 300, Big: 1 << 20, Names: 300, Fragments: 4}
	}
	dir := source(t, tree)
	list := map[string]string{"genisoimage": genisoimage(t, dir, "-R")}
	if testing.Short() { // of the full tree it writes an image and says that it is damaged
		list["xorriso"] = xorriso(t, dir)
	}
	for name, image := range list {
		t.Run(name, func(t *testing.T) {
			want, err := guesttest.Walk(dir)
			if err != nil {
				t.Fatal(err)
			}
			f := open(t, image)
			got := walk(t, f)
			for _, l := range got {
				if ino, err := guesttest.Find(f, l.Path); err != nil {
					t.Errorf("%s: %v", guesttest.Quote(l.Path), err)
				} else if st, err := f.Stat(ino); err != nil || fmt.Sprint(st.Size) != l.Fields["size"] {
					t.Errorf("%s: %d bytes, %v, not %s", guesttest.Quote(l.Path), st.Size, err, l.Fields["size"])
				}
			}
			for _, l := range append(want, got...) {
				l.Fields["mtime"], _, _ = strings.Cut(l.Fields["mtime"], ".") // to the second
				if l.Fields["type"] == "d" {
					l.Fields["size"] = ""
				}
			}
			got = slices.DeleteFunc(got, func(l guesttest.Line) bool { return l.Path == "rr_moved" }) // where what is too deep was moved to
			guesttest.Same(t, want, got, "blocks", "atime", "ctime", "btime", "xattrs", "id", "nlink")
			guesttest.Conform(t, f)
			t.Logf("%d entries", len(got))
		})
	}
}

// TestBsdtar compares contents of plain names and Joliet with what libarchive reads.
func TestBsdtar(t *testing.T) {
	guesttest.NeedsPrograms(t, "bsdtar")
	few := plain(t)
	for name, image := range map[string]string{"joliet": genisoimage(t, few, "-J", "-joliet-long"), "plain": genisoimage(t, few)} {
		dir := t.TempDir()
		guesttest.Run(t, "bsdtar", "-C", dir, "-xf", image)
		want, err := guesttest.Walk(dir)
		if err != nil {
			t.Fatal(err)
		}
		f := open(t, image)
		for i, l := range want {
			if name == "plain" {
				want[i].Path = strings.TrimSuffix(strings.ToLower(l.Path), ".")
			}
			if l.Path == "" {
				continue
			}
			ino, err := guesttest.Find(f, want[i].Path)
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			st, err := f.Stat(ino)
			if err != nil || l.Fields["type"] == "f" && fmt.Sprint(st.Size) != l.Fields["size"] {
				t.Errorf("%s: %s: %+v, %v", name, l.Path, st, err)
			}
		}
		if got := walk(t, f); len(got) != len(want) {
			t.Errorf("%s: %d entries, libarchive has %d", name, len(got), len(want))
		}
	}
}

// TestInfo: label and UUID as blkid names them.
func TestInfo(t *testing.T) {
	guesttest.NeedsPrograms(t, "blkid")
	few := plain(t)
	for _, image := range []string{genisoimage(t, few, "-J"), genisoimage(t, few), xorriso(t, few, "-J")} {
		i := open(t, image).Info()
		want := guesttest.Run(t, "blkid", "-o", "export", "-p", image)
		if !strings.Contains(want, "\nUUID="+i.UUID+"\n") || !strings.Contains(want, "\nLABEL="+strings.ReplaceAll(i.Label, " ", "\\ ")+"\n") || len(i.Warnings) > 0 {
			t.Errorf("%+v; blkid:\n%s", i, want)
		}
	}
}

// TestUDF: a volume that is a UDF one too says so.
func TestUDF(t *testing.T) {
	i := open(t, genisoimage(t, plain(t), "-udf", "-allow-limited-size")).Info()
	if len(i.Warnings) != 1 || !strings.Contains(i.Warnings[0], "UDF") {
		t.Errorf("%+v", i)
	}
}

// TestConcurrent reads a volume by many at a time.
func TestConcurrent(t *testing.T) {
	f := open(t, genisoimage(t, plain(t), "-R"))
	want := walk(t, f)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			got, err := guesttest.WalkFS(f)
			if d := guesttest.Diff(want, got); err != nil || len(d) > 0 {
				t.Error(err, d)
			}
		})
	}
	wg.Wait()
}

// BenchmarkWalk walks a volume and hashes its files.
func BenchmarkWalk(b *testing.B) {
	dir := b.TempDir()
	for i := range 3000 {
		p := fmt.Sprintf("%s/%d/%d/a file of some name", dir, i%20, i)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			b.Fatal(err)
		}
		if err := os.WriteFile(p, bytes.Repeat([]byte("content "), i), 0o644); err != nil {
			b.Fatal(err)
		}
	}
	if _, err := exec.LookPath("genisoimage"); err != nil {
		b.Skip(err)
	}
	image := genisoimage(b, dir, "-R")
	for b.Loop() {
		if _, err := guesttest.WalkFS(open(b, image)); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N*6041)/b.Elapsed().Seconds(), "entries/s")
}
