package nfs_test

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fs/nfs"
	"github.com/holdfast-backup/holdfast/fs/nfs/nfstest"
)

// dialFrom gives a connection of another address of this machine.
func (r *running) dialFrom(addr string) net.Conn {
	r.t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(addr)}}
	nc, err := d.Dial("tcp", r.addr())
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { nc.Close() })
	return nc
}

// ends reports whether the server closes a connection within a time.
func ends(nc net.Conn, within time.Duration) bool {
	nc.SetReadDeadline(time.Now().Add(within))
	_, err := io.Copy(io.Discard, nc)
	return !errors.Is(err, os.ErrDeadlineExceeded)
}

// TestStrangers: machines that no export allows get no more than a few connections, for a moment, and take none from those that may.
func TestStrangers(t *testing.T) {
	x := share(nfstest.NewMemory())
	x.Clients = []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}
	r := serve(t, &nfs.Server{Limits: nfs.Limits{Conns: 6, AddressConns: 3, StrangerConns: 2, StrangerTime: 300 * time.Millisecond}}, x)
	a, b := r.dialFrom("127.0.0.2"), r.dialFrom("127.0.0.3")
	for range 5 {
		if !ends(r.dialFrom("127.0.0.4"), 5*time.Second) {
			t.Fatal("a third stranger may stay")
		}
	}
	r.log.has(t, "too many connections")
	var c []*nfstest.Client
	for range 3 {
		c = append(c, r.dial(nfstest.Root))
		wants(t, "a client beside strangers", c[len(c)-1].Null(), nil)
	}
	if r.dial(nil).Null() == nil {
		t.Error("one address has more connections than it may")
	}
	if !ends(a, 5*time.Second) || !ends(b, 5*time.Second) {
		t.Error("strangers may stay")
	}
	wants(t, "a client after strangers", c[0].Null(), nil)
	// One that is allowed while it is connected stays.
	a = r.dialFrom("127.0.0.2")
	y := share(nfstest.NewMemory())
	y.Path, y.ID, y.Clients = "/other", 78, []netip.Prefix{netip.MustParsePrefix("127.0.0.2/32")}
	wants(t, "Export", r.Export(y), nil)
	if ends(a, 600*time.Millisecond) {
		t.Error("a client was taken for a stranger")
	}
	r.log.take("too many connections")
}

// TestExpect: clients of an export that is to come again are told to wait.
func TestExpect(t *testing.T) {
	m := nfstest.NewMemory()
	r, c, root := mounted(t, m)
	get := func() error {
		_, err := c.Getattr(root)
		return err
	}
	r.Expect(77, nil) // that is there
	wants(t, "what is there", get(), nil)
	wants(t, "Unexport", r.Unexport("/ds"), nil)
	wants(t, "what is not expected", get(), nfstest.Stale)
	r.Expect(77, nil)
	wants(t, "what is expected", get(), nfstest.Jukebox)
	if _, err := c.Mount("/ds"); err == nil {
		t.Error("mounted")
	}
	wants(t, "Export", r.Export(share(m)), nil)
	wants(t, "what is there again", get(), nil)
	wants(t, "Unexport", r.Unexport("/ds"), nil)
	wants(t, "what was expected", get(), nfstest.Stale)
	r.Expect(77, nil)
	r.Unexpect(77)
	wants(t, "what is not expected any more", get(), nfstest.Stale)
}
