package overlay

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// flatImage is an Image of bytes, with holes where whole granules are zero.
type flatImage struct {
	b   []byte
	bad extent.Extent // reads that touch it fail
}

var errBad = errors.New("bad place")

func (m *flatImage) Size() int64 { return int64(len(m.b)) }

func (m *flatImage) ReadAt(p []byte, off int64) (int, error) {
	if !extent.Intersect(m.bad, extent.Extent{Off: off, Len: int64(len(p))}).Empty() {
		return 0, errBad
	}
	return bytes.NewReader(m.b).ReadAt(p, off)
}

func (m *flatImage) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) {
		for off := int64(0); off < m.Size(); off += granularity {
			n := min(granularity, m.Size()-off)
			if !isZero(m.b[off:off+n]) && !yield(extent.Extent{Off: off, Len: n}, nil) {
				return
			}
		}
	}
}

// someImage has data in about half of its blocks.
func someImage(r *rand.Rand, size int64) *flatImage {
	m := &flatImage{b: make([]byte, size)}
	for off := int64(0); off < size; off += Block {
		if r.IntN(2) == 0 {
			fillRandom(r, m.b[off:min(off+Block, size)])
		}
	}
	return m
}

func fillRandom(r *rand.Rand, p []byte) {
	for ; len(p) >= 8; p = p[8:] {
		binary.LittleEndian.PutUint64(p, r.Uint64())
	}
	for i := range p {
		p[i] = byte(r.Uint32())
	}
}

func read(t *testing.T, d *Disk) []byte { return readInto(t, d, nil) }

// readInto is read that uses b if there is room.
func readInto(t *testing.T, d *Disk, b []byte) []byte {
	t.Helper()
	b = slices.Grow(b[:0], int(d.Size()))[:d.Size()]
	if n, err := d.ReadAt(b, 0); n != len(b) || (err != nil && err != io.EOF) {
		t.Fatalf("read: %d of %d, %v", n, len(b), err)
	}
	return b
}

// step does something at random to the disk and to what it should hold.
func step(t *testing.T, r *rand.Rand, d *Disk, want *[]byte) string {
	t.Helper()
	size := int64(len(*want))
	if size == 0 {
		if err := d.Resize(1000); err != nil {
			t.Fatal(err)
		}
		*want = make([]byte, 1000)
		return "resize"
	}
	off := r.Int64N(size)
	n := min(size-off, 1+r.Int64N([]int64{10, 600, 5000, 40000}[r.IntN(4)]))
	if r.IntN(3) == 0 {
		off, n = off/Block*Block, (n+Block-1)/Block*Block
		n = min(n, size-off)
	}
	var err error
	var what string
	switch op := r.IntN(100); {
	case op < 60:
		what = fmt.Sprintf("write %d+%d", off, n)
		p := (*want)[off : off+n]
		fillRandom(r, p)
		_, err = d.WriteAt(p, off)
	case op < 75:
		what = fmt.Sprintf("zero %d+%d", off, n)
		clear((*want)[off : off+n])
		err = d.Zero(off, n, r.IntN(2) == 0)
	case op < 85:
		what = fmt.Sprintf("trim %d+%d", off, n)
		if err = d.Trim(off, n); err != nil {
			break
		}
		end := off + n
		if end != size {
			end -= end % Block
		}
		if from := roundUp(off); from < end {
			clear((*want)[from:end])
		}
	case op < 97:
		what = "flush"
		err = d.Flush()
	default:
		to := r.Int64N(2*size + 10000)
		to = min(to, 400000)
		what = fmt.Sprintf("resize %d", to)
		err = d.Resize(to)
		grown := make([]byte, to)
		copy(grown, *want)
		*want = grown
	}
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	return what
}

// TestRandom compares an overlay with a slice of bytes, over many reopenings.
func TestRandom(t *testing.T) {
	seeds := uint64(40)
	if testing.Short() {
		seeds = 16
	}
	for seed := range seeds {
		r := rand.New(rand.NewPCG(seed, 1))
		size := r.Int64N(300000)
		if seed%4 == 0 {
			size = size / Block * Block
		}
		image := someImage(r, size)
		dir := filepath.Join(t.TempDir(), "o")
		d, err := Create(dir, image, Options{Base: "x"})
		if err != nil {
			t.Fatal(err)
		}
		want, got := bytes.Clone(image.b), []byte(nil)
		id := d.ID()
		for i := range 150 {
			what := step(t, r, d, &want)
			if got = readInto(t, d, got); !bytes.Equal(got, want) {
				t.Fatalf("seed %d, step %d, %s: differs from byte %d", seed, i, what, firstDifference(got, want))
			}
			checkLists(t, d, image, want)
			if i%25 == 24 {
				if err := d.Close(); err != nil {
					t.Fatal(err)
				}
				if d, err = Open(dir, image, Options{Base: "x"}); err != nil {
					t.Fatal(err)
				}
				if got := read(t, d); !bytes.Equal(got, want) || d.ID() != id {
					t.Fatalf("seed %d, step %d, opened again: differs from byte %d", seed, i, firstDifference(got, want))
				}
			}
		}
		d.Close()
	}
}

