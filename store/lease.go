package store

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"

	"github.com/holdfast-backup/holdfast/store/bucket"
)

// LeaseKind says what its holder is doing.
type LeaseKind uint8

// Kinds of leases.
const (
	LeaseWriter LeaseKind = 1 // a draft: it may rely on any chunk that it has looked up
	LeaseReader LeaseKind = 2 // reads one point, also after it was forgotten
	LeaseGC     LeaseKind = 3 // a collection; there is one at a time
)

// Lease tells gc that somebody in some process uses the repository.
type Lease struct {
	ID   [16]byte // random, never used again
	Kind LeaseKind
	// FirstPack of a writer: packs with this number or a higher one may be its own.
	FirstPack uint32
	// Manifest of a reader: the manifest object of its point.
	Manifest []byte
}

// Leases is the list of leases of one repository, shared by all its processes.
// Safe for concurrent use. A lease ends when it is released and when its process
// ends, however that happens; it has no time limit.
type Leases interface {
	// Take adds a lease. When it has returned, every Live that begins sees it.
	Take(ctx context.Context, l Lease) (release func(), err error)
	// Live lists the leases that have not ended.
	Live(ctx context.Context) ([]Lease, error)
}

// MemoryLeases are the leases of a repository that only this process uses.
type MemoryLeases struct {
	mu   sync.Mutex // guards following
	live map[[16]byte]Lease
}

var _ Leases = (*MemoryLeases)(nil)

// Take implements Leases.
func (m *MemoryLeases) Take(ctx context.Context, l Lease) (func(), error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.live == nil {
		m.live = map[[16]byte]Lease{}
	}
	m.live[l.ID] = l
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.live, l.ID)
	}, nil
}

// Live implements Leases.
func (m *MemoryLeases) Live(ctx context.Context) ([]Lease, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	list := make([]Lease, 0, len(m.live))
	for _, l := range m.live {
		list = append(list, l)
	}
	return list, ctx.Err()
}

// lease takes a lease with a new id.
func (r *Repo) lease(ctx context.Context, l Lease) (id [16]byte, release func(), err error) {
	if _, err := rand.Read(l.ID[:]); err != nil {
		return id, nil, err
	}
	release, err = r.leases.Take(ctx, l)
	if err != nil {
		return id, nil, fmt.Errorf("store: lease: %w", err)
	}
	return l.ID, sync.OnceFunc(release), nil
}

// Hold keeps a point readable until release is called, even when it is forgotten
// meanwhile and its chunks are collected. ErrNotExist when it is gone already.
// Where nothing can be written it is read without that protection.
func (r *Repo) Hold(ctx context.Context, id PointID) (p *Point, release func(), err error) {
	raw, err := r.readManifest(ctx, id)
	if err != nil {
		return nil, nil, err
	}
	_, release, err = r.lease(ctx, Lease{Kind: LeaseReader, Manifest: raw})
	switch {
	case errors.Is(err, bucket.ErrReadOnly), errors.Is(err, bucket.ErrFull):
		release = func() {}
	case err != nil:
		return nil, nil, err
	}
	// Only now: whoever forgets the point after this and collects sees the lease.
	if p, err = r.readPoint(ctx, id); err != nil {
		release()
		return nil, nil, err
	}
	return p, release, nil
}
