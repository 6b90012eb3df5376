package vdisk

import (
	"bytes"
	"encoding/binary"
	"io"
	"iter"
	"testing"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// qcowReport is what checkQCOW2 found in a file that obeys its specification.
type qcowReport struct {
	disk   int64 // bytes
	mapped int64 // clusters of the disk that are in the file
}

// checkQCOW2 holds a qcow2 without snapshots and backing file against the qcow2
// specification ("Header", "Host cluster management", "Cluster mapping"), and
// to stricter rules of ours: version 3, clusters of 64 KiB, whole clusters only,
// and no padding but zeros. It shares no constant with the code it checks.
func checkQCOW2(r io.ReaderAt, size int64) (rep qcowReport, err error) {
	defer func() {
		if e, ok := recover().(vhdxError); ok {
			err = e
		}
	}()
	c := &qcowChecker{vhdxChecker: vhdxChecker{r: r, size: size}}
	c.must(size%65536 == 0 && size > 0, "file of %d bytes", size)
	c.refs = make([]byte, size/65536)
	c.header()
	c.mapping(&rep)
	c.refcounts()
	rep.disk = c.disk
	return rep, nil
}

type qcowChecker struct {
	vhdxChecker
	disk               int64
	l1, l1Entries      int64
	refTable, refCount int64  // offset, clusters
	refs               []byte // references per cluster of the file
}

// use notes a reference to a cluster.
func (c *qcowChecker) use(at int64, what string) {
	c.must(at > 0 && at%65536 == 0 && at < c.size, "%s at %d", what, at)
	c.must(c.refs[at/65536] == 0, "%s at %d, where something else is", what, at)
	c.refs[at/65536] = 1
}

func (c *qcowChecker) header() {
	b := c.read(0, 65536)
	c.refs[0] = 1
	be := binary.BigEndian
	c.must(string(b[:4]) == "QFI\xfb" && be.Uint32(b[4:]) == 3, "magic or version")
	c.zero(b[8:20], "backing file")
	c.must(be.Uint32(b[20:]) == 16, "cluster bits")
	c.disk = int64(be.Uint64(b[24:]))
	c.must(c.disk%512 == 0, "disk of %d bytes", c.disk)
	c.zero(b[32:36], "encryption")
	c.l1Entries, c.l1 = int64(be.Uint32(b[36:])), int64(be.Uint64(b[40:]))
	c.refTable, c.refCount = int64(be.Uint64(b[48:])), int64(be.Uint32(b[56:]))
	c.zero(b[60:72], "snapshots")
	c.zero(b[72:96], "features")
	c.must(be.Uint32(b[96:]) == 4 && be.Uint32(b[100:]) == 104, "refcount order or header length")
	c.zero(b[104:], "space after the header")
	c.must(c.refCount > 0 && c.refCount*65536 <= 8<<20, "refcount table of %d clusters", c.refCount)
	for i := range c.refCount {
		c.use(c.refTable+i*65536, "refcount table")
	}
	c.must(c.l1Entries*8 <= 32<<20, "L1 table of %d entries", c.l1Entries)
	for i := range (c.l1Entries*8 + 65535) / 65536 {
		c.use(c.l1+i*65536, "L1 table")
	}
}

// table reads n u64 and checks that what follows to the end of the cluster is 0.
func (c *qcowChecker) table(at, n int64) []byte {
	b := c.read(at, (n*8+65535)/65536*65536)
	c.zero(b[n*8:], "space after a table")
	return b[:n*8]
}

func (c *qcowChecker) mapping(rep *qcowReport) {
	clusters := (c.disk + 65535) / 65536
	c.must(c.l1Entries == (clusters+8191)/8192, "L1 table of %d entries for %d clusters", c.l1Entries, clusters)
	if c.l1Entries == 0 {
		return
	}
	l1 := c.table(c.l1, c.l1Entries)
	empty := make([]byte, 65536)
	for i := range c.l1Entries {
		e := binary.BigEndian.Uint64(l1[8*i:])
		if e == 0 {
			continue
		}
		c.must(e>>63 == 1 && e&0x7f000000000001ff == 0, "L1 entry %x", e)
		at := int64(e &^ (1 << 63))
		c.use(at, "L2 table")
		l2 := c.read(at, 65536)
		if bytes.Equal(l2, empty) {
			continue
		}
		for k := range int64(8192) {
			e := binary.BigEndian.Uint64(l2[8*k:])
			if e == 0 {
				continue
			}
			c.must(i*8192+k < clusters, "entry for cluster %d of a disk of %d", i*8192+k, clusters)
			c.must(e>>63 == 1 && e&0x7f000000000001ff == 0, "L2 entry %x", e)
			c.use(int64(e&^(1<<63)), "data")
			rep.mapped++
		}
	}
}

// refcounts are 1 for what is referenced and 0 for all else: no leaks.
func (c *qcowChecker) refcounts() {
	table := c.read(c.refTable, c.refCount*65536)
	blocks := (c.size/65536 + 32767) / 32768
	var at []int64
	for i := range c.refCount * 8192 {
		e := int64(binary.BigEndian.Uint64(table[8*i:]))
		c.must((e != 0) == (i < blocks), "refcount block %d of %d at %d", i, blocks, e)
		if e != 0 {
			c.use(e, "refcount block")
			at = append(at, e)
		}
	}
	want, refs := make([]byte, 65536), c.refs
	for i, off := range at {
		clear(want)
		for k, r := range refs[:min(32768, len(refs))] {
			want[2*k+1] = r
		}
		refs = refs[min(32768, len(refs)):]
		got := c.read(off, 65536)
		k := mismatch(got, want)
		c.must(k < 0, "refcount of cluster %d is wrong", int64(i)*32768+int64(k)/2)
	}
}

func TestQCOW2Structure(t *testing.T) {
	for _, l := range layouts() {
		for _, make := range []func(Source) (File, error){QCOW2, QCOW2Sparse} {
			f, err := make(l.disk)
			if err != nil {
				t.Fatal(err)
			}
			rep, err := checkQCOW2(f, f.Size())
			if err != nil {
				t.Fatalf("%s: %v", l.name, err)
			}
			want := qcowReport{disk: roundUp(l.disk.size, 512)}
			for _, e := range allocated(t, l.disk, 65536) {
				want.mapped += divUp(e.Len, 65536)
			}
			if rep != want {
				t.Errorf("%s: %+v, want %+v", l.name, rep, want)
			}
		}
	}
}

func TestQCOW2ChecksCanFail(t *testing.T) {
	disk := newModel(1, 3<<30, ext(0, 70*mib), ext(2<<30, 5*mib))
	f, err := QCOW2Sparse(disk)
	if err != nil {
		t.Fatal(err)
	}
	const c = 65536
	l1, refs, l2 := int64(2*c), int64(3*c), int64(5*c) // 2 refcount blocks
	for _, b := range []struct {
		name string
		off  int64
		flip byte
	}{
		{"magic", 0, 1}, {"version", 7, 1}, {"disk", 26, 1}, {"feature", 79, 4}, {"after the header", 500, 1},
		{"refcount table", c + 6, 1}, {"another refcount block", c + 8*2 + 5, 1},
		{"L1 flag", l1, 0x80}, {"L1 place", l1 + 5, 1}, {"L1 place twice", l1 + 8 + 5, 1}, {"space after the L1 table", l1 + 8*6 + 5, 1},
		{"refcount 0", refs + 1, 1}, {"refcount of data", refs + 2*15 + 1, 1}, {"a leak", refs + 2*5000 + 1, 1}, {"refcount past the end", refs + 2*c - 1, 1},
		{"L2 flag", l2, 0x80}, {"L2 place", l2 + 8 + 5, 1}, {"data dropped", l2 + 5, 0xff}, {"L2 entry in a hole", l2 + 8*5000 + 5, 1},
	} {
		if _, err := checkQCOW2(&flipped{f, b.off, b.flip}, f.Size()); err == nil {
			t.Errorf("%s: not noticed", b.name)
		} else {
			t.Logf("%s: %v", b.name, err)
		}
	}
}

// askedFor notes where its map was asked for.
type askedFor struct {
	*model
	from, to int64 // of what was listed
	walks    int
}

func (a *askedFor) AllocatedFrom(off, granularity int64) iter.Seq2[extent.Extent, error] {
	a.walks++
	a.from = min(a.from, off)
	return func(yield func(extent.Extent, error) bool) {
		for e, err := range allocatedFrom(a.model, off, granularity) {
			a.to = max(a.to, e.End())
			if !yield(e, err) {
				return
			}
		}
	}
}

// Making a sparse qcow2 asks the disk nothing, whatever its size, and a read of
// its tables asks for the part that they speak of.
func TestQCOW2SparseIsLazy(t *testing.T) {
	var data []extent.Extent
	for off := int64(0); off < 10*tib; off += 64 * mib {
		data = append(data, ext(off, 100*kib))
	}
	disk := &askedFor{model: newModel(1, 10*tib, data...), from: 1 << 62}
	if n := testing.AllocsPerRun(5, func() { QCOW2Sparse(disk) }); n > 100 {
		t.Errorf("making one takes %v allocations", n)
	}
	file, err := QCOW2Sparse(disk)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 65536)
	f := file.(*inPlace)
	for off := int64(0); off < f.maps[0].Off; off += c64 {
		f.ReadAt(p, off) // header, refcount table, L1 table
	}
	if disk.walks != 0 || disk.model.walks.Load() != 0 || disk.reads.Load() != 0 {
		t.Error("making one, or opening it, asks the disk")
	}
	for _, i := range []int64{0, 7, 20000} {
		disk.from, disk.to, disk.walks = 1<<62, 0, 0
		f.ReadAt(p, f.maps[1].Off+i*c64)
		if disk.walks != 1 || disk.from < i<<29 || disk.to > (i+1)<<29+64*mib+128*kib {
			t.Errorf("L2 table %d: %d walks from %d to %d", i, disk.walks, disk.from, disk.to)
		}
	}
	disk.reads.Store(0)
	if n := testing.AllocsPerRun(10, func() { f.ReadAt(p, f.data+5*tib) }); n != 0 || disk.reads.Load() != 11 {
		t.Errorf("data: %v allocations, %d reads", n, disk.reads.Load())
	}
	// An error of the listing is an error of the table, and of nothing else.
	bad, err := QCOW2Sparse(listing{disk.model, failed(errBadSector)})
	if err != nil {
		t.Fatal(err)
	}
	if n, err := bad.ReadAt(p, f.maps[1].Off); n != 0 || err == nil {
		t.Error(n, err)
	}
	if _, err := bad.ReadAt(p, f.data); err != nil {
		t.Error(err)
	}
}

const c64 = 65536
