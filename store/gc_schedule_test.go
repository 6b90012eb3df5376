package store_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"os"
	"runtime"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// jitter delays calls at random, so that every run of a test has another schedule.
type jitter struct {
	mu  sync.Mutex
	rnd *rand.Rand
}

func (j *jitter) n(n int) int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.rnd.IntN(n)
}

func (j *jitter) pause() {
	switch k := j.n(16); {
	case k == 0:
		time.Sleep(time.Duration(j.n(300)) * time.Microsecond)
	case k < 8:
		runtime.Gosched()
	}
}

// slowBucket pauses before and after what changes or lists objects.
type slowBucket struct {
	bucket.Bucket
	j *jitter
}

func (b slowBucket) Create(ctx context.Context, name string) (bucket.Writer, error) {
	b.j.pause()
	w, err := b.Bucket.Create(ctx, name)
	if err != nil {
		return nil, err
	}
	return slowWriter{w, b.j}, nil
}

func (b slowBucket) Open(ctx context.Context, name string) (bucket.Object, error) {
	b.j.pause()
	return b.Bucket.Open(ctx, name)
}

func (b slowBucket) List(ctx context.Context, prefix string) iter.Seq2[bucket.Info, error] {
	b.j.pause()
	return func(yield func(bucket.Info, error) bool) {
		for i, err := range b.Bucket.List(ctx, prefix) {
			b.j.pause()
			if !yield(i, err) {
				return
			}
		}
	}
}

func (b slowBucket) Remove(ctx context.Context, name string) error {
	b.j.pause()
	defer b.j.pause()
	return b.Bucket.Remove(ctx, name)
}

type slowWriter struct {
	bucket.Writer
	j *jitter
}

func (w slowWriter) Commit() error {
	w.j.pause()
	defer w.j.pause()
	return w.Writer.Commit()
}

// sharedIndex is one index that several Repos use, as processes use that of the
// owner. It can be lost and made anew while they do.
type sharedIndex struct {
	j     *jitter
	check store.IndexCheck

	lost sync.RWMutex // held by every call, and alone while the index is made anew
	// guards following
	x store.Index
}

func (s *sharedIndex) call(fn func(store.Index) error) error {
	s.j.pause()
	s.lost.RLock()
	defer s.lost.RUnlock()
	return fn(s.x)
}

func called[T any](s *sharedIndex, fn func(store.Index) (T, error)) (v T, err error) {
	err = s.call(func(x store.Index) error { v, err = fn(x); return err })
	return v, err
}

