package store

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/zeebo/blake3"
)

// Draft is a restore point in the making. Nothing of it shows until Commit;
// what it stored before a failure is found again by the next run.
type Draft struct {
	repo   *Repo
	stored atomic.Int64 // bytes of records written
	end    func()       // gives up the lease
}

// NewDraft begins a point. It first makes sure that the index agrees with the
// packs and manifests that are really there, once per open repository.
func (r *Repo) NewDraft(ctx context.Context) (*Draft, error) {
	if err := r.prepareWrite(ctx); err != nil {
		return nil, err
	}
	next, err := r.index.NextPack(ctx)
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	// Before anything is looked up.
	_, end, err := r.lease(ctx, Lease{Kind: LeaseWriter, FirstPack: next})
	if err != nil {
		return nil, err
	}
	leave := r.packer.enter()
	return &Draft{repo: r, end: sync.OnceFunc(func() { leave(); end() })}, nil
}

// ChunkWriter is one worker's way into a Draft: it holds the scratch memory of
// hashing, compressing and encrypting, about twice the chunk size. Not safe for concurrent
// use; make one for each worker and Close it.
type ChunkWriter struct {
	draft *Draft
	hash  *blake3.Hasher
	enc   *zstd.Encoder
	buf   []byte // record being built
	plain []byte // chunk being decoded; see Decode

	// of one Write call
	need   []int // chunks of data that may be new
	needID []ID
	locs   []Loc
	mine   []bool
}

// Writer gives a worker its ChunkWriter.
func (d *Draft) Writer() (*ChunkWriter, error) {
	h, err := blake3.NewKeyed(d.repo.keys.chunkID[:])
	if err != nil {
		return nil, err
	}
	enc, err := newEncoder()
	if err != nil {
		return nil, err
	}
	cs := d.repo.cfg.ChunkSize
	return &ChunkWriter{draft: d, hash: h, enc: enc, buf: make([]byte, recordLen, recordLen+cs+cs/8+1024)}, nil
}

// newEncoder: level "fastest" costs a third less CPU than the default for 4 % more space.
func newEncoder() (*zstd.Encoder, error) {
	return zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1),
		zstd.WithEncoderCRC(false), zstd.WithSingleSegment(true))
}

// Close releases the scratch memory.
func (w *ChunkWriter) Close() { w.enc.Close() }

// Written says what a Write did, in bytes.
type Written struct {
	Data int64 // in chunks that are not holes
	New  int64 // in chunks that the repository did not hold
}

// Write stores consecutive chunks. data is a whole number of chunks, the last of
// the disk padded with zeros; parents are the ids that the parent point has in their place
// (zero where unknown). The ids of the chunks come back in ids, zero for holes.
func (w *ChunkWriter) Write(ctx context.Context, data []byte, parents, ids []ID) (Written, error) {
	cs := w.draft.repo.cfg.ChunkSize
	var sum Written
	w.need, w.needID = w.need[:0], w.needID[:0]
	for i := 0; i*cs < len(data); i++ {
		chunk := data[i*cs : (i+1)*cs]
		if isZero(chunk) {
			ids[i] = ID{}
			continue
		}
		w.hash.Reset()
		w.hash.Write(chunk)
		w.hash.Sum(ids[i][:0])
		sum.Data += int64(cs)
		if ids[i] != parents[i] {
			w.need = append(w.need, i)
			w.needID = append(w.needID, ids[i])
		}
	}
	if len(w.need) == 0 {
		return sum, nil
	}
	missing, placed, err := w.draft.missing(ctx, w.needID, &w.locs, &w.mine)
	if err != nil {
		return sum, err
	}
	defer placed()
	for j, i := range w.need {
		if !missing[j] {
			continue
		}
		n, err := w.store(ctx, ids[i], KindChunk, data[i*cs:(i+1)*cs])
		if err != nil {
			return sum, err
		}
		w.draft.stored.Add(int64(n))
		sum.New += int64(cs)
	}
	return sum, nil
}

