package nbd

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// serve does what r asks for and makes its reply.
func (c *conn) serve(r *request) {
	if r.bad != 0 {
		c.refuse(r, r.bad, refusal(r.bad))
		return
	}
	off, n := int64(r.off), int64(r.n)
	var err error
	switch r.cmd {
	case cmdRead:
		err = c.serveRead(r)
		if err == nil {
			return
		}
	case cmdBlockStatus:
		err = c.serveStatus(r)
		if err == nil {
			return
		}
	case cmdWrite:
		if n > 0 {
			_, err = c.writable.WriteAt(r.buf.data(int(n)), off)
		}
	case cmdWriteZeroes:
		err = c.writable.Zero(off, n, r.flags&flagNoHole == 0)
	case cmdTrim:
		err = c.writable.Trim(off, n)
	case cmdCache:
		c.prefetch.Prefetch(off, n)
	}
	if err == nil && (r.cmd == cmdFlush || r.flags&flagFUA != 0) && c.writable != nil {
		err = c.writable.Flush()
	}
	if err != nil {
		err = fmt.Errorf("%s of %d bytes at %d: %w", commandNames[r.cmd], n, off, err)
		c.logf("%w", err)
		c.refuse(r, errnoOf(err), err.Error())
		return
	}
	c.simple(r, 0)
}

func refusal(e Errno) string {
	switch e {
	case EPERM:
		return "the export is read-only"
	case ENOSPC:
		return "past the end of the export"
	case EOVERFLOW:
		return "the request is too long"
	}
	return "the request is not valid for this export"
}

// simple makes a reply without data.
func (c *conn) simple(r *request, e Errno) {
	r.head = r.head[:simpleLen]
	putSimple(r.head, r.cookie, e)
	r.parts = append(r.parts[:0], r.head)
}

// refuse makes a reply that says what went wrong.
func (c *conn) refuse(r *request, e Errno, message string) {
	if !c.structured {
		c.simple(r, e)
		return
	}
	message = cleanString(message)
	p := append(r.head[:0], make([]byte, structuredLen)...)
	putChunk(p, chunkDone, chunkError, r.cookie, uint32(6+len(message)))
	p = be.AppendUint32(p, uint32(e))
	p = be.AppendUint16(p, uint16(len(message)))
	r.head = append(p, message...)
	r.parts = append(r.parts[:0], r.head)
}

// cleanString makes s a string of the protocol (proto, "Conventions").
func cleanString(s string) string {
	s = strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "\uFFFD")
	if len(s) <= maxString {
		return s
	}
	s = s[:maxString]
	for !utf8.ValidString(s) {
		s = s[:len(s)-1]
	}
	return s
}

