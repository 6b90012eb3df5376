//go:build linux

package nbd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// fakeServer answers clients with bytes made by a test. It serves one export of
// 1 MiB with structured replies and base:allocation as context 1.
func fakeServer(t *testing.T, answer func(nc net.Conn, r []byte)) string {
	t.Helper()
	path := filepath.Join(scratch(t), "s")
	ln, err := Listen("unix:" + path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { nc.Close() })
			go func() {
				nc.Write(fakeHandshake())
				io.CopyN(io.Discard, nc, fakeHandshakeLen)
				for {
					r := make([]byte, requestLen)
					if _, err := io.ReadFull(nc, r); err != nil {
						return
					}
					answer(nc, r)
				}
			}()
		}
	}()
	return "unix:" + path
}

// fakeHandshake is what such a server says, before it is even asked.
func fakeHandshake() []byte {
	p := be.AppendUint64(nil, magicGreeting)
	p = be.AppendUint64(p, magicOption)
	p = be.AppendUint16(p, 3)
	o := optionReply{opt: optStructuredReply, mem: p}
	o.add(repAck, nil)
	o.opt = optSetMetaContext
	o.add(repMetaContext, append([]byte{0, 0, 0, 1}, baseAllocation...))
	o.add(repAck, nil)
	o.opt = optGo
	o.info(infoExport, be.AppendUint16(be.AppendUint64(nil, mib), uint16(HasFlags|SendFlush|CanMultiConn)))
	o.add(repAck, nil)
	return o.mem
}

// fakeHandshakeLen is what the client says meanwhile, bytes.
const fakeHandshakeLen int64 = 4 + optionLen + (optionLen + 4 + 4 + 4 + int64(len(baseAllocation))) + (optionLen + 4 + 2 + 4)

func chunkBytes(flags, typ uint16, cookie []byte, payload ...[]byte) []byte {
	body := bytes.Join(payload, nil)
	p := make([]byte, structuredLen)
	putChunk(p, flags, typ, be.Uint64(cookie), uint32(len(body)))
	return append(p, body...)
}

func u16(v uint16) []byte { return be.AppendUint16(nil, v) }
func u32(v uint32) []byte { return be.AppendUint32(nil, v) }
func u64(v uint64) []byte { return be.AppendUint64(nil, v) }

// TestHostileReplies reads 4096 bytes at 8192 from a server that answers wrongly.
func TestHostileReplies(t *testing.T) {
	const at = 8192
	zeros := make([]byte, 4096)
	simple := func(cookie []byte, e Errno) []byte {
		p := make([]byte, simpleLen)
		putSimple(p, be.Uint64(cookie), e)
		return p
	}
	for want, answer := range map[string]func(cookie []byte) []byte{
		"magic number":                       func(c []byte) []byte { return append(u64(1), c...) },
		"a reply to no request":              func(c []byte) []byte { return chunkBytes(1, chunkNone, u64(77)) },
		"a simple reply to a read":           func(c []byte) []byte { return append(simple(c, 0), zeros...) },
		"unexpected EOF":                     func(c []byte) []byte { return chunkBytes(1, chunkData, c, u64(at), zeros)[:300] },
		"a chunk of type 1 with 8 bytes":     func(c []byte) []byte { return chunkBytes(1, chunkData, c, u64(at)) },
		"a chunk of type 0 with 1 bytes":     func(c []byte) []byte { return chunkBytes(1, chunkNone, c, []byte{1}) },
		"a chunk of type 0 with 0 bytes":     func(c []byte) []byte { return chunkBytes(0, chunkNone, c) },
		"a chunk of type 2 with 13 bytes":    func(c []byte) []byte { return chunkBytes(1, chunkHole, c, make([]byte, 13)) },
		"a chunk of type 3 ":                 func(c []byte) []byte { return chunkBytes(1, 3, c) },
		"a chunk of type 5 ":                 func(c []byte) []byte { return chunkBytes(1, chunkBlockStatus, c, u32(1), u32(512), u32(0)) },
		"4096 bytes at 8191, which":          func(c []byte) []byte { return chunkBytes(1, chunkData, c, u64(at-1), zeros) },
		"4096 bytes at 8193, which":          func(c []byte) []byte { return chunkBytes(1, chunkData, c, u64(at+1), zeros) },
		"4096 bytes at 18446744073709551615": func(c []byte) []byte { return chunkBytes(1, chunkData, c, u64(1<<64-1), zeros) },
		"4097 bytes at 8192, which":          func(c []byte) []byte { return chunkBytes(1, chunkData, c, u64(at), zeros, []byte{1}) },
		"4294967295 bytes at 8192":           func(c []byte) []byte { return chunkBytes(1, chunkHole, c, u64(at), u32(1<<32-1)) },
		"0 bytes at 8192, which":             func(c []byte) []byte { return chunkBytes(1, chunkHole, c, u64(at), u32(0)) },
		"ends after 4095 bytes":              func(c []byte) []byte { return chunkBytes(1, chunkData, c, u64(at), zeros[:4095]) },
		"ends after 0 bytes":                 func(c []byte) []byte { return chunkBytes(1, chunkNone, c) },
		"with 4161 bytes":                    func(c []byte) []byte { return chunkBytes(1, chunkError, c, u32(5), u16(4155), make([]byte, 4155)) },
		"error 0 ":                           func(c []byte) []byte { return chunkBytes(1, chunkError, c, u32(0), u16(0)) },
		"error 5 with a message of 9 bytes":  func(c []byte) []byte { return chunkBytes(1, chunkError, c, u32(5), u16(9), zeros[:8]) },
		"too many chunks":                    func(c []byte) []byte { return bytes.Repeat(chunkBytes(0, chunkError, c, u32(5), u16(0)), 1000) },
		"100 bytes at 8292 for the second time": func(c []byte) []byte {
			return append(chunkBytes(0, chunkData, c, u64(at), zeros[:200]), chunkBytes(1, chunkHole, c, u64(at+100), u32(100))...)
		},
		"message of 3 bytes in a chunk of 16": func(c []byte) []byte { return chunkBytes(1, chunkErrorOffset, c, u32(5), u16(3), zeros[:10]) },
	} {
		c := dial(t, fakeServer(t, func(nc net.Conn, r []byte) {
			nc.Write(answer(r[8:16]))
			if strings.HasSuffix(want, "EOF") {
				nc.Close()
			}
		}), ClientOptions{})
		_, err := c.ReadAt(make([]byte, 4096), at)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "read of 4096 bytes at 8192: connection given up") {
			t.Errorf("%s: %v", want, err)
		}
		if _, again := c.ReadAt(make([]byte, 1), 0); again == nil || !strings.Contains(again.Error(), "connection given up") {
			t.Errorf("%s: the connection is still in use: %v", want, again)
		}
	}
}

