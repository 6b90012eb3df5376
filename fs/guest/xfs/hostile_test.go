package xfs

import (
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// resum gives what lies around a changed byte its checksum, so that the change gets past it.
func resum(m *memory, fs *FS, off int64) {
	const block = 1024
	page := m.page(off)
	at := off % memoryPage
	b := page[at/block*block:][:block]
	r := &replayer{fs: fs}
	if i := page[at/512*512:][:512]; be.Uint16(i) == 0x494e {
		le.PutUint32(i[inodeCRC:], checksum(i, inodeCRC))
		return
	}
	if s := page[at/512*512:][:512]; string(s[:4]) == "XFSB" || string(s[:4]) == "XAGF" {
		b = s
	}
	dir := page // a block of a directory has 4 KiB here
	if m := string(dir[:4]); m == "XDB3" || m == "XDD3" {
		b = dir
	} else if m := be.Uint16(dir[8:]); m == magicLeaf1v5 || m == magicLeafNv5 {
		b = dir
	}
	if at, ok := r.stampOf(b); ok {
		le.PutUint32(b[at.crc:], checksum(b, at.crc))
	} else if string(b[:4]) == "XARM" {
		le.PutUint32(b[12:], checksum(b, 12))
	}
}

// resumLog gives all records of the log their checksums.
func resumLog(m *memory, r *ring, recs []record) {
	for _, rec := range recs {
		b, err := r.read(rec.at, rec.sectors())
		if err != nil {
			continue
		}
		head := b[:rec.heads*sector]
		off := r.off + rec.at*sector
		le.PutUint32(m.page(off)[off%memoryPage+32:], recordSum(head, b[rec.heads*sector:][:rec.size], headerBytes))
	}
}

// exercise asks a file system everything, within bounds.
func exercise(t testing.TB, fs *FS) {
	seen := 0
	buf := make([]byte, 20000)
	var visit func(ino guest.Ino, depth int)
	visit = func(ino guest.Ino, depth int) {
		if seen++; seen > 3000 || depth > 30 {
			return
		}
		st, err := fs.Stat(ino)
		if err != nil {
			return
		}
		fs.Xattrs(ino)
		fs.Readlink(ino)
		if f, err := fs.Open(ino); err == nil {
			for _, off := range []int64{0, st.Size / 2, st.Size - 100} {
				if n, err := f.ReadAt(buf, max(off, 0)); n < len(buf) && err == nil || n > len(buf) {
					t.Errorf("%d bytes without an error", n)
				}
			}
			bounded(f.Allocated(4096), 2000)
			bounded(fs.Locate(ino), 2000)
		}
		n := 0
		for e, err := range fs.ReadDir(ino, 0) {
			if n++; err != nil || n > 1000 {
				break
			}
			if n%7 == 0 {
				fs.Lookup(ino, e.Name)
			}
			visit(e.Ino, depth+1)
		}
	}
	visit(fs.Root(), 0)
	bounded(fs.Free(), 20000)
}

func bounded[K, V any](seq func(func(K, V) bool), limit int) {
	n := 0
	seq(func(K, V) bool { n++; return n < limit })
}

// hits are the sectors where a change is worth while: those that look like metadata.
func hits(b []byte) []int64 {
	var out []int64
	for at := 0; at < len(b); at += 512 {
		if be.Uint16(b[at:]) == 0x494e || b[at] == 'X' || string(b[at:at+3]) == "BMA" || b[at+8] == 0x3d || b[at+8] == 0x3b || b[at+8] == 0x3e {
			for i := range 4 {
				out = append(out, int64(at+i*512)/512*512)
			}
		}
	}
	return out
}

// A mangler makes disks of the golden one with changes that a seed or a fuzzer chooses.
type mangler struct {
	base []byte
	fs   *FS
	ring ring
	recs []record
	hits []int64
}

func newMangler(t testing.TB) *mangler {
	disk := goldenDisk(t)
	fs, err := Open(disk, guest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	m := &mangler{base: disk.base, fs: fs, hits: hits(disk.base)}
	m.ring = ring{dev: disk, size: fs.sb.logLen << fs.sb.blockLog / sector, uuid: fs.sb.uuid}
	m.ring.off, _ = fs.sb.offset(fs.sb.journal, 1)
	s, err := m.ring.stretch()
	if err != nil {
		t.Fatal(err)
	}
	for at := s.tail; at != s.head; {
		rec, err := m.ring.header(at)
		if err != nil {
			t.Fatal(err)
		}
		m.recs = append(m.recs, rec)
		at = (at + rec.sectors()) % m.ring.size
	}
	return m
}

// mangle changes a byte for every 4 bytes of how: 2 for the sector, 1 for the byte in it, and the new value. A sector is one
// of metadata, or one of the log.
func (m *mangler) mangle(how []byte) *memory {
	disk := &memory{m.base, map[int64][]byte{}}
	inLog := false
	for ; len(how) >= 4; how = how[4:] {
		n := int(be.Uint16(how))
		off := m.hits[n%len(m.hits)]
		if n&0x8000 != 0 {
			rec := m.recs[n%len(m.recs)]
			off = m.ring.off + (rec.at+int64(n>>3)%rec.sectors())%m.ring.size*sector
			inLog = true
		}
		off += int64(how[2]) * 2 % 512
		if how[3]&1 == 1 {
			off++
		}
		disk.page(off)[off%memoryPage] = how[3]
		if n&0x8000 == 0 {
			resum(disk, m.fs, off)
		}
	}
	if inLog {
		ring := m.ring
		ring.dev = disk
		resumLog(disk, &ring, m.recs)
	}
	return disk
}

// try opens a mangled disk and asks it everything.
func (m *mangler) try(t testing.TB, how []byte) {
	start := time.Now()
	fs, err := Open(m.mangle(how), guest.Options{Cache: 1 << 20, Journal: 4 << 20})
	if err == nil {
		exercise(t, fs)
	} else if !errors.Is(err, guest.ErrDamaged) && !errors.Is(err, guest.ErrUnknown) && !errors.Is(err, guest.ErrUnsupported) {
		t.Errorf("an error of another kind: %v", err)
	}
	if d := time.Since(start); d > 10*time.Second {
		t.Errorf("%v for %x", d, how)
	}
}

func TestMangled(t *testing.T) {
	m := newMangler(t)
	rng := rand.New(rand.NewPCG(5, 5))
	rounds := 800
	if testing.Short() {
		rounds = 60
	}
	for range rounds {
		how := make([]byte, 4*(1+rng.IntN(6)))
		for i := range how {
			how[i] = byte(rng.Uint32())
		}
		m.try(t, how)
	}
}

func FuzzImage(f *testing.F) {
	m := newMangler(f)
	f.Add([]byte{0, 1, 2, 3, 0x80, 4, 5, 6})
	f.Fuzz(func(t *testing.T, how []byte) {
		if len(how) < 256 {
			m.try(t, how)
		}
	})
}

func FuzzSuper(f *testing.F) {
	f.Add([]byte("XFSB"))
	f.Add(goldenDisk(f).base[:512])
	f.Fuzz(func(t *testing.T, b []byte) {
		if sb, err := parseSuper(b); err == nil && sb.blockSize == 0 {
			t.Error("no block size")
		}
	})
}

// TestTruncated opens disks that end too early.
func TestTruncated(t *testing.T) {
	base := goldenDisk(t).base
	for size := 0; size < len(base); size += 77777 {
		fs, err := Open(&memory{base[:size], map[int64][]byte{}}, guest.Options{})
		if err == nil {
			exercise(t, fs)
		}
	}
}

// TestFlipped flips single bits, without new checksums: what is shown is the truth, or an error; only the bytes of files may change.
func TestFlipped(t *testing.T) {
	m := newMangler(t)
	want := map[string]guesttest.Line{}
	for _, l := range goldenTruth(t) {
		want[l.Path] = l
	}
	rng := rand.New(rand.NewPCG(9, 9))
	rounds := 60
	if testing.Short() {
		rounds = 5
	}
	refused := 0
	for range rounds {
		disk := &memory{m.base, map[int64][]byte{}}
		off := m.hits[rng.IntN(len(m.hits))] + rng.Int64N(512)
		if off >= m.ring.off && off < m.ring.off+m.ring.size*sector {
			continue // a torn record ends the log: no error, but another truth (TestTorn)
		}
		disk.page(off)[off%memoryPage] ^= 1 << rng.IntN(8)
		fs, err := Open(disk, guest.Options{})
		if err != nil || len(fs.info.Warnings) > 0 {
			refused++
			continue
		}
		got, err := guesttest.WalkFS(fs)
		if err != nil {
			t.Fatal(err)
		}
		bad := 0
		for _, l := range got {
			if l.Fields["error"] != "" {
				bad = 1
				continue
			}
			for _, d := range guesttest.Diff([]guesttest.Line{want[l.Path]}, []guesttest.Line{l}, "sum", "id") {
				t.Errorf("a bit at %d, no error: %s", off, d)
			}
		}
		refused += bad
	}
	if refused < rounds/20 {
		t.Errorf("only %d of %d flipped bits were seen", refused, rounds)
	}
}
