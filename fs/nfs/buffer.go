package nfs

import (
	"math/bits"
	"sync"
)

const (
	maxData = 1 << 20  // bytes of one READ or WRITE; rtmax and wtmax of FSINFO
	maxDir  = 64 << 10 // bytes of one READDIR or READDIRPLUS; dtpref

	// slack is what a buffer has beyond a power of two, bytes: for what stands before and after the data in a message.
	slack     = 4 << 10
	maxRecord = maxData + slack
	// headroom is kept free before the data of a reply, bytes, for the start of the message: 28 + 4 + 88 + 12 of READ, 28 + 100 of READDIR.
	headroom = 256
)

// Buffers come in powers of two, and slack.
const (
	minBufferBits = 12
	maxBufferBits = 20
)

// A buffer is memory for one message. Its contents are arbitrary at first.
type buffer struct {
	mem   []byte
	class int
}

var bufferPools [maxBufferBits - minBufferBits + 1]sync.Pool // class => *buffer

// getBuffer gives a buffer for n bytes, at most maxRecord.
func getBuffer(n int) *buffer {
	class := bufferClass(n)
	if b, ok := bufferPools[class].Get().(*buffer); ok {
		return b
	}
	return &buffer{mem: make([]byte, bufferSize(n)), class: class}
}

func bufferClass(n int) int { return max(0, bits.Len(uint(max(n-slack, 1)-1))-minBufferBits) }

// bufferSize is the memory of a buffer for n bytes.
func bufferSize(n int) int64 { return slack + 1<<(bufferClass(n)+minBufferBits) }

// free gives the memory back; b, which may be nil, must not be used any more.
func (b *buffer) free() {
	if b != nil {
		bufferPools[b.class].Put(b)
	}
}
