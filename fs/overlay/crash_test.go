package overlay

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/overlay/overlaytest"
)

const unit = overlaytest.Sector

var errCut = errors.New("power is gone")

// power is what several lossyFiles hang on.
type power struct {
	slow  func() // called by each sync before it does anything; nil for none
	whole int64  // bytes that the disk writes whole or not at all; 0: a sector

	mu   sync.Mutex // guards following, and the files
	left int        // calls until it goes; negative: stays
	off  bool
	rnd  *rand.Rand
}

// use counts a call. p.mu is held.
func (p *power) use() error {
	if p.left == 0 {
		p.off = true
	}
	p.left--
	if p.off {
		return errCut
	}
	return nil
}

// lossyFile is a file in memory of which a power cut takes any part of what was not synced.
type lossyFile struct {
	power  *power
	now    []byte
	synced []byte
	ops    []lossyOp // since the last sync
}

// lossyOp writes data at off, or, without data, sets the size.
type lossyOp struct {
	off   int64
	data  []byte
	whole int64 // bytes of it that are written together
}

func (f *lossyFile) ReadAt(p []byte, off int64) (int, error) {
	f.power.mu.Lock()
	defer f.power.mu.Unlock()
	if f.power.off {
		return 0, errCut
	}
	return bytes.NewReader(f.now).ReadAt(p, off)
}

func (f *lossyFile) WriteAt(p []byte, off int64) (int, error) {
	return len(p), f.do(lossyOp{off: off, data: p})
}

func (f *lossyFile) Punch(off, n int64) error { return f.do(lossyOp{off: off, data: make([]byte, n)}) }
func (f *lossyFile) Clear(off, n int64) error { return f.do(lossyOp{off: off, data: make([]byte, n)}) }
func (f *lossyFile) Truncate(n int64) error   { return f.do(lossyOp{off: n}) }
func (f *lossyFile) Close() error             { return nil }

func (f *lossyFile) Data(off, end int64) (int64, int64, error) { return off, end, nil }

func (f *lossyFile) do(op lossyOp) error {
	f.power.mu.Lock()
	defer f.power.mu.Unlock()
	err := f.power.use()
	if err != nil && f.power.left != -1 {
		return err
	}
	f.now = op.apply(f.now, nil)
	if op.data != nil { // what goes to the disk is whole
		w := max(unit, f.power.whole)
		from, to := op.off/w*w, min((op.off+int64(len(op.data))+w-1)/w*w, int64(len(f.now)))
		op = lossyOp{from, bytes.Clone(f.now[from:to]), w}
	}
	f.ops = append(f.ops, op) // the last one may have reached the disk in part
	return err
}

func (f *lossyFile) Sync() error {
	if f.power.slow != nil {
		f.power.slow()
	}
	f.power.mu.Lock()
	defer f.power.mu.Unlock()
	if err := f.power.use(); err != nil {
		return err
	}
	for _, op := range f.ops {
		f.synced = op.apply(f.synced, nil)
	}
	f.ops = nil
	return nil
}

// apply does the operation, or with rnd any part of it.
func (op lossyOp) apply(b []byte, rnd *rand.Rand) []byte {
	if op.data == nil {
		if rnd != nil && rnd.IntN(2) == 0 {
			return b
		}
		if op.off <= int64(len(b)) {
			return b[:op.off:op.off]
		}
		return append(b, make([]byte, op.off-int64(len(b)))...)
	}
	if grow := op.off + int64(len(op.data)) - int64(len(b)); grow > 0 {
		b = append(b, make([]byte, grow)...)
	}
	for at := op.off; at < op.off+int64(len(op.data)); {
		n := op.off + int64(len(op.data)) - at
		if rnd != nil {
			n = min(n, op.whole-at%op.whole)
		}
		if rnd == nil || rnd.IntN(2) == 0 {
			copy(b[at:at+n], op.data[at-op.off:])
		}
		at += n
	}
	return b
}

// cut is what the disk holds after a power cut, as a file on a new disk. f.power.mu is held.
func (f *lossyFile) cut(p *power) *lossyFile {
	b := bytes.Clone(f.synced)
	for _, op := range f.ops {
		b = op.apply(b, p.rnd)
	}
	return &lossyFile{power: p, now: b, synced: bytes.Clone(b)}
}

func lossyFiles(p *power) files {
	return files{data: &lossyFile{power: p}, blocks: &lossyFile{power: p}, head: &lossyFile{power: p}, live: &lossyFile{power: p}, log: &lossyFile{power: p}, boot: "first", logSize: 12 * Block}
}

