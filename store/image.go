package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"

	"github.com/zeebo/blake3"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// Image is the content of one disk (or configuration file) of a point: random
// access to bytes that never change. Safe for concurrent use. A read that meets
// damage returns what lies before it and a DamageError, never zeros in its place.
type Image struct {
	repo   *Repo
	root   Root
	top    uint8
	chunks int64
	// point and disk name the image in errors.
	point, disk string
	checked     bool // see Checked
	// cache is where decoded frames are kept: the repository's, or one of the reader's own.
	cache *chunkCache
	fill  fill
}

// fill says what goes through an image's cache.
type fill uint8

const (
	fillParts  fill = iota // what is wanted in part; what is wanted whole is decoded where it is wanted
	fillPeek               // so, too, but what is in the cache is taken from there
	fillWanted             // frames that are wanted, in part or whole
	fillAll                // and the rest of small chunks
)

var _ io.ReaderAt = (*Image)(nil)

// OpenDisk gives the content of a disk of a point by the disk's name; ErrNotExist
// when the point has no such disk.
func (r *Repo) OpenDisk(p *Point, disk string) (*Image, error) {
	for i := range p.Disks {
		if d := &p.Disks[i]; d.Name == disk {
			return r.openMap(d.Map(), p.Path(), disk)
		}
	}
	return nil, fmt.Errorf("%s has no disk %q: %w", p.Path(), disk, ErrNotExist)
}

// OpenConfig gives the content of a configuration file of a point.
func (r *Repo) OpenConfig(p *Point, name string) (*Image, error) {
	for i := range p.Config {
		if c := &p.Config[i]; c.Name == name {
			return r.openMap(c.Map(), p.Path(), "config/"+name)
		}
	}
	return nil, fmt.Errorf("%s has no configuration file %q: %w", p.Path(), name, ErrNotExist)
}

// OpenMap gives the content of a chunk map that belongs to no point yet.
func (r *Repo) OpenMap(root Root) (*Image, error) { return r.openMap(root, "", "") }

func (r *Repo) openMap(root Root, point, disk string) (*Image, error) {
	n := chunkCount(root.Size, r.cfg.ChunkSize)
	h := height(n)
	if h > maxHeight || root.Size < 0 {
		return nil, &DamageError{Point: point, What: "size of " + disk}
	}
	return &Image{repo: r, root: root, top: uint8(h - 1), chunks: n, point: point, disk: disk, cache: r.chunks}, nil
}

// Size is the size of the disk in bytes.
func (m *Image) Size() int64 { return m.root.Size }

// ChunkSize is the unit in which the image is stored, bytes.
func (m *Image) ChunkSize() int { return m.repo.cfg.ChunkSize }

// Checked is the same image, of which every chunk that is read is also compared with
// its id: the proof that does not rest on the writer of the pack. Where a read wants a part of a
// chunk it costs all of it.
func (m *Image) Checked() *Image {
	c := *m
	c.checked = true
	return &c
}

// located fills the place of a damage into err.
func (m *Image) located(err error, off int64) error {
	var d *DamageError
	if errors.As(err, &d) && d.Disk == "" {
		named := *d
		named.Point, named.Disk, named.Off = m.point, m.disk, off
		return &named
	}
	return err
}

// page gives a decoded page through the cache.
func (m *Image) page(ctx context.Context, id ID, level uint8) (*leaf, error) {
	if l := m.repo.leaves.get(id); l != nil && l.level == level {
		return l, nil
	}
	l := new(leaf)
	if err := m.repo.loadPage(ctx, id, level, &l.page); err != nil {
		return nil, err
	}
	m.repo.leaves.put(id, l)
	return l, nil
}

// leafOf gives the level-0 page with chunk i; nil when that range is a hole.
func (m *Image) leafOf(ctx context.Context, i int64) (*leaf, error) {
	id := m.root.Page
	for level := m.top; ; level-- {
		if id.IsZero() {
			return nil, nil
		}
		l, err := m.page(ctx, id, level)
		if err != nil || level == 0 {
			return l, err
		}
		id = l.ids[(i/span(level))%PageEntries]
	}
}

// resolveWhole is how many chunks a read must want of a leaf before all of the
// leaf is looked up at once: single look-ups keep a cold random read short, one batch
// keeps a long read from asking again.
const resolveWhole = 4

