package lease

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/holdfast-backup/holdfast/fs/vdisk"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// randomDisk has data in some of its ranges: noise, or what shrinks.
func randomDisk(seed uint64, size int, full float64) []byte {
	rnd := rand.New(rand.NewPCG(seed, 1))
	disk := make([]byte, size)
	noise := rand.NewChaCha8([32]byte{byte(seed)})
	for off := 0; off < size; {
		n := min(size-off, 1+rnd.IntN(2<<20))
		switch {
		case rnd.Float64() >= full:
		case rnd.IntN(4) == 0:
			copy(disk[off:off+n], bytes.Repeat(fmt.Appendf(nil, "%d ", off), n/2+1))
		default:
			noise.Read(disk[off : off+n])
		}
		off += n
	}
	return disk
}

// streamOf is the disk as qemu-img writes it, or, where that is missing or -short given, as we do.
func streamOf(t testing.TB, disk []byte) []byte {
	t.Helper()
	if !testing.Short() {
		if _, err := exec.LookPath("qemu-img"); err != nil {
			t.Skipf("the oracle is missing (Debian package qemu-utils): %v", err)
		}
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "raw"), disk, 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", "raw", "x.vmdk")
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		b, err := os.ReadFile(filepath.Join(dir, "x.vmdk"))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	return ourStream(t, disk)
}

// ourStream has the tables behind the grains, as VMware's products write them.
func ourStream(t testing.TB, disk []byte) []byte {
	t.Helper()
	raw := filepath.Join(t.TempDir(), "raw")
	if err := os.WriteFile(raw, disk, 0o600); err != nil {
		t.Fatal(err)
	}
	img, err := vdisk.OpenChain(raw, vdisk.Policy{})
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	var b bytes.Buffer
	if _, err := vdisk.WriteStreamOptimized(context.Background(), &b, img, vdisk.Identity{1}, "x", nil); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// server sends a stream.
type server struct {
	b       []byte
	resumes bool
	drop    func(skip, sent int64) (error, bool) // whether the connection ends, and how
	pace    func()                               // before each read
	change  func(n int, b []byte) []byte         // what connection n sends

	opened, open, resumed atomic.Int64
}

func (s *server) get(ctx context.Context, skip int64) (io.ReadCloser, error) {
	n := s.opened.Add(1)
	if skip > 0 && !s.resumes {
		return nil, ErrNoResume
	}
	if skip > 0 {
		s.resumed.Add(1)
	}
	s.open.Add(1)
	b := s.b
	if s.change != nil {
		b = s.change(int(n), b)
	}
	ctx, cancel := context.WithCancel(ctx)
	return &conn{s: s, r: bytes.NewReader(b[min(skip, int64(len(b))):]), skip: skip, ctx: ctx, cancel: cancel}, nil
}

type conn struct {
	s          *server
	r          *bytes.Reader
	skip, sent int64
	ctx        context.Context
	cancel     context.CancelFunc
	once       sync.Once
}

func (c *conn) Read(p []byte) (int, error) {
	if c.s.pace != nil {
		c.s.pace()
	}
	if c.ctx.Err() != nil {
		return 0, os.ErrClosed
	}
	if c.s.drop != nil {
		if err, ends := c.s.drop(c.skip, c.sent); ends {
			if err == nil { // silence
				<-c.ctx.Done()
				err = os.ErrClosed
			}
			return 0, err
		}
	}
	n, err := c.r.Read(p[:min(len(p), 10_000)])
	c.sent += int64(n)
	return n, err
}

func (c *conn) Close() error {
	c.once.Do(func() { c.s.open.Add(-1) })
	c.cancel()
	return nil
}

func newDisk(t testing.TB, s *server, size int, change func(*Options)) *Disk {
	opt := Options{Name: "x", Size: int64(size), Open: s.get, Window: minWindow, Backoff: time.Microsecond, Patience: 50 * time.Millisecond}
	if change != nil {
		change(&opt)
	}
	d := New(opt)
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		d.Close()
		if n := s.open.Load(); n != 0 {
			t.Errorf("%d connections are open", n)
		}
		for end := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > before; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Errorf("%d goroutines are left", runtime.NumGoroutine()-before)
				break
			}
		}
	})
	return d
}

