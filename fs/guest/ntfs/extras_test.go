package ntfs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// mixed is n bytes of which parts can be compressed, others not, and others are zeros.
func mixed(rng *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for at := 0; at < n; {
		part := b[at:min(n, at+1+rng.IntN(60000))]
		switch rng.IntN(3) {
		case 0:
			for i := range part {
				part[i] = byte(rng.Uint32())
			}
		case 1:
			for i := range part {
				part[i] = byte(rng.IntN(3)) + 'a'
			}
		}
		at += len(part)
	}
	return b
}

// TestCompressed reads files that were written, truncated, and written to in places within a compressed directory.
func TestCompressed(t *testing.T) {
	image := volume(t, 512<<20)
	dir, unmount := guesttest.MountNTFS(t, image, "compression")
	d := dir + "/compressed"
	must(t, os.Mkdir(d, 0o755))
	const compressed = 0x800
	must(t, unix.Setxattr(d, "system.ntfs_attrib_be", binary.BigEndian.AppendUint32(nil, compressed|0x20), 0))
	rng := rand.New(rand.NewPCG(3, 3))
	for _, n := range []int{0, 1, 700, 4095, 4096, 4097, 5000, 61440, 65535, 65536, 65537, 69632, 100000, 200000, 1 << 20, 5<<20 + 7} {
		must(t, os.WriteFile(fmt.Sprint(d, "/zeros ", n), make([]byte, n), 0o644))
		must(t, os.WriteFile(fmt.Sprint(d, "/text ", n), []byte(strings.Repeat("holdfast ", n/9+1)[:n]), 0o644))
		for i := range 5 {
			must(t, os.WriteFile(fmt.Sprintf("%s/mixed %d %d", d, n, i), mixed(rng, n), 0o644))
		}
	}
	// Truncated and grown again; with a hole; appended to, in turns, so that units are in pieces.
	for i := range 30 {
		p := fmt.Sprint(d, "/changed ", i)
		must(t, os.WriteFile(p, mixed(rng, 300000), 0o644))
		must(t, os.Truncate(p, int64(rng.IntN(300000))))
		must(t, os.Truncate(p, int64(rng.IntN(600000))))
		w, err := os.OpenFile(p, os.O_RDWR, 0)
		must(t, err)
		for range 20 {
			_, err := w.WriteAt(mixed(rng, 1+rng.IntN(20000)), int64(rng.IntN(1<<20)))
			must(t, err)
		}
		must(t, w.Close())
	}
	for range 200 {
		w, err := os.OpenFile(fmt.Sprint(d, "/turns ", rng.IntN(3)), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		must(t, err)
		_, err = w.Write(mixed(rng, 1+rng.IntN(9000)))
		must(t, err)
		must(t, w.Close())
	}
	unmount()
	same(t, image, "")
	n := 0
	f := open(t, image)
	for e, err := range f.ReadDir(lookup(t, f, "compressed"), 0) {
		must(t, err)
		if i, err := f.inode(e.Ino); err == nil && i.find(attrData, "").unit > 0 {
			n++
		}
	}
	if n < 100 {
		t.Errorf("only %d files are compressed", n)
	}
}

func lookup(t *testing.T, f *FS, p string) guest.Ino {
	t.Helper()
	ino, err := guesttest.Find(f, p)
	if err != nil {
		t.Fatal(err)
	}
	return ino
}

// TestStreams compares streams with what ntfs-3g shows as file:stream.
func TestStreams(t *testing.T) {
	image := volume(t, 256<<20)
	dir, unmount := guesttest.MountNTFS(t, image, "streams_interface=windows")
	rng := rand.New(rand.NewPCG(4, 4))
	must(t, os.WriteFile(dir+"/file", []byte("content"), 0o644))
	must(t, os.Mkdir(dir+"/dir", 0o755))
	sizes := map[string]int{"short": 5, "Zone.Identifier": 26, "empty": 0, "ünï": 900, "65536": 65536, "large": 3 << 20}
	for i := range 100 {
		sizes[fmt.Sprint("stream ", i)] = i * 50
	}
	for name, n := range sizes {
		must(t, os.WriteFile(dir+"/file:"+name, mixed(rng, n), 0o644))
		must(t, os.WriteFile(dir+"/dir:"+name, mixed(rng, n/2), 0o644))
	}
	unmount()
	f := open(t, image)
	dir, unmount = guesttest.MountNTFS(t, guesttest.Copy(t, image), "ro,streams_interface=windows")
	defer unmount()
	for _, p := range []string{"file", "dir"} {
		ino := lookup(t, f, p)
		names, err := f.Streams(ino)
		must(t, err)
		if len(names) != len(sizes) {
			t.Errorf("%s: %d streams of %d", p, len(names), len(sizes))
		}
		for _, name := range names {
			want, err := os.ReadFile(dir + "/" + p + ":" + name)
			must(t, err)
			s, err := f.OpenStream(ino, name)
			must(t, err)
			got, err := io.ReadAll(io.NewSectionReader(s, 0, s.Size()))
			must(t, err)
			if !bytes.Equal(got, want) {
				t.Errorf("%s:%s: %d bytes, want %d", p, name, len(got), len(want))
			}
		}
	}
	if _, err := f.OpenStream(f.Root(), "none"); err == nil {
		t.Error("a stream that is not there")
	}
	same(t, image, "")
}

// TestAttributeLists has files whose attributes do not fit into a record: by links, streams and pieces.
func TestAttributeLists(t *testing.T) {
	image := volume(t, 512<<20)
	dir, unmount := guesttest.MountNTFS(t, image, "")
	rng := rand.New(rand.NewPCG(5, 5))
	var files []*os.File
	for i := range 3 {
		w, err := os.Create(fmt.Sprint(dir, "/pieces ", i))
		must(t, err)
		files = append(files, w)
	}
	for i := range int64(1500) {
		for _, w := range files { // each with a hole behind it
			_, err := w.WriteAt(mixed(rng, 4096), i*8192)
			must(t, err)
		}
	}
	must(t, os.Mkdir(dir+"/links", 0o755))
	must(t, os.WriteFile(dir+"/linked", mixed(rng, 10000), 0o644))
	for n, p := range []string{files[1].Name(), dir + "/linked"} {
		for i := range 3 + 200*n {
			must(t, os.Link(p, fmt.Sprintf("%s/links/%d %d %s", dir, n, i, strings.Repeat("ö", 200))))
		}
		for i := range 50 {
			must(t, unix.Setxattr(p, fmt.Sprint("user.", i), mixed(rng, i*97), 0))
		}
	}
	for n, w := range files {
		must(t, w.Truncate(11<<20+int64(n)))
		_, err := w.WriteAt([]byte("far away"), 30<<20)
		must(t, err)
		must(t, w.Close())
	}
	unmount()
	same(t, image, "")
	f := open(t, image)
	i, err := f.inode(lookup(t, f, "pieces 1"))
	must(t, err)
	a := i.find(attrData, "")
	linked, err := f.inode(lookup(t, f, "linked"))
	must(t, err)
	if len(a.parts) < 5 || len(linked.names) < 200 {
		t.Errorf("%d parts, %d names: no attribute list to speak of", len(a.parts), len(linked.names))
	}
}

// TestMFTInPieces has an MFT that is itself in so many pieces that it needs an attribute list.
func TestMFTInPieces(t *testing.T) {
	image := volume(t, 12<<20, "-c", "512")
	dir, unmount := guesttest.MountNTFS(t, image, "")
	must(t, os.Mkdir(dir+"/d", 0o755))
	n := 0
	for ; ; n++ {
		if err := os.WriteFile(fmt.Sprint(dir, "/d/", n), make([]byte, 1400), 0o644); err != nil {
			break
		}
	}
	for i := 0; i < n; i += 2 {
		must(t, os.Remove(fmt.Sprint(dir, "/d/", i)))
	}
	must(t, os.Mkdir(dir+"/e", 0o755))
	for i := range 3 * n {
		if os.WriteFile(fmt.Sprint(dir, "/e/", i), []byte(strings.Repeat("x", i%300)), 0o644) != nil {
			t.Logf("full after %d of %d", i, 3*n)
			break
		}
	}
	unmount()
	same(t, image, "")
	f := open(t, image)
	i, err := f.inode(0)
	must(t, err)
	a := i.find(attrData, "")
	t.Logf("%d files, an MFT in %d parts", n, len(a.parts))
	if len(a.parts) < 2 {
		t.Error("the MFT is in one piece")
	}
}