func (c *conn) serveRead(r *request) error {
	if r.n == 0 {
		c.empty(r)
		return nil
	}
	p := r.buf.data(int(r.n))
	n, err := c.disk.ReadAt(p, int64(r.off))
	if n < len(p) {
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	switch {
	case !c.structured:
		c.plainData(r, simpleLen)
		putSimple(r.parts[0], r.cookie, 0)
	case r.flags&flagDF != 0 || !maybeHoles(p, r.off):
		c.plainData(r, dataHeaderLen)
		putData(r.parts[0], chunkDone, r.cookie, r.off, r.n)
	default:
		c.withHoles(r, p)
	}
	return nil
}

// empty answers a read of nothing.
func (c *conn) empty(r *request) {
	if !c.structured {
		c.simple(r, 0)
		return
	}
	r.head = r.head[:structuredLen]
	putChunk(r.head, chunkDone, chunkNone, r.cookie, 0)
	r.parts = append(r.parts[:0], r.head)
}

// plainData makes a reply of one piece, with a header in front of the data.
func (c *conn) plainData(r *request, header int) {
	r.parts = append(r.parts[:0], r.buf.mem[headroom-header:headroom+int(r.n)])
}

func putData(p []byte, flags uint16, cookie, off uint64, n uint32) {
	putChunk(p, flags, chunkData, cookie, n+8)
	be.PutUint64(p[structuredLen:], off)
}

// holeUnit is what is looked at for zeros at a time, bytes, aligned to the disk.
const holeUnit = 64 << 10

// unit is the first piece of p, which lies at off: up to the next multiple of holeUnit.
func unit(p []byte, off uint64) []byte {
	return p[:min(uint64(len(p)), holeUnit-off%holeUnit)]
}

// maybeHoles reports whether a look at the first bytes of every unit leaves the
// possibility that one is zero.
func maybeHoles(p []byte, off uint64) bool {
	for len(p) > 0 {
		u := unit(p, off)
		if isZero(u[:min(len(u), 16)]) {
			return true
		}
		p, off = p[len(u):], off+uint64(len(u))
	}
	return false
}

// withHoles makes a reply of data and holes.
func (c *conn) withHoles(r *request, p []byte) {
	r.head, r.parts = r.head[:0], r.parts[:0]
	// What follows takes slices of head: it must not move.
	if room := (len(p)/holeUnit + 2) * holeChunkLen; cap(r.head) < room {
		r.head = make([]byte, 0, room)
	}
	off := r.off
	for len(p) > 0 {
		hole, n := sameKind(p, off)
		flags := uint16(0)
		if n == len(p) {
			flags = chunkDone
		}
		if hole {
			h := c.grow(r, holeChunkLen)
			putChunk(h, flags, chunkHole, r.cookie, holeChunkLen-structuredLen)
			be.PutUint64(h[structuredLen:], off)
			be.PutUint32(h[dataHeaderLen:], uint32(n))
		} else {
			putData(c.grow(r, dataHeaderLen), flags, r.cookie, off, uint32(n))
			r.parts = append(r.parts, p[:n])
		}
		p, off = p[n:], off+uint64(n)
	}
}

// grow adds n bytes of header to the reply.
func (c *conn) grow(r *request, n int) []byte {
	at := len(r.head)
	r.head = r.head[:at+n]
	r.parts = append(r.parts, r.head[at:])
	return r.head[at:]
}

// sameKind is the number of bytes at the start of p that are all holes, or all not.
func sameKind(p []byte, off uint64) (hole bool, n int) {
	u := unit(p, off)
	hole = isZero(u)
	for n = len(u); n < len(p); n += len(u) {
		if u = unit(p[n:], off+uint64(n)); isZero(u) != hole {
			break
		}
	}
	return hole, n
}

// maxStatus is how many extents one reply has, at most.
const maxStatus = 4096

// serveStatus answers NBD_CMD_BLOCK_STATUS with base:allocation.
func (c *conn) serveStatus(r *request) error {
	granularity := c.export.Granularity
	if granularity <= 0 {
		granularity = 4096
	}
	at, end := int64(r.off), int64(r.off)+int64(r.n)
	most := maxStatus
	if r.flags&flagReqOne != 0 {
		most = 1
	}
	p := append(r.head[:0], make([]byte, structuredLen+4)...)
	count := 0
	add := func(to int64, state uint32) bool {
		if to > at {
			p = be.AppendUint32(p, uint32(to-at))
			p = be.AppendUint32(p, state)
			at = to
			count++
		}
		return count < most && at < end
	}
	for e, err := range allocated(c.disk, at, granularity) {
		if err != nil {
			return err
		}
		e = extent.Intersect(e, extent.Extent{Off: at, Len: end - at})
		if e.Empty() && e.Off < end {
			continue
		}
		if e.Empty() || !add(e.Off, StateHole|StateZero) || !add(e.End(), 0) {
			break
		}
	}
	if count < most {
		add(end, StateHole|StateZero)
	}
	putChunk(p, chunkDone, chunkBlockStatus, r.cookie, uint32(len(p)-structuredLen))
	be.PutUint32(p[structuredLen:], allocationID)
	r.head = p
	r.parts = append(r.parts[:0], p)
	return nil
}
