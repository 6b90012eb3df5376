//go:build linux

package nbd

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// need skips the test when a program is missing, and in short runs; with
// HOLDFAST_TEST_ALL=1 a missing one is an error.
func need(t testing.TB, programs ...string) {
	t.Helper()
	if testing.Short() {
		t.Skip("-short: not running " + programs[0])
	}
	for _, p := range programs {
		_, err := exec.LookPath(p)
		switch {
		case err == nil:
		case os.Getenv("HOLDFAST_TEST_ALL") == "1":
			t.Fatalf("the oracle is missing: %v", err)
		default:
			t.Skipf("the oracle is missing: %v", err)
		}
	}
}

// run runs an oracle to its end and gives what it wrote.
func run(t testing.TB, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%v: %w\n%s", args, err, out)
	}
	return string(out), err
}

func mustRun(t testing.TB, args ...string) string {
	t.Helper()
	out, err := run(t, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// errorLog collects what a server logs.
type errorLog struct {
	mu   sync.Mutex
	errs []error // guarded by mu
}

func (l *errorLog) add(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.errs = append(l.errs, err)
}

func (l *errorLog) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return fmt.Sprint(l.errs)
}

// serve serves s on a socket until the test ends, and gives the socket's path.
func serve(t testing.TB, s *Server) string {
	t.Helper()
	path := filepath.Join(scratch(t), "s")
	ln, err := Listen("unix:" + path)
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, s, ln)
	return path
}

func serveOn(t testing.TB, s *Server, ln net.Listener) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(20 * time.Second):
			t.Error("the server does not end")
		}
	})
}

func uri(path, export string) string { return "nbd+unix:///" + export + "?socket=" + path }

func exports(d Disk, writable bool) []Export {
	return []Export{{Name: "disk0", Description: "the first", Disk: d, Writable: writable}}
}

func TestNbdinfo(t *testing.T) {
	need(t, "nbdinfo")
	d := newFileDisk(t, 20*mib+512)
	path := serve(t, &Server{Exports: []Export{
		{Name: "disk0", Description: "the first", Disk: d, Writable: true},
		{Name: "ro", Disk: &fileDisk{f: d.f, size: d.size}},
	}})
	type exportInfo struct {
		Name        string   `json:"export-name"`
		Description string   `json:"description"`
		Contexts    []string `json:"contexts"`
		ReadOnly    bool     `json:"is_read_only"`
		DF          bool     `json:"can_df"`
		FastZero    bool     `json:"can_fast_zero"`
		Flush       bool     `json:"can_flush"`
		FUA         bool     `json:"can_fua"`
		Multi       bool     `json:"can_multi_conn"`
		Trim        bool     `json:"can_trim"`
		Zero        bool     `json:"can_zero"`
		Min         int      `json:"block_size_minimum"`
		Pref        int      `json:"block_size_preferred"`
		Max         int      `json:"block_size_maximum"`
		Size        int64    `json:"export-size"`
	}
	var got struct {
		Protocol   string
		Structured bool
		Exports    []exportInfo
	}
	if err := json.Unmarshal([]byte(mustRun(t, "nbdinfo", "--json", "--list", uri(path, ""))), &got); err != nil {
		t.Fatal(err)
	}
	first := exportInfo{Name: "disk0", Description: "the first", Contexts: []string{baseAllocation}, DF: true, Flush: true,
		FUA: true, Multi: true, Trim: true, Zero: true, Min: 1, Pref: 64 * kib, Max: 32 * mib, Size: d.size}
	second := first
	second.Name, second.Description, second.ReadOnly, second.Trim, second.Zero = "ro", "", true, false, false
	for i, want := range []exportInfo{first, second} {
		if fmt.Sprint(got.Exports[i]) != fmt.Sprint(want) {
			t.Errorf("export %d:\n%+v, want\n%+v", i, got.Exports[i], want)
		}
	}
	if got.Protocol != "newstyle-fixed" || !got.Structured {
		t.Errorf("protocol %q, structured %v", got.Protocol, got.Structured)
	}
	if out, err := run(t, "nbdinfo", uri(path, "none")); err == nil {
		t.Errorf("an export that is not there: %s", out)
	}
	checkMap(t, path, d)
}

