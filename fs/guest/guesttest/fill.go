package guesttest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Tree says how large the tree is that Fill makes.
type Tree struct {
	Seed  uint64
	Files int   // small files in nested directories; 0 is 13,000
	Big   int64 // bytes of the largest file with content; 0 is 48 MiB
	Names int   // names in the large directories; 0 is 5,000
	// Fragments is how many blocks each of two files has that take turns on the disk, each synced; 0 is 400.
	Fragments int
	// NoHuge leaves out files beyond what 2 TiB of a disk can address.
	NoHuge bool
	// NoHoles leaves out a file that takes 2 GiB of zeros where there are no holes.
	NoHoles bool
}

// filler fills one directory.
type filler struct {
	Tree
	dir     string
	rng     *rand.Rand
	err     error
	skipped []string
}

// Fill fills a mounted directory, syncs the file system, and gives what the file system refused: a test says which refusals it expects, or a
// tree that shrank would pass. It needs root.
func Fill(dir string, t Tree) (skipped []string, err error) {
	if t.Files == 0 {
		t.Files = 13000
	}
	if t.Big == 0 {
		t.Big = 48 << 20
	}
	if t.Names == 0 {
		t.Names = 5000
	}
	if t.Fragments == 0 {
		t.Fragments = 400
	}
	f := &filler{Tree: t, dir: dir, rng: rand.New(rand.NewPCG(t.Seed, 1))}
	for _, part := range []func(){f.many, f.long, f.deep, f.nested, f.big, f.sparse, f.fragmented, f.allocated, f.names, f.links, f.special, f.owners, f.times, f.xattrs} {
		if part(); f.err != nil {
			return f.skipped, f.err
		}
	}
	d, err := os.Open(dir)
	if err != nil {
		return f.skipped, err
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return f.skipped, err
	}
	slices.Sort(f.skipped)
	return slices.Compact(f.skipped), nil
}

// refused are the errors of a file system that does not have something.
var refused = []error{unix.EOPNOTSUPP, unix.ENOTSUP, unix.EPERM, unix.EINVAL, unix.ENAMETOOLONG, unix.EFBIG, unix.EILSEQ, unix.ENOSPC, unix.E2BIG, unix.ERANGE, unix.ENOSYS, unix.EMLINK,
	unix.ENOENT} // of vfat, for a name of dots

// may notes what the file system refuses; want ends the filling.
func (f *filler) may(what string, err error) bool {
	for _, r := range refused {
		if errors.Is(err, r) {
			f.skipped = append(f.skipped, fmt.Sprintf("%s: %s", what, errText(err)))
			return false
		}
	}
	f.want(err)
	return err == nil
}

func (f *filler) want(err error) {
	if f.err == nil && err != nil {
		f.err = err
	}
}

func (f *filler) path(parts ...string) string { return f.dir + "/" + strings.Join(parts, "/") }

func (f *filler) mkdir(parts ...string) string {
	p := f.path(parts...)
	f.want(os.MkdirAll(p, 0o755))
	return p
}

// content is n bytes, half of which can be compressed.
func (f *filler) content(n int) []byte {
	b := make([]byte, n)
	for at := 0; at < n; at += 8 {
		var word [8]byte
		if at>>13&1 == 0 {
			binary.LittleEndian.PutUint64(word[:], f.rng.Uint64())
		} else {
			copy(word[:], "holdfast")
		}
		copy(b[at:], word[:])
	}
	return b
}

func (f *filler) write(p string, b []byte) { f.want(os.WriteFile(p, b, 0o644)) }

// many is a large directory with holes in it.
func (f *filler) many() {
	d := f.mkdir("many")
	for i := range f.Names {
		f.write(fmt.Sprintf("%s/file number %05d.txt", d, i), f.content(i%100))
	}
	for i := 0; i < f.Names; i += 7 {
		f.want(os.Remove(fmt.Sprintf("%s/file number %05d.txt", d, i)))
	}
}

// long is a directory of long names: more levels of whatever tree directories are.
func (f *filler) long() {
	d := f.mkdir("long")
	for i := range f.Names / 2 {
		name := fmt.Sprintf("%05d-", i*7919%100000)
		f.write(d+"/"+name+strings.Repeat(string(rune('a'+i%26)), 200-i%50), nil)
	}
}

func (f *filler) deep() {
	d := f.mkdir("deep")
	for i := range 50 {
		d = fmt.Sprintf("%s/level %d", d, i)
		f.want(os.Mkdir(d, 0o755))
		f.write(d+"/file", f.content(i))
	}
	f.mkdir("empty")
}

