package vdisk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// qcowKinds are the images that QEMU is asked to make: options of qemu-img.
var qcowKinds = []struct {
	name string
	args []string
}{
	{"v3", nil},
	{"v2", []string{"-o", "compat=0.10"}},
	{"512 byte clusters", []string{"-o", "cluster_size=512"}},
	{"4 KiB clusters", []string{"-o", "cluster_size=4096"}},
	{"2 MiB clusters", []string{"-o", "cluster_size=2M"}},
	{"1 bit refcounts", []string{"-o", "refcount_bits=1"}},
	{"preallocated", []string{"-o", "preallocation=metadata"}},
	{"extended L2", []string{"-o", "extended_l2=on"}},
	{"extended L2, 16 KiB", []string{"-o", "extended_l2=on,cluster_size=16k"}},
	{"zlib", []string{"-c"}},
	{"zlib, v2", []string{"-c", "-o", "compat=0.10"}},
	{"zlib, 512 byte clusters", []string{"-c", "-o", "cluster_size=512"}},
	{"zlib, 2 MiB clusters", []string{"-c", "-o", "cluster_size=2M"}},
	{"zlib, extended L2", []string{"-c", "-o", "extended_l2=on"}},
	{"zstd", []string{"-c", "-o", "compression_type=zstd"}},
	{"zstd, 2 MiB clusters", []string{"-c", "-o", "compression_type=zstd,cluster_size=2M"}},
}

// compressible makes runs of equal bytes of what would be noise.
type compressible struct{ *model }

func (c compressible) ReadAt(p []byte, off int64) (int, error) {
	n, err := c.model.ReadAt(p, off)
	for i := range p[:n] {
		if p[i] != 0 {
			p[i] = byte((off+int64(i))/97 | 1)
		}
	}
	return n, err
}

func TestReadsQEMUsImages(t *testing.T) {
	needQEMU(t)
	disks := map[string]Source{
		"empty":      newModel(1, 0),
		"one sector": newModel(1, 512, ext(0, 512)),
		"random":     newModel(2, 5*mib+512*3, ext(0, 6*mib)),
		"sparse":     compressible{randomModel(3, 40*mib+512, 70, 300*kib)},
		"sparser":    randomModel(4, 3<<30, 9, 300*kib),
		"zeros":      newModel(5, 10*mib),
	}
	for _, k := range qcowKinds {
		for name, disk := range disks {
			if disk.Size() > 1<<30 && strings.Contains(k.name, "512") {
				continue // its tables alone take QEMU minutes
			}
			t.Run(k.name+"/"+name, func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				store(t, disk, filepath.Join(dir, "raw"))
				args := append([]string{"convert", "-f", "raw", "-O", "qcow2"}, k.args...)
				mustQEMU(t, dir, "qemu-img", append(args, "raw", "disk.qcow2")...)
				img := openChain(t, filepath.Join(dir, "disk.qcow2"), Policy{})
				checkImage(t, img, disk)
				if !strings.Contains(k.name, "2 MiB") && !strings.Contains(k.name, "prealloc") && disk.Size() > 1<<30 {
					if n := extent.Total(allocated(t, img, 64*kib)); n > 10*mib {
						t.Errorf("%d bytes allocated", n)
					}
				}
			})
		}
	}
}

