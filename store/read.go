package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"sync"

	"github.com/klauspost/compress/zstd"
	"github.com/zeebo/blake3"

	"github.com/holdfast-backup/holdfast/store/bucket"
)

// maxOpenPacks bounds the packs kept open for reading: one file descriptor each.
const maxOpenPacks = 256

// packCache keeps packs open between reads.
type packCache struct {
	open func(ctx context.Context, number uint32) (*readPack, error)

	mu    sync.Mutex           // guards following
	packs map[uint32]*readPack // number => open pack
	clock uint64
}

// readPack is a pack open for reading.
type readPack struct {
	obj  bucket.Object
	id   PackID
	box  box
	refs int // readers; under packCache.mu, as is used
	used uint64
	gone bool // evicted: the last reader closes it
}

func (c *packCache) get(ctx context.Context, number uint32) (*readPack, error) {
	c.mu.Lock()
	if p := c.packs[number]; p != nil {
		p.refs++
		c.clock++
		p.used = c.clock
		c.mu.Unlock()
		return p, nil
	}
	c.mu.Unlock()
	p, err := c.open(ctx, number)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if other := c.packs[number]; other != nil { // somebody was quicker
		p.obj.Close()
		p = other
	} else {
		if c.packs == nil {
			c.packs = map[uint32]*readPack{}
		}
		if len(c.packs) >= maxOpenPacks {
			c.evict()
		}
		c.packs[number] = p
	}
	p.refs++
	c.clock++
	p.used = c.clock
	return p, nil
}

// evict drops the least recently used pack. Callers hold c.mu.
func (c *packCache) evict() {
	var oldest uint32
	var used uint64 = math.MaxUint64
	for n, p := range c.packs {
		if p.used < used {
			oldest, used = n, p.used
		}
	}
	c.drop(oldest)
}

// drop takes a pack out of the cache. Callers hold c.mu.
func (c *packCache) drop(number uint32) {
	p := c.packs[number]
	delete(c.packs, number)
	p.gone = true
	if p.refs == 0 {
		p.obj.Close()
	}
}

// forget makes the next read of a pack open it anew.
func (c *packCache) forget(number uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.packs[number] != nil {
		c.drop(number)
	}
}

// prune closes the packs that are gone, so that the medium can give back their room.
func (c *packCache) prune(gone func(number uint32) bool) {
	c.mu.Lock()
	numbers := slices.Collect(maps.Keys(c.packs))
	c.mu.Unlock()
	for _, n := range numbers {
		if gone(n) {
			c.forget(n)
		}
	}
}

func (c *packCache) put(p *readPack) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p.refs--; p.refs == 0 && p.gone {
		p.obj.Close()
	}
}

func (c *packCache) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.packs) > 0 {
		c.evict()
	}
}

func (r *Repo) openPack(ctx context.Context, number uint32) (*readPack, error) {
	info, err := r.index.Pack(ctx, number)
	if errors.Is(err, ErrNotExist) { // collected; what was in it is elsewhere now
		return nil, &DamageError{What: fmt.Sprintf("pack number %d", number), Err: errors.New("gone")}
	}
	if err != nil {
		return nil, err
	}
	o, err := r.bucket.Open(ctx, packName(info.ID))
	if errors.Is(err, bucket.ErrNotExist) {
		return nil, &DamageError{What: "pack " + info.ID.String(), Err: errors.New("missing")}
	}
	if err != nil {
		return nil, fmt.Errorf("store: pack %s: %w", info.ID, err)
	}
	return &readPack{obj: o, id: info.ID, box: r.keys.box(ctxPack, info.ID[:])}, nil
}

// scratch is the memory of reading one record.
type scratch struct {
	buf   []byte // the record
	plain []byte // a frame of which only a part is wanted
}

var scratchPool = sync.Pool{New: func() any { return new(scratch) }}

func (s *scratch) grow(n int) []byte {
	if cap(s.buf) < n {
		s.buf = make([]byte, n+n/4)
	}
	return s.buf[:n]
}

// decoder decodes whole frames, on as many goroutines as call it at once.
var decoder = sync.OnceValue(func() *zstd.Decoder {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderMaxMemory(MaxChunkSize+1<<20),
		zstd.WithDecoderLowmem(false))
	if err != nil {
		panic(err) // options are constants
	}
	return d
})

// readRecord reads, checks and decodes the record of id at loc into dst, which
// must be as long as the plaintext is allowed to be, and gives the plaintext. The
// authentication tag proves the bytes (in a repository without encryption, the
// CRC-32C does against accidents). With deep the content hash is compared as well.
func (r *Repo) readRecord(ctx context.Context, id ID, kind uint8, loc Loc, dst []byte, deep bool) (plain []byte, err error) {
	err = r.withRecord(ctx, id, kind, loc, func(rec []byte, b box, _ *scratch) (err error) {
		plain, err = r.openRecord(rec, id, kind, b, dst, deep)
		return err
	})
	return plain, err
}

