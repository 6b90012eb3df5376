package store_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/holdfast-backup/holdfast/store"
)

// hurt takes a pack its header or its table, which costs nothing that it holds.
func (s *schedule) hurt(ctx context.Context) error {
	for info, err := range s.mem.List(ctx, "packs/") {
		if err != nil {
			return err
		}
		o, err := s.mem.Open(ctx, info.Name)
		if err != nil {
			return err
		}
		b := make([]byte, o.Size())
		if _, err := o.ReadAt(b, 0); err != nil && err != io.EOF {
			return err
		}
		if s.j.n(2) == 0 {
			clear(b[:80])
		} else {
			clear(b[len(b)-64:])
		}
		w, err := s.mem.Create(ctx, info.Name)
		if err != nil {
			return err
		}
		if _, err := w.WriteAt(b, 0); err != nil {
			return err
		}
		s.counts.Hurt++
		return w.Commit()
	}
	return nil
}

// repair repairs packs, which a gc may be in the way of.
func (s *schedule) repair(ctx context.Context, r *store.Repo, interrupt bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if interrupt {
		time.AfterFunc(time.Duration(s.j.n(3000))*time.Microsecond, cancel)
	}
	var lost error
	rep, err := r.RepairPacks(ctx, store.RepairPacksOptions{Damage: func(d *store.DamageError) {
		if d.Point != "" {
			lost = errors.Join(lost, d)
		}
	}})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts.Repaired += rep.Removed
	if errors.Is(err, store.ErrIndexAnew) || errors.Is(err, store.ErrLocked) || interrupt && errors.Is(err, context.Canceled) {
		err = nil
	}
	if err := errors.Join(err, lost); err != nil {
		return fmt.Errorf("repair: %w", err)
	}
	return nil
}