// lossyDisk makes an overlay on such files.
func lossyDisk(t *testing.T, p *power, image Image) (files, *Disk) {
	t.Helper()
	f := lossyFiles(p)
	d, err := create(f, image, head{seq: 1, size: image.Size(), limit: image.Size()})
	if err != nil {
		t.Fatal(err)
	}
	return f, d
}

// cut is what the disk holds if the power goes now, or went before. The files may be in use.
func (f files) cut(p *power) files {
	now := f.data.(*lossyFile).power
	now.mu.Lock()
	defer now.mu.Unlock()
	return files{f.data.(*lossyFile).cut(p), f.blocks.(*lossyFile).cut(p), f.head.(*lossyFile).cut(p), f.live.(*lossyFile).cut(p), f.log.(*lossyFile).cut(p), f.boot + "+", f.logSize}
}

// TestPowerCut writes, zeroes and flushes at random until the power goes in the middle of
// some call, or the process alone, several times in a row. Then each sector holds what it held at the last
// flush that returned, or something written after that.
func TestPowerCut(t *testing.T) {
	const size = 40*Block + 700
	cuts, kills, flushes := 0, 0, 0
	for seed := range uint64(overlaytest.Runs(t)) {
		r := rand.New(rand.NewPCG(seed, 3))
		image := someImage(r, size)
		p := &power{left: -1, rnd: r}
		f, d := lossyDisk(t, p, image)
		var err error
		may := overlaytest.New(image.b) // what each sector may hold
		for range 1 + r.IntN(4) {
			p.left = 1 + r.IntN(60)
			for {
				off := r.Int64N(size)
				n := min(size-off, 1+r.Int64N([]int64{unit, 3 * Block, 9 * Block}[r.IntN(3)]))
				if r.IntN(2) == 0 {
					off, n = off/Block*Block, Block
					n = min(n, size-off)
				}
				if r.IntN(4) == 0 {
					if err = d.Flush(); err != nil {
						break
					}
					flushes++
					may.Settle()
					continue
				}
				data := make([]byte, n)
				if r.IntN(3) == 0 {
					may.Add(off, data)
					err = d.Zero(off, n, true)
				} else {
					fillRandom(r, data)
					may.Add(off, data)
					_, err = d.WriteAt(data, off)
				}
				if err != nil {
					break
				}
			}
			if !errors.Is(err, errCut) {
				t.Fatalf("seed %d: %v", seed, err)
			}
			if r.IntN(3) == 0 { // only the process went: what it wrote is in the system's memory still
				kills++
				p.off, p.left = false, -1
			} else {
				cuts++
				p = &power{left: -1, rnd: r}
				f = f.cut(p)
			}
			if d, err = open(f, image, ""); err != nil {
				t.Fatalf("seed %d: opened after a crash: %v", seed, err)
			}
			got := make([]byte, size)
			if _, err := d.ReadAt(got, 0); err != nil && err != io.EOF {
				t.Fatal(err)
			}
			if err := may.Check(got); err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			may = overlaytest.New(got) // what is seen now must stay: it may be acted on
		}
	}
	t.Logf("%d runs, %d power cuts, %d processes killed, %d flushes", overlaytest.Runs(t), cuts, kills, flushes)
}

// TestPowerCutParallel: several writers of their own sectors flush when they like.
func TestPowerCutParallel(t *testing.T) {
	const writers, sectors = 4, 200
	const size = sectors * unit
	n := overlaytest.Runs(t) / 4
	for seed := range uint64(n) {
		r := rand.New(rand.NewPCG(seed, 4))
		image := someImage(r, size)
		p := &power{left: -1, rnd: r}
		f, d := lossyDisk(t, p, image)
		var err error
		p.left = 20 + r.IntN(300)
		var all [writers]*overlaytest.Sectors
		var wg sync.WaitGroup
		for w := range writers {
			all[w] = overlaytest.New(image.b)
			wg.Go(func() {
				r := rand.New(rand.NewPCG(seed, uint64(w)))
				for {
					if r.IntN(5) == 0 {
						if d.Flush() != nil {
							return
						}
						all[w].Settle()
						continue
					}
					off := int64(r.IntN(sectors/writers)*writers+w) * unit
					data := make([]byte, unit)
					fillRandom(r, data)
					all[w].Add(off, data)
					if _, err := d.WriteAt(data, off); err != nil {
						return
					}
				}
			})
		}
		wg.Wait()
		d, err = open(f.cut(&power{left: -1, rnd: r}), image, "")
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		got := make([]byte, size)
		if _, err := d.ReadAt(got, 0); err != nil && err != io.EOF {
			t.Fatal(err)
		}
		for i := range sectors {
			m := all[i%writers]
			if !m.Holds(i, got[i*unit:(i+1)*unit]) {
				t.Fatalf("seed %d: sector %d holds nothing that it may hold", seed, i)
			}
		}
	}
	t.Logf("%d runs", n)
}

