package backup_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
	"github.com/holdfast-backup/holdfast/test/reader"
)

// copyAll copies points and wants no error.
func copyAll(t *testing.T, from, to *store.Repo, points []store.Summary) (all []backup.Copied) {
	t.Helper()
	for res, err := range backup.Copy(t.Context(), from, to, points, backup.CopyOptions{}) {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, res)
	}
	return all
}

// pointsOf lists all points.
func pointsOf(t *testing.T, r *store.Repo) []store.Summary {
	t.Helper()
	list, err := r.Points(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return slices.Clone(list)
}

// objects is all that a bucket holds.
func objects(t *testing.T, b bucket.Bucket) map[string]string {
	t.Helper()
	all := map[string]string{}
	for info, err := range b.List(t.Context(), "") {
		if err != nil {
			t.Fatal(err)
		}
		all[info.Name] = string(object(t, b, info.Name))
	}
	return all
}

func object(t *testing.T, b bucket.Bucket, name string) []byte {
	t.Helper()
	o, err := b.Open(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	raw := make([]byte, o.Size())
	if _, err := o.ReadAt(raw, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	return raw
}

func replace(t *testing.T, b bucket.Bucket, name string, raw []byte) {
	t.Helper()
	w, err := b.Create(t.Context(), name)
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

// wantWhole wants that a verification of everything finds nothing.
func wantWhole(t *testing.T, r *store.Repo) {
	t.Helper()
	if _, err := r.Verify(t.Context(), store.VerifyOptions{ReadData: true, Damage: func(d *store.DamageError) { t.Error(d) }}); err != nil {
		t.Error(err)
	}
}

// wantRead has the independent reader read a bucket, and wants all its points to be
// copies with these disks.
func wantRead(t *testing.T, b bucket.Bucket, disks map[store.PointID]map[string][]byte) {
	t.Helper()
	fsys := fstest.MapFS{}
	for name, content := range objects(t, b) {
		fsys[name] = &fstest.MapFile{Data: []byte(content)}
	}
	r, err := reader.Open(fsys, reader.Options{Passphrase: "secret"})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(r.Damage...); err != nil {
		t.Error(err)
	}
	for _, p := range r.Points {
		var of struct {
			Origin store.Origin `json:"copied_from"`
		}
		if err := json.Unmarshal(p.JSON, &of); err != nil {
			t.Fatal(err)
		}
		want, ok := disks[of.Origin.Point]
		if !ok || len(p.Disks) != len(want) {
			t.Errorf("%s is a copy of %v and has %d disks", p.Name, of.Origin, len(p.Disks))
		}
		for _, d := range p.Disks {
			if got, err := r.Bytes(d); err != nil || !bytes.Equal(got, want[d.Name]) {
				t.Errorf("independent reader: %s %s: wrong bytes, or %v", p.Name, d.Name, err)
			}
		}
	}
}

// contentOf is what a disk or configuration file holds.
func contentOf(t *testing.T, img *store.Image, err error) []byte {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(io.NewSectionReader(img, 0, img.Size()))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// wantCopy wants that q of to is p of from in all that a copy keeps.
func wantCopy(t *testing.T, from, to *store.Repo, p, q *store.Point, disks map[string][]byte) {
	t.Helper()
	want, got := *p, *q
	if q.CopiedFrom == nil || *q.CopiedFrom != from.Origin(p) {
		t.Errorf("%s is a copy of %v", q.Path(), q.CopiedFrom)
	}
	for _, x := range []*store.Point{&want, &got} { // what is each repository's own
		x.ID, x.Parent, x.CopiedFrom = store.PointID{}, nil, nil
		x.Stats = store.Stats{Total: x.Stats.Total}
		x.Disks, x.Config = slices.Clone(x.Disks), slices.Clone(x.Config)
		for i := range x.Disks {
			x.Disks[i].Root, x.Disks[i].Stats = nil, store.Stats{}
		}
		for i := range x.Config {
			x.Config[i].Root = nil
		}
	}
	if !reflect.DeepEqual(want, got) {
		t.Errorf("copied %+v\ngot %+v", want, got)
	}
	for name, data := range disks {
		wantDisk(t, to, q, name, data)
	}
	for i, d := range q.Disks {
		img, err := to.OpenDisk(q, d.Name)
		if err != nil {
			t.Fatal(err)
		}
		if want := chunksOf(t, img); d.Stats.Data != want || d.Stats.Total != p.Disks[i].Size {
			t.Errorf("%s %s: %+v, its map has %d bytes", q.Path(), d.Name, d.Stats, want)
		}
	}
	for _, f := range p.Config {
		a, err := from.OpenConfig(p, f.Name)
		b, err2 := to.OpenConfig(q, f.Name)
		if !bytes.Equal(contentOf(t, a, err), contentOf(t, b, err2)) {
			t.Errorf("%s: config/%s differs", q.Path(), f.Name)
		}
	}
}

// chunksOf is the bytes in chunks that are no holes.
func chunksOf(t *testing.T, img *store.Image) (n int64) {
	t.Helper()
	cs := int64(img.ChunkSize())
	ids := make([]store.ID, (img.Size()+cs-1)/cs)
	if err := img.IDs(t.Context(), 0, ids); err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		if !id.IsZero() {
			n += cs
		}
	}
	return n
}

// history is a repository with points whose content is known.
type history struct {
	bucket bucket.Bucket
	repo   *store.Repo
	disks  map[store.PointID]map[string][]byte // point => disk => content
}

// newHistory backs up two VMs that change, grow and shrink.
func newHistory(t *testing.T, rnd *rand.Rand, opt store.InitOptions) *history {
	t.Helper()
	h := &history{disks: map[store.PointID]map[string][]byte{}}
	rounds, least, most := 8, 7<<20, 20<<20
	if testing.Short() {
		rounds, least, most = 5, 3<<20, 10<<20
	}
	h.bucket, h.repo = newRepo(t, opt)
	for _, vm := range []string{"db", "web"} {
		at := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
		snap := &memSnapshot{name: vm, disks: []*memDisk{
			{key: "a", data: make([]byte, least+513)}, {key: "b", data: make([]byte, 1+rnd.IntN(100_000))},
		}}
		for round := range rounds {
			if round != 3 { // two points of one second
				at = at.Add(time.Duration(1+rnd.IntN(5000)) * time.Second)
			}
			d := snap.disks[0]
			switch n := rnd.IntN(most); rnd.IntN(5) {
			case 0:
				d.data = append(d.data, make([]byte, n)...)
			case 1:
				d.data = d.data[:max(1, len(d.data)-n/2)]
			}
			mutate(rnd, d.data, rnd.IntN(10))
			snap.at, d.change = at, fmt.Sprint("change ", round)
			d.changed, d.lost = nil, true // read everything
			snap.config = []backup.ConfigFile{{Name: "vm.json", Data: fmt.Appendf(nil, "round %d", round/2)}, {Name: "empty"}}
			o := backup.Options{Tags: []string{"x", fmt.Sprint(round)}, Program: "test 1"}
			if round == 2 {
				o.LockFor = mustDuration(t, "30d")
			}
			p, err := backup.Run(t.Context(), h.repo, snap, o)
			if err != nil {
				t.Fatal(err)
			}
			h.disks[p.ID] = map[string][]byte{}
			for i, d := range snap.disks {
				h.disks[p.ID][fmt.Sprint("disk", i)] = bytes.Clone(d.data)
			}
		}
	}
	return h
}

func mustDuration(t *testing.T, s string) backup.Duration {
	t.Helper()
	d, err := backup.ParseDuration(s)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// TestCopy copies the points of random VMs between repositories of different chunk
// sizes and ciphers, some before the others, and compares everything; the same again then
// copies nothing and writes nothing, and a copy of the copies has the same origins.
func TestCopy(t *testing.T) {
	for i, c := range []struct {
		from, to           int // bytes
		fromPlain, toPlain bool
	}{
		{128 << 10, 128 << 10, false, false},
		{64 << 10, 1 << 20, false, true},
		{1 << 20, 64 << 10, true, false},
		{4 << 20, 64 << 10, false, false},
		{64 << 10, 128 << 10, true, true},
	} {
		t.Run(fmt.Sprintf("%d to %d, plain %v to %v", c.from>>10, c.to>>10, c.fromPlain, c.toPlain), func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(11, uint64(i)))
			h := newHistory(t, rnd, store.InitOptions{ChunkSize: c.from, NoEncryption: c.fromPlain})
			b, to := newRepo(t, store.InitOptions{ChunkSize: c.to, NoEncryption: c.toPlain})
			points := pointsOf(t, h.repo)
			some := slices.Clone(points)
			rnd.Shuffle(len(some), func(i, k int) { some[i], some[k] = some[k], some[i] })
			some = some[:len(some)/3]
			done := map[store.PointID]bool{}
			for _, res := range copyAll(t, h.repo, to, some) {
				done[res.From.ID] = !res.Skipped
			}
			if len(done) != len(some) {
				t.Errorf("%d of %d points were copied", len(done), len(some))
			}
			// Both from other processes, with indexes made anew.
			from := openRepo(t, h.bucket)
			to = openRepo(t, b)
			for _, res := range copyAll(t, from, to, append(points, points...)) {
				if res.Skipped != done[res.From.ID] {
					t.Errorf("%s: skipped %v", res.From.Path(), res.Skipped)
				}
				p, err := from.Point(t.Context(), res.From.ID)
				if err != nil {
					t.Fatal(err)
				}
				wantCopy(t, from, to, p, res.Point, h.disks[p.ID])
			}
			if n := len(pointsOf(t, to)); n != len(points) {
				t.Fatalf("%d points, want %d", n, len(points))
			}
			anew := openRepo(t, b)
			wantWhole(t, anew)
			wantRead(t, b, h.disks)
			before := objects(t, b)
			for _, res := range copyAll(t, from, anew, points) {
				if !res.Skipped {
					t.Errorf("%s was copied twice", res.From.Path())
				}
				wantDisk(t, anew, res.Point, "disk0", h.disks[res.From.ID]["disk0"])
			}
			if !reflect.DeepEqual(before, objects(t, b)) {
				t.Error("copying nothing wrote something")
			}
			// Back to where they come from, and on to a third.
			for _, res := range copyAll(t, anew, from, pointsOf(t, anew)) {
				if !res.Skipped || res.Point.CopiedFrom != nil {
					t.Errorf("%s came back", res.From.Path())
				}
			}
			_, third := newRepo(t, store.InitOptions{})
			copyAll(t, anew, third, pointsOf(t, anew))
			for _, res := range copyAll(t, from, third, points) {
				if !res.Skipped {
					t.Errorf("%s is not known by its origin", res.From.Path())
				}
			}
		})
	}
}

// TestCopySame: a repository is not copied to itself.
func TestCopySame(t *testing.T) {
	b, repo := newRepo(t, store.InitOptions{})
	for _, err := range backup.Copy(t.Context(), repo, openRepo(t, b), nil, backup.CopyOptions{}) {
		if !errors.Is(err, backup.ErrSameRepository) {
			t.Fatal(err)
		}
		return
	}
	t.Fatal("no error")
}

// counting counts what is read of packs.
type counting struct {
	bucket.Bucket
	bytes, reads atomic.Int64
}

func (c *counting) Open(ctx context.Context, name string) (bucket.Object, error) {
	o, err := c.Bucket.Open(ctx, name)
	if err != nil || !strings.HasPrefix(name, "packs/") {
		return o, err
	}
	return &countingObject{o, c}, nil
}

type countingObject struct {
	bucket.Object
	c *counting
}

func (o *countingObject) ReadAt(p []byte, off int64) (int, error) {
	n, err := o.Object.ReadAt(p, off)
	o.c.bytes.Add(int64(n))
	o.c.reads.Add(1)
	return n, err
}

// TestCopyIsProportional: of the second of two nearly equal points only what
// differs is read, whether or not the first was copied by the same run, and each
// chunk of the source once.
func TestCopyIsProportional(t *testing.T) {
	for _, c := range []struct{ from, to int }{{128 << 10, 128 << 10}, {64 << 10, 1 << 20}, {4 << 20, 64 << 10}} {
		t.Run(fmt.Sprint(c.from>>10, " to ", c.to>>10), func(t *testing.T) {
			b, repo := newRepo(t, store.InitOptions{ChunkSize: c.from})
			size := int64(64 << 20)
			if testing.Short() {
				size = 16 << 20
			}
			data := make([]byte, size)
			rnd := rand.NewChaCha8([32]byte{1})
			rnd.Read(data)
			d := &memDisk{key: "a", data: data}
			var last *store.Point
			for i := range 3 {
				data[size/2+1<<20+5]++
				snap := &memSnapshot{name: "vm", at: time.Unix(1e9+int64(i), 0), disks: []*memDisk{d}}
				var err error
				if last, err = backup.Run(t.Context(), repo, snap, backup.Options{}); err != nil {
					t.Fatal(err)
				}
			}
			cb := &counting{Bucket: b}
			from := openRepo(t, cb)
			_, to := newRepo(t, store.InitOptions{ChunkSize: c.to})
			points := pointsOf(t, from)
			cb.bytes.Store(0)
			var read [3]int64
			var packs [3]int64
			i := 0
			step := func(points []store.Summary) {
				for res, err := range backup.Copy(t.Context(), from, to, points, backup.CopyOptions{}) {
					if err != nil {
						t.Fatal(err)
					}
					read[i], packs[i] = res.Point.Stats.Read, cb.bytes.Swap(0)
					i++
				}
			}
			step(points[:2])
			step(points[2:])
			wide := int64(max(c.from, c.to))
			slack := int64(64 << 10) // pages
			if read[0] != size || packs[0] > size+size/20 {
				t.Errorf("the first copy read %d bytes of the disk, %d of packs", read[0], packs[0])
			}
			for k := 1; k < 3; k++ {
				if read[k] != wide || packs[k] > wide+slack || packs[k] == 0 {
					t.Errorf("copy %d read %d bytes of the disk, %d of packs, where %d differ", k+1, read[k], packs[k], wide)
				}
			}
			t.Logf("read of packs: %d, then %d and %d", packs[0], packs[1], packs[2])
			list := pointsOf(t, to)
			q, err := to.Point(t.Context(), list[2].ID)
			if err != nil {
				t.Fatal(err)
			}
			wantCopy(t, repo, to, last, q, map[string][]byte{"disk0": data})
		})
	}
}

// TestCopyDamage: a damaged chunk of the source, of a kind that only the content
// hash shows too, costs the points that use it, and no others.
func TestCopyDamage(t *testing.T) {
	for _, forged := range []bool{false, true} {
		t.Run(fmt.Sprint("forged ", forged), func(t *testing.T) {
			b, repo := newRepo(t, store.InitOptions{ChunkSize: 64 << 10, NoEncryption: true})
			own := 40 << 20 // where each point has a chunk of its own
			if testing.Short() {
				own = 6 << 20
			}
			d := &memDisk{key: "a", data: make([]byte, own+10<<20)}
			rand.NewChaCha8([32]byte{2}).Read(d.data)
			var wants [][]byte
			for i := range 4 {
				for k := range 64 << 10 {
					d.data[own+k] += byte(k%7 + 1)
				}
				snap := &memSnapshot{name: "vm", at: time.Unix(1e9+int64(i), 0), disks: []*memDisk{d}}
				if _, err := backup.Run(t.Context(), repo, snap, backup.Options{}); err != nil {
					t.Fatal(err)
				}
				wants = append(wants, bytes.Clone(d.data))
			}
			points := pointsOf(t, repo)
			damage(t, b, wants[1][own:own+64<<10], forged)
			from := openRepo(t, b)
			db, to := newRepo(t, store.InitOptions{})
			var failed, copied []string
			for res, err := range backup.Copy(t.Context(), from, to, points, backup.CopyOptions{}) {
				if err == nil {
					copied = append(copied, res.From.Path())
					continue
				}
				failed = append(failed, res.From.Path())
				if !errors.Is(err, store.ErrDamaged) || !strings.Contains(err.Error(), "copy "+points[1].Path()+": ") {
					t.Errorf("the error is %q", err)
				}
			}
			if len(copied) != 3 || len(failed) != 1 || failed[0] != points[1].Path() {
				t.Errorf("copied %q, not %q", copied, failed)
			}
			anew := openRepo(t, db)
			wantWhole(t, anew)
			for i, s := range pointsOf(t, anew) {
				q, err := anew.Point(t.Context(), s.ID)
				if err != nil {
					t.Fatal(err)
				}
				if i > 0 && q.Stats.Read > 1<<20 {
					t.Errorf("%s read %d bytes", q.Path(), q.Stats.Read)
				}
				wantDisk(t, anew, q, "disk0", wants[[]int{0, 2, 3}[i]])
			}
		})
	}
}

// damage changes the record of a chunk that was stored as it is; forged, with a
// right sum.
func damage(t *testing.T, b bucket.Bucket, chunk []byte, forged bool) {
	t.Helper()
	hit := 0
	for name, content := range objects(t, b) {
		at := strings.Index(content, string(chunk))
		if at < 0 || !strings.HasPrefix(name, "packs/") {
			continue
		}
		raw := []byte(content)
		raw[at+77] ^= 1
		if rec := raw[at-56 : at+len(chunk)]; forged {
			binary.LittleEndian.PutUint32(rec[4:], crc32.Checksum(rec[8:], crc32.MakeTable(crc32.Castagnoli)))
		}
		replace(t, b, name, raw)
		hit++
	}
	if hit != 1 {
		t.Fatalf("%d records were hit", hit)
	}
}

// TestCopyBadBase: a base that has lost something, at the destination or in the
// source, is done without.
func TestCopyBadBase(t *testing.T) {
	for _, lost := range []string{"destination", "destination with its index", "source"} {
		t.Run(lost, func(t *testing.T) {
			index := store.MemoryIndex()
			if lost == "destination with its index" { // which has the pages, and not the chunks
				index = store.LocalIndex(t.TempDir(), false)
			}
			open := func(b bucket.Bucket) *store.Repo {
				r, err := store.Open(t.Context(), b, index, store.OpenOptions{Passphrase: func() ([]byte, error) { return []byte("secret"), nil }})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { r.Close() })
				return r
			}
			b, repo := newRepo(t, store.InitOptions{ChunkSize: 64 << 10})
			d := &memDisk{key: "a", data: make([]byte, 20<<20)}
			rand.NewChaCha8([32]byte{3}).Read(d.data)
			db, _ := newRepo(t, store.InitOptions{ChunkSize: 64 << 10})
			to := open(db)
			for i := range 2 {
				snap := &memSnapshot{name: "vm", at: time.Unix(1e9+int64(i), 0), disks: []*memDisk{d}}
				if i == 1 { // every page is another, every chunk but one in a page the same
					for off := 0; off < len(d.data); off += 256 * 64 << 10 {
						d.data[off]++
					}
				}
				if _, err := backup.Run(t.Context(), repo, snap, backup.Options{}); err != nil {
					t.Fatal(err)
				}
				if i == 0 {
					copyAll(t, repo, to, pointsOf(t, repo))
				}
			}
			from, points := repo, pointsOf(t, repo)
			to.Close()
			if lost != "source" {
				for name := range objects(t, db) {
					if strings.HasPrefix(name, "packs/") {
						if err := db.Remove(t.Context(), name); err != nil {
							t.Fatal(err)
						}
					}
				}
			} else { // the pages of the first point only
				damagePages(t, b, repo, points[0], points[1])
				from = openRepo(t, b)
			}
			res := copyAll(t, from, open(db), points[1:])
			if res[0].Point.Stats.Read != 20<<20 {
				t.Errorf("the copy read %d bytes", res[0].Point.Stats.Read)
			}
			wantDisk(t, openRepo(t, db), res[0].Point, "disk0", d.data)
		})
	}
}

// damagePages changes a byte of the records of all pages of a that b does not use.
func damagePages(t *testing.T, m bucket.Bucket, repo *store.Repo, a, b store.Summary) {
	t.Helper()
	p, err := repo.Point(t.Context(), a.ID)
	if err != nil {
		t.Fatal(err)
	}
	other, err := repo.Point(t.Context(), b.ID)
	if err != nil || bytes.Equal(p.Disks[0].Root, other.Disks[0].Root) {
		t.Fatal("equal roots", err)
	}
	for name, content := range objects(t, m) {
		raw := []byte(content)
		for at := 0; strings.HasPrefix(name, "packs/"); at++ {
			i := bytes.Index(raw[at:], p.Disks[0].Root)
			if i < 0 {
				break
			}
			at += i
			if at >= 8 && string(raw[at-8:at-4]) == "HFCR" { // the record of the root page
				raw[at+60] ^= 1
				replace(t, m, name, raw)
				return
			}
		}
	}
	t.Fatal("no root page found")
}

// TestCopyCancelled: a cancelled copy ends with the context's error, and the next one
// finds its chunks.
func TestCopyCancelled(t *testing.T) {
	_, from := newRepo(t, store.InitOptions{})
	d := &memDisk{key: "a", data: make([]byte, 60<<20)}
	rand.NewChaCha8([32]byte{4}).Read(d.data)
	if _, err := backup.Run(t.Context(), from, &memSnapshot{name: "vm", at: time.Unix(1e9, 0), disks: []*memDisk{d}}, backup.Options{}); err != nil {
		t.Fatal(err)
	}
	db, to := newRepo(t, store.InitOptions{ChunkSize: 64 << 10})
	ctx, cancel := context.WithCancel(t.Context())
	var done atomic.Int64
	opt := backup.CopyOptions{Start: func(*store.Point, string, int64) backup.Meter {
		return backup.Meter{New: func(n int64) {
			if done.Add(n) > 8<<20 {
				cancel()
			}
		}}
	}}
	n := 0
	for _, err := range backup.Copy(ctx, from, to, pointsOf(t, from), opt) {
		if n++; !errors.Is(err, context.Canceled) {
			t.Fatalf("the copy ended with %v", err)
		}
	}
	if n != 1 || len(pointsOf(t, to)) != 0 {
		t.Fatalf("%d results, %d points", n, len(pointsOf(t, to)))
	}
	res := copyAll(t, from, to, pointsOf(t, from))
	if s := res[0].Point.Stats; s.New >= s.Data {
		t.Errorf("nothing of the cancelled copy was used: %+v", s)
	}
	wantDisk(t, openRepo(t, db), res[0].Point, "disk0", d.data)
}

// TestCopyCrash stops a copy of two points at every call to the destination's
// bucket, in every way; whatever is there then is right, and the same copy again, with an
// index made anew, completes it.
func TestCopyCrash(t *testing.T) {
	if testing.Short() {
		t.Skip("-short")
	}
	_, from := newRepo(t, store.InitOptions{ChunkSize: 64 << 10, NoEncryption: true})
	d := &memDisk{key: "a", data: make([]byte, 1<<20+9)}
	var wants [][]byte
	disks := map[store.PointID]map[string][]byte{}
	for i := range 2 {
		mutate(rand.New(rand.NewPCG(9, uint64(i))), d.data, 6)
		snap := &memSnapshot{name: "vm", at: time.Unix(1e9+int64(i), 0), disks: []*memDisk{d},
			config: []backup.ConfigFile{{Name: "at", Data: fmt.Append(nil, i)}}}
		p, err := backup.Run(t.Context(), from, snap, backup.Options{})
		if err != nil {
			t.Fatal(err)
		}
		disks[p.ID] = map[string][]byte{"disk0": bytes.Clone(d.data)}
		wants = append(wants, bytes.Clone(d.data))
	}
	points := pointsOf(t, from)
	empty := bucket.NewMemory()
	if err := store.Init(t.Context(), empty, store.InitOptions{ChunkSize: 128 << 10, NoEncryption: true}, time.Now()); err != nil {
		t.Fatal(err)
	}
	stops := 0
	for _, kind := range []bucket.Kind{bucket.Fail, bucket.Short, bucket.Gone, bucket.LostAck} {
		for n := int64(1); ; n++ {
			stops++
			where := fmt.Sprintf("kind %d at call %d", kind, n)
			left := empty.Crash()
			f := bucket.NewFaulty(left, bucket.At(n, bucket.Fault{Kind: kind}))
			done := 0
			if to, err := store.Open(t.Context(), f, store.MemoryIndex(), store.OpenOptions{}); err == nil {
				for _, err := range backup.Copy(t.Context(), from, to, points, backup.CopyOptions{}) {
					if err == nil {
						done++
					}
				}
				to.Close()
			}
			left = left.Crash()
			wantRead(t, left, disks)
			to := openRepo(t, left)
			found := pointsOf(t, to)
			if len(found) < done || len(found) > len(points) {
				t.Errorf("%s: %d points were copied, %d are there", where, done, len(found))
			}
			wantWhole(t, to)
			for i, res := range copyAll(t, from, to, points) {
				if res.Skipped != (i < len(found)) {
					t.Errorf("%s: point %d: skipped %v, though %d were there", where, i, res.Skipped, len(found))
				}
				wantDisk(t, to, res.Point, "disk0", wants[i])
			}
			wantRead(t, left.Crash(), disks)
			if n := len(pointsOf(t, to)); n != len(points) {
				t.Errorf("%s: %d points after the second copy", where, n)
			}
			to.Close()
			if t.Failed() {
				t.Fatal(where)
			}
			if f.Calls() < n {
				break
			}
		}
	}
	t.Logf("%d stop points", stops)
}