// soon fails the test when f takes long: somebody waits for ever.
func soon(t testing.TB, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		b := make([]byte, 1<<16)
		t.Fatalf("waits for ever:\n%s", b[:runtime.Stack(b, true)])
	}
}

// copyDisk reads d as a backup does: one goroutine pulls the ranges and cuts them into pieces of whole
// chunks, others read those in any order of up to 32.
func copyDisk(ctx context.Context, d *Disk, chunk int64, seed uint64) ([]byte, error) {
	const piece = 1 << 20
	out := make([]byte, d.Size())
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	work, free := make(chan extent.Extent, 32), make(chan struct{}, 32)
	var wg sync.WaitGroup
	for i := range uint64(16) {
		rnd := rand.New(rand.NewPCG(seed, i))
		wg.Go(func() {
			for e := range work {
				if rnd.IntN(3) == 0 {
					time.Sleep(time.Duration(rnd.IntN(1000)) * time.Microsecond)
				}
				if n, err := d.ReadAt(out[e.Off:e.End()], e.Off); int64(n) < e.Len {
					cancel(fmt.Errorf("%v: %w", e, err))
				}
				<-free
			}
		})
	}
	rnd := rand.New(rand.NewPCG(seed, 99))
	var mixed []extent.Extent // pieces in a random order
	send := func(keep int) bool {
		for len(mixed) > keep {
			i := rnd.IntN(len(mixed))
			select {
			case work <- mixed[i]:
				mixed = append(mixed[:i], mixed[i+1:]...)
			case <-ctx.Done():
				return false
			}
		}
		return true
	}
	limit := max(1, piece/chunk) * chunk
	for e, err := range extent.CoarsenUpTo(d.Extents(ctx), chunk, limit, d.Size()) {
		if err != nil {
			cancel(err)
			break
		}
		select {
		case free <- struct{}{}:
			mixed = append(mixed, e)
		case <-ctx.Done():
		}
		if !send(0) {
			break
		}
	}
	send(0)
	close(work)
	wg.Wait()
	return out, context.Cause(ctx)
}

// Random disks, chunk sizes and paces, with connections that end anywhere, against the plain disk.
func TestReadsTheDisk(t *testing.T) {
	rounds := uint64(16)
	if testing.Short() {
		rounds = 6
	}
	for seed := range rounds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, 7))
			disk := randomDisk(seed, (rnd.IntN(64<<20)+1)/512*512+512, []float64{0.02, 0.3, 0.8, 1}[seed%4])
			s := &server{b: streamOf(t, disk), resumes: seed%3 != 0}
			if seed%2 == 1 {
				s.b = ourStream(t, disk)
			}
			drops := int64(0)
			at := rnd.Int64N(int64(len(s.b)) + 1)
			s.drop = func(skip, sent int64) (error, bool) {
				if drops < 4 && skip+sent >= at {
					drops++
					at += rnd.Int64N(int64(len(s.b)) - at + 1)
					return []error{io.EOF, io.ErrUnexpectedEOF, os.ErrDeadlineExceeded}[rnd.IntN(3)], true
				}
				return nil, false
			}
			told := int64(0)
			d := newDisk(t, s, len(disk), func(o *Options) {
				o.Progress = func(n int64) {
					if n < told || n > int64(len(s.b)) {
						t.Errorf("told %d after %d", n, told)
					}
					told = n
				}
			})
			soon(t, func() {
				for range 2 { // the second time from the beginning
					got, err := copyDisk(t.Context(), d, 64<<10<<rnd.IntN(7), seed)
					if err != nil || !bytes.Equal(got, disk) {
						t.Errorf("equal %v: %v", bytes.Equal(got, disk), err)
					}
					if told == 0 {
						t.Error("no progress was told")
					}
					told = 0
				}
			})
			if s.resumes && s.resumed.Load() == 0 && drops > 1 {
				t.Error("never resumed")
			}
		})
	}
}

