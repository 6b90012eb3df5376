package store

import (
	"context"
	"crypto/rand"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/holdfast-backup/holdfast/store/bucket"
)

const (
	packTarget  = 64 << 20 // bytes after which a pack is sealed
	packRecords = 1 << 16  // records after which a pack is sealed: its table stays under 3 MiB
	spaceEvery  = 8 << 20  // bytes of a pack after which the room on the medium is looked at
	maxUnsealed = 4        // packs being written or sealed at once; their chunks are remembered in memory
)

// packer writes records into packs. Many goroutines place records in the
// current pack at once; a full pack is sealed in the background while the next
// one fills. A chunk being written is claimed, so that it is stored once even
// when it is met twice before its pack is sealed.
type packer struct {
	repo   *Repo
	target uint32 // bytes after which a pack is sealed

	mu       sync.Mutex // guards following
	cond     *sync.Cond // an unsealed pack came to its end
	cur      *openPack
	unsealed map[*openPack]bool
	claimed  map[ID]bool            // chunks in unsealed packs
	placing  map[chan struct{}]bool // claims of which not all is placed; closed when it is
	drafts   int                    // that have begun and not ended
	err      error                  // the first failure; nothing can be committed after it, see recover
}

// openPack is a pack not yet visible.
type openPack struct {
	id      PackID
	w       bucket.Writer
	header  []byte
	box     box
	end     uint32 // bytes placed so far
	space   uint32 // end when the room was last looked at
	slots   uint32
	recs    []PackRecord
	writers sync.WaitGroup // records placed but not written yet
	done    chan struct{}  // closed when sealed or failed
}

func newPacker(r *Repo) *packer {
	p := &packer{repo: r, target: packTarget, unsealed: map[*openPack]bool{}, claimed: map[ID]bool{}, placing: map[chan struct{}]bool{}}
	p.cond = sync.NewCond(&p.mu)
	return p
}

// enter begins a draft; leave ends it, after a flush.
func (p *packer) enter() (leave func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.drafts++
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.drafts--
	}
}

// recover forgets a failure when no draft is left that may rely on what was lost.
func (p *packer) recover() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.drafts == 0 && p.cur == nil && len(p.unsealed) == 0 {
		p.err = nil
	}
}

// claim marks the ids that nobody is writing yet and reports them in mine. The
// caller places those, or fails, and then calls placed: until then no draft that met one
// of them can commit.
func (p *packer) claim(ids []ID, mine []bool) (placed func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	some := false
	for i, id := range ids {
		mine[i] = !p.claimed[id]
		p.claimed[id] = true
		some = some || mine[i]
	}
	if !some {
		return func() {}
	}
	done := make(chan struct{})
	p.placing[done] = true
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.placing, done)
		close(done)
	}
}

// place reserves room for a record with a body of n bytes as stored. The caller
// writes the record at the returned offset and then calls written.
func (p *packer) place(ctx context.Context, n int, r PackRecord) (pack *openPack, off, slot uint32, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	need := uint32(recordLen + n)
	if p.cur != nil && len(p.cur.recs) > 0 && (p.cur.end+need > p.target || len(p.cur.recs) >= packRecords) {
		p.rotate()
	}
	for p.cur == nil && p.err == nil && len(p.unsealed) >= maxUnsealed {
		p.cond.Wait()
	}
	if p.err != nil {
		return nil, 0, 0, p.err
	}
	if p.cur == nil {
		if err := p.start(ctx); err != nil {
			p.fail(err)
			return nil, 0, 0, err
		}
	}
	c := p.cur
	if c.end-c.space >= spaceEvery {
		if err := p.room(); err != nil {
			p.fail(err)
			return nil, 0, 0, err
		}
		c.space = c.end
	}
	off, slot = c.end, c.slots
	c.end += need
	c.slots++
	r.Off, r.Len = off, uint32(n)
	c.recs = append(c.recs, r)
	c.writers.Add(1)
	return c, off, slot, nil
}

