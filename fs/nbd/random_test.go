//go:build linux

package nbd

import (
	"bytes"
	"crypto/tls"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// TestRandom has many goroutines change their own parts of a disk through client
// and server; the file under the server must be as a plain model then. It is
// ours against ours up to that comparison.
func TestRandom(t *testing.T) {
	cert, roots := certificates(t, t.TempDir())
	for name, o := range map[string]ClientOptions{
		"one connection":   {},
		"four connections": {Connections: 4},
		"TLS":              {TLS: &tls.Config{RootCAs: roots, ServerName: "nbd.example"}},
	} {
		t.Run(name, func(t *testing.T) {
			const part, parts = 3*mib + 1, 8
			d := newFileDisk(t, part*parts)
			path := serve(t, &Server{Exports: exports(d, true), TLS: &tls.Config{Certificates: []tls.Certificate{cert}}})
			c := dial(t, "unix:"+path, o)
			model, err := os.ReadFile(d.path())
			if err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			for i := range parts {
				wg.Go(func() {
					w := window{c, int64(i) * part}
					for range 3 {
						changeRandomly(t, w, model[i*part:(i+1)*part], uint64(i), 100)
					}
				})
			}
			wg.Wait()
			got, err := os.ReadFile(d.path())
			if err != nil || !bytes.Equal(got, model) {
				t.Error("the file is not what was written")
			}
			checkAllocated(t, c, model)
		})
	}
}

// window is a part of a disk.
type window struct {
	*Client
	off int64
}

func changeRandomly(t *testing.T, w window, model []byte, seed uint64, n int) {
	rnd := rand.New(rand.NewPCG(seed, 3))
	size := int64(len(model))
	for i := range n {
		off := rnd.Int64N(size)
		length := min(1+rnd.Int64N([]int64{600, 200 * kib}[i%2]), size-off)
		part := model[off : off+length]
		var err error
		switch rnd.IntN(5) {
		case 0, 1:
			for j := range part {
				part[j] = byte(rnd.Uint32())
			}
			_, err = w.WriteAt(part, w.off+off)
		case 2:
			clear(part)
			err = w.Zero(w.off+off, length, i%3 == 0)
		default:
			got := bytes.Repeat([]byte{0xAA}, len(part))
			if _, err = w.ReadAt(got, w.off+off); err == nil && !bytes.Equal(got, part) {
				t.Errorf("read of %d bytes at %d differs", length, w.off+off)
				return
			}
		}
		if err != nil {
			t.Error(err)
			return
		}
	}
}

// checkAllocated makes sure that all outside of the allocation is zero, and that
// it says the same from every place on.
func checkAllocated(t *testing.T, c *Client, model []byte) {
	t.Helper()
	var all []extent.Extent
	end := int64(0)
	for e, err := range c.Allocated(512) {
		if err != nil {
			t.Fatal(err)
		}
		if !isZero(model[end:e.Off]) {
			t.Errorf("data between %d and %d is not allocated", end, e.Off)
		}
		end = e.End()
		all = append(all, e)
	}
	if !isZero(model[end:]) {
		t.Errorf("data after %d is not allocated", end)
	}
	for off := int64(0); off < c.Size(); off += c.Size() / 7 {
		var got, want []extent.Extent
		for e, err := range c.AllocatedFrom(off, 1) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, e)
		}
		for _, e := range all {
			want = append(want, extent.Intersect(e, extent.Extent{Off: off, Len: c.Size() - off}))
		}
		if want = extent.Normalise(want); !slices.Equal(got, want) {
			t.Errorf("from %d: %v, want %v", off, got, want)
		}
	}
}
