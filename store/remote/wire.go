package remote

import (
	"encoding/binary"
	"io"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/remote/wire"
)

// The protocol on the socket: frames of package wire. Responses come in any order and carry the
// number of their request. The first request of a connection is hello: protocol version u32,
// repository id 16.
const (
	protocolVersion = 3
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
	opWrite
)

const (
	statusOK = iota
	statusError
	statusNotExist
	statusVersion
	statusFull
)

func readFrame(r io.Reader) ([]byte, error) { return wire.ReadFrame(r, nil, maxFrame) }

func finish(b []byte) ([]byte, error) { return wire.Finish(b, maxFrame) }

// cursor takes a message of this protocol apart.
type cursor struct{ wire.Cursor }

func newCursor(b []byte) *cursor { return &cursor{wire.NewCursor(b)} }

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
	ids := make([]T, c.Count(32))
	for i := range ids {
		copy(ids[i][:], c.Take(32))
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
	l := store.Loc{Pack: c.U32(), Off: c.U32(), Len: c.U32(), Slot: c.U32()}
	f := c.U8()
	l.Suspect, l.Condemned = f&flagSuspect != 0, f&flagCondemned != 0
	return l
}

// A line of the registry: id 32, size u64, records u32.
func putPack(b []byte, p store.PackInfo) []byte {
	b = binary.LittleEndian.AppendUint64(append(b, p.ID[:]...), uint64(p.Size))
	return binary.LittleEndian.AppendUint32(b, p.Records)
}

func (c *cursor) pack() (p store.PackInfo) {
	copy(p.ID[:], c.Take(32))
	p.Size, p.Records = int64(c.U64()), c.U32()
	return p
}

// A point: id 16, length u32, summary.
func putPoint(b []byte, p store.SealedPoint) []byte {
	return wire.AppendBytes(append(b, p.ID[:]...), p.Summary)
}

func (c *cursor) point() (p store.SealedPoint) {
	copy(p.ID[:], c.Take(16))
	p.Summary = c.Bytes()
	return p
}
