package vdisk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// model is a disk whose data is a function of the offset, so that it can be of
// any size. Outside of data it is zero.
type model struct {
	size  int64
	data  []extent.Extent // ascending
	seed  uint64
	bad   int64        // reads of this byte fail; -1: none
	reads atomic.Int64 // calls of ReadAt
	walks atomic.Int64 // calls of Allocated
}

var errBadSector = errors.New("bad sector")

func newModel(seed uint64, size int64, data ...extent.Extent) *model {
	for i, e := range data {
		data[i] = extent.Intersect(e, extent.Extent{Off: 0, Len: size})
	}
	return &model{size: size, data: extent.Normalise(data), seed: seed, bad: -1}
}

// randomModel has n random ranges of up to longest bytes, some at sector edges.
func randomModel(seed uint64, size int64, n int, longest int64) *model {
	rnd := rand.New(rand.NewPCG(seed, 1))
	var data []extent.Extent
	for range n {
		e := extent.Extent{Off: rnd.Int64N(size), Len: 1 + rnd.Int64N(longest)}
		if rnd.IntN(2) == 0 {
			e = extent.Align(e, 64*kib)
		}
		data = append(data, e)
	}
	return newModel(seed, size, data...)
}

func (m *model) Size() int64 { return m.size }

func (m *model) word(i int64) uint64 {
	x := uint64(i)*0x9E3779B97F4A7C15 + m.seed
	x = (x ^ x>>30) * 0xBF58476D1CE4E5B9
	x = (x ^ x>>27) * 0x94D049BB133111EB
	return x ^ x>>31
}

func (m *model) ReadAt(p []byte, off int64) (int, error) {
	m.reads.Add(1)
	p, end := clip(p, off, m.size)
	if m.bad >= off && m.bad < off+int64(len(p)) {
		p, end = p[:m.bad-off], errBadSector
	}
	clear(p)
	for _, e := range m.data {
		part := extent.Intersect(e, extent.Extent{Off: off, Len: int64(len(p))})
		if part.Empty() {
			continue
		}
		m.generate(p[part.Off-off:part.End()-off], part.Off)
	}
	return len(p), end
}

func (m *model) generate(p []byte, off int64) {
	var w [8]byte
	for ; off%8 == 0 && len(p) >= 8; off += 8 {
		binary.LittleEndian.PutUint64(p, m.word(off/8))
		p = p[8:]
	}
	for len(p) > 0 {
		binary.LittleEndian.PutUint64(w[:], m.word(off/8))
		n := copy(p, w[off%8:])
		p, off = p[n:], off+int64(n)
	}
}

func (m *model) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	m.walks.Add(1)
	return extent.Coarsen(extent.All(m.data), granularity, m.size)
}

// store writes what src has allocated to path and makes the rest a hole.
func store(t testing.TB, src Source, path string) {
	t.Helper()
	if err := storeFile(src, path); err != nil {
		t.Fatal(err)
	}
}

func storeFile(src Source, path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(src.Size()); err != nil {
		return err
	}
	p := make([]byte, 4*mib)
	for e, err := range src.Allocated(4 * kib) {
		if err != nil {
			return err
		}
		for off := e.Off; off < e.End(); {
			n := min(int64(len(p)), e.End()-off)
			if n, err := src.ReadAt(p[:n], off); err != nil && !(err == io.EOF && off+int64(n) == src.Size()) {
				return err
			}
			if _, err := f.WriteAt(p[:n], off); err != nil {
				return err
			}
			off += n
		}
	}
	return nil
}

// qemu runs a QEMU tool in dir and returns its output. The test is skipped when
// the tool is not there, and in short runs.
func qemu(t testing.TB, dir, tool string, args ...string) (string, error) {
	t.Helper()
	needQEMU(t)
	cmd := exec.Command(tool, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s %v: %w\n%s", tool, args, err, out)
	}
	return string(out), err
}

func needQEMU(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("-short: not running qemu-img")
	}
	for _, tool := range []string{"qemu-img", "qemu-io"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("the oracle is missing (Debian package qemu-utils): %v", err)
		}
	}
}

