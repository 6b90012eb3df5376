package backup_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// memDisk is a disk in memory that tracks its changes by a counter.
type memDisk struct {
	key     string
	data    []byte
	change  string
	changed map[string][]extent.Extent // since => ranges
	lost    bool                       // Extents(since) reports lost tracking
	short   int64                      // when positive, reads end there
	bad     extent.Extent              // reads that touch it give err
	err     error
}

func (d *memDisk) Key() string      { return d.key }
func (d *memDisk) Size() int64      { return int64(len(d.data)) }
func (d *memDisk) ChangeID() string { return d.change }

func (d *memDisk) Verify() (string, error) { return "", nil }

func (d *memDisk) ReadAt(p []byte, off int64) (int, error) {
	if !extent.Intersect(d.bad, extent.Extent{Off: off, Len: int64(len(p))}).Empty() {
		return 0, d.err
	}
	if d.short > 0 && off+int64(len(p)) > d.short {
		return int(max(0, d.short-off)), io.EOF
	}
	return bytes.NewReader(d.data).ReadAt(p, off)
}

func (d *memDisk) Extents(_ context.Context, since string) iter.Seq2[extent.Extent, error] {
	if since == "" {
		return extent.All([]extent.Extent{{Len: d.Size()}})
	}
	es, ok := d.changed[since]
	if !ok || d.lost {
		return func(yield func(extent.Extent, error) bool) { yield(extent.Extent{}, backup.ErrChangesLost) }
	}
	return extent.All(es)
}

type memSnapshot struct {
	name   string
	at     time.Time
	disks  []*memDisk
	config []backup.ConfigFile
}

func (s *memSnapshot) VM() store.VM        { return store.VM{Name: s.name, Source: "test"} }
func (s *memSnapshot) Time() time.Time     { return s.at }
func (s *memSnapshot) Consistency() string { return "crash" }
func (s *memSnapshot) Close() error        { return nil }
func (s *memSnapshot) Config(context.Context) ([]backup.ConfigFile, error) {
	return s.config, nil
}
func (s *memSnapshot) Disks() (ds []backup.Disk) {
	for _, d := range s.disks {
		ds = append(ds, d)
	}
	return ds
}

