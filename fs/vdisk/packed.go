package vdisk

import (
	"bytes"
	"errors"
	"io"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zlib"
	"github.com/klauspost/compress/zstd"
)

// packedCache decodes compressed clusters and keeps the last few, so that small
// reads one after the other decode each cluster once. Safe for concurrent use.
type packedCache struct {
	cluster int64
	decode  func(u *unpacker, dst []byte, key packedKey) error // fills dst, one cluster
	work    sync.Pool                                          // of *unpacker

	mu sync.Mutex
	// guards following: which slot is for which cluster
	slots []*packedSlot
	clock uint64
}

// packedKey says where a compressed cluster is in the file, and, where the
// format checks that, where on the disk.
type packedKey struct {
	host int64 // 0 is never a compressed cluster with data
	at   int64
}

// packedSlot holds one decoded cluster.
type packedSlot struct {
	key  packedKey // guarded by packedCache.mu
	used uint64    // guarded by packedCache.mu

	mu sync.Mutex
	// guards following
	holds packedKey // what b was decoded from; host 0: nothing
	b     []byte
}

func newPackedCache(cluster int64, decode func(u *unpacker, dst []byte, key packedKey) error) *packedCache {
	n := max(2, min(16, mib/cluster))
	c := &packedCache{cluster: cluster, decode: decode, slots: make([]*packedSlot, n)}
	for i := range c.slots {
		c.slots[i] = new(packedSlot)
	}
	c.work.New = func() any { return new(unpacker) }
	return c
}

// read fills p with the bytes from in on of a cluster.
func (c *packedCache) read(p []byte, key packedKey, in int64) error {
	s := c.slot(key)
	if s == nil && int64(len(p)) == c.cluster {
		return c.unpack(p, key) // whole: no need to keep it
	}
	if s == nil {
		s = c.claim(key)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.b == nil {
		s.b = make([]byte, c.cluster)
	}
	if s.holds != key || key.host == 0 {
		s.holds = packedKey{}
		if err := c.unpack(s.b, key); err != nil {
			return err
		}
		s.holds = key
	}
	copy(p, s.b[in:])
	return nil
}

// slot finds the slot for a cluster, nil when there is none.
func (c *packedCache) slot(key packedKey) *packedSlot {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.slots {
		if s.key == key {
			c.clock++
			s.used = c.clock
			return s
		}
	}
	return nil
}

// claim gives a cluster the slot that was not used for longest. Whoever still
// waits for that slot decodes again: what a slot holds is what counts.
func (c *packedCache) claim(key packedKey) *packedSlot {
	c.mu.Lock()
	defer c.mu.Unlock()
	oldest := c.slots[0]
	for _, s := range c.slots {
		if s.used < oldest.used {
			oldest = s
		}
	}
	c.clock++
	oldest.key, oldest.used = key, c.clock
	return oldest
}

func (c *packedCache) unpack(dst []byte, key packedKey) error {
	u := c.work.Get().(*unpacker)
	defer c.work.Put(u)
	return c.decode(u, dst, key)
}

// unpacker is what decoding one cluster takes.
type unpacker struct {
	in     []byte // at most about 2 clusters
	out    []byte // of VMDKStream, one grain
	more   [1]byte
	src    bytes.Reader
	inflat io.ReadCloser
	zlib   io.ReadCloser
	zstd   *zstd.Decoder
}

// load reads the compressed bytes: n from off on.
func (u *unpacker) load(r io.ReaderAt, off, n int64) error {
	if int64(cap(u.in)) < n {
		u.in = make([]byte, n)
	}
	u.in = u.in[:n]
	_, err := readFull(r, u.in, off)
	return err
}

// inflate: zlib in qcow2 means a raw deflate stream.
func (u *unpacker) inflate(dst []byte) error {
	u.src.Reset(u.in)
	if u.inflat == nil {
		u.inflat = flate.NewReader(&u.src)
	} else if err := u.inflat.(flate.Resetter).Reset(&u.src, nil); err != nil {
		return err
	}
	return fill(u.inflat, dst)
}

// unzlib fills dst from a zlib stream (RFC 1950), whose checksum it verifies,
// and returns how much the stream gave: at most len(dst), or an error.
func (u *unpacker) unzlib(dst []byte) (int, error) {
	u.src.Reset(u.in)
	if u.zlib == nil {
		z, err := zlib.NewReader(&u.src)
		if err != nil {
			return 0, err
		}
		u.zlib = z
	} else if err := u.zlib.(zlib.Resetter).Reset(&u.src, nil); err != nil {
		return 0, err
	}
	// io.EOF comes at the good end of a stream only, after its checksum.
	n := 0
	for n < len(dst) {
		k, err := u.zlib.Read(dst[n:])
		n += k
		if err == io.EOF {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
	for {
		k, err := u.zlib.Read(u.more[:])
		if k > 0 {
			return n, errors.New("gives more than it should")
		}
		if err == io.EOF {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}

// unzstd reads frames until dst is full; what follows is padding.
func (u *unpacker) unzstd(dst []byte) error {
	u.src.Reset(u.in)
	if u.zstd == nil {
		// One goroutine (the caller's), and no more than 8 MiB of window
		// however large a frame claims to be.
		d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(8*mib), zstd.WithDecoderLowmem(true))
		if err != nil {
			return err
		}
		u.zstd = d
	}
	if err := u.zstd.Reset(&u.src); err != nil {
		return err
	}
	return fill(u.zstd, dst)
}

func fill(r io.Reader, dst []byte) error {
	_, err := io.ReadFull(r, dst)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("ends too early")
	}
	return err
}
