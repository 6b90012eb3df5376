package ext

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// collect gathers what a listing yields.
func collect(t *testing.T, seq func(func(extent.Extent, error) bool)) []extent.Extent {
	t.Helper()
	var list []extent.Extent
	for e, err := range seq {
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, e)
	}
	return list
}

// freeByDumpe2fs is what dumpe2fs says is free. It names a cluster by its first block.
func freeByDumpe2fs(t *testing.T, image string, block, cluster int64) []extent.Extent {
	t.Helper()
	var list []extent.Extent
	for _, m := range regexp.MustCompile(`(?m)^  Free blocks: (.*)$`).FindAllStringSubmatch(guesttest.Run(t, "dumpe2fs", image), -1) {
		for part := range strings.SplitSeq(m[1], ", ") {
			if part == "" {
				continue
			}
			from, to, _ := strings.Cut(part, "-")
			if to == "" {
				to = from
			}
			a, err1 := strconv.ParseInt(from, 10, 64)
			b, err2 := strconv.ParseInt(to, 10, 64)
			if err1 != nil || err2 != nil {
				t.Fatalf("dumpe2fs says %q", m[0])
			}
			list = append(list, extent.Extent{Off: a * block, Len: (b-a)*block + cluster})
		}
	}
	return extent.Normalise(list)
}

// checkFree compares what is free with what dumpe2fs says of the same file system, its journal replayed.
func checkFree(t *testing.T, f *FS, replayed string) {
	t.Helper()
	got, want := collect(t, f.Free()), freeByDumpe2fs(t, replayed, f.blockSize, f.info.Block)
	if !slices.Equal(got, want) || len(got) == 0 {
		t.Errorf("free: %d ranges, %d bytes; dumpe2fs: %d ranges, %d bytes", len(got), extent.Total(got), len(want), extent.Total(want))
	}
}

// fiemap asks the kernel where a file is (Documentation/filesystems/fiemap.rst: a header of 32 bytes, 56 bytes an extent).
func fiemap(t *testing.T, p string) []extent.Extent {
	t.Helper()
	const request, room, inline = 0xC020660B, 4000, 0x200
	w, err := os.OpenFile(p, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	b := make([]byte, 32+56*room)
	binary.NativeEndian.PutUint64(b[8:], 1<<63)
	binary.NativeEndian.PutUint32(b[24:], room)
	_, _, no := unix.Syscall(unix.SYS_IOCTL, w.Fd(), request, uintptr(unsafe.Pointer(&b[0])))
	runtime.KeepAlive(b)
	if no != 0 {
		t.Fatal(p, no)
	}
	n := int(binary.NativeEndian.Uint32(b[20:]))
	if n == room {
		t.Fatal(p, ": more extents than expected")
	}
	var list []extent.Extent
	for i := range n {
		e := b[32+56*i:]
		if binary.NativeEndian.Uint32(e[40:])&inline != 0 {
			continue
		}
		list = append(list, extent.Extent{Off: int64(binary.NativeEndian.Uint64(e[8:])), Len: int64(binary.NativeEndian.Uint64(e[16:]))})
	}
	return extent.Normalise(list)
}

// checkLocate compares where files are with what the kernel says of a mount.
func checkLocate(t *testing.T, f *FS, image string, v variant) {
	t.Helper()
	dir, unmount := guesttest.Mount(t, image, v.fstype(), "ro")
	defer unmount()
	files := 0
	for _, pattern := range []string{"sparse/*", "big/*", "allocated/*", "fragmented/*", "nested/a0/b0/*"} {
		list, err := filepath.Glob(dir + "/" + pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range list {
			rel := strings.TrimPrefix(p, dir)
			ino, err := guesttest.Find(f, rel)
			if err != nil {
				t.Fatal(err)
			}
			got, want := extent.Normalise(collect(t, f.Locate(ino))), fiemap(t, p)
			if !slices.Equal(got, want) {
				t.Errorf("%s: at %.200s, the kernel says %.200s", rel, fmt.Sprint(got), fmt.Sprint(want))
			}
			files++
		}
	}
	if files < 100 {
		t.Errorf("only %d files", files)
	}
}

func TestUncertain(t *testing.T) {
	image := fastImage(t, func(string) error { return nil })
	for what, opt := range map[string]guest.Options{"with fast commits": {}, "without replay": {NoReplay: true}} {
		for _, err := range open(t, image, opt).Free() {
			if err == nil {
				t.Errorf("%s: something is free", what)
			}
			break
		}
	}
}
