package exfat

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/cluster"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

type memory = guesttest.Memory

var images sync.Map // name => []byte

// golden is a copy of a volume.
func golden(t testing.TB, name string) memory {
	t.Helper()
	b, ok := images.Load(name)
	if !ok {
		b = guesttest.Unpack(t, name+".img")
		images.Store(name, b)
	}
	return bytes.Clone(b.([]byte))
}

func opened(t testing.TB, m memory) *FS {
	t.Helper()
	f, err := Open(m, guest.Options{})
	must(t, err)
	return f
}

func at(t testing.TB, f *FS, path string) guest.Ino {
	t.Helper()
	ino, err := guesttest.Find(f, path)
	must(t, err)
	return ino
}

// visit asks a volume everything, with an end to it.
func visit(t testing.TB, dev guest.Device) {
	t.Helper()
	f, err := Open(dev, guest.Options{Cache: 1 << 20})
	if err != nil {
		return
	}
	done := make(chan error, 1)
	go func() {
		lines, err := guesttest.WalkFS(f)
		for range f.Free() {
		}
		for n := range guest.Ino(80) {
			for range f.Locate(n + guest.Ino(f.geo.heap/32)<<1) {
			}
			f.Lookup(n, "x")
		}
		if len(lines) > 20000 {
			err = fmt.Errorf("%d lines", len(lines))
		}
		done <- err
	}()
	select {
	case err := <-done:
		if err != nil && !strings.Contains(err.Error(), "listed twice") {
			t.Error(err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("does not end")
	}
}

// reseal makes checksums match again: those of the boot region, and of each set of entries.
func reseal(m memory) {
	g, err := parseBoot(m)
	if err != nil {
		return
	}
	if covered := m[:min((bootSectors-1)*g.sector, int64(len(m)))]; len(covered) > 512 {
		sum := checksum32(checksum32(checksum32(0, covered[:106]), covered[108:112]), covered[113:])
		for last := m[len(covered):min(bootSectors*g.sector, int64(len(m)))]; len(last) >= 4; last = last[4:] {
			le.PutUint32(last, sum)
		}
	}
	for off := g.heap; off >= 0 && off+32 <= int64(len(m)); off += 32 {
		b := m[off:]
		if n := (int(b[1]) + 1) * 32; b[0] == entryFile && n <= len(b) && b[32] == entryStream {
			le.PutUint16(b[2:], checksum16(checksum16(0, b[:2]), b[4:n]))
		}
	}
}

// mutate changes bytes of the metadata; half of the time, checksums match.
func mutate(m memory, rng *rand.Rand) {
	g, err := parseBoot(m)
	if err != nil {
		return
	}
	var slots []int
	for off := int(g.heap); off+32 <= len(m); off += 32 {
		if m[off] == entryFile || m[off] == entryStream || m[off] == entryUpcase || m[off] == entryBitmap {
			slots = append(slots, off)
		}
	}
	for range 1 + rng.IntN(20) {
		off := slots[rng.IntN(len(slots))] + rng.IntN(32)
		switch rng.IntN(8) {
		case 0:
			off = 64 + rng.IntN(60)
		case 1, 2:
			off = int(g.table) + rng.IntN(2000)
		case 3:
			off = int(g.heap) + rng.IntN(20000)
		}
		for i := range 1 + rng.IntN(4) {
			switch rng.IntN(3) {
			case 0:
				m[off+i] ^= 1 << rng.IntN(8)
			case 1:
				m[off+i] = byte(rng.Uint32())
			case 2:
				m[off+i] = []byte{0, 0xff, 0x10, 1, 2, 3, 5, 0x85}[rng.IntN(8)]
			}
		}
	}
	if rng.IntN(2) == 0 {
		reseal(m)
	}
}

func TestHostile(t *testing.T) {
	rounds := 500
	if testing.Short() {
		rounds = 50
	}
	for _, name := range goldens {
		for seed := range uint64(rounds) {
			m := golden(t, name)
			mutate(m, rand.New(rand.NewPCG(seed, 11)))
			if visit(t, m); t.Failed() {
				t.Fatal(name, " seed ", seed)
			}
		}
		m := golden(t, name)
		for n := 0; n < len(m); n += len(m)/40 + 100 {
			visit(t, m[:n])
		}
	}
}

func FuzzVolume(f *testing.F) {
	f.Add(uint64(1), uint64(2))
	f.Fuzz(func(t *testing.T, a, b uint64) {
		m := golden(t, goldens[a%2])
		mutate(m, rand.New(rand.NewPCG(a, b)))
		visit(t, m)
	})
}

func FuzzBoot(f *testing.F) {
	f.Add([]byte("\xeb\x76\x90EXFAT   "))
	f.Fuzz(func(t *testing.T, b []byte) {
		g, err := parseBoot(append(b, make([]byte, 512)...))
		if err == nil && (g.clusters <= 0 || g.heap+g.clusters*g.cluster > g.size) {
			t.Fatalf("%+v", g)
		}
	})
}

func FuzzUpcase(f *testing.F) {
	f.Add([]byte("\xff\xff\x61\x00A\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if u, err := parseUpcase(b); err == nil && len(u) > 1<<16 {
			t.Fatal(len(u))
		}
	})
}

// slots are entries in memory.
type slots []byte

func (s *slots) Next() ([]byte, error) {
	if len(*s) < cluster.SlotSize {
		return nil, nil
	}
	b := (*s)[:cluster.SlotSize]
	*s = (*s)[cluster.SlotSize:]
	return b, nil
}

func FuzzSet(f *testing.F) {
	f.Add(make([]byte, 96))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < 3*cluster.SlotSize {
			return
		}
		b = bytes.Clone(b[:min(len(b), 256*cluster.SlotSize)&^(cluster.SlotSize-1)])
		n := min((int(b[1])+1)*cluster.SlotSize, len(b))
		le.PutUint16(b[2:], checksum16(checksum16(0, b[:2]), b[4:n]))
		rest := slots(b[cluster.SlotSize:])
		if s, err := readSet(b[:cluster.SlotSize], &rest); err == nil && (s.name == "" || s.valid() > s.size()) {
			t.Fatalf("%+v", s)
		}
	})
}

