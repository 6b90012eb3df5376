package store

import (
	"context"
	"math/rand/v2"
	"slices"
	"testing"
)

// TestLookupAscending compares looking up many ids at once with looking them up one by one.
func TestLookupAscending(t *testing.T) {
	x, err := openBadger("", [16]byte{1}, false)
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	ctx := context.Background()
	rnd := rand.NewChaCha8([32]byte{7})
	const packs, perPack = 40, 1000
	var all []ID
	var second PackID
	for n := range packs {
		var pack PackID
		rnd.Read(pack[:])
		if n == 1 {
			second = pack
		}
		recs := make([]PackRecord, perPack)
		for i := range recs {
			rnd.Read(recs[i].ID[:])
			recs[i].Off, recs[i].Len = uint32(80+100*i), uint32(40+i%7)
			all = append(all, recs[i].ID)
		}
		if err := x.AddPack(ctx, PackInfo{ID: pack, Size: 1 << 20}, recs); err != nil {
			t.Fatal(err)
		}
	}
	if done, err := x.Condemn(ctx, [16]byte{}, Condemned{Epoch: [16]byte{1}, Packs: []PackID{second}}); !done || err != nil {
		t.Fatal(done, err)
	}
	foreign := func(n int) (ids []ID) {
		ids = make([]ID, n)
		for i := range ids {
			rnd.Read(ids[i][:])
		}
		return ids
	}
	ends := []ID{{}, {0: 1}, {0: 0xff, 1: 0xff, 2: 0xff}, {0: 0xff, 1: 0xff, 2: 0xff, 3: 1}}
	for _, c := range []struct {
		name string
		ids  []ID
		scan bool
	}{
		{"all", all, true},
		{"all, twice, and others", slices.Concat(all, all[:5000], foreign(9000), ends), true},
		{"an eighth", all[:packs*perPack/8], true},
		{"a narrow range", narrow(all, 3), false},
		{"only others", foreign(scanFrom + 3), true},
		{"few of many", append(foreign(0), all[:scanFrom-1]...), false},
	} {
		ids := slices.Clone(c.ids)
		slices.SortFunc(ids, compareIDs)
		if scans := len(ids) >= scanFrom && x.gap(ids) <= maxGap; scans != c.scan {
			t.Errorf("%s: scans: %v", c.name, scans)
		}
		locs := make([]Loc, len(ids))
		for i := range locs {
			locs[i].Pack = 99 // to be overwritten
		}
		if err := x.Lookup(ctx, ids, locs); err != nil {
			t.Fatal(err)
		}
		known := 0
		for i := range ids {
			var want [1]Loc
			if err := x.Lookup(ctx, ids[i:i+1], want[:]); err != nil {
				t.Fatal(err)
			}
			if locs[i] != want[0] {
				t.Fatalf("%s: id %d of %d is at %+v, one by one at %+v", c.name, i, len(ids), locs[i], want[0])
			}
			if locs[i].Known() {
				known++
			}
		}
		t.Logf("%s: %d of %d are known", c.name, known, len(ids))
	}
}

// narrow gives the ids that begin with a byte.
func narrow(ids []ID, first byte) (list []ID) {
	for _, id := range ids {
		if id[0] == first {
			list = append(list, id)
		}
	}
	return list
}
