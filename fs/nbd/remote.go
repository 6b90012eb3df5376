package nbd

import (
	"context"
	"fmt"
	"io"
	"iter"
	"slices"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// Status is what a metadata context says of a range.
type Status struct {
	extent.Extent
	Flags uint32 // their meaning is the context's, such as StateHole and StateZero
}

// maxLength is the longest range in a request without data, bytes: well below what
// servers count in 32 bits with a sign, and a multiple of every block size.
const maxLength = 1 << 30

// ReadAt reads from the export.
func (c *Client) ReadAt(p []byte, off int64) (int, error) {
	return c.ReadContext(context.Background(), p, off)
}

// ReadContext is ReadAt that gives up when ctx ends; p is the caller's again
// when it returns.
func (c *Client) ReadContext(ctx context.Context, p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, fmt.Errorf("nbd: export %q: read at %d", c.export, off)
	}
	if off >= c.info.size && len(p) > 0 {
		return 0, io.EOF
	}
	if short := int64(len(p)) - (c.info.size - off); short > 0 {
		p, err = p[:int64(len(p))-short], io.EOF
	}
	for n < len(p) {
		piece := p[n:min(len(p), n+c.largest())]
		if e := c.readPiece(ctx, piece, off+int64(n)); e != nil {
			return n, e
		}
		n += len(piece)
	}
	return n, err
}

// largest is the most data in one request, bytes: a multiple of the smallest block.
func (c *Client) largest() int {
	if c.info.large == 0 {
		return maxPayload
	}
	n := min(c.info.large, maxPayload)
	return int(n - n%c.block32())
}

func (c *Client) block32() uint32 { return max(1, c.info.minimum) }

// block is what requests must be multiples of, bytes.
func (c *Client) block() int64 { return int64(c.block32()) }

func (c *Client) readPiece(ctx context.Context, p []byte, off int64) error {
	want := extent.Extent{Off: off, Len: int64(len(p))}
	e := extent.Align(want, c.block())
	if e == want {
		return c.read(ctx, p, off)
	}
	for len(p) > 0 { // through memory of its own, in pieces that a request may have
		e.Len = min(e.Len, int64(c.largest()))
		tmp := make([]byte, e.Len)
		if err := c.read(ctx, tmp, e.Off); err != nil {
			return err
		}
		n := copy(p, tmp[off-e.Off:])
		p, off = p[n:], off+int64(n)
		e = extent.Align(extent.Extent{Off: off, Len: int64(len(p))}, c.block())
	}
	return nil
}

func (c *Client) read(ctx context.Context, p []byte, off int64) error {
	k := newCall(cmdRead, off, int64(len(p)))
	defer k.free()
	k.p = p
	return c.do(ctx, k, nil)
}

// WriteAt writes to the export. Offset and length must be multiples of the
// server's smallest block, of which most say 1.
func (c *Client) WriteAt(p []byte, off int64) (n int, err error) {
	if err := c.writable("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	for n < len(p) {
		piece := p[n:min(len(p), n+c.largest())]
		if err := c.plain(cmdWrite, 0, off+int64(n), int64(len(piece)), piece); err != nil {
			return n, err
		}
		n += len(piece)
	}
	return n, nil
}

// writable says why a range cannot be written; nil when it can.
func (c *Client) writable(op string, off, n int64) error {
	why := ""
	switch {
	case c.info.flags&ReadOnly != 0:
		return fmt.Errorf("nbd: export %q: %s of %d bytes at %d: read-only: %w", c.export, op, n, off, EPERM)
	case off < 0 || n < 0 || off > c.info.size || n > c.info.size-off:
		return fmt.Errorf("nbd: export %q: %s of %d bytes at %d: past the end: %w", c.export, op, n, off, ENOSPC)
	case (off|n)&(c.block()-1) != 0:
		why = fmt.Sprintf("not in blocks of %d bytes", c.block())
	default:
		return nil
	}
	return fmt.Errorf("nbd: export %q: %s of %d bytes at %d: %s: %w", c.export, op, n, off, why, EINVAL)
}

// plain is a request whose reply has no data.
func (c *Client) plain(cmd, flags uint16, off, n int64, data []byte) error {
	k := newCall(cmd, off, n)
	defer k.free()
	k.flags = flags
	return c.do(context.Background(), k, data)
}

// Flush makes everything written before durable. It is an error when the server
// does not know how to.
func (c *Client) Flush() error {
	switch {
	case c.info.flags&SendFlush != 0:
		return c.plain(cmdFlush, 0, 0, 0, nil)
	case c.info.flags&ReadOnly != 0:
		return nil
	}
	return fmt.Errorf("nbd: export %q: the server cannot flush: %w", c.export, ENOTSUP)
}

