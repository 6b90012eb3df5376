package extract_test

import (
	"context"
	"io"
	"iter"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fs"
	"github.com/holdfast-backup/holdfast/fs/extract"
	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// dir is a directory of a file system that was made by somebody hostile: any names, any number of times.
type dir []child

type child struct {
	name string
	node fs.Node
}

func stat(mode uint32) *guest.Stat {
	now := time.Unix(1e9, 5)
	return &guest.Stat{Mode: mode, Nlink: 1, Mtime: now, Atime: now, UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}
}

func (d dir) Attr(context.Context) (fs.Attr, error) {
	return fs.Attr{Kind: fs.KindDir, Inode: 77 + uint64(len(d)), Time: time.Unix(1e9, 0), Guest: stat(0o40755)}, nil
}
func (d dir) Entries(context.Context) ([]fs.Entry, error) { panic("it can be listed bit by bit") }
func (d dir) List(context.Context) iter.Seq2[fs.Entry, error] {
	return func(yield func(fs.Entry, error) bool) {
		for i, c := range d {
			if !yield(fs.Entry{Name: c.name, Inode: uint64(i)}, nil) {
				return
			}
		}
	}
}

// Lookup gives what has the name, of several each in turn.
func (d dir) Lookup(_ context.Context, name string) (fs.Node, error) {
	for _, c := range d {
		if c.name != name {
			continue
		}
		if t, ok := c.node.(*turns); ok {
			return t.next(), nil
		}
		return c.node, nil
	}
	return nil, store.ErrNotExist
}

// turns is one node after the other.
type turns struct {
	fs.Node
	list []fs.Node
	at   int
}

func (t *turns) next() fs.Node {
	if t.at > 0 {
		time.Sleep(100 * time.Millisecond) // the first is there by now
	}
	n := t.list[t.at%len(t.list)]
	t.at++
	return n
}

type link string

func (l link) Attr(context.Context) (fs.Attr, error) {
	return fs.Attr{Kind: fs.KindLink, Inode: 5, Time: time.Unix(1e9, 0), Guest: stat(0o120777)}, nil
}
func (l link) Target(context.Context) (string, error) { return string(l), nil }

// doubleFile is zeros that cannot be read from some offset on.
type doubleFile struct {
	size, bad int64
	text      string
}

func textFile(s string) *doubleFile { return &doubleFile{int64(len(s)), 1 << 60, s} }

func (f *doubleFile) Attr(context.Context) (fs.Attr, error) {
	return fs.Attr{Kind: fs.KindFile, Inode: 9, Size: f.size, Time: time.Unix(1e9, 0), Guest: stat(0o100644)}, nil
}
func (f *doubleFile) Hold(context.Context) (func(), error)    { return func() {}, nil }
func (f *doubleFile) Image(context.Context) (fs.Image, error) { return f, nil }
func (f *doubleFile) Size() int64                             { return f.size }
func (f *doubleFile) Allocated(g int64) iter.Seq2[extent.Extent, error] {
	return extent.Coarsen(extent.All([]extent.Extent{{Len: f.size}}), g, f.size)
}
func (f *doubleFile) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > f.bad {
		return 0, guest.Damaged("bytes from %d on", f.bad)
	}
	if f.text != "" {
		return strings.NewReader(f.text).ReadAt(p, off)
	}
	if off+int64(len(p)) > f.size {
		return int(f.size - off), io.EOF
	}
	return len(p), nil
}

// hostile has names that lead elsewhere, and links of the same names as directories and files.
func hostile(outside string) dir {
	evil := textFile("evil")
	two := func(a, b fs.Node) *turns { return &turns{list: []fs.Node{a, b}} }
	sub := dir{{"passwd", evil}}
	linkThenDir, dirThenLink, linkThenFile := two(link(outside), sub), two(sub, link(outside)), two(link(outside+"/f"), evil)
	return dir{
		{"..", sub}, {".", sub}, {"", sub}, {"/", evil}, {"../evil", evil}, {outside + "/evil", evil}, {"a/b", evil}, {"nul\x00", evil}, {"..", evil},
		{"x", linkThenDir}, {"x", linkThenDir}, {"y", dirThenLink}, {"y", dirThenLink}, {"z", linkThenFile}, {"z", linkThenFile},
		{"good", textFile("good")}, {"bad", &doubleFile{size: 3 << 20, bad: 2 << 20}},
	}
}

