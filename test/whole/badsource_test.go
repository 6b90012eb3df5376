package whole

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// badSources are disks that a backup must refuse, and what it says of them.
var badSources = []struct {
	name string
	says string // besides the file's name
	make func(t *testing.T, dir string) (file string)
}{
	{"missing", "no such file", func(t *testing.T, dir string) string { return dir + "/missing.raw" }},
	{"below a file", "not a directory", func(t *testing.T, dir string) string {
		return newRaw(t, dir+"/file", 5).file + "/bad.raw"
	}},
	{"directory", "neither a file nor a block device", func(t *testing.T, dir string) string {
		return mkdir(t, dir+"/bad.raw")
	}},
	{"fifo", "neither a file nor a block device", func(t *testing.T, dir string) string {
		if err := syscall.Mkfifo(dir+"/bad.raw", 0o600); err != nil {
			t.Fatal(err)
		}
		return dir + "/bad.raw"
	}},
	{"character device", "neither a file nor a block device", func(t *testing.T, dir string) string {
		return symlink(t, "/dev/zero", dir+"/bad.raw")
	}},
	{"dangling link", "no such file", func(t *testing.T, dir string) string {
		return symlink(t, "nowhere", dir+"/bad.raw")
	}},
	{"qcow2 cut in its header", "", cutQCOW2(50)},
	{"qcow2 cut in its tables", "", cutQCOW2(70_000)},
	{"qcow2 cut in its data", "", cutQCOW2(1 << 20)},
	{"qcow2 of only a magic", "", func(t *testing.T, dir string) string {
		return write(t, dir+"/bad.qcow2", "QFI\xfb")
	}},
	{"qcow2 over itself", "own chain", func(t *testing.T, dir string) string {
		return backed(t, dir, "bad.qcow2", "bad.qcow2", "qcow2")
	}},
	{"qcow2 in a loop of three", "own chain", func(t *testing.T, dir string) string {
		backed(t, dir, "b.qcow2", "c.qcow2", "qcow2")
		backed(t, dir, "c.qcow2", "bad.qcow2", "qcow2")
		return backed(t, dir, "bad.qcow2", "b.qcow2", "qcow2")
	}},
	{"qcow2 without its backing file", "no such file", func(t *testing.T, dir string) string {
		return backed(t, dir, "bad.qcow2", "lost.raw", "raw")
	}},
	{"qcow2 over an absolute name", "/etc/passwd", func(t *testing.T, dir string) string {
		return backed(t, dir, "bad.qcow2", "/etc/passwd", "raw")
	}},
	{"qcow2 over a name outside", "../", func(t *testing.T, dir string) string {
		newRaw(t, dir+"/outside.raw", 1<<20, piece{0, 512})
		return backed(t, mkdir(t, dir+"/in"), "bad.qcow2", "../outside.raw", "raw")
	}},
	{"qcow2 over a link that leads outside", "link.raw", func(t *testing.T, dir string) string {
		symlink(t, "/etc/passwd", dir+"/link.raw")
		return backed(t, dir, "bad.qcow2", "link.raw", "raw")
	}},
	{"qcow2 over a protocol", "nbd:", func(t *testing.T, dir string) string {
		return backed(t, dir, "bad.qcow2", "nbd:127.0.0.1:10809", "raw")
	}},
	{"qcow2 over a fifo", "", func(t *testing.T, dir string) string {
		if err := syscall.Mkfifo(dir+"/fifo", 0o600); err != nil {
			t.Fatal(err)
		}
		return backed(t, dir, "bad.qcow2", "fifo", "raw")
	}},
	{"VHDX of only a magic", "both headers are damaged", func(t *testing.T, dir string) string {
		return write(t, dir+"/bad.vhdx", "vhdxfile")
	}},
	{"VHDX without its parent", "no such file", func(t *testing.T, dir string) string {
		return newChild(t, dir+"/bad.vhdx", "relative_path", `.\lost.vhdx`)
	}},
	{"VHDX over a name outside", "outside.vhdx\": leaves the directory", func(t *testing.T, dir string) string {
		tool(t, "qemu-img", "create", "-q", "-f", "vhdx", dir+"/outside.vhdx", "4M")
		return newChild(t, mkdir(t, dir+"/in")+"/bad.vhdx", "relative_path", `..\outside.vhdx`)
	}},
	{"VHDX over another disk than it was", "another disk", func(t *testing.T, dir string) string {
		tool(t, "qemu-img", "create", "-q", "-f", "vhdx", dir+"/base.vhdx", "4M")
		return newChild(t, dir+"/bad.vhdx", "relative_path", `.\base.vhdx`)
	}},
	{"VHDX over a lost place on Windows", "no such file", func(t *testing.T, dir string) string {
		return newChild(t, dir+"/bad.vhdx", "absolute_win32_path", `\\?\d:\base.vhdx`)
	}},
	{"qcow2 encrypted", "encrypt", func(t *testing.T, dir string) string {
		needs(t, "qemu-img")
		var out []byte
		var err error
		for range 20 { // it times itself, and refuses when it gets no CPU at that moment
			out, err = exec.Command("qemu-img", "create", "-q", "--object", "secret,id=s,data=x", "-f", "qcow2",
				"-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", dir+"/bad.qcow2", "1M").CombinedOutput()
			if err == nil {
				return dir + "/bad.qcow2"
			}
		}
		t.Fatalf("%v: %s", err, out)
		return ""
	}},
}