// TestOddReplies reads from a server that answers rightly, but as few do.
func TestOddReplies(t *testing.T) {
	want := bytes.Repeat([]byte("abcdefgh"), 512)
	clear(want[1000:2000])
	n := 0
	c := dial(t, fakeServer(t, func(nc net.Conn, r []byte) {
		c := r[8:16]
		switch n++; n {
		case 1: // backwards, byte by byte in part, with the end in a chunk of its own
			nc.Write(chunkBytes(0, chunkData, c, u64(2000), want[2000:]))
			nc.Write(chunkBytes(0, chunkHole, c, u64(1000), u32(1000)))
			for i := 999; i >= 500; i-- {
				nc.Write(chunkBytes(0, chunkData, c, u64(uint64(i)), want[i:i+1]))
			}
			nc.Write(chunkBytes(0x8000, chunkData, c, u64(0), want[:500]))
			nc.Write(chunkBytes(1, chunkNone, c))
		case 2: // two errors, then data
			nc.Write(chunkBytes(0, chunkErrorOffset, c, u32(uint32(ENOSPC)), u16(3), []byte("no\xff"), u64(8)))
			nc.Write(chunkBytes(0, chunkErrorBit|99, c, u32(uint32(EIO)), u16(0), []byte("more")))
			nc.Write(chunkBytes(1, chunkData, c, u64(0), want))
		case 3:
			p := make([]byte, simpleLen)
			putSimple(p, be.Uint64(c), 12345)
			nc.Write(p)
		}
	}), ClientOptions{})
	p := bytes.Repeat([]byte{0xAA}, 4096)
	if _, err := c.ReadAt(p, 0); err != nil || !bytes.Equal(p, want) {
		t.Errorf("in pieces: %v", err)
	}
	if _, err := c.ReadAt(p, 0); !errors.Is(err, ENOSPC) || !strings.Contains(err.Error(), "no\uFFFD") {
		t.Errorf("two errors: %v", err)
	}
	if _, err := c.ReadAt(p, 0); !errors.Is(err, Errno(12345)) {
		t.Errorf("an unknown error: %v", err)
	}
}

