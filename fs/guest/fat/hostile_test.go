package fat

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

type memory = guesttest.Memory

// goldens are small volumes that Linux filled with guesttest.Little's tree (see TestMakeGolden), and their walks.
var goldens = []string{"fat12", "fat16", "fat32"}

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
		for n := range guest.Ino(40) {
			for range f.Locate(n + guest.Ino(f.geo.data/32)) {
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

// mutate changes bytes of the metadata, and gives what puts them back.
func mutate(m memory, rng *rand.Rand) (restore func()) {
	old := map[int]byte{}
	g, err := parseBoot(m)
	if err != nil {
		g.data = 4096
	}
	for range 1 + rng.IntN(20) {
		at := rng.IntN(int(min(g.data+40*g.cluster, int64(len(m)))) - 4)
		switch rng.IntN(4) {
		case 0:
			at = rng.IntN(96)
		case 1:
			at = int(g.table) + rng.IntN(400)
		}
		for i := range 1 + rng.IntN(4) {
			if _, ok := old[at+i]; !ok {
				old[at+i] = m[at+i]
			}
			switch rng.IntN(4) {
			case 0:
				m[at+i] ^= 1 << rng.IntN(8)
			case 1:
				m[at+i] = byte(rng.Uint32())
			case 2:
				m[at+i] = []byte{0, 0xff, 0x0f, 0x10, 1, 2, 3}[rng.IntN(7)]
			case 3:
				m[at+i]++
			}
		}
	}
	return func() {
		for at, b := range old {
			m[at] = b
		}
	}
}

func TestHostile(t *testing.T) {
	rounds := 700
	if testing.Short() {
		rounds = 60
	}
	for _, name := range goldens {
		m := golden(t, name)
		for seed := range uint64(rounds) {
			restore := mutate(m, rand.New(rand.NewPCG(seed, 10)))
			visit(t, m)
			if t.Failed() {
				t.Fatal(name, " seed ", seed)
			}
			restore()
		}
		for n := 0; n < len(m); n += max(1, len(m)/37*512/512) + 100 {
			visit(t, m[:n])
		}
	}
}

func FuzzVolume(f *testing.F) {
	f.Add(uint64(1), uint64(2))
	f.Fuzz(func(t *testing.T, a, b uint64) {
		m := golden(t, goldens[a%3])
		mutate(m, rand.New(rand.NewPCG(a, b)))
		visit(t, m)
	})
}

func FuzzBoot(f *testing.F) {
	f.Add(make([]byte, bootSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		g, err := parseBoot(append(b, make([]byte, bootSize)...))
		if err == nil && (g.clusters <= 0 || g.data+g.clusters*g.cluster > g.size || (g.clusters+2)*int64(g.bits) > g.tableLen*8) {
			t.Fatalf("%+v", g)
		}
	})
}

// FuzzDirectory reads any bytes as the root directory of a volume.
func FuzzDirectory(f *testing.F) {
	f.Add([]byte("\x41a\x00b\x00\x00\x00\xff\xff\xff\xff\x0f\x00\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x00\x00\xff\xff\xff\xffAB         \x20"))
	f.Fuzz(func(t *testing.T, b []byte) {
		m := golden(t, "fat12")
		g, err := parseBoot(m)
		must(t, err)
		copy(m[g.rootAt:g.rootAt+g.rootLen], b)
		visit(t, m)
	})
}

// TestDamage: what is damaged is said to be, and the rest is readable.
func TestDamage(t *testing.T) {
	for _, name := range goldens {
		m := golden(t, name)
		f, err := Open(m, guest.Options{})
		must(t, err)
		ino, err := guesttest.Find(f, "taking turns 1")
		must(t, err)
		e, err := f.entry(ino)
		must(t, err)
		for what, value := range map[string]uint32{"a circle": f.first(e), "nowhere": uint32(f.geo.clusters) + 2, "free": 0, "too short": 0xfffffff} {
			m := bytes.Clone(m)
			links := f.table.Links()
			second, err := links(f.first(e))
			must(t, err)
			setNumber(f, m, second, value)
			g, err := Open(memory(m), guest.Options{})
			must(t, err)
			file, err := g.Open(ino)
			must(t, err)
			buf := make([]byte, file.Size())
			if _, err := file.ReadAt(buf, 0); !isDamaged(err) {
				t.Errorf("%s: %s: %v", name, what, err)
			}
			if _, err := file.ReadAt(buf[:f.geo.cluster], 0); err != nil {
				t.Errorf("%s: %s: the first cluster: %v", name, what, err)
			}
			if _, err := file.ReadAt(buf[:100], f.geo.cluster+100); isDamaged(err) != (what == "a circle") {
				t.Errorf("%s: %s: the second cluster: %v", name, what, err)
			}
			other, err := guesttest.Find(g, "taking turns 2")
			must(t, err)
			file, err = g.Open(other)
			must(t, err)
			if _, err := file.ReadAt(buf[:4096], file.Size()-4096); err != nil {
				t.Error(err)
			}
			if what != "a circle" { // its copy is as it was
				for _, err = range g.Free() {
				}
				if g.geo.tables > 1 && !isDamaged(err) {
					t.Errorf("%s: copies that differ: %v", name, err)
				}
			}
		}
	}
}

func isDamaged(err error) bool {
	return err != nil && strings.Contains(err.Error(), guest.ErrDamaged.Error())
}

// setNumber writes to the first table.
func setNumber(f *FS, m memory, n, value uint32) {
	at := f.geo.table
	switch f.geo.bits {
	case 12:
		at += int64(n + n/2)
		shift := n & 1 * 4
		le.PutUint16(m[at:], le.Uint16(m[at:])&^(0xfff<<shift)|uint16(value&0xfff<<shift))
	case 16:
		le.PutUint16(m[at+int64(n)*2:], uint16(value))
	case 32:
		le.PutUint32(m[at+int64(n)*4:], value&0xfffffff)
	}
}

// TestCircle: a directory that is in itself is damage, and listing the others goes on.
func TestCircle(t *testing.T) {
	m := golden(t, "fat16")
	f, err := Open(m, guest.Options{})
	must(t, err)
	inner, err := guesttest.Find(f, "level 0/level 1/level 2")
	must(t, err)
	outer, err := guesttest.Find(f, "level 0")
	must(t, err)
	copy(m[inner*32+26:][:2], m[outer*32+26:][:2])
	f, err = Open(m, guest.Options{})
	must(t, err)
	lines, err := guesttest.WalkFS(f)
	must(t, err)
	bad := 0
	for _, l := range lines {
		if l.Fields["error"] != "" {
			bad++
		}
	}
	if bad == 0 || len(lines) < 50 {
		t.Errorf("%d lines, %d with an error", len(lines), bad)
	}
}

// TestCopyOfBoot: FAT32 is readable without its first sector.
func TestCopyOfBoot(t *testing.T) {
	m := golden(t, "fat32")
	f, err := Open(m, guest.Options{})
	must(t, err)
	want, err := guesttest.WalkFS(f)
	must(t, err)
	clear(m[:512])
	f, err = Open(m, guest.Options{})
	must(t, err)
	got, err := guesttest.WalkFS(f)
	must(t, err)
	guesttest.Same(t, want, got)
	if len(f.Info().Warnings) == 0 {
		t.Error("no warning")
	}
}

// TestActiveTable: without mirroring, the table that the flags name counts.
func TestActiveTable(t *testing.T) {
	m := golden(t, "fat32")
	f, err := Open(m, guest.Options{})
	must(t, err)
	want, err := guesttest.WalkFS(f)
	must(t, err)
	m[40] = 0x81
	clear(m[f.geo.table+12 : f.geo.table+f.geo.tableLen])
	f, err = Open(m, guest.Options{})
	must(t, err)
	got, err := guesttest.WalkFS(f)
	must(t, err)
	guesttest.Same(t, want, got)
}

// TestConcurrent walks one volume in many goroutines, with hardly any cache.
func TestConcurrent(t *testing.T) {
	f, err := Open(golden(t, "fat32"), guest.Options{Cache: 64 << 10})
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
			for _, l := range want {
				if _, err := guesttest.Find(f, strings.ToUpper(l.Path)+"/none"); err == nil {
					t.Error(l.Path)
				}
			}
		})
	}
	wait.Wait()
}

