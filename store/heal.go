package store

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// Wanted is a chunk or page that is known to be damaged, and where points need it.
type Wanted struct {
	ID     ID
	Page   bool // of a chunk map
	Places []WantedPlace
}

// WantedPlace is one of those places.
type WantedPlace struct {
	Point PointID
	Disk  string // or config/NAME
	Off   int64  // of the chunk, or where the range of the page begins; bytes
}

// Wanted lists what is known to be damaged, is needed by a point, and is not healed yet:
// pages first, since what is below them is not known.
func (r *Repo) Wanted(ctx context.Context) ([]Wanted, error) {
	s, _, err := r.loadVerifyState(ctx)
	if err != nil || len(s.Touched) == 0 {
		return nil, err
	}
	open, _, err := r.unhealed(ctx, s)
	if err != nil {
		return nil, err
	}
	var list []Wanted
	at := map[ID]int{}
	for i := range s.Damage {
		d := &s.Damage[i]
		if _, ok := at[d.ID]; !ok && open[d.ID] {
			at[d.ID] = len(list)
			list = append(list, Wanted{ID: d.ID, Page: d.Kind == KindPage})
		}
	}
	for _, t := range s.Touched {
		for _, p := range t.Places {
			if i, ok := at[p.ID]; ok {
				list[i].Places = append(list[i].Places, WantedPlace{t.Point, t.Disk, p.Off})
			}
		}
	}
	list = slices.DeleteFunc(list, func(w Wanted) bool { return len(w.Places) == 0 })
	slices.SortStableFunc(list, func(a, b Wanted) int {
		switch {
		case a.Page == b.Page:
			return 0
		case a.Page:
			return -1
		}
		return 1
	})
	return list, nil
}

// Content gives the plaintext of a chunk or page by its id, proved by it.
func (r *Repo) Content(ctx context.Context, id ID, page bool) ([]byte, error) {
	if page {
		return r.readPage(ctx, id)
	}
	var loc [1]Loc
	if err := r.index.Lookup(ctx, []ID{id}, loc[:]); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	dst := make([]byte, r.cfg.ChunkSize)
	err := r.retried(ctx, id, loc[0], func(loc Loc) error { return r.readWhole(ctx, id, loc, dst, true) })
	return dst, err
}