// readPart is readRecord for bytes [from, from+len(dst)) of a chunk. All of the
// stored record is proved, and as little of it decoded as it can be.
func (r *Repo) readPart(ctx context.Context, id ID, loc Loc, from int, dst []byte) error {
	return r.withRecord(ctx, id, KindChunk, loc, func(rec []byte, b box, s *scratch) error {
		h, body, err := proveRecord(rec, id, KindChunk, b)
		switch {
		case err != nil:
			return err
		case int(h.plain) != r.cfg.ChunkSize || from+len(dst) > int(h.plain):
			return errors.New("record length")
		case h.codec == codecZstd:
			return decodeFrames(body, from, dst, s)
		case len(body) != int(h.plain):
			return errors.New("record length")
		}
		copy(dst, body[from:])
		return nil
	})
}

// withRecord reads a record into scratch memory and has it opened; an error of
// open is damage.
func (r *Repo) withRecord(ctx context.Context, id ID, kind uint8, loc Loc, open func(rec []byte, b box, s *scratch) error) error {
	if !loc.Known() {
		return &DamageError{What: recordWhat(id, kind), Err: errors.New("not in the repository")}
	}
	pack, err := r.packs.get(ctx, loc.Pack)
	if err != nil {
		return err
	}
	defer r.packs.put(pack)
	s := scratchPool.Get().(*scratch)
	defer scratchPool.Put(s)
	rec := s.grow(recordLen + int(loc.Len))
	if n, err := pack.obj.ReadAt(rec, int64(loc.Off)); n < len(rec) {
		if err == nil || err == io.EOF {
			err = &DamageError{What: recordWhat(id, kind) + " in pack " + pack.id.String(), Err: errors.New("pack is cut short")}
		}
		return fmt.Errorf("store: read pack %s: %w", pack.id, err)
	}
	if err := open(rec, pack.box, s); err != nil {
		return &DamageError{What: recordWhat(id, kind) + " in pack " + pack.id.String(), Err: err}
	}
	return nil
}

func recordWhat(id ID, kind uint8) string {
	if kind == KindPage {
		return "page " + id.String()[:16]
	}
	return "chunk " + id.String()[:16]
}

// proveRecord checks a record in memory, decrypting it in place, and gives its
// body, still compressed.
func proveRecord(rec []byte, id ID, kind uint8, b box) (h recordHeader, body []byte, err error) {
	h, ok := parseRecordHeader(rec)
	if !ok || int(h.len) != len(rec)-recordLen || h.id != id || h.kind != kind {
		return h, nil, errors.New("record header")
	}
	body = rec[recordLen:]
	if b.aead != nil {
		nonce := counterNonce(h.slot)
		if body, err = b.aead.Open(body[:0], nonce[:], body, recordAAD(rec)); err != nil {
			return h, nil, errors.New("authentication")
		}
	} else if crcOf(rec) != h.crc {
		return h, nil, errors.New("checksum")
	}
	return h, body, nil
}

// openRecord checks and decodes a record in memory, decrypting it in place.
func (r *Repo) openRecord(rec []byte, id ID, kind uint8, b box, dst []byte, deep bool) ([]byte, error) {
	h, body, err := proveRecord(rec, id, kind, b)
	if err != nil {
		return nil, err
	}
	return r.decodeBody(h, body, dst, deep)
}

// decodeBody decodes what proveRecord gave, into dst; deep compares the content with its id.
func (r *Repo) decodeBody(h recordHeader, body, dst []byte, deep bool) ([]byte, error) {
	if int(h.plain) > len(dst) {
		return nil, errors.New("record length")
	}
	plain := dst[:h.plain]
	switch {
	case h.codec == codecZstd:
		if err := decodeInto(plain, body); err != nil {
			return nil, err
		}
	case len(body) != len(plain):
		return nil, errors.New("record length")
	default:
		copy(plain, body)
	}
	if deep && r.hashOf(h.kind, plain) != h.id {
		return nil, errors.New("content hash")
	}
	return plain, nil
}

// hashOf is the id that content of that kind has.
func (r *Repo) hashOf(kind uint8, plain []byte) (id ID) {
	if kind == KindPage {
		return r.hashPage(plain)
	}
	h, err := blake3.NewKeyed(r.keys.chunkID[:])
	if err != nil {
		panic(err) // key length is a constant
	}
	h.Write(plain)
	h.Sum(id[:0])
	return id
}

// loadPage decodes a page: from the index, or from its pack when the index does
// not hold it or holds it damaged.
func (r *Repo) loadPage(ctx context.Context, id ID, level uint8, p *page) error {
	b, err := r.index.Page(ctx, id)
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	if b == nil || r.hashPage(b) != id {
		if b, err = r.readPage(ctx, id); err != nil {
			return err
		}
		// The index is a cache here: failing to fill it is no error.
		_ = r.index.PutPages(ctx, []ID{id}, [][]byte{b})
	}
	if err := decodePage(b, level, p); err != nil {
		return &DamageError{What: recordWhat(id, KindPage), Err: err}
	}
	return nil
}

// readPage reads the encoded page from its pack.
func (r *Repo) readPage(ctx context.Context, id ID) ([]byte, error) {
	var loc [1]Loc
	if err := r.index.Lookup(ctx, []ID{id}, loc[:]); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	b := make([]byte, maxPageLen)
	var plain []byte
	err := r.retried(ctx, id, loc[0], func(loc Loc) (err error) {
		plain, err = r.readRecord(ctx, id, KindPage, loc, b, true)
		return err
	})
	return plain, err
}