func (f *filler) nested() {
	const perDir = 130
	for i := range f.Files {
		if i%perDir == 0 {
			f.mkdir("nested", fmt.Sprint("a", i/perDir/10), fmt.Sprint("b", i/perDir%10))
		}
		p := f.path("nested", fmt.Sprint("a", i/perDir/10), fmt.Sprint("b", i/perDir%10), fmt.Sprint("f", i))
		n := f.rng.IntN(900)
		if i%50 == 0 {
			n = f.rng.IntN(200 << 10)
		}
		f.write(p, f.content(n))
	}
}

// big are files of sizes around those of blocks and clusters.
func (f *filler) big() {
	d := f.mkdir("big")
	for _, n := range []int{0, 1, 59, 60, 61, 255, 256, 511, 512, 513, 1023, 1024, 1025, 2048, 4095, 4096, 4097, 16384, 65535, 65536, 65537, 131072, 200000, 1 << 20} {
		f.write(fmt.Sprint(d, "/size ", n), f.content(n))
	}
	f.write(d+"/large", f.content(int(f.Big)))
	f.write(d+"/large, odd", f.content(int(f.Big/3)+1))
}

// create makes a file of size and lets fn write to it.
func (f *filler) create(p string, size int64, fn func(w *os.File)) {
	w, err := os.Create(p)
	if err != nil {
		f.want(err)
		return
	}
	defer w.Close()
	if size >= 0 && !f.may(fmt.Sprintf("a file of %d bytes", size), w.Truncate(size)) {
		return
	}
	fn(w)
}

func (f *filler) at(w *os.File, off int64, n int) {
	_, err := w.WriteAt(f.content(n), off)
	if f.err == nil && err != nil {
		f.may(fmt.Sprintf("a write at %d", off), err)
	}
}

func (f *filler) sparse() {
	d := f.mkdir("sparse")
	f.create(d+"/middle", 3<<20, func(w *os.File) { f.at(w, 0, 5000); f.at(w, 3<<20-4097, 4097) })
	if !f.NoHoles {
		f.create(d+"/head", 2<<30+12345, func(w *os.File) { f.at(w, 2<<30, 12345) })
	}
	f.create(d+"/all", 7<<20+1, func(w *os.File) {})
	f.create(d+"/tail", 9<<20, func(w *os.File) { f.at(w, 0, 10001) })
	f.create(d+"/600 extents", -1, func(w *os.File) {
		for i := range 600 {
			f.at(w, int64(i)*40960, 1+i*13%8192)
		}
	})
	if !f.NoHuge {
		f.create(d+"/beyond 5 GiB", 5<<30+99, func(w *os.File) { f.at(w, 5<<30-1000, 1099) })
		f.create(d+"/14 TiB", 14<<40, func(w *os.File) { f.at(w, 1<<40+77, 100); f.at(w, 14<<40-5000, 5000) })
	}
}

// fragmented are two files whose blocks take turns.
func (f *filler) fragmented() {
	d := f.mkdir("fragmented")
	var w [2]*os.File
	for i := range w {
		var err error
		if w[i], err = os.Create(fmt.Sprint(d, "/", i)); err != nil {
			f.want(err)
			return
		}
		defer w[i].Close()
	}
	for i := range int64(f.Fragments) {
		for _, w := range w {
			f.at(w, i*4096, 4096)
			f.want(unix.Fdatasync(int(w.Fd())))
		}
	}
}

// allocated are files with extents that were allocated, punched, shifted and zeroed.
func (f *filler) allocated() {
	d := f.mkdir("allocated")
	try := func(name string, size int, mode uint32, ranges ...[2]int64) {
		f.create(d+"/"+name, -1, func(w *os.File) {
			f.at(w, 0, size)
			for _, r := range ranges {
				if !f.may(name, unix.Fallocate(int(w.Fd()), mode, r[0], r[1])) {
					return
				}
			}
		})
	}
	var holes [][2]int64
	for i := range int64(1024) {
		holes = append(holes, [2]int64{i * 8192, 4096})
	}
	try("punched", 8<<20+100, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, holes...)
	try("punched oddly", 1<<20, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, [2]int64{1, 1}, [2]int64{5000, 300000}, [2]int64{1<<20 - 10, 5000})
	try("unwritten behind the end", 10000, unix.FALLOC_FL_KEEP_SIZE, [2]int64{0, 4 << 20})
	try("unwritten", 10000, 0, [2]int64{0, 4<<20 + 17})
	try("zeroed", 1<<20, unix.FALLOC_FL_ZERO_RANGE, [2]int64{65536, 300000})
	try("collapsed", 1<<20, unix.FALLOC_FL_COLLAPSE_RANGE, [2]int64{65536, 131072})
	try("inserted", 1<<20, unix.FALLOC_FL_INSERT_RANGE, [2]int64{65536, 131072})
	f.create(d+"/unwritten, written in places", -1, func(w *os.File) {
		if !f.may("unwritten, written in places", unix.Fallocate(int(w.Fd()), 0, 0, 8<<20)) {
			return
		}
		for i := range int64(200) {
			f.at(w, i*40000, 1+int(i*37%5000))
		}
	})
}

