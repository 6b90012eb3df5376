package ext

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// oddName makes names of all lengths, some of whose bytes are above 127.
func oddName(i int) string {
	n := fmt.Sprintf("%x %c ", i*7919, rune(0xa0+i%500))
	return n + strings.Repeat(string(rune('a'+i%26)), i*13%(250-len(n)))
}

// namesImage makes an image with a directory of so many names.
func namesImage(t *testing.T, count int, mkfs []string, then ...string) string {
	t.Helper()
	guesttest.Needs(t, "mkfs.ext4", "mount", "tune2fs", "debugfs")
	image := guesttest.Sparse(t, 512<<20)
	guesttest.Run(t, append(append([]string{"mkfs.ext4", "-q", "-F", "-b", "1024"}, mkfs...), image)...)
	for _, cmd := range then {
		guesttest.Run(t, append(strings.Split(cmd, "|"), image)...)
	}
	dir, unmount := guesttest.Mount(t, image, "ext4", "rw")
	if err := os.Mkdir(dir+"/d", 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range count {
		target := fmt.Sprint(dir, "/target ", i/60000)
		if i%60000 == 0 {
			if err := os.WriteFile(target, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Link(target, dir+"/d/"+oddName(i)); err != nil {
			t.Fatal(err)
		}
	}
	unmount()
	return image
}

// TestHashes looks names up by the index that the kernel made, with each kind of hash. None may be found by going through all.
func TestHashes(t *testing.T) {
	for _, test := range []struct{ hash, flags string }{{"legacy", "1"}, {"legacy", "2"}, {"half_md4", "1"}, {"half_md4", "2"}, {"tea", "1"}, {"tea", "2"}} {
		t.Run(test.hash+test.flags, func(t *testing.T) {
			image := namesImage(t, 2000, nil, "tune2fs|-E|hash_alg="+test.hash, "debugfs|-w|-R|ssv flags "+test.flags)
			f := open(t, image, guest.Options{})
			d, err := guesttest.Find(f, "d")
			if err != nil {
				t.Fatal(err)
			}
			in, err := f.dir(d)
			if err != nil || in.flags&flagIndex == 0 {
				t.Fatal(in, err)
			}
			for i := range 2000 {
				if n, ok := f.lookupIndex(&in, &sought{name: oddName(i)}); !ok || n.ino == 0 {
					t.Fatalf("name %d is not where its hash says", i)
				}
			}
			if n, ok := f.lookupIndex(&in, &sought{name: "none"}); ok {
				t.Error(n)
			}
			if _, err := f.Lookup(d, "none"); !errors.Is(err, guest.ErrNotExist) || !f.sound.has(in.no) {
				t.Error("an index of the kernel's is not sound")
			}
		})
	}
}

// TestLargeDirectory counts reads in a directory whose index has three levels.
func TestLargeDirectory(t *testing.T) {
	count := 100000
	if testing.Short() {
		count = 5000
	}
	image := namesImage(t, count, []string{"-O", "large_dir"})
	dev := &guesttest.Counted{Device: guesttest.OpenDevice(t, image)}
	f, err := Open(dev, guest.Options{Cache: 256 << 10})
	if err != nil {
		t.Fatal(err)
	}
	d, err := f.Lookup(f.Root(), "d")
	if err != nil {
		t.Fatal(err)
	}
	if n := dev.Reads.Load(); n > 10 {
		t.Errorf("%d reads to open", n)
	}
	before := dev.Reads.Load()
	for i := 0; i < count; i += count / 500 {
		if _, err := f.Lookup(d, oddName(i)); err != nil {
			t.Fatal(err)
		}
	}
	n := dev.Reads.Load() - before
	t.Logf("%d reads for 500 names", n)
	if n > 500*6 {
		t.Errorf("%d reads for 500 names", n)
	}
	for i := range 100 {
		before := dev.Reads.Load()
		if _, err := f.Lookup(d, fmt.Sprint("none ", i)); !errors.Is(err, guest.ErrNotExist) {
			t.Error(err)
		}
		if n := dev.Reads.Load() - before; i > 0 && n > 6 {
			t.Errorf("%d reads for a name that is not there", n)
		}
	}
	listed := map[string]bool{}
	from := uint64(0)
	for more := true; more; {
		more = false
		k := 0
		for e, err := range f.ReadDir(d, from) {
			if err != nil || listed[e.Name] {
				t.Fatal(e, err)
			}
			listed[e.Name], from = true, e.Next
			if k++; k == 1000 {
				more = true
				break
			}
		}
	}
	for i := range count {
		if !listed[oddName(i)] {
			t.Fatalf("name %d is not listed", i)
		}
	}
	if len(listed) != count {
		t.Errorf("%d names", len(listed))
	}
}

// collisions are numbers that, behind the same 224 bytes and with 31 digits, have the same hash in fours: a leaf of 1 KiB holds only three such names,
// so that the fourth is in the next. They were found by hashing sixty million names.
var collisions = []int{8965601, 10059434, 17455271, 45651328, 8928479, 9954175, 15055922, 54863755, 8809442, 22997226, 43638338, 47695235, 8807293, 32297988, 36263251, 38434727,
	8768334, 32644784, 41775475, 55839760, 8407639, 19293439, 45984247, 59278001, 8361873, 44538432, 48928873, 52272952, 8234775, 34849595, 47731096, 58053365}

// TestCollisions looks up names whose hash goes on in the next leaf.
func TestCollisions(t *testing.T) {
	guesttest.Needs(t, "mkfs.ext4", "mount", "debugfs")
	image := guesttest.Sparse(t, 100<<20)
	guesttest.Run(t, "mkfs.ext4", "-q", "-F", "-b", "1024", image)
	for _, cmd := range []string{"ssv hash_seed 11111111-2222-2222-3333-333344444444", "ssv flags 1"} {
		guesttest.Run(t, "debugfs", "-w", "-R", cmd, image)
	}
	dir, unmount := guesttest.Mount(t, image, "ext4", "rw")
	var names []string
	for i := range 200 {
		names = append(names, fmt.Sprintf("%0250d", i))
	}
	for _, n := range collisions {
		names = append(names, fmt.Sprintf("%s%031d", strings.Repeat("c", 224), n))
	}
	for _, n := range names {
		if err := os.WriteFile(dir+"/"+n, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	unmount()
	f := open(t, image, guest.Options{})
	in, err := f.dir(f.Root())
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if _, ok := f.lookupIndex(&in, &sought{name: n}); !ok {
			t.Error(n, " is not where its hash says")
		}
	}
	if _, err := f.Lookup(f.Root(), "none"); !errors.Is(err, guest.ErrNotExist) || !f.sound.has(rootIno) {
		t.Error("an index of the kernel's is not sound")
	}
}

// TestWrongIndex looks up names in a directory whose index leads elsewhere.
func TestWrongIndex(t *testing.T) {
	image := namesImage(t, 1500, []string{"-O", "^metadata_csum"})
	f := open(t, image, guest.Options{})
	d, err := f.Lookup(f.Root(), "d")
	if err != nil {
		t.Fatal(err)
	}
	in, err := f.dir(d)
	if err != nil {
		t.Fatal(err)
	}
	r, err := f.find(&in, 0)
	if err != nil {
		t.Fatal(err)
	}
	w, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := w.WriteAt([]byte{1, 2, 3, 4, 5, 6, 7, 8, 1, 0, 0, 0, 4, 0, 0, 0}, r.phys*f.blockSize+40); err != nil {
		t.Fatal(err)
	}
	f = open(t, image, guest.Options{})
	if _, err := f.Lookup(d, "none"); !errors.Is(err, guest.ErrNotExist) {
		t.Error(err)
	}
	lost := 0
	for i := range 1500 {
		if _, ok := f.lookupIndex(&in, &sought{name: oddName(i)}); !ok {
			lost++
		}
		if _, err := f.Lookup(d, oddName(i)); err != nil {
			t.Fatal(i, err)
		}
	}
	if lost == 0 {
		t.Error("the index is not wrong")
	}
}
