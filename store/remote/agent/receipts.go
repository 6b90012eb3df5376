package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/holdfast-backup/holdfast/store"
)

// generationLen bounds the receipts that a client keeps: two generations of so many, about
// 100 bytes each. A chunk that is met again when its receipt is gone is sent again.
const generationLen = 1 << 17

// receipts are what a client can show for chunks. The younger generation has what was used
// since it began: what a backup has at work, some thousand chunks, is never lost. Safe for
// concurrent use.
type receipts struct {
	mu         sync.Mutex // guards following
	young, old map[store.ID]receipt
}

// receipt is that of a chunk, or is still to come.
type receipt struct {
	proof [receiptLen]byte
	put   *put // that brings it; nil when it is there
}

// put is a message with chunks on its way.
type put struct {
	ids  []store.ID
	done chan struct{} // closed when they have receipts or never will
}

func (r *receipts) init() { r.young = map[store.ID]receipt{} }

// set keeps a receipt. Callers hold r.mu.
func (r *receipts) set(id store.ID, e receipt) {
	if len(r.young) >= generationLen {
		r.old, r.young = r.young, map[store.ID]receipt{}
	}
	r.young[id] = e
}

// find gives a receipt and makes it young. Callers hold r.mu.
func (r *receipts) find(id store.ID) (receipt, bool) {
	if e, ok := r.young[id]; ok {
		return e, true
	}
	e, ok := r.old[id]
	if ok {
		r.set(id, e)
	}
	return e, ok
}

// add keeps the receipt of a chunk of the parent.
func (r *receipts) add(id store.ID, proof [receiptLen]byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.set(id, receipt{proof: proof})
}

// claim reports whether the chunk has to be sent, in p: nobody has or is about to.
func (r *receipts) claim(id store.ID, p *put) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.find(id); ok {
		return false
	}
	r.set(id, receipt{put: p})
	p.ids = append(p.ids, id)
	return true
}

// settle ends a put: with its receipts, or without any, so that others send its chunks.
func (r *receipts) settle(p *put, proofs []byte) {
	r.mu.Lock()
	for i, id := range p.ids {
		switch {
		case len(proofs) == receiptLen*len(p.ids):
			r.set(id, receipt{proof: [receiptLen]byte(proofs[i*receiptLen:])})
		default:
			delete(r.young, id)
			delete(r.old, id)
		}
	}
	r.mu.Unlock()
	close(p.done)
}

var errNoReceipt = errors.New("a chunk has no receipt")

// get waits for the receipt of a chunk.
func (r *receipts) get(ctx context.Context, id store.ID) ([receiptLen]byte, error) {
	for {
		r.mu.Lock()
		e, ok := r.find(id)
		r.mu.Unlock()
		switch {
		case !ok:
			return e.proof, fmt.Errorf("chunk %s: %w", id, errNoReceipt)
		case e.put == nil:
			return e.proof, nil
		}
		select {
		case <-e.put.done:
		case <-ctx.Done():
			return e.proof, ctx.Err()
		}
	}
}
