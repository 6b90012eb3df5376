package vdisk

import (
	"bytes"
	"errors"
	"io"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"
)

// packedCache decodes compressed clusters and keeps the last few, so that small
// reads one after the other decode each cluster once. Safe for concurrent use.
type packedCache struct {
	r       io.ReaderAt
	size    int64 // of the file, bytes
	cluster int64
	zstd    bool
	work    sync.Pool // of *unpacker

	mu sync.Mutex
	// guards following: which slot is for which entry
	slots []*packedSlot
	clock uint64
}

// packedSlot holds one decoded cluster.
type packedSlot struct {
	entry uint64 // guarded by packedCache.mu; 0 is never a compressed cluster with data
	used  uint64 // guarded by packedCache.mu

	mu sync.Mutex
	// guards following
	holds uint64 // entry that b was decoded from; 0: none
	b     []byte
}

func newPackedCache(r io.ReaderAt, size, cluster int64, zstd bool) *packedCache {
	n := max(2, min(16, mib/cluster))
	c := &packedCache{r: r, size: size, cluster: cluster, zstd: zstd, slots: make([]*packedSlot, n)}
	for i := range c.slots {
		c.slots[i] = new(packedSlot)
	}
	c.work.New = func() any { return new(unpacker) }
	return c
}

// read fills p with the bytes from in on of the cluster that an L2 entry
// (without its two top bits) describes.
func (c *packedCache) read(p []byte, entry uint64, in int64) error {
	s := c.slot(entry)
	if s == nil && int64(len(p)) == c.cluster {
		return c.unpack(p, entry) // whole: no need to keep it
	}
	if s == nil {
		s = c.claim(entry)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.b == nil {
		s.b = make([]byte, c.cluster)
	}
	if s.holds != entry || entry == 0 {
		s.holds = 0
		if err := c.unpack(s.b, entry); err != nil {
			return err
		}
		s.holds = entry
	}
	copy(p, s.b[in:])
	return nil
}

// slot finds the slot for entry, nil when there is none.
func (c *packedCache) slot(entry uint64) *packedSlot {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.slots {
		if s.entry == entry {
			c.clock++
			s.used = c.clock
			return s
		}
	}
	return nil
}

// claim gives entry the slot that was not used for longest. Whoever still
// waits for that slot decodes again: what a slot holds is what counts.
func (c *packedCache) claim(entry uint64) *packedSlot {
	c.mu.Lock()
	defer c.mu.Unlock()
	oldest := c.slots[0]
	for _, s := range c.slots {
		if s.used < oldest.used {
			oldest = s
		}
	}
	c.clock++
	oldest.entry, oldest.used = entry, c.clock
	return oldest
}

// unpacker is what decoding one cluster takes.
type unpacker struct {
	in     []byte // at most 2 clusters
	src    bytes.Reader
	inflat io.ReadCloser
	zstd   *zstd.Decoder
}

// unpack decodes into dst, which is one cluster. The entry, qcow2
// specification, "Compressed Clusters Descriptor", with x = 70 - cluster_bits:
//
//	bits 0..x-1  offset in the file, not aligned
//	bits x..61   512-byte sectors used after the one with that offset
func (c *packedCache) unpack(dst []byte, entry uint64) error {
	bits := 0
	for 1<<bits < c.cluster {
		bits++
	}
	x := 70 - bits
	off := int64(entry & (1<<x - 1))
	n := (int64(entry>>x)+1)*sector - off%sector
	if off >= c.size {
		return corrupt("compressed data at %d lies past the end of the file at %d", off, c.size)
	}
	n = min(n, c.size-off) // the last sector need not be whole; too little will not decode

	u := c.work.Get().(*unpacker)
	defer c.work.Put(u)
	if int64(cap(u.in)) < n {
		u.in = make([]byte, n)
	}
	u.in = u.in[:n]
	if _, err := readFull(c.r, u.in, off); err != nil {
		return err
	}
	var err error
	if c.zstd {
		err = u.unzstd(dst)
	} else {
		err = u.inflate(dst)
	}
	if err != nil {
		return corrupt("compressed data at %d (%v)", off, err)
	}
	return nil
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
