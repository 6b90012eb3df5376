package iso9660

import (
	"bytes"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

type memory []byte

func (m memory) ReadAt(p []byte, off int64) (int, error) { return bytes.NewReader(m).ReadAt(p, off) }
func (m memory) Size() int64                             { return int64(len(m)) }

// small gives images of each kind to break.
func small(t *testing.T) (list []memory) {
	dir := t.TempDir()
	for _, p := range []string{"a/b/c/d/e/f/g/h/i/j", "long name, so that it goes on elsewhere"} {
		if err := os.MkdirAll(dir+"/"+p, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range []string{"file", "a/file", "a/b/c/d/e/f/g/h/i/j/deep"} {
		if err := os.WriteFile(dir+"/"+p, bytes.Repeat([]byte("content "), 5000), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("a/../a/b/./c", dir+"/link"); err != nil {
		t.Fatal(err)
	}
	guesttest.NeedsPrograms(t, "genisoimage", "mkzftree")
	packed := t.TempDir() + "/z"
	guesttest.Run(t, "mkzftree", dir, packed)
	for _, image := range []string{genisoimage(t, dir, "-R"), genisoimage(t, dir, "-J"), genisoimage(t, packed, "-R", "-z")} {
		b, err := os.ReadFile(image)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, b)
	}
	return list
}

// TestBroken: whatever a volume says, reading it ends, and soon.
func TestBroken(t *testing.T) {
	rnd := rand.New(rand.NewPCG(5, 5))
	rounds := 600
	if testing.Short() {
		rounds = 100
	}
	for _, image := range small(t) {
		opened := 0
		used := len(bytes.TrimRight(image, "\x00"))
		for range rounds {
			b := bytes.Clone(image)
			for range rnd.IntN(12) {
				at := firstVolume*sectorSize + rnd.IntN(used-firstVolume*sectorSize)
				b[at] = byte(rnd.Uint32())
			}
			// Directories are behind the descriptors and the path tables.
			for range rnd.IntN(20) {
				b[20*sectorSize+rnd.IntN(min(used-20*sectorSize, 40*sectorSize))] = []byte{0, 1, 2, 0x80, 255, byte(rnd.Uint32())}[rnd.IntN(6)]
			}
			if rnd.IntN(5) == 0 {
				b = b[:rnd.IntN(len(b))]
			}
			if tour(t, b) {
				opened++
			}
		}
		if opened < rounds/4 {
			t.Errorf("only %d of %d could be opened", opened, rounds)
		}
	}
}

// tour walks a volume that may be broken, and reports whether there was one.
func tour(t *testing.T, b memory) bool {
	start := time.Now()
	f, err := Open(b, guest.Options{})
	if err != nil {
		return false
	}
	guesttest.WalkFS(f)
	for _, p := range []string{"a/b/c/d/e/f/g/h/i/j/deep", "link", "file"} {
		guesttest.Find(f, p)
	}
	if d := time.Since(start); d > 20*time.Second {
		t.Fatalf("took %v", d)
	}
	return true
}

// TestCircle: a directory that is moved below itself is damage, also when it says that it is in itself.
func TestCircle(t *testing.T) {
	image := small(t)[1]
	f, err := Open(image, guest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	a, err := guesttest.Find(f, "a")
	if err != nil {
		t.Fatal(err)
	}
	b, err := guesttest.Find(f, "a/b")
	if err != nil {
		t.Fatal(err)
	}
	at := func(ino guest.Ino, off int64) []byte { return image[int64(ino)+off:] }
	c := at(b, 68) // the third record: c, which is to be a
	block := uint32(a / sectorSize)
	le.PutUint32(c[2:], block)
	f, _ = Open(image, guest.Options{})
	if ino, err := guesttest.Find(f, "a/b/c"); err == nil {
		t.Errorf("a/b/c is %d", ino)
	}
	le.PutUint32(at(a, 34)[2:], block) // the second record of a: it is in itself
	f, _ = Open(image, guest.Options{})
	if ino, err := guesttest.Find(f, "a/b/c"); err == nil {
		t.Errorf("a/b/c is %d", ino)
	}
	if _, err := guesttest.WalkFS(f); err != nil {
		t.Error(err)
	}
}

// built is a volume with a directory, a file of two extents, and a link.
func built() memory {
	b := make(memory, 24*sectorSize)
	copy(b[16*sectorSize:], "\x01CD001\x01")
	copy(b[17*sectorSize:], "\xffCD001\x01")
	p := b[16*sectorSize:]
	for at, v := range map[int]uint16{120: 1, 124: 1, 128: sectorSize} { // volumes, this one, bytes of a block
		le.PutUint16(p[at:], v)
		binary.BigEndian.PutUint16(p[at+2:], v)
	}
	for at, v := range map[int]uint32{80: 24, 132: 10} { // blocks, bytes of the path table
		le.PutUint32(p[at:], v)
		binary.BigEndian.PutUint32(p[at+4:], v)
	}
	le.PutUint32(p[140:], 23) // the path table
	binary.BigEndian.PutUint32(p[148:], 23)
	p[881] = 1
	put := func(at int, start, size uint32, flags byte, name string, use string) int {
		r := b[at:]
		n := recordHead + len(name)
		n += n & 1
		copy(r[n:], use)
		n += len(use) + len(use)&1
		r[0], r[25], r[32] = byte(n), flags, byte(len(name))
		r[18], r[19], r[20] = 120, 1, 1
		le.PutUint32(r[2:], start)
		binary.BigEndian.PutUint32(r[6:], start)
		le.PutUint32(r[10:], size)
		binary.BigEndian.PutUint32(r[14:], size)
		r[28], r[31] = 1, 1 // of volume 1
		copy(r[recordHead:], name)
		return at + n
	}
	put(16*sectorSize+156, 18, sectorSize, flagDir, "\x00", "")
	at := put(18*sectorSize, 18, sectorSize, flagDir, "\x00", "SP\x07\x01\xbe\xef\x00")
	at = put(at, 18, sectorSize, flagDir, "\x01", "")
	at = put(at, 19, sectorSize, flagDir, "D", "NM\x09\x01\x00dir")
	at = put(at, 20, 3000, flagMore, "F", "TF\x0c\x01\x02\x78\x01\x01\x01\x01\x01\x00")
	at = put(at, 22, 30, 0, "F", "")
	put(at, 0, 0, 0, "L", "PX\x24\x01\xff\xa1\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00SL\x0a\x01\x00\x00\x03abc")
	put(put(19*sectorSize, 19, sectorSize, flagDir, "\x00", ""), 18, sectorSize, flagDir, "\x01", "")
	for i := range 3030 {
		b[20*sectorSize+i+i/3000*1096] = byte(i)
	}
	return b
}

func FuzzVolume(f *testing.F) {
	f.Add([]byte(built()))
	f.Fuzz(func(t *testing.T, b []byte) { tour(t, b) })
}

// TestTwoExtents: libarchive reads the same in a file of two extents.
func TestTwoExtents(t *testing.T) {
	guesttest.NeedsPrograms(t, "bsdtar")
	image := t.TempDir() + "/iso"
	if err := os.WriteFile(image, built(), 0o644); err != nil {
		t.Fatal(err)
	}
	want, err := exec.Command("bsdtar", "--options", "iso9660:!rockridge", "-xOf", image, "F").Output()
	if err != nil {
		t.Fatal(err)
	}
	f := open(t, image)
	ino, err := guesttest.Find(f, "f")
	if err != nil {
		t.Fatal(err)
	}
	file, err := f.Open(ino)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(io.NewSectionReader(file, 0, 1<<20))
	if err != nil || !bytes.Equal(got, want) || len(got) != 3030 {
		t.Errorf("%d bytes, %v; libarchive has %d", len(got), err, len(want))
	}
}