func openChain(t testing.TB, path string, p Policy) *Chain {
	t.Helper()
	c, err := OpenChain(path, p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// checkImage compares all of img, and random parts, with want.
func checkImage(t testing.TB, img, want Source) {
	t.Helper()
	if img.Size() != want.Size() {
		t.Fatalf("size %d, want %d", img.Size(), want.Size())
	}
	near := allocated(t, img, 512)
	checkReads(t, 5, img, want, img.Size(), 20, 2*mib, near)
	checkReads(t, 6, img, want, img.Size(), 200, 100, near)
	if img.Size() <= 64*mib {
		checkRead(t, img, want, img.Size(), 0, img.Size()+1)
		for _, g := range []int64{512, 64 * kib} {
			checkHoles(t, img, g)
		}
		return
	}
	// What is not listed is zero in the reference, and what is is equal.
	for _, e := range allocated(t, want, 64*kib) {
		checkRead(t, img, want, img.Size(), e.Off, e.Len)
		if !covered(near, want, e) {
			t.Errorf("data in %v is not listed in %v", e, near)
		}
	}
}

// covered says whether all bytes of want in e that are not zero lie in list.
func covered(list []extent.Extent, want io.ReaderAt, e extent.Extent) bool {
	p := make([]byte, e.Len)
	want.ReadAt(p, e.Off)
	for _, l := range list {
		if part := extent.Intersect(l, e); !part.Empty() {
			clear(p[part.Off-e.Off : part.End()-e.Off])
		}
	}
	return bytes.Count(p, []byte{0}) == len(p)
}

// Chains made by random writes, zero writes and discards of qemu-io, over
// backing files of other sizes; QEMU says what the disk is.
func TestReadsQEMUsChains(t *testing.T) {
	needQEMU(t)
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			rnd := rand.New(rand.NewPCG(seed, 7))
			dir := t.TempDir()
			size := 3*mib + 512*rnd.Int64N(5000)
			store(t, randomModel(seed, size, 12, 200*kib), filepath.Join(dir, "0"))
			format := "raw"
			if seed%3 == 0 {
				mustQEMU(t, dir, "qemu-img", "convert", "-c", "-O", "qcow2", "-f", "raw", "0", "base")
				mustQEMU(t, dir, "mv", "base", "0")
				format = "qcow2"
			}
			depth := 1 + rnd.IntN(4)
			for i := 1; i <= depth; i++ {
				options := []string{"cluster_size=64k", "cluster_size=4k", "extended_l2=on", "compat=0.10", "cluster_size=512", "extended_l2=on,cluster_size=16k"}[rnd.IntN(6)]
				size = max(512, size+512*(rnd.Int64N(3000)-1500))
				mustQEMU(t, dir, "qemu-img", "create", "-f", "qcow2", "-o", options, "-b", fmt.Sprint(i-1), "-F", format, fmt.Sprint(i), fmt.Sprint(size))
				args := []string{"-f", "qcow2", "-d", "unmap"}
				for range 25 {
					off, n := rnd.Int64N(size/512)*512, 512*(1+rnd.Int64N(200))
					n = min(n, size-off)
					op := []string{"write -P %[3]d %[1]d %[2]d", "write -z %d %d", "write -z -u %d %d", "discard %d %d", "write -c -P %[3]d %[1]d %[2]d"}[rnd.IntN(5)]
					if strings.HasPrefix(op, "write -c") { // whole clusters only
						off = off / (64 * kib) * 64 * kib
						n = min(64*kib, size-off)
					}
					cmd := fmt.Sprintf(op, off, n, 1+rnd.IntN(255))
					cmd, _, _ = strings.Cut(cmd, "%!(EXTRA")
					args = append(args, "-c", cmd)
				}
				// Some combinations are refused (compressed writes over others'
				// data, zero writes in version 2): what matters is what QEMU reads.
				out, _ := qemu(t, dir, "qemu-io", append(args, fmt.Sprint(i))...)
				if strings.Count(out, "wrote ") < 5 {
					t.Errorf("hardly anything was written: %s", out)
				}
				format = "qcow2"
			}
			if seed%4 == 1 {
				mustQEMU(t, dir, "qemu-img", "snapshot", "-c", "kept", fmt.Sprint(depth))
				mustQEMU(t, dir, "qemu-io", "-f", "qcow2", "-c", "write -P 77 1000 5000", fmt.Sprint(depth))
			}
			mustQEMU(t, dir, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", fmt.Sprint(depth), "want")
			want, err := OpenRaw(filepath.Join(dir, "want"))
			if err != nil {
				t.Fatal(err)
			}
			defer want.Close()
			img := openChain(t, filepath.Join(dir, fmt.Sprint(depth)), Policy{})
			if len(img.Files()) != depth+1 {
				t.Errorf("files %v, want %d", img.Files(), depth+1)
			}
			checkImage(t, img, want)
		})
	}
}

// A qcow2 of 10 TiB, written by QEMU.
func TestReadsHugeImage(t *testing.T) {
	dir := t.TempDir()
	mustQEMU(t, dir, "qemu-img", "create", "-f", "qcow2", "disk", "10T")
	mustQEMU(t, dir, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1000", "-c", "write -P 2 5T 3M", "-c", "write -P 3 10995116277248 512", "disk")
	img := openChain(t, filepath.Join(dir, "disk"), Policy{})
	want := []extent.Extent{ext(0, 64*kib), ext(5*tib, 3*mib), ext(10*tib-64*kib, 64*kib)}
	if got := allocated(t, img, 64*kib); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("allocated %v, want %v", got, want)
	}
	for _, c := range []struct {
		off int64
		b   byte
	}{{0, 1}, {999, 1}, {5*tib - 1, 0}, {5 * tib, 2}, {5*tib + 3*mib - 1, 2}, {5*tib + 3*mib, 0}, {10*tib - 512, 3}, {10*tib - 1, 3}, {10*tib - 513, 0}} {
		var b [1]byte
		if _, err := img.ReadAt(b[:], c.off); err != nil && err != io.EOF || b[0] != c.b {
			t.Errorf("byte %d is %d (%v), want %d", c.off, b[0], err, c.b)
		}
	}
}