// ranges pulls all extents.
func ranges(ctx context.Context, d *Disk) (list []extent.Extent, err error) {
	for e, err := range d.Extents(ctx) {
		if err != nil {
			return list, err
		}
		list = append(list, e)
	}
	return list, nil
}

func TestConnectionErrors(t *testing.T) {
	disk := randomDisk(1, 5<<20, 0.7)
	b := ourStream(t, disk)
	boom := errors.New("boom")
	at := func(n int64, err error) func(skip, sent int64) (error, bool) {
		return func(skip, sent int64) (error, bool) { return err, skip+sent >= n }
	}
	for _, c := range []struct {
		name   string
		s      *server
		change func(*Options)
		want   error
		text   string
	}{
		{"sound", &server{b: b}, nil, nil, ""},
		{"always lost at one byte", &server{b: b, resumes: true, drop: at(100_000, boom)}, nil, boom, "5 attempts"},
		{"always lost at one byte, from the beginning", &server{b: b, drop: at(100_000, boom)}, nil, boom, "attempts"},
		{"cut off", &server{b: b[:len(b)-512], resumes: true}, nil, io.ErrUnexpectedEOF, "5 attempts"},
		{"cut off in the header", &server{b: b[:100], resumes: true}, nil, io.ErrUnexpectedEOF, "5 attempts"},
		{"nothing", &server{}, nil, io.ErrUnexpectedEOF, "at byte 0"},
		{"silent", &server{b: b, resumes: true, drop: at(100_000, nil)}, func(o *Options) { o.Idle = time.Millisecond }, nil, "nothing came for 1ms"},
		{"changed", &server{b: b, drop: func(skip, sent int64) (error, bool) { return boom, sent >= 100_000 }, change: func(n int, b []byte) []byte {
			b = bytes.Clone(b)
			b[50_000] ^= byte(n)
			return b
		}}, nil, ErrChanged, "another disk"},
		{"refused", &server{b: b}, func(o *Options) {
			o.Open = func(context.Context, int64) (io.ReadCloser, error) { return nil, boom }
		}, boom, "attempts"},
		{"another size", &server{b: b}, func(o *Options) { o.Size += 64 << 10 }, nil, "the disk has"},
		{"a smaller size", &server{b: b}, func(o *Options) { o.Size -= 64 << 10 }, nil, "the disk has"},
		{"a part of a grain less", &server{b: b}, func(o *Options) { o.Size -= 512 }, nil, ""},
		{"damaged", &server{b: append(bytes.Clone(b[:len(b)-512]), 1)}, nil, nil, "x: at byte"},
		{"a text", &server{b: bytes.Repeat([]byte("# Disk DescriptorFile\n"), 100)}, nil, vdisk.ErrUnsupported, "not a streamOptimized"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newDisk(t, c.s, len(disk), c.change)
			soon(t, func() {
				_, err := ranges(t.Context(), d)
				if c.want != nil && !errors.Is(err, c.want) || (err == nil) != (c.text == "") || err != nil && !strings.Contains(err.Error(), c.text) {
					t.Errorf("extents: %v", err)
				}
				if _, again := d.ReadAt(make([]byte, 512), d.Size()-512); err != nil && again == nil {
					t.Error("the end of the disk can be read")
				}
			})
		})
	}
}

// A damaged grain is an error of who reads it, and a lost one of Extents.
func TestDamagedGrain(t *testing.T) {
	disk := randomDisk(3, 5<<20, 1)
	b := ourStream(t, disk)
	for _, i := range []int{64<<10 + 500, len(b) / 2} {
		bad := bytes.Clone(b)
		bad[i] ^= 4
		s := &server{b: bad}
		d := newDisk(t, s, len(disk), nil)
		soon(t, func() {
			if got, err := copyDisk(t.Context(), d, 64<<10, 1); !errors.Is(err, vdisk.ErrCorrupt) {
				t.Errorf("byte %d: equal %v, %v", i, bytes.Equal(got, disk), err)
			}
		})
	}
}