// RestoreManifest puts back the manifest of a point, if the one that is there is damaged and the
// one of other, a copy of this repository byte for byte, is whole. It reports whether it did.
func (r *Repo) RestoreManifest(ctx context.Context, other *Repo, id PointID) (bool, error) {
	if _, err := r.readPoint(ctx, id); !errors.Is(err, ErrDamaged) {
		return false, err // it is whole, or the point is forgotten
	}
	raw, err := other.readManifest(ctx, id)
	if errors.Is(err, ErrDamaged) || errors.Is(err, ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	p, err := decodePoint(raw, id, r.id, r.keys)
	if err != nil {
		return false, nil // of another repository, or damaged too
	}
	if err := writeObject(ctx, r.bucket, pointObject(id), raw); err != nil {
		return false, fmt.Errorf("store: manifest %s: %w", id, err)
	}
	s := p.summary()
	if err := r.putSummary(ctx, &s); err != nil {
		return false, fmt.Errorf("store: %s is restored, but the index does not show it yet: %w", p.Path(), err)
	}
	return true, nil
}

// Healer stores again what is damaged, out of bytes from anywhere: they are compared with the id
// first. Not safe for concurrent use. Close ends it; only then all is durable.
type Healer struct {
	Chunks, Pages int // stored so far

	draft *Draft
	w     *ChunkWriter
}

// Healer begins to heal. It holds the lease of a writer, as a backup does.
func (r *Repo) Healer(ctx context.Context) (*Healer, error) {
	d, err := r.NewDraft(ctx)
	if err != nil {
		return nil, err
	}
	w, err := d.Writer()
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return &Healer{draft: d, w: w}, nil
}

// Close makes all that was stored durable.
func (h *Healer) Close() error {
	h.w.Close()
	return h.draft.Close()
}

// Chunk stores data, one whole chunk, if it is what id stands for, and reports whether it is.
func (h *Healer) Chunk(ctx context.Context, id ID, data []byte) (bool, error) {
	if h.draft.repo.hashOf(KindChunk, data) != id {
		return false, nil
	}
	_, err := h.chunk(ctx, data)
	return err == nil, err
}

// chunk stores a chunk unless it is there.
func (h *Healer) chunk(ctx context.Context, data []byte) (ID, error) {
	var id [1]ID
	wrote, err := h.w.Write(ctx, data, make([]ID, 1), id[:])
	if wrote.New > 0 {
		h.Chunks++
	}
	return id[0], err
}

// Page stores the encoded page plain if it is what id stands for, and reports whether it is.
func (h *Healer) Page(ctx context.Context, id ID, plain []byte) (bool, error) {
	if h.draft.repo.hashPage(plain) != id {
		return false, nil
	}
	return true, h.page(ctx, id, plain)
}

func (h *Healer) page(ctx context.Context, id ID, plain []byte) error {
	missing, placed, err := h.draft.missing(ctx, append(h.w.needID[:0], id), &h.w.locs, &h.w.mine)
	if err != nil {
		return err
	}
	defer placed()
	if !missing[0] {
		return nil
	}
	_, err = h.w.store(ctx, id, KindPage, plain)
	h.Pages++
	return err
}

// Indexed stores a page of which the index has kept a copy, and reports whether it had.
func (h *Healer) Indexed(ctx context.Context, id ID) (bool, error) {
	b, err := h.draft.repo.indexedPage(ctx, id)
	if b == nil || err != nil {
		return false, err
	}
	return true, h.page(ctx, id, b)
}

// Rebuild makes the page id, of img, anew out of src, a disk that may hold the same bytes in the
// range that begins at off, and stores it with all below it. It reports whether it came out right. Chunks
// are stored only when it did.
func (h *Healer) Rebuild(ctx context.Context, img *Image, id ID, off int64, src *Image) (bool, error) {
	first := off / int64(img.ChunkSize())
	level, ok, err := img.levelOf(ctx, id, first)
	if err != nil || !ok || src.Size() != img.Size() {
		return false, err
	}
	b := rebuild{h: h, src: src.Checked(), buf: make([]byte, img.ChunkSize()), chunks: img.chunks}
	if got, err := b.page(ctx, level, first); err != nil || got != id {
		return false, err
	}
	b.store = true
	_, err = b.page(ctx, level, first)
	return err == nil, err
}

// levelOf gives the level of a page on the way to chunk first.
func (m *Image) levelOf(ctx context.Context, id ID, first int64) (level uint8, ok bool, err error) {
	at := m.root.Page
	for level = m.top; !at.IsZero(); level-- {
		if at == id {
			return level, true, nil
		}
		if level == 0 {
			break
		}
		l, err := m.page(ctx, at, level)
		if errors.Is(err, ErrDamaged) {
			return 0, false, nil // one above it is to be healed first
		}
		if err != nil {
			return 0, false, err
		}
		at = l.ids[(first/span(level))%PageEntries]
	}
	return 0, false, nil
}

// rebuild computes pages of one repository out of a disk of another.
type rebuild struct {
	h      *Healer
	src    *Image
	buf    []byte // one chunk
	chunks int64  // of the disk
	store  bool   // and not only compute ids
	// run is the first range, at or past the offset asked, where the source has something.
	asked int64
	run   extent.Extent
}

// page gives the id of the page of that level whose first chunk is first, zero for a hole. It
// keeps 256 ids for each level.
func (b *rebuild) page(ctx context.Context, level uint8, first int64) (ID, error) {
	p := page{level: level}
	for k := range p.ids {
		at := first + int64(k)*span(level)
		if at >= b.chunks {
			break
		}
		hole, err := b.hole(at, span(level))
		if err != nil {
			return ID{}, err
		}
		switch {
		case hole:
		case level > 0:
			p.ids[k], err = b.page(ctx, level-1, at)
		default:
			p.ids[k], err = b.chunk(ctx, at)
		}
		if err != nil {
			return ID{}, err
		}
	}
	if p.empty() {
		return ID{}, nil
	}
	plain := p.encode(nil)
	id := b.h.draft.repo.hashPage(plain)
	if b.store {
		return id, b.h.page(ctx, id, plain)
	}
	return id, nil
}

// hole reports whether the source has nothing in a range of n chunks from chunk at on.
func (b *rebuild) hole(at, n int64) (bool, error) {
	cs := int64(len(b.buf))
	if off := at * cs; off < b.asked || off >= b.run.Off+b.run.Len {
		b.asked, b.run = off, extent.Extent{Off: b.chunks * cs, Len: cs}
		for e, err := range b.src.AllocatedFrom(off, 0) {
			if err != nil {
				return false, err
			}
			b.run = e
			break
		}
	}
	return b.run.Off >= (at+n)*cs, nil
}

func (b *rebuild) chunk(ctx context.Context, at int64) (ID, error) {
	off := at * int64(len(b.buf))
	n := min(int64(len(b.buf)), b.src.Size()-off)
	clear(b.buf[n:])
	if _, err := b.src.ReadContext(ctx, b.buf[:n], off); err != nil {
		return ID{}, err
	}
	if isZero(b.buf) {
		return ID{}, nil
	}
	if !b.store {
		return b.h.draft.repo.hashOf(KindChunk, b.buf), nil
	}
	return b.h.chunk(ctx, b.buf)
}
