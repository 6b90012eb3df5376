package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/holdfast-backup/holdfast/store/bucket"
)

var (
	// ErrPinned: something needs the point; see Pin.
	ErrPinned = errors.New("point is in use")
	// ErrNotPinned: the repository cannot be written now.
	ErrNotPinned = errors.New("cannot be kept from being forgotten")
)

const pinKind = "pin"

// Pin says that something needs a point for longer than a process lives: a VM that was booted from it, whose disks are what it wrote over
// the point's. A pinned point is not forgotten.
type Pin struct {
	ID    string    `json:"id"` // unique in the repository
	Point PointID   `json:"point"`
	Since time.Time `json:"since"`
	// Of whom, for people; Home and Place for whoever is to find out whether that is still there.
	What    string `json:"what"` // such as a boot's name
	Host    string `json:"host"` // name of the computer
	Machine string `json:"machine,omitempty"`
	Home    string `json:"home"`
	Place   string `json:"place"`
}

// Pin keeps a point from being forgotten until Unpin. A pin of the same ID is replaced. ErrNotExist when the point is gone, ErrNotPinned when there is no room
// for a pin or nothing may be written.
func (r *Repo) Pin(ctx context.Context, p Pin) error {
	err := r.pin(ctx, p)
	if errors.Is(err, bucket.ErrReadOnly) || errors.Is(err, bucket.ErrFull) {
		return fmt.Errorf("%w: %w", ErrNotPinned, err)
	}
	return err
}

func (r *Repo) pin(ctx context.Context, p Pin) error {
	text, err := json.Marshal(p)
	if err != nil {
		return err
	}
	// Whoever forgets has looked at the pins before and is done, or sees this one.
	unlock, err := r.LockForget(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if err := r.makeRoom(ctx); err != nil {
		return err
	}
	if _, err := r.readManifest(ctx, p.Point); err != nil {
		return err
	}
	return r.SetNote(ctx, pinKind, p.ID, text)
}

// Pinned reports whether there is a pin of that ID.
func (r *Repo) Pinned(ctx context.Context, id string) (bool, error) {
	_, err := r.Note(ctx, pinKind, id)
	if errors.Is(err, ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// Unpin removes a pin, if it is there.
func (r *Repo) Unpin(ctx context.Context, id string) error { return r.dropNote(ctx, pinKind, id) }

// Pins gives all pins. ErrDamaged, beside the rest, when one cannot be read: nobody knows then which point it is of.
func (r *Repo) Pins(ctx context.Context) ([]Pin, error) {
	var list []Pin
	var bad []error
	for name, err := range bucket.Names(ctx, r.bucket, notePrefix+pinKind+"-") {
		if err != nil {
			return nil, fmt.Errorf("store: pins: %w", err)
		}
		_, data, err := r.openNote(ctx, name)
		if errors.Is(err, ErrNotExist) {
			continue // removed meanwhile
		}
		var p Pin
		if err == nil {
			if err = json.Unmarshal(data, &p); err != nil {
				err = &DamageError{What: name, Err: err}
			}
		}
		if err != nil {
			bad = append(bad, err)
			continue
		}
		list = append(list, p)
	}
	return list, errors.Join(bad...)
}

// nonePinned gives an error when one of the points is pinned.
func (r *Repo) nonePinned(ctx context.Context, ids []PointID) error {
	pins, err := r.Pins(ctx)
	if err != nil {
		return err
	}
	pinned := make(map[PointID]*Pin, len(pins))
	for i := range pins {
		pinned[pins[i].Point] = &pins[i]
	}
	for _, id := range ids {
		if p := pinned[id]; p != nil {
			return fmt.Errorf("%s: %w by %s on %s", id, ErrPinned, p.What, p.Host)
		}
	}
	return nil
}
