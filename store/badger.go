package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"

	"github.com/holdfast-backup/holdfast/store/bucket"
)

// Keys of the Badger index. Nothing in it is secret: ids are keyed hashes and
// summaries of points are encrypted.
//
//	c id[:16]   -> pack u32, offset u32, length u32 (bit 31: suspect), slot u32   where a chunk or page is stored
//	k number    -> pack id 32, size u64, records u32  pack registry (number is u32, big-endian)
//	g pack id   -> nothing; there when the pack is condemned
//	e           -> epoch of the condemned packs, 16
//	x pack id   -> nothing; there when the pack was condemned and dropped
//	m id        -> encoded page                       pages of chunk maps, a cache
//	t point id  -> encrypted summary                  points
//	n           -> u32                                next pack number
//	w           -> nothing; there when the index is whole
//	s           -> version u8, clean u8, repository id 16, incarnation u64
const (
	keyChunk    = 'c'
	keyPack     = 'k'
	keyPage     = 'm'
	keyPoint    = 't'
	keyNext     = 'n'
	keyState    = 's'
	keyWhole    = 'w'
	keyDoomed   = 'g'
	keyEpoch    = 'e'
	keyRemoved  = 'x'
	indexFormat = 2

	locLen     = 16      // bytes of a stored Loc
	packRowLen = 44      // bytes of a line of the registry
	stateLen   = 26      // bytes of the state
	maxChanges = 1 << 14 // changes of points remembered
)

// badgerIndex is the Index in Badger.
type badgerIndex struct {
	db          *badger.DB
	dir         string // empty: in memory
	readOnly    bool
	generation  atomic.Uint64
	repo        [16]byte
	incarnation uint64
	wasClean    bool          // the last owner closed it lacking nothing
	complete    atomic.Bool   // compared with the repository since it was opened
	failed      atomic.Bool   // a write went wrong: never mark it clean
	advised     atomic.Uint64 // number of the newest table that the kernel was told of
	pagesRead   atomic.Uint64
	tables      atomic.Pointer[[]tableFile] // when the kernel was told

	// onCommit carries out commits; nil does so at once. Tests stop a run there.
	onCommit func(commit func() error) error

	// entries is held while entries of chunks are changed: between looking one up
	// and writing it nobody else may. Taken before mu.
	entries sync.Mutex

	mu       sync.RWMutex // guards following
	packs    map[uint32]knownPack
	numbers  map[PackID]uint32
	doomed   map[PackID]bool // condemned, registered or not
	epoch    [16]byte        // of doomed
	removed  map[PackID]bool // condemned and dropped: they never come back
	next     uint32
	changes  []pointChange  // the last ones, by generation
	oldest   uint64         // generation before the first of changes
	dirty    bool           // marked as not clean on disk
	reserved map[string]int // name => how often handed out
	closed   bool
}

var _ Index = (*badgerIndex)(nil)

// knownPack is a line of the registry.
type knownPack struct {
	PackInfo
	condemned bool
}

// pointChange: a point came, changed or went.
type pointChange struct {
	gen uint64
	id  PointID
}

// badgerOptions bounds Badger's memory: two memtables of 8 MiB, 16 MiB of table
// indexes and bloom filters, no block cache (useless without compression, since
// tables are memory-mapped). Writes survive a killed process through mmap; after
// a power cut the index is brought up to date from packs and manifests.
func badgerOptions(dir string) badger.Options {
	return badger.DefaultOptions(dir).
		WithLogger(nil).
		WithMetricsEnabled(false).
		WithCompression(0).
		WithChecksumVerificationMode(options.OnBlockRead). // of what turns bad after proveFiles; 13 us of a look-up become 20
		WithDetectConflicts(false).
		WithNumVersionsToKeep(1).
		WithMemTableSize(8 << 20).
		WithNumMemtables(2).
		WithNumLevelZeroTables(4).
		WithNumLevelZeroTablesStall(12).
		WithNumCompactors(2).
		WithBaseTableSize(4 << 20).
		WithBlockCacheSize(0).
		WithIndexCacheSize(16 << 20).
		WithValueThreshold(1 << 19). // pages stay in the tree: nothing ever enters the value log
		WithValueLogFileSize(2 << 20)
}

// openBadger opens the index in dir. With readOnly the directory is not written;
// with dir empty the index lives in memory.
func openBadger(dir string, repo [16]byte, readOnly bool) (*badgerIndex, error) {
	// Badger's own lock is no use: an owner has one before it comes here, and a reader
	// has all files open before an owner that comes later may remove some.
	opt := badgerOptions(dir).WithReadOnly(readOnly).WithBypassLockGuard(true)
	if dir == "" {
		opt = opt.WithInMemory(true)
	}
	db, err := badger.Open(opt)
	if err != nil {
		return nil, err
	}
	x := &badgerIndex{
		db: db, dir: dir, readOnly: readOnly, repo: repo,
		packs: map[uint32]knownPack{}, numbers: map[PackID]uint32{}, doomed: map[PackID]bool{}, removed: map[PackID]bool{}, reserved: map[string]int{}, next: 1,
	}
	x.generation.Store(uint64(time.Now().UnixNano()))
	x.oldest = x.generation.Load()
	if err := x.loadState(repo); err != nil {
		db.Close()
		return nil, err
	}
	x.advise()
	return x, nil
}

