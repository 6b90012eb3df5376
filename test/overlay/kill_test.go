//go:build linux

package overlay

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fs/nbd"
	"github.com/holdfast-backup/holdfast/fs/overlay"
	"github.com/holdfast-backup/holdfast/fs/overlay/overlaytest"
	"github.com/holdfast-backup/holdfast/fs/vdisk"
)

// Sizes in bytes. The parts of the disk do not end with blocks, so writers share some.
const (
	writers = 4
	part    = 12*overlay.Block + 3*overlaytest.Sector
	size    = writers*part + 700
)

// killsOfOne is how many kills an overlay lives through.
const killsOfOne = 20

// serveDir tells this program to serve the overlay in a directory, instead of testing.
const serveDir = "HOLDFAST_TEST_OVERLAY_SERVE"

func TestMain(m *testing.M) {
	dir := os.Getenv(serveDir)
	if dir == "" {
		os.Exit(m.Run())
	}
	fmt.Fprintln(os.Stderr, serve(dir))
	os.Exit(1)
}

// serve serves the overlay in dir until stdin ends. It says on stdout when it listens.
func serve(dir string) error {
	d, err := openOverlay(dir, overlay.Open)
	if err != nil {
		return err
	}
	ln, err := nbd.Listen("unix:" + filepath.Join(dir, "socket"))
	if err != nil {
		return err
	}
	fmt.Println("listening")
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	return (&nbd.Server{Exports: []nbd.Export{{Disk: d, Writable: true}}}).Serve(ctx, ln)
}

// openOverlay opens the overlay in dir, which leaves the image open, too.
func openOverlay(dir string, how func(string, overlay.Image, overlay.Options) (*overlay.Disk, error)) (*overlay.Disk, error) {
	image, err := vdisk.OpenRaw(filepath.Join(dir, "base.raw"))
	if err != nil {
		return nil, err
	}
	d, err := how(filepath.Join(dir, "overlay"), image, overlay.Options{Base: "base"})
	if err != nil {
		image.Close()
	}
	return d, err
}

// count is what happened.
type count struct {
	runs, flushes, sectors int
	inFlush                int // kills while somebody waited for a flush
}

// TestKill: several clients write, zero, trim and flush over NBD when SIGKILL ends the server. Then each sector
// holds what it held at the last flush that returned, or something written after that.
func TestKill(t *testing.T) {
	var n count
	start, runs := time.Now(), overlaytest.Runs(t)
	for seed := uint64(0); n.runs < runs; seed++ {
		lives(t, seed, min(killsOfOne, runs-n.runs), &n)
	}
	t.Logf("%d runs, as many kills, %d of them in a flush; %d flushes acknowledged, %d sectors checked, in %v",
		n.runs, n.inFlush, n.flushes, n.sectors, time.Since(start).Round(time.Second))
}

// lives makes an overlay and kills its server many times.
func lives(t *testing.T, seed uint64, kills int, n *count) {
	dir, err := os.MkdirTemp(cmp.Or(os.Getenv("HOLDFAST_TEST_DIR"), "/var/tmp"), "holdfast-kill-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	r := rand.New(rand.NewPCG(seed, 1))
	holds := makeBase(t, r, filepath.Join(dir, "base.raw"))
	d, err := openOverlay(dir, overlay.Create)
	if err == nil {
		err = d.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	for range kills {
		may := life(t, r, dir, holds, n)
		holds = look(t, dir)
		for w, s := range may {
			from, to := partOf(w)
			if err := s.Check(holds[from:to]); err != nil {
				t.Fatalf("seed %d, part %d: %v", seed, w, err)
			}
		}
		n.runs++
		n.sectors += (size + overlaytest.Sector - 1) / overlaytest.Sector
	}
}

// makeBase writes an image with data in half of its blocks.
func makeBase(t *testing.T, r *rand.Rand, file string) []byte {
	b := make([]byte, size)
	for off := 0; off < size; off += overlay.Block {
		if r.IntN(2) == 0 {
			fill(r, b[off:min(off+overlay.Block, size)])
		}
	}
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		t.Fatal(err)
	}
	return b
}

func fill(r *rand.Rand, p []byte) {
	for i := range p {
		p[i] = byte(r.Uint32())
	}
}

// partOf is the bytes of the disk that a writer has for itself.
func partOf(w int) (from, to int64) {
	if w == writers-1 {
		return int64(w) * part, size
	}
	return int64(w) * part, int64(w+1) * part
}

// look is what the overlay holds now.
func look(t *testing.T, dir string) []byte {
	d, err := openOverlay(dir, overlay.Open)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, size)
	if _, err := d.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	return b
}

