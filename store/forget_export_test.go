package store

import (
	"context"
	"time"
)

// DropLock takes the lock of a point out of the index, and leaves its manifest alone.
func (r *Repo) DropLock(ctx context.Context, id PointID) error {
	s, err := r.summaryOf(ctx, id)
	if err != nil {
		return err
	}
	s.LockedUntil = time.Time{}
	return r.putSummary(ctx, &s)
}
