package store

import (
	"context"
	"errors"
	"fmt"

	"github.com/klauspost/compress/zstd"
	"github.com/zeebo/blake3"
)

// ChunkCoder names and compresses chunks for a repository that is elsewhere. Not safe for
// concurrent use; make one for each worker and Close it.
type ChunkCoder struct {
	hash *blake3.Hasher
	enc  *zstd.Encoder
}

// NewChunkCoder makes one for a repository with that chunk id key.
func NewChunkCoder(idKey [32]byte) (*ChunkCoder, error) {
	h, err := blake3.NewKeyed(idKey[:])
	if err != nil {
		return nil, err
	}
	enc, err := newEncoder()
	if err != nil {
		return nil, err
	}
	return &ChunkCoder{h, enc}, nil
}

// ID names a chunk: zero for one that is all zeros, a hole.
func (c *ChunkCoder) ID(chunk []byte) (id ID) {
	if isZero(chunk) {
		return id
	}
	c.hash.Reset()
	c.hash.Write(chunk)
	c.hash.Sum(id[:0])
	return id
}

// Append appends a chunk to dst in the form of a record's body before encryption (see
// doc.go, "Packs").
func (c *ChunkCoder) Append(dst, chunk []byte) (out []byte, codec uint8) {
	out = appendFrames(c.enc, dst, chunk)
	if len(out)-len(dst) >= len(chunk) {
		return append(out[:len(dst)], chunk...), codecRaw
	}
	return out, codecZstd
}

// Close releases the scratch memory.
func (c *ChunkCoder) Close() { c.enc.Close() }

// CodedChunk is a chunk as a ChunkCoder made it, somewhere else.
type CodedChunk struct {
	ID    ID // set by Decode
	Codec uint8
	Body  []byte
}

var errCoded = errors.New("no chunk as this program writes them")

// Decode proves that c is a chunk that this program could have written, and names it: by
// what it decodes to, whatever its sender may call it. It allocates nothing besides the
// memory of one chunk, which w keeps. Frames are taken as they were compressed, but must be
// laid out as ours: readers find their way in them.
func (w *ChunkWriter) Decode(c *CodedChunk) error {
	cs := w.draft.repo.cfg.ChunkSize
	if w.plain == nil {
		w.plain = make([]byte, cs)
	}
	plain := w.plain
	switch c.Codec {
	case codecRaw:
		if len(c.Body) != cs {
			return errCoded
		}
		plain = c.Body
	case codecZstd:
		if len(c.Body) >= cs {
			return errCoded
		}
		rest := c.Body
		for at := 0; at < cs; at += frameLen {
			// The length of the content comes first, so that nothing larger is decoded.
			stored, n, err := nextFrame(rest)
			if err != nil || n != min(frameLen, cs-at) {
				return errCoded
			}
			if err := decodeInto(plain[at:at+n], rest[:stored]); err != nil {
				return errCoded
			}
			rest = rest[stored:]
		}
		if len(rest) != 0 {
			return errCoded
		}
	default:
		return errCoded
	}
	if isZero(plain) {
		return fmt.Errorf("%w: a chunk of zeros is a hole", errCoded)
	}
	w.hash.Reset()
	w.hash.Write(plain)
	w.hash.Sum(c.ID[:0])
	return nil
}

// WriteCoded stores those of the decoded chunks that the repository does not hold. Their
// bodies are w's no longer when it returns.
func (w *ChunkWriter) WriteCoded(ctx context.Context, chunks []CodedChunk) (Written, error) {
	cs := w.draft.repo.cfg.ChunkSize
	sum := Written{Data: int64(len(chunks)) * int64(cs)}
	w.needID = w.needID[:0]
	for i := range chunks {
		w.needID = append(w.needID, chunks[i].ID)
	}
	missing, placed, err := w.draft.missing(ctx, w.needID, &w.locs, &w.mine)
	if err != nil {
		return sum, err
	}
	defer placed()
	for i, c := range chunks {
		if !missing[i] {
			continue
		}
		h := recordHeader{id: c.ID, plain: uint32(cs), kind: KindChunk, codec: c.Codec}
		n, err := w.put(ctx, h, append(w.buf[:recordLen], c.Body...))
		if err != nil {
			return sum, err
		}
		w.draft.stored.Add(int64(n))
		sum.New += int64(cs)
	}
	return sum, nil
}

// Recheck makes the next draft begin like the first one of an open repository: it compares the
// index with the packs that are really there, and a failure to write, such as that of a full
// medium, which ended all drafts at work then, is over when they are. It is for a process that
// runs for long and writes by drafts alone; there must be no GC of this Repo meanwhile.
func (r *Repo) Recheck() {
	r.prepareMu.Lock()
	defer r.prepareMu.Unlock()
	r.prepared = false
	r.packer.recover()
}