func gathered[T any](s *sharedIndex, fn func(store.Index) iter.Seq2[T, error]) iter.Seq2[T, error] {
	list, err := called(s, func(x store.Index) (list []T, err error) {
		for v, err := range fn(x) {
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		return list, nil
	})
	return func(yield func(T, error) bool) {
		for _, v := range list {
			if !yield(v, nil) {
				return
			}
		}
		if err != nil {
			var none T
			yield(none, err)
		}
	}
}

func (s *sharedIndex) Close() error { return nil }
func (s *sharedIndex) Lookup(ctx context.Context, ids []store.ID, locs []store.Loc) error {
	return s.call(func(x store.Index) error { return x.Lookup(ctx, ids, locs) })
}
func (s *sharedIndex) AddPack(ctx context.Context, p store.PackInfo, recs []store.PackRecord) error {
	return s.call(func(x store.Index) error { return x.AddPack(ctx, p, recs) })
}
func (s *sharedIndex) Packs(ctx context.Context) iter.Seq2[store.NumberedPack, error] {
	return gathered(s, func(x store.Index) iter.Seq2[store.NumberedPack, error] { return x.Packs(ctx) })
}
func (s *sharedIndex) Pack(ctx context.Context, n uint32) (store.PackInfo, error) {
	return called(s, func(x store.Index) (store.PackInfo, error) { return x.Pack(ctx, n) })
}
func (s *sharedIndex) DropPack(ctx context.Context, p store.PackID, ids []store.ID) error {
	return s.call(func(x store.Index) error { return x.DropPack(ctx, p, ids) })
}
func (s *sharedIndex) Incarnation(ctx context.Context) (uint64, error) {
	return called(s, func(x store.Index) (uint64, error) { return x.Incarnation(ctx) })
}
func (s *sharedIndex) NextPack(ctx context.Context) (uint32, error) {
	return called(s, func(x store.Index) (uint32, error) { return x.NextPack(ctx) })
}
func (s *sharedIndex) Condemn(ctx context.Context, old [16]byte, c store.Condemned) (bool, error) {
	return called(s, func(x store.Index) (bool, error) { return x.Condemn(ctx, old, c) })
}
func (s *sharedIndex) Epoch(ctx context.Context) ([16]byte, error) {
	return called(s, func(x store.Index) ([16]byte, error) { return x.Epoch(ctx) })
}
func (s *sharedIndex) Suspect(ctx context.Context, ids []store.ID) error {
	return s.call(func(x store.Index) error { return x.Suspect(ctx, ids) })
}
func (s *sharedIndex) Whole(ctx context.Context) (bool, error) {
	return called(s, func(x store.Index) (bool, error) { return x.Whole(ctx) })
}
func (s *sharedIndex) SetWhole(ctx context.Context) error {
	return s.call(func(x store.Index) error { return x.SetWhole(ctx) })
}
func (s *sharedIndex) Page(ctx context.Context, id store.ID) ([]byte, error) {
	return called(s, func(x store.Index) ([]byte, error) { return x.Page(ctx, id) })
}
func (s *sharedIndex) PutPages(ctx context.Context, ids []store.ID, pages [][]byte) error {
	return s.call(func(x store.Index) error { return x.PutPages(ctx, ids, pages) })
}
func (s *sharedIndex) PageIDs(ctx context.Context, after store.ID) iter.Seq2[store.ID, error] {
	return gathered(s, func(x store.Index) iter.Seq2[store.ID, error] { return x.PageIDs(ctx, after) })
}
func (s *sharedIndex) DropPages(ctx context.Context, ids []store.ID) error {
	return s.call(func(x store.Index) error { return x.DropPages(ctx, ids) })
}
func (s *sharedIndex) Points(ctx context.Context, after store.PointID) iter.Seq2[store.SealedPoint, error] {
	return gathered(s, func(x store.Index) iter.Seq2[store.SealedPoint, error] { return x.Points(ctx, after) })
}
func (s *sharedIndex) PutPoint(ctx context.Context, p store.SealedPoint) error {
	return s.call(func(x store.Index) error { return x.PutPoint(ctx, p) })
}
func (s *sharedIndex) DropPoint(ctx context.Context, id store.PointID) error {
	return s.call(func(x store.Index) error { return x.DropPoint(ctx, id) })
}
func (s *sharedIndex) Generation(ctx context.Context) (uint64, error) {
	return called(s, func(x store.Index) (uint64, error) { return x.Generation(ctx) })
}
func (s *sharedIndex) Changes(ctx context.Context, since uint64) (store.Changes, error) {
	return called(s, func(x store.Index) (store.Changes, error) { return x.Changes(ctx, since) })
}
func (s *sharedIndex) Reserve(ctx context.Context, name string) (int, error) {
	return called(s, func(x store.Index) (int, error) { return x.Reserve(ctx, name) })
}

// mosaicVM is a VM whose disk is made of chunks out of a small set.
type mosaicVM struct {
	name string
	at   time.Time
	data []byte
}

func (m *mosaicVM) VM() store.VM                                        { return store.VM{Name: m.name, Source: "test"} }
func (m *mosaicVM) Time() time.Time                                     { return m.at }
func (m *mosaicVM) Consistency() string                                 { return "crash" }
func (m *mosaicVM) Close() error                                        { return nil }
func (m *mosaicVM) Config(context.Context) ([]backup.ConfigFile, error) { return nil, nil }
func (m *mosaicVM) Disks() []backup.Disk                                { return []backup.Disk{mosaicDisk{bytes.NewReader(m.data)}} }

type mosaicDisk struct{ *bytes.Reader }

func (d mosaicDisk) Key() string             { return "sda" }
func (d mosaicDisk) ChangeID() string        { return "" }
func (d mosaicDisk) Verify() (string, error) { return "", nil }
func (d mosaicDisk) Extents(context.Context, string) iter.Seq2[extent.Extent, error] {
	return extent.All([]extent.Extent{{Len: d.Size()}})
}

const mosaicChunk = 64 << 10

// mosaic gives a disk of n chunks, each one of colours.
func mosaic(j *jitter, n, colours int) []byte {
	data := make([]byte, n*mosaicChunk)
	for i := range n {
		c := j.n(colours)
		for k := 0; k < mosaicChunk; k += 4096 {
			copy(data[i*mosaicChunk+k:], "colour "+strconv.Itoa(c))
		}
	}
	return data
}

// TestGCSchedules runs backups of overlapping data in three Repos, as in three
// processes, beside collections, removals of points and a reader, many times with another
// schedule. The index may be lost on the way and collections may be interrupted. At the
// end every point that was committed and not removed reads back whole.
func TestGCSchedules(t *testing.T) {
	t.Cleanup(store.CheapKeys())
	n := 200
	if testing.Short() {
		n = 40
	}
	if s := os.Getenv("HOLDFAST_TEST_SCHEDULES"); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("HOLDFAST_TEST_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
		n = 1
	}
	var sum scheduleCounts
	for i := range n {
		s := &schedule{t: t, seed: seed + uint64(i), j: &jitter{rnd: rand.New(rand.NewPCG(seed+uint64(i), 1))}}
		if err := s.run(t.Context()); err != nil {
			t.Fatalf("HOLDFAST_TEST_SEED=%d: %v", s.seed, err)
		}
		sum.add(s.counts)
	}
	t.Logf("%d schedules: %+v", n, sum)
	if sum.Hurt == 0 || sum.Repaired == 0 || sum.Removed == 0 || sum.Copied == 0 || sum.Lost == 0 || sum.Waited == 0 || sum.Dropped == 0 || sum.Cancelled == 0 {
		t.Errorf("something was never exercised: %+v", sum)
	}
}

// scheduleCounts say what the schedules did.
type scheduleCounts struct {
	Points, Dropped, Collections, Removed, Waited, Cancelled, Lost, Reads int
	Hurt, Repaired                                                        int // packs
	Copied                                                                int64
}

func (c *scheduleCounts) add(o scheduleCounts) {
	c.Points += o.Points
	c.Dropped += o.Dropped
	c.Collections += o.Collections
	c.Removed += o.Removed
	c.Waited += o.Waited
	c.Cancelled += o.Cancelled
	c.Lost += o.Lost
	c.Reads += o.Reads
	c.Copied += o.Copied
	c.Hurt += o.Hurt
	c.Repaired += o.Repaired
}

type schedule struct {
	t      *testing.T
	seed   uint64
	j      *jitter
	mem    *bucket.Memory
	repos  []*store.Repo
	shared *sharedIndex
	id     [16]byte

	mu     sync.Mutex // guards following
	counts scheduleCounts
	alive  map[store.PointID]*mosaicVM // committed and not dropped
	clock  time.Time
}

func (s *schedule) run(ctx context.Context) (err error) {
	s.mem, s.alive, s.clock = bucket.NewMemory(), map[store.PointID]*mosaicVM{}, time.Unix(1e9, 0)
	if err := store.Init(ctx, s.mem, store.InitOptions{ChunkSize: mosaicChunk, NoEncryption: s.seed%2 == 0, Passphrase: []byte("secret")}, s.clock); err != nil {
		return err
	}
	defer func() {
		if s.shared != nil { // after the Repos, which share it
			err = errors.Join(err, s.shared.x.Close())
		}
	}()
	leases := &store.MemoryLeases{}
	for range 4 {
		r, err := store.Open(ctx, slowBucket{s.mem, s.j}, s.open, store.OpenOptions{
			Passphrase: func() ([]byte, error) { return []byte("secret"), nil },
			ChunkCache: 1 << 20, PageCache: 1 << 20, Leases: leases,
		})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, r.Close()) }()
		r.SetPackSize(1500)
		s.repos = append(s.repos, r)
	}
	// Something to begin with, part of it dead.
	for range 3 {
		if err := s.backup(ctx, s.repos[0], "vm0"); err != nil {
			return err
		}
	}
	if err := s.drop(ctx, s.repos[0]); err != nil {
		return err
	}
	if s.j.n(2) == 0 {
		if err := s.hurt(ctx); err != nil {
			return err
		}
	}
	var wg sync.WaitGroup
	errs := make(chan error, 16)
	work := func(fn func() error) {
		wg.Go(func() {
			if err := fn(); err != nil {
				errs <- err
			}
		})
	}
	for w := range 3 {
		work(func() error {
			for range 2 + s.j.n(2) {
				vm := fmt.Sprintf("vm%d", w)
				if s.j.n(4) == 0 {
					vm = "vm0" // two backups of one VM at a time
				}
				if err := s.backup(ctx, s.repos[w], vm); err != nil {
					return err
				}
			}
			return nil
		})
	}
	work(func() error {
		for range 3 {
			if err := s.collect(ctx, s.repos[3], s.j.n(4) == 0); err != nil {
				return err
			}
		}
		return nil
	})
	work(func() error {
		for range 3 {
			time.Sleep(time.Duration(s.j.n(2000)) * time.Microsecond)
			if err := s.drop(ctx, s.repos[s.j.n(4)]); err != nil {
				return err
			}
		}
		return nil
	})
	work(func() error {
		for range 3 {
			if err := s.read(ctx, s.repos[s.j.n(4)]); err != nil {
				return err
			}
		}
		return nil
	})
	work(func() error {
		for range 2 {
			// What a point that goes meanwhile lacks, or a pack that is collected, is no damage.
			var damage error
			_, err := s.repos[s.j.n(4)].Verify(ctx, store.VerifyOptions{ReadData: true, Damage: func(d *store.DamageError) {
				if d.Point != "" || s.counts.Hurt == 0 {
					damage = errors.Join(damage, d)
				}
			}})
			if errors.Is(err, store.ErrIndexAnew) {
				err = nil
			}
			if err := errors.Join(err, damage); err != nil {
				return fmt.Errorf("verify: %w", err)
			}
		}
		return nil
	})
	if s.counts.Hurt > 0 {
		work(func() error {
			for range 2 {
				time.Sleep(time.Duration(s.j.n(3000)) * time.Microsecond)
				if err := s.repair(ctx, s.repos[s.j.n(4)], s.j.n(3) == 0); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if s.j.n(3) == 0 {
		work(func() error {
			time.Sleep(time.Duration(s.j.n(4000)) * time.Microsecond)
			return s.loseIndex(ctx)
		})
	}
	wg.Wait()
	close(errs)
	for e := range errs {
		err = errors.Join(err, e)
	}
	if err != nil {
		return err
	}
	if s.counts.Hurt > 0 {
		if err := s.repair(ctx, s.repos[1], false); err != nil {
			return fmt.Errorf("at the end: %w", err)
		}
	}
	if err := s.check(ctx); err != nil {
		return fmt.Errorf("at the end: %w", err)
	}
	// Nobody is at work now: one more collection leaves only what is needed.
	if err := s.collect(ctx, s.repos[0], false); err != nil {
		return err
	}
	if err := s.check(ctx); err != nil {
		return fmt.Errorf("after the last collection: %w", err)
	}
	return s.minimal(ctx)
}

// open gives all Repos the same index; the first one checks it.
func (s *schedule) open(ctx context.Context, id [16]byte, check store.IndexCheck) (store.Index, error) {
	if s.shared == nil {
		x, err := store.MemoryIndex()(ctx, id, check)
		if err != nil {
			return nil, err
		}
		s.id = id
		s.shared = &sharedIndex{x: x, j: s.j, check: check}
	}
	return s.shared, nil
}

// loseIndex makes the index anew from packs, manifests and the state of gc.
func (s *schedule) loseIndex(ctx context.Context) error {
	s.shared.lost.Lock()
	defer s.shared.lost.Unlock()
	x, err := store.MemoryIndex()(ctx, s.id, s.shared.check)
	if err != nil {
		return fmt.Errorf("index made anew: %w", err)
	}
	old := s.shared.x
	s.shared.x = x
	if err := old.Close(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts.Lost++
	return nil
}

func (s *schedule) backup(ctx context.Context, r *store.Repo, vm string) error {
	s.mu.Lock()
	s.clock = s.clock.Add(time.Second)
	m := &mosaicVM{name: vm, at: s.clock}
	s.mu.Unlock()
	m.data = mosaic(s.j, 3+s.j.n(4), 10)
	p, err := backup.Run(ctx, r, m, backup.Options{})
	if err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts.Points++
	s.alive[p.ID] = m
	return nil
}

// drop removes one point, any one.
func (s *schedule) drop(ctx context.Context, r *store.Repo) error {
	s.mu.Lock()
	var id store.PointID
	for id = range s.alive {
		break
	}
	_, ok := s.alive[id]
	delete(s.alive, id)
	s.mu.Unlock()
	if !ok {
		return nil
	}
	return s.dropNow(ctx, r, id)
}

// dropThis removes a point unless somebody else has.
func (s *schedule) dropThis(ctx context.Context, r *store.Repo, id store.PointID) error {
	s.mu.Lock()
	_, ok := s.alive[id]
	delete(s.alive, id)
	s.mu.Unlock()
	if !ok {
		return nil
	}
	return s.dropNow(ctx, r, id)
}

func (s *schedule) dropNow(ctx context.Context, r *store.Repo, id store.PointID) error {
	if _, err := r.Forget(ctx, []store.PointID{id}, time.Now()); err != nil {
		return fmt.Errorf("drop: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts.Dropped++
	return nil
}

func (s *schedule) collect(ctx context.Context, r *store.Repo, interrupt bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if interrupt {
		time.AfterFunc(time.Duration(s.j.n(3000))*time.Microsecond, cancel)
	}
	rep, err := r.GC(ctx, store.GCOptions{MaxLive: 0.9})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts.Collections++
	s.counts.Removed += rep.Removed
	s.counts.Copied += rep.Copied
	if rep.Pending > 0 {
		s.counts.Waited++
	}
	if interrupt && errors.Is(err, context.Canceled) {
		s.counts.Cancelled++
		return nil
	}
	if err != nil && !errors.Is(err, store.ErrIndexAnew) && !(errors.Is(err, store.ErrLocked) && s.counts.Hurt > 0) {
		return fmt.Errorf("gc: %w", err)
	}
	return nil
}

// read holds a point, if it is still there, and reads it twice with a pause.
func (s *schedule) read(ctx context.Context, r *store.Repo) error {
	s.mu.Lock()
	var id store.PointID
	var m *mosaicVM
	for id, m = range s.alive {
		break
	}
	s.mu.Unlock()
	if m == nil {
		return nil
	}
	p, release, err := r.Hold(ctx, id)
	if errors.Is(err, store.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("hold: %w", err)
	}
	defer release()
	if s.j.n(2) == 0 {
		if err := s.dropThis(ctx, r, id); err != nil {
			return err
		}
	}
	for range 3 {
		if err := sameDisk(r, p, m.data); err != nil {
			return fmt.Errorf("held point: %w", err)
		}
		s.mu.Lock()
		s.counts.Reads++
		s.mu.Unlock()
		time.Sleep(time.Duration(s.j.n(2000)) * time.Microsecond)
	}
	return nil
}

func sameDisk(r *store.Repo, p *store.Point, want []byte) error {
	img, err := r.OpenDisk(p, "disk0")
	if err != nil {
		return err
	}
	got := make([]byte, img.Size()) // whole chunks at a time, which no cache keeps
	if _, err := img.ReadAt(got, 0); err != nil && err != io.EOF {
		return err
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("%s: wrong bytes", p.Path())
	}
	return nil
}

// check reads all points that must be there, through a Repo and through one that is
// opened from the objects alone.
func (s *schedule) check(ctx context.Context) error {
	fresh, err := store.Open(ctx, s.mem, store.MemoryIndex(), store.OpenOptions{Passphrase: func() ([]byte, error) { return []byte("secret"), nil }})
	if err != nil {
		return err
	}
	defer fresh.Close()
	for name, r := range map[string]*store.Repo{"index in use": s.repos[1], "new index": fresh} {
		list, err := r.Points(ctx)
		if err != nil {
			return err
		}
		if len(list) != len(s.alive) {
			return fmt.Errorf("%s: %d points, want %d", name, len(list), len(s.alive))
		}
		for id, m := range s.alive {
			p, err := r.Point(ctx, id)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			if err := sameDisk(r, p, m.data); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		var damage error
		if _, err := r.Verify(ctx, store.VerifyOptions{ReadData: true, Damage: func(d *store.DamageError) { damage = errors.Join(damage, d) }}); err != nil || damage != nil {
			return fmt.Errorf("%s: verify: %w", name, errors.Join(err, damage))
		}
	}
	return nil
}

// minimal demands that the packs hold nothing but what the points need: with a
// threshold of 1 every pack with anything dead in it goes.
func (s *schedule) minimal(ctx context.Context) error {
	if _, err := s.repos[0].GC(ctx, store.GCOptions{MaxLive: 1}); err != nil {
		return fmt.Errorf("gc: %w", err)
	}
	if err := s.check(ctx); err != nil {
		return fmt.Errorf("with nothing dead left: %w", err)
	}
	want := map[string]bool{}
	for _, m := range s.alive {
		for i := 0; i < len(m.data); i += mosaicChunk {
			want[string(m.data[i:i+mosaicChunk])] = true
		}
	}
	rep, err := s.repos[0].GC(ctx, store.GCOptions{MaxLive: 1, DryRun: true})
	if err != nil {
		return err
	}
	if rep.Chunks != int64(len(want)) {
		return fmt.Errorf("%d chunks are live, %d are needed", rep.Chunks, len(want))
	}
	return nil
}
