package nfs_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fs/nfs"
	"github.com/holdfast-backup/holdfast/fs/nfs/nfstest"
)

// TestOutOfOrder has one connection wait for as many calls as it may, and answers the last one first.
func TestOutOfOrder(t *testing.T) {
	m := nfstest.NewMemory()
	const n = 10
	var at atomic.Int32
	var gates [n]chan struct{}
	for i := range gates {
		gates[i] = make(chan struct{})
	}
	entered := make(chan struct{}, 100)
	m.Before = func(op string, _ nfs.ID) error {
		if op == "ReadAt" {
			i := at.Add(1) - 1
			entered <- struct{}{}
			if i < n {
				<-gates[i]
			}
		}
		return nil
	}
	r := serve(t, &nfs.Server{Limits: nfs.Limits{Requests: n}}, share(m))
	c := r.dial(nfstest.Root)
	root := must(c.Mount("/ds"))(t)
	fh := must(c.Create(root, "f", true, &sattr{Size: ptr(uint64(100))}))(t).FH
	var order []int
	done := make(chan int)
	for i := range n {
		go func() {
			if _, err := c.Read(fh, 0, 10); err != nil {
				t.Error(err)
			}
			done <- i
		}()
		<-entered
	}
	late := make(chan error, 1)
	go func() { late <- second(c.Read(fh, 0, 10)) }()
	select {
	case <-entered:
		t.Error("more calls at work than the limit")
	case <-time.After(50 * time.Millisecond):
	}
	for i := n - 1; i >= 0; i-- {
		close(gates[i])
		order = append(order, <-done)
	}
	for i, got := range order {
		if got != n-1-i {
			t.Errorf("answered in the order %v", order)
			break
		}
	}
	wants(t, "the call that had to wait", <-late, nil)
}

