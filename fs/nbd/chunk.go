package nbd

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// Bounds on a structured reply.
const (
	maxPieces     = 4096           // of a read that lie apart at a time, for whatever order they come in
	maxExtras     = 64             // chunks without data in one reply
	maxErrorChunk = maxString + 64 // bytes: proto knows up to 14 besides the message
)

// chunk reads one chunk of the reply to k.
func (l *link) chunk(cookie uint64, k *call) error {
	p, err := l.br.Peek(structuredLen)
	if err != nil {
		return err
	}
	flags, typ, n := be.Uint16(p[4:]), be.Uint16(p[6:]), be.Uint32(p[16:])
	l.br.Discard(structuredLen)
	if err := l.payload(k, typ, n, flags&chunkDone != 0); err != nil {
		return fmt.Errorf("reply to a %s of %d bytes at %d: %w", commandNames[k.cmd], k.n, k.off, err)
	}
	if flags&chunkDone == 0 {
		return nil
	}
	if k.err == nil {
		if err := k.whole(); err != nil {
			return err
		}
	}
	l.complete(cookie, k)
	return nil
}

// payload reads the n bytes that follow the header of a chunk.
func (l *link) payload(k *call, typ uint16, n uint32, done bool) error {
	if typ != chunkData && typ != chunkHole {
		if k.extras++; k.extras > maxExtras {
			return errors.New("too many chunks")
		}
	}
	switch {
	case typ == chunkNone && n == 0 && done:
		return nil
	case typ == chunkData && k.cmd == cmdRead && n >= 9:
		return l.data(k, int64(n)-8)
	case typ == chunkHole && k.cmd == cmdRead && n == 12:
		return l.hole(k)
	case typ == chunkBlockStatus && k.cmd == cmdBlockStatus && n >= 12 && n%8 == 4 && n <= 4+8*maxExtents:
		return l.blockStatus(k, int(n-4)/8)
	case typ&chunkErrorBit != 0 && n >= 6 && n <= maxErrorChunk:
		return l.errorChunk(k, typ, n)
	}
	return fmt.Errorf("a chunk of type %d with %d bytes", typ, n)
}

// number reads an integer of 4 or 8 bytes.
func (l *link) number(n int) (uint64, error) {
	p, err := l.br.Peek(n)
	if err != nil {
		return 0, err
	}
	l.br.Discard(n)
	if n == 4 {
		return uint64(be.Uint32(p)), nil
	}
	return be.Uint64(p), nil
}

func (l *link) data(k *call, n int64) error {
	off, err := l.number(8)
	if err != nil {
		return err
	}
	at, err := k.cover(off, n)
	if err != nil {
		return err
	}
	return l.fill(k, at, n)
}

func (l *link) hole(k *call) error {
	off, err := l.number(8)
	if err != nil {
		return err
	}
	n, err := l.number(4)
	if err != nil {
		return err
	}
	at, err := k.cover(off, int64(n))
	if err != nil {
		return err
	}
	if l.begin(k) {
		clear(k.p[at : at+int64(n)])
		l.end(k, nil)
	}
	return nil
}

// cover notes that n bytes at off of the export come; at is their place in k.p.
func (k *call) cover(off uint64, n int64) (at int64, err error) {
	if n == 0 || n > k.n || off < uint64(k.off) || off > uint64(k.off+k.n-n) {
		return 0, fmt.Errorf("%d bytes at %d, which were not asked for", n, off)
	}
	e := extent.Extent{Off: int64(off), Len: n}
	i, found := slices.BinarySearchFunc(k.got, e, func(a, b extent.Extent) int { return int(min(1, max(-1, a.Off-b.Off))) })
	if found || i > 0 && k.got[i-1].End() > e.Off || i < len(k.got) && k.got[i].Off < e.End() {
		return 0, fmt.Errorf("%d bytes at %d for the second time", n, off)
	}
	before, after := i > 0 && k.got[i-1].End() == e.Off, i < len(k.got) && k.got[i].Off == e.End()
	switch {
	case before && after:
		k.got[i-1].Len += n + k.got[i].Len
		k.got = slices.Delete(k.got, i, i+1)
	case before:
		k.got[i-1].Len += n
	case after:
		k.got[i] = extent.Extent{Off: e.Off, Len: n + k.got[i].Len}
	case len(k.got) >= maxPieces:
		return 0, errors.New("too many pieces")
	default:
		k.got = slices.Insert(k.got, i, e)
	}
	return e.Off - k.off, nil
}

// whole reports as an error what is missing in a reply that claims success.
func (k *call) whole() error {
	switch {
	case k.cmd == cmdRead && k.n > 0 && extent.Total(k.got) != k.n:
		return fmt.Errorf("reply to a read of %d bytes at %d ends after %d bytes", k.n, k.off, extent.Total(k.got))
	case k.cmd == cmdBlockStatus && len(k.status) == 0:
		return fmt.Errorf("reply to a block status at %d says nothing of %s", k.off, k.context)
	}
	return nil
}

// blockStatus reads what one metadata context says, in count extents.
func (l *link) blockStatus(k *call, count int) error {
	id, err := l.number(4)
	if err != nil {
		return err
	}
	name, ok := l.contexts[uint32(id)]
	if !ok || slices.Contains(k.seen, uint32(id)) {
		return fmt.Errorf("metadata context %d, which was not asked for", id)
	}
	k.seen = append(k.seen, uint32(id))
	at, end := k.off, k.off+k.n
	for i := range count {
		v, err := l.number(8)
		if err != nil {
			return err
		}
		n := int64(v >> 32)
		if n == 0 || at >= end {
			return fmt.Errorf("extent %d of %d bytes at %d", i, n, at)
		}
		// The last one may go on after what was asked about.
		if name == k.context {
			k.status = append(k.status, Status{extent.Extent{Off: at, Len: min(n, end-at)}, uint32(v)})
		}
		at += n
	}
	return nil
}

// errorChunk reads an error; the first of a reply is kept.
func (l *link) errorChunk(k *call, typ uint16, n uint32) error {
	p := make([]byte, n)
	if _, err := io.ReadFull(l.br, p); err != nil {
		return err
	}
	e, length := Errno(be.Uint32(p)), int(be.Uint16(p[4:]))
	if e == 0 || length > len(p)-6 || typ == chunkErrorOffset && length > len(p)-14 {
		return fmt.Errorf("error %d with a message of %d bytes in a chunk of %d", uint32(e), length, n)
	}
	if k.err != nil {
		return nil
	}
	k.err = e
	if length > 0 {
		k.err = &serverError{e, strings.ToValidUTF8(string(p[6:6+length]), "\uFFFD")}
	}
	return nil
}

// serverError is an Errno with the server's words.
type serverError struct {
	Errno
	message string
}

func (e *serverError) Error() string {
	return fmt.Sprintf("%v (the server says %q)", e.Errno, e.message)
}
func (e *serverError) Unwrap() error { return e.Errno }