func openRepo(t *testing.T, b bucket.Bucket) *store.Repo {
	t.Helper()
	r, err := store.Open(t.Context(), b, store.MemoryIndex(), store.OpenOptions{
		Passphrase: func() ([]byte, error) { return []byte("secret"), nil },
		Warn:       func(s string) { t.Log(s) },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func newRepo(t *testing.T, opt store.InitOptions) (bucket.Bucket, *store.Repo) {
	t.Helper()
	b := bucket.NewMemory()
	opt.Passphrase = []byte("secret")
	if err := store.Init(t.Context(), b, opt, time.Now()); err != nil {
		t.Fatal(err)
	}
	return b, openRepo(t, b)
}

func wantDisk(t *testing.T, r *store.Repo, p *store.Point, name string, want []byte) {
	t.Helper()
	img, err := r.OpenDisk(p, name)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want)+10)
	n, err := img.ReadAt(got, 0)
	if n != len(want) || err != io.EOF || !bytes.Equal(got[:n], want) {
		t.Fatalf("%s %s: %d bytes, %v; equal %v", p.Path(), name, n, err, bytes.Equal(got[:n], want))
	}
}

// mutate writes random data, zeros and repeats, and gives the ranges it touched.
func mutate(rnd *rand.Rand, data []byte, writes int) (touched []extent.Extent) {
	for range writes {
		off := rnd.IntN(len(data))
		n := min(len(data)-off, 1+rnd.IntN(300_000))
		switch rnd.IntN(4) {
		case 0:
			clear(data[off : off+n])
		case 1:
			copy(data[off:off+n], bytes.Repeat([]byte("holdfast"), n/8+1))
		default:
			for i := off; i < off+n; i++ {
				data[i] = byte(rnd.Uint32())
			}
		}
		touched = append(touched, extent.Extent{Off: int64(off), Len: int64(n)})
	}
	return extent.Normalise(touched)
}

// TestEveryPointReadsBack backs up a changing, resized two-disk VM many times,
// with and without change tracking, and reads every point back whole: from the
// repository that made it and from one opened anew over the bare packs and manifests.
func TestEveryPointReadsBack(t *testing.T) {
	for _, opt := range []store.InitOptions{{}, {ChunkSize: 64 << 10, NoEncryption: true}, {ChunkSize: 1 << 20}} {
		t.Run(fmt.Sprintf("chunk %d plain %v", opt.ChunkSize, opt.NoEncryption), func(t *testing.T) {
			if testing.Short() && opt.ChunkSize == 1<<20 {
				t.Skip("-short")
			}
			b, repo := newRepo(t, opt)
			rnd := rand.New(rand.NewPCG(3, 9))
			snap := &memSnapshot{name: "vm", at: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC), disks: []*memDisk{
				{key: "a", data: make([]byte, 9<<20+513)}, {key: "b", data: make([]byte, 1)},
			}}
			type kept struct {
				p     *store.Point
				disks [][]byte
			}
			var all []kept
			for round := range 12 {
				d := snap.disks[0]
				if round == 5 {
					d.data = append(d.data, make([]byte, 40<<20)...)
				}
				if round == 8 {
					d.data = d.data[:3<<20+7]
				}
				prev := d.change
				d.change = fmt.Sprint("change-", round)
				d.changed = map[string][]extent.Extent{prev: mutate(rnd, d.data, rnd.IntN(12))}
				d.lost = round == 3
				if round%3 == 1 {
					snap.disks[1].data = append(snap.disks[1].data, byte(round))
				}
				snap.config = []backup.ConfigFile{{Name: "vm.json", Data: fmt.Appendf(nil, "round %d", round)}, {Name: "empty"}}
				p, err := backup.Run(t.Context(), repo, snap, backup.Options{Tags: []string{"x"}})
				if err != nil {
					t.Fatal(err)
				}
				if round == 3 && len(p.Warnings) != 1 {
					t.Fatalf("lost tracking gave warnings %q", p.Warnings)
				}
				k := kept{p: p}
				for _, d := range snap.disks {
					k.disks = append(k.disks, bytes.Clone(d.data))
				}
				all = append(all, k)
			}
			anew := openRepo(t, b)
			list, err := anew.Points(t.Context())
			if err != nil || len(list) != len(all) {
				t.Fatalf("%d points, %v", len(list), err)
			}
			for i, k := range all {
				want := store.PointName(snap.at)
				if i > 0 {
					want = fmt.Sprintf("%s-%d", want, i+1)
				}
				if k.p.Name != want || list[i].Name != want {
					t.Errorf("point %d is called %s and %s, want %s", i, k.p.Name, list[i].Name, want)
				}
				for n, data := range k.disks {
					wantDisk(t, repo, k.p, fmt.Sprint("disk", n), data)
					p, err := anew.Point(t.Context(), k.p.ID)
					if err != nil {
						t.Fatal(err)
					}
					wantDisk(t, anew, p, fmt.Sprint("disk", n), data)
				}
				c, err := anew.OpenConfig(k.p, "vm.json")
				if err != nil {
					t.Fatal(err)
				}
				text, err := io.ReadAll(io.NewSectionReader(c, 0, c.Size()))
				if err != nil || string(text) != fmt.Sprintf("round %d", i) {
					t.Errorf("config of point %d: %q, %v", i, text, err)
				}
			}
		})
	}
}