func (f *filler) names() {
	d := f.mkdir("names")
	for _, n := range []string{strings.Repeat("x", 255), strings.Repeat("é", 127), strings.Repeat("\U0001F600", 63), "ünï©ödé", "日本語のファイル", "emoji \U0001F680", "\xff\xfe invalid \x80", "new\nline", "tab\t",
		" leading", "trailing ", "trailing.", "-dash", "back\\slash", "quote\"'", "con", "a:b", "q?*|<>", "..dots", "...", "Case", "case2", "\x01control", "%41"} {
		if err := os.WriteFile(d+"/"+n, []byte(n), 0o644); err != nil {
			f.may(fmt.Sprintf("name %.20q", n), err)
		}
	}
	if err := os.Mkdir(d+"/dir \xc3\x28", 0o755); err != nil {
		f.may("a directory's name", err)
	}
}

func (f *filler) links() {
	d := f.mkdir("links")
	f.write(d+"/file", []byte("linked"))
	for i := range 60 {
		sub := f.mkdir("links", fmt.Sprint("d", i%7))
		f.may("hard link", os.Link(d+"/file", fmt.Sprintf("%s/%d %s", sub, i, strings.Repeat("long name ", 12))))
	}
	for _, n := range []int{1, 6, 30, 58, 59, 60, 61, 100, 255, 500, 1000, 1023, 1024, 2000, 3000, 4000, 4095} {
		target := strings.Repeat("0123456789/", n/11+1)[:n]
		f.may(fmt.Sprint("symbolic link of ", n, " bytes"), os.Symlink(target, fmt.Sprint(d, "/symlink ", n)))
	}
	f.may("symbolic link", os.Symlink("nowhere \xff", d+"/dangling"))
	f.may("symbolic link", os.Symlink("..", d+"/up"))
}