// locate sets locs to the places of the entries of a leaf from entry first on.
func (m *Image) locate(ctx context.Context, l *leaf, first int, locs []Loc) error {
	ids := l.ids[first : first+len(locs)]
	l.mu.Lock()
	known := l.locs != nil
	if known {
		copy(locs, l.locs[first:])
		for i := range ids {
			known = known && (l.resolved || locs[i].Known() || ids[i].IsZero())
		}
	}
	l.mu.Unlock()
	if known {
		return nil
	}
	if len(locs) < resolveWhole {
		if err := m.repo.index.Lookup(ctx, ids, locs); err != nil {
			return fmt.Errorf("store: %w", err)
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.locs == nil {
			l.locs = make([]Loc, PageEntries)
		}
		copy(l.locs[first:], locs)
		return nil
	}
	all := make([]Loc, PageEntries)
	if err := m.repo.index.Lookup(ctx, l.ids[:], all); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	copy(locs, all[first:])
	l.mu.Lock()
	defer l.mu.Unlock()
	l.locs, l.resolved = all, true
	return nil
}

// ReadAt reads as io.ReaderAt demands: io.EOF at the end of the disk.
func (m *Image) ReadAt(p []byte, off int64) (int, error) {
	return m.ReadContext(context.Background(), p, off)
}

// ReadContext is ReadAt with a context.
func (m *Image) ReadContext(ctx context.Context, p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, fmt.Errorf("store: read at negative offset %d", off)
	}
	if off >= m.root.Size {
		if len(p) == 0 {
			return 0, nil
		}
		return 0, io.EOF
	}
	short := int64(len(p)) > m.root.Size-off
	if short {
		p = p[:m.root.Size-off]
	}
	cs := int64(m.repo.cfg.ChunkSize)
	var places [PageEntries]Loc
	for n < len(p) {
		i := (off + int64(n)) / cs
		l, err := m.leafOf(ctx, i)
		if err != nil {
			return n, m.located(err, off+int64(n))
		}
		first := int(i % PageEntries)
		last := min(PageEntries-1, first+int((off+int64(len(p))-1)/cs-i))
		end := min(int64(len(p)), (i+int64(last-first)+1)*cs-off) // bytes of p up to there
		if l == nil {
			clear(p[n:end])
			n = int(end)
			continue
		}
		locs := places[:last+1-first]
		if err := m.locate(ctx, l, first, locs); err != nil {
			return n, err
		}
		for k := first; k <= last; k++ {
			at := off + int64(n)
			from := at % cs
			piece := p[n:min(end, int64(n)+cs-from)]
			if err := m.readChunk(ctx, l.ids[k], locs[k-first], piece, from); err != nil {
				return n, m.located(err, at)
			}
			n += len(piece)
		}
	}
	if short {
		return n, io.EOF
	}
	return n, nil
}

// readChunk copies the bytes of a chunk from offset from on into p. Frames that
// are wanted whole are decoded where they are wanted; parts of frames go through the cache.
func (m *Image) readChunk(ctx context.Context, id ID, loc Loc, p []byte, from int64) error {
	r := m.repo
	if id.IsZero() {
		clear(p)
		return nil
	}
	if len(p) == r.cfg.ChunkSize && m.fill < fillWanted {
		if !m.checked && m.cached(id, 0, p) {
			return nil
		}
		return r.retried(ctx, id, loc, func(loc Loc) error { return r.readWhole(ctx, id, loc, p, m.checked) })
	}
	if m.checked {
		whole := make([]byte, r.cfg.ChunkSize)
		err := r.retried(ctx, id, loc, func(loc Loc) error { return r.readWhole(ctx, id, loc, whole, true) })
		copy(p, whole[from:])
		return err
	}
	for len(p) > 0 {
		if whole := int64(len(p)) &^ (frameLen - 1); from%frameLen == 0 && whole > 0 && m.fill < fillWanted {
			piece := p[:whole]
			if m.cached(id, from, piece) {
				p, from = p[whole:], from+whole
				continue
			}
			if err := r.retried(ctx, id, loc, func(loc Loc) error { return r.readPart(ctx, id, loc, int(from), piece) }); err != nil {
				return err
			}
			p, from = p[whole:], from+whole
			continue
		}
		n := from / frameLen
		e, err := m.cache.get(frameKey{id, uint8(n)}, func(dst []byte) error {
			if m.fill == fillAll && r.cfg.ChunkSize <= wholeUpTo {
				return m.fetch(ctx, id, loc, n, dst)
			}
			return r.retried(ctx, id, loc, func(loc Loc) error { return r.readPart(ctx, id, loc, int(n*frameLen), dst) })
		})
		if err != nil {
			return err
		}
		k := copy(p, (*e.data)[from-n*frameLen:])
		m.cache.release(e)
		p, from = p[k:], from+int64(k)
	}
	return nil
}