// TestOrphans: the entries of a long name that do not belong to the short one behind them, or are not all there, are left out.
func TestOrphans(t *testing.T) {
	for what, change := range map[string]func(m memory, short int64){
		"another checksum": func(m memory, short int64) { m[short-32+13]++ },
		"two others":       func(m memory, short int64) { m[short-32+13]++; m[short-64+13]++ },
		"another order":    func(m memory, short int64) { m[short-32]++ },
		"one is deleted":   func(m memory, short int64) { m[short-32] = deleted },
		"the last is gone": func(m memory, short int64) { m[short-64] = deleted },
	} {
		m := golden(t, "fat16")
		f, err := Open(m, guest.Options{})
		must(t, err)
		ino, err := guesttest.Find(f, "names/Mixed Case.Txt")
		must(t, err)
		change(m, int64(ino)*32)
		f, err = Open(m, guest.Options{})
		must(t, err)
		dir, err := guesttest.Find(f, "names")
		must(t, err)
		var names []string
		for e, err := range f.ReadDir(dir, 0) {
			must(t, err)
			if e.Ino == ino {
				names = append(names, e.Name)
			}
		}
		if len(names) != 1 || !strings.HasPrefix(names[0], "MIXEDC~") {
			t.Errorf("%s: %q", what, names)
		}
	}
}
