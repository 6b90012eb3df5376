package store

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// DiskDamage is what is known to be damaged of one disk of a point and not healed yet.
type DiskDamage struct {
	Disk   string    `json:"disk"`           // or config/NAME
	Chunks int       `json:"chunks"`         //
	Pages  int       `json:"pages"`          // of the chunk map: each stands for 256 chunks or more
	More   bool      `json:"more,omitempty"` // there are more than these
	Off    int64     `json:"offset"`         // of the first, bytes
	Found  time.Time `json:"found"`          // by the last verification that named it
}

// String says what is hit: "3 chunks of disk0".
func (d DiskDamage) String() string {
	count := func(n int, what string) string {
		if n == 1 {
			return "1 " + what
		}
		return fmt.Sprintf("%d %ss", n, what)
	}
	s := ""
	switch {
	case d.Pages == 0 && d.Chunks == 0:
		return "some chunks of " + d.Disk
	case d.Pages == 0:
		s = count(d.Chunks, "chunk")
	case d.Chunks == 0:
		s = count(d.Pages, "map page")
	default:
		s = count(d.Chunks, "chunk") + " and " + count(d.Pages, "map page")
	}
	if d.More {
		s += " or more"
	}
	return s + " of " + d.Disk
}

// WithDamage gives a copy of list in which Hit says what verifications have found of each
// point and nothing has healed since. It costs one small object and one look-up of what was found.
func (r *Repo) WithDamage(ctx context.Context, list []Summary) ([]Summary, error) {
	list = slices.Clone(list)
	hit, err := r.damageOf(ctx)
	if err != nil {
		return nil, err
	}
	for i := range list {
		list[i].Hit = hit[list[i].ID]
	}
	return list, nil
}

// damageOf gives the damage of all points.
func (r *Repo) damageOf(ctx context.Context) (map[PointID][]DiskDamage, error) {
	s, _, err := r.loadVerifyState(ctx)
	if err != nil || len(s.Touched) == 0 {
		return nil, err
	}
	open, _, err := r.unhealed(ctx, s)
	if err != nil {
		return nil, err
	}
	kinds := make(map[ID]uint8, len(s.Damage))
	for i := range s.Damage {
		kinds[s.Damage[i].ID] = s.Damage[i].Kind
	}
	hit := map[PointID][]DiskDamage{}
	for i := range s.Touched {
		t := &s.Touched[i]
		d := DiskDamage{Disk: t.Disk, More: t.More, Found: t.Found, Off: -1}
		for _, p := range t.Places {
			if !open[p.ID] {
				continue
			}
			if d.Off < 0 || p.Off < d.Off {
				d.Off = p.Off
			}
			if kinds[p.ID] == KindPage {
				d.Pages++
			} else {
				d.Chunks++
			}
		}
		if d.Off < 0 && !d.More {
			continue
		}
		d.Off = max(d.Off, 0)
		hit[t.Point] = append(hit[t.Point], d)
	}
	return hit, nil
}