// errForeignIndex: the directory holds the index of another repository or format.
var errForeignIndex = errors.New("index belongs to another repository or format")

func (x *badgerIndex) loadState(repo [16]byte) error {
	fresh := false
	err := x.db.View(func(txn *badger.Txn) error {
		item, err := txn.Get([]byte{keyState})
		if errors.Is(err, badger.ErrKeyNotFound) {
			fresh = true
			return nil
		}
		if err != nil {
			return err
		}
		if err := item.Value(func(v []byte) error {
			if len(v) != stateLen || v[0] != indexFormat || [16]byte(v[2:18]) != repo {
				return errForeignIndex
			}
			x.wasClean, x.incarnation = v[1] == 1, binary.LittleEndian.Uint64(v[18:])
			return nil
		}); err != nil {
			return err
		}
		if item, err := txn.Get([]byte{keyNext}); err == nil {
			err = item.Value(func(v []byte) error {
				if len(v) != 4 {
					return errors.New("index: next pack number")
				}
				x.next = binary.BigEndian.Uint32(v)
				return nil
			})
			if err != nil {
				return err
			}
		} else if !errors.Is(err, badger.ErrKeyNotFound) {
			return err
		}
		if err := x.loadDoomed(txn); err != nil {
			return err
		}
		return x.loadPacks(txn)
	})
	if err != nil {
		return err
	}
	if fresh {
		x.incarnation = rand.Uint64()
	}
	if fresh && !x.readOnly {
		return x.setState(repo, false)
	}
	return nil
}

// room fails when the medium is too full for Badger to write, whoever has filled
// it. Half of what backups leave free is for what one call and Badger's own
// flushes and compactions write.
func (x *badgerIndex) room() error {
	if x.dir == "" {
		return nil
	}
	free, err := bucket.FreeBytes(x.dir)
	if err == nil && free < MinFree/2 {
		return bucket.ErrFull
	}
	return nil
}

func (x *badgerIndex) setState(repo [16]byte, clean bool) error {
	v := binary.LittleEndian.AppendUint64(append([]byte{indexFormat, 0}, repo[:]...), x.incarnation)
	if clean {
		v[1] = 1
	}
	return x.update(func(txn *badger.Txn) error { return txn.Set([]byte{keyState}, v) })
}

// markDirty begins every write: it makes a crash from here on visible to the
// next owner. Callers hold x.mu.
func (x *badgerIndex) markDirty() error {
	if x.readOnly {
		return bucket.ErrReadOnly
	}
	if err := x.room(); err != nil {
		return err
	}
	if x.dirty {
		return nil
	}
	err := x.update(func(txn *badger.Txn) error {
		item, err := txn.Get([]byte{keyState})
		if err != nil {
			return err
		}
		v, err := item.ValueCopy(nil)
		if err != nil {
			return err
		}
		v[1] = 0
		return txn.Set([]byte{keyState}, v)
	})
	x.dirty = err == nil
	return err
}

func chunkKey(id ID) [17]byte {
	var k [17]byte
	k[0] = keyChunk
	copy(k[1:], id[:16])
	return k
}

