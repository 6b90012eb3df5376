package guesttest

import (
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
)

// noiseSize is how much noise there is; noise starts anywhere in its first half.
const noiseSize = 128 << 20 // bytes

// sumsScript has the work done on the host that is slow where it is emulated: to make noise and to hash.
const sumsScript = `
spare=/dev/vd%c from=0 to=%d
noise() { dd if=$spare of=$1 bs=64k skip=$from seek=$2 count=$3 conv=notrunc 2>/dev/null; from=$(((from + $3) %% %d)); }
sum() {
	sync; echo 3 > /proc/sys/vm/drop_caches
	size=$(blockdev --getsize64 $2)
	dd if=$2 of=$spare bs=1M seek=$to conv=notrunc 2>/dev/null
	echo $1 $size $to
	to=$((to + size / 1048576 + 1))
}
`

// Sums is Guest for a script that fills block devices and says what they hold. It has two further commands:
//
//	noise DEVICE AT COUNT    writes COUNT times 64 KiB of noise behind AT times 64 KiB, and fails where the device ends
//	sum NAME DEVICE          gives the size of a device and the SHA-256 of what the kernel reads from it, once its caches are empty
//
// It gives what was said: name => size and sum, and the names in their order.
func Sums(t *testing.T, disks []string, script string, extra ...string) (said map[string]string, names []string) {
	t.Helper()
	spare := Sparse(t, 8<<30)
	f, err := os.OpenFile(spare, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := io.CopyN(f, rand.NewChaCha8([32]byte{1}), noiseSize); err != nil {
		t.Fatal(err)
	}
	script = fmt.Sprintf(sumsScript, 'a'+len(disks), noiseSize>>20, noiseSize>>17) + script
	said = map[string]string{}
	for line := range strings.Lines(Guest(t, append(disks, spare), script, extra...)) {
		var name string
		var size, at int64
		if _, err := fmt.Sscan(line, &name, &size, &at); err != nil || said[name] != "" {
			t.Fatalf("the guest says %q: %v", line, err)
		}
		h := sha256.New()
		if n, err := io.Copy(h, io.NewSectionReader(f, at<<20, size)); err != nil || n != size {
			t.Fatalf("%s: %d of %d bytes, %v", name, n, size, err)
		}
		said[name] = fmt.Sprintf("%d %x", size, h.Sum(nil))
		names = append(names, name)
	}
	return said, names
}