// Ours against ours: it shows that both sides agree, also where QEMU is too
// slow to be asked.
func TestReadsComputed(t *testing.T) {
	for _, l := range layouts() {
		t.Run(l.name, func(t *testing.T) {
			t.Parallel()
			f, err := QCOW2(l.disk)
			if err != nil {
				t.Fatal(err)
			}
			img, err := OpenQCOW2(f, f.Size(), QCOW2Options{})
			if err != nil {
				t.Fatal(err)
			}
			checkImage(t, img, Flat(l.disk))
		})
	}
}

// counting counts the reads of a file and fails those of one byte.
type counting struct {
	io.ReaderAt
	reads atomic.Int64
	bad   atomic.Int64 // 0: none
}

func (c *counting) ReadAt(p []byte, off int64) (int, error) {
	c.reads.Add(1)
	if bad := c.bad.Load(); bad >= off && bad < off+int64(len(p)) && bad > 0 {
		return 0, errBadSector
	}
	return c.ReaderAt.ReadAt(p, off)
}

func TestMergedReads(t *testing.T) {
	disk := newModel(1, 64*mib, ext(0, 64*mib))
	f, err := QCOW2(disk)
	if err != nil {
		t.Fatal(err)
	}
	file := &counting{ReaderAt: f}
	img, err := OpenQCOW2(file, f.Size(), QCOW2Options{})
	if err != nil {
		t.Fatal(err)
	}
	opened := file.reads.Load()
	p := make([]byte, mib)
	for off := int64(0); off < disk.size; off += mib {
		if _, err := img.ReadAt(p, off); err != nil && err != io.EOF {
			t.Fatal(err)
		}
	}
	// 64 for the data, 1 slice of the L1 table, 2 of the L2 table.
	if n := file.reads.Load() - opened; n != 67 {
		t.Errorf("64 reads of 1 MiB took %d reads of the file, want 67", n)
	}
	if n := testing.AllocsPerRun(10, func() { img.ReadAt(p, 7*mib+3) }); n != 0 {
		t.Errorf("%v allocations per read", n)
	}
	// An error of the file is passed on, and is not remembered.
	file.bad.Store(f.Size() - 10)
	if n, err := img.ReadAt(p, 63*mib); n != 0 || !errors.Is(err, errBadSector) {
		t.Errorf("%d, %v", n, err)
	}
	file.bad.Store(0)
	if _, err := img.ReadAt(p, 63*mib); err != nil && err != io.EOF {
		t.Error(err)
	}
}

func TestTableCacheIsBounded(t *testing.T) {
	disk := randomModel(1, 40<<30, 2000, kib)
	f, err := QCOW2(disk)
	if err != nil {
		t.Fatal(err)
	}
	img, err := OpenQCOW2(f, f.Size(), QCOW2Options{TableCache: 64 * kib})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for g := range uint64(4) {
		wg.Go(func() { checkReads(t, g, img, disk, disk.size, 500, 5000, disk.data) })
	}
	wg.Wait()
	if n, m := len(img.tables.ring), len(img.tables.byOff); n != 16 || m != 16 {
		t.Errorf("%d slices of 4 KiB cached, %d known; want 16", n, m)
	}
}

func TestCompressedClustersDecodeOnce(t *testing.T) {
	dir := t.TempDir()
	disk := compressible{newModel(1, 4*mib, ext(0, 4*mib))}
	store(t, disk, filepath.Join(dir, "raw"))
	for _, method := range []string{"zlib", "zstd"} {
		mustQEMU(t, dir, "qemu-img", "convert", "-c", "-O", "qcow2", "-o", "compression_type="+method, "-f", "raw", "raw", "disk")
		raw, err := OpenRaw(filepath.Join(dir, "disk"))
		if err != nil {
			t.Fatal(err)
		}
		defer raw.Close()
		file := &counting{ReaderAt: raw}
		img, err := OpenQCOW2(file, raw.Size(), QCOW2Options{})
		if err != nil {
			t.Fatal(err)
		}
		opened := file.reads.Load()
		for off := int64(0); off < disk.size; off += 3000 {
			checkRead(t, img, disk, disk.size, off, 3000)
		}
		if n := file.reads.Load() - opened; n != 64+2 { // clusters, and one slice of each table
			t.Errorf("%s: %d reads of the file, want 66", method, n)
		}
		var wg sync.WaitGroup
		for g := range uint64(4) {
			wg.Go(func() { checkReads(t, g, img, disk, disk.size, 60, 100*kib, nil) })
		}
		wg.Wait()
		fresh, err := OpenQCOW2(file, raw.Size(), QCOW2Options{})
		if err != nil {
			t.Fatal(err)
		}
		w := fresh.walk()
		s, err := fresh.lookup(w, mib)
		if err != nil || s.kind != packed {
			t.Fatal(s, err)
		}
		file.bad.Store(s.host & (1<<54 - 1)) // see unpack
		for _, n := range []int64{100, 2 * mib} {
			if _, err := fresh.ReadAt(make([]byte, n), mib); !errors.Is(err, errBadSector) {
				t.Errorf("%s: %v", method, err)
			}
		}
	}
}