func TestHostileStatus(t *testing.T) {
	for want, answer := range map[string]func(cookie []byte) []byte{
		"says nothing of base:allocation": func(c []byte) []byte { return chunkBytes(1, chunkNone, c) },
		"metadata context 2":              func(c []byte) []byte { return chunkBytes(1, chunkBlockStatus, c, u32(2), u32(512), u32(0)) },
		"metadata context 1, which": func(c []byte) []byte {
			one := chunkBytes(0, chunkBlockStatus, c, u32(1), u32(512), u32(0))
			return append(one, one...)
		},
		"extent 1 of 0 bytes": func(c []byte) []byte {
			return chunkBytes(1, chunkBlockStatus, c, u32(1), u32(512), u32(0), u32(0), u32(0))
		},
		"extent 1 of 512 bytes": func(c []byte) []byte {
			return chunkBytes(1, chunkBlockStatus, c, u32(1), u32(8192), u32(0), u32(512), u32(0))
		},
		"with 13 bytes":      func(c []byte) []byte { return chunkBytes(1, chunkBlockStatus, c, u32(1), u32(512), u32(0), []byte{0}) },
		"with 8388620 bytes": func(c []byte) []byte { return chunkBytes(1, chunkBlockStatus, c, make([]byte, 4+8*(maxExtents+1))) },
	} {
		c := dial(t, fakeServer(t, func(nc net.Conn, r []byte) { nc.Write(answer(r[8:16])) }), ClientOptions{})
		if got, err := c.BlockStatus(context.Background(), baseAllocation, 0, 8192); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, %v", want, got, err)
		}
	}
	// More than was asked about is right, and cut.
	c := dial(t, fakeServer(t, func(nc net.Conn, r []byte) {
		nc.Write(chunkBytes(1, chunkBlockStatus, r[8:16], u32(1), u32(4096), u32(3), u32(1<<32-1), u32(0)))
	}), ClientOptions{})
	got, err := c.BlockStatus(context.Background(), baseAllocation, 0, 8192)
	if err != nil || len(got) != 2 || got[1].Len != 4096 || got[0].Flags != 3 {
		t.Errorf("more than asked: %v, %v", got, err)
	}
}

func TestCancel(t *testing.T) {
	stuck := make(chan struct{})
	c := dial(t, fakeServer(t, func(nc net.Conn, r []byte) {
		switch be.Uint64(r[16:]) {
		case 0: // never
		case 4096: // later
			cookie := bytes.Clone(r[8:16])
			go func() {
				<-stuck
				nc.Write(chunkBytes(1, chunkData, cookie, u64(4096), bytes.Repeat([]byte{0xFF}, 512)))
			}()
		case 8192:
			nc.Write(chunkBytes(1, chunkData, r[8:16], u64(8192), bytes.Repeat([]byte{1}, 512)))
		case 12288: // half of it
			nc.Write(chunkBytes(1, chunkData, r[8:16], u64(12288), make([]byte, 512))[:100])
		}
	}), ClientOptions{})
	given := make(map[int64][]byte) // back to the caller, by the offset that was read
	read := func(off int64, limit time.Duration) error {
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		defer cancel()
		p := make([]byte, 512)
		_, err := c.ReadContext(ctx, p, off)
		if err != nil {
			clear(p) // with -race: nobody else writes there any more
			given[off] = p
		}
		return err
	}
	for _, off := range []int64{0, 4096} {
		if err := read(off, 20*time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("at %d: %v", off, err)
		}
	}
	close(stuck)
	for range 50 { // the late answer is among these
		time.Sleep(time.Millisecond)
		if err := read(8192, 10*time.Second); err != nil {
			t.Errorf("after a cancelled read: %v", err)
		}
	}
	if !isZero(given[4096]) {
		t.Error("the answer to a cancelled read came after its end")
	}
	waiting := make(chan error, 1)
	go func() {
		_, err := c.ReadAt(make([]byte, 512), 0)
		waiting <- err
	}()
	if err := read(12288, 100*time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("in the middle of a reply: %v", err)
	}
	if err := <-waiting; err == nil || !strings.Contains(err.Error(), "read of 512 bytes at 0: connection given up") {
		t.Errorf("the other request: %v", err)
	}
}

// TestDialCancel connects to servers that say nothing, or never end.
func TestDialCancel(t *testing.T) {
	for name, say := range map[string]func(nc net.Conn){
		"silent": func(nc net.Conn) {},
		"endless": func(nc net.Conn) {
			greeting := fakeHandshake()[:18]
			nc.Write(greeting)
			o := optionReply{opt: optStructuredReply}
			o.add(repServer, make([]byte, 1000))
			for {
				if _, err := nc.Write(o.mem); err != nil {
					return
				}
			}
		},
	} {
		ln, err := Listen("unix:" + filepath.Join(scratch(t), "s"))
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		go func() {
			if nc, err := ln.Accept(); err == nil {
				say(nc)
			}
		}()
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		defer cancel()
		if _, err := Dial(ctx, "unix:"+ln.Addr().String(), ClientOptions{}); err == nil {
			t.Errorf("%s: connected", name)
		}
	}
}
