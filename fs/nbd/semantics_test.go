//go:build linux

package nbd

import (
	"context"
	"crypto/tls"
	"io"
	"testing"
)

// TestFUA makes sure that a write with FUA, of any kind, is flushed before its
// reply, and one without is not.
func TestFUA(t *testing.T) {
	d := newFileDisk(t, mib)
	c := rawDial(t, serve(t, &Server{Exports: exports(d, true)}), 3)
	c.option(optGo, goBytes(""))
	for _, r := range []struct {
		cmd, flags uint16
		n          uint32
		want       int64
	}{
		{cmdWrite, 0, 4096, 0}, {cmdWrite, flagFUA, 4096, 1},
		{cmdTrim, 0, 0, 0}, {cmdTrim, flagFUA, 0, 1},
		{cmdWriteZeroes, 0, 0, 0}, {cmdWriteZeroes, flagFUA, 0, 1},
		{cmdFlush, 0, 0, 1},
	} {
		before := d.flushes.Load()
		if e := c.ask(r.cmd, r.flags, 0, r.n, make([]byte, r.n)); e != 0 {
			t.Errorf("command %d: %v", r.cmd, e)
		}
		if got := d.flushes.Load() - before; got != r.want {
			t.Errorf("command %d with flags %d: %d flushes", r.cmd, r.flags, got)
		}
	}
}

// TestNoHole zeroes with and without NBD_CMD_FLAG_NO_HOLE.
func TestNoHole(t *testing.T) {
	d := newFileDisk(t, mib)
	c := rawDial(t, serve(t, &Server{Exports: exports(d, true)}), 3)
	c.option(optGo, goBytes(""))
	for flags, want := range map[uint16]bool{0: false, flagNoHole: true} {
		if e := c.ask(cmdWriteZeroes, flags, 0, mib, nil); e != 0 {
			t.Fatal(e)
		}
		got := false
		for range d.Allocated(4096) {
			got = true
		}
		if got != want {
			t.Errorf("flags %d: space is taken: %v", flags, got)
		}
	}
}

// TestShortRead has a disk that gives less than it was asked for and calls that
// well, or the end.
func TestShortRead(t *testing.T) {
	for _, end := range []error{nil, io.EOF} {
		d := &faultyDisk{newFileDisk(t, mib), 5000, end}
		c := rawDial(t, serve(t, &Server{Exports: exports(d, true)}), 3)
		c.option(optGo, goBytes(""))
		if e := c.ask(cmdRead, 0, 4096, 4096, nil); e != EIO {
			t.Errorf("a short read with %v: %v", end, e)
		}
	}
}

// TestTLSForgets says things before TLS that must not count over it.
func TestTLSForgets(t *testing.T) {
	cert, _ := certificates(t, t.TempDir())
	path := serve(t, &Server{Exports: exports(make(memory, 4096), false), TLS: &tls.Config{Certificates: []tls.Certificate{cert}}})
	c := rawDial(t, path, 3)
	c.option(optStructuredReply, nil)
	c.option(optStartTLS, nil)
	c.nc = tls.Client(c.nc, &tls.Config{InsecureSkipVerify: true})
	c.br.Reset(c.nc)
	if got := c.option(optSetMetaContext, contextBytes("", baseAllocation)); got[0] != repErrInvalid {
		t.Errorf("structured replies from before TLS count: %#x", got)
	}
	if got := c.option(optStartTLS, nil); got[0] != repErrInvalid {
		t.Errorf("TLS in TLS: %#x", got)
	}
}

// TestStatusOfParts asks a server with blocks of 4096 bytes about parts of them.
func TestStatusOfParts(t *testing.T) {
	c := dial(t, "unix:"+nbdkit(t, "--filter=blocksize-policy", "memory", "64k", "blocksize-minimum=4096",
		"blocksize-error-policy=error"), ClientOptions{})
	if _, err := c.WriteAt(make([]byte, 4096), 8192); err != nil {
		t.Fatal(err)
	}
	for _, r := range [][2]int64{{0, 1}, {100, 50}, {4095, 2}, {8191, 4098}, {65535, 1}} {
		off := r[0]
		for s, err := range c.Extents(context.Background(), baseAllocation, r[0], r[1]) {
			if err != nil || s.Off != off || s.End() > r[0]+r[1] {
				t.Fatalf("%v: %v, %v", r, s, err)
			}
			off = s.End()
		}
		if off != r[0]+r[1] {
			t.Errorf("%v: to %d", r, off)
		}
	}
	if _, err := c.WriteAt(make([]byte, 512), 0); err == nil {
		t.Error("a part of a block is written")
	}
}
