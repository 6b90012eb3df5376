package volume

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// bdeNTFS makes an NTFS file system with some noise in it, and says where it has 1 MiB for BitLocker's metadata.
func bdeNTFS(t testing.TB, size, sector int) (image []byte, gap int) {
	t.Helper()
	dir := t.TempDir()
	fs, files := filepath.Join(dir, "fs"), []string{filepath.Join(dir, "gap"), filepath.Join(dir, "noise")}
	rnd := rand.New(rand.NewPCG(1, 2))
	noise := make([]byte, 1<<20+8192)
	for i := range noise {
		noise[i] = byte(rnd.Uint32())
	}
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	if err := errors.Join(os.WriteFile(fs, nil, 0o600), os.Truncate(fs, int64(size))); err != nil {
		t.Fatal(err)
	}
	run("mkntfs", "-q", "-F", "-Q", "-s", fmt.Sprint(sector), "-p", "0", "-H", "0", "-S", "0", fs)
	for i, file := range files {
		if err := os.WriteFile(file, noise, 0o600); err != nil {
			t.Fatal(err)
		}
		run("ntfscp", fs, file, filepath.Base(file))
		noise[0] += byte(i + 1)
	}
	image, err := os.ReadFile(fs)
	if err != nil {
		t.Fatal(err)
	}
	noise[0] -= 3
	if gap = bytes.Index(image, noise[:4096]); gap < 0 || !bytes.Equal(image[gap:gap+len(noise)], noise) {
		t.Fatal("the file is not in one piece")
	}
	return image, gap
}

// bdeKinds are volumes of all the ways of encryption, and the older and newer layouts.
var bdeKinds = []struct {
	name string
	bdeMaker
}{
	{"AES 128 with Diffuser", bdeMaker{method: 0x8000, sector: 512, header: 8192}},
	{"AES 256 with Diffuser", bdeMaker{method: 0x8001, sector: 512, header: 8192}},
	{"AES 128", bdeMaker{method: 0x8002, sector: 512, header: 8192}},
	{"AES 256", bdeMaker{method: 0x8003, sector: 512, header: 8192}},
	{"XTS-AES 128", bdeMaker{method: 0x8004, sector: 512, header: 8192}},
	{"XTS-AES 256", bdeMaker{method: 0x8005, sector: 512, header: 8192}},
	{"AES 256", bdeMaker{method: 0x8003, sector: 4096, header: 8192}},
	{"XTS-AES 128", bdeMaker{method: 0x8004, sector: 4096, header: 8192}},
	{"XTS-AES 256", bdeMaker{method: 0x8005, sector: 512, header: 80 << 10, toGo: true}},
	{"AES 128 with Diffuser", bdeMaker{method: 0x8000, sector: 512}},                                                   // Vista
	{"AES 256", bdeMaker{method: 0x8003, sector: 512}},                                                                 // Vista
	{"XTS-AES 128", bdeMaker{method: 0x8004, sector: 512, header: 8192, encrypted: 9<<20 + 512}},                       // a part
	{"AES 128", bdeMaker{method: 0x8002, sector: 512, header: 8192, encrypted: 64 << 10}},                              // not the header's new place
	{"AES 128 with Diffuser", bdeMaker{method: 0x8000, sector: 512, header: 24 << 10, encrypted: 2 << 20, toGo: true}}, // the header first
}

func bdeKeep(names ...string) func(string) bool {
	return func(name string) bool { return slices.Contains(names, name) }
}

func withKeys(keys ...string) Options {
	return Options{Unlock: func(Locked) [][]byte {
		var b [][]byte
		for _, k := range keys {
			b = append(b, []byte(k))
		}
		return b
	}}
}

// openMemory scans one disk in memory.
func openMemory(t testing.TB, image []byte, opt Options) (Volume, []string) {
	t.Helper()
	volumes, warnings := Scan([]Disk{{"disk0", memory(image)}}, opt)
	if len(volumes) != 1 {
		t.Fatalf("%+v", volumes)
	}
	return volumes[0], warnings
}