// cached copies whole frames from offset from on into p if all of them are in the cache, or on their way there, and the image
// is one that looks.
func (m *Image) cached(id ID, from int64, p []byte) bool {
	if m.fill != fillPeek {
		return false
	}
	for at := int64(0); at < int64(len(p)); at += frameLen {
		e := m.cache.peek(frameKey{id, uint8((from + at) / frameLen)})
		if e == nil {
			return false
		}
		copy(p[at:], *e.data)
		m.cache.release(e)
	}
	return true
}

// wholeUpTo is up to which size a chunk is read at once into a reader's own cache, though a part of it is
// wanted: the rest is wanted soon, and another read of the pack costs more than decoding it.
const wholeUpTo = 256 << 10

// fetch reads a chunk, gives frame n of it and puts the others into the cache.
func (m *Image) fetch(ctx context.Context, id ID, loc Loc, n int64, dst []byte) error {
	r := m.repo
	buf := r.wholes.Get().(*[]byte)
	defer r.wholes.Put(buf)
	if err := r.retried(ctx, id, loc, func(loc Loc) error { return r.readWhole(ctx, id, loc, *buf, false) }); err != nil {
		return err
	}
	for k := range int64(len(*buf) / frameLen) {
		if frame := (*buf)[k*frameLen:][:frameLen]; k == n {
			copy(dst, frame)
		} else {
			m.cache.fill(frameKey{id, uint8(k)}, frame)
		}
	}
	return nil
}

// retried reads with loc. When what lies there is not the chunk it asks the index
// once more: the chunk may have moved, or the index may have been made anew.
func (r *Repo) retried(ctx context.Context, id ID, loc Loc, read func(Loc) error) error {
	err := read(loc)
	if !errors.Is(err, ErrDamaged) {
		return err
	}
	var again [1]Loc
	if r.index.Lookup(ctx, []ID{id}, again[:]) != nil || !again[0].Known() {
		return err
	}
	r.packs.forget(again[0].Pack)
	return read(again[0])
}

// readWhole decodes a chunk into dst, exactly one chunk long.
func (r *Repo) readWhole(ctx context.Context, id ID, loc Loc, dst []byte, deep bool) error {
	plain, err := r.readRecord(ctx, id, KindChunk, loc, dst, deep)
	if err != nil {
		return err
	}
	if len(plain) != len(dst) {
		return &DamageError{What: recordWhat(id, KindChunk), Err: errors.New("record length")}
	}
	return nil
}

// Allocated yields ascending ranges, aligned to granularity and clipped to the
// disk, outside of which the disk is all zeros. It reads no chunk, and of the map no pages
// finer than granularity asks for.
func (m *Image) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	return m.AllocatedFrom(0, granularity)
}

// AllocatedFrom is Allocated for the part of the disk from offset off on.
func (m *Image) AllocatedFrom(off, granularity int64) iter.Seq2[extent.Extent, error] {
	cs := int64(m.repo.cfg.ChunkSize)
	level := uint8(0)
	for level < m.top && span(level+1)*cs <= granularity {
		level++
	}
	return extent.Coarsen(func(yield func(extent.Extent, error) bool) {
		if !m.root.Page.IsZero() {
			m.walk(context.Background(), m.root.Page, m.top, 0, off/cs, level, yield)
		}
	}, max(granularity, 1), m.root.Size)
}

// walk yields the entries at level stop that are no holes, below the page id at
// level whose first chunk is first, leaving out all that ends before chunk from.
func (m *Image) walk(ctx context.Context, id ID, level uint8, first, from int64, stop uint8, yield func(extent.Extent, error) bool) bool {
	l, err := m.page(ctx, id, level)
	if err != nil {
		return yield(extent.Extent{}, m.located(err, first*int64(m.repo.cfg.ChunkSize)))
	}
	s := span(level)
	for k := range l.ids {
		at := first + int64(k)*s
		if l.ids[k].IsZero() || at+s <= from {
			continue
		}
		if level > stop {
			if !m.walk(ctx, l.ids[k], level-1, at, from, stop, yield) {
				return false
			}
			continue
		}
		cs := int64(m.repo.cfg.ChunkSize)
		if !yield(extent.Extent{Off: at * cs, Len: s * cs}, nil) {
			return false
		}
	}
	return true
}

