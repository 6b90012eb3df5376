package store_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// TestChanged compares random chunk maps of one to three levels, of disks that grow
// and shrink, with a comparison of all their entries.
func TestChanged(t *testing.T) {
	t.Cleanup(store.CheapKeys())
	m := bucket.NewMemory()
	const cs = 64 << 10
	if err := store.Init(t.Context(), m, store.InitOptions{ChunkSize: cs, NoEncryption: true}, time.Now()); err != nil {
		t.Fatal(err)
	}
	repo, err := crashOpen(t.Context(), m, store.MemoryIndex())
	if err != nil {
		t.Fatal(err)
	}
	defer repo.Close()
	draft, err := repo.NewDraft(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer draft.Close()
	rnd := rand.New(rand.NewPCG(12, 12))
	var chunks map[int64]store.ID // of the last map
	var last *store.Image
	var root store.Root
	for round := range 150 {
		size := []int64{0, 1, cs, 3*cs + 7, 256 * cs, 256*cs + 1, 4000*cs + 5, 65536 * cs, 65536*cs + 9, 200_000 * cs}[rnd.IntN(10)]
		if rnd.IntN(3) > 0 && last != nil {
			size = last.Size()
		}
		count := (size + cs - 1) / cs
		next := map[int64]store.ID{}
		for i, id := range chunks {
			if i < count {
				next[i] = id
			}
		}
		touched := map[int64]bool{}
		for range rnd.IntN(8) * int(min(count, 1)) {
			at := rnd.Int64N(count)
			for i := at; i < min(count, at+1+rnd.Int64N(400)); i++ {
				touched[i] = true
				if delete(next, i); rnd.IntN(3) > 0 {
					next[i] = store.ID{byte(rnd.IntN(3) + 1), byte(i)}
				}
			}
		}
		b, err := draft.Map(t.Context(), root, size)
		if err != nil {
			t.Fatal(err)
		}
		order := make([]int64, 0, len(touched))
		for i := range touched {
			order = append(order, i)
		}
		slices.Sort(order)
		for _, i := range order {
			if err := b.Set(t.Context(), i, next[i]); err != nil {
				t.Fatal(err)
			}
		}
		if root, err = b.Finish(t.Context(), size); err != nil {
			t.Fatal(err)
		}
		img, err := repo.OpenMap(root)
		if err != nil {
			t.Fatal(err)
		}
		if last != nil {
			var want []extent.Extent
			for i := range count {
				if next[i] != chunks[i] {
					want = append(want, extent.Intersect(extent.Extent{Off: i * cs, Len: cs}, extent.Extent{Len: size}))
				}
			}
			want = extent.Normalise(want)
			var got []extent.Extent
			for e, err := range img.Changed(t.Context(), last) {
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, e)
			}
			if fmt.Sprint(got) != fmt.Sprint(want) {
				t.Fatalf("round %d, %d to %d bytes: %v, want %v", round, last.Size(), size, got, want)
			}
		}
		chunks, last = next, img
	}
}
