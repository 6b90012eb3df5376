package xfs

import (
	"bytes"
	"encoding/json"
	"flag"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// testdata/dirty.img.gz is a disk of 16 MiB that was copied while it was mounted, and dirty.json.gz what the kernel showed of it after its own
// replay (Linux 6.18). They let the reader be tested without root.
var makeGolden = flag.Bool("golden", false, "make testdata/dirty.* anew; needs root")

func TestMakeGolden(t *testing.T) {
	if !*makeGolden {
		t.Skip("asked for by -golden")
	}
	v := variant{mkfs: []string{"-b", "size=1024", "-m", "rmapbt=1,reflink=1"}, size: 16 << 20}
	image := v.empty(t)
	for round := range uint64(2) {
		dir, unmount := guesttest.Mount(t, image, "xfs", "rw")
		c := &churn{t: t, dir: dir + "/churn", rng: rand.New(rand.NewPCG(1, round))}
		c.run(40)
		if round == 0 {
			unmount()
			continue
		}
		image = guesttest.Copy(t, image)
	}
	raw, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	lines, err := json.Marshal(guesttest.Truth(t, image, "xfs", "nouuid"))
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{"dirty.img.gz": raw, "dirty.json.gz": lines} {
		guesttest.Zip(t, "testdata/"+name, b)
	}
}

// memory is a disk in memory with pages of it replaced, so that many can share one image.
type memory struct {
	base  []byte
	pages map[int64][]byte // page of 4 KiB => its bytes
}

const memoryPage = 4096

func (m *memory) Size() int64 { return int64(len(m.base)) }

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	n := 0
	for n < len(p) && off < int64(len(m.base)) {
		page := off / memoryPage
		b := m.pages[page]
		if b == nil {
			b = m.base[page*memoryPage : min((page+1)*memoryPage, int64(len(m.base)))]
		}
		k := copy(p[n:], b[off%memoryPage:])
		n, off = n+k, off+int64(k)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// page gives a page to be changed.
func (m *memory) page(off int64) []byte {
	n := off / memoryPage
	if m.pages[n] == nil {
		m.pages[n] = bytes.Clone(m.base[n*memoryPage : (n+1)*memoryPage])
	}
	return m.pages[n]
}

var golden = sync.OnceValues(func() ([]byte, error) { return guesttest.Unzip("testdata/dirty.img.gz") })

func goldenDisk(t testing.TB) *memory {
	t.Helper()
	b, err := golden()
	if err != nil {
		t.Fatal(err)
	}
	return &memory{b, map[int64][]byte{}}
}

func goldenTruth(t testing.TB) []guesttest.Line {
	t.Helper()
	var want []guesttest.Line
	b, err := guesttest.Unzip("testdata/dirty.json.gz")
	if err == nil {
		err = json.Unmarshal(b, &want)
	}
	if err != nil {
		t.Fatal(err)
	}
	return want
}

func TestGolden(t *testing.T) {
	fs, err := Open(goldenDisk(t), guest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	guesttest.SameFS(t, goldenTruth(t), fs)
	if i := fs.Info(); i.Type != "xfs" || !i.Replayed || i.Size != 16<<20 || i.Block != 1024 || len(i.UUID) != 36 || len(i.Warnings) != 0 {
		t.Errorf("%+v", i)
	}
}

// TestCopyOfSuper damages the superblock: a copy of it must serve.
func TestCopyOfSuper(t *testing.T) {
	guesttest.Needs(t, "mkfs.xfs", "mount")
	v := variant{mkfs: []string{"-b", "size=1024"}, size: 320 << 20, tree: tiny}
	image := v.make(t)
	want := guesttest.Truth(t, image, "xfs", "nouuid")
	for what, damage := range map[string][]byte{"overwritten": make([]byte, 512), "a bit": []byte("XFSB\x01")} {
		copied := guesttest.Copy(t, image)
		f, err := os.OpenFile(copied, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(damage, 0); err != nil {
			t.Fatal(err)
		}
		f.Close()
		fs := open(t, copied, guest.Options{})
		if len(fs.Info().Warnings) != 1 {
			t.Errorf("%s: %+v", what, fs.Info())
		}
		guesttest.SameFS(t, want, fs)
	}
}
