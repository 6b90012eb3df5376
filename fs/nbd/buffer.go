package nbd

import (
	"bytes"
	"math/bits"
	"sync"
)

// headroom is the space in a buffer before the data, bytes: a reply's header is
// written there, so that header and data go out as one piece, over TLS too.
const headroom = 64

// Buffers come in powers of two.
const (
	minBufferBits = 12
	maxBufferBits = 25
)

// A buffer is memory for the data of one request. Its contents are arbitrary at first.
type buffer struct {
	mem   []byte // headroom, then the data
	class int
}

var bufferPools [maxBufferBits - minBufferBits + 1]sync.Pool // class => *buffer

// getBuffer gives a buffer for n bytes of data, at most maxPayload.
func getBuffer(n int) *buffer {
	class := bufferClass(n)
	if b, ok := bufferPools[class].Get().(*buffer); ok {
		return b
	}
	return &buffer{mem: make([]byte, headroom+1<<(class+minBufferBits)), class: class}
}

func bufferClass(n int) int { return max(0, bits.Len(uint(max(n, 1)-1))-minBufferBits) }

// bufferSize is the memory of a buffer for n bytes of data, less its headroom.
func bufferSize(n int) int64 { return 1 << (bufferClass(n) + minBufferBits) }

func (b *buffer) data(n int) []byte { return b.mem[headroom : headroom+n] }

// free gives the memory back; b must not be used any more.
func (b *buffer) free() { bufferPools[b.class].Put(b) }

var zeroPage [4096]byte

// isZero reports whether all of p is zero. It looks at little when it is not.
func isZero(p []byte) bool {
	for len(p) > 0 {
		n := min(len(p), len(zeroPage))
		if !bytes.Equal(p[:n], zeroPage[:n]) {
			return false
		}
		p = p[n:]
	}
	return true
}

// A budget bounds bytes. It is given out in the order it is asked for.
type budget struct {
	mu sync.Mutex
	// guards following
	free    int64
	waiting []claim // in order
}

type claim struct {
	n     int64
	given chan struct{} // closed when it has been
}

// take waits until n bytes are free and takes them; n must not exceed the whole budget.
func (b *budget) take(n int64) {
	b.mu.Lock()
	if len(b.waiting) == 0 && b.free >= n {
		b.free -= n
		b.mu.Unlock()
		return
	}
	given := make(chan struct{})
	b.waiting = append(b.waiting, claim{n, given})
	b.mu.Unlock()
	<-given
}

func (b *budget) give(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.free += n
	for len(b.waiting) > 0 && b.waiting[0].n <= b.free {
		b.free -= b.waiting[0].n
		close(b.waiting[0].given)
		b.waiting = b.waiting[1:]
	}
}
