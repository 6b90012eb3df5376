package nfs

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"iter"
	"net"
	"net/netip"
	"syscall"
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
func (s *script) LocalAddr() net.Addr              { return s.RemoteAddr() }
func (s *script) RemoteAddr() net.Addr             { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9} }
func (s *script) SetDeadline(time.Time) error      { return nil }
func (s *script) SetReadDeadline(time.Time) error  { return nil }
func (s *script) SetWriteDeadline(time.Time) error { return nil }

// tiny is a directory with one file, that forgets what is written.
type tiny struct{}

var tinyRoot, tinyFile = ID{1, 1}, ID{2, 1}

func (tiny) Root() ID { return tinyRoot }

func (tiny) Attr(_ context.Context, id ID) (Attr, error) {
	switch id {
	case tinyRoot:
		return Attr{Kind: KindDir, Mode: 0o777}, nil
	case tinyFile:
		return Attr{Kind: KindFile, Mode: 0o666, Size: 5000}, nil
	}
	return Attr{}, syscall.ESTALE
}

func (tiny) Lookup(_ context.Context, dir ID, name string) (ID, error) {
	if name == "f" {
		return tinyFile, nil
	}
	return ID{}, syscall.ENOENT
}

func (tiny) Parent(context.Context, ID) (ID, error) { return tinyRoot, nil }

func (tiny) ReadDir(_ context.Context, _ ID, after uint64) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		if after == 0 {
			yield(Entry{"f", tinyFile, 1}, nil)
		}
	}
}

func (tiny) ReadAt(_ context.Context, _ ID, p []byte, off int64) (int, error) {
	n := int(min(int64(len(p)), max(5000-off, 0)))
	clear(p[:n])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (tiny) Readlink(context.Context, ID) (string, error) { return "", syscall.EINVAL }
func (tiny) Space(context.Context) (Space, error)         { return Space{}, nil }
func (tiny) WriteAt(_ context.Context, _ ID, p []byte, _ int64) (int, error) {
	return len(p), nil
}
func (tiny) Sync(context.Context, ID) error            { return nil }
func (tiny) SetAttr(context.Context, ID, Change) error { return nil }
func (tiny) Create(context.Context, ID, string, Creation) (ID, error) {
	return tinyFile, nil
}
func (tiny) Mkdir(context.Context, ID, string, Change) (ID, error) { return tinyRoot, nil }
func (tiny) Remove(context.Context, ID, string) error              { return nil }
func (tiny) Rmdir(context.Context, ID, string) error               { return nil }
func (tiny) Rename(context.Context, ID, string, ID, string) error  { return nil }

var allPrograms = []*program{&nfsProgram, &mountProgram, &portmapProgram}

// tinyServer has no listener.
func tinyServer(t testing.TB) *Server {
	s := &Server{Log: func(err error) {
		if bytes.Contains([]byte(err.Error()), []byte("panic")) {
			t.Error(err)
		}
	}}
	if err := s.Export(Export{Path: "/x", ID: 1, FS: tiny{}, Writable: true, NoRootSquash: true}); err != nil {
		t.Fatal(err)
	}
	return s
}

func handleOf(id ID) []byte {
	var w encoder
	w.handle(handle{1, id})
	return w.b
}

// callBytes is a call with its mark.
func callBytes(prog, vers, proc uint32, args []byte) []byte {
	var w encoder
	w.u32(0)
	for _, v := range []uint32{9, msgCall, rpcVersion, prog, vers, proc, flavorSys, 28, 1, 1} {
		w.u32(v)
	}
	w.b = append(w.b, "m\x00\x00\x00"...)
	for range 3 + 2 {
		w.u32(0)
	}
	w.u32(0)
	w.b = append(w.b, args...)
	be.PutUint32(w.b, lastFragment|uint32(len(w.b)-markLen))
	return w.b
}

// seedArgs are well-formed arguments for each procedure of NFS, in short.
func seedArgs(proc uint32) []byte {
	fh := handleOf(tinyFile)
	name := []byte("\x00\x00\x00\x01g\x00\x00\x00")
	dir := append(handleOf(tinyRoot), name...)
	zeros := make([]byte, 32)
	switch proc {
	case 3, 12, 13:
		return dir
	case 8, 9, 10, 11:
		return append(dir, zeros...)
	case 14:
		return append(dir, dir...)
	case 15:
		return append(fh, dir...)
	case 16, 17:
		return append(handleOf(tinyRoot), binary.BigEndian.AppendUint64(zeros[:16:16], 1<<41|1<<10)...)
	case 6:
		return append(fh, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 2, 0)
	}
	return append(fh, zeros...)
}

// FuzzConn lets a client say anything.
func FuzzConn(f *testing.F) {
	for proc := range uint32(23) {
		f.Add(callBytes(progNFS, versNFS, proc, seedArgs(proc)))
	}
	for proc := range uint32(6) {
		f.Add(callBytes(progMount, versMount, proc, []byte("\x00\x00\x00\x02/x\x00\x00")))
	}
	f.Add([]byte{0, 0, 0, 3, 1, 2, 3, 0x80, 0, 0, 1, 4})
	f.Fuzz(func(t *testing.T, p []byte) {
		s := tinyServer(t)
		nc := &script{Reader: bytes.NewReader(p)}
		newConn(s, allPrograms, nc).run()
		if most := 2000 + 2*maxData*(1+len(p)/40); nc.sent > most {
			t.Errorf("%d bytes of replies to %d bytes", nc.sent, len(p))
		}
		if s.gate.requests != s.Limits.TotalRequests || s.gate.bytes != s.Limits.TotalData {
			t.Errorf("%d requests and %d bytes were not given back", s.Limits.TotalRequests-s.gate.requests, s.Limits.TotalData-s.gate.bytes)
		}
		e := s.exports.Load().byID[1]
		if len(e.changes.files) != 0 || len(e.syncs.files) != 0 || !e.use.TryLock() {
			t.Error("the export is still in use")
		}
	})
}

// FuzzUDP answers a packet with anything in it.
func FuzzUDP(f *testing.F) {
	for proc := range uint32(6) {
		f.Add(callBytes(progMount, versMount, proc, []byte("\x00\x00\x00\x02/x\x00\x00"))[markLen:])
		f.Add(callBytes(progPortmap, versPortmap, proc, make([]byte, 16))[markLen:])
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		s := tinyServer(t)
		var r request
		r.srv, r.ctx, r.programs, r.addr, r.udp = s, s.base, allPrograms, netip.MustParseAddr("127.0.0.1"), true
		args, err := parseCall(&r.call, p)
		if err != nil {
			return
		}
		r.args.p = args
		r.run()
		if r.prog != progNFS && len(r.msg) > maxUDP+markLen {
			t.Errorf("a reply of %d bytes", len(r.msg))
		}
		if r.msg != nil && (be.Uint32(r.msg)&^lastFragment != uint32(len(r.msg)-markLen) || len(r.msg)%4 != 0) {
			t.Errorf("a reply of %d bytes marked %#x", len(r.msg), be.Uint32(r.msg))
		}
		r.free()
	})
}

