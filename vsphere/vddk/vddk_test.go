//go:build linux

package vddk

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// image makes a file of random bytes.
func image(t testing.TB, size int) (path string, data []byte) {
	t.Helper()
	data = make([]byte, size)
	c := rand.NewChaCha8([32]byte{byte(size)})
	c.Read(data)
	path = filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path, data
}

// readAll reads all of d by several goroutines in random pieces and compares.
func readAll(t testing.TB, d *Disk, want []byte) {
	t.Helper()
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(1, uint64(i)))
			for range 40 {
				off := rnd.IntN(len(want) + 1)
				p := make([]byte, rnd.IntN(300*kib))
				n, err := d.ReadAt(p, int64(off))
				end := min(off+len(p), len(want))
				switch {
				case off+len(p) > len(want) && err != io.EOF, off+len(p) <= len(want) && err != nil:
					t.Errorf("read of %d at %d of %d: %v", len(p), off, len(want), err)
					return
				case !bytes.Equal(p[:n], want[off:end]):
					t.Errorf("read of %d at %d: %d bytes, and not the file's", len(p), off, n)
					return
				}
			}
		})
	}
	wg.Wait()
}

// TestReads compares what is read with the file that nbdkit serves, and looks into nbdkit's log for what was asked.
func TestReads(t *testing.T) {
	need(t, "nbdkit")
	path, data := image(t, 3*mib+512)
	for _, c := range []struct {
		name    string
		maxRead int
		block   string // smallest block that nbdkit says; empty: it says none
	}{
		{"no blocks", 64 * kib, ""},
		{"sectors", 64 * kib, "512"}, // as the vddk plugin
		{"odd", 10_000, "512"},
		{"one sector", 1, "512"},
	} {
		t.Run(c.name, func(t *testing.T) {
			log := filepath.Join(t.TempDir(), "log")
			args := []string{"--filter=log", "file", path, "logfile=" + log}
			if c.block != "" {
				args = append([]string{"--filter=blocksize-policy"}, append(args, "blocksize-minimum="+c.block, "blocksize-preferred=4096",
					"blocksize-maximum=33554432", "blocksize-error-policy=error")...)
			}
			f := newFake(t, "", args...)
			o := f.options()
			o.MaxRead, o.Connections = c.maxRead, 3
			d := open(t, o)
			if d.Size() != int64(len(data)) {
				t.Fatalf("size %d, want %d", d.Size(), len(data))
			}
			if c.maxRead > 512 {
				readAll(t, d, data)
			} else {
				p := make([]byte, 5000)
				if _, err := d.ReadAt(p, 777); err != nil || !bytes.Equal(p, data[777:5777]) {
					t.Errorf("%v, or other bytes", err)
				}
			}
			if n, err := d.ReadAt(nil, d.Size()); n != 0 || err != nil {
				t.Errorf("nothing at the end: %d, %v", n, err)
			}
			if n, err := d.ReadAt(make([]byte, 1), d.Size()); n != 0 || err != io.EOF {
				t.Errorf("a byte at the end: %d, %v", n, err)
			}
			if _, err := d.ReadAt(make([]byte, 1), -1); err == nil {
				t.Error("a byte before the beginning is read")
			}
			d.Close()
			asked(t, log, max(512, c.maxRead), c.block != "")
			if f.count(t) != 1 {
				t.Errorf("nbdkit was started %d times", f.count(t))
			}
		})
	}
}

var readLine = regexp.MustCompile(` Read id=\d+ offset=(0x[0-9a-f]+) count=(0x[0-9a-f]+)`)

// asked looks at the log of nbdkit's log filter for requests that are too long or not of whole sectors.
func asked(t *testing.T, log string, most int, sectors bool) {
	t.Helper()
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	all := readLine.FindAllSubmatch(text, -1)
	longest := int64(0)
	for _, m := range all {
		off, _ := strconv.ParseInt(string(m[1]), 0, 64)
		n, _ := strconv.ParseInt(string(m[2]), 0, 64)
		if longest = max(longest, n); n > int64(most) || sectors && (off|n)%512 != 0 {
			t.Fatalf("a request of %d bytes at %d", n, off)
		}
	}
	if len(all) < 5 || longest < int64(most)*9/10-512 {
		t.Errorf("%d requests, the longest of %d bytes", len(all), longest)
	}
}

