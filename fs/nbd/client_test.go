//go:build linux

package nbd

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// start runs a server that is not ours until the test ends. SOCKET in args is
// the path where it is to listen, which is returned.
func start(t testing.TB, args ...string) string {
	t.Helper()
	path := filepath.Join(scratch(t), "s")
	for i := range args {
		args[i] = strings.ReplaceAll(args[i], "SOCKET", path)
	}
	var out bytes.Buffer
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-ended
	})
	for range 500 {
		if nc, err := net.Dial("unix", path); err == nil {
			nc.Close()
			return path
		}
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("%v: %v\n%s", args, err, out.String())
		case <-time.After(20 * time.Millisecond):
		}
	}
	t.Fatalf("%v does not listen", args)
	return ""
}

func nbdkit(t testing.TB, args ...string) string {
	t.Helper()
	need(t, "nbdkit")
	return start(t, append([]string{"nbdkit", "-f", "-U", "SOCKET"}, args...)...)
}

func dial(t testing.TB, server string, o ClientOptions) *Client {
	t.Helper()
	c, err := Dial(context.Background(), server, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// TestClientWrites writes through the client to nbdkit, in all ways that servers
// differ, and reads what is there with nbdcopy.
func TestClientWrites(t *testing.T) {
	const size = 6 * mib
	for _, c := range []struct {
		name  string
		args  []string
		block int64
		conns int // that come of 4
	}{
		{"plain", nil, 1, 4},
		{"no structured replies", []string{"--no-sr"}, 1, 4},
		{"no options", []string{"--mask-handshake=0"}, 1, 4},
		{"blocks of 4096", []string{"--filter=blocksize-policy", "blocksize-minimum=4096", "blocksize-preferred=65536",
			"blocksize-maximum=262144", "blocksize-error-policy=error"}, 4096, 4},
		{"one connection", []string{"--filter=multi-conn", "multi-conn-mode=disable"}, 1, 1},
		{"no zeroing", []string{"--filter=nozero"}, 1, 4},
	} {
		t.Run(c.name, func(t *testing.T) {
			need(t, "nbdcopy")
			var filters, params []string
			for _, a := range c.args {
				if strings.HasPrefix(a, "--") {
					filters = append(filters, a)
				} else {
					params = append(params, a)
				}
			}
			path := nbdkit(t, append(append(filters, "memory", fmt.Sprint(size)), params...)...)
			cl := dial(t, "unix:"+path, ClientOptions{Connections: 4})
			if cl.Size() != size || cl.Connections() != c.conns {
				t.Errorf("size %d, %d connections, want %d", cl.Size(), cl.Connections(), c.conns)
			}
			model := make([]byte, size)
			randomOps(t, cl, model, c.block, 200)
			got := filepath.Join(scratch(t), "out")
			mustRun(t, "nbdcopy", uri(path, ""), got)
			p, err := os.ReadFile(got)
			if err != nil || !bytes.Equal(p, model) {
				t.Fatalf("nbdcopy reads other bytes than were written (%v)", err)
			}
		})
	}
}

// TestHandshakeTime: a server that opens the export slowly is given the time that it is said to need.
func TestHandshakeTime(t *testing.T) {
	path := nbdkit(t, "--filter=delay", "memory", "1M", "delay-open=1")
	dial(t, "unix:"+path, ClientOptions{Handshake: 10 * time.Second})
	start := time.Now()
	if c, err := Dial(context.Background(), "unix:"+path, ClientOptions{Handshake: 100 * time.Millisecond}); err == nil {
		c.Close()
		t.Error("the handshake took its time")
	} else if took := time.Since(start); !errors.Is(err, context.DeadlineExceeded) || took > 900*time.Millisecond {
		t.Errorf("after %v: %v", took, err)
	}
}

// randomOps changes d and model alike, and compares what it reads.
func randomOps(t testing.TB, d WritableDisk, model []byte, block int64, n int) {
	t.Helper()
	rnd := mathrand.New(mathrand.NewPCG(1, uint64(block)))
	size := int64(len(model))
	for i := range n {
		off := rnd.Int64N(size/block) * block
		length := min(rnd.Int64N(600*kib)/block*block, size-off)
		var err error
		switch rnd.IntN(4) {
		case 0:
			p := bytes.Repeat([]byte{byte(i)}, int(length))
			copy(model[off:], p)
			_, err = d.WriteAt(p, off)
		case 1:
			clear(model[off : off+length])
			err = d.Zero(off, length, i%2 == 0)
		case 2:
			err = d.Flush()
		default:
			off, length = off+rnd.Int64N(block), length-rnd.Int64N(min(length, block)+1)
			length = min(max(length, 1), size-off)
			checkRead(t, d, model, off, length)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	checkRead(t, d, model, 0, size)
}

func checkRead(t testing.TB, d io.ReaderAt, model []byte, off, length int64) {
	t.Helper()
	p := bytes.Repeat([]byte{0xAA}, int(length))
	if n, err := d.ReadAt(p, off); n != len(p) || err != nil && err != io.EOF {
		t.Fatalf("ReadAt(%d bytes, %d) = %d, %v", length, off, n, err)
	}
	if !bytes.Equal(p, model[off:off+length]) {
		t.Fatalf("ReadAt(%d bytes, %d) reads other bytes than were written", length, off)
	}
}

// TestClientReads reads nbdkit's pattern, in which every 8 bytes are their own
// offset, with the ends of the export and unaligned edges.
func TestClientReads(t *testing.T) {
	const size = 10<<40 + 8*13
	path := nbdkit(t, "pattern", fmt.Sprint(int64(size)))
	c := dial(t, uri(path, ""), ClientOptions{})
	for _, off := range []int64{0, 3, 4096, 1<<32 - 5, size - 100*kib, size - 9, size - 1} {
		p := make([]byte, 100*kib)
		n, err := c.ReadAt(p, off)
		if want := min(int64(len(p)), size-off); int64(n) != want || (want < int64(len(p))) != (err == io.EOF) {
			t.Fatalf("read at %d: %d, %v", off, n, err)
		}
		for i := range n {
			at := off + int64(i)
			if want := byte(at &^ 7 >> (8 * (7 - at%8))); p[i] != want {
				t.Fatalf("byte %d is %#x, want %#x", at, p[i], want)
			}
		}
	}
	if n, err := c.ReadAt(make([]byte, 1), size); n != 0 || err != io.EOF {
		t.Errorf("past the end: %d, %v", n, err)
	}
	large := make([]byte, 33*mib) // more than one request may have
	if _, err := c.ReadAt(large, 5); err != nil || be.Uint64(large[32*mib+3:]) != 32*mib+8 {
		t.Errorf("large read: %v", err)
	}
}

func TestClientErrors(t *testing.T) {
	path := nbdkit(t, "--filter=error", "memory", "1M", "error-pread=ENOSPC", "error-pread-rate=100%", "error-pwrite=EIO", "error-pwrite-rate=100%")
	c := dial(t, "unix:"+path, ClientOptions{Export: "x"})
	if _, err := c.ReadAt(make([]byte, 512), 1024); !errors.Is(err, ENOSPC) || !strings.Contains(err.Error(), `export "x": read of 512 bytes at 1024`) {
		t.Errorf("read: %v", err)
	}
	if _, err := c.WriteAt(make([]byte, 512), 1024); !errors.Is(err, EIO) || !strings.Contains(err.Error(), `write of 512 bytes at 1024`) {
		t.Errorf("write: %v", err)
	}
	if _, err := c.WriteAt(make([]byte, 512), 1<<20-1); !errors.Is(err, ENOSPC) {
		t.Errorf("write past the end: %v", err)
	}
	for server, want := range map[string]string{
		"unix:" + filepath.Join(t.TempDir(), "none"):                                      "no such file",
		"unix:" + nbdkit(t, "-r", "memory", "1M", "--tls=require", "--tls-psk=/dev/null"): "",
		"unix:" + nbdkit(t, "-o", "memory", "1M"):                                         "oldstyle",
	} {
		if _, err := Dial(context.Background(), server, ClientOptions{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", server, err)
		}
	}
	ro := dial(t, "unix:"+nbdkit(t, "-r", "memory", "1M"), ClientOptions{})
	if _, err := ro.WriteAt([]byte{1}, 0); !errors.Is(err, EPERM) || ro.Flags()&ReadOnly == 0 {
		t.Errorf("write to a read-only export: %v", err)
	}
}

// qcow2 makes an image with a bitmap b0 that was added after the first of two writes.
func qcow2(t *testing.T) string {
	t.Helper()
	need(t, "qemu-img", "qemu-io", "qemu-nbd")
	path := filepath.Join(scratch(t), "disk.qcow2")
	mustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
	mustRun(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 1M 1M", "-c", "write -P 2 8M 64k", path)
	mustRun(t, "qemu-img", "bitmap", "--add", "-f", "qcow2", "-g", "64k", path, "b0")
	mustRun(t, "qemu-io", "-f", "qcow2", "-c", "write -P 3 8M 192k", "-c", "write -P 4 40M 64k", path)
	return path
}

// TestDirtyBitmap asks qemu-nbd what was written since a bitmap was added.
func TestDirtyBitmap(t *testing.T) {
	path := start(t, "qemu-nbd", "-t", "-e", "8", "-r", "-k", "SOCKET", "-x", "disk", "-f", "qcow2", "-B", "b0", "-A", qcow2(t))
	names := []string{baseAllocation, "qemu:dirty-bitmap:b0", "qemu:allocation-depth", "qemu:dirty-bitmap:none"}
	c := dial(t, uri(path, "disk"), ClientOptions{MetaContexts: names, Connections: 2})
	if got := slices.Sorted(slices.Values(c.Contexts())); !slices.Equal(got, slices.Sorted(slices.Values(names[:3]))) {
		t.Errorf("contexts %v", got)
	}
	for name, want := range map[string][]extent.Extent{
		names[0]: {{Off: mib, Len: mib}, {Off: 8 * mib, Len: 192 * kib}, {Off: 40 * mib, Len: 64 * kib}},
		names[1]: {{Off: 8 * mib, Len: 192 * kib}, {Off: 40 * mib, Len: 64 * kib}},
		names[2]: {{Off: mib, Len: mib}, {Off: 8 * mib, Len: 192 * kib}, {Off: 40 * mib, Len: 64 * kib}},
	} {
		var got []extent.Extent
		end := int64(0)
		for s, err := range c.Extents(context.Background(), name, 0, c.Size()) {
			if err != nil {
				t.Fatal(err)
			}
			if s.Off != end {
				t.Errorf("%s: %v after %d", name, s, end)
			}
			end = s.End()
			if name == baseAllocation && s.Flags&StateZero == 0 || name != baseAllocation && s.Flags != 0 {
				got = append(got, s.Extent)
			}
		}
		if got = extent.Normalise(got); !slices.Equal(got, want) || end != c.Size() {
			t.Errorf("%s: %v to %d, want %v", name, got, end, want)
		}
	}
	if _, err := c.BlockStatus(context.Background(), names[3], 0, 1); err == nil {
		t.Error("a bitmap that is not there")
	}
	list, err := List(context.Background(), "unix:"+path, ClientOptions{})
	if err != nil || len(list) != 1 || list[0].Name != "disk" {
		t.Errorf("list: %v, %v", list, err)
	}
	if _, err := Dial(context.Background(), uri(path, "none"), ClientOptions{}); err == nil || !strings.Contains(err.Error(), `export "none"`) {
		t.Errorf("another export: %v", err)
	}
}

// TestAllocated compares what the client finds allocated on nbdkit with what the
// file system says, and everything with a server that does not know.
func TestAllocated(t *testing.T) {
	d := newFileDisk(t, 30*mib+777)
	collect := func(d Disk, granularity int64) (all []extent.Extent) {
		for e, err := range d.Allocated(granularity) {
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, e)
		}
		return all
	}
	c := dial(t, "unix:"+nbdkit(t, "-r", "file", d.path()), ClientOptions{})
	for _, g := range []int64{1, 4096, 128 * kib, mib} {
		if got, want := collect(c, g), collect(d, g); !slices.Equal(got, want) {
			t.Errorf("by %d: %v, want %v", g, got, want)
		}
	}
	c = dial(t, "unix:"+nbdkit(t, "--no-sr", "-r", "file", d.path()), ClientOptions{})
	if got := collect(c, 1); len(got) != 1 || got[0].Len != d.size {
		t.Errorf("without base:allocation: %v", got)
	}
}

// certificates makes an authority and a server's certificate in dir, by the
// names that nbdkit and libnbd expect.
func certificates(t testing.TB, dir string) (server tls.Certificate, roots *x509.CertPool) {
	t.Helper()
	check := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	write := func(name, kind string, der []byte) {
		check(os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
	}
	sign := func(tmpl, parent *x509.Certificate, key, by *ecdsa.PrivateKey) *x509.Certificate {
		tmpl.NotBefore, tmpl.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
		if parent == nil {
			parent = tmpl
		}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, &key.PublicKey, by)
		check(err)
		cert, err := x509.ParseCertificate(der)
		check(err)
		return cert
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(err)
	ca := sign(&x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}, nil, caKey, caKey)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(err)
	cert := sign(&x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "nbd.example"}, DNSNames: []string{"nbd.example"},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}, ca, key, caKey)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	check(err)
	write("ca-cert.pem", "CERTIFICATE", ca.Raw)
	write("server-cert.pem", "CERTIFICATE", cert.Raw)
	write("server-key.pem", "PRIVATE KEY", keyDER)
	roots = x509.NewCertPool()
	roots.AddCert(ca)
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}, roots
}

func TestClientTLS(t *testing.T) {
	dir := scratch(t)
	_, roots := certificates(t, dir)
	path := nbdkit(t, "--tls=require", "--tls-certificates="+dir, "pattern", "8M")
	conf := &tls.Config{RootCAs: roots, ServerName: "nbd.example"}
	c := dial(t, "unix:"+path, ClientOptions{TLS: conf, Connections: 2})
	p := make([]byte, 3*mib)
	if _, err := c.ReadAt(p, 4096); err != nil || be.Uint64(p[2*mib:]) != 2*mib+4096 || !c.Secure() {
		t.Errorf("read over TLS: %v, secure %v", err, c.Secure())
	}
	for what, o := range map[string]ClientOptions{
		"wants TLS": {},
		"x509":      {TLS: &tls.Config{ServerName: "nbd.example"}},
		"not other": {TLS: &tls.Config{RootCAs: roots, ServerName: "other.example"}},
	} {
		if _, err := Dial(context.Background(), "unix:"+path, o); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%s: %v", what, err)
		}
	}
	plain := nbdkit(t, "memory", "1M")
	if _, err := Dial(context.Background(), "nbds+unix:///?tls-verify-peer=0&socket="+plain, ClientOptions{}); err == nil {
		t.Error("a server without TLS was good enough for nbds")
	}
}

func TestServerTLS(t *testing.T) {
	need(t, "nbdinfo", "nbdcopy", "cmp")
	dir := scratch(t)
	cert, _ := certificates(t, dir)
	d := newFileDisk(t, 9*mib)
	path := serve(t, &Server{Exports: exports(d, false), TLS: &tls.Config{Certificates: []tls.Certificate{cert}}, RequireTLS: true})
	secure := "nbds+unix://nbd.example/disk0?tls-certificates=" + dir + "&socket=" + path
	out := filepath.Join(scratch(t), "out")
	mustRun(t, "nbdcopy", secure, out)
	mustRun(t, "cmp", out, d.path())
	if got := mustRun(t, "nbdinfo", "--list", secure); !strings.Contains(got, "with TLS") || !strings.Contains(got, baseAllocation) {
		t.Errorf("nbdinfo: %s", got)
	}
	if got, err := run(t, "nbdinfo", uri(path, "disk0")); err == nil || !strings.Contains(got, "TLS") {
		t.Errorf("without TLS: %v: %s", err, got)
	}
}