// TestSlowClient has clients that send and never read: what they hold is bounded, and others are served.
func TestSlowClient(t *testing.T) {
	m := nfstest.NewMemory()
	r := serve(t, &nfs.Server{Limits: nfs.Limits{TotalData: 32 << 20, TotalRequests: 40, Stall: 30 * time.Second}}, share(m))
	c := r.dial(nfstest.Root)
	root := must(c.Mount("/ds"))(t)
	fh := must(c.Create(root, "f", true, &sattr{Size: ptr(uint64(1 << 20))}))(t).FH
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	const slow = 12
	for i := range slow {
		nc := must(net.Dial("tcp", r.addr()))(t)
		defer nc.Close()
		var calls []byte
		for xid := range uint32(200) {
			calls = append(calls, nfstest.Record(nfstest.CallMessage(xid, nfstest.NFS, 3, 6, nfstest.Root, new(args).Opaque(fh).U64(0).U32(1<<20).B))...)
		}
		nc.SetWriteDeadline(time.Now().Add(10 * time.Second))
		if _, err := nc.Write(calls); err != nil {
			t.Fatal(i, err)
		}
	}
	time.Sleep(300 * time.Millisecond)
	for i := range 20 {
		start := time.Now()
		if d := must(c.Read(fh, 0, 1<<20))(t); len(d.P) != 1<<20 {
			t.Fatal("short")
		}
		if d := time.Since(start); d > 5*time.Second {
			t.Fatalf("READ %d took %v beside clients that do not read", i, d)
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	// 32 MiB for all, one request for each, and what the client of the test holds.
	if grown := int64(after.HeapInuse) - int64(before.HeapInuse); grown > (32+2*slow+16)<<20 {
		t.Errorf("%d MiB are held for clients that do not read", grown>>20)
	}
}

// TestStall ends clients that do not take their replies, or stop in the middle of a call.
func TestStall(t *testing.T) {
	m := nfstest.NewMemory()
	r := serve(t, &nfs.Server{Limits: nfs.Limits{Stall: 200 * time.Millisecond}}, share(m))
	c := r.dial(nfstest.Root)
	root := must(c.Mount("/ds"))(t)
	fh := must(c.Create(root, "f", true, &sattr{Size: ptr(uint64(1 << 20))}))(t).FH
	half := must(net.Dial("tcp", r.addr()))(t)
	defer half.Close()
	half.Write([]byte{0x80, 0, 1, 0, 1, 2, 3})
	deaf := must(net.Dial("tcp", r.addr()))(t)
	defer deaf.Close()
	deaf.(*net.TCPConn).SetReadBuffer(4096)
	for range 20 {
		deaf.Write(nfstest.Record(nfstest.CallMessage(1, nfstest.NFS, 3, 6, nfstest.Root, new(args).Opaque(fh).U64(0).U32(1<<20).B)))
	}
	half.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := half.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("half a call: %v", err)
	}
	for range 500 {
		if r.Clients("/ds")[0].Conns == 1 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if n := r.Clients("/ds")[0].Conns; n != 1 {
		t.Errorf("%d connections are left", n)
	}
	r.log.has(t, "sending: ")
	r.log.has(t, "i/o timeout")
	time.Sleep(250 * time.Millisecond)
	wants(t, "an idle client", c.Null(), nil)
}

// TestShutdown answers the calls at work, and starts again on the same port with the same handles.
func TestShutdown(t *testing.T) {
	m := nfstest.NewMemory()
	entered, release := make(chan struct{}, 100), make(chan struct{})
	m.Before = func(op string, _ nfs.ID) error {
		if op == "ReadAt" {
			entered <- struct{}{}
			<-release
		}
		return nil
	}
	r, c, root := mounted(t, m)
	fh := must(c.Create(root, "f", true, &sattr{Size: ptr(uint64(1 << 20))}))(t).FH
	done := make(chan error, 8)
	for range 8 {
		go func() {
			d, err := c.Read(fh, 0, 1<<20)
			if err == nil && len(d.P) != 1<<20 {
				err = errors.New("short")
			}
			done <- err
		}()
		<-entered
	}
	addr := r.addr()
	go func() {
		time.Sleep(50 * time.Millisecond)
		for range 100 {
			go c.Null() // is not read any more, and must not cost the replies to the others
		}
		time.Sleep(50 * time.Millisecond)
		close(release)
	}()
	r.stop()
	for range 8 {
		wants(t, "a call that was at work", <-done, nil)
	}
	if err := c.Null(); err == nil {
		t.Error("a call after the end was answered")
	}
	again := serveAt(t, addr, &nfs.Server{}, share(m))
	c = again.dial(nfstest.Root)
	if d := must(c.Read(fh, 0, 10))(t); len(d.P) != 10 {
		t.Error("the handle is of another file now")
	}
}

// TestServeContext ends Serve by its context.
func TestServeContext(t *testing.T) {
	s := &nfs.Server{}
	if err := s.Serve(t.Context()); err == nil {
		t.Error("Serve without Listen")
	}
	wants(t, "Listen", s.Listen("[::1]:0"), nil)
	wants(t, "Export", s.Export(share(nfstest.NewMemory())), nil)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- s.Serve(ctx) }()
	c := must(nfstest.Dial(s.Addr().String(), nil))(t)
	defer c.Close()
	wants(t, "MNT over IPv6", second(c.Mount("/ds")), nil)
	cancel()
	wants(t, "Serve", <-done, nil)
	if err := c.Null(); err == nil {
		t.Error("a call after the end was answered")
	}
	if err := s.Listen("127.0.0.1:0"); err == nil {
		t.Error("Listen after the end")
	}
}

// TestCut ends calls of an FS that do not return in time.
func TestCut(t *testing.T) {
	m := nfstest.NewMemory()
	entered, release := make(chan struct{}, 1), make(chan struct{})
	m.Before = func(op string, _ nfs.ID) error {
		if op == "Space" {
			entered <- struct{}{}
			<-release
		}
		return nil
	}
	r, c, root := mounted(t, m)
	done := make(chan error, 1)
	go func() {
		_, _, err := c.Fsstat(root)
		done <- err
	}()
	<-entered
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	wants(t, "Shutdown", r.Shutdown(ctx), context.DeadlineExceeded)
	if err := <-done; err == nil {
		t.Error("answered all the same")
	}
	close(release)
	wants(t, "Close", r.Close(), nil)
	wants(t, "Close again", r.Close(), nil)
}

// TestUnexportWaits returns when the FS is not in use any more.
func TestUnexportWaits(t *testing.T) {
	m := nfstest.NewMemory()
	entered, release := make(chan struct{}, 1), make(chan struct{})
	m.Before = func(op string, _ nfs.ID) error {
		if op == "Space" {
			entered <- struct{}{}
			<-release
		}
		return nil
	}
	r, c, root := mounted(t, m)
	done := make(chan error, 1)
	go func() {
		_, _, err := c.Fsstat(root)
		done <- err
	}()
	<-entered
	gone := make(chan error, 1)
	go func() { gone <- r.Unexport("/ds") }()
	select {
	case <-gone:
		t.Error("Unexport returned while the FS was in use")
	case <-time.After(50 * time.Millisecond):
	}
	close(release)
	wants(t, "FSSTAT", <-done, nil)
	wants(t, "Unexport", <-gone, nil)
}

// TestTooMany closes connections beyond the limit, and takes others when there is room again.
func TestTooMany(t *testing.T) {
	r := serve(t, &nfs.Server{Limits: nfs.Limits{Conns: 2}}, share(nfstest.NewMemory()))
	a, b := r.dial(nil), r.dial(nil)
	wants(t, "the first", a.Null(), nil)
	wants(t, "the second", b.Null(), nil)
	if err := r.dial(nil).Null(); err == nil {
		t.Error("a third connection")
	}
	r.log.has(t, "too many connections")
	a.Close()
	for range 200 {
		if c := r.dial(nil); c.Null() == nil {
			r.log.take("too many connections")
			return
		}
		time.Sleep(5 * time.Millisecond) // the log hears of some refusals only
	}
	t.Error("no room after one has gone")
}

// TestMixedSizes has large and small calls in one connection in any order.
func TestMixedSizes(t *testing.T) {
	_, c, root := mounted(t, nfstest.NewMemory())
	fh := must(c.Create(root, "f", true, &sattr{}))(t).FH
	want := make([]byte, 2<<20)
	for i := range want {
		want[i] = byte(i * 31 >> 5)
	}
	var all sync.WaitGroup
	sizes := []int{1, 4096, 3, 65536, 100, 1 << 20, 17, 300_000}
	for off, i := 0, 0; off < len(want); i++ {
		n := min(sizes[i%len(sizes)], len(want)-off)
		p, at := want[off:off+n], uint64(off)
		all.Go(func() {
			if _, err := c.Write(fh, at, p, nfstest.Unstable); err != nil {
				t.Error(err)
			}
		})
		off += n
	}
	all.Wait()
	for off, i := 0, 3; off < len(want); i++ {
		n := min(sizes[i%len(sizes)], len(want)-off)
		p, at := want[off:off+n], uint64(off)
		all.Go(func() {
			if d, err := c.Read(fh, at, uint32(len(p))); err != nil || !bytes.Equal(d.P, p) {
				t.Errorf("%d bytes at %d: %v", len(p), at, err)
			}
		})
		off += n
	}
	all.Wait()
}

// TestWorkersLeave has a burst of calls: the goroutines that it took go away.
func TestWorkersLeave(t *testing.T) {
	m := nfstest.NewMemory()
	release, entered := make(chan struct{}), make(chan struct{}, 100)
	m.Before = func(op string, _ nfs.ID) error {
		if op == "Space" {
			entered <- struct{}{}
			<-release
		}
		return nil
	}
	_, c, root := mounted(t, m)
	before := runtime.NumGoroutine()
	var all sync.WaitGroup
	for range 60 {
		all.Go(func() {
			if _, _, err := c.Fsstat(root); err != nil {
				t.Error(err)
			}
		})
		<-entered
	}
	close(release)
	all.Wait()
	for range 200 {
		if runtime.NumGoroutine() <= before+5 {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Errorf("%d goroutines are left, %d were before", runtime.NumGoroutine(), before)
}

// TestPipelined sends many small calls at once, more than may be at work: they
// are answered together, and none waits for a reply that has been put off.
func TestPipelined(t *testing.T) {
	m := nfstest.NewMemory()
	for _, requests := range []int{1, 3, 64} {
		r := serve(t, &nfs.Server{Limits: nfs.Limits{Requests: requests}}, share(m))
		root := must(r.dial(nfstest.Root).Mount("/ds"))(t)
		nc := must(net.Dial("tcp", r.addr()))(t)
		defer nc.Close()
		nc.SetDeadline(time.Now().Add(20 * time.Second))
		const n = 1000
		var calls []byte
		for xid := range uint32(n) {
			calls = append(calls, nfstest.Record(nfstest.CallMessage(xid, nfstest.NFS, 3, 1, nfstest.Root, new(args).Opaque(root).B))...)
		}
		go nc.Write(calls)
		seen := make(map[uint32]bool)
		for range n {
			p, err := nfstest.ReadRecord(nc)
			if err != nil {
				t.Fatalf("%d at a time: %d replies, then %v", requests, len(seen), err)
			}
			seen[binary.BigEndian.Uint32(p)] = true
		}
		if len(seen) != n {
			t.Errorf("%d at a time: %d calls were answered", requests, len(seen))
		}
	}
}