// life is that of one server: what each writer's part may hold afterwards.
func life(t *testing.T, r *rand.Rand, dir string, holds []byte, n *count) (may [writers]*overlaytest.Sectors) {
	server, listening := start(t, dir)
	defer server.Process.Kill()
	if !listening.Scan() {
		t.Fatal("the server did not listen: ", server.Wait())
	}
	c, err := nbd.Dial(context.Background(), "unix:"+filepath.Join(dir, "socket"), nbd.ClientOptions{Connections: 3})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	all := make([]*writer, writers)
	flushing := make(chan bool, 1)
	var killed atomic.Bool
	var wg sync.WaitGroup
	for w := range all {
		from, to := partOf(w)
		may[w] = overlaytest.New(holds[from:to])
		all[w] = &writer{rnd: rand.New(rand.NewPCG(r.Uint64(), 2)), disk: c, may: may[w], from: from, to: to, flushing: flushing}
		wg.Go(func() {
			if err := all[w].work(); !killed.Load() {
				t.Errorf("before the kill: %v", err)
			}
		})
	}
	if r.IntN(4) > 0 {
		for range 1 + r.IntN(16) {
			select {
			case <-flushing:
			case <-time.After(time.Minute):
				t.Fatal("nobody flushes")
			}
		}
	}
	time.Sleep(time.Duration(r.IntN(2000)) * time.Microsecond)
	killed.Store(true)
	if err := server.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	server.Wait()
	inFlush := false
	for _, w := range all {
		n.flushes += w.flushes
		inFlush = inFlush || w.inFlush
	}
	if inFlush {
		n.inFlush++
	}
	return may
}

// start starts this program as a server.
func start(t *testing.T, dir string) (*exec.Cmd, *bufio.Scanner) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), serveDir+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cmd.StdinPipe(); err != nil { // ends with this process
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd, bufio.NewScanner(out)
}

// writer changes a part of a disk.
type writer struct {
	rnd      *rand.Rand
	disk     nbd.WritableDisk
	may      *overlaytest.Sectors // what the part may hold
	from, to int64
	flushing chan<- bool // told about a flush that begins, if it listens

	flushes int  // that returned
	inFlush bool // it was a flush that failed
}

// work works until something fails, which it returns.
func (w *writer) work() error {
	for {
		var err error
		if w.rnd.IntN(6) == 0 {
			err = w.flush()
		} else {
			err = w.change()
		}
		if err != nil {
			return err
		}
	}
}

func (w *writer) flush() error {
	select {
	case w.flushing <- true:
	default:
	}
	if err := w.disk.Flush(); err != nil {
		w.inFlush = true
		return err
	}
	w.flushes++
	w.may.Settle()
	return nil
}

// change writes, zeroes or trims any bytes, or whole blocks.
func (w *writer) change() error {
	const block = overlay.Block
	off := w.from + w.rnd.Int64N(w.to-w.from)
	n := 1 + w.rnd.Int64N([]int64{overlaytest.Sector, block, 4 * block}[w.rnd.IntN(3)])
	if w.rnd.IntN(3) == 0 {
		off, n = max(w.from, off/block*block), (n+block-1)/block*block
	}
	n = min(n, w.to-off)
	p := make([]byte, n)
	switch w.rnd.IntN(6) {
	case 0:
		w.may.Add(off-w.from, p)
		return w.disk.Zero(off, n, w.rnd.IntN(2) == 0)
	case 1:
		// What Trim takes is zero: whole blocks.
		end := off + n
		if end != size {
			end -= end % block
		}
		if at := (off + block - 1) / block * block; at < end {
			w.may.Add(at-w.from, p[:end-at])
		}
		return w.disk.Trim(off, n)
	}
	fill(w.rnd, p)
	w.may.Add(off-w.from, p)
	_, err := w.disk.WriteAt(p, off)
	return err
}
