package store_test

import (
	"bytes"
	"context"
	"io"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
)

// holdBucket holds the first record that is written until release is closed.
type holdBucket struct {
	*bucket.Memory
	held, release chan struct{}
	once          atomic.Bool
}

func (b *holdBucket) Create(ctx context.Context, name string) (bucket.Writer, error) {
	w, err := b.Memory.Create(ctx, name)
	return &holdWriter{w, b}, err
}

type holdWriter struct {
	bucket.Writer
	b *holdBucket
}

func (w *holdWriter) WriteAt(p []byte, off int64) (int, error) {
	if off > 0 { // behind the header
		if w.b.once.CompareAndSwap(false, true) {
			close(w.b.held)
			<-w.b.release
		}
	}
	return w.Writer.WriteAt(p, off)
}

// TestCommitWaitsForChunksOfOthers commits a point with a chunk that another
// draft has claimed and not yet placed in a pack: Commit must not return before that chunk
// is durable.
func TestCommitWaitsForChunksOfOthers(t *testing.T) {
	ctx := t.Context()
	b := &holdBucket{Memory: bucket.NewMemory(), held: make(chan struct{}), release: make(chan struct{})}
	if err := store.Init(ctx, b.Memory, store.InitOptions{ChunkSize: 64 << 10, NoEncryption: true}, time.Now()); err != nil {
		t.Fatal(err)
	}
	repo, err := store.Open(ctx, b, store.MemoryIndex(), store.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer repo.Close()
	first, shared := bytes.Repeat([]byte("a"), 64<<10), bytes.Repeat([]byte("b"), 64<<10)
	write := func(data []byte) (*store.Draft, []store.ID, error) {
		d, err := repo.NewDraft(ctx)
		if err != nil {
			return nil, nil, err
		}
		w, err := d.Writer()
		if err != nil {
			return nil, nil, err
		}
		defer w.Close()
		ids := make([]store.ID, len(data)>>16)
		_, err = w.Write(ctx, data, make([]store.ID, len(ids)), ids)
		return d, ids, err
	}
	other := make(chan error)
	go func() {
		_, _, err := write(append(bytes.Clone(first), shared...))
		other <- err
	}()
	<-b.held
	d, ids, err := write(shared)
	if err != nil {
		t.Fatal(err)
	}
	m, err := d.Map(ctx, store.Root{}, 64<<10)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Set(ctx, 0, ids[0]); err != nil {
		t.Fatal(err)
	}
	root, err := m.Finish(ctx, 64<<10)
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(100*time.Millisecond, func() { close(b.release) })
	p := &store.Point{VM: store.VM{Name: "vm"}, Disks: []store.Disk{{Name: "disk0", Size: root.Size, Root: root.Page[:]}}}
	if err := d.Commit(ctx, p); err != nil {
		t.Fatal(err)
	}
	crashed := b.Crash()
	if err := <-other; err != nil {
		t.Fatal(err)
	}
	again, err := store.Open(ctx, crashed, store.MemoryIndex(), store.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	img, err := again.OpenDisk(p, "disk0")
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(io.NewSectionReader(img, 0, img.Size()))
	if err != nil || !bytes.Equal(got, shared) {
		t.Fatalf("the committed point is not whole after a crash: %d bytes, %v", len(got), err)
	}
}
