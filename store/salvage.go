package store

import (
	"bytes"
	"context"
	"errors"
	"io"
)

// unreadableStep is what is given up at once where a pack cannot be read: a sector. bytes
const unreadableStep = 512

// patchedReader reads a pack around the places that the medium refuses: those are zeros, which
// are no part of any record that proves right. Not safe for concurrent use.
type patchedReader struct {
	ctx  context.Context
	r    io.ReaderAt
	last error // of the medium; nil: everything was read
}

// ReadAt fails only when the context is done.
func (p *patchedReader) ReadAt(b []byte, off int64) (int, error) {
	if err := p.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := p.r.ReadAt(b, off)
	switch {
	case err == nil, errors.Is(err, io.EOF):
		return n, err
	case p.ctx.Err() != nil:
		return 0, p.ctx.Err()
	case len(b) > unreadableStep:
		// By halves, so that a large read with one bad block in it takes few more.
		half := int64(len(b)/2+unreadableStep-1) &^ (unreadableStep - 1)
		if _, err := p.ReadAt(b[:half], off); err != nil {
			return 0, err
		}
		m, err := p.ReadAt(b[half:], off+half)
		return int(half) + m, err
	}
	// Once more: what a medium or a network refuses once it may give the next time.
	if n, err = p.r.ReadAt(b, off); err == nil || errors.Is(err, io.EOF) {
		return n, err
	}
	clear(b)
	p.last = err
	return len(b), nil
}

// salvaged is what still proves right of a pack.
type salvaged struct {
	recs []PackRecord // by offset, each of them proved by CRC-32C, tag and content
	ids  map[ID]bool  // of recs
	// table is what the pack says that it holds; with named false it does not say.
	table []PackRecord
	named bool
	// unread is the error of the medium when a part could not be read; nil when all could.
	unread error
}

// sizedReader is what is needed of an object.
type sizedReader interface {
	io.ReaderAt
	Size() int64
}

// has reports whether a record of id proved right. A nil s is a pack that is gone.
func (s *salvaged) has(id ID) bool { return s != nil && s.ids[id] }

// salvage goes through the records of a pack without believing its table.
func (r *Repo) salvage(ctx context.Context, o sizedReader, id PackID) (*salvaged, error) {
	s := &salvaged{ids: map[ID]bool{}}
	b := r.keys.box(ctxPack, id[:])
	dst := make([]byte, max(r.cfg.ChunkSize, maxPageLen))
	p := &patchedReader{ctx: ctx, r: o}
	_, err := scanRecords(p, o.Size(), func(off int64, h recordHeader, raw []byte) error {
		if _, err := r.openRecord(bytes.Clone(raw), h.id, h.kind, b, dst, true); err == nil {
			s.recs = append(s.recs, PackRecord{ID: h.id, Off: uint32(off), Len: h.len, Plain: h.plain, Kind: h.kind})
			s.ids[h.id] = true
		}
		return ctx.Err()
	})
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, err
	}
	s.unread = p.last
	return s, nil
}
