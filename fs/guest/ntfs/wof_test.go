package ntfs

import (
	"bytes"
	"crypto/sha1"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// packed compresses files as wimlib does it, and gives their compressed bytes: a resource of a WIM image is what WOF has in its stream.
func packed(t *testing.T, files map[string][]byte, format string, chunk int) map[string][]byte {
	t.Helper()
	dir := t.TempDir()
	for name, b := range files {
		must(t, os.WriteFile(filepath.Join(dir, name), b, 0o644))
	}
	wim := filepath.Join(t.TempDir(), "wim")
	guesttest.Run(t, "wimcapture", "--quiet", dir, wim, "--compress="+format, fmt.Sprint("--chunk-size=", chunk))
	image, err := os.ReadFile(wim)
	must(t, err)
	list, err := exec.Command("wiminfo", "--blobs", wim).Output()
	must(t, err)
	blobs := map[string][]byte{} // hash => bytes
	for blob := range strings.SplitSeq(string(list), "\n\n") {
		var hash string
		var size, stored, off int
		_, err := fmt.Sscanf(blob, "Hash              = 0x%s\nUncompressed size = %d bytes\nCompressed size   = %d bytes\nOffset in WIM     = %d bytes\n", &hash, &size, &stored, &off)
		if err == nil && strings.Contains(blob, "WIM_RESHDR_FLAG_COMPRESSED") {
			blobs[hash] = image[off : off+stored]
		}
	}
	out := map[string][]byte{}
	for name, b := range files {
		if out[name] = blobs[fmt.Sprintf("%x", sha1.Sum(b))]; out[name] == nil {
			t.Fatalf("%s: not in the image", name)
		}
	}
	return out
}

// wofFiles are contents that make the encoders use all that they have.
func wofFiles(t testing.TB) map[string][]byte {
	rng := rand.New(rand.NewPCG(6, 6))
	exe, err := os.ReadFile("/bin/bash")
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{"code": exe, "zeros": make([]byte, 300000), "a byte more": append(make([]byte, 65536), 1)}
	for i, n := range []int{2, 300, 4095, 4096, 4097, 32767, 32768, 32769, 100000, 1 << 20} {
		files[fmt.Sprint("text ", n)] = []byte(strings.Repeat("a line of text, and another; ", n/29+1)[:n])
		b := mixed(rng, n)
		files[fmt.Sprint("mixed ", n)] = append(b, make([]byte, 9000+i)...)
		short := make([]byte, n) // nothing to repeat, and yet few bits
		for i := range short {
			short[i] = byte(rng.ExpFloat64() * 3)
		}
		files[fmt.Sprint("uneven ", n)] = append(short, strings.Repeat("x", 500)...)
	}
	delete(files, "text 2")
	return files
}

// wofReparse is a reparse point of WOF's file provider.
func wofReparse(algorithm uint32) []byte {
	b := le.AppendUint32(nil, tagWOF)
	for _, v := range []uint32{16, 1, wofFile, 1, algorithm} {
		b = le.AppendUint32(b, v)
	}
	return b
}

func TestWOF(t *testing.T) {
	guesttest.Needs(t, "wimcapture", "wiminfo")
	image := volume(t, 256<<20)
	dir, unmount := guesttest.MountNTFS(t, image, "streams_interface=windows")
	files := wofFiles(t)
	for algorithm, format := range []string{"XPRESS", "LZX", "XPRESS", "XPRESS"} {
		d := fmt.Sprint(dir, "/", algorithm)
		must(t, os.Mkdir(d, 0o755))
		for name, b := range packed(t, files, format, int(wofAlgorithms[algorithm].chunk)) {
			p := d + "/" + name
			must(t, os.WriteFile(p, nil, 0o644))
			must(t, os.Truncate(p, int64(len(files[name]))))
			must(t, os.WriteFile(p+":"+wofStream, b, 0o644))
			must(t, unix.Setxattr(p, "system.ntfs_reparse_data", wofReparse(uint32(algorithm)), 0))
		}
	}
	unmount()
	f := open(t, image)
	rng := rand.New(rand.NewPCG(7, 7))
	for algorithm := range wofAlgorithms {
		for name, want := range files {
			ino := lookup(t, f, fmt.Sprint(algorithm, "/", name))
			file, err := f.Open(ino)
			must(t, err)
			got, err := io.ReadAll(io.NewSectionReader(file, 0, file.Size()))
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d/%s: %d bytes, want %d: %v", algorithm, name, len(got), len(want), err)
				continue
			}
			for range 20 {
				off := rng.IntN(len(want))
				p := make([]byte, 1+rng.IntN(len(want)-off))
				if _, err := file.ReadAt(p, int64(off)); err != nil || !bytes.Equal(p, want[off:off+len(p)]) {
					t.Errorf("%d/%s: %d bytes at %d: %v", algorithm, name, len(p), off, err)
				}
			}
			if names, err := f.Streams(ino); err != nil || len(names) != 0 {
				t.Errorf("%s: streams %q, %v", name, names, err)
			}
			if st, err := f.Stat(ino); err != nil || st.Mode&guest.ModeType != guest.ModeRegular || st.Size != int64(len(want)) {
				t.Errorf("%s: %+v, %v", name, st, err)
			}
		}
	}
}

// TestDecompressHostile feeds mutated chunks to the decompressors: they may say that these are damaged, and no more.
func TestDecompressHostile(t *testing.T) {
	guesttest.Needs(t, "wimcapture", "wiminfo")
	rng := rand.New(rand.NewPCG(8, 8))
	files := map[string][]byte{"code": wofFiles(t)["code"][:32<<10]}
	for algorithm, format := range []string{"XPRESS", "LZX"} {
		chunk := int(wofAlgorithms[algorithm].chunk)
		for _, b := range packed(t, map[string][]byte{"code": files["code"][:chunk]}, format, chunk) {
			for range 3000 {
				src := bytes.Clone(b)
				for range 1 + rng.IntN(4) {
					src[rng.IntN(len(src))] ^= byte(1 << rng.IntN(8))
				}
				src = src[:rng.IntN(len(src)+1)]
				dst := make([]byte, chunk)
				if err := wofAlgorithms[algorithm].decompress(dst, src); err != nil && !errors.Is(err, guest.ErrDamaged) {
					t.Fatal(err)
				}
			}
		}
	}
}