// TestHostile copies such a tree in all ways and looks at what is outside.
func TestHostile(t *testing.T) {
	for _, how := range []string{"dir", "again", "tar", "bsdtar", "zip"} {
		t.Run(how, func(t *testing.T) {
			base := t.TempDir()
			outside, dest := filepath.Join(base, "outside"), filepath.Join(base, "dest")
			for _, d := range []string{outside, dest} {
				if err := os.Mkdir(d, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			h := hostile(outside)
			if how != "tar" && how != "bsdtar" && how != "zip" {
				n := 1
				if how == "again" {
					n = 2
				}
				for range n {
					r, err := extract.ToDir(t.Context(), dest, []extract.Source{{Name: "d", Node: h}}, extract.Options{})
					if err != nil || r.Failed < 9+3 || r.Damaged < 10 {
						t.Errorf("%+v, %v", r, err)
					}
				}
			} else {
				archive(t, how, h, base, dest)
			}
			if b, err := os.ReadFile(dest + "/d/good"); string(b) != "good" {
				t.Errorf("%q, %v", b, err)
			}
			if _, err := os.Lstat(dest + "/d/bad"); err == nil && how != "zip" {
				t.Error("a damaged file is there")
			}
			if l, err := os.ReadDir(outside); err != nil || len(l) > 0 {
				t.Errorf("outside: %v, %v", l, err)
			}
			if l, _ := os.ReadDir(dest); len(l) != 1 {
				t.Errorf("beside: %v", l)
			}
		})
	}
}

// archive makes one of what can be read, and has it extracted with no protection by those who do.
func archive(t *testing.T, how string, h dir, base, dest string) {
	t.Helper()
	h = h[:len(h)-1]
	file := base + "/archive"
	w, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	write, cmd := extract.Tar, []string{"tar", "--absolute-names", "-xf", file, "-C", dest}
	switch how {
	case "bsdtar":
		cmd = []string{"bsdtar", "-P", "-xf", file, "-C", dest}
	case "zip":
		write, cmd = extract.Zip, []string{"unzip", "-qo", file, "-d", dest}
	}
	r, err := write(t.Context(), w, []extract.Source{{Name: "d", Node: h}}, extract.Options{})
	if err != nil || r.Failed < 9+2 {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := exec.LookPath(cmd[0]); err != nil {
		t.Skip("needs ", cmd[0])
	}
	// They refuse to put the link where the directory is.
	out, err := exec.Command(cmd[0], cmd[1:]...).CombinedOutput()
	t.Logf("%v %s", err, out)
}

// TestDepth ends at directories without end.
func TestDepth(t *testing.T) {
	d := dir{{"same inode", dir{{"x", textFile("x")}}}}
	r, err := extract.ToDir(t.Context(), t.TempDir(), []extract.Source{{Name: "d", Node: d}}, extract.Options{})
	if err != nil || r.Failed != 1 || !extract.IsDamage(r.First) {
		t.Errorf("%+v, %v", r, err)
	}
	r, err = extract.ToDir(t.Context(), t.TempDir(), []extract.Source{{Name: "d", Node: endless(1)}}, extract.Options{})
	if err != nil || r.Failed != 1 || r.Dirs < 500 {
		t.Errorf("%+v, %v", r, err)
	}
}

// endless is a directory in a directory in a directory.
type endless uint64

func (e endless) Attr(context.Context) (fs.Attr, error) {
	return fs.Attr{Kind: fs.KindDir, Inode: uint64(e), Guest: stat(0o40755)}, nil
}
func (e endless) Entries(context.Context) ([]fs.Entry, error) { return []fs.Entry{{Name: "in"}}, nil }
func (e endless) Lookup(context.Context, string) (fs.Node, error) {
	return e + 1, nil
}
