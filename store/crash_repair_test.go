package store_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
)

// repairScene is a scene with damaged packs. What of its points can be read is what they hold: all of
// it, but for those in lost.
type repairScene struct {
	*scene
	lost map[store.PointID]bool
}

// damagedScene makes points and damages the packs that they are in: tails and headers are lost, which
// costs nothing, and, with lose, a chunk of the first point.
func damagedScene(t *testing.T, plain, lose bool, points ...string) *repairScene {
	t.Helper()
	s := &repairScene{newScene(t, plain, points...), map[store.PointID]bool{}}
	ctx := t.Context()
	r, err := sceneRepo(ctx, s.mem, store.LocalIndex(s.index, false))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if lose {
		for id, vm := range s.live {
			if !vm.at.Equal(time.Unix(1e9, 0)) {
				continue
			}
			p, err := r.Point(ctx, id)
			if err != nil {
				t.Fatal(err)
			}
			pack, loc, err := r.Place(ctx, p, "disk0", 0)
			if err != nil {
				t.Fatal(err)
			}
			flipByte(t, s.mem, pack, int64(loc.Off)+60)
			s.lost[id] = true
		}
		if _, err := r.Verify(ctx, store.VerifyOptions{ReadData: true, Damage: func(*store.DamageError) {}}); err != nil {
			t.Fatal(err)
		}
		return s
	}
	for i, name := range packNames(t, s.mem) {
		b := bytes.Clone(object(t, s.mem, name))
		switch i % 3 {
		case 0:
			b = b[:len(b)-64-44]
		case 1:
			clear(b[:80])
		default:
			continue
		}
		putObject(t, s.mem, name, b)
	}
	return s
}

func packNames(t *testing.T, m *bucket.Memory) (names []string) {
	t.Helper()
	for info, err := range m.List(t.Context(), "packs/") {
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, info.Name)
	}
	slices.Sort(names)
	return names
}

// readable demands of the independent reader that every point that was whole, or could be read
// out of damaged packs, reads whole.
func (s *repairScene) readable(ctx context.Context, b *bucket.Memory, clean bool) error {
	r, err := readerOf(ctx, b)
	if err != nil {
		return err
	}
	if clean && len(r.Damage) > 0 {
		return fmt.Errorf("damage is left: %w", errors.Join(r.Damage...))
	}
	seen := map[string]bool{}
	for _, p := range r.Points {
		seen[p.ID] = true
		for id, vm := range s.live {
			if id.String() != p.ID || s.lost[id] {
				continue
			}
			if got, err := r.Bytes(p.Disks[0]); err != nil || !bytes.Equal(got, vm.data) {
				return fmt.Errorf("the point at %v reads wrong, or %w", vm.at, err)
			}
		}
	}
	for id, vm := range s.live {
		if !seen[id.String()] {
			return fmt.Errorf("the point at %v is gone", vm.at)
		}
	}
	for _, id := range s.gone {
		if seen[id.String()] {
			return fmt.Errorf("point %s is back", id)
		}
	}
	return nil
}

// sceneCheck looks at what a stop has left. done says that the run reported success.
type sceneCheck func(ctx context.Context, s *repairScene, r *store.Repo, done bool) error

// goesOn opens what a stop has left, looks at it, and finishes the work with again.
func (s *repairScene) goesOn(ctx context.Context, b *bucket.Memory, open store.IndexOpener, done bool, again func(*store.Repo) error, first sceneCheck) error {
	if err := s.readable(ctx, b, false); err != nil {
		return fmt.Errorf("independent reader: %w", err)
	}
	r, err := sceneRepo(ctx, b, open)
	if err != nil {
		return err
	}
	defer r.Close()
	if first != nil {
		if err := first(ctx, s, r, done); err != nil {
			return err
		}
	}
	look := func() error {
		for id, vm := range s.live {
			p, err := r.Point(ctx, id)
			if err != nil {
				return err
			}
			err = sameDisk(r, p, vm.data)
			if s.lost[id] {
				if err != nil && !errors.Is(err, store.ErrDamaged) {
					return err
				}
				continue
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
	if err := look(); err != nil {
		return err
	}
	if err := again(r); err != nil {
		return fmt.Errorf("again: %w", err)
	}
	if err := look(); err != nil {
		return fmt.Errorf("after that: %w", err)
	}
	if _, err := r.GC(ctx, store.GCOptions{MaxLive: 0.9, IgnoreMissing: true}); err != nil {
		return fmt.Errorf("gc: %w", err)
	}
	if err := look(); err != nil {
		return fmt.Errorf("after a gc: %w", err)
	}
	var damage error
	_, err = r.Verify(ctx, store.VerifyOptions{ReadData: true, Damage: func(d *store.DamageError) { damage = errors.Join(damage, d) }})
	if err != nil || damage != nil && len(s.lost) == 0 {
		return errors.Join(err, damage)
	}
	if err := s.readable(ctx, b.Crash(), true); err != nil {
		return fmt.Errorf("independent reader, at the end: %w", err)
	}
	return nil
}

// everywhere stops op everywhere and goes on with what is left.
func (s *repairScene) everywhere(t *testing.T, op, again func(*store.Repo) error, first sceneCheck) {
	t.Helper()
	s.everyStop(t, op, func(ctx context.Context, b *bucket.Memory, open store.IndexOpener, done bool) error {
		return s.goesOn(ctx, b, open, done, again, first)
	})
}

// TestCrashRepairPacks stops the repair of packs everywhere.
func TestCrashRepairPacks(t *testing.T) {
	if testing.Short() {
		t.Skip("-short")
	}
	t.Cleanup(store.CheapKeys())
	ctx := t.Context()
	op := func(r *store.Repo) error {
		_, err := r.RepairPacks(ctx, store.RepairPacksOptions{Damage: func(*store.DamageError) {}})
		return err
	}
	type crashCase struct {
		name  string
		scene *repairScene
		lost  int
	}
	cases := []crashCase{
		{"a chunk lost", damagedScene(t, false, true, "abc", "bcx"), 1},
		{"ends lost", damagedScene(t, false, false, "abcde", "XYZ", "cex"), 0},
		{"not encrypted", damagedScene(t, true, false, "abcde", "XYZ", "cex"), 0},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.scene.everywhere(t, op, func(r *store.Repo) error {
				var found []string
				rep, err := r.RepairPacks(ctx, store.RepairPacksOptions{Damage: func(d *store.DamageError) { found = append(found, d.Error()) }})
				if err != nil {
					return err
				}
				if rep.Lost != c.lost || rep.Kept > 0 {
					return fmt.Errorf("%+v\n%s", rep, strings.Join(found, "\n"))
				}
				return nil
			}, nil)
		})
	}
}
