package store_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
)

// recordOf gives the pack and the offset of the record of the n-th chunk of a point's disk.
func (g *gcRepo) recordOf(r *store.Repo, p *store.Point, n int64) (pack string, off int64) {
	g.t.Helper()
	name, loc, err := r.Place(g.t.Context(), p, "disk0", n)
	if err != nil {
		g.t.Fatal(err)
	}
	return name, int64(loc.Off)
}

// damage flips a byte in the body of the n-th chunk of a point.
func (g *gcRepo) damage(r *store.Repo, p *store.Point, n int64) (undo func()) {
	g.t.Helper()
	pack, off := g.recordOf(r, p, n)
	flipByte(g.t, g.mem, pack, off+60)
	return func() { flipByte(g.t, g.mem, pack, off+60) }
}

func (g *gcRepo) verify(r *store.Repo, opt store.VerifyOptions) (rep store.VerifyReport, found []*store.DamageError) {
	g.t.Helper()
	opt.Damage = func(d *store.DamageError) { found = append(found, d) }
	rep, err := r.Verify(g.t.Context(), opt)
	if err != nil {
		g.t.Fatal(err)
	}
	return rep, found
}

// hit gives what is known to be damaged of points: "2 chunks of disk0 at 65536".
func (g *gcRepo) hit(r *store.Repo, points ...*store.Point) (all []string) {
	g.t.Helper()
	var list []store.Summary
	for _, p := range points {
		list = append(list, store.Summary{ID: p.ID})
	}
	list, err := r.WithDamage(g.t.Context(), list)
	if err != nil {
		g.t.Fatal(err)
	}
	for _, s := range list {
		text := ""
		for _, d := range s.Hit {
			text += fmt.Sprintf("%s at %d", d, d.Off)
		}
		all = append(all, text)
	}
	return all
}

func (g *gcRepo) wantHit(r *store.Repo, points []*store.Point, want ...string) {
	g.t.Helper()
	if got := g.hit(r, points...); !slices.Equal(got, want) {
		g.t.Errorf("damage known of the points: %q, want %q", got, want)
	}
}

// TestDamageRemembered: what a verification found is known to every process afterwards, also
// with an index made anew, until it is healed; and a healed chunk wins over its damaged copy.
func TestDamageRemembered(t *testing.T) {
	g := newGCRepo(t)
	r := g.open(g.mem)
	a, b := g.backup(r, "abcdef"), g.backup(r, "xyz")
	c := g.backup(r, "abcdef")
	points := []*store.Point{a, b, c}
	g.damage(r, a, 1)
	g.damage(r, a, 3)
	g.wantHit(r, points, "", "", "")
	if _, found := g.verify(r, store.VerifyOptions{ReadData: true}); len(found) != 4 {
		t.Fatalf("%v", found)
	}
	const two = "2 chunks of disk0 at 65536"
	g.wantHit(r, points, two, "", two)
	anew := g.open(g.mem)
	g.wantHit(anew, points, two, "", two)
	// Without reading a byte of them, these chunks are damage still.
	if _, found := g.verify(anew, store.VerifyOptions{}); len(found) != 4 || found[0].Off != 65536 || found[0].Point != a.Path() {
		t.Errorf("%v", found)
	}
	for _, n := range []int64{1, 3} {
		if _, loc, err := anew.Place(t.Context(), a, "disk0", n); err != nil || !loc.Suspect {
			t.Errorf("chunk %d: %+v, %v", n, loc, err)
		}
	}
	// One of the two is healed by a backup that has it.
	d := g.backup(anew, "bq")
	const one = "1 chunk of disk0 at 196608"
	for i := range 8 { // packs come in any order
		fresh := g.open(g.mem)
		if i == 0 {
			fresh = anew
		}
		g.wantHit(fresh, points, one, "", one)
		if err := sameDisk(fresh, d, lettered("bq")); err != nil {
			t.Fatalf("the damaged copy won: %v", err)
		}
	}
	g.backup(anew, "d")
	g.wantHit(anew, points, "", "", "")
	g.whole(anew, a, "abcdef")
	for range 8 {
		fresh := g.open(g.mem)
		g.whole(fresh, a, "abcdef")
		g.whole(fresh, c, "abcdef")
	}
	// The damaged records are dead now. A verification still tells, of no point.
	if _, found := g.verify(g.open(g.mem), store.VerifyOptions{ReadData: true}); len(found) != 2 || found[0].Point != "" {
		t.Errorf("%v", found)
	}
	if _, found := g.verify(g.open(g.mem), store.VerifyOptions{}); len(found) != 0 {
		t.Errorf("%v", found)
	}
}

