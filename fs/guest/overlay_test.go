package guest

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
)

type memory []byte

func (m memory) ReadAt(p []byte, off int64) (int, error) { return bytes.NewReader(m).ReadAt(p, off) }
func (m memory) Size() int64                             { return int64(len(m)) }

// TestOverlay compares an overlay with a plain copy to which the same was done.
func TestOverlay(t *testing.T) {
	const unit = 64
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		disk := make(memory, unit*40+rnd.IntN(unit))
		for i := range disk {
			disk[i] = byte(rnd.Uint32())
		}
		want := bytes.Clone(disk)
		o := NewOverlay(disk, unit, 1<<20)
		for range rnd.IntN(20) {
			n := rnd.Int64N(40)
			switch rnd.IntN(3) {
			case 0:
				b := bytes.Repeat([]byte{byte(n)}, unit)
				if err := o.Set(n, b); err != nil {
					t.Fatal(err)
				}
				copy(want[n*unit:], b)
			case 1:
				from, head := rnd.Int64N(39*unit), []byte("head")[:rnd.IntN(5)]
				if err := o.Move(n, from, head); err != nil {
					t.Fatal(err)
				}
				copy(want[n*unit:(n+1)*unit], disk[from:])
				copy(want[n*unit:], head)
			case 2:
				o.Drop(n)
				copy(want[n*unit:(n+1)*unit], disk[n*unit:])
			}
		}
		for range 50 {
			off := rnd.IntN(len(disk) + 10)
			p := make([]byte, rnd.IntN(5*unit))
			n, err := o.ReadAt(p, int64(off))
			end := max(off, min(off+len(p), len(want)))
			if n != end-off || !bytes.Equal(p[:n], want[min(off, end):end][:n]) || (n < len(p)) != errors.Is(err, io.EOF) {
				t.Fatalf("%d bytes at %d of %d: %d, %v", len(p), off, len(want), n, err)
			}
		}
	}
}

// TestOverlayRoom: an overlay takes no more memory than it may, and gives back what it drops.
func TestOverlayRoom(t *testing.T) {
	o := NewOverlay(make(memory, 1<<20), 1024, 5*(1024+patchCost))
	for n := range int64(5) {
		if err := o.Set(n, make([]byte, 1024)); err != nil {
			t.Fatal(err)
		}
	}
	if err := o.Set(2, make([]byte, 1024)); err != nil {
		t.Errorf("the same block again: %v", err)
	}
	if err := o.Set(9, make([]byte, 1024)); !errors.Is(err, ErrUnsupported) {
		t.Errorf("a sixth block: %v", err)
	}
	o.Drop(1)
	if err := o.Set(9, make([]byte, 1024)); err != nil {
		t.Errorf("in the room of one that was dropped: %v", err)
	}
	if err := o.Set(9, make([]byte, 10)); err == nil {
		t.Error("a short block is taken")
	}
}

// TestCache: what it gives is what the device has, whoever asks at the same time, and a block that a check refuses is asked for
// again.
func TestCache(t *testing.T) {
	disk := make(memory, 100*512)
	for i := range disk {
		disk[i] = byte(i / 512)
	}
	c := NewCache(disk, 512, 10*512)
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(w), 1))
			for range 2000 {
				n := rnd.Int64N(100)
				b, err := c.Block(n, nil)
				if err != nil || len(b) != 512 || b[0] != byte(n) || b[511] != byte(n) {
					t.Errorf("block %d: %v", n, err)
					return
				}
			}
		})
	}
	wg.Wait()
	if n := len(c.young) + len(c.old); n > 12 {
		t.Errorf("%d blocks are kept", n)
	}
	c = NewCache(disk, 512, 10*512)
	bad := errors.New("bad")
	for range 2 {
		if _, err := c.Block(3, func([]byte) error { return bad }); !errors.Is(err, bad) {
			t.Error(err)
		}
	}
	for _, n := range []int64{-1, 100, 1 << 60} {
		if _, err := c.Block(n, nil); !errors.Is(err, ErrDamaged) {
			t.Errorf("block %d: %v", n, err)
		}
	}
}
