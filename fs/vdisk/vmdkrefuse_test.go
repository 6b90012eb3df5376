package vdisk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// openText opens a descriptor; every extent is b.
func openText(text, b []byte) (*VMDKImage, error) {
	return OpenVMDK(bytes.NewReader(text), int64(len(text)), VMDKOptions{
		Extent: func(string) (io.ReaderAt, int64, error) { return bytes.NewReader(b), int64(len(b)), nil },
	})
}

func TestVMDKDescriptorChecks(t *testing.T) {
	flat := make([]byte, 100*512)
	for _, c := range []struct {
		createType, extent string
		want               error
		text               string
	}{
		{"monolithicFlat", `RW 100 FLAT "x" 0`, nil, ""},
		{"MONOLITHICFLAT", `  rw   100	flat "x y" 0  `, nil, ""},
		{"2GbMaxExtentFlat", `RW 99 FLAT "x" 1`, nil, ""},
		{"vmfs", `RW 100 VMFS "x"`, nil, ""},
		{"vmfs", `RW 100 VMFS "x" 0 partitionUUID abc`, nil, ""},
		{"custom", `RW 100 FLAT "x" 0`, ErrUnsupported, `createType "custom"`},
		{"fullDevice", `RW 100 FLAT "/dev/sda" 0`, ErrUnsupported, "physical disk"},
		{"partitionedDevice", `RW 100 FLAT "/dev/sda" 0`, ErrUnsupported, "physical disk"},
		{"vmfsRaw", `RW 100 VMFSRAW "x"`, ErrUnsupported, "physical disk"},
		{"vmfsRawDeviceMap", `RW 100 VMFSRDM "x"`, ErrUnsupported, "physical disk"},
		{"vmfsPassthroughRawDeviceMap", `RW 100 VMFSRDM "x"`, ErrUnsupported, "physical disk"},
		{"vmfs", `RW 100 VMFSRDM "x"`, ErrUnsupported, "VMFSRDM"},
		{"", `RW 100 FLAT "x" 0`, ErrCorrupt, "createType"},
		{"monolithicFlat", ``, ErrCorrupt, "no extents"},
		{"monolithicFlat", `NOACCESS 100 FLAT "x" 0`, ErrUnsupported, "without access"},
		{"monolithicFlat", `RW 101 FLAT "x" 0`, ErrCorrupt, "do not fit"},
		{"monolithicFlat", `RW 100 FLAT "x" 1`, ErrCorrupt, "do not fit"},
		{"monolithicFlat", `RW 17592186044416 FLAT "x" 17592186044416`, ErrCorrupt, "do not fit"},
		{"monolithicFlat", `RW -1 FLAT "x" 0`, ErrCorrupt, "out of range"},
		{"monolithicFlat", `RW 99999999999999999999 FLAT "x" 0`, ErrCorrupt, "out of range"},
		{"monolithicFlat", "RW 17592186044416 ZERO\nRW 17592186044416 ZERO", ErrCorrupt, "sectors and more"},
		{"monolithicFlat", `RW 100 FLAT "x" -1`, ErrCorrupt, "out of range"},
		{"monolithicFlat", `RW 100 FLAT x 0`, ErrCorrupt, "not understood"},
		{"monolithicFlat", `RW 100 FLAT "x`, ErrCorrupt, "not understood"},
		{"monolithicFlat", `RW 100 FLAT "" 0`, ErrCorrupt, "not understood"},
		{"monolithicFlat", `RW`, ErrCorrupt, "invalid syntax"},
		{"monolithicSparse", `RW 100 SPARSE "x"`, ErrCorrupt, "not a sparse extent"},
		{"vmfsSparse", `RW 100 VMFSSPARSE "x"`, ErrCorrupt, "not an extent"},
		{"seSparse", `RW 100 SESPARSE "x"`, ErrCorrupt, "not a seSparse"},
		{"monolithicFlat", strings.Repeat("RW 1 ZERO\n", 4097), ErrUnsupported, "more than 4096 extents"},
	} {
		img, err := openText(deltaText(c.createType, "1", "ffffffff", "", c.extent), flat)
		if !errors.Is(err, c.want) || err != nil && !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s, %s: %v", c.createType, c.extent, err)
		}
		if err == nil && img.Size() > 100*512 {
			t.Errorf("%s: %d bytes", c.extent, img.Size())
		}
	}
	whole := string(deltaText("monolithicFlat", "1", "ffffffff", "", `RW 100 FLAT "x" 0`))
	for _, c := range []struct {
		was, is string
		want    error
	}{
		{"version=1", "version=3", nil},
		{"version=1", "version = \"2\"", nil},
		{"version=1", "version=4", ErrUnsupported},
		{"CID=1\n", "", ErrCorrupt},
		{"CID=1\n", "CID=123456789\n", ErrCorrupt},
		{"CID=1\n", "CID=xyz\n", ErrCorrupt},
		{"\n", "\r\n", nil},
		{"parentCID=ffffffff", "parentCID=2", ErrCorrupt},
		{"parentCID=ffffffff", "parentCID=0", nil},
		{"parentCID=ffffffff", "parentCID=2\nparentFileNameHint=\"x\"", ErrRefused},
		{"# Disk DescriptorFile", "\n  # Disk DescriptorFile", nil},
		{"# Disk DescriptorFile", "# A disk", ErrCorrupt},
	} {
		if _, err := openText([]byte(strings.ReplaceAll(whole, c.was, c.is)), flat); !errors.Is(err, c.want) {
			t.Errorf("%q for %q: %v", c.is, c.was, err)
		}
	}
	if _, err := openText(deltaText("twoGbMaxExtentSparse", "1", "0", "", `RW 100 SPARSE "x"`), flat); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "parentCID") {
		t.Errorf("parent 0 of a sparse disk: %v", err)
	}
	if _, err := OpenVMDK(strings.NewReader(whole), int64(len(whole)), VMDKOptions{}); !errors.Is(err, ErrRefused) {
		t.Errorf("no way to open extents: %v", err)
	}
}