// missing reports which of ids the caller has to store: those that the index
// does not have and nobody is writing. placed is as with claim.
func (d *Draft) missing(ctx context.Context, ids []ID, locs *[]Loc, mine *[]bool) (m []bool, placed func(), err error) {
	if cap(*locs) < len(ids) {
		*locs, *mine = make([]Loc, len(ids)), make([]bool, len(ids))
	}
	l := (*locs)[:len(ids)]
	m = (*mine)[:len(ids)]
	if err := d.repo.index.Lookup(ctx, ids, l); err != nil {
		return nil, nil, fmt.Errorf("store: %w", err)
	}
	unknown := ids[:0]
	for i, id := range ids {
		if !l[i].Reusable() {
			unknown = append(unknown, id)
		}
	}
	// claim the unknown ones; the answers are spread to their places from the back.
	placed = d.repo.packer.claim(unknown, m[:len(unknown)])
	k := len(unknown)
	for i := len(l) - 1; i >= 0; i-- {
		if l[i].Reusable() {
			m[i] = false
			continue
		}
		k--
		m[i] = m[k]
	}
	return m, placed, nil
}

// store compresses, encrypts and writes one claimed record and gives its size.
func (w *ChunkWriter) store(ctx context.Context, id ID, kind uint8, plain []byte) (int, error) {
	h := recordHeader{id: id, plain: uint32(len(plain)), kind: kind}
	buf := w.buf[:recordLen]
	if kind == KindChunk { // pages are ids: they do not compress
		buf, h.codec = appendFrames(w.enc, buf, plain), codecZstd
	}
	if kind == KindPage || len(buf)-recordLen >= len(plain) {
		buf, h.codec = append(buf[:recordLen], plain...), codecRaw
	}
	return w.put(ctx, h, buf)
}

// copy writes a record of another pack again: its header and its body decrypted.
func (w *ChunkWriter) copy(ctx context.Context, h recordHeader, body []byte) (int, error) {
	return w.put(ctx, h, append(w.buf[:recordLen], body...))
}

// put encrypts and writes the record in buf, which begins with room for its header;
// of h, length and slot are filled in. buf becomes w's.
func (w *ChunkWriter) put(ctx context.Context, h recordHeader, buf []byte) (int, error) {
	p := w.draft.repo.packer
	stored := len(buf) - recordLen + p.repo.overhead()
	pack, off, slot, err := p.place(ctx, stored, PackRecord{ID: h.id, Plain: h.plain, Kind: h.kind})
	if err != nil {
		return 0, err
	}
	h.len, h.slot = uint32(stored), slot
	putRecordHeader(buf, &h)
	if pack.box.aead != nil {
		nonce := counterNonce(slot)
		body := pack.box.aead.Seal(buf[recordLen:recordLen], nonce[:], buf[recordLen:], recordAAD(buf))
		buf = append(buf[:recordLen], body...) // in place unless Seal had to grow
	}
	putRecordCRC(buf)
	w.buf = buf
	return len(buf), p.write(pack, off, buf)
}

// pageStore stores the pages of one MapBuilder and keeps them until they are in the index.
type pageStore struct {
	draft *Draft
	w     *ChunkWriter
	ids   []ID
	pages [][]byte
}

// maxPageBatch bounds the pages kept: 512 of them are 4 MiB.
const maxPageBatch = 512

// Map begins the chunk map of a disk of size bytes out of its parent's (a zero
// Root: none). Close releases a builder that is not finished.
func (d *Draft) Map(ctx context.Context, parent Root, size int64) (*MapBuilder, error) {
	if chunkCount(size, d.repo.cfg.ChunkSize) > span(maxHeight-1)*PageEntries {
		return nil, fmt.Errorf("store: a disk of %d bytes is too large", size)
	}
	w, err := d.Writer()
	if err != nil {
		return nil, err
	}
	s := &pageStore{draft: d, w: w}
	b, err := newMapBuilder(ctx, parent, size, d.repo.cfg.ChunkSize, s.load, s.store)
	if err != nil {
		w.Close()
		return nil, err
	}
	b.done = s.flush
	return b, nil
}

// load finds pages that no index has yet, then all others.
func (s *pageStore) load(ctx context.Context, id ID, level uint8, p *page) error {
	for i := range s.ids {
		if s.ids[i] == id {
			return decodePage(s.pages[i], level, p)
		}
	}
	return s.draft.repo.loadPage(ctx, id, level, p)
}