// room fails when writing on would leave the index without the room it needs.
func (p *packer) room() error {
	s, ok := p.repo.bucket.(bucket.Spacer)
	if !ok {
		return nil
	}
	free, err := s.Free()
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	if free < MinFree {
		return fmt.Errorf("store: %w: %d MiB are free, %d are kept for the index", bucket.ErrFull, free>>20, MinFree>>20)
	}
	return nil
}

// write puts a finished record, header and body, in its place.
func (p *packer) write(c *openPack, off uint32, record []byte) error {
	defer c.writers.Done()
	if _, err := c.w.WriteAt(record, int64(off)); err != nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.fail(fmt.Errorf("store: write pack: %w", err))
		return p.err
	}
	return nil
}

// start opens a new pack. Callers hold p.mu.
func (p *packer) start(ctx context.Context) error {
	if err := p.room(); err != nil {
		return err
	}
	c := &openPack{done: make(chan struct{}), end: packHeaderLen, space: packHeaderLen}
	if _, err := rand.Read(c.id[:]); err != nil {
		return err
	}
	// The pack is everybody's: the draft that happens to begin it may be cancelled.
	w, err := p.repo.bucket.Create(context.WithoutCancel(ctx), packName(c.id))
	if err != nil {
		return fmt.Errorf("store: new pack: %w", err)
	}
	c.w, c.header, c.box = w, encodePackHeader(p.repo.id, c.id, p.repo.keys.sealed), p.repo.keys.box(ctxPack, c.id[:])
	if _, err := w.WriteAt(c.header, 0); err != nil {
		w.Abort()
		return fmt.Errorf("store: new pack: %w", err)
	}
	p.cur = c
	p.unsealed[c] = true
	return nil
}

// rotate hands the current pack to a goroutine that seals it. Callers hold p.mu.
func (p *packer) rotate() {
	c := p.cur
	p.cur = nil
	go func() {
		c.writers.Wait()
		err := p.seal(c)
		p.mu.Lock()
		defer p.mu.Unlock()
		if err != nil {
			p.fail(err)
		}
		for _, r := range c.recs {
			delete(p.claimed, r.ID)
		}
		delete(p.unsealed, c)
		close(c.done)
		p.cond.Broadcast()
	}()
}

// fail keeps the first error. Callers hold p.mu.
func (p *packer) fail(err error) {
	if p.err == nil {
		p.err = err
	}
	p.cond.Broadcast()
}

// seal makes a pack durable and visible and tells the index of it. It uses a
// context of its own: a cancelled run keeps what it has written for the next one.
func (p *packer) seal(c *openPack) error {
	p.mu.Lock()
	err := p.err
	p.mu.Unlock()
	if err != nil {
		c.w.Abort()
		return err
	}
	footer := encodeFooter(c.recs, c.header, c.end)
	if _, err := c.w.WriteAt(footer, int64(c.end)); err != nil {
		c.w.Abort()
		return fmt.Errorf("store: seal pack: %w", err)
	}
	if err := c.w.Commit(); err != nil {
		c.w.Abort()
		return fmt.Errorf("store: seal pack: %w", err)
	}
	info := PackInfo{ID: c.id, Size: int64(c.end) + int64(len(footer))}
	if err := p.repo.index.AddPack(context.Background(), info, c.recs); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	return nil
}

// flush seals what has been claimed so far and waits until it is durable.
func (p *packer) flush() error {
	p.mu.Lock()
	placing := slices.Collect(maps.Keys(p.placing))
	p.mu.Unlock()
	for _, done := range placing {
		<-done
	}
	p.mu.Lock()
	if p.cur != nil {
		p.rotate()
	}
	var waits []chan struct{}
	for c := range p.unsealed {
		waits = append(waits, c.done)
	}
	p.mu.Unlock()
	for _, done := range waits {
		<-done
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}
