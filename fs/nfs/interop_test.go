//go:build linux

package nfs_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/nfs"
	"github.com/holdfast-backup/holdfast/fs/nfs/nfstest"
)

// need skips the test when a program, "root" or "qemu's nfs" is missing, and in
// short runs; with HOLDFAST_TEST_ALL=1 that is an error.
func need(t *testing.T, things ...string) {
	t.Helper()
	if testing.Short() {
		t.Skip("-short: not running " + things[0])
	}
	for _, thing := range things {
		var err error
		switch thing {
		case "root":
			if os.Geteuid() != 0 {
				err = unix.EPERM
			}
		case "qemu's nfs": // a package of its own
			out, _ := exec.Command("qemu-img", "info", "nfs://127.0.0.1:1/a/b").CombinedOutput()
			if bytes.Contains(out, []byte("Unknown protocol")) {
				err = errors.New("qemu-img knows no nfs://")
			}
		default:
			_, err = exec.LookPath(thing)
		}
		switch {
		case err == nil:
		case os.Getenv("HOLDFAST_TEST_ALL") == "1":
			t.Fatalf("needs %s: %v", thing, err)
		default:
			t.Skipf("needs %s: %v", thing, err)
		}
	}
}

// run runs a program to its end and gives what it wrote.
func run(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return string(out)
}

// ownNetwork gives the test a network of its own, where port 111 is free. Only
// what the test's own goroutine starts is in it.
func ownNetwork(t *testing.T) {
	t.Helper()
	need(t, "root")
	runtime.LockOSThread() // for good: the thread ends with the test
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		t.Fatal(err)
	}
	lo.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo); err != nil {
		t.Fatal(err)
	}
}

// onStandardPorts serves fs as hypervisors expect it.
func onStandardPorts(t *testing.T, fs nfs.FS) *running {
	t.Helper()
	s := &nfs.Server{}
	if err := s.ListenPortmap(":111"); err != nil {
		t.Fatal(err)
	}
	return serveAt(t, ":2049", s, share(fs))
}

func randomBytes(n int) []byte {
	p := make([]byte, n)
	rnd := rand.New(rand.NewPCG(1, uint64(n)))
	for i := range p {
		p[i] = byte(rnd.Uint32())
	}
	return p
}

// TestLibnfsTools copies files there and back with the tools of libnfs, by the portmapper.
func TestLibnfsTools(t *testing.T) {
	need(t, "nfs-ls", "nfs-cp", "nfs-cat")
	ownNetwork(t)
	onStandardPorts(t, nfstest.NewMemory())
	libnfsTools(t, "nfs://127.0.0.1/ds", "")
}

// TestLibnfsPorts does the same with ports that the client is told.
func TestLibnfsPorts(t *testing.T) {
	need(t, "nfs-ls", "nfs-cp", "nfs-cat")
	r := serve(t, &nfs.Server{}, share(nfstest.NewMemory()))
	port := r.Addr().(*net.TCPAddr).Port
	libnfsTools(t, "nfs://127.0.0.1/ds", fmt.Sprintf("?version=3&nfsport=%d&mountport=%[1]d", port))
}

func libnfsTools(t *testing.T, url, options string) {
	dir := t.TempDir()
	for _, size := range []int{0, 1, 4097, 3<<20 + 7} {
		local, back := filepath.Join(dir, fmt.Sprint("f", size)), filepath.Join(dir, fmt.Sprint("back", size))
		data := randomBytes(size)
		if err := os.WriteFile(local, data, 0o600); err != nil {
			t.Fatal(err)
		}
		remote := fmt.Sprintf("%s/f%d%s", url, size, options)
		run(t, "nfs-cp", local, remote)
		run(t, "nfs-cp", remote, back)
		if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes came back as %d other ones: %v", size, len(got), err)
		}
		if size > 0 && run(t, "nfs-cat", remote) != string(data) {
			t.Errorf("nfs-cat of %d bytes differs", size)
		}
	}
	list := run(t, "nfs-ls", "-R", url+options)
	for _, want := range []string{"f0", "f1", "f4097", "f3145735"} {
		if !strings.Contains(list, " "+want+"\n") {
			t.Errorf("%q is not listed:\n%s", want, list)
		}
	}
}

