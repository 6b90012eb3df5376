package store

import (
	"cmp"
	"context"
	"fmt"
	"runtime"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"
)

// bulkSize is how many ids a bulk looks up at a time. They take 36 bytes each: 72 MiB, in a
// repository that has so many.
const bulkSize = 2 << 20

// bulk puts chunks off and looks up many of them at a time, in ascending order of their
// ids, which takes a fraction of the time. Safe for concurrent use.
type bulk struct {
	index Index
	size  int
	// settled is told of chunks and where they are. Never called by two goroutines at once.
	settled func(chunks []bulkChunk, locs []Loc)

	mu    sync.Mutex // guards following; held while settled is called
	n     int
	parts [256][]bulkChunk // by the first byte of their ids
}

// bulkChunk is a chunk, and who uses it where that matters.
type bulkChunk struct {
	id    ID
	owner owner
}

// add puts chunks off.
func (b *bulk) add(ctx context.Context, chunks []bulkChunk) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range chunks {
		b.parts[c.id[0]] = append(b.parts[c.id[0]], c)
	}
	b.n += len(chunks)
	if b.n < b.size {
		return nil
	}
	return b.settle(ctx)
}

// end settles what is left.
func (b *bulk) end(ctx context.Context) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	err := b.settle(ctx)
	b.parts = [256][]bulkChunk{}
	return err
}

// settle looks up all chunks, each with each of its owners once. b.mu is held.
func (b *bulk) settle(ctx context.Context) error {
	var mu sync.Mutex // held while settled is called
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for i := range b.parts {
		if len(b.parts[i]) == 0 {
			continue
		}
		g.Go(func() error {
			list := b.parts[i]
			slices.SortFunc(list, func(a, b bulkChunk) int { return cmp.Or(compareIDs(a.id, b.id), cmp.Compare(a.owner, b.owner)) })
			list = slices.Compact(list)
			ids, locs := make([]ID, len(list)), make([]Loc, len(list))
			for k := range list {
				ids[k] = list[k].id
			}
			if err := b.index.Lookup(ctx, ids, locs); err != nil {
				return fmt.Errorf("store: %w", err)
			}
			mu.Lock()
			defer mu.Unlock()
			b.settled(list, locs)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for i := range b.parts {
		b.parts[i] = b.parts[i][:0]
	}
	b.n = 0
	return nil
}
