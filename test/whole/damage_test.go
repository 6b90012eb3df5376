package whole

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// flip changes one byte of a file until the returned function is called.
func flip(t *testing.T, file string, off int64) (undo func()) {
	t.Helper()
	change := func() {
		f, err := os.OpenFile(file, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		var b [1]byte
		if _, err := f.ReadAt(b[:], off); err != nil {
			t.Fatal(err)
		}
		b[0] ^= 0x10
		if _, err := f.WriteAt(b[:], off); err != nil {
			t.Fatal(err)
		}
	}
	change()
	return change
}

// record is where a record is in a pack; see store/doc.go.
type record struct {
	off, body, end int64
	page           bool
}

// readPack finds the records of a pack, its table and its trailer, as store/doc.go
// describes them.
func readPack(t *testing.T, file string) (recs []record, table, trailer int64) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	trailer = int64(len(b)) - 64
	table = int64(le.Uint32(b[trailer+4:]))
	for off := int64(80); off < table; {
		r := record{off: off, body: off + 56, page: b[off+49] == 1}
		r.end = r.body + int64(le.Uint32(b[off+40:]))
		recs = append(recs, r)
		off = r.end
	}
	if n := int(le.Uint32(b[trailer:])); n != len(recs) || !bytes.HasSuffix(b, []byte("HFFOOT\r\n")) {
		t.Fatalf("%s: %d records, the trailer says %d", file, len(recs), n)
	}
	return recs, table, trailer
}

// finding is what `verify --json` says of damage.
type finding struct {
	Type   string `json:"type"`
	Point  string `json:"point"`
	Disk   string `json:"disk"`
	Offset *int64 `json:"offset"`
	What   string `json:"what"`
}

// damage runs verify, wants exit 4 and gives what it found.
func (r *repository) damage(t *testing.T, args ...string) (all []finding) {
	t.Helper()
	res := r.wants(t, 4, "damage found", append([]string{"verify", "--read-data", "--json"}, args...)...)
	for line := range strings.Lines(res.out) {
		var f finding
		if err := json.Unmarshal([]byte(line), &f); err != nil {
			t.Fatal(err)
		}
		if f.Type == "damage" {
			all = append(all, f)
		}
	}
	if len(all) == 0 {
		t.Fatalf("verify names nothing:\n%s", res.out)
	}
	return all
}

const smallChunk = 64 << 10

// damaged is a repository with two points of "hit", whose pack is damaged, and one of another VM.
type damaged struct {
	*repository
	hit, also, other kept
	file             string // that hit was made of
	pack             string // with hit's chunks; also shares them all
	records          []record
	table, trailer   int64
}

func newDamaged(t *testing.T, args ...string) *damaged {
	t.Helper()
	d := &damaged{repository: newRepository(t, append([]string{"--chunk-size", "64K"}, args...)...)}
	dir := newDir(t)
	disk := newText(t, dir+"/d.raw", 9, 10*smallChunk)
	newRaw(t, dir+"/d2.raw", 20*smallChunk, piece{12 * smallChunk, 3*smallChunk + 7})
	tool(t, "dd", "if="+disk.file, "of="+dir+"/d2.raw", "conv=notrunc", "status=none")
	d.file = dir + "/d2.raw"
	d.hit = d.keep(t, "hit", d.file)
	packs, err := filepath.Glob(d.dir + "/packs/*")
	if err != nil || len(packs) != 1 {
		t.Fatalf("packs %q, %v", packs, err)
	}
	d.pack = packs[0]
	d.records, d.table, d.trailer = readPack(t, d.pack)
	d.also = d.keep(t, "hit", dir+"/d2.raw")
	d.other = d.keep(t, "other", newText(t, dir+"/other.raw", 10, 5*smallChunk+1).file)
	return d
}

// readsAround reads a mounted disk chunk by chunk and gives the offsets that fail
// with EIO. All others must be right.
func readsAround(t *testing.T, file string, want string) (bad []int64) {
	t.Helper()
	source, err := os.ReadFile(want)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_DIRECT, 0) // no read-ahead over the edge
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for off := int64(0); off < int64(len(source)); off += smallChunk {
		b := make([]byte, min(smallChunk, int64(len(source))-off))
		n, err := f.ReadAt(b, off)
		switch {
		case errors.Is(err, syscall.EIO):
			bad = append(bad, off)
		case err != nil && err != io.EOF:
			t.Errorf("%s at %d: %v", file, off, err)
		case n < len(b) || !bytes.Equal(b, source[off:off+int64(n)]):
			t.Errorf("%s at %d: %d bytes, and wrong", file, off, n)
		}
	}
	return bad
}