// One change after the other to the header of a sound file.
func TestVMDKHeaderChecks(t *testing.T) {
	d := smallESX(60, 8)
	hosted, cowd, se := writeHosted(d, nil), writeCOWD(smallESX(60, 8)), writeSESparse(d)
	le := binary.LittleEndian
	u32 := func(at int, v uint32) func(b []byte) []byte {
		return func(b []byte) []byte { le.PutUint32(b[at:], v); return b }
	}
	u64 := func(at int, v uint64) func(b []byte) []byte {
		return func(b []byte) []byte { le.PutUint64(b[at:], v); return b }
	}
	gte := func(entry uint64) func(b []byte) []byte { return u64(6144*512, entry) } // of seSparse
	table := func(v uint32) func(b []byte) []byte {                                 // entry 0 of both grain tables
		return func(b []byte) []byte {
			for _, at := range []int{48, 56} {
				dir := le.Uint64(b[at:]) * 512
				le.PutUint32(b[uint64(le.Uint32(b[dir:]))*512:], v)
			}
			return b
		}
	}
	for _, c := range []struct {
		kind   string
		file   []byte
		change func(b []byte) []byte
		want   error
	}{
		{"SPARSE", hosted, u32(4, 2), nil},
		{"SPARSE", hosted, u32(4, 3), nil},
		{"SPARSE", hosted, u32(4, 4), ErrUnsupported},
		{"SPARSE", hosted, u32(8, 7|1<<20), ErrUnsupported},
		{"SPARSE", hosted, u32(8, 7|1<<16), ErrCorrupt}, // packed by no method
		{"SPARSE", hosted, func(b []byte) []byte { b[77] = 1; return b }, ErrCorrupt},
		{"SPARSE", hosted, func(b []byte) []byte { b[77] = 2; return b }, ErrUnsupported},
		{"SPARSE", hosted, func(b []byte) []byte { b[75] = '\n'; return b }, ErrCorrupt},
		{"SPARSE", hosted, u64(12, 59), ErrCorrupt},
		{"SPARSE", hosted, u64(12, 1<<63), ErrCorrupt},
		{"SPARSE", hosted, u64(12, 1<<40), ErrCorrupt}, // the directory has no room
		{"SPARSE", hosted, u64(20, 0), ErrCorrupt},
		{"SPARSE", hosted, u64(20, 7), ErrCorrupt},
		{"SPARSE", hosted, u64(20, 1<<60), ErrCorrupt},
		{"SPARSE", hosted, u32(44, 0), ErrCorrupt},
		{"SPARSE", hosted, u32(44, 1<<31), ErrCorrupt},
		{"SPARSE", hosted, u64(28, 1), nil}, // an offset without a length
		{"SPARSE", hosted, func(b []byte) []byte { return u64(36, 1<<62)(u64(28, 1)(b)) }, ErrCorrupt},
		{"SPARSE", hosted, func(b []byte) []byte { return u64(48, 1<<54)(u64(56, 1<<54)(b)) }, ErrCorrupt},
		{"SPARSE", hosted, table(0x7fffffff), ErrCorrupt},
		{"SPARSE", hosted, table(0), nil},
		{"SPARSE", hosted, table(1), nil},
		{"SPARSE", hosted, func(b []byte) []byte { return table(1)(u32(8, 3)(b)) }, ErrCorrupt}, // 1 is a sector
		{"SPARSE", hosted, func(b []byte) []byte { return b[:len(b)-100] }, ErrCorrupt},
		{"SPARSE", hosted, func(b []byte) []byte { return b[:100] }, ErrCorrupt},
		{"SPARSE", hosted, func(b []byte) []byte { return nil }, ErrCorrupt},
		{"VMFSSPARSE", cowd, u32(4, 1), nil},
		{"VMFSSPARSE", cowd, u32(4, 2), ErrUnsupported},
		{"VMFSSPARSE", cowd, u32(12, 1<<31), ErrCorrupt},
		{"VMFSSPARSE", cowd, u32(16, 0), ErrCorrupt},
		{"VMFSSPARSE", cowd, u32(20, 0), ErrCorrupt},
		{"VMFSSPARSE", cowd, u32(20, 1<<31), ErrCorrupt},
		{"VMFSSPARSE", cowd, u32(24, 0), ErrCorrupt},
		{"VMFSSPARSE", cowd, u32(2048, 1<<30), ErrCorrupt},
		{"VMFSSPARSE", cowd, u32(2560, 1<<30), ErrCorrupt},
		{"VMFSSPARSE", cowd, u32(2560, 1), ErrCorrupt},
		{"VMFSSPARSE", cowd, func(b []byte) []byte { return b[:3000] }, ErrCorrupt},
		{"SESPARSE", se, u64(8, 1<<32), ErrUnsupported},
		{"SESPARSE", se, u64(24, 16), ErrUnsupported},
		{"SESPARSE", se, u64(32, 1<<50), ErrUnsupported},
		{"SESPARSE", se, u64(40, 1), ErrUnsupported},
		{"SESPARSE", se, u64(16, 59), ErrCorrupt},
		{"SESPARSE", se, u64(16, 1<<62), ErrCorrupt},
		{"SESPARSE", se, u64(16, 1<<40), ErrCorrupt},
		{"SESPARSE", se, u64(128, 1<<60), ErrCorrupt},
		{"SESPARSE", se, u64(136, 0), ErrCorrupt},
		{"SESPARSE", se, u64(144, 1<<60), ErrCorrupt},
		{"SESPARSE", se, u64(152, 0), ErrCorrupt},
		{"SESPARSE", se, u64(192, 1<<60), ErrCorrupt},
		{"SESPARSE", se, u64(80, 1<<60), ErrCorrupt},
		{"SESPARSE", se, u64(512, 7), ErrCorrupt},
		{"SESPARSE", se, u64(512+24, 1), ErrUnsupported},
		{"SESPARSE", se, gte(1 << 60), nil},
		{"SESPARSE", se, gte(2<<60 | 7), nil},
		{"SESPARSE", se, gte(4 << 60), ErrCorrupt},
		{"SESPARSE", se, gte(7), ErrCorrupt},
		{"SESPARSE", se, gte(3<<60 | 1<<40), ErrCorrupt},
		{"SESPARSE", se, gte(3<<60 | 0xffffffffffffff), ErrCorrupt},
		{"SESPARSE", se, u64(4096*512, 2<<60), ErrCorrupt},
		{"SESPARSE", se, func(b []byte) []byte { return b[:600] }, ErrCorrupt},
	} {
		img, err := openText(deltaText("vmfsSparse", "1", "ffffffff", "", fmt.Sprintf(`RW 60 %s "x"`, c.kind)), c.change(bytes.Clone(c.file)))
		if err == nil {
			if _, err = img.ReadAt(make([]byte, 60*512), 0); err == io.EOF {
				err = nil
			}
		}
		if !errors.Is(err, c.want) {
			t.Errorf("%s, change %x: %v, want %v", c.kind, c.change(bytes.Clone(c.file))[:min(88, len(c.change(bytes.Clone(c.file))))], err, c.want)
		}
	}
}

