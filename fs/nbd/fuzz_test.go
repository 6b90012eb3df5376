//go:build linux

package nbd

import (
	"bufio"
	"bytes"
	"context"
	"net"
	"testing"
	"time"
)

// script is a connection whose other side says what it says, whatever it hears.
type script struct {
	*bytes.Reader
	sent int
}

func (s *script) Read(p []byte) (int, error) { return s.Reader.Read(p[:min(len(p), 1000)]) }

func (s *script) Write(p []byte) (int, error) {
	s.sent += len(p)
	return len(p), nil
}

func (s *script) Close() error                     { return nil }
func (s *script) LocalAddr() net.Addr              { return &net.UnixAddr{} }
func (s *script) RemoteAddr() net.Addr             { return &net.UnixAddr{} }
func (s *script) SetDeadline(time.Time) error      { return nil }
func (s *script) SetReadDeadline(time.Time) error  { return nil }
func (s *script) SetWriteDeadline(time.Time) error { return nil }

// zeroDisk is a disk that forgets.
type zeroDisk struct{ memory }

func (zeroDisk) WriteAt(p []byte, off int64) (int, error) { return len(p), nil }
func (zeroDisk) Flush() error                             { return nil }
func (zeroDisk) Zero(off, n int64, punch bool) error      { return nil }
func (zeroDisk) Trim(off, n int64) error                  { return nil }

// FuzzServer lets a client say anything.
func FuzzServer(f *testing.F) {
	hello := be.AppendUint32(nil, 3)
	enter := append(hello[:4:4], optionBytes(optStructuredReply, nil)...)
	enter = append(enter, optionBytes(optSetMetaContext, contextBytes("", baseAllocation))...)
	enter = append(enter, optionBytes(optGo, goBytes(""))...)
	f.Add(append(hello[:4:4], optionBytes(optExportName, nil)...))
	f.Add(append(hello[:4:4], optionBytes(optList, nil)...))
	for cmd := range uint16(9) {
		p := append(enter[:len(enter):len(enter)], requestBytes(cmd, 0, 1, 0, 16)...)
		f.Add(append(p, make([]byte, 16)...))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		s := &Server{Exports: exports(zeroDisk{make(memory, 100*kib)}, true)}
		s.Limits.fill()
		s.total.free = s.Limits.TotalData
		nc := &script{Reader: bytes.NewReader(p)}
		newConn(s, nil, nc).run()
		if most := 2000 + 300*kib*(1+len(p)/requestLen); nc.sent > most {
			t.Errorf("%d bytes are answered with %d", len(p), nc.sent)
		}
		if s.total.free != s.Limits.TotalData {
			t.Errorf("%d bytes are not given back", s.Limits.TotalData-s.total.free)
		}
	})
}

// FuzzClient lets a server say anything.
func FuzzClient(f *testing.F) {
	cookie := u64(1)
	enter := fakeHandshake()
	for _, p := range [][]byte{
		nil,
		chunkBytes(1, chunkData, cookie, u64(8), make([]byte, 64)),
		append(chunkBytes(0, chunkHole, cookie, u64(8), u32(32)), chunkBytes(1, chunkData, cookie, u64(40), make([]byte, 32))...),
		chunkBytes(1, chunkErrorOffset, cookie, u32(5), u16(1), []byte("x"), u64(8)),
		append(chunkBytes(1, chunkError, cookie, u32(5), u16(0)), chunkBytes(1, chunkBlockStatus, u64(2), u32(1), u32(99), u32(3))...),
		{0x67, 0x44, 0x66, 0x98, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 1},
	} {
		f.Add(append(enter[:len(enter):len(enter)], p...))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		nc := &script{Reader: bytes.NewReader(p)}
		h := &hello{nc: nc, br: bufio.NewReader(nc)}
		if h.negotiate([]string{baseAllocation}, nil) != nil {
			return
		}
		l := &link{nc: nc, br: h.br, structured: h.structured, contexts: h.contexts,
			ended: make(chan struct{}), sending: make(chan struct{}, 1), calls: make(map[uint64]*call)}
		data := bytes.Repeat([]byte{0xAA}, 64)
		read, status := newCall(cmdRead, 8, 64), newCall(cmdBlockStatus, 8, 512)
		read.p, status.context = data, baseAllocation
		l.register(read)
		l.register(status)
		l.receive()
		<-read.done
		<-status.done
		if read.err == nil && bytes.Contains(data, bytes.Repeat([]byte{0xAA}, 8)) && !bytes.Contains(p, bytes.Repeat([]byte{0xAA}, 8)) {
			t.Error("a read that ended well left memory as it was")
		}
		for _, s := range status.status {
			if s.Len <= 0 || s.Off < 8 || s.End() > 520 {
				t.Errorf("status %v", s)
			}
		}
		if err := l.do(context.Background(), newCall(cmdFlush, 0, 0), nil); err == nil {
			t.Error("a dead connection takes requests")
		}
	})
}