// TestLibnfsManyFiles lists 10,000 of them.
func TestLibnfsManyFiles(t *testing.T) {
	need(t, "nfs-ls")
	m := nfstest.NewMemory()
	for i := range 10_000 {
		if _, err := m.Create(t.Context(), m.Root(), fmt.Sprintf("file%05d", i), nfs.Creation{}); err != nil {
			t.Fatal(err)
		}
	}
	r := serve(t, &nfs.Server{}, share(m))
	port := r.Addr().(*net.TCPAddr).Port
	list := run(t, "nfs-ls", fmt.Sprintf("nfs://127.0.0.1/ds?version=3&nfsport=%d&mountport=%[1]d", port))
	if n := strings.Count(list, "file"); n != 10_000 {
		t.Errorf("%d files are listed", n)
	}
}

// TestQemuWrites has QEMU's NFS driver write at random, and the same to a plain file.
func TestQemuWrites(t *testing.T) {
	need(t, "qemu-img", "qemu-io", "qemu's nfs")
	ownNetwork(t)
	m := nfstest.NewMemory()
	onStandardPorts(t, m)
	const size = 24 << 20
	local, remote := filepath.Join(t.TempDir(), "disk.raw"), "nfs://127.0.0.1/ds/disk.raw"
	run(t, "qemu-img", "create", "-q", "-f", "raw", local, fmt.Sprint(size))
	run(t, "qemu-img", "create", "-q", "-f", "raw", remote, fmt.Sprint(size))
	rnd := rand.New(rand.NewPCG(3, 3))
	for range 4 {
		var ops []string
		for range 60 {
			off := rnd.IntN(size)
			n := 1 + rnd.IntN(min(size-off, 1<<[...]int{9, 12, 16, 21}[rnd.IntN(4)]))
			op := fmt.Sprintf("%s -P %d %d %d", []string{"write", "aio_write", "write -f"}[rnd.IntN(3)], rnd.IntN(256), off, n)
			ops = append(ops, "-c", op)
			if rnd.IntN(10) == 0 {
				ops = append(ops, "-c", "aio_flush", "-c", "flush")
			}
			if strings.HasPrefix(op, "aio") {
				ops = append(ops, "-c", "aio_flush") // of writes that overlap either may be the last
			}
		}
		ops = append(ops, "-c", "aio_flush", "-c", "flush")
		for _, disk := range []string{local, remote} {
			run(t, append(append([]string{"qemu-io", "-f", "raw"}, ops...), disk)...)
		}
		m.Crash() // all was flushed
		if out := run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", local, remote); !strings.Contains(out, "identical") {
			t.Fatal(out)
		}
	}
	back := filepath.Join(t.TempDir(), "back.raw")
	run(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", remote, back)
	run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", local, back)
}

// TestQemuRestart starts the server again under a client that has a file open.
func TestQemuRestart(t *testing.T) {
	need(t, "qemu-img", "qemu-io", "qemu's nfs")
	ownNetwork(t)
	m := nfstest.NewMemory()
	first := onStandardPorts(t, m)
	run(t, "qemu-img", "create", "-q", "-f", "raw", "nfs://127.0.0.1/ds/disk.raw", "1M")
	cmd := exec.CommandContext(t.Context(), "qemu-io", "-f", "raw", "nfs://127.0.0.1/ds/disk.raw")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	// A line that comes before the prompt would wait in the buffer of stdin for ever.
	do := func(line, want string) {
		t.Helper()
		io.WriteString(in, line)
		var got []byte
		for p := make([]byte, 1000); !bytes.Contains(got, []byte(want)) || !bytes.HasSuffix(got, []byte("qemu-io> ")); {
			n, err := out.Read(p)
			if got = append(got, p[:n]...); err != nil {
				t.Fatalf("%s: %v\n%s", line, err, got)
			}
			if bytes.Contains(got, []byte("rror")) || bytes.Contains(got, []byte("failed")) {
				t.Fatalf("%s: %s", line, got)
			}
		}
	}
	do("", "")
	do("write -P 17 4096 8192\n", "wrote 8192/8192")
	do("flush\n", "")
	for range 3 {
		first.stop()
		first = onStandardPorts(t, m)
		do("read -P 17 4096 8192\n", "read 8192/8192")
		do("write -P 17 4096 8192\n", "wrote 8192/8192")
		if st, err := first.Stats("/ds"); err != nil || st.Ops["READ"] == 0 || st.Ops["WRITE"] == 0 {
			t.Errorf("the new server did not do it: %+v, %v", st, err)
		}
	}
}