func firstDifference(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

// checkLists proves what Allocated and Changed promise.
func checkLists(t *testing.T, d *Disk, image *flatImage, want []byte) {
	t.Helper()
	for _, g := range []int64{512, Block, 1 << 16} {
		var end int64
		outside := func(e extent.Extent) {
			if !isZero(want[end:e.Off]) {
				t.Fatalf("granularity %d: not zero in [%d,%d), which is not allocated", g, end, e.Off)
			}
		}
		for e, err := range d.Allocated(g) {
			if err != nil || e.Off < end || e.Empty() || e.End() > int64(len(want)) || e.Off%g != 0 {
				t.Fatalf("allocated %v after %d: %v", e, end, err)
			}
			outside(e)
			end = e.End()
		}
		outside(extent.Extent{Off: int64(len(want))})

		end = 0
		same := func(e extent.Extent) {
			cut := max(end, min(e.Off, image.Size()))
			if !bytes.Equal(want[end:cut], image.b[min(end, image.Size()):min(cut, image.Size())]) || !isZero(want[cut:e.Off]) {
				t.Fatalf("granularity %d: not as the image in [%d,%d), which did not change", g, end, e.Off)
			}
		}
		for e, err := range d.Changed(g) {
			if err != nil || e.Off < end || e.Empty() || e.End() > int64(len(want)) {
				t.Fatalf("changed %v after %d: %v", e, end, err)
			}
			same(e)
			end = e.End()
		}
		same(extent.Extent{Off: int64(len(want))})
	}
}

// TestListsAreTight: what was never written is not said to be changed, and what was zeroed takes no room.
func TestListsAreTight(t *testing.T) {
	image := &flatImage{b: bytes.Repeat([]byte{1}, 100*Block)}
	d, err := Create(t.TempDir(), image, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if _, err := d.WriteAt([]byte{2}, 10*Block+5); err != nil {
		t.Fatal(err)
	}
	if err := d.Trim(20*Block, 70*Block); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(all(t, d.Changed(Block))); got != fmt.Sprint([]extent.Extent{{Off: 10 * Block, Len: Block}, {Off: 20 * Block, Len: 70 * Block}}) {
		t.Errorf("changed: %v", got)
	}
	if got := extent.Total(all(t, d.Allocated(Block))); got != 30*Block {
		t.Errorf("allocated: %d blocks", got/Block)
	}
	if got := extent.Total(all(t, d.Changed(Block))); got != 71*Block {
		t.Errorf("stored: %d blocks", got/Block)
	}
}

func all(t *testing.T, seq iter.Seq2[extent.Extent, error]) (list []extent.Extent) {
	t.Helper()
	for e, err := range seq {
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, e)
	}
	return list
}

// TestParallel: many writers, each on sectors of its own that share blocks with those of
// others. A first write to a block must not undo what somebody else wrote to it.
func TestParallel(t *testing.T) {
	const writers, sector, size = 8, 512, 64 * Block
	for round := range 20 {
		r := rand.New(rand.NewPCG(uint64(round), 2))
		image := someImage(r, size)
		d, err := Create(t.TempDir(), image, Options{})
		if err != nil {
			t.Fatal(err)
		}
		want := bytes.Clone(image.b)
		var wg sync.WaitGroup
		for w := range writers {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(round), uint64(w)))
				for range 300 {
					at := (r.IntN(size/sector/writers)*writers + w) * sector
					if r.IntN(4) == 0 {
						clear(want[at : at+sector])
						if err := d.Zero(int64(at), sector, true); err != nil {
							t.Error(err)
						}
					} else {
						fillRandom(r, want[at:at+sector])
						if _, err := d.WriteAt(want[at:at+sector], int64(at)); err != nil {
							t.Error(err)
						}
					}
					if r.IntN(20) == 0 {
						if err := d.Flush(); err != nil {
							t.Error(err)
						}
					}
					got := make([]byte, sector)
					if _, err := d.ReadAt(got, int64(at)); err != nil || !bytes.Equal(got, want[at:at+sector]) {
						t.Errorf("sector %d: %v, or not what was written", at/sector, err)
					}
				}
			})
		}
		wg.Wait()
		if got := read(t, d); !bytes.Equal(got, want) {
			t.Fatalf("round %d: differs from byte %d", round, firstDifference(got, want))
		}
		d.Close()
	}
}