// sameReads compares a volume with what it should be, in reads of any size, several at once.
func sameReads(t *testing.T, dev guest.Device, want []byte) {
	t.Helper()
	if dev == nil || dev.Size() != int64(len(want)) {
		t.Fatalf("%v", dev)
	}
	b := make([]byte, len(want))
	if err := guest.ReadFull(dev, b, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b, want) {
		for i := range b {
			if b[i] != want[i] {
				t.Fatalf("differs from byte %#x on", i)
			}
		}
	}
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(4, uint64(g)))
			for range 100 {
				n := rnd.IntN(1 << rnd.IntN(18))
				at := rnd.IntN(len(want) - n)
				b := make([]byte, n)
				if err := guest.ReadFull(dev, b, int64(at)); err != nil || !bytes.Equal(b, want[at:at+n]) {
					t.Errorf("%d bytes at %d differ (%v)", n, at, err)
				}
			}
		})
	}
	wg.Wait()
}

// libbde decrypts a volume: image, out, and how a key is given.
const libbde = `
import pybde, sys
v = pybde.volume()
getattr(v, sys.argv[3])(sys.argv[4])
v.open(sys.argv[1])
with open(sys.argv[2], "wb") as out:
    at = 0
    while at < v.get_size():
        b = v.read_buffer_at_offset(1 << 20, at)
        at += len(b)
        out.write(b)
`

// byLibbde decrypts a volume, if libbde is there.
func byLibbde(t *testing.T, args ...string) bool {
	t.Helper()
	if err := exec.Command("/usr/bin/python3", "-c", "import pybde").Run(); err != nil {
		if os.Getenv("HOLDFAST_TEST_ALL") != "" {
			t.Fatal("needs python3-libbde")
		}
		return false
	}
	guesttest.Run(t, append([]string{"/usr/bin/python3", "-c", libbde}, args...)...)
	return true
}

// bdeOracles decrypts by dislocker and by libbde, as far as they can.
func bdeOracles(t *testing.T, dir string, kind *bdeMaker, v *bdeMade) {
	t.Helper()
	image, bek, out := filepath.Join(dir, "image"), filepath.Join(dir, "key.BEK"), filepath.Join(dir, "out")
	if err := errors.Join(os.WriteFile(image, v.image, 0o600), os.WriteFile(bek, v.bek, 0o600)); err != nil {
		t.Fatal(err)
	}
	same := func(who string, least int64, want []byte) {
		t.Helper()
		b, err := os.ReadFile(out)
		if least == 0 {
			least = int64(len(want))
		}
		if err != nil || int64(len(b)) < least || !bytes.Equal(b, want[:len(b)]) {
			t.Errorf("%s does not find what was hidden (%v)", who, err)
		}
		os.Remove(out)
	}
	guesttest.Run(t, "dislocker-file", "-r", "-V", image, "-f", bek, "--", out)
	plain := v.plain
	if kind.header == 0 {
		// The cluster of the MFT's mirror, which Vista keeps in the metadata, is not put back by dislocker 0.7.2.
		plain = slices.Concat(plain[:56], v.image[56:64], plain[64:])
	}
	same("dislocker", kind.encrypted, plain) // it ends where encryption does
	if kind.header == 0 || kind.method == 0x8005 {
		return // libbde 20190102 opens neither
	}
	if !byLibbde(t, image, out, "read_startup_key", bek) {
		return
	}
	same("libbde", int64(len(v.plain))-512, v.plain) // NTFS has a sector less
}

