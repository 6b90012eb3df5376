//go:build linux

package nbd

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// rawClient speaks to a server byte by byte.
type rawClient struct {
	t  testing.TB
	nc net.Conn
	br *bufio.Reader
}

func rawDial(t testing.TB, path string, flags uint32) *rawClient {
	t.Helper()
	nc, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(20 * time.Second))
	c := &rawClient{t, nc, bufio.NewReader(nc)}
	if got := c.read(18); be.Uint64(got) != magicGreeting || be.Uint64(got[8:]) != magicOption || be.Uint16(got[16:]) != 3 {
		t.Fatalf("greeting %x", got)
	}
	c.write(be.AppendUint32(nil, flags))
	return c
}

func (c *rawClient) write(p []byte) {
	c.t.Helper()
	if _, err := c.nc.Write(p); err != nil {
		c.t.Fatal(err)
	}
}

func (c *rawClient) read(n int) []byte {
	c.t.Helper()
	p := make([]byte, n)
	if _, err := io.ReadFull(c.br, p); err != nil {
		c.t.Fatal(err)
	}
	return p
}

// gone reports whether the server hangs up without another word.
func (c *rawClient) gone() bool {
	_, err := c.br.ReadByte()
	return err == io.EOF || quiet(err)
}

func optionBytes(opt uint32, data []byte) []byte {
	p := be.AppendUint64(nil, magicOption)
	p = be.AppendUint32(p, opt)
	return append(be.AppendUint32(p, uint32(len(data))), data...)
}

// option sends an option and gives the types of the replies.
func (c *rawClient) option(opt uint32, data []byte) (types []uint32) {
	c.t.Helper()
	c.write(optionBytes(opt, data))
	for {
		p := c.read(optionReplyLen)
		if be.Uint64(p) != magicOptionReply || be.Uint32(p[8:]) != opt {
			c.t.Fatalf("option reply %x", p)
		}
		c.read(int(be.Uint32(p[16:])))
		types = append(types, be.Uint32(p[12:]))
		if typ := be.Uint32(p[12:]); typ == repAck || typ&repError != 0 {
			return types
		}
	}
}

func goBytes(name string) []byte { return append(appendString(nil, name), 0, 0) }

func contextBytes(name string, queries ...string) []byte {
	p := be.AppendUint32(appendString(nil, name), uint32(len(queries)))
	for _, q := range queries {
		p = appendString(p, q)
	}
	return p
}

func requestBytes(cmd, flags uint16, cookie, off uint64, n uint32) []byte {
	p := be.AppendUint32(nil, magicRequest)
	p = be.AppendUint16(p, flags)
	p = be.AppendUint16(p, cmd)
	p = be.AppendUint64(p, cookie)
	p = be.AppendUint64(p, off)
	return be.AppendUint32(p, n)
}

// ask sends a request with data and gives the error of the reply to it.
func (c *rawClient) ask(cmd, flags uint16, off uint64, n uint32, data []byte) Errno {
	c.t.Helper()
	const cookie = 0x1122334455667788
	c.write(append(requestBytes(cmd, flags, cookie, off, n), data...))
	p := c.read(simpleLen)
	if be.Uint64(p[8:]) != cookie {
		c.t.Fatalf("reply %x", p)
	}
	if be.Uint32(p) == magicSimple {
		e := Errno(be.Uint32(p[4:]))
		if cmd == cmdRead && e == 0 {
			c.read(int(n))
		}
		return e
	}
	payload := c.read(int(be.Uint32(c.read(4))))
	if be.Uint16(p[4:]) != chunkDone {
		c.t.Fatalf("more than one chunk")
	}
	if be.Uint16(p[6:])&chunkErrorBit != 0 {
		return Errno(be.Uint32(payload))
	}
	return 0
}

