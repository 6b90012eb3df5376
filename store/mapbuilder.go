package store

import (
	"context"
	"fmt"
)

// pageSource gives decoded pages. pageSink stores a page and gives its id.
type (
	pageSource func(ctx context.Context, id ID, level uint8, p *page) error
	pageSink   func(ctx context.Context, p *page) (ID, error)
)

// MapBuilder makes the chunk map of a disk out of its parent's map and the
// changes, given in ascending order. Pages that no change touches are never
// read, and pages that come out as the parent had them are not written again:
// work and new metadata follow the changes, not the size of the disk.
// Not safe for concurrent use.
type MapBuilder struct {
	load   pageSource
	store  pageSink
	chunks int64 // of the new disk
	next   int64 // chunks before it are settled
	top    uint8 // level of the root page
	root   ID    // as the parent has it, or as finish made it
	done   func(context.Context) error
	path   []*buildPage // from the root page down to the one last touched
}

// buildPage is the page at one level on the path to the current chunk.
type buildPage struct {
	page
	first int64 // first chunk that it covers
	old   ID    // id as the parent had it; zero for a hole
	dirty bool
}

// newMapBuilder starts from parent; a zero Root means a disk of holes.
func newMapBuilder(ctx context.Context, parent Root, size int64, chunkSize int, load pageSource, store pageSink) (*MapBuilder, error) {
	b := &MapBuilder{load: load, store: store, chunks: chunkCount(size, chunkSize)}
	h := height(b.chunks)
	b.top = uint8(h - 1)
	parentChunks := chunkCount(parent.Size, chunkSize)
	root := parent.Page
	ph := height(parentChunks)
	var p page
	for ; ph > h && !root.IsZero(); ph-- { // the disk shrank: go down its left edge
		if err := load(ctx, root, uint8(ph-1), &p); err != nil {
			return nil, err
		}
		root = p.ids[0]
	}
	for ; ph < h && !root.IsZero(); ph++ { // the disk grew: put pages above it
		p = page{level: uint8(ph)}
		p.ids[0] = root
		var err error
		if root, err = store(ctx, &p); err != nil {
			return nil, err
		}
	}
	b.root = root
	if parentChunks > b.chunks && !root.IsZero() {
		// Entries past the new end must not survive in the last pages.
		trim := &MapBuilder{load: load, store: store, chunks: int64(span(b.top)) * PageEntries, top: b.top, root: root}
		if err := trim.Punch(ctx, b.chunks, trim.chunks); err != nil {
			return nil, err
		}
		r, err := trim.finish(ctx)
		if err != nil {
			return nil, err
		}
		b.root = r
	}
	return b, nil
}

// Set gives chunk i the id. i must not be below an earlier call's.
func (b *MapBuilder) Set(ctx context.Context, i int64, id ID) error {
	if err := b.advance(i, i+1); err != nil {
		return err
	}
	leaf, _, err := b.find(ctx, i, 0, true)
	if err != nil {
		return err
	}
	if e := &leaf.ids[i%PageEntries]; *e != id {
		*e, leaf.dirty = id, true
	}
	return nil
}

// Punch makes chunks [from, to) holes. from must not be below an earlier call's.
func (b *MapBuilder) Punch(ctx context.Context, from, to int64) error {
	if from >= to {
		return nil
	}
	if err := b.advance(from, to); err != nil {
		return err
	}
	for i := from; i < to; {
		// The highest level at which an entry begins at i and lies inside the range.
		level := uint8(0)
		for level < b.top && i%span(level+1) == 0 && i+span(level+1) <= to {
			level++
		}
		p, holeEnd, err := b.find(ctx, i, level, false)
		if err != nil {
			return err
		}
		if p == nil { // a hole already
			i = holeEnd
			continue
		}
		if e := &p.ids[(i/span(level))%PageEntries]; !e.IsZero() {
			*e, p.dirty = ID{}, true
		}
		i += span(level)
	}
	return nil
}

// Finish gives the finished chunk map. The builder must not be used afterwards.
func (b *MapBuilder) Finish(ctx context.Context, size int64) (Root, error) {
	id, err := b.finish(ctx)
	if err != nil {
		return Root{}, err
	}
	return Root{Page: id, Size: size}, b.Close(ctx)
}

// Close releases the builder; after Finish it does nothing.
func (b *MapBuilder) Close(ctx context.Context) error {
	done := b.done
	b.done = nil
	if done == nil {
		return nil
	}
	return done(ctx)
}

func (b *MapBuilder) finish(ctx context.Context) (ID, error) {
	for len(b.path) > 0 {
		if err := b.pop(ctx); err != nil {
			return ID{}, err
		}
	}
	return b.root, nil
}

// advance keeps the promise of ascending calls.
func (b *MapBuilder) advance(from, to int64) error {
	if from < b.next || to > b.chunks {
		return fmt.Errorf("store: chunks [%d,%d) %w: settled up to %d of %d", from, to, ErrOrder, b.next, b.chunks)
	}
	b.next = to
	return nil
}

// find gives the page of that level on the path to chunk i. Where the map has a
// hole on the way it makes empty pages, or, without create, gives nil and the
// chunk at which the hole ends.
func (b *MapBuilder) find(ctx context.Context, i int64, level uint8, create bool) (p *buildPage, holeEnd int64, err error) {
	for len(b.path) > 0 && !b.path[len(b.path)-1].covers(i, level) {
		if err := b.pop(ctx); err != nil {
			return nil, 0, err
		}
	}
	if len(b.path) == 0 {
		if b.root.IsZero() && !create {
			return nil, span(b.top) * PageEntries, nil
		}
		if err := b.push(ctx, b.root, b.top, 0); err != nil {
			return nil, 0, err
		}
	}
	for {
		p := b.path[len(b.path)-1]
		if p.level == level {
			return p, 0, nil
		}
		s := span(p.level)
		child := p.ids[(i/s)%PageEntries]
		if child.IsZero() && !create {
			return nil, (i/s + 1) * s, nil
		}
		if err := b.push(ctx, child, p.level-1, i/s*s); err != nil {
			return nil, 0, err
		}
	}
}

func (p *buildPage) covers(i int64, level uint8) bool {
	return p.level >= level && p.first <= i && i < p.first+span(p.level)*PageEntries
}

// push puts the page with that id, or an empty one for a hole, on the path.
func (b *MapBuilder) push(ctx context.Context, id ID, level uint8, first int64) error {
	p := &buildPage{first: first, old: id}
	p.level = level
	if !id.IsZero() {
		if err := b.load(ctx, id, level, &p.page); err != nil {
			return err
		}
	}
	b.path = append(b.path, p)
	return nil
}

// pop takes the lowest page off the path, stores it when it changed, and tells
// the page above.
func (b *MapBuilder) pop(ctx context.Context) error {
	p := b.path[len(b.path)-1]
	b.path = b.path[:len(b.path)-1]
	id := p.old
	switch {
	case !p.dirty:
	case p.empty():
		id = ID{}
	default:
		var err error
		if id, err = b.store(ctx, &p.page); err != nil {
			return err
		}
	}
	if len(b.path) == 0 {
		b.root = id
		return nil
	}
	if up := b.path[len(b.path)-1]; id != p.old {
		up.ids[(p.first/span(up.level))%PageEntries], up.dirty = id, true
	}
	return nil
}