// TestImageErrors: what cannot be read is an error, never zeros, and a first write of a part of a block
// that cannot be read leaves the block as it was.
func TestImageErrors(t *testing.T) {
	image := someImage(rand.New(rand.NewPCG(1, 1)), 16*Block)
	image.bad = extent.Extent{Off: 4 * Block, Len: Block}
	d, err := Create(t.TempDir(), image, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	p := make([]byte, 3*Block)
	if n, err := d.ReadAt(p, 3*Block); !errors.Is(err, errBad) || n > Block {
		t.Errorf("read: %d, %v", n, err)
	}
	if _, err := d.WriteAt(p[:100], 4*Block+7); !errors.Is(err, errBad) {
		t.Errorf("write of a part: %v", err)
	}
	if _, err := d.ReadAt(p[:1], 4*Block); !errors.Is(err, errBad) {
		t.Errorf("read after that: %v", err)
	}
	if _, err := d.WriteAt(p[:Block], 4*Block); err != nil {
		t.Errorf("write of the whole block: %v", err)
	}
	if _, err := d.ReadAt(p[:1], 4*Block); err != nil {
		t.Errorf("read of it: %v", err)
	}
}

// TestRefusals: what is not opened.
func TestRefusals(t *testing.T) {
	image := someImage(rand.New(rand.NewPCG(1, 1)), 16*Block)
	dir := t.TempDir()
	if _, err := Open(dir, image, Options{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("none: %v", err)
	}
	d, err := Create(dir, image, Options{Base: "a"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Create(dir, image, Options{Base: "a"}); !errors.Is(err, os.ErrExist) {
		t.Errorf("again: %v", err)
	}
	if _, err := Open(dir, image, Options{Base: "a"}); !errors.Is(err, ErrBusy) {
		t.Errorf("busy: %v", err)
	}
	for _, c := range [][2]int64{{-1, 1}, {16 * Block, 1}, {16*Block - 1, 2}, {1 << 62, 1 << 40}} {
		if err := d.Zero(c[0], c[1], true); !errors.Is(err, ErrRange) {
			t.Errorf("zero %v: %v", c, err)
		}
		if c[1] < 10 {
			if _, err := d.WriteAt(make([]byte, c[1]), c[0]); !errors.Is(err, ErrRange) {
				t.Errorf("write %v: %v", c, err)
			}
		}
	}
	if _, err := d.WriteAt([]byte{1}, 5); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(d.Close(), d.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := d.ReadAt(make([]byte, 1), 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
	if _, err := Open(dir, image, Options{Base: "b"}); !errors.Is(err, ErrOtherBase) {
		t.Errorf("other base: %v", err)
	}
	if _, err := Open(dir, &flatImage{b: image.b[:Block]}, Options{Base: "a"}); !errors.Is(err, ErrOtherBase) {
		t.Errorf("shorter image: %v", err)
	}
	for _, c := range []struct {
		name string
		at   int64
	}{{mapName, 100}, {mapName, 3}, {mapName, 511}} {
		flip(t, filepath.Join(dir, c.name), c.at)
		if _, err := Open(dir, image, Options{Base: "a"}); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s, byte %d: %v", c.name, c.at, err)
		}
		flip(t, filepath.Join(dir, c.name), c.at)
	}
	flip(t, filepath.Join(dir, headName), headLen+20)
	if _, err := Open(dir, image, Options{Base: "a"}); !errors.Is(err, ErrDamaged) {
		t.Errorf("head: %v", err)
	}
}

func flip(t *testing.T, name string, at int64) {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	b[at] ^= 4
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestLarge: nearly 15 TiB, of which little is written and all is trimmed.
func TestLarge(t *testing.T) {
	const size = 15<<40 - 512 // ext4 has files of up to 16 TiB
	image := holeImage(size)
	d, err := Create(t.TempDir(), image, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for _, off := range []int64{0, 3<<40 + 77, size - 5} {
		if _, err := d.WriteAt([]byte("12345"), off); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Trim(1<<40, 14<<40-512); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 5)
	for off, want := range map[int64]string{0: "12345", 3<<40 + 77: "\x00\x00\x00\x00\x00", size - 5: "\x00\x00\x00\x00\x00"} {
		if _, err := d.ReadAt(p, off); err != nil || string(p) != want {
			t.Errorf("at %d: %q, %v", off, p, err)
		}
	}
	if n := extent.Total(all(t, d.Changed(Block))); n != 3*Block-512 { // the disk ends in the last one
		t.Errorf("stored: %d", n)
	}
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
}

// holeImage is an image of zeros.
type holeImage int64

func (m holeImage) Size() int64 { return int64(m) }
func (m holeImage) ReadAt(p []byte, _ int64) (int, error) {
	clear(p)
	return len(p), nil
}

func (m holeImage) Allocated(int64) iter.Seq2[extent.Extent, error] {
	return func(func(extent.Extent, error) bool) {}
}
