package backup

import (
	"context"
	"io"
	"iter"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// Sizes of the pipeline. Its memory is jobsInFlight × jobBytes (or × the chunk
// size or the plan's unit where that is larger), plus twice the chunk size per worker.
const (
	jobBytes     = 1 << 20 // one read from the source
	jobsInFlight = 32
	readers      = 16
)

// job is a run of consecutive chunks on its way through the pipeline: planned,
// read, stored, put into the map. Jobs are used again.
type job struct {
	first   int64 // chunk
	n       int   // chunks
	bytes   int   // of the disk; the rest of the last chunk is padding
	buf     []byte
	parents []store.ID
	ids     []store.ID
	stored  chan struct{} // receives when ids are set
}

func wholeOf(size int64) iter.Seq2[extent.Extent, error] {
	return extent.All([]extent.Extent{{Off: 0, Len: size}})
}

// read backs up one disk after its plan.
func (r *run) read(ctx context.Context, d Disk, name string, p plan, left *leftOut) (store.Root, store.Stats, error) {
	meter := r.opt.Start(r.vm, name, d.Size())
	ranges := r.ranges(ctx, d, name, p, left)
	if p.from == nil {
		p.gone = left.of(name)
	}
	return r.write(ctx, d, d.Size(), p, ranges, meter)
}

// write stores the given ranges of src and gives the chunk map. Without p.since
// everything outside the ranges is a hole; with it, as in p.base.
//
// Four stages overlap: one goroutine plans and looks up the parent's ids, readers
// read, as many workers as there are cores hash, compress, encrypt and write, and this goroutine builds
// the map in ascending order.
func (r *run) write(ctx context.Context, src io.ReaderAt, size int64, p plan, ranges iter.Seq2[extent.Extent, error], meter Meter) (store.Root, store.Stats, error) {
	stats := store.Stats{Total: size, Data: p.data}
	var fresh atomic.Int64 // bytes in new chunks
	builder, err := r.draft.Map(ctx, p.base, size)
	if err != nil {
		return store.Root{}, stats, err
	}
	defer builder.Close(context.WithoutCancel(ctx))
	cs := r.draft.ChunkSize()
	perJob := max(1, max(jobBytes, p.unit)/cs)

	g, gctx := errgroup.WithContext(ctx)
	free := make(chan *job, jobsInFlight)
	for range jobsInFlight {
		free <- nil // made when first used
	}
	ordered, toRead, toStore := make(chan *job, jobsInFlight), make(chan *job, jobsInFlight), make(chan *job, jobsInFlight)

	g.Go(func() error { // plan
		defer close(toRead)
		defer close(ordered)
		for e, err := range extent.CoarsenUpTo(ranges, int64(cs), int64(perJob*cs), size) {
			if err != nil {
				return err
			}
			end := (e.End() + int64(cs) - 1) / int64(cs)
			for i := e.Off / int64(cs); i < end; {
				var j *job
				select {
				case j = <-free:
				case <-gctx.Done():
					return gctx.Err()
				}
				if j == nil {
					j = &job{buf: make([]byte, perJob*cs), parents: make([]store.ID, perJob), ids: make([]store.ID, perJob), stored: make(chan struct{}, 1)}
				}
				j.first, j.n = i, int(min(int64(perJob), end-i))
				j.bytes = int(min(int64(j.n*cs), size-i*int64(cs)))
				clear(j.parents)
				if p.base != nil {
					if err := p.base.IDs(gctx, i, j.parents[:j.n]); err != nil {
						return err
					}
				}
				ordered <- j
				toRead <- j
				i += int64(j.n)
			}
		}
		return nil
	})

	// Each reader's error ends the group at once: the others may wait for jobs that are
	// only made when those before the failed one are done.
	var reading sync.WaitGroup
	for range readers {
		reading.Add(1)
		g.Go(func() error {
			defer reading.Done()
			for j := range toRead {
				if err := (exactReader{src}).ReadAt(j.buf[:j.bytes], j.first*int64(cs)); err != nil {
					return err
				}
				clear(j.buf[j.bytes : j.n*cs])
				select {
				case toStore <- j:
				case <-gctx.Done():
					return gctx.Err()
				}
			}
			return nil
		})
	}
	g.Go(func() error {
		reading.Wait()
		close(toStore)
		return nil
	})

	for range runtime.GOMAXPROCS(0) {
		g.Go(func() error {
			w, err := r.draft.Writer()
			if err != nil {
				return err
			}
			defer w.Close()
			for j := range toStore {
				n, err := w.Write(gctx, j.buf[:j.n*cs], j.parents[:j.n], j.ids[:j.n])
				if err != nil {
					return err
				}
				fresh.Add(n.New)
				meter.fresh(n.New)
				j.stored <- struct{}{}
			}
			return nil
		})
	}

	g.Go(func() error { // map
		next := int64(0) // first chunk not settled yet
		gone := newPuncher(builder, p, int64(cs))
		defer gone.stop()
		defer p.told.follow(p.gone)()
		settle := func(to int64) error {
			if p.since == "" {
				if err := builder.Punch(gctx, next, to); err != nil {
					return err
				}
				if err := p.told.passed(gctx, next, to); err != nil {
					return err
				}
			} else if err := gone.upTo(gctx, to); err != nil {
				return err
			}
			meter.done(min(to*int64(cs), size) - min(next*int64(cs), size))
			next = to
			return nil
		}
		for j := range ordered {
			select {
			case <-j.stored:
			case <-gctx.Done():
				return gctx.Err()
			}
			if err := settle(j.first); err != nil {
				return err
			}
			if err := builder.Set(gctx, j.first, j.ids[:j.n], j.parents[:j.n]); err != nil {
				return err
			}
			p.told.saw(j.first, j.ids[:j.n], j.parents[:j.n])
			for k, id := range j.ids[:j.n] {
				if !id.IsZero() {
					stats.Data += int64(cs)
				}
				if p.since != "" && !j.parents[k].IsZero() {
					stats.Data -= int64(cs) // counted in p.data
				}
			}
			stats.Read += int64(j.bytes)
			meter.done(int64(j.bytes))
			next = j.first + int64(j.n)
			free <- j
		}
		if gctx.Err() != nil {
			return gctx.Err()
		}
		err := settle((size + int64(cs) - 1) / int64(cs))
		stats.Data -= gone.data
		return err
	})
	before := r.draft.Stored()
	if err := g.Wait(); err != nil {
		return store.Root{}, stats, err
	}
	root, err := builder.Finish(ctx, size)
	stats.New, stats.Stored = fresh.Load(), r.draft.Stored()-before
	return root, stats, err
}