func TestOptions(t *testing.T) {
	disk := make(memory, 4096)
	for i := range disk {
		disk[i] = byte(i * 7)
	}
	path := serve(t, &Server{Exports: exports(disk, false)})
	c := rawDial(t, path, 3)
	for _, step := range []struct {
		opt  uint32
		data []byte
		want []uint32
	}{
		{optSetMetaContext, contextBytes("disk0", baseAllocation), []uint32{repErrInvalid}}, // no structured replies
		{optStructuredReply, []byte{1}, []uint32{repErrInvalid}},
		{optStructuredReply, nil, []uint32{repAck}},
		{99, []byte("data"), []uint32{repErrUnsup}},
		{99, make([]byte, maxOption+1), []uint32{repErrTooBig}},
		{optStartTLS, nil, []uint32{repErrPolicy}},
		{optList, nil, []uint32{repServer, repAck}},
		{optList, []byte{1}, []uint32{repErrInvalid}},
		{optInfo, goBytes("none"), []uint32{repErrUnknown}},
		{optInfo, goBytes("disk0")[:5], []uint32{repErrInvalid}},
		{optInfo, append(goBytes("disk0"), 1), []uint32{repErrInvalid}},
		{optInfo, goBytes(""), []uint32{repInfo, repAck}},
		{optListMetaContext, contextBytes("disk0"), []uint32{repMetaContext, repAck}},
		{optListMetaContext, contextBytes("disk0", "base:"), []uint32{repMetaContext, repAck}},
		{optListMetaContext, contextBytes("disk0", "x-other:y"), []uint32{repAck}},
		{optListMetaContext, contextBytes("disk0", "nocolon"), []uint32{repErrInvalid}},
		{optSetMetaContext, contextBytes("none", baseAllocation), []uint32{repErrUnknown}},
		{optSetMetaContext, contextBytes("disk0"), []uint32{repAck}},
		{optSetMetaContext, contextBytes("disk0", "base:"), []uint32{repAck}},
		{optSetMetaContext, contextBytes("disk0", baseAllocation, "base:other"), []uint32{repMetaContext, repAck}},
		{optSetMetaContext, contextBytes("disk0", baseAllocation)[:12], []uint32{repErrInvalid}}, // and none is selected
		{optGo, goBytes("disk0"), []uint32{repInfo, repAck}},
	} {
		if got := c.option(step.opt, step.data); fmt.Sprint(got) != fmt.Sprint(step.want) {
			t.Errorf("option %d with %.40q: %#x, want %#x", step.opt, step.data, got, step.want)
		}
	}
	if e := c.ask(cmdBlockStatus, 0, 0, 4096, nil); e != EINVAL {
		t.Errorf("block status without its context: %v", e)
	}
	c = rawDial(t, path, 3)
	if c.option(optAbort, nil); !c.gone() {
		t.Error("NBD_OPT_ABORT does not end the connection")
	}
	for what, p := range map[string][]byte{
		"an unknown export":   optionBytes(optExportName, []byte("none")),
		"a long option":       optionBytes(99, nil)[:12],
		"a wrong magic":       make([]byte, 16),
		"an endless export":   append(optionBytes(optExportName, nil)[:12], 0xff, 0xff, 0xff, 0xff),
		"an endless option":   append(optionBytes(optInfo, nil)[:12], 0xff, 0xff, 0xff, 0xff),
		"half an option's":    optionBytes(optInfo, nil)[:9],
		"a name of 5000":      optionBytes(optExportName, make([]byte, 5000)),
		"a name of 5 with GO": append(optionBytes(optExportName, []byte("disk1")), optionBytes(optGo, goBytes("disk0"))...),
	} {
		c := rawDial(t, path, 3)
		c.write(p)
		c.nc.(*net.UnixConn).CloseWrite()
		if !c.gone() {
			t.Errorf("%s does not end the connection", what)
		}
	}
	c = rawDial(t, path, 7)
	if !c.gone() {
		t.Error("unknown client flags do not end the connection")
	}
	for flags, zeroes := range map[uint32]int{0: 124, 1: 124, 2: 0} {
		c := rawDial(t, path, flags)
		c.write(optionBytes(optExportName, nil))
		if got := c.read(10 + zeroes); be.Uint64(got) != 4096 || Flags(be.Uint16(got[8:]))&(HasFlags|ReadOnly) != HasFlags|ReadOnly {
			t.Errorf("flags %d: %x", flags, got)
		}
		c.write(requestBytes(cmdRead, 0, 5, 7, 512))
		if got := c.read(simpleLen + 512); be.Uint32(got[4:]) != 0 || !bytes.Equal(got[simpleLen:], disk[7:519]) {
			t.Errorf("flags %d: %x", flags, got)
		}
	}
}