// A truncated image gives what it still has, or ErrCorrupt: at every length.
func TestTruncated(t *testing.T) {
	dir := t.TempDir()
	disk := compressible{newModel(3, 400*kib, ext(0, 100*kib), ext(200*kib, 3*kib), ext(300*kib, 100*kib))}
	store(t, disk, filepath.Join(dir, "raw"))
	for _, k := range []string{"", "-c", "-c,-o,compression_type=zstd", "-o,extended_l2=on,-o,cluster_size=16k"} {
		args := []string{"convert", "-f", "raw", "-O", "qcow2"}
		if k != "" {
			args = append(args, strings.Split(k, ",")...)
		}
		mustQEMU(t, dir, "qemu-img", append(args, "raw", "disk")...)
		whole, err := os.ReadFile(filepath.Join(dir, "disk"))
		if err != nil {
			t.Fatal(err)
		}
		want := make([]byte, disk.size)
		disk.ReadAt(want, 0)
		failures := 0
		for n := 0; n < len(whole); n += 509 {
			img, err := OpenQCOW2(bytes.NewReader(whole[:n]), int64(n), QCOW2Options{Name: "cut.qcow2"})
			if err == nil {
				got := make([]byte, disk.size)
				var read int
				read, err = img.ReadAt(got, 0)
				if i := mismatch(got[:read], want[:read]); i >= 0 {
					t.Fatalf("%q cut at %d: byte %d is wrong", k, n, i)
				}
				if read == len(want) {
					continue // only padding or a refcount is missing
				}
			}
			if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "cut.qcow2: ") {
				t.Fatalf("%q cut at %d: %v", k, n, err)
			}
			failures++
		}
		if failures < len(whole)/509/2 {
			t.Errorf("%q: only %d lengths of %d fail", k, failures, len(whole)/509)
		}
	}
}

// edited is a good image of 1 MiB with one change.
func edited(t *testing.T, change func(b []byte)) error {
	t.Helper()
	f, err := QCOW2(newModel(1, mib, ext(0, mib)))
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, f.Size())
	f.ReadAt(b, 0)
	change(b)
	img, err := OpenQCOW2(bytes.NewReader(b), int64(len(b)), QCOW2Options{Name: "img"})
	if err != nil {
		return err
	}
	_, err = img.ReadAt(make([]byte, mib), 0)
	if err == io.EOF {
		return nil
	}
	return err
}

