package backup_test

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
)

// TestLostPacks: when packs are gone, the next backup of an unchanged disk stores
// again what they held, whatever the parent's map and the index still say: an index made
// anew, and one from before the loss.
func TestLostPacks(t *testing.T) {
	for name, index := range map[string]store.IndexOpener{
		"anew": store.MemoryIndex(), "kept": store.LocalIndex(t.TempDir(), false),
	} {
		t.Run(name, func(t *testing.T) {
			b := bucket.NewMemory()
			if err := store.Init(t.Context(), b, store.InitOptions{Passphrase: []byte("secret")}, time.Now()); err != nil {
				t.Fatal(err)
			}
			d := &memDisk{key: "a", data: make([]byte, 20<<20+5), change: "1"}
			mutate(rand.New(rand.NewPCG(5, 5)), d.data, 60)
			snap := &memSnapshot{name: "vm", at: time.Now(), disks: []*memDisk{d}}
			run := func() *store.Point {
				t.Helper()
				r, err := store.Open(t.Context(), b, index, store.OpenOptions{Passphrase: func() ([]byte, error) { return []byte("secret"), nil }})
				if err != nil {
					t.Fatal(err)
				}
				defer r.Close()
				p, err := backup.Run(t.Context(), r, snap, backup.Options{})
				if err != nil {
					t.Fatal(err)
				}
				return p
			}
			run()
			d.data[0]++ // a second pack, with the pages above the change
			run()
			var packs []string
			for info, err := range b.List(t.Context(), "packs/") {
				if err != nil {
					t.Fatal(err)
				}
				packs = append(packs, info.Name)
			}
			if len(packs) != 2 {
				t.Fatalf("%d packs", len(packs))
			}
			for _, lost := range packs {
				if err := b.Remove(t.Context(), lost); err != nil {
					t.Fatal(err)
				}
				p := run()
				wantDisk(t, openRepo(t, b), p, "disk0", d.data)
			}
		})
	}
}

// TestHealing: damage that a verification has found is healed by the next backup
// that still has the bytes, for old points too.
func TestHealing(t *testing.T) {
	b := bucket.NewMemory()
	if err := store.Init(t.Context(), b, store.InitOptions{Passphrase: []byte("secret")}, time.Now()); err != nil {
		t.Fatal(err)
	}
	repo := openRepo(t, b)
	d := &memDisk{key: "a", data: make([]byte, 5<<20+5)}
	mutate(rand.New(rand.NewPCG(6, 6)), d.data, 40)
	snap := &memSnapshot{name: "vm", at: time.Now(), disks: []*memDisk{d}}
	first, err := backup.Run(t.Context(), repo, snap, backup.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for info, err := range b.List(t.Context(), "packs/") {
		if err != nil {
			t.Fatal(err)
		}
		o, err := b.Open(t.Context(), info.Name)
		if err != nil {
			t.Fatal(err)
		}
		raw := make([]byte, o.Size())
		if n, err := o.ReadAt(raw, 0); n < len(raw) {
			t.Fatal(err)
		}
		for at := 1000; at < len(raw)*9/10; at += 50_000 { // chunks, and not the table
			raw[at] ^= 1
		}
		w, err := b.Create(t.Context(), info.Name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.WriteAt(raw, 0); err != nil {
			t.Fatal(err)
		}
		if err := w.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	verify := func() (found int) {
		t.Helper()
		if _, err := repo.Verify(t.Context(), store.VerifyOptions{ReadData: true, Damage: func(d *store.DamageError) {
			if d.Disk != "" {
				found++
			}
		}}); err != nil {
			t.Fatal(err)
		}
		return found
	}
	if verify() == 0 {
		t.Fatal("no damage found")
	}
	second, err := backup.Run(t.Context(), repo, snap, backup.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if n := verify(); n != 0 {
		t.Errorf("%d places are still damaged", n)
	}
	wantDisk(t, repo, first, "disk0", d.data)
	wantDisk(t, repo, second, "disk0", d.data)
}