// FuzzArgs calls each procedure with arguments of all kinds.
func FuzzArgs(f *testing.F) {
	for proc := range uint32(22) {
		f.Add(proc, seedArgs(proc))
	}
	f.Fuzz(func(t *testing.T, proc uint32, args []byte) {
		if len(args) > maxRecord {
			return
		}
		s := tinyServer(t)
		r := request{srv: s, ctx: s.base, addr: netip.MustParseAddr("127.0.0.1"), programs: allPrograms}
		r.call = call{xid: 7, rpcVers: rpcVersion, prog: progNFS, vers: versNFS, proc: proc % 22, cred: cred{known: true}}
		r.args.p = args
		room := replyRoom(&r.call, args)
		r.run()
		if r.out != nil && int64(len(r.out.mem)) > room {
			t.Errorf("a reply buffer of %d bytes where %d were reckoned with", len(r.out.mem), room)
		}
		if be.Uint32(r.msg)&^lastFragment != uint32(len(r.msg)-markLen) || len(r.msg)%4 != 0 {
			t.Errorf("a reply of %d bytes marked %#x", len(r.msg), be.Uint32(r.msg))
		}
		r.free()
	})
}

// TestCutOff cuts the arguments of every procedure off at every length: they are
// garbage up to where they are whole.
func TestCutOff(t *testing.T) {
	s := tinyServer(t)
	for proc := range uint32(22) {
		whole := proc == 0
		for n := range len(seedArgs(proc)) + 1 {
			r := request{srv: s, ctx: s.base, addr: netip.MustParseAddr("127.0.0.1"), programs: allPrograms}
			r.call = call{rpcVers: rpcVersion, prog: progNFS, vers: versNFS, proc: proc, cred: cred{known: true}}
			r.args.p = seedArgs(proc)[:n]
			r.run()
			garbage := r.how == acceptGarbageArgs
			if garbage && (whole || n == len(seedArgs(proc))) || !garbage && n == 0 && proc > 0 {
				t.Errorf("%s with %d bytes of arguments: garbage %v", r.procName(), n, garbage)
			}
			whole = !garbage
			r.free()
		}
	}
}