func (f *filler) special() {
	d := f.mkdir("special")
	f.may("fifo", unix.Mkfifo(d+"/fifo", 0o640))
	f.may("character device", unix.Mknod(d+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	f.may("block device", unix.Mknod(d+"/block", unix.S_IFBLK|0o660, int(unix.Mkdev(8, 17))))
	f.may("large device", unix.Mknod(d+"/large", unix.S_IFBLK|0o600, int(unix.Mkdev(259, 70000))))
	// The kernel has no longer name for the address of a socket than 108 bytes; a short way to the directory always fits, and works
	// in parallel tests.
	dir, err := os.Open(d)
	if err != nil {
		f.want(err)
		return
	}
	defer dir.Close()
	l, err := net.Listen("unix", fmt.Sprintf("/proc/self/fd/%d/socket", dir.Fd()))
	if f.may("socket", err) {
		l.(*net.UnixListener).SetUnlinkOnClose(false)
		l.Close()
	}
}

func (f *filler) owners() {
	d := f.mkdir("owners")
	for i, mode := range []uint32{0, 0o1777, 0o2755, 0o4755, 0o6711, 0o7777, 0o400, 0o001} {
		p := fmt.Sprintf("%s/%04o", d, mode)
		f.write(p, []byte{byte(i)})
		f.may("owner", os.Chown(p, []int{0, 1, 65534, 65535, 65536, 1000000, 1<<31 + 5, 1<<32 - 2}[i], []int{1<<32 - 2, 0, 100000, 70000, 65536, 65535, 3, 1}[i]))
		f.may("mode", unix.Chmod(p, mode))
		f.want(os.Mkdir(p+" dir", 0o700))
		f.may("mode", unix.Chmod(p+" dir", mode))
	}
}

// times sets times as far apart as file systems know, seconds since 1970.
func (f *filler) times() {
	d := f.mkdir("times")
	for _, sec := range []int64{-1 << 31, -1<<31 + 1, -86400*365*30 - 7, -1, 0, 1, 315532800, 1e9, 1<<31 - 1, 1 << 31, 1<<31 + 1, 1<<32 - 1, 1 << 32, 1<<32 + 5, 1<<33 + 123, 13569465600, 15032385535} {
		for _, nsec := range []int64{0, 1, 100, 123456700, 999999999} {
			p := fmt.Sprintf("%s/%d.%d", d, sec, nsec)
			f.write(p, nil)
			ts := []unix.Timespec{{Sec: sec + 1, Nsec: 999999999 - nsec}, {Sec: sec, Nsec: nsec}}
			f.may("time", unix.UtimesNanoAt(unix.AT_FDCWD, p, ts, 0))
		}
	}
}

// acl makes the value of a system.posix_acl_* attribute: include/uapi/linux/posix_acl_xattr.h's layout, version 2, entries
// of tag (2 bytes), permissions (2) and id (4).
func acl(entries ...[3]uint32) []byte {
	b := []byte{2, 0, 0, 0}
	for _, e := range entries {
		b = binary.LittleEndian.AppendUint16(b, uint16(e[0]))
		b = binary.LittleEndian.AppendUint16(b, uint16(e[1]))
		b = binary.LittleEndian.AppendUint32(b, e[2])
	}
	return b
}

func (f *filler) xattrs() {
	d := f.mkdir("xattrs")
	set := func(p, name string, value []byte) {
		kind, _, _ := strings.Cut(name, ".")
		f.may(fmt.Sprintf("%s xattr of %d bytes", kind, len(value)), unix.Lsetxattr(p, name, value, 0))
	}
	none := uint32(1<<32 - 1)
	access := acl([3]uint32{1, 7, none}, [3]uint32{2, 5, 1000}, [3]uint32{2, 4, 70000}, [3]uint32{4, 5, none}, [3]uint32{8, 1, 100}, [3]uint32{16, 5, none}, [3]uint32{32, 0, none})
	for _, p := range []string{d + "/file", d + "/dir"} {
		if strings.HasSuffix(p, "dir") {
			f.want(os.Mkdir(p, 0o755))
			set(p, "system.posix_acl_default", access)
		} else {
			f.write(p, []byte("x"))
		}
		set(p, "user.short", []byte("v"))
		set(p, "user.empty", nil)
		set(p, "user.binary", []byte{0, 255, 1, 254, 0})
		set(p, "trusted.overlay.opaque", []byte("y"))
		set(p, "security.selinux", []byte("system_u:object_r:etc_t:s0\x00"))
		set(p, "system.posix_acl_access", access)
	}
	// The capability cap_net_raw+ep, revision 2 (capability.h's layout).
	f.write(d+"/capable", []byte("x"))
	set(d+"/capable", "security.capability", []byte{1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	if f.may("symbolic link", os.Symlink("x", d+"/symlink")) {
		set(d+"/symlink", "trusted.of a link", []byte("value"))
	}
	for _, n := range []int{100, 900, 1900, 3000, 3900, 5000, 10000, 40000, 65536} {
		p := fmt.Sprintf("%s/value of %d", d, n)
		f.write(p, nil)
		set(p, "user.large", f.content(n))
	}
	for _, n := range []int{5, 40, 100, 500} {
		p := fmt.Sprintf("%s/%d names", d, n)
		f.write(p, nil)
		for i := range n {
			if unix.Lsetxattr(p, fmt.Sprintf("user.name %d %s", i, strings.Repeat("n", i%200)), f.content(i%90), 0) != nil {
				f.skipped = append(f.skipped, "many xattrs")
				break
			}
		}
	}
	f.write(d+"/removed", nil)
	for i := range 20 {
		name := fmt.Sprint("user.", i)
		if f.may("xattr", unix.Lsetxattr(d+"/removed", name, f.content(i*20), 0)) && i%3 != 0 {
			f.want(unix.Lremovexattr(d+"/removed", name))
		}
	}
}

// Burst changes a mounted tree in many small steps and has each of them made durable by fsync, so that a copy of the disk taken
// then has them in the journal.
func Burst(dir string, seed uint64, steps int) error {
	f := &filler{dir: dir, rng: rand.New(rand.NewPCG(seed, 2))}
	d := f.mkdir("burst")
	for i := range steps {
		p := fmt.Sprintf("%s/%d", d, f.rng.IntN(steps/2+1))
		switch f.rng.IntN(6) {
		case 0, 1:
			f.write(p, f.content(f.rng.IntN(20000)))
		case 2:
			if err := os.Rename(p, fmt.Sprintf("%s/renamed %d", d, i)); err != nil && !os.IsNotExist(err) {
				f.want(err)
			}
		case 3:
			if err := os.Remove(p); err != nil && !os.IsNotExist(err) {
				f.want(err)
			}
		case 4:
			sub := f.mkdir("burst", fmt.Sprint("dir ", i%40))
			f.write(sub+"/new", f.content(i%3000))
			if err := os.Link(sub+"/new", fmt.Sprintf("%s/link %d", sub, i)); err != nil && !os.IsExist(err) {
				f.want(err)
			}
			p = sub + "/new"
		case 5:
			if w, err := os.OpenFile(p, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600); err == nil {
				_, err = w.Write(f.content(f.rng.IntN(9000)))
				f.want(err)
				w.Close()
			}
		}
		for _, s := range []string{p, filepath.Dir(p)} {
			if err := syncPath(s); err != nil && !os.IsNotExist(err) {
				f.want(err)
			}
		}
		if f.err != nil {
			return f.err
		}
	}
	return nil
}

func syncPath(p string) error {
	f, err := os.Open(p)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}