// TestBitLocker: what dislocker and libbde decrypt is what we do.
func TestBitLocker(t *testing.T) {
	guesttest.NeedsPrograms(t, "mkntfs", "ntfscp", "dislocker-file")
	dir := t.TempDir()
	fs, gap := map[int][]byte{}, map[int]int{}
	for _, sector := range []int{512, 4096} {
		fs[sector], gap[sector] = bdeNTFS(t, 12<<20, sector)
	}
	for i, kind := range bdeKinds {
		t.Run(fmt.Sprintf("%d %s", i, kind.name), func(t *testing.T) {
			kind.only = bdeKeep("external", "tpm")
			v := kind.make(fs[kind.sector], gap[kind.sector], uint64(i))
			bdeOracles(t, dir, &kind.bdeMaker, v)
			got, warnings := openMemory(t, v.image, withKeys("no", string(v.bek)))
			if part := kind.encrypted != 0; part != (len(warnings) == 1) || len(warnings) > 1 {
				t.Error(warnings)
			}
			if !strings.HasPrefix(got.Encryption, "BitLocker "+kind.name+" (TPM and PIN, external key ") || got.Signature != "ntfs" {
				t.Errorf("%+v", got)
			}
			sameReads(t, got.Device, v.plain)
		})
	}
}

// TestBitLockerKeys: cryptsetup opens with the same keys.
func TestBitLockerKeys(t *testing.T) {
	guesttest.NeedsPrograms(t, "mkntfs", "ntfscp", "cryptsetup")
	fs, gap := bdeNTFS(t, 12<<20, 512)
	m := bdeMaker{method: 0x8004, sector: 512, header: 8192, ascii: true}
	v := m.make(fs, gap, 77)
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, v.image, 0o600); err != nil {
		t.Fatal(err)
	}
	dump := guesttest.Run(t, "cryptsetup", "bitlkDump", image)
	h, _ := openMemory(t, v.image, Options{})
	if !errors.Is(h.Err, ErrLocked) || h.Device != nil || h.Signature != "BitLocker" || !strings.Contains(dump, h.UUID) {
		t.Errorf("%+v\n%s", h, dump)
	}
	for _, want := range []string{"BitLocker XTS-AES 128 (TPM and PIN, password, recovery password ", ", external key "} {
		if !strings.Contains(h.Encryption, want) {
			t.Errorf("%q", h.Encryption)
		}
	}
	_, id, _ := strings.Cut(h.Encryption, "recovery password ")
	if id, _, _ = strings.Cut(id, ","); !strings.Contains(dump, strings.ToLower(id)) {
		t.Errorf("%s is not in\n%s", id, dump)
	}
	asked := Locked{}
	Scan([]Disk{{"d", memory(v.image)}}, Options{Unlock: func(l Locked) [][]byte { asked = l; return nil }})
	if asked != (Locked{"d", "BitLocker", h.UUID, "VM C:"}) {
		t.Errorf("%+v", asked)
	}
	for name, key := range map[string]string{"password": v.password, "recovery": v.recovery, "external": string(v.bek)} {
		file := filepath.Join(t.TempDir(), "key")
		if err := os.WriteFile(file, []byte(key), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("cryptsetup", "open", "--type", "bitlk", "--test-passphrase", "--key-file", file, image).CombinedOutput(); err != nil {
			t.Errorf("cryptsetup by %s: %v %s", name, err, out)
		}
		got, warnings := openMemory(t, v.image, withKeys(key))
		if got.Err != nil || len(warnings) > 0 {
			t.Errorf("%s: %+v %v", name, got, warnings)
			continue
		}
		sameReads(t, got.Device, v.plain)
	}
	for _, wrong := range []string{v.password + "\n", v.password[1:], v.recovery[:48] + "7", strings.Repeat("0", 55), string(v.bek[:100]), ""} {
		if got, _ := openMemory(t, v.image, withKeys(wrong)); !errors.Is(got.Err, ErrLocked) {
			t.Errorf("%q: %+v", wrong, got)
		}
	}
	if got, _ := openMemory(t, v.image, withKeys("x", " "+strings.ReplaceAll(v.recovery, "-", " ")+"\n")); got.Err != nil {
		t.Errorf("%+v", got)
	}
	// Of a password in UTF-16, libbde is the judge.
	m.ascii, m.only = false, bdeKeep("password")
	v = m.make(fs, gap, 78)
	out := filepath.Join(t.TempDir(), "out")
	if err := os.WriteFile(image, v.image, 0o600); err != nil {
		t.Fatal(err)
	}
	if !byLibbde(t, image, out, "set_password", v.password) {
		return
	}
	if b, err := os.ReadFile(out); err != nil || !bytes.Equal(b, v.plain) {
		t.Error("libbde does not find what was hidden", err)
	}
	if got, _ := openMemory(t, v.image, withKeys(v.password)); got.Err != nil {
		t.Errorf("%+v", got)
	}
}

