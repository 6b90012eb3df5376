// Package wire has the frames of the protocols between holdfast processes, and takes messages
// apart. Both sides of a connection send frames, little-endian:
//
//	request:  u32 length of the rest | u64 number | u8 operation | payload
//	response: u32 length of the rest | u64 number | u8 status    | payload
//
//	b := wire.AppendBytes(wire.NewFrame(7, opReserve), name)
//	b, err := wire.Finish(b, maxFrame)
//
// What a frame costs in memory follows what has arrived of it, not the length that it claims.
package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// HeadLen is the bytes of a frame's number and operation, which its length counts.
const HeadLen = 9

// ReadFrame reads a frame of at most limit bytes into buf, growing it as bytes really
// arrive, and gives what follows the length.
func ReadFrame(r io.Reader, buf []byte, limit int) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := binary.LittleEndian.Uint32(head[:])
	if n < HeadLen || int64(n) > int64(limit) {
		return nil, fmt.Errorf("frame of %d bytes", n)
	}
	buf = buf[:0]
	for len(buf) < int(n) {
		step := min(int(n)-len(buf), max(64<<10, len(buf)))
		at := len(buf)
		if cap(buf) < at+step {
			buf = append(make([]byte, 0, at+step), buf...)
		}
		buf = buf[:at+step]
		if _, err := io.ReadFull(r, buf[at:]); err != nil {
			return nil, err
		}
	}
	return buf, nil
}

// NewFrame begins a frame; Finish sets its length.
func NewFrame(number uint64, kind uint8) []byte {
	b := make([]byte, 4, 64)
	b = binary.LittleEndian.AppendUint64(b, number)
	return append(b, kind)
}

// Finish sets the length of a frame of at most limit bytes.
func Finish(b []byte, limit int) ([]byte, error) {
	if len(b)-4 > limit {
		return nil, fmt.Errorf("a message of %d bytes is too long", len(b))
	}
	binary.LittleEndian.PutUint32(b, uint32(len(b)-4))
	return b, nil
}

// AppendBytes appends v and its length before it.
func AppendBytes(b, v []byte) []byte {
	return append(binary.LittleEndian.AppendUint32(b, uint32(len(v))), v...)
}

// ErrMalformed: a message is shorter or longer than what it says of itself.
var ErrMalformed = errors.New("malformed message")

// Cursor takes a message apart; after the first error everything is zero.
type Cursor struct {
	b   []byte
	err error
}

// NewCursor begins with b, parts of which it gives out.
func NewCursor(b []byte) Cursor { return Cursor{b: b} }

// Take takes n bytes, which stay the message's; nil when there are not as many.
func (c *Cursor) Take(n int) []byte {
	if c.err != nil || n < 0 || n > len(c.b) {
		c.err = ErrMalformed
		return nil
	}
	v := c.b[:n]
	c.b = c.b[n:]
	return v
}

// U8 takes a byte.
func (c *Cursor) U8() uint8 {
	if v := c.Take(1); v != nil {
		return v[0]
	}
	return 0
}

// U32 takes four bytes.
func (c *Cursor) U32() uint32 {
	if v := c.Take(4); v != nil {
		return binary.LittleEndian.Uint32(v)
	}
	return 0
}

// U64 takes eight bytes.
func (c *Cursor) U64() uint64 {
	if v := c.Take(8); v != nil {
		return binary.LittleEndian.Uint64(v)
	}
	return 0
}

// Bytes takes a u32 length and as many bytes, which stay the message's.
func (c *Cursor) Bytes() []byte {
	n := c.U32()
	if uint64(n) > uint64(len(c.b)) {
		c.err = ErrMalformed
		return nil
	}
	return c.Take(int(n))
}

// Count takes a u32 that says how many items of size bytes follow at least.
func (c *Cursor) Count(size int) int {
	n := c.U32()
	if c.err == nil && uint64(n) > uint64(len(c.b)/size) {
		c.err = ErrMalformed
		return 0
	}
	return int(n)
}

// Rest is what has not been taken.
func (c *Cursor) Rest() []byte { return c.b }

// More reports whether there is something left to take.
func (c *Cursor) More() bool { return c.err == nil && len(c.b) > 0 }

// Err is the first error.
func (c *Cursor) Err() error { return c.err }

// End is the error of a message that must be used up by now.
func (c *Cursor) End() error {
	if c.err == nil && len(c.b) != 0 {
		return ErrMalformed
	}
	return c.err
}
