package store

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dgraph-io/badger/v4"

	"github.com/holdfast-backup/holdfast/store/bucket"
)

// Keys of the Badger index. Nothing in it is secret: ids are keyed hashes and
// summaries of points are encrypted.
//
//	c id[:16]   -> pack u32, offset u32, length u32 (bit 31: suspect)   where a chunk or page is stored
//	k number    -> pack id 32, size u64               pack registry (number is u32, big-endian)
//	m id        -> encoded page                       pages of chunk maps, a cache
//	t point id  -> encrypted summary                  points
//	n           -> u32                                next pack number
//	w           -> nothing; there when the index is whole
//	s           -> version u8, clean u8, repository id 16
const (
	keyChunk    = 'c'
	keyPack     = 'k'
	keyPage     = 'm'
	keyPoint    = 't'
	keyNext     = 'n'
	keyState    = 's'
	keyWhole    = 'w'
	indexFormat = 1
)

// badgerIndex is the Index in Badger.
type badgerIndex struct {
	db         *badger.DB
	dir        string // empty: in memory
	readOnly   bool
	generation atomic.Uint64
	repo       [16]byte
	wasClean   bool        // the last owner closed it lacking nothing
	complete   atomic.Bool // compared with the repository since it was opened
	failed     atomic.Bool // a write went wrong: never mark it clean

	mu       sync.RWMutex // guards following
	packs    map[uint32]PackInfo
	numbers  map[PackID]uint32
	next     uint32
	dirty    bool           // marked as not clean on disk
	reserved map[string]int // name => how often handed out
	closed   bool
}

var _ Index = (*badgerIndex)(nil)

