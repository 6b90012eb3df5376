package store

import (
	"context"
	"encoding/hex"
	"iter"
)

// Loc says where a chunk or page is stored. The zero Loc means nowhere.
type Loc struct {
	Pack uint32 // number of the pack in this index, from 1
	Off  uint32 // bytes, of the record header
	Len  uint32 // bytes of the stored body
	Slot uint32 // which record of its pack by offset, from 0
	// Suspect: the record was found damaged, and no other is known.
	Suspect bool
	// Condemned: its pack is going to be removed. What a point needs of it is
	// copied before that; for new points it is as good as gone.
	Condemned bool
}

// Sound reports whether the chunk is stored and nothing is known against it.
func (l Loc) Sound() bool { return l.Known() && !l.Suspect }

// Reusable reports whether a new point may rely on the chunk.
func (l Loc) Reusable() bool { return l.Sound() && !l.Condemned }

// Known reports whether the chunk is stored.
func (l Loc) Known() bool { return l.Pack != 0 }

// MinFree is the room, bytes, that backups leave on the medium and without which
// an index is not opened for writing. Badger writes by memory mapping: on a full
// disk that ends the process by SIGBUS instead of giving an error.
const MinFree = 64 << 20

// PointID names a point: 16 random bytes.
type PointID [16]byte

// String is the hexadecimal form.
func (p PointID) String() string { return hex.EncodeToString(p[:]) }

// PackInfo is a line of the pack registry.
type PackInfo struct {
	ID      PackID
	Size    int64  // bytes
	Records uint32 // in its table
}

// Condemned are the packs that gc is about to remove, and the name of the decision.
type Condemned struct {
	Epoch [16]byte // random; zero: nothing was ever condemned
	Packs []PackID
}

// SealedPoint is what the index keeps of a point: its id and an encrypted
// summary, so that a listing of 100,000 points reads no manifest and the index
// tells nothing about the VMs to somebody without the passphrase.
type SealedPoint struct {
	ID      PointID
	Summary []byte
}

// Index is the rebuildable part of a repository: where chunks are, the pages of
// chunk maps, the pack registry and summaries of the points. It is held in
// Badger by the process that owns the repository, and by a connection to that
// process (store/remote) in all others. All methods are safe for concurrent use
// and take batches, so that a call is never made per chunk.
type Index interface {
	// Lookup sets locs[i] for each ids[i], zero for ids that are not stored.
	Lookup(ctx context.Context, ids []ID, locs []Loc) error
	// AddPack registers a durable pack with its records. Doing it twice is harmless,
	// and for a pack that was condemned and dropped it does nothing. A record of KindSuspect
	// takes the place of no other that nothing is known against, and is marked as by Suspect.
	AddPack(ctx context.Context, pack PackInfo, recs []PackRecord) error
	// Packs lists the registry: number and pack.
	Packs(ctx context.Context) iter.Seq2[NumberedPack, error]
	// Pack gives one line of the registry; ErrNotExist for an unknown number.
	Pack(ctx context.Context, number uint32) (PackInfo, error)
	// DropPack forgets a pack and the chunks that it held, of which ids are cleared
	// away. The index is not whole after it, unless the pack was condemned.
	DropPack(ctx context.Context, pack PackID, ids []ID) error
	// Incarnation is another number for an index that was made anew: the numbers of
	// packs mean nothing to it.
	Incarnation(ctx context.Context) (uint64, error)
	// NextPack is a number above that of every pack.
	NextPack(ctx context.Context) (uint32, error)
	// Condemn replaces the set of condemned packs: new points do not rely on them. It
	// does so only if the present epoch is old, and says whether it was.
	Condemn(ctx context.Context, old [16]byte, c Condemned) (bool, error)
	// Epoch is that of the last Condemn.
	Epoch(ctx context.Context) ([16]byte, error)
	// Suspect marks chunks and pages whose records were found damaged: readers still
	// try them, backups store them again. The index is not whole after it.
	Suspect(ctx context.Context, ids []ID) error
	// Whole reports whether everything that the points need is known to be in this
	// index: it was made with the repository, or a verification found no damage, and no
	// pack was lost since.
	Whole(ctx context.Context) (bool, error)
	// SetWhole records that.
	SetWhole(ctx context.Context) error
	// Page gives the stored form of a page, nil when the index does not hold it.
	Page(ctx context.Context, id ID) ([]byte, error)
	// PutPages keeps the stored form of pages.
	PutPages(ctx context.Context, ids []ID, pages [][]byte) error
	// PageIDs lists the ids of the pages kept that come after one, in order.
	PageIDs(ctx context.Context, after ID) iter.Seq2[ID, error]
	// DropPages removes pages from the cache.
	DropPages(ctx context.Context, ids []ID) error
	// Points lists the points whose ids come after one, in order.
	Points(ctx context.Context, after PointID) iter.Seq2[SealedPoint, error]
	// PutPoint adds or replaces the summary of a point whose manifest is durable.
	PutPoint(ctx context.Context, p SealedPoint) error
	// DropPoint removes a point whose manifest is gone.
	DropPoint(ctx context.Context, id PointID) error
	// Generation grows whenever a point comes or goes, and when a pack goes.
	Generation(ctx context.Context) (uint64, error)
	// Changes says what came and went since a generation, or that this is too long
	// ago to know.
	Changes(ctx context.Context, since uint64) (Changes, error)
	// Reserve hands out 0, 1, 2… for each further use of the same name, so that two
	// backups of one VM within one second get two names, whoever makes them.
	Reserve(ctx context.Context, name string) (int, error)
	// Close releases the index. Calling it twice is harmless.
	Close() error
}

// IndexWriter is an Index that may have been opened for reading alone, for lack of
// room on the medium.
type IndexWriter interface {
	// Write makes it one that can be written, if need be another one, of another
	// incarnation and in memory. Forget and gc call it before they begin: they make room.
	Write(ctx context.Context) error
}

// NumberedPack is a pack and its number in the index.
type NumberedPack struct {
	Number uint32
	PackInfo
	Condemned bool
}

// Changes are those of the points between two generations.
type Changes struct {
	Generation uint64 // up to which they go
	Unknown    bool   // all points are to be listed instead
	Put        []SealedPoint
	Dropped    []PointID
}