// TestIncrementalIsProportional: with change tracking only what changed is read,
// and an unchanged disk stores nothing.
func TestIncrementalIsProportional(t *testing.T) {
	_, repo := newRepo(t, store.InitOptions{})
	d := &memDisk{key: "a", data: make([]byte, 64<<20), change: "1"}
	mutate(rand.New(rand.NewPCG(1, 1)), d.data, 300)
	d.data[5<<20] = 1
	snap := &memSnapshot{name: "vm", at: time.Now(), disks: []*memDisk{d}}
	first, err := backup.Run(t.Context(), repo, snap, backup.Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.data[5<<20] = 2
	d.change, d.changed = "2", map[string][]extent.Extent{"1": {{Off: 5 << 20, Len: 1}}}
	p, err := backup.Run(t.Context(), repo, snap, backup.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if p.Stats.Read != 128<<10 || p.Stats.New != 128<<10 || p.Disks[0].Read != "changes" || p.Stats.Data != first.Stats.Data {
		t.Errorf("one changed byte: %+v", p.Stats)
	}
	wantDisk(t, repo, p, "disk0", d.data)
	d.change = "" // tracking is off: everything is read, nothing is new
	if p, err = backup.Run(t.Context(), repo, snap, backup.Options{}); err != nil {
		t.Fatal(err)
	}
	if p.Stats.Read != int64(len(d.data)) || p.Stats.New != 0 || p.Stats.Stored != 0 {
		t.Errorf("unchanged disk: %+v", p.Stats)
	}
}

// TestShrinkingDisk: a disk that ends early gives an error and no point.
func TestShrinkingDisk(t *testing.T) {
	_, repo := newRepo(t, store.InitOptions{})
	d := &memDisk{key: "a", data: bytes.Repeat([]byte{7}, 3<<20), short: 2<<20 + 100}
	if _, err := backup.Run(t.Context(), repo, &memSnapshot{name: "vm", disks: []*memDisk{d}}, backup.Options{}); err == nil {
		t.Fatal("no error")
	}
	if list, err := repo.Points(t.Context()); err != nil || len(list) != 0 {
		t.Fatalf("%d points, %v", len(list), err)
	}
}

// TestOneBadRead: one read that fails, in the middle of a disk with far more jobs
// than are in flight, ends the run.
func TestOneBadRead(t *testing.T) {
	bad := errors.New("unreadable")
	for range 10 {
		_, repo := newRepo(t, store.InitOptions{})
		d := &memDisk{key: "a", data: bytes.Repeat([]byte{7}, 150<<20), bad: extent.Extent{Off: 60 << 20, Len: 1}, err: bad}
		if _, err := backup.Run(t.Context(), repo, &memSnapshot{name: "vm", disks: []*memDisk{d}}, backup.Options{}); !errors.Is(err, bad) {
			t.Fatal(err)
		}
	}
}

// TestFailureStaysAlone: runs that fail at any moment do not make later runs with
// the same open repository fail, nor leave them without a chunk.
func TestFailureStaysAlone(t *testing.T) {
	b, repo := newRepo(t, store.InitOptions{ChunkSize: 64 << 10})
	rnd := rand.New(rand.NewPCG(7, 7))
	rounds := 60
	if testing.Short() {
		rounds = 19
	}
	for i := range rounds {
		data := make([]byte, 3<<20)
		mutate(rnd, data, 30)
		bad := &memDisk{key: "a", data: data, short: 1 + rnd.Int64N(3<<20)}
		if _, err := backup.Run(t.Context(), repo, &memSnapshot{name: "bad", disks: []*memDisk{bad}}, backup.Options{}); err == nil {
			t.Fatal("no error")
		}
		if i%6 > 0 {
			continue
		}
		good := &memDisk{key: "a", data: data}
		p, err := backup.Run(t.Context(), repo, &memSnapshot{name: "good", disks: []*memDisk{good}}, backup.Options{})
		if err != nil {
			t.Fatal(err)
		}
		wantDisk(t, openRepo(t, b), p, "disk0", data)
	}
}

// TestCancelled: a cancelled run leaves no point, and the next one finds its chunks.
func TestCancelled(t *testing.T) {
	_, repo := newRepo(t, store.InitOptions{})
	d := &memDisk{key: "a", data: make([]byte, 32<<20)}
	mutate(rand.New(rand.NewPCG(4, 4)), d.data, 200)
	ctx, cancel := context.WithCancel(t.Context())
	snap := &memSnapshot{name: "vm", at: time.Now(), disks: []*memDisk{d}}
	var done atomic.Int64
	go func() {
		for done.Load() < 8<<20 {
			time.Sleep(time.Millisecond)
		}
		cancel()
	}()
	if _, err := backup.Run(ctx, repo, snap, backup.Options{Start: func(string, string, int64) backup.Meter {
		return backup.Meter{Done: func(n int64) { done.Add(n) }}
	}}); !errors.Is(err, context.Canceled) {
		t.Skipf("the run was quicker than the test: %v", err)
	}
	if list, _ := repo.Points(t.Context()); len(list) != 0 {
		t.Fatal("a cancelled run left a point")
	}
	p, err := backup.Run(t.Context(), repo, snap, backup.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if p.Stats.New >= p.Stats.Data {
		t.Errorf("nothing of the cancelled run was used: %+v", p.Stats)
	}
	wantDisk(t, repo, p, "disk0", d.data)
}