// TestBitLockerClear: with protection suspended no key is needed. The copies of the metadata stand in for each other.
func TestBitLockerClear(t *testing.T) {
	guesttest.NeedsPrograms(t, "mkntfs", "ntfscp", "dislocker-file")
	fs, gap := bdeNTFS(t, 12<<20, 512)
	m := bdeMaker{method: 0x8005, sector: 512, header: 8192, clear: true, only: bdeKeep("clear", "tpm")}
	v := m.make(fs, gap, 5)
	dir := t.TempDir()
	image, out := filepath.Join(dir, "image"), filepath.Join(dir, "out")
	if err := os.WriteFile(image, v.image, 0o600); err != nil {
		t.Fatal(err)
	}
	guesttest.Run(t, "dislocker-file", "-r", "-V", image, "-c", "--", out)
	if theirs, err := os.ReadFile(out); err != nil || !bytes.Equal(theirs, v.plain) {
		t.Error("dislocker does not find what was hidden", err)
	}
	opened := func(want error, warned int) {
		t.Helper()
		got, warnings := openMemory(t, v.image, Options{})
		switch {
		case !errors.Is(got.Err, want) || len(warnings) != warned:
			t.Errorf("%+v %v", got, warnings)
		case want == nil && !bytes.Equal(readAll(t, got.Device), v.plain):
			t.Error("differs")
		}
	}
	opened(nil, 0)
	good := bytes.Clone(v.image)
	at := v.metadata
	size := 16 * int(binary.LittleEndian.Uint16(v.image[at[0]+8:]))
	v.image[at[0]+200] ^= 1 // the checksum finds it
	opened(nil, 1)
	v.image[at[1]+3] ^= 1
	opened(nil, 1)
	v.image[at[2]+size+4] ^= 1
	opened(guest.ErrDamaged, 0)
	// With the checksum right, the hash that is sealed finds it.
	bad := func(i int) {
		b := v.image[at[i]:]
		b[112+10] ^= 1 // the label
		binary.LittleEndian.PutUint32(b[size+4:], crc32.ChecksumIEEE(b[:size]))
	}
	copy(v.image, good)
	bad(0)
	opened(nil, 0)
	bad(1)
	bad(2)
	opened(guest.ErrDamaged, 0)
	// States that we cannot be sure of.
	for _, p := range []struct{ at, n int }{{24, 4}, {16, 8}, {100, 2}} {
		copy(v.image, good)
		for i := range at {
			b := v.image[at[i]:]
			copy(b[p.at:p.at+p.n], make([]byte, 8))
			if p.at == 24 {
				b[p.at] = 1
			}
			binary.LittleEndian.PutUint32(b[size+4:], crc32.ChecksumIEEE(b[:size]))
		}
		opened(guest.ErrUnsupported, 0)
	}
	copy(v.image, good)
	copy(v.image[160:], bitLockerUsedGUID)
	opened(guest.ErrUnsupported, 0)
}

func readAll(t testing.TB, dev guest.Device) []byte {
	t.Helper()
	b := make([]byte, dev.Size())
	if err := guest.ReadFull(dev, b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}
