package vdisk

import (
	"bytes"
	"compress/zlib"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// The checkers of this file hold computed files against the documents, also
// where QEMU is lenient. They share no constant with the code they check.

type formatError struct{ error }

// formatChecker reads a file and stops at the first thing that is wrong.
type formatChecker struct {
	r    io.ReaderAt
	size int64
}

func (c *formatChecker) must(ok bool, format string, args ...any) {
	if !ok {
		panic(formatError{fmt.Errorf(format, args...)})
	}
}

func (c *formatChecker) read(off, n int64) []byte {
	b := make([]byte, n)
	m, err := c.r.ReadAt(b, off)
	c.must(int64(m) == n, "%d bytes at %d of %d: %v", n, off, c.size, err)
	return b
}

func (c *formatChecker) zero(b []byte, what string) {
	c.must(len(bytes.Trim(b, "\x00")) == 0, "%s is not zero", what)
}

// caught runs a check and gives what was wrong.
func caught(check func()) (err error) {
	defer func() {
		if e, ok := recover().(formatError); ok {
			err = e
		}
	}()
	check()
	return nil
}

// checkVHD holds a dynamic VHD against the specification 1.0, and to two rules
// of ours: blocks follow each other without gaps, and the parts of them that are
// past the end of the disk are zero.
func checkVHD(r io.ReaderAt, size, disk int64) error {
	return caught(func() {
		c := &formatChecker{r, size}
		be := binary.BigEndian
		foot := c.read(size-512, 512)
		c.must(bytes.Equal(foot, c.read(0, 512)), "the copy of the footer differs")
		c.vhdFooter(foot, disk, 3, 512)
		h := c.read(512, 1024)
		c.must(string(h[:8]) == "cxsparse", "header cookie %q", h[:8])
		c.must(be.Uint64(h[8:]) == 0xFFFFFFFFFFFFFFFF, "header data offset %x", h[8:16])
		c.must(be.Uint32(h[24:]) == 0x10000, "header version %x", h[24:28])
		c.sum(h, 36)
		c.zero(h[40:1024], "parent of a disk without one, or reserved")
		block := int64(be.Uint32(h[32:]))
		c.must(block == 0x200000, "block size %d", block)
		table, entries := int64(be.Uint64(h[16:])), int64(be.Uint32(h[28:]))
		c.must(table == 1536, "table at %d", table)
		c.must(entries == (disk+block-1)/block, "%d entries for %d bytes", entries, disk)
		next := (table + entries*4 + 511) / 512
		bat := c.read(table, next*512-table)
		for i := range int64(len(bat)) / 4 {
			at := be.Uint32(bat[i*4:])
			if at == 0xFFFFFFFF {
				continue
			}
			c.must(i < entries, "an entry past the last is %x", at)
			c.must(int64(at) == next, "block %d at sector %d, expected at %d", i, at, next)
			bitmap := c.read(int64(at)*512, 512)
			c.must(bytes.Count(bitmap, []byte{0xff}) == 512, "block %d: a sector is not there", i)
			if rest := (i+1)*block - disk; rest > 0 {
				c.zero(c.read(int64(at+1)*512+block-rest, rest), "what is past the end of the disk")
			}
			next += 1 + block/512
		}
		c.must(next*512 == size-512, "blocks end at %d, the file has %d", next*512, size)
	})
}

func (c *formatChecker) sum(b []byte, at int) {
	sum := uint32(0)
	for i, x := range b {
		if i/4 != at/4 {
			sum += uint32(x)
		}
	}
	want := binary.BigEndian.Uint32(b[at:])
	c.must(want == 0xFFFFFFFF-sum, "checksum %x, computed %x", want, 0xFFFFFFFF-sum)
}

func (c *formatChecker) vhdFooter(f []byte, disk int64, kind uint32, header uint64) {
	be := binary.BigEndian
	c.must(string(f[:8]) == "conectix", "cookie %q", f[:8])
	c.must(be.Uint32(f[8:]) == 2, "features %x", f[8:12])
	c.must(be.Uint32(f[12:]) == 0x10000, "version %x", f[12:16])
	c.must(be.Uint64(f[16:]) == header, "data offset %x", f[16:24])
	c.must(int64(be.Uint64(f[40:])) == disk && int64(be.Uint64(f[48:])) == disk, "sizes %x", f[40:56])
	c.must(be.Uint32(f[60:]) == kind, "type %x", f[60:64])
	c.sum(f, 64)
	c.must(len(bytes.Trim(f[68:84], "\x00")) > 0, "no id")
	c.zero(f[84:], "reserved part")
	cylinders, heads, sectors := int64(be.Uint16(f[56:])), int64(f[58]), int64(f[59])
	chs := cylinders * heads * sectors * 512
	c.must(chs <= disk, "geometry %d/%d/%d is larger than %d bytes", cylinders, heads, sectors, disk)
	// Rounding down loses less than a cylinder, which has 4032 sectors at most up
	// to the size from which on it has 4080.
	if disk < 65535*16*255*512 {
		c.must(disk-chs < 16*255*512, "geometry %d/%d/%d for %d bytes", cylinders, heads, sectors, disk)
	} else {
		c.must(cylinders == 65535 && heads == 16 && sectors == 255, "geometry %d/%d/%d", cylinders, heads, sectors)
	}
}

// vmdkHead checks a hosted sparse header, VMware Virtual Disk Format 5.0.
func (c *formatChecker) vmdkHead(h []byte, version, flags uint32, compression uint16, disk int64) (redundant, directory, overhead int64) {
	le := binary.LittleEndian
	c.must(string(h[:4]) == "KDMV" && le.Uint32(h[4:]) == version && le.Uint32(h[8:]) == flags, "header %x", h[:12])
	c.must(int64(le.Uint64(h[12:]))*512 == disk, "capacity %x", h[12:20])
	c.must(le.Uint64(h[20:]) == 128 && le.Uint32(h[44:]) == 512, "grains %x, tables %x", h[20:28], h[44:48])
	c.must(le.Uint64(h[28:]) == 1 && le.Uint64(h[36:]) == 20, "descriptor %x", h[28:44])
	c.must(h[72] == 0 && string(h[73:77]) == "\n \r\n" && le.Uint16(h[77:]) == compression, "end of header %x", h[72:79])
	c.zero(h[79:], "padding of the header")
	return int64(le.Uint64(h[48:])), int64(le.Uint64(h[56:])), int64(le.Uint64(h[64:]))
}

func (c *formatChecker) vmdkText(createType string, disk int64) {
	text, rest, _ := strings.Cut(string(c.read(512, 20*512)), "\x00")
	c.must(len(strings.Trim(rest, "\x00")) == 0, "something behind the descriptor")
	for _, want := range []string{"# Disk DescriptorFile\nversion=1\n", "parentCID=ffffffff\n", "createType=\"" + createType + "\"\n", fmt.Sprintf("RW %d SPARSE \"", disk/512), "ddb.adapterType"} {
		c.must(strings.Contains(text, want), "descriptor without %q:\n%s", want, text)
	}
}

// checkSparseVMDK: two directories, each with its tables, which agree; grains in
// the order of the disk from the overhead on, to the end of the file.
func checkSparseVMDK(r io.ReaderAt, size, disk int64) error {
	return caught(func() {
		c := &formatChecker{r, size}
		le := binary.LittleEndian
		h := c.read(0, 512)
		redundant, directory, overhead := c.vmdkHead(h, 1, 3, 0, disk)
		c.vmdkText("monolithicSparse", disk)
		tables := (disk/512 + 65535) / 65536
		grains := (disk/512 + 127) / 128
		next := overhead
		c.must(overhead%128 == 0, "grains from sector %d on", overhead)
		a, b := c.read(redundant*512, tables*4), c.read(directory*512, tables*4)
		for i := range tables {
			x, y := int64(le.Uint32(a[i*4:])), int64(le.Uint32(b[i*4:]))
			c.must(x != y && x > 20 && y > 20 && x+4 <= overhead && y+4 <= overhead, "table %d at %d and %d", i, x, y)
			t := c.read(y*512, 2048)
			c.must(bytes.Equal(t, c.read(x*512, 2048)), "the copies of table %d differ", i)
			if len(bytes.Trim(t, "\x00")) == 0 {
				continue
			}
			for j := range int64(512) {
				if at := int64(le.Uint32(t[j*4:])); at != 0 {
					c.must(i*512+j < grains && at == next, "grain %d at %d, expected at %d", i*512+j, at, next)
					next += 128
				}
			}
		}
		c.must(next*512 == size, "grains end at %d, the file has %d", next*512, size)
	})
}

// checkStream reads a streamOptimized VMDK as a receiver does that cannot seek:
// marker by marker. Grains ascend, each table follows the grains it is for, and
// the disk put together from the grains is want.
func checkStream(r io.ReaderAt, size int64, want Source) error {
	return caught(func() {
		disk := (want.Size() + 511) / 512 * 512
		c := &formatChecker{r, size}
		le := binary.LittleEndian
		h := c.read(0, 512)
		_, directory, overhead := c.vmdkHead(h, 3, 0x30001, 1, disk)
		c.must(directory == -1, "directory %d in the header", directory)
		c.vmdkText("streamOptimized", disk)
		tables := (disk/512 + 65535) / 65536
		at, last, dirAt := overhead, int64(-1), int64(0)
		c.zero(c.read(21*512, (overhead-21)*512), "space before the grains")
		seen := map[int64]int64{}   // grain => sector, not yet in a table
		tableAt := map[int64]bool{} // sectors
		for {
			m := c.read(at*512, 512)
			value, n, kind := int64(le.Uint64(m)), int64(le.Uint32(m[8:])), le.Uint32(m[12:])
			if n != 0 {
				c.must(value%128 == 0 && value*512 < disk && value > last, "grain for sector %d after %d", value, last)
				c.grain(c.read(at*512+12, n), value*512, want)
				seen[value/128], last = at, value
				end := at*512 + 12 + n
				at = (end + 511) / 512
				c.zero(c.read(end, at*512-end), "padding of a grain")
				continue
			}
			c.zero(m[16:], "padding of a marker")
			at++
			switch kind {
			case 1:
				c.must(value == 4, "a table of %d sectors", value)
				tableAt[at] = true
				t, used := c.read(at*512, 2048), 0
				number := int64(-1)
				for g, place := range seen {
					if le.Uint32(t[g%512*4:]) == uint32(place) {
						number = g / 512
						delete(seen, g)
						used++
					}
				}
				c.must(number >= 0, "a table of no grains before it")
				for j := range 512 {
					if le.Uint32(t[j*4:]) != 0 {
						used--
					}
				}
				c.must(used == 0, "table %d has entries for other grains", number)
			case 2:
				c.must(len(seen) == 0, "%d grains without a table", len(seen))
				c.must(value == (tables*4+511)/512, "a directory of %d sectors", value)
				dirAt = at
				d := c.read(at*512, value*512)
				for i := range value * 128 {
					if e := int64(le.Uint32(d[i*4:])); e != 0 {
						c.must(tableAt[e], "directory entry %d is %d", i, e)
						delete(tableAt, e)
					}
				}
				c.must(len(tableAt) == 0, "tables that the directory does not know")
			case 3:
				c.must(value == 1, "a footer of %d sectors", value)
				foot := c.read(at*512, 512)
				_, d, _ := c.vmdkHead(foot, 3, 0x30001, 1, disk)
				c.must(d == dirAt && dirAt != 0, "the footer has the directory at %d, it is at %d", d, dirAt)
				copy(foot[56:64], h[56:64])
				c.must(bytes.Equal(foot, h), "header and footer differ")
			case 0:
				c.must(value == 0 && at*512 == size, "the end at sector %d of %d bytes", at, size)
				return
			default:
				c.must(false, "marker of type %d", kind)
			}
			at += value
		}
	})
}

func (c *formatChecker) grain(packed []byte, off int64, want Source) {
	src := bytes.NewReader(packed)
	z, err := zlib.NewReader(src)
	c.must(err == nil, "grain of %d: %v", off, err)
	b, err := io.ReadAll(z)
	c.must(err == nil && src.Len() == 0, "grain of %d: %v, %d bytes left", off, err, src.Len())
	c.must(len(b) == 65536, "grain of %d has %d bytes", off, len(b))
	ref := make([]byte, 65536)
	want.ReadAt(ref, off)
	c.must(bytes.Equal(b, ref), "grain of %d: other bytes", off)
}

// fileBytes reads all of a computed file.
func fileBytes(t testing.TB, f File) []byte {
	t.Helper()
	b := make([]byte, f.Size())
	if n, err := f.ReadAt(b, 0); n != len(b) || err != nil && err != io.EOF {
		t.Fatal(n, err)
	}
	return b
}

// checkedLayouts leaves out what takes checkers too long: millions of entries
// of tables, or under the race detector megabytes of bytes made and compared.
func checkedLayouts() []layout {
	return slices.DeleteFunc(layouts(), func(l layout) bool {
		return l.disk.size > 3*tib || (raced || testing.Short()) && (l.disk.size > tib || extent.Total(l.disk.data) > 8*mib)
	})
}

func TestFormatsAgainstDocuments(t *testing.T) {
	for _, l := range checkedLayouts() {
		t.Run(l.name, func(t *testing.T) {
			t.Parallel()
			disk := (l.disk.size + 511) / 512 * 512
			for _, f := range formatsFor(l) {
				file, err := f.make(l.disk, "x.vmdk")
				if f.name == "vhdx" || f.name == "qcow2" || f.name == "raw" || !f.fits(t, l.disk.size, err) {
					continue
				}
				switch f.name {
				case "vpc":
					err = checkVHD(file, file.Size(), disk)
				case "fixed":
					err = checkFixedVHD(file, l.disk, sector)
				case "vmdk":
					err = checkSparseVMDK(file, file.Size(), disk)
				case "stream":
					err = checkStream(file, file.Size(), l.disk)
				}
				if err != nil {
					t.Errorf("%s: %v", f.name, err)
				}
			}
		})
	}
}

// The checkers find what is wrong.
func TestFormatCheckersFindDamage(t *testing.T) {
	disk := newModel(1, 40*mib, ext(0, mib), ext(33*mib, 2*mib))
	try := func(name string, f File, err error, check func(r io.ReaderAt, size int64) error, places ...int64) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		b := fileBytes(t, f)
		if err := check(bytes.NewReader(b), f.Size()); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for _, at := range places {
			if at < 0 {
				at += f.Size()
			}
			b[at] ^= 1
			if check(bytes.NewReader(b), f.Size()) == nil {
				t.Errorf("%s: byte %d changed, and nothing noticed", name, at)
			}
			b[at] ^= 1
		}
	}
	v, err := VHD(disk, testID)
	try("vhd", v, err, func(r io.ReaderAt, n int64) error { return checkVHD(r, n, disk.size) },
		8, 57, 68, 300, 512, 545, 1000, 1536+3, 1536+16*4+3, 1536+25*4, 2048+7, -1, -450)
	s, err := StreamVMDK(disk, testID, "x")
	try("stream", s, err, func(r io.ReaderAt, n int64) error { return checkStream(r, n, disk) },
		5, 12, 56, 600, 21*512, 65536, 65536+8, 65536+12, 65536+5000, 65536+65560, 65536+65570, -512, -1024+56, -1536+12, -2048, -2048-512+12)
	m, err := SparseVMDK(disk, testID, "x")
	try("sparse", m, err, func(r io.ReaderAt, n int64) error { return checkSparseVMDK(r, n, disk.size) },
		5, 12, 48, 56, 64, 600, 21*512, 22*512, 30*512)
}

