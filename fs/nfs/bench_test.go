package nfs

import (
	"bufio"
	"context"
	"io"
	"net"
	"testing"
	"time"
)

// large is tiny with a file of 1 GiB that costs nothing to read.
type large struct{ tiny }

var largeTime = time.Unix(1e9, 5)

func (large) Attr(ctx context.Context, id ID) (Attr, error) {
	a, err := tiny{}.Attr(ctx, id)
	if id == tinyFile {
		a.Size = 1 << 30
	}
	a.Modified, a.Changed, a.Accessed = largeTime, largeTime, largeTime
	return a, err
}

func (large) ReadAt(_ context.Context, _ ID, p []byte, _ int64) (int, error) { return len(p), nil }

// benchCall has a client send the same call again and again, depth at a time,
// and allocates nothing itself: what is reported is the server's.
func benchCall(b *testing.B, depth int, rec []byte, data int) {
	s := &Server{}
	if err := s.Export(Export{Path: "/x", ID: 1, FS: large{}, Writable: true, NoRootSquash: true}); err != nil {
		b.Fatal(err)
	}
	if err := s.Listen("127.0.0.1:0"); err != nil {
		b.Fatal(err)
	}
	go s.Serve(context.Background())
	defer s.Close()
	nc, err := net.Dial("tcp", s.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	defer nc.Close()
	br := bufio.NewReaderSize(nc, 1<<20)
	reply := make([]byte, 2<<20)
	one := func() {
		if _, err := io.ReadFull(br, reply[:4]); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(br, reply[:be.Uint32(reply)&^lastFragment]); err != nil {
			b.Fatal(err)
		}
		if st := be.Uint32(reply[24:]); st != 0 {
			b.Fatal("status", st)
		}
	}
	b.SetBytes(int64(data))
	b.ReportAllocs()
	left := b.N
	b.ResetTimer()
	go func() {
		for range min(depth, b.N) {
			nc.Write(rec)
		}
	}()
	for i := range b.N {
		one()
		if left--; i+depth < b.N {
			nc.Write(rec)
		}
	}
}

func readCall(n uint32) []byte {
	w := encoder{handleOf(tinyFile)}
	w.u64(4096)
	w.u32(n)
	return callBytes(progNFS, versNFS, procRead, w.b)
}

func writeCall(n uint32) []byte {
	w := encoder{handleOf(tinyFile)}
	w.u64(4096)
	w.u32(n)
	w.u32(unstable)
	w.u32(n)
	return callBytes(progNFS, versNFS, procWrite, append(w.b, make([]byte, n)...))
}

func BenchmarkRead4K(b *testing.B)       { benchCall(b, 1, readCall(4096), 4096) }
func BenchmarkRead4KDeep(b *testing.B)   { benchCall(b, 16, readCall(4096), 4096) }
func BenchmarkRead64KDeep(b *testing.B)  { benchCall(b, 8, readCall(64<<10), 64<<10) }
func BenchmarkRead1M(b *testing.B)       { benchCall(b, 1, readCall(1<<20), 1<<20) }
func BenchmarkRead1MDeep(b *testing.B)   { benchCall(b, 4, readCall(1<<20), 1<<20) }
func BenchmarkWrite4K(b *testing.B)      { benchCall(b, 1, writeCall(4096), 4096) }
func BenchmarkWrite4KDeep(b *testing.B)  { benchCall(b, 16, writeCall(4096), 4096) }
func BenchmarkWrite64KDeep(b *testing.B) { benchCall(b, 8, writeCall(64<<10), 64<<10) }
func BenchmarkWrite1M(b *testing.B)      { benchCall(b, 1, writeCall(1<<20), 1<<20) }