// TestPowerCutResize: after a power cut in a Resize, or in the Open after the process was killed in one, the disk
// has the old size or the new one, and what grows back is zero. What an Open showed stays.
func TestPowerCutResize(t *testing.T) {
	for seed := range uint64(overlaytest.Runs(t) / 4) {
		r := rand.New(rand.NewPCG(seed, 5))
		size := 1 + r.Int64N(20*Block)
		image := someImage(r, size)
		p := &power{left: -1, rnd: r}
		f, d := lossyDisk(t, p, image)
		var err error
		want := bytes.Clone(image.b)
		for at := int64(0); at < size; at += 3 * Block {
			fillRandom(r, want[at:at+1])
			if _, err := d.WriteAt(want[at:at+1], at); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.Flush(); err != nil {
			t.Fatal(err)
		}
		p.left = r.IntN(30)
		next := want
		for err == nil {
			want = next
			to := 1 + r.Int64N(40*Block)
			next = make([]byte, to)
			copy(next, want)
			err = d.Resize(to)
		}
		if r.IntN(2) == 0 {
			p.off, p.left = false, 1+r.IntN(8)
			if d, err = open(f, image, ""); err == nil && d.Size() == int64(len(next)) {
				want = next
			} else if err == nil {
				next = want
			}
		}
		if d, err = open(f.cut(&power{left: -1, rnd: r}), image, ""); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		got := make([]byte, d.Size())
		if _, err := d.ReadAt(got, 0); err != nil && err != io.EOF {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) && !bytes.Equal(got, next) {
			t.Fatalf("seed %d: %d bytes, of %d or %d", seed, len(got), len(want), len(next))
		}
	}
}

// TestKilled kills the process in the middle of some call, several times in a row: what was
// answered is there, flushed or not. Then the power goes: what was flushed is there.
func TestKilled(t *testing.T) {
	const size = 40*Block + 700
	kills := 0
	for seed := range uint64(overlaytest.Runs(t)) {
		r := rand.New(rand.NewPCG(seed, 6))
		image := someImage(r, size)
		p := &power{left: -1, rnd: r}
		f, d := lossyDisk(t, p, image)
		var err error
		now := bytes.Clone(image.b)
		may := overlaytest.New(now)
		for range 1 + r.IntN(4) {
			p.left = 1 + r.IntN(60)
			var off, n int64
			for err == nil {
				off = r.Int64N(size)
				n = min(size-off, 1+r.Int64N([]int64{unit, 3 * Block, 9 * Block}[r.IntN(3)]))
				data := make([]byte, n)
				switch r.IntN(8) {
				case 0:
					off, n = 0, 0
					if err = d.Flush(); err == nil {
						may.Settle()
					}
					continue
				case 1, 2:
					err = d.Zero(off, n, r.IntN(2) == 0)
				default:
					fillRandom(r, data)
					_, err = d.WriteAt(data, off)
				}
				may.Add(off, data)
				if err == nil {
					copy(now[off:], data)
				}
			}
			if !errors.Is(err, errCut) {
				t.Fatalf("seed %d: %v", seed, err)
			}
			kills++
			p.off, p.left = false, -1 // the system has what the process wrote
			if d, err = open(f, image, ""); err != nil {
				t.Fatalf("seed %d: opened after a kill: %v", seed, err)
			}
			got := make([]byte, size)
			if _, err = d.ReadAt(got, 0); err != nil && err != io.EOF {
				t.Fatal(err)
			}
			err = nil
			copy(now[off:off+n], got[off:off+n]) // what was going on may have come to pass in part
			if !bytes.Equal(got, now) {
				t.Fatalf("seed %d: after a kill the disk differs from what was answered from byte %d", seed, firstDifference(got, now))
			}
			may.Add(0, got) // the same in may
		}
		if seed%2 == 0 {
			if err := d.Flush(); err != nil {
				t.Fatal(err)
			}
			may = overlaytest.New(now)
		}
		if d, err = open(f.cut(&power{left: -1, rnd: r}), image, ""); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		got := make([]byte, size)
		if _, err := d.ReadAt(got, 0); err != nil && err != io.EOF {
			t.Fatal(err)
		}
		if err := may.Check(got); err != nil {
			t.Fatalf("seed %d: after a power cut: %v", seed, err)
		}
	}
	t.Logf("%d runs, %d kills", overlaytest.Runs(t), kills)
}