// TestRequests asks for what is not allowed; the connection goes on after each.
func TestRequests(t *testing.T) {
	const size = 40 * mib
	d := newFileDisk(t, size)
	for _, structured := range []bool{false, true} {
		for _, writable := range []bool{false, true} {
			c := rawDial(t, serve(t, &Server{Exports: exports(d, writable)}), 3)
			if structured {
				c.option(optStructuredReply, nil)
				c.option(optSetMetaContext, contextBytes("disk0", baseAllocation))
			}
			c.option(optGo, goBytes("disk0"))
			ro := func(e Errno) Errno { // of a write, when it can be
				if !writable {
					return EPERM
				}
				return e
			}
			sr := func(yes, no Errno) Errno {
				if structured {
					return yes
				}
				return no
			}
			for _, r := range []struct {
				cmd, flags uint16
				off        uint64
				n          uint32
				data       int
				want       Errno
			}{
				{cmdRead, 0, size - 1, 1, 0, 0},
				{cmdRead, 0, size, 0, 0, 0},
				{cmdRead, 0, size - 1, 2, 0, EINVAL},
				{cmdRead, 0, 1 << 63, 2, 0, EINVAL},
				{cmdRead, 0, 1<<64 - 1, 2, 0, EINVAL},
				{cmdRead, 0, 0, maxPayload + 1, 0, sr(EOVERFLOW, EINVAL)},
				{cmdRead, 0, 0, 1<<32 - 1, 0, EINVAL},
				{cmdRead, flagDF, 0, 64 * kib, 0, sr(0, EINVAL)},
				{cmdRead, flagFUA, 0, 512, 0, 0},
				{cmdRead, flagNoHole, 0, 512, 0, EINVAL},
				{cmdRead, 1 << 15, 0, 512, 0, EINVAL},
				{cmdWrite, 0, 0, 0, 0, ro(0)},
				{cmdWrite, flagFUA, size - 1, 1, 1, ro(0)},
				{cmdWrite, 0, size - 1, 2, 2, ro(ENOSPC)},
				{cmdWrite, 0, 1<<64 - 2, 4, 4, ro(ENOSPC)},
				{cmdWrite, 0, 0, maxPayload + 1, maxPayload + 1, ro(EINVAL)},
				{cmdWrite, 0, 0, size + 1, size + 1, ro(ENOSPC)},
				{cmdWrite, flagDF, 0, 10, 10, EINVAL},
				{cmdFlush, 0, 0, 0, 0, 0},
				{cmdFlush, 0, 1, 0, 0, EINVAL},
				{cmdTrim, flagFUA, 0, size, 0, ro(0)},
				{cmdTrim, 0, 1, size, 0, ro(EINVAL)},
				{cmdWriteZeroes, 0, 0, size, 0, ro(0)},
				{cmdWriteZeroes, flagNoHole | flagFUA, 0, 4096, 0, ro(0)},
				{cmdWriteZeroes, flagFastZero, 0, 4096, 0, EINVAL},
				{cmdWriteZeroes, 0, 1, size, 0, ro(ENOSPC)},
				{cmdCache, 0, 0, 4096, 0, EINVAL},
				{cmdBlockStatus, 0, 0, size, 0, sr(0, EINVAL)},
				{cmdBlockStatus, flagReqOne, size - 1, 1, 0, sr(0, EINVAL)},
				{cmdBlockStatus, 0, 0, 0, 0, EINVAL},
				{cmdBlockStatus, 0, 1, size, 0, EINVAL},
				{8, 0, 0, 0, 0, EINVAL},
				{0xffff, 0, 0, 0, 0, EINVAL},
			} {
				if got := c.ask(r.cmd, r.flags, r.off, r.n, make([]byte, r.data)); got != r.want {
					t.Errorf("structured %v, writable %v: command %d, flags %#x, %d at %d: %v, want %v",
						structured, writable, r.cmd, r.flags, r.n, r.off, got, r.want)
				}
			}
			c.write(requestBytes(cmdDisc, 0, 1, 0, 0))
			if !c.gone() {
				t.Error("NBD_CMD_DISC does not end the connection")
			}
		}
	}
}

// slowDisk answers no read before open is closed.
type slowDisk struct {
	memory
	open  chan struct{}
	reads atomic.Int32
}

func (d *slowDisk) ReadAt(p []byte, off int64) (int, error) {
	d.reads.Add(1)
	<-d.open
	return d.memory.ReadAt(p, off)
}

