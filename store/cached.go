package store

import (
	"context"
	"io"

	"golang.org/x/sync/errgroup"
)

// Cache keeps what was read of images, decoded, least recently used out first.
type Cache struct{ frames *chunkCache }

// NewCache makes a cache of so many bytes.
func NewCache(bytes int64) *Cache { return &Cache{newChunkCache(bytes)} }

// streamLen is from how many bytes on a read is taken for one of a stream, which does not come back: it
// uses what is in a Cache, such as what was prefetched for it, and puts nothing there.
const streamLen = 1 << 20

// CachedImage is an image whose reads go through a Cache: that of one reader, which the reads of others
// must not throw out. Several images may share a Cache. Safe for concurrent use.
type CachedImage struct {
	*Image
	through Image // with the cache
	stream  Image // looks into the cache, and puts no whole chunks there
	ahead   Image // for prefetching
}

var _ io.ReaderAt = (*CachedImage)(nil)

// Cached gives the same image through c.
func (m *Image) Cached(c *Cache) *CachedImage {
	i := &CachedImage{Image: m, through: *m, stream: *m}
	i.through.cache, i.through.fill = c.frames, fillAll
	i.stream.cache, i.stream.fill = c.frames, fillPeek
	i.ahead = i.through
	return i
}

// ReadAt reads as that of Image does.
func (m *CachedImage) ReadAt(p []byte, off int64) (int, error) {
	if len(p) >= streamLen {
		return m.stream.ReadAt(p, off)
	}
	return m.through.ReadAt(p, off)
}

// Kept gives the same image with all that is read, and no more, kept in c: for servers whose clients read the same again, and a c that has room for much of it.
func (m *Image) Kept(c *Cache) *CachedImage {
	i := m.Cached(c)
	i.stream.fill = fillWanted
	i.through = i.stream
	return i
}

// prefetchAtOnce is how many chunks are fetched at a time: a store that answers late is asked for many.
const prefetchAtOnce = 8

// Ahead gives the same image with only what is prefetched, and parts of chunks, kept in c: for readers that read
// anything, each byte about once.
func (m *Image) Ahead(c *Cache) *CachedImage {
	i := m.Cached(c)
	i.through = i.stream
	return i
}

// Prefetch brings a range into the cache. It returns when that is there; what cannot be read is left to
// whoever reads it.
func (m *CachedImage) Prefetch(off, n int64) {
	cs := int64(m.ChunkSize())
	end := min(off+n, m.Size())
	var g errgroup.Group
	g.SetLimit(prefetchAtOnce)
	for at := off - off%cs; at < end; at += cs {
		g.Go(func() error {
			m.PrefetchChunk(context.Background(), at/cs)
			return nil
		})
	}
	g.Wait()
}

// PrefetchChunk brings a chunk, by its number, into the cache.
func (m *CachedImage) PrefetchChunk(ctx context.Context, i int64) {
	cs := int64(m.ChunkSize())
	var b [1]byte
	step := int64(frameLen)
	if cs <= wholeUpTo {
		step = cs // one frame brings the others
	}
	for at := i * cs; at < min((i+1)*cs, m.Size()); at += step {
		m.ahead.ReadContext(ctx, b[:], at)
	}
}