// lost wants that a point cannot be restored: exit 4 and no file.
func (r *repository) lost(t *testing.T, k kept) {
	t.Helper()
	out := filepath.Join(newDir(t), "out")
	r.wants(t, 4, "damaged", "restore", k.ID, "--to", out)
	if left, _ := os.ReadDir(out); len(left) > 0 {
		t.Errorf("the failed restore left %v", left)
	}
}

// withoutIndex makes the next run build the index anew.
func (r *repository) withoutIndex(t *testing.T) {
	t.Helper()
	if err := os.RemoveAll(r.dir + "/index"); err != nil {
		t.Fatal(err)
	}
}

// TestDamagedChunk flips bytes in every part of a chunk's record.
func TestDamagedChunk(t *testing.T) {
	needs(t, "fuse")
	for name, args := range map[string][]string{"encrypted": nil, "plain": {"--no-encryption"}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := newDamaged(t, args...)
			seen := map[int64]bool{}
			for i, rec := range d.records {
				if rec.page {
					continue
				}
				// A different part of each record: magic, sum, id, lengths, codec, kind, spare,
				// slot, the body's first, middle and last byte.
				parts := []int64{0, 4, 20, 40, 44, 48, 49, 51, 52, 56, (rec.end-rec.off)/2 + 28, rec.end - rec.off - 1}
				part := parts[i%len(parts)]
				undo := flip(t, d.pack, rec.off+part)
				named := map[string][]int64{}
				for _, f := range d.damage(t) {
					if f.Offset == nil {
						t.Errorf("record %d: no place in %+v", i, f)
						continue
					}
					named[f.Point+"/"+f.Disk] = append(named[f.Point+"/"+f.Disk], *f.Offset)
				}
				where := named[d.hit.path()+"/disk0"]
				if config := named[d.hit.path()+"/config/imagefile.json"]; len(config) > 0 && len(where) == 0 {
					undo()
					continue
				}
				if len(where) != 1 || len(named) != 2 || len(named[d.also.path()+"/disk0"]) != 1 {
					t.Fatalf("record %d: verify names %v", i, named)
				}
				if seen[where[0]] {
					t.Errorf("offset %d is named for two records", where[0])
				}
				seen[where[0]] = true
				m := d.mount(t)
				if part == 4 && args == nil {
					// Only the sum is wrong: the tag proves the bytes, so they are given.
					where = nil
				}
				for _, k := range []kept{d.hit, d.also} {
					if bad := readsAround(t, filepath.Join(m.dir, k.path(), "disk0.raw"), k.copy); fmt.Sprint(bad) != fmt.Sprint(where) {
						t.Errorf("record %d: EIO at %v, verify says %v", i, bad, where)
					}
				}
				if len(where) > 0 && !strings.Contains(m.err.String(), fmt.Sprintf("%s disk0 at offset %d", d.hit.path(), where[0])) {
					t.Errorf("the mount does not name the place:\n%s", m.err.String())
				}
				tool(t, "cmp", d.other.copy, m.dir+"/other/latest/disk0.raw")
				m.stop(t, terminate)
				if i < 4 && len(where) > 0 {
					d.lost(t, d.hit)
					d.damage(t, d.hit.path())
					d.must(t, "verify", "--read-data", d.other.path())
				}
				d.reads(t, d.other)
				undo()
			}
			if len(seen) != 14 {
				t.Errorf("%d chunks of the disk were hit, it has 14", len(seen))
			}
			d.must(t, "verify", "--read-data")
			d.intact(t, d.hit, d.also, d.other)
		})
	}
}

// TestDamagedPack flips bytes where they cost no data: in the header, the table
// and the trailer of a pack. Everything still reads, even from an index made anew.
func TestDamagedPack(t *testing.T) {
	needs(t)
	t.Parallel()
	d := newDamaged(t)
	for _, off := range []int64{0, 8, 12, 20, 40, 70, 79, d.table, d.table + 33, d.table + 43, d.trailer - 1,
		d.trailer, d.trailer + 4, d.trailer + 10, d.trailer + 30, d.trailer + 63} {
		undo := flip(t, d.pack, off)
		check := func() {
			found := d.damage(t)
			if !strings.Contains(found[0].What, "pack "+filepath.Base(d.pack)) {
				t.Errorf("byte %d: verify names %+v", off, found)
			}
			d.intact(t, d.hit, d.also, d.other)
		}
		check()
		d.withoutIndex(t)
		check()
		undo()
		d.withoutIndex(t)
	}
	d.must(t, "verify", "--read-data")
}