// cutQCOW2 makes a qcow2 file that ends after n bytes.
func cutQCOW2(n int64) func(t *testing.T, dir string) string {
	return func(t *testing.T, dir string) string {
		needs(t, "qemu-img")
		d := newRaw(t, dir+"/whole.raw", 4<<20, piece{0, 4 << 20})
		tool(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", d.file, dir+"/bad.qcow2")
		if err := os.Truncate(dir+"/bad.qcow2", n); err != nil {
			t.Fatal(err)
		}
		return dir + "/bad.qcow2"
	}
}

// backed makes a qcow2 with whatever backing name, existing or not.
func backed(t *testing.T, dir, name, backing, format string) string {
	t.Helper()
	needs(t, "qemu-img")
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", format, dir+"/"+name, "1M")
	return dir + "/" + name
}

// newChild has QEMU make a VHDX and makes it a differencing one, which QEMU has
// not, by the metadata of MS-VHDX §2.6: it has a parent, and where.
func newChild(t *testing.T, file, key, value string) string {
	t.Helper()
	needs(t, "qemu-img")
	tool(t, "qemu-img", "create", "-q", "-f", "vhdx", file, "4M")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	const regionTable, itemOff = 192 << 10, 512 << 10
	at := bytes.Index(b[regionTable:], []byte("\x06\xa2\x7c\x8b\x90\x47\x9a\x4b\xb8\xfe\x57\x5f\x05\x0f\x88\x6e"))
	meta := b[le.Uint64(b[regionTable+at+16:]):]
	at = bytes.Index(meta[:64<<10], []byte("\x37\x67\xa1\xca\x36\xfa\x43\x4d\xb3\xb6\x33\xf0\xaa\x44\xe7\x6b"))
	meta[le.Uint32(meta[at+16:])+4] |= 2 // file parameters: HasParent

	locator := []byte("\xb7\xef\x4a\xb0\x9e\xd1\x81\x4a\xb7\x89\x25\xb8\xe9\x44\x59\x13\x00\x00\x02\x00")
	var texts []byte
	for _, pair := range [][2]string{{"parent_linkage", "{01234567-89ab-cdef-0123-456789abcdef}"}, {key, value}} {
		var off, size [2]int
		for i, s := range pair {
			off[i], size[i] = 20+2*12+len(texts), 2*len(s)
			for _, c := range []byte(s) {
				texts = append(texts, c, 0)
			}
		}
		for i := range pair {
			locator = le.AppendUint32(locator, uint32(off[i]))
		}
		for i := range pair {
			locator = le.AppendUint16(locator, uint16(size[i]))
		}
	}
	locator = append(locator, texts...)
	copy(meta[itemOff:], locator)
	n := le.Uint16(meta[10:])
	le.PutUint16(meta[10:], n+1)
	entry := meta[32+32*int(n):]
	copy(entry, "\x2d\x5f\xd3\xa8\x0b\xb3\x4d\x45\xab\xf7\xd3\xd8\x48\x34\xab\x0c")
	le.PutUint32(entry[16:], itemOff)
	le.PutUint32(entry[20:], uint32(len(locator)))
	le.PutUint32(entry[24:], 4) // required
	return write(t, file, string(b))
}

func mkdir(t *testing.T, dir string) string {
	t.Helper()
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func symlink(t *testing.T, to, file string) string {
	t.Helper()
	if err := os.Symlink(to, file); err != nil {
		t.Fatal(err)
	}
	return file
}

func write(t *testing.T, file, text string) string {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestBadSource: each bad disk ends with exit 1 and a message that names it, and
// leaves no point; beside a good one, that is backed up and the end is exit 3.
func TestBadSource(t *testing.T) {
	needs(t)
	t.Parallel()
	r, k := newKept(t)
	all := []kept{k}
	for i, s := range badSources {
		t.Run(s.name, func(t *testing.T) {
			file := s.make(t, newDir(t))
			res := r.wants(t, 1, s.says, "backup", file)
			if !strings.Contains(res.err, file) {
				t.Errorf("the message does not name %s:\n%s", file, res.err)
			}
			r.intact(t, all...)
			if i%4 != 0 {
				return // the rest is the same for all
			}
			r.wants(t, 1, s.says, "backup", "--vm", "both", k.copy, file)
			r.intact(t, all...)
			res = r.wants(t, 3, "partly done: 1 of 2 VMs failed", "backup", "--json", file, k.copy)
			points := summaryOf(res.out)
			if len(points) != 1 {
				t.Fatalf("%d points:\n%s", len(points), res.out)
			}
			all = append(all, kept{points[0], k.copy})
			r.intact(t, all...)
		})
	}
}

// TestTrustedBacking: what is refused by default works when asked for.
func TestTrustedBacking(t *testing.T) {
	needs(t, "qemu-img")
	t.Parallel()
	dir := newDir(t)
	newRaw(t, dir+"/base.raw", 1<<20, piece{0, 99_999})
	r := newRepository(t)
	k := kept{copy: dir + "/base.raw"}
	k.point, _ = r.backup(t, "--allow-outside-backing", backed(t, mkdir(t, dir+"/in"), "top.qcow2", dir+"/base.raw", "raw"))
	r.intact(t, k)
}

// unprivileged makes the program run as another user from now on, who owns the
// repository.
func (r *repository) unprivileged(t *testing.T) {
	t.Helper()
	needs(t, "root", "setpriv")
	tool(t, "chown", "-R", "65534:65534", filepath.Dir(r.dir))
	r.as = []string{"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"}
}

// TestUnreadable: a user who may not read the disk is told so.
func TestUnreadable(t *testing.T) {
	needs(t)
	t.Parallel()
	r, k := newKept(t)
	r.unprivileged(t)
	dir := newDir(t)
	secret := newText(t, dir+"/secret.raw", 2, 1<<20).file
	for _, mode := range []os.FileMode{0o600, 0o000, 0o200} {
		if err := os.Chmod(secret, mode); err != nil {
			t.Fatal(err)
		}
		r.wants(t, 1, secret+": permission denied", "backup", secret)
	}
	if err := os.Chmod(secret, 0o644); err != nil {
		t.Fatal(err)
	}
	for what, make := range map[string]func(){
		"qcow2":            func() { newCompressed(t, dir+"/a.qcow2", "compat=1.1") },
		"its backing file": func() { newRaw(t, dir+"/base.raw", 1<<20) },
	} {
		t.Run(what, func(t *testing.T) {
			needs(t, "qemu-img")
			make()
			top, denied := dir+"/a.qcow2", dir+"/a.qcow2"
			if what != "qcow2" {
				top, denied = backed(t, dir, "top.qcow2", "base.raw", "raw"), "base.raw"
			}
			if err := os.Chmod(filepath.Join(dir, filepath.Base(denied)), 0o600); err != nil {
				t.Fatal(err)
			}
			res := r.wants(t, 1, "permission denied", "backup", top)
			if !strings.Contains(res.err, denied) {
				t.Errorf("the message does not name %s:\n%s", denied, res.err)
			}
		})
	}
	// A folder that may not be entered.
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	r.wants(t, 1, fmt.Sprintf("%s: permission denied", secret), "backup", secret)
	r.intact(t, k)
}
