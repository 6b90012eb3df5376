package extract_test

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fs"
	"github.com/holdfast-backup/holdfast/fs/extract"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

type streamer func(context.Context, io.Writer, []extract.Source, extract.Options) (extract.Result, error)

// archived writes the guest's tree to a file, without what is too large for a stream.
func (g *backedUp) archived(t *testing.T, write streamer, ext string) (file string, r extract.Result) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "a."+ext)
	w, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	r, err = write(t.Context(), w, []extract.Source{source(t, g.tree, "copy", "vm/latest/files/disk0")}, extract.Options{
		Skip: func(_ fs.Dir, name string) bool { return name == "sparse" },
		Report: func(i extract.Item) {
			if i.Err != nil {
				t.Errorf("%s: %v", i.Path, i.Err)
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", r)
	return file, r
}

// without leaves lines out.
func without(list []guesttest.Line, out func(guesttest.Line) bool) []guesttest.Line {
	return slices.DeleteFunc(slices.Clone(list), out)
}

func under(names ...string) func(guesttest.Line) bool {
	return func(l guesttest.Line) bool {
		for _, n := range names {
			if l.Path == n || n != "" && strings.HasPrefix(l.Path, n+"/") {
				return true
			}
		}
		return false
	}
}

// tar has GNU tar and libarchive extract the stream.
func (g *backedUp) tar(t *testing.T) {
	file, r := g.archived(t, extract.Tar, "tar")
	if r.Lost["socket"] != 1 || len(r.Lost) != 1 {
		t.Errorf("lost: %v", r.Lost)
	}
	for _, c := range [][]string{
		{"tar", "--xattrs", "--xattrs-include=*", "--acls", "--numeric-owner", "--same-owner", "-xpf", file, "-C"},
		{"bsdtar", "--xattrs", "--acls", "--numeric-owner", "-xpf", file, "-C"},
	} {
		t.Run(c[0], func(t *testing.T) {
			dest := target(t)
			out := guesttest.Run(t, append(c, dest)...)
			t.Logf("%.2000s", out)
			want := without(g.want, under("sparse", "special/socket"))
			if c[0] == "bsdtar" { // takes -1.5 s for half a second after -1 (libarchive 3.6.2, GNU tar does not)
				want = without(want, under("times"))
				st, err := os.Stat(dest + "/copy")
				if err = errors.Join(err, os.RemoveAll(dest+"/copy/times"), os.Chtimes(dest+"/copy", time.Time{}, st.ModTime())); err != nil {
					t.Fatal(err)
				}
			}
			sameTree(t, want, dest+"/copy", "atime")
		})
	}
}

// zip has unzip and libarchive extract the stream.
func (g *backedUp) zip(t *testing.T) {
	file, r := g.archived(t, extract.Zip, "zip")
	t.Log(r.Lost)
	for _, c := range [][]string{{"unzip", "-qXK^", file, "-d"}, {"bsdtar", "-xpf", file, "-C"}} {
		t.Run(c[0], func(t *testing.T) {
			dest := target(t)
			out, err := exec.Command(c[0], append(c[1:], dest)...).CombinedOutput()
			t.Logf("%v: %.2000s", err, out)
			want := without(g.want, under("sparse", "special/socket", "special/fifo", "special/null", "special/block", "special/large"))
			for _, l := range want {
				l.Fields["mtime"], _, _ = strings.Cut(l.Fields["mtime"], ".") // to the second
			}
			sameTree(t, want, dest+"/copy", "atime", "xattrs", "id", "nlink", "mtime")
		})
	}
}

// TestTarBroken: a file that cannot be read to its end leaves an archive that no reader takes for whole, and one whose
// beginning is bad is left out.
func TestTarBroken(t *testing.T) {
	for _, bad := range []int64{0, 1 << 20, 3<<20 - 5} {
		for name, write := range map[string]streamer{"tar": extract.Tar, "zip": extract.Zip} {
			file := filepath.Join(t.TempDir(), "a."+name)
			w, err := os.Create(file)
			if err != nil {
				t.Fatal(err)
			}
			d := dir{{"a", textFile("before")}, {"b", &doubleFile{size: 5 << 20, bad: bad}}, {"c", textFile("after")}}
			r, err := write(t.Context(), w, []extract.Source{{Name: "d", Node: d}}, extract.Options{})
			w.Close()
			list := exec.Command("tar", "-tf", file)
			if name == "zip" {
				list = exec.Command("unzip", "-Z1", file)
			}
			out, rerr := list.CombinedOutput()
			whole := err == nil && r.Failed == 1 && extract.IsDamage(r.First)
			if bad == 0 && (!whole || rerr != nil || string(out) != "d/\nd/a\nd/c\n") {
				t.Errorf("%s: %+v, %v; %v %s", name, r, err, rerr, out)
			}
			if bad > 0 && (err == nil || !extract.IsDamage(err) || rerr == nil) {
				t.Errorf("%s, broken at %d: %+v, %v; %v %s", name, bad, r, err, rerr, out)
			}
		}
	}
}

// TestPipeGone: nobody reads the archive.
func TestPipeGone(t *testing.T) {
	r, w := io.Pipe()
	r.Close()
	d := dir{{"a", &doubleFile{size: 5 << 20, bad: 9 << 20}}, {"b", textFile("x")}}
	if _, err := extract.Tar(t.Context(), w, []extract.Source{{Name: "d", Node: d}}, extract.Options{}); !errors.Is(err, io.ErrClosedPipe) {
		t.Error(err)
	}
}
