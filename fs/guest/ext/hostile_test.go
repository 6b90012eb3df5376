package ext

import (
	"bytes"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// seeds are small images that mkfs.ext4 made and Linux 6.18 filled, in blocks of 1 KiB; only one of them has checksums, or a change
// would not get past these: extents and inline data; block maps; clusters and checksums; changes in the journal; fast commits.
func seeds(t testing.TB) map[string][]byte {
	t.Helper()
	list, err := filepath.Glob("testdata/*.img.gz")
	if err != nil || len(list) != 5 {
		t.Fatal(list, err)
	}
	out := map[string][]byte{}
	for _, p := range list {
		b, err := guesttest.Unzip(p)
		if err != nil {
			t.Fatal(err)
		}
		out[strings.TrimSuffix(filepath.Base(p), ".img.gz")] = b
	}
	return out
}

// bounds are small ones, for disks of a few megabytes.
var bounds = guest.Options{Cache: 1 << 20, Journal: 1 << 20}

// crawler asks a file system everything, up to a number of things.
type crawler struct {
	f    *FS
	left int
	errs int
}

func (c *crawler) note(err error) {
	if err != nil {
		c.errs++
	}
}

func (c *crawler) visit(ino guest.Ino, depth int) {
	if c.left--; c.left < 0 || depth > 30 {
		return
	}
	st, err := c.f.Stat(ino)
	c.note(err)
	_, err = c.f.Xattrs(ino)
	c.note(err)
	switch st.Mode & guest.ModeType {
	case guest.ModeLink:
		_, err = c.f.Readlink(ino)
		c.note(err)
	case guest.ModeRegular:
		c.file(ino)
	case guest.ModeDir:
		for e, err := range c.f.ReadDir(ino, 0) {
			c.note(err)
			if err == nil && c.left > 0 {
				c.visit(e.Ino, depth+1)
			}
		}
		_, err = c.f.Lookup(ino, "name 077 "+strings.Repeat("n", 37))
		c.note(err)
	}
}

func (c *crawler) file(ino guest.Ino) {
	file, err := c.f.Open(ino)
	c.note(err)
	if err != nil {
		return
	}
	p := make([]byte, 8<<10)
	for _, off := range []int64{0, file.Size() / 2, file.Size() - 5000, 1 << 40} {
		if off >= 0 {
			n, err := file.ReadAt(p, off)
			if err == nil && n < len(p) {
				panic("a short read without an error")
			}
			if err != io.EOF {
				c.note(err)
			}
		}
	}
	for range 20 {
		for _, err := range file.Allocated(4096) {
			c.note(err)
		}
		break
	}
	for _, err := range c.f.Locate(ino) {
		c.note(err)
	}
}

// crawl opens an image and asks it everything. It gives the errors that it saw; -1 when the image cannot be opened.
func crawl(image []byte, things int) (seen, errs int) {
	f, err := Open(guesttest.Memory(image), bounds)
	if err != nil {
		return 0, -1
	}
	c := &crawler{f: f, left: things}
	c.visit(f.Root(), 0)
	for _, err := range f.Free() {
		c.note(err)
	}
	return things - c.left, c.errs
}

func TestSeeds(t *testing.T) {
	for name, image := range seeds(t) {
		f, err := Open(guesttest.Memory(image), bounds)
		if err != nil {
			t.Fatal(name, err)
		}
		if i := f.Info(); len(i.Warnings) > 0 || i.Replayed != (name == "journal" || name == "fast") {
			t.Error(name, i)
		}
		list, err := guesttest.WalkFS(f)
		if err != nil || len(list) < 160 {
			t.Error(name, len(list), err)
		}
		for _, l := range list {
			if l.Fields["error"] != "" {
				t.Error(name, l)
			}
		}
	}
}

// TestFlips damages small images, a few bytes at a time and where there is something, and asks them everything.
func TestFlips(t *testing.T) {
	rounds := 500
	if testing.Short() {
		rounds = 100
	}
	for name, image := range seeds(t) {
		t.Run(name, func(t *testing.T) {
			var used []int // 16 bytes each
			for i := 0; i < len(image); i += 16 {
				if binary.LittleEndian.Uint64(image[i:]) != 0 || binary.LittleEndian.Uint64(image[i+8:]) != 0 {
					used = append(used, i)
				}
			}
			rng := rand.New(rand.NewPCG(9, uint64(len(used))))
			opened, slowest, worst := 0, time.Duration(0), 0
			for round := range rounds {
				b := bytes.Clone(image)
				for range 1 + rng.IntN(12) {
					at := used[rng.IntN(len(used))] + rng.IntN(16)
					b[at] = byte(rng.Uint32())
				}
				if round%10 == 0 {
					b = b[:rng.IntN(len(b))]
				}
				begin := time.Now()
				_, errs := crawl(b, 2000)
				if errs >= 0 {
					opened++
				}
				if d := time.Since(begin); d > slowest {
					slowest, worst = d, round
				}
			}
			t.Logf("%d of %d opened, the slowest took %v (%d)", opened, rounds, slowest, worst)
			if opened < rounds/2 || slowest > 5*time.Second {
				t.Error("too few, or too slow")
			}
		})
	}
}

// TestChecksums damages single bytes of an image with checksums: what is shown is then as it was, or has an error; only what is in files and in
// links with blocks of their own, which have no checksum, may differ without one.
func TestChecksums(t *testing.T) {
	image := seeds(t)["sums"]
	clean, err := Open(guesttest.Memory(image), bounds)
	if err != nil {
		t.Fatal(err)
	}
	want, err := guesttest.WalkFS(clean)
	if err != nil {
		t.Fatal(err)
	}
	// Where there is something that is no file's content.
	mask := bytes.Clone(image)
	for _, p := range []string{"big", "sparse"} {
		ino, err := guesttest.Find(clean, p)
		if err != nil {
			t.Fatal(err)
		}
		for e, err := range clean.Locate(ino) {
			if err != nil {
				t.Fatal(err)
			}
			clear(mask[e.Off:e.End()])
		}
	}
	var places []int
	for i, c := range mask {
		if c != 0 {
			places = append(places, i)
		}
	}
	rng := rand.New(rand.NewPCG(11, 11))
	caught, rounds := 0, 600
	if testing.Short() {
		rounds = 60
	}
	for range rounds {
		at := places[rng.IntN(len(places))]
		b := bytes.Clone(image)
		b[at] ^= 1 << rng.IntN(8)
		f, err := Open(guesttest.Memory(b), bounds)
		if err != nil {
			caught++
			continue
		}
		got, err := guesttest.WalkFS(f)
		if err != nil {
			t.Fatal(at, err)
		}
		for _, lie := range guesttest.Honest(want, got, "sum", "target") {
			t.Errorf("byte %d: %s", at, lie)
		}
		if slices.ContainsFunc(got, func(l guesttest.Line) bool { return l.Fields["error"] != "" }) {
			caught++
		}
	}
	if t.Logf("%d caught", caught); caught < rounds/2 {
		t.Errorf("only %d caught", caught)
	}
}

// TestLoops points parts of a file system at themselves.
func TestLoops(t *testing.T) {
	image := seeds(t)["extents"]
	f, err := Open(guesttest.Memory(image), bounds)
	if err != nil {
		t.Fatal(err)
	}
	ino, err := f.Lookup(f.Root(), "sparse")
	if err != nil {
		t.Fatal(err)
	}
	in, err := f.inode(ino)
	if err != nil {
		t.Fatal(err)
	}
	root, err := in.root()
	if err != nil || root.depth == 0 {
		t.Fatal(root, err)
	}
	block, _ := root.child(0)
	for _, depth := range []uint16{1, 2, 5} {
		b := bytes.Clone(image)
		node := b[block*1024:]
		// An inner node whose one child is itself, in a root as deep as its depth says.
		at := bytes.Index(b, in.block())
		le.PutUint16(b[at+6:], depth)
		copy(node, image[at:at+12])
		le.PutUint16(node[2:], 1)
		le.PutUint16(node[4:], 80)
		le.PutUint16(node[6:], depth-1)
		le.PutUint32(node[12:], 0)
		le.PutUint32(node[16:], uint32(block))
		f, err := Open(guesttest.Memory(b), bounds)
		if err != nil {
			t.Fatal(err)
		}
		file, err := f.Open(ino)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := file.ReadAt(make([]byte, 10), 0); depth > 1 && err == nil {
			t.Error("no error at depth ", depth)
		}
	}
}

// TestManyBlocks lists a directory whose extents are the same blocks a hundred thousand times.
func TestManyBlocks(t *testing.T) {
	image := bytes.Clone(seeds(t)["extents"])
	f, err := Open(guesttest.Memory(image), bounds)
	if err != nil {
		t.Fatal(err)
	}
	ino, err := f.Lookup(f.Root(), "dir")
	if err != nil {
		t.Fatal(err)
	}
	in, err := f.inode(ino)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(image, in.raw)
	root := image[at+0x28:]
	le.PutUint32(image[at+4:], 1<<31)
	first := bytes.Clone(root[12:24])
	le.PutUint16(root[2:], 4)
	for i := range 4 {
		e := root[12+12*i:]
		copy(e, first)
		le.PutUint32(e, uint32(i*3000))
		le.PutUint16(e[4:], 3000-uint16(le.Uint32(first[8:])))
	}
	if f, err = Open(guesttest.Memory(image), bounds); err != nil {
		t.Fatal(err)
	}
	names := 0
	for _, err = range f.ReadDir(ino, 0) {
		names++
	}
	if err == nil || names > 200*3072 {
		t.Error(names, err)
	}
}

// FuzzImage damages the small images: four bytes of place, one of value, again and again.
func FuzzImage(f *testing.F) {
	images := seeds(f)
	names := []string{"extents", "maps", "sums", "journal", "fast"}
	for i := range names {
		f.Add(uint8(i), []byte{0, 4, 0, 0, 1})
	}
	f.Fuzz(func(t *testing.T, which uint8, patch []byte) {
		b := bytes.Clone(images[names[int(which)%len(names)]])
		for ; len(patch) >= 5; patch = patch[5:] {
			b[int(le.Uint32(patch))%len(b)] = patch[4]
		}
		crawl(b, 300)
	})
}

// FuzzDecoders feeds the decoders that work without a file system.
func FuzzDecoders(f *testing.F) {
	for _, image := range seeds(f) {
		f.Add(image[1024:2048])
		break
	}
	f.Add([]byte("\x01\x00\x00\x00\x01\x00\x06\x00\x02\x00\x05\x00\xe8\x03\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := parseSuper(b); (s == nil) != (err != nil) && err == nil {
			t.Error("neither a superblock nor an error")
		}
		expandACL(b)
		parseAttrs(b, 0, 0, func(a attr) bool { return len(a.value) <= len(b) })
		if len(b) >= 12 {
			n := node{hi: maxBlocks, depth: int(b[0])}
			n.parse(b)
			for i := range n.len() {
				n.search(n.at(i))
			}
		}
		if len(b) >= 4 {
			if r, n := parseRecord(b); n > len(b) || len(r.value) > n {
				t.Error(r, n)
			}
			var x index
			if x.parse(b) {
				x.seek(le.Uint32(b))
				x.block()
			}
		}
		for kind := range 7 {
			hashName(kind, [4]uint32{1}, string(b[:min(len(b), 255)]))
		}
		j := journal{incompat: uint32(len(b)) & 0x1f}
		j.tags(append(bytes.Clone(b), make([]byte, 16)...))
	})
}
