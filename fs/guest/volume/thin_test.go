package volume

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// TestThinTrees: mappings in trees of several levels, as thin_restore writes them; and no mapping is wrong when bytes are.
func TestThinTrees(t *testing.T) {
	guesttest.Needs(t, "thin_restore", "thin_dump")
	rnd := rand.New(rand.NewPCG(9, 9))
	const data = 1 << 20 // blocks
	want := map[uint64]map[uint64]uint64{}
	var xml strings.Builder
	fmt.Fprintf(&xml, "<superblock uuid=\"\" time=\"3\" transaction=\"7\" version=\"2\" data_block_size=\"128\" nr_data_blocks=\"%d\">\n", data)
	next := uint64(5)
	for _, dev := range []uint64{0, 1, 7, 1<<24 - 1} {
		want[dev] = map[uint64]uint64{}
		var maps strings.Builder
		block := uint64(0)
		for range 30000 {
			block += 1 + uint64(rnd.IntN(3))*uint64(rnd.IntN(1000))
			next += 1 + uint64(rnd.IntN(3))
			want[dev][block] = next
			fmt.Fprintf(&maps, "<single_mapping origin_block=\"%d\" data_block=\"%d\" time=\"%d\"/>\n", block, next, rnd.IntN(4))
		}
		fmt.Fprintf(&xml, "<device dev_id=\"%d\" mapped_blocks=\"%d\" transaction=\"1\" creation_time=\"0\" snap_time=\"2\">\n%s</device>\n", dev, len(want[dev]), maps.String())
	}
	xml.WriteString("</superblock>\n")
	in := filepath.Join(t.TempDir(), "xml")
	if err := os.WriteFile(in, []byte(xml.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	image := guesttest.Sparse(t, 32<<20)
	guesttest.Run(t, "thin_restore", "-i", in, "-o", image)

	meta, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	if wrong, damaged := thinWrong(t, meta, want, 1); wrong != 0 || damaged != 0 {
		t.Errorf("%d mappings wrong, %d damaged", wrong, damaged)
	}
	total := 0
	for range 30 {
		// In what the trees use: blocks with a node's flags.
		bad := append([]byte(nil), meta...)
		for range 20 {
			bad[rnd.IntN(6<<20)] ^= 1 << rnd.IntN(8)
		}
		wrong, damaged := thinWrong(t, bad, want, 17)
		if wrong != 0 {
			t.Errorf("%d mappings wrong after damage", wrong)
		}
		total += damaged
	}
	if total == 0 {
		t.Error("the damage hit nothing")
	}
}

// thinWrong looks mappings up, one in step, and counts those that are wrong and those that are damaged.
func thinWrong(t *testing.T, meta []byte, want map[uint64]map[uint64]uint64, step int) (wrong, damaged int) {
	t.Helper()
	p, err := openPool(whole{memory(meta), 0}, whole{memory{}, 0}, 0)
	if err != nil {
		return 0, 1
	}
	n := 0
	for dev, blocks := range want {
		root, ok, err := p.lookup(p.mappings, dev)
		if errors.Is(err, guest.ErrDamaged) {
			damaged++
			continue
		}
		if !ok || err != nil {
			t.Fatal(dev, ok, err)
		}
		for block, at := range blocks {
			if n++; n%step != 0 {
				continue
			}
			value, ok, err := p.lookup(root, block)
			_, hole, err2 := p.lookup(root, block+1)
			_, mapped := blocks[block+1]
			switch {
			case errors.Is(err, guest.ErrDamaged) || errors.Is(err2, guest.ErrDamaged):
				damaged++
			case err != nil || err2 != nil || !ok || value>>24 != at || hole != mapped:
				wrong++
			}
		}
	}
	return wrong, damaged
}

// TestConcurrent reads a degraded array below encryption by many at a time, for the race detector.
func TestConcurrent(t *testing.T) {
	legs := legsOf(5, 1, 3)
	for i, l := range legs {
		if l.dev != nil {
			rnd := rand.New(rand.NewPCG(1, uint64(i)))
			for b := l.dev.(whole).Device.(memory)[:1<<20]; len(b) > 0; b = b[1:] {
				b[0] = byte(rnd.Uint32())
			}
		}
	}
	dev, err := newParity(legs, 1<<20, 64<<10, 6, leftSymmetric)
	if err != nil {
		t.Fatal(err)
	}
	h := &luksHeader{cipher: "aes-cbc-essiv:sha256", sector: 512}
	plain, err := h.device(dev, make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, plain.Size())
	if _, err := plain.ReadAt(want, 0); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(2, uint64(i)))
			b := make([]byte, 20000)
			for range 50 {
				off := rnd.Int64N(plain.Size() - int64(len(b)))
				if _, err := plain.ReadAt(b, off); err != nil || !bytes.Equal(b, want[off:off+int64(len(b))]) {
					t.Error(off, err)
				}
			}
		})
	}
	wg.Wait()
}

// TestNotPlain: what is at several places, or at none of its own, has no map.
func TestNotPlain(t *testing.T) {
	mirror, err := newMirror(legsOf(2), 1<<20)
	parity, err2 := newParity(legsOf(3), 1<<20, 64<<10, 5, leftSymmetric)
	both, err3 := striped([]place{{mirror, 0, 1 << 20}, {parity, 0, 1 << 20}}, 4096)
	if err := errors.Join(err, err2, err3); err != nil {
		t.Fatal(err)
	}
	for _, dev := range []device{mirror, parity, both, shared(whole{make(memory, 4096), 0})} {
		v := Volume{dev: dev}
		if at, err := v.Map(0, 4096); !errors.Is(err, ErrNotPlain) {
			t.Errorf("%v, %v", at, err)
		}
	}
}

// faulty fails to read from some byte on, below another.
type faulty struct {
	memory
	from, to int64
}

var errBroken = errors.New("broken")

func (f faulty) ReadAt(p []byte, off int64) (int, error) {
	if off < f.to && off+int64(len(p)) > f.from {
		return 0, errBroken
	}
	return f.memory.ReadAt(p, off)
}

// TestUnreadable: a disk that cannot be read is one that says so, not an empty one.
func TestUnreadable(t *testing.T) {
	for _, from := range []int64{0, 512, 1024, 60 << 10} {
		disk := faulty{make(memory, 1<<20), from, from + 512}
		if got, _ := byName(Scan([]Disk{{"d", disk}}, Options{})); len(got) != 1 || !errors.Is(got["d"].Err, errBroken) || got["d"].Device != nil {
			t.Errorf("%d: %+v", from, got)
		}
	}
}

// TestLogicalLoop: a chain of EBRs that comes back to itself ends, with a warning.
func TestLogicalLoop(t *testing.T) {
	disk := make(memory, 1<<20)
	entry := func(at, i int, kind, start, count byte) {
		e := disk[at*512+446+16*i:]
		e[4], e[8], e[12] = kind, start, count
		disk[at*512+510], disk[at*512+511] = 0x55, 0xaa
	}
	entry(0, 0, 5, 10, 200)
	entry(10, 0, 0x83, 1, 5)
	entry(10, 1, 5, 20, 5)
	entry(30, 0, 0x83, 1, 5)
	entry(30, 1, 5, 0, 5) // back to the first: relative to the extended partition
	got, warnings := byName(Scan([]Disk{{"d", disk}}, Options{}))
	if len(got) != 2 || got["d/p5"].Device == nil || got["d/p6"].Device == nil || len(warnings) != 1 || !strings.Contains(warnings[0], "comes back") {
		t.Errorf("%+v %v", got, warnings)
	}
}
