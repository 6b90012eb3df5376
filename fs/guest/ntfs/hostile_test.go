package ntfs

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

type memory = guesttest.Memory

// mutate changes some bytes of a disk where there are any, and gives what puts them back.
func mutate(m memory, used []int, rng *rand.Rand) (restore func()) {
	type change struct {
		at  int
		old byte
	}
	var changes []change
	for range 1 + rng.IntN(12) {
		at := used[rng.IntN(len(used))]*512 + rng.IntN(510)
		for range 1 + rng.IntN(3) {
			changes = append(changes, change{at, m[at]})
			switch rng.IntN(3) {
			case 0:
				m[at] ^= 1 << rng.IntN(8)
			case 1:
				m[at] = byte(rng.Uint32())
			case 2:
				m[at] = []byte{0, 0xff, 0x7f, 0x80, 1}[rng.IntN(5)]
			}
			at++
		}
	}
	return func() {
		for i := len(changes) - 1; i >= 0; i-- {
			m[changes[i].at] = changes[i].old
		}
	}
}

// metadata are the sectors of a disk that have something, those of records and of nodes several times.
func metadata(m memory) (used []int) {
	for at := 0; at+1024 <= len(m); at += 512 {
		if head := m[at : at+4]; bytes.Equal(head, []byte("FILE")) || bytes.Equal(head, []byte("INDX")) {
			used = append(used, at/512, at/512+1, at/512, at/512+1, at/512, at/512+1)
		} else if bytes.Count(m[at:at+512], []byte{0}) < 512 {
			used = append(used, at/512)
		}
	}
	return append(used, 0)
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
		for n := range guest.Ino(100) {
			if names, err := f.Streams(n); err == nil && len(names) > 0 {
				if s, err := f.OpenStream(n, names[0]); err == nil {
					io.Copy(io.Discard, io.NewSectionReader(s, 0, min(s.Size(), 1<<20)))
				}
			}
			for range f.Locate(n) {
			}
			f.Lookup(n, "x")
		}
		if len(lines) > 10000 {
			err = fmt.Errorf("%d lines", len(lines))
		}
		done <- err
	}()
	select {
	case err := <-done:
		if err != nil && !strings.Contains(err.Error(), "listed twice") {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("does not end")
	}
}

func TestHostile(t *testing.T) {
	m := goldenDisk(t)
	used := metadata(m)
	rounds := 400
	if testing.Short() {
		rounds = 100
	}
	for seed := range uint64(rounds) {
		rng := rand.New(rand.NewPCG(seed, 10))
		restore := mutate(m, used, rng)
		visit(t, m)
		if t.Failed() {
			t.Fatal("seed ", seed)
		}
		restore()
	}
	for n := 0; n < len(m); n += 37*512 + 100 {
		visit(t, m[:n])
	}
}

func FuzzVolume(f *testing.F) {
	var m memory
	var used []int
	f.Add(uint64(1), uint64(2))
	f.Fuzz(func(t *testing.T, a, b uint64) {
		if m == nil {
			m = goldenDisk(t)
			used = metadata(m)
		}
		restore := mutate(m, used, rand.New(rand.NewPCG(a, b)))
		defer restore()
		visit(t, m)
	})
}

func FuzzRuns(f *testing.F) {
	f.Add([]byte{0x21, 0x18, 0x34, 0x56, 0x11, 0x05, 0xf0, 0x01, 0x07, 0}, int64(35))
	f.Fuzz(func(t *testing.T, b []byte, high int64) {
		runs, err := decodeRuns(b, 0, high, 1<<20)
		if err != nil {
			return
		}
		vcn := int64(0)
		for _, r := range runs {
			if r.vcn != vcn || r.n <= 0 || r.lcn != hole && (r.lcn < 0 || r.lcn+r.n > 1<<20) {
				t.Fatalf("%v", runs)
			}
			vcn += r.n
		}
	})
}

func FuzzDecompress(f *testing.F) {
	f.Add([]byte("\x03\xb0\x00abc"), uint8(0))
	f.Fuzz(func(t *testing.T, b []byte, kind uint8) {
		dst := make([]byte, 32<<10)
		switch kind % 3 {
		case 0:
			lznt1(dst, b)
		case 1:
			xpress(dst, b)
		case 2:
			lzx(dst, b)
		}
	})
}

func FuzzRecord(f *testing.F) {
	f.Add(make([]byte, 1024))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < recordHeader || len(b) > maxRecord {
			return
		}
		i := &inode{}
		if i.parse(record(b)) == nil {
			i.standard()
		}
		eachEA(b, func(string, []byte) {})
		restartArea(append(b, make([]byte, 4096)...))
		parseBoot(append(b, make([]byte, 512)...))
	})
}

func FuzzNames(f *testing.F) {
	f.Add([]byte("a\x00\x00\xd8b\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		b = b[:min(len(b), 2*maxName)&^1]
		got, ok := encode(text(b))
		if !ok || !bytes.Equal(got, b) {
			t.Fatalf("%x: %q, %x", b, text(b), got)
		}
	})
}