// TestDamage: an entry whose checksum does not match is damage, and the others are shown.
func TestDamage(t *testing.T) {
	for _, name := range goldens {
		m := golden(t, name)
		f := opened(t, m)
		want, err := guesttest.WalkFS(f)
		must(t, err)
		ino := at(t, f, "size 513")
		m[int64(ino>>1)*32+14] ^= 1
		f = opened(t, m)
		if _, err := f.Stat(ino); !errors.Is(err, guest.ErrDamaged) {
			t.Error(err)
		}
		if _, err := f.Lookup(rootIno, "size 513"); !errors.Is(err, guest.ErrDamaged) {
			t.Error(err)
		}
		got, err := guesttest.WalkFS(f)
		must(t, err)
		if len(got) != len(want)-1 || got[0].Fields["error"] == "" {
			t.Errorf("%d lines of %d, %q", len(got), len(want), got[0].Fields["error"])
		}
	}
}

// TestBootRegion: a damaged one gives way to its copy.
func TestBootRegion(t *testing.T) {
	for _, off := range []int{0, 96, 300, 600, 11*512 + 4} {
		m := golden(t, "c4096")
		want, err := guesttest.WalkFS(opened(t, m))
		must(t, err)
		m[off] ^= 0x40
		f := opened(t, m)
		got, err := guesttest.WalkFS(f)
		must(t, err)
		guesttest.Same(t, want, got)
		// What a jump is does not matter to who does not boot it, but the checksum covers it.
		if len(f.Info().Warnings) != 1 {
			t.Errorf("%d: %q", off, f.Info().Warnings)
		}
	}
}

// TestValidLength: what lies behind the valid length is zeros, whatever is on the disk.
func TestValidLength(t *testing.T) {
	m := golden(t, "c512")
	f := opened(t, m)
	ino := at(t, f, "size 8192")
	read := func(f *FS) []byte {
		file, err := f.Open(ino)
		must(t, err)
		b := make([]byte, file.Size())
		_, err = file.ReadAt(b, 0)
		must(t, err)
		return b
	}
	want := read(f)
	clear(want[3000:])
	le.PutUint64(m[int64(ino>>1)*32+32+8:], 3000)
	reseal(m)
	f = opened(t, m)
	if got := read(f); len(got) != 8192 || !bytes.Equal(got, want) {
		t.Errorf("%d bytes", len(got))
	}
	file, err := f.Open(ino)
	must(t, err)
	for e, err := range file.Allocated(512) {
		if must(t, err); e.Off != 0 || e.Len != 3072 {
			t.Error(e)
		}
	}
}

// TestNoClusters: behind the clusters that a file has, there are no zeros.
func TestNoClusters(t *testing.T) {
	m := golden(t, "c512")
	f := opened(t, m)
	ino := at(t, f, "taking turns 1") // it has a chain
	b := m[int64(ino>>1)*32+32:]
	le.PutUint64(b[24:], le.Uint64(b[24:])+512)
	reseal(m)
	file, err := opened(t, m).Open(ino)
	must(t, err)
	if _, err := file.ReadAt(make([]byte, 512), file.Size()-512); !errors.Is(err, guest.ErrDamaged) {
		t.Error(err)
	}
	if _, err := file.ReadAt(make([]byte, 512), file.Size()-1024); err != nil {
		t.Error(err)
	}
}

