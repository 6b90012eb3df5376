package whole

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// disk is a source image.
type disk struct {
	file   string
	format string // as qemu calls it
	size   int64  // bytes that a guest sees
}

// piece is random data at an offset.
type piece struct{ off, len int64 }

// newRaw makes a raw file of holes and random pieces.
func newRaw(t *testing.T, file string, size int64, pieces ...piece) disk {
	t.Helper()
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for _, p := range pieces {
		if _, err := f.WriteAt(randomBytes(uint64(size+p.off), p.len), p.off); err != nil {
			t.Fatal(err)
		}
	}
	return disk{file, "raw", size}
}

// randomBytes gives the same bytes for the same seed.
func randomBytes(seed uint64, n int64) []byte {
	b := make([]byte, n)
	rnd := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24), byte(seed >> 32), byte(seed >> 40)})
	rnd.Read(b) // never fails
	return b
}

// newText makes a raw file of compressible data without a hole, seed by seed another.
func newText(t *testing.T, file string, seed uint64, size int64) disk {
	t.Helper()
	var b bytes.Buffer
	rnd := rand.New(rand.NewPCG(seed, 1))
	for int64(b.Len()) < size {
		fmt.Fprintf(&b, "%d: the quick brown fox jumps over %x\n", b.Len(), rnd.Uint64())
	}
	if err := os.WriteFile(file, b.Bytes()[:size], 0o644); err != nil {
		t.Fatal(err)
	}
	return disk{file, "raw", size}
}

// newZeros makes a raw file of zeros that are written, not holes.
func newZeros(t *testing.T, file string, size int64) disk {
	t.Helper()
	if err := os.WriteFile(file, make([]byte, size), 0o644); err != nil {
		t.Fatal(err)
	}
	return disk{file, "raw", size}
}

// Layout of newDebian's disk.
const (
	debianSize  = 160 << 20
	rootOff     = 8 << 20   // bytes, where the ext4 begins
	rootSize    = 120 << 20 // bytes
	rootSectors = rootSize / 512
)

// newDebian makes a disk with a GPT: a boot partition, an ext4 that the kernel has
// filled with files of this system and partly emptied again, and a swap partition.
func newDebian(t *testing.T, file string) disk {
	t.Helper()
	needs(t, "root", "sgdisk", "losetup", "mkfs.ext4")
	d := newRaw(t, file, debianSize)
	tool(t, "sgdisk", "--clear", "--new=1:2048:+1M", "--typecode=1:EF02",
		fmt.Sprintf("--new=2:%d:+%d", rootOff/512, rootSectors-1), "--new=3:0:0", "--typecode=3:8200", file)
	tool(t, "mkfs.ext4", "-q", "-F", "-E", fmt.Sprintf("offset=%d", rootOff), file, fmt.Sprint(rootSize>>10)+"k")
	dev := loop(t, file, "--offset", fmt.Sprint(rootOff), "--sizelimit", fmt.Sprint(rootSize))
	dir, unmount := kernelMount(t, dev)
	for _, from := range []string{"/etc/passwd", "/etc/default", "/usr/share/zoneinfo", "/usr/share/perl", "/usr/share/common-licenses", "/bin/bash"} {
		if _, err := os.Stat(from); err == nil {
			tool(t, "cp", "-a", from, dir+"/")
		}
	}
	for i := range 40 { // gone again: data in free blocks
		newText(t, filepath.Join(dir, fmt.Sprint("temporary", i)), uint64(i), 200_000)
	}
	tool(t, "sh", "-c", fmt.Sprintf("sync -f %s; rm %s/temporary?[13579]; ln -s bash %s/sh; mkdir -p %s/a/b/c", dir, dir, dir, dir))
	unmount()
	tool(t, "losetup", "--detach", dev)
	return d
}