// TestNbdkitDies kills nbdkit again and again while the disk is read.
func TestNbdkitDies(t *testing.T) {
	need(t, "nbdkit")
	path, data := image(t, 4*mib)
	f := newFake(t, "", "--filter=delay", "file", path, "rdelay=3ms")
	o := f.options()
	o.MaxRead, o.Connections = 32*kib, 2
	d := open(t, o)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			if pid, err := strconv.Atoi(strings.TrimSpace(f.note(f.count(t), "pid"))); err == nil {
				syscall.Kill(pid, syscall.SIGKILL)
			}
			select {
			case <-stop:
				return
			case <-time.After(700 * time.Millisecond):
			}
		}
	}()
	readAll(t, d, data)
	close(stop)
	<-done
	if n := f.count(t); n < 2 {
		t.Errorf("nbdkit was started %d times", n)
	} else {
		t.Logf("nbdkit was started %d times", n)
	}
	d.Close()
	f.allEnd(t)
}

// TestIdleDeath: an nbdkit that ended between two reads costs no attempt.
func TestIdleDeath(t *testing.T) {
	need(t, "nbdkit")
	path, data := image(t, mib)
	f := newFake(t, "", "file", path)
	o := f.options()
	o.pause = time.Hour
	d := open(t, o)
	for n := 1; n < 5; n++ {
		syscall.Kill(f.pid(t, n), syscall.SIGKILL)
		seen := func() bool {
			d.mu.Lock()
			defer d.mu.Unlock()
			return d.now == nil
		}
		for !seen() {
			time.Sleep(time.Millisecond)
		}
		p := make([]byte, mib)
		if _, err := d.ReadAt(p, 0); err != nil || !bytes.Equal(p, data) {
			t.Fatalf("%v, or other bytes", err)
		}
	}
}

// TestErrorsEnd: a read that fails is tried three times, then the error says what nbdkit said, without the password.
func TestErrorsEnd(t *testing.T) {
	need(t, "nbdkit")
	f := newFake(t, `cat $run/password >&2; echo " is it; NFC error 5 from server: Failed to allocate the requested 2097176 bytes" >&2`,
		"--filter=error", "memory", "1M", "error-pread-rate=100%")
	var mu sync.Mutex
	var logged []string
	o := f.options()
	o.Log = func(s string) {
		mu.Lock()
		defer mu.Unlock()
		logged = append(logged, s)
	}
	d := open(t, o)
	_, err := d.ReadAt(make([]byte, 1024), 512)
	if err == nil || !strings.Contains(err.Error(), "read of 1024 bytes at 512") || !strings.Contains(err.Error(), "*** is it; NFC") {
		t.Errorf("the error is %v", err)
	}
	if hint := hintOf(t, err); !strings.Contains(hint, "smaller requests") {
		t.Errorf("hint %q", hint)
	}
	mu.Lock()
	all := strings.Join(append(logged, err.Error()), "\n")
	mu.Unlock()
	if strings.Contains(all, secret) || !strings.Contains(all, "trying again") {
		t.Errorf("logged: %s", all)
	}
	if n := f.count(t); n != 3 {
		t.Errorf("nbdkit was started %d times", n)
	}
	d.Close()
	f.allEnd(t)
}

// TestErrorPasses: one failed read does not harm those beside it.
func TestErrorPasses(t *testing.T) {
	need(t, "nbdkit")
	path, data := image(t, mib)
	// Only the first nbdkit fails reads, five in a hundred.
	f := newFake(t, `[ $n = 1 ] && exec nbdkit "$@" --filter=error --filter=delay file '`+path+`' rdelay=2ms error-pread-rate=5%`, "file", path)
	o := f.options()
	var mu sync.Mutex
	injected, again := 0, 0
	o.Log = func(s string) {
		mu.Lock()
		defer mu.Unlock()
		if strings.HasPrefix(s, "trying again") {
			again++
		} else if strings.Contains(s, "injecting EIO") {
			injected++
		}
	}
	d := open(t, o)
	readAll(t, d, data)
	if n := f.count(t); n != 2 {
		t.Errorf("nbdkit was started %d times", n)
	}
	mu.Lock()
	if again != injected || again == 0 {
		t.Errorf("%d reads failed and %d were tried again", injected, again)
	}
	mu.Unlock()
	d.Close()
	f.allEnd(t)
}