func (x *badgerIndex) Suspect(ctx context.Context, ids []ID) error {
	if x.readOnly {
		return nil
	}
	x.entries.Lock()
	defer x.entries.Unlock()
	locs := make([]Loc, len(ids))
	if err := x.Lookup(ctx, ids, locs); err != nil {
		return err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if err := x.markDirty(); err != nil {
		return x.wrote(err)
	}
	wb := x.db.NewWriteBatch()
	defer wb.Cancel()
	if err := wb.Delete([]byte{keyWhole}); err != nil {
		return x.wrote(err)
	}
	for i, id := range ids {
		if !locs[i].Known() {
			continue
		}
		k := chunkKey(id)
		locs[i].Suspect = true
		if err := wb.Set(k[:], appendLoc(nil, locs[i])); err != nil {
			return x.wrote(err)
		}
	}
	return x.wrote(x.flush(wb))
}

// appendLoc and parseLoc are the stored form of a Loc, locLen bytes.
func appendLoc(b []byte, l Loc) []byte {
	le := binary.LittleEndian
	n := l.Len
	if l.Suspect {
		n |= suspectBit
	}
	return le.AppendUint32(le.AppendUint32(le.AppendUint32(le.AppendUint32(b, l.Pack), l.Off), n), l.Slot)
}

func parseLoc(b []byte) Loc {
	le := binary.LittleEndian
	n := le.Uint32(b[8:])
	return Loc{Pack: le.Uint32(b), Off: le.Uint32(b[4:]), Len: n &^ suspectBit, Slot: le.Uint32(b[12:]), Suspect: n&suspectBit != 0}
}

func (x *badgerIndex) Whole(context.Context) (whole bool, err error) {
	err = x.db.View(func(txn *badger.Txn) error {
		_, err := txn.Get([]byte{keyWhole})
		if errors.Is(err, badger.ErrKeyNotFound) {
			return nil
		}
		whole = err == nil
		return err
	})
	if err != nil {
		return false, fmt.Errorf("index: %w", err)
	}
	return whole, nil
}

func (x *badgerIndex) SetWhole(context.Context) error {
	if x.readOnly {
		return nil
	}
	return x.wrote(x.update(func(txn *badger.Txn) error { return txn.Set([]byte{keyWhole}, nil) }))
}

func (x *badgerIndex) Page(_ context.Context, id ID) (b []byte, err error) {
	if x.pagesRead.Add(1)%adviseEvery == 0 {
		x.advise()
	}
	err = x.db.View(func(txn *badger.Txn) error {
		item, err := txn.Get(append([]byte{keyPage}, id[:]...))
		if errors.Is(err, badger.ErrKeyNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		b, err = item.ValueCopy(nil)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("index: %w", err)
	}
	return b, nil
}

func (x *badgerIndex) PutPages(_ context.Context, ids []ID, pages [][]byte) error {
	if x.readOnly || x.room() != nil {
		return nil // a cache that cannot be written is only slower
	}
	wb := x.db.NewWriteBatch()
	defer wb.Cancel()
	for i, id := range ids {
		if err := wb.Set(append([]byte{keyPage}, id[:]...), pages[i]); err != nil {
			return fmt.Errorf("index: %w", err)
		}
	}
	if err := x.flush(wb); err != nil {
		return fmt.Errorf("index: %w", err)
	}
	return nil
}

func (x *badgerIndex) PageIDs(ctx context.Context, after ID) iter.Seq2[ID, error] {
	return func(yield func(ID, error) bool) {
		err := x.each(ctx, keyPage, after[:], false, func(k, _ []byte) bool { return yield(ID(k), nil) })
		if err != nil {
			yield(ID{}, err)
		}
	}
}

// each calls fn with the keys of one kind behind a certain one, without their
// first byte, and with their values when asked for, until it returns false. Both
// are valid during the call only.
func (x *badgerIndex) each(ctx context.Context, kind byte, after []byte, values bool, fn func(k, v []byte) bool) error {
	more := true
	err := x.db.View(func(txn *badger.Txn) error {
		it := txn.NewIterator(badger.IteratorOptions{Prefix: []byte{kind}, PrefetchValues: values, PrefetchSize: 100})
		defer it.Close()
		seek := append([]byte{kind}, after...)
		for it.Seek(seek); it.Valid() && more; it.Next() {
			k := it.Item().Key()
			if bytes.Equal(k, seek) {
				continue
			}
			if len(k) != len(seek) {
				return fmt.Errorf("key of %d bytes", len(k))
			}
			if err := ctx.Err(); err != nil {
				return err
			}
			if !values {
				more = fn(k[1:], nil)
				continue
			}
			if err := it.Item().Value(func(v []byte) error { more = fn(k[1:], v); return nil }); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("index: %w", err)
	}
	return nil
}

func (x *badgerIndex) DropPages(_ context.Context, ids []ID) error {
	if x.readOnly {
		return nil
	}
	wb := x.db.NewWriteBatch()
	defer wb.Cancel()
	for _, id := range ids {
		if err := wb.Delete(append([]byte{keyPage}, id[:]...)); err != nil {
			return x.wrote(err)
		}
	}
	return x.wrote(x.flush(wb))
}

// Close ends the index. When it lacks nothing it is marked so, and the next
// owner need not compare it with the packs.
func (x *badgerIndex) Close() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.closed {
		return nil
	}
	x.closed = true
	if !x.readOnly && x.room() != nil {
		// Closing writes. What Badger has is left as by a crash: its files hold it,
		// and the next owner finds an index that is not marked clean.
		return nil
	}
	var err error
	if !x.readOnly && x.complete.Load() && !x.failed.Load() && (x.dirty || !x.wasClean) {
		err = x.setState(x.repo, true)
	}
	return errors.Join(err, x.db.Close())
}

// update and flush are every commit to Badger.
func (x *badgerIndex) update(fn func(*badger.Txn) error) error {
	return x.commit(func() error { return x.db.Update(fn) })
}

func (x *badgerIndex) flush(wb *badger.WriteBatch) error { return x.commit(wb.Flush) }

func (x *badgerIndex) commit(fn func() error) error {
	if x.onCommit != nil {
		return x.onCommit(fn)
	}
	return fn()
}

// wrote wraps the error of a write and remembers it.
func (x *badgerIndex) wrote(err error) error {
	if err == nil {
		return nil
	}
	x.failed.Store(true)
	return fmt.Errorf("index: %w", err)
}
