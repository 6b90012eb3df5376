package ntfs

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// reparseData makes a reparse point.
func reparseData(tag uint32, data []byte) []byte {
	b := le.AppendUint32(nil, tag)
	return append(le.AppendUint32(b, uint32(len(data))), data...)
}

// link makes the reparse point of a symbolic link, relative or not, or of a junction.
func link(tag uint32, target string, relative bool) []byte {
	name, _ := encode(strings.ReplaceAll(target, "/", `\`))
	n := uint16(len(name))
	var b []byte
	for _, v := range []uint16{0, n, n + 2, 0} {
		b = le.AppendUint16(b, v)
	}
	if tag == tagSymlink {
		flag := uint32(0)
		if relative {
			flag = 1
		}
		b = le.AppendUint32(b, flag)
	}
	return reparseData(tag, append(append(b, name...), 0, 0, 0, 0))
}

// links are reparse points, and what leads where; "" is what ntfs-3g says, made relative.
var links = []struct {
	at     string // with a slash at its end: a directory
	data   []byte
	target string
}{
	{"relative", link(tagSymlink, "Dir/Sub/File.txt", true), ""},
	{"other case", link(tagSymlink, "dir/SUB/file.TXT", true), ""},
	{"Dir/beside", link(tagSymlink, "sub/File.txt", true), ""},
	{"junction/", link(tagMountPoint, "/??/C:/Dir/Sub", false), ""},
	{"Dir/Sub/junction/", link(tagMountPoint, "/??/D:/dir/other", false), ""},
	{"Dir/Sub/absolute", link(tagSymlink, "/??/C:/Dir/Sub/File.txt", false), ""},
	{"directory link/", link(tagSymlink, "/??/C:/Dir", false), ""},
	{"wsl", reparseData(tagLXSymlink, append([]byte{2, 0, 0, 0}, "../some/where \xc3\xa9"...)), ""},
	// Of these ntfs-3g shows none, or one below a directory of its own (.NTFS-3G).
	{"nowhere", link(tagSymlink, "no/such", true), "no/such"},
	{"up", link(tagSymlink, "../x/./y", true), "../x/./y"},
	{"Dir/Sub/from the root", link(tagSymlink, "/dir/Sub", true), "../../Dir/Sub"},
	{"Dir/to the root/", link(tagMountPoint, "/??/C:/", false), ".."},
	{"other volume", link(tagSymlink, "/??/E:/x/y", false), "E:/x/y"},
	{"share", link(tagSymlink, "/??/UNC/server/share", false), "UNC/server/share"},
	{"volume/", link(tagMountPoint, "/??/Volume{12345678-1234-1234-1234-123456789012}/", false), "Volume{12345678-1234-1234-1234-123456789012}/"},
}

func TestLinks(t *testing.T) {
	image := volume(t, 64<<20)
	dir, unmount := guesttest.MountNTFS(t, image, "")
	must(t, os.MkdirAll(dir+"/Dir/Sub", 0o755))
	must(t, os.Mkdir(dir+"/Dir/Other", 0o755))
	must(t, os.WriteFile(dir+"/Dir/Sub/File.txt", []byte("x"), 0o644))
	must(t, os.WriteFile(dir+"/known", []byte("x"), 0o644))
	must(t, unix.Setxattr(dir+"/known", "system.ntfs_object_id", []byte("0123456789abcdef"), 0))
	for _, l := range links {
		p := dir + "/" + strings.TrimSuffix(l.at, "/")
		if strings.HasSuffix(l.at, "/") {
			must(t, os.Mkdir(p, 0o755))
		} else {
			must(t, os.WriteFile(p, nil, 0o644))
		}
		must(t, unix.Lsetxattr(p, "system.ntfs_reparse_data", l.data, 0))
	}
	unmount()
	f := open(t, image)
	dir, unmount = guesttest.MountNTFS(t, guesttest.Copy(t, image), "ro")
	defer unmount()
	for _, l := range links {
		at := strings.TrimSuffix(l.at, "/")
		want, absolute := l.target, false
		if want == "" {
			var err error
			want, err = os.Readlink(dir + "/" + at)
			must(t, err)
			if filepath.IsAbs(want) {
				want, err = filepath.Rel(dir, want)
				must(t, err)
				absolute = true
			}
		}
		ino := lookup(t, f, at)
		got, err := f.Readlink(ino)
		size := int64(len(got))
		if absolute {
			got = filepath.Join(filepath.Dir(at), got)
		}
		if err != nil || got != want {
			t.Errorf("%s: %q, %v; want %q", at, got, err, want)
		}
		if st, err := f.Stat(ino); err != nil || st.Mode&guest.ModeType != guest.ModeLink || st.Size != size {
			t.Errorf("%s: %+v, %v", at, st, err)
		}
	}
	// ntfs-3g shows 48 bytes more, of $Extend/$ObjId.
	list, err := f.Xattrs(lookup(t, f, "known"))
	if i := slices.IndexFunc(list, func(x guest.Xattr) bool { return x.Name == "system.ntfs_object_id" }); err != nil || i < 0 || string(list[i].Value) != "0123456789abcdef" {
		t.Errorf("%v, %v", list, err)
	}
}

// TestElsewhere has files whose data Windows has elsewhere: they are there, and their content is refused.
func TestElsewhere(t *testing.T) {
	image := volume(t, 64<<20)
	dir, unmount := guesttest.MountNTFS(t, image, "")
	wim := le.AppendUint32(le.AppendUint32(nil, 1), wofWIM)
	files := map[string][]byte{"dedup": reparseData(tagDedup, make([]byte, 64)), "cloud": reparseData(0x9000601a, make([]byte, 64)), "wim": reparseData(tagWOF, append(wim, make([]byte, 24)...)),
		"hsm": reparseData(tagHSM2, make([]byte, 40)), "app": reparseData(tagAppLink, make([]byte, 40)), "unknown": reparseData(0x80001234, make([]byte, 40))}
	for name, data := range files {
		must(t, os.WriteFile(dir+"/"+name, nil, 0o644))
		must(t, os.Truncate(dir+"/"+name, 100000))
		must(t, unix.Lsetxattr(dir+"/"+name, "system.ntfs_reparse_data", data, 0))
	}
	must(t, os.WriteFile(dir+"/in the cloud and here", []byte("all of it"), 0o644))
	must(t, unix.Lsetxattr(dir+"/in the cloud and here", "system.ntfs_reparse_data", files["cloud"], 0))
	unmount()
	f := open(t, image)
	for name := range files {
		ino := lookup(t, f, name)
		if st, err := f.Stat(ino); err != nil || st.Mode&guest.ModeType != guest.ModeRegular || st.Size != 100000 {
			t.Errorf("%s: %+v, %v", name, st, err)
		}
		if _, err := f.Open(ino); !errors.Is(err, guest.ErrUnsupported) {
			t.Errorf("%s: %v", name, err)
		} else {
			t.Log(err)
		}
	}
	here, err := f.Open(lookup(t, f, "in the cloud and here"))
	must(t, err)
	b := make([]byte, here.Size())
	if _, err := here.ReadAt(b, 0); err != nil || string(b) != "all of it" {
		t.Errorf("%q, %v", b, err)
	}
}

// TestWSL sets what WSL notes of a file.
func TestWSL(t *testing.T) {
	image := volume(t, 64<<20)
	dir, unmount := guesttest.MountNTFS(t, image, "")
	var ea []byte
	notes := []struct {
		name  string
		value uint32
	}{{"$LXUID", 1000}, {"$LXGID", 70000}, {"$LXMOD", 0o104751}}
	for _, n := range notes {
		e := append([]byte{0, 0, 0, 0, 0, byte(len(n.name)), 4, 0}, n.name...)
		e = le.AppendUint32(append(e, 0), n.value)
		for len(e)%4 != 0 {
			e = append(e, 0)
		}
		le.PutUint32(e, uint32(len(e)))
		ea = append(ea, e...)
	}
	must(t, os.WriteFile(dir+"/file", []byte("x"), 0o644))
	must(t, unix.Setxattr(dir+"/file", "system.ntfs_ea", ea, 0))
	must(t, os.WriteFile(dir+"/short", []byte("x"), 0o644))
	must(t, unix.Setxattr(dir+"/short", "system.ntfs_dos_name", []byte("SHO~1"), 0))
	must(t, os.WriteFile(dir+"/either.txt", nil, 0o600)) // which becomes one name for both, as Windows does it
	must(t, unix.Setxattr(dir+"/either.txt", "system.ntfs_dos_name", []byte("EITHER.TXT"), 0))
	unmount()
	// Owner and mode: those of WSL, which ntfs-3g does not look at.
	same(t, image, "", "mode", "uid", "gid")
	f := open(t, image)
	st, err := f.Stat(lookup(t, f, "file"))
	if err != nil || st.Mode != guest.ModeRegular|0o4751 || st.UID != 1000 || st.GID != 70000 {
		t.Errorf("%+v, %v", st, err)
	}
	if short, err := f.Lookup(f.Root(), "SHO~1"); err != nil || short != lookup(t, f, "short") {
		t.Errorf("%d, %v", short, err)
	}
}