func (d *slowDisk) waitFor(t *testing.T, n int32) {
	t.Helper()
	for range 1000 {
		if d.reads.Load() == n {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("%d reads reached the disk, not %d", d.reads.Load(), n)
}

// TestLimits has more clients and requests than are served at a time.
func TestLimits(t *testing.T) {
	d := &slowDisk{memory: bytes.Repeat([]byte{1}, 4096), open: make(chan struct{})}
	path := serve(t, &Server{Exports: exports(d, false), Limits: Limits{Conns: 2, Requests: 5}})
	a := rawDial(t, path, 3)
	rawDial(t, path, 3)
	if nc, err := net.Dial("unix", path); err == nil {
		if _, err := nc.Read(make([]byte, 1)); err == nil {
			t.Error("a third connection is served")
		}
		nc.Close()
	}
	a.option(optGo, goBytes(""))
	for i := range 10 {
		a.write(requestBytes(cmdRead, 0, uint64(i), 0, 512))
	}
	d.waitFor(t, 5) // Limits.Requests
	time.Sleep(50 * time.Millisecond)
	d.waitFor(t, 5)
	close(d.open)
	for range 10 {
		a.read(simpleLen + 512)
	}
}

// slowAt answers reads at an offset only when open is closed.
type slowAt struct {
	memory
	at   int64
	open chan struct{}
}

func (d *slowAt) ReadAt(p []byte, off int64) (int, error) {
	if off == d.at {
		<-d.open
	}
	return d.memory.ReadAt(p, off)
}

// TestHandOver: after many requests that were served at once, large ones among them, two large ones that come together are
// served side by side.
func TestHandOver(t *testing.T) {
	const n = 128 << 10
	d := &slowAt{memory: bytes.Repeat([]byte{1}, 2*mib), at: mib, open: make(chan struct{})}
	a := rawDial(t, serve(t, &Server{Exports: exports(d, false)}), 3)
	a.option(optGo, goBytes(""))
	for i := range 2 * quickRun {
		a.write(requestBytes(cmdRead, 0, uint64(i), 0, n))
		a.read(simpleLen + n)
	}
	a.write(append(requestBytes(cmdRead, 0, 7, uint64(d.at), n), requestBytes(cmdRead, 0, 8, 0, n)...))
	if head := a.read(simpleLen + n); be.Uint64(head[8:]) != 8 {
		t.Errorf("the first reply is to request %d", be.Uint64(head[8:]))
	}
	close(d.open)
	a.read(simpleLen + n)
}

// TestDataLimits has two clients ask for more data than is kept for them.
func TestDataLimits(t *testing.T) {
	d := &slowDisk{memory: bytes.Repeat([]byte{1}, 32*mib), open: make(chan struct{})}
	path := serve(t, &Server{Exports: exports(d, false), Limits: Limits{ConnData: 48 * mib, TotalData: 64 * mib}})
	a, b := rawDial(t, path, 3), rawDial(t, path, 3)
	a.option(optGo, goBytes(""))
	b.option(optGo, goBytes(""))
	for i := range 3 { // 20 MiB are 32 in memory: a second one is over ConnData, and b's over TotalData
		a.write(requestBytes(cmdRead, 0, uint64(i), 0, 20*mib))
	}
	d.waitFor(t, 1)
	b.write(requestBytes(cmdRead, 0, 1, 0, 20*mib))
	d.waitFor(t, 2)
	b.write(requestBytes(cmdRead, 0, 2, 0, 512))
	time.Sleep(50 * time.Millisecond)
	d.waitFor(t, 2)
	close(d.open)
	var wg sync.WaitGroup
	wg.Go(func() {
		for range 3 {
			a.read(simpleLen + 20*mib)
		}
	})
	b.read(simpleLen + 20*mib)
	b.read(simpleLen + 512)
	wg.Wait()
}

func TestTimeouts(t *testing.T) {
	log := new(errorLog)
	s := &Server{Exports: exports(newFileDisk(t, 32*mib), true), Log: log.add,
		Limits: Limits{Handshake: 100 * time.Millisecond, Stall: 200 * time.Millisecond}}
	path := serve(t, s)
	if c := rawDial(t, path, 3); !c.gone() {
		t.Error("a client may take forever to choose an export")
	}
	c := rawDial(t, path, 3)
	c.option(optGo, goBytes(""))
	time.Sleep(400 * time.Millisecond) // being idle is allowed
	c.write(append(requestBytes(cmdWrite, 0, 1, 0, 8*mib), make([]byte, mib)...))
	if !c.gone() {
		t.Error("a client may take forever to send what it writes")
	}
	c = rawDial(t, path, 3)
	c.option(optGo, goBytes(""))
	c.write(requestBytes(cmdRead, 0, 1, 0, 32*mib))
	for end := time.Now().Add(20 * time.Second); strings.Count(log.text(), "timeout") < 3 && time.Now().Before(end); {
		time.Sleep(50 * time.Millisecond) // a busy machine takes its time before it has anything to send
	}
	if n, err := io.Copy(io.Discard, c.br); n >= 32*mib {
		t.Errorf("a client may take forever to read: %d bytes, %v", n, err)
	}
	if text := log.text(); strings.Count(text, "timeout") != 3 {
		t.Errorf("logged: %s", text)
	}
}

// TestShutdown stops a server with a request at work, which is answered.
func TestShutdown(t *testing.T) {
	d := &slowDisk{memory: bytes.Repeat([]byte{7}, 4096), open: make(chan struct{})}
	s := &Server{Exports: exports(d, false)}
	path := serve(t, s)
	idle, c := rawDial(t, path, 3), dial(t, "unix:"+path, ClientOptions{})
	read := make(chan error, 1)
	p := make([]byte, 512)
	go func() {
		_, err := c.ReadAt(p, 0)
		read <- err
	}()
	d.waitFor(t, 1)
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	down := make(chan error, 1)
	go func() { down <- s.Shutdown(context.Background()) }()
	if !idle.gone() {
		t.Error("an idle connection stays")
	}
	select {
	case err := <-down:
		t.Errorf("Shutdown did not wait: %v", err)
	case <-ctx.Done():
	}
	close(d.open)
	if err := <-read; err != nil || p[0] != 7 {
		t.Errorf("the request at work: %v", err)
	}
	if err := <-down; err != nil {
		t.Error(err)
	}
	if _, err := c.ReadAt(p, 0); err == nil {
		t.Error("the server still answers")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestShutdownGivesUp(t *testing.T) {
	d := &slowDisk{memory: make([]byte, 4096), open: make(chan struct{})}
	s := &Server{Exports: exports(d, false)}
	c := dial(t, "unix:"+serve(t, s), ClientOptions{})
	read := make(chan error, 1)
	go func() {
		_, err := c.ReadAt(make([]byte, 512), 0)
		read <- err
	}()
	d.waitFor(t, 1)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	if err := <-read; err == nil {
		t.Error("a connection that was cut gave an answer")
	}
	close(d.open)
}

// TestRequireTLS says things before TLS, and more than it should.
func TestRequireTLS(t *testing.T) {
	cert, _ := certificates(t, t.TempDir())
	path := serve(t, &Server{Exports: exports(memory(make([]byte, 4096)), false),
		TLS: &tls.Config{Certificates: []tls.Certificate{cert}}, RequireTLS: true})
	c := rawDial(t, path, 3)
	for opt := range uint32(12) {
		want := uint32(repErrTLSReqd)
		if opt == optExportName || opt == optAbort || opt == optStartTLS {
			continue
		}
		if got := c.option(opt, nil); len(got) != 1 || got[0] != want {
			t.Errorf("option %d: %#x", opt, got)
		}
	}
	c.write(optionBytes(optExportName, []byte("disk0")))
	if !c.gone() {
		t.Error("an export without TLS")
	}
	c = rawDial(t, path, 3) // what comes in the clear must not count as said over TLS
	c.write(append(optionBytes(optStartTLS, nil), optionBytes(optStructuredReply, nil)...))
	c.read(optionReplyLen)
	if !c.gone() {
		t.Error("data before TLS is taken")
	}
	for version, ok := range map[uint16]bool{tls.VersionTLS11: false, tls.VersionTLS12: true, tls.VersionTLS13: true} {
		c = rawDial(t, path, 3)
		c.option(optStartTLS, nil)
		err := tls.Client(c.nc, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS10, MaxVersion: version}).Handshake()
		if (err == nil) != ok {
			t.Errorf("TLS version %#x: %v", version, err)
		}
	}
}