// Zero makes a range read as zeros. With a server that knows no such command it
// writes them.
func (c *Client) Zero(off, n int64, punch bool) error {
	if err := c.writable("zero", off, n); err != nil {
		return err
	}
	if c.info.flags&SendWriteZeroes == 0 {
		return c.writeZeros(off, n)
	}
	flags := uint16(flagNoHole)
	if punch {
		flags = 0
	}
	return c.ranges(cmdWriteZeroes, flags, off, n)
}

func (c *Client) writeZeros(off, n int64) error {
	zeros := make([]byte, min(n, int64(c.largest()), 1<<20))
	for n > 0 {
		k, err := c.WriteAt(zeros[:min(n, int64(len(zeros)))], off)
		if err != nil {
			return err
		}
		off, n = off+int64(k), n-int64(k)
	}
	return nil
}

// Trim says that a range is not needed any more. Servers without such a command are not told.
func (c *Client) Trim(off, n int64) error {
	if err := c.writable("trim", off, n); err != nil {
		return err
	}
	if c.info.flags&SendTrim == 0 {
		return nil
	}
	return c.ranges(cmdTrim, 0, off, n)
}

// Prefetch asks the server to bring a range nearer, if it knows how to.
func (c *Client) Prefetch(off, n int64) {
	e := extent.Intersect(extent.Align(extent.Extent{Off: off, Len: n}, c.block()), extent.Extent{Len: c.info.size})
	if c.info.flags&SendCache != 0 && !e.Empty() {
		_ = c.ranges(cmdCache, 0, e.Off, e.Len) // only advice
	}
}

// ranges is a command without data over any length.
func (c *Client) ranges(cmd, flags uint16, off, n int64) error {
	for n > 0 {
		piece := min(n, maxLength)
		if err := c.plain(cmd, flags, off, piece, nil); err != nil {
			return err
		}
		off, n = off+piece, n-piece
	}
	return nil
}

// BlockStatus asks what a metadata context says of the n bytes at off. The
// answer begins at off and may end before the range does, but not after it; it
// is never empty. One answer has up to 2^20 ranges (24 MiB).
func (c *Client) BlockStatus(ctx context.Context, name string, off, n int64) ([]Status, error) {
	if !slices.Contains(c.contexts, name) {
		return nil, fmt.Errorf("nbd: export %q: the server has no metadata context %s", c.export, name)
	}
	if off < 0 || n <= 0 || n > c.info.size-off {
		return nil, fmt.Errorf("nbd: export %q: block status of %d bytes at %d: %w", c.export, n, off, EINVAL)
	}
	e := extent.Extent{Off: off - off%c.block(), Len: min(n+off%c.block(), maxLength)}
	e = extent.Intersect(extent.Align(e, c.block()), extent.Extent{Len: c.info.size})
	k := newCall(cmdBlockStatus, e.Off, e.Len)
	defer k.free()
	k.context = name
	if err := c.do(ctx, k, nil); err != nil {
		return nil, err
	}
	all := clip(k.status, extent.Extent{Off: off, Len: n})
	if len(all) == 0 {
		return nil, fmt.Errorf("nbd: export %q: block status of %d bytes at %d: the answer ends before", c.export, n, off)
	}
	return all, nil
}

// clip cuts an answer to the range that was asked about.
func clip(all []Status, to extent.Extent) []Status {
	out := all[:0]
	for _, s := range all {
		if s.Extent = extent.Intersect(s.Extent, to); !s.Empty() {
			out = append(out, s)
		}
	}
	return out
}

// Extents yields all that a metadata context says of the n bytes at off.
func (c *Client) Extents(ctx context.Context, name string, off, n int64) iter.Seq2[Status, error] {
	return func(yield func(Status, error) bool) {
		for end := off + n; off < end; {
			all, err := c.BlockStatus(ctx, name, off, end-off)
			if err != nil {
				yield(Status{}, err)
				return
			}
			for _, s := range all {
				if !yield(s, nil) {
					return
				}
				off = s.End()
			}
		}
	}
}

// Allocated yields the ranges that the server does not say are zero; without
// base:allocation that is everything.
func (c *Client) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	return c.AllocatedFrom(0, granularity)
}

// AllocatedFrom is Allocated for the part of the export from off on.
func (c *Client) AllocatedFrom(off, granularity int64) iter.Seq2[extent.Extent, error] {
	return extent.Coarsen(func(yield func(extent.Extent, error) bool) {
		if !slices.Contains(c.contexts, baseAllocation) {
			yield(extent.Extent{Off: off, Len: c.info.size - off}, nil)
			return
		}
		for s, err := range c.Extents(context.Background(), baseAllocation, off, c.info.size-off) {
			if err == nil && s.Flags&StateZero != 0 {
				continue
			}
			if !yield(s.Extent, err) || err != nil {
				return
			}
		}
	}, max(granularity, 1), c.info.size)
}
