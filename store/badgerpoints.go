package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"

	"github.com/dgraph-io/badger/v4"
)

func (x *badgerIndex) Points(ctx context.Context, after PointID) iter.Seq2[SealedPoint, error] {
	return func(yield func(SealedPoint, error) bool) {
		err := x.each(ctx, keyPoint, after[:], true, func(k, v []byte) bool {
			return yield(SealedPoint{PointID(k), bytes.Clone(v)}, nil)
		})
		if err != nil {
			yield(SealedPoint{}, err)
		}
	}
}

func (x *badgerIndex) PutPoint(_ context.Context, p SealedPoint) error {
	return x.changePoint(p.ID, func(txn *badger.Txn) error {
		return txn.Set(append([]byte{keyPoint}, p.ID[:]...), p.Summary)
	})
}

func (x *badgerIndex) DropPoint(_ context.Context, id PointID) error {
	return x.changePoint(id, func(txn *badger.Txn) error {
		return txn.Delete(append([]byte{keyPoint}, id[:]...))
	})
}

func (x *badgerIndex) changePoint(id PointID, fn func(*badger.Txn) error) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if err := x.markDirty(); err != nil {
		return x.wrote(err)
	}
	if err := x.update(fn); err != nil {
		return x.wrote(err)
	}
	if len(x.changes) >= maxChanges {
		x.oldest = x.changes[maxChanges/2-1].gen
		x.changes = append(x.changes[:0], x.changes[maxChanges/2:]...)
	}
	x.changes = append(x.changes, pointChange{x.generation.Load() + 1, id})
	x.generation.Add(1)
	return nil
}

func (x *badgerIndex) Changes(_ context.Context, since uint64) (c Changes, err error) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	c.Generation = x.generation.Load()
	if since < x.oldest || since > c.Generation {
		c.Unknown = true
		return c, nil
	}
	seen := map[PointID]bool{}
	err = x.db.View(func(txn *badger.Txn) error {
		for _, ch := range slices.Backward(x.changes) {
			if ch.gen <= since {
				return nil
			}
			if seen[ch.id] {
				continue
			}
			seen[ch.id] = true
			item, err := txn.Get(append([]byte{keyPoint}, ch.id[:]...))
			if errors.Is(err, badger.ErrKeyNotFound) {
				c.Dropped = append(c.Dropped, ch.id)
				continue
			}
			if err != nil {
				return fmt.Errorf("index: %w", err)
			}
			v, err := item.ValueCopy(nil)
			if err != nil {
				return fmt.Errorf("index: %w", err)
			}
			c.Put = append(c.Put, SealedPoint{ch.id, v})
		}
		return nil
	})
	return c, err
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