// checkMap compares what nbdinfo says is allocated with what the file system says.
func checkMap(t *testing.T, path string, d *fileDisk) {
	t.Helper()
	var entries []struct {
		Offset, Length int64
		Type           uint32
	}
	if err := json.Unmarshal([]byte(mustRun(t, "nbdinfo", "--json", "--map", uri(path, "disk0"))), &entries); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		if e.Type == 0 {
			got = append(got, fmt.Sprintf("[%d,%d)", e.Offset, e.Offset+e.Length))
		} else if e.Type != StateHole|StateZero {
			t.Errorf("state %d", e.Type)
		}
	}
	var want []string
	for e, err := range d.Allocated(4096) {
		if err != nil {
			t.Fatal(err)
		}
		want = append(want, e.String())
	}
	if !slices.Equal(got, want) || len(want) < 2 {
		t.Errorf("map:\n%v, want\n%v", got, want)
	}
}

func TestNbdcopy(t *testing.T) {
	need(t, "nbdcopy", "cmp", "qemu-img")
	src, dst := newFileDisk(t, 48*mib+4096), newFileDisk(t, 48*mib+4096)
	from, to := serve(t, &Server{Exports: exports(src, false)}), serve(t, &Server{Exports: exports(dst, true)})
	out := filepath.Join(scratch(t), "out.raw")
	mustRun(t, "nbdcopy", "--connections=4", "--requests=16", uri(from, "disk0"), out)
	mustRun(t, "cmp", out, src.path())
	if _, err := dst.f.WriteAt(bytes.Repeat([]byte{7}, 5*mib), mib); err != nil { // what must go
		t.Fatal(err)
	}
	mustRun(t, "nbdcopy", "--connections=4", "--flush", out, uri(to, "disk0"))
	mustRun(t, "cmp", dst.path(), src.path())
	if dst.flushes.Load() == 0 {
		t.Error("nbdcopy --flush did not reach the disk")
	}
	mustRun(t, "nbdcopy", "--synchronous", uri(from, "disk0"), uri(to, "disk0"))
	mustRun(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", uri(from, ""), uri(to, ""))
	if _, err := dst.f.WriteAt([]byte{1}, 30*mib+17); err != nil {
		t.Fatal(err)
	}
	if _, err := run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", uri(from, ""), uri(to, "")); err == nil {
		t.Error("qemu-img compare did not see a changed byte")
	}
}

