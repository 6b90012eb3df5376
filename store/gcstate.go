package store

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/zeebo/blake3"

	"github.com/holdfast-backup/holdfast/store/bucket"
)

const (
	gcObject    = "gc/state"
	gcMagic     = "holdfast gc\n"
	maxGCState  = 64 << 20
	gcVersion   = 1
	gcSumLength = len(configSumLabel) + 2*32 + 1
)

// gcState is what a collection leaves for the next one, and for an index that is
// made anew; see doc.go, "gc/state".
type gcState struct {
	Version int        `json:"version"`
	Epoch   hexBytes   `json:"epoch"`           // 16 bytes, new whenever Packs changes
	Packs   []hexBytes `json:"packs,omitempty"` // condemned, in order
	// Waits are the leases of writers that began before the epoch, so that they may
	// rely on a condemned chunk; nil when that was not written down yet.
	Waits []hexBytes `json:"waits"`
}

// condemned is the part that an index has.
func (s *gcState) condemned() Condemned {
	var c Condemned
	copy(c.Epoch[:], s.Epoch)
	for _, p := range s.Packs {
		c.Packs = append(c.Packs, PackID(p))
	}
	return c
}

func (s *gcState) encode() ([]byte, error) {
	slices.SortFunc(s.Packs, func(a, b hexBytes) int { return bytes.Compare(a, b) })
	body, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	out := append([]byte(gcMagic), body...)
	return fmt.Appendf(out, "%s%x\n", configSumLabel, blake3.Sum256(out)), nil
}

// decodeGCState's errors match ErrDamaged or ErrNewerFormat.
func decodeGCState(b []byte) (*gcState, error) {
	at := len(b) - gcSumLength
	if at < len(gcMagic) || !bytes.HasPrefix(b, []byte(gcMagic)) || string(b[at:]) != fmt.Sprintf("%s%x\n", configSumLabel, blake3.Sum256(b[:at])) {
		return nil, &DamageError{What: gcObject, Err: errors.New("checksum")}
	}
	var s gcState
	if err := json.Unmarshal(b[len(gcMagic):at], &s); err != nil {
		return nil, &DamageError{What: gcObject, Err: err}
	}
	if s.Version > gcVersion {
		return nil, fmt.Errorf("%s: %w", gcObject, ErrNewerFormat)
	}
	bad := len(s.Epoch) != 16
	for _, p := range s.Packs {
		bad = bad || len(p) != 32
	}
	for _, w := range s.Waits {
		bad = bad || len(w) != 16
	}
	if bad {
		return nil, &DamageError{What: gcObject, Err: errors.New("fields")}
	}
	return &s, nil
}

// loadGCState reads the state; an empty one when nothing was ever collected. A
// damaged one is as good as empty, since what it would say is only what may
// go: sound is false then, and nothing may go before it is written again.
func (r *Repo) loadGCState(ctx context.Context) (s *gcState, sound bool, err error) {
	raw, err := readObject(ctx, r.bucket, gcObject, maxGCState)
	if errors.Is(err, bucket.ErrNotExist) {
		return &gcState{Version: gcVersion, Epoch: make([]byte, 16)}, true, nil
	}
	if err == nil {
		s, err = decodeGCState(raw)
	}
	if errors.Is(err, ErrDamaged) {
		r.warn(fmt.Sprintf("%v; the next gc begins again", err))
		return &gcState{Version: gcVersion, Epoch: make([]byte, 16)}, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("store: %w", err)
	}
	return s, true, nil
}

func (r *Repo) saveGCState(ctx context.Context, s *gcState) error {
	raw, err := s.encode()
	if err != nil {
		return err
	}
	if err := writeObject(ctx, r.bucket, gcObject, raw); err != nil {
		return fmt.Errorf("store: write %s: %w", gcObject, err)
	}
	return nil
}

// reconcileGC tells x which packs are condemned. It reports whether x had not
// heard of the last collection: then packs may be gone that it thinks are there.
func (r *Repo) reconcileGC(ctx context.Context, x Index) (stale bool, err error) {
	for {
		// In this order: should a gc publish something newer in between, Condemn refuses.
		epoch, err := x.Epoch(ctx)
		if err != nil {
			return false, err
		}
		s, _, err := r.loadGCState(ctx)
		if err != nil {
			return false, err
		}
		c := s.condemned()
		if epoch == c.Epoch {
			return false, nil
		}
		if done, err := x.Condemn(ctx, epoch, c); err != nil || done {
			return true, err
		}
	}
}