// Extents and parents are held to the same rules as backing files.
func TestVMDKPolicy(t *testing.T) {
	top := t.TempDir()
	dir := filepath.Join(top, "images")
	for _, err := range []error{
		os.MkdirAll(filepath.Join(dir, "sub"), 0o700),
		os.Symlink("../secret", filepath.Join(dir, "link")),
		unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	secret := bytes.Repeat([]byte("secret! "), 64*100)
	flatOf := func(name string) []byte {
		return deltaText("monolithicFlat", "aa", "ffffffff", "", fmt.Sprintf(`RW 100 FLAT %q 0`, name))
	}
	over := func(cid, parentCID, hint string) []byte {
		return deltaText("monolithicFlat", cid, parentCID, hint, `RW 100 FLAT "base" 0`)
	}
	writeFiles(t, top, map[string][]byte{"secret": secret, "secret.vmdk": flatOf("secret")})
	writeFiles(t, dir, map[string][]byte{
		"base": secret, "a:b": secret, "base.vmdk": flatOf("base"), "in.vmdk": flatOf(`sub\base`),
		"ring1": over("aa", "aa", "ring2"), "ring2": over("aa", "aa", "ring1"),
	})
	writeFiles(t, filepath.Join(dir, "sub"), map[string][]byte{"base": secret, "up.vmdk": flatOf("../base")})
	for _, c := range []struct {
		text   []byte
		policy Policy
		want   error
	}{
		{flatOf("base"), Policy{}, nil},
		{flatOf("a:b"), Policy{}, nil},
		{flatOf(`sub\base`), Policy{}, nil},
		{flatOf("sub/../base"), Policy{}, nil},
		{flatOf("missing"), Policy{}, os.ErrNotExist},
		{flatOf(`C:\vm\base`), Policy{}, os.ErrNotExist},
		{flatOf("../secret"), Policy{}, ErrRefused},
		{flatOf("../secret"), Policy{AllowOutside: true}, nil},
		{flatOf(top + "/secret"), Policy{}, ErrRefused},
		{flatOf(top + "/secret"), Policy{AllowOutside: true}, nil},
		{flatOf("link"), Policy{}, ErrRefused},
		{flatOf("fifo"), Policy{}, ErrRefused},
		{flatOf("/dev/zero"), Policy{AllowOutside: true, AllowDevices: true}, ErrRefused},
		{over("bb", "aa", "base.vmdk"), Policy{}, nil},
		{over("bb", "aa", "sub/up.vmdk"), Policy{}, nil},
		{over("bb", "aa", "base"), Policy{}, ErrCorrupt}, // no VMDK
		{over("bb", "cc", "base.vmdk"), Policy{}, ErrCorrupt},
		{over("bb", "aa", "../secret.vmdk"), Policy{}, ErrRefused},
		{over("bb", "aa", "ring1"), Policy{}, ErrCorrupt},
		{over("aa", "aa", "top.vmdk"), Policy{}, ErrCorrupt},
		{flatOf("base"), Policy{Format: "vmdk"}, nil},
		{flatOf("base"), Policy{Format: "vhd"}, ErrCorrupt},
	} {
		writeFiles(t, dir, map[string][]byte{"top.vmdk": c.text})
		img, err := OpenChain(filepath.Join(dir, "top.vmdk"), c.policy)
		if !errors.Is(err, c.want) {
			t.Errorf("%s %+v: %v, want %v", c.text, c.policy, err, c.want)
		}
		if err != nil {
			continue
		}
		p := make([]byte, len(secret))
		if _, err := img.ReadAt(p, 0); err != nil && err != io.EOF || !bytes.Equal(p, secret) {
			t.Errorf("%s: wrong bytes (%v)", c.text, err)
		}
		img.Close()
	}
	if open := openFiles(t, top); open != 0 {
		t.Errorf("%d files left open", open)
	}
}

func TestVMDKDepth(t *testing.T) {
	dir := t.TempDir()
	writeFiles(t, dir, map[string][]byte{"base": make([]byte, 512)})
	for i := range 65 {
		cid, parent, hint := fmt.Sprintf("%x", i+1), fmt.Sprintf("%x", i), fmt.Sprint(i-1)
		if i == 0 {
			parent, hint = "ffffffff", ""
		}
		writeFiles(t, dir, map[string][]byte{fmt.Sprint(i): deltaText("vmfs", cid, parent, hint, `RW 1 VMFS "base"`)})
	}
	if img := openChain(t, filepath.Join(dir, "63"), Policy{}); len(img.Files()) != 128 {
		t.Errorf("%d files", len(img.Files()))
	}
	if _, err := OpenChain(filepath.Join(dir, "64"), Policy{}); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "more than 64") {
		t.Errorf("65 images: %v", err)
	}
}