// held is a disk whose stream stays where it is told to.
func held(t *testing.T, disk []byte, at int64, change func(*Options)) (d *Disk, goOn func()) {
	b := ourStream(t, disk)
	gate := make(chan struct{})
	s := &server{b: b}
	s.drop = func(skip, sent int64) (error, bool) {
		if skip+sent < at {
			return nil, false
		}
		select {
		case <-gate:
			return nil, false
		default:
			return nil, true // until the connection is closed
		}
	}
	return newDisk(t, s, len(disk), change), sync.OnceFunc(func() { close(gate) })
}

// Whoever waits gets an error when the waiting ends.
func TestWaitersAreReleased(t *testing.T) {
	disk := randomDisk(4, 8<<20, 1)
	for name, end := range map[string]struct {
		how  func(d *Disk, cancel func())
		want error
	}{
		"Close":   {func(d *Disk, _ func()) { d.Close() }, ErrClosed},
		"cancel":  {func(_ *Disk, cancel func()) { cancel() }, context.Canceled},
		"another": {func(d *Disk, _ func()) { d.begin(context.Background()) }, errAnew},
	} {
		t.Run(name, func(t *testing.T) {
			d, _ := held(t, disk, 1<<20, nil)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			soon(t, func() {
				errs := make(chan error)
				began := make(chan struct{})
				go func() {
					first := true
					for _, err := range d.Extents(ctx) {
						if first {
							close(began)
							first = false
						}
						if err != nil {
							errs <- err
							return
						}
					}
					errs <- errors.New("the extents ended")
				}()
				<-began
				for i := range int64(16) {
					go func() {
						_, err := d.ReadAt(make([]byte, 100_000), 4<<20+i*100_000)
						errs <- err
					}()
				}
				time.Sleep(20 * time.Millisecond) // most of them wait
				end.how(d, cancel)
				for range 17 {
					if err := <-errs; !errors.Is(err, end.want) {
						t.Errorf("%v, want %v", err, end.want)
					}
				}
			})
		})
	}
}

// The one that pulls leaves early; the readers get what they ask for.
func TestPullerStops(t *testing.T) {
	disk := randomDisk(5, 40<<20, 1)
	s := &server{b: ourStream(t, disk)}
	d := newDisk(t, s, len(disk), nil)
	soon(t, func() {
		for range d.Extents(t.Context()) {
			break
		}
		var wg sync.WaitGroup
		for i := range 40 { // far more than the window holds
			p := make([]byte, 1<<20)
			if i%8 == 7 {
				wg.Wait()
			}
			wg.Go(func() {
				if n, err := d.ReadAt(p, int64(i)<<20); err != nil || !bytes.Equal(p, disk[i<<20:][:n]) {
					t.Errorf("MiB %d: %d, %v", i, n, err)
				}
			})
		}
		wg.Wait()
	})
}

// Extents are pulled to the end before anything is read: the window is full by then.
func TestPulledFarAhead(t *testing.T) {
	disk := randomDisk(6, 60<<20, 0.9)
	s := &server{b: ourStream(t, disk)}
	d := newDisk(t, s, len(disk), nil)
	soon(t, func() {
		list, err := ranges(t.Context(), d)
		if err != nil || list[len(list)-1].End() != d.Size() {
			t.Errorf("%v, %v", list, err)
		}
		got := make([]byte, len(disk))
		for _, e := range list {
			if _, err := d.ReadAt(got[e.Off:e.End()], e.Off); err != nil && err != io.EOF {
				t.Error(err)
			}
		}
		if !bytes.Equal(got, disk) {
			t.Error("another disk")
		}
	})
}

// What nobody reads is given up when somebody needs the room; reading it then is an error, not zeros.
func TestLeftOut(t *testing.T) {
	disk := randomDisk(7, 60<<20, 1)
	s := &server{b: ourStream(t, disk)}
	d := newDisk(t, s, len(disk), nil)
	soon(t, func() {
		if _, err := d.ReadAt(make([]byte, 100), 0); !errors.Is(err, ErrOutOfReach) {
			t.Errorf("before Extents: %v", err)
		}
		for range d.Extents(t.Context()) {
			break
		}
		p := make([]byte, 1<<20)
		last := int64(len(disk)) - int64(len(p))
		if n, err := d.ReadAt(p, last); n < len(p) || !bytes.Equal(p, disk[last:]) {
			t.Errorf("the end: %d, %v", n, err)
		}
		for _, off := range []int64{0, 1 << 20, last} { // given up twice, and read
			if _, err := d.ReadAt(p, off); !errors.Is(err, ErrOutOfReach) {
				t.Errorf("byte %d again: %v", off, err)
			}
		}
	})
}

