package store

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"slices"

	"github.com/dgraph-io/badger/v4"
)

// loadDoomed reads which packs are condemned, and which were.
func (x *badgerIndex) loadDoomed(txn *badger.Txn) error {
	for _, set := range []struct {
		key byte
		ids map[PackID]bool
	}{{keyDoomed, x.doomed}, {keyRemoved, x.removed}} {
		it := txn.NewIterator(badger.IteratorOptions{Prefix: []byte{set.key}})
		for it.Rewind(); it.Valid(); it.Next() {
			if k := it.Item().Key(); len(k) == 33 {
				set.ids[PackID(k[1:])] = true
			}
		}
		it.Close()
	}
	item, err := txn.Get([]byte{keyEpoch})
	if errors.Is(err, badger.ErrKeyNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	return item.Value(func(v []byte) error {
		if copy(x.epoch[:], v) != len(v) {
			return errors.New("index: epoch")
		}
		return nil
	})
}

// loadPacks reads the registry.
func (x *badgerIndex) loadPacks(txn *badger.Txn) error {
	it := txn.NewIterator(badger.IteratorOptions{Prefix: []byte{keyPack}, PrefetchValues: true, PrefetchSize: 100})
	defer it.Close()
	for it.Rewind(); it.Valid(); it.Next() {
		k := it.Item().Key()
		err := it.Item().Value(func(v []byte) error {
			if len(k) != 5 || len(v) != packRowLen {
				return errors.New("index: pack registry")
			}
			n := binary.BigEndian.Uint32(k[1:])
			id := PackID(v[:32])
			info := PackInfo{id, int64(binary.LittleEndian.Uint64(v[32:])), binary.LittleEndian.Uint32(v[40:])}
			x.packs[n] = knownPack{info, x.doomed[id]}
			x.numbers[id] = n
			x.next = max(x.next, n+1)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func packKey(n uint32) []byte { return binary.BigEndian.AppendUint32([]byte{keyPack}, n) }

func (x *badgerIndex) AddPack(ctx context.Context, pack PackInfo, recs []PackRecord) error {
	// From the look whether it is registered to its registration: two who add one
	// pack must not give it two numbers.
	x.entries.Lock()
	defer x.entries.Unlock()
	n, condemned, err := x.takeNumber(pack.ID)
	if n == 0 || err != nil {
		return err
	}
	pack.Records = uint32(len(recs))
	// In the order of their offsets, which is that of their slots.
	recs = slices.Clone(recs)
	slices.SortFunc(recs, func(a, b PackRecord) int { return cmp.Compare(a.Off, b.Off) })
	var old []Loc
	suspect := slices.ContainsFunc(recs, func(r PackRecord) bool { return r.Kind&KindSuspect != 0 })
	if condemned || suspect { // what is elsewhere too shall be read there
		if old, err = x.places(ctx, recs); err != nil {
			return err
		}
	}
	wb := x.db.NewWriteBatch()
	defer wb.Cancel()
	if suspect {
		if err := wb.Delete([]byte{keyWhole}); err != nil {
			return x.wrote(err)
		}
	}
	// One allocation each for keys and values: the batch keeps them until Flush.
	keys, vals := make([]byte, 0, 17*len(recs)), make([]byte, 0, locLen*len(recs))
	for i, r := range recs {
		if condemned && old[i].Reusable() {
			continue
		}
		bad := r.Kind&KindSuspect != 0
		if bad && old[i].Sound() {
			continue
		}
		k := chunkKey(r.ID)
		keys = append(keys, k[:]...)
		vals = appendLoc(vals, Loc{Pack: n, Off: r.Off, Len: r.Len, Slot: uint32(i), Suspect: bad})
		if err := wb.Set(keys[len(keys)-17:], vals[len(vals)-locLen:]); err != nil {
			return x.wrote(err)
		}
	}
	// Readers may follow the entries as soon as they are there: some replace others.
	x.mu.Lock()
	x.packs[n] = knownPack{pack, x.doomed[pack.ID]}
	x.mu.Unlock()
	undo := func(err error) error { // it will be added again, under another number
		x.mu.Lock()
		delete(x.packs, n)
		x.mu.Unlock()
		return x.wrote(err)
	}
	if err := x.flush(wb); err != nil {
		return undo(err)
	}
	// The registry row comes last: it says that all of the pack's records are in.
	row := binary.LittleEndian.AppendUint64(append([]byte(nil), pack.ID[:]...), uint64(pack.Size))
	row = binary.LittleEndian.AppendUint32(row, pack.Records)
	if err := x.update(func(txn *badger.Txn) error { return txn.Set(packKey(n), row) }); err != nil {
		return undo(err)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.numbers[pack.ID] = n
	return nil
}

// places looks up the ids of records.
func (x *badgerIndex) places(ctx context.Context, recs []PackRecord) ([]Loc, error) {
	ids, locs := make([]ID, len(recs)), make([]Loc, len(recs))
	for i, r := range recs {
		ids[i] = r.ID
	}
	return locs, x.Lookup(ctx, ids, locs)
}

// takeNumber gives the number for a new pack, 0 when the pack is registered, or was removed. It is
// used up on disk before anything refers to it: after a crash in between no other
// pack may come to own these entries.
func (x *badgerIndex) takeNumber(id PackID) (n uint32, condemned bool, err error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if _, ok := x.numbers[id]; ok || x.removed[id] {
		return 0, false, nil
	}
	if err := x.markDirty(); err != nil {
		return 0, false, x.wrote(err)
	}
	n = x.next
	err = x.update(func(txn *badger.Txn) error {
		return txn.Set([]byte{keyNext}, binary.BigEndian.AppendUint32(nil, n+1))
	})
	if err != nil {
		return 0, false, x.wrote(err)
	}
	x.next++
	return n, x.doomed[id], nil
}

func (x *badgerIndex) NextPack(context.Context) (uint32, error) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.next, nil
}

func (x *badgerIndex) Packs(context.Context) iter.Seq2[NumberedPack, error] {
	x.mu.RLock()
	list := make([]NumberedPack, 0, len(x.packs))
	for n, p := range x.packs {
		list = append(list, NumberedPack{n, p.PackInfo, p.condemned})
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
		return PackInfo{}, fmt.Errorf("index: pack number %d: %w", number, ErrNotExist)
	}
	return p.PackInfo, nil
}

func (x *badgerIndex) Incarnation(context.Context) (uint64, error) { return x.incarnation, nil }

func (x *badgerIndex) DropPack(ctx context.Context, pack PackID, ids []ID) error {
	x.entries.Lock()
	defer x.entries.Unlock()
	x.mu.RLock()
	number, ok := x.numbers[pack]
	x.mu.RUnlock()
	if !ok {
		return nil
	}
	if err := x.clearEntries(ctx, number, ids); err != nil {
		return err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	p := x.packs[number]
	err := x.update(func(txn *badger.Txn) error {
		if p.condemned {
			// Somebody who listed the packs just before may be about to add it again.
			if err := txn.Set(append([]byte{keyRemoved}, pack[:]...), nil); err != nil {
				return err
			}
		} else if err := txn.Delete([]byte{keyWhole}); err != nil {
			return err
		}
		return txn.Delete(packKey(number))
	})
	if err != nil {
		return x.wrote(err)
	}
	if p.condemned {
		x.removed[pack] = true
	}
	delete(x.numbers, p.ID)
	delete(x.packs, number)
	x.generation.Add(1) // those who keep packs open look which are gone
	return nil
}

// clearEntries removes the entries that point into a pack. x.entries is held.
func (x *badgerIndex) clearEntries(ctx context.Context, number uint32, ids []ID) error {
	x.mu.Lock()
	err := x.markDirty()
	x.mu.Unlock()
	if err != nil {
		return x.wrote(err)
	}
	locs := make([]Loc, len(ids))
	if err := x.Lookup(ctx, ids, locs); err != nil {
		return err
	}
	wb := x.db.NewWriteBatch()
	defer wb.Cancel()
	for i, id := range ids {
		if locs[i].Pack != number {
			continue
		}
		k := chunkKey(id)
		if err := wb.Delete(k[:]); err != nil {
			return x.wrote(err)
		}
	}
	return x.wrote(x.flush(wb))
}

// Condemn writes the new set before anybody sees it; the epoch comes last, so that
// after a crash in between the next owner finds another one than in the repository.
func (x *badgerIndex) Condemn(_ context.Context, old [16]byte, c Condemned) (bool, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.epoch != old {
		return false, nil
	}
	if err := x.markDirty(); err != nil {
		return false, x.wrote(err)
	}
	return true, x.wrote(x.condemn(c))
}

// condemn is Condemn. x.mu is held.
func (x *badgerIndex) condemn(c Condemned) error {
	doomed := make(map[PackID]bool, len(c.Packs))
	for _, id := range c.Packs {
		doomed[id] = true
	}
	wb := x.db.NewWriteBatch()
	defer wb.Cancel()
	key := func(id PackID) []byte { return append([]byte{keyDoomed}, id[:]...) }
	for id := range x.doomed {
		if !doomed[id] {
			if err := wb.Delete(key(id)); err != nil {
				return err
			}
		}
	}
	for id := range doomed {
		if !x.doomed[id] {
			if err := wb.Set(key(id), nil); err != nil {
				return err
			}
		}
	}
	if err := x.flush(wb); err != nil {
		return err
	}
	if err := x.update(func(txn *badger.Txn) error { return txn.Set([]byte{keyEpoch}, c.Epoch[:]) }); err != nil {
		return err
	}
	x.doomed, x.epoch = doomed, c.Epoch
	for n, p := range x.packs {
		if p.condemned != doomed[p.ID] {
			p.condemned = doomed[p.ID]
			x.packs[n] = p
		}
	}
	return nil
}

func (x *badgerIndex) Epoch(context.Context) ([16]byte, error) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.epoch, nil
}

// suspectBit marks a suspect record in the stored length, which needs 23 bits.
const suspectBit = 1 << 31