// Grains that are neighbours are read at once, and tables come from the cache.
func TestVMDKReadsAreMerged(t *testing.T) {
	for _, grain := range []int64{1, 8, 128} {
		d := esxDisk{sectors: 8192, grain: grain, seed: 1, states: make([]esxState, 8192/grain)}
		for i := range d.states {
			d.states[i] = esxData
		}
		want := make([]byte, 8192*512)
		d.over(want)
		b := writeHosted(d, nil)
		// As the grains are in the file; runs begin at every seventh.
		calls := &counting{ReaderAt: bytes.NewReader(b)}
		text := deltaText("monolithicSparse", "1", "ffffffff", "", `RW 8192 SPARSE "x"`)
		img, err := OpenVMDK(bytes.NewReader(text), int64(len(text)), VMDKOptions{
			Extent: func(string) (io.ReaderAt, int64, error) { return calls, int64(len(b)), nil },
		})
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			calls.reads.Store(0)
			got := make([]byte, len(want))
			if _, err := img.ReadAt(got, 0); err != nil && err != io.EOF || !bytes.Equal(got, want) {
				t.Fatal("wrong bytes", err)
			}
		}
		if n, runs := calls.reads.Load(), int64(len(d.states))/7+1; n > runs {
			t.Errorf("grains of %d sectors: %d reads for %d runs", grain, n, runs)
		}
	}
}

// Many extents share the memory for tables.
func TestVMDKMemoryIsBounded(t *testing.T) {
	const extents = 1000
	d := esxDisk{sectors: 128 * 1024, grain: 1, seed: 1, states: make([]esxState, 128*1024)}
	for i := 0; i < len(d.states); i += 1024 {
		d.states[i] = esxData
	}
	b := writeHosted(d, nil)
	text := deltaText("twoGbMaxExtentSparse", "1", "ffffffff", "", strings.Repeat("RW 131072 SPARSE \"x\"\n", extents))
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	img, err := openText(text, b)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 512)
	for off := int64(0); off < img.Size(); off += 1024 * 512 {
		if _, err := img.ReadAt(p, off); err != nil && err != io.EOF {
			t.Fatal(err)
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 16*mib {
		t.Errorf("%d bytes are kept for %d extents", grown, extents)
	}
	runtime.KeepAlive(img)
}