// TestOtherSize: a disk that has another size when nbdkit is started again is not read.
func TestOtherSize(t *testing.T) {
	need(t, "nbdkit")
	f := newFake(t, `if [ $n = 1 ]; then set -- "$@" memory 1M; else set -- "$@" memory 2M; fi`)
	d := open(t, f.options())
	syscall.Kill(f.pid(t, 1), syscall.SIGKILL)
	if _, err := d.ReadAt(make([]byte, 512), 0); err == nil || !strings.Contains(err.Error(), "had 1048576 bytes and now has 2097152") {
		t.Errorf("the error is %v", err)
	}
	d.Close()
	f.allEnd(t)
}

// TestLastingError: what another attempt cannot mend is not tried again, so that no account is locked.
func TestLastingError(t *testing.T) {
	need(t, "nbdkit")
	f := newFake(t, `if [ $n != 1 ]; then echo "incorrect user name or password" >&2; exit 1; fi`, "memory", "1M")
	d := open(t, f.options())
	syscall.Kill(f.pid(t, 1), syscall.SIGKILL)
	ends(t, f.pid(t, 1))
	if _, err := d.ReadAt(make([]byte, 512), 0); err == nil || !strings.Contains(err.Error(), "incorrect user name") {
		t.Errorf("the error is %v", err)
	}
	if n := f.count(t); n > 2 {
		t.Errorf("nbdkit was started %d times", n)
	}
}

