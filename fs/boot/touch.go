package boot

import (
	"context"
	"encoding/binary"
	"errors"
	"iter"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// A VM reads nearly the same chunks each time it boots: which ones is kept as a note on the VM and read ahead of
// it at the next boot of any of its points.

const (
	// CacheBytes is how much of what a session has read of the repository is kept decoded, bytes.
	CacheBytes = 256 << 20
	// touchTime is for how long the chunks that a boot touches are written down.
	touchTime = 5 * time.Minute
	// maxTouched bounds them.
	maxTouched = 1 << 16
	// ahead is how many chunks are read at a time: of a slow store as many as it takes.
	ahead    = 16
	noteKind = "boot"
)

// touched is a chunk of a disk.
type touched struct {
	disk  uint32 // number of the disk
	chunk int64
}

// recorder writes down which chunks are touched, in order. Safe for concurrent use.
type recorder struct {
	until time.Time

	mu   sync.Mutex // guards following
	seen map[touched]bool
	list []touched
}

func (r *recorder) touch(disk uint32, first, last int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.list) >= maxTouched || time.Now().After(r.until) {
		return
	}
	for c := first; c <= last; c++ {
		t := touched{disk, c}
		if !r.seen[t] {
			r.seen[t] = true
			r.list = append(r.list, t)
		}
	}
}

func (r *recorder) touches() []touched {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.list[:len(r.list):len(r.list)]
}

// touchedImage is a disk of the point, read through the session's cache.
type touchedImage struct {
	*store.CachedImage
	disk uint32
	rec  *recorder
}

func (i *touchedImage) ReadAt(p []byte, off int64) (int, error) {
	if n := int64(len(p)); n > 0 && off >= 0 {
		cs := int64(i.ChunkSize())
		i.rec.touch(i.disk, off/cs, (off+n-1)/cs)
	}
	return i.CachedImage.ReadAt(p, off)
}

// AllocatedFrom is that of the image.
func (i *touchedImage) AllocatedFrom(off, granularity int64) iter.Seq2[extent.Extent, error] {
	return i.Image.AllocatedFrom(off, granularity)
}

// replay reads what the last boot touched, until ctx ends or that is done.
func (s *Session) replay(ctx context.Context) {
	list, chunk, err := s.lastTouched(ctx)
	if err != nil || chunk != s.repo.ChunkSize() {
		return
	}
	list = list[:min(len(list), CacheBytes*3/4/chunk)]
	work := make(chan touched)
	var g sync.WaitGroup
	for range ahead {
		g.Go(func() {
			for t := range work {
				s.images[t.disk].PrefetchChunk(ctx, t.chunk)
			}
		})
	}
	for _, t := range list {
		if ctx.Err() != nil {
			break
		}
		if int(t.disk) < len(s.images) {
			work <- t
		}
	}
	close(work)
	g.Wait()
}

// The note is: version u8, chunk size u32, then for each chunk the disk and the difference to
// the chunk before, varints.
const noteVersion = 1

var errNote = errors.New("boot: the list of blocks is damaged")

func encodeTouched(list []touched, chunk int) []byte {
	b := binary.LittleEndian.AppendUint32([]byte{noteVersion}, uint32(chunk))
	last := int64(0)
	for _, t := range list {
		b = binary.AppendUvarint(b, uint64(t.disk))
		b = binary.AppendVarint(b, t.chunk-last)
		last = t.chunk
	}
	return b
}

func decodeTouched(b []byte) (list []touched, chunk int, err error) {
	if len(b) < 5 || b[0] != noteVersion {
		return nil, 0, errNote
	}
	chunk, b = int(binary.LittleEndian.Uint32(b[1:])), b[5:]
	last := int64(0)
	for len(b) > 0 {
		disk, n := binary.Uvarint(b)
		if n <= 0 || disk > 1<<16 {
			return nil, 0, errNote
		}
		step, m := binary.Varint(b[n:])
		last += step
		if m <= 0 || last < 0 || len(list) == maxTouched {
			return nil, 0, errNote
		}
		list = append(list, touched{uint32(disk), last})
		b = b[n+m:]
	}
	return list, chunk, nil
}

func (s *Session) lastTouched(ctx context.Context) ([]touched, int, error) {
	b, err := s.repo.Note(ctx, noteKind, s.point.VM.Name)
	if err != nil {
		return nil, 0, err
	}
	return decodeTouched(b)
}

// saveTouched keeps what this boot touched, unless it was cut short: then the list of the one before is
// better. A repository that cannot be written goes without.
func (s *Session) saveTouched(ctx context.Context) error {
	list := s.rec.touches()
	before, chunk, err := s.lastTouched(ctx)
	if err == nil && chunk == s.repo.ChunkSize() && len(list) < len(before)/2 {
		return nil
	}
	if len(list) == 0 {
		return nil
	}
	return s.repo.SetNote(ctx, noteKind, s.point.VM.Name, encodeTouched(list, s.repo.ChunkSize()))
}
