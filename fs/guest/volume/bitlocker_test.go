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

const bdeSize = 8 << 20 // bytes

const halfHeader = -1 // encrypted up to the middle of the header's new place

// bdeKinds are volumes of all the ways of encryption, and the older and newer layouts.
var bdeKinds = []struct {
	name string
	guesttest.BitLocker
}{
	{"AES 128 with Diffuser", guesttest.BitLocker{Method: 0x8000, Sector: 512, Header: 8192}},
	{"AES 256 with Diffuser", guesttest.BitLocker{Method: 0x8001, Sector: 512, Header: 8192}},
	{"AES 128", guesttest.BitLocker{Method: 0x8002, Sector: 512, Header: 8192}},
	{"AES 256", guesttest.BitLocker{Method: 0x8003, Sector: 512, Header: 8192}},
	{"XTS-AES 128", guesttest.BitLocker{Method: 0x8004, Sector: 512, Header: 8192}},
	{"XTS-AES 256", guesttest.BitLocker{Method: 0x8005, Sector: 512, Header: 8192}},
	{"AES 256", guesttest.BitLocker{Method: 0x8003, Sector: 4096, Header: 8192}},
	{"XTS-AES 128", guesttest.BitLocker{Method: 0x8004, Sector: 4096, Header: 8192}},
	{"XTS-AES 256", guesttest.BitLocker{Method: 0x8005, Sector: 512, Header: 80 << 10, ToGo: true}},
	{"AES 128 with Diffuser", guesttest.BitLocker{Method: 0x8000, Sector: 512}},                               // Vista
	{"AES 256", guesttest.BitLocker{Method: 0x8003, Sector: 512}},                                             // Vista
	{"XTS-AES 128", guesttest.BitLocker{Method: 0x8004, Sector: 512, Header: 8192, Encrypted: bdeSize - 512}}, // the end is not
	{"XTS-AES 128", guesttest.BitLocker{Method: 0x8004, Sector: 512, Header: 8192, Encrypted: 5<<20 + 512}},   // a part
	{"AES 128", guesttest.BitLocker{Method: 0x8002, Sector: 512, Header: 8192, Encrypted: 64 << 10}},          // not the header's new place
	{"XTS-AES 128", guesttest.BitLocker{Method: 0x8004, Sector: 512, Header: 8192, Encrypted: halfHeader}},
	{"AES 128 with Diffuser", guesttest.BitLocker{Method: 0x8000, Sector: 512, Header: 24 << 10, Encrypted: 2 << 20, ToGo: true}}, // the header first
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
func bdeOracles(t *testing.T, dir string, kind *guesttest.BitLocker, v *guesttest.BitLockerVolume) {
	t.Helper()
	image, bek, out := filepath.Join(dir, "image"), filepath.Join(dir, "key.BEK"), filepath.Join(dir, "out")
	if err := errors.Join(os.WriteFile(image, v.Image, 0o600), os.WriteFile(bek, v.BEK, 0o600)); err != nil {
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
	plain := v.Plain
	if kind.Header == 0 {
		// The cluster of the MFT's mirror, which Vista keeps in the metadata, is not put back by dislocker 0.7.2.
		plain = slices.Concat(plain[:56], v.Image[56:64], plain[64:])
	}
	same("dislocker", kind.Encrypted, plain) // it ends where encryption does
	if kind.Header == 0 || kind.Method == 0x8005 {
		return // libbde 20190102 opens neither
	}
	if !byLibbde(t, image, out, "read_startup_key", bek) {
		return
	}
	same("libbde", int64(len(v.Plain))-512, v.Plain) // NTFS has a sector less
}

// TestBitLocker: what dislocker and libbde decrypt is what we do.
func TestBitLocker(t *testing.T) {
	guesttest.NeedsPrograms(t, "mkntfs", "ntfscp", "dislocker-file")
	dir := t.TempDir()
	fs, gap := map[int][]byte{}, map[int]int{}
	for _, sector := range []int{512, 4096} {
		fs[sector], gap[sector] = guesttest.BitLockerNTFS(t, bdeSize, sector)
	}
	for i, kind := range bdeKinds {
		if testing.Short() && i%6 != 0 {
			continue
		}
		t.Run(fmt.Sprintf("%d %s", i, kind.name), func(t *testing.T) {
			kind.Protectors = []string{"tpm", "external"}
			if kind.Encrypted == halfHeader {
				v := kind.Make(fs[kind.Sector], gap[kind.Sector], 0)
				kind.Encrypted = int64(binary.LittleEndian.Uint64(v.Image[v.Metadata[0]+56:])) + 4096
			}
			v := kind.Make(fs[kind.Sector], gap[kind.Sector], uint64(i))
			bdeOracles(t, dir, &kind.BitLocker, v)
			got, warnings := openMemory(t, v.Image, withKeys("no", string(v.BEK)))
			if part := kind.Encrypted != 0 && kind.Encrypted < 6<<20; part != (len(warnings) == 1) || len(warnings) > 1 {
				t.Error(warnings)
			}
			if !strings.HasPrefix(got.Encryption, "BitLocker "+kind.name+" (TPM and PIN, external key ") || got.Signature != "ntfs" {
				t.Errorf("%+v", got)
			}
			sameReads(t, got.Device, v.Plain)
			if v.Image[11], v.Image[12] = 0, 0; kind.Header != 0 { // as in front of exFAT
				if got, _ := openMemory(t, v.Image, withKeys(string(v.BEK))); got.Device == nil || !bytes.Equal(readAll(t, got.Device), v.Plain) {
					t.Errorf("without a sector size: %+v", got)
				}
			}
		})
	}
}

// TestBitLockerKeys: cryptsetup opens with the same keys.
func TestBitLockerKeys(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: not making keys of passwords, which takes a while each")
	}
	guesttest.NeedsPrograms(t, "mkntfs", "ntfscp", "cryptsetup")
	fs, gap := guesttest.BitLockerNTFS(t, bdeSize, 512)
	m := guesttest.BitLocker{Method: 0x8004, Sector: 512, Header: 8192, ASCII: true, Protectors: []string{"tpm", "password", "recovery", "external"}}
	v := m.Make(fs, gap, 77)
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, v.Image, 0o600); err != nil {
		t.Fatal(err)
	}
	dump := guesttest.Run(t, "cryptsetup", "bitlkDump", image)
	h, _ := openMemory(t, v.Image, Options{})
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
	Scan([]Disk{{"d", memory(v.Image)}}, Options{Unlock: func(l Locked) [][]byte { asked = l; return nil }})
	if asked != (Locked{"d", "BitLocker", h.UUID, "VM C:"}) {
		t.Errorf("%+v", asked)
	}
	for name, key := range map[string]string{"password": v.Password, "recovery": v.Recovery, "external": string(v.BEK)} {
		file := filepath.Join(t.TempDir(), "key")
		if err := os.WriteFile(file, []byte(key), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("cryptsetup", "open", "--type", "bitlk", "--test-passphrase", "--key-file", file, image).CombinedOutput(); err != nil {
			t.Errorf("cryptsetup by %s: %v %s", name, err, out)
		}
		got, warnings := openMemory(t, v.Image, withKeys(key))
		if got.Err != nil || len(warnings) > 0 {
			t.Errorf("%s: %+v %v", name, got, warnings)
			continue
		}
		sameReads(t, got.Device, v.Plain)
	}
	for _, wrong := range []string{v.Password + "\n", v.Password[1:], v.Recovery[:48] + "7", strings.Repeat("0", 55), string(v.BEK[:100]), ""} {
		if got, _ := openMemory(t, v.Image, withKeys(wrong)); !errors.Is(got.Err, ErrLocked) {
			t.Errorf("%q: %+v", wrong, got)
		}
	}
	if got, _ := openMemory(t, v.Image, withKeys("x", " "+strings.ReplaceAll(v.Recovery, "-", " ")+"\n")); got.Err != nil {
		t.Errorf("%+v", got)
	}
	// Of a password in UTF-16, libbde is the judge.
	m.ASCII, m.Protectors = false, []string{"password"}
	v = m.Make(fs, gap, 78)
	out := filepath.Join(t.TempDir(), "out")
	if err := os.WriteFile(image, v.Image, 0o600); err != nil {
		t.Fatal(err)
	}
	if !byLibbde(t, image, out, "set_password", v.Password) {
		return
	}
	if b, err := os.ReadFile(out); err != nil || !bytes.Equal(b, v.Plain) {
		t.Error("libbde does not find what was hidden", err)
	}
	if got, _ := openMemory(t, v.Image, withKeys(v.Password)); got.Err != nil {
		t.Errorf("%+v", got)
	}
}

// TestBitLockerClear: with protection suspended no key is needed. The copies of the metadata stand in for each other.
func TestBitLockerClear(t *testing.T) {
	guesttest.NeedsPrograms(t, "mkntfs", "ntfscp", "dislocker-file")
	fs, gap := guesttest.BitLockerNTFS(t, bdeSize, 512)
	m := guesttest.BitLocker{Method: 0x8005, Sector: 512, Header: 8192, Protectors: []string{"tpm", "clear"}}
	v := m.Make(fs, gap, 5)
	dir := t.TempDir()
	image, out := filepath.Join(dir, "image"), filepath.Join(dir, "out")
	if err := os.WriteFile(image, v.Image, 0o600); err != nil {
		t.Fatal(err)
	}
	guesttest.Run(t, "dislocker-file", "-r", "-V", image, "-c", "--", out)
	if theirs, err := os.ReadFile(out); err != nil || !bytes.Equal(theirs, v.Plain) {
		t.Error("dislocker does not find what was hidden", err)
	}
	opened := func(want error, warned int) {
		t.Helper()
		got, warnings := openMemory(t, v.Image, Options{})
		switch {
		case !errors.Is(got.Err, want) || len(warnings) != warned:
			t.Errorf("%+v %v", got, warnings)
		case want == nil && !bytes.Equal(readAll(t, got.Device), v.Plain):
			t.Error("differs")
		}
	}
	opened(nil, 0)
	good := bytes.Clone(v.Image)
	at := v.Metadata
	size := 16 * int(binary.LittleEndian.Uint16(v.Image[at[0]+8:]))
	v.Image[at[0]+200] ^= 1 // the checksum finds it
	opened(nil, 1)
	v.Image[at[1]+3] ^= 1
	opened(nil, 1)
	v.Image[at[2]+size+4] ^= 1
	opened(guest.ErrDamaged, 0)
	// With the checksum right, the hash that is sealed finds it.
	bad := func(i int) {
		b := v.Image[at[i]:]
		b[112+10] ^= 1 // the label
		binary.LittleEndian.PutUint32(b[size+4:], crc32.ChecksumIEEE(b[:size]))
	}
	copy(v.Image, good)
	bad(0)
	opened(nil, 0)
	bad(1)
	bad(2)
	opened(guest.ErrDamaged, 0)
	// States that we cannot be sure of.
	for _, p := range []struct{ at, n int }{{24, 4}, {16, 8}, {100, 2}} {
		copy(v.Image, good)
		for i := range at {
			b := v.Image[at[i]:]
			copy(b[p.at:p.at+p.n], make([]byte, 8))
			if p.at == 24 {
				b[p.at] = 1
			}
			binary.LittleEndian.PutUint32(b[size+4:], crc32.ChecksumIEEE(b[:size]))
		}
		opened(guest.ErrUnsupported, 0)
	}
	// A copy somewhere else is not taken.
	copy(v.Image, good)
	copy(v.Image[at[0]+80<<10:], good[at[0]:at[0]+2048])
	binary.LittleEndian.PutUint64(v.Image[176:], uint64(at[0]+80<<10))
	if got, warnings := openMemory(t, v.Image, Options{}); got.Err != nil || len(warnings) != 1 {
		t.Errorf("%+v %v", got, warnings)
	}
	// Copies that do not agree.
	copy(v.Image, good)
	b := v.Image[at[1]:]
	b[17] ^= 2 // the size of what is encrypted
	binary.LittleEndian.PutUint32(b[size+4:], crc32.ChecksumIEEE(b[:size]))
	opened(guest.ErrUnsupported, 0)
	copy(v.Image, good)
	copy(v.Image[160:], bitLockerConvertGUID)
	opened(guest.ErrUnsupported, 0)
}

// TestUnseal: no bit of a sealed key can be changed.
func TestUnseal(t *testing.T) {
	m := guesttest.BitLocker{Method: 0x8004, Sector: 512, Header: 8192, Protectors: []string{"clear"}}
	all, bad, err := readBitLocker(memory(m.Make(make([]byte, 2<<20), 1<<20, 1).Image))
	if err != nil || bad != nil {
		t.Fatal(err, bad)
	}
	p := all[0].protectors[0]
	if key, err := unsealKey(p.clear, p.master); err != nil || len(key) != 32 {
		t.Fatal(key, err)
	}
	for i := range 8 * len(p.master) {
		b := bytes.Clone(p.master)
		b[i/8] ^= 1 << (i % 8)
		if _, err := unseal(p.clear, b); !errors.Is(err, guest.ErrDamaged) {
			t.Errorf("bit %d: %v", i, err)
		}
	}
}

func readAll(t testing.TB, dev guest.Device) []byte {
	t.Helper()
	b := make([]byte, dev.Size())
	if err := guest.ReadFull(dev, b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// TestBitLockerInGuest: dm-crypt, as cryptsetup sets it up, reads the same.
func TestBitLockerInGuest(t *testing.T) {
	if os.Getenv("HOLDFAST_TEST_ALL") == "" {
		t.Skip("boots a guest, which takes a minute; HOLDFAST_TEST_ALL asks for it")
	}
	image := guesttest.Sparse(t, 200<<20)
	script, n, want := "echo start >&2\n", 0, map[string]string{}
	lines := "label: gpt\n"
	type part struct {
		off int64
		bek []byte
	}
	var parts []part
	for i, kind := range bdeKinds {
		if kind.Header == 0 || kind.Encrypted != 0 {
			continue // it knows neither Vista nor volumes of which a part is encrypted
		}
		fs, gap := guesttest.BitLockerNTFS(t, bdeSize, kind.Sector)
		kind.Protectors = []string{"tpm", "external"}
		v := kind.Make(fs, gap, uint64(100+i))
		n++
		at := int64(n) * 10 << 20
		lines += fmt.Sprintf("start=%dMiB, size=%dMiB\n", at>>20, bdeSize>>20)
		parts = append(parts, part{at, v.BEK})
		writeAt(t, image, at, v.Image)
		name := fmt.Sprintf("disk0/p%d", n)
		want[name] = kind.name
		script += fmt.Sprintf("dd if=/dev/vda bs=1M skip=%d count=1 2>/dev/null | head -c %d > /tmp/k\ncryptsetup open --type bitlk --readonly --key-file /tmp/k /dev/vda%d c >&2\n"+
			"sum %s /dev/mapper/c\ncryptsetup close c\n", at>>20+9, len(v.BEK), n, name)
	}
	sfdisk(t, image, lines)
	for _, p := range parts {
		writeAt(t, image, p.off+9<<20, p.bek) // between the partitions
	}
	var keys []string
	for _, p := range parts {
		keys = append(keys, string(p.bek))
	}
	got, warnings := scanImages(t, withKeys(keys...), image)
	if len(warnings) > 0 {
		t.Error(warnings)
	}
	sums, _ := guesttest.Sums(t, []string{image}, script)
	for name, sum := range sums {
		sameSum(t, got, name, sum)
		delete(want, name)
	}
	if len(want) > 0 {
		t.Error("not opened: ", want)
	}
}

func writeAt(t *testing.T, image string, at int64, b []byte) {
	t.Helper()
	f, err := os.OpenFile(image, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
}