// TestClose closes a disk while it is read, twice, and counts what is left.
func TestClose(t *testing.T) {
	need(t, "nbdkit")
	before := runtime.NumGoroutine()
	f := newFake(t, "", "--filter=delay", "memory", "8M", "rdelay=50ms")
	for range 3 {
		o := f.options()
		o.MaxRead, o.Connections = 512, 2
		d := open(t, o)
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				if _, err := d.ReadAt(make([]byte, mib), 0); !errors.Is(err, os.ErrClosed) {
					t.Errorf("the error is %v", err)
				}
			})
		}
		time.Sleep(100 * time.Millisecond)
		wg.Go(func() { d.Close() })
		start := time.Now()
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if took := time.Since(start); took > stopTime/2 {
			t.Errorf("closing took %v", took)
		}
		wg.Wait()
		if _, err := d.ReadAt(make([]byte, 1), 0); !errors.Is(err, os.ErrClosed) {
			t.Errorf("read of a closed disk: %v", err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	f.allEnd(t)
	for range 100 {
		if runtime.NumGoroutine() <= before {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	stacks := make([]byte, 64*kib)
	t.Errorf("%d goroutines, %d before\n%s", runtime.NumGoroutine(), before, stacks[:runtime.Stack(stacks, true)])
}

// TestAllocated compares with nbdinfo, over a nbdkit of its own.
func TestAllocated(t *testing.T) {
	need(t, "nbdkit", "nbdinfo")
	path := filepath.Join(t.TempDir(), "disk")
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	const size = 5 << 40
	if err := file.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{0, 1 * mib, 1<<31 - 4096, 3 << 40, size - 4096} {
		if _, err := file.WriteAt(bytes.Repeat([]byte{1}, 4096), off); err != nil {
			t.Fatal(err)
		}
	}
	for _, args := range [][]string{{"file", path}, {"sparse-random", "1G", "seed=7", "runlength=1048576"}, {"--filter=noextents", "memory", "3G"}} {
		f := newFake(t, "", slices.Clone(args)...)
		d := open(t, f.options())
		var got []extent.Extent
		for e, err := range d.Allocated(1) {
			if err != nil {
				t.Fatal(err)
			}
			if got = append(got, e); len(got) == 3 && f.count(t) == 1 { // the listing goes on over another nbdkit
				syscall.Kill(f.pid(t, 1), syscall.SIGKILL)
			}
		}
		if args[0] == "file" && f.count(t) != 2 {
			t.Errorf("nbdkit was started %d times", f.count(t))
		}
		if want := mapOf(t, args...); !slices.Equal(got, want) {
			t.Errorf("%v: %d ranges %v, want %d %v", args, len(got), got[:min(len(got), 9)], len(want), want[:min(len(want), 9)])
		} else {
			t.Logf("%v: %d ranges", args, len(got))
		}
	}
}

// mapOf is what nbdinfo says has data.
func mapOf(t *testing.T, args ...string) (all []extent.Extent) {
	t.Helper()
	out := mustRun(t, append(append([]string{"nbdkit", "-r", "-U", "-"}, args...), "--run", `nbdinfo --json --map "$uri"`)...)
	var entries []struct{ Offset, Length, Type int64 }
	if err := json.Unmarshal(out, &entries); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, e := range entries {
		if e.Type&2 == 0 { // NBD_STATE_ZERO
			all = append(all, extent.Extent{Off: e.Offset, Len: e.Length})
		}
	}
	return extent.Normalise(all)
}

// TestWrites writes a disk and compares the file with what was written, by qemu-img.
func TestWrites(t *testing.T) {
	need(t, "nbdkit", "qemu-img")
	path, data := image(t, 2*mib)
	f := newFake(t, "", "--filter=blocksize-policy", "file", path, "blocksize-minimum=512", "blocksize-preferred=4096",
		"blocksize-maximum=65536", "blocksize-error-policy=error")
	o := f.options()
	o.Writable, o.MaxRead = true, 64*kib
	d := open(t, o)
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range 50 {
		off := rnd.IntN(len(data)/512) * 512
		p := bytes.Repeat([]byte{byte(i)}, min(len(data)-off, rnd.IntN(400)*512))
		if n, err := d.WriteAt(p, int64(off)); n != len(p) || err != nil {
			t.Fatalf("write of %d at %d: %d, %v", len(p), off, n, err)
		}
		copy(data[off:], p)
	}
	for _, bad := range []struct{ n, off int64 }{{1, 0}, {512, 1}, {512, int64(len(data))}, {512, -512}, {1024, int64(len(data)) - 512}} {
		if _, err := d.WriteAt(make([]byte, bad.n), bad.off); err == nil {
			t.Errorf("%d bytes at %d are written", bad.n, bad.off)
		}
	}
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
	readAll(t, d, data)
	d.Close()
	want := filepath.Join(t.TempDir(), "want")
	if err := os.WriteFile(want, data, 0o600); err != nil {
		t.Fatal(err)
	}
	mustRun(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", path, want)

	d = open(t, f.options())
	if _, err := d.WriteAt(make([]byte, 512), 0); !errors.Is(err, os.ErrPermission) {
		t.Errorf("write of a disk opened for reading: %v", err)
	}
	if err := d.Flush(); !errors.Is(err, os.ErrPermission) {
		t.Errorf("flush of a disk opened for reading: %v", err)
	}
}

// TestWriterDies: after nbdkit has ended nothing works any more on a disk that is written.
func TestWriterDies(t *testing.T) {
	need(t, "nbdkit")
	f := newFake(t, "", "memory", "1M")
	o := f.options()
	o.Writable = true
	d := open(t, o)
	if _, err := d.WriteAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	syscall.Kill(f.pid(t, 1), syscall.SIGKILL)
	for i := range 3 {
		if _, err := d.WriteAt(make([]byte, 512), 0); err == nil {
			t.Errorf("write %d after the end of nbdkit: no error", i)
		}
		if _, err := d.ReadAt(make([]byte, 512), 0); !errors.Is(err, errLost) {
			t.Errorf("read %d after the end of nbdkit: %v", i, err)
		}
		if err := d.Flush(); !errors.Is(err, errLost) {
			t.Errorf("flush %d after the end of nbdkit: %v", i, err)
		}
	}
	if f.count(t) != 1 {
		t.Errorf("nbdkit was started %d times", f.count(t))
	}
}
