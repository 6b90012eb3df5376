package volume

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

type memory = guesttest.Memory

// scanImages scans image files as disk0, disk1 ….
func scanImages(t *testing.T, opt Options, images ...string) (map[string]Volume, []string) {
	t.Helper()
	var disks []Disk
	for i, image := range images {
		disks = append(disks, Disk{fmt.Sprintf("disk%d", i), guesttest.OpenDevice(t, image)})
	}
	return byName(Scan(disks, opt))
}

func byName(volumes []Volume, warnings []string) (map[string]Volume, []string) {
	m := map[string]Volume{}
	for _, v := range volumes {
		m[v.Name] = v
	}
	return m, warnings
}

// sum is the SHA-256 of a whole device.
func sum(t *testing.T, dev guest.Device) string {
	t.Helper()
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(dev, 0, dev.Size())); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// scatter writes seeded noise to places of a file: at its beginning, its end and between.
func scatter(t *testing.T, path string, off, size int64, seed uint64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rnd := rand.New(rand.NewPCG(seed, 1))
	for i := range 64 {
		b := make([]byte, 1+rnd.IntN(32<<10))
		for j := range b {
			b[j] = byte(rnd.Uint32())
		}
		at := rnd.Int64N(max(1, size-int64(len(b))))
		switch i {
		case 0:
			at = 0
		case 1:
			at = size - int64(len(b))
		}
		if _, err := f.WriteAt(b, off+at); err != nil {
			t.Fatal(err)
		}
	}
}

// sameBytes compares a volume with where its bytes are on the disks, by reads of odd sizes at odd places, and at its end.
func sameBytes(t *testing.T, name string, got, want guest.Device) {
	t.Helper()
	if got.Size() != want.Size() {
		t.Fatalf("%s has %d bytes, not %d", name, got.Size(), want.Size())
	}
	rnd := rand.New(rand.NewPCG(7, uint64(got.Size())))
	a, b := make([]byte, 300<<10), make([]byte, 300<<10)
	for range 200 {
		n, off := rnd.IntN(len(a)), rnd.Int64N(got.Size())
		na, ea := got.ReadAt(a[:n], off)
		nb, eb := want.ReadAt(b[:n], off)
		if na != nb || (ea == io.EOF) != (eb == io.EOF) || ea != nil && ea != io.EOF || !bytes.Equal(a[:na], b[:nb]) {
			t.Fatalf("%s: %d bytes at %d: got %d (%v), want %d (%v)", name, n, off, na, ea, nb, eb)
		}
	}
}

// pieces is a device made of what Map says.
func pieces(t *testing.T, v Volume, images ...string) guest.Device {
	t.Helper()
	ps, err := v.Map(0, v.Device.Size())
	if err != nil {
		t.Fatal(err)
	}
	var parts []place
	for _, p := range ps {
		parts = append(parts, place{whole{guesttest.OpenDevice(t, images[p.Disk]), p.Disk}, p.Off, p.Len})
	}
	dev, err := concat(parts)
	if err != nil {
		t.Fatal(err)
	}
	return dev
}