// TestDamagedPage flips a byte of a chunk map.
func TestDamagedPage(t *testing.T) {
	needs(t, "fuse")
	t.Parallel()
	d := newDamaged(t)
	for i, rec := range d.records {
		if !rec.page {
			continue
		}
		undo := flip(t, d.pack, rec.body+40)
		found := d.damage(t)
		for _, f := range found {
			if !strings.HasPrefix(f.Point, "hit/") || f.Disk == "" {
				t.Errorf("page of record %d: verify names %+v", i, f)
			}
		}
		d.reads(t, d.hit) // the index has the page, too
		d.withoutIndex(t)
		d.reads(t, d.other)
		d.damage(t)
		if found[0].Disk == "disk0" {
			d.lost(t, d.hit)
			m := d.mount(t)
			if _, err := os.ReadFile(filepath.Join(m.dir, d.hit.path(), "disk0.raw")); !errors.Is(err, syscall.EIO) {
				t.Errorf("reading through a damaged page: %v", err)
			}
			tool(t, "cmp", d.other.copy, m.dir+"/other/latest/disk0.raw")
			m.stop(t, terminate)
		}
		undo()
		d.withoutIndex(t)
	}
	d.intact(t, d.hit, d.also, d.other)
	d.must(t, "verify", "--read-data")
}

// TestDamagedManifest: verify names the point, all others read, and `latest` leads
// to one that is whole.
func TestDamagedManifest(t *testing.T) {
	needs(t)
	t.Parallel()
	d := newDamaged(t)
	file := filepath.Join(d.dir, "points", d.also.ID)
	st, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{0, 9, 15, 32, 48, 64, 72, st.Size() / 2, st.Size() - 1} {
		d.must(t, "points") // the index knows it
		undo := flip(t, file, off)
		for _, index := range []string{"known", "anew"} {
			if index == "anew" {
				d.withoutIndex(t)
			}
			found := d.damage(t)
			if len(found) != 1 || !strings.Contains(found[0].What, d.also.ID) || index == "known" && found[0].Point != d.also.path() {
				t.Errorf("byte %d: verify names %+v", off, found)
			}
			d.lost(t, d.also)
			d.reads(t, d.hit)
			d.reads(t, d.other)
			listed := d.points(t)
			if len(listed) != 3 {
				t.Errorf("byte %d: %d points are listed", off, len(listed))
			}
			if index == "known" {
				continue
			}
			if listed[0].Damaged == "" { // without its name it comes first
				t.Errorf("byte %d: the list does not say so: %+v", off, listed)
			}
			if out := d.must(t, "show", "hit/latest", "--json").out; !strings.Contains(out, d.hit.ID) {
				t.Errorf("latest is %s", out)
			}
		}
		// A backup does without it.
		if off == 0 {
			p, _ := d.backup(t, "--vm", "next", d.hit.copy)
			d.reads(t, kept{p, d.hit.copy})
			if err := os.Remove(filepath.Join(d.dir, "points", p.ID)); err != nil {
				t.Fatal(err)
			}
		}
		undo()
		d.withoutIndex(t)
	}
	d.intact(t, d.hit, d.also, d.other)
}

// TestDamagedAnywhere flips bytes anywhere in a repository: verify always sees it,
// and no restore ever gives wrong bytes.
func TestDamagedAnywhere(t *testing.T) {
	needs(t)
	t.Parallel()
	d := newDamaged(t)
	all := []kept{d.hit, d.also, d.other}
	var files []string
	for _, pattern := range []string{"/packs/*", "/points/*", "/config*"} {
		list, err := filepath.Glob(d.dir + pattern)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, list...)
	}
	rnd := rand.New(rand.NewPCG(11, 7))
	for i := range 40 {
		file := files[i%len(files)]
		st, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		off := rnd.Int64N(st.Size())
		undo := flip(t, file, off)
		if i%5 == 4 {
			d.withoutIndex(t)
		}
		found := d.damage(t)
		name := filepath.Base(file)
		if f := found[0]; f.Point == "" && !strings.Contains(f.What, name) {
			t.Errorf("%s at %d: verify names %+v", name, off, f)
		}
		out := newDir(t)
		k := all[i%len(all)]
		switch res := d.run(t, "restore", k.ID, "--to", out); res.code {
		case 0:
			tool(t, "cmp", k.copy, out+"/disk0.raw")
		case 4:
			gone(t, out+"/disk0.raw", out+"/disk0.raw.partial")
		default:
			t.Errorf("%s at %d: restore ended with %d:\n%s", name, off, res.code, res.err)
		}
		undo()
		if i%5 == 4 {
			d.withoutIndex(t) // it knows of the damage, which is gone
		}
	}
	d.intact(t, all...)
	d.must(t, "verify", "--read-data")
}
