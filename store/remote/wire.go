package remote

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/holdfast-backup/holdfast/store"
)

// The protocol on the socket. Both sides send frames, little-endian:
//
//	request:  u32 length of the rest | u64 number | u8 operation | payload
//	response: u32 length of the rest | u64 number | u8 status    | payload
//
// Responses come in any order and carry the number of their request. The first
// request of a connection is hello: protocol version u32, repository id 16.
const (
	protocolVersion = 2
	maxFrame        = 16 << 20 // bytes; a longer frame ends the connection
	pageOfListing   = 2 << 20  // bytes after which a listing is continued by another request
)

const (
	opHello = iota + 1
	opLookup
	opAddPack
	opPacks
	opPack
	opDropPack
	opNextPack
	opCondemn
	opIncarnation
	opEpoch
	opSuspect
	opWhole
	opSetWhole
	opPage
	opPutPages
	opPageIDs
	opDropPages
	opPoints
	opPutPoint
	opDropPoint
	opGeneration
	opChanges
	opReserve
)

const (
	statusOK = iota
	statusError
	statusNotExist
	statusVersion
)

// readFrame reads a frame into buf, growing it as bytes really arrive.
func readFrame(r io.Reader, buf []byte) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := binary.LittleEndian.Uint32(head[:])
	if n < 9 || n > maxFrame {
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

// newFrame begins a frame; finish sets its length.
func newFrame(number uint64, kind uint8) []byte {
	b := make([]byte, 4, 64)
	b = binary.LittleEndian.AppendUint64(b, number)
	return append(b, kind)
}

func finish(b []byte) ([]byte, error) {
	if len(b)-4 > maxFrame {
		return nil, fmt.Errorf("a message of %d bytes is too long", len(b))
	}
	binary.LittleEndian.PutUint32(b, uint32(len(b)-4))
	return b, nil
}

// putIDs appends a list of ids and their number.
func putIDs[T ~[32]byte](b []byte, ids []T) []byte {
	b = binary.LittleEndian.AppendUint32(b, uint32(len(ids)))
	for _, id := range ids {
		b = append(b, id[:]...)
	}
	return b
}

// takeIDs is its counterpart.
func takeIDs[T ~[32]byte](c *cursor) []T {
	ids := make([]T, c.count(32))
	for i := range ids {
		copy(ids[i][:], c.take(32))
	}
	return ids
}

// A Loc on the wire: pack, offset, length, slot u32, then a byte of flags.
const (
	flagSuspect = 1 << iota
	flagCondemned
)

func putLoc(b []byte, l store.Loc) []byte {
	le := binary.LittleEndian
	b = le.AppendUint32(le.AppendUint32(le.AppendUint32(le.AppendUint32(b, l.Pack), l.Off), l.Len), l.Slot)
	return append(b, flag(l.Suspect)*flagSuspect|flag(l.Condemned)*flagCondemned)
}

func (c *cursor) loc() store.Loc {
	l := store.Loc{Pack: c.u32(), Off: c.u32(), Len: c.u32(), Slot: c.u32()}
	f := c.u8()
	l.Suspect, l.Condemned = f&flagSuspect != 0, f&flagCondemned != 0
	return l
}

// A line of the registry: id 32, size u64, records u32.
func putPack(b []byte, p store.PackInfo) []byte {
	b = binary.LittleEndian.AppendUint64(append(b, p.ID[:]...), uint64(p.Size))
	return binary.LittleEndian.AppendUint32(b, p.Records)
}

func (c *cursor) pack() (p store.PackInfo) {
	copy(p.ID[:], c.take(32))
	p.Size, p.Records = int64(c.u64()), c.u32()
	return p
}

// A point: id 16, length u32, summary.
func putPoint(b []byte, p store.SealedPoint) []byte {
	return putBytes(append(b, p.ID[:]...), p.Summary)
}

func (c *cursor) point() (p store.SealedPoint) {
	copy(p.ID[:], c.take(16))
	p.Summary = c.bytes()
	return p
}

func (c *cursor) u8() uint8 {
	if v := c.take(1); v != nil {
		return v[0]
	}
	return 0
}

var errShort = errors.New("malformed message")

// cursor takes a message apart; after the first error everything is zero.
type cursor struct {
	b   []byte
	err error
}

func (c *cursor) take(n int) []byte {
	if c.err != nil || n < 0 || n > len(c.b) {
		c.err = errShort
		return nil
	}
	v := c.b[:n]
	c.b = c.b[n:]
	return v
}

func (c *cursor) u32() uint32 {
	if v := c.take(4); v != nil {
		return binary.LittleEndian.Uint32(v)
	}
	return 0
}

func (c *cursor) u64() uint64 {
	if v := c.take(8); v != nil {
		return binary.LittleEndian.Uint64(v)
	}
	return 0
}

// bytes takes a u32 length and as many bytes, which stay the message's.
func (c *cursor) bytes() []byte { return c.take(int(c.u32())) }

// count takes a u32 that says how many items of size bytes follow at least.
func (c *cursor) count(size int) int {
	n := int(c.u32())
	if c.err == nil && n > len(c.b)/size {
		c.err = errShort
		return 0
	}
	return n
}

func putBytes(b, v []byte) []byte {
	return append(binary.LittleEndian.AppendUint32(b, uint32(len(v))), v...)
}

// end is the error of a message that must be used up by now.
func (c *cursor) end() error {
	if c.err == nil && len(c.b) != 0 {
		return errShort
	}
	return c.err
}