// What is written from beginning to end is the same disk for QEMU and for the
// documents, the same bytes each time, and smaller.
func TestWriteStreamOptimized(t *testing.T) {
	for _, l := range checkedLayouts() {
		t.Run(l.name, func(t *testing.T) {
			t.Parallel()
			var disk Source = l.disk
			if l.disk.size == 256*mib+4097 {
				disk = compressible{l.disk}
			}
			var b bytes.Buffer
			told := int64(0)
			n, err := WriteStreamOptimized(context.Background(), &b, disk, testID, "disk.vmdk", func(n int64) { told += n })
			if l.disk.size == 0 {
				if !errors.Is(err, ErrEmpty) {
					t.Errorf("empty: %v", err)
				}
				return
			}
			if err != nil || n != int64(b.Len()) || told != disk.Size() {
				t.Fatalf("%d bytes of %d, told %d of %d: %v", n, b.Len(), told, disk.Size(), err)
			}
			if err := checkStream(bytes.NewReader(b.Bytes()), n, disk); err != nil {
				t.Error(err)
			}
			v, err := OpenVMDK(bytes.NewReader(b.Bytes()), n, VMDKOptions{})
			if err != nil {
				t.Fatal(err)
			}
			checkReads(t, 3, v, section{disk, 0, v.Size()}, v.Size(), 30, 300*kib, l.disk.data)
			if l.huge || testing.Short() {
				return
			}
			dir := t.TempDir()
			writeFiles(t, dir, map[string][]byte{"disk.vmdk": b.Bytes()})
			store(t, Flat(disk), filepath.Join(dir, "raw"))
			mustQEMU(t, dir, "qemu-img", "compare", "-f", "vmdk", "-F", "raw", "disk.vmdk", "raw")
			mustQEMU(t, dir, "qemu-img", "check", "-f", "vmdk", "disk.vmdk")
			var again bytes.Buffer
			if _, err := WriteStreamOptimized(context.Background(), &again, disk, testID, "disk.vmdk", nil); err != nil || !bytes.Equal(again.Bytes(), b.Bytes()) {
				t.Errorf("the second time: other bytes (%v)", err)
			}
		})
	}
}