// store writes a page unless the repository holds it.
func (s *pageStore) store(ctx context.Context, p *page) (ID, error) {
	plain := p.encode(make([]byte, 0, maxPageLen))
	id := s.draft.repo.pageID(plain)
	w := s.w
	missing, placed, err := s.draft.missing(ctx, append(w.needID[:0], id), &w.locs, &w.mine)
	if err != nil {
		return id, err
	}
	defer placed()
	if missing[0] {
		n, err := w.store(ctx, id, KindPage, plain)
		if err != nil {
			return id, err
		}
		s.draft.stored.Add(int64(n))
	}
	s.ids, s.pages = append(s.ids, id), append(s.pages, plain)
	if len(s.ids) >= maxPageBatch {
		return id, s.put(ctx)
	}
	return id, nil
}

// put hands the pages to the index, which is a cache: they are durable in packs.
func (s *pageStore) put(ctx context.Context) error {
	if len(s.ids) == 0 {
		return nil
	}
	err := s.draft.repo.index.PutPages(ctx, s.ids, s.pages)
	s.ids, s.pages = nil, nil
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	return nil
}

func (s *pageStore) flush(ctx context.Context) error {
	s.w.Close()
	return s.put(ctx)
}

// Stored is the bytes of records written for this draft so far.
func (d *Draft) Stored() int64 { return d.stored.Load() }

// Commit makes the point durable: packs, then index, then the manifest, whose
// appearance is the commit. It fills in p.ID, p.Name and the stored bytes; a name that p has
// already, and that is one for its time, stays when it is free. When it returns an
// error the point does not exist, unless removing it failed too or the error says that
// only the index lacks it.
func (d *Draft) Commit(ctx context.Context, p *Point) error {
	r := d.repo
	if err := r.packer.flush(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if _, err := rand.Read(p.ID[:]); err != nil {
		return err
	}
	p.Time = p.Time.UTC().Truncate(time.Second)
	p.Stats.Stored = d.Stored()
	var err error
	if p.Name, err = r.reserveName(ctx, p); err != nil {
		return err
	}
	raw, err := encodePoint(p, r.id, r.keys)
	if err != nil {
		return err
	}
	if err := writeObject(ctx, r.bucket, pointObject(p.ID), raw); err != nil {
		// The object may be there all the same (a lost acknowledgement): a failed
		// commit must not show later.
		rmErr := r.bucket.Remove(context.WithoutCancel(ctx), pointObject(p.ID))
		if rmErr != nil && !errors.Is(rmErr, ErrNotExist) {
			err = errors.Join(err, rmErr)
		}
		return fmt.Errorf("store: commit %s: %w", p.Path(), err)
	}
	s := p.summary()
	if err := r.putSummary(ctx, &s); err != nil {
		return fmt.Errorf("store: %s is committed, but the index does not show it yet: %w", p.Path(), err)
	}
	return nil
}

// Close ends the draft. Chunks that it stored stay for the next run to find, until
// a gc that comes first.
func (d *Draft) Close() error {
	defer d.end()
	err := d.repo.packer.flush()
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	return err
}

// reserveName gives the point a name that its VM does not have yet.
func (r *Repo) reserveName(ctx context.Context, p *Point) (string, error) {
	base := PointName(p.Time)
	taken := map[string]bool{}
	list, err := r.PointsOf(ctx, p.VM.Name)
	if err != nil {
		return "", err
	}
	for _, s := range list {
		taken[s.Name] = true
	}
	// Who takes a name with a number reserves it as well, however it came to it.
	free := func(name string) (bool, error) {
		if taken[name] {
			return false, nil
		}
		n, err := r.index.Reserve(ctx, p.VM.Name+"/"+name)
		if err != nil {
			return false, fmt.Errorf("store: %w", err)
		}
		return n == 0, nil
	}
	if suffix, ok := strings.CutPrefix(p.Name, base+"-"); ok && strings.Trim(suffix, "0123456789") == "" {
		if ok, err := free(p.Name); ok || err != nil {
			return p.Name, err
		}
	}
	for {
		n, err := r.index.Reserve(ctx, p.VM.Name+"/"+base)
		if err != nil {
			return "", fmt.Errorf("store: %w", err)
		}
		if n == 0 && !taken[base] {
			return base, nil
		}
		if n == 0 {
			continue
		}
		name := fmt.Sprintf("%s-%d", base, n+1)
		if ok, err := free(name); ok || err != nil {
			return name, err
		}
	}
}