func TestQemu(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	d := newFileDisk(t, 24*mib)
	log := new(errorLog)
	u := uri(serve(t, &Server{Exports: exports(d, true), Log: log.add}), "disk0")
	qcow2 := filepath.Join(scratch(t), "out.qcow2")
	mustRun(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", u, qcow2)
	mustRun(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", qcow2, d.path())
	out := mustRun(t, "qemu-img", "map", "--output=json", "-f", "raw", u)
	if !strings.Contains(out, `"zero": true`) || !strings.Contains(out, `"zero": false`) {
		t.Errorf("map: %s", out)
	}
	flushes := d.flushes.Load()
	out = mustRun(t, "qemu-io", "-t", "none", "-f", "raw",
		"-c", "write -f -P 0x5a 4096 8192", "-c", "read -P 0x5a 4096 8192",
		"-c", "discard 1M 64k", "-c", "read -P 0 1M 64k",
		"-c", "write -z -u 2M 64k", "-c", "read -P 0 2M 64k",
		"-c", "write -z 3M 4k", "-c", "read -P 0 3M 4k",
		"-c", "aio_write -P 1 4M 1M", "-c", "aio_write -P 2 5M 1M", "-c", "aio_flush",
		"-c", "read -P 1 4M 1M", "-c", "read -P 2 5M 1M",
		"-c", "write -P 9 25165312 512", "-c", "read -P 9 25165312 512", "-c", "flush", u)
	if strings.Contains(out, "fail") || strings.Contains(out, "verification") {
		t.Errorf("qemu-io: %s", out)
	}
	if d.flushes.Load() < flushes+2 { // FUA and flush
		t.Errorf("%d flushes reached the disk", d.flushes.Load()-flushes)
	}
	if out, _ := run(t, "qemu-io", "-f", "raw", "-c", "write -z -n 0 64k", u); !strings.Contains(out, "not supported") {
		t.Errorf("fast zeroing: %s", out)
	}
	if text := log.text(); text != "[]" {
		t.Errorf("logged: %s", text)
	}
}

func TestReadErrors(t *testing.T) {
	need(t, "qemu-io", "nbdcopy")
	d := &faultyDisk{newFileDisk(t, 8*mib), 4608 * kib, io.ErrNoProgress} // where it has data
	log := new(errorLog)
	u := uri(serve(t, &Server{Exports: exports(d, true), Log: log.add}), "disk0")
	for _, args := range [][]string{
		{"qemu-io", "-r", "-f", "raw", "-c", "read 4608k 4k", u},
		{"nbdcopy", u, filepath.Join(scratch(t), "out.raw")},
	} {
		if out, err := run(t, args...); err == nil || !strings.Contains(strings.ToLower(out), "input/output error") {
			t.Errorf("%v: %v: %s", args, err, out)
		}
	}
	mustRun(t, "qemu-io", "-r", "-f", "raw", "-c", "read 4M 512k", u)
	if text := log.text(); !strings.Contains(text, `export "disk0": read of 4096 bytes at 4718592: `+io.ErrNoProgress.Error()) {
		t.Errorf("logged: %s", text)
	}
	if out, _ := run(t, "qemu-io", "-f", "raw", "-c", "write 4608k 4k", u); !strings.Contains(out, "Input/output error") {
		t.Errorf("write: %s", out)
	}
}

func TestFio(t *testing.T) {
	need(t, "fio")
	d := newFileDisk(t, 32*mib)
	path := serve(t, &Server{Exports: exports(d, true)})
	out, err := run(t, "fio", "--name=v", "--ioengine=nbd", "--uri="+uri(path, "disk0"), "--rw=randrw", "--bs=12k",
		"--iodepth=16", "--size=32m", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0")
	if err != nil && strings.Contains(out, "engine nbd not loadable") {
		t.Skip("this fio has no NBD engine")
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestListen also listens beside a server, and over what a dead one left.
func TestListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	ln, err := Listen("unix:" + path)
	if err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(path)
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", fi.Mode(), err)
	}
	if ln, err := Listen("unix:" + path); err == nil {
		ln.Close()
		t.Error("two listen on one socket")
	}
	ln.(*net.UnixListener).SetUnlinkOnClose(false)
	ln.Close()
	ln, err = Listen("unix:" + path)
	if err != nil {
		t.Fatalf("over a left socket: %v", err)
	}
	ln.Close()
	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen("unix:" + path); err == nil {
		t.Error("listens over a file")
	}
	if p, err := os.ReadFile(path); err != nil || string(p) != "mine" {
		t.Errorf("the file: %q, %v", p, err)
	}
	if ln, err = Listen("127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	ln.Close()
}

// TestSizes serves disks of odd, no and enormous size.
func TestSizes(t *testing.T) {
	need(t, "nbdinfo", "nbdcopy", "cmp")
	for _, size := range []int64{0, 1, 511, 4097, 9<<40 + 513} {
		d := newFileDisk(t, size)
		if size > 1<<40 {
			for _, off := range []int64{5<<40 - 3, 1<<42 + 1<<32, size - 1} {
				if _, err := d.f.WriteAt([]byte("abcdefg")[:min(7, size-off)], off); err != nil {
					t.Skipf("no room for %d bytes: %v", size, err)
				}
			}
		}
		path := serve(t, &Server{Exports: exports(d, false)})
		if got := mustRun(t, "nbdinfo", "--size", uri(path, "")); strings.TrimSpace(got) != fmt.Sprint(size) {
			t.Errorf("size %s, want %d", got, size)
		}
		c := dial(t, "unix:"+path, ClientOptions{})
		p, want := make([]byte, 7), make([]byte, 7)
		n, err := c.ReadAt(p, max(0, size-3))
		if k, _ := d.ReadAt(want, max(0, size-3)); n != k || !bytes.Equal(p, want) || err != io.EOF {
			t.Errorf("the end of %d: %d %q, %v; want %d %q", size, n, p, err, k, want)
		}
		if size > 1<<40 {
			checkMap(t, path, d)
			continue
		}
		out := filepath.Join(scratch(t), "out")
		mustRun(t, "nbdcopy", uri(path, ""), out)
		mustRun(t, "cmp", out, d.path())
	}
}

// TestTCP serves over TCP, to several clients of both kinds.
func TestTCP(t *testing.T) {
	need(t, "nbdcopy", "cmp")
	d := newFileDisk(t, 20*mib)
	ln, err := Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, &Server{Exports: exports(d, false)}, ln)
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			out := filepath.Join(scratch(t), "out")
			for _, args := range [][]string{
				{"nbdcopy", "--connections=2", "nbd://" + ln.Addr().String() + "/disk0", out},
				{"cmp", out, d.path()},
			} {
				if _, err := run(t, args...); err != nil {
					t.Error(err)
				}
			}
		})
	}
	c := dial(t, ln.Addr().String(), ClientOptions{Connections: 3})
	p, want := make([]byte, 10*mib), make([]byte, 10*mib)
	if _, err := d.ReadAt(want, 77); err != nil {
		t.Fatal(err)
	}
	if _, err := c.ReadAt(p, 77); err != nil || !bytes.Equal(p, want) {
		t.Errorf("our client: %v", err)
	}
	wg.Wait()
}
