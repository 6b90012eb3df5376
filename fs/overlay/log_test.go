package overlay

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

// TestLog: flushes of few blocks sync the log alone until it is full, and what they made durable is there after a power cut that takes all
// that was not synced, whatever becomes of the process that opens it then.
func TestLog(t *testing.T) {
	const size = 100 * Block
	r := rand.New(rand.NewPCG(1, 1))
	image := someImage(r, size)
	f := lossyFiles(&power{left: -1, rnd: r})
	f.logSize = 7 * Block // three records of a block
	data := 0
	counted := f
	counted.data = syncFile{f.data, func() error { data++; return nil }}
	d, err := create(counted, image, head{seq: 1, size: size, limit: size})
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Clone(image.b)
	write := func(off int64) {
		t.Helper()
		p := make([]byte, 10)
		fillRandom(r, p)
		copy(want[off:], p)
		if _, err := d.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
		if err := d.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	before := data
	for i, syncs := range []int{0, 0, 0, 1, 1, 1, 1, 2} {
		write([]int64{0, 7, 7, 21}[i%4] * Block) // the same blocks again: the last record counts
		if data-before != syncs {
			t.Fatalf("flush %d: data was synced %d times, not %d", i, data-before, syncs)
		}
	}
	write(3 * Block)
	write(7 * Block)
	write(3 * Block)
	for calls, whole := 0, false; !whole; calls++ {
		for _, x := range []file{f.data, f.blocks, f.head, f.live, f.log} {
			x.(*lossyFile).ops = nil
		}
		p := &power{left: calls, rnd: r}
		boot, live := f.boot, f.live.(*lossyFile)
		live.synced = bytes.Clone(live.now)
		if f = f.cut(p); calls%2 == 0 { // the file system alone was away
			f.boot = boot
		}
		_, err = open(f, image, "") // is killed after so many calls
		whole = err == nil
		p.off, p.left = false, -1
		if d, err = open(f, image, ""); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, size)
		if _, err := d.ReadAt(got, 0); err != nil && err != io.EOF {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Fatal("a flush was lost")
		}
		write(11 * Block)
	}
}

// TestLogDamaged: a log whose head is not what was written is not taken for an empty one. Without one, as older overlays are, there is nothing to know.
func TestLogDamaged(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "o")
	image := someImage(rand.New(rand.NewPCG(1, 1)), 16*Block)
	d, err := Create(dir, image, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt([]byte("kept"), 5*Block); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(d.Flush(), d.Close()); err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(dir, logName)
	b, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	if len(b) != logLen {
		t.Errorf("the log has %d bytes", len(b))
	}
	b[9] ^= 1
	if err := os.WriteFile(log, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, image, Options{}); !errors.Is(err, ErrDamaged) {
		t.Errorf("damaged: %v", err)
	}
	if err := os.Remove(log); err != nil {
		t.Fatal(err)
	}
	if d, err = Open(dir, image, Options{}); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4)
	if _, err := d.ReadAt(got, 5*Block); err != nil || string(got) != "kept" {
		t.Errorf("%q, %v", got, err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// FuzzLog: whatever is in the file, with checksums that are right, what replay gives are blocks, of no more than there is room for.
func FuzzLog(f *testing.F) {
	p := &power{left: -1}
	l := newLog(&lossyFile{power: p}, 12*Block)
	data := &lossyFile{power: p, now: bytes.Repeat([]byte{7}, 8*Block)}
	for _, blocks := range [][]int64{{1}, {2, 5}, {1}} {
		if ok, err := l.add(blocks, data); !ok || err != nil {
			f.Fatal(ok, err)
		}
	}
	f.Add(l.f.(*lossyFile).now, false)
	f.Add(l.f.(*lossyFile).now[:5*Block+100], true)
	f.Fuzz(func(t *testing.T, b []byte, killed bool) {
		b = bytes.Clone(b)
		le := binary.LittleEndian
		if len(b) >= logHeadLen {
			le.PutUint32(b[logHeadLen-4:], crc32.Checksum(b[:logHeadLen-4], crcTable))
		}
		for at := logStart; at+Block <= len(b); {
			end := min(at+(1+int(le.Uint32(b[at+24:])%(maxLogged+1)))*Block, len(b))
			le.PutUint32(b[at+4:], crc32.Checksum(b[at+8:end], crcTable))
			at = end
		}
		l := newLog(&lossyFile{power: &power{left: -1}, now: b}, 0)
		if l.open() != nil {
			return
		}
		given := 0
		err := l.replay(killed, func(_ int64, content []byte) error {
			if given++; len(content) != Block {
				t.Errorf("%d bytes", len(content))
			}
			return nil
		})
		if err != nil || given > len(b)/Block {
			t.Errorf("%d blocks of %d bytes, %v", given, len(b), err)
		}
	})
}