// failingWriter takes left bytes.
type failingWriter struct{ left int }

func (w *failingWriter) Write(p []byte) (int, error) {
	n := min(len(p), w.left)
	w.left -= n
	if n < len(p) {
		return n, os.ErrClosed
	}
	return n, nil
}

func TestWriteStreamOptimizedErrors(t *testing.T) {
	before := runtime.NumGoroutine()
	disk := newModel(1, 100*mib, ext(0, 100*mib))
	for _, left := range []int{0, 100000, 5 * mib} {
		if _, err := WriteStreamOptimized(context.Background(), &failingWriter{left}, disk, testID, "x", nil); !errors.Is(err, os.ErrClosed) {
			t.Errorf("a writer that takes %d bytes: %v", left, err)
		}
	}
	disk.bad = 50 * mib
	if _, err := WriteStreamOptimized(context.Background(), io.Discard, disk, testID, "x", nil); !errors.Is(err, errBadSector) {
		t.Errorf("a bad sector: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	seen := int64(0)
	_, err := WriteStreamOptimized(ctx, io.Discard, newModel(1, 100*mib, ext(0, 100*mib)), testID, "x", func(n int64) {
		if seen += n; seen > 10*mib {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	for deadline := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > before; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines are left", runtime.NumGoroutine()-before)
		}
	}
}

// A stream that was cut off is refused, wherever that was.
func TestTruncatedStream(t *testing.T) {
	var b bytes.Buffer
	disk := newModel(1, 5*mib, ext(0, 5*mib))
	n, err := WriteStreamOptimized(context.Background(), &b, disk, testID, "x", nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, cut := range []int64{1, 511, 512, 1024, 1536, 2048, 4096, n / 2, n - 65536, n - 300, n - 100, n} {
		_, err := OpenVMDK(bytes.NewReader(b.Bytes()), n-cut, VMDKOptions{})
		if !errors.Is(err, ErrCorrupt) {
			t.Errorf("%d of %d bytes: %v", n-cut, n, err)
		}
	}
	// Damage to a grain is an error of the reads that need it.
	damaged := bytes.Clone(b.Bytes())
	damaged[65536+1000] ^= 4
	v, err := OpenVMDK(bytes.NewReader(damaged), n, VMDKOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.ReadAt(make([]byte, 100), 60000); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a damaged grain: %v", err)
	}
	if _, err := v.ReadAt(make([]byte, 100), 70000); err != nil {
		t.Errorf("the next one: %v", err)
	}
	copy(damaged, b.Bytes())
	damaged[65536] = 128 // says that it is another grain
	if _, err := v.ReadAt(make([]byte, 100), 0); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a grain of another place: %v", err)
	}
}
