package xfs

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// proto is a prototype of mkfs.xfs(8), and what a reader must show of it.
type proto struct {
	text strings.Builder
	want map[string]string // path => what it is
}

func (p *proto) dir(path string, inside func()) {
	fmt.Fprintf(&p.text, "%s d--755 3 4\n", filepath.Base(path))
	p.want[path] = "d0755"
	inside()
	p.text.WriteString("$\n")
}

// protoTree makes a tree with directories in all forms.
func protoTree(t *testing.T, v5 bool) *proto {
	t.Helper()
	p := &proto{want: map[string]string{}}
	source := filepath.Join(t.TempDir(), "source")
	content := strings.Repeat("content of a file\n", 5000)
	if err := os.WriteFile(source, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	p.text.WriteString("/none\n0 0\nd--755 0 0\n")
	for form, n := range map[string]int{"short": 3, "block": 40, "leaf": 400, "node": 3000} {
		p.dir(form, func() {
			for i := range n {
				path := fmt.Sprintf("%s/Name-%d", form, i)
				switch {
				case i%3 == 0 && i > 100:
					fmt.Fprintf(&p.text, "Name-%d l--777 5 6 target-%d\n", i, i)
					p.want[path] = fmt.Sprint("l0777 target-", i)
				case i%3 == 1:
					fmt.Fprintf(&p.text, "Name-%d b--640 7 8 %d %d\n", i, i%256, i)
					p.want[path] = fmt.Sprintf("b0640 %d:%d", i%256, i)
				default:
					fmt.Fprintf(&p.text, "Name-%d pu-600 9 10\n", i)
					p.want[path] = "p4600"
				}
			}
		})
	}
	fmt.Fprintf(&p.text, "file --g755 70000 80000 %s\n", source)
	p.want["file"] = "f2755 " + fmt.Sprint(len(content)) + content[:40]
	if !v5 {
		// In version 5 mkfs.xfs 6.1 writes links outside of the inode without their header; the kernel refuses them, too.
		long := strings.Repeat("long/", 200)
		fmt.Fprintf(&p.text, "link l--777 0 0 %s\n", long)
		p.want["link"] = "l0777 " + long
	}
	p.text.WriteString("$\n")
	return p
}

// shown is what a reader shows, in the words of proto.
func shown(t *testing.T, fs *FS) map[string]string {
	t.Helper()
	got := map[string]string{}
	lines, err := guesttest.WalkFS(fs)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range lines {
		f := l.Fields
		if f["error"] != "" {
			t.Errorf("%s: %s", l.Path, f["error"])
		}
		text := f["type"] + f["mode"]
		switch f["type"] {
		case "l":
			text += " " + f["target"]
		case "b":
			text += " " + f["rdev"]
		case "f":
			ino, _ := guesttest.Find(fs, l.Path)
			file, err := fs.Open(ino)
			if err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 40)
			if _, err := file.ReadAt(b, 0); err != nil {
				t.Fatal(err)
			}
			text += " " + f["size"] + string(b)
		}
		if l.Path != "" {
			got[l.Path] = text
		}
	}
	return got
}

// TestVersion4 reads what mkfs.xfs makes of a prototype: this kernel does not mount version 4, nor names without case.
func TestVersion4(t *testing.T) {
	for _, v := range []variant{
		{name: "4", mkfs: []string{"-m", "crc=0"}},
		{name: "4 old", mkfs: []string{"-m", "crc=0", "-n", "ftype=0,size=8192", "-i", "size=256,attr=1,projid32bit=0", "-b", "size=1024", "-l", "version=1"}},
		{name: "4 of 512 bytes", mkfs: []string{"-m", "crc=0", "-b", "size=512"}},
		{name: "4 without case", mkfs: []string{"-m", "crc=0", "-n", "version=ci"}},
		{name: "5 without case", mkfs: []string{"-n", "version=ci"}},
	} {
		t.Run(strings.ReplaceAll(v.name, " ", "-"), func(t *testing.T) {
			p := protoTree(t, v.name[0] == '5')
			file := filepath.Join(t.TempDir(), "proto")
			if err := os.WriteFile(file, []byte(p.text.String()), 0o600); err != nil {
				t.Fatal(err)
			}
			v.size = 330 << 20
			v.mkfs = append(v.mkfs, "-p", file)
			image := v.empty(t)
			fs := open(t, image, guest.Options{})
			if i := fs.Info(); len(i.Warnings) > 0 || i.Replayed {
				t.Errorf("%+v", i)
			}
			got := shown(t, fs)
			for path, want := range p.want {
				if got[path] != want {
					t.Errorf("%s: %.100q, want %.100q", path, got[path], want)
				}
				_, err := guesttest.Find(fs, path)
				_, other := guesttest.Find(fs, strings.ToUpper(path))
				if err != nil || (other == nil) != fs.sb.ci {
					t.Errorf("%s: %v, in capitals: %v", path, err, other)
				}
			}
			if len(got) != len(p.want) {
				t.Errorf("%d paths, want %d", len(got), len(p.want))
			}
			if !strings.Contains(v.name, "old") { // xfs_db 6.1 crashes over attributes there
				attributes(t, fs, image)
			}
			freeByDebugger(t, image)
		})
	}
}

// attributes sets some with xfs_db and reads them.
func attributes(t *testing.T, fs *FS, image string) {
	t.Helper()
	guesttest.Needs(t, "xfs_db")
	ino, err := guesttest.Find(fs, "file")
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]int{}
	args := []string{"xfs_db", "-x", "-c", fmt.Sprint("inode ", ino)}
	for i, n := range []int{1, 30, 200, 3000, 60000, 5, 70, 900, 2000, 2500, 2000, 2500} {
		args = append(args, "-c", fmt.Sprintf("attr_set -%c -v %d name%d", "urs"[i%3], n, i))
		want[[]string{"user", "trusted", "security"}[i%3]+fmt.Sprint(".name", i)] = n
	}
	out := guesttest.Run(t, append(args, image)...)
	list, err := open(t, image, guest.Options{}).Xattrs(ino)
	if err != nil || len(list) != len(want) {
		t.Fatalf("%d attributes of %d, %v; xfs_db: %s", len(list), len(want), err, out)
	}
	for _, x := range list {
		if len(x.Value) != want[x.Name] || strings.Trim(string(x.Value), "v") != "" {
			t.Errorf("%s: %d bytes, want %d: %.20q", x.Name, len(x.Value), want[x.Name], x.Value)
		}
	}
}

// freeByDebugger compares the free space with what xfs_db says.
func freeByDebugger(t *testing.T, image string) {
	t.Helper()
	fs := open(t, image, guest.Options{})
	want := map[int64]int64{}
	for line := range strings.Lines(guesttest.Run(t, "xfs_db", "-r", "-c", "freesp -d", image)) {
		var ag, block, n int64
		if k, _ := fmt.Sscan(line, &ag, &block, &n); k == 3 {
			want[(ag*int64(fs.sb.agBlocks)+block)*fs.sb.blockSize] = n * fs.sb.blockSize
		}
	}
	for e, err := range fs.Free() {
		if err != nil {
			t.Fatal(err)
		}
		if want[e.Off] != e.Len {
			t.Errorf("%v is free, xfs_db says %d bytes", e, want[e.Off])
		}
		delete(want, e.Off)
	}
	for off, n := range want {
		if n > 16*fs.sb.blockSize { // what a group keeps for itself is in xfs_db's list, too
			t.Errorf("%d bytes at %d are free, too", n, off)
		}
	}
}
