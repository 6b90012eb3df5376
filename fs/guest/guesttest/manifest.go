package guesttest

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// Line is what there is to say about one thing in a file system. Its fields are strings, so that a
// difference can be printed, and an absent one is "".
type Line struct {
	Path   string            // from the root of the file system, "" for the root itself
	Fields map[string]string // field => value; the fields are those of Fields
}

// Fields are the names of what a line has. "sum" is of a regular file's content; of one larger than wholeUpTo, of
// windows of it. "id" is the first path, in order, that has the same inode: what is linked to what.
var Fields = []string{"type", "mode", "nlink", "uid", "gid", "size", "blocks", "rdev", "mtime", "atime", "ctime", "btime", "target", "sum", "xattrs", "id", "error"}

// wholeUpTo is up to which size a file is read from beginning to end; of a larger one, windows are.
const (
	wholeUpTo = 256 << 20
	window    = 1 << 20
)

// Quote makes a path printable: bytes that are not printable ASCII, and %, as %XX.
func Quote(p string) string {
	var b strings.Builder
	for i := range len(p) {
		if c := p[i]; c < ' ' || c > '~' || c == '%' {
			fmt.Fprintf(&b, "%%%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

// typeName is what find -printf %y prints.
func typeName(mode uint32) string {
	switch mode & guest.ModeType {
	case guest.ModeRegular:
		return "f"
	case guest.ModeDir:
		return "d"
	case guest.ModeLink:
		return "l"
	case guest.ModeChar:
		return "c"
	case guest.ModeBlock:
		return "b"
	case guest.ModeFIFO:
		return "p"
	case guest.ModeSocket:
		return "s"
	}
	return fmt.Sprintf("?%o", mode&guest.ModeType)
}

func stamp(sec int64, nsec uint32) string { return fmt.Sprintf("%d.%09d", sec, nsec) }

func stampOf(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return stamp(t.Unix(), uint32(t.Nanosecond()))
}

func xattrText(list []guest.Xattr) string {
	slices.SortFunc(list, func(a, b guest.Xattr) int { return cmp.Compare(a.Name, b.Name) })
	var words []string
	for _, x := range list {
		value := hex.EncodeToString(x.Value)
		if len(value) > 64 {
			h := sha256.Sum256(x.Value)
			value = fmt.Sprintf("%d bytes, %x", len(x.Value), h[:8])
		}
		words = append(words, Quote(x.Name)+"="+value)
	}
	return strings.Join(words, " ")
}

// lines sorts a walk's result and numbers what is linked.
func lines(all map[string]map[string]string, inodes map[string]string) []Line {
	first := map[string]string{}
	var out []Line
	for _, p := range slices.Sorted(maps.Keys(all)) {
		ino := inodes[p]
		if _, ok := first[ino]; !ok {
			first[ino] = p
		}
		all[p]["id"] = Quote(first[ino])
		out = append(out, Line{p, all[p]})
	}
	return out
}

// skipped is what no walk goes into: e2fsck's, and not of interest.
func skipped(p string) bool { return p == "lost+found" }

// Walk writes down what the directory dir shows: through the kernel, by system calls. It needs the rights to read everything.
func Walk(dir string) ([]Line, error) {
	all, inodes := map[string]map[string]string{}, map[string]string{}
	var visit func(rel string) error
	visit = func(rel string) error {
		full := dir
		if rel != "" {
			full = dir + "/" + rel
		}
		f, ino, err := kernelLine(full)
		if err != nil {
			return err
		}
		all[rel], inodes[rel] = f, ino
		if f["type"] != "d" {
			return nil
		}
		d, err := os.Open(full)
		if err != nil {
			f["error"] = errText(err)
			return nil
		}
		names, err := d.Readdirnames(-1)
		d.Close()
		if err != nil {
			f["error"] = errText(err)
		}
		for _, name := range names {
			if rel == "" && skipped(name) {
				continue
			}
			if err := visit(join(rel, name)); err != nil {
				return err
			}
		}
		return nil
	}
	err := visit("")
	return lines(all, inodes), err
}

// join joins without cleaning: names are bytes.
func join(rel, name string) string {
	if rel == "" {
		return name
	}
	return rel + "/" + name
}

// errText is the kernel's word for an error, without the path.
func errText(err error) string {
	var no unix.Errno
	if errors.As(err, &no) {
		return unix.ErrnoName(no)
	}
	return err.Error()
}

// kernelLine asks the kernel about one path.
func kernelLine(full string) (f map[string]string, ino string, err error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, full, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st); err != nil {
		return nil, "", fmt.Errorf("%s: %w", Quote(full), err)
	}
	f = map[string]string{
		"type": typeName(uint32(st.Mode)), "mode": fmt.Sprintf("%04o", st.Mode&0o7777), "nlink": fmt.Sprint(st.Nlink),
		"uid": fmt.Sprint(st.Uid), "gid": fmt.Sprint(st.Gid), "size": fmt.Sprint(st.Size), "blocks": fmt.Sprint(st.Blocks * 512),
		"mtime": stamp(st.Mtime.Sec, st.Mtime.Nsec), "atime": stamp(st.Atime.Sec, st.Atime.Nsec), "ctime": stamp(st.Ctime.Sec, st.Ctime.Nsec),
	}
	if st.Mask&unix.STATX_BTIME != 0 {
		f["btime"] = stamp(st.Btime.Sec, st.Btime.Nsec)
	}
	switch f["type"] {
	case "b", "c":
		f["rdev"] = fmt.Sprintf("%d:%d", st.Rdev_major, st.Rdev_minor)
	case "l":
		target, err := os.Readlink(full)
		if err != nil {
			f["error"] = errText(err)
		}
		f["target"] = Quote(target)
	case "f":
		file, err := os.OpenFile(full, os.O_RDONLY|unix.O_NOATIME, 0)
		if err == nil {
			f["sum"], err = hashed(file, int64(st.Size))
			file.Close()
		}
		if err != nil {
			f["error"] = errText(err)
		}
	}
	list, err := kernelXattrs(full)
	if err != nil {
		f["error"] = "xattrs: " + errText(err)
	}
	f["xattrs"] = xattrText(list)
	// Subvolumes of Btrfs are devices of their own, and number their inodes alike.
	return f, fmt.Sprintf("%d:%d:%d", st.Dev_major, st.Dev_minor, st.Ino), nil
}

// hashed hashes size bytes of r, or windows of them.
func hashed(r io.ReaderAt, size int64) (string, error) {
	h := sha256.New()
	ranges := [][2]int64{{0, size}}
	if size > wholeUpTo {
		ranges = nil
		for _, off := range []int64{0, size/4 - window/2, size / 2, size/4*3 - 7, size - window} {
			ranges = append(ranges, [2]int64{off, window})
		}
	}
	buf := make([]byte, min(size+1, 256<<10))
	for _, e := range ranges {
		n, err := io.CopyBuffer(h, io.NewSectionReader(r, e[0], e[1]), buf)
		if err == nil && n != e[1] {
			err = fmt.Errorf("%d of %d bytes: %w", n, e[1], io.ErrUnexpectedEOF)
		}
		if err != nil {
			return "", err
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func kernelXattrs(full string) ([]guest.Xattr, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(full, buf)
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var list []guest.Xattr
	for name := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(full, name, value)
		if errors.Is(err, unix.E2BIG) {
			continue // ntfs-3g lists streams that are larger than an attribute of Linux can be
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		list = append(list, guest.Xattr{Name: name, Value: value[:n]})
	}
	return list, nil
}

// maxDepth ends a walk through a file system whose directories go in a circle.
const maxDepth = 400

// WalkFS writes down what a reader shows. What it refuses is in the line's "error"; it goes on with the rest.
func WalkFS(f guest.FS) ([]Line, error) {
	all, inodes := map[string]map[string]string{}, map[string]string{}
	var visit func(rel string, ino guest.Ino, depth int) error
	visit = func(rel string, ino guest.Ino, depth int) error {
		if depth > maxDepth {
			return fmt.Errorf("%.100s…: directories without end", Quote(rel))
		}
		line := readerLine(f, ino)
		all[rel], inodes[rel] = line, fmt.Sprint(ino)
		if line["type"] != "d" {
			return nil
		}
		for e, err := range f.ReadDir(ino, 0) {
			if err != nil {
				line["error"] = err.Error()
				break
			}
			if rel == "" && skipped(e.Name) {
				continue
			}
			p := join(rel, e.Name)
			if all[p] != nil {
				return fmt.Errorf("%s: listed twice", Quote(p))
			}
			if err := visit(p, e.Ino, depth+1); err != nil {
				return err
			}
			if t := all[p]["type"]; e.Type != 0 && t != typeName(e.Type) {
				all[p]["error"] += fmt.Sprintf(" the directory says %s", typeName(e.Type))
			}
		}
		return nil
	}
	err := visit("", f.Root(), 0)
	return lines(all, inodes), err
}

// readerLine asks a reader about one inode.
func readerLine(f guest.FS, ino guest.Ino) map[string]string {
	st, err := f.Stat(ino)
	if err != nil {
		return map[string]string{"error": err.Error()}
	}
	l := map[string]string{
		"type": typeName(st.Mode), "mode": fmt.Sprintf("%04o", st.Mode&0o7777), "nlink": fmt.Sprint(st.Nlink),
		"uid": fmt.Sprint(st.UID), "gid": fmt.Sprint(st.GID), "size": fmt.Sprint(st.Size), "blocks": fmt.Sprint(st.Allocated),
		"mtime": stampOf(st.Mtime), "atime": stampOf(st.Atime), "ctime": stampOf(st.Ctime), "btime": stampOf(st.Btime),
	}
	var errs []error
	switch l["type"] {
	case "b", "c":
		l["rdev"] = fmt.Sprintf("%d:%d", st.Major, st.Minor)
	case "l":
		target, err := f.Readlink(ino)
		errs = append(errs, err)
		l["target"] = Quote(target)
	case "f":
		file, err := f.Open(ino)
		if err == nil {
			if file.Size() != st.Size {
				errs = append(errs, fmt.Errorf("open: %d bytes, stat: %d", file.Size(), st.Size))
			}
			l["sum"], err = hashed(file, st.Size)
		}
		errs = append(errs, err)
	}
	list, err := f.Xattrs(ino)
	errs = append(errs, err)
	l["xattrs"] = xattrText(list)
	if err := errors.Join(errs...); err != nil {
		l["error"] = err.Error()
	}
	return l
}

// Find gives what is at a path of a reader.
func Find(f guest.FS, p string) (guest.Ino, error) {
	ino := f.Root()
	for name := range strings.SplitSeq(strings.Trim(p, "/"), "/") {
		if name == "" {
			continue
		}
		var err error
		if ino, err = f.Lookup(ino, name); err != nil {
			return 0, fmt.Errorf("%s: %w", Quote(p), err)
		}
	}
	return ino, nil
}

// Diff compares two walks and gives a line for each difference, at most 50. Fields named in ignore are not
// compared; each name needs a reason beside it where it is passed.
func Diff(want, got []Line, ignore ...string) []string {
	w, g := byPath(want), byPath(got)
	var out []string
	say := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	for _, l := range want {
		other, ok := g[l.Path]
		if !ok {
			say("%s: missing", Quote(l.Path))
			continue
		}
		for _, field := range Fields {
			if a, b := l.Fields[field], other[field]; a != b && !slices.Contains(ignore, field) {
				say("%s: %s: want %.200q, got %.200q", Quote(l.Path), field, a, b)
			}
		}
	}
	for _, l := range got {
		if _, ok := w[l.Path]; !ok {
			say("%s: should not be there", Quote(l.Path))
		}
	}
	if n := len(out); n > 50 {
		out = append(out[:50], fmt.Sprintf("… and %d more", n-50))
	}
	return out
}

func byPath(list []Line) map[string]map[string]string {
	m := map[string]map[string]string{}
	for _, l := range list {
		m[l.Path] = l.Fields
	}
	return m
}