func mustQEMU(t testing.TB, dir, tool string, args ...string) string {
	t.Helper()
	out, err := qemu(t, dir, tool, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// checkReads compares random reads of got with want, which are at least as long
// as each other says, byte by byte, with odd offsets and lengths and ends.
func checkReads(t testing.TB, seed uint64, got, want io.ReaderAt, size int64, n int, longest int64, near []extent.Extent) {
	t.Helper()
	rnd := rand.New(rand.NewPCG(seed, 2))
	for range n {
		var off int64
		switch rnd.IntN(6) {
		case 0:
			off = max(0, size-rnd.Int64N(2*longest)) // the end
		case 1:
			off = size + rnd.Int64N(longest) // past it
		case 2, 3:
			if len(near) > 0 {
				e := near[rnd.IntN(len(near))]
				off = max(0, e.Off-longest/2+rnd.Int64N(e.Len+longest))
				break
			}
			fallthrough
		default:
			off = rnd.Int64N(size + 1)
		}
		checkRead(t, got, want, size, off, rnd.Int64N(longest))
	}
}

func checkRead(t testing.TB, got, want io.ReaderAt, size, off, length int64) {
	t.Helper()
	p, ref := bytes.Repeat([]byte{0xAA}, int(length)), make([]byte, max(0, min(length, size-off))) // what is not written shows
	wantErr := error(nil)
	if length > 0 && off+length > size {
		wantErr = io.EOF
	}
	if n, err := got.ReadAt(p, off); n != len(ref) || !(err == wantErr || err == io.EOF && off+length == size) {
		t.Fatalf("ReadAt(%d bytes, %d) of %d = %d, %v; want %d, %v", length, off, size, n, err, len(ref), wantErr)
	}
	if n, err := want.ReadAt(ref, off); n != len(ref) {
		t.Fatalf("reference: %d, %v", n, err)
	}
	if i := mismatch(p[:len(ref)], ref); i >= 0 {
		t.Fatalf("ReadAt(%d bytes, %d): byte %d is %#x, want %#x", length, off, off+int64(i), p[i], ref[i])
	}
}

func mismatch(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return len(a)
}

// allocated collects a listing and checks its promises: ascending, apart,
// aligned, within the size.
func allocated(t testing.TB, src Source, granularity int64) []extent.Extent {
	t.Helper()
	var all []extent.Extent
	last := int64(-1)
	for e, err := range src.Allocated(granularity) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Off <= last || e.Len <= 0 || e.End() > src.Size() ||
			e.Off%granularity != 0 || e.End()%granularity != 0 && e.End() != src.Size() {
			t.Fatalf("range %v of %d after %d, granularity %d", e, src.Size(), last, granularity)
		}
		last = e.End()
		all = append(all, e)
	}
	return all
}

// checkHoles reads all of src, which must be small, and finds data outside of
// what it lists.
func checkHoles(t testing.TB, src Source, granularity int64) {
	t.Helper()
	all := make([]byte, src.Size())
	if n, err := src.ReadAt(all, 0); n != len(all) || err != nil && err != io.EOF {
		t.Fatal(n, err)
	}
	for _, e := range allocated(t, src, granularity) {
		clear(all[e.Off:e.End()])
	}
	if i := mismatch(all, make([]byte, len(all))); i >= 0 {
		t.Fatalf("data at %d, outside of what Allocated(%d) lists", i, granularity)
	}
}

func tempPath(t testing.TB, name string) string { return filepath.Join(t.TempDir(), name) }

var testID = Identity{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}

type layout struct {
	name string
	disk *model
	huge bool // comparing it as a whole takes too long
}

func ext(off, length int64) extent.Extent { return extent.Extent{Off: off, Len: length} }

// layouts are the disks that every format is tried with. The race detector
// makes generating and comparing bytes ten times slower: disks with much data,
// and the largest, are left to runs without it.
func layouts() []layout {
	return slices.DeleteFunc(allLayouts(), func(l layout) bool {
		return raced && (extent.Total(l.disk.data) > 16*mib && l.disk.size < tib || l.disk.size > 3*tib)
	})
}

func allLayouts() []layout {
	all := func(name string, size int64) layout {
		return layout{name: name, disk: newModel(uint64(size), size, ext(0, size))}
	}
	ends := func(name string, size int64) layout {
		return layout{name: name, huge: true, disk: newModel(uint64(size), size,
			ext(0, 3*mib+77), ext(size/2-100, 40*mib), ext(size/2+200*mib+1, 1), ext(size-5*mib-1, 5*mib+1))}
	}
	return []layout{
		all("empty", 0),
		all("one byte", 1),
		all("one sector", 512),
		all("sector and a byte", 513),
		all("1 MiB random", mib),
		all("odd size random", 5*mib+12345),
		all("32 MiB less 1", 32*mib-1),
		{name: "64 MiB and 512", disk: newModel(64*mib+512, 64*mib+512, ext(0, mib), ext(32*mib-77, 3*mib), ext(64*mib-9, 521))},
		{name: "zeros", disk: newModel(1, 100*mib)},
		{name: "zeros, odd", disk: newModel(1, 100*mib+7)},
		{name: "last byte only", disk: newModel(1, 300*mib+1, ext(300*mib, 1))},
		{name: "sparse", disk: randomModel(3, 1<<30+511, 60, mib)},
		{name: "sparser", disk: randomModel(4, 20<<30, 10, 100*kib), huge: true},
		{name: "many small", disk: randomModel(5, 256*mib+4097, 3000, 9000)},
		// 132 GiB: more than 4096 blocks of 32 MiB, so several sector bitmap entries.
		{name: "beyond a chunk", disk: randomModel(6, 140<<30, 15, mib), huge: true},
		ends("2 TiB and more", 2*tib+33*mib+512),
		ends("10 TiB, odd", 10*tib+999),
	}
}