// TestUpcase: with a damaged table, names are found in the case of ASCII, and there is a warning.
func TestUpcase(t *testing.T) {
	m := golden(t, "c512")
	f := opened(t, m)
	m[f.table.At(f.letter.first)+400] ^= 1
	f = opened(t, m)
	if len(f.Info().Warnings) != 1 {
		t.Errorf("%q", f.Info().Warnings)
	}
	at(t, f, "SIZE 513")
	at(t, f, "names/ÄÖÜ")
}

// TestZone: a time of the time zone one and a quarter of an hour before UTC.
func TestZone(t *testing.T) {
	stamp := []byte{0, 0x60, 0x21, 0x50} // 2020-01-01 12:00
	for zone, want := range map[byte]string{0: "12:00:00.99", 0x80: "12:00:00.99", 0x80 | 4: "11:00:00.99", 0x80 | 0x7b: "13:15:00.99"} {
		if got := timeOf(stamp, 99, zone).Format("15:04:05.00"); got != want {
			t.Errorf("%#x: %s, not %s", zone, got, want)
		}
	}
}

// TestConcurrent walks one volume in many goroutines, with hardly any cache.
func TestConcurrent(t *testing.T) {
	f, err := Open(golden(t, "c512"), guest.Options{Cache: 64 << 10})
	must(t, err)
	want, err := guesttest.WalkFS(f)
	must(t, err)
	var wait sync.WaitGroup
	for range 8 {
		wait.Go(func() {
			got, err := guesttest.WalkFS(f)
			if err != nil || len(guesttest.Diff(want, got)) > 0 {
				t.Error(err)
			}
		})
	}
	wait.Wait()
}

// TestFree: a volume with other bytes in its free clusters is what it was; one whose bitmap leaves out the root directory is refused.
func TestFree(t *testing.T) {
	guesttest.NeedsPrograms(t, "fsck.exfat")
	for _, name := range goldens {
		m := golden(t, name)
		f := opened(t, m)
		want, err := guesttest.WalkFS(f)
		must(t, err)
		free := int64(0)
		for e, err := range f.Free() {
			must(t, err)
			free += e.Len
			for i := range e.Len {
				m[e.Off+i] = 0xa5
			}
		}
		if free < int64(len(m))/10 {
			t.Errorf("only %d bytes are free", free)
		}
		checked(t, f, guesttest.Saved(t, m))
		got, err := guesttest.WalkFS(opened(t, m))
		must(t, err)
		guesttest.Same(t, want, got)
		n := f.geo.root - cluster.First
		m[f.table.At(f.bitmap.first)+int64(n/8)] &^= 1 << (n % 8)
		for _, err = range opened(t, m).Free() {
		}
		if !errors.Is(err, guest.ErrDamaged) {
			t.Error(err)
		}
	}
}

// TestLocate: what a file's places hold is the file.
func TestLocate(t *testing.T) {
	for _, name := range goldens {
		m := golden(t, name)
		f := opened(t, m)
		for _, path := range []string{"taking turns 1", "size 65536", "size 1", "size 0"} {
			file, err := f.Open(at(t, f, path))
			must(t, err)
			want := make([]byte, file.Size())
			_, err = file.ReadAt(want, 0)
			must(t, err)
			var got []byte
			for e, err := range f.Locate(at(t, f, path)) {
				must(t, err)
				got = append(got, m[e.Off:e.End()]...)
			}
			if int64(len(got)) != f.rounded(file.Size()) || !bytes.Equal(got[:len(want)], want) {
				t.Errorf("%s: %s", name, path)
			}
		}
	}
}

// TestDirty: a volume that is marked (§3.1.13) has a warning, and what is free of it is not told. Linux 6.1 takes its mark away with each
// sync(2), so one that was just synced has none while it is mounted.
func TestDirty(t *testing.T) {
	for _, flag := range []byte{flagDirty, flagFailure} {
		m := golden(t, "c512")
		m[106] |= flag
		f := opened(t, m)
		if len(f.Info().Warnings) != 1 {
			t.Errorf("%q", f.Info().Warnings)
		}
		for _, err := range f.Free() {
			if err == nil {
				t.Error("tells what is free")
			}
		}
	}
}

// TestCircle: a directory that is in itself is damage.
func TestCircle(t *testing.T) {
	m := golden(t, "c4096")
	f := opened(t, m)
	inner, outer := at(t, f, "level 0/level 1/level 2"), at(t, f, "level 0")
	copy(m[int64(inner>>1)*32+32:][:32], m[int64(outer>>1)*32+32:][:32])
	m[int64(inner>>1)*32+32+3] = m[int64(outer>>1)*32+32+3]
	reseal(m)
	lines, err := guesttest.WalkFS(opened(t, m))
	must(t, err)
	bad := 0
	for _, l := range lines {
		if l.Fields["error"] != "" {
			bad++
		}
	}
	if bad == 0 || len(lines) < 100 {
		t.Errorf("%d lines, %d with an error", len(lines), bad)
	}
}