// Complete reports whether the index knows a place for every page and chunk of
// the image. It reads the whole map, and no chunk.
func (m *Image) Complete(ctx context.Context) (bool, error) {
	if m.root.Page.IsZero() {
		return true, nil
	}
	ok, err := m.complete(ctx, []ID{m.root.Page}, m.top+1)
	if errors.Is(err, ErrDamaged) {
		return false, nil
	}
	return ok, err
}

// complete checks ids, the entries of a page of that level, and all below them.
func (m *Image) complete(ctx context.Context, ids []ID, level uint8) (bool, error) {
	locs := make([]Loc, len(ids))
	if err := m.repo.index.Lookup(ctx, ids, locs); err != nil {
		return false, fmt.Errorf("store: %w", err)
	}
	for i, id := range ids {
		if id.IsZero() {
			continue
		}
		if !locs[i].Sound() {
			return false, nil
		}
		if level == 0 {
			continue
		}
		l, err := m.page(ctx, id, level-1)
		if err != nil {
			return false, err
		}
		if ok, err := m.complete(ctx, l.ids[:], level-1); err != nil || !ok {
			return false, err
		}
	}
	return true, nil
}

// IDs fills ids with the ids of the chunks from chunk first on; zero for holes
// and past the end.
func (m *Image) IDs(ctx context.Context, first int64, ids []ID) error {
	for n := 0; n < len(ids); {
		i := first + int64(n)
		k := int(i % PageEntries)
		run := ids[n:min(len(ids), n+PageEntries-k)]
		if i >= m.chunks {
			clear(ids[n:])
			return nil
		}
		l, err := m.leafOf(ctx, i)
		if err != nil {
			return m.located(err, i*int64(m.repo.cfg.ChunkSize))
		}
		if l == nil {
			clear(run)
		} else {
			copy(run, l.ids[k:])
		}
		n += len(run)
	}
	return nil
}

// Comparer tells whether bytes from elsewhere are what an image holds, by their
// ids alone: no chunk is read. Not safe for concurrent use.
type Comparer struct {
	img  *Image
	hash *blake3.Hasher
	pad  []byte
	ids  []ID
}

// Comparer makes one.
func (m *Image) Comparer() *Comparer {
	h, err := blake3.NewKeyed(m.repo.keys.chunkID[:])
	if err != nil {
		panic(err) // key length is a constant
	}
	return &Comparer{img: m, hash: h, pad: make([]byte, m.repo.cfg.ChunkSize)}
}

// Same reports whether data is what the image holds from off on. Chunks that data
// does not cover whole, but for the end of the disk, make it false.
func (c *Comparer) Same(ctx context.Context, data []byte, off int64) (bool, error) {
	cs := int64(c.img.repo.cfg.ChunkSize)
	end := off + int64(len(data))
	if off%cs != 0 || (end%cs != 0 && end != c.img.root.Size) {
		return false, nil
	}
	n := int(chunkCount(int64(len(data)), int(cs)))
	if cap(c.ids) < n {
		c.ids = make([]ID, n)
	}
	ids := c.ids[:n]
	if err := c.img.IDs(ctx, off/cs, ids); err != nil {
		return false, err
	}
	for i := range ids {
		chunk := data[int64(i)*cs : min(int64(i+1)*cs, int64(len(data)))]
		if int64(len(chunk)) < cs {
			clear(c.pad[copy(c.pad, chunk):])
			chunk = c.pad
		}
		var id ID
		if !isZero(chunk) {
			c.hash.Reset()
			c.hash.Write(chunk)
			c.hash.Sum(id[:0])
		}
		if id != ids[i] {
			return false, nil
		}
	}
	return true, nil
}

var zeros [MinChunkSize]byte

// isZero reports whether b is all zeros.
func isZero(b []byte) bool {
	for len(b) > len(zeros) {
		if !bytes.Equal(b[:len(zeros)], zeros[:]) {
			return false
		}
		b = b[len(zeros):]
	}
	return bytes.Equal(b, zeros[:len(b)])
}