// badgerOptions bounds Badger's memory: two memtables of 8 MiB, 16 MiB of table
// indexes and bloom filters, no block cache (useless without compression, since
// tables are memory-mapped). Writes survive a killed process through mmap; after
// a power cut the index is brought up to date from packs and manifests.
func badgerOptions(dir string) badger.Options {
	return badger.DefaultOptions(dir).
		WithLogger(nil).
		WithMetricsEnabled(false).
		WithCompression(0).
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
	// A reader needs no lock: it has all files open before an owner that comes
	// later may remove some.
	opt := badgerOptions(dir).WithReadOnly(readOnly).WithBypassLockGuard(readOnly)
	if dir == "" {
		opt = opt.WithInMemory(true)
	}
	db, err := badger.Open(opt)
	if err != nil {
		return nil, err
	}
	x := &badgerIndex{
		db: db, dir: dir, readOnly: readOnly, repo: repo,
		packs: map[uint32]PackInfo{}, numbers: map[PackID]uint32{}, reserved: map[string]int{}, next: 1,
	}
	x.generation.Store(uint64(time.Now().UnixNano()))
	if err := x.loadState(repo); err != nil {
		db.Close()
		return nil, err
	}
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
			if len(v) != 18 || v[0] != indexFormat || [16]byte(v[2:]) != repo {
				return errForeignIndex
			}
			x.wasClean = v[1] == 1
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
		it := txn.NewIterator(badger.IteratorOptions{Prefix: []byte{keyPack}, PrefetchValues: true, PrefetchSize: 100})
		defer it.Close()
		for it.Rewind(); it.Valid(); it.Next() {
			k := it.Item().Key()
			err := it.Item().Value(func(v []byte) error {
				if len(k) != 5 || len(v) != 40 {
					return errors.New("index: pack registry")
				}
				n := binary.BigEndian.Uint32(k[1:])
				x.packs[n] = PackInfo{PackID(v[:32]), int64(binary.LittleEndian.Uint64(v[32:]))}
				x.numbers[PackID(v[:32])] = n
				x.next = max(x.next, n+1)
				return nil
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
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
	v := append([]byte{indexFormat, 0}, repo[:]...)
	if clean {
		v[1] = 1
	}
	return x.db.Update(func(txn *badger.Txn) error { return txn.Set([]byte{keyState}, v) })
}

// markDirty begins every write: it makes a crash from here on visible to the
// next owner. Callers hold x.mu.
func (x *badgerIndex) markDirty() error {
	if err := x.room(); err != nil {
		return err
	}
	if x.dirty {
		return nil
	}
	err := x.db.Update(func(txn *badger.Txn) error {
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

func packKey(n uint32) []byte { return binary.BigEndian.AppendUint32([]byte{keyPack}, n) }

func (x *badgerIndex) Lookup(_ context.Context, ids []ID, locs []Loc) error {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.db.View(func(txn *badger.Txn) error {
		for i, id := range ids {
			locs[i] = Loc{}
			k := chunkKey(id)
			item, err := txn.Get(k[:])
			if errors.Is(err, badger.ErrKeyNotFound) {
				continue
			}
			if err != nil {
				return fmt.Errorf("index: %w", err)
			}
			err = item.Value(func(v []byte) error {
				if len(v) != 12 {
					return errors.New("index: chunk entry")
				}
				l := parseLoc(v)
				if _, ok := x.packs[l.Pack]; ok {
					locs[i] = l
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
}

func (x *badgerIndex) AddPack(_ context.Context, pack PackInfo, recs []PackRecord) error {
	n, err := x.takeNumber(pack.ID)
	if n == 0 || err != nil {
		return err
	}
	wb := x.db.NewWriteBatch()
	defer wb.Cancel()
	// One allocation each for keys and values: the batch keeps them until Flush.
	keys, vals := make([]byte, 0, 17*len(recs)), make([]byte, 0, 12*len(recs))
	for _, r := range recs {
		k := chunkKey(r.ID)
		keys = append(keys, k[:]...)
		vals = appendLoc(vals, Loc{Pack: n, Off: r.Off, Len: r.Len})
		if err := wb.Set(keys[len(keys)-17:], vals[len(vals)-12:]); err != nil {
			return x.wrote(err)
		}
	}
	if err := wb.Flush(); err != nil {
		return x.wrote(err)
	}
	// The registry row comes last: it says that all of the pack's records are in.
	row := binary.LittleEndian.AppendUint64(append([]byte(nil), pack.ID[:]...), uint64(pack.Size))
	if err := x.db.Update(func(txn *badger.Txn) error { return txn.Set(packKey(n), row) }); err != nil {
		return x.wrote(err)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.packs[n], x.numbers[pack.ID] = pack, n
	return nil
}

// takeNumber gives the number for a new pack, 0 when the pack is registered. It is
// used up on disk before anything refers to it: after a crash in between no other
// pack may come to own these entries.
func (x *badgerIndex) takeNumber(id PackID) (uint32, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if _, ok := x.numbers[id]; ok {
		return 0, nil
	}
	if err := x.markDirty(); err != nil {
		return 0, x.wrote(err)
	}
	n := x.next
	err := x.db.Update(func(txn *badger.Txn) error {
		return txn.Set([]byte{keyNext}, binary.BigEndian.AppendUint32(nil, n+1))
	})
	if err != nil {
		return 0, x.wrote(err)
	}
	x.next++
	return n, nil
}

func (x *badgerIndex) Packs(context.Context) iter.Seq2[NumberedPack, error] {
	x.mu.RLock()
	list := make([]NumberedPack, 0, len(x.packs))
	for n, p := range x.packs {
		list = append(list, NumberedPack{n, p})
	}
	x.mu.RUnlock()
	return func(yield func(NumberedPack, error) bool) {
		for _, p := range list {
			if !yield(p, nil) {
				return
			}
		}
	}
}

func (x *badgerIndex) Pack(_ context.Context, number uint32) (PackInfo, error) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	p, ok := x.packs[number]
	if !ok {
		return p, fmt.Errorf("index: pack number %d: %w", number, ErrNotExist)
	}
	return p, nil
}

func (x *badgerIndex) DropPack(_ context.Context, number uint32) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if err := x.markDirty(); err != nil {
		return x.wrote(err)
	}
	err := x.db.Update(func(txn *badger.Txn) error {
		if err := txn.Delete([]byte{keyWhole}); err != nil {
			return err
		}
		return txn.Delete(packKey(number))
	})
	if err != nil {
		return x.wrote(err)
	}
	delete(x.numbers, x.packs[number].ID)
	delete(x.packs, number)
	return nil
}

// suspectBit marks a suspect record in the stored length, which needs 23 bits.
const suspectBit = 1 << 31

func (x *badgerIndex) Suspect(ctx context.Context, ids []ID) error {
	if x.readOnly {
		return nil
	}
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
	return x.wrote(wb.Flush())
}

// appendLoc and parseLoc are the stored form of a Loc, 12 bytes.
func appendLoc(b []byte, l Loc) []byte {
	b = binary.LittleEndian.AppendUint32(b, l.Pack)
	b = binary.LittleEndian.AppendUint32(b, l.Off)
	if l.Suspect {
		l.Len |= suspectBit
	}
	return binary.LittleEndian.AppendUint32(b, l.Len)
}

func parseLoc(b []byte) Loc {
	n := binary.LittleEndian.Uint32(b[8:])
	return Loc{binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:]), n &^ suspectBit, n&suspectBit != 0}
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
	return x.wrote(x.db.Update(func(txn *badger.Txn) error { return txn.Set([]byte{keyWhole}, nil) }))
}

func (x *badgerIndex) Page(_ context.Context, id ID) (b []byte, err error) {
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
	if err := wb.Flush(); err != nil {
		return fmt.Errorf("index: %w", err)
	}
	return nil
}

func (x *badgerIndex) Points(context.Context) (list []SealedPoint, err error) {
	err = x.db.View(func(txn *badger.Txn) error {
		it := txn.NewIterator(badger.IteratorOptions{Prefix: []byte{keyPoint}, PrefetchValues: true, PrefetchSize: 100})
		defer it.Close()
		for it.Rewind(); it.Valid(); it.Next() {
			k := it.Item().Key()
			if len(k) != 17 {
				return errors.New("point key")
			}
			p := SealedPoint{ID: PointID(k[1:])}
			if p.Summary, err = it.Item().ValueCopy(nil); err != nil {
				return err
			}
			list = append(list, p)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("index: %w", err)
	}
	return list, nil
}

func (x *badgerIndex) PutPoint(_ context.Context, p SealedPoint) error {
	return x.changePoint(func(txn *badger.Txn) error {
		return txn.Set(append([]byte{keyPoint}, p.ID[:]...), p.Summary)
	})
}

func (x *badgerIndex) DropPoint(_ context.Context, id PointID) error {
	return x.changePoint(func(txn *badger.Txn) error {
		return txn.Delete(append([]byte{keyPoint}, id[:]...))
	})
}

func (x *badgerIndex) changePoint(fn func(*badger.Txn) error) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if err := x.markDirty(); err != nil {
		return x.wrote(err)
	}
	if err := x.db.Update(fn); err != nil {
		return x.wrote(err)
	}
	x.generation.Add(1)
	return nil
}

func (x *badgerIndex) Generation(context.Context) (uint64, error) { return x.generation.Load(), nil }

func (x *badgerIndex) Reserve(_ context.Context, name string) (int, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	n := x.reserved[name]
	x.reserved[name] = n + 1
	if len(x.reserved) > 1<<16 { // names are by the second: old ones never come back
		x.reserved = map[string]int{name: n + 1}
	}
	return n, nil
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

// wrote wraps the error of a write and remembers it.
func (x *badgerIndex) wrote(err error) error {
	if err == nil {
		return nil
	}
	x.failed.Store(true)
	return fmt.Errorf("index: %w", err)
}