// TestDamageForgotten: what is over is not told any more.
func TestDamageForgotten(t *testing.T) {
	g := newGCRepo(t)
	r := g.open(g.mem)
	a, b := g.backup(r, "abc"), g.backup(r, "xyz")
	points := []*store.Point{a, b}
	mend := g.damage(r, a, 0)
	mendOther := g.damage(r, b, 2)
	g.verify(r, store.VerifyOptions{ReadData: true})
	g.wantHit(r, points, "1 chunk of disk0 at 0", "1 chunk of disk0 at 131072")
	// Somebody put the right bytes back: only reading them tells.
	mend()
	g.verify(r, store.VerifyOptions{})
	g.wantHit(r, points, "1 chunk of disk0 at 0", "1 chunk of disk0 at 131072")
	if _, found := g.verify(r, store.VerifyOptions{ReadData: true, Points: []store.PointID{a.ID}}); len(found) != 0 {
		t.Errorf("%v", found)
	}
	g.wantHit(r, points, "", "1 chunk of disk0 at 131072")
	mendOther()
	if _, found := g.verify(r, store.VerifyOptions{ReadData: true}); len(found) != 0 {
		t.Errorf("%v", found)
	}
	g.wantHit(r, points, "", "")
	// A pack that is lost, and the point with it.
	pack, _ := g.recordOf(r, b, 0)
	if err := g.mem.Remove(t.Context(), pack); err != nil {
		t.Fatal(err)
	}
	g.verify(r, store.VerifyOptions{}) // which has the page in its index
	g.wantHit(r, points, "", "3 chunks of disk0 at 0")
	r = g.open(g.mem)
	g.wantHit(r, points, "", "3 chunks of disk0 at 0")
	g.verify(r, store.VerifyOptions{})
	g.wantHit(r, points, "", "1 map page of disk0 at 0")
	g.drop(r, b)
	g.verify(r, store.VerifyOptions{})
	if n := r.Remembered(t.Context()); n != 0 {
		t.Errorf("%d records are remembered", n)
	}
}

// TestVerifyStateLost: a state that is damaged or of a newer program costs only what it says.
func TestVerifyStateLost(t *testing.T) {
	t.Cleanup(store.CheapKeys())
	g := newGCRepo(t)
	r := g.open(g.mem)
	a := g.backup(r, "abc")
	g.damage(r, a, 1)
	g.verify(r, store.VerifyOptions{ReadData: true})
	raw := object(t, g.mem, "verify/state")
	for i := 0; i < len(raw); i++ {
		flipByte(t, g.mem, "verify/state", int64(i))
		var warned []string
		fresh, err := store.Open(t.Context(), g.mem, store.MemoryIndex(), store.OpenOptions{
			Passphrase: func() ([]byte, error) { return []byte("secret"), nil }, Warn: func(s string) { warned = append(warned, s) },
		})
		if err != nil {
			t.Fatalf("byte %d: %v", i, err)
		}
		if !slices.ContainsFunc(warned, func(s string) bool { return strings.Contains(s, "verify/state") }) {
			t.Errorf("byte %d: warnings %q", i, warned)
		}
		g.wantHit(fresh, []*store.Point{a}, "")
		fresh.Close()
		flipByte(t, g.mem, "verify/state", int64(i))
		if i > 56 { // the header
			i += 15
		}
	}
	g.wantHit(r, []*store.Point{a}, "1 chunk of disk0 at 65536")
	// Of a newer program it is not replaced.
	newer, err := store.NewerVerifyState(raw)
	if err != nil {
		t.Fatal(err)
	}
	putObject(t, g.mem, "verify/state", newer)
	if _, found := g.verify(r, store.VerifyOptions{ReadData: true}); len(found) != 1 {
		t.Errorf("%v", found)
	}
	if got := object(t, g.mem, "verify/state"); string(got) != string(newer) {
		t.Error("the state of a newer program was replaced")
	}
}

// meeting holds back who writes the state, so that others read the old one meanwhile if they may.
type meeting struct{ *bucket.Memory }

func (m meeting) Create(ctx context.Context, name string) (bucket.Writer, error) {
	if name == "verify/state" {
		time.Sleep(50 * time.Millisecond)
	}
	return m.Memory.Create(ctx, name)
}

// TestVerifiesAtOnce: neither of two verifications loses what the other one finds.
func TestVerifiesAtOnce(t *testing.T) {
	g := newGCRepo(t)
	r := g.open(g.mem)
	var points []*store.Point
	for _, letters := range []string{"ab", "cd", "ef", "gh"} {
		points = append(points, g.backup(r, letters))
		g.damage(r, points[len(points)-1], 1)
	}
	m := meeting{g.mem}
	var wg sync.WaitGroup
	for _, p := range points {
		other := g.open(m)
		wg.Go(func() {
			_, err := other.Verify(t.Context(), store.VerifyOptions{ReadData: true, Points: []store.PointID{p.ID}, Damage: func(*store.DamageError) {}})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	const one = "1 chunk of disk0 at 65536"
	g.wantHit(g.open(g.mem), points, one, one, one, one)
}

// refusing refuses to write.
type refusing struct{ bucket.Bucket }

func (refusing) Create(context.Context, string) (bucket.Writer, error) {
	return nil, bucket.ErrReadOnly
}

// TestVerifyReadOnly: who may not write verifies all the same.
func TestVerifyReadOnly(t *testing.T) {
	g := newGCRepo(t)
	r := g.open(g.mem)
	a := g.backup(r, "abc")
	g.damage(r, a, 1)
	var warned []string
	ro, err := store.Open(t.Context(), refusing{g.mem}, store.MemoryIndex(), store.OpenOptions{
		Passphrase: func() ([]byte, error) { return []byte("secret"), nil }, Warn: func(s string) { warned = append(warned, s) },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer ro.Close()
	if _, found := g.verify(ro, store.VerifyOptions{ReadData: true}); len(found) != 1 || len(warned) != 1 || !strings.Contains(warned[0], "cannot be remembered") {
		t.Errorf("%v, warnings %q", found, warned)
	}
	if _, err := g.mem.Open(t.Context(), "verify/state"); !errors.Is(err, store.ErrNotExist) {
		t.Error(err)
	}
}
