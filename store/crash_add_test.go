package store_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
)

// TestCrashAdd stops a backup and a copy at every call to the bucket and at every
// commit to Badger. What was there before stays whole, what came is whole, and the same
// again makes the rest.
func TestCrashAdd(t *testing.T) {
	if testing.Short() {
		t.Skip("-short")
	}
	t.Cleanup(store.CheapKeys())
	ctx := t.Context()
	at := time.Unix(2e9, 0)
	run := func(r *store.Repo, vms []*mosaicVM) error {
		for _, vm := range vms {
			if _, err := backup.Run(ctx, r, vm, backup.Options{}); err != nil {
				return err
			}
		}
		return nil
	}
	vm := func(name, letters string) *mosaicVM { return &mosaicVM{name: name, at: at, data: lettered(letters)} }

	// The repository that is copied from has other chunks, so that pages and ids differ.
	source := bucket.NewMemory()
	if err := store.Init(ctx, source, store.InitOptions{ChunkSize: 2 * mosaicChunk, NoEncryption: true}, at); err != nil {
		t.Fatal(err)
	}
	from, err := store.Open(ctx, source, store.MemoryIndex(), store.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { from.Close() })
	copied := []*mosaicVM{vm("vm0", "abcx"), vm("vm7", "mnoxx")}
	if err := run(from, copied); err != nil {
		t.Fatal(err)
	}
	points, err := from.Points(ctx)
	if err != nil {
		t.Fatal(err)
	}

	cases := []struct {
		name  string
		scene *scene
		made  []*mosaicVM
		op    func(*store.Repo) error
	}{
		{name: "backup", scene: newScene(t, false, "abc", "abcd"), made: []*mosaicVM{vm("vm1", "axcde")}},
		{name: "copy", scene: newScene(t, false, "abc", "xyz"), made: copied, op: func(r *store.Repo) error {
			var all error
			for _, err := range backup.Copy(ctx, from, r, points, backup.CopyOptions{}) {
				all = errors.Join(all, err)
			}
			return all
		}},
		{name: "backup beside condemned packs", scene: condemned(t, false, "ABCDEFGH", "chx", "XYZ", "adx"), made: []*mosaicVM{vm("vm1", "abyzdx")}},
		{name: "first backup, not encrypted", scene: newScene(t, true), made: []*mosaicVM{vm("vm1", "abcd")}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.scene.made = c.made
			if c.op == nil {
				c.op = func(r *store.Repo) error { return run(r, c.made) }
			}
			again := *c.scene // without the point that is made again
			c.scene.everyStop(t, c.op, func(ctx context.Context, b *bucket.Memory, open store.IndexOpener, done bool) error {
				if err := c.scene.holds(ctx, b, done); err != nil {
					return err
				}
				r, err := sceneRepo(ctx, b, open)
				if err != nil {
					return err
				}
				err = c.op(r)
				if cerr := r.Close(); err == nil {
					err = cerr
				}
				if err != nil {
					return fmt.Errorf("again: %w", err)
				}
				if err := c.scene.holds(ctx, b.Crash(), true); err != nil {
					return fmt.Errorf("done again: %w", err)
				}
				return again.goesOn(ctx, b, open, true)
			})
		})
	}
}