// newChain makes a qcow2 (v3, 128 MiB) over a smaller compressed qcow2 over a raw
// file, with clusters of every kind: plain, compressed by zstd, zeroed, from each backing file.
func newChain(t *testing.T, dir string) disk {
	t.Helper()
	needs(t, "qemu-img", "qemu-io")
	newRaw(t, filepath.Join(dir, "bottom.raw"), 48<<20+5*512, piece{0, 3 << 20}, piece{20<<20 + 77, 99_999}, piece{48 << 20, 5 * 512})
	middle, top := filepath.Join(dir, "middle.qcow2"), filepath.Join(dir, "top.qcow2")
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "bottom.raw", "-F", "raw", middle, "96M")
	tool(t, "qemu-io", "-f", "qcow2", middle, "-c", "write -q -c -P 0x11 1M 64k", "-c", "write -q -c -P 0x12 1984k 64k",
		"-c", "write -q -P 0x13 60M 100k", "-c", "write -q -z 2M 512k", "-c", "write -q -P 0x14 95M 1M")
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "compression_type=zstd", "-b", "middle.qcow2", "-F", "qcow2", top, "128M")
	tool(t, "qemu-io", "-f", "qcow2", top, "-c", "write -q -c -P 0x21 1M 64k", "-c", "write -q -P 0x22 512 1024",
		"-c", "write -q -z 60M 64k", "-c", "write -q -c -P 0x23 100M 64k", "-c", "write -q -P 0x24 134217216 512")
	return disk{top, "qcow2", 128 << 20}
}

// newDelta makes a VMDK over a VMDK in two files.
func newDelta(t *testing.T, dir string) disk {
	t.Helper()
	needs(t, "qemu-img", "qemu-io")
	newRaw(t, filepath.Join(dir, "raw"), 48<<20+5*512, piece{0, 3 << 20}, piece{20<<20 + 77, 99_999}, piece{48 << 20, 5 * 512})
	base, top := filepath.Join(dir, "base.vmdk"), filepath.Join(dir, "top.vmdk")
	tool(t, "qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=monolithicFlat", filepath.Join(dir, "raw"), base)
	tool(t, "qemu-img", "create", "-q", "-f", "vmdk", "-o", "zeroed_grain=on", "-b", "base.vmdk", "-F", "vmdk", top)
	tool(t, "qemu-io", "-f", "vmdk", top, "-c", "write -q -P 0x11 1M 64k", "-c", "write -q -P 0x12 512 1024", "-c", "write -q -z 20M 64k")
	return disk{top, "vmdk", 48<<20 + 5*512}
}

// newCompressed makes a qcow2 with only compressed clusters of mixed content.
func newCompressed(t *testing.T, file string, options string) disk {
	t.Helper()
	return newConverted(t, file, "qcow2", options, "-c")
}

// newConverted makes an image of mixed content.
func newConverted(t *testing.T, file, format, options string, args ...string) disk {
	t.Helper()
	needs(t, "qemu-img")
	raw := newText(t, file+".raw", 5, 9<<20+512)
	f, err := os.OpenFile(raw.file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(randomBytes(1, 1<<20), 3<<20+333); err != nil { // stored plain: it does not shrink
		t.Fatal(err)
	}
	args = append([]string{"convert", "-f", "raw", "-O", format, "-o", options}, append(args, raw.file, file)...)
	tool(t, "qemu-img", args...)
	if err := os.Remove(raw.file); err != nil {
		t.Fatal(err)
	}
	return disk{file, format, 9<<20 + 512}
}

// allocated is the bytes that a file takes up on its disk.
func allocated(t *testing.T, file string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// usage is the bytes of all files in dir, as they say and as they take up.
func usage(t *testing.T, dir string) (apparent, taken int64) {
	t.Helper()
	for _, c := range []struct {
		to   *int64
		args []string
	}{{&apparent, []string{"--apparent-size"}}, {&taken, nil}} {
		out := tool(t, "du", append(append([]string{"-s", "-B1"}, c.args...), dir)...)
		if _, err := fmt.Sscan(strings.Fields(out)[0], c.to); err != nil {
			t.Fatal(err)
		}
	}
	return apparent, taken
}