func TestHeaderChecks(t *testing.T) {
	be := binary.BigEndian
	const l1, l2 = 3 * 65536, 4 * 65536 // see QCOW2
	put := func(off int, v uint64) func([]byte) { return func(b []byte) { be.PutUint64(b[off:], v) } }
	put32 := func(off int, v uint32) func([]byte) { return func(b []byte) { be.PutUint32(b[off:], v) } }
	for _, c := range []struct {
		name   string
		change func([]byte)
		want   error
		text   string
	}{
		{"sound", func([]byte) {}, nil, ""},
		{"dirty", put(72, 1), nil, ""},
		{"compatible and autoclear bits", func(b []byte) { put(80, 99)(b); put(88, 1<<40)(b) }, nil, ""},
		{"corrupt bit", put(72, 2), ErrCorrupt, "marked corrupt"},
		{"external data", put(72, 4), ErrUnsupported, "external data file"},
		{"unknown bit", put(72, 1<<33), ErrUnsupported, "bit 33"},
		{"unknown bits with names", func(b []byte) {
			put(72, 1<<5|1<<63)(b)
			be.PutUint32(b[104:], 0x6803F857)
			be.PutUint32(b[108:], 96)
			b[113] = 5
			copy(b[114:], "time travel")
			b[160] = 1 // a compatible feature
			b[161] = 63
			copy(b[162:], "wrong")
		}, ErrUnsupported, `"time travel", bit 63`},
		{"magic", put32(0, 7), ErrCorrupt, "not a qcow2"},
		{"version", put32(4, 4), ErrUnsupported, "version 4"},
		{"encrypted", put32(32, 2), ErrUnsupported, "encrypted"},
		{"cluster bits 8", put32(20, 8), ErrCorrupt, "2^8"},
		{"cluster bits 22", put32(20, 22), ErrCorrupt, "2^22"},
		{"cluster bits huge", put32(20, 1<<31), ErrCorrupt, ""},
		{"size", put(24, 1<<63), ErrCorrupt, "disk of"},
		{"size beyond L1", put(24, 1<<40), ErrCorrupt, "L1 table of 1 entries"},
		{"L1 entries", put32(36, 1<<31), ErrCorrupt, "L1 table"},
		{"L1 past the end", put(40, 1<<40), ErrCorrupt, "L1 table at"},
		{"L1 offset overflow", put(40, 1<<63|65536), ErrCorrupt, "L1 table at"},
		{"L1 unaligned", put(40, l1+8), ErrCorrupt, "L1 table at"},
		{"header length", put32(100, 1<<30), ErrCorrupt, "header length"},
		{"header length 0", put32(100, 0), ErrCorrupt, "header length"},
		{"compression type", func(b []byte) { put32(100, 112)(b); b[104] = 1 }, ErrCorrupt, "compression type 1"},
		{"compression type 9", func(b []byte) { put32(100, 112)(b); b[104] = 9; put(72, 8)(b) }, ErrUnsupported, "compression type 9"},
		{"compression bit", put(72, 8), ErrCorrupt, "compression type 0"},
		{"extension", func(b []byte) { put32(104, 5)(b); put32(108, 1<<31)(b) }, ErrCorrupt, "header extension"},
		{"backing refused", func(b []byte) { put(8, 512)(b); put32(16, 4)(b); copy(b[512:], "base") }, ErrRefused, `"base"`},
		{"backing name outside", func(b []byte) { put(8, 65535)(b); put32(16, 4)(b) }, ErrCorrupt, "backing file name"},
		{"backing name far outside", func(b []byte) { put(8, 1<<63)(b); put32(16, 4)(b) }, ErrCorrupt, "backing file name"},
		{"backing name long", func(b []byte) { put(8, 512)(b); put32(16, 1024)(b) }, ErrCorrupt, "backing file name"},
		{"backing name with NUL", func(b []byte) { put(8, 512)(b); put32(16, 4)(b) }, ErrCorrupt, "backing file name"},
		{"L1 entry past the end", put(l1, 1<<50|1<<63), ErrCorrupt, "past the end"},
		{"L1 entry unaligned", put(l1, l2+512), ErrCorrupt, "L1 entry 0"},
		{"L1 reserved bits", put(l1, l2|1<<60), ErrCorrupt, "L1 entry 0"},
		{"L2 entry past the end", put(l2+8, 1<<50|1<<63), ErrCorrupt, "reading at 65536: data at"},
		{"L2 entry unaligned", put(l2+8, 5*65536+512), ErrCorrupt, "L2 entry at 262152"},
		{"L2 reserved bits", put(l2+16, 5*65536|2), ErrCorrupt, "L2 entry at 262160"},
		{"zero cluster in version 2", func(b []byte) { put32(4, 2)(b); put(l2, 1)(b) }, ErrCorrupt, "L2 entry at 262144"},
		{"compressed past the end", put(l2, 1<<62|1<<50), ErrCorrupt, "past the end"},
		{"compressed garbage", put(l2, 1<<62|5*65536), ErrCorrupt, "compressed data at 327680"},
		{"zero cluster", put(l2, 1), nil, ""},
		{"unallocated", put(l2, 0), nil, ""},
	} {
		err := edited(t, c.change)
		if !errors.Is(err, c.want) || err != nil && !(strings.Contains(err.Error(), c.text) && strings.HasPrefix(err.Error(), "img: ")) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// Features that QEMU itself writes are refused by their name.
func TestRefusesQEMUsFeatures(t *testing.T) {
	dir := t.TempDir()
	mustQEMU(t, dir, "qemu-img", "create", "-f", "qcow2", "-o", "data_file=data.raw", "external", "1M")
	features := map[string]string{"external": "external data file", "luks": "encrypted"} // image => what the error says
	if _, err := qemu(t, dir, "qemu-img", "create", "-f", "qcow2", "--object", "secret,id=s,data=x", "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=100", "luks", "1M"); err != nil {
		t.Logf("without LUKS, whose key derivation QEMU times and now and then gives up on: %v", err)
		delete(features, "luks")
	}
	for name, text := range features {
		if _, err := OpenChain(filepath.Join(dir, name), Policy{}); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
