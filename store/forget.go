package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/holdfast-backup/holdfast/store/bucket"
)

// ErrLockedPoint: the point is locked until a later time. Nothing here lifts or
// shortens a lock.
var ErrLockedPoint = errors.New("point is locked")

const forgetLockName = "forget.lock"

// LockForget keeps everybody else who calls it out until unlock is called: what one decides to
// keep, another must not forget before the decision is carried out. Where the medium has
// no room for a lock, there is none.
func (r *Repo) LockForget(ctx context.Context) (unlock func(), err error) {
	l, ok := r.bucket.(bucket.Locker)
	if !ok {
		return func() {}, nil
	}
	unlock, err = l.Lock(ctx, forgetLockName)
	if errors.Is(err, bucket.ErrFull) {
		return func() {}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("store: forget: %w", err)
	}
	return unlock, nil
}

// Forget removes points: the manifest durably, which is the end of the point, and
// then its line in the index. The chunks stay until they are collected, and whoever has a
// disk of the point open goes on reading. A point whose manifest is gone already is done.
//
// All manifests are looked at before the first is removed, since they alone say what is
// locked at now: with a locked one (ErrLockedPoint), or one that cannot be read (ErrDamaged: its lock is
// unknown), nothing is removed; nor with one that is pinned (ErrPinned). Between the call of LockForget and its end
// nobody pins a point. After any other error done has the points that are gone.
func (r *Repo) Forget(ctx context.Context, ids []PointID, now time.Time) (done []PointID, err error) {
	return r.forget(ctx, ids, now, false)
}

// ForgetDamaged is Forget, but removes points whose manifest is damaged, too, and pinned ones. Of
// a damaged point only the index may still know a lock, and that one counts.
func (r *Repo) ForgetDamaged(ctx context.Context, ids []PointID, now time.Time) (done []PointID, err error) {
	return r.forget(ctx, ids, now, true)
}

func (r *Repo) forget(ctx context.Context, ids []PointID, now time.Time, damaged bool) (done []PointID, err error) {
	if err := r.makeRoom(ctx); err != nil {
		return nil, err
	}
	list, err := r.Points(ctx)
	if err != nil {
		return nil, err
	}
	listed := make(map[PointID]*Summary, len(ids))
	for _, id := range ids {
		listed[id] = nil
	}
	for i := range list {
		if _, ok := listed[list[i].ID]; ok {
			listed[list[i].ID] = &list[i]
		}
	}
	if !damaged {
		if err := r.nonePinned(ctx, ids); err != nil {
			return nil, err
		}
	}
	for _, id := range ids {
		if err := r.mayForget(ctx, id, listed[id], now, damaged); err != nil {
			return nil, err
		}
	}
	for _, id := range ids {
		if err := r.bucket.Remove(ctx, pointObject(id)); err != nil && !errors.Is(err, ErrNotExist) {
			return done, fmt.Errorf("store: forget %s: %w", id, err)
		}
		done = append(done, id)
		if err := r.index.DropPoint(ctx, id); err != nil {
			return done, fmt.Errorf("store: %s is forgotten, but the index still shows it: %w", id, err)
		}
	}
	return done, nil
}

// mayForget looks at the lock of a point in its manifest. s is what the listing
// has, nil for nothing.
func (r *Repo) mayForget(ctx context.Context, id PointID, s *Summary, now time.Time, damaged bool) error {
	p, err := r.readPoint(ctx, id)
	switch {
	case errors.Is(err, ErrNotExist):
		return nil
	case damaged && errors.Is(err, ErrDamaged):
		if s != nil && s.LockedUntil.After(now) {
			return lockedError(s.Path(), s.LockedUntil)
		}
		return nil
	case err != nil:
		return err
	case !p.LockedUntil.After(now):
		return nil
	}
	if s != nil && !s.LockedUntil.Equal(p.LockedUntil) {
		// The summary is of a program that knew no locks. With a right one the point
		// is not chosen again.
		fresh := p.summary()
		if err := r.putSummary(ctx, &fresh); err != nil {
			return err
		}
	}
	return lockedError(p.Path(), p.LockedUntil)
}

func lockedError(path string, until time.Time) error {
	return fmt.Errorf("%s: %w until %s", path, ErrLockedPoint, until.UTC().Format(time.RFC3339))
}