// A stream of many small grains and holes: the lists stay bounded, also while one who reads stays behind.
func TestWindowIsBounded(t *testing.T) {
	disk := make([]byte, 300<<20)
	for i := 0; i < len(disk); i += 128 << 10 {
		disk[i] = 1
	}
	s := &server{b: ourStream(t, disk)}
	d := newDisk(t, s, len(disk), nil)
	d.opt.Window = 1 << 20 // 2048 grains, of 2400
	soon(t, func() {
		p, _ := d.begin(t.Context())
		buf := make([]byte, 1<<20)
		crowded := false
		for off := int64(0); off < d.Size(); off += int64(len(buf)) {
			for end := time.Now().Add(10 * time.Second); off == 100<<20 && !crowded && time.Now().Before(end); time.Sleep(time.Millisecond) {
				p.mu.Lock()
				crowded = p.crowded()
				p.mu.Unlock()
			}
			if _, err := d.ReadAt(buf, off); err != nil || !bytes.Equal(buf, disk[off:off+int64(len(buf))]) {
				t.Errorf("byte %d: %v", off, err)
				return
			}
			p.mu.Lock()
			crowded = crowded || p.crowded()
			if len(p.grains)-p.head > 2048 || cap(p.grains) > 4*2048 || p.slabs > p.maxSlabs() {
				t.Errorf("%d grains, %d slabs", len(p.grains), p.slabs)
			}
			p.mu.Unlock()
		}
		if !crowded {
			t.Error("there was room always")
		}
	})
}

// Small reads, one after the other, and of odd lengths.
func TestSmallReads(t *testing.T) {
	disk := randomDisk(8, 3<<20+512, 0.6)
	s := &server{b: streamOf(t, disk)}
	d := newDisk(t, s, len(disk), nil)
	soon(t, func() {
		if _, err := d.begin(t.Context()); err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(iotest.OneByteReader(io.NewSectionReader(d, 0, 1000)))
		if err != nil || !bytes.Equal(got, disk[:1000]) {
			t.Error(err)
		}
		p := make([]byte, 7777)
		for off := 1000; off < len(disk); off += len(p) {
			n, err := d.ReadAt(p, int64(off))
			if !bytes.Equal(p[:n], disk[off:off+n]) || err != nil && (err != io.EOF || off+n != len(disk)) {
				t.Fatalf("byte %d: %d, %v", off, n, err)
			}
		}
		if _, err := d.ReadAt(p, d.Size()); err != io.EOF {
			t.Error(err)
		}
		d.Close()
		if _, err := d.ReadAt(p, 0); !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
		if _, err := ranges(t.Context(), d); !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
	})
}

// 256 MiB of a stream out of memory, read as a backup does.
func BenchmarkDisk(b *testing.B) {
	for name, disk := range map[string][]byte{
		"noise": randomDisk(1, 256<<20, 1),
		"text":  bytes.Repeat([]byte("a line of text, with a number: 1234567890\n"), 6400000)[:256<<20],
	} {
		b.Run(name, func(b *testing.B) {
			s := &server{b: ourStream(b, disk)}
			d := newDisk(b, s, len(disk), func(o *Options) { o.Window = 0 })
			b.SetBytes(int64(len(disk)))
			for b.Loop() {
				work := make(chan int64, 32)
				var wg sync.WaitGroup
				for range 16 {
					wg.Go(func() {
						p := make([]byte, 1<<20)
						for off := range work {
							if _, err := d.ReadAt(p, off); err != nil && err != io.EOF {
								b.Error(err)
							}
						}
					})
				}
				for e, err := range extent.CoarsenUpTo(d.Extents(context.Background()), 1<<20, 1<<20, d.Size()) {
					if err != nil {
						b.Fatal(err)
					}
					work <- e.Off
				}
				close(work)
				wg.Wait()
			}
		})
	}
}
